"""The model on a GPU beside the same model on the CPU. It needs torch, transformers and pytest only: no conftest."""

import copy
import warnings

import pytest
import torch
from torch import nn

from noprop_hf import DenoisingBlock, NoPropConfig, NoPropForCausalLM, NoPropForPreTraining
from noprop_hf.modeling_noprop import TokenTable
from noprop_hf.noise_noprop import standardize


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

CONFIG = NoPropConfig(
    vocab_size=300,
    hidden_size=32,
    num_blocks=3,
    num_layers_per_block=2,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=64,
)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(CONFIG.vocab_size, shape, generator=torch.Generator().manual_seed(7))


def stirred(model: nn.Module) -> nn.Module:
    """The model with noise on every weight that is trained, so that every part of it does something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def block_and_table() -> tuple[DenoisingBlock, TokenTable]:
    torch.manual_seed(0)
    table = TokenTable(CONFIG)
    table.weight.copy_(standardize(torch.randn(table.weight.shape)))
    return stirred(DenoisingBlock(CONFIG, 2)), table


@pytest.fixture
def model() -> NoPropForCausalLM:
    torch.manual_seed(0)
    return stirred(NoPropForCausalLM(CONFIG)).eval()


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return torch.allclose(ours.cpu(), theirs, atol=1e-4, rtol=1e-3)


def test_logits_and_bound_agree(model):
    input_ids, mask = tokens(3, 20), torch.ones(3, 20, dtype=torch.long)
    mask[1, :5] = 0
    with torch.no_grad():
        expected = [model(input_ids).logits, model(input_ids, attention_mask=mask).logits[mask == 1]]
    bound = model.variational_bound(input_ids, generator=torch.Generator().manual_seed(3))
    model.cuda()
    ids, ones = input_ids.cuda(), mask.cuda()
    with torch.no_grad():
        found = [model(ids).logits, model(ids, attention_mask=ones).logits[ones == 1]]
    assert all(same(*pair) for pair in zip(found, expected, strict=True))
    assert same(model.variational_bound(ids, generator=torch.Generator().manual_seed(3)).token_nats, bound.token_nats)


def test_losses_and_gradients_agree():
    """In evaluation mode, whose noise comes from a generator on the CPU; phase 1 has none."""
    input_ids = tokens(4, 16)
    block, table = block_and_table()
    phase_1 = stirred(NoPropForPreTraining(CONFIG)).train()
    found = {}
    for device in ("cpu", "cuda"):
        models = [copy.deepcopy(model).to(device) for model in (block.eval(), phase_1)]
        ids, frozen = input_ids.to(device), copy.deepcopy(table).to(device)
        noise = torch.Generator().manual_seed(3)
        losses = [models[0](ids, ids, frozen, generator=noise).loss, models[1](ids, labels=ids).loss]
        sum(losses).backward()
        found[device] = [*losses, *(parameter.grad for model in models for parameter in model.parameters())]
    for ours, theirs in zip(found["cuda"], found["cpu"], strict=True):
        assert same(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_training_step_in_half_precision_is_finite_and_near_float32(dtype):
    input_ids = tokens(8, 32).cuda()
    block, table = (module.cuda() for module in block_and_table())
    phase_1 = stirred(NoPropForPreTraining(CONFIG)).cuda().train()
    block.train()
    jobs = {
        "block": lambda: block(input_ids, input_ids, table).loss,
        "phase 1": lambda: phase_1(input_ids, labels=input_ids).loss,
    }
    for name, model in (("block", block), ("phase 1", phase_1)):
        scaler = torch.amp.GradScaler("cuda", 2.0**10, enabled=dtype == torch.float16)
        torch.manual_seed(2)
        expected = jobs[name]()
        torch.manual_seed(2)
        with torch.autocast("cuda", dtype):
            loss = jobs[name]()
        assert loss.item() == pytest.approx(expected.item(), rel=0.02)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        scaler.step(optimizer)
        scaler.update()
        assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("options", [{}, {"decoding_mode": "denoising", "num_trajectories": 2}])
def test_greedy_text_is_that_of_the_cpu(model, options):
    prompts = tokens(2, 5)
    texts = {}
    for device in ("cpu", "cuda"):
        own = dict(options, generator=torch.Generator().manual_seed(4)) if options else {}
        ids = prompts.to(device)
        texts[device] = model.to(device).generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, pad_token_id=0, **own
        )
    assert texts["cuda"].tolist() == texts["cpu"].tolist()


def test_training_waits_for_the_gpu_only_to_learn_sizes():
    """As `test_modeling.py` counts it by operations: four times in a block, and once in phase 1."""
    input_ids = tokens(8, 32).cuda()
    block, table = (module.cuda().train() for module in block_and_table())
    phase_1 = NoPropForPreTraining(CONFIG).cuda().train()
    jobs = [
        (4, lambda: block(input_ids, input_ids, table).loss),
        (1, lambda: phase_1(input_ids, labels=input_ids).loss),
    ]
    for allowed, compute in jobs:
        compute().backward()  # what happens once
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                compute().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found = [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
        assert len(found) <= allowed, found
