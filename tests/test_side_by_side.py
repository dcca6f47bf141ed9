"""Blocks side by side say what they say one by one."""

import copy

import pytest
import torch
from transformers import DynamicCache

from conftest import tokens
from noprop_hf import NoPropConfig, NoPropForCausalLM
from noprop_hf.stacked_noprop import ROWS_AT_ONCE, GrowingLayer, can_be_stacked


@pytest.fixture
def one_by_one(model):
    """The same model, which cannot run its blocks side by side."""
    other = copy.deepcopy(model)
    other.model.stacked_blocks = lambda **kwargs: None
    return other


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


def close(ours, theirs) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("num_inference_blocks", [None, 1, 2])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padded_and_shortened(model, one_by_one, num_inference_blocks, attention):
    input_ids, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = 0
    outputs = []
    for either in (model, one_by_one):
        either.set_attn_implementation(attention)
        outputs.append(either.model(input_ids, attention_mask=mask, num_inference_blocks=num_inference_blocks))
    assert model.model.stacked_blocks() is not None
    seen = mask.bool()
    close(outputs[0].last_hidden_state[seen], outputs[1].last_hidden_state[seen])
    for ours, theirs in zip(outputs[0].context_states, outputs[1].context_states, strict=True):
        close(ours[seen], theirs[seen])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows_at_once", [1, 27, 2**20])
def test_a_prompt_in_groups_of_blocks_and_with_one_answer(model, one_by_one, attention, rows_at_once, monkeypatch):
    monkeypatch.setitem(ROWS_AT_ONCE, "cpu", rows_at_once)  # 3 rows of 9 tokens: one block, one block, all blocks
    input_ids, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.long)
    for padding in (0, 4):
        mask[0, :padding] = 0
        for either in (model, one_by_one):
            either.set_attn_implementation(attention)
        cache = DynamicCache()
        last = model(input_ids, attention_mask=mask, cache=cache, use_cache=True, logits_to_keep=1).logits
        expected = one_by_one(input_ids, attention_mask=mask).logits
        close(last, expected[:, -1:])
        close(model(input_ids, attention_mask=mask).logits[mask.bool()], expected[mask.bool()])
        more, longer = tokens(3, 2), torch.cat([mask, mask.new_ones(3, 2)], dim=1)
        after = model(more, attention_mask=longer, cache=cache).logits
        whole = one_by_one(torch.cat([input_ids, more], dim=1), attention_mask=longer).logits
        close(after, whole[:, -2:])


def test_shared_key_heads(monkeypatch):
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_blocks": 3, "num_layers_per_block": 2}
    model = NoPropForCausalLM(NoPropConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    input_ids = tokens(2, 7)
    with torch.enable_grad():
        expected = model(input_ids).logits.detach()  # gradients run through the blocks one by one
    close(model(input_ids).logits, expected)
    monkeypatch.setitem(ROWS_AT_ONCE, "cpu", 1)  # block by block into one cache
    cache = DynamicCache()
    pieces = [model(piece, cache=cache, use_cache=True).logits for piece in input_ids.split([5, 2], dim=1)]
    close(torch.cat(pieces, dim=1), expected)


def test_the_cache_holds_the_heads_of_all_blocks(model, one_by_one):
    input_ids, cache = tokens(2, 8), DynamicCache()
    pieces = [model(piece, cache=cache, use_cache=True).logits for piece in input_ids.split([5, 2, 1], dim=1)]
    close(torch.cat(pieces, dim=1), one_by_one(input_ids).logits)
    config = model.config
    assert len(cache.layers) == config.num_layers_per_block
    assert cache.layers[0].keys.shape[1] == config.num_blocks * config.num_key_value_heads


def test_a_cache_that_grows_is_the_stock_one(model):
    """Through growth, cropping, and what beam search does with a cache."""
    torch.manual_seed(0)
    stock, ours = DynamicCache(), DynamicCache()
    ours.layers = [GrowingLayer()]

    def grow(length: int, batch: int) -> None:
        keys, values = torch.randn(batch, 3, length, 4), torch.randn(batch, 3, length, 4)
        for mine, theirs in zip(ours.update(keys, values, 0), stock.update(keys, values, 0), strict=True):
            assert torch.equal(mine, theirs)

    for length in (7, 1, 1, 30, 1):
        grow(length, 2)
    begin = ours.layers[0].keys.data_ptr()
    grow(1, 2)
    assert ours.layers[0].keys.data_ptr() == begin  # written, not copied
    for change in (
        lambda cache: cache.crop(-4),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.reorder_cache(torch.tensor([3, 0, 0, 1])),
        lambda cache: cache.batch_select_indices(torch.tensor([2, 1])),
        lambda cache: cache.reset(),
    ):
        for cache in (ours, stock):
            change(cache)
        for _ in range(2):
            grow(2, 2 if not ours.layers[0].is_initialized else ours.layers[0].keys.shape[0])
    copied = copy.deepcopy(ours)
    grow(1, 2)
    assert copied.get_seq_length() == ours.get_seq_length() - 1


def test_inner_states_on_request(model, one_by_one):
    input_ids = tokens(2, 6)
    ours = model(input_ids, output_hidden_states=True, output_attentions=False)
    theirs = one_by_one(input_ids, output_hidden_states=True)
    assert len(ours.hidden_states) == len(theirs.hidden_states) == model.config.num_hidden_layers + 1
    close(ours.hidden_states, theirs.hidden_states)


def test_nothing_is_held_twice_and_changes_are_seen(model, one_by_one):
    input_ids = tokens(2, 6)
    model(input_ids)
    stacked, parameters = model.model.stacked_blocks(), dict(model.named_parameters())
    storages = {weights.untyped_storage().data_ptr() for layer in stacked.layers for weights in layer}
    layers = [parameter for name, parameter in parameters.items() if ".layers." in name]
    assert {parameter.untyped_storage().data_ptr() for parameter in layers} == storages
    for name, parameter in one_by_one.named_parameters():  # in place, as optimizers and `load_state_dict` do
        parameter *= 1.1
        parameters[name] *= 1.1
    close(model(input_ids).logits, one_by_one(input_ids).logits)
    assert model.model.stacked_blocks() is stacked
    model.double(), one_by_one.double()  # with new memory
    close(model(input_ids).logits, one_by_one(input_ids).logits)
    assert model.model.stacked_blocks() is not stacked


def test_saving_and_copying_a_stacked_model(model, tmp_path):
    input_ids = tokens(2, 6)
    expected = model(input_ids).logits
    model.save_pretrained(tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert size < 1.2 * sum(tensor.nbytes for tensor in model.state_dict().values()) + 50_000
    assert torch.equal(NoPropForCausalLM.from_pretrained(tmp_path).eval()(input_ids).logits, expected)
    assert torch.equal(copy.deepcopy(model)(input_ids).logits, expected)


def test_what_cannot_be_stacked(model):
    assert can_be_stacked(model.model.blocks)
    hierarchical = copy.deepcopy(model.config)
    hierarchical.context_source = "previous_block"
    assert not can_be_stacked(NoPropForCausalLM(hierarchical).model.blocks)
    with torch.enable_grad():
        assert model.model.stacked_blocks() is None
    with torch.device("meta"):
        assert not can_be_stacked(NoPropForCausalLM(model.config).model.blocks)
