#!/usr/bin/env python
"""Phase 1: make the frozen embedding table and the model directory around it.

python scripts/pretrain_embeddings.py recipes/demo.yaml
"""

from noprop_hf.arguments import parse_recipe
from noprop_hf.training import pretrain_embeddings


def main() -> None:
    recipe = parse_recipe(__doc__, parallelism="data")
    pretrain_embeddings(recipe.model, recipe.data, recipe.pretraining, recipe.training)


if __name__ == "__main__":
    main()
