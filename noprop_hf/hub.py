"""Sharing a model directory on the Hub: its files, its card, the network, and the commit."""

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
# Of all stock tokenizers: what every one has, and vocabularies.
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
# What phase 1 makes and a worker needs, but for the table.
PHASE_1_FILES = (
    *(CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, *TOKENIZER_FILES, CORPUS_FILE, *PRETRAINING_FILES),
)
SHARED_FILES = {EMBEDDINGS_SHARD, *PHASE_1_FILES, *CODE_FILES, RESULTS_FILE, CARD_NAME, PLOT_NAME}

TRANSIENT = (408, 409, 412, 425, 429, 500, 502, 503, 504)
# What the Hub answers with status 400 where an upload was answered by something between, and never arrived.
LOST_UPLOAD = "LFS pointer pointed to a file that does not exist"
# What the client makes of answers that are not the Hub's, such as the page of a captive portal.
WRONG_ANSWERS = (ValueError, LookupError, TypeError, AttributeError, AssertionError)
LONGEST_PAUSE = 300.0  # seconds between two attempts, also where the Hub asks for more
Result = TypeVar("Result")


# --- files ------------------------------------------------------------------------------------------------------------


def files_to_push(directory: Path) -> dict[str, Path]:
    """The files of a model directory that make up the model, by their path in the repository; nothing else.

    Raises:
        FileNotFoundError: the directory holds no model, or one whose blocks are not all there and whole.
        ValueError: it holds no tokenizer, or that of another model, or its `corpus.yaml` is damaged.
    """
    if not (directory / EMBEDDINGS_SHARD).is_file():
        raise FileNotFoundError(f"{directory} holds no model: there is no {EMBEDDINGS_SHARD}.")
    config = read_config(directory)
    shapes = weight_shapes(config)
    fault = model_fault(directory, config, shapes) or index_fault(directory, shapes)
    if fault is not None:
        raise FileNotFoundError(f"{directory} {fault}.")
    load_tokenizer(str(directory), config.vocab_size)  # or raises, as does the next
    if (directory / CORPUS_FILE).is_file():
        _read_corpus(directory / CORPUS_FILE)
    return _existing(directory, SHARED_FILES | {block_shard(index) for index in range(config.num_blocks)})


def files_of_phase_1(directory: Path) -> dict[str, Path]:
    """The same without blocks and what is measured, for a model whose blocks are trained elsewhere."""
    return _existing(directory, {EMBEDDINGS_SHARD, *PHASE_1_FILES, *CODE_FILES})


def _existing(directory: Path, names: set[str]) -> dict[str, Path]:
    return {name: directory / name for name in sorted(names) if (directory / name).is_file()}


def files_left_out(directory: Path, files: dict[str, Path]) -> list[str]:
    """What else lies in a model directory, folders by their name alone."""
    found = [
        path for folder in (directory, *(directory / name for name in PRETRAINING_FOLDERS)) for path in folder.glob("*")
    ]
    names = [path.relative_to(directory).as_posix() + "/" * path.is_dir() for path in found]
    return sorted(set(names) - set(files) - {f"{folder}/" for folder in PRETRAINING_FOLDERS})


def operation(name: str, path: Path) -> CommitOperationAdd:
    """The upload of a file of a model directory. Paths of this machine are left out of `corpus.yaml`."""
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
    """Whether what may be a name on the Hub is, or looks like, a path of this machine."""
    if name_or_path is None:
        return False
    try:
        validate_repo_id(name_or_path)
    except HFValidationError:
        return True
    return Path(name_or_path).exists()


# --- the network ------------------------------------------------------------------------------------------------------


def check_repo_id(repo_id: str) -> None:
    """Make sure that a repository can have this name.

    Raises:
        ValueError: it cannot.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no name of a repository: write it as user/name.") from error
    if "/" not in repo_id:
        raise ValueError(f"{repo_id!r} is no name of a repository: write it as user/name.")


def check_sharing(training_args: TrainingArguments) -> None:
    """Check, without the network, that a run can push where it is asked to.

    Raises:
        ConnectionError: the Hub is switched off by `HF_HUB_OFFLINE`.
        PermissionError: there is no token, or it is none.
        ValueError: `hub_model_id` is no name of a repository.
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
            "The access token is malformed: it holds spaces or letters that no token has. Log in with `hf auth login`, "
            "or pass another one with --hub_token."
        )
    if is_offline_mode():
        raise ConnectionError("--push_to_hub needs the Hub: unset HF_HUB_OFFLINE, or leave --push_to_hub out.")


