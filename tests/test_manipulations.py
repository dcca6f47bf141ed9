"""What people do to a model acts on it: adapters, hooks, pruning, quantization, savers, offloading.

Every change is compared with gradients on, where blocks run one by one through their own modules, and must show.
"""

import copy
import functools
import importlib.util
import itertools
import pickle
import random

import pytest
import torch
from accelerate import Accelerator, cpu_offload, disk_offload
from safetensors.torch import load_file, load_model, save_model
from torch import nn
from torch.nn.utils import parametrize, prune
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    DynamicCache,
    QuantoConfig,
    StaticCache,
    TorchAoConfig,
    pipeline,
)
from transformers.integrations.executorch import register_dynamic_cache_export_support
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from conftest import ROOT, tokens
from noprop_hf import NoPropConfig, NoPropForCausalLM, NoPropForMaskedLM, NoPropForPreTraining, modeling_noprop
from noprop_hf.compatibility_noprop import CACHE
from noprop_hf.training import new_block


INPUT = tokens(2, 7)
CONTAINERS = (
    "blocks.1",
    "blocks.1.encoder",
    "blocks.1.encoder.norm",
    "blocks.1.encoder.layers.1",
    "blocks.1.encoder.layers.1.self_attn",
    "blocks.1.encoder.layers.1.mlp",
    "blocks.1.encoder.layers.1.mlp.act_fn",
    "blocks.1.encoder.layers.0.input_layernorm",
    "blocks.1.encoder.layers.0.post_attention_layernorm",
    "blocks.1.head",
    "blocks.1.head.correction",
    "embed_tokens",
)
LINEARS = (
    "blocks.1.encoder.input_projection",
    *(f"blocks.1.encoder.layers.1.self_attn.{name}_proj" for name in "qkvo"),
    *(f"blocks.1.encoder.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")),
    "blocks.1.head.readout",
    "blocks.1.head.correction.0",
    "blocks.1.head.correction.2",
)
NORMS = tuple(name for name in CONTAINERS if name.endswith("norm"))


def off(model, **options) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=INPUT, **options).logits.log_softmax(-1)


def on(model, **options) -> torch.Tensor:
    with torch.enable_grad():
        return model(input_ids=INPUT, **options).logits.log_softmax(-1).detach()


