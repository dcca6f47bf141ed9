"""Blocks side by side compute what they compute one by one, in every cache and whatever was done to their modules."""

import copy

import pytest
import torch
import transformers
from torch.autograd import forward_ad
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.cache_utils import DynamicLayer

from conftest import tokens
from noprop_hf import NoPropConfig, NoPropForCausalLM, modeling_noprop
from noprop_hf.cache_noprop import BlockCache, GrowingLayer, write
from noprop_hf.compatibility_noprop import CACHE
from noprop_hf.side_by_side_noprop import ROWS_AT_ONCE, product


@pytest.fixture
def counted(monkeypatch):
    """How often blocks ran side by side."""
    calls = []
    encode = modeling_noprop.encode_side_by_side
    monkeypatch.setattr(modeling_noprop, "encode_side_by_side", lambda *a, **k: calls.append(1) or encode(*a, **k))
    return calls


def close(ours, theirs) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def with_gradients(model, *args, **kwargs) -> torch.Tensor:
    """The log-probabilities by the modules of the blocks, one by one."""
    with torch.enable_grad():
        return model(*args, **kwargs).logits.detach()


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("num_inference_blocks", [None, 1, 2])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padded_and_shortened(model, counted, num_inference_blocks, attention):
    input_ids, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = 0
    model.set_attn_implementation(attention)
    options = {"attention_mask": mask, "num_inference_blocks": num_inference_blocks}
    ours = model.model(input_ids, **options)
    assert counted
    with torch.enable_grad():
        theirs = model.model(input_ids, **options)
    assert len(counted) == 1
    seen = mask.bool()
    close(ours.last_hidden_state[seen], theirs.last_hidden_state[seen].detach())
    close(ours.bias, theirs.bias.detach())
    for one, other in zip(ours.context_states, theirs.context_states, strict=True):
        close(one[seen], other[seen].detach())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows_at_once", [1, 27, 2**20])
def test_a_prompt_in_groups_of_blocks_and_with_one_answer(model, counted, attention, rows_at_once, monkeypatch):
    monkeypatch.setitem(ROWS_AT_ONCE, "cpu", rows_at_once)  # 3 rows of 9 tokens: one block, one block, all blocks
    input_ids, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.long)
    model.set_attn_implementation(attention)
    for padding in (0, 4):
        mask[0, :padding] = 0
        cache = BlockCache(config=model.config)
        last = model(input_ids, attention_mask=mask, cache=cache, use_cache=True, logits_to_keep=1).logits
        expected = with_gradients(model, input_ids, attention_mask=mask)
        close(last, expected[:, -1:])
        close(model(input_ids, attention_mask=mask).logits[mask.bool()], expected[mask.bool()])
        more, longer = tokens(3, 2), torch.cat([mask, mask.new_ones(3, 2)], dim=1)
        after = model(more, attention_mask=longer, cache=cache).logits
        close(after, with_gradients(model, torch.cat([input_ids, more], dim=1), attention_mask=longer)[:, -2:])
    assert len(counted) == 6


def test_a_mask_for_each_head_and_none(model, counted):
    input_ids, causal = tokens(2, 9), torch.ones(9, 9).triu(1).bool()
    mask = torch.zeros(2, 2, 9, 9).masked_fill(causal, -1e9)
    mask[:, 1] -= torch.arange(9.0)
    for options in ({"attention_mask": mask}, {"is_causal": False}):
        expected = with_gradients(model, input_ids, **options)
        close(model(input_ids, **options).logits, expected)
        close(model(input_ids, logits_to_keep=1, **options).logits, expected[:, -1:])
        assert (expected - model(input_ids).logits).abs().max() > 1e-2
    assert len(counted) == 4


