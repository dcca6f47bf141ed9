"""Every field of the data and the model arguments either changes the result of a run, which then cannot go on with
another value, or does not."""

import dataclasses
import shutil
from collections import ChainMap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from conftest import MODEL, arguments, sentences
from noprop_hf import checkpoints
from noprop_hf.arguments import BlockArguments, ModelArguments, PretrainingArguments
from noprop_hf.checkpoints import DurableTrainer, checkpoints_of
from noprop_hf.data import DataArguments, load_corpus, tokenize, train_tokenizer, training_fingerprint
from noprop_hf.pretraining import build_config, load_config, prepare_pretraining, pretrain_embeddings, pretraining_run
from noprop_hf.shards_noprop import EMBEDDINGS_SHARD, block_shard
from noprop_hf.training import train_blocks


# Data arguments that change the weights: another value (with the values it needs) gives other training data.
DATA_CHANGES: dict[str, dict[str, Any]] = {
    "dataset_name": {"dataset_name": "lines", "train_file": None, "dataset_config_name": "some"},
    "dataset_config_name": {"dataset_config_name": "others", "dataset_name": "lines", "train_file": None},
    "train_file": {"train_file": "other.txt"},
    "validation_file": {"validation_file": "other.txt"},
    "text_column_name": {"text_column_name": "title", "train_file": "rows.jsonl"},
    "validation_split_percentage": {"validation_split_percentage": 20.0},
    "streaming": {"streaming": True, "validation_file": "other.txt"},
    "max_length": {"max_length": 12},
    "packing": {"packing": False},
    "append_eos": {"append_eos": True},
    "max_train_samples": {"max_train_samples": 50},
}
# With `load_best_model_at_end`, decides which weights are the best, and changes nothing else.
DATA_SELECTS: dict[str, dict[str, Any]] = {"max_eval_samples": {"max_eval_samples": 15}}
DATA_KEEPS: dict[str, dict[str, Any]] = {
    "test_file": {"test_file": "other.txt"},
    "preprocessing_num_workers": {"preprocessing_num_workers": 1},
}
# Every model argument decides what is trained.
MODEL_CHANGES: dict[str, dict[str, Any]] = {
    "tokenizer_name": {"tokenizer_name": "tokenizer", "vocab_size": None},
    "vocab_size": {"vocab_size": 280},
    "embeddings_from": {"embeddings_from": "no/such", "vocab_size": None},
    "trunk_from": {"trunk_from": "no/such", "vocab_size": None},
    "hidden_size": {"hidden_size": 24},
    "num_blocks": {"num_blocks": 3},
    "num_layers_per_block": {"num_layers_per_block": 2},
    "num_attention_heads": {"num_attention_heads": 4},
    "intermediate_size": {"intermediate_size": 16},
    "attention_dropout": {"attention_dropout": 0.2},
    "noise_schedule": {"noise_schedule": "cosine"},
    "loss_type": {"loss_type": "mse"},
    "sampled_softmax": {"sampled_softmax": False},
    "denoising_weight": {"denoising_weight": 0.25},
    "num_pretraining_layers": {"num_pretraining_layers": 2},
    "pretraining_objective": {"pretraining_objective": "mlm"},
    "block_initialization": {"block_initialization": "pretraining"},
    "block_data": {"block_data": "clusters"},
}


def test_every_field_has_one_treatment():
    for fields, treatments in (
        (DataArguments, (DATA_CHANGES, DATA_SELECTS, DATA_KEEPS)),
        (ModelArguments, (MODEL_CHANGES,)),
    ):
        names = [name for treatment in treatments for name in treatment]
        assert sorted(names) == sorted(field.name for field in dataclasses.fields(fields))


