"""Every field of `TrainingArguments` has an effect in both phases, or is refused before any work."""

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaMLP

from conftest import MODEL, arguments, sentences
from noprop_hf import NoPropConfig, NoPropForPreTraining
from noprop_hf.arguments import UNSUPPORTED_ARGUMENTS, BlockArguments, PretrainingArguments, check_training_arguments
from noprop_hf.checkpoints import RESULT_ARGUMENTS, SELECTION_ARGUMENTS, DurableTrainer, checkpoints_of
from noprop_hf.data import DataArguments, data_fingerprint, load_corpus, load_tokenizer, tokenize
from noprop_hf.meeting_place import NoMeetingPlace
from noprop_hf.model_directory import load_table
from noprop_hf.planning import checkpoints_kept
from noprop_hf.pretraining import pretrain_embeddings, pretrain_language_model
from noprop_hf.recipes import parse_recipe
from noprop_hf.shards_noprop import block_shard
from noprop_hf.training import BlockRun, train_block, train_blocks


# Changes the weights: another value (with the values it needs) gives other bits in both phases.
CHANGES = {
    "per_device_train_batch_size": {"per_device_train_batch_size": 3},
    "num_train_epochs": {"num_train_epochs": 0.25, "max_steps": -1},
    "max_steps": {"max_steps": 3},
    "learning_rate": {"learning_rate": 1e-3},
    "lr_scheduler_type": {"lr_scheduler_type": "constant"},
    "lr_scheduler_kwargs": {"lr_scheduler_kwargs": {"power": 2.0}, "lr_scheduler_type": "polynomial"},
    "warmup_steps": {"warmup_steps": 1},
    "optim": {"optim": "adafactor"},
    "optim_args": {"optim_args": "momentum=0.5", "optim": "sgd"},
    "weight_decay": {"weight_decay": 0.5},
    "adam_beta1": {"adam_beta1": 0.5},
    "adam_beta2": {"adam_beta2": 0.5},
    "adam_epsilon": {"adam_epsilon": 0.01},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 2},
    "max_grad_norm": {"max_grad_norm": 0.01},
    "bf16": {"bf16": True},
    "activation_checkpointing_kwargs": {
        "activation_checkpointing_kwargs": {"use_reentrant": False, "preserve_rng_state": False},
        "activation_checkpointing": True,
    },
    "load_best_model_at_end": {
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "best",
        "metric_for_best_model": "loss",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "max_steps": 6,
    },
    "seed": {"seed": 12},
    "data_seed": {"data_seed": 3},
    "dataloader_drop_last": {
        "dataloader_drop_last": True,
        "per_device_train_batch_size": 12,
        "max_steps": -1,
        "num_train_epochs": 1.0,
    },
    "train_sampling_strategy": {"train_sampling_strategy": "sequential"},
}
# Changes the weights on GPUs, with several processes, or by rounding only.
CHANGES_ELSEWHERE = {
    "average_tokens_across_devices": {"average_tokens_across_devices": False},
    "fp16": {"fp16": True},
    "tf32": {"tf32": False},
    "torch_compile": {"torch_compile": True},
    "torch_compile_backend": {"torch_compile_backend": "eager", "torch_compile": True},
    "torch_compile_mode": {"torch_compile_mode": "default", "torch_compile": True},
    "full_determinism": {"full_determinism": True},
    "ddp_bucket_cap_mb": {"ddp_bucket_cap_mb": 10},
    "ddp_backend": {"ddp_backend": "gloo"},
}
# Decides which weights are the best, and changes nothing else.
SELECTS = {
    "eval_strategy": {"eval_strategy": "epoch"},
    "eval_steps": {"eval_steps": 2},
    "eval_delay": {"eval_delay": 1},
    "per_device_eval_batch_size": {"per_device_eval_batch_size": 3},
    "logging_nan_inf_filter": {"logging_nan_inf_filter": False},
}
# Changes no weight: where, how often and how fast.
KEEPS = {
    "output_dir": {},
    "activation_checkpointing": {"activation_checkpointing": True},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "gradient_checkpointing_kwargs": {"gradient_checkpointing_kwargs": None},  # the old name of another
    "torch_empty_cache_steps": {"torch_empty_cache_steps": 1},
    "logging_strategy": {"logging_strategy": "epoch"},
    "logging_steps": {"logging_steps": 2},
    "logging_first_step": {"logging_first_step": True},
    "log_on_each_node": {"log_on_each_node": False},
    "include_num_input_tokens_seen": {"include_num_input_tokens_seen": "non_padding"},
    "log_level": {"log_level": "error"},
    "log_level_replica": {"log_level_replica": "error"},
    "disable_tqdm": {"disable_tqdm": False},
    "report_to": {"report_to": ["tensorboard"]},
    "run_name": {"run_name": "name"},
    "project": {"project": "name"},
    "trackio_space_id": {"trackio_space_id": "user/name"},
    "trackio_bucket_id": {"trackio_bucket_id": "user/name"},
    "prediction_loss_only": {"prediction_loss_only": True},
    "eval_on_start": {"eval_on_start": True, "eval_strategy": "steps"},
    "save_strategy": {"save_strategy": "steps"},
    "save_steps": {"save_steps": 1},
    "save_total_limit": {"save_total_limit": 1},
    "push_to_hub": {"push_to_hub": True},
    "hub_token": {"hub_token": "hf_secret"},
    "hub_private_repo": {"hub_private_repo": True},
    "hub_model_id": {"hub_model_id": "user/name"},
    "metric_for_best_model": {"metric_for_best_model": "eval_loss"},
    "greater_is_better": {"greater_is_better": False},
    "use_cpu": {"use_cpu": True},
    "dataloader_num_workers": {"dataloader_num_workers": 1},
    "dataloader_pin_memory": {"dataloader_pin_memory": False},
    "dataloader_persistent_workers": {"dataloader_persistent_workers": True, "dataloader_num_workers": 1},
    "dataloader_prefetch_factor": {"dataloader_prefetch_factor": 4, "dataloader_num_workers": 1},
    "dataloader_multiprocessing_context": {
        "dataloader_multiprocessing_context": "fork",
        "dataloader_num_workers": 1,
    },
    "ddp_find_unused_parameters": {"ddp_find_unused_parameters": True},
    "ddp_broadcast_buffers": {"ddp_broadcast_buffers": False},
    "ddp_timeout": {"ddp_timeout": 100},
    "skip_memory_metrics": {"skip_memory_metrics": False},
    "do_eval": {"do_eval": True, "eval_strategy": "steps"},  # follows `eval_strategy`
    "local_rank": {"local_rank": 0},  # given by an old launcher, and not used
}
# Refused unless it is the default.
REFUSED = {
    "optim_target_modules": "all-linear",
    "label_smoothing_factor": 0.1,
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "use_cache": True,
    "neftune_noise_alpha": 5.0,
    "auto_find_batch_size": True,
    "trackio_static_space_id": "user/name",
    "eval_do_concat_batches": False,
    "eval_use_gather_object": True,
    "eval_accumulation_steps": 2,
    "include_for_metrics": ["loss"],
    "batch_eval_metrics": True,
    "save_only_model": True,
    "save_on_each_node": True,
    "enable_jit_checkpoint": True,
    "hub_strategy": "all_checkpoints",
    "hub_always_push": True,
    "hub_revision": "other",
    "ignore_data_skip": True,
    "restore_callback_states_from_checkpoint": True,
    "accelerator_config": {"use_seedable_sampler": False},
    "parallelism_config": "tp",
    "ddp_static_graph": True,
    "fsdp": "full_shard",
    "fsdp_config": {"min_num_params": 1},
    "deepspeed": {"zero_optimization": {"stage": 2}},
    "dataloader_in_order": False,
    "remove_unused_columns": False,
    "label_names": ["labels"],
    "length_column_name": "size",
    "debug": "underflow_overflow",
    "do_train": True,
    "do_predict": True,
    "resume_from_checkpoint": "checkpoint-3",
}
TREATMENTS = (CHANGES, CHANGES_ELSEWHERE, SELECTS, KEEPS, REFUSED)


