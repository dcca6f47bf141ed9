"""Phase 1: create the frozen embedding table and the model directory.

%(prog)s recipes/demo.yaml
accelerate launch -m noprop_hf pretrain recipes/demo.yaml --push_to_hub true --hub_model_id user/name
"""

from ..hub import check_sharing
from ..meeting_place import meeting_place
from ..pretraining import pretrain_embeddings
from ..recipes import entry_point, parse_recipe


@entry_point
def main() -> None:
    recipe = parse_recipe(__doc__, parallelism="data")
    if recipe.run.dry_run:
        raise SystemExit("`noprop plan` forecasts both phases at once: use it instead of --dry_run.")
    check_sharing(recipe.training)
    place = meeting_place(recipe.training)
    if place is not None and recipe.training.should_save:
        place.prepare(recipe.training.hub_private_repo)
    pretrain_embeddings(recipe.model, recipe.data, recipe.pretraining, recipe.training, recipe.blocks)
    if place is not None and recipe.training.should_save:
        place.publish_table(recipe.training.hub_private_repo)
