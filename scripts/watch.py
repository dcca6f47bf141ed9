#!/usr/bin/env python
"""The command `noprop watch`."""

from noprop_hf.commands.watch import main


if __name__ == "__main__":
    main()