def test_every_field_has_one_treatment():
    names = [name for treatment in TREATMENTS for name in treatment]
    assert sorted(names) == sorted(field.name for field in dataclasses.fields(TrainingArguments))
    assert tuple(name for name in RESULT_ARGUMENTS if name in CHANGES | CHANGES_ELSEWHERE) == RESULT_ARGUMENTS
    assert set(RESULT_ARGUMENTS) == (CHANGES | CHANGES_ELSEWHERE).keys()
    assert set(SELECTION_ARGUMENTS) == SELECTS.keys()
    assert UNSUPPORTED_ARGUMENTS.keys() == REFUSED.keys()


# --- both phases on a few rows ----------------------------------------------------------------------------------------


class Corpus(NamedTuple):
    directory: Path  # a model directory without blocks
    dataset: Any
    data: str  # its fingerprint


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    folder = tmp_path_factory.mktemp("arguments")
    (folder / "train.txt").write_text("\n".join(sentences(60)) + "\n")
    data_args = DataArguments(train_file=str(folder / "train.txt"), max_length=16, validation_split_percentage=20)
    one_step = PretrainingArguments(pretraining_max_steps=1)
    directory = pretrain_embeddings(MODEL, data_args, one_step, arguments(folder / "model"))
    shutil.rmtree(directory / "checkpoints")
    dataset = tokenize(load_corpus(data_args), load_tokenizer(str(directory)), data_args)
    return Corpus(directory, dataset, data_fingerprint(dataset["train"]))


