import dataclasses
import gc
import hashlib
import math
import shutil
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertModel, Trainer, TrainerCallback

from conftest import BLOCKS, MODEL, ROOT, arguments, reconfigure
from noprop_hf import DenoisingBlock, NoPropConfig, NoPropForCausalLM, NoPropForPreTraining
from noprop_hf import training as training_module
from noprop_hf.arguments import BlockArguments, ModelArguments, PretrainingArguments
from noprop_hf.checkpoints import checkpoints_of
from noprop_hf.data import CausalCollator, DataArguments, load_corpus, load_tokenizer, tokenize, train_tokenizer
from noprop_hf.model_directory import load_table, read_metadata
from noprop_hf.noise_noprop import information_levels, standardize
from noprop_hf.pretraining import pretrain_embeddings
from noprop_hf.shards_noprop import EMBEDDINGS_SHARD, block_shard
from noprop_hf.status import local_status
from noprop_hf.training import (
    BlockTrainer,
    block_seed,
    new_block,
    train_blocks,
)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- phase 1 ----------------------------------------------------------------------------------------------------------


def test_phase_1_writes_a_directory_without_blocks(phase1, data):
    config = NoPropConfig.from_pretrained(phase1)
    table = load_table(phase1, config)
    assert torch.allclose(table.weight.norm(dim=-1), torch.full((config.vocab_size,), 4.0))
    assert config.noise_levels == information_levels(table.weight, table.log_prior, 4)
    assert config.use_cache
    tokenizer = load_tokenizer(str(phase1))
    assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    rows = tokenize(load_corpus(data), tokenizer, data)["train"]["input_ids"]
    counts = torch.tensor([token for row in rows for token in row]).bincount(minlength=config.vocab_size) + 1
    assert torch.allclose(table.log_prior.exp(), counts / counts.sum())


@pytest.mark.parametrize("pretraining_objective", ["mlm", "clm"])
def test_phase_1_moves_the_table(data, tmp_path, pretraining_objective):
    model = dataclasses.replace(MODEL, pretraining_objective=pretraining_objective)
    runs = [tmp_path / "once", tmp_path / "again"]
    for directory in runs:
        pretrain_embeddings(model, data, PretrainingArguments(pretraining_max_steps=8), arguments(directory))
    tables = [load_file(path / "embeddings.safetensors")["model.embed_tokens.weight"] for path in runs]
    assert torch.equal(*tables)  # same seed, same bits
    short = tmp_path / "short"
    pretrain_embeddings(model, data, PretrainingArguments(pretraining_max_steps=1), arguments(short))
    other = load_file(short / "embeddings.safetensors")["model.embed_tokens.weight"]
    assert not torch.allclose(tables[0], other, atol=1e-3)


def test_phase_1_is_skipped_when_the_table_is_there(directory, data, caplog):
    before = digest(directory / "embeddings.safetensors")
    steps = PretrainingArguments(pretraining_max_steps=8)
    pretrain_embeddings(MODEL, data, steps, arguments(directory))
    assert "kept" not in caplog.text
    pretrain_embeddings(MODEL, data, PretrainingArguments(pretraining_max_steps=2), arguments(directory, seed=99))
    assert "The table is kept, with its own settings: max_steps is 2 and was 8, seed is 99 and was 11." in caplog.text
    assert digest(directory / "embeddings.safetensors") == before
    with pytest.raises(ValueError, match="hidden_size=16, but hidden_size=32"):
        other = dataclasses.replace(MODEL, hidden_size=32)
        pretrain_embeddings(other, data, PretrainingArguments(), arguments(directory))


def test_an_interrupted_phase_1_ends_with_the_same_bits(phase1, data, tmp_path, monkeypatch):
    directory = tmp_path / "model"
    steps = iter(range(6))

    def stop(self, model, *args, **kwargs):
        if model.training and next(steps, None) is None:
            raise KeyboardInterrupt
        return compute_loss(self, model, *args, **kwargs)

    compute_loss = Trainer.compute_loss
    options = (MODEL, data, PretrainingArguments(pretraining_max_steps=8), arguments(directory))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "compute_loss", stop)
        pretrain_embeddings(*options)
    assert [step for step, _ in checkpoints_of(directory / "checkpoints" / "pretraining")] == [6, 3]
    assert not (directory / "embeddings.safetensors").exists()
    pretrain_embeddings(*options)
    resumed, straight = (load_file(path / "embeddings.safetensors") for path in (directory, phase1))
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


