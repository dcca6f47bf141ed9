"""The plan of a run of `noprop train`: data, model, steps, memory, time and disk. Nothing is trained.

%(prog)s recipes/demo.yaml
%(prog)s recipes/demo.yaml --num_blocks 8 --hidden_size 256
"""

import sys

from ..hub import check_sharing
from ..planning import plan
from ..recipes import entry_point, parse_recipe


@entry_point
def main() -> None:
    recipe = parse_recipe(__doc__, [*sys.argv[1:], "--dry_run"])
    check_sharing(recipe.training)
    print(plan(recipe))