BASE = {"max_steps": 2, "eval_strategy": "no", "save_strategy": "no", "logging_steps": 1}
Weights = dict[str, torch.Tensor]


def train_phase_1(corpus: Corpus, folder: Path, **options) -> Weights:
    config = NoPropConfig.from_pretrained(corpus.directory)
    tokenizer, args = load_tokenizer(str(corpus.directory)), arguments(folder, **(BASE | options))
    check_training_arguments(args)
    model, _ = pretrain_language_model(config, tokenizer, corpus.dataset, corpus.data, PretrainingArguments(), args)
    return model.state_dict()


def train_phase_2(corpus: Corpus, folder: Path, **options) -> Weights:
    config = NoPropConfig.from_pretrained(corpus.directory)
    tokenizer, args = load_tokenizer(str(corpus.directory)), arguments(folder, **(BASE | options))
    check_training_arguments(args)
    table, block_args = load_table(corpus.directory, config), BlockArguments(sample_max_new_tokens=2)
    place = NoMeetingPlace(folder)
    train_block(
        BlockRun(folder, config, table, None, tokenizer, corpus.dataset, corpus.data, args, block_args, place), 1
    )
    return load_file(folder / block_shard(1))


PHASES = pytest.mark.parametrize("train", [train_phase_1, train_phase_2])
Train = Callable[..., Weights]


def checkpoints(folder: Path) -> Path:
    (path,) = (folder / "checkpoints").iterdir()
    return path


def history(folder: Path) -> list[dict[str, float]]:
    return json.loads((checkpoints(folder) / "trainer_state.json").read_text())["log_history"]


def same_bits(one: Weights, two: Weights) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_any_work(tmp_path, capsys, name):
    args = arguments(tmp_path / "model")
    setattr(args, name, REFUSED[name])
    for run in (
        lambda: pretrain_embeddings(MODEL, DataArguments(train_file="no.txt"), PretrainingArguments(), args),
        lambda: train_blocks(DataArguments(train_file="no.txt"), BlockArguments(), args),
    ):
        with pytest.raises(ValueError, match=f"--{name} .*: leave it out"):
            run()
    assert not (tmp_path / "model").exists()
    if name not in ("parallelism_config", "liger_kernel_config"):  # no command line can give these
        value = REFUSED[name]
        words = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else str(value)]
        with pytest.raises(SystemExit):
            parse_recipe("test", ["--train_file", "no.txt", "--output_dir", str(tmp_path), f"--{name}", *words])
        assert f"--{name} {UNSUPPORTED_ARGUMENTS[name]}" in capsys.readouterr().err


