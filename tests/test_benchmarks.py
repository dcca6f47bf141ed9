"""The benchmarks in a setting small enough for a test: that they run, keep what they measure, and cannot flatter."""

import gzip
import json
import math
import pickle
import sys
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import ablation
import gpu
import memory
import scaling
import trunk
from ablation import GROUPS
from common import SHAPES, EndToEnd, OneBlock, SampledEndToEnd, Training, num_parameters, random_text
from conftest import run_python, sentences
from cost import arithmetic_to_reach
from noprop_hf import NoPropConfig, NoPropForCausalLM, NoPropForPreTraining
from noprop_hf.data import data_fingerprint, load_corpus
from noprop_hf.model_directory import read_metadata
from noprop_hf.planning import PeakBytes
from noprop_hf.shards_noprop import block_shard
from quality import (
    DEPTHS,
    MODELS,
    SETTINGS,
    Bench,
    Blocks,
    Plentiful64,
    QualityArguments,
    generation_flops,
    main,
    measure_rows,
    parse,
    plot,
)


SMALL = "--hidden_size 16 --intermediate_size 24 --num_attention_heads 2 --num_layers_per_block 1 --num_blocks 2"
SMALL += " --vocab_size 280 --max_length 16 --batch_size 4 --tokens 1500 --num_workers 1"


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    (folder / "shakespeare.txt").write_text("\n".join(sentences(600)))
    (folder / "documents").mkdir()
    for split, count, seed in (("first", 800, 1), ("second", 60, 2)):
        rows = [{"domain": "words", "text": text} for text in sentences(count, seed)]
        with gzip.open(folder / "documents" / f"{split}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


class OneThread(ThreadPoolExecutor):
    """Takes the place of a pool of processes, which start slowly. A job must be picklable, as for a process."""

    def __init__(self, *args, **options):
        super().__init__(1)

    def submit(self, function, *args) -> Future:
        return super().submit(*pickle.loads(pickle.dumps((function, *args))))


def test_every_model_gets_the_same_arithmetic_parameters_and_depth():
    bench = Bench(QualityArguments(["shakespeare=unused"]), "shakespeare", 0, {"sampled_softmax": False})
    flops, budgets, args = bench.flops, bench.budgets(), bench.args
    total = flops["end_to_end"] * args.tokens
    spent = flops["phase1"] * budgets["phase1"] + args.num_blocks * flops["block"] * budgets["block"]
    assert spent == pytest.approx(total)
    baseline = bench.baseline()
    for model in (baseline, bench.baseline(4)):  # counting arithmetic leaves their attention as it was
        generation_flops(model, bench.random_tokens())
        assert model.config._attn_implementation == "sdpa"
    assert baseline.config.num_hidden_layers == args.num_blocks * args.num_layers_per_block
    assert num_parameters(baseline) == pytest.approx(num_parameters(NoPropForCausalLM(bench.config())), rel=0.01)

    # By hand: 6 operations per weight of a matrix and token; attention 12 per width and key; the vocabulary 6, or 4
    # for a frozen table. A last position predicts nothing, and attention does not count the half that is masked.
    width, inner, last = args.hidden_size, baseline.config.intermediate_size, 1 - 1 / args.max_length
    layer = 6 * (4 * width**2 + 3 * width * inner) + 12 * width * args.max_length
    stock = baseline.config.num_hidden_layers * layer + 6 * args.vocab_size * width
    assert flops["end_to_end"] == pytest.approx(stock, rel=0.03)
    layer = 6 * (4 * width**2 + 3 * width * args.intermediate_size) + 12 * width * args.max_length
    head = 6 * last * (width**2 + 3 * width**2) + 4 * last * args.vocab_size * width
    block = args.num_layers_per_block * layer + 4 * width**2 + head  # the embeddings get no gradient
    assert flops["block"] == pytest.approx(block, rel=0.03)
    phase1 = args.num_layers_per_block * layer + 6 * 2 * width**2 + 6 * last * args.vocab_size * width
    assert flops["phase1"] == pytest.approx(phase1, rel=0.03)
    clustered = Bench(bench.args, "shakespeare", 0, {"sampled_softmax": False, "block_data": "clusters"})
    router = args.num_layers_per_block * layer + 4 * width**2 + 6 * args.num_blocks * width
    assert clustered.flops["phase1"] - flops["phase1"] == pytest.approx(router / 10, rel=0.03)


@pytest.mark.parametrize("far", [True, False])
def test_a_model_far_behind_does_not_hide_how_the_others_differ(far, tmp_path, monkeypatch):
    pictures = []
    monkeypatch.setattr("quality.Figure.savefig", lambda figure, *args, **options: pictures.append(figure))
    nats = dict(zip(MODELS, [3.9, 4.0, 3.95, 4.7 if far else 4.05, 3.85, 3.97, 3.98], strict=False))
    plot({"text": {name: {"nats_per_token": [one], "bound": [one + 0.01]} for name, one in nats.items()}}, tmp_path)
    (axes,) = pictures[0].axes
    low, high = axes.get_xlim()
    assert [text.get_text() for text in axes.texts] == ["4.700 \u2192"] * far
    assert high - low < 0.3 and low < 3.85 and high > (4.0 if far else 4.05)


@pytest.mark.slow
def test_blocks_on_a_trunk_are_compared_with_fine_tuning(corpora, tokenizer, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer))).eval()
    model.save_pretrained(tmp_path / "stock")
    tokenizer.save_pretrained(tmp_path / "stock")
    file, results = corpora / "shakespeare.txt", tmp_path / "trunk.json"
    options = ["--trunk", str(tmp_path / "stock"), "--train_file", str(file), "--output_dir", str(tmp_path / "runs")]
    options += ["--results", str(results), "--epochs", "0.2", "--learning_rates", "1e-3", "1e-2", "--num_blocks", "2"]
    options += "--num_layers_per_block 1 --num_attention_heads 2 --intermediate_size 24 --max_length 16".split()
    monkeypatch.setattr(sys, "argv", ["trunk.py", *options, "--batch_size", "8"])
    trunk.main()
    rows = {row["method"]: row for row in json.loads(results.read_text())}
    assert list(rows) == list(trunk.ROWS)
    growth = trunk.Growth(trunk.GrowthArguments(str(tmp_path / "stock"), str(file), max_length=16), 1e-3)
    held_out = torch.tensor(growth.dataset["validation"]["input_ids"])
    with torch.no_grad():
        expected = F.cross_entropy(model(held_out).logits[:, :-1].flatten(0, 1), held_out[:, 1:].flatten())
    assert rows["trunk"]["nats_per_token"] == pytest.approx(expected.item(), abs=1e-4)
    assert len({row["training_flops"] for name, row in rows.items() if name != "trunk"}) == 1
    best = rows["fine_tuned"]["nats_by_learning_rate"]
    assert rows["fine_tuned"]["nats_per_token"] == min(best.values()) and set(best) == {"0.001", "0.01"}
    assert "blocks on the model as a trunk" in capsys.readouterr().out


