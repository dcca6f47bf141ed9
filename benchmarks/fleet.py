#!/usr/bin/env python
"""Train one model with a fleet of independent workers, which are killed at random and whose network fails.

python benchmarks/fleet.py             # 24 workers, 12 blocks, 200 kills: some minutes on two cores
python benchmarks/fleet.py --small     # 4 workers, 3 blocks, 10 kills
python benchmarks/fleet.py --simulate  # up to 1,000 workers, 96 blocks, a simulated clock: see fleet_simulation.py

The workers are processes with a directory each. They share a repository of a local server with the Hub's protocol,
through the real client. Requests fail, are cut off, or get wrong content or no answer; clocks of workers are wrong; the
repository also holds invalid claims and blocks, and checkpoints with other weights. In the end, every block must be
published once, trained by one worker, and equal bit for bit that of a single process that trains all blocks in order.
"""

import gc
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

from hub_server import TOKEN, Chaos, HubServer, hub_server


REPOSITORY = "user/fleet"


@dataclass
class FleetArguments:
    results: str = field(default="benchmarks/results/fleet.json", metadata={"help": "File of the results."})
    num_workers: int = field(default=24, metadata={"help": "Workers."})
    num_blocks: int = field(default=12, metadata={"help": "Blocks."})
    num_kills: int = field(default=200, metadata={"help": "Kills."})
    life: float = field(default=8.0, metadata={"help": "Seconds a worker lives, on average, while there are kills."})
    steps: int = field(default=40, metadata={"help": "Steps of training per block; every other is saved."})
    fault_rate: float = field(default=0.15, metadata={"help": "Share of the requests that go wrong."})
    timeout: float = field(default=2.0, metadata={"help": "Seconds after which a worker gives a request up."})
    clocks: float = field(default=1e6, metadata={"help": "Seconds, at most, by which the clock of a worker is wrong."})
    seed: int = field(default=0, metadata={"help": "Seed of kills, faults and clocks."})
    small: bool = field(default=False, metadata={"help": "4 workers, 3 blocks, 10 kills."})

    def __post_init__(self):
        if self.small:
            self.num_workers, self.num_blocks, self.num_kills = 4, 3, 10


# --- what a worker does -----------------------------------------------------------------------------------------------


