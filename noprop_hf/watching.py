"""Watch the chain of blocks: its beliefs about each generated token as data, as a terminal table and as a figure."""

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from rich.table import Table
from rich.text import Text
from transformers import DynamicCache, PreTrainedTokenizerBase

from .evaluation import encode_prompt
from .generation_noprop import sample_categorical
from .modeling_noprop import NoPropForCausalLM


if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class BlockBelief:
    """The chain's belief at a block.

    Args:
        level: signal-to-noise ratio of the evidence; 0 is pure noise.
        moved_to: the token, drawn from the belief before, that the evidence of the first trajectory moved towards.
        candidates: the likeliest tokens as text with their probabilities, likeliest first.
        probability: the probability of the token that was generated.
    """

    level: float
    moved_to: str | None
    candidates: list[tuple[str, float]]
    probability: float


@dataclass
class WatchedToken:
    """A generated token and the beliefs that led to it.

    Args:
        token_id: the index in the vocabulary.
        token: the token as text, with visible signs for white space.
        text: all text generated so far.
        beliefs: the belief at each block, in order.
    """

    token_id: int
    token: str
    text: str
    beliefs: list[BlockBelief]


@torch.no_grad()
def watch(
    model: NoPropForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int = 8,
    num_candidates: int = 200,
    num_inference_blocks: int | None = None,
    num_trajectories: int = 1,
    temperature: float = 1.0,
    seed: int = 0,
) -> Iterator[WatchedToken]:
    """Generate with the chain, and yield each token with the belief at every block.

    Args:
        num_candidates: number of likeliest tokens to keep per block. With 200, any other token has less than 1/200.
        num_inference_blocks: run only the first blocks; all when not given.
        num_trajectories: chains to average for each token.
        temperature: temperature of the draw from the last belief; below 1e-5, the likeliest token is taken.

    Yields:
        The generated tokens, until the end of the text or `max_new_tokens`.

    Raises:
        ValueError: if the prompt holds no token, or does not fit into the model's window with the new tokens.
    """
    window = model.config.max_position_embeddings
    input_ids = encode_prompt(prompt, tokenizer).to(model.device)
    if input_ids.shape[1] + max_new_tokens > window:
        raise ValueError(
            f"A prompt of {input_ids.shape[1]} tokens and {max_new_tokens} new tokens do not fit into the {window} "
            "tokens that the model was trained for. Shorten the prompt."
        )
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    levels = [block.level for block in model.model.blocks]
    cache = DynamicCache(config=model.config)
    generated: list[int] = []
    while len(generated) < max_new_tokens:
        outputs = model.model(
            input_ids, cache=cache, use_cache=True, logits_to_keep=1, num_inference_blocks=num_inference_blocks
        )
        beliefs, moves = [], []
        for log_probs, drawn in model.chain(outputs.context_states, num_trajectories, generator, outputs.block_logits):
            beliefs.append((log_probs.logsumexp(0) - math.log(num_trajectories)).flatten())
            moves.append(None if drawn is None else token_name(tokenizer, int(drawn.flatten()[0])))
        if temperature < 1e-5:
            token = beliefs[-1].argmax()
        else:
            token = sample_categorical((beliefs[-1] / temperature).log_softmax(-1)[None], generator)[0]
        if token == model.config.eos_token_id:
            return
        generated.append(int(token))
        input_ids = token.view(1, 1)
        yield WatchedToken(
            token_id=int(token),
            token=token_name(tokenizer, int(token)),
            text=tokenizer.decode(generated),
            beliefs=[
                BlockBelief(level, moved_to, _likeliest(belief, tokenizer, num_candidates), belief[token].exp().item())
                for level, moved_to, belief in zip(levels, moves, beliefs, strict=False)
            ],
        )


def _likeliest(belief: torch.Tensor, tokenizer: PreTrainedTokenizerBase, count: int) -> list[tuple[str, float]]:
    top = belief.exp().topk(min(count, len(belief)))
    return [
        (token_name(tokenizer, index), probability)
        for index, probability in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]