def on_ids(model, input_ids: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        return model(input_ids=input_ids, use_cache=False).logits.detach()


def agree(model) -> torch.Tensor:
    """Check all ways of a forward pass against the one with gradients; returns its log-probabilities."""
    expected = on(model)
    torch.testing.assert_close(off(model), expected, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(off(model, logits_to_keep=1), expected[:, -1:], atol=1e-4, rtol=1e-3)
    with torch.inference_mode():
        cache = model(input_ids=INPUT[:, :4], use_cache=True)[CACHE]
        rest = model(input_ids=INPUT[:, 4:], cache=cache).logits.log_softmax(-1)
    torch.testing.assert_close(rest, expected[:, 4:], atol=1e-4, rtol=1e-3)
    return expected


def distorted(output):
    """An output of another direction, not only of another length, which a norm would take away."""
    if isinstance(output, tuple):
        return tuple(distorted(part) for part in output)
    return output + 0.5 * output.roll(1, dims=-1) if torch.is_tensor(output) else output


class Scaled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 1.7 * weight


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, output: distorted(output))


def input_hook(module: nn.Module) -> None:
    def distort(module, args, kwargs):
        kwargs = {k: distorted(v) if k in ("inputs_embeds", "hidden_states") else v for k, v in kwargs.items()}
        return tuple(distorted(a) if torch.is_tensor(a) and a.is_floating_point() else a for a in args), kwargs

    module.register_forward_pre_hook(distort, with_kwargs=True)


def in_place_input_hook(module: nn.Module) -> None:
    def double(module, args):
        args[0].mul_(-2)

    module.register_forward_pre_hook(double)


def replace_forward(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda *args, **kwargs: distorted(forward(*args, **kwargs))


def change_in_place(module: nn.Module) -> None:
    with torch.no_grad():
        module.weight.mul_(-2)


def change_data(module: nn.Module) -> None:
    module.weight.data *= -2  # without a trace in the version of the parameter


def new_parameter(module: nn.Module) -> None:
    module.weight = nn.Parameter(1.5 * module.weight.detach())


def pruned(module: nn.Module) -> None:
    prune.l1_unstructured(module, "weight", amount=0.6)


def pruned_for_good(module: nn.Module) -> None:
    pruned(module)
    prune.remove(module, "weight")


def parametrized(module: nn.Module) -> None:
    parametrize.register_parametrization(module, "weight", Scaled())


def by_name(model: NoPropForCausalLM, name: str) -> nn.Module:
    return model.model.get_submodule(name)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        *itertools.product([hook, input_hook, replace_forward], CONTAINERS + LINEARS),
        *itertools.product([in_place_input_hook], LINEARS),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_hooks_and_patches_act_on_every_module(model, name, change):
    before = agree(model)
    if change is input_hook and name == "embed_tokens":
        pytest.skip("its input are token ids")
    change(by_name(model, name))
    assert not torch.allclose(agree(model), before, atol=1e-3)


def test_hooks_record_the_same_in_the_same_order(model):
    """As one list of outputs shows it; and what a hook has kept stays as it was."""
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(module, args, output):
        kept.append((output, output.detach().clone()))

    parts = {name.split(".")[-1] for name in (*LINEARS, *NORMS)} - {"0", "2"}
    for part in sorted(parts | {"correction", "mlp", "output_embeddings"}):
        modules = [module for name, module in model.named_modules() if name.split(".")[-1] == part]
        handles = [module.register_forward_hook(keep) for module in modules]
        records = []
        for grads in (True, False):
            kept.clear()
            with torch.set_grad_enabled(grads):
                model(INPUT)
            records.append([*kept])
        for handle in handles:
            handle.remove()
        assert len(modules) == len(records[0]) == len(records[1]) > 0
        for (_, expected), (output, as_given) in zip(*records, strict=True):
            torch.testing.assert_close(as_given, expected, atol=1e-4, rtol=1e-3)
            assert torch.equal(output, as_given)


@pytest.mark.parametrize(
    "change",
    [change_in_place, change_data, new_parameter, pruned, pruned_for_good, parametrized],
    ids=lambda change: change.__name__,
)
@pytest.mark.parametrize("name", LINEARS + NORMS)
def test_changed_weights_act(model, name, change):
    before = agree(model)
    change(by_name(model, name))
    assert not torch.allclose(agree(model), before, atol=1e-4)


def test_patched_classes_act(model, monkeypatch):
    before = agree(model)
    for name in CONTAINERS[:-1]:
        kind = type(by_name(model, name))
        if kind is nn.Sequential:
            continue
        with monkeypatch.context() as patch:
            forward = kind.forward
            patch.setattr(kind, "forward", lambda *args, forward=forward, **kwargs: distorted(forward(*args, **kwargs)))
            assert not torch.allclose(agree(model), before, atol=1e-3), name


@pytest.mark.parametrize("name", [*CONTAINERS[:-1], None])
def test_patched_calls_act(model, monkeypatch, name):
    before = agree(model)
    kind, classes = (nn.Module, ("LlamaMLP", "Linear")) if name is None else (type(by_name(model, name)), None)
    call = kind.__call__

    def patched(self, *args, **kwargs):
        output = call(self, *args, **kwargs)
        return distorted(output) if classes is None or type(self).__name__ in classes else output

    monkeypatch.setattr(kind, "__call__", patched)
    assert not torch.allclose(agree(model), before, atol=1e-3)


@pytest.mark.parametrize("name", ["forward", "class"])
def test_what_was_patched_before_the_import_is_not_bypassed(model, monkeypatch, name):
    """As kernels do when the model's own code is loaded later."""
    forward = modeling_llama.LlamaMLP.forward
    if name == "forward":
        patched = functools.wraps(forward)(lambda self, states: distorted(forward(self, states)))
        monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", patched)
    else:
        Own = type("Own", (nn.Module,), {"forward": lambda self, states: distorted(forward(self, states))})
        monkeypatch.setattr(modeling_llama, "LlamaMLP", Own)
        for module in model.modules():
            module.__class__ = Own if type(module).__name__ == "LlamaMLP" else type(module)
    spec = importlib.util.find_spec("noprop_hf.side_by_side_noprop")
    late = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(late)
    own = (modeling_noprop.DenoisingBlock, modeling_noprop.ContextEncoder)
    forwards = {**late.LLAMA_FORWARDS, **{kind: kind.forward for kind in own}}
    monkeypatch.setattr(type(model.model), "_forwards", forwards)
    monkeypatch.setattr(modeling_noprop, "find_layers", late.find_layers)
    agree(model)


def test_global_hooks_act(model):
    before = agree(model)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: (
            2 * output if isinstance(module, nn.SiLU | type(by_name(model, CONTAINERS[6]))) else None
        )
    )
    try:
        assert not torch.allclose(agree(model), before, atol=1e-3)
    finally:
        handle.remove()


def test_attributes_act(model):
    for name, attribute, value in (
        ("blocks.1.encoder.layers.1.self_attn", "scaling", 2.0),
        ("blocks.1.encoder.layers.1.self_attn", "is_causal", False),
        ("blocks.1.encoder.layers.0.input_layernorm", "variance_epsilon", 0.5),
        ("blocks.1.encoder.norm", "variance_epsilon", 0.5),
    ):
        changed = copy.deepcopy(model)
        setattr(by_name(changed, name), attribute, value)
        torch.testing.assert_close(off(changed), on(changed), atol=1e-4, rtol=1e-3)
    mlp = by_name(model, "blocks.0.encoder.layers.0.mlp")
    before = agree(model)
    mlp.act_fn = nn.GELU()
    assert not torch.allclose(agree(model), before, atol=1e-4)


def test_a_configuration_of_the_attention_alone_acts(model, monkeypatch):
    def doubled(*args, **kwargs):
        mixed, weights = sdpa_attention_forward(*args, **kwargs)
        return 2 * mixed, weights

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "doubled", doubled)
    before = agree(model)
    config = copy.deepcopy(model.config)
    config._attn_implementation = "doubled"
    for block in model.model.blocks:
        block.encoder.layers[1].self_attn.config = config
    assert not torch.allclose(agree(model), before, atol=1e-3)