def test_transforms_of_functions(model):
    """vmap over inputs and over models, and derivatives in forward mode, which know neither caches nor `out=`."""
    input_ids, options = tokens(2, 7), {"use_cache": False}
    expected = with_gradients(model, input_ids)
    close(torch.vmap(lambda row: model(row[None], **options).logits[0])(input_ids), expected)
    other = copy.deepcopy(model)
    other.model.blocks[1].encoder.layers[0].mlp.up_proj.weight *= 2
    stacked = torch.func.stack_module_state([model, other])
    called = torch.vmap(lambda *state: torch.func.functional_call(model, state, (input_ids,), options).logits)(*stacked)
    close(called[0], expected)
    close(called[1], with_gradients(other, input_ids))
    model.set_attn_implementation("eager")
    embeds = model.get_input_embeddings()(input_ids)
    direction = torch.randn_like(embeds)
    step = 1e-2 * direction
    found = []
    for context in (torch.no_grad(), torch.enable_grad()):
        with context, forward_ad.dual_level():
            logits = model(inputs_embeds=forward_ad.make_dual(embeds, direction), **options).logits
            found.append(forward_ad.unpack_dual(logits).tangent.detach())
    close(*found)
    difference = (model(inputs_embeds=embeds + step).logits - model(inputs_embeds=embeds - step).logits) / 2e-2
    torch.testing.assert_close(found[0], difference, atol=2e-2, rtol=5e-2)