@pytest.fixture(scope="module")
def files(corpus, tmp_path_factory) -> Path:
    """Other data and another tokenizer than those of the run."""
    folder = tmp_path_factory.mktemp("identity")
    (folder / "other.txt").write_text("\n".join(sentences(60, seed=1)) + "\n")
    rows = [f'{{"text": "{one}", "title": "{two}"}}' for one, two in zip(sentences(60), sentences(60, 2), strict=True)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    (folder / "lines").mkdir()
    for seed, name in enumerate(("some", "others")):
        (folder / "lines" / f"{name}.txt").write_text("\n".join(sentences(60, seed)) + "\n")
    configs = [f"- config_name: {name}\n  data_files: {name}.txt" for name in ("some", "others")]
    (folder / "lines" / "README.md").write_text("\n".join(["---", "configs:", *configs, "---"]))
    train_tokenizer(corpus["train"]["text"], 280, 16).save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(autouse=True)
def here(files, monkeypatch):
    monkeypatch.chdir(files)


def prepare(data_args: DataArguments) -> tuple[Any, str, Any]:
    """Dataset, its fingerprint, and tokenizer of a run."""
    splits = load_corpus(data_args)
    _, tokenizer, _ = prepare_pretraining(MODEL, data_args, splits["train"])
    dataset = tokenize(splits, tokenizer, data_args)
    return dataset, training_fingerprint(dataset["train"], data_args), tokenizer


def test_the_identity_of_a_run_is_that_of_its_data_and_model(data):
    def data_of(**options):
        return prepare(dataclasses.replace(data, **options))

    def identity(prepared, model_args: ModelArguments = MODEL, **options: Any) -> dict[str, Any]:
        dataset, fingerprint, tokenizer = prepared
        config = build_config(model_args, data, tokenizer)
        args = arguments(Path("model"), **options)
        return pretraining_run(config, dataset, fingerprint, PretrainingArguments(), args)[1]

    for name, options in DATA_CHANGES.items():
        without = {key: value for key, value in options.items() if key != name}
        if name == "dataset_config_name":
            without[name] = "some"
        elif name == "dataset_name":
            without = {}  # the file
        assert data_of(**options)[1] != data_of(**without)[1], name
    prepared, best = data_of(), {"load_best_model_at_end": True}
    plain, selecting = identity(prepared), identity(prepared, **best)
    for options in (DATA_SELECTS | DATA_KEEPS).values():
        assert identity(data_of(**options)) == plain, options
    for options in DATA_SELECTS.values():
        assert identity(data_of(**options), **best) != selecting, options
    for name, options in MODEL_CHANGES.items():
        if name not in ("tokenizer_name", "vocab_size", "embeddings_from", "trunk_from"):  # other data or source
            assert identity(prepared, dataclasses.replace(MODEL, **options)) != plain, name


def test_a_stream_is_not_known_by_its_first_rows_alone(data):
    """Of which a thousand are read."""
    rows = Dataset.from_dict({"input_ids": [[1, 2]] * 1001}).to_iterable_dataset()
    limited, other = (
        dataclasses.replace(data, max_train_samples=1001),
        dataclasses.replace(data, train_file="other.txt"),
    )
    assert len({training_fingerprint(rows, args) for args in (data, limited, other)}) == 3


# --- between a kill and a restart -------------------------------------------------------------------------------------


def phase_1(directory: Path, data_args: DataArguments, model_args: ModelArguments) -> dict[str, torch.Tensor]:
    one = PretrainingArguments(pretraining_max_steps=6)
    pretrain_embeddings(model_args, data_args, one, arguments(directory, save_steps=2))
    return load_file(directory / EMBEDDINGS_SHARD)


def phase_2(directory: Path, data_args: DataArguments, model_args: ModelArguments) -> dict[str, torch.Tensor]:
    one = BlockArguments(blocks="1", sample_prompts=[])
    train_blocks(data_args, one, arguments(directory, save_steps=2), model_args)
    return load_file(directory / block_shard(1))


Train = Callable[[Path, DataArguments, ModelArguments], dict[str, torch.Tensor]]


@pytest.fixture(scope="module", params=[phase_1, phase_2])
def killed(request, data, phase1, tmp_path_factory) -> tuple[Train, Path, dict[str, torch.Tensor]]:
    """A run that was killed after its fourth step, and the weights of one that was not."""
    train, directory = request.param, tmp_path_factory.mktemp("killed") / "model"
    if train is phase_2:
        shutil.copytree(phase1, directory)
    weights = train(directory, data, MODEL)
    (directory / (EMBEDDINGS_SHARD if train is phase_1 else block_shard(1))).unlink()
    folder = directory / "checkpoints" / ("pretraining" if train is phase_1 else "block-01")
    (step, newest), *_ = checkpoints_of(folder)
    assert step == 6
    shutil.rmtree(newest)
    return train, directory, weights


def test_what_does_not_change_the_result_may_change(killed, data, tmp_path, monkeypatch):
    """Another number of threads may change it, so that is told."""
    train, directory, weights = killed
    directory = Path(shutil.copytree(directory, tmp_path / "model"))
    other, told = [options for treatment in (DATA_SELECTS, DATA_KEEPS) for options in treatment.values()], []
    monkeypatch.setattr(checkpoints.logger, "warning", told.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    again = train(directory, dataclasses.replace(data, **dict(ChainMap(*other))), MODEL)
    assert again.keys() == weights.keys() and all(torch.equal(again[name], weights[name]) for name in weights)
    assert any("now there are 64" in text and "OMP_NUM_THREADS=" in text for text in told)


@pytest.mark.parametrize("name", ["train_file", "max_length", "append_eos", "max_train_samples", "streaming"])
def test_other_data_are_refused(killed, data, monkeypatch, name):
    train, directory, _ = killed
    monkeypatch.setattr(DurableTrainer, "train", None)
    with pytest.raises(ValueError, match="other settings: .*the training data .* changed|was trained on other data"):
        train(directory, dataclasses.replace(data, **DATA_CHANGES[name]), MODEL)


@pytest.mark.parametrize("name", ["tokenizer_name", "vocab_size", "hidden_size", "loss_type", "denoising_weight"])
def test_another_model_is_refused(killed, data, monkeypatch, name):
    train, directory, _ = killed
    monkeypatch.setattr(DurableTrainer, "train", None)
    with pytest.raises(ValueError, match="other settings: .* was .* and is|holds a model with .* was requested"):
        train(directory, data, dataclasses.replace(MODEL, **MODEL_CHANGES[name]))


@pytest.mark.parametrize("name", MODEL_CHANGES)
def test_a_model_directory_is_that_of_its_arguments(phase1, name):
    value = MODEL_CHANGES[name][name]
    with pytest.raises(ValueError, match=f"holds a model with {name}=.*, but {name}={value} was requested"):
        load_config(phase1, dataclasses.replace(MODEL, **{name: value}))
