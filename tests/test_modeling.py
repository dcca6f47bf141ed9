import copy
import itertools
import math
from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, modeling_utils

from conftest import tokens
from noprop_hf import DenoisingBlock, NoPropConfig, NoPropForCausalLM, NoPropForPreTraining, modeling_noprop
from noprop_hf.modeling_noprop import TokenTable, sampled_candidates, vocabulary_nats
from noprop_hf.noise_noprop import sample_evidence, standardize


# --- the head and Bayes' rule -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_index", [1, 2])
def test_bayes_skip_is_the_posterior_by_brute_force(config, block_index):
    """Without a correction, a block's logits are the posterior under Gaussian densities, summed out token by token."""
    torch.manual_seed(0)
    block = DenoisingBlock(config, block_index).eval()
    table = TokenTable(config)
    block._init_weights(table)
    torch.nn.init.normal_(block.head.readout.weight)
    torch.nn.init.normal_(block.head.bias)
    context = torch.randn(6, config.hidden_size)
    evidence = torch.randn(6, config.hidden_size)
    logits = block.head(context, evidence)[0] @ table.weight.T + block.head.bias

    prior = (block.head(context)[0] @ table.weight.T + block.head.bias).double().softmax(-1)
    gamma = torch.tensor(config.noise_levels[block_index], dtype=torch.float64)
    for row in range(6):
        joint = [
            prior[row, y].log()
            + torch.distributions.Normal(gamma * table.weight[y].double(), gamma.sqrt())
            .log_prob(evidence[row].double())
            .sum()
            for y in range(config.vocab_size)
        ]
        assert torch.allclose(logits[row].double().softmax(-1), torch.stack(joint).softmax(-1), atol=1e-5)


@pytest.mark.parametrize("rows_at_once", [1, 5, 28, 100])
@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16])
def test_vocabulary_nats_and_their_gradients_are_those_of_whole_logits(precision, rows_at_once, monkeypatch):
    """In float32 under autocast too, with losses scaled as in float16, and with logits of hundreds."""
    monkeypatch.setattr(modeling_noprop, "LOGITS_AT_ONCE", 50 * rows_at_once)
    torch.manual_seed(0)
    dtype = precision or torch.float32
    inputs = [torch.randn(*shape, requires_grad=True) for shape in ((4, 7, 16), (50, 16), (50,))]
    prediction, table, bias = inputs
    targets = tokens(4, 7)
    targets[0, 3:] = targets[1] = -100  # whole chunks of five, too
    with torch.autocast("cpu", precision, enabled=precision is not None):
        found, nats = vocabulary_nats(20 * prediction.to(dtype), table, bias, targets)
    # the reference is in float64, with the same rounding of the prediction
    logits = (20 * prediction.to(dtype)).double() @ table.T.double() + bias.double()
    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    torch.testing.assert_close(nats, each.view(4, 7).float())
    torch.testing.assert_close(found, each.sum().float())
    expected = torch.autograd.grad(each.sum(), inputs)
    tolerance = {None: 1e-3, torch.float16: 1e-2, torch.bfloat16: 1e-1}[precision]  # the rounding of 20 * gradient
    for scale in (1.0, 2.0**7):  # as with accumulation, and in float16
        gradients = torch.autograd.grad(scale * found, inputs, retain_graph=True)
        torch.testing.assert_close([g / scale for g in gradients], list(expected), rtol=tolerance, atol=tolerance)


