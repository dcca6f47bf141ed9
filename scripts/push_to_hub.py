#!/usr/bin/env python
"""The command `noprop push`."""

from noprop_hf.commands.push import main


if __name__ == "__main__":
    main()
