#!/usr/bin/env python
"""The command `noprop plan`."""

from noprop_hf.commands.plan import main


if __name__ == "__main__":
    main()
