"""Sharing a model directory on the Hub: its files, its card, and the commit."""

import json
import math
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import yaml
from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from transformers.utils import CONFIG_NAME

from .arguments import CORPUS_FILE, one_line
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


def check_repo_id(repo_id: str) -> None:
    """Make sure that a repository can have this name.

    Raises:
        ValueError: it cannot.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no name of a repository: write it as user/name.") from error


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
        ConnectionError: the Hub cannot be reached, or refuses for another reason.
        ValueError: `repo_id` is no name of a repository.
    """
    check_repo_id(repo_id)
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
        raise ConnectionError(f"The Hub refused {repo_id}: {one_line(error)}") from error
    except (HTTPError, OfflineModeIsEnabled) as error:
        raise ConnectionError(
            f"The Hub cannot be reached ({one_line(error)}). Nothing of {repo_id} is visible there; run this again "
            "with a connection, and without HF_HUB_OFFLINE."
        ) from error
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
        has_plot=find_spec("matplotlib") is not None,
    )


def card_files(
    directory: Path, repo_id: str, template: Path, license: str | None, language: str | None
) -> dict[str, bytes]:
    """The card of an evaluated model directory, with its picture where matplotlib is installed, by file name.

    Raises:
        ValueError: what training and evaluation left there cannot be read.
    """
    files = {}
    try:
        if find_spec("matplotlib") is not None:
            from .plotting import bound_figure  # matplotlib comes with the extra `plot`

            with BytesIO() as picture:
                bound_figure(directory).savefig(picture, format="png", dpi=120)
                files[PLOT_NAME] = picture.getvalue()
        card = model_card(directory, repo_id, template, license, language)
    except (OSError, KeyError, json.JSONDecodeError, yaml.YAMLError) as error:
        raise ValueError(
            f"{RESULTS_FILE}, {CORPUS_FILE} or the metadata of a block in {directory} are missing or damaged, so no "
            f"card can be made ({one_line(error)}). Run scripts/train.py again, or remove {RESULTS_FILE}."
        ) from error
    return {CARD_NAME: str(card).encode(), **files}


def write_card(directory: Path, repo_id: str, template: Path, license: str | None, language: str | None) -> None:
    """Write the card of an evaluated model directory."""
    for name, content in card_files(directory, repo_id, template, license, language).items():
        (directory / name).write_bytes(content)
