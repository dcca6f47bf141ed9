"""A fleet of many workers with a simulated clock: `python benchmarks/fleet.py --simulate`.

Workers run the package's own loop over blocks (`training._train_waiting`) and its own requests (`MeetingPlace`), with
retries and pauses. Simulated are the clock, the Hub behind `HfApi` (a repository in memory, with latencies and limits)
and the training of a block, which only takes time. Workers are threads that take turns: one runs at a time, when its
next event is due. A run depends on its seed only and takes no time but that of computing.

Limits of the Hub: requests of an account in windows of 5 minutes are those of a free user in
https://huggingface.co/docs/hub/rate-limits (September 2025). The limit of commits is not documented: 128 per hour is
that of the Hub's error message, taken to count the commits to a repository that succeed. The regions, failures and
sizes below are assumptions.
"""

import gc
import heapq
import io
import json
import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from email.utils import formatdate
from itertools import count, product
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import SafetensorsFileMetadata

from common import commit, write_results
from hub_server import Conflict, Repository, blob
from noprop_hf import NoPropConfig, hub, meeting_place, training
from noprop_hf.layout import block_name, checkpoint_folder
from noprop_hf.meeting_place import BLOCK_NAME, CLAIM_NAME, MeetingPlace
from noprop_hf.model_directory import save_shard
from noprop_hf.planning import Sizes
from noprop_hf.shards_noprop import EMBEDDINGS_SHARD, PRETRAINING_FOLDER, block_shard


HOUR = 3600.0
START = 1.7e9  # of the simulated clock, in seconds since 1970
LOOK_SECONDS, COMMIT_SECONDS = 0.05, 0.3  # that the Hub works on a request, and on a commit
Answer = TypeVar("Answer")


@dataclass
class Region:
    """Workers of similar distance and equipment.

    Attributes:
        share: share of all workers.
        speed: median of the speed of training, relative to the reference; speeds are log-normal.
        spread: standard deviation of its logarithm.
        round_trip: seconds to the Hub and back.
        upload, download: bytes per second.
    """

    share: float
    speed: float
    spread: float
    round_trip: float
    upload: float
    download: float


REGIONS = {
    "north america": Region(0.35, 1.0, 0.5, 0.04, 2.5e6, 25e6),
    "europe": Region(0.35, 0.8, 0.5, 0.10, 2.5e6, 25e6),
    "asia": Region(0.20, 0.7, 0.6, 0.22, 2.5e6, 12e6),
    "elsewhere": Region(0.10, 0.4, 0.6, 0.25, 1e6, 5e6),
}


@dataclass
class SimulationArguments:
    simulate: bool = field(default=True, metadata={"help": "Simulate the fleet."})
    results: str = field(default="benchmarks/results/fleet_simulation.json", metadata={"help": "File of the results."})
    num_workers: list[int] = field(default_factory=lambda: [10, 100, 1000], metadata={"help": "Workers, per run."})
    accounts: list[int] = field(
        default_factory=lambda: [0, 1], metadata={"help": "Accounts that workers share, per run; 0: one for each."}
    )
    back_up: list[bool] = field(
        default_factory=lambda: [False, True], metadata={"help": "Whether idle workers repeat slow work, per run."}
    )
    num_blocks: int = field(default=96, metadata={"help": "Blocks."})
    hidden_size: int = field(default=1024, metadata={"help": "Width, which sets the bytes of a block (one layer)."})
    steps: int = field(default=10_000, metadata={"help": "Steps of training per block."})
    save_steps: int = field(default=250, metadata={"help": "Steps between two checkpoints."})
    step_seconds: float = field(default=1.0, metadata={"help": "Seconds of a step at speed 1."})
    arrival_hours: float = field(default=0.5, metadata={"help": "Hours in which the workers join, uniformly."})
    failure_hours: float = field(default=12.0, metadata={"help": "Mean hours until a worker fails; exponential."})
    downtime_hours: float = field(default=1.0, metadata={"help": "Mean hours until it is back; exponential."})
    leave_rate: float = field(default=0.05, metadata={"help": "Share of failures after which a worker never returns."})
    rest_seconds: float = field(
        default=6 * 3600, metadata={"help": "Mean seconds until an ended command is run again."}
    )
    fault_rate: float = field(default=0.01, metadata={"help": "Share of the requests that end with status 503."})
    api_limit: int = field(default=1000, metadata={"help": "API requests of an account in 5 minutes."})
    resolver_limit: int = field(default=5000, metadata={"help": "Downloads of an account in 5 minutes."})
    commit_limit: int = field(default=128, metadata={"help": "Commits to a repository in an hour."})
    max_hours: float = field(default=24 * 30, metadata={"help": "Hours after which a run is ended."})
    seed: int = field(default=0, metadata={"help": "Seed of speeds, failures and faults."})
    small: bool = field(default=False, metadata={"help": "8 workers, 6 blocks."})

    def __post_init__(self):
        if self.small:
            self.num_workers, self.accounts, self.back_up, self.num_blocks = [8], [0], [True], 6


