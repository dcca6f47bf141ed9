"""Upload a model directory to the Hub: its files, its card, requests with retries, and the commit."""

import hashlib
import json
import math
import random
import re
import time
from collections.abc import Callable, Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from huggingface_hub import (
    CommitOperationAdd,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    constants,
    get_session,
    get_token,
    is_offline_mode,
    set_client_factory,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo, RepoSibling
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils._http import default_client_factory
from huggingface_hub.utils.sha import git_hash
from transformers import TrainingArguments
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from . import __version__
from .arguments import PACKAGE, is_users, one_line
from .configuration_noprop import NoPropConfig
from .data import load_tokenizer
from .evaluation import MODEL_ROW, perplexity
from .layout import CORPUS_FILE, RESULTS_FILE
from .model_directory import read_config, read_metadata
from .modeling_noprop import NoPropForCausalLM, weight_shapes
from .shards_noprop import EMBEDDINGS_SHARD, PRETRAINING_FOLDERS, block_shard, index_fault, model_fault


logger = logging.get_logger(__name__)

CARD_NAME = "README.md"
PLOT_NAME = "bound.png"
LOCAL_SOURCE = "local "  # a hash follows
CODE_NAMES = sorted(path.name for path in PACKAGE.glob("*_noprop.py"))
CODE_FILES = (*CODE_NAMES, *(f"{folder}/{name}" for folder in PRETRAINING_FOLDERS for name in CODE_NAMES))
# Files of all stock tokenizers: common ones, and vocabularies.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.txt", "vocab.json", "merges.txt", "bpe.codes", "dict.txt", "spiece.model", "spm.model", "spm_char.model"),
    *("tokenizer.model", "sentencepiece.model", "sentencepiece.bpe.model", "source.spm", "target.spm"),
)
PRETRAINING_FILES = tuple(
    f"{folder}/{name}"
    for folder in PRETRAINING_FOLDERS
    for name in (CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_NAME)
)
# Files of phase 1 that a worker needs, except the table.
PHASE_1_FILES = (
    *(CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, *TOKENIZER_FILES, CORPUS_FILE, *PRETRAINING_FILES),
)
SHARED_FILES = {EMBEDDINGS_SHARD, *PHASE_1_FILES, *CODE_FILES, RESULTS_FILE, CARD_NAME, PLOT_NAME}

TRANSIENT = (408, 409, 412, 425, 429, 500, 502, 503, 504)
# The Hub's answer, with status 400, if a proxy answered an upload, which never reached the Hub.
LOST_UPLOAD = "LFS pointer pointed to a file that does not exist"
# Errors of the client over answers that are not the Hub's, such as the page of a captive portal.
WRONG_ANSWERS = (ValueError, LookupError, TypeError, AttributeError, AssertionError)
LONGEST_PAUSE = 300.0  # seconds between two attempts, even if the Hub asks for more
Result = TypeVar("Result")


# --- files ------------------------------------------------------------------------------------------------------------


def files_to_push(directory: Path) -> dict[str, Path]:
    """Return the files of the model in a directory, and no others, by their path in the repository.

    Raises:
        FileNotFoundError: if the directory holds no model, or a block is missing or damaged.
        ValueError: if the tokenizer is missing or belongs to another model, or `corpus.yaml` is damaged.
    """
    if not (directory / EMBEDDINGS_SHARD).is_file():
        raise FileNotFoundError(f"{directory} holds no model: {EMBEDDINGS_SHARD} is missing.")
    config = read_config(directory)
    shapes = weight_shapes(config)
    fault = model_fault(directory, config, shapes) or index_fault(directory, shapes)
    if fault is not None:
        raise FileNotFoundError(f"{directory} {fault}.")
    load_tokenizer(str(directory), config.vocab_size)  # raises if it does not fit, as does the next check
    if (directory / CORPUS_FILE).is_file():
        _read_corpus(directory / CORPUS_FILE)
    return _existing(directory, SHARED_FILES | {block_shard(index) for index in range(config.num_blocks)})