@pytest.fixture(scope="module")
def bert(tmp_path_factory, corpus) -> Path:
    """A tiny encoder with its own tokenizer, as a stand-in for `bert-base-uncased`."""
    directory = tmp_path_factory.mktemp("bert")
    tokenizer = train_tokenizer(corpus["train"]["text"], 290, 64)
    tokenizer.save_pretrained(directory)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(directory)
    return directory


def test_embeddings_from_another_model(bert, data, tmp_path):
    model = ModelArguments(
        embeddings_from=str(bert), num_blocks=2, num_layers_per_block=1, num_attention_heads=2, intermediate_size=16
    )
    directory = pretrain_embeddings(model, data, PretrainingArguments(), arguments(tmp_path / "model"))
    table = load_file(directory / "embeddings.safetensors")["model.embed_tokens.weight"]
    source = BertModel.from_pretrained(bert).get_input_embeddings().weight.detach()
    assert torch.equal(table, standardize(source))
    assert not (directory / "pretraining").exists()


def test_table_of_the_wrong_size(bert, data, directory, tmp_path):
    model = ModelArguments(embeddings_from=str(bert), hidden_size=16, num_attention_heads=2)
    with pytest.raises(ValueError, match="has 12 dimensions, but `hidden_size` is 16"):
        pretrain_embeddings(model, data, PretrainingArguments(), arguments(tmp_path / "other"))
    config = NoPropConfig.from_pretrained(directory)
    config.vocab_size += 1
    config.save_pretrained(directory)
    with pytest.raises(ValueError, match=r"is of size \(300, 16\), but the configuration asks for \(301, 16\)"):
        train_blocks(data, BLOCKS, arguments(directory))


def test_tokenizer_without_a_mask_token(data, tmp_path, tokenizer):
    import copy

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.mask_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    model = dataclasses.replace(
        MODEL, tokenizer_name=str(tmp_path / "tokenizer"), vocab_size=None, pretraining_objective="mlm"
    )
    with pytest.raises(ValueError, match="no mask token.*--pretraining_objective clm"):
        pretrain_embeddings(model, data, PretrainingArguments(), arguments(tmp_path / "model"))
    model.pretraining_objective = "clm"  # which needs none
    directory = pretrain_embeddings(
        model, data, PretrainingArguments(pretraining_max_steps=1), arguments(tmp_path / "model")
    )
    assert (directory / "embeddings.safetensors").is_file()


# --- phase 2 ----------------------------------------------------------------------------------------------------------


def test_a_block_alone_is_bit_for_bit_the_block_among_all(trained, directory, data):
    train_blocks(data, dataclasses.replace(BLOCKS, blocks="3"), arguments(directory))
    alone, among = (load_file(path / block_shard(3)) for path in (directory, trained))
    assert alone.keys() == among.keys()
    assert all(torch.equal(alone[name], among[name]) for name in alone)
    assert [path.name for path in sorted(directory.glob("block-*"))] == [block_shard(3)]


def test_blocks_differ_and_so_do_seeds(trained, directory, data):
    name = "encoder.layers.0.mlp.up_proj.weight"
    weights = [load_file(trained / block_shard(b))[f"model.blocks.{b}.{name}"] for b in range(4)]
    assert not any(torch.equal(weights[0], other) for other in weights[1:])
    train_blocks(data, dataclasses.replace(BLOCKS, blocks="0"), arguments(directory, seed=12))
    assert not torch.equal(weights[0], load_file(directory / block_shard(0))[f"model.blocks.0.{name}"])
    assert len({block_seed(seed, block) for seed in range(50) for block in range(50)}) == 2500


