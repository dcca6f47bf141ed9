#!/usr/bin/env python
"""The command `noprop train-blocks`."""

from noprop_hf.commands.train_blocks import main


if __name__ == "__main__":
    main()