def test_modules_of_another_kind_act(model):
    before = agree(model)
    layers = by_name(model, "blocks.2.encoder").layers
    layers[0].mlp.down_proj = nn.Sequential(layers[0].mlp.down_proj, nn.Tanh())
    first = agree(model)
    layers[1].mlp = nn.Identity()
    second = agree(model)
    narrow = nn.Linear(16, 8, bias=True), nn.Linear(8, 16, bias=True)
    layers[0].mlp.gate_proj, layers[0].mlp.up_proj = copy.deepcopy(narrow[0]), narrow[0]
    layers[0].mlp.down_proj = narrow[1]
    third = agree(model)
    outputs = [before, first, second, third]
    assert all(not torch.allclose(a, b, atol=1e-4) for a, b in zip(outputs, outputs[1:], strict=False))


def test_a_layer_less(model):
    """Fewer layers in a block, or none in any, as layer dropping leaves them."""
    encoder = by_name(model, "blocks.1.encoder")
    encoder.layers = encoder.layers[:1]
    torch.testing.assert_close(off(model), on(model), atol=1e-4, rtol=1e-3)
    for block in model.model.blocks:
        block.encoder.layers = nn.ModuleList()
    torch.testing.assert_close(off(model, logits_to_keep=1), on(model)[:, -1:], atol=1e-4, rtol=1e-3)


def narrow(model, layer: str, heads: int | None = None, features: int | None = None) -> None:
    """Prune a layer to its first heads or features, with smaller weights."""
    attention, mlp = by_name(model, f"{layer}.self_attn"), by_name(model, f"{layer}.mlp")
    size = None if heads is None else heads * attention.head_dim
    into = {attention.q_proj: size, attention.k_proj: size, attention.v_proj: size}
    into |= {mlp.gate_proj: features, mlp.up_proj: features}
    for linear, rows in into.items():
        linear.weight = nn.Parameter(linear.weight[:rows].detach().clone())
    for linear, columns in ((attention.o_proj, size), (mlp.down_proj, features)):
        linear.weight = nn.Parameter(linear.weight[:, :columns].detach().clone())


def test_narrower_layers_act(model):
    outputs = [agree(model)]
    for layer, sizes in (("blocks.1.encoder.layers.0", {"features": 16}), ("blocks.2.encoder.layers.1", {"heads": 1})):
        narrow(model, layer, **sizes)
        outputs.append(agree(model))
    assert all(not torch.allclose(a, b, atol=1e-4) for a, b in zip(outputs, outputs[1:], strict=False))