def test_vocabulary_nats_have_second_and_forward_derivatives_and_transforms():
    """Those of whole logits, also where some inputs are frozen."""
    targets = tokens(7)
    targets[2] = -100

    def whole(prediction, table, bias):
        return F.cross_entropy(prediction @ table.T + bias, targets, reduction="sum")

    def ours(*inputs):
        return vocabulary_nats(*inputs, targets)[0]

    for trained in ((True, True, True), (True, False, True), (True, False, False)):
        shapes = zip(((7, 16), (50, 16), (50,)), trained, strict=True)
        inputs = [torch.randn(*shape, requires_grad=needs) for shape, needs in shapes]
        needed, second = [x for x in inputs if x.requires_grad], []
        for loss in (ours, whole):
            gradients = torch.autograd.grad(3 * loss(*inputs), needed, create_graph=True)
            second.append(torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), needed))
        torch.testing.assert_close(*second, rtol=1e-4, atol=1e-4)
    values = tuple(x.detach() for x in inputs)
    assert not vocabulary_nats(*inputs, targets)[1].requires_grad
    for transform in (torch.func.grad, torch.func.hessian, lambda loss: partial(torch.func.jvp, loss)):
        arguments = (values, values) if isinstance(transform(ours), partial) else values
        torch.testing.assert_close(transform(ours)(*arguments), transform(whole)(*arguments), rtol=1e-4, atol=1e-4)


# --- one block --------------------------------------------------------------------------------------------------------


def reference_losses(model, block_index, input_ids, labels, generator):
    """The two terms of a block's loss, from whole logits."""
    block, table = model.model.blocks[block_index], model.model.embed_tokens.weight
    embeds = table[input_ids]
    states = block.encoder(embeds, **block.encoder.attention_inputs(embeds))[:, :-1]
    targets = labels[:, 1:]
    clean = table[targets.clamp(min=0)]
    eps = torch.randn(clean.shape, generator=generator)
    evidence = block.level * clean + block.level**0.5 * eps
    terms = {}
    for name, s in (("context", None), ("denoising", evidence)):
        logits = block.head(states, s)[0] @ table.T + block.head.bias
        if block.config.loss_type == "mse":
            errors = (logits.softmax(-1) @ table - clean).pow(2).mean(-1)
            terms[name] = errors[targets != -100].mean()
        else:
            terms[name] = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    return terms


@pytest.mark.parametrize("loss_type", ["cross_entropy", "mse"])
@pytest.mark.parametrize("block_index", [0, 2])
def test_block_loss_is_the_weighted_mean_of_its_terms(model, loss_type, block_index):
    model.config.loss_type, model.config.denoising_weight = loss_type, 0.3
    block = model.model.blocks[block_index]
    input_ids, labels = tokens(3, 9), tokens(3, 9)
    terms = reference_losses(model, block_index, input_ids, labels, torch.Generator().manual_seed(5))
    output = block(input_ids, labels, model.model.embed_tokens, generator=torch.Generator().manual_seed(5))
    assert torch.allclose(output.denoising_loss, terms["denoising"], atol=1e-5)
    assert torch.allclose(output.context_loss, terms["context"], atol=1e-5)
    expected = 0.3 * terms["denoising"] + 0.7 * terms["context"] if block_index else terms["context"]
    assert torch.allclose(output.loss, expected, atol=1e-5)


@pytest.mark.parametrize("loss_type", ["cross_entropy", "mse"])
def test_the_training_loss_is_that_loss_on_average(model, loss_type):
    model.config.loss_type, model.config.denoising_weight = loss_type, 0.3
    model.config.sampled_softmax = False
    block, table = model.model.blocks[2], model.model.embed_tokens
    input_ids, labels = tokens(30, 9), tokens(30, 9)
    labels[1, 5:] = -100
    torch.manual_seed(0)
    with torch.no_grad():
        expected = torch.stack([block.eval()(input_ids, labels, table).loss for _ in range(50)]).mean()
        drawn = torch.stack([block.train()(input_ids, labels, table).loss for _ in range(200)])
    assert abs(drawn.mean() - expected) < 4 * drawn.std() / 200**0.5
    # and the same for its gradient, in the direction of one weight
    weight = block.head.correction[0].weight
    gradients = {}
    for mode in (False, True):
        block.train(mode)
        draws = [torch.autograd.grad(block(input_ids, labels, table).loss, weight)[0][0, 0] for _ in range(200)]
        gradients[mode] = torch.stack(draws)
    error = (gradients[True].var() / 200 + gradients[False].var() / 200).sqrt()
    assert abs(gradients[True].mean() - gradients[False].mean()) < 4 * error


