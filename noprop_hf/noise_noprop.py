"""Noise: the levels of a chain of blocks, and the path of the evidence over them.

Everything here is in the *evidence form*. A clean embedding ``e`` (every row of the table has ``||e||^2 = d``) is
observed at signal-to-noise ratio ``gamma`` as

    s = gamma * e + sqrt(gamma) * eps,        eps ~ N(0, I).

It carries the same information as the variance-preserving form ``z = sqrt(a) e + sqrt(1 - a) eps`` with
``a = gamma / (1 + gamma)`` (``s = z sqrt(a) / (1 - a)``), in the scale in which Bayes' rule is additive:
``log p(y | s) = log p(y) + <s, e_y> + const`` because all rows have the same norm. Over growing levels, ``s`` is a
random walk with drift (stochastic localization; Montanari 2023, arXiv 2305.10690, section 2).
"""

import math

import torch
from torch.nn import functional as F


# How much of a token the evidence tells by the end of the chain. Where it tells more, a block learns little that the
# context has to do with; measured in docs/quality.md.
INFORMATION_SHARE = 1 / 3


def standardize(table: torch.Tensor) -> torch.Tensor:
    """Centre the rows of `table` on their mean and scale each to `||e||^2 = d`.

    Args:
        table (`torch.Tensor` of shape `(vocab_size, hidden_size)`): raw embeddings.

    Returns:
        `torch.Tensor` of the same shape, every row with unit root mean square.
    """
    centred = table - table.mean(dim=0, keepdim=True)
    return F.normalize(centred, dim=-1) * math.sqrt(table.shape[-1])


def sample_evidence(
    embeds: torch.Tensor, level: float | torch.Tensor, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Draw `s = level * e + sqrt(level) * eps` for clean embeddings `embeds` of shape `(..., hidden_size)`.

    `level` is the gain in signal-to-noise ratio, so that adding the result to the evidence at level `g` gives the
    evidence at `g + level`. The draw is in float32 whatever the dtype of `embeds`.
    """
    embeds = embeds.float()
    # A number is filled in on the device: to copy it there, the host would wait for all that the device has to do.
    level = level.to(embeds) if isinstance(level, torch.Tensor) else embeds.new_full((), level)
    if generator is None:
        noise = torch.randn_like(embeds)
    else:  # drawn where the generator lives, so that one seed gives one sequence on every device
        noise = torch.randn(embeds.shape, generator=generator, device=generator.device).to(embeds.device)
    return level * embeds + level.sqrt() * noise


def prior_levels(noise_schedule: str, num_blocks: int, vocab_size: int, hidden_size: int) -> list[float]:
    """Compute the signal-to-noise ratio of each block (block 0 first), without a table.

    - `"cosine"` (Nichol and Dhariwal 2021, arXiv 2102.09672, eq. 17, offset 0): `gamma_b = a_b / (1 - a_b)` with
      `a_b = cos^2(pi/2 (1 - b/N))`;
    - `"information"`: equal steps of information, up to [`INFORMATION_SHARE`] of it. At low signal-to-noise ratio the
      mutual information grows as `gamma d / 2` (I-MMSE; Guo, Shamai, Verdu 2005, arXiv cs/0412108, theorem 1), and a
      uniform token has `log V` nats to give. [`information_levels`] replaces this first guess once the table and the
      token counts are known.
    """
    fractions = [block / num_blocks for block in range(num_blocks)]
    if noise_schedule == "cosine":
        signal = [math.cos(math.pi / 2 * (1 - fraction)) ** 2 if fraction else 0.0 for fraction in fractions]
        return [a / (1 - a) for a in signal]
    if noise_schedule == "information":
        return [2 * INFORMATION_SHARE * math.log(vocab_size) / hidden_size * fraction for fraction in fractions]
    raise ValueError(f"`noise_schedule` must be 'information' or 'cosine', got {noise_schedule!r}.")


def remaining_nats(
    table: torch.Tensor, log_prior: torch.Tensor, level: float, targets: torch.Tensor, noise: torch.Tensor
) -> float:
    """Monte-Carlo estimate, in nats, of what is still unknown of a token after evidence at `level`.

    The cross-entropy of the exact posterior `softmax(log_prior + s E^T)` under the unigram prior.

    Args:
        table (`(vocab_size, hidden_size)`): standardized embeddings.
        log_prior (`(vocab_size,)`): log-probabilities of the tokens.
        targets (`(num_samples,)`): tokens drawn from the prior.
        noise (`(num_samples, hidden_size)`): standard normal draws, the same for every level.
    """
    total = 0.0
    for chunk, eps in zip(targets.split(256), noise.split(256), strict=True):
        evidence = level * table[chunk] + math.sqrt(level) * eps
        total += F.cross_entropy(evidence @ table.T + log_prior, chunk, reduction="sum").item()
    return total / len(targets)


@torch.no_grad()
def information_levels(
    table: torch.Tensor,
    log_prior: torch.Tensor,
    num_blocks: int,
    share: float = INFORMATION_SHARE,
    num_samples: int = 4096,
    seed: int = 24_11_2026,
) -> list[float]:
    """Levels at which the evidence removes the same number of nats from block to block, of a token drawn from the
    unigram prior.

    Block `b` starts where `1 - share * b/N` of the unigram entropy is left. It needs only the table and the token
    counts, so every worker finds the same levels alone.

    Args:
        table (`(vocab_size, hidden_size)`): standardized embeddings.
        log_prior (`(vocab_size,)`): log-probabilities of the tokens, up to a constant.
        num_blocks: number of blocks `N`.
        share: how much of the entropy `N` steps remove.
        num_samples: Monte-Carlo samples; one set serves all levels, so the curve is smooth.
        seed: seed of the samples. An unlikely number on purpose: the samples must not come from the very stream of
            random numbers that a table was initialized with.
    """
    generator = torch.Generator().manual_seed(seed)
    table, log_prior = table.float().cpu(), log_prior.float().cpu().log_softmax(-1)
    targets = torch.multinomial(log_prior.exp(), num_samples, replacement=True, generator=generator)
    noise = torch.randn(num_samples, table.shape[1], generator=generator)

    entropy = -(log_prior.exp() * log_prior).sum().item()
    # The samples' own entropy is known exactly too, and what it is off by is off at every level (a control variate).
    offset = entropy - remaining_nats(table, log_prior, 0.0, targets, noise)

    def nats(level: float) -> float:
        return remaining_nats(table, log_prior, level, targets, noise) + offset

    levels = [0.0]
    for block in range(1, num_blocks):
        goal = entropy * (1 - share * block / num_blocks)
        low, high = levels[-1], max(2 * levels[-1], 2 * entropy / table.shape[1])
        while nats(high) > goal:
            low, high = high, 2 * high
        for _ in range(20):  # bisection: the remaining nats fall with the level
            middle = (low + high) / 2
            low, high = (middle, high) if nats(middle) > goal else (low, middle)
        levels.append((low + high) / 2)
    return levels
