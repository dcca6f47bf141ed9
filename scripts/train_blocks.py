#!/usr/bin/env python
"""Phase 2: train all denoising blocks, or some of them, beside a table that phase 1 made.

python scripts/train_blocks.py recipes/demo.yaml --blocks 0,2-3
"""

from noprop_hf.arguments import parse_recipe
from noprop_hf.training import train_blocks


def main() -> None:
    recipe = parse_recipe(__doc__)
    train_blocks(recipe.data, recipe.blocks, recipe.training, recipe.model)


if __name__ == "__main__":
    main()