@pytest.mark.slow
def test_quality_measures_every_model_and_goes_on_where_it_stopped(corpora, tmp_path, monkeypatch):
    options = ["--corpora", f"shakespeare={corpora / 'shakespeare.txt'}", "--num_seeds", "1", *SMALL.split()]
    options += ["--output_dir", str(tmp_path / "runs"), "--results", str(tmp_path / "quality.json")]
    monkeypatch.setattr(sys, "argv", ["quality.py", *options])
    monkeypatch.setattr("quality.ProcessPoolExecutor", OneThread)
    main()
    results = json.loads((tmp_path / "quality.json").read_text())
    figures, rows = results["shakespeare"], QualityArguments(["unused=unused"]).models
    assert all(0 < nats < 20 for name in rows for nats in figures[name]["nats_per_token"])
    assert [sum(nats) for nats in figures["noprop"]["block_nats"]] == pytest.approx(figures["noprop"]["bound"])
    assert len(figures["samples"]) == 1
    assert (tmp_path / "quality.png").stat().st_size > 10_000
    assert MODELS["end_to_end"] in (tmp_path / "quality.md").read_text()

    kept = tmp_path / "runs" / "shakespeare" / "0" / "0.001" / "end_to_end.json"
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"nats_per_token": 1.5}))
    main()  # nothing is trained again
    again = json.loads((tmp_path / "quality.json").read_text())
    assert again["shakespeare"]["end_to_end"]["nats_per_token"] == [1.5]
    assert again["shakespeare"]["noprop"] == results["shakespeare"]["noprop"]


