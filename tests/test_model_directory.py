import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from conftest import run_python
from noprop_hf import NoPropConfig, NoPropForCausalLM, NoPropForMaskedLM, NoPropModel
from noprop_hf.model_directory import (
    block_is_trained,
    create_model_directory,
    fingerprint,
    load_table,
    save_block,
    write_atomically,
)
from noprop_hf.shards_noprop import block_shard


@pytest.fixture
def directory(model, tokenizer, tmp_path) -> Path:
    """The directory of a whole model, written part by part as training does."""
    path = tmp_path / "model"
    create_model_directory(path, model.config, tokenizer, model.model.embed_tokens)
    for block in model.model.blocks:
        save_block(path, block, model.model.embed_tokens, {})
    return path


INPUT = torch.arange(12).view(2, 6)


def test_a_directory_loads_with_the_auto_classes(model, directory):
    assert isinstance(AutoConfig.from_pretrained(directory), NoPropConfig)
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    assert isinstance(loaded, NoPropForCausalLM)
    assert torch.equal(loaded(INPUT).logits, model(INPUT).logits)
    base = AutoModel.from_pretrained(directory)
    assert isinstance(base, NoPropModel)
    assert torch.equal(base(INPUT).last_hidden_state, model.model(INPUT).last_hidden_state)
    assert not loaded.model.embed_tokens.weight.requires_grad


@pytest.mark.parametrize("saved_by", ["training", "save_pretrained"])
def test_a_directory_loads_without_the_package(model, tokenizer, directory, tmp_path, saved_by):
    """With `trust_remote_code`, in a process that cannot import `noprop_hf`."""
    if saved_by == "save_pretrained":
        directory = tmp_path / "saved"
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    NoPropForMaskedLM(model.config).save_pretrained(directory / "masked_lm")
    code = f"""
import sys
sys.modules["noprop_hf"] = None  # importing it is an error
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, pipeline
directory, options = {str(directory)!r}, dict(trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(directory, **options)
names = [type(auto.from_pretrained(directory, **options)).__name__
         for auto in (AutoConfig, AutoModel, AutoModelForMaskedLM)]
torch.save(model(torch.arange(12).view(2, 6)).logits, {str(tmp_path / "logits.pt")!r})
names.append(str(tuple(model.generate(torch.tensor([[1, 2]]), max_new_tokens=3, do_sample=False).shape)))
AutoTokenizer.from_pretrained(directory, **options)
model.save_pretrained({str(tmp_path / "again")!r})
AutoModelForCausalLM.from_pretrained({str(tmp_path / "again")!r}, **options)
print(*names)
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    output = run_python("-c", code, cwd=tmp_path, env=environment)
    assert output.split()[-5:] == ["NoPropConfig", "NoPropModel", "NoPropForMaskedLM", "(1,", "5)"]
    assert torch.equal(torch.load(tmp_path / "logits.pt"), model(INPUT).logits)


def test_model_files_import_only_torch_and_transformers(directory):
    import ast

    files = sorted(path.name for path in directory.glob("*.py"))
    names = ("cache", "compatibility", "configuration", "generation", "modeling", "noise", "shards", "side_by_side")
    assert files == [f"{name}_noprop.py" for name in names]
    allowed = {"torch", "transformers", *sys.stdlib_module_names}
    for file in files:
        for node in ast.walk(ast.parse((directory / file).read_text())):
            if isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] in allowed for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] in allowed if node.level == 0 else node.level == 1
                assert node.level == 0 or f"{node.module}.py" in files


def test_shards_hold_what_their_names_say(directory):
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert shards == {"embeddings.safetensors", *(block_shard(block) for block in range(3))}
    total = 0
    for shard in shards:
        with safe_open(directory / shard, framework="pt") as file:
            assert {name for name, where in index["weight_map"].items() if where == shard} == set(file.keys())
            total += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert index["metadata"]["total_size"] == total


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModel])
def test_a_directory_with_missing_blocks_is_refused(directory, auto):
    (directory / block_shard(1)).unlink()
    with pytest.raises(OSError, match=r"not fully trained: block-01.safetensors missing.*--blocks"):
        auto.from_pretrained(directory)


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("base", [False, True])
def test_save_pretrained_round_trip(model, tmp_path, dtype, base):
    model = (model.model if base else model).to(dtype)
    model.save_pretrained(tmp_path)
    weights = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert weights == [*(block_shard(block) for block in range(3)), "embeddings.safetensors"]
    auto = AutoModel if base else AutoModelForCausalLM
    assert same(auto.from_pretrained(tmp_path), model)
    assert same(auto.from_pretrained(tmp_path, dtype=dtype, low_cpu_mem_usage=True, device_map="cpu"), model)
    assert same(auto.from_pretrained(tmp_path, device_map="auto"), model)
    assert auto.from_pretrained(tmp_path, dtype="float32").dtype == torch.float32
    for implementation in ("sdpa", "eager"):
        loaded = auto.from_pretrained(tmp_path, attn_implementation=implementation)
        assert loaded.config._attn_implementation == implementation


def test_a_base_model_loads_into_the_causal_one_and_back(model, tmp_path):
    model.model.save_pretrained(tmp_path / "base")
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), model)
    model.save_pretrained(tmp_path / "causal")
    assert same(AutoModel.from_pretrained(tmp_path / "causal"), model.model)


@pytest.mark.parametrize("model_class", [NoPropForCausalLM, NoPropForMaskedLM])
def test_weights_from_a_state_dict(config, model_class):
    torch.manual_seed(0)
    model = model_class(config)
    assert same(model_class.from_pretrained(None, config=config, state_dict=model.state_dict()), model)


def test_saving_over_the_directory_it_came_from(model, tmp_path):
    model.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True).save_pretrained(tmp_path)
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_saving_fewer_blocks_leaves_no_stale_ones(model, config, tmp_path):
    model.save_pretrained(tmp_path)
    small = NoPropForCausalLM(NoPropConfig(**config.to_dict() | {"num_blocks": 1, "noise_levels": [0.0]}))
    small.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("block-*")] == [block_shard(0)]
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path), small)


def test_masked_lm_round_trip(config, tmp_path):
    torch.manual_seed(0)
    model = NoPropForMaskedLM(config).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(INPUT).logits, model(INPUT).logits)


def test_masked_lm_of_a_causal_model(model, directory):
    """The model of phase 1 is found beside the model that its table was made for."""
    torch.manual_seed(0)
    masked = NoPropForMaskedLM(model.config).eval()
    masked.save_pretrained(directory / "masked_lm")
    assert same(AutoModelForMaskedLM.from_pretrained(directory), masked)


def test_table_round_trip(model, directory):
    table = load_table(directory, model.config)
    assert torch.equal(table.weight, model.model.embed_tokens.weight)
    assert fingerprint(model.config, table.weight) == fingerprint(model.config, model.model.embed_tokens.weight)


def test_blocks_of_another_table_are_told(model, directory):
    table = load_table(directory, model.config)
    assert block_is_trained(directory, model.config, table, 1)
    table.weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match="another table"):
        block_is_trained(directory, model.config, table, 1)


def test_shards_are_as_readable_as_any_file(directory):
    (directory / "other").touch()
    assert (directory / block_shard(0)).stat().st_mode == (directory / "other").stat().st_mode


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
