import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from conftest import programs
from noprop_hf import DenoisingBlock, NoPropConfig, NoPropForCausalLM, NoPropForPreTraining, NoPropModel
from noprop_hf.hub import files_to_push
from noprop_hf.model_directory import (
    block_is_trained,
    create_model_directory,
    load_table,
    read_config,
    save_block,
    save_shard,
    write_atomically,
)
from noprop_hf.shards_noprop import EMBEDDINGS_SHARD, block_shard, clusters_hash, fingerprint
from noprop_hf.status import local_status


@pytest.fixture
def directory(model, tokenizer, tmp_path) -> Path:
    """The directory of a whole model, written part by part as training does."""
    path = tmp_path / "model"
    data = {"data": "1" * 64}
    create_model_directory(path, model.config, tokenizer, model.model.embed_tokens, data)
    for block in model.model.blocks:
        save_block(path, block, model.model.embed_tokens, data)
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
    NoPropForPreTraining(model.config).save_pretrained(directory / "pretraining")
    code = f"""
import sys
sys.modules["noprop_hf"] = None  # importing it is an error
import torch
from transformers import (AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM,
    AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer)
directory, options = {str(directory)!r}, dict(trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(directory, **options)
names = [type(auto.from_pretrained(directory, **options)).__name__
         for auto in (AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification,
                      AutoModelForTokenClassification)]
torch.save(model(torch.arange(12).view(2, 6)).logits, {str(tmp_path / "logits.pt")!r})
names.append(str(tuple(model.generate(torch.tensor([[1, 2]]), max_new_tokens=3, do_sample=False).shape)))
AutoTokenizer.from_pretrained(directory, **options)
model.save_pretrained({str(tmp_path / "again")!r})
AutoModelForCausalLM.from_pretrained({str(tmp_path / "again")!r}, **options)
print(*names)
"""
    programs().forget()
    status, output = programs().stock.run("-c", code, cwd=tmp_path)
    assert status == 0, output
    heads = ["NoPropForPreTraining", "NoPropForSequenceClassification", "NoPropForTokenClassification"]
    assert output.split()[-7:] == ["NoPropConfig", "NoPropModel", *heads, "(1,", "5)"]
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


@pytest.mark.parametrize("model_class", [NoPropForCausalLM, NoPropForPreTraining])
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
    model = NoPropForPreTraining(config).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(INPUT).logits, model(INPUT).logits)


def test_masked_lm_of_a_causal_model(model, directory):
    """The model of phase 1 is found beside the model that its table was made for."""
    torch.manual_seed(0)
    masked = NoPropForPreTraining(model.config).eval()
    masked.save_pretrained(directory / "pretraining")
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


