#!/usr/bin/env python
"""The command `noprop generate`."""

from noprop_hf.commands.generate import main


if __name__ == "__main__":
    main()