@pytest.mark.parametrize("name", ["plentiful_64", "plentiful_96"])
def test_where_text_is_plentiful_every_depth_spends_the_same_arithmetic_and_reads_no_token_twice(name):
    args = SETTINGS[name](["books=unused"], batch_size=1)
    bench = Bench(args, "books", 0)
    bench.num_tokens = 25_000_000
    table, width = args.vocab_size * args.hidden_size, args.hidden_size
    deep = bench.baseline()
    assert args.tokens / (num_parameters(deep) - table) == pytest.approx(20, rel=0.01)
    assert num_parameters(deep) == pytest.approx(num_parameters(NoPropForCausalLM(bench.config())), rel=0.01)

    spent = {}
    for depth in (8, *DEPTHS.values()):
        config = bench.baseline(depth).config  # by hand, as above
        layer = 6 * (4 * width**2 + 3 * width * config.intermediate_size) + 12 * width * args.max_length
        tokens = bench.total_flops / bench.stock_flops(config)
        spent[depth] = tokens * (depth * layer + 6 * args.vocab_size * width)
        assert config.num_hidden_layers == depth and tokens <= bench.num_tokens
        is_wider = config.intermediate_size > deep.config.intermediate_size
        assert (
            tokens > 0.98 * bench.num_tokens if is_wider else config.intermediate_size == deep.config.intermediate_size
        )
        assert is_wider == (depth == 1 or (name == "plentiful_96" and depth < 8))
    assert list(spent.values()) == pytest.approx([spent[8]] * 5, rel=0.01)


@pytest.fixture
def plentiful(corpora, tmp_path) -> list[str]:
    """Arguments for a text of documents, and sizes for a test."""
    options = ["--setting", "plentiful_64", "--corpora", f"words={corpora / 'documents'}", *SMALL.split()]
    options += ["--train_split", "first", "--validation_split", "second", "--learning_rates", "1e-2"]
    return [*options, "--output_dir", str(tmp_path / "runs"), "--results", str(tmp_path / "quality.json")]


def test_a_corpus_that_is_too_short_is_refused(plentiful, monkeypatch):
    short = "too short for '{}': it has [0-9,]+ training tokens"
    row = Blocks({"block_initialization": "pretraining"}, 0.4, random_splits=True)  # its blocks read more than phase 1
    monkeypatch.setitem(Plentiful64.own_phase1, "noprop_random_splits", row)
    for models, tokens, message in (
        ("end_to_end", 1e6, short.format("end_to_end") + ", of which a training reads 1,000,000 once"),
        ("noprop_start", 1e6, short.format("noprop_start")),
        ("noprop_random_splits", 1.5e4, short.format("noprop_random_splits") + " in a random split"),
        ("end_to_end_3", 1e6, "--models takes"),
    ):
        command = ["quality.py", *plentiful, "--models", models, "--tokens", str(tokens)]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit, match=message):
            main()