def test_only_one_block_exists_while_it_trains_and_the_table_stays(directory, data, monkeypatch):
    """At every step, every parameter alive in the process is the block's own, the optimizer holds exactly those, and
    the table is what it was."""
    gc.collect()
    gc.freeze()  # `gc.get_objects` lists what is made from here on
    table_bits = load_file(directory / "embeddings.safetensors")["model.embed_tokens.weight"]
    seen = []

    class Inspect(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            table = trainers[-1].frozen["table"]
            own = {id(parameter) for parameter in model.parameters()}
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            gc.collect()
            objects = gc.get_objects()
            alive = {id(p) for p in objects if isinstance(p, torch.Tensor) and isinstance(p, nn.Parameter)}
            assert held == own == alive - {id(table.weight)}
            assert [block for block in objects if isinstance(block, DenoisingBlock)] == [model]
            assert torch.equal(table.weight, table_bits) and table.weight.grad is None
            seen.append(model.block_index)

    trainers = []

    class InspectedTrainer(BlockTrainer):
        def __init__(self, *args, **kwargs):
            trainers[:] = [self]
            super().__init__(*args, callbacks=[Inspect()], **kwargs)

    monkeypatch.setattr(training_module, "BlockTrainer", InspectedTrainer)
    shard = digest(directory / "embeddings.safetensors")
    train_blocks(data, dataclasses.replace(BLOCKS, blocks="1-2"), arguments(directory))
    assert seen == [1] * 6 + [2] * 6
    assert digest(directory / "embeddings.safetensors") == shard


def test_finished_blocks_are_skipped(directory, data, caplog):
    train_blocks(data, dataclasses.replace(BLOCKS, blocks="0"), arguments(directory))
    stamp = (directory / block_shard(0)).stat().st_mtime_ns
    train_blocks(data, dataclasses.replace(BLOCKS, blocks="0-1"), arguments(directory))
    assert (directory / block_shard(0)).stat().st_mtime_ns == stamp
    assert (directory / block_shard(1)).is_file() and "kept" not in caplog.text
    train_blocks(data, dataclasses.replace(BLOCKS, blocks="0"), arguments(directory, learning_rate=1e-4))
    assert "Block 0 is kept, with its own settings: learning_rate is 0.0001 and was 0.005." in caplog.text
    assert (directory / block_shard(0)).stat().st_mtime_ns == stamp


@pytest.mark.parametrize("stop_at", [4, 5])
def test_an_interrupted_block_ends_with_the_same_bits(trained, directory, data, monkeypatch, stop_at):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == stop_at:
                raise KeyboardInterrupt

    class StoppedTrainer(BlockTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, callbacks=[Stop()], **kwargs)

    only = dataclasses.replace(BLOCKS, blocks="2")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training_module, "BlockTrainer", StoppedTrainer)
        train_blocks(data, only, arguments(directory))
    assert not (directory / block_shard(2)).exists()
    checkpoints = directory / "checkpoints" / "block-02"
    assert [step for step, _ in checkpoints_of(checkpoints)] == [3]
    half_written = checkpoints / "checkpoint-5"
    half_written.mkdir()
    (half_written / "model.safetensors").write_bytes(b"half a file")
    train_blocks(data, only, arguments(directory))
    resumed, straight = (load_file(path / block_shard(2)) for path in (directory, trained))
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


def test_training_lowers_the_loss_and_reports_nats(trained, directory, data):
    config = NoPropConfig.from_pretrained(directory)
    table, tokenizer = load_table(directory, config), load_tokenizer(str(directory))
    dataset = tokenize(load_corpus(data), tokenizer, data)
    args = arguments(directory / "x", max_steps=40, logging_steps=10, eval_steps=20)
    trainer = BlockTrainer(
        DenoisingBlock(config, 1),
        table,
        args=args,
        train_dataset=dataset["train"],
        eval_dataset=dataset["validation"],
        data_collator=CausalCollator(tokenizer),
    )
    trainer.train()
    history = trainer.state.log_history
    losses = [entry for entry in history if "loss" in entry]
    assert losses[-1]["loss"] < losses[0]["loss"] - 0.3
    for entry in losses:
        mean = (entry["denoising_loss"] + entry["context_loss"]) / 2
        assert entry["loss"] == pytest.approx(mean, rel=0.05)  # about half the positions carry each term
    evaluations = [entry for entry in history if "eval_loss" in entry]
    assert len(evaluations) == 2
    for entry in evaluations:
        mean = (entry["eval_denoising_nats"] + entry["eval_context_nats"]) / 2
        assert entry["eval_loss"] == pytest.approx(mean, rel=1e-3)
        assert entry["eval_bound_nats"] <= entry["eval_context_nats"] + 0.2
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == trainer.evaluate()["eval_loss"]  # the noise of an evaluation is fixed


def test_accumulated_gradients_are_those_of_the_whole_batch(data, tmp_path):
    line = DataArguments(train_file=data.train_file, packing=False, max_length=16, max_eval_samples=40)
    one_step = PretrainingArguments(pretraining_max_steps=1)
    directory = pretrain_embeddings(MODEL, line, one_step, arguments(tmp_path / "model"))
    shards = []
    for size, steps in ((8, 1), (2, 4)):
        target = Path(shutil.copytree(directory, directory.parent / f"batch-{size}"))
        options = {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": steps,
            "max_steps": 3,
            "optim": "sgd",
            "max_grad_norm": 0.0,
        }
        # The candidates of the sampled softmax are those of the batch on the device.
        reconfigure(target, attention_dropout=0.0, sampled_softmax=False)
        train_blocks(line, dataclasses.replace(BLOCKS, blocks="0"), arguments(target, **options))
        shards.append(load_file(target / block_shard(0)))
    for name in shards[0]:
        assert torch.allclose(shards[0][name], shards[1][name], atol=1e-5), name