def files_of_phase_1(directory: Path) -> dict[str, Path]:
    """Return the files of phase 1, by their path in the repository, for blocks that are trained elsewhere."""
    return _existing(directory, {EMBEDDINGS_SHARD, *PHASE_1_FILES, *CODE_FILES})


def _existing(directory: Path, names: set[str]) -> dict[str, Path]:
    return {name: directory / name for name in sorted(names) if (directory / name).is_file()}


def files_left_out(directory: Path, files: dict[str, Path]) -> list[str]:
    """List the other files and folders in a model directory."""
    paths = [
        path for folder in (directory, *(directory / name for name in PRETRAINING_FOLDERS)) for path in folder.glob("*")
    ]
    names = [path.relative_to(directory).as_posix() + "/" * path.is_dir() for path in paths]
    return sorted(set(names) - set(files) - {f"{folder}/" for folder in PRETRAINING_FOLDERS})


def operation(name: str, path: Path) -> CommitOperationAdd:
    """Create the upload of a file of a model directory, without the local paths in `corpus.yaml`."""
    return CommitOperationAdd(name, _public_corpus(path) if name == CORPUS_FILE else path)


def _read_corpus(path: Path) -> dict[str, Any]:
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, yaml.YAMLError):
        fields = None
    if not isinstance(fields, dict) or any(isinstance(value, list | dict) for value in fields.values()):
        raise ValueError(f"{path} is damaged: it must be a YAML file of `name: value` lines.")
    return fields


def _public_corpus(path: Path) -> bytes:
    fields = _read_corpus(path)
    private = {name for name in fields if name.endswith("_file")}
    if is_local(fields.get("dataset_name")):
        private.add("dataset_name")
    return yaml.safe_dump({k: v for k, v in fields.items() if k not in private}, sort_keys=False).encode()


def is_local(name_or_path: str | None) -> bool:
    """Whether a name is, or looks like, a local path instead of a name on the Hub."""
    if name_or_path is None:
        return False
    try:
        validate_repo_id(name_or_path)
    except HFValidationError:
        return True
    return Path(name_or_path).exists()


# --- the network ------------------------------------------------------------------------------------------------------


