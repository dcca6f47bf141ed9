"""What is shown of the chain is what the chain does."""

import io

import pytest
import torch
from rich.console import Console

from conftest import run_python
from noprop_hf.data import train_tokenizer
from noprop_hf.evaluation import encode_prompt
from noprop_hf.watching import candidates, figure, probabilities, table, token_name, visible, watch


def test_it_shows_the_tokens_that_generate_gives(writer, tokenizer):
    prompt = encode_prompt("the cat", tokenizer)
    tokens = list(watch(writer, tokenizer, "the cat", max_new_tokens=6, num_trajectories=3, temperature=0, seed=4))
    expected = writer.generate(
        prompt,
        max_new_tokens=6,
        do_sample=False,
        decoding_mode="denoising",
        num_trajectories=3,
        generator=torch.Generator().manual_seed(4),
    )[0, prompt.shape[1] :].tolist()
    assert [token.token_id for token in tokens] == [i for i in expected if i != tokenizer.eos_token_id]
    assert tokens[-1].text == tokenizer.decode([token.token_id for token in tokens])


def test_beliefs_are_distributions_and_the_first_is_that_of_block_0(writer, tokenizer):
    (token,) = watch(writer, tokenizer, "birds", max_new_tokens=1, num_candidates=len(tokenizer), seed=1)
    assert [belief.level for belief in token.beliefs] == writer.config.noise_levels
    assert token.beliefs[0].moved_to is None and token.beliefs[1].moved_to is not None
    for belief in token.beliefs:
        shares = [share for _, share in belief.candidates]
        assert sum(shares) == pytest.approx(1, abs=1e-4)
        assert shares == sorted(shares, reverse=True)
        assert belief.probability in [pytest.approx(share) for name, share in belief.candidates if name == token.token]
    with torch.no_grad():
        alone = writer(encode_prompt("birds", tokenizer), num_inference_blocks=1).logits[0, -1]
    assert token.beliefs[0].candidates[0] == (
        visible(tokenizer.decode([alone.argmax().item()])),
        pytest.approx(alone.exp().max().item(), rel=1e-4),
    )


def test_tokens_have_names_of_their_own():
    """Those, too, that are parts of characters, whose text is a replacement sign alike."""
    tokenizer = train_tokenizer(["caf\u00e9 na\u00efve \u4f60\u597d\n"] * 9, 300, 16)
    names = [token_name(tokenizer, index) for index in range(len(tokenizer))]
    assert len(set(names)) == len(names)
    assert "\u2423na\u00efve" in names


def test_fewer_blocks_and_a_seed(writer, tokenizer):
    runs = [
        [token.text for token in watch(writer, tokenizer, "a mat", num_inference_blocks=1, seed=seed)]
        for seed in (2, 2, 3)
    ]
    assert runs[0] == runs[1] != runs[2]
    (token,) = watch(writer, tokenizer, "a mat", 1, num_inference_blocks=1)
    assert len(token.beliefs) == 1


def test_a_prompt_that_does_not_fit(writer, tokenizer):
    with pytest.raises(ValueError, match="do not fit into the 32 .* Shorten the prompt"):
        next(watch(writer, tokenizer, "the cat sat on a mat " * 20))


def test_the_table_and_the_picture_show_every_block(writer, tokenizer):
    tokens = list(watch(writer, tokenizer, "the $old$", max_new_tokens=5, seed=1))
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(table(tokens[0], 3))
    shown = console.export_text()
    for belief in tokens[0].beliefs:
        for name, share in belief.candidates[:3]:
            assert f"{name} {share:.2f}" in shown
        assert len(belief.candidates) > 3
    picture = figure("the $old$", tokens)
    panels = [axes for axes in picture.axes if axes.images]
    assert len(panels) == 5
    for axes, token in zip(panels, tokens, strict=True):
        names = candidates(token)
        assert token.token in names
        shares = probabilities(token, names)
        assert axes.images[0].get_array().tolist() == shares
        assert [row[names.index(token.token)] for row in shares] == [belief.probability for belief in token.beliefs]
        assert len(shares) == writer.config.num_blocks


@pytest.mark.slow
def test_script_without_matplotlib_and_with_bad_input(trained, tmp_path):
    def run(script: str, *options: str, fails: bool = False) -> str:
        begin = f"import runpy, sys; sys.modules['matplotlib'] = None; sys.argv = {[script, str(trained), *options]}"
        return run_python("-c", f"{begin}; runpy.run_path(sys.argv[0], run_name='__main__')", fails=fails)

    assert "likeliest" in run("scripts/watch.py", "a", "--max_new_tokens", "1")
    shown = run("scripts/plot_run.py", fails=True)
    assert "pip install matplotlib" in shown and "Traceback" not in shown
    for script in ("watch", "generate"):
        shown = run_python(f"scripts/{script}.py", str(tmp_path / "absent"), "a", fails=True)
        assert "absent" in shown and "Traceback" not in shown
    shown = run_python("scripts/watch.py", str(trained), "the cat " * 99, fails=True)
    assert "Shorten the prompt" in shown and "Traceback" not in shown


@pytest.mark.slow
def test_script(trained, tmp_path):
    picture = tmp_path / "chain.png"
    shown = run_python("scripts/watch.py", str(trained), "the cat", "--max_new_tokens", "3", "--save", str(picture))
    assert shown.count("likeliest tokens") == 3
    assert picture.read_bytes().startswith(b"\x89PNG")
