#!/usr/bin/env python
"""The command `noprop status`."""

from noprop_hf.commands.status import main


if __name__ == "__main__":
    main()
