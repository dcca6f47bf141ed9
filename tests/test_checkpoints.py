"""What interrupts a run, and that it goes on where it was."""

import builtins
import dataclasses
import gc
import os
import random
import shutil
import signal
import subprocess
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from torch.utils._pytree import tree_leaves

from conftest import BLOCKS, MODEL, arguments
from noprop_hf.arguments import PretrainingArguments
from noprop_hf.checkpoints import (
    MANIFEST_NAME,
    PREEMPTED,
    DurableTrainer,
    checkpoints_of,
    read_manifest,
    write_manifest,
)
from noprop_hf.model_directory import read_metadata
from noprop_hf.pretraining import pretrain_embeddings
from noprop_hf.shards_noprop import EMBEDDINGS_SHARD, block_shard
from noprop_hf.training import BlockTrainer, train_blocks


ONE = dataclasses.replace(BLOCKS, blocks="2", sample_prompts=[])
SAVES = {"eval_strategy": "no", "save_steps": 1, "save_total_limit": 2}


def run(directory: Path, data, options: dict) -> None:
    """Train one block, in a process of its own."""
    gc.freeze()  # see `freeze` of conftest.py
    torch.set_num_threads(1)
    train_blocks(data, ONE, arguments(directory, **options))


def start(directory: Path, data, **options):
    context = get_context("forkserver")
    context.set_forkserver_preload(["noprop_hf.training"])
    process = context.Process(target=run, args=(directory, data, SAVES | options))
    process.start()
    return process


def same_bits(directory: Path, other: Path) -> bool:
    one, two = (load_file(path / block_shard(2)) for path in (directory, other))
    return all(torch.equal(one[name], two[name]) for name in one | two)


@pytest.fixture(scope="module")
def undisturbed(phase1, data, tmp_path_factory) -> Path:
    """A block trained for 12 steps in one go."""
    directory = Path(shutil.copytree(phase1, tmp_path_factory.mktemp("undisturbed") / "model"))
    train_blocks(data, ONE, arguments(directory, **SAVES, max_steps=12))
    return directory


def test_killed_again_and_again_it_ends_with_the_same_bits(directory, data, undisturbed):
    """SIGKILL at random moments; with a checkpoint at every step, many of them while one is written."""
    moments, kills = random.Random(0), 0
    checkpoints = directory / "checkpoints" / "block-02"
    while True:
        begun = newest_step(checkpoints)
        process = start(directory, data, max_steps=12)
        if moments.random() < 0.3:  # before its first step, or a little later
            process.join(timeout=moments.uniform(0, 0.5))
        else:
            while process.exitcode is None and newest_step(checkpoints) == begun:
                time.sleep(0.001)
            process.join(timeout=moments.uniform(0, 0.03))
        if process.exitcode is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
        for _, path in checkpoints_of(checkpoints):
            assert read_manifest(path) is not None, f"{path} has its name and is not whole"
    assert process.exitcode == 0
    assert kills >= 5
    print(f"{kills} kills")
    assert same_bits(directory, undisturbed)


def newest_step(checkpoints: Path) -> int:
    return max((step for step, _ in checkpoints_of(checkpoints)), default=0)


def test_sigterm_saves_first(directory, data, undisturbed):
    process = start(directory, data, max_steps=12, save_strategy="no")
    process.join(timeout=4)
    while process.exitcode is None:
        process.terminate()
        process.join(timeout=0.5)
    saved = checkpoints_of(directory / "checkpoints" / "block-02")
    if process.exitcode == PREEMPTED:
        assert len(saved) == 1 and not (directory / block_shard(2)).exists()
    train_blocks(data, ONE, arguments(directory, **SAVES, max_steps=12))
    assert same_bits(directory, undisturbed)


CONSTANT = {"lr_scheduler_type": "constant", "max_steps": 4, "eval_strategy": "steps", "eval_steps": 4}


def remake(directory: Path, data, **options) -> dict[str, torch.Tensor]:
    """The table of phase 1 and one block, made again from their checkpoints where those exist."""
    phase_1, args = PretrainingArguments(pretraining_max_steps=3), arguments(directory, **(CONSTANT | options))
    for name in (EMBEDDINGS_SHARD, block_shard(2)):
        (directory / name).unlink(missing_ok=True)
    pretrain_embeddings(MODEL, data, phase_1, args)
    train_blocks(data, ONE, args)
    assert read_metadata(directory / block_shard(2))["steps"] == "4"
    return load_file(directory / EMBEDDINGS_SHARD) | load_file(directory / block_shard(2))


@pytest.fixture(scope="module")
def constant(data, tmp_path_factory) -> dict[str, torch.Tensor]:
    return remake(tmp_path_factory.mktemp("constant") / "model", data)


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_what_is_made_again_from_its_last_checkpoint_takes_no_further_step(data, tmp_path, constant, monkeypatch):
    """With a learning rate that is not zero at the end, a further step would show."""
    assert equal(remake(tmp_path / "model", data), constant)
    monkeypatch.setattr(DurableTrainer, "training_step", None)
    for _ in range(2):
        assert equal(remake(tmp_path / "model", data), constant)


