#!/usr/bin/env python
"""Measure the speed-up by two processes, and plan the traffic of a fleet.

python benchmarks/scaling.py           # four blocks by one process and by two, one thread each: nine minutes
python benchmarks/scaling.py --small   # the same, too short for a reliable figure
python benchmarks/scaling.py --plan    # no training: the bytes of twelve blocks on twelve machines

The efficiency is the time of one process divided by twice that of two. Both times are of whole commands, with start-up.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from transformers import HfArgumentParser

from common import commit, write_results
from noprop_hf import NoPropConfig
from noprop_hf.planning import Sizes, checkpoint_bytes


ROOT = Path(__file__).parent.parent
PROCESSES = (1, 2)


@dataclass
class ScalingArguments:
    results: str = field(default="benchmarks/results/scaling.json", metadata={"help": "File of the results."})
    num_blocks: int = field(default=4, metadata={"help": "Blocks."})
    steps: int = field(default=800, metadata={"help": "Steps of training per block."})
    repeats: int = field(default=1, metadata={"help": "Runs of each kind, in turns; the fastest counts."})
    small: bool = field(default=False, metadata={"help": "10 steps, once."})
    plan: bool = field(default=False, metadata={"help": "Only print what twelve machines download, upload and keep."})

    def __post_init__(self):
        if self.small:
            self.steps, self.repeats = 10, 1


def train(folder: Path, processes: int) -> float:
    """Seconds that all blocks take, from the command to its end."""
    directory = folder / f"by_{processes}"
    shutil.copytree(folder / "phase1", directory)
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launch" / "2_processes_cpu.yaml")]
    launch += ["--num_processes", str(processes), "--num_cpu_threads_per_process", "1", "--main_process_port", "0"]
    if processes == 1:  # accelerate's configuration for several processes cannot start a single one
        launch = []
    script = [str(ROOT / "scripts" / "train_blocks.py"), str(folder / "recipe.yaml"), "--output_dir", str(directory)]
    begin = time.perf_counter()
    run(*launch, *script)
    seconds = time.perf_counter() - begin
    shutil.rmtree(directory)
    return seconds


def run(*command: str) -> None:
    done = subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stdout)


def measure(args: ScalingArguments, folder: Path) -> dict:
    random = Random(0)
    words = ["".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=random.randint(2, 9))) for _ in range(2000)]
    text = "\n".join(" ".join(random.choices(words, k=12)) for _ in range(10_000))
    (folder / "text.txt").write_text(text)
    (folder / "recipe.yaml").write_text(
        f"""
train_file: {folder / "text.txt"}
output_dir: {folder / "phase1"}
max_length: 64
max_eval_samples: 32
vocab_size: 2048
hidden_size: 128
num_blocks: {args.num_blocks}
num_layers_per_block: 2
intermediate_size: 352
pretraining_max_steps: 5
max_steps: {args.steps}
per_device_train_batch_size: 32
save_strategy: "no"
sample_prompts: []
disable_tqdm: true
report_to: none
"""
    )
    run(str(ROOT / "scripts" / "pretrain_embeddings.py"), str(folder / "recipe.yaml"))
    seconds: dict[int, list[float]] = {processes: [] for processes in PROCESSES}
    for _ in range(args.repeats):
        for processes in PROCESSES:
            seconds[processes].append(train(folder, processes))
            print(f"{processes} process(es): {seconds[processes][-1]:.1f} s", flush=True)
    one, two = (min(seconds[processes]) for processes in PROCESSES)
    return {
        "commit": commit(),
        "processes": 2,
        "efficiency": one / (2 * two),
        "seconds": {str(processes): values for processes, values in seconds.items()},
        "blocks": args.num_blocks,
        "steps": args.steps,
        "cores": os.cpu_count(),
    }


def plan(num_blocks: int = 12) -> str:
    """Compute the traffic and disk space of each machine of a fleet, at the sizes of the T4 recipe."""
    config = NoPropConfig(num_blocks=num_blocks)
    sizes = Sizes.of(config)
    rows = {
        "downloads, once: the table and the model of phase 1": sizes.table + sizes.phase1,
        "uploads, once: its block": sizes.block,
        "keeps on disk, at most: those, and checkpoints": (
            sizes.table + sizes.phase1 + sizes.block + checkpoint_bytes(sizes.block)
        ),
        "the whole model, which no machine needs for training": sizes.model,
    }
    lines = [f"{num_blocks} blocks on {num_blocks} machines, fp32; each machine", ""]
    return "\n".join(lines + [f"{size / 1e6:8,.0f} MB  {name}" for name, size in rows.items()])


def main() -> None:
    (args,) = HfArgumentParser(ScalingArguments, description=__doc__).parse_args_into_dataclasses()
    print(plan())
    if args.plan:
        return
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(args, Path(folder))
    write_results(Path(args.results), figures)
    print(f"efficiency of two processes: {figures['efficiency']:.3f}")


if __name__ == "__main__":
    main()