def check_repo_id(repo_id: str) -> None:
    """Check the name of a repository.

    Raises:
        ValueError: if `repo_id` is not a valid name.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is not the name of a repository: write it as user/name.") from error
    if "/" not in repo_id:
        raise ValueError(f"{repo_id!r} is not the name of a repository: write it as user/name.")


def check_sharing(training_args: TrainingArguments) -> None:
    """Check, without the network, that a run can push to its repository.

    Raises:
        ConnectionError: if `HF_HUB_OFFLINE` is set.
        PermissionError: if the token is missing or malformed.
        ValueError: if `hub_model_id` is not a valid name.
    """
    if not training_args.push_to_hub:
        return
    check_repo_id(training_args.hub_model_id)
    token = training_args.hub_token or get_token()
    if token is None:
        raise PermissionError(
            "--push_to_hub needs an access token: log in with `hf auth login`, or pass one with --hub_token."
        )
    if not re.fullmatch(r"[!-~]+", token):
        raise PermissionError(
            "The access token is malformed: it contains spaces or characters that no token has. Log in with "
            "`hf auth login`, or pass another one with --hub_token."
        )
    if is_offline_mode():
        raise ConnectionError("--push_to_hub needs the Hub: unset HF_HUB_OFFLINE, or leave --push_to_hub out.")


class Repository:
    """A repository of the Hub whose failed requests are retried.

    From the first attempt on, all requests of `huggingface_hub` in this process have a timeout, and wait at most
    `LONGEST_PAUSE` if the Hub asks to wait. Times are those of the Hub's clock, as clocks of workers may be wrong.

    Args:
        repo_id: `user/name`.
        token: access token; default: that of `hf auth login`.
        patience: seconds for which failed requests are retried. With 0, only the client itself retries some requests.
        timeout: seconds without data after which a request fails.
    """

    def __init__(self, repo_id: str, token: str | None = None, patience: float = 0, timeout: float = 30):
        self.repo_id, self.patience, self.timeout = repo_id, patience, timeout
        self.api = HfApi(token=token)
        self._deadline = math.inf
        self._clock_lead = time.time() - time.monotonic()

    def now(self) -> float:
        """Return the time of the Hub's clock, in seconds since 1970."""
        return time.monotonic() + self._clock_lead

    def _client(self) -> Any:
        client = default_client_factory()
        client.event_hooks["request"].append(self._before)
        client.event_hooks["response"].append(self._after)
        return client

    def _before(self, request: Any) -> None:
        if time.monotonic() > self._deadline:
            raise TimeoutError(f"{self.repo_id} could not be reached on the Hub within the time limit.")
        given = request.extensions.get("timeout", {})
        kinds = ("connect", "read", "write", "pool")
        request.extensions["timeout"] = {kind: given.get(kind) or self.timeout for kind in kinds}

    def _after(self, response: Any) -> None:
        response.headers.pop("RateLimit", None)  # the client would wait for any time in it
        longest = max(0, min(LONGEST_PAUSE, self._deadline - time.monotonic()))
        asked = response.headers.get("Retry-After", "").strip()
        if asked and not (asked.isascii() and asked.isdecimal() and len(asked) < 9 and int(asked) <= longest):
            response.headers["Retry-After"] = str(int(longest))
        if "/api/" in response.request.url.path:  # downloads may come from a cache, with an old date
            try:
                date = parsedate_to_datetime(response.headers["Date"]).replace(tzinfo=UTC)
                self._clock_lead = date.timestamp() - time.monotonic()
            except (KeyError, ValueError):
                pass  # an answer without a time

    def insist(self, attempt: Callable[[], Result], patience: float | None = None) -> Result:
        """Retry until an attempt succeeds, with growing pauses, as long as errors may be temporary.

        Args:
            attempt: the requests; it may be called several times.
            patience: overrides that of the repository.

        Raises:
            ConnectionError: if the Hub cannot be reached, or refuses the request.
            PermissionError: if the token does not allow the request.
            RepositoryNotFoundError: if the repository does not exist.
        """
        patience = self.patience if patience is None else patience
        end, wait, reason = time.monotonic() + patience, 1.0, ""
        if self._before not in get_session().event_hooks["request"]:
            set_client_factory(self._client)
        while True:
            self._deadline = end if patience else math.inf
            try:
                return attempt()
            except (HTTPError, OSError, RuntimeError, *WRONG_ANSWERS) as error:
                self._deadline = math.inf
                cause = _cause(error)
                self._raise_if_lasting(cause)
                left = end - time.monotonic()
                reason = reason if reason and isinstance(cause, TimeoutError) else _words(cause)
                if left <= 0:
                    raise ConnectionError(
                        f"The Hub cannot be reached, or answers wrongly ({reason}). Files that are not yet in "
                        f"{self.repo_id} are kept here; run this again with a connection."
                    ) from error
                response = getattr(cause, "response", None)
                asked = "" if response is None else response.headers.get("Retry-After", "")  # see `_after`
                pause = min(float(asked) if asked else wait * random.uniform(0.5, 1), left)
                logger.warning(f"{self.repo_id}: {reason}; retrying in {pause:.1f} s.")
                time.sleep(pause)
                wait = min(2 * wait, LONGEST_PAUSE)
            finally:
                self._deadline = math.inf

    def _raise_if_lasting(self, error: BaseException) -> None:
        """Raise errors that a retry cannot resolve."""
        if isinstance(error, OfflineModeIsEnabled) or isinstance(error.__cause__, OfflineModeIsEnabled):
            raise ConnectionError(
                f"The Hub cannot be reached: HF_HUB_OFFLINE is set. Unset it, and run this again for {self.repo_id}."
            ) from error
        if isinstance(error, TimeoutError):
            return
        if isinstance(error, Exception) and is_users(error):
            raise error
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise error  # an error of a file, not of the network
        if not isinstance(error, HfHubHTTPError) or error.response is None:
            return
        status = error.response.status_code
        if isinstance(error, RepositoryNotFoundError | RemoteEntryNotFoundError):
            raise error
        if status in (401, 403):
            raise PermissionError(
                f"The Hub does not allow you to write to {self.repo_id}. Log in with `hf auth login`, or pass a token "
                "that may write there with --hub_token (--token of `noprop push`)."
            ) from error
        if status >= 300 and status not in TRANSIENT and LOST_UPLOAD not in str(error):
            raise ConnectionError(f"The Hub refused {self.repo_id}: {one_line(error)}") from error

    def head(self) -> ModelInfo:
        """Return the newest state of the repository, with its files, in one request without retries."""
        head = self.api.repo_info(self.repo_id, files_metadata=True, timeout=self.timeout)
        if not isinstance(head.sha, str) or head.siblings is None:
            raise RuntimeError("the answer is not one of the Hub")
        return head

    def create(self, private: bool | None = None, patience: float | None = None) -> None:
        """Create the repository unless it exists."""
        self.insist(lambda: self.api.create_repo(self.repo_id, private=private, exist_ok=True), patience)

    def check_writable(self, patience: float | None = None) -> None:
        """Check that the token may write to the repository.

        Raises:
            FileNotFoundError: if the repository does not exist.
            PermissionError: if the token does not allow it.
        """
        probe = CommitOperationAdd(CARD_NAME, b"-")  # announced and never committed
        try:
            self.insist(lambda: self.api.preupload_lfs_files(self.repo_id, [probe]), patience)
        except RepositoryNotFoundError as error:
            raise FileNotFoundError(
                f"The repository {self.repo_id} does not exist on the Hub, or you have no access to it."
            ) from error


