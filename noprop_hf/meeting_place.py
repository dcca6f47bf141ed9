"""A repository of the Hub where workers that never meet leave their blocks.

Phase 1 publishes everything but the blocks. Each worker fetches that, says which block it works on (a claim, a small
file in `workers/`), and publishes the block's shard when it is done, in one commit that takes the claim away. Commits
name the state they were made for, so that of two workers who claim a block at once one is told; and whatever the
network does, a commit is tried again until it is there, and not made twice.
"""

import json
import random
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from transformers import TrainingArguments
from transformers.utils import logging

from .checkpoints import CHECKPOINTS_FOLDER
from .hub import files_of_phase_1
from .model_directory import flush_files, read_metadata, write_atomically
from .shards_noprop import CONTENT_HASH, EMBEDDINGS_SHARD, block_shard


logger = logging.get_logger(__name__)

CLAIMS_FOLDER = "workers"
STALE_AFTER = 6 * 3600  # seconds without news after which a worker is thought to be gone
REPORT_EVERY = 600  # seconds, at the least, between two commits that tell how far a block is
TRANSIENT = (408, 409, 412, 425, 429, 500, 502, 503, 504)


@dataclass
class Claim:
    """Who trains a block, and how far it is."""

    worker: str
    host: str
    step: int
    time: float

    @property
    def age(self) -> float:
        return time.time() - self.time

    @property
    def is_stale(self) -> bool:
        """Whether its worker is thought to be gone."""
        return self.age > STALE_AFTER

    def __str__(self) -> str:
        return f"worker {self.worker[:8]} on {self.host}, at step {self.step} {self.age / 60:.0f} minutes ago"


