"""Names of the files and folders in a model directory that are not part of the model.

Those of the model itself stand in `shards_noprop.py`.
"""

from pathlib import Path


CORPUS_FILE = "corpus.yaml"  # the data arguments that the model was trained with
RESULTS_FILE = "results.json"  # the figures of the evaluation
LOGS_FOLDER = "runs"  # of TensorBoard
CHECKPOINTS_FOLDER = "checkpoints"  # checkpoints and locks of trainings


def block_name(block_index: int) -> str:
    """The name of a block in folders and files, such as `block-03`."""
    return f"block-{block_index:02d}"


def checkpoint_folder(directory: Path, name: str) -> Path:
    """The folder that holds the checkpoints of one training: of a block, or of phase 1."""
    return directory / CHECKPOINTS_FOLDER / name


def lock_file(directory: Path, name: str) -> Path:
    """The file whose lock a process holds while it does a piece of work."""
    return directory / CHECKPOINTS_FOLDER / f"{name}.lock"