STEPS = {"eval_strategy": "steps", "eval_steps": 1}
COMBINATIONS = [
    ({"per_device_train_batch_size": 0}, "--per_device_train_batch_size must be at least 1"),
    ({"per_device_eval_batch_size": 0}, "--per_device_eval_batch_size must be at least 1"),
    ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps must be at least 1"),
    ({"learning_rate": float("nan")}, "--learning_rate must be a number"),
    ({"learning_rate": -1.0}, "--learning_rate must be a number"),
    ({"weight_decay": float("inf")}, "--weight_decay must be a number"),
    ({"max_grad_norm": -1.0}, "--max_grad_norm must be a number"),
    ({"warmup_steps": float("nan")}, "--warmup_steps must be a number"),
    ({"max_steps": 0}, "--max_steps must be positive, or -1"),
    ({"max_steps": -1, "num_train_epochs": 0.0}, "--max_steps must be positive, or -1"),
    ({"seed": -1}, "--seed must be between"),
    ({"data_seed": 2**32}, "--data_seed must be between"),
    ({"optim": "lomo"}, "--optim lomo is not supported: take one of adamw_torch"),
    ({"optim_args": "momentum=0.5"}, "ignores momentum of --optim_args"),
    ({"optim": "sgd", "optim_args": "momentun=0.5"}, "ignores momentun of --optim_args"),
    ({"optim": "sgd", "optim_args": "weight_decay=0.5"}, "ignores weight_decay of --optim_args"),
    ({"optim": "sgd", "optim_args": "momentum"}, "optimizer cannot be created"),
    ({"optim": "sgd", "adam_beta1": 0.5}, "--optim sgd ignores --adam_beta1"),
    ({"adam_beta2": 1.5}, "optimizer cannot be created.*--adam_beta2"),
    ({"lr_scheduler_type": "greedy", **STEPS}, "--lr_scheduler_type greedy"),
    ({"lr_scheduler_type": "reduce_lr_on_plateau", **STEPS}, "--lr_scheduler_type reduce_lr_on_plateau"),
    ({"lr_scheduler_type": "constant", "warmup_steps": 3}, "take constant_with_warmup"),
    ({"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"power": 2}}, "ignores --lr_scheduler_kwargs"),
    ({"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"power": 2}}, "schedule cannot be created"),
    ({"lr_scheduler_type": "warmup_stable_decay"}, "schedule cannot be created.*--lr_scheduler_kwargs"),
    ({"train_sampling_strategy": "group_by_length"}, "take random or sequential"),
    ({"train_sampling_strategy": "batch_rebalance"}, "take random or sequential"),
    ({"dataloader_persistent_workers": True}, "--dataloader_ arguments do not fit together"),
    ({"dataloader_multiprocessing_context": "fork"}, "--dataloader_ arguments do not fit together"),
    ({"dataloader_num_workers": -1}, "--dataloader_ arguments do not fit together"),
    ({"dataloader_num_workers": 1, "dataloader_prefetch_factor": 0}, "--dataloader_prefetch_factor must be at least"),
    ({"activation_checkpointing_kwargs": {"use_reentrant": True}}, "need --activation_checkpointing true"),
    *[
        (
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": options},
            "--activation_checkpointing_kwargs cannot be used",
        )
        for options in ({"none_such": 1}, {"every_n_layers": 0}, {"offload": True})
    ],
    ({"torch_compile": True, "torch_compile_backend": "none_such"}, "Cannot compile with --torch_compile_backend"),
    ({"fp16": True}, "--fp16 has no effect on a CPU"),
    ({"logging_steps": -1}, "--logging_steps must be positive"),
    ({"eval_strategy": "steps", "eval_steps": -1}, "--eval_steps must be positive"),
    ({"save_strategy": "steps", "save_steps": 0}, "--save_steps must be positive"),
    ({"save_total_limit": 0}, "--save_total_limit must be at least 1"),
    ({"eval_strategy": "no", "do_eval": True}, "--do_eval has no effect"),
    ({"eval_strategy": "no", "eval_on_start": True}, "--eval_on_start needs"),
    ({"metric_for_best_model": "bound_nats"}, "leave --metric_for_best_model"),
    ({"metric_for_best_model": "loss", "greater_is_better": True}, "leave --metric_for_best_model"),
    ({"save_strategy": "best", **STEPS}, "needs --metric_for_best_model loss"),
    ({"save_strategy": "best", "eval_strategy": "no", "metric_for_best_model": "loss"}, "needs evaluations"),
    ({"save_strategy": "no", "eval_strategy": "no", "load_best_model_at_end": True}, "needs evaluations"),
    ({"load_best_model_at_end": True, "eval_delay": 7}, "lower --eval_delay"),
    ({"include_num_input_tokens_seen": "some"}, "--include_num_input_tokens_seen must be"),
    ({"log_level": "loud"}, "--log_level must be one of"),
    ({"report_to": ["none_such"]}, "--report_to none_such is not a tracker"),
]


@pytest.mark.parametrize(("options", "message"), COMBINATIONS)
def test_values_that_break_or_do_nothing_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        check_training_arguments(arguments(tmp_path, **options))


def test_a_backend_needs_several_processes(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_recipe("test", ["--train_file", "no.txt", "--output_dir", str(tmp_path), "--ddp_backend", "gloo"])
    assert "--ddp_backend needs processes that train together" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": float("nan")}, "--pretraining_learning_rate must be a number"),
        ({"per_device_train_batch_size": 0}, "--pretraining_per_device_train_batch_size must be at least 1"),
        ({"max_steps": 0}, "--pretraining_max_steps"),
    ],
)
def test_the_arguments_of_phase_1_are_checked_too(tmp_path, options, message):
    fields = {f"pretraining_{name}": value for name, value in options.items()}
    with pytest.raises(ValueError, match=message):
        check_training_arguments(arguments(tmp_path), PretrainingArguments(**fields))


def test_frameworks_of_the_launcher_are_refused(tmp_path, monkeypatch):
    args = arguments(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="configuration of accelerate enables FSDP"):
        check_training_arguments(args)


@pytest.mark.parametrize("name", KEEPS)
def test_what_works_is_accepted(tmp_path, name):
    if name != "dataloader_multiprocessing_context":
        check_training_arguments(arguments(tmp_path, **KEEPS[name]))


# --- what changes the weights, and what does not ----------------------------------------------------------------------


@PHASES
@pytest.mark.parametrize("name", CHANGES)
def test_a_result_argument_changes_the_weights(corpus, tmp_path, train: Train, name):
    options = dict(CHANGES[name])
    del options[name]
    assert not same_bits(
        train(corpus, tmp_path / "without", **options), train(corpus, tmp_path / "with", **CHANGES[name])
    )


TOGETHER = [
    {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "per_device_eval_batch_size": 3},
    {"eval_strategy": "epoch", "eval_delay": -1, "metric_for_best_model": "loss", "logging_nan_inf_filter": False},
    {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "logging_strategy": "no"},
    {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 1},
    {"activation_checkpointing": True, "torch_empty_cache_steps": 1, "include_num_input_tokens_seen": "all"},
]


@PHASES
def test_the_other_arguments_do_not(corpus, tmp_path, train: Train):
    expected = train(corpus, tmp_path / "plain")
    for index, options in enumerate(TOGETHER):
        assert options.keys() <= (SELECTS | KEEPS).keys()
        assert same_bits(train(corpus, tmp_path / str(index), **options), expected), options


def identity(folder: Path, corpus: Corpus, options: dict[str, Any]) -> dict[str, Any]:
    args = arguments(folder, **(BASE | options))
    model = NoPropForPreTraining(NoPropConfig.from_pretrained(corpus.directory))
    splits = {"train_dataset": corpus.dataset["train"], "eval_dataset": corpus.dataset["validation"]}
    return DurableTrainer(model=model, args=args, **splits).run_identity()


def test_the_identity_of_a_run_is_that_of_its_result(corpus, tmp_path):
    """A run that is started again with other arguments is refused where its result would be another."""
    for name, options in (CHANGES | CHANGES_ELSEWHERE).items():
        if name in ("load_best_model_at_end", "ddp_backend"):  # tested below; not for a single process
            continue
        without = {key: value for key, value in options.items() if key != name}
        assert identity(tmp_path, corpus, options)[name] != identity(tmp_path, corpus, without)[name], name
    best = {"load_best_model_at_end": True, "save_strategy": "best", "metric_for_best_model": "loss"}
    best |= {"eval_strategy": "steps", "eval_steps": 1}
    plain, selecting = (identity(tmp_path, corpus, options) for options in ({}, best))
    for name, options in SELECTS.items():
        assert identity(tmp_path, corpus, options) == plain, name
        assert identity(tmp_path, corpus, best | options) != selecting, name
    for name, options in KEEPS.items():
        if name not in ("push_to_hub", "report_to"):  # not for a plain `Trainer` without a network
            assert identity(tmp_path, corpus, options) == plain, name


# --- effects ----------------------------------------------------------------------------------------------------------


@PHASES
def test_logging_evaluation_and_saving_happen_when_asked(corpus, tmp_path, train: Train):
    train(
        corpus,
        tmp_path,
        max_steps=6,
        logging_steps=4,
        logging_first_step=True,
        eval_strategy="steps",
        eval_steps=2,
        eval_delay=3,
        eval_on_start=True,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=3,
        include_num_input_tokens_seen="non_padding",
    )
    entries = history(tmp_path)
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 4]
    assert [entry["step"] for entry in entries if "eval_loss" in entry] == [0, 4, 6]
    assert [step for step, _ in checkpoints_of(checkpoints(tmp_path))] == [6, 5, 4]
    assert entries[-1]["num_input_tokens_seen"] == 6 * 4 * 16
    train(corpus, tmp_path / "epochs", max_steps=-1, num_train_epochs=2.0, eval_strategy="epoch", save_strategy="epoch")
    steps = [entry["step"] for entry in history(tmp_path / "epochs") if "eval_loss" in entry]
    assert [step for step, _ in checkpoints_of(checkpoints(tmp_path / "epochs"))] == steps[::-1]
    assert len(steps) == 2 and steps[1] == 2 * steps[0]


@PHASES
def test_memory_is_logged(corpus, tmp_path, train: Train):
    train(corpus, tmp_path, max_steps=1, skip_memory_metrics=False)
    assert "train_mem_cpu_alloc_delta" in history(tmp_path)[-1 if train is train_phase_1 else -2]


@PHASES
def test_checkpointed_activations_are_computed_twice(corpus, tmp_path, train: Train, monkeypatch):
    calls = []
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: calls.append(torch.is_grad_enabled()) or forward(self, x))
    train(corpus, tmp_path / "plain")
    once = sum(calls)
    calls.clear()
    train(corpus, tmp_path / "checkpointed", activation_checkpointing=True)
    assert sum(calls) == 2 * once


@PHASES
def test_all_rows_are_evaluated_when_the_last_batch_of_training_is_dropped(corpus, tmp_path, train: Train):
    options = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 64}
    train(corpus, tmp_path / "kept", **options)
    train(corpus, tmp_path / "dropped", **options, dataloader_drop_last=True)
    losses = [[e["eval_loss"] for e in history(tmp_path / run) if "eval_loss" in e] for run in ("kept", "dropped")]
    assert losses[0] == losses[1] and len(losses[0]) == 1


