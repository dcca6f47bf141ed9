#!/usr/bin/env python
"""A page that generates text and shows the chain of blocks turn noise into each token; ready for a Space.

python space/app.py runs/demo
MODEL=user/name python space/app.py
"""

import base64
import io
import os
import random
import sys
from bisect import bisect_left
from collections.abc import Iterator
from functools import partial
from html import escape
from pathlib import Path

import gradio as gr
from transformers import PreTrainedTokenizerBase

from noprop_hf import NoPropForCausalLM
from noprop_hf.data import load_tokenizer
from noprop_hf.evaluation import load_model
from noprop_hf.watching import WatchedToken, block_name, candidates, figure, probabilities, watch


INTRODUCTION = (
    "# Text out of noise, block by block\n"
    "Each block of this language model was trained by itself, and for every token the chain of blocks turns pure noise "
    "into a belief about what comes next. A map shows one token: rows are blocks, with the signal-to-noise ratio "
    "\u03b3 of what they see, columns are likely tokens, the shade is their probability, and \u2713 is the token taken."
)
PAPER = "https://arxiv.org/abs/2503.24322"
HUB = "https://huggingface.co"
EXAMPLES = ["Return the", "If the file does not exist,", "The first of these functions"]
LONGEST_PROMPT = 10_000  # characters, of which only the last ones are used
CSS = """
& { white-space: pre-wrap; overflow-wrap: anywhere; }
.prompt { opacity: .6; }
.generated { font-weight: 600; }
.notice { margin: 0; }
.map { display: inline-block; max-width: 100%; margin: 0 1.5rem 1rem 0; overflow-x: auto; vertical-align: top; }
/* A shadow at each edge beyond which there is more; covers that move with the table hide it at the table's ends. */
.map {
  --cover: var(--body-background-fill) 30%, transparent;
  --shadow: rgb(128 128 128 / .7), transparent;
  background:
    linear-gradient(to right, var(--cover)) left / 2.5rem 100% no-repeat local,
    linear-gradient(to left, var(--cover)) right / 2.5rem 100% no-repeat local,
    linear-gradient(to right, var(--shadow)) left / .8rem 100% no-repeat scroll,
    linear-gradient(to left, var(--shadow)) right / .8rem 100% no-repeat scroll;
}
.map table { width: auto; margin: 0; border-spacing: 2px; border-collapse: separate; font-size: .8rem; }
.map table, .map tr, .map th, .map td { border: 0; }
.map caption { font-weight: 600; text-align: left; }
.map th { padding: 0 .4rem; font-weight: 400; text-align: center; white-space: nowrap; }
.map tbody th { opacity: .75; text-align: right; }
.map td { min-width: 2.8rem; height: 1.4rem; padding: 0 .2rem; border-radius: 3px; text-align: center; }
.map tbody td { background: rgb(0 120 50 / calc(.04 + .96 * var(--share))); }
.map th.taken { font-weight: 700; text-decoration: underline; }
.map td.taken { outline: 1px solid currentColor; }
.map td.sure { color: white; }
"""


