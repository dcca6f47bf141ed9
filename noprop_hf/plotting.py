"""Figures of the learning curves of a run, finished or not, and of the bound by block."""

import json
import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformers.trainer import TRAINER_STATE_NAME

from .checkpoints import checkpoints_of
from .layout import CHECKPOINTS_FOLDER, RESULTS_FILE
from .shards_noprop import PRETRAINING_FOLDER


# Title, whether the panel is of blocks (or of phase 1), and the logged values: solid line, dashed line.
PANELS = (
    ("embeddings: loss", False, ("loss", "eval_loss")),
    ("blocks: loss in training", True, ("loss",)),
    ("blocks, evaluated: on pure noise", True, ("eval_context_nats",)),
    ("blocks, evaluated: at their own noise level", True, ("eval_denoising_nats",)),
    ("blocks, evaluated: bound of each alone", True, ("eval_bound_nats",)),
)


def read_history(folder: Path) -> list[dict[str, float]]:
    """Read the log of a trainer from its final state or, before the end, its newest checkpoint; empty if missing."""
    for path in (folder, *(checkpoint for _, checkpoint in checkpoints_of(folder))):
        try:
            return json.loads((path / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["log_history"]
        except (OSError, ValueError, LookupError, TypeError):  # a run may be writing or removing it now
            continue
    return []


def draw_run(directory: Path) -> Figure:
    """Draw the curves of phase 1 and of all blocks, and the bound by block once the model is evaluated.

    Args:
        directory: a model directory, of which any part may be missing.

    Raises:
        FileNotFoundError: if the directory holds neither logs nor results.
    """
    folders = [path for path in sorted((directory / CHECKPOINTS_FOLDER).glob("block-*")) if path.is_dir()]
    folders.append(directory / CHECKPOINTS_FOLDER / PRETRAINING_FOLDER)
    histories = {folder.name: history for folder in folders if (history := read_history(folder))}
    panels = []
    for title, of_blocks, keys in PANELS:
        names = [name for name in histories if (name != PRETRAINING_FOLDER) == of_blocks]
        if any(key in entry for name in names for entry in histories[name] for key in keys):
            panels.append((title, names, keys))
    results = directory / RESULTS_FILE
    num_panels = len(panels) + results.is_file()
    if num_panels == 0:
        raise FileNotFoundError(
            f"There is nothing to draw in {directory}: no {CHECKPOINTS_FOLDER}/*/{TRAINER_STATE_NAME} with logged "
            "values. A run writes it with every checkpoint (--save_steps), and when a block is done."
        )

    columns = min(3, num_panels)
    rows = math.ceil(num_panels / columns)
    figure = Figure(figsize=(5 * columns, 3.6 * rows), layout="constrained")
    figure.suptitle(directory.resolve().name)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (title, names, keys) in zip(grid, panels, strict=False):
        for index, name in enumerate(names):
            for key, style, kind in zip(keys, ("-", "--"), ("in training", "evaluated"), strict=False):
                points = [(entry["step"], entry[key]) for entry in histories[name] if key in entry]
                if points:
                    label = name if name != PRETRAINING_FOLDER else kind
                    is_single = len(points) == 1  # visible only as a marker
                    marker = "D" if is_single else "."
                    axes.plot(*zip(*points, strict=True), style, marker=marker, color=f"C{index}", label=label)
                    if is_single and len(names) == 1:
                        annotate(axes, f"{points[0][1]:.3f}", points[0], offset=(-6, 6), ha="right")
        axes.set(title=title, xlabel="step", ylabel="nats per token" if "nats" in keys[0] else "loss")
        if PRETRAINING_FOLDER in names:
            axes.legend(fontsize="small")
    # One legend for all panels of blocks, outside of them, where it covers no curve.
    curves = {line.get_label(): line for axes in grid for line in axes.get_lines() if line.get_label() in histories}
    if curves:
        names = sorted(curves)
        figure.legend([curves[name] for name in names], names, loc="outside lower center", ncols=min(len(names), 8))
    if results.is_file():
        draw_bound(grid[len(panels)], results)
    for axes in grid[num_panels:]:
        axes.set_axis_off()
    return figure


def annotate(axes: Axes, text: str, point: tuple[float, float], offset: tuple[float, float], **options) -> None:
    """Write a text beside a point, in front of all curves."""
    box = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
    options |= {"textcoords": "offset points", "fontsize": "small", "bbox": box, "zorder": 10}
    axes.annotate(text, point, xytext=offset, **options)


def bound_figure(directory: Path) -> Figure:
    """Draw the bound of an evaluated model by block.

    Raises:
        ValueError: if the results of the evaluation are damaged.
    """
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    draw_bound(figure.add_subplot(), directory / RESULTS_FILE)
    return figure


def draw_bound(axes: Axes, results: Path) -> None:
    """Draw the bound of the chain up to each block on the last evaluated split, labelled with the block's share.

    Each block alone and the predictive distribution are drawn for comparison.

    Raises:
        ValueError: if the results of the evaluation are damaged.
    """
    try:
        split, nats = list(json.loads(results.read_text(encoding="utf-8"))["details"].items())[-1]
        totals = np.cumsum(nats["block_nats"])
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(f"{results} is damaged. Remove it and run `noprop train` again, which evaluates.") from error
    blocks = range(len(totals))
    axes.errorbar(blocks, totals, yerr=nats["block_errors"], marker="o", capsize=4, label="bound of the chain so far")
    for block, (total, part) in enumerate(zip(totals, nats["block_nats"], strict=True)):
        text = f"{part:+.3f}" if block else f"{part:.3f}"
        annotate(axes, text, (block, total), offset=(6, 6))
    axes.plot(blocks, nats["context"], marker="s", linestyle=":", label="each block alone, on pure noise")
    axes.axhline(nats["predictive"], color="gray", linewidth=1, label="predictive distribution of all blocks")
    axes.set(
        title=f"model on {split}: bound up to each block", xlabel="block", ylabel="nats per token", xticks=list(blocks)
    )
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.2))  # below, where it covers nothing
    axes.margins(0.15)
