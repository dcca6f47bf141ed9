#!/usr/bin/env python
"""The command `noprop pretrain`."""

from noprop_hf.commands.pretrain import main


if __name__ == "__main__":
    main()