@pytest.mark.parametrize("loss_type", ["cross_entropy", "mse"])
def test_shards_tell_what_they_are(directory, data, loss_type):
    of_phase1 = read_metadata(directory / EMBEDDINGS_SHARD)
    reconfigure(directory, loss_type=loss_type)
    train_blocks(data, dataclasses.replace(BLOCKS, blocks="1"), arguments(directory))
    metadata = read_metadata(directory / block_shard(1))
    assert metadata["steps"] == "6" and 0 < float(metadata["context_nats"]) < 8
    for shard, steps in ((of_phase1, "8"), (metadata, "6")):
        notes = dict(line.split(": ", 1) for line in shard["training"].splitlines())
        told = [notes[name] for name in ("learning_rate", "max_steps", "per_device_train_batch_size", "seed")]
        assert told == ["0.005", steps, "4", "11"] and "num_train_epochs" not in notes
        assert (notes["torch"], notes["transformers"]) == (torch.__version__, transformers.__version__)


def test_blocks_out_of_range(directory, data):
    with pytest.raises(ValueError, match="no block 4: the model has 4 blocks, 0 to 3"):
        train_blocks(data, dataclasses.replace(BLOCKS, blocks="2,4"), arguments(directory))


def test_phase_2_without_phase_1(tmp_path, data):
    with pytest.raises(FileNotFoundError, match="Pretrain the embeddings first"):
        train_blocks(data, BLOCKS, arguments(tmp_path))


def test_a_block_of_another_configuration(directory, data):
    train_blocks(data, dataclasses.replace(BLOCKS, blocks="0"), arguments(directory))
    reconfigure(directory, denoising_weight=0.9)
    with pytest.raises(ValueError, match="another table, another configuration"):
        train_blocks(data, BLOCKS, arguments(directory))


def test_a_configuration_that_is_changed_after_phase_1(directory, data):
    config = NoPropConfig.from_pretrained(directory)
    config.rms_norm_eps = 0.1
    config.save_pretrained(directory)
    with pytest.raises(ValueError, match="a table and a config.json that do not belong together"):
        train_blocks(data, BLOCKS, arguments(directory))