def _cause(error: BaseException) -> BaseException:
    """Return the cause of a failed upload or download, which the client wraps in errors of other types."""
    while not isinstance(error, HTTPError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def file_names(head: ModelInfo) -> dict[str, RepoSibling]:
    """Return the files in a state of a repository, by name."""
    return {sibling.rfilename: sibling for sibling in head.siblings or []}


def arrived_whole(path: Path, sibling: RepoSibling) -> bool:
    """Whether a downloaded file has the hash that the Hub reports; true if the Hub reports none."""
    if sibling.lfs is not None:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == sibling.lfs.sha256
    return sibling.blob_id is None or git_hash(path.read_bytes()) == sibling.blob_id


def push_model(
    directory: Path,
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    update: bool = False,
    commit_message: str = "Upload NoProp model",
    patience: float = 0,
) -> str:
    """Create a repository of the Hub and upload a model directory, all in one commit.

    If the upload is interrupted, `main` is unchanged, and a second call sends only the missing files.

    Args:
        repo_id: `user/name`.
        private: whether to create the repository as private.
        token: access token; default: that of `hf auth login`.
        update: whether to commit to a repository that already holds a model.
        patience: seconds for which failed requests are retried.

    Returns:
        The address of the commit.

    Raises:
        FileExistsError: if the repository holds a model, and `update` is false.
        PermissionError: if the token is missing, or does not allow writing to the repository.
        ConnectionError: if the Hub cannot be reached, or refuses the upload for another reason.
        ValueError: if `repo_id` is not a valid name.
    """
    check_repo_id(repo_id)
    files = files_to_push(directory)
    repository = Repository(repo_id, token, patience)
    repository.create(private)

    def push() -> str:
        head = repository.head()
        if not update and CONFIG_NAME in file_names(head):
            raise FileExistsError(
                f"{repo_id} already holds a model. Use --update to commit this one over it, or choose another name."
            )
        operations = [operation(name, path) for name, path in files.items()]
        # With `parent_commit`, the Hub rejects this commit after a concurrent push instead of overwriting that.
        commit = repository.api.create_commit(
            repo_id, operations, commit_message=commit_message, parent_commit=head.sha
        )
        return commit.commit_url

    return repository.insist(push)


def model_card(directory: Path, repo_id: str, license: str | None = None, language: str | None = None) -> ModelCard:
    """Create the model card from `model_card.md` and the results and metadata in the model directory.

    Args:
        repo_id: the repository of the model, `user/name`.
        license: licence of the model, by its identifier on the Hub.
        language: language of the text, by its ISO 639-1 code.
    """
    config = NoPropConfig.from_pretrained(directory)
    corpus = _read_corpus(directory / CORPUS_FILE)
    results = json.loads((directory / RESULTS_FILE).read_text(encoding="utf-8"))
    shards = [read_metadata(directory / block_shard(block)) for block in range(config.num_blocks)]
    dataset = corpus.get("dataset_name")
    dataset = "local files" if dataset is None or is_local(dataset) else dataset
    of_table = read_metadata(directory / EMBEDDINGS_SHARD)
    base_model = of_table.get("embeddings_from") or of_table.get("trunk_from")
    base_model = None if is_local(base_model) else base_model
    parts: dict[str | None, list[str]] = {}  # by their training note: workers may have trained with other settings
    for name, metadata in [("phase 1", of_table), *((f"block {index}", shard) for index, shard in enumerate(shards))]:
        parts.setdefault(metadata.get("training"), []).append(name)
    with torch.device("meta"):
        model = NoPropForCausalLM(config)
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
            ("perplexity", "Perplexity", perplexity(nats[MODEL_ROW][split])),
        )
    ]
    name = repo_id.split("/")[-1]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=license,
        language=language,
        datasets=[dataset] if "/" in dataset else None,
        base_model=base_model,
        tags=["noprop", "denoising", "block-wise-training"],
        model_name=name,
        eval_results=evaluations,
    )
    return ModelCard.from_template(
        data,
        template_path=str(PACKAGE / "model_card.md"),
        model_name=name,
        model_id=repo_id,
        config=config,
        dataset=dataset,
        base_model=base_model,
        table=results["table"],
        block_nats=results["details"][splits[-1]]["block_nats"],
        samples=results["samples"],
        num_parameters=model.num_parameters(),
        num_trained=model.num_parameters(only_trainable=True),
        costs=[(_figure(shard, "steps"), _figure(shard, "seconds")) for shard in shards],
        notes={", ".join(names): note for note, names in parts.items() if note},
        prompt=repr(results["samples"][0][0] if results["samples"] else "The"),
        hub=constants.ENDPOINT,
        version=__version__,
        has_plot=find_spec("matplotlib") is not None,
    )


