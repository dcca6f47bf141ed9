#!/usr/bin/env python
"""The command `noprop evaluate`."""

from noprop_hf.commands.evaluate import main


if __name__ == "__main__":
    main()