@pytest.mark.slow
def test_rows_where_text_is_plentiful(plentiful, tmp_path, monkeypatch):
    rows = ["end_to_end_1", "pretraining_all", "noprop_random_splits", "noprop_half"]
    monkeypatch.setattr(sys, "argv", ["quality.py", *plentiful, "--models", *rows])
    monkeypatch.setattr("quality.ProcessPoolExecutor", OneThread)
    main()
    results = json.loads((tmp_path / "quality.json").read_text())
    assert list(results) == ["words_16"] and results["words_16"]["setting"]["kind"] == "plentiful"
    assert "**words_16** (plentiful)" in (tmp_path / "quality.md").read_text()
    bench = Bench(parse(), "words", 0)
    windows = bench.load()[1]["validation"].with_format("torch")["input_ids"][:]
    folder = tmp_path / "runs" / "words_16" / "0" / "0.01"
    for name, model in {
        "end_to_end_1": LlamaForCausalLM.from_pretrained(folder / "end_to_end_1"),
        "pretraining_all": NoPropForPreTraining.from_pretrained(folder / "pretraining_all" / "phase1"),
    }.items():
        entry = results["words_16"][name]
        with torch.no_grad():
            logits = model.eval()(windows).logits[:, :-1]
        nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
        assert entry["nats_per_token"] == pytest.approx([nats], rel=1e-4)
        weights = {parameter.data_ptr(): parameter.numel() for parameter in model.parameters()}
        assert entry["parameters"] == sum(weights.values())
        assert entry["training_bytes"] > 16 * entry["parameters"]  # with gradients and two moments in float32
        assert entry["bytes_sent"] == 2 * 4 * entry["parameters"] * round(entry["tokens"] / 64)  # of two workers

    entry = results["words_16"]["noprop_random_splits"]
    assert len(entry["block_nats"][0]) == 2 and sum(entry["block_nats"][0]) == pytest.approx(entry["bound"][0])
    (model,) = folder.glob("0.65_*/noprop_random_splits")
    splits = [bench.of_row("noprop_random_splits").split(index) for index in range(2)]
    parts = [load_corpus(split)["train"]["text"][:] for split in splits]
    assert sorted(parts[0] + parts[1]) == sorted(sentences(800, 1)) and abs(len(parts[0]) - len(parts[1])) < 2
    fetched = [model / "embeddings.safetensors", model / "pretraining" / "model.safetensors"]
    blocks = [model / block_shard(index) for index in range(2)]
    assert entry["bytes_sent"] == sum(file.stat().st_size for file in (*fetched, *fetched, *blocks))
    for index, block in enumerate(blocks):
        windows = bench.load(splits[index])[1]["train"]
        assert read_metadata(block)["data"] == data_fingerprint(windows)
        assert entry["tokens"] <= windows.num_rows * 16

    entry, whole = results["words_16"]["noprop_half"], results["words_16"]["end_to_end_1"]
    assert entry["training_flops"] == pytest.approx(0.5 * whole["training_flops"], rel=0.01)
    (directory,) = folder.glob("0.5_0.65_*/noprop_half")
    config = NoPropForCausalLM.from_pretrained(directory).config
    assert config.block_data == "clusters" and (config.num_blocks, config.num_layers_per_block) == (2, 4)


def test_arithmetic_to_reach_a_loss_is_interpolated_in_its_logarithm():
    def loss(arithmetic: float) -> float:
        return 3.5 - 0.2 * math.log(arithmetic)

    points = [(share, loss(share)) for share in (0.5, 0.75, 1.0)]
    for share in (0.5, 0.6, 0.75, 0.9, 1.0):
        assert arithmetic_to_reach(loss(share) + 1e-12, points) == pytest.approx(share)
    assert arithmetic_to_reach(loss(0.4), points) == 0.5  # not extrapolated
    assert arithmetic_to_reach(loss(1.01), points) is None


@pytest.mark.slow
def test_cost_to_reach_a_loss(tmp_path):
    tokens = {"tokens": 1e6, "pretraining_tokens": 2e6, "training_bytes": 10}
    entries = {
        "end_to_end": {"nats_per_token": [3.0, 4.0], "training_flops": 8.0, "tokens": 2e6, "training_bytes": 40},
        "noprop": {"nats_per_token": [3.4, 3.6], "training_flops": 8.0, **tokens},
        "noprop_half": {"nats_per_token": [3.7], "training_flops": 4.0, **tokens},
    }
    quality, results = tmp_path / "quality.json", tmp_path / "cost.json"
    command = ["benchmarks/cost.py", "--small", "--quality", str(quality), "--results", str(results)]
    quality.write_text(json.dumps({"plentiful_64": {"noprop": entries["noprop"]}}))
    assert "has no row end_to_end of plentiful_64" in run_python(*command, fails=True)
    quality.write_text(json.dumps({"plentiful_64": entries}))
    run_python(*command)
    rows = {(row["method"], row["workers"]): row for row in json.loads(results.read_text())}
    assert all(row["arithmetic"] == pytest.approx(1.0) for row in rows.values())  # both have 3.5 nats
    seconds, steps = (rows["noprop", 2][name] for name in ("milliseconds_per_step", "steps"))
    first = seconds["phase1"] * steps["phase1"] + seconds["router"] * steps["router"]
    each = seconds["block, two at once"] * steps["block"]
    assert 1000 * rows["noprop", 2]["seconds"] == pytest.approx(first + each)

    sizes = Plentiful64(["unused=unused"]).sizes()
    stock = 4 * num_parameters(EndToEnd(NoPropConfig(vocab_size=2048, **sizes)).model)
    assert rows["end_to_end", 2]["bytes_sent"] == 2 * stock * round(2e6 / (32 * 64))
    config = NoPropConfig(vocab_size=2048, **sizes | Plentiful64.own_phase1["noprop"].changes)
    NoPropForCausalLM(config).save_pretrained(tmp_path / "model")
    NoPropForPreTraining(config).save_pretrained(tmp_path / "phase1")
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors")}
    fetched = sizes["embeddings.safetensors"] + (tmp_path / "phase1" / "model.safetensors").stat().st_size
    assert rows["noprop", 2]["bytes_sent"] == pytest.approx(fetched + sizes["block-01.safetensors"], rel=0.02)