@PHASES
def test_data_that_give_no_batch_are_refused(corpus, tmp_path, train: Train):
    with pytest.raises(ValueError, match="training data ended at step 0 of 2.*--dataloader_drop_last"):
        train(corpus, tmp_path, per_device_train_batch_size=64, dataloader_drop_last=True)
    assert not (tmp_path / block_shard(1)).exists()


@PHASES
def test_the_token_is_not_kept(corpus, tmp_path, train: Train):
    train(corpus, tmp_path, hub_token="hf_secret", push_to_hub=True, save_strategy="steps", save_steps=1)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in files)
    assert not any(b"hf_secret" in path.read_bytes() for path in files)


@pytest.mark.slow
@PHASES
def test_compiled_training(corpus, tmp_path, train: Train):
    compiled = train(corpus, tmp_path / "compiled", torch_compile=True, torch_compile_backend="eager")
    assert same_bits(compiled, train(corpus, tmp_path / "plain"))


# --- the best weights -------------------------------------------------------------------------------------------------


BEST = CHANGES["load_best_model_at_end"]


@pytest.mark.parametrize(
    "saving",
    [
        {"save_strategy": "best"},
        {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1},
        {"save_strategy": "steps", "save_steps": 6, "save_total_limit": 2},  # not at the best step
    ],
)
@PHASES
def test_the_best_weights_are_kept_whatever_interrupts(corpus, tmp_path, train: Train, saving, monkeypatch):
    every = BEST | {"load_best_model_at_end": False, "save_strategy": "steps", "save_steps": 1}
    train(corpus, tmp_path / "all", **every)
    losses = {entry["step"]: entry["eval_loss"] for entry in history(tmp_path / "all") if "eval_loss" in entry}
    best = min(losses, key=losses.__getitem__)
    assert len(losses) == 6 and best < 6
    expected = load_file(checkpoints(tmp_path / "all") / f"checkpoint-{best}" / "model.safetensors")

    def is_best(weights: Weights) -> bool:
        prefix = "model.blocks.1." if train is train_phase_2 else ""
        return same_bits({name.removeprefix(prefix): tensor for name, tensor in weights.items()}, expected)

    options = BEST | saving
    assert is_best(train(corpus, tmp_path / "best", **options))
    kept = checkpoints_of(checkpoints(tmp_path / "best"))
    assert len(kept) <= checkpoints_kept(arguments(tmp_path, **options), 6, None)
    (tmp_path / "best" / block_shard(1)).unlink(missing_ok=True)
    assert is_best(train(corpus, tmp_path / "best", **options))  # from the last checkpoint

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        init = DurableTrainer.__init__
        patch.setattr(
            DurableTrainer, "__init__", lambda self, *a, **k: (init(self, *a, **k), self.add_callback(Stop()))[0]
        )
        train(corpus, tmp_path / "stopped", **options)
    assert is_best(train(corpus, tmp_path / "stopped", **options))


