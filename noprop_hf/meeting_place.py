"""A repository of the Hub where workers that never meet leave their blocks.

Phase 1 publishes everything but the blocks. Each worker fetches that, says which block it works on (a claim, a small
file in `workers/`), and publishes the block's shard when it is done, in one commit that takes the claim away. Commits
name the state they were made for, so that of two workers who claim a block at once one is told; and whatever the
network does, a commit is tried again until it is there, and not made twice.

Anybody who may write to the repository can leave anything there. Files are therefore taken by their names alone, and
what cannot be read is named and passed over.
"""

import hashlib
import json
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import RepositoryNotFoundError, SafetensorsParsingError
from huggingface_hub.hf_api import ModelInfo
from transformers import TrainingArguments
from transformers.utils import CONFIG_NAME, logging

from .arguments import PACKAGE
from .configuration_noprop import NoPropConfig
from .hub import (
    CODE_FILES,
    PHASE_1_FILES,
    WRONG_ANSWERS,
    Repository,
    arrived_whole,
    file_names,
    files_left_out,
    files_of_phase_1,
    operation,
)
from .layout import CHECKPOINTS_FOLDER, block_name
from .model_directory import (
    check_whole,
    flush_files,
    missing_table,
    read_metadata,
    shapes_in,
    write_atomically,
)
from .shards_noprop import (
    CONTENT_HASH,
    EMBEDDINGS_SHARD,
    Shard,
    block_shard,
    placement_fault,
    read_shard,
    weight_type,
)


logger = logging.get_logger(__name__)

CLAIMS_FOLDER = "workers"
CLAIM_NAME = re.compile(rf"{CLAIMS_FOLDER}/block-([0-9]{{2,8}})\.json")
BLOCK_NAME = re.compile(r"block-([0-9]{2,8})\.safetensors")
STALE_AFTER = 6 * 3600  # seconds without news after which a worker is thought to be gone
REPORT_EVERY = 600  # seconds, at the least, between two commits that tell how far a block is
BRIEF_PATIENCE = 60  # seconds for what is worth no long wait
LARGEST_CLAIM = 10_000  # bytes


@dataclass
class BlockClaim:
    """Who trains a block, and how far it is.

    Attributes:
        age: seconds since it was made or renewed, by the Hub's clock.
    """

    worker: str
    step: int
    age: float

    @property
    def is_stale(self) -> bool:
        """Whether its worker is thought to be gone."""
        return self.age > STALE_AFTER

    def __str__(self) -> str:
        return f"worker {self.worker[:8]}, at step {self.step} {self.age / 60:.0f} minutes ago"


