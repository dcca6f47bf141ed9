"""Meeting place: a repository of the Hub through which independent workers share the blocks of a model.

Phase 1 publishes everything except the blocks. Each worker downloads these files, claims a block with a small file in
`workers/`, and publishes the shard of the trained block in one commit that also deletes the claim. Every commit names
its parent, so when two workers claim a block at once, one commit is rejected. Failed commits are retried; a commit
whose response was lost is not repeated.

Other users with write access may add any files. Files are therefore recognised by name only, and unreadable ones are
logged and ignored.
"""

import hashlib
import json
import math
import os
import random
import re
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
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
from .layout import CHECKPOINTS_FOLDER, block_name, checkpoint_folder
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
STALE_AFTER = 6 * 3600  # seconds after which a claim that was not renewed is stale
REPORT_EVERY = 2 * 3600  # minimum seconds between two renewals of a claim; the Hub limits commits per hour
CHECK_EVERY = 600  # minimum seconds between two checks that a backup is still needed
CLOCK_ERROR = 600  # seconds by which the time of a claim may be ahead
BRIEF_PATIENCE = 60  # seconds of retries for requests of minor importance
LARGEST_CLAIM = 10_000  # bytes


class BlockPublished(Exception):
    """Another worker has published the block that this one backs up."""


@dataclass
class BlockClaim:
    """Claim of a worker on a block.

    Attributes:
        worker: name of the worker.
        step: training step of the last renewal.
        age: seconds since the last renewal, by the Hub's clock.
    """

    worker: str
    step: int
    age: float

    @property
    def is_stale(self) -> bool:
        """Whether the worker is presumed gone."""
        return self.age > STALE_AFTER

    @property
    def trains(self) -> str:
        """A sentence for workers that do not get the block."""
        return f"{self} trains it. If that worker is gone, rerun with --take_over true."

    def __str__(self) -> str:
        return f"worker {self.worker[:8]}, at step {self.step} {self.age / 60:.0f} minutes ago"