def test_few_and_no_rows_of_a_large_weight(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    weight = torch.randn(512, 512)
    for rows in (torch.randn(3, 5, 512), torch.randn(0, 512), torch.randn(2, 0, 512)):
        torch.testing.assert_close(product(rows, weight), rows @ weight.T, atol=1e-3, rtol=1e-4)


def test_shared_key_heads(monkeypatch, counted):
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_blocks": 3, "num_layers_per_block": 2}
    model = NoPropForCausalLM(NoPropConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    input_ids = tokens(2, 7)
    expected = with_gradients(model, input_ids)
    close(model(input_ids).logits, expected)
    monkeypatch.setitem(ROWS_AT_ONCE, "cpu", 1)  # block by block into one cache
    cache = BlockCache(config=model.config)
    pieces = [model(piece, cache=cache, use_cache=True).logits for piece in input_ids.split([5, 2], dim=1)]
    close(torch.cat(pieces, dim=1), expected)
    assert len(counted) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_and_in_half_precision(model, counted, dtype):
    """As evaluation in mixed precision runs them; to the rounding of the dtype."""
    input_ids = tokens(2, 7)
    for half, autocast in ((model, True), (copy.deepcopy(model).to(torch.bfloat16), False)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            ours, theirs = half(input_ids).logits, with_gradients(half, input_ids)
            assert torch.allclose(ours, theirs, atol=0.1)
            expected = with_gradients(model.float(), input_ids)
            assert (ours - expected).abs().mean() < 0.1
    assert len(counted) == 2


# --- the cache --------------------------------------------------------------------------------------------------------

PREFIX, REST = tokens(2, 5), tokens(2, 8)[:, 5:]
WAYS = {
    "side by side": lambda: (torch.no_grad(), {}),
    "in inference mode": lambda: (torch.inference_mode(), {}),
    "with gradients": lambda: (torch.enable_grad(), {}),
    "with hidden states": lambda: (torch.no_grad(), {"output_hidden_states": True}),
    "with two blocks": lambda: (torch.no_grad(), {"num_inference_blocks": 2}),
}
CACHES = {
    "made by the model": lambda config: None,
    "ours": lambda config: BlockCache(config=config),
    "stock": lambda config: DynamicCache(config=config),
    "stock without configuration": lambda config: DynamicCache(),
    "static": lambda config: StaticCache(config=config, max_cache_len=20),
}


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("first", WAYS)
@pytest.mark.parametrize("then", WAYS)
def test_every_way_continues_from_the_cache_of_every_other(model, kind, first, then):
    if kind == "static" and {first, then} & {"with gradients", "in inference mode"}:
        pytest.skip("a static cache is written in place")
    blocks = 2 if "with two blocks" in (first, then) else 3
    context, options = WAYS[first]()
    with context:
        cache = model(PREFIX, cache=CACHES[kind](model.config), use_cache=True, **options)[CACHE]
    context, options = WAYS[then]()
    with context:
        if first == "with two blocks" != then:
            with pytest.raises(ValueError, match="num_inference_blocks=2"):
                model(REST[:, :1], cache=cache)
            options = {**options, "num_inference_blocks": 2}
        pieces = [model(piece, cache=cache, use_cache=True, **options).logits for piece in REST.split([1, 2], 1)]
    expected = with_gradients(model, torch.cat([PREFIX, REST], 1), num_inference_blocks=blocks)[:, 5:]
    close(torch.cat(pieces, 1).detach().clone(), expected)


@pytest.mark.parametrize("implementation", ["static", "dynamic", None])
def test_the_first_token_in_every_cache_of_generate(model, implementation):
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    output = model.generate(PREFIX, cache_implementation=implementation, **options)
    for step, logits in enumerate(output.logits):
        close(logits.log_softmax(-1), with_gradients(model, output.sequences[:, : 5 + step])[:, -1])


@pytest.mark.slow
def test_continuous_batching(model):
    prompts = [[3, 7, 11, 4], [9, 2]]
    config = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1)
    expected = [model.generate(torch.tensor([row]), config)[0, len(row) :].tolist() for row in prompts]
    small, options = {"num_blocks": 4, "max_batch_tokens": 64}, {}  # by default, the cache takes most of the memory
    if hasattr(transformers, "ContinuousBatchingConfig"):
        options["continuous_batching_config"] = transformers.ContinuousBatchingConfig(**small)
    else:  # of older versions, the generation configuration
        vars(config).update(small)
    outputs = model.generate_batch(prompts, generation_config=config, **options)
    assert [output.generated_tokens for output in outputs.values()] == expected


def test_shallow_copies_of_a_cache_go_their_own_ways(model):
    cache = model(PREFIX, use_cache=True)[CACHE]
    copies = []
    for _ in range(2):
        copies.append(copy.copy(cache))
        copies[-1].layers = [copy.copy(layer) for layer in cache.layers]
    rests = REST, 49 - REST
    for step in range(3):
        for other, rest in zip(copies, rests, strict=True):
            logits = model(rest[:, step : step + 1], cache=other).logits
            close(logits[:, 0], with_gradients(model, torch.cat([PREFIX, rest[:, : step + 1]], 1))[:, -1])
    close(model(REST, cache=cache).logits, with_gradients(model, torch.cat([PREFIX, REST], 1))[:, 5:])


CHANGES = {
    "grow": lambda model, cache: model(REST, cache=cache),
    "crop": lambda model, cache: cache.crop(-2),
    "reorder": lambda model, cache: cache.reorder_cache(torch.tensor([1, 0])),
    "select": lambda model, cache: cache.batch_select_indices(torch.tensor([1, 1])),
    "replace": lambda model, cache: [setattr(layer, "keys", 2 * layer.keys) for layer in cache.layers],
    "grow and overwrite": lambda model, cache: (
        model(REST, cache=cache) and [layer.values.zero_() for layer in cache.layers]
    ),
}


@pytest.mark.parametrize("changed", [0, 1])
@pytest.mark.parametrize("has_memory", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_a_shallow_copy_does_not_see_what_is_done_to_the_other(model, change, has_memory, changed):
    with torch.set_grad_enabled(not has_memory):
        cache = model(PREFIX, use_cache=True)[CACHE]
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    CHANGES[change](model, (cache, other)[changed])
    rest = model(REST, cache=(other, cache)[changed]).logits
    close(rest, with_gradients(model, torch.cat([PREFIX, REST], 1))[:, 5:])


def test_the_cache_has_the_layout_of_every_model(model):
    ours, stock = BlockCache(config=model.config), DynamicCache(config=model.config)
    for cache in (ours, stock):
        for piece in torch.cat([PREFIX, REST], 1).split([5, 1, 2], 1):
            model(piece, cache=cache)
    assert len(ours.layers) == len(stock.layers) == model.config.num_hidden_layers
    for mine, theirs in zip(ours.layers, stock.layers, strict=True):
        close(mine.keys, theirs.keys)
        close(mine.values, theirs.values)


@pytest.mark.parametrize("together", [True, False])
def test_a_cache_that_grows_is_the_stock_one(together):
    """Through growth, cropping, and what beam search does with a cache; for layers that share memory and for one."""
    torch.manual_seed(0)
    stock, ours = DynamicCache(), DynamicCache()
    ours.layers = [GrowingLayer() for _ in range(3)]

    def grow(length: int, batch: int) -> None:
        keys, values = torch.randn(batch, 6, length, 4), torch.randn(batch, 6, length, 4)
        parts = [(keys[:, i : i + 2], values[:, i : i + 2]) for i in (0, 2, 4)]
        expected = [stock.update(*part, index) for index, part in enumerate(parts)]
        if together:
            found = write(ours.layers, keys, values)
            expected = [torch.cat(states, 1) for states in zip(*expected, strict=True)]
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
        else:
            for index, part in enumerate(parts):
                for mine, theirs in zip(ours.update(*part, index), expected[index], strict=True):
                    assert torch.equal(mine, theirs)
        for mine, theirs in zip(ours.layers, stock.layers, strict=True):
            assert torch.equal(mine.keys, theirs.keys) and torch.equal(mine.values, theirs.values)
            assert mine.get_seq_length() == theirs.get_seq_length()

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


def test_the_cache_is_made_and_changed_as_the_stock_one(model):
    expected = with_gradients(model, torch.cat([PREFIX, REST], 1))[:, 5:]
    filled = model(PREFIX, use_cache=True)[CACHE]
    states = [(layer.keys.clone(), layer.values.clone()) for layer in filled.layers]
    changed, static = copy.deepcopy(filled), StaticCache(config=model.config, max_cache_len=20)
    changed.layers[2] = DynamicCache(states).layers[2]
    for layer, pair in zip(static.layers, states, strict=True):
        layer.update(*pair)
    replaced = BlockCache(config=model.config)
    replaced.layers = static.layers
    for cache in (BlockCache(states), BlockCache(states, config=model.config), changed, replaced):
        pieces = [model(piece, cache=cache).logits for piece in REST.split([1, 2], 1)]
        close(torch.cat(pieces, 1), expected)
    close(model(REST, cache=model(PREFIX, cache=BlockCache(), use_cache=True)[CACHE]).logits, expected)


class Quantized(torch.Tensor):
    """Like activations of `optimum-quanto`, it cannot be written into a plain tensor, only joined with others."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__setitem__ and not isinstance(args[0], cls):
            raise AttributeError("'Tensor' object has no attribute 'qtype'")
        output = super().__torch_function__(function, types, args, kwargs)
        return output.as_subclass(torch.Tensor) if function is torch.Tensor.new_empty else output


def test_keys_that_are_no_plain_tensors():
    stock, ours = DynamicLayer(), GrowingLayer()
    for length in (3, 1, 2):
        keys, values = torch.randn(2, 1, 2, length, 4).unbind()
        pair = keys.as_subclass(Quantized), values
        for mine, theirs in zip(ours.update(*pair), stock.update(*pair), strict=True):
            assert torch.equal(mine, theirs)


def test_a_cache_of_another_batch_size_is_refused(model):
    cache = model(PREFIX[:1], use_cache=True)[CACHE]
    with pytest.raises(ValueError, match="batch_repeat_interleave"):
        model(REST, cache=cache)


def test_inner_states_on_request(model):
    input_ids = tokens(2, 6)
    ours = model(input_ids, output_hidden_states=True)
    assert len(ours.hidden_states) == model.config.num_hidden_layers + 1
    close(ours.logits, with_gradients(model, input_ids))
    model.set_attn_implementation("eager")
    assert len(model(input_ids, output_attentions=True).attentions) == model.config.num_hidden_layers


def test_a_router_weighs_the_blocks(model, counted):
    config = NoPropConfig(**model.config.to_dict() | {"block_data": "clusters"})
    torch.manual_seed(0)
    routed = NoPropForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in (*routed.model.blocks.parameters(), *routed.model.router.parameters()):
            parameter.add_(0.1 * torch.randn_like(parameter))
    close(routed(PREFIX).logits, with_gradients(routed, PREFIX))
    assert counted
    cache = routed(PREFIX, use_cache=True)[CACHE]
    assert len(cache.layers) == config.num_hidden_layers == 8
    whole = torch.cat([PREFIX, REST], 1)
    close(routed(REST, cache=cache).logits, with_gradients(routed, whole)[:, PREFIX.shape[1] :])
    for count in (1, 2):
        routed.config.num_hidden_layers = 2 + 2 * count
        early = routed(PREFIX).logits
        routed.config.num_hidden_layers = 8
        close(early, routed(PREFIX, num_inference_blocks=count).logits)
    cache = routed(PREFIX, use_cache=True, num_inference_blocks=2)[CACHE]
    with pytest.raises(ValueError, match="num_inference_blocks=2`, and 3 blocks cannot"):
        routed(REST, cache=cache)