def test_heads_of_uneven_number_act(config):
    """One, two and three heads: as many as three blocks of two have."""
    config.num_attention_heads = config.num_key_value_heads = 4
    config.head_dim = 4
    model = NoPropForCausalLM(config).eval()
    for block, heads in enumerate((1, 2, 3)):
        narrow(model, f"blocks.{block}.encoder.layers.0", heads=heads)
    agree(model)


def test_a_block_less(model):
    before = agree(model)
    model.model.blocks = nn.ModuleList([model.model.blocks[0], model.model.blocks[2]])
    assert not torch.allclose(agree(model), before, atol=1e-3)
    written = model.generate(INPUT, max_new_tokens=3, do_sample=False)
    assert torch.equal(written[:, 7:], on_ids(model, written)[:, 6:-1].argmax(-1))


@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantization_acts(model):
    before = agree(model)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    torch.testing.assert_close(off(quantized), on(quantized), atol=1e-3, rtol=1e-3)
    assert 0 < (off(quantized) - before).abs().max() < 0.6


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tool", ["quanto", "torchao", "bitsandbytes"])
def test_quantization_to_8_bits_acts(config, tmp_path, tool):
    """By its configuration, from a directory. Where a tool is not installed, its test is skipped."""
    pytest.importorskip({"quanto": "optimum.quanto"}.get(tool, tool))
    config = NoPropConfig(**config.to_dict() | {"hidden_size": 64, "head_dim": 32, "correction_size": 64})
    model = NoPropForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.model.blocks.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    if tool == "torchao":
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig

        quantization = TorchAoConfig(Int8DynamicActivationInt8WeightConfig())
    else:
        quantization = QuantoConfig("int8") if tool == "quanto" else BitsAndBytesConfig(load_in_8bit=True)
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization, device_map="cpu")
    assert type(by_name(quantized, LINEARS[1]).weight) is not nn.Parameter or tool == "bitsandbytes"
    torch.testing.assert_close(off(quantized), on(quantized), atol=1e-3, rtol=1e-3)
    assert 0 < (off(quantized) - off(model)).abs().max() < 0.6
    assert quantized.generate(INPUT, max_new_tokens=2, do_sample=False).shape == (2, 9)


# --- adapters ---------------------------------------------------------------------------------------------------------

TARGETS = ["v_proj", "down_proj", "input_projection", "readout", "correction.0"]


@pytest.mark.parametrize("kind", ["LoraConfig", "IA3Config", "LoHaConfig", "OFTConfig", "VeraConfig", "dora"])
def test_adapters_act_and_merge(model, kind):
    peft = pytest.importorskip("peft")
    options = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}
    if kind == "IA3Config":
        options |= {"target_modules": TARGETS, "feedforward_modules": ["down_proj"]}
    elif kind == "VeraConfig":
        options["target_modules"] = ["q_proj", "o_proj"]
    elif kind == "OFTConfig":
        options |= {"target_modules": TARGETS, "oft_block_size": 4}
    elif kind == "LoHaConfig":
        options["target_modules"] = TARGETS
    config = peft.LoraConfig(use_dora=True, **options) if kind == "dora" else getattr(peft, kind)(**options)
    before = agree(model)
    adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    after = agree(adapted)
    assert not torch.allclose(after, before, atol=1e-2)
    with adapted.disable_adapter():
        torch.testing.assert_close(agree(adapted), before, atol=1e-4, rtol=1e-3)
    greedy = adapted.generate(input_ids=INPUT, max_new_tokens=1, do_sample=False)
    assert torch.equal(greedy[:, -1], after[:, -1].argmax(-1))
    torch.testing.assert_close(agree(adapted.merge_and_unload()), after, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["prompt", "text", "prefix", "encoder"])
def test_prompt_learning(model, kind):
    peft = pytest.importorskip("peft")
    config = {
        "prompt": lambda **o: peft.PromptTuningConfig(**o),
        "text": lambda **o: peft.PromptTuningConfig(prompt_tuning_init="SAMPLE_VOCAB", **o),
        "prefix": lambda **o: peft.PrefixTuningConfig(**o),
        "encoder": lambda **o: peft.PromptEncoderConfig(encoder_hidden_size=8, **o),
    }[kind](task_type="CAUSAL_LM", num_virtual_tokens=3)
    before = agree(model)
    adapted = peft.get_peft_model(model, config).eval()
    assert adapted.word_embeddings is adapted.base_model.get_input_embeddings()
    with torch.no_grad():
        for parameter in adapted.prompt_encoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    torch.testing.assert_close(off(adapted), on(adapted), atol=1e-4, rtol=1e-3)
    assert not torch.allclose(off(adapted)[:, -7:], before, atol=1e-2)
    adapted(input_ids=INPUT, labels=INPUT).loss.backward()
    trained = [parameter.grad for parameter in adapted.parameters() if parameter.requires_grad]
    assert trained and all(grad is not None and grad.abs().sum() > 0 for grad in trained)


