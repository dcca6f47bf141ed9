"""Phase 2: train all or some denoising blocks, given the table of phase 1.

%(prog)s recipes/demo.yaml --blocks 0,2-3
accelerate launch -m noprop_hf train-blocks recipes/demo.yaml

Independent workers share a repository of the Hub: each downloads the table from it and publishes its blocks there:

%(prog)s recipes/demo.yaml --blocks 3 --push_to_hub true --hub_model_id user/name
"""

from ..hub import check_sharing
from ..meeting_place import meeting_place
from ..recipes import entry_point, parse_recipe
from ..training import train_blocks


@entry_point
def main() -> None:
    recipe = parse_recipe(__doc__)
    if recipe.run.dry_run:
        raise SystemExit("`noprop plan` forecasts both phases at once: use it instead of --dry_run.")
    check_sharing(recipe.training)
    train_blocks(recipe.data, recipe.blocks, recipe.training, recipe.model, meeting_place(recipe.training))
