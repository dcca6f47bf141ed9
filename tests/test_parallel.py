"""Several processes at once, and workers that meet on a Hub."""

import json
import os
import re
import socket
import subprocess
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load, load_file
from transformers import TrainingArguments

from conftest import ROOT, programs, run_python, sentences
from hub_server import TOKEN, Fault
from noprop_hf.parallel import GROUP_VARIABLES, arrange_processes, hold_lock, holder_of, lock, run_once


RECIPE = """
vocab_size: 300
hidden_size: 16
num_blocks: 3
num_layers_per_block: 1
num_attention_heads: 2
intermediate_size: 24
attention_dropout: 0.1
max_length: 16
max_eval_samples: 40
pretraining_max_steps: 8
max_steps: 12
per_device_train_batch_size: 4
learning_rate: 5e-3
save_steps: 6
sample_prompts: [the cat]
"""


@pytest.fixture
def args(tmp_path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True)


# --- who works with whom ----------------------------------------------------------------------------------------------


def launched(monkeypatch, rank: int, world_size: int) -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")


def test_processes_that_train_blocks_of_their_own_forget_the_others(monkeypatch):
    launched(monkeypatch, 1, 3)
    arrange_processes("auto", 3)
    assert not any(name in os.environ for name in GROUP_VARIABLES)


def test_processes_that_train_together_stay_together(monkeypatch):
    launched(monkeypatch, 1, 3)
    arrange_processes("data", 3)
    assert os.environ["WORLD_SIZE"] == "3"


def test_more_processes_than_blocks(monkeypatch):
    launched(monkeypatch, 4, 5)
    with pytest.raises(ValueError, match="5 processes were launched for 2 blocks"):
        arrange_processes("blocks", 2)
    with pytest.raises(SystemExit) as ended:  # the fifth of five, when four can be shared out
        arrange_processes("auto", 2)
    assert ended.value.code == 0


def hold(path: Path, seconds: float) -> None:
    with lock(path):
        time.sleep(seconds)


def test_a_lock_ends_with_its_process(tmp_path, args):
    path = tmp_path / "block-00.lock"
    process = get_context("fork").Process(target=hold, args=(path, 60))
    process.start()
    while holder_of(path) in (None, "another process"):  # locked, and then signed
        time.sleep(0.01)
    assert f"process {process.pid} on" in holder_of(path)
    with hold_lock(path, args) as mine:
        assert not mine
    process.kill()
    process.join()
    assert holder_of(path) is None
    with hold_lock(path, args) as mine:
        assert mine
    with hold_lock(path, args, is_done=lambda: True) as mine:
        assert not mine


def test_once_waits_for_another_process(tmp_path, args):
    path, done, calls = tmp_path / "table.lock", tmp_path / "done", []
    process = get_context("fork").Process(target=hold, args=(path, 60))
    process.start()
    while holder_of(path) is None:
        time.sleep(0.01)
    process.kill()  # it dies with the work undone, so somebody else does it
    run_once(path, args, done.exists, lambda: (calls.append(1), done.touch()))
    run_once(path, args, done.exists, lambda: calls.append(2))
    assert calls == [1]


# --- launched for real ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    (folder / "train.txt").write_text("\n".join(sentences(400)) + "\n")
    path = folder / "tiny.yaml"
    path.write_text(f"output_dir: {folder / 'model'}\ntrain_file: {folder / 'train.txt'}\n{RECIPE}")
    return path


@pytest.fixture(scope="module")
def in_order(recipe) -> Path:
    """The model that one process makes."""
    run_python("scripts/train.py", str(recipe))
    return recipe.parent / "model"


def blocks(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(directory.glob("block-*.safetensors")) for k, v in load_file(path).items()}