def reshard(path: Path, change) -> None:
    """Write a shard anew with what `change` makes of its tensors and metadata, and with a hash that is right."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors, metadata)
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + b"\0" + tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    save_file(tensors, path, metadata={**metadata, "content_sha256": digest.hexdigest()})


def rewrite(path: Path, change) -> None:
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


BIAS = "model.blocks.1.head.bias"
SHARD = "block-01.safetensors"
INDEX = "model.safetensors.index.json"


def rename_block(tensors: dict, metadata: dict) -> None:
    for name in list(tensors):
        tensors[name.replace("blocks.0.", "blocks.1.")] = tensors.pop(name)


def forget_block(fields: dict) -> None:
    fields["weight_map"] = {name: file for name, file in fields["weight_map"].items() if file != SHARD}


IN_SHARD = {  # of block 1
    "a tensor less": (lambda t, m: t.pop(BIAS), "lacks blocks.1.head.bias"),
    "a tensor of block 0": (lambda t, m: t.update({"model.blocks.0.head.bias": t[BIAS].clone()}), "not belong there"),
    "a tensor twice": (lambda t, m: t.update({"blocks.1.head.bias": t[BIAS].clone()}), "not belong there"),
    "shape": (lambda t, m: t.update({BIAS: torch.zeros(51)}), r"of size \(51,\), but the configuration asks for \(50,"),
    "integers": (lambda t, m: t.update({BIAS: t[BIAS].int()}), "type I32"),
    "one in half precision": (lambda t, m: t.update({BIAS: t[BIAS].half()}), "type F16"),
    "all in half precision": (lambda t, m: t.update({n: x.half() for n, x in t.items()}), "type F16"),
    "not a number": (lambda t, m: t[BIAS].fill_(float("nan")), "not finite"),
    "of another table": (lambda t, m: m.update(fingerprint="0" * 64), "another table, another configuration"),
    "of other data": (lambda t, m: m.update(data="0" * 64), "other data"),
    "no step": (lambda t, m: m.update(steps="0"), "0 steps"),
    "diverged": (lambda t, m: m.update(bound_nats="nan"), "diverged"),
    "no figure": (lambda t, m: m.update(bound_nats="evil"), "evil"),
}
IN_DIRECTORY = {
    "index without a block": (lambda d: rewrite(d / INDEX, forget_block), "lacks blocks.1"),
    "index without a tensor": (
        lambda d: rewrite(d / INDEX, lambda f: f["weight_map"].pop(BIAS)),
        "lacks blocks.1.head",
    ),
    "index of other files": (
        lambda d: rewrite(d / INDEX, lambda f: f["weight_map"].update({BIAS: block_shard(0)})),
        "names model.blocks.1.head.bias",
    ),
    "index that is none": (lambda d: (d / INDEX).write_text("[]"), f"holds no readable {INDEX}"),
    "one more block": (
        lambda d: rewrite(d / "config.json", lambda f: f.update(num_blocks=4, noise_levels=[*f["noise_levels"], 9.0])),
        "do not belong together",
    ),
    "levels": (lambda d: rewrite(d / "config.json", lambda f: f.update(noise_levels=[0, 1, 5])), "do not belong"),
    "depth": (lambda d: rewrite(d / "config.json", lambda f: f.update(num_hidden_layers=2)), "do not belong together"),
    "kind of positions": (
        lambda d: rewrite(d / "config.json", lambda f: f["rope_parameters"].update(rope_type="fancy")),
        "must be one of default",
    ),
    "epsilon": (lambda d: rewrite(d / "config.json", lambda f: f.update(rms_norm_eps=0.1)), "do not belong together"),
    "other table": (
        lambda d: reshard(d / "embeddings.safetensors", lambda t, m: t["model.embed_tokens.weight"].mul_(2)),
        "do not belong together",
    ),
    "a file that hides the shards": (
        lambda d: save_file(load_file(d / SHARD), d / "model.safetensors", metadata={"format": "pt"}),
        "hides",
    ),
}


@pytest.mark.parametrize("content", [None, "{}", "{", "[]"])
def test_a_directory_without_a_model_is_not_called_another_model(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="There is no model .* with a readable config.json"):
        read_config(tmp_path)


def uses(directory: Path) -> dict:
    """All that looks at the weights of a directory."""

    def train() -> None:
        config = read_config(directory)
        table = load_table(directory, config)
        for index in range(config.num_blocks):
            block_is_trained(directory, config, table, index)

    return {
        "load": lambda: AutoModelForCausalLM.from_pretrained(directory),
        "load base": lambda: AutoModel.from_pretrained(directory),
        "push": lambda: files_to_push(directory),
        "train": train,
    }


@pytest.mark.parametrize("fault", [*IN_SHARD, "another block", "another block under its names"])
def test_a_shard_that_does_not_belong_there_is_refused_everywhere(directory, fault):
    change, said = IN_SHARD.get(fault, (None, "lacks blocks.1" if fault == "another block" else "as block 0"))
    if change is None:
        shutil.copy(directory / block_shard(0), directory / SHARD)
        change = rename_block if fault != "another block" else None
    if change is not None:
        reshard(directory / SHARD, change)
    for use in uses(directory).values():
        with pytest.raises((OSError, ValueError), match=rf"{SHARD} .*{said}"):
            use()
    blocks = local_status(directory)
    assert [block.state for block in blocks] == ["done", "unusable", "done"]
    assert re.search(said, blocks[1].details)


@pytest.mark.parametrize("fault", list(IN_DIRECTORY))
def test_a_directory_that_is_no_whole_model_is_refused_everywhere(directory, fault):
    change, said = IN_DIRECTORY[fault]
    change(directory)
    for use in (*uses(directory).values(), lambda: local_status(directory)):
        with pytest.raises((OSError, ValueError), match=said):
            use()


def test_a_block_alone_is_no_model(model, tmp_path):
    """Such as a checkpoint of its training."""
    DenoisingBlock(model.config, 1).save_pretrained(tmp_path)
    for auto in (AutoModelForCausalLM, AutoModel, AutoModelForMaskedLM):
        with pytest.raises(OSError, match="not a whole model: model.safetensors lacks"):
            auto.from_pretrained(tmp_path)
    assert same(DenoisingBlock.from_pretrained(tmp_path), DenoisingBlock.from_pretrained(tmp_path))


def test_a_causal_model_is_no_model_of_phase_1(directory):
    with pytest.raises(OSError, match="not a whole model"):
        AutoModelForMaskedLM.from_pretrained(directory)


def test_weights_in_another_format_must_be_whole_as_well(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path), model)
    torch.save({n: w for n, w in model.state_dict().items() if n != BIAS}, tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="lacks model.blocks.1.head.bias"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_shards_of_other_savers_load(model, tmp_path):
    """Numbered shards, one file, and other weights beside those of the model; none of them notes where it is from."""
    PreTrainedModel.save_pretrained(model, tmp_path / "numbered", max_shard_size="20KB")
    assert len(list((tmp_path / "numbered").glob("model-*.safetensors"))) > 1
    PreTrainedModel.save_pretrained(model, tmp_path / "one")
    headed = load_file(tmp_path / "one" / "model.safetensors") | {"score.weight": torch.ones(2, 16)}
    save_file(headed, tmp_path / "one" / "model.safetensors", metadata={"format": "pt"})
    for folder in ("numbered", "one"):
        assert same(AutoModelForCausalLM.from_pretrained(tmp_path / folder), model)
    last = sorted((tmp_path / "numbered").glob("model-*.safetensors"))[-1]
    tensors = load_file(last)
    save_file({name: tensor[:1] for name, tensor in tensors.items()}, last, metadata={"format": "pt"})
    with pytest.raises(OSError, match=f"{last.name} holds"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "numbered")


def test_only_the_configuration_of_the_files_is_checked(model, directory):
    """What a caller changes while loading is the caller's own."""
    config = AutoConfig.from_pretrained(directory, rms_norm_eps=0.1, attn_implementation="eager")
    assert AutoModelForCausalLM.from_pretrained(directory, config=config).config.rms_norm_eps == 0.1
    early = AutoModelForCausalLM.from_pretrained(directory, num_hidden_layers=2, dtype=torch.bfloat16)
    assert early.dtype == torch.bfloat16 and early.config.num_hidden_layers == 2
    loaded, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert same(loaded, model) and not info["missing_keys"]


