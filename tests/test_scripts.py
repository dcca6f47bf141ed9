"""What the scripts do with what their users get wrong: one sentence and a status, before any work, and no traceback."""

import io
import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import ROOT, sentences
from noprop_hf import perplexity, pretraining, training
from noprop_hf.recipes import entry_point


def run(script: str, *options: str) -> int | str | None:
    """Run a script in this process. Returns its exit status, or the sentence it ends with."""
    sys.argv = [script, *options]
    try:
        runpy.run_path(str(ROOT / "scripts" / f"{script}.py"), run_name="__main__")
    except SystemExit as end:
        return end.code
    return None


def refusal(capsys, script: str, *options: str) -> str:
    """The last line that a script which refuses its arguments writes."""
    status = run(script, *options)
    output = capsys.readouterr().err
    assert "Traceback" not in output and status not in (None, 0)
    text = status if isinstance(status, str) else output.strip().splitlines()[-1]
    assert "\n" not in text
    return text


@pytest.fixture(autouse=True)
def argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)


@pytest.fixture(scope="module")
def folder(trained, tokenizer, corpus_file, tmp_path_factory) -> Path:
    """Models, texts and recipes, good and bad."""
    folder = tmp_path_factory.mktemp("inputs")
    shutil.copytree(trained, folder / "model", ignore=shutil.ignore_patterns("checkpoints"))
    good = folder / "model"
    for name in ("half", "damaged", "odd", "no_json", "huge", "deep", "odd_number", "bomb", "no_results", "brackets"):
        shutil.copytree(good, folder / name)
    (folder / "half" / "block-01.safetensors").unlink()
    (folder / "folder").mkdir()
    shutil.copytree(folder / "half", folder / "folder", dirs_exist_ok=True)
    (folder / "folder" / "block-01.safetensors").mkdir()
    for name in ("large_tokenizer", "no_tokenizer", "odd_corpus"):
        shutil.copytree(folder / "no_results", folder / name)
    added = json.loads((good / "tokenizer.json").read_text())
    added["added_tokens"].append(added["added_tokens"][0] | {"id": 5000, "content": "the"})
    (folder / "large_tokenizer" / "tokenizer.json").write_text(json.dumps(added))
    (folder / "no_tokenizer" / "tokenizer.json").unlink()
    (folder / "odd_corpus" / "corpus.yaml").write_bytes(b"\xff\xfe")
    (folder / "damaged" / "block-01.safetensors").write_bytes(b"nothing")
    (folder / "no_json" / "config.json").write_text("{")
    (folder / "brackets" / "config.json").write_text("[" * 100_000)
    config = json.loads((good / "config.json").read_text())
    (folder / "odd" / "config.json").write_text(json.dumps(config | {"hidden_size": "wide"}))
    (folder / "huge" / "config.json").write_text(json.dumps(config | {"num_blocks": 10**9, "noise_levels": None}))
    (folder / "deep" / "config.json").write_text(json.dumps(config | {"num_layers_per_block": 10**9}))
    (folder / "odd_number" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": "small"}))
    (folder / "bomb" / "corpus.yaml").write_text(str(RECIPES["bomb"]))
    (good / "results.json").write_text('{"table": ')
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)).save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    shutil.copy(corpus_file, folder / "text.txt")
    (folder / "empty.txt").touch()
    (folder / "numbers.csv").write_text("text\n" + "\n".join(map(str, range(400))))
    (folder / "latin.txt").write_text("caf\u00e9\n" * 100, encoding="latin-1")
    for name, text in RECIPES.items():
        (folder / f"{name}.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


RECIPES: dict[str, str | bytes] = {
    "good": "train_file: text.txt\nmax_length: 16\nvocab_size: 300\nmax_steps: 2\nuse_cpu: true\n",
    "list": "- max_length\n- 16\n",
    "word": "max_length",
    "nothing": "# only a comment\n",
    "no_yaml": "max_length: [16\nvocab_size: 300\n",
    "tabs": "max_length:\t16\n\t- x\n",
    "binary": bytes(range(128, 256)),
    "twice": "max_length: 16\nvocab_size: 300\nmax_length: 32\n",
    "unknown": "max_lenght: 16\n",
    "kind": "max_steps: [1, 2]\n",
    "nested": "seed: {a: 1}\n",
    "deep": "sample_prompts: [[a, b]]\n",
    "word_for_number": "max_steps: many\n",
    "bomb": "a: &a [x, x]\nb: &b [*a, *a]\nsample_prompts: [*b, *b]\n",
    "deep_brackets": "a: " + "[" * 5000,
    "long": "sample_prompts: [" + "word, " * 20_000 + "]\n",
    "list_for_name": "? [a, b]\n: 1\n",
}
TRAINING = ("train", "train_blocks", "pretrain_embeddings")
READERS = ("generate", "watch", "evaluate_perplexity")
REFUSED: list[tuple[str, str, str]] = [  # script, options, a word of the sentence
    *((script, "nowhere.yaml", "no recipe") for script in TRAINING),
    *(("train", f"{name}.yaml", name) for name in ("list", "word", "nothing", "no_yaml", "tabs", "binary")),
    ("train", "model", "no recipe"),
    ("train", "twice.yaml", "twice.yaml, line 3: 'max_length' is given twice"),
    ("train", "unknown.yaml", "'max_length'?"),
    ("train", "kind.yaml", "max_steps must not be"),
    ("train", "nested.yaml", "seed must not be"),
    ("train", "deep.yaml", "sample_prompts must not be"),
    ("train", "word_for_number.yaml", "--max_steps"),
    ("train", "bomb.yaml", "alias"),
    ("train", "deep_brackets.yaml", "deep_brackets.yaml"),
    ("train", "long.yaml", "long.yaml"),
    ("train", "list_for_name.yaml", "list_for_name.yaml, line 1: a name must be a word"),
    ("train", "--max_steps 3 good.yaml", "before all options"),
    ("train", "good.yaml other.yaml", "no argument 'other.yaml'"),
    ("train", "good.yaml --warmup_steps -1", "warmup_steps"),  # in the words of transformers
    *(
        ("train", f"good.yaml --{name} {value}", name)
        for name, value in (
            ("per_device_train_batch_size", 0),
            ("per_device_eval_batch_size", -1),
            ("gradient_accumulation_steps", 0),
            ("seed", -1),
            ("seed", 2**32),
            ("learning_rate", "nan"),
            ("learning_rate", -1),
            ("pretraining_learning_rate", "inf"),
            ("num_train_epochs", 0),
            ("max_steps", -2),
            ("save_steps", 0),
            ("save_steps", "inf"),
            ("eval_delay", "nan"),
            ("logging_steps", 0),
            ("sample_max_new_tokens", 0),
            ("sample_max_new_tokens", 10**12),
            ("max_length", 10**12),
            ("dataloader_num_workers", 10**8),
            ("attention_dropout", 2),
            ("num_blocks", 99999999999),
            ("vocab_size", 10),
            ("report_to", "bogus"),
            ("max_train_samples", 0),
            ("max_eval_samples", -3),
            ("preprocessing_num_workers", 0),
            ("preprocessing_num_workers", 10**6),
            ("blocks", "0-9999999999"),
            ("blocks", "7-3"),
            ("blocks", "\u00b2"),
            ("output_dir", "text.txt"),
            ("output_dir", "text.txt/below"),
            ("tokenizer_name", "no/such"),
            ("text_column_name", "body"),
            ("validation_split_percentage", 100),
        )
    ),
    ("train", "good.yaml --lr_scheduler_type bogus", "bogus"),
    ("train", "good.yaml --optim bogus", "bogus"),
    ("train", "good.yaml --lr_scheduler_kwargs {}x", "'{}x' is not JSON"),
    ("train", "good.yaml --accelerator_config {\"x\":1}", "--accelerator_config"),
    ("train", "good.yaml --embeddings_from no/such", "Cannot load the model 'no/such'"),
    ("train", "good.yaml --train_file nowhere.txt", "no file 'nowhere.txt'"),
    ("train", "good.yaml --train_file empty.txt", "is empty"),
    ("train", "good.yaml --train_file model", "is a directory"),
    ("train", "good.yaml --train_file numbers.csv", "--text_column_name"),
    ("train", "good.yaml --train_file latin.txt", "iconv"),
    ("train", "good.yaml --validation_file nowhere.txt", "no file 'nowhere.txt'"),
    ("train", "--dataset_name no/such --output_dir new", "Cannot read the dataset 'no/such'"),
    ("train", "good.yaml --dataloader_drop_last true --per_device_train_batch_size 9999", "too few for one batch"),
    ("train", "--output_dir new", "`train_file`"),
    *((script, "good.yaml --output_dir llama", "type 'llama'") for script in TRAINING),
    *((script, "good.yaml --output_dir no_json", "no_json") for script in TRAINING),
    ("train", "good.yaml --dataset_name x --train_file text.txt", "not both"),
    ("train", "good.yaml --dataset_config_name x", "not both"),
    *((script, "good.yaml --output_dir folder", "is a directory") for script in ("train", "train_blocks")),
    ("generate", "model \udcff", "not text in UTF-8"),
    *((script, "large_tokenizer the", "ids up to 300, but") for script in ("generate", "watch")),
    ("evaluate_perplexity", "large_tokenizer", "ids up to 300, but"),
    ("push_to_hub", "large_tokenizer user/x --dry_run", "ids up to 300, but"),
    ("push_to_hub", "no_tokenizer user/x --dry_run", "Cannot load the tokenizer"),
    ("push_to_hub", "odd_corpus user/x --dry_run", "corpus.yaml is damaged"),
    *((script, "brackets the", "There is no model 'brackets'") for script in ("generate", "watch")),
    ("status", "brackets", "There is no model 'brackets'"),
    ("status", "user/name", "HF_HUB_OFFLINE"),
    ("train", "good.yaml --output_dir model --hidden_size 64", "hidden_size=16, but hidden_size=64"),
    *(
        (script, f"good.yaml --output_dir model --{name} no/such", f"{name}=None, but {name}=no/such was requested")
        for script in TRAINING
        for name in ("tokenizer_name", "embeddings_from")
    ),
    ("train_blocks", "good.yaml --output_dir new", "`noprop pretrain`"),
    ("train_blocks", "good.yaml --dry_run", "`noprop plan`"),
    *((script, f"good.yaml --output_dir {where} --push_to_hub true {options}", word)
      for script, where in (("train", "new"), ("train", "model --dry_run true"), ("pretrain_embeddings", "new"),
                            ("train_blocks", "model"))
      for options, word in (
        *((f"--hub_model_id {name}", "user/name") for name in ("user/m@main", "a/b/c", "https://hf.co/u/m", "m")),
        ("--hub_model_id user/m --hub_token hf_secr\u00e9t", "malformed"),
        ("--hub_model_id user/m --hub_token hf_secret", "HF_HUB_OFFLINE"),
    )),
    *((script, f"{name} the", word) for script in READERS[:2] for name, word in (
        ("nowhere", "There is no model 'nowhere'"),
        ("no name!", "There is no model"),
        ("text.txt", "There is no model 'text.txt'"),
        ("llama", "type 'llama'"),
        ("half", "not fully trained"),
        ("damaged", "corrupted: block-01.safetensors"),
        ("odd", "cannot be used"),
        ("no_json", "no_json"),
        ("huge", "`num_blocks`"),
        ("deep", "`num_layers_per_block`"),
        ("odd_number", "`rms_norm_eps`"),
    ) if " " not in name),
    *(("evaluate_perplexity", name, word) for name, word in (
        ("nowhere", "There is no model 'nowhere'"),
        ("llama", "type 'llama'"),
        ("half", "not fully trained"),
        ("damaged", "corrupted: block-01.safetensors"),
        ("no_json", "no_json"),
        ("bomb", "alias"),
        ("model --split none", "--split"),
        ("model --split test", "no 'test' split"),
        ("model --batch_size 0", "--batch_size"),
        ("model --seed -1", "--seed"),
        ("model --train_file nowhere.txt", "no file 'nowhere.txt'"),
        ("model --max_lenght 3", "'--max_length'?"),
    )),
    *((script, f"model the --{name} {value}", f"--{name}") for script in READERS[:2] for name, value in (
        ("temperature", -1),
        ("temperature", "nan"),
        ("max_new_tokens", 0),
        ("num_trajectories", 0),
        ("num_inference_blocks", 0),
        ("num_inference_blocks", 9),
        ("seed", -1),
    )),
    ("generate", "model the --temperature 0", "--temperature"),
    ("generate", "model the --temperature 1e-300", "--temperature"),
    ("generate", "model the --top_k -1", "--top_k"),
    ("generate", "model the --top_p 0", "--top_p"),
    ("watch", "model the --max_new_tokens 5000", "do not fit"),
    ("watch", "model the --save nowhere/chain.png", "nowhere/chain.png"),
    ("watch", "model the --save chain.xyz", "must end in"),
    *(("status", name, word) for name, word in (
        ("nowhere", "There is no model 'nowhere'"),
        ("llama", "embeddings.safetensors"),
        ("no_json", "no_json"),
        ("huge", "`num_blocks`"),
        ("deep", "`num_layers_per_block`"),
        ("odd_number", "`rms_norm_eps`"),
    )),
    ("plot_run", "nowhere", "not a directory"),
    ("plot_run", "llama", "nothing to draw"),
    ("plot_run", "model", "results.json is damaged"),
    ("plot_run", "model --save nowhere/x.png", "nowhere/x.png"),
    ("push_to_hub", "nowhere user/x", "holds no model"),
    ("push_to_hub", "half user/x", "not fully trained"),
    ("push_to_hub", "damaged user/x", "corrupted"),
    ("push_to_hub", "model a/b/c --dry_run", "user/name"),
    ("push_to_hub", "model user/x --dry_run", "results.json"),
    ("push_to_hub", "no_results user/x", "cannot be reached"),
]  # fmt: skip


@pytest.mark.parametrize(("script", "options", "word"), REFUSED)
def test_what_a_user_gets_wrong(folder, monkeypatch, capsys, script, options, word):
    if script in ("watch", "plot_run"):
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(pretraining, "pretrain_language_model", lambda *args: pytest.fail("work was begun"))
    monkeypatch.setattr(training, "train_block", lambda *args: pytest.fail("work was begun"))
    text = refusal(capsys, script, *options.split(" "))
    assert word in text
    if script == "train" and "train.py: error" not in text:  # refused after the arguments are read
        assert refusal(capsys, script, *options.split(" "), "--dry_run") == text


def test_without_matplotlib(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for module in [name for name in sys.modules if name.startswith(("matplotlib", "noprop_hf.plotting"))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for options in (("watch", "model", "the", "--save", "x.png"), ("plot_run", "model")):
        assert "pip install matplotlib" in refusal(capsys, *options)


def test_nothing_is_written_by_a_dry_run_of_a_push(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    before = {path: path.stat().st_mtime_ns for path in (folder / "no_results").rglob("*")}
    assert run("push_to_hub", "no_results", "user/x", "--dry_run") is None
    assert {path: path.stat().st_mtime_ns for path in (folder / "no_results").rglob("*")} == before
    assert "block-01.safetensors" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["some lines of words\n\n \n\nand more\n" * 8, "one line alone"])
def test_texts_without_tokens_are_left_out(folder, monkeypatch, capsys, text):
    monkeypatch.chdir(folder)
    (folder / "lines.txt").write_text(text)
    monkeypatch.setattr(perplexity, "AutoModelForCausalLM", None)  # the model is loaded once
    options = ["--packing", "false", "--test_file", "lines.txt", "--train_file", "text.txt"]
    assert run("evaluate_perplexity", "model", *options) is None
    assert f"{sum(bool(line.strip()) for line in text.splitlines())} texts of test" in capsys.readouterr().out


def test_a_small_text_gives_a_small_vocabulary(tmp_path, monkeypatch, capsys):
    """And the same recipe is accepted again, by every script."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.txt").write_text("\n".join(sentences(60)[:40]))
    sizes = "--hidden_size 8 --num_blocks 1 --num_layers_per_block 1 --num_attention_heads 1 --intermediate_size 8"
    options = f"--train_file small.txt --vocab_size 4096 --max_length 8 --max_steps 1 --use_cpu true {sizes}"
    options += " --output_dir model --disable_tqdm true --save_strategy no --report_to none"
    for script in ("train", "train", "train_blocks", "pretrain_embeddings"):
        assert run(script, *options.split()) is None
    size = json.loads((tmp_path / "model" / "config.json").read_text())["vocab_size"]
    assert 259 < size < 1000
    assert "--vocab_size must be" not in capsys.readouterr().err
    assert "vocab_size" in refusal(capsys, "train", *options.split(), "--vocab_size", str(size - 1))


# --- the rule ---------------------------------------------------------------------------------------------------------


def fail_in_torch():
    torch.zeros(2).view(3)


def fail_in_python():
    int("three")


def fail_in_numpy():
    import numpy as np

    np.zeros(2).reshape(3)


def disk_is_full():
    raise OSError(28, os.strerror(28), "model")


@pytest.mark.parametrize("fault", [fail_in_torch, fail_in_python, fail_in_numpy])
def test_faults_of_the_program_keep_their_traceback(folder, monkeypatch, fault):
    """Of the same types as errors of a user, and called from the package."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(training, "tokenize", lambda *args: fault())
    with pytest.raises((RuntimeError, ValueError)):
        run("train", "good.yaml", "--output_dir", "new")


def test_a_full_disk_is_told(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(training, "tokenize", lambda *args: disk_is_full())
    assert refusal(capsys, "train", "good.yaml", "--output_dir", "new") == "No space left on device: model"


def test_an_interruption_is_quiet(capsys):
    @entry_point
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 130 and capsys.readouterr().err == ""


def test_any_terminal_will_do(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    entry_point(lambda: print("1.0 \u00b1 0.1"))()
    sys.stdout.flush()
    assert written.getvalue() == b"1.0 \\xb1 0.1\n"


def test_every_script_goes_through_it():
    for script in (ROOT / "scripts").glob("*.py"):
        assert hasattr(runpy.run_path(str(script))["main"], "__wrapped__"), script