class MeetingPlace(Repository):
    """A repository, as one worker sees it.

    Args:
        repo_id: `user/name`.
        directory: the worker's model directory. Its identity is kept there, so that it knows its own claims again. Who
            only looks needs none.
        token: access token; that of `hf auth login` when not given.
        patience: seconds for which a commit or a look is tried again.
        timeout: seconds without news after which a request has failed.
    """

    def __init__(
        self,
        repo_id: str,
        directory: Path | None,
        token: str | None = None,
        patience: float = 3600,
        timeout: float = 30,
    ):
        super().__init__(repo_id, token, patience, timeout)
        self.directory = directory or Path()
        self._reported = -math.inf
        self.worker = "" if directory is None else _worker_of(directory)

    # --- phase 1 --------------------------------------------------------------------------------------------------

    def prepare(self, private: bool | None = None, patience: float = BRIEF_PATIENCE) -> None:
        """Make sure, before any work, that its result can be published: create the repository, unless it is there.

        Raises:
            ConnectionError: the Hub cannot be reached.
            FileExistsError: the repository holds another table, or another model.
            PermissionError: the token does not allow to write there.
        """
        self.create(private, patience)
        self.check_writable(patience)
        self.insist(self._holds_our_table, patience)

    def publish_table(self, private: bool | None = None) -> None:
        """Create the repository and publish what phase 1 made; nothing happens when it is there already.

        Raises:
            FileExistsError: the repository holds another table, or another model.
        """
        self.create(private)
        files = files_of_phase_1(self.directory)
        left_out = files_left_out(self.directory, files)
        if left_out:
            logger.warning(f"Not published, as no part of phase 1: {', '.join(left_out)}.")

        def publish() -> None:
            head = self.head()
            if not self._holds_our_table(head):
                operations = [operation(name, path) for name, path in files.items()]
                self._commit("Table, tokenizer and configuration", operations, head)

        self.insist(publish)

    def _holds_our_table(self, head: ModelInfo | None = None) -> bool:
        head = head or self.head()
        names, path = file_names(head), self.directory / EMBEDDINGS_SHARD
        if EMBEDDINGS_SHARD in names:
            if path.is_file():
                check_whole(path)
            if not path.is_file() or self._table(head).metadata != read_metadata(path):
                raise FileExistsError(
                    f"{self.repo_id} holds the table of another run than {self.directory}. Choose another "
                    "--hub_model_id, or train blocks for that table: `noprop train-blocks` with an empty "
                    "--output_dir."
                )
            return True
        if CONFIG_NAME in names:
            raise FileExistsError(f"{self.repo_id} holds another model. Choose another --hub_model_id.")
        return False

    def fetch_table(self) -> None:
        """Download what phase 1 published into the directory, with the code of this package.

        Raises:
            FileNotFoundError: the repository is not there, or holds no table.
            ValueError: the table in the repository is damaged.
        """
        head = self._begun()
        for name in filter(file_names(head).__contains__, CODE_FILES):
            target = self.directory / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(PACKAGE / target.name, target)
        # The embeddings come last, since they say that the directory is complete.
        for name in filter(file_names(head).__contains__, PHASE_1_FILES):
            self._fetch(name, head)
        flush_files(self.directory)
        self._fetch(EMBEDDINGS_SHARD, head)

    def check_table(self) -> Shard:
        """Make sure that the table in the directory is the one of the repository, and that blocks can be published.

        Returns:
            The content of its file.

        Raises:
            FileExistsError: it is another one.
            FileNotFoundError: the repository is not there, or holds no table.
            PermissionError: the token does not allow to write there.
        """
        table = check_whole(self.directory / EMBEDDINGS_SHARD)
        if self.table().metadata != table.metadata:
            raise FileExistsError(
                f"{self.directory} holds another table than {self.repo_id}. Fetch that one, with an empty "
                "--output_dir, or publish yours elsewhere: `noprop pretrain` with another --hub_model_id."
            )
        self.check_writable()
        return table

    def table(self) -> Shard:
        """The header of the published table.

        Raises:
            FileNotFoundError: the repository is not there, or holds no table.
            ValueError: the table in the repository is damaged.
        """
        head = self._begun()
        return self.insist(lambda: self._table(head))

    def _begun(self) -> ModelInfo:
        """The newest state of a repository that holds a table."""
        try:
            head = self.insist(self.head)
        except RepositoryNotFoundError as error:
            raise FileNotFoundError(
                f"There is no repository {self.repo_id} on the Hub, or you may not see it."
            ) from error
        if EMBEDDINGS_SHARD not in file_names(head):
            raise FileNotFoundError(
                f"{self.repo_id} holds no {EMBEDDINGS_SHARD}. Publish phase 1 first: `noprop pretrain` "
                "with --push_to_hub true."
            )
        return head

    def _table(self, head: ModelInfo) -> Shard:
        table = self._header(EMBEDDINGS_SHARD, head)
        if table is None:
            raise ValueError(
                f"{EMBEDDINGS_SHARD} in {self.repo_id} is damaged. Publish phase 1 in another repository, with "
                "`noprop pretrain` and another --hub_model_id."
            )
        return table

    # --- blocks ---------------------------------------------------------------------------------------------------

    def blocks(self) -> dict[str, Shard | None]:
        """The header of every published block, by the name of its shard; None where it cannot be read."""

        def look() -> dict[str, Shard | None]:
            head = self.head()
            return {name: self._header(name, head) for name in sorted(filter(BLOCK_NAME.fullmatch, file_names(head)))}

        return self.insist(look)

    def claims(self) -> dict[int, BlockClaim]:
        """Who works on which block."""

        def look() -> dict[int, BlockClaim]:
            head = self.head()
            indices = [int(match[1]) for match in map(CLAIM_NAME.fullmatch, file_names(head)) if match is not None]
            found = {index: self._claim_of(index, head) for index in sorted(indices)}
            return {index: claim for index, claim in found.items() if claim is not None}

        return self.insist(look)

    def claim_block(self, block_index: int, take_over: bool = False) -> str | None:
        """Say that this worker trains a block.

        Args:
            take_over: whether to do so when another worker said it.

        Returns:
            None if the block is ours; else why not, as the end of a sentence.
        """

        def commit() -> str | None:
            head = self.head()
            if block_shard(block_index) in file_names(head):
                return "was published by another worker meanwhile: skipped."
            other = self._claim_of(block_index, head)
            if other is not None and other.worker != self.worker and not other.is_stale and not take_over:
                return f"is being trained by {other}: left to it. If that worker is gone, --take_over true."
            self._commit(f"Block {block_index} is begun", [self._claim_file(block_index, 0)], head)
            self._reported = time.monotonic()
            return None

        return self.insist(commit)

    def report(self, block_index: int, step: int) -> None:
        """Renew the claim of a block, unless that was done a moment ago. What goes wrong here is only told: training
        matters more."""
        if time.monotonic() - self._reported < REPORT_EVERY:
            return
        self._reported = time.monotonic()
        try:
            claim = [self._claim_file(block_index, step)]
            self.insist(lambda: self._commit(f"Block {block_index} is at step {step}", claim), BRIEF_PATIENCE)
        except Exception as error:
            logger.warning(f"Could not tell {self.repo_id} that block {block_index} is at step {step}: {error}")

    def release(self, block_index: int) -> None:
        """Take back the claim of a block that this worker could not train. What goes wrong here is only told."""

        def give_back() -> None:
            head = self.head()
            claim = self._claim_of(block_index, head)
            if claim is not None and claim.worker == self.worker:
                self._commit(f"Block {block_index} is left", [CommitOperationDelete(_claim_name(block_index))], head)

        try:
            self.insist(give_back, BRIEF_PATIENCE)
        except Exception as error:
            logger.warning(f"Could not tell {self.repo_id} that block {block_index} is free again: {error}")

    def publish_block(self, block_index: int) -> None:
        """Publish the shard of a block, and take the claim away, in one commit."""
        shard, claim = block_shard(block_index), _claim_name(block_index)
        path = self.directory / shard
        ours = read_metadata(path)

        def publish() -> None:
            head = self.head()
            names = file_names(head)
            operations: list[Any] = [CommitOperationDelete(claim)] if claim in names else []
            if shard not in names:
                operations.append(CommitOperationAdd(shard, path))
            elif noted_hash(self._header(shard, head)) != ours.get(CONTENT_HASH):
                logger.warning(f"{shard} in {self.repo_id} is another one than in {self.directory}. Both stay.")
            if operations:
                self._commit(f"Block {block_index} is trained", operations, head)

        self.insist(publish)

    # --- single requests, for an attempt --------------------------------------------------------------------------

    def _commit(self, message: str, operations: list[Any], head: ModelInfo | None = None) -> None:
        """Commit, if `head` is given only while it is the newest state."""
        parent = None if head is None else head.sha
        self.api.create_commit(self.repo_id, operations, commit_message=message, parent_commit=parent)

    def _claim_file(self, block_index: int, step: int) -> CommitOperationAdd:
        claim = {"worker": self.worker, "step": step, "time": self.now()}
        return CommitOperationAdd(_claim_name(block_index), json.dumps(claim).encode())

    def _claim_of(self, block_index: int, head: ModelInfo) -> BlockClaim | None:
        """The claim of a block, or none where there is none that a worker could have made."""
        name = _claim_name(block_index)
        if name not in file_names(head):
            return None
        content = b""
        if (file_names(head)[name].size or 0) <= LARGEST_CLAIM:
            with TemporaryDirectory() as folder:
                content = self._download(name, head, Path(folder)).read_bytes()
        try:
            fields = json.loads(content)
            worker, step, age = fields["worker"], fields["step"], self.now() - fields["time"]
            if not (isinstance(worker, str) and worker.isprintable() and isinstance(step, int)):
                raise ValueError("not of a worker")
            if not -REPORT_EVERY < age < math.inf:
                raise ValueError("of no time that was")
            return BlockClaim(worker, step, max(age, 0))
        except (*WRONG_ANSWERS, RecursionError, OverflowError) as error:
            logger.warning(f"{name} in {self.repo_id} is no claim, and passed over: {type(error).__name__} {error}")
            return None

    def _header(self, shard: str, head: ModelInfo) -> Shard | None:
        """The header of a safetensors file, or None where it is none."""
        for _ in range(3):  # a file that is damaged stays so
            try:
                header = self.api.parse_safetensors_file_metadata(
                    self.repo_id, shard, revision=head.sha, timeout=self.timeout
                )
                metadata = {str(name): str(value) for name, value in header.metadata.items()}
                tensors = {name: (str(info.dtype), tuple(info.shape)) for name, info in header.tensors.items()}
                return Shard(metadata, tensors)
            except (SafetensorsParsingError, *WRONG_ANSWERS) as error:
                reason = error
        self.head()  # the network speaks for the Hub, so it is the file
        logger.warning(f"{shard} in {self.repo_id} is damaged, and passed over: {reason}")
        return None

    def _download(self, name: str, head: ModelInfo, folder: Path) -> Path:
        path = self.api.hf_hub_download(
            self.repo_id, name, revision=head.sha, local_dir=folder, force_download=True, etag_timeout=self.timeout
        )
        if not arrived_whole(Path(path), file_names(head)[name]):
            raise RuntimeError(f"{name} arrived damaged")
        return Path(path)

    def _fetch(self, name: str, head: ModelInfo) -> None:
        """Download a file into the directory, where it appears when it is whole; nothing happens if it is there."""
        target, sibling = self.directory / name, file_names(head)[name]
        if target.is_file() and sibling.blob_id is not None and arrived_whole(target, sibling):
            return
        folder = self.directory / CHECKPOINTS_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix="download-", dir=folder) as arriving:
            path = self.insist(lambda: self._download(name, head, Path(arriving)))
            if path.suffix == ".safetensors" and read_shard(path) is None:
                raise ValueError(f"{name} in {self.repo_id} is damaged. Remove it there, and publish it anew.")
            target.parent.mkdir(exist_ok=True)
            os.replace(path, target)


