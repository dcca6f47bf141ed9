#!/usr/bin/env python
"""The command `noprop train`."""

from noprop_hf.commands.train import main


if __name__ == "__main__":
    main()