def test_a_model_with_a_router(model, tokenizer, tmp_path):
    config = NoPropConfig(**model.config.to_dict() | {"block_data": "clusters"})
    routed = NoPropForCausalLM(config)
    table, router = routed.model.embed_tokens, routed.model.router
    router.centroids.normal_()
    create_model_directory(tmp_path, config, tokenizer, table, {"clusters": clusters_hash(router.state_dict())}, router)
    for block in routed.model.blocks:
        save_block(tmp_path, block, table, {})
    assert [block.state for block in local_status(tmp_path)] == ["done"] * 3
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path), routed)
    reshard(tmp_path / EMBEDDINGS_SHARD, lambda t, m: m.pop("clusters"))  # as other savers do
    assert [block.state for block in local_status(tmp_path)] == ["done"] * 3
    reshard(tmp_path / EMBEDDINGS_SHARD, lambda t, m: t["model.router.prices"].add_(1))
    assert [block.state for block in local_status(tmp_path)] == ["unusable"] * 3
    for use in uses(tmp_path).values():
        with pytest.raises((OSError, ValueError), match="other clusters"):
            use()
    reshard(tmp_path / EMBEDDINGS_SHARD, lambda t, m: t["model.router.prices"].sub_(1))
    reshard(tmp_path / EMBEDDINGS_SHARD, lambda t, m: t.pop("model.router.readout.bias"))
    for use in uses(tmp_path).values():
        with pytest.raises((OSError, ValueError), match="router.readout.bias"):
            use()


def test_weights_of_another_model_in_other_formats(config, tmp_path):
    config.block_data = "clusters"
    torch.save(NoPropForCausalLM(config).state_dict(), tmp_path / "pytorch_model.bin")
    config.save_pretrained(tmp_path)
    NoPropForCausalLM.from_pretrained(tmp_path)
    config.block_data = "shared"
    config.save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"holds weights of another model: model\.router\."):
        NoPropForCausalLM.from_pretrained(tmp_path)


def test_weights_that_are_not_finite_are_not_written(directory, tmp_path):
    with pytest.raises(FloatingPointError, match="not finite"):
        save_shard(tmp_path / "shard", {"x": torch.tensor([1.0, float("inf")])}, {})
    assert not (tmp_path / "shard").exists()


def test_what_the_embedding_shard_stands_for_is_on_disk_first(model, tokenizer, tmp_path, monkeypatch):
    """Everything in the directory is flushed before the shard gets its name, and the name after that."""
    path, events = tmp_path / "new" / "model", []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (events.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append(("named", str(new))), replace(old, new)))
    NoPropForPreTraining(model.config).save_pretrained(path / "pretraining")
    create_model_directory(path, model.config, tokenizer, model.model.embed_tokens)
    named = events.index(("named", str(path / "embeddings.safetensors")))
    flushed = set(events[:named])
    files = {file for folder in (path, path / "pretraining") for file in folder.iterdir() if file.is_file()}
    assert {str(file) for file in files - {path / "embeddings.safetensors"}} <= flushed
    assert {str(folder) for folder in (path, path / "pretraining", path.parent, tmp_path)} <= flushed
    assert any("embeddings.safetensors" in str(event) for event in events[:named])
    assert str(path) in events[named:]


def test_what_killed_runs_left_is_removed(model, directory):
    left = directory / f".{block_shard(1)}.123.tmp"
    left.mkdir()
    (left / ".tmpabc").write_bytes(b"half")
    (directory / f".{block_shard(1)}.7.tmp").write_bytes(b"of an earlier version")
    save_block(directory, model.model.blocks[1], model.model.embed_tokens, {})
    assert not list(directory.glob(".*"))


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