class MeetingPlace(Repository):
    """The meeting place, as seen by one worker.

    Args:
        repo_id: `user/name`.
        directory: the worker's model directory, which also stores the worker's name, so that it recognises its own
            claims; None to only read the repository.
        token: access token; default: that of `hf auth login`.
        patience: seconds for which failed requests are retried.
        timeout: seconds without data after which a request fails.
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
        self._lost_claim = False
        self._backs_up = False
        self.worker = "" if directory is None else _worker_of(directory)

    # --- phase 1 --------------------------------------------------------------------------------------------------

    def prepare(self, private: bool | None = None, patience: float = BRIEF_PATIENCE) -> None:
        """Create the repository unless it exists, and check before any work that results can be published in it.

        Raises:
            ConnectionError: if the Hub cannot be reached.
            FileExistsError: if the repository holds another table or model.
            PermissionError: if the token does not allow writing to the repository.
        """
        self.create(private, patience)
        self.check_writable(patience)
        self.insist(self._holds_our_table, patience)

    def publish_table(self, private: bool | None = None) -> None:
        """Create the repository and publish the files of phase 1, unless they are published already.

        Raises:
            FileExistsError: if the repository holds another table or model.
        """
        self.create(private)
        files = files_of_phase_1(self.directory)
        left_out = files_left_out(self.directory, files)
        if left_out:
            logger.warning(f"Not published, as they are not part of phase 1: {', '.join(left_out)}.")

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
        """Download the files of phase 1 into the directory, with the code of this package.

        Raises:
            FileNotFoundError: if the repository does not exist, or holds no table.
            ValueError: if the published table is damaged.
        """
        head = self._begun()
        for name in filter(file_names(head).__contains__, CODE_FILES):
            target = self.directory / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(PACKAGE / target.name, target)
        # The table comes last, since its presence marks the directory as complete.
        for name in filter(file_names(head).__contains__, PHASE_1_FILES):
            self._fetch(name, head)
        flush_files(self.directory)
        self._fetch(EMBEDDINGS_SHARD, head)

    def check_table(self) -> Shard:
        """Check that the table in the directory is the published one, and that blocks can be published.

        Returns:
            The header of its shard.

        Raises:
            FileExistsError: if the tables differ.
            FileNotFoundError: if the repository does not exist, or holds no table.
            PermissionError: if the token does not allow writing to the repository.
        """
        table = check_whole(self.directory / EMBEDDINGS_SHARD)
        if self.table().metadata != table.metadata:
            raise FileExistsError(
                f"{self.directory} holds another table than {self.repo_id}. Download that table into an empty "
                "--output_dir, or publish yours elsewhere: `noprop pretrain` with another --hub_model_id."
            )
        self.check_writable()
        return table

    def table(self) -> Shard:
        """Return the header of the published table.

        Raises:
            FileNotFoundError: if the repository does not exist, or holds no table.
            ValueError: if the published table is damaged.
        """
        head = self._begun()
        return self.insist(lambda: self._table(head))

    def _begun(self) -> ModelInfo:
        """Return the newest state of the repository, which must hold a table."""
        try:
            head = self.insist(self.head)
        except RepositoryNotFoundError as error:
            raise FileNotFoundError(
                f"The repository {self.repo_id} does not exist on the Hub, or you have no access to it."
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
        """Return the header of every published block, by the name of its shard; None if it cannot be read."""

        def look() -> dict[str, Shard | None]:
            head = self.head()
            return {name: self._header(name, head) for name in sorted(filter(BLOCK_NAME.fullmatch, file_names(head)))}

        return self.insist(look)

    def claims(self) -> dict[int, BlockClaim]:
        """Return the claims, by block index."""

        def look() -> dict[int, BlockClaim]:
            head = self.head()
            indices = [int(match[1]) for match in map(CLAIM_NAME.fullmatch, file_names(head)) if match is not None]
            claims = {index: self._claim_of(index, head) for index in sorted(indices)}
            return {index: claim for index, claim in claims.items() if claim is not None}

        return self.insist(look)

    def open_blocks(self, indices: Sequence[int], take_over: bool = False, back_up: bool = False) -> list[int]:
        """Select the blocks that may be left to train, in the order in which this worker should try to claim them.

        Blocks with a checkpoint in the directory come first, then unclaimed ones, in random order once another worker
        has been faster. Claims are read only when no other block is left, since that takes two requests for each.

        Args:
            take_over, back_up: whether to select blocks with a valid claim of another worker.
        """

        def look() -> list[int]:
            head = self.head()
            names = file_names(head)
            left = [index for index in indices if block_shard(index) not in names]
            for index in sorted({*indices} - {*left}):
                logger.warning(f"Block {index} is skipped: another worker has published it.")
            begun = [i for i in left if checkpoint_folder(self.directory, block_name(i)).is_dir()]
            free = [index for index in left if _claim_name(index) not in names and index not in begun]
            claimed = [index for index in left if index not in free and index not in begun]
            if self._lost_claim:
                random.shuffle(free)
            if begun or free:
                return begun + free + claimed
            random.shuffle(claimed)
            return [index for index in claimed if take_over or back_up or not self._is_taken(index, head)]

        return self.insist(look)

    def _is_taken(self, block_index: int, head: ModelInfo) -> bool:
        """Check whether another worker has a valid claim on a block, and log it."""
        other = self._claim_of(block_index, head)
        if other is None or other.worker == self.worker or other.is_stale:
            return False
        logger.warning(f"Block {block_index} is skipped: {other.trains}")
        return True

    def claim_block(self, block_index: int, take_over: bool = False, back_up: bool = False) -> str | None:
        """Claim a block for this worker.

        Args:
            take_over: whether to replace the claim of another worker.
            back_up: whether to succeed beside the claim of another worker, which is left as it is. As in MapReduce
                (Dean and Ghemawat 2004, section 3.6), idle workers then repeat the work of slow ones.

        Returns:
            None if the claim succeeded, else the reason, as the predicate of a sentence about the block.
        """

        def commit() -> str | None:
            head = self.head()
            if block_shard(block_index) in file_names(head):
                return "is skipped: another worker has published it."
            other = self._claim_of(block_index, head)
            if other is None or other.worker == self.worker or other.is_stale or take_over:
                self._commit(f"Block {block_index} is claimed", [self._claim_file(block_index, 0)], head)
                self._backs_up = False
            elif back_up:
                logger.info(f"Block {block_index} is trained as a backup: {other} trains it, too.")
                self._backs_up = True
            else:
                return f"is skipped: {other.trains}"
            self._reported = time.monotonic()
            return None

        reason = self.insist(commit)
        self._lost_claim |= reason is not None
        return reason

    def report(self, block_index: int, step: int) -> None:
        """Renew the claim of a block, at most every `REPORT_EVERY` seconds, or check that a backup is still needed.

        Errors are logged and ignored so that they cannot stop training.

        Raises:
            BlockPublished: if another worker has published the block that this one backs up.
        """
        if time.monotonic() - self._reported < (CHECK_EVERY if self._backs_up else REPORT_EVERY):
            return
        self._reported, is_published = time.monotonic(), False

        def renew() -> bool:
            if block_shard(block_index) in file_names(self.head()):
                return True
            if not self._backs_up:
                claim = [self._claim_file(block_index, step)]
                self._commit(f"Block {block_index} is at step {step}", claim)
            return False

        try:
            is_published = self.insist(renew, BRIEF_PATIENCE)
        except Exception as error:
            logger.warning(f"Cannot renew the claim of block {block_index} in {self.repo_id} at step {step}: {error}")
        if is_published and self._backs_up:
            raise BlockPublished(f"Another worker has published block {block_index}.")
        if is_published:
            logger.warning(
                f"Another worker has published block {block_index}, so that this training, at step {step}, is not "
                "needed: interrupt it, and run the same command again to train another block."
            )

    def release(self, block_index: int) -> None:
        """Release the claim of a block that this worker failed to train. Errors are logged and ignored."""

        def delete_claim() -> None:
            head = self.head()
            claim = self._claim_of(block_index, head)
            if claim is not None and claim.worker == self.worker:
                self._commit(
                    f"Block {block_index} is released", [CommitOperationDelete(_claim_name(block_index))], head
                )

        try:
            self.insist(delete_claim, BRIEF_PATIENCE)
        except Exception as error:
            logger.warning(f"Cannot release the claim of block {block_index} in {self.repo_id}: {error}")

    def publish_block(self, block_index: int) -> None:
        """Publish the shard of a block and delete its claim, in one commit."""
        shard, claim = block_shard(block_index), _claim_name(block_index)
        path = self.directory / shard
        metadata = read_metadata(path)

        def publish() -> None:
            head = self.head()
            names = file_names(head)
            operations: list[Any] = [CommitOperationDelete(claim)] if claim in names else []
            if shard not in names:
                operations.append(CommitOperationAdd(shard, path))
            elif noted_hash(self._header(shard, head)) != metadata.get(CONTENT_HASH):
                logger.warning(f"{shard} in {self.repo_id} differs from that in {self.directory}. Both are kept.")
            if operations:
                self._commit(f"Block {block_index} is trained", operations, head)

        self.insist(publish)

    # --- requests without retries -----------------------------------------------------------------------------

    def _commit(self, message: str, operations: list[Any], head: ModelInfo | None = None) -> None:
        """Commit; with `head`, only if it is still the newest state."""
        parent = None if head is None else head.sha
        self.api.create_commit(self.repo_id, operations, commit_message=message, parent_commit=parent)

    def _claim_file(self, block_index: int, step: int) -> CommitOperationAdd:
        claim = {"worker": self.worker, "step": step, "time": self.now()}
        return CommitOperationAdd(_claim_name(block_index), json.dumps(claim).encode())

    def _claim_of(self, block_index: int, head: ModelInfo) -> BlockClaim | None:
        """Return the claim of a block, or None if it is missing or invalid."""
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
                raise ValueError("invalid worker or step")
            if not -CLOCK_ERROR < age < math.inf:
                raise ValueError("invalid time")
            return BlockClaim(worker, step, max(age, 0))
        except (*WRONG_ANSWERS, RecursionError, OverflowError) as error:
            logger.warning(f"{name} in {self.repo_id} is not a claim and is ignored: {type(error).__name__} {error}")
            return None

    def _header(self, shard: str, head: ModelInfo) -> Shard | None:
        """Return the header of a safetensors file, or None if it is damaged."""
        for _ in range(3):  # to tell a damaged file from a damaged answer
            try:
                header = self.api.parse_safetensors_file_metadata(
                    self.repo_id, shard, revision=head.sha, timeout=self.timeout
                )
                metadata = {str(name): str(value) for name, value in header.metadata.items()}
                tensors = {name: (str(info.dtype), tuple(info.shape)) for name, info in header.tensors.items()}
                return Shard(metadata, tensors)
            except (SafetensorsParsingError, *WRONG_ANSWERS) as error:
                reason = error
        self.head()  # raises if answers are not those of the Hub; otherwise the file is damaged
        logger.warning(f"{shard} in {self.repo_id} is damaged and is ignored: {reason}")
        return None

    def _download(self, name: str, head: ModelInfo, folder: Path) -> Path:
        path = self.api.hf_hub_download(
            self.repo_id, name, revision=head.sha, local_dir=folder, force_download=True, etag_timeout=self.timeout
        )
        if not arrived_whole(Path(path), file_names(head)[name]):
            raise RuntimeError(f"{name} arrived damaged")
        return Path(path)

    def _fetch(self, name: str, head: ModelInfo) -> None:
        """Download a file into the directory, where it appears once complete, unless the directory has it."""
        target, sibling = self.directory / name, file_names(head)[name]
        if target.is_file() and sibling.blob_id is not None and arrived_whole(target, sibling):
            return
        folder = self.directory / CHECKPOINTS_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix="download-", dir=folder) as arriving:
            path = self.insist(lambda: self._download(name, head, Path(arriving)))
            if path.suffix == ".safetensors" and read_shard(path) is None:
                raise ValueError(f"{name} in {self.repo_id} is damaged. Delete it there, and publish it again.")
            target.parent.mkdir(exist_ok=True)
            os.replace(path, target)


class NoMeetingPlace:
    """The counterpart of [`MeetingPlace`] for a run that shares nothing."""

    repo_id = "no repository"

    def __init__(self, directory: Path):
        self.directory = directory

    def fetch_table(self) -> None:
        """Raise an error, since only phase 1 makes a table.

        Raises:
            FileNotFoundError: always.
        """
        raise FileNotFoundError(missing_table(self.directory))

    def check_table(self) -> Shard:
        """Return an empty header, as no table is published."""
        return Shard({}, {})

    def blocks(self) -> dict[str, Shard | None]:
        """Return an empty dictionary, as no block is published."""
        return {}

    def open_blocks(self, indices: Sequence[int], take_over: bool = False, back_up: bool = False) -> list[int]:
        """Return all blocks, in their order."""
        return list(indices)

    def claim_block(self, block_index: int, take_over: bool = False, back_up: bool = False) -> str | None:
        """Return None: processes of one machine exclude one another by locks."""
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
    """Check the header of a published shard of a block.

    Args:
        published: the headers of the published blocks, by the names of their shards.
        table: the header of the model's table, whose provenance must be that of the block.

    Returns:
        The fault, as the predicate of a sentence about the shard, or None.
    """
    name = block_shard(block_index)
    shard = published[name]
    if shard is None:
        return "is damaged"
    notes = ("fingerprint", "data", "clusters", "trunk")
    provenance = {note: value for note, value in table.metadata.items() if note in notes}
    lacking = sorted({CONTENT_HASH, *provenance} - shard.metadata.keys()) if provenance else []
    if lacking:
        return f"has no complete provenance: its metadata lack {', '.join(lacking)}"
    return placement_fault(shard, shapes_in(name, config), provenance | {"block": str(block_index)}, weight_type(table))


def noted_hash(shard: Shard | None) -> str | None:
    """Return the content hash in the header of a published shard."""
    return None if shard is None else shard.metadata.get(CONTENT_HASH)


def meeting_place(args: TrainingArguments) -> MeetingPlace | None:
    """Return the repository in the training arguments, or None without `push_to_hub`."""
    if not args.push_to_hub:
        return None
    return MeetingPlace(args.hub_model_id, Path(args.output_dir), args.hub_token)


def _worker_of(directory: Path) -> str:
    """Return the name of the worker of a directory; a copy of the directory is another worker."""
    identity = directory / CHECKPOINTS_FOLDER / "worker"
    if not identity.is_file():
        identity.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(identity, lambda path: path.write_text(uuid.uuid4().hex, encoding="utf-8"))
    return hashlib.sha256(identity.read_bytes() + str(identity.stat().st_ino).encode()).hexdigest()[:32]


def _claim_name(block_index: int) -> str:
    return f"{CLAIMS_FOLDER}/{block_name(block_index)}.json"