def settings(args: FleetArguments, folder: Path, directory: Path) -> dict[str, Any]:
    from transformers import TrainingArguments

    from noprop_hf.arguments import BlockArguments
    from noprop_hf.data import DataArguments

    return {
        "data_args": DataArguments(train_file=str(folder / "text.txt"), max_length=16, max_eval_samples=20),
        "block_args": BlockArguments(sample_prompts=[]),
        "training_args": TrainingArguments(
            output_dir=str(directory),
            max_steps=args.steps,
            per_device_train_batch_size=4,
            learning_rate=5e-3,
            lr_scheduler_type="constant",  # a schedule that ends at 0 would hide a step too many
            save_steps=2,
            save_total_limit=2,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
    }


def prepare(args: FleetArguments, folder: Path) -> None:
    """Run phase 1 and publish it, and train all blocks in order without the Hub."""
    from noprop_hf.arguments import ModelArguments, PretrainingArguments
    from noprop_hf.meeting_place import MeetingPlace
    from noprop_hf.pretraining import pretrain_embeddings
    from noprop_hf.training import train_blocks

    one = settings(args, folder, folder / "in_order")
    model_args = ModelArguments(
        vocab_size=300,
        hidden_size=16,
        num_blocks=args.num_blocks,
        num_layers_per_block=1,
        num_attention_heads=2,
        intermediate_size=24,
        attention_dropout=0.1,
    )
    phase1 = PretrainingArguments(pretraining_max_steps=10)
    pretrain_embeddings(model_args, one["data_args"], phase1, one["training_args"])
    MeetingPlace(REPOSITORY, folder / "in_order").publish_table()
    train_blocks(**one)
    plant(folder / "in_order" / "checkpoints", folder / "planted" / "checkpoints")


def plant(checkpoints: Path, target: Path) -> None:
    """Write checkpoints with zero weights from which a run would resume if it found them, and a worker's name."""
    import torch
    from safetensors.torch import load_file, save_file

    from noprop_hf.checkpoints import MANIFEST_NAME, checkpoints_of, write_manifest

    for block in checkpoints.glob("block-??"):
        _, path = checkpoints_of(block)[-1]
        identity = json.loads((path / MANIFEST_NAME).read_text())["identity"]
        planted = Path(shutil.copytree(path, target / block.name / path.name))
        (weights,) = planted.glob("*.safetensors")
        zeros = {name: torch.zeros_like(tensor) for name, tensor in load_file(weights).items()}
        save_file(zeros, weights, metadata={"format": "pt"})
        write_manifest(planted, identity)
    (target / "worker").write_text("everybody")


def work(args: FleetArguments, folder: Path, worker: int) -> None:
    """Train the blocks that no other worker trains."""
    import torch

    from noprop_hf.meeting_place import MeetingPlace
    from noprop_hf.training import train_blocks

    gc.freeze()  # `Trainer` collects garbage when training begins, which takes long with all modules
    torch.set_num_threads(1)
    directory = folder / f"worker-{worker:02d}"
    directory.mkdir(exist_ok=True)
    error, clock = Random(f"{args.seed} {worker}").uniform(-args.clocks, args.clocks), time.time
    time.time = lambda: clock() + error
    log = os.open(directory / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    place = MeetingPlace(REPOSITORY, directory, timeout=args.timeout)
    train_blocks(**settings(args, folder, directory), place=place)


# --- the harness ------------------------------------------------------------------------------------------------------


class Fleet:
    """Worker processes that are restarted whenever they end."""

    def __init__(self, args: FleetArguments, folder: Path):
        self.args, self.folder = args, folder
        self.context = get_context("forkserver")
        self.context.set_forkserver_preload(["noprop_hf.training"])  # makes starts fast
        self.processes: dict[int, Any] = {}
        self.rests: dict[int, float] = {}
        self.failures = 0

    def run(self, target, *arguments: Any):
        process = self.context.Process(target=target, args=(self.args, self.folder, *arguments))
        process.start()
        return process

    def keep_running(self) -> None:
        for worker in range(self.args.num_workers):
            process = self.processes.get(worker)
            if process is not None and process.exitcode is not None:
                self.failures += process.exitcode > 0
                del self.processes[worker]
                self.rests[worker] = time.monotonic() + (0 if process.exitcode else 2)  # nothing to do: wait a little
            if worker not in self.processes and time.monotonic() > self.rests.get(worker, 0):
                self.processes[worker] = self.run(work, worker)

    def kill(self, worker: int) -> bool:
        process = self.processes.get(worker)
        if process is None or process.exitcode is not None:
            return False
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        return True

    def stop(self) -> None:
        for worker in list(self.processes):
            self.kill(worker)


def block_names(args: FleetArguments) -> list[str]:
    return [f"block-{index:02d}.safetensors" for index in range(args.num_blocks)]


def published(args: FleetArguments, server: HubServer) -> dict[str, bytes]:
    repository = server.repositories[REPOSITORY]
    files = repository.commits[repository.head]
    return {name: files[name] for name in block_names(args) if name in files}


def leave(server: HubServer, files: dict[str, bytes]) -> None:
    """Commit files as another user of the repository."""
    with server.lock:
        repository = server.repositories[REPOSITORY]
        repository.commit({**repository.commits[repository.head], **files}, "left by another user")


def first_junk(args: FleetArguments, folder: Path) -> dict[str, bytes]:
    """Return invalid files with names of claims, and planted checkpoints."""
    contents = [b"", b"[]", b"{}", b"\xff", b"[" * 10**5, b"9" * 10**6, b'{"worker": "x", "step": 0, "time": 1e99}']
    claims = {f"workers/block-{index:02d}.json": contents[index % len(contents)] for index in range(args.num_blocks)}
    planted = [path for path in (folder / "planted").rglob("*") if path.is_file()]
    return claims | {path.relative_to(folder / "planted").as_posix(): path.read_bytes() for path in planted}


def more_junk(random: Random) -> dict[str, bytes]:
    """Return a random file, whose name may resemble that of a claim or block."""
    names = ("workers/block-xx.json", "workers/block-1.json", "block-foo.txt", "block-00.safetensors.bak", "notes.txt")
    return {random.choice([*names, "block-99.safetensors", "pytorch_model.bin"]): random.randbytes(1000)}


def simulate(args: FleetArguments, folder: Path, server: HubServer) -> dict[str, Any]:
    random = Random(args.seed)
    (folder / "text.txt").write_text(make_text(random))
    fleet = Fleet(args, folder)
    preparation = fleet.run(prepare)
    preparation.join()
    if preparation.exitcode:
        raise SystemExit("The model in order could not be trained.")
    leave(server, first_junk(args, folder))
    server.chaos = Chaos(args.fault_rate, Random(args.seed + 1), silence=2 * args.timeout)
    begin, kills, reported, junk_files = time.monotonic(), 0, 0.0, 0
    while len(published(args, server)) < args.num_blocks or kills < args.num_kills:
        fleet.keep_running()
        if random.random() < 0.3:
            leave(server, more_junk(random))
            junk_files += 1
        time.sleep(random.uniform(0, 2 * args.life / args.num_workers))
        if kills < args.num_kills:
            kills += fleet.kill(random.randrange(args.num_workers))
        if time.monotonic() - reported > 10:
            reported = time.monotonic()
            print(f"{reported - begin:4.0f} s: {len(published(args, server))} blocks, {kills} kills", flush=True)
    fleet.stop()
    logs = [path.read_text() for path in folder.glob("worker-*/log.txt")]
    retries = sum(log.count("retrying in") for log in logs)
    errors = {line for log in logs for line in log.splitlines() if re.match(r"[\w.]*(Error|Exception)\b", line)}
    print("\n".join(sorted(errors)))
    return {
        "workers": args.num_workers,
        "blocks": args.num_blocks,
        "kills": kills,
        "failures": fleet.failures,
        "faults": sum(server.chaos.counts.values()),
        "faults_by_kind": dict(server.chaos.counts),
        "retries": retries,
        "junk_files": junk_files,
        "seconds": time.monotonic() - begin,
        **compare(args, folder, server),
    }


def compare(args: FleetArguments, folder: Path, server: HubServer) -> dict[str, Any]:
    """Compare the published blocks with those trained in order, and count lost and repeated ones."""
    import torch
    from safetensors.torch import load, load_file

    blocks, identical = published(args, server), True
    expected = {path.name: path for path in (folder / "in_order").glob("block-*.safetensors")}
    for name in blocks.keys() & expected.keys():
        ours, theirs = load(blocks[name]), load_file(expected[name])
        identical &= ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    versions: dict[str, set[bytes]] = {}
    for files in server.repositories[REPOSITORY].commits.values():
        for name, content in files.items():
            if name in expected:
                versions.setdefault(name, set()).add(content)
    trained = [path.name for path in folder.glob("worker-*/block-*.safetensors")]
    return {
        "lost": len(expected.keys() - blocks.keys()),
        "duplicated": sum(len(contents) - 1 for contents in versions.values()),
        "trained_twice": len(trained) - len(set(trained)),
        "bit_identical": identical and len(expected) == args.num_blocks,
    }


def make_text(random: Random) -> str:
    words = "the cat sat on a mat while old dogs slept near warm stones and birds sang over green hills".split()
    return "\n".join(" ".join(random.choices(words, k=8)) + "." for _ in range(400)) + "\n"


def main() -> None:
    from transformers import HfArgumentParser

    if "--simulate" in sys.argv:
        import fleet_simulation

        parser = HfArgumentParser(fleet_simulation.SimulationArguments, description=fleet_simulation.__doc__)
        return fleet_simulation.main(*parser.parse_args_into_dataclasses())
    (args,) = HfArgumentParser(FleetArguments, description=__doc__).parse_args_into_dataclasses()
    folder = Path(tempfile.mkdtemp(prefix="fleet-"))
    with hub_server() as server:
        os.environ |= {  # before the client is imported, in the workers
            "HF_ENDPOINT": server.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(folder / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
        }
        figures = simulate(args, folder, server)
    from common import commit, write_results

    figures = {"commit": commit(), **figures}
    write_results(Path(args.results), figures)
    print(json.dumps(figures, indent=1))
    shutil.rmtree(folder)
    if any(figures[name] for name in ("lost", "duplicated", "trained_twice")) or not figures["bit_identical"]:
        raise SystemExit("The fleet's model differs from that of a single process.")


if __name__ == "__main__":
    main()
