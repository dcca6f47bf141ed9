#!/usr/bin/env python
"""The command `noprop plot`."""

from noprop_hf.commands.plot import main


if __name__ == "__main__":
    main()
