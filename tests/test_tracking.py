import dataclasses
import json
import runpy
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback, TrainerState

from conftest import BLOCKS, MODEL, ROOT, arguments, reconfigure
from noprop_hf import training as training_module
from noprop_hf.arguments import PretrainingArguments
from noprop_hf.commands.train import finish
from noprop_hf.plotting import draw_run
from noprop_hf.pretraining import pretrain_embeddings
from noprop_hf.tracking import TrackingCallback
from noprop_hf.training import BlockTrainer, train_blocks


Run = dict[str, list[tuple[int, float | str]]]  # steps and values by name

EVALUATED = {"eval_context_nats", "eval_denoising_nats", "eval_bound_nats", "eval_runtime"}
EVALUATED |= {"eval_samples_per_second", "eval_steps_per_second"}
COUNTED = {"epoch", "grad_norm", "learning_rate", "train_runtime", "train_samples_per_second", "train_steps_per_second"}
LOSSES = {"loss", "context_loss", "denoising_loss", "eval_loss", "train_loss"}


def tensorboard_runs(directory: Path) -> dict[str, Run]:
    runs = {}
    for folder in sorted({path.parent for path in directory.rglob("*tfevents*")}):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
        run: Run = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
        for name in events.Tags()["tensors"]:
            texts = [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors(name)]
            run[name.removesuffix("/text_summary")] = texts
        runs[folder.relative_to(directory).as_posix()] = run
    return runs


def trackio_runs(project: str) -> dict[str, Run]:
    from trackio.sqlite_storage import SQLiteStorage

    runs: dict[str, Run] = {}
    for record in SQLiteStorage.get_run_records(project):
        run = runs[record["name"]] = defaultdict(list)
        for entry in SQLiteStorage.get_logs(project, record["name"], run_id=record["id"]):
            for name in entry.keys() - {"step", "timestamp"}:
                run[name].append((entry["step"], entry[name]))
    return runs


