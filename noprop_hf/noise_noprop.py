"""Noise: the levels of a chain of blocks, and the path of the evidence from level to level.

Everything here is in the *evidence form*. A clean embedding ``e`` (every row of the table has ``||e||^2 = d``) is
observed at signal-to-noise ratio ``gamma`` as

    s = gamma * e + sqrt(gamma) * eps,        eps ~ N(0, I).

The evidence carries the same information as the variance-preserving form ``z = sqrt(a) e + sqrt(1 - a) eps`` with
``a = gamma / (1 + gamma)`` (``s = z sqrt(a) / (1 - a)``), in the scale in which Bayes' rule is additive:
``log p(y | s) = log p(y) + <s, e_y> + const`` because all rows have the same norm. Over growing levels, ``s`` is a
random walk with drift (stochastic localization; Montanari 2023, arXiv 2305.10690, section 2).
"""

import math

import torch
from torch.nn import functional as F


# Share of a token's entropy that the evidence removes by the end of the chain. With a larger share, blocks learn less
# from the context; measured in docs/quality.md.
INFORMATION_SHARE = 1 / 3


def standardize(table: torch.Tensor) -> torch.Tensor:
    """Subtract the mean of the rows of `table` and scale each row to `||e||^2 = d`.

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
    # Filled in on the device: to copy a number from the host, the host would wait for the device to finish its work.
    level = level.to(embeds) if isinstance(level, torch.Tensor) else embeds.new_full((), level)
    if generator is None:
        noise = torch.randn_like(embeds)
    else:  # drawn on the generator's device, so that a seed gives the same numbers for every device of the model
        noise = torch.randn(embeds.shape, generator=generator, device=generator.device).to(embeds.device)
    return noise.mul_(level.sqrt()).addcmul_(level, embeds)


def prior_levels(noise_schedule: str, num_blocks: int, vocab_size: int, hidden_size: int) -> list[float]:
    """Compute the signal-to-noise ratio of each block (block 0 first), without a table.

    - `"cosine"` (Nichol and Dhariwal 2021, arXiv 2102.09672, eq. 17, offset 0): `gamma_b = a_b / (1 - a_b)` with
      `a_b = cos^2(pi/2 (1 - b/N))`;
    - `"information"`: equal steps of information, up to the share [`INFORMATION_SHARE`]. At low signal-to-noise ratio
      the mutual information grows as `gamma d / 2` (I-MMSE; Guo, Shamai, Verdu 2005, arXiv cs/0412108, theorem 1), and
      a uniform token has an entropy of `log V` nats. [`information_levels`] replaces this first guess once the table
      and the token counts are known.
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
    """Estimate the remaining entropy of a token after evidence at `level`, in nats, by Monte Carlo.

    This is the cross-entropy of the exact posterior `softmax(log_prior + s E^T)` under the unigram prior.

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
    """Compute levels at which the evidence removes the same number of nats from block to block.

    Tokens are drawn from the unigram prior. At the level of block `b`, the share `1 - share * b/N` of the unigram
    entropy remains. Levels depend on the table and the token counts only, so all workers compute the same levels.

    Args:
        table (`(vocab_size, hidden_size)`): standardized embeddings.
        log_prior (`(vocab_size,)`): log-probabilities of the tokens, up to a constant.
        num_blocks: number of blocks `N`.
        share: share of the entropy that `N` steps remove.
        num_samples: Monte-Carlo samples; one set serves all levels, so the curve is smooth.
        seed: seed of the samples. It is an unlikely number, since the samples must not repeat the random numbers that
            the table was initialized with.
    """
    generator = torch.Generator().manual_seed(seed)
    table, log_prior = table.float().cpu(), log_prior.float().cpu().log_softmax(-1)
    targets = torch.multinomial(log_prior.exp(), num_samples, replacement=True, generator=generator)
    noise = torch.randn(num_samples, table.shape[1], generator=generator)

    entropy = -(log_prior.exp() * log_prior).sum().item()
    # Control variate: the sampling error at level 0 is known exactly, and shared by all levels.
    offset = entropy - remaining_nats(table, log_prior, 0.0, targets, noise)

    def nats(level: float) -> float:
        return remaining_nats(table, log_prior, level, targets, noise) + offset

    levels = [0.0]
    for block in range(1, num_blocks):
        goal = entropy * (1 - share * block / num_blocks)
        low, high = levels[-1], max(2 * levels[-1], 2 * entropy / table.shape[1])
        before, last = (low, entropy * share / num_blocks), (high, nats(high) - goal)
        while last[1] > 0:
            low, high, before, last = high, 2 * high, last, (2 * high, nats(2 * high) - goal)
        # Secants, each continued by a cell of the bisection, enclose the root between two close levels. The remaining
        # nats fall with the level, so the bisection needs them only beside the root.
        left, right, cell = low, high, (high - low) / 2**20
        while right - left > 2 * cell:
            (x, y), (end, excess) = before, last
            level = end + excess * (end - x) / (y - excess) + math.copysign(cell, excess) if y != excess else left
            level = level if left < level < right else (left + right) / 2
            before, last = last, (level, nats(level) - goal)
            left, right = (level, right) if last[1] > 0 else (left, level)
        for _ in range(20):
            middle = (low + high) / 2
            is_near = left - cell < middle < right + cell  # closer than the nats resolve
            is_above = nats(middle) > goal if is_near else middle < left
            low, high = (middle, high) if is_above else (low, middle)
        levels.append((low + high) / 2)
    return levels
