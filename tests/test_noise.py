import math

import pytest
import torch

from noprop_hf.noise_noprop import information_levels, prior_levels, sample_evidence, standardize


def random_table(vocab_size: int, hidden_size: int, seed: int = 0) -> torch.Tensor:
    return standardize(torch.randn(vocab_size, hidden_size, generator=torch.Generator().manual_seed(seed)))


def test_standardized_rows_have_unit_root_mean_square():
    table = standardize(3 + 2 * torch.randn(40, 12))
    assert torch.allclose(table.norm(dim=-1), torch.full((40,), math.sqrt(12)))


@pytest.mark.parametrize("level", [0.02, 1.0, 6.0])
def test_evidence_is_the_variance_preserving_form_in_another_scale(level):
    """`z = sqrt(a) e + sqrt(1-a) eps` becomes the evidence by `s = z sqrt(a) / (1-a)`, noise for noise."""
    embeds = torch.randn(5, 8)
    evidence = sample_evidence(embeds, level, torch.Generator().manual_seed(3))
    eps = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
    alpha = level / (1 + level)
    z = math.sqrt(alpha) * embeds + math.sqrt(1 - alpha) * eps
    assert torch.allclose(evidence, z * math.sqrt(alpha) / (1 - alpha), rtol=1e-4, atol=1e-4)


def test_two_steps_of_evidence_are_distributed_as_one():
    torch.manual_seed(0)
    embeds = torch.randn(1, 6).expand(200_000, 6)
    path = sample_evidence(embeds, 0.3) + sample_evidence(embeds, 0.5)
    assert torch.allclose(path.mean(0), 0.8 * embeds[0], atol=0.01)
    assert torch.allclose(path.T.cov(), 0.8 * torch.eye(6), atol=0.02)


def test_evidence_of_level_zero_is_nothing():
    assert torch.equal(sample_evidence(torch.randn(3, 4), 0.0), torch.zeros(3, 4))


@pytest.mark.parametrize("share", [0.25, 1.0])
@pytest.mark.parametrize("num_blocks", [1, 4, 6])
def test_information_schedule_takes_equal_steps(num_blocks, share):
    """Measured again, with other samples and by the densities of the variance-preserving form."""
    table = random_table(60, 24)
    prior = torch.softmax(torch.randn(60, generator=torch.Generator().manual_seed(1)), -1)
    levels = information_levels(table, prior.log(), num_blocks, share)
    assert levels[0] == 0 and len(levels) == num_blocks

    generator = torch.Generator().manual_seed(2)
    targets = torch.multinomial(prior, 6_000, replacement=True, generator=generator)
    noise = torch.randn(6_000, 24, generator=generator)
    remaining = []
    for level in levels:
        alpha = level / (1 + level)
        z = math.sqrt(alpha) * table[targets] + math.sqrt(1 - alpha) * noise
        density = torch.distributions.Normal(math.sqrt(alpha) * table, math.sqrt(1 - alpha))
        joint = density.log_prob(z[:, None]).sum(-1) + prior.log()
        remaining.append(-joint.log_softmax(-1).gather(1, targets[:, None]).mean())
    entropy = -(prior * prior.log()).sum()
    removed = entropy - torch.stack(remaining)
    assert torch.allclose(removed, share * entropy / num_blocks * torch.arange(num_blocks), atol=0.05)


def test_information_levels_are_the_same_everywhere():
    table = random_table(60, 24)
    assert information_levels(table, torch.zeros(60), 4) == information_levels(table, torch.zeros(60), 4)


def test_first_guess_of_the_information_schedule_is_near_the_measured_one():
    guess = prior_levels("information", 4, 500, 64)
    measured = information_levels(random_table(500, 64), torch.zeros(500), 4)
    assert guess == pytest.approx(measured, rel=0.3)