class NoMeetingPlace:
    """The counterpart of [`MeetingPlace`] for a run that shares nothing."""

    repo_id = "no repository"

    def __init__(self, directory: Path):
        self.directory = directory

    def fetch_table(self) -> None:
        """Raise, since a table can only come from phase 1.

        Raises:
            FileNotFoundError: always.
        """
        raise FileNotFoundError(missing_table(self.directory))

    def check_table(self) -> Shard:
        """Return an empty header: no table is published."""
        return Shard({}, {})

    def blocks(self) -> dict[str, Shard | None]:
        """Return no block."""
        return {}

    def claim_block(self, block_index: int, take_over: bool = False) -> str | None:
        """Accept: processes of one machine exclude one another by locks."""
        return None

    def report(self, block_index: int, step: int) -> None:
        """Do nothing."""

    def release(self, block_index: int) -> None:
        """Do nothing."""

    def publish_block(self, block_index: int) -> None:
        """Do nothing."""


def published_fault(
    block_index: int, published: Mapping[str, Shard | None], config: NoPropConfig, table: Shard
) -> str | None:
    """What keeps a published shard from being a block of a model, by its header.

    Args:
        published: the headers of the published blocks, by the names of their shards.
        table: the header of the model's table. What its metadata note, those of a block must note as well.

    Returns:
        The fault, as the predicate of a sentence about the shard, or None.
    """
    name = block_shard(block_index)
    shard = published[name]
    if shard is None:
        return "is damaged"
    provenance = {note: value for note, value in table.metadata.items() if note in ("fingerprint", "data")}
    if config.context_source == "trunk":
        provenance["trunk"] = table.content_hash or noted_hash(table) or ""
    lacking = sorted({CONTENT_HASH, *provenance} - shard.metadata.keys()) if provenance else []
    if lacking:
        return f"does not say what it was trained on: its metadata lack {', '.join(lacking)}"
    return placement_fault(shard, shapes_in(name, config), provenance | {"block": str(block_index)}, weight_type(table))


def noted_hash(shard: Shard | None) -> str | None:
    """The hash of a published shard's content, as its header notes it."""
    return None if shard is None else shard.metadata.get(CONTENT_HASH)


def meeting_place(args: TrainingArguments) -> MeetingPlace | None:
    """The repository that training arguments name, or none without `push_to_hub`."""
    if not args.push_to_hub:
        return None
    return MeetingPlace(args.hub_model_id, Path(args.output_dir), args.hub_token)


def _worker_of(directory: Path) -> str:
    """A name for a directory on its disk: a copy of it is another worker."""
    identity = directory / CHECKPOINTS_FOLDER / "worker"
    if not identity.is_file():
        identity.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(identity, lambda path: path.write_text(uuid.uuid4().hex, encoding="utf-8"))
    return hashlib.sha256(identity.read_bytes() + str(identity.stat().st_ino).encode()).hexdigest()[:32]


def _claim_name(block_index: int) -> str:
    return f"{CLAIMS_FOLDER}/{block_name(block_index)}.json"
