"""Names of the files and folders in a model directory that are not part of the model.

The names of the model's own files are in `shards_noprop.py`.
"""

from pathlib import Path


CORPUS_FILE = "corpus.yaml"  # the data arguments that the model was trained with
RESULTS_FILE = "results.json"  # the results of the evaluation
LOGS_FOLDER = "runs"  # the logs of TensorBoard
CHECKPOINTS_FOLDER = "checkpoints"  # the checkpoints and locks of phase 1 and the blocks


def block_name(block_index: int) -> str:
    """Return the name of a block in folders and files, such as `block-03`."""
    return f"block-{block_index:02d}"


def checkpoint_folder(directory: Path, name: str) -> Path:
    """Return the folder with the checkpoints of a block or of phase 1."""
    return directory / CHECKPOINTS_FOLDER / name


def lock_file(directory: Path, name: str) -> Path:
    """Return the file that a process locks while it trains a block or runs phase 1."""
    return directory / CHECKPOINTS_FOLDER / f"{name}.lock"