# --- anything after anything ------------------------------------------------------------------------------------------


def manipulations(model: NoPropForCausalLM, generator: random.Random) -> NoPropForCausalLM:
    """Apply one manipulation, drawn at random, to modules drawn at random."""
    modules = dict(model.named_modules())
    linears = [m for m in modules.values() if type(m) is nn.Linear]
    norms = [m for m in modules.values() if type(m).__name__ == "LlamaRMSNorm"]
    weighted, anything = generator.choice(linears + norms), generator.choice(list(modules.values())[1:])
    if type(anything) in (nn.ModuleList, type(model.model)):
        anything = weighted
    name = generator.choice("hook prune parametrize replace cast move copy load in_place data train save".split())
    if name == "hook":
        anything.register_forward_hook(lambda module, args, output: output)
        weighted.register_forward_hook(lambda module, args, output: 1.2 * output)
    elif name == "prune":
        pruned(weighted)
    elif name == "parametrize" and not parametrize.is_parametrized(weighted):
        parametrized(weighted)
    elif name == "replace":
        new_parameter(weighted) if "weight" in weighted._parameters else None
    elif name == "cast":
        model = model.double() if generator.random() < 0.5 else model.float()
    elif name == "move":
        model = model.to("cpu", copy=True) if generator.random() < 0 else model.to("cpu")
    elif name == "copy":
        model = copy.deepcopy(model)
    elif name == "load":
        model.load_state_dict({name: 0.9 * tensor for name, tensor in model.state_dict().items()}, assign=True)
    elif name == "in_place":
        change_in_place(weighted) if "weight" in weighted._parameters else None
    elif name == "data":
        for tensor in model.state_dict().values():  # aliases that somebody holds
            tensor.mul_(1.05)
    elif name == "train":
        model.train()
        model(INPUT, labels=INPUT).loss.backward()
        model.eval()
    return model


@pytest.mark.parametrize("seed", range(12))
def test_any_manipulations_in_any_order(model, seed):
    generator = random.Random(seed)
    for _ in range(8):
        model = manipulations(model, generator)
        agree(model)


# --- parameters stay as they are --------------------------------------------------------------------------------------


def test_a_forward_pass_leaves_parameters_as_they_are(model, tmp_path):
    size = len(pickle.dumps(model))
    state = {name: (p, p.data_ptr(), p._version, p.untyped_storage().nbytes()) for name, p in model.named_parameters()}
    agree(model)
    model.generate(INPUT, max_new_tokens=2)
    for name, p in model.named_parameters():
        assert state[name][0] is p and state[name][1:] == (p.data_ptr(), p._version, p.untyped_storage().nbytes())
        assert not p.is_inference()
    assert len(pickle.dumps(model)) == size
    expected = on(model)
    save_model(model, str(tmp_path / "model.safetensors"))
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    other = NoPropForCausalLM(model.config).eval()
    load_model(other, str(tmp_path / "model.safetensors"))
    assert torch.equal(on(other), expected)
    Accelerator(cpu=True).save_model(model, str(tmp_path / "accelerate"))
    assert load_file(tmp_path / "accelerate" / "model.safetensors").keys() == model.state_dict().keys()
    model.train()
    model(INPUT, labels=INPUT).loss.backward()


def test_shared_memory_stays_shared(model):
    model.share_memory()
    agree(model)
    assert all(parameter.is_shared() for parameter in model.parameters())