def test_sampled_candidates_give_the_partition_function_on_average():
    torch.manual_seed(0)
    log_prior = (2 * torch.randn(200)).log_softmax(-1)
    logits, sums = torch.randn(200), []
    for _ in range(4000):
        targets = torch.multinomial(log_prior.exp(), 64, replacement=True)
        candidates, indices, correction = sampled_candidates(targets, log_prior + 1)
        assert torch.equal(candidates[indices], targets)
        sums.append((logits[candidates] + correction).exp().sum())
    sums = torch.stack(sums)
    assert abs(sums.mean() - logits.exp().sum()) < 3 * sums.std() / len(sums) ** 0.5


def test_sampled_softmax_is_the_corrected_softmax_over_the_tokens_of_the_batch(model):
    block, table = model.model.blocks[0].train(), model.model.embed_tokens
    table.log_prior.copy_(torch.randn(50).log_softmax(-1))
    block.head.bias.data.normal_()
    input_ids = tokens(2, 9)
    loss = block(input_ids, input_ids, table).loss
    context = block.encoder(table(input_ids), **block.encoder.attention_inputs(table(input_ids)))[:, :-1].flatten(0, 1)
    logits = block.head(context)[0] @ table.weight.T + block.head.bias
    targets = input_ids[:, 1:].flatten()
    present = set(targets.tolist())
    seen = 1 - (1 - table.log_prior.exp()) ** len(targets)
    logits = torch.where(torch.tensor([token in present for token in range(50)]), logits - seen.log(), -math.inf)
    assert torch.allclose(loss, F.cross_entropy(logits, targets))


def test_ignored_labels_and_the_divisor_of_the_loss(model):
    block, table = model.model.blocks[2], model.model.embed_tokens
    input_ids, labels = tokens(3, 9), tokens(3, 9)
    labels[1, 5:] = -100

    def loss(**options) -> torch.Tensor:
        return block(input_ids, labels, table, generator=torch.Generator().manual_seed(5), **options).loss

    assert torch.allclose(loss(num_items_in_batch=40) * 40, loss() * (labels[:, 1:] != -100).sum())
    before = loss()
    input_ids[1, 6:] = (input_ids[1, 6:] + 1) % 50  # seen by positions that predict nothing
    assert torch.allclose(loss(), before)


@pytest.mark.parametrize("loss_type", ["cross_entropy", "mse"])
def test_labels_that_predict_nothing_give_a_zero_gradient(model, loss_type):
    """As in one batch of several whose gradients are accumulated."""
    model.config.loss_type = loss_type
    block = model.model.blocks[1].train()
    block(tokens(3, 9), torch.full((3, 9), -100), model.model.embed_tokens, num_items_in_batch=7).loss.backward()
    assert all((parameter.grad == 0).all() for parameter in block.parameters())


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_one_term_alone(model, weight):
    model.config.denoising_weight = weight
    block = model.model.blocks[1].train()
    output = block(tokens(3, 9), tokens(3, 9), model.model.embed_tokens)
    output.loss.backward()
    name = "denoising_loss" if weight else "context_loss"
    assert torch.allclose(output.loss, output[name])
    assert all(parameter.grad is not None for parameter in block.parameters())