def same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def together(processes: int, *command: str) -> str:
    """Run a script in processes whose environment is that of a launched group; returns all they print."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    ranks = [group | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]
    variables = [{name: str(value) for name, value in rank.items()} for rank in ranks]
    status, output = programs().ours.run(*command, cwd=ROOT, variables=variables)
    assert status == 0, output
    return output


def launch(processes: int, *command: str, fails: bool = False) -> str:
    config = str(ROOT / "launch" / "2_processes_cpu.yaml")
    launcher = ["-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", str(processes)]
    return run_python(*launcher, "--main_process_port", "0", *command, fails=fails)


@pytest.mark.slow
def test_block_parallel_equals_one_process_bit_for_bit(recipe, in_order, tmp_path):
    output = launch(2, "-m", "noprop_hf", "train", str(recipe), "--output_dir", str(tmp_path / "model"))
    assert "works on it" in output  # two processes were at it
    assert output.count("NoProp, all blocks") == 1  # and one evaluated
    assert same_bits(blocks(tmp_path / "model"), blocks(in_order))


@pytest.mark.slow
def test_data_parallel_is_training_with_a_larger_batch(recipe, tmp_path):
    """Without dropout and noise (block 0 has none), two processes with 4 rows each are one with 8."""
    config = ["--attention_dropout", "0", "--sampled_softmax", "false"]  # candidates are those of a process's rows
    same = [*config, "--blocks", "0", "--optim", "sgd", "--learning_rate", "0.1"]
    phase1 = ["scripts/pretrain_embeddings.py", str(recipe), *config]
    run_python(*phase1, "--output_dir", str(tmp_path / "one"))
    subprocess.run(["cp", "-r", str(tmp_path / "one"), str(tmp_path / "two")], check=True)
    train = ["scripts/train_blocks.py", str(recipe), *same]
    eight = ["--per_device_train_batch_size", "8"]
    run_python(*train, *eight, "--output_dir", str(tmp_path / "one"))
    together(2, *train, "--parallelism", "data", "--output_dir", str(tmp_path / "two"))
    one, two = blocks(tmp_path / "one"), blocks(tmp_path / "two")
    assert one.keys() == two.keys()
    apart = {name: (one[name] - two[name]).abs().max().item() for name in one}
    assert max(apart.values()) < 1e-5, apart


DRAWS = """
import sys
import torch
from datasets import Dataset
from transformers import TrainingArguments
from noprop_hf.checkpoints import DurableTrainer

class Draws(torch.nn.Linear):
    def forward(self, x):
        sys.stdout.write(f"DRAW {torch.rand(()).item()} {x.tolist()}\\n")
        return {"loss": super().forward(x[:, None].float()).square().mean()}