def test_export_and_compile_after_a_forward_pass(model):
    expected = agree(model)
    register_dynamic_cache_export_support()
    with torch.no_grad():
        exported = torch.export.export(model, (INPUT,), strict=False).module()
        assert type(exported(INPUT).cache) is DynamicCache
        assert torch.allclose(exported(INPUT).logits, expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_onnx(config):
    """For any batch and any length, run by the reference implementation of ONNX."""
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    small = {"num_blocks": 2, "num_layers_per_block": 1, "noise_levels": None}
    model = NoPropForCausalLM(NoPropConfig(**config.to_dict() | small)).eval()
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=32)}
    shapes, options = {"input_ids": sizes, "use_cache": None}, {"use_cache": False}
    program = torch.onnx.export(model, (INPUT,), kwargs=options, dynamic_shapes=shapes, dynamo=True, verbose=False)
    evaluator = ReferenceEvaluator(program.model_proto)
    for input_ids in (INPUT, tokens(3, 5)):
        (logits,) = evaluator.run(None, {"input_ids": input_ids.numpy()})
        expected = on_ids(model, input_ids)
        torch.testing.assert_close(torch.from_numpy(logits), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_compiled(config):
    torch.manual_seed(0)
    small = {"num_blocks": 2, "num_layers_per_block": 1, "noise_levels": None}
    model = NoPropForCausalLM(NoPropConfig(**config.to_dict() | small)).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    expected = agree(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    cache = StaticCache(config=model.config, max_cache_len=12)
    with torch.no_grad():
        model(INPUT[:, :4], cache=cache)
        rest = compiled(INPUT[:, 4:], cache=cache).logits
    assert torch.allclose(rest, expected[:, 4:], atol=1e-4)
    assert torch.allclose(off(compiled), expected, atol=1e-4) and torch.allclose(on(compiled), expected, atol=1e-4)


# --- weights that are elsewhere ---------------------------------------------------------------------------------------


def use(model: NoPropForCausalLM) -> list[torch.Tensor]:
    """Everything a model is used for."""
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        return [
            off(model),
            model.generate(INPUT, max_new_tokens=4, do_sample=False),
            model.generate(INPUT, max_new_tokens=4, decoding_mode="denoising", num_trajectories=2, seed=1),
            model.variational_bound(INPUT, generator=generator).token_nats,
        ]


@pytest.mark.parametrize("way", ["cpu", "cpu with buffers", "disk"])
def test_offloading_with_accelerate(model, tmp_path, way):
    expected = use(model)
    if way == "disk":
        offloaded = disk_offload(model, str(tmp_path), torch.device("cpu"))
    else:
        offloaded = cpu_offload(model, torch.device("cpu"), offload_buffers=way == "cpu with buffers")
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    torch.testing.assert_close(use(offloaded), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "device_map",
    [
        {"": "disk"},
        {"model.embed_tokens": "disk", "model.blocks": "cpu"},
        {"model.embed_tokens": "cpu", "model.blocks.0": "cpu", "model.blocks.1": "disk", "model.blocks.2": "disk"},
        "auto",
    ],
    ids=str,
)
def test_device_maps(model, tmp_path, device_map):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "offload")
    torch.testing.assert_close(use(loaded), use(model), atol=1e-5, rtol=1e-4)


def test_the_output_embeddings_are_the_table_and_the_mean_bias(model):
    """What tools compute with the weight and the bias of an output layer is what the model answers."""
    table, output = model.get_input_embeddings(), model.get_output_embeddings()
    assert table.num_embeddings == model.config.vocab_size and output.weight is table.weight
    assert dict(model.named_modules())["output_embeddings"] is output and not output.state_dict()
    for layers in (6, 2):  # all blocks, and the first alone
        model.config.num_hidden_layers = layers
        states = model.model(INPUT).last_hidden_state
        logits = torch.nn.functional.linear(states, output.weight, output.bias)
        torch.testing.assert_close(logits.log_softmax(-1), on(model), atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(output(states), logits, atol=1e-4, rtol=1e-3)
    model.config.num_hidden_layers = 6
    output.weight = table.weight
    with pytest.raises(ValueError, match="takes no parameters"):
        output.weight = nn.Parameter(table.weight.clone())
    weights = torch.randn(50)
    (output.bias @ weights).backward()
    for block in model.model.blocks:
        torch.testing.assert_close(block.head.bias.grad, weights / 3)
    for replace, same, other in (
        (model.set_output_embeddings, output, nn.Linear(16, 50)),
        (model.set_input_embeddings, table, nn.Embedding(50, 16)),
    ):
        replace(same)
        with pytest.raises(ValueError, match="frozen table"):
            replace(other)
    assert model.resize_token_embeddings(50) is model.resize_token_embeddings(pad_to_multiple_of=10) is table
    with pytest.raises(ValueError, match="resized to 56"):
        model.resize_token_embeddings(pad_to_multiple_of=8)


@pytest.mark.parametrize("change", [hook, replace_forward], ids=lambda change: change.__name__)
def test_the_output_embeddings_act(model, change):
    before = agree(model)
    change(model.get_output_embeddings())
    assert not torch.allclose(agree(model), before, atol=1e-3)


def test_the_output_embeddings_follow_the_model(model):
    """Into copies, and to a base model that is put in the place of the first."""
    other = copy.deepcopy(model)
    assert other.output_embeddings.weight is other.get_input_embeddings().weight is not model.output_embeddings.weight
    other.model = NoPropForCausalLM(model.config).eval().model
    output = other.get_output_embeddings()
    assert output.weight is other.model.embed_tokens.weight
    logits = output(other.model(INPUT).last_hidden_state)
    torch.testing.assert_close(logits.log_softmax(-1), on(other), atol=1e-4, rtol=1e-3)


def test_early_exit_drafts_for_the_whole_model(model):
    expected = model.generate(INPUT[:1], max_new_tokens=8, do_sample=False)
    for layers in (2, 4):  # one block, two blocks
        output = model.generate(INPUT[:1], max_new_tokens=8, do_sample=False, assistant_early_exit=layers)
        assert torch.equal(output, expected)
    shortened = {"max_new_tokens": 4, "do_sample": False, "num_inference_blocks": 2}
    drafted = model.generate(INPUT[:1], assistant_early_exit=2, **shortened)
    assert torch.equal(drafted, model.generate(INPUT[:1], **shortened))
    model.config.num_hidden_layers = 2
    assert torch.equal(model(INPUT).logits, model(INPUT, num_inference_blocks=1).logits)
    model.config.num_hidden_layers = 6
    assert "_num_hidden_layers" not in model.config.to_dict()
    with pytest.raises(ValueError, match="multiple of 2"):
        model.config.num_hidden_layers = 3


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_masks_are_filled_by_a_model_that_learnt_to(config, tokenizer, tmp_path, objective):
    fields = {
        "vocab_size": len(tokenizer),
        "pretraining_objective": objective,
        "mask_token_id": tokenizer.mask_token_id,
    }
    NoPropForPreTraining(NoPropConfig(**config.to_dict() | fields)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    fill = pipeline("fill-mask", model=str(tmp_path), tokenizer=str(tmp_path))
    text = f"the cat {tokenizer.mask_token} on a mat"
    if objective == "mlm":
        assert len(fill(text)) == 5
    else:
        with pytest.raises(ValueError, match="pretraining_objective='mlm'"):
            fill(text)


# --- weights from before ----------------------------------------------------------------------------------------------


def test_a_directory_of_an_earlier_version_is_the_same_model():
    """Written at commit b720796, where linear layers scaled their input themselves and the table was a buffer."""
    directory = ROOT / "tests" / "model_b720796"
    expected = load_file(directory / "expected.safetensors")
    model, input_ids = AutoModelForCausalLM.from_pretrained(directory), expected["input_ids"]
    torch.testing.assert_close(model(input_ids).logits, expected["logits"], atol=1e-5, rtol=1e-4)
    generator = torch.Generator().manual_seed(3)
    torch.testing.assert_close(model.variational_bound(input_ids, generator=generator).bound, expected["bound"])
    generator = torch.Generator().manual_seed(3)
    denoised = model(input_ids, decoding_mode="denoising", generator=generator).logits
    torch.testing.assert_close(denoised, expected["denoised"], atol=1e-4, rtol=1e-4)
    assert NoPropForMaskedLM is NoPropForPreTraining  # its name then
    phase_1 = AutoModelForMaskedLM.from_pretrained(directory)
    torch.testing.assert_close(phase_1(input_ids).logits, expected["phase1_logits"], atol=1e-5, rtol=1e-4)
    config = NoPropConfig.from_pretrained(directory, block_initialization="pretraining")
    start = new_block(directory, config, model.model.embed_tokens, 1)  # from the folder `masked_lm`
    torch.testing.assert_close(start.head.readout.weight, phase_1.readout.weight)
    classifier, info = AutoModelForSequenceClassification.from_pretrained(directory, output_loading_info=True)
    assert info["missing_keys"] == {"score.weight"} and not info["unexpected_keys"]
    states = classifier.model(input_ids).last_hidden_state
    logits = model.get_output_embeddings()(states).log_softmax(-1)
    torch.testing.assert_close(logits, expected["logits"], atol=1e-5, rtol=1e-4)