# --- the clock --------------------------------------------------------------------------------------------------------


class Ended(BaseException):
    """The simulation is over."""


class Failed(BaseException):
    """The worker is killed."""


class Clock:
    """A simulated clock, in place of the module `time`. Threads that sleep take turns in the order of their alarms."""

    def __init__(self):
        self.seconds, self.is_over = 0.0, False
        self._alarms: list[tuple[float, int, threading.Lock]] = []
        self._order = count()

    def monotonic(self) -> float:
        return self.seconds

    def time(self) -> float:
        return START + self.seconds

    def sleep(self, seconds: float) -> None:
        """Wait, unless the thread's own `fails_at` comes first."""
        left = getattr(threading.current_thread(), "fails_at", math.inf) - self.seconds
        self._wait(min(seconds, left))
        if left <= seconds:
            raise Failed

    def end(self) -> None:
        self.is_over = True

    def _wait(self, seconds: float) -> None:
        if self.is_over:
            raise Ended
        if self._alarms and self._alarms[0][0] <= self.seconds + seconds:
            alarm = self.set_alarm(seconds)
            self._wake_next()
            alarm.acquire()
        else:  # the next turn is that of this thread
            self.seconds += max(0, seconds)
        if self.is_over:
            raise Ended

    def set_alarm(self, seconds: float) -> threading.Lock:
        alarm = threading.Lock()
        alarm.acquire()  # until its time
        heapq.heappush(self._alarms, (self.seconds + max(0, seconds), next(self._order), alarm))
        return alarm

    def _wake_next(self) -> None:
        if self._alarms:
            self.seconds, _, alarm = heapq.heappop(self._alarms)
            alarm.release()

    def run(self, threads: list[threading.Thread]) -> None:
        """Run threads, each of which calls [`Clock.live`], until all have ended."""
        for thread in threads:
            thread.start()
        self._wake_next()
        for thread in threads:
            thread.join()

    def live(self, work: Callable[[], None], alarm: threading.Lock) -> None:
        """Run a work in the present thread, from the alarm on."""
        alarm.acquire()
        try:
            if not self.is_over:
                work()
        except Ended:
            pass
        finally:
            if self.is_over:
                while self._alarms:
                    with suppress(IndexError):  # the threads that are woken do the same
                        heapq.heappop(self._alarms)[2].release()
            else:
                self._wake_next()


# --- the Hub ----------------------------------------------------------------------------------------------------------