def heat_map(watched: WatchedToken) -> str:
    """The denoising of a token as an HTML table: blocks (rows), candidate tokens (columns), and their probabilities.

    Args:
        watched: a token of `noprop_hf.watching.watch`.
    """
    names = candidates(watched)
    heads = "".join(
        f'<th scope="col" class="taken" title="the token taken">\u2713 {escape(name)}</th>'
        if name == watched.token
        else f'<th scope="col">{escape(name)}</th>'
        for name in names
    )
    rows = ""
    for index, (belief, shares) in enumerate(zip(watched.beliefs, probabilities(watched, names), strict=True)):
        block = escape(block_name(index, belief))
        rows += f'<tr><th scope="row">{block}</th>'
        for name, share in zip(names, shares, strict=True):
            classes = "taken " * (name == watched.token) + "sure" * (share > 0.75)
            number = f"{share:.2f}" if share >= 0.005 else ""
            rows += (
                f'<td class="{classes.strip()}" style="--share: {share:.3f}" '
                f'title="{block}: {escape(name)} {number or "below 0.005"}">{number}</td>'
            )
        rows += "</tr>"
    return (
        f'<div class="map"><table><caption>{escape(watched.token)}</caption>'
        f"<thead><tr><td></td>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def fit_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> str:
    """The longest end of a prompt that has no more than some number of tokens."""
    if tokenizer.bos_token_id is not None:
        max_tokens -= 1

    def fits(start: int) -> bool:
        return len(tokenizer(prompt[start:], add_special_tokens=False)["input_ids"]) <= max_tokens

    return prompt[bisect_left(range(len(prompt)), True, key=fits) :]


def generate(
    model: NoPropForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | None,
    num_inference_blocks: int,
    num_trajectories: int,
    temperature: float,
    max_new_tokens: int,
    new_seed: bool,
    seed: int,
) -> Iterator[tuple[int, str, str, str]]:
    """Generate as `noprop_hf.watching.watch` does, for the page.

    Args:
        prompt: the text to continue; its end is kept when it does not fit into the model's window, and of a very long
            one only the end is read.
        new_seed: whether to draw a seed in place of `seed`.

    Yields:
        After each token, the seed that is used and, as HTML, the text, what has to be said of it, and the maps of its
        tokens.
    """
    prompt = prompt or ""
    seed = random.randrange(10**6) if new_seed else seed
    kept = fit_prompt(prompt[-LONGEST_PROMPT:], tokenizer, model.config.max_position_embeddings - max_new_tokens)
    text, notice, maps, tokens = f'<span class="prompt">{escape(kept)}</span>', "", "", []
    if kept != prompt:
        notice = f"The prompt is too long for the model's window: its last {len(kept)} characters are used. "
    yield seed, text, note(notice), maps
    try:
        for watched in watch(
            model,
            tokenizer,
            kept,
            max_new_tokens=max_new_tokens,
            num_inference_blocks=num_inference_blocks,
            num_trajectories=num_trajectories,
            temperature=temperature,
            seed=seed,
        ):
            tokens.append(watched)
            maps += heat_map(watched)
            yield seed, f'{text}<span class="generated">{escape(watched.text)}</span>', note(notice), maps
    except ValueError as error:  # says what is wrong and what to do
        yield seed, text, note(str(error)), maps
        return
    if len(tokens) < max_new_tokens:
        notice += f"The model ended the text after {len(tokens)} tokens. "
    link = ""
    if tokens:
        text += f'<span class="generated">{escape(tokens[-1].text)}</span>'
        link = download_link(kept, tokens)
    yield seed, text, note(notice, link), maps


def links(model_name: str) -> str:
    """Where model, paper and code are, as Markdown. What is on the disk of this machine has no address."""
    found, space = [f"[Paper]({PAPER})"], os.environ.get("SPACE_ID")
    if not Path(model_name).exists():
        found.insert(0, f"[Model {model_name}]({HUB}/{model_name})")
        found.append(f"[Code of the model]({HUB}/{model_name}/tree/main)")
    if space:
        found.append(f"[Code of this page]({HUB}/spaces/{space}/tree/main)")
    return " \u00b7 ".join(found)


def note(notice: str, link: str = "") -> str:
    return f'<p class="notice" role="status">{escape(notice)}{link}</p>'


def download_link(prompt: str, tokens: list[WatchedToken]) -> str:
    """The maps as a picture, inside of the link that saves it: there are no files to clean up."""
    file = io.BytesIO()
    figure(prompt[-40:], tokens).savefig(file, format="png", dpi=120)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<a download="chain.png" href="data:image/png;base64,{data}">Download the maps as a picture</a>'


def build(model: NoPropForCausalLM, tokenizer: PreTrainedTokenizerBase) -> gr.Blocks:
    """The page.

    Args:
        model: what generates.
        tokenizer: of the same vocabulary.
    """
    num_blocks, window = model.config.num_blocks, model.config.max_position_embeddings
    most = min(64, window // 2)  # half of a small window is left to the prompt
    with gr.Blocks(title="NoProp: text out of noise", analytics_enabled=False) as page:
        gr.Markdown(f"{INTRODUCTION}\n\n{links(model.name_or_path)}")
        with gr.Row():
            with gr.Column(scale=3):
                prompt = gr.Textbox(  # of one line, so that Enter submits it; it grows
                    label="Prompt",
                    info="Enter generates, Shift and Enter begin a line. A blank at the end would begin the next word.",
                    placeholder="A text to continue",
                    lines=1,
                    max_lines=8,
                    max_length=LONGEST_PROMPT,
                )
                gr.Examples(EXAMPLES, prompt)
                button = gr.Button("Generate", variant="primary")
            with gr.Column(scale=2):
                sliders = [
                    gr.Slider(1, num_blocks, num_blocks, step=1, label="Blocks"),
                    gr.Slider(1, 16, 1, step=1, label="Trajectories", info="chains to average"),
                    gr.Slider(0, 2, 1, step=0.05, label="Temperature", info="0 takes the likeliest token"),
                    gr.Slider(1, most, min(12, most), step=1, label="New tokens"),
                ]
                with gr.Row():
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**32 - 1, min_width=120)
                    new_seed = gr.Checkbox(True, label="New seed each time", min_width=120)
        outputs = [gr.HTML(elem_id=name, css_template=CSS) for name in ("text", "notice", "maps")]
        gr.on(
            [button.click, prompt.submit],
            partial(generate, model, tokenizer),
            [prompt, *sliders, new_seed, seed],
            [seed, *outputs],
            api_name="generate",
            show_progress="minimal",
            show_progress_on=outputs,
        )
    return page


def launch(page: gr.Blocks, **options) -> str:
    """Serve a page; returns its address.

    Args:
        options: of `gradio.Blocks.launch`.
    """
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}  # the reader's own: nothing is fetched
    theme = gr.themes.Default(primary_hue="green", **fonts)
    return page.launch(theme=theme, footer_links=[], ssr_mode=False, **options)[1]


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("MODEL", str(Path(__file__).parent / "model"))
    try:
        model = load_model(name)
        tokenizer = load_tokenizer(name, model.config.vocab_size)
    except ValueError as error:
        sys.exit(
            f"Cannot load a model from {name!r}: {error}\nName a model directory, or a repository of the Hub that can "
            "be reached, as the first argument or in the environment variable MODEL (on a Space: Settings, Variables)."
        )
    launch(build(model, tokenizer))


if __name__ == "__main__":
    main()
