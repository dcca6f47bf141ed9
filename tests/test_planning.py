import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer

from conftest import BLOCKS, MODEL, ROOT, arguments, run_python
from noprop_hf import NoPropConfig, NoPropForCausalLM, NoPropForPreTraining
from noprop_hf.arguments import BlockArguments, PretrainingArguments, RunArguments, ShareArguments
from noprop_hf.data import CausalCollator, load_corpus, load_tokenizer, tokenize
from noprop_hf.modeling_noprop import DenoisingBlock, TokenTable
from noprop_hf.planning import PeakBytes, activations, count_steps, group_processes, largest_width, memory, plan
from noprop_hf.pretraining import pretrain_embeddings
from noprop_hf.recipes import Recipe
from noprop_hf.training import BlockTrainer, train_blocks


def recipe_of(directory: Path, data, blocks: BlockArguments = BLOCKS, **options) -> Recipe:
    pretraining = PretrainingArguments(pretraining_max_steps=8)
    training = arguments(directory, **options)
    return Recipe(MODEL, data, pretraining, blocks, ShareArguments(), training, RunArguments(dry_run=True))


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def trainer_of(directory: Path, data, tmp_path: Path, **options) -> BlockTrainer:
    """A trainer of block 1, and all it needs."""
    tokenizer, config = load_tokenizer(str(directory)), NoPropConfig.from_pretrained(directory)
    dataset = tokenize(load_corpus(data), tokenizer, data)
    model = NoPropForCausalLM(config)
    return BlockTrainer(
        DenoisingBlock(config, 1),
        model.model.embed_tokens,
        args=arguments(tmp_path / "trainer", eval_strategy="no", **options),
        train_dataset=dataset["train"],
        data_collator=CausalCollator(tokenizer),
    )