torch.manual_seed(0)
args = TrainingArguments(sys.argv[1], max_steps=4, per_device_train_batch_size=2, use_cpu=True, disable_tqdm=True)
DurableTrainer(model=Draws(1, 1), args=args, train_dataset=Dataset.from_dict({"x": range(16)})).train()
"""


@pytest.mark.slow
def test_processes_of_a_group_share_the_data_and_not_the_noise(tmp_path):
    script = tmp_path / "draws.py"
    script.write_text(DRAWS)
    printed = re.findall(r"DRAW (\S+) (\[.+?\])", together(2, str(script), str(tmp_path)))
    draws = [draw for draw, _ in printed]
    rows = [row for _, batch in printed for row in json.loads(batch)]
    assert len(draws) == len(set(draws)) == 8
    assert sorted(rows) == list(range(16))


@pytest.mark.slow
def test_groups_of_processes_train_a_block_each(recipe, tmp_path):
    output = together(5, "scripts/train.py", str(recipe), "--num_blocks", "2", "--output_dir", str(tmp_path / "model"))
    assert "Process 4 exits: 2 blocks are trained by 2 processes each" in output
    assert "NoProp, all blocks" in output
    states = sorted((tmp_path / "model" / "checkpoints").glob("block-*/checkpoint-12/rng_state_*.pth"))
    assert len(states) == 4  # two processes for each of two blocks


@pytest.mark.slow
def test_workers_that_never_meet(recipe, in_order, tmp_path):
    programs().forget()
    server = programs().hub
    hub = ["--push_to_hub", "true", "--hub_model_id", "user/tiny"]

    def run(script: str, directory: str, *options: str, fails: bool = False) -> str:
        target = ["--output_dir", str(tmp_path / directory)]
        command = [f"scripts/{script}.py", str(recipe), *target, *hub, *options]
        return run_python(*command, fails=fails, HF_TOKEN=TOKEN)

    def status() -> str:
        return run_python("scripts/status.py", "user/tiny", HF_TOKEN=TOKEN)

    assert "The repository user/tiny does not exist" in run("train_blocks", "b", fails=True)
    run("pretrain_embeddings", "a")
    repository = server.repositories["user/tiny"]
    assert repository.messages == ["initial commit", "Table, tokenizer and configuration"]
    assert "0 of 3 blocks are done" in status()

    server.faults += [
        Fault("POST", "/commit/", 500),
        Fault("POST", "/commit/", None),
        Fault("POST", "/commit/", 412),
    ]
    assert "retrying in" in run("train_blocks", "b", "--blocks", "1")
    assert [message for message in repository.messages if "Block" in message] == [
        "Block 1 is claimed",
        "Block 1 is trained",
    ]
    assert not any(name.startswith("workers/") for name in repository.files("main"))
    assert "1 of 3 blocks are done" in status()

    # Block 2 is claimed by another worker: skipped, until --take_over says that the worker is gone.
    claim = {"worker": "someone", "step": 70, "time": time.time() - 600}
    files = dict(repository.files("main"))
    repository.commit(files | {"workers/block-02.json": json.dumps(claim).encode()}, "Block 2 is claimed")
    assert "block  2  training  worker someone, at step 70 10 minutes ago" in status()
    output = run("train_blocks", "c")
    assert "Block 1 is trained already" in output
    assert "Block 2 is skipped: worker someone" in output
    assert "2 of 3 blocks are done" in status()
    run("train_blocks", "c", "--take_over", "true")
    assert "3 of 3 blocks are done" in status()

    published = {name: load(content) for name, content in repository.files("main").items() if name[:6] == "block-"}
    ours = {name: tensor for shard in published.values() for name, tensor in shard.items()}
    assert same_bits(ours, blocks(in_order))

    # What differs is told before it trains.
    repository.commit({n: c for n, c in repository.files("main").items() if n != "block-00.safetensors"}, "gone")
    assert "was trained on other data" in run("train_blocks", "d", "--max_length", "12", fails=True)
    run_python("scripts/pretrain_embeddings.py", str(recipe), "--output_dir", str(tmp_path / "e"), "--seed", "5")
    assert "holds the table of another run" in run("pretrain_embeddings", "e", "--seed", "5", fails=True)
    assert "holds another table than user/tiny" in run("train_blocks", "e", "--seed", "5", fails=True)


@pytest.mark.slow
def test_a_fleet_loses_nothing(tmp_path):
    output = run_python("benchmarks/fleet.py", "--small", "--results", str(tmp_path / "fleet.json"))
    figures = json.loads((tmp_path / "fleet.json").read_text())
    assert figures["kills"] >= 10 and figures["faults"] > 0, output
    assert not any(figures[name] for name in ("lost", "duplicated", "trained_twice", "failures")), output
    assert figures["bit_identical"]


# --- launch files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "launch").glob("*.yaml")), ids=lambda path: path.name)
def test_launch_files_are_configurations_of_accelerate(path):
    assert load_config_from_file(str(path)).num_processes >= 1


@pytest.mark.parametrize("path", sorted((ROOT / "launch").glob("*.sh")), ids=lambda path: path.name)
def test_launch_scripts_are_shell_scripts(path):
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_a_slurm_task_is_queued_again_when_it_has_saved(tmp_path):
    """With programs in place of SLURM's, which write down what happens."""
    log = tmp_path / "log"
    step = f"trap 'sleep 0.3; echo saved >> {log}; exit 143' TERM; echo begun >> {log}; while true; do sleep 0.05; done"
    for name, code in {"srun": step, "scontrol": f'echo "$@" >> {log}'}.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{code}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "3", "SLURM_JOB_ID": "17"}
    task = subprocess.Popen(["bash", str(ROOT / "launch" / "slurm_blocks.sh"), "demo"], env=os.environ | variables)
    while not log.exists():
        time.sleep(0.01)
    task.terminate()  # as SLURM signals the shell before the time limit
    assert task.wait(10) == 143
    assert log.read_text().split("\n") == ["begun", "saved", "requeue 17", ""]