def test_best_weights_that_are_damaged_are_not_replaced_by_others(corpus, tmp_path):
    options = BEST | {"save_strategy": "steps", "save_steps": 1}
    train_phase_2(corpus, tmp_path, **options)
    (tmp_path / block_shard(1)).unlink()
    best = json.loads((checkpoints(tmp_path) / "trainer_state.json").read_text())["best_global_step"]
    (checkpoints(tmp_path) / f"checkpoint-{best}" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"checkpoint-{best} with the best weights is missing or damaged"):
        train_phase_2(corpus, tmp_path, **options)


@PHASES
@pytest.mark.parametrize("step", [3, 6, 8])
def test_sigterm_changes_no_evaluation(corpus, tmp_path, train: Train, monkeypatch, step):
    """Epochs of six steps: a part of one is not evaluated; a whole one is, though SIGTERM arrives in its last step."""
    options = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True, "max_steps": 8}
    options |= {"per_device_train_batch_size": 8, "logging_strategy": "no"}
    expected = train(corpus, tmp_path / "undisturbed", **options)
    training_step, signals = DurableTrainer.training_step, []

    def signalled(self, *args, **kwargs):
        if self.state.global_step == step - 1 and not signals:
            signals.append(os.kill(os.getpid(), signal.SIGTERM))
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(DurableTrainer, "training_step", signalled)
    with pytest.raises(SystemExit):
        train(corpus, tmp_path / "stopped", **options)
    assert same_bits(train(corpus, tmp_path / "stopped", **options), expected)
    evaluations = [
        [(entry["step"], entry["eval_loss"]) for entry in history(tmp_path / run) if "eval_loss" in entry]
        for run in ("undisturbed", "stopped")
    ]
    assert evaluations[0] == evaluations[1] and len(evaluations[0]) == 2