def token_name(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """Return the text of a token, or its entry in the vocabulary if the token is a part of a character."""
    text = tokenizer.decode([token_id])
    return f"<{tokenizer.convert_ids_to_tokens(token_id)}>" if "\ufffd" in text else visible(text)


def visible(text: str) -> str:
    """Replace spaces, ends of lines and tabs in a text by visible signs."""
    return text.replace(" ", "\u2423").replace("\n", "\u21b5").replace("\t", "\u21e5")


def table(watched: WatchedToken, num_candidates: int = 4) -> Table:
    """Show a token in a terminal: one row per block with its likeliest tokens, those of high probability in bold."""
    grid = Table(title=Text.assemble("token ", (watched.token, "bold green")), title_justify="left")
    grid.add_column("block", justify="right", min_width=5)
    grid.add_column("\u03b3", justify="right", min_width=5)
    grid.add_column("moved to", min_width=8)
    grid.add_column("the likeliest tokens", no_wrap=True)
    for block, belief in enumerate(watched.beliefs):
        line = Text()
        for token, probability in belief.candidates[:num_candidates]:
            style = "bold green" if token == watched.token else "bold" if probability > 0.2 else "dim"
            line.append(f"{token} ", style).append(f"{probability:.2f}   ", "dim")
        grid.add_row(str(block), f"{belief.level:.3f}" if belief.level else "noise", belief.moved_to or "", line)
    return grid


def figure(prompt: str, tokens: Sequence[WatchedToken]) -> "Figure":
    """Draw the tokens: for each, a map of the probabilities of candidates (columns) at the blocks (rows)."""
    from matplotlib.figure import Figure  # in the extra `plot`, which the terminal table does not need

    columns = min(4, len(tokens))
    rows = -(-len(tokens) // columns)
    num_blocks = len(tokens[0].beliefs)
    size = (3.4 * columns, (1.4 + 0.35 * num_blocks) * rows + 0.6)
    picture = Figure(figsize=size, layout="constrained")
    text = f"{prompt} \u2192 {tokens[-1].text.lstrip(' ')}".replace("\n", "\u21b5").replace("$", r"\$")
    picture.suptitle(textwrap.fill(text, 30 * columns))
    for axes, watched in zip(picture.subplots(rows, columns, squeeze=False).flat, tokens, strict=False):
        names = candidates(watched)
        shares = probabilities(watched, names)
        axes.imshow(shares, cmap="Greens", vmin=0, vmax=1, aspect="auto")
        for row, line in enumerate(shares):
            for column, share in enumerate(line):
                if share >= 0.005:
                    color = "white" if share > 0.6 else "black"
                    axes.text(column, row, f"{share:.2f}", ha="center", va="center", fontsize=7, color=color)
        axes.set_title(watched.token.replace("$", r"\$"), fontweight="bold", color="darkgreen")
        labels = [name.replace("$", r"\$") for name in names]
        axes.set_xticks(range(len(names)), labels, rotation=35, ha="right", rotation_mode="anchor", fontsize=8)
        axes.set_yticks(
            range(num_blocks), [block_name(block, b) for block, b in enumerate(watched.beliefs)], fontsize=7
        )
        for tick, name in zip(axes.get_xticklabels(), names, strict=True):
            if name == watched.token:
                tick.set(fontweight="bold", color="darkgreen")
    for axes in picture.axes[len(tokens) :]:
        axes.set_axis_off()
    return picture


def candidates(watched: WatchedToken, count: int = 6) -> list[str]:
    """Select the tokens for the columns of a figure: the generated token, and the likeliest tokens at any block."""
    best: dict[str, float] = {}
    for belief in watched.beliefs:
        for token, probability in belief.candidates:
            best[token] = max(best.get(token, 0.0), probability)
    names = sorted(best, key=lambda name: best[name], reverse=True)[:count]
    if watched.token not in names:
        names[-1:] = [watched.token]
    return names


def probabilities(watched: WatchedToken, names: Sequence[str]) -> list[list[float]]:
    """Return the probabilities of named tokens (columns) at each block (rows); 0 if not among the candidates."""
    rows = [dict(belief.candidates) | {watched.token: belief.probability} for belief in watched.beliefs]
    return [[row.get(name, 0.0) for name in names] for row in rows]


def block_name(index: int, belief: BlockBelief) -> str:
    return f"block {index}, " + (f"\u03b3 {belief.level:.3f}" if belief.level else "noise")