def _figure(metadata: Mapping[str, str], name: str) -> str:
    """Return a number of a shard's metadata, which other workers and savers write; a dash if it is missing or none."""
    value = metadata.get(name, "")
    return value if re.fullmatch(r"\d{1,12}(\.\d{1,6})?", value) else "–"


def card_files(directory: Path, repo_id: str, license: str | None, language: str | None) -> dict[str, bytes]:
    """Create the card of an evaluated model and, if matplotlib is installed, its plot, by file name.

    Raises:
        ValueError: if the results or metadata in the directory cannot be read.
    """
    files = {}
    try:
        if find_spec("matplotlib") is not None:
            from .plotting import bound_figure  # matplotlib comes with the extra `plot`

            with BytesIO() as plot:
                bound_figure(directory).savefig(plot, format="png", dpi=120)
                files[PLOT_NAME] = plot.getvalue()
        card = model_card(directory, repo_id, license, language)
    except (OSError, LookupError, ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(
            f"{RESULTS_FILE}, {CORPUS_FILE} or the metadata of a block in {directory} are missing or damaged, so the "
            f"card cannot be written ({one_line(error)}). Run `noprop train` again, or remove {RESULTS_FILE}."
        ) from error
    return {CARD_NAME: str(card).encode(), **files}


def write_card(directory: Path, repo_id: str, license: str | None, language: str | None) -> None:
    """Write the card of an evaluated model, and its plot, into its directory."""
    for name, content in card_files(directory, repo_id, license, language).items():
        (directory / name).write_bytes(content)