def test_a_run_is_what_was_planned(data, tmp_path):
    directory = tmp_path / "model"
    options = {"max_steps": -1, "num_train_epochs": 0.3, "gradient_accumulation_steps": 2, "save_steps": 4}
    options |= {"eval_steps": 8}
    recipe = recipe_of(directory, data, **options)
    planned = plan(recipe)
    assert listing(tmp_path) == {}

    pretrain_embeddings(recipe.model, data, recipe.pretraining, arguments(directory, **options))
    train_blocks(data, BLOCKS, arguments(directory, **options), MODEL)
    steps = []
    for index in range(4):
        with safe_open(directory / f"block-{index:02d}.safetensors", "pt") as file:
            steps.append(int(file.metadata()["steps"]))
    assert steps == [planned.block.steps] * 4 and planned.block.steps > 8
    saved = directory / "checkpoints" / "pretraining" / f"checkpoint-{planned.phase1.steps}"
    assert json.loads((saved / "trainer_state.json").read_text())["global_step"] == planned.phase1.steps == 8
    last = directory / "checkpoints" / "block-00" / f"checkpoint-{planned.block.steps}"
    epoch = json.loads((last / "trainer_state.json").read_text())["epoch"]
    assert planned.block.epochs == pytest.approx(epoch, rel=0.1)

    tokenizer = load_tokenizer(str(directory))
    corpus = load_corpus(data)
    for split in ("train", "validation"):
        tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in corpus[split]["text"])
        windows = tokens // 16
        found = planned.splits[split]
        assert (found.rows, found.windows, found.tokens) == (len(corpus[split]), windows, 16 * windows)
    assert planned.block.tokens == planned.block.steps * 2 * 4 * 16

    model = NoPropForCausalLM.from_pretrained(directory)
    masked = NoPropForPreTraining.from_pretrained(directory)
    tables = sum(tensor.numel() for tensor in model.model.embed_tokens.state_dict().values())
    frozen = model.model.embed_tokens.weight.numel()
    modules = (model, model.model.blocks[3], masked)
    count = [sum(p.numel() for p in module.parameters()) for module in modules]
    count[0] -= frozen
    sizes = planned.sizes
    assert [sizes.model // 4 - tables, sizes.block // 4, sizes.phase1 // 4] == count
    assert sizes.table == 4 * tables and planned.config.vocab_size == model.config.vocab_size

    checkpoints = size(directory / "checkpoints")
    written = size(directory) - checkpoints
    assert sizes.model + sizes.phase1 < written < planned.model_bytes
    kept = math.ceil(planned.block.steps / 4)
    assert 3 * (2 * sizes.phase1 + 4 * kept * sizes.block) < checkpoints < planned.checkpoint_bytes


def test_what_is_done_is_told_and_nothing_is_written(trained, phase1, data, tmp_path):
    directory = Path(shutil.copytree(phase1, tmp_path / "model"))
    shutil.copy(trained / "block-00.safetensors", directory)
    unfinished = Path("checkpoints", "block-01", "checkpoint-3")
    shutil.copytree(trained / unfinished, directory / unfinished)
    before = listing(tmp_path)
    planned = plan(recipe_of(directory, data))
    assert listing(tmp_path) == before and len(before) > 10
    assert planned.phase1 is None and planned.remaining == {0: 0, 1: 3, 2: 6, 3: 6}
    text = str(planned)
    assert re.search(r"phase 1 +done, skipped\n +block 0 +done, skipped\n +block 1 +resumes from step 3\n", text)
    assert planned.config.noise_levels == NoPropConfig.from_pretrained(directory).noise_levels
    assert "a guess" not in text and "nothing is pushed" in text
    assert planned.blocks_seconds == pytest.approx(15 * planned.block.seconds) and planned.block.seconds > 0
    two = dataclasses.replace(planned, groups=(2, 1))
    assert two.blocks_seconds == pytest.approx(9 * planned.block.seconds)  # 3 + 6, beside 6

    everything = plan(recipe_of(trained, data))
    assert everything.remaining == dict.fromkeys(range(4), 0) and everything.block is None
    assert "blocks 0, 1, 2, 3  done, skipped" in str(everything) and "minutes" not in str(everything)


def test_only_some_blocks(phase1, data):
    planned = plan(recipe_of(phase1, data, dataclasses.replace(BLOCKS, blocks="1,3")))
    assert list(planned.remaining) == [1, 3]
    assert "2 blocks, 1 at a time" in str(planned)


def test_other_data_are_refused(phase1, data):
    with pytest.raises(ValueError, match="other data"):
        plan(recipe_of(phase1, dataclasses.replace(data, max_length=12)))


def test_memory_by_hand(phase1, data, tmp_path):
    trainer = trainer_of(phase1, data, tmp_path, per_device_train_batch_size=24)
    held = memory(trainer)
    width, feed_forward, vocabulary = 16, 24, 300
    layer = 4 * width**2 + 3 * width * feed_forward + 2 * width
    head = width**2 + (2 * width + 1) * width + width**2 + vocabulary
    parts = held.parts
    assert parts["parameters"] == parts["gradients"] == 4 * (width**2 + layer + width + head)
    assert parts["frozen table"] == 4 * vocabulary * (width + 1)
    assert parts["activations"] == pytest.approx(activations(trainer, 24), rel=0.1)
    assert parts["activations"] > 2 * activations(trainer, 8)
    assert held.total == sum(parts.values()) and 24 * held.row == pytest.approx(parts["activations"], rel=0.2)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd"])
def test_states_of_the_optimizer_are_its_own(phase1, data, tmp_path, optim):
    trainer = trainer_of(phase1, data, tmp_path, optim=optim, max_steps=1)
    trainer.train()
    numbers = 0  # of float32; a momentum is not set
    for parameter in trainer.model.parameters():
        is_matrix = parameter.ndim == 2
        rows_and_columns = sum(parameter.shape) if is_matrix else parameter.numel()
        numbers += {"adamw_torch": 2 * parameter.numel(), "adafactor": rows_and_columns, "sgd": 0}[optim]
    if optim == "sgd":  # before the first step, and without states, AdamW's are assumed
        numbers = 2 * sum(parameter.numel() for parameter in trainer.model.parameters())
    assert memory(trainer).parts["states of the optimizer"] == pytest.approx(4 * numbers, rel=0.05)


def test_half_precision_needs_less_memory(phase1, data, tmp_path):
    full, half = (activations(trainer := trainer_of(phase1, data, tmp_path, bf16=bf16), 8) for bf16 in (False, True))
    assert 0.5 < half / full < 0.9  # logits are in float32


def test_what_fits(phase1, data, tmp_path):
    planned = plan(recipe_of(phase1, data))
    needed = planned.block.memory.total
    text = str(dataclasses.replace(planned, usable_bytes=needed))
    assert re.search(r"\n +fits +\S+ GB of \S+ GB \(90% of this machine's available memory\), for one block\n", text)
    text = str(dataclasses.replace(planned, usable_bytes=needed - 1))
    assert re.search(r"\n +DOES NOT FIT ", text) and re.search(r"\n +lower ", text)
    assert re.search(r"\n +largest batch, one block +--per_device_train_batch_size 3\n", text)
    assert "none at this hidden_size" in str(dataclasses.replace(planned, usable_bytes=needed // 10))

    trainer = trainer_of(phase1, data, tmp_path, per_device_train_batch_size=40)
    assert planned.block.memory.largest_batch(memory(trainer).total) == pytest.approx(40, abs=2)

    config = NoPropConfig.from_pretrained(phase1)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "correction_size": 64, "head_dim": 4 * config.head_dim}
    wide = NoPropConfig(**config.to_diff_dict() | sizes)
    table = TokenTable(wide)
    trainer = BlockTrainer(
        DenoisingBlock(wide, 1), table, args=trainer.args, train_dataset=trainer.train_dataset,
        data_collator=trainer.data_collator,
    )  # fmt: skip
    trainer.args.per_device_train_batch_size = 4
    usable = memory(trainer).total
    assert largest_width(config, {"one block": planned.block.memory}, usable) == pytest.approx(64, abs=10)


def test_the_time_of_the_router_counts_with_any_table(phase1, data):
    planned = plan(recipe_of(phase1, data))
    assert planned.phase1 is None
    block = dataclasses.replace(planned.block, seconds=0.1)
    without, with_router = (
        float(re.findall(r"\n +together +(\S+)", str(dataclasses.replace(planned, block=block, router_steps=n)))[-1])
        for n in (0, 1200)
    )
    assert with_router - without == pytest.approx(2.0, abs=0.11)  # minutes, printed to a tenth


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return self.linear(x).tanh().tanh().tanh().tanh()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_peak_bytes_by_hand(checkpointing):
    """Layers that save the results of four functions each, or their own input and recompute the rest in backward."""
    layers, rows = nn.ModuleList(Layer() for _ in range(8)), 1000
    x = torch.randn(rows, 4)
    with PeakBytes([layers]) as tracker:
        for layer in layers:
            x = checkpoint(layer, x, use_reentrant=False) if checkpointing else layer(x)
        x.sum().backward()
    unit = rows * 4 * 4
    saved = 7 + 4 if checkpointing else 8 * 4  # the inputs of the second to the last layer, and one layer
    assert saved + 1 <= tracker.peak / unit < saved + 2.5  # and a result or gradients that are not saved
    x = x.detach()
    assert tracker.live == x.nbytes  # no gradient of a weight, and nothing else


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("epochs", [0.3, 2])
def test_steps_are_those_of_trainer(tmp_path, drop_last, accumulate, epochs):
    args = arguments(
        tmp_path / "trainer",
        max_steps=-1,
        num_train_epochs=epochs,
        gradient_accumulation_steps=accumulate,
        dataloader_drop_last=drop_last,
        eval_strategy="no",
    )
    trainer = Trainer(nn.Linear(1, 1), args, train_dataset=[{"x": 1.0}] * 83)
    *_, steps = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
    assert count_steps(args, 83, 1) == steps
    assert count_steps(dataclasses.replace(args, max_steps=7), None, 2) == 7


def test_steps_of_several_processes(tmp_path):
    args = arguments(tmp_path, max_steps=-1, num_train_epochs=1)
    assert [count_steps(args, 80, processes) for processes in (1, 2, 3)] == [20, 10, 7]


@pytest.mark.parametrize(
    ("parallelism", "processes", "blocks", "groups"),
    [("auto", 1, 4, (1, 1)), ("auto", 2, 4, (2, 1)), ("auto", 5, 2, (2, 2)), ("data", 3, 4, (1, 3))],
)
def test_group_processes(parallelism, processes, blocks, groups):
    assert group_processes(parallelism, processes, blocks) == groups


def test_streams_and_sharing(data, corpus_file, tmp_path):
    stream = dataclasses.replace(data, streaming=True, validation_file=corpus_file)
    hub = {"push_to_hub": True, "hub_model_id": "user/tiny", "hub_private_repo": True}
    planned = plan(recipe_of(tmp_path / "model", stream, **hub))
    text = str(planned)
    assert re.search(r"train +a stream of unknown length: the run ends at max_steps", text)
    assert (planned.block.steps, planned.block.tokens, planned.block.epochs) == (6, 6 * 4 * 16, None)
    assert "the model and its card to user/tiny" in text and re.search(r"a new repository is +private", text)
    assert listing(tmp_path) == {}


def test_dry_run_of_a_launch(corpus_file, tmp_path):
    """As the first of two processes sees it: it waits for nobody, and counts on two."""
    launch = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    model = [f"--{name}={value}" for name, value in vars(MODEL).items() if value is not None]
    options = ["--max_length", "16", "--max_steps", "6", "--output_dir", str(tmp_path / "model")]
    output = run_python(
        str(ROOT / "scripts" / "train.py"),
        *["--train_file", corpus_file, *options, *model, "--dry_run"],
        cwd=tmp_path,
        **launch,
    )
    assert "4 blocks, 2 at a time" in output
    for section in ("data", "model", "done already", "training", "memory", "fit", "time", "disk", "sharing"):
        assert re.search(rf"^{section}", output, re.MULTILINE), section
    assert not list(tmp_path.iterdir())