def test_a_block_that_diverges_is_not_written(directory, data):
    """Its loss is still a number in the last step, which makes the weights infinite."""
    unfinished = directory / "checkpoints" / "block-01" / "unfinished"
    (unfinished / "checkpoint-1").mkdir(parents=True)  # of a run that was killed
    options = {"max_steps": 1, "learning_rate": 1e38, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    for _ in range(2):  # and no checkpoint says that it is done
        with pytest.raises(FloatingPointError, match="not finite numbers any more, at step 1"):
            train_blocks(data, BlockArguments(blocks="1"), arguments(directory, **options, eval_strategy="no"), MODEL)
    assert not (directory / block_shard(1)).exists()
    assert not list(unfinished.parent.glob("checkpoint-*")) and not unfinished.exists()
    assert local_status(directory)[1].state == "missing"


@pytest.mark.parametrize("name", [EMBEDDINGS_SHARD, block_shard(0)])
@pytest.mark.parametrize("damage", ["cut", "flipped bit"])
def test_a_damaged_shard_is_told_and_made_again(trained, data, tmp_path, name, damage):
    directory = Path(shutil.copytree(trained, tmp_path / "model"))
    content = bytearray((directory / name).read_bytes())
    content[-8] ^= 1
    (directory / name).write_bytes(content[:-9] if damage == "cut" else content)
    with pytest.raises(ValueError, match=f"{name} is damaged. Remove it"):
        train_blocks(data, BLOCKS, arguments(directory))
    if name == block_shard(0):
        (directory / name).unlink()
        train_blocks(data, BLOCKS, arguments(directory))
        ours, theirs = load_file(directory / name), load_file(trained / name)
        assert all(torch.equal(ours[weight], theirs[weight]) for weight in ours | theirs)


def test_settings_that_are_not_the_directory_s(directory, data):
    with pytest.raises(ValueError, match="num_blocks=4, but num_blocks=5"):
        train_blocks(data, BLOCKS, arguments(directory), dataclasses.replace(MODEL, num_blocks=5))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_half_precision_training_on_a_gpu(directory, data):
    """fp16 with loss scaling; the device holds the block and the table, and little else between steps."""
    options = {"use_cpu": False, "fp16": True, "max_steps": 40, "eval_steps": 20}
    train_blocks(data, dataclasses.replace(BLOCKS, blocks="3"), arguments(directory, **options))
    shard = load_file(directory / block_shard(3))
    assert all(tensor.isfinite().all() for tensor in shard.values())
    assert float(read_metadata(directory / block_shard(3))["denoising_nats"]) < 5
    gc.collect()
    assert torch.cuda.memory_allocated() < 50_000_000


# --- where blocks start, and blocks that read one another -------------------------------------------------------------


def test_blocks_start_as_the_model_of_phase_1(directory, data):
    """Before its first step a block says what phase 1 says of the next token."""
    config = NoPropConfig.from_pretrained(directory)
    table = load_table(directory, config)
    assert torch.equal(new_block(directory, config, table, 2).head.bias, table.log_prior)  # random by default
    config = reconfigure(directory, block_initialization="pretraining")
    block = new_block(directory, config, table, 2).eval()
    phase_1 = NoPropForPreTraining.from_pretrained(directory).eval()
    phase_1.config.pretraining_objective = "clm"  # looks back only
    rows = tokenize(load_corpus(data), load_tokenizer(str(directory)), data)["validation"][:4]["input_ids"]
    input_ids = torch.tensor(rows)
    embeds = table(input_ids)
    states = block.head(block.encoder(embeds, **block.encoder.attention_inputs(embeds)))[0]
    assert torch.allclose(states @ table.weight.T + block.head.bias, phase_1(input_ids).logits, atol=1e-4)
    shutil.rmtree(directory / "pretraining")
    with pytest.raises(FileNotFoundError, match="Copy it together with the table"):
        train_blocks(data, BLOCKS, arguments(directory))


def test_the_system_as_first_described(data, tmp_path):
    """`recipes/seed.yaml`, small: a masked table, cosine levels, squared error and denoising alone."""
    choices = yaml.safe_load((ROOT / "recipes" / "seed.yaml").read_text())
    names = {field.name for field in dataclasses.fields(ModelArguments)} - vars(MODEL).keys()
    names |= {name for name, value in vars(MODEL).items() if value is None} - {"tokenizer_name"}
    model = dataclasses.replace(MODEL, **{name: value for name, value in choices.items() if name in names})
    directory = tmp_path / "model"
    pretrain_embeddings(model, data, PretrainingArguments(pretraining_max_steps=20), arguments(directory))
    train_blocks(data, BLOCKS, arguments(directory, max_steps=40, eval_steps=20, learning_rate=3e-3), model)
    trained = NoPropForCausalLM.from_pretrained(directory).eval()
    config = trained.config
    assert (config.pretraining_objective, config.loss_type, config.denoising_weight) == ("mlm", "mse", 1.0)
    signal = [math.cos(math.pi / 2 * (1 - block / 4)) ** 2 for block in range(1, 4)]
    assert config.noise_levels == pytest.approx([0, *(part / (1 - part) for part in signal)])

    rows = tokenize(load_corpus(data), load_tokenizer(str(directory)), data)["validation"]
    labels = torch.tensor(rows[:16]["input_ids"])
    table = trained.model.embed_tokens
    for index, block in enumerate(trained.model.blocks):
        errors = []
        for weights in (block, new_block(directory, config, table, index).eval()):
            output = weights(labels, labels, table, generator=torch.Generator().manual_seed(0))
            errors.append(output.denoising_loss if index > 0 else output.context_loss)
        assert errors[0] < errors[1], f"block {index} learnt nothing"
    options = {"decoding_mode": "denoising", "do_sample": True, "max_new_tokens": 5, "eos_token_id": None}
    texts = trained.generate(labels[:2, :4], attention_mask=torch.ones(2, 4, dtype=torch.long), **options)
    assert texts.shape == (2, 9)


@pytest.mark.parametrize(("objective", "std"), [("clm", 0.05 / 20), ("mlm", 0.05)])
def test_initial_rows_are_short_for_next_tokens(objective, std):
    config = NoPropConfig(
        vocab_size=500, hidden_size=64, initializer_range=0.05, num_blocks=2, pretraining_objective=objective
    )
    rows = NoPropForPreTraining(config).embed_tokens.weight
    assert rows.std().item() == pytest.approx(std, rel=0.02)
