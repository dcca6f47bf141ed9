"""Sharing a model directory on the Hub: its files, its card, and the commit."""

import json
import math
from importlib.util import find_spec
from pathlib import Path

import yaml
from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError
from transformers.utils import CONFIG_NAME

from .arguments import CORPUS_FILE
from .configuration_noprop import NoPropConfig
from .evaluation import MODEL_ROW, RESULTS_FILE
from .model_directory import read_metadata
from .shards_noprop import EMBEDDINGS_SHARD, MASKED_LM_FOLDER, block_shard, damaged_shards, missing_shards


CARD_NAME = "README.md"
PLOT_NAME = "bound.png"
SHARED_FILES = ("*.safetensors", "*.json", "*.py", "*.jinja", "*.txt", "*.model", CORPUS_FILE, CARD_NAME, PLOT_NAME)


def files_to_push(directory: Path) -> dict[str, Path]:
    """The files of a model directory that make up the model, by their path in the repository; no checkpoints.

    Raises:
        FileNotFoundError: the directory holds no model, or one whose blocks are not all there and whole.
    """
    if not (directory / EMBEDDINGS_SHARD).is_file():
        raise FileNotFoundError(f"{directory} holds no model: there is no {EMBEDDINGS_SHARD}.")
    missing = missing_shards(directory)
    if missing:
        raise FileNotFoundError(f"{directory} is not fully trained: {', '.join(missing)} missing.")
    damaged = damaged_shards(directory)
    if damaged:
        raise FileNotFoundError(
            f"Weights in {directory} are corrupted: {', '.join(damaged)}. Train these blocks again."
        )
    return _shared_files(directory)


def files_of_phase_1(directory: Path) -> dict[str, Path]:
    """The same without blocks, for a model whose blocks are trained elsewhere."""
    return {name: path for name, path in _shared_files(directory).items() if not name.startswith("block-")}


def _shared_files(directory: Path) -> dict[str, Path]:
    files = {}
    for folder in (directory, directory / MASKED_LM_FOLDER):
        for pattern in SHARED_FILES:
            for path in sorted(folder.glob(pattern)):
                files[path.relative_to(directory).as_posix()] = path
    return files


def push_model(
    directory: Path,
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    update: bool = False,
    commit_message: str = "Upload NoProp model",
) -> str:
    """Create a repository of the Hub and upload a model directory, all in one commit.

    When it fails on the way, nothing is visible on `main`, and a second call sends only what has not arrived.

    Args:
        repo_id: `user/name`.
        private: whether to create the repository as private.
        token: access token; that of `hf auth login` when not given.
        update: whether to commit to a repository that holds a model already.

    Returns:
        The address of the commit.

    Raises:
        FileExistsError: the repository holds a model, and `update` is not given.
        PermissionError: there is no token, or it does not allow to write there.
    """
    files = files_to_push(directory)
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        head = api.repo_info(repo_id)
        if not update and any(sibling.rfilename == CONFIG_NAME for sibling in head.siblings or []):
            raise FileExistsError(
                f"{repo_id} holds a model already. Use --update to commit this one over it, or choose another name."
            )
        operations = [CommitOperationAdd(name, path) for name, path in files.items()]
        # Of the commit we have seen, so that a push that happened meanwhile is told and not overwritten.
        commit = api.create_commit(repo_id, operations, commit_message=commit_message, parent_commit=head.sha)
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise PermissionError(
                f"The Hub does not let you write to {repo_id}. Log in with `hf auth login`, or pass a token that may "
                "write there with --token."
            ) from error
        raise
    return commit.commit_url


def model_card(
    directory: Path,
    repo_id: str,
    template: Path,
    license: str | None = None,
    language: str | None = None,
) -> ModelCard:
    """The card of a model directory, from a template and from what training and evaluation left there.

    Args:
        repo_id: where the model will be found.
        template: `model_card.md` of the project.
        license: licence of the model, by its identifier on the Hub.
        language: language of the text, by its ISO 639-1 code.
    """
    config = NoPropConfig.from_pretrained(directory)
    corpus = yaml.safe_load((directory / CORPUS_FILE).read_text(encoding="utf-8"))
    results = json.loads((directory / RESULTS_FILE).read_text(encoding="utf-8"))
    shards = [read_metadata(directory / block_shard(block)) for block in range(config.num_blocks)]
    dataset = corpus.get("dataset_name") or "local files"
    base_model = read_metadata(directory / EMBEDDINGS_SHARD).get("embeddings_from")
    nats = results["nats_per_token"]
    splits = list(nats[MODEL_ROW])
    evaluations = [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=split,
            metric_type=metric,
            metric_name=name,
            metric_value=round(value, 4),
        )
        for split in splits
        for metric, name, value in (
            ("nats_per_token", "Nats per token", nats[MODEL_ROW][split]),
            ("perplexity", "Perplexity", math.exp(nats[MODEL_ROW][split])),
        )
    ]
    name = repo_id.split("/")[-1]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=license,
        language=language,
        datasets=[dataset] if "/" in dataset and not Path(dataset).exists() else None,
        base_model=base_model if base_model and not Path(base_model).exists() else None,
        tags=["noprop", "denoising", "block-wise-training"],
        model_name=name,
        eval_results=evaluations,
    )
    return ModelCard.from_template(
        data,
        template_path=str(template),
        model_name=name,
        model_id=repo_id,
        config=config,
        dataset=dataset,
        base_model=base_model,
        table=results["table"],
        block_nats=results["details"][splits[-1]]["block_nats"],
        samples=results["samples"],
        shards=shards,
        has_plot=(directory / PLOT_NAME).is_file(),
    )


def write_card(directory: Path, repo_id: str, template: Path, license: str | None, language: str | None) -> None:
    """Write the card of an evaluated model directory, with its picture where matplotlib is installed."""
    if find_spec("matplotlib") is not None:
        from .plotting import bound_figure  # matplotlib comes with the extra `plot`

        bound_figure(directory).savefig(directory / PLOT_NAME, dpi=120)
    model_card(directory, repo_id, template, license, language).save(directory / CARD_NAME)
