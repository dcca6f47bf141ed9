"""What transformers checks of its own models (`ModelTesterMixin`, `GenerationTesterMixin`), as far as it is not told
elsewhere: these mixins are not part of the installed package."""

import copy
import json
import pickle

import pytest
import torch
from transformers import AutoConfig
from transformers.utils import ModelOutput

from noprop_hf import (
    DenoisingBlock,
    NoPropConfig,
    NoPropForCausalLM,
    NoPropForPreTraining,
    NoPropForTokenClassification,
    NoPropModel,
)


INPUT = torch.tensor([[3, 7, 11, 4, 30, 2], [9, 2, 5, 8, 1, 49]])
CLASSES = [NoPropModel, NoPropForCausalLM, NoPropForPreTraining, NoPropForTokenClassification]


@pytest.fixture(params=CLASSES, ids=lambda cls: cls.__name__)
def any_model(request, config):
    torch.manual_seed(0)
    model = request.param(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def first(model, *args, **kwargs) -> torch.Tensor:
    output = model(*args, **kwargs)
    return output.last_hidden_state if isinstance(model, NoPropModel) else output.logits


def test_initialization(config):
    torch.manual_seed(0)
    model = NoPropForCausalLM(config)
    table = model.model.embed_tokens.weight
    assert torch.allclose(table.pow(2).mean(-1), torch.ones(len(table)))
    for name, parameter in model.named_parameters():
        if "layers" in name and "proj" in name:
            assert abs(parameter.mean().item()) < 0.01 and parameter.std().item() == pytest.approx(0.02, rel=0.2), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        elif "input_projection" in name:
            assert torch.equal(parameter, torch.eye(config.hidden_size))
        elif "readout" in name:
            assert torch.allclose(parameter @ parameter.T, torch.eye(config.hidden_size), atol=1e-5), name
        elif "correction.2" in name or name.endswith("bias"):
            assert (parameter == 0).all(), name


def test_every_output_is_a_model_output_and_a_tuple_on_request(any_model):
    output = any_model(INPUT)
    assert isinstance(output, ModelOutput)
    as_tuple = any_model(INPUT, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], output[0])


def test_hidden_states_and_attentions(any_model, config):
    any_model.set_attn_implementation("eager")
    output = any_model(INPUT, output_hidden_states=True, output_attentions=True)
    layers = config.num_pretraining_layers if isinstance(any_model, NoPropForPreTraining) else config.num_hidden_layers
    assert len(output.attentions) == layers
    assert len(output.hidden_states) == layers + 1
    for attention in output.attentions:
        assert attention.shape == (2, 2, 6, 6)
        assert torch.allclose(attention.sum(-1), torch.ones(2, 2, 6), atol=1e-5)
        if not isinstance(any_model, NoPropForPreTraining):
            assert (attention.triu(1) == 0).all()
    assert all(states.shape == (2, 6, 16) for states in output.hidden_states)
    assert any_model(INPUT).hidden_states is None


def test_eager_and_sdpa_agree(any_model):
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    outputs = []
    for implementation in ("eager", "sdpa"):
        any_model.set_attn_implementation(implementation)
        outputs.append(first(any_model, INPUT, attention_mask=mask)[mask.bool()])
    assert torch.allclose(*outputs, atol=1e-5)


def test_right_padding_changes_nothing(any_model):
    padded = torch.cat([INPUT, torch.zeros(2, 3, dtype=torch.long)], dim=1)
    mask = torch.cat([torch.ones_like(INPUT), torch.zeros(2, 3, dtype=torch.long)], dim=1)
    assert torch.allclose(first(any_model, padded, attention_mask=mask)[:, :6], first(any_model, INPUT), atol=1e-5)


def test_a_batch_gives_what_its_rows_give(any_model):
    rows = torch.cat([first(any_model, row[None]) for row in INPUT])
    assert torch.allclose(first(any_model, INPUT), rows, atol=1e-5)


