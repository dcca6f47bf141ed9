"""Run a whole recipe: pretrain the table, train all blocks, evaluate, and write samples.

%(prog)s recipes/demo.yaml --dry_run    # plan the run without training
%(prog)s recipes/demo.yaml
%(prog)s recipes/demo.yaml --max_steps 1000 --output_dir runs/longer
accelerate launch -m noprop_hf train recipes/demo.yaml
%(prog)s recipes/demo.yaml --push_to_hub true --hub_model_id user/name --license apache-2.0
"""

import time
from pathlib import Path

from ..evaluation import report
from ..hub import check_sharing, files_left_out, files_to_push, push_model, write_card
from ..layout import RESULTS_FILE, lock_file
from ..meeting_place import meeting_place
from ..model_directory import missing_blocks
from ..parallel import hold_lock
from ..planning import plan
from ..pretraining import pretrain_embeddings
from ..recipes import Recipe, entry_point, parse_recipe
from ..tracking import track_results
from ..training import train_blocks


@entry_point
def main() -> None:
    begin = time.time()
    recipe = parse_recipe(__doc__)
    training = recipe.training
    check_sharing(training)
    if recipe.run.dry_run:
        print(plan(recipe))
        return
    place = meeting_place(training)
    if place is not None and training.should_save:
        place.prepare(training.hub_private_repo)
    pretrain_embeddings(recipe.model, recipe.data, recipe.pretraining, training, recipe.blocks)
    directory = train_blocks(recipe.data, recipe.blocks, training, recipe.model)
    missing = missing_blocks(directory)
    if missing:
        print(f"{directory} still lacks {', '.join(missing)}: this process does not evaluate the model.")
        return

    def is_evaluated() -> bool:  # by another process of this launch
        results = directory / RESULTS_FILE
        return results.is_file() and results.stat().st_mtime > begin

    with hold_lock(lock_file(directory, "evaluation"), training, is_evaluated) as is_ours:
        if is_ours and training.should_save:
            finish(recipe, directory)


def finish(recipe: Recipe, directory: Path) -> None:
    """Evaluate the finished model, and upload it if `push_to_hub` is set."""
    training = recipe.training
    print(report(directory, recipe.data, recipe.blocks, training.per_device_eval_batch_size, training.seed))
    track_results(training, directory)
    place = meeting_place(training)
    if place is not None:
        place.prepare(training.hub_private_repo, place.patience)  # other workers may have published since
        write_card(directory, training.hub_model_id, recipe.share.license, recipe.share.language)
        left_out = files_left_out(directory, files_to_push(directory))
        if left_out:
            print(f"Not uploaded, as they are not part of the model: {', '.join(left_out)}")
        private, token = training.hub_private_repo, training.hub_token
        url = push_model(directory, training.hub_model_id, private, token, update=True, patience=place.patience)
        print(f"Uploaded: {url}")