OPERATIONS = [(builtins, "open"), *((os, name) for name in ("open", "fsync", "mkdir", "replace", "rename", "unlink"))]
OPERATIONS += [(os, "remove"), (os, "rmdir")]


def record(directory: Path, states: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before every file operation from here on, copy the directory, if it is not as it was at the last copy.

    A process that is killed leaves what the system has of its files. So each copy is what a SIGKILL leaves there.
    """
    seen, copying = set(), False

    def before(operation):
        def operate(*args, **kwargs):
            nonlocal copying
            if not copying:
                copying = True
                files = [(str(path), path.lstat().st_size, path.lstat().st_mtime_ns) for path in directory.rglob("*")]
                if tuple(files) not in seen:
                    seen.add(tuple(files))
                    shutil.copytree(directory, states / str(len(seen)))
                copying = False
            return operation(*args, **kwargs)

        return operate

    for module, name in OPERATIONS:
        monkeypatch.setattr(module, name, before(getattr(module, name)))


@pytest.mark.slow
def test_killed_before_any_file_operation_it_ends_with_the_same_bits(data, tmp_path, monkeypatch):
    """The whole job at a constant learning rate, where a step too many would show.

    With `KILLS=all` in the environment, it goes on from all states, which takes some minutes, else from a sample.
    """
    model, phase_1 = dataclasses.replace(MODEL, num_blocks=2), PretrainingArguments(pretraining_max_steps=2)

    def job(directory: Path) -> dict[str, bytes]:
        args = arguments(directory, lr_scheduler_type="constant", max_steps=2, save_steps=1, eval_strategy="no")
        pretrain_embeddings(model, data, phase_1, args)
        train_blocks(data, dataclasses.replace(BLOCKS, sample_prompts=[]), args, model)
        files = [
            path for folder in (directory, directory / "pretraining") for path in folder.iterdir() if path.is_file()
        ]
        return {str(path.relative_to(directory)): content(path) for path in files}

    def content(path: Path) -> bytes:
        """Of weights without their metadata, which say how long their training took."""
        return save(load_file(path)) if path.suffix == ".safetensors" else path.read_bytes()

    (tmp_path / "model").mkdir()
    with monkeypatch.context() as patch:
        record(tmp_path / "model", tmp_path / "states", patch)
        whole = job(tmp_path / "model")
    states = sorted((tmp_path / "states").iterdir())
    assert len(states) > 100
    for state in states if os.environ.get("KILLS") == "all" else random.Random(0).sample(states, 15):
        assert job(state) == whole, state


@pytest.mark.parametrize("save_strategy", ["steps", "no"])
@pytest.mark.parametrize("phase", ["pretraining", "block-02"])
@pytest.mark.parametrize("moment", ["training_step", "evaluate", "_save"])
def test_sigterm_at_the_very_end_is_not_lost(data, tmp_path, constant, monkeypatch, moment, phase, save_strategy):
    last_step = (3 if phase == "pretraining" else 4) - (moment == "training_step")
    original, signals = getattr(DurableTrainer, moment), []

    def signalled(self, *args, **kwargs):
        if Path(self.args.output_dir).name == phase and self.state.global_step == last_step and not signals:
            signals.append(os.kill(os.getpid(), signal.SIGTERM))
        return original(self, *args, **kwargs)

    if (moment, save_strategy) == ("_save", "no"):
        pytest.skip("nothing is saved")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(DurableTrainer, moment, signalled)
        remake(tmp_path / "model", data, save_strategy=save_strategy)
    assert ended.value.code == PREEMPTED and signals
    assert not (tmp_path / "model" / (EMBEDDINGS_SHARD if phase == "pretraining" else block_shard(2))).exists()
    monkeypatch.setattr(
        DurableTrainer, "training_step", no_step_of(phase, DurableTrainer.training_step)
    )  # everything was saved
    assert equal(remake(tmp_path / "model", data, save_strategy=save_strategy), constant)


def no_step_of(phase: str, training_step):
    def step(self, *args, **kwargs):
        assert Path(self.args.output_dir).name != phase
        return training_step(self, *args, **kwargs)

    return step


def interrupted(directory: Path, data, **options) -> Path:
    """The checkpoints of a block that was stopped after step 6 of 12."""

    class Stopped(Exception):
        pass

    def stop(self, *args, **kwargs):
        if self.state.global_step == 6:
            raise Stopped
        return training_step(self, *args, **kwargs)

    training_step = BlockTrainer.training_step
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(BlockTrainer, "training_step", stop)
        train_blocks(data, ONE, arguments(directory, **SAVES, max_steps=12, **options))
    return directory / "checkpoints" / "block-02"


def test_8_bit_states_resume_to_the_same_bits(data, tmp_path):
    pytest.importorskip("bitsandbytes")
    straight = tmp_path / "straight"
    wide = dataclasses.replace(MODEL, hidden_size=64, intermediate_size=64)  # smaller weights have states of 32 bits
    pretrain_embeddings(wide, data, PretrainingArguments(), arguments(straight, optim="adamw_8bit"))
    resumed = Path(shutil.copytree(straight, tmp_path / "resumed"))
    checkpoints = interrupted(resumed, data, optim="adamw_8bit")
    states = tree_leaves(torch.load(checkpoints_of(checkpoints)[0][1] / "optimizer.pt")["state"])
    assert any(torch.is_tensor(value) and value.dtype == torch.uint8 and value.numel() >= 4096 for value in states)
    for directory in (straight, resumed):
        train_blocks(data, ONE, arguments(directory, **SAVES, max_steps=12, optim="adamw_8bit"))
    assert same_bits(straight, resumed)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json", MANIFEST_NAME])
@pytest.mark.parametrize("damage", ["truncated", "removed", "altered"])
def test_a_damaged_checkpoint_is_passed_over(directory, data, undisturbed, name, damage, caplog):
    checkpoints = interrupted(directory, data)
    newest = checkpoints_of(checkpoints)[0][1] / name
    content = bytearray(newest.read_bytes())
    if damage == "removed":
        newest.unlink()
    elif damage == "truncated":
        newest.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        newest.write_bytes(content)
    train_blocks(data, ONE, arguments(directory, **SAVES, max_steps=12))
    assert same_bits(directory, undisturbed)


def test_every_bit_of_a_seal_counts(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    write_manifest(tmp_path, {"seed": 11, "optim": "sgd"})
    kept, content = read_manifest(tmp_path), (tmp_path / MANIFEST_NAME).read_bytes()
    assert kept is not None
    for index in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[index // 8] ^= 1 << index % 8
        (tmp_path / MANIFEST_NAME).write_bytes(flipped)
        assert read_manifest(tmp_path) in (None, kept), flipped


def test_no_silent_restart_from_zero(directory, data):
    checkpoints = interrupted(directory, data)
    for _, path in checkpoints_of(checkpoints):
        (path / "optimizer.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="All checkpoints .* are damaged.*Remove that folder to start again"):
        train_blocks(data, ONE, arguments(directory, **SAVES, max_steps=12))


@pytest.mark.parametrize("option", [{"learning_rate": 1e-4}, {"seed": 12}, {"per_device_train_batch_size": 8}])
def test_other_settings_than_those_it_began_with(directory, data, option):
    interrupted(directory, data)
    with pytest.raises(ValueError, match=f"had other settings: {next(iter(option))} was .* and is"):
        train_blocks(data, ONE, arguments(directory, **(SAVES | {"max_steps": 12} | option)))


def test_other_data_than_those_of_the_table(directory, data):
    other = dataclasses.replace(data, max_length=12)
    with pytest.raises(ValueError, match="trained on other data.*corpus.yaml"):
        train_blocks(other, ONE, arguments(directory))


def test_a_loss_that_is_no_number_ends_the_run(directory, data, monkeypatch):
    interrupted(directory, data)
    training_step = BlockTrainer.training_step

    def explode(self, model, *args, **kwargs):
        if self.state.global_step == 8:
            next(model.parameters()).data.fill_(float("nan"))
        return training_step(self, model, *args, **kwargs)

    monkeypatch.setattr(BlockTrainer, "training_step", explode)
    with pytest.raises(FloatingPointError, match="Lower --learning_rate"):
        train_blocks(data, ONE, arguments(directory, **SAVES, max_steps=12))
    kept = checkpoints_of(directory / "checkpoints" / "block-02")
    assert [step for step, _ in kept] == [8, 7]
    assert all(weight.isfinite().all() for weight in load_file(kept[0][1] / "model.safetensors").values())


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system, which needs root")
def test_a_full_disk_is_told_and_loses_nothing(directory, data, undisturbed, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20M", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("cannot mount a file system here")
    try:
        full = Path(shutil.copytree(directory, disk / "model"))
        checkpoints = interrupted(full, data)
        kept = checkpoints_of(checkpoints)
        with pytest.raises(OSError), open(disk / "filler", "wb") as filler:
            while True:
                filler.write(bytes(4096))
                filler.flush()
        with pytest.raises(OSError, match="The disk is full. Free space and run the same command again"):
            train_blocks(data, ONE, arguments(full, **SAVES, max_steps=12))
        assert not (full / block_shard(2)).exists()
        assert checkpoints_of(checkpoints) == kept
        (disk / "filler").unlink()
        train_blocks(data, ONE, arguments(full, **SAVES, max_steps=12))
        assert same_bits(full, undisturbed)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