class Waits(TorchDispatchMode):
    """The operations that make the host wait for a device: their result is a number, or its size depends on data."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_by_mask = func is torch.ops.aten.index.Tensor and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        is_decided = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output} & {*func.tags}
        if is_by_mask or (is_decided and func is not torch.ops.aten.index.Tensor):
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("labels_are_cut", [False, True])
def test_training_waits_for_a_device_only_to_learn_sizes(model, config, labels_are_cut):
    """Once for the predicted tokens and once for the tokens of the softmax, both before anything else."""
    input_ids = tokens(3, 9)
    labels = input_ids.masked_fill(input_ids < 10, -100) if labels_are_cut else input_ids
    with Waits() as block:
        model.model.blocks[1].train()(input_ids, labels, model.model.embed_tokens).loss.backward()
    assert block.names == ["nonzero", "_unique2"]
    with Waits() as phase_1:
        NoPropForPreTraining(config).train()(input_ids, labels=labels).loss.backward()
    assert phase_1.names == ["nonzero"]
    with Waits() as masks:
        input_ids[input_ids < 10], input_ids.sum().item()
    assert masks.names == ["index", "_local_scalar_dense"]


def test_bound_of_a_block_alone_is_that_of_its_answers_on_pure_noise_and_at_its_level(model):
    block, table, input_ids = model.model.blocks[1], model.model.embed_tokens, tokens(2, 8)
    output = block(input_ids, input_ids, table, generator=torch.Generator().manual_seed(1))
    embeds, targets = table(input_ids), input_ids[:, 1:].flatten()
    evidence = sample_evidence(embeds[:, 1:].flatten(0, 1), block.level, torch.Generator().manual_seed(1))
    states = block.encoder(embeds, **block.encoder.attention_inputs(embeds))[:, :-1].flatten(0, 1)
    alone, informed = (block.head(states, s)[0] @ table.weight.T + block.head.bias for s in (None, evidence))
    updated = alone + evidence @ table.weight.T
    expected = F.cross_entropy(alone, targets) + F.cross_entropy(informed, targets) - F.cross_entropy(updated, targets)
    assert torch.allclose(output.bound_nats, expected, atol=1e-5)


def test_the_table_is_frozen_until_somebody_unfreezes_it(model, tmp_path):
    input_ids = tokens(2, 8)
    model.save_pretrained(tmp_path)
    for any_model in (model, NoPropForCausalLM.from_pretrained(tmp_path), copy.deepcopy(model).double()):
        table = any_model.model.embed_tokens
        any_model(input_ids, labels=input_ids).loss.backward()
        any_model.model.blocks[1](input_ids, input_ids, table).loss.backward()
        assert not table.weight.requires_grad and table.weight.grad is None
        assert all(parameter.grad is not None for parameter in any_model.model.blocks[1].parameters())
    model.requires_grad_(True)
    model(input_ids, labels=input_ids).loss.backward()
    assert model.model.embed_tokens.weight.grad is not None  # as an embedding of any other model


@pytest.mark.parametrize("has_evidence", [False, True])
def test_the_head_calls_its_first_layer_when_it_is_not_plain(model, config, has_evidence):
    """With the same answer and gradients: a hook, here of the backward pass, acts as everywhere else."""
    head = model.model.blocks[1].head
    torch.nn.init.normal_(head.correction[2].weight)
    context, evidence = torch.randn(2, 6, config.hidden_size, requires_grad=True)
    answers, seen = [], []
    for has_hook in (False, True):
        if has_hook:
            head.correction[0].register_full_backward_hook(lambda *_: seen.append(1))
        answer, _ = head(context, evidence if has_evidence else None)
        answers.append([answer, *torch.autograd.grad(answer.sin().sum(), [context, *head.correction.parameters()])])
    assert seen
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-4)


def test_block_index_out_of_range(config):
    with pytest.raises(ValueError, match="block_index"):
        DenoisingBlock(config, 3)


# --- the whole model --------------------------------------------------------------------------------------------------


def test_logits_are_the_normalised_mean_of_the_blocks(model):
    input_ids = tokens(2, 8)
    logits = model(input_ids).logits
    assert torch.allclose(logits.exp().sum(-1), torch.ones(2, 8), atol=1e-5)
    table = model.model.embed_tokens.weight
    embeds, each = table[input_ids], []
    for block in model.model.blocks:
        states = block.encoder(embeds, **block.encoder.attention_inputs(embeds))
        each.append(block.head(states)[0] @ table.T + block.head.bias)
    assert torch.allclose(logits, torch.stack(each).mean(0).log_softmax(-1), atol=1e-4)
    assert torch.equal(logits, model(input_ids).logits)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_future_tokens_change_no_earlier_logits(model, attn_implementation):
    model.set_attn_implementation(attn_implementation)
    input_ids = tokens(2, 12)
    changed = input_ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 50
    before, after = model(input_ids).logits, model(changed).logits
    assert torch.allclose(before[:, :7], after[:, :7], atol=1e-6)
    assert not torch.allclose(before[:, 7:], after[:, 7:], atol=1e-3)


def test_loss_is_the_cross_entropy_of_the_logits(model):
    input_ids = tokens(2, 8)
    labels = input_ids.masked_fill(torch.arange(8) < 3, -100)
    output = model(input_ids, labels=labels)
    reference = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert torch.allclose(output.loss, reference, atol=1e-6)


@pytest.mark.parametrize("kept", [1, 3, torch.tensor([2, 5])])
def test_labels_are_scored_at_all_positions_whatever_logits_are_kept(model, kept):
    input_ids = tokens(2, 8)
    labels = input_ids.masked_fill(torch.arange(8) < 3, -100)
    whole = model(input_ids, labels=labels)
    for options in ({}, {"num_items_in_batch": 40}):
        output = model(input_ids, labels=labels, logits_to_keep=kept, **options)
        expected = whole.loss * (10 / 40 if options else 1)
        torch.testing.assert_close(output.loss, expected)
        index = slice(-kept, None) if isinstance(kept, int) else kept
        torch.testing.assert_close(output.logits, whole.logits[:, index])
        bias = model.model.blocks[0].head.bias
        torch.testing.assert_close(
            *(torch.autograd.grad(loss, bias, retain_graph=True) for loss in (output.loss, expected))
        )
    sliced = model(input_ids, labels=labels[:, -3:], logits_to_keep=3).loss  # as in stock models
    torch.testing.assert_close(sliced, F.cross_entropy(whole.logits[:, -3:-1].flatten(0, 1), labels[:, -2:].flatten()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_half_precision_are_normalised_piece_by_piece_without_a_copy(model, dtype, monkeypatch):
    model.to(dtype)
    input_ids = tokens(5, 8)
    expected = model(input_ids).logits
    monkeypatch.setattr(modeling_noprop, "LOGITS_AT_ONCE", 50 * 3)

    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **kwargs or {})
            if isinstance(result, torch.Tensor) and result.dtype == dtype and result.shape[-1] == 50:
                self.largest = max(self.largest, result.numel())
            return result

    with torch.no_grad(), Sizes() as sizes:
        found = model(input_ids).logits
    assert found.dtype == torch.float32
    # A product of fewer rows may be rounded otherwise, by one unit in the last place.
    unit = torch.finfo(dtype).eps * float(expected.detach().abs().max())
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=unit)
    assert 50 * 16 <= sizes.largest < found.numel()  # the table, and no copy of the logits


def test_cached_logits_equal_uncached_ones(model):
    input_ids = tokens(2, 10)
    whole = model(input_ids, use_cache=False).logits
    cache, pieces = DynamicCache(config=model.config), []
    for piece in input_ids.split([4, 1, 3, 2], dim=1):
        pieces.append(model(piece, cache=cache, use_cache=True).logits)
    assert torch.allclose(torch.cat(pieces, dim=1), whole, atol=1e-5)
    assert len(cache.layers) == model.config.num_hidden_layers == 6


def test_a_padded_batch_gives_what_each_prompt_gives_alone(model):
    short, long = tokens(1, 4), tokens(1, 9)
    batch = torch.cat([F.pad(short, (5, 0)), long])
    mask = torch.cat([F.pad(torch.ones_like(short), (5, 0)), torch.ones_like(long)])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(batch, attention_mask=mask, position_ids=positions).logits
    assert torch.allclose(logits[:1, 5:], model(short).logits, atol=1e-5)
    assert torch.allclose(logits[1:], model(long).logits, atol=1e-5)


# --- the bound and the chain, by enumeration --------------------------------------------------------------------------


def tiny_model() -> NoPropForCausalLM:
    """Five tokens in the plane and two blocks that disagree."""
    torch.manual_seed(4)
    config = NoPropConfig(
        vocab_size=5,
        hidden_size=2,
        num_blocks=2,
        num_layers_per_block=1,
        num_attention_heads=1,
        intermediate_size=4,
        noise_levels=[0.0, 0.7],
    )
    model = NoPropForCausalLM(config).eval()
    with torch.no_grad():
        for block in model.model.blocks:
            for parameter in block.head.parameters():
                parameter.normal_(0, 0.7)
    return model


def chain_by_quadrature(model: NoPropForCausalLM, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact distribution of the chain's token after the first input, and the exact bound for each token.

    A chain of two blocks: `p(y) = sum_y0 p_0(y0) E[p_1(y | s)]`, `s ~ N(g e_y0, g I)`, integrated on a grid, with `p_1`
    the normalised geometric mean of the second block's answer and the first one's, updated by Bayes' rule.
    """
    first, second = model.model.blocks
    table = model.model.embed_tokens.weight.double()
    gamma = second.level
    axis = torch.linspace(-12, 12, 601, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    cell = (axis[1] - axis[0]) ** 2
    embeds = model.model.embed_tokens(input_ids)
    h0, h1 = (block.encoder(embeds, **block.encoder.attention_inputs(embeds))[0, 0] for block in (first, second))
    with torch.no_grad():
        log_p0 = (first.head(h0)[0].double() @ table.T + first.head.bias).log_softmax(-1)
        prediction = second.head(h1.expand(len(grid), 2), grid.float())[0].double()
        own = (prediction @ table.T + second.head.bias).log_softmax(-1)
        updated = (log_p0 + grid @ table.T).log_softmax(-1)
        log_p1 = ((own + updated) / 2).log_softmax(-1)
    densities = torch.stack(
        [torch.distributions.Normal(gamma * e, gamma**0.5).log_prob(grid).sum(-1).exp() * cell for e in table]
    )
    assert torch.allclose(densities.sum(-1), torch.ones(5, dtype=torch.float64), atol=1e-6)
    exact = log_p0.exp() @ densities @ log_p1.exp()
    brackets = torch.stack([densities[y] @ (updated[:, y] - log_p1[:, y]) for y in range(5)])
    return exact, -log_p0 + brackets


def test_bound_is_above_the_exact_likelihood_and_is_what_enumeration_gives():
    model = tiny_model()
    exact, exact_bound = chain_by_quadrature(model, torch.tensor([[3, 0]]))
    assert (exact_bound >= -exact.log()).all()
    assert (exact_bound + exact.log()).max() > 0.05  # these blocks are not exact, so the bound is not tight
    for y in range(5):
        pairs = torch.tensor([[3, y]]).expand(20_000, 2)
        output = model.variational_bound(pairs, generator=torch.Generator().manual_seed(y))
        per_token = output.token_nats.sum(0)
        error = per_token.std() / len(per_token) ** 0.5
        assert abs(output.bound - exact_bound[y]) < 4 * error
        assert torch.allclose(output.block_nats.sum(), output.bound, atol=1e-5)


def test_scales_at_the_start_do_not_depend_on_the_width():
    """Rows enter the encoder, and answers leave the head, at norm 1, so that logits have a variance of 1."""
    for width in (32, 512):
        block = DenoisingBlock(NoPropConfig(vocab_size=4096, hidden_size=width, num_blocks=2, num_layers_per_block=1))
        rows = standardize(torch.randn(4096, width))
        entering = []
        block.encoder.input_projection.register_forward_hook(
            lambda module, args, output, entering=entering: entering.append(output)
        )
        block.encoder(rows[None, :64], **block.encoder.attention_inputs(rows[None, :64]))
        assert torch.allclose(entering[0].norm(dim=-1), torch.ones(1, 64), atol=1e-4)
        answers = block.head(rows[:64])[0]  # states have a root mean square of 1, as rows have
        assert torch.allclose(answers.norm(dim=-1), torch.ones(64), atol=1e-4)
        assert (answers @ rows.T).std().item() == pytest.approx(1, rel=0.1)


def test_bound_is_tight_for_exact_blocks(config):
    """Blocks that ignore the context are Bayes' rule on one prior: the exact posterior of a token drawn from it."""
    model = NoPropForCausalLM(config).eval()
    prior = torch.randn(config.vocab_size).log_softmax(-1)
    with torch.no_grad():
        for block in model.model.blocks:
            block.head.bias.copy_(prior)
            block.head.readout.weight.zero_()
    input_ids = tokens(2, 9)
    output = model.variational_bound(input_ids)
    exact = -prior[input_ids[:, 1:]].flatten()
    assert torch.allclose(output.token_nats[0], exact, atol=1e-5)
    assert output.token_nats[1:].abs().max() < 1e-4


def test_chain_samples_the_distribution_of_enumeration():
    model = tiny_model()
    exact, _ = chain_by_quadrature(model, torch.tensor([[3]]))
    prompts = torch.tensor([[3]]).expand(40_000, 1)
    torch.manual_seed(0)
    output = model.generate(
        prompts, max_new_tokens=1, do_sample=True, top_k=0, decoding_mode="denoising", pad_token_id=0
    )
    frequencies = output[:, 1].bincount(minlength=5) / len(output)
    assert torch.allclose(frequencies.double(), exact, atol=4 * (0.25 / 40_000) ** 0.5)


def test_averaged_trajectories_approach_the_exact_distribution():
    model = tiny_model()
    exact, _ = chain_by_quadrature(model, torch.tensor([[3]]))
    logits = model(
        torch.tensor([[3]]),
        decoding_mode="denoising",
        num_trajectories=20_000,
        generator=torch.Generator().manual_seed(0),
    ).logits
    assert torch.allclose(logits[0, 0].exp().double(), exact, atol=0.02)


# --- generate ---------------------------------------------------------------------------------------------------------


def test_greedy_generation_takes_the_likeliest_token(model):
    prompt = tokens(2, 4)
    output = model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
    reference = prompt
    for _ in range(6):
        reference = torch.cat([reference, model(reference).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(output, reference)


@pytest.mark.parametrize("options", [{}, {"decoding_mode": "denoising", "num_trajectories": 2}])
def test_sampling_is_reproducible_and_the_cache_changes_nothing(model, options):
    outputs = []
    for use_cache in (True, True, False):
        torch.manual_seed(3)
        outputs.append(
            model.generate(
                tokens(2, 4), max_new_tokens=8, do_sample=True, pad_token_id=0, use_cache=use_cache, **options
            )
        )
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_chain_takes_its_randomness_from_a_generator(model):
    outputs = []
    for seed, noise in itertools.product((1, 2), (10, 20)):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(noise)
        outputs.append(model(tokens(1, 4), decoding_mode="denoising", generator=generator).logits)
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])
    assert not torch.equal(outputs[0], outputs[1])


def test_fewer_blocks(model):
    input_ids = tokens(1, 5)
    table, block = model.model.embed_tokens.weight, model.model.blocks[0]
    states = block.encoder(table[input_ids], **block.encoder.attention_inputs(table[input_ids]))
    expected = (block.head(states)[0] @ table.T + block.head.bias).log_softmax(-1)
    assert torch.allclose(model(input_ids, num_inference_blocks=1).logits, expected, atol=1e-5)
    with pytest.raises(ValueError, match="num_inference_blocks"):
        model(input_ids, num_inference_blocks=4)


def test_unknown_decoding_mode(model):
    with pytest.raises(ValueError, match="decoding_mode"):
        model(tokens(1, 4), decoding_mode="magic")


# --- phase 1 ----------------------------------------------------------------------------------------------------------


def phase_1_model(config: NoPropConfig, pretraining_objective: str) -> NoPropForPreTraining:
    torch.manual_seed(0)
    model = NoPropForPreTraining(NoPropConfig(**config.to_dict() | {"pretraining_objective": pretraining_objective}))
    with torch.no_grad():
        torch.nn.init.normal_(model.readout.weight, std=0.3)
        model.bias.normal_()
    return model.eval()


def test_masked_lm_sees_both_sides_and_ties_its_table(config):
    model = phase_1_model(config, "mlm")
    input_ids = tokens(2, 9)
    changed = input_ids.clone()
    changed[:, 8] = (changed[:, 8] + 1) % 50
    assert not torch.allclose(model(input_ids).logits[:, 0], model(changed).logits[:, 0], atol=1e-5)

    table = model.token_table()
    assert torch.allclose(table.norm(dim=-1), torch.full((50,), 4.0))
    labels = input_ids.masked_fill(torch.arange(9) % 3 != 0, -100)
    output = model(input_ids, labels=labels)
    reference = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    assert torch.allclose(output.loss, reference, atol=1e-5)
    model.train()
    assert torch.allclose(model(input_ids, labels=labels).loss, reference, atol=1e-5)


def test_next_token_objective_sees_the_past_alone(config):
    model, input_ids = phase_1_model(config, "clm"), tokens(2, 9)
    changed = input_ids.clone()
    changed[:, 8] = (changed[:, 8] + 1) % 50
    logits = model(input_ids).logits
    assert torch.allclose(logits[:, :8], model(changed).logits[:, :8], atol=1e-5)
    reference = F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
    assert torch.allclose(model.train()(input_ids, labels=input_ids).loss, reference, atol=1e-5)


def test_next_token_objective_counts_every_token_that_is_not_padding(config):
    model, input_ids = phase_1_model(config, "clm"), tokens(4, 9)
    attention_mask = torch.ones(4, 9, dtype=torch.long)
    attention_mask[3, 6:] = 0
    options = {"attention_mask": attention_mask, "labels": input_ids}
    targets = input_ids.masked_fill(attention_mask == 0, -100)
    logits = model(input_ids, attention_mask=attention_mask).logits
    reference = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
    loss = model.train()(input_ids, **options).loss
    assert torch.allclose(loss, reference, atol=1e-5)
    half = model(input_ids, num_items_in_batch=2 * input_ids.numel(), **options).loss
    assert torch.allclose(half, loss / 2)  # as one of two batches that gradients are accumulated over


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("noise_schedule", ["information", "cosine"])
def test_mixed_precision_loss_is_near_the_full_one(config, dtype, noise_schedule):
    """Also where the evidence is strong: cosine levels make logits of a hundred even here."""
    fields = config.to_dict() | {"noise_schedule": noise_schedule, "noise_levels": None, "hidden_size": 64}
    torch.manual_seed(0)
    block = DenoisingBlock(NoPropConfig(**fields | {"head_dim": None}), 2)
    table = TokenTable(block.config)
    block._init_weights(table)
    input_ids = tokens(4, 16)
    full = block(input_ids, input_ids, table, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype):
        mixed = block(input_ids, input_ids, table, generator=torch.Generator().manual_seed(1))
        mixed.loss.backward()
    assert mixed.loss.dtype == torch.float32
    assert torch.allclose(mixed.loss, full.loss, rtol=2e-2)
    assert all(parameter.grad.isfinite().all() for parameter in block.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(model, dtype):
    input_ids = tokens(2, 8)
    full = model(input_ids).logits
    model.to(dtype)
    half = model(input_ids).logits
    assert torch.allclose(half.exp().sum(-1), torch.ones(2, 8), atol=1e-5)
    assert (half - full).abs().max() < 0.2
    bound = model.variational_bound(input_ids, generator=torch.Generator().manual_seed(0))
    assert bound.token_nats.isfinite().all()
    output = model.generate(input_ids, max_new_tokens=3, do_sample=True, decoding_mode="denoising", pad_token_id=0)
    assert output.shape == (2, 11)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(model, use_reentrant):
    """Gradients reach the layers without a hook on embeddings, so transformers must not warn that a block has none."""
    block, table = model.model.blocks[1].train(), model.model.embed_tokens
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            enable = getattr(block, "activation_checkpointing_enable", block.gradient_checkpointing_enable)
            with patch.object(modeling_utils, "logger") as logger:
                enable({"use_reentrant": use_reentrant})
            assert not logger.method_calls
        block.zero_grad()
        block(tokens(3, 9), tokens(3, 9), table, generator=torch.Generator().manual_seed(1)).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in block.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))