def test_the_best_learning_rate_of_seed_0_is_used_with_further_seeds(monkeypatch):
    jobs = []

    class Pool:
        def submit(self, function, args, corpus, seed, name):
            (rate,) = args.learning_rates
            jobs.append((name, seed, rate))
            return SimpleNamespace(result=lambda: {"nats_per_token": abs(rate - {"noprop": 2, "end_to_end": 3}[name])})

    names, rates = ["end_to_end", "noprop"], [1.0, 2.0, 3.0]
    args = QualityArguments(["books=unused"], models=names, learning_rates=rates)
    figures = measure_rows(args, Pool())
    assert jobs[:6] == [(name, 0, rate) for name in names for rate in rates]
    assert jobs[6:] == [("end_to_end", 1, 3.0), ("end_to_end", 2, 3.0), ("noprop", 1, 2.0), ("noprop", 2, 2.0)]
    assert len(figures) == 10


@pytest.mark.slow
def test_ablation_measures_variations(corpora, tmp_path, monkeypatch):
    options = ["--data_dir", str(corpora), "--tokens", "6000", "--groups", "head"]
    options += ["--output_dir", str(tmp_path / "runs"), "--results", str(tmp_path / "ablation.json")]
    monkeypatch.setattr(sys, "argv", ["ablation.py", *options])
    monkeypatch.setattr(ablation, "ProcessPoolExecutor", OneThread)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_layers_per_block": 1, "vocab_size": 280}
    monkeypatch.setattr(ablation, "QualityArguments", partial(QualityArguments, **sizes, max_length=16))
    ablation.main()
    results = json.loads((tmp_path / "ablation.json").read_text())
    assert set(results) == {"reference", *GROUPS["head"]}
    for figures in results.values():
        assert figures["mixture"] <= max(figures["first block"], figures["geometric mean"]) + 0.1
        assert len(figures["block_nats"]) == 4