class Limit:
    """At most `quota` requests in every window of `seconds`, for each key."""

    def __init__(self, quota: int, seconds: float):
        self.quota, self.seconds, self.counts = quota, seconds, Counter[tuple[Any, int]]()

    def wait(self, key: Any, now: float) -> float:
        """Return the seconds until a request is allowed; 0 if it is now."""
        window = int(now // self.seconds)
        return (window + 1) * self.seconds - now if self.counts[key, window] >= self.quota else 0

    def count(self, key: Any, now: float) -> None:
        """Count a request that is allowed."""
        self.counts[key, int(now // self.seconds)] += 1


class SimulatedHub:
    """A repository in memory, with its limits, and what has happened to it."""

    def __init__(self, args: SimulationArguments, clock: Clock, files: dict[str, bytes], sizes: dict[str, int]):
        self.args, self.clock, self.sizes = args, clock, sizes
        self.repository = Repository()
        self.repository.commit(files, "Table, tokenizer and configuration")
        self.limits = {
            "api": Limit(args.api_limit, 300),
            "resolvers": Limit(args.resolver_limit, 300),
            "commits": Limit(args.commit_limit, HOUR),
        }
        self.random = Random(f"{args.seed} faults")
        self.answered: dict[str, list[float]] = {kind: [] for kind in self.limits}  # the times of requests
        self.refused = Counter[str]()
        self.bytes = Counter[str]()
        self.objects: set[bytes] = set()  # large files that have arrived, in a commit or not
        self.states: list[tuple[float, int, int]] = []  # seconds, published blocks, claims
        self.taken_over = 0
        self._infos: dict[str, ModelInfo] = {}

    def info(self) -> ModelInfo:
        head = self.repository.head
        if head not in self._infos:
            files = self.repository.commits[head]
            siblings = [{"rfilename": name, **blob(name, content)} for name, content in files.items()]
            self._infos = {head: ModelInfo(id="user/fleet", sha=head, siblings=siblings)}
        return self._infos[head]

    def files(self, revision: str) -> dict[str, bytes]:
        files = self.repository.files(revision)
        assert files is not None
        return files

    def size(self, name: str, content: bytes) -> int:
        return self.sizes.get("block" if BLOCK_NAME.fullmatch(name) else name, len(content))

    def change(self, added: dict[str, bytes], deleted: list[str], message: str, parent: str | None) -> None:
        before = self.repository.files("main") or {}
        self.repository.change(added, deleted, message, parent)
        self.limits["commits"].count("the repository", self.clock.seconds)
        for name in filter(CLAIM_NAME.fullmatch, added):
            if name in before and json.loads(before[name])["worker"] != json.loads(added[name])["worker"]:
                self.taken_over += 1
        names = self.repository.files("main") or {}
        done, claims = (len([*filter(pattern.fullmatch, names)]) for pattern in (BLOCK_NAME, CLAIM_NAME))
        self.states.append((self.clock.seconds, done, claims))
        self.clock.is_over = done == self.args.num_blocks


class SimulatedApi:
    """The methods of `HfApi` that a worker calls, each with the requests that the real one sends."""

    def __init__(self, hub: SimulatedHub, place: MeetingPlace, account: int, region: Region):
        self.hub, self.place, self.account, self.region = hub, place, account, region

    def request(
        self, kind: str, answer: Callable[[], Answer], received: int = 0, seconds: float = LOOK_SECONDS
    ) -> Answer:
        """Send a request that the Hub answers after half of a round trip, with the state that it has then.

        Files of a revision do not change, so that a download takes a single turn.

        Raises:
            HfHubHTTPError: 429 beyond a limit, 503 at random, 412 for a commit whose parent is not the newest state.
        """
        hub, clock, region = self.hub, self.hub.clock, self.region
        self.place._before(SimpleNamespace(extensions={}))  # raises if the deadline is over
        there, back = region.round_trip / 2 + seconds, region.round_trip / 2 + received / region.download
        clock.sleep(there + back if kind == "resolvers" else there)
        status, wait = 200, 0.0
        for limit in ("api", "commits") if kind == "commits" else (kind,):
            key = "the repository" if limit == "commits" else self.account
            wait = hub.limits[limit].wait(key, clock.seconds)
            hub.answered[limit].append(clock.seconds)
            if wait:
                hub.refused[limit] += 1
                status = 429
                break
            if limit != "commits":  # commits count once they have succeeded
                hub.limits[limit].count(key, clock.seconds)
        if status == 200 and hub.random.random() < hub.args.fault_rate:
            status = 503
            hub.refused["faults"] += 1
        if status == 200:
            try:
                result = answer()
            except Conflict:
                status = 412
                hub.refused["conflicts"] += 1
        if status == 200:
            hub.bytes["down"] += received
            clock.sleep(0 if kind == "resolvers" else back)
            return result
        url = SimpleNamespace(path="/user/fleet/resolve/" if kind == "resolvers" else "/api/models/user/fleet")
        headers = {"Date": formatdate(clock.time(), usegmt=True)}
        headers |= {"Retry-After": str(math.ceil(wait))} if wait else {}
        response: Any = SimpleNamespace(status_code=status, headers=headers, request=SimpleNamespace(url=url))
        self.place._after(response)
        raise HfHubHTTPError(f"status {status}", response=response)

    def repo_info(self, repo_id: str, files_metadata: bool, timeout: float) -> ModelInfo:
        return self.request("api", self.hub.info)

    def preupload_lfs_files(self, repo_id: str, additions: list[CommitOperationAdd]) -> None:
        self.request("api", lambda: None)

    def create_commit(
        self, repo_id: str, operations: list[Any], commit_message: str, parent_commit: str | None
    ) -> None:
        added = {
            operation.path_in_repo: content_of(operation)
            for operation in operations
            if isinstance(operation, CommitOperationAdd)
        }
        deleted = [operation.path_in_repo for operation in operations if isinstance(operation, CommitOperationDelete)]
        if added:
            self.request("api", lambda: None)  # which files are large
        for name, content in added.items():
            if name.endswith(".safetensors"):
                self.request("api", lambda: None)  # where to upload it
                if content in self.hub.objects:
                    continue
                self.hub.clock.sleep(self.region.round_trip + self.hub.size(name, content) / self.region.upload)
                self.hub.bytes["up"] += self.hub.size(name, content)
                self.hub.objects.add(content)
        change = (added, deleted, commit_message, parent_commit)
        self.request("commits", lambda: self.hub.change(*change), seconds=COMMIT_SECONDS)

    def hf_hub_download(self, repo_id: str, name: str, revision: str, local_dir: Path, **options: Any) -> str:
        content = self.hub.files(revision)[name]
        self.request("resolvers", lambda: None)  # its hash
        self.request("resolvers", lambda: None, received=self.hub.size(name, content))
        path = Path(local_dir, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return str(path)

    def parse_safetensors_file_metadata(
        self, repo_id: str, name: str, revision: str, timeout: float
    ) -> SafetensorsFileMetadata:
        content = self.hub.files(revision)[name]
        self.request("resolvers", lambda: None, received=min(100_000, self.hub.size(name, content)))
        entries = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return SafetensorsFileMetadata(entries.pop("__metadata__"), {})


def content_of(operation: CommitOperationAdd) -> bytes:
    source = operation.path_or_fileobj
    if isinstance(source, bytes):
        return source
    assert not isinstance(source, io.BufferedIOBase)
    return Path(source).read_bytes()


# --- workers ----------------------------------------------------------------------------------------------------------


class Worker(threading.Thread):
    """A machine that runs `noprop train-blocks` again and again, and fails at times.

    Args:
        index: the number of the worker, which with the seed decides its region, speed and failures.
        folder: the folder of all model directories.
    """

    def __init__(
        self,
        hub: SimulatedHub,
        args: SimulationArguments,
        index: int,
        account: int,
        folder: Path,
        back_up: bool = False,
    ):
        super().__init__(daemon=True)
        self.hub, self.args, self.clock, self.back_up = hub, args, hub.clock, back_up
        self.random = Random(f"{args.seed} {index}")
        regions = list(REGIONS.values())
        (self.region,) = self.random.choices(regions, [region.share for region in regions])
        speed = self.region.speed * math.exp(self.random.gauss(0, self.region.spread))
        self.step_seconds = args.step_seconds / speed
        self.fails_at = math.inf
        self.steps_trained, self.saved_steps = 0, Counter[int]()
        self.directory = folder / f"worker-{index:04d}"
        self.directory.mkdir()
        self.place = MeetingPlace("user/fleet", self.directory)
        self.place.api = SimulatedApi(hub, self.place, account, self.region)
        self.alarm = self.clock.set_alarm(self.random.uniform(0, args.arrival_hours * HOUR))

    def run(self) -> None:
        self.clock.live(self.live, self.alarm)

    def live(self) -> None:
        while True:
            self.fails_at = self.clock.seconds + self.random.expovariate(1 / (self.args.failure_hours * HOUR))
            try:
                while True:
                    with suppress(ConnectionError):  # without the Hub for an hour, the command ends with a message
                        self.command()
                    self.clock.sleep(self.args.rest_seconds * self.random.uniform(0.5, 1.5))
            except Failed:
                self.fails_at = math.inf
                if self.random.random() < self.args.leave_rate:
                    return
                self.clock.sleep(self.random.expovariate(1 / (self.args.downtime_hours * HOUR)))

    def command(self) -> None:
        """Do what `train_blocks` does, with the requests of its start and its loop over the blocks."""
        if not (self.directory / EMBEDDINGS_SHARD).is_file():
            self.place.fetch_table()
        self.place.check_table()
        published = self.place.blocks()
        run: Any = SimpleNamespace(
            directory=self.directory,
            training_args=SimpleNamespace(process_index=0, world_size=1, should_save=True),
            block_args=SimpleNamespace(take_over=False, back_up=self.back_up),
            place=self.place,
            checkpoint=lambda index: None,
            block_dataset=lambda index: None,
            worker=self,
        )
        training._train_waiting(run, [i for i in range(self.args.num_blocks) if block_shard(i) not in published])

    def train(self, run: Any, index: int) -> None:
        """Take the time of the training of a block, from its last checkpoint on, and publish it."""
        report = training.ReportCallback(run.place, index)
        checkpoints = checkpoint_folder(self.directory, block_name(index))
        while self.saved_steps[index] < self.args.steps:
            steps = min(self.args.save_steps, self.args.steps - self.saved_steps[index])
            begin = self.clock.seconds
            try:
                self.clock.sleep(steps * self.step_seconds)
            finally:
                self.steps_trained += int((self.clock.seconds - begin) / self.step_seconds + 1e-6)
            self.saved_steps[index] += steps
            checkpoints.mkdir(parents=True, exist_ok=True)
            report.on_save(run.training_args, SimpleNamespace(global_step=self.saved_steps[index]), None)
        save_shard(self.directory / block_shard(index), {"weight": torch.full((1,), float(index))}, {})
        run.place.publish_block(index)


class AnyClient:
    """The HTTP client of a process: it has the hooks of whichever repository asks."""

    class Hooks:
        def __contains__(self, hook: Any) -> bool:
            return True

    event_hooks = {"request": Hooks()}


@contextmanager
def simulated(clock: Clock, seed: int) -> Iterator[None]:
    """Run the package by a simulated clock, with the training of a block replaced by [`Worker.train`]."""
    with ExitStack() as stack:
        for module in (hub, meeting_place):
            stack.enter_context(patch.object(module, "time", clock))
            if hasattr(module, "random"):
                stack.enter_context(patch.object(module, "random", Random(f"{seed} {module.__name__}")))
        stack.enter_context(patch.object(hub, "get_session", AnyClient))
        stack.enter_context(patch.object(training, "train_block", lambda run, index: run.worker.train(run, index)))
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.WARNING)
        gc.freeze()
        stack.callback(gc.unfreeze)
        yield


# --- figures ----------------------------------------------------------------------------------------------------------


def shared_files(folder: Path) -> dict[str, bytes]:
    """Create small files with the names of those of phase 1."""
    save_shard(folder / "table.safetensors", {"weight": torch.zeros(1)}, {})
    shard = (folder / "table.safetensors").read_bytes()
    files = {"config.json": b"{}", "tokenizer.json": b"{}", "tokenizer_config.json": b"{}"}
    return files | {EMBEDDINGS_SHARD: shard, f"{PRETRAINING_FOLDER}/model.safetensors": shard}


def fewest_seconds(block_seconds: list[float], num_blocks: int) -> float:
    """Return the time that the given workers need for all blocks at best: no block is shared, and no time is lost.

    Args:
        block_seconds: the time that each worker takes for a block.
    """
    ends = [(seconds, seconds) for seconds in block_seconds]
    heapq.heapify(ends)
    last = 0.0
    for _ in range(num_blocks):
        last, seconds = ends[0]
        heapq.heapreplace(ends, (last + seconds, seconds))
    return last


def rates(times: list[float], window: float, end: float) -> dict[str, float]:
    """Return the mean number of events in a window and the largest in any window of a fixed grid."""
    counts = Counter(int(time // window) for time in times)
    return {"mean": len(times) / (end / window), "peak": max(counts.values(), default=0)}


def simulate(args: SimulationArguments, num_workers: int, accounts: int, back_up: bool = False) -> dict[str, Any]:
    """Simulate a fleet until all blocks are published, and return its figures."""
    clock = Clock()
    config = NoPropConfig(
        vocab_size=50_257,
        hidden_size=args.hidden_size,
        num_blocks=args.num_blocks,
        num_layers_per_block=1,
        num_attention_heads=16,
        intermediate_size=round(8 / 3 * args.hidden_size),
    )
    sizes = Sizes.of(config)
    names = {EMBEDDINGS_SHARD: sizes.table, f"{PRETRAINING_FOLDER}/model.safetensors": sizes.phase1}
    with TemporaryDirectory() as name, simulated(clock, args.seed):
        folder = Path(name)
        repository = SimulatedHub(args, clock, shared_files(folder), {**names, "block": sizes.block})
        workers = [
            Worker(repository, args, index, index % accounts if accounts else index, folder, back_up)
            for index in range(num_workers)
        ]
        watch = threading.Thread(target=clock.live, args=(clock.end, clock.set_alarm(args.max_hours * HOUR)))
        clock.run([*workers, watch])
    end = clock.seconds
    published = sum(BLOCK_NAME.fullmatch(name) is not None for name in repository.files("main"))
    best = fewest_seconds([args.steps * worker.step_seconds for worker in workers], args.num_blocks)
    fluid = args.num_blocks * args.steps / sum(1 / worker.step_seconds for worker in workers)
    trained = sum(worker.steps_trained for worker in workers)
    halves = [seconds for seconds, done, _ in repository.states if 2 * done >= args.num_blocks]
    return {
        "workers": num_workers,
        "accounts": accounts or num_workers,
        "back_up": back_up,
        "num_blocks": args.num_blocks,
        "report_every": meeting_place.REPORT_EVERY,
        "published": published,
        "hours": end / HOUR,
        "hours_half": halves[0] / HOUR if halves else None,
        "hours_best": best / HOUR,
        "hours_fluid": fluid / HOUR,
        "ratio_to_best": end / best if published == args.num_blocks else None,
        "block_bytes": sizes.block,
        "bytes_up": repository.bytes["up"],
        "bytes_down": repository.bytes["down"],
        "commits": len(repository.states),
        "commits_per_hour": rates([seconds for seconds, *_ in repository.states], HOUR, end),
        "commits_tried_per_hour": rates(repository.answered["commits"], HOUR, end),
        "requests_per_minute": {
            kind: rates(repository.answered[kind], 60, end) for kind in ("api", "resolvers", "commits")
        },
        "refused": {kind: repository.refused[kind] for kind in (*repository.limits, "conflicts", "faults")},
        "taken_over": repository.taken_over,
        "steps_lost_share": trained / (published * args.steps) - 1 if published == args.num_blocks else None,
        "workers_that_trained": sum(worker.steps_trained > 0 for worker in workers),
        "states": [[round(seconds / HOUR, 2), done, claims] for seconds, done, claims in sampled(repository.states)],
        "settings": {name: value for name, value in asdict(args).items() if name not in OWN_FIELDS},
    }


OWN_FIELDS = ("simulate", "results", "num_workers", "accounts", "back_up", "num_blocks", "small")


def sampled(states: list[tuple[float, int, int]], points: int = 12) -> list[tuple[float, int, int]]:
    """Select the states at equal distances in time, and the last one."""
    chosen = [
        max(s for s in states if s[0] <= states[-1][0] * point / points)
        for point in range(1, points)
        if states[0][0] <= states[-1][0] * point / points
    ]
    return [*chosen, states[-1]]


def main(args: SimulationArguments) -> None:
    path = Path(args.results)
    kept = json.loads(path.read_text()) if path.is_file() else []
    for num_workers, accounts, back_up in product(args.num_workers, args.accounts, args.back_up):
        row = {"commit": commit(), **simulate(args, num_workers, accounts, back_up)}
        keys = ("workers", "accounts", "back_up", "num_blocks", "report_every")
        kept = [one for one in kept if any(one[key] != row[key] for key in keys)] + [row]
        print(json.dumps({key: value for key, value in row.items() if key not in ("settings", "states")}), flush=True)
        write_results(path, kept)