def test_determinism_in_evaluation_and_dropout_in_training(any_model):
    any_model.config.attention_dropout = 0.5
    for module in any_model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    assert torch.equal(first(any_model, INPUT), first(any_model, INPUT))
    any_model.train()
    torch.manual_seed(0)
    assert not torch.equal(first(any_model, INPUT), first(any_model, INPUT))


def test_embeddings_as_input(model):
    embeds = model.get_input_embeddings()(INPUT)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(INPUT).logits)
    with pytest.raises(ValueError, match="exactly one"):
        model(INPUT, inputs_embeds=embeds)


def test_logits_to_keep(model):
    whole = model(INPUT).logits
    assert torch.allclose(model(INPUT, logits_to_keep=2).logits, whole[:, -2:], atol=1e-6)
    positions = torch.tensor([0, 3])
    assert torch.allclose(model(INPUT, logits_to_keep=positions).logits, whole[:, positions], atol=1e-6)


def test_resizing_is_refused(model):
    assert model.resize_token_embeddings(50) is model.get_input_embeddings()
    with pytest.raises(ValueError, match="frozen at 50 tokens.*cannot be resized to 60"):
        model.resize_token_embeddings(60)


def test_copies(any_model):
    for twin in (copy.deepcopy(any_model), pickle.loads(pickle.dumps(any_model))):
        assert torch.equal(first(twin, INPUT), first(any_model, INPUT))
        with torch.no_grad():
            next(twin.parameters()).add_(1)
        assert not torch.equal(next(twin.parameters()), next(any_model.parameters()))


def test_the_config_as_json(config, tmp_path):
    config.save_pretrained(tmp_path)
    read = AutoConfig.from_pretrained(tmp_path)
    ignored = {"transformers_version", "_name_or_path", "auto_map"}
    assert {k: v for k, v in read.to_dict().items() if k not in ignored} == {
        k: v for k, v in config.to_dict().items() if k not in ignored
    }
    assert NoPropConfig.from_dict(json.loads(config.to_json_string())).to_dict() == config.to_dict()
    assert copy.deepcopy(config).to_dict() == config.to_dict()
    assert config.num_hidden_layers == 6 and NoPropConfig().num_hidden_layers == 30


def test_dtypes(any_model):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        any_model.to(dtype)
        assert any_model.dtype == dtype
        assert first(any_model, INPUT).isfinite().all()


def test_gradients_reach_every_parameter(any_model):
    any_model.train()
    first(any_model, INPUT).pow(2).sum().backward()
    missing = [name for name, parameter in any_model.named_parameters() if parameter.grad is None]
    missing = [name for name in missing if "embed_tokens" not in name]  # frozen
    # without the vocabulary, there is no token bias
    without = isinstance(any_model, NoPropModel | NoPropForTokenClassification)
    assert all(name.endswith("head.bias") for name in missing) if without else not missing


@pytest.mark.slow
def test_compiled_forward(config):
    """To code of the machine; two blocks of a layer each, since every kernel takes a second to compile."""
    sizes = {"num_blocks": 2, "num_layers_per_block": 1, "noise_levels": None}
    torch.manual_seed(0)
    model = NoPropForCausalLM(NoPropConfig(**config.to_dict() | sizes)).eval()
    with torch.no_grad():
        for parameter in model.model.blocks.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    compiled = torch.compile(model)
    with torch.no_grad():
        assert torch.allclose(compiled(INPUT).logits, model(INPUT).logits, atol=1e-5)
        assert torch.allclose(compiled(INPUT[:1, :3]).logits, model(INPUT[:1, :3]).logits, atol=1e-5)


def test_a_block_is_a_model_of_transformers(config):
    block = DenoisingBlock(config, 1)
    assert block.num_parameters() == sum(parameter.numel() for parameter in block.parameters())
    assert block.dtype == torch.float32 and block.device.type == "cpu"