@pytest.mark.slow
def test_memory_speed_and_decoding_against_a_stock_model(tmp_path):
    results = {}
    for name in ("memory", "training_speed", "decoding"):
        run_python(f"benchmarks/{name}.py", "--small", "--results", str(tmp_path / f"{name}.json"))
        results[name] = json.loads((tmp_path / f"{name}.json").read_text())
        assert (tmp_path / f"{name}.png").is_file()
    rows = {row["method"]: row for row in results["memory"]}
    assert list(rows) == [*memory.METHODS] and all(row["num_blocks"] == 2 for row in rows.values())
    parts = ("parameters", "gradients", "optimizer", "table", "activations")
    assert all(row["bytes"] == sum(row[part] for part in parts) for row in rows.values())
    assert all(row["resident"] > 0 for name, row in rows.items() if name != "fsdp" and not name.endswith("8bit"))
    block, stock, layer = rows["noprop"], rows["end_to_end"], 4 * 128**2 + 3 * 128 * 352 + 2 * 128
    assert 0 < block["ratio"] < block["bar"]
    # by hand: a layer, norm, projection, head and its biases; two layers, norm and table
    assert block["parameters"] == block["gradients"] == 4 * (layer + 128 + 5 * 128**2 + 128 + 2048)
    assert stock["parameters"] == stock["gradients"] == 4 * (2 * layer + 128 + 2048 * 128)
    assert (block["table"], stock["table"]) == (4 * 2048 * 128, 0)
    assert block["optimizer"] == 2 * block["parameters"]
    on_trunk = rows["noprop_trunk"]
    assert on_trunk["table"] == block["table"] + 4 * (layer + 128 + 2048 * 128)  # with its embeddings
    assert all(on_trunk[part] == block[part] for part in ("parameters", "gradients", "optimizer"))
    assert on_trunk["ratio"] < on_trunk["bar"] == pytest.approx(block["bar"] + on_trunk["trunk_share"])
    # one layer, or the table and a norm
    group = rows["block_coordinate"]
    assert group["parameters"] == stock["parameters"] and group["gradients"] in (4 * layer, 4 * (2048 * 128 + 128))
    assert rows["fsdp"]["gradients"] == stock["gradients"] / 2
    assert [run["softmax"] for run in results["training_speed"]] == ["sampled", "whole"]
    assert all(run["ratio_time_per_token"] > 0 for run in results["training_speed"])
    assert results["decoding"][0]["ratio_tokens_per_second"] > 0


SHORT = NoPropConfig(
    vocab_size=900, hidden_size=64, intermediate_size=192, num_blocks=2, num_layers_per_block=1, num_attention_heads=4
)


@pytest.mark.parametrize(
    ("way", "phase1", "half"),
    [
        (memory.PLAIN, False, False),
        (memory.PLAIN, False, True),
        (memory.CHECKPOINTED, False, True),
        (memory.BY_GROUP, False, True),
        (memory.BLOCK, False, False),
        (memory.CHECKPOINTED_BLOCK, False, True),
        (memory.CHECKPOINTED_BLOCK, True, False),
        (memory.BLOCK_ON_TRUNK, False, False),
        (memory.BLOCK_ON_TRUNK, True, False),
    ],
)
def test_tensors_without_data_need_as_much_memory_as_real_ones(way, phase1, half):
    torch.manual_seed(0)
    tokens = random_text(900, 8, 64)
    needs = []
    for group in memory.GROUPS.get(way.trains, (0,)):
        model = memory.build(way, SHORT, group, half, phase1)
        with PeakBytes([model]) as tracker:
            with torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=not way.checkpointing):
                loss = model(tokens)
            loss.backward()
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        weights = sum(p.nbytes for p in model.parameters())
        needs.append(weights + 3 * gradients + tracker.peak)  # AdamW's moments
    counted = memory.count(way, SHORT, tokens, half, phase1)["adamw"]
    assert sum(counted.values()) == pytest.approx(max(needs), rel=0.04)  # one or two states more


def test_memory_of_deep_models_from_shallow_ones(monkeypatch):
    monkeypatch.setattr(memory, "FAMILY", {"deep": (6, 64, 4)})
    monkeypatch.setattr(memory, "FAMILY_VOCABULARY", 900)
    config, shape = memory.family_config("deep", 1), torch.Size((1, 16))
    whole = memory.count_group(memory.CHECKPOINTED, config, shape, 0, True, False, [])
    for optim, parts in memory.count_deep(memory.CHECKPOINTED, "deep", 1, 16).items():
        needed = sum(whole[optim].values())
        assert 0.98 * needed < sum(parts.values()) <= needed


def test_no_group_needs_more_memory_than_those_counted():
    config = NoPropConfig(**SHORT.to_diff_dict() | {"num_blocks": 3, "noise_levels": None})
    shape = torch.Size((8, 64))
    counts = [memory.count_group(memory.BY_GROUP, config, shape, group, False, False, []) for group in range(4)]
    for optim in memory.OPTIMIZERS:
        needs = [sum(parts[optim].values()) for parts in counts]
        assert max(needs) == max(needs[group] for group in memory.GROUPS["group"])
        assert max(needs[1:]) == max(needs[group] for group in memory.GROUPS["layers"])