class Repository:
    """A repository of the Hub, with patience.

    From the first attempt on, all requests of `huggingface_hub` in this process get a timeout, and none waits longer
    than `LONGEST_PAUSE` because the Hub asks for it. Times are those of the Hub's clock, as clocks of workers may be
    wrong.

    Args:
        repo_id: `user/name`.
        token: access token; that of `hf auth login` when not given.
        patience: seconds for which what fails is tried again. With 0 there is one attempt, in which the client itself
            tries some requests again.
        timeout: seconds without news after which a request has failed.
    """

    def __init__(self, repo_id: str, token: str | None = None, patience: float = 0, timeout: float = 30):
        self.repo_id, self.patience, self.timeout = repo_id, patience, timeout
        self.api = HfApi(token=token)
        self._deadline = math.inf
        self._clock_lead = time.time() - time.monotonic()

    def now(self) -> float:
        """The time by the Hub's clock, in seconds since 1970."""
        return time.monotonic() + self._clock_lead

    def _client(self) -> Any:
        client = default_client_factory()
        client.event_hooks["request"].append(self._before)
        client.event_hooks["response"].append(self._after)
        return client

    def _before(self, request: Any) -> None:
        if time.monotonic() > self._deadline:
            raise TimeoutError(f"{self.repo_id} could not be reached on the Hub in the time there was for it.")
        given = request.extensions.get("timeout", {})
        kinds = ("connect", "read", "write", "pool")
        request.extensions["timeout"] = {kind: given.get(kind) or self.timeout for kind in kinds}

    def _after(self, response: Any) -> None:
        response.headers.pop("RateLimit", None)  # the client would wait as long as it says
        longest = max(0, min(LONGEST_PAUSE, self._deadline - time.monotonic()))
        asked = response.headers.get("Retry-After", "").strip()
        if asked and not (asked.isascii() and asked.isdecimal() and len(asked) < 9 and int(asked) <= longest):
            response.headers["Retry-After"] = str(int(longest))
        if "/api/" in response.request.url.path:  # downloads may come, with their date, out of a cache
            try:
                date = parsedate_to_datetime(response.headers["Date"]).replace(tzinfo=UTC)
                self._clock_lead = date.timestamp() - time.monotonic()
            except (KeyError, ValueError):
                pass  # this answer says no time

    def insist(self, attempt: Callable[[], Result], patience: float | None = None) -> Result:
        """Try until it works, ever more patiently, as long as what goes wrong may pass.

        Args:
            attempt: what to try. It may be made several times.
            patience: has precedence over that of the repository.

        Raises:
            ConnectionError: the Hub cannot be reached, or refuses.
            PermissionError: the Hub does not allow it.
            RepositoryNotFoundError: there is no such repository.
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
                        f"The Hub cannot be reached, or answers wrongly ({reason}). What is not yet visible in "
                        f"{self.repo_id} is kept here; run this again with a connection."
                    ) from error
                response = getattr(cause, "response", None)
                asked = "" if response is None else response.headers.get("Retry-After", "")  # see `_after`
                pause = min(float(asked) if asked else wait * random.uniform(0.5, 1), left)
                logger.warning(f"{self.repo_id}: {reason}; tried again in {pause:.1f} s.")
                time.sleep(pause)
                wait = min(2 * wait, LONGEST_PAUSE)
            finally:
                self._deadline = math.inf

    def _raise_if_lasting(self, error: BaseException) -> None:
        """Raise an error that no patience mends."""
        if isinstance(error, OfflineModeIsEnabled) or isinstance(error.__cause__, OfflineModeIsEnabled):
            raise ConnectionError(
                f"The Hub cannot be reached: HF_HUB_OFFLINE is set. Unset it, and run this again for {self.repo_id}."
            ) from error
        if isinstance(error, TimeoutError):
            return
        if isinstance(error, Exception) and is_users(error):
            raise error
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise error  # of a file, not of the network
        if not isinstance(error, HfHubHTTPError) or error.response is None:
            return
        status = error.response.status_code
        if isinstance(error, RepositoryNotFoundError | RemoteEntryNotFoundError):
            raise error
        if status in (401, 403):
            raise PermissionError(
                f"The Hub does not let you write to {self.repo_id}. Log in with `hf auth login`, or pass a token that "
                "may write there with --hub_token (--token of `noprop push`)."
            ) from error
        if status >= 300 and status not in TRANSIENT and LOST_UPLOAD not in str(error):
            raise ConnectionError(f"The Hub refused {self.repo_id}: {one_line(error)}") from error

    def head(self) -> ModelInfo:
        """The newest state of the repository, with its files. One request, for an attempt."""
        head = self.api.repo_info(self.repo_id, files_metadata=True, timeout=self.timeout)
        if not isinstance(head.sha, str) or head.siblings is None:
            raise RuntimeError("this is no answer of the Hub")
        return head

    def create(self, private: bool | None = None, patience: float | None = None) -> None:
        """Create the repository, unless it is there."""
        self.insist(lambda: self.api.create_repo(self.repo_id, private=private, exist_ok=True), patience)

    def check_writable(self, patience: float | None = None) -> None:
        """Make sure that the token may write to the repository.

        Raises:
            FileNotFoundError: there is no such repository.
            PermissionError: it may not.
        """
        probe = CommitOperationAdd(CARD_NAME, b"-")  # announced and never committed
        try:
            self.insist(lambda: self.api.preupload_lfs_files(self.repo_id, [probe]), patience)
        except RepositoryNotFoundError as error:
            raise FileNotFoundError(
                f"There is no repository {self.repo_id} on the Hub, or you may not see it."
            ) from error


def _cause(error: BaseException) -> BaseException:
    """What went wrong in an upload or download: the client wraps that in errors of other types."""
    while not isinstance(error, HTTPError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def file_names(head: ModelInfo) -> dict[str, RepoSibling]:
    """The files in a state of a repository, by their names."""
    return {sibling.rfilename: sibling for sibling in head.siblings or []}


def arrived_whole(path: Path, sibling: RepoSibling) -> bool:
    """Whether a downloaded file has the hash that the Hub says; also where it says none."""
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

    When it fails on the way, nothing is visible on `main`, and a second call sends only what has not arrived.

    Args:
        repo_id: `user/name`.
        private: whether to create the repository as private.
        token: access token; that of `hf auth login` when not given.
        update: whether to commit to a repository that holds a model already.
        patience: seconds for which what fails is tried again.

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
    repository = Repository(repo_id, token, patience)
    repository.create(private)

    def push() -> str:
        head = repository.head()
        if not update and CONFIG_NAME in file_names(head):
            raise FileExistsError(
                f"{repo_id} holds a model already. Use --update to commit this one over it, or choose another name."
            )
        operations = [operation(name, path) for name, path in files.items()]
        # Of the commit we have seen, so that a push that happened meanwhile is told and not overwritten.
        commit = repository.api.create_commit(
            repo_id, operations, commit_message=commit_message, parent_commit=head.sha
        )
        return commit.commit_url

    return repository.insist(push)


def model_card(directory: Path, repo_id: str, license: str | None = None, language: str | None = None) -> ModelCard:
    """The card of a model directory, from `model_card.md` and from what training and evaluation left there.

    Args:
        repo_id: where the model will be found.
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
    base_model = of_table.get("embeddings_from")
    base_model = None if is_local(base_model) else base_model
    trained_so: dict[str | None, list[str]] = {}  # workers elsewhere may have trained otherwise
    for name, metadata in [("phase 1", of_table), *((f"block {index}", shard) for index, shard in enumerate(shards))]:
        trained_so.setdefault(metadata.get("training"), []).append(name)
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
        notes={", ".join(names): note for note, names in trained_so.items() if note},
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
        card = model_card(directory, repo_id, license, language)
    except (OSError, LookupError, ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(
            f"{RESULTS_FILE}, {CORPUS_FILE} or the metadata of a block in {directory} are missing or damaged, so no "
            f"card can be made ({one_line(error)}). Run `noprop train` again, or remove {RESULTS_FILE}."
        ) from error
    return {CARD_NAME: str(card).encode(), **files}


def write_card(directory: Path, repo_id: str, license: str | None, language: str | None) -> None:
    """Write the card of an evaluated model directory."""
    for name, content in card_files(directory, repo_id, license, language).items():
        (directory / name).write_bytes(content)