class MeetingPlace:
    """A repository, as one worker sees it.

    Args:
        repo_id: `user/name`.
        directory: the worker's model directory. Its identity is kept there, so that it knows its own claims again. Who
            only looks needs none.
        token: access token; that of `hf auth login` when not given.
        patience: seconds for which a commit or a look is tried again.
    """

    def __init__(self, repo_id: str, directory: Path | None, token: str | None = None, patience: float = 3600):
        self.repo_id, self.directory, self.token, self.patience = repo_id, directory or Path(), token, patience
        self.api = HfApi(token=token)
        self.retries = 0
        self._reported = 0.0
        self.worker = "" if directory is None else _worker_of(directory)

    # --- phase 1 --------------------------------------------------------------------------------------------------

    def publish_table(self, private: bool | None = None) -> None:
        """Create the repository and publish what phase 1 made; nothing happens when it is there already.

        Raises:
            FileExistsError: the repository holds another table.
        """
        self._insist(lambda: self.api.create_repo(self.repo_id, private=private, exist_ok=True))
        ours = read_metadata(self.directory / EMBEDDINGS_SHARD)
        files = files_of_phase_1(self.directory)

        def publish() -> None:
            head = self.api.repo_info(self.repo_id)
            if EMBEDDINGS_SHARD in [sibling.rfilename for sibling in head.siblings or []]:
                if self._metadata(EMBEDDINGS_SHARD, head.sha) != ours:
                    raise FileExistsError(
                        f"{self.repo_id} holds the table of another run. Choose another --hub_model_id, or fetch that "
                        "table: an empty --output_dir does."
                    )
                return
            operations = [CommitOperationAdd(name, path) for name, path in files.items()]
            self.api.create_commit(
                self.repo_id, operations, commit_message="Table, tokenizer and configuration", parent_commit=head.sha
            )

        self._insist(publish)

    def fetch_table(self) -> None:
        """Download what phase 1 published into the directory.

        Raises:
            FileNotFoundError: the repository is not there, or holds no table.
        """
        sha, names = self._begun()
        others = [name for name in names if not name.startswith(("block-", f"{CLAIMS_FOLDER}/", EMBEDDINGS_SHARD))]
        # One by one: `snapshot_download` takes an unfinished folder for a whole one when the Hub cannot be reached. The
        # embeddings come last, since they say that the directory is complete.
        for name in others:
            self.fetch(name, sha)
        flush_files(self.directory)
        self.fetch(EMBEDDINGS_SHARD, sha)

    def check_table(self) -> None:
        """Make sure that the table in the directory is the one of the repository.

        Raises:
            FileExistsError: it is another one.
            FileNotFoundError: the repository is not there, or holds no table.
        """
        sha, _ = self._begun()
        theirs = self._insist(lambda: self._metadata(EMBEDDINGS_SHARD, sha))
        if theirs != read_metadata(self.directory / EMBEDDINGS_SHARD):
            raise FileExistsError(
                f"{self.directory} holds another table than {self.repo_id}. Fetch that one, with an empty "
                "--output_dir, or publish yours elsewhere: scripts/pretrain_embeddings.py with another --hub_model_id."
            )

    def _begun(self) -> tuple[str, list[str]]:
        """The newest state of a repository that holds a table, and its files."""
        try:
            head = self._insist(lambda: self.api.repo_info(self.repo_id))
        except RepositoryNotFoundError as error:
            raise FileNotFoundError(
                f"There is no repository {self.repo_id} on the Hub, or you may not see it."
            ) from error
        names = [sibling.rfilename for sibling in head.siblings or []]
        if EMBEDDINGS_SHARD not in names:
            raise FileNotFoundError(
                f"{self.repo_id} holds no {EMBEDDINGS_SHARD}. Publish phase 1 first: scripts/pretrain_embeddings.py "
                "with --push_to_hub true."
            )
        return head.sha, names

    def fetch(self, name: str, revision: str | None = None) -> None:
        """Download a file into the directory."""
        options = {"revision": revision, "local_dir": self.directory, "token": self.token}
        self._insist(lambda: hf_hub_download(self.repo_id, name, **options))

    # --- blocks ---------------------------------------------------------------------------------------------------

    def blocks(self) -> dict[str, Mapping[str, str]]:
        """The metadata of every block that is published, by the name of its shard."""

        def look() -> dict[str, Mapping[str, str]]:
            head = self.api.repo_info(self.repo_id)
            names = sorted(s.rfilename for s in head.siblings or [] if s.rfilename.startswith("block-"))
            return {name: self._metadata(name, head.sha) for name in names}

        return self._insist(look)

    def claims(self, revision: str | None = None) -> dict[int, Claim]:
        """Who works on which block."""

        def look() -> dict[int, Claim]:
            head = self.api.repo_info(self.repo_id, revision=revision)
            names = [s.rfilename for s in head.siblings or [] if s.rfilename.startswith(f"{CLAIMS_FOLDER}/block-")]
            claims = {}
            for name in names:
                path = hf_hub_download(self.repo_id, name, revision=head.sha, token=self.token)
                claims[int(Path(name).stem.removeprefix("block-"))] = Claim(**json.loads(Path(path).read_text()))
            return claims

        return self._insist(look)

    def claim(self, block_index: int, take_over: bool = False) -> Claim | None:
        """Say that this worker trains a block.

        Args:
            take_over: whether to do so when another worker said it.

        Returns:
            None if the block is ours; else the claim of the one who trains it.
        """

        def commit() -> Claim | None:
            head = self.api.repo_info(self.repo_id)
            other = self.claims(head.sha).get(block_index)
            if other is not None and other.worker != self.worker and not other.is_stale and not take_over:
                return other
            message = f"Block {block_index} is begun"
            self.api.create_commit(
                self.repo_id, [self._claim_file(block_index, 0)], commit_message=message, parent_commit=head.sha
            )
            self._reported = time.monotonic()
            return None

        return self._insist(commit)

    def report(self, block_index: int, step: int) -> None:
        """Renew the claim of a block, unless that was done a moment ago. What goes wrong here is only told: training
        matters more."""
        if time.monotonic() - self._reported < REPORT_EVERY:
            return
        self._reported = time.monotonic()
        try:
            message = f"Block {block_index} is at step {step}"
            self.api.create_commit(self.repo_id, [self._claim_file(block_index, step)], commit_message=message)
        except (HTTPError, OSError) as error:
            logger.warning(f"Could not tell {self.repo_id} that block {block_index} is at step {step}: {error}")

    def publish_block(self, block_index: int) -> None:
        """Publish the shard of a block, and take the claim away, in one commit."""
        shard, claim = block_shard(block_index), _claim_name(block_index)
        path = self.directory / shard
        ours = read_metadata(path)

        def publish() -> None:
            head = self.api.repo_info(self.repo_id)
            names = [sibling.rfilename for sibling in head.siblings or []]
            operations: list[Any] = [CommitOperationDelete(claim)] if claim in names else []
            if shard not in names:
                operations.append(CommitOperationAdd(shard, path))
            elif self._metadata(shard, head.sha)[CONTENT_HASH] != ours[CONTENT_HASH]:
                logger.warning(f"{shard} in {self.repo_id} was published by another worker meanwhile, and stays.")
            if operations:
                message = f"Block {block_index} is trained"
                self.api.create_commit(self.repo_id, operations, commit_message=message, parent_commit=head.sha)

        self._insist(publish)

    # --- the network ----------------------------------------------------------------------------------------------

    def _claim_file(self, block_index: int, step: int) -> CommitOperationAdd:
        claim = Claim(self.worker, socket.gethostname(), step, time.time())
        return CommitOperationAdd(_claim_name(block_index), json.dumps(asdict(claim)).encode())

    def _metadata(self, shard: str, revision: str) -> Mapping[str, str]:
        return self.api.parse_safetensors_file_metadata(self.repo_id, shard, revision=revision).metadata

    def _insist(self, attempt: Callable[[], Any]) -> Any:
        """Try until it works, ever more patiently, as long as what went wrong may pass.

        Raises:
            PermissionError: the Hub does not allow it.
        """
        begin, wait = time.monotonic(), 1.0
        while True:
            try:
                return attempt()
            except (RepositoryNotFoundError, RemoteEntryNotFoundError):
                raise
            except (HTTPError, LocalEntryNotFoundError) as error:  # the second: a download without a connection
                response = error.response if isinstance(error, HfHubHTTPError) else None
                if response is not None and response.status_code in (401, 403):
                    raise PermissionError(
                        f"The Hub does not let you write to {self.repo_id}. Log in with `hf auth login`, or pass a "
                        "token that may write there with --hub_token."
                    ) from error
                if response is not None and response.status_code not in TRANSIENT:
                    raise
                if time.monotonic() - begin > self.patience:
                    raise
                asked = response.headers.get("Retry-After", "") if response is not None else ""
                pause = float(asked) if asked.isdigit() else wait * random.uniform(0.5, 1)
                logger.warning(f"{self.repo_id}: {str(error).splitlines()[0]}; tried again in {pause:.1f} s.")
                self.retries += 1
                time.sleep(pause)
                wait = min(2 * wait, 300)


def meeting_place(args: TrainingArguments) -> MeetingPlace | None:
    """The repository that training arguments name, or none without `push_to_hub`."""
    if not args.push_to_hub:
        return None
    return MeetingPlace(args.hub_model_id, Path(args.output_dir), args.hub_token)


def _worker_of(directory: Path) -> str:
    identity = directory / CHECKPOINTS_FOLDER / "worker"
    if not identity.is_file():
        identity.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(identity, lambda path: path.write_text(uuid.uuid4().hex, encoding="utf-8"))
    return identity.read_text(encoding="utf-8")


def _claim_name(block_index: int) -> str:
    return f"{CLAIMS_FOLDER}/block-{block_index:02d}.json"