@pytest.mark.parametrize("optim", memory.OPTIMIZERS)
def test_states_of_optimizers_by_formula(optim):
    if optim == "8bit":
        pytest.importorskip("bitsandbytes")
    model = OneBlock(SHORT)
    parameters = [*model.block.parameters()]
    optimizer = memory.new_optimizer(optim, parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [t for state in optimizer.state.values() for name, t in state.items() if not name.startswith("qmap")]
    counted = sum(t.nbytes for t in states if isinstance(t, torch.Tensor) and t.ndim > 0)
    assert memory.state_bytes(optim, parameters) == pytest.approx(counted, rel=1e-3)


def test_the_largest_model_of_a_family(tmp_path, monkeypatch):
    family = {"small": (2, 32, 4), "large": (4, 64, 4)}
    stock = [
        500 * width + layers * (4 * width**2 + 3 * width * inner + 2 * width) + width
        for (layers, width, _), inner in zip(family.values(), (64, 192), strict=True)
    ]
    methods = {name: memory.METHODS[name] for name in ("end_to_end", "noprop_checkpointing_adafactor", "noprop_trunk")}
    budget = 16 * stock[1]  # room for weights, gradients and moments, but for no activations
    values = {"FAMILY": family, "FAMILY_VOCABULARY": 500, "LENGTHS": (32,), "METHODS": methods, "BUDGET": budget}
    for name, value in values.items():
        monkeypatch.setattr(memory, name, value)
    path = tmp_path / "largest.json"
    monkeypatch.setattr(sys, "argv", ["memory.py", "--largest", "--family_layers", "1", "--results", str(path)])
    memory.main()
    stocks, ours = json.loads(path.read_text())
    assert stocks["method"] == "end_to_end" and stocks["model"] == "small" and stocks["parameters"] == stock[0]
    assert 16 * stock[0] < stocks["bytes"] <= budget < stocks["next_bytes"] < 2 * budget
    assert ours["model"] == ours["block_model"] == "large" and ours["parameters"] == stock[1]
    assert ours["block_bytes"] <= ours["bytes"] <= budget and ours["next_bytes"] is None
    assert path.with_suffix(".png").is_file()

    needs = {"small": budget - 1, "large": budget + 1}
    assert memory.largest(needs)["parameters"] == stock[0]
    nothing = memory.largest({"small": budget + 1})
    assert (nothing["parameters"], nothing["model"], nothing["next_bytes"]) == (0, None, budget + 1)


def test_the_sampled_softmax_of_the_stock_model_is_the_corrected_softmax_over_the_tokens_of_the_batch():
    config = NoPropConfig(**{**SHAPES["demo"], "vocab_size": 50})
    model = SampledEndToEnd(config)
    model.log_prior.copy_(torch.randn(50).log_softmax(-1))
    tokens = torch.randint(50, (2, 9))
    logits, targets = model.model(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    seen = (1 - (1 - model.log_prior.double().exp()) ** len(targets)).float()
    is_present = torch.zeros(50, dtype=torch.bool).index_fill(0, targets, True)
    expected = F.cross_entropy(torch.where(is_present, logits - seen.log(), -torch.inf), targets)
    found = model(tokens)
    torch.testing.assert_close(found, expected)
    table = model.model.lm_head.weight
    gradients = [torch.autograd.grad(loss, table)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5 * float(gradients[1].abs().max()))


@pytest.mark.slow
def test_scaling_compares_one_process_with_two(tmp_path, monkeypatch, capsys):
    results = tmp_path / "scaling.json"
    monkeypatch.setattr("sys.argv", ["scaling.py", "--small", "--num_blocks", "2", "--results", str(results)])
    scaling.main()
    figures = json.loads(results.read_text())
    (one,), (two,) = figures["seconds"].values()
    assert figures["efficiency"] == pytest.approx(one / (2 * two)) and f"{one / two / 2:.3f}" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there it would be no toy")
def test_what_only_a_gpu_can_tell_runs_at_toy_size_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    sections = ["precision", "memory", "speed", "t4", "decoding"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--results", str(tmp_path), "--only", *sections])
    gpu.main()
    files = {name: tmp_path / f"{name}.json" for name in sections}
    found = {name: json.loads(path.read_text()) for name, path in files.items()}
    assert all(record["complete"] and record["is_toy"] and "error" not in record for record in found.values())
    results = {name: record["result"] for name, record in found.items()}
    for phase in ("phase_1", "block"):
        whole = results["precision"][phase]["float32"]["nats"]
        assert results["precision"][phase]["float32"]["last_nats"] < whole[0] - 0.2
        for name in ("bfloat16", "float16"):
            half = results["precision"][phase][name]
            assert half["nats"] == pytest.approx(whole, abs=0.05) and half["nats"] != whole
            assert half["largest_gap"] == pytest.approx(
                max(abs(a - b) for a, b in zip(half["nats"], whole, strict=True))
            )
            assert half["overflow_steps"] == half["steps_not_finite"] == 0
        assert all(rows["fits"] for rows in results["t4"][phase].values())
    saved = {kind: rows["4_windows"]["saved_bytes"] for kind, rows in results["memory"].items()}
    assert saved["block_checkpointed"] < saved["block"] < saved["end_to_end"]
    assert saved["end_to_end_checkpointed"] < saved["end_to_end"]
    assert "GPU" in results["memory"]["block"]["4_windows"]["peak_bytes"]["reason"]
    for precision in ("float16", "bfloat16"):
        assert all(results["speed"][precision][kind]["tokens_per_second"] > 0 for kind in gpu.VARIANTS)
    rows = results["decoding"]["batch_2"]
    kinds = ("ours", "one_by_one", "stock", "ours_compiled", "stock_compiled")
    assert all(rows[kind]["tokens_per_second"] > 0 for kind in kinds)

    capsys.readouterr()
    times = {path: path.stat().st_mtime_ns for path in files.values()}
    old = found["t4"] | {"versions": found["t4"]["versions"] | {"torch": "1.0"}}
    files["t4"].write_text(json.dumps(old))  # of other circumstances
    files["speed"].write_text(json.dumps(found["speed"] | {"complete": False}))
    monkeypatch.setitem(gpu.SECTIONS, "speed", broken)
    with pytest.raises(SystemExit, match="Failed: speed"):
        gpu.main()
    assert capsys.readouterr().out.count("is measured already") == 3
    assert all(
        path.stat().st_mtime_ns == times[path] for path in (files[name] for name in ("precision", "memory", "decoding"))
    )
    assert json.loads(files["t4"].read_text())["versions"] == found["t4"]["versions"]
    broken_off = json.loads(files["speed"].read_text())
    assert broken_off["result"] == {"known": 1} and "no such card" in broken_off["error"]


def broken(setting):
    yield {"known": 1}
    raise RuntimeError("no such card")


def test_steps_that_overflow_are_counted():
    """Gradients above what float16 holds: the scale is halved until they fit."""
    torch.manual_seed(0)
    config = NoPropConfig(vocab_size=50, hidden_size=16, num_blocks=2, num_layers_per_block=1, intermediate_size=24)
    training = Training(OneBlock(config).train(), torch.float16)
    training.scaler = torch.amp.GradScaler("cpu", 2.0**30)
    before = [parameter.clone() for parameter in training.parameters]
    found = gpu.losses_and_overflows(training, torch.randint(50, (20, 2, 8)), 1e-3)
    assert 0 < found["overflow_steps"] < 20
    assert found["final_scale"] == 2.0 ** (30 - found["overflow_steps"])
    assert found["steps_not_finite"] == 0 and len(found["nats"]) == 20
    assert any(not torch.equal(old, new) for old, new in zip(before, training.parameters, strict=True))


def test_waits_for_the_gpu_are_recorded_with_their_place():
    def copies() -> None:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)  # in torch's words

    with gpu.recorded_waits() as stacks:
        warnings.warn("something else", stacklevel=1)
        copies()
        copies()
    assert len(stacks) == 2 and stacks[0] != stacks[1]  # called from two lines
    assert all("warnings.warn(" in stack[0] and "copies()" in stack[1] for stack in stacks)
    assert all(stack[0].startswith("test_benchmarks.py:") for stack in stacks)  # no folder of this machine
    assert gpu.importable(torch.functional.__file__) == "torch/functional.py"


def test_without_pytest_the_section_of_tests_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytest", None)
    (result,) = gpu.tests(None)
    assert "pytest is not installed" in result["skipped"]