def wandb_runs(directory: Path) -> list[tuple[str, Run]]:
    """What is in the files of offline runs: records of protobuf in blocks of 32 KiB, after 7 bytes of header."""
    from wandb.proto.wandb_internal_pb2 import Record

    runs = []
    for path in sorted(directory.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        content, position, part = path.read_bytes(), 7, b""
        title, run = "", defaultdict(list)
        while position + 7 <= len(content):
            left = 2**15 - position % 2**15
            if left < 7:
                position += left
                continue
            size, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
            part += content[position + 7 : position + 7 + size]
            position += 7 + size
            if kind not in (1, 4):  # a whole record, or the last part of one
                continue
            record, part = Record.FromString(part), b""
            title = record.run.display_name or title
            assert record.run.run_group in ("model", "")
            for item in record.history.item:
                name = item.key or "/".join(item.nested_key)
                if not name.startswith("_"):
                    run[name].append((record.history.step.num, json.loads(item.value_json)))
        runs.append((title, run))
    return runs


def shown_as(key: str, unit: str = "_nats") -> str:
    """The name that trackers are to show for a value of a trainer's log."""
    name = key + unit if key in LOSSES else key
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"


def logged(directory: Path, folder: str, unit: str = "_nats") -> Run:
    """What the state of a trainer has, by the names that trackers are to show."""
    history = json.loads((directory / "checkpoints" / folder / "trainer_state.json").read_text())["log_history"]
    run: Run = defaultdict(list)
    for entry in history:
        for key in entry.keys() - {"step", "total_flos"}:
            run[shown_as(key, unit)].append((entry["step"], pytest.approx(entry[key], rel=1e-6)))
    return run


def without_samples(run: Run, steps: list[int]) -> Run:
    """A run without its texts, after a look at those."""
    texts = run["eval/samples"]
    assert [step for step, _ in texts] == steps
    assert all(text.startswith("'the cat' -> '") and len(text) > 16 for _, text in texts)
    return {key: values for key, values in run.items() if key != "eval/samples"}


def once_per_step(run: Run) -> Run:
    """Of several values at a step, the last: `epoch` is logged with everything."""
    return {name: list(dict(values).items()) for name, values in run.items()}


def only(blocks: str):
    return dataclasses.replace(BLOCKS, blocks=blocks)


def names(unit: str = "_nats") -> set[str]:
    return {shown_as(key, unit) for key in EVALUATED | COUNTED | LOSSES}


@pytest.fixture
def stop_at_5(monkeypatch) -> Callable:
    """Trains what is interrupted in its fifth step; the checkpoint is of the third."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    class StoppedTrainer(BlockTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, callbacks=[Stop()], **kwargs)

    def train(*args) -> None:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(training_module, "BlockTrainer", StoppedTrainer)
            train_blocks(*args)

    return train


# --- trackers ---------------------------------------------------------------------------------------------------------


def test_tensorboard_has_what_each_block_logs_by_its_name(directory, data):
    train_blocks(data, only("1-2"), arguments(directory, report_to=["tensorboard"]))
    runs = tensorboard_runs(directory)
    assert set(runs) == {"runs/block_01", "runs/block_02"}  # and nothing of the stock callback
    for index in (1, 2):
        block = f"block_{index:02d}"
        run = without_samples(runs[f"runs/{block}"], [3, 6])
        assert run == logged(directory, f"block-{index:02d}")
        assert set(run) == names()
        assert [step for step, _ in run["train/loss_nats"]] == [2, 4, 6]


def test_phase_1_is_tracked(data, tmp_path):
    args = arguments(tmp_path / "model", report_to=["tensorboard"])
    directory = pretrain_embeddings(MODEL, data, PretrainingArguments(pretraining_max_steps=4), args)
    runs = tensorboard_runs(directory)
    assert set(runs) == {"runs/embeddings"}
    run = runs["runs/embeddings"]
    assert run == logged(directory, "pretraining")
    assert {"train/loss_nats", "eval/loss_nats", "train/learning_rate"} < set(run)


def test_a_squared_error_is_not_called_nats(directory, data):
    reconfigure(directory, loss_type="mse")
    train_blocks(data, only("1"), arguments(directory, report_to=["tensorboard"]))
    run = without_samples(tensorboard_runs(directory)["runs/block_01"], [3, 6])
    assert run == logged(directory, "block-01", unit="")
    assert set(run) == names(unit="")


def test_the_evaluation_after_the_end_is_tracked(directory, data):
    train_blocks(data, only("1"), arguments(directory, report_to=["tensorboard"], eval_strategy="no"))
    run = tensorboard_runs(directory)["runs/block_01"]
    assert run == logged(directory, "block-01")
    assert [step for step, _ in run["eval/context_nats"]] == [6]


def test_tensorboard_forgets_what_an_interrupted_block_logged_after_its_checkpoint(directory, data, stop_at_5):
    args = (data, only("2"), arguments(directory, report_to=["tensorboard"]))
    stop_at_5(*args)
    stopped = tensorboard_runs(directory)["runs/block_02"]
    assert [step for step, _ in stopped["train/loss_nats"]] == [2, 4]
    train_blocks(*args)
    assert len(list(directory.glob("runs/block_02/*tfevents*"))) == 2
    run = without_samples(tensorboard_runs(directory)["runs/block_02"], [3, 6])
    assert run == logged(directory, "block-02")
    assert [step for step, _ in run["train/loss_nats"]] == [2, 4, 6]


def test_trackio(directory, data, stop_at_5, trackio_folder):
    utils = pytest.importorskip("trackio.utils")
    assert trackio_folder == utils.TRACKIO_DIR
    options = {"report_to": ["trackio"], "project": "blocks"}
    train_blocks(data, only("1"), arguments(directory, **options))
    stop_at_5(data, only("2"), arguments(directory, **options))
    train_blocks(data, only("2"), arguments(directory, **options))
    assert list(trackio_folder.glob("blocks*.db"))
    runs = trackio_runs("blocks")
    assert set(runs) == {"model-block_01", "model-block_02"}
    run = without_samples(runs["model-block_01"], [3, 6])
    assert run == logged(directory, "block-01")
    assert set(run) == names()
    resumed = runs["model-block_02"]
    assert [step for step, _ in resumed["train/loss_nats"]] == [2, 4, 4, 6]  # it forgets nothing
    expected = once_per_step(logged(directory, "block-02"))["train/loss_nats"]
    assert once_per_step(resumed)["train/loss_nats"] == expected


def test_wandb(directory, data, stop_at_5, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    options = {"report_to": ["wandb", "tensorboard"]}
    train_blocks(data, only("1"), arguments(directory, **options))
    stop_at_5(data, only("2"), arguments(directory, **options))
    train_blocks(data, only("2"), arguments(directory, **options))
    (first, run), (stopped, begin), (resumed, end) = wandb_runs(tmp_path)
    assert (first, stopped, resumed) == ("model-block_01", "model-block_02", "model-block_02")
    run = without_samples(run, [3, 6])
    assert run == once_per_step(logged(directory, "block-01"))
    assert set(run) == names()
    assert [step for step, _ in begin["train/loss_nats"]] == [2, 4]
    expected = logged(directory, "block-02")["train/loss_nats"]
    assert end["train/loss_nats"] == expected[1:]
    assert set(tensorboard_runs(directory)) == {"runs/block_01", "runs/block_02"}  # both at once


def test_the_results_of_the_main_job_are_tracked(trained, data, tmp_path):
    directory = Path(shutil.copytree(trained, tmp_path / "model"))
    training = arguments(directory, report_to=["tensorboard"])
    finish(SimpleNamespace(data=data, blocks=BLOCKS, training=training), directory)
    details = json.loads((directory / "results.json").read_text())["details"]
    runs = tensorboard_runs(directory)
    assert set(runs) == {f"runs/{split}" for split in details} and "validation" in details
    for split, nats in details.items():
        expected = {"bound/nats": nats["bound"], "predictive/nats": nats["predictive"]}
        expected |= {f"bound/block_{index:02d}": nats["block_nats"][index] for index in range(4)}
        assert runs[f"runs/{split}"] == {name: [(0, pytest.approx(v, rel=1e-6))] for name, v in expected.items()}


def test_nobody_but_the_main_process_tracks_and_none_means_none(directory, data, trained):
    assert not (trained / "runs" / "block_00").exists()  # trained without `report_to`
    with TrackingCallback(directory, "block_00") as callback:
        args, state = arguments(directory, report_to=["tensorboard"]), TrainerState(is_world_process_zero=False)
        callback.on_train_begin(args, state, None, model=SimpleNamespace(config=MODEL))
        callback.on_log(args, state, None, logs={"loss": 1.0})
    assert not callback.trackers and not (directory / "runs").exists()


# --- curves -----------------------------------------------------------------------------------------------------------


def lines(axes) -> list[list[tuple[float, float]]]:
    return [line.get_xydata().tolist() for line in axes.get_lines()]


def curve(state: Path, key: str) -> list[tuple[float, float]]:
    history = json.loads(state.read_text())["log_history"]
    points = [[entry["step"], entry[key]] for entry in history if key in entry]
    assert points
    return points


def test_curves_have_the_values_of_the_state_files(directory, data, stop_at_5):
    train_blocks(data, only("0"), arguments(directory))
    stop_at_5(data, only("2"), arguments(directory))
    checkpoints = directory / "checkpoints"
    assert not (checkpoints / "block-02" / "trainer_state.json").exists()
    half_written = checkpoints / "block-02" / "checkpoint-5"
    half_written.mkdir()
    (half_written / "trainer_state.json").write_text('{"log_history": [')

    phase_1 = checkpoints / "pretraining" / "trainer_state.json"
    blocks = [checkpoints / "block-00" / "trainer_state.json"]
    blocks += [checkpoints / "block-02" / "checkpoint-3" / "trainer_state.json"]
    figure = draw_run(directory)
    embeddings, *of_blocks = figure.axes
    assert [text.get_text() for text in embeddings.get_legend().get_texts()] == ["in training", "evaluated"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["block-00", "block-02"]
    assert lines(embeddings) == [curve(phase_1, "loss"), curve(phase_1, "eval_loss")]
    assert [axes.get_title() for axes in of_blocks if axes.axison] == [
        "blocks: loss in training",
        "blocks, evaluated: on pure noise",
        "blocks, evaluated: at their own noise level",
        "blocks, evaluated: bound of each alone",
    ]
    keys = ("loss", "eval_context_nats", "eval_denoising_nats", "eval_bound_nats")
    for axes, key in zip(of_blocks, keys, strict=False):
        assert lines(axes) == [curve(state, key) for state in blocks]
        assert axes.get_legend() is None

    nats = {
        "block_nats": [3.0, -0.5, -0.25],
        "block_errors": [0.1, 0.02, 0.01],
        "context": [3.0, 2.9, 2.8],
        "predictive": 2.2,
    }
    (directory / "results.json").write_text(json.dumps({"details": {"validation": {}, "test": nats}}))
    figure = draw_run(directory)
    bound = figure.axes[5]
    figure.draw_without_rendering()
    panels = [axes.get_window_extent() for axes in figure.axes]
    for legend in (figure.legends[0], bound.get_legend()):  # covers nothing
        assert not any(legend.get_window_extent().overlaps(panel) for panel in panels)
    assert bound.axison and bound.get_title() == "model on test: bound up to each block"
    curves = dict(zip([line.get_label() for line in bound.lines], lines(bound), strict=True))
    assert np.allclose(lines(bound)[0], [[0, 3.0], [1, 2.5], [2, 2.25]])
    assert np.allclose(curves["each block alone, on pure noise"], [[0, 3.0], [1, 2.9], [2, 2.8]])
    assert [nats for _, nats in curves["predictive distribution of all blocks"]] == [2.2, 2.2]
    assert [text.get_text() for text in bound.texts] == ["3.000", "-0.500", "-0.250"]


def test_a_single_value_is_seen(tmp_path):
    folder = tmp_path / "checkpoints" / "pretraining"
    folder.mkdir(parents=True)
    history = [{"step": 2, "loss": 3.5}, {"step": 4, "loss": 3.0}, {"step": 5, "eval_loss": 3.25}]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    (axes,) = draw_run(tmp_path).axes
    training, evaluated = axes.get_lines()
    assert training.get_xydata().tolist() == [[2, 3.5], [4, 3]] and evaluated.get_xydata().tolist() == [[5, 3.25]]
    assert (training.get_marker(), evaluated.get_marker()) == (".", "D")
    assert [(text.get_text(), text.xy) for text in axes.texts] == [("3.250", (5, 3.25))]


def test_the_state_of_a_finished_block_has_its_last_evaluation(directory, data):
    train_blocks(data, only("1"), arguments(directory, eval_strategy="no", save_strategy="no"))
    assert [step for step, _ in curve(directory / "checkpoints/block-01/trainer_state.json", "eval_bound_nats")] == [6]


def test_the_script_draws_or_tells_why_not(directory, tmp_path, monkeypatch, capsys):
    def run(*options: Path | str) -> None:
        monkeypatch.setattr(sys, "argv", ["plot_run.py", *map(str, options)])
        runpy.run_path(str(ROOT / "scripts" / "plot_run.py"), run_name="__main__")

    for path, options in ((directory / "curves.png", ()), (tmp_path / "a.png", ("--save", tmp_path / "a.png"))):
        run(directory, *options)  # phase 1 alone
        assert path.read_bytes().startswith(b"\x89PNG")
        assert f"Saved the plot to {path}." in capsys.readouterr().out
    empty = tmp_path / "empty" / "checkpoints" / "block-00"
    empty.mkdir(parents=True)
    for _ in range(2):  # no state, and one without a log
        with pytest.raises(SystemExit, match="nothing to draw in .*empty"):
            run(tmp_path / "empty")
        (empty / "trainer_state.json").write_text('{"log_history": []}')
