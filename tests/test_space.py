"""The page of `space/`: what it renders, and the page itself in a real browser."""

import copy
import importlib.util
import io
import os
import re
import shutil
import sys
from collections.abc import Callable
from html import unescape
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import yaml
from transformers import GPT2Config, GPT2LMHeadModel

from conftest import ROOT
from noprop_hf.evaluation import encode_prompt
from noprop_hf.watching import BlockBelief, WatchedToken


gradio = pytest.importorskip("gradio")
spec = importlib.util.spec_from_file_location("space_app", ROOT / "space" / "app.py")
app = importlib.util.module_from_spec(spec)
spec.loader.exec_module(app)

WINDOW = 32  # of the `writer`
LONG = "the <b>cat</b> sat on a mat " * 200


def all_of(model, tokenizer, prompt="the cat", temperature=1.0, new_seed=False, seed=0):
    """All that the page is given, of two blocks, one trajectory and three tokens."""
    return list(app.generate(model, tokenizer, prompt, 2, 1, temperature, 3, new_seed, seed))


# --- without a browser ------------------------------------------------------------------------------------------------


def test_heat_map():
    token = '<i>"&'
    beliefs = [
        BlockBelief(0.0, None, [("cat", 0.81), (token, 0.1239), ("dog", 0.004)], 0.1239),
        BlockBelief(0.25, "cat", [(token, 0.6), ("cat", 0.3)], 0.6),
    ]
    html = app.heat_map(WatchedToken(7, token, "so far", beliefs))
    cells = [[unescape(text) for text in re.findall(r"<t[hd][^>]*>([^<]*)<", row)] for row in html.split("<tr>")[1:]]
    assert cells == [
        ["", "cat", f"\u2713 {token}", "dog"],
        ["block 0, noise", "0.81", "0.12", ""],
        ["block 1, \u03b3 0.250", "0.30", "0.60", ""],
    ]
    assert "<i>" not in html
    taken = re.findall(r'<td class="taken[^>]*--share: ([\d.]+)[^>]*title="([^"]*)"', html)
    assert [(share, unescape(title)) for share, title in taken] == [
        ("0.124", f"block 0, noise: {token} 0.12"),
        ("0.600", f"block 1, \u03b3 0.250: {token} 0.60"),
    ]


def test_text_and_maps_arrive_token_by_token(writer, tokenizer):
    _, texts, notices, maps = zip(*all_of(writer, tokenizer), strict=True)
    assert [html.count("<table>") for html in maps] == [0, 1, 2, 3, 3]
    assert all(later.startswith(earlier) for earlier, later in zip(maps, maps[1:], strict=False))
    assert len(set(texts[:4])) == 4 and texts[4] == texts[3]
    assert ["download=" in notice for notice in notices] == [False] * 4 + [True]


def test_seeds(writer, tokenizer):
    """A new one each time, with which the same text comes again."""
    drawn, other = (all_of(writer, tokenizer, new_seed=True) for _ in range(2))
    ((seed,), (other_seed,)) = ({seed for seed, *_ in steps} for steps in (drawn, other))
    assert all_of(writer, tokenizer, seed=seed) == drawn and seed != other_seed


def test_links(writer, tmp_path, monkeypatch):
    monkeypatch.delenv("SPACE_ID", raising=False)
    assert re.findall(r"\((.*?)\)", app.links(str(tmp_path))) == ["https://arxiv.org/abs/2503.24322"]
    monkeypatch.setenv("SPACE_ID", "user/page")
    assert re.findall(r"\((.*?)\)", app.links("user/name")) == [
        "https://huggingface.co/user/name",
        "https://arxiv.org/abs/2503.24322",
        "https://huggingface.co/user/name/tree/main",
        "https://huggingface.co/spaces/user/page/tree/main",
    ]


def test_maps_say_what_is_believed(writer, tokenizer):
    *_, (*_, maps) = all_of(writer, tokenizer, temperature=0.0)
    for table in maps.split("<table>")[1:]:
        last = re.findall(r'<td class="([^"]*)" style="--share: ([\d.]+)"', table)[-6:]
        assert [share for name, share in last if "taken" in name] == [max(share for _, share in last)]


def test_a_prompt_of_any_length_costs_little(writer, tokenizer, monkeypatch):
    lengths, fit_prompt = [], app.fit_prompt

    def fit(prompt, *args):
        lengths.append(len(prompt))
        return fit_prompt(prompt, *args)

    monkeypatch.setattr(app, "fit_prompt", fit)
    *_, (*_, notice, _) = all_of(writer, tokenizer, "the cat " * 10**6)
    assert "its last" in notice and max(lengths) <= app.LONGEST_PROMPT
    assert all_of(writer, tokenizer, None)[-1][1] == all_of(writer, tokenizer, "")[-1][1]


@pytest.mark.parametrize("text", [LONG, "\U0001f63a" * 50, "x" * 5000])
def test_the_end_of_a_long_prompt_is_kept(text, tokenizer):
    kept = app.fit_prompt(text, tokenizer, 20)
    longer = text[-len(kept) - 1 :]
    assert kept and longer.endswith(kept)
    assert encode_prompt(kept, tokenizer).shape[1] <= 20 < encode_prompt(longer, tokenizer).shape[1]
    assert app.fit_prompt(kept, tokenizer, 20) == kept


def test_an_empty_prompt_without_a_token_that_begins_a_text(writer, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = tokenizer.eos_token = None
    *_, (*_, notice, maps) = all_of(writer, tokenizer, prompt="")
    assert "must not be empty" in notice and maps == ""


def test_a_text_that_ends_early(writer, tokenizer):
    writer = copy.deepcopy(writer)
    writer.config.eos_token_id = [watched.token_id for watched in app.watch(writer, tokenizer, "the cat", 3)][1]
    *_, (_, text, notice, maps) = all_of(writer, tokenizer)
    assert "ended the text after 1 tokens" in notice and maps.count("<table>") == 1 and "generated" in text


def test_main_loads_what_it_is_told_to(writer, tokenizer, tmp_path, monkeypatch):
    pages = []
    monkeypatch.setattr(app, "launch", pages.append)
    for part in (writer, tokenizer):
        part.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(sys, "argv", ["app.py", str(tmp_path / "model")])
    monkeypatch.setenv("MODEL", "not/this")
    app.main()
    monkeypatch.setattr(sys, "argv", ["app.py"])
    monkeypatch.setenv("MODEL", str(tmp_path / "model"))
    app.main()
    assert [type(page) for page in pages] == [gradio.Blocks] * 2


@pytest.mark.parametrize("name", [None, "no/model", "stock"])
def test_main_says_what_to_do(name, tokenizer, tmp_path, monkeypatch):
    stock = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_layer=1, n_embd=8, n_head=1))
    for part in (stock, tokenizer):
        part.save_pretrained(tmp_path / "stock")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["app.py"])
    monkeypatch.delenv("MODEL", raising=False)
    if name:
        monkeypatch.setenv("MODEL", name)
    else:
        monkeypatch.setattr(app, "__file__", str(tmp_path / "app.py"))
    told = "of type 'gpt2'" if name == "stock" else "in the environment variable MODEL"
    with pytest.raises(SystemExit, match=told):
        app.main()


def test_header_and_requirements_name_the_tested_versions():
    header = yaml.safe_load((ROOT / "space" / "README.md").read_text().split("---")[1])
    assert header["sdk_version"] == gradio.__version__
    assert (ROOT / "space" / header["app_file"]).exists() and len(header["short_description"]) <= 60
    pins = (ROOT / "space" / "requirements.txt").read_text().lower().split("\n")[1:-1]
    assert pins and set(pins) <= set((ROOT / "constraints.txt").read_text().lower().split("\n"))


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        names = ("chromium", "chromium-browser", "google-chrome")
        installed = [os.environ.get("CHROMIUM"), *map(shutil.which, names), playwright.chromium.executable_path]
        executable = next(path for path in installed if path)
        if not Path(executable).exists():
            pytest.skip("There is no Chromium. Install one, or name it in the environment variable CHROMIUM.")
        with playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"]) as browser:
            yield browser


@pytest.fixture(scope="module")
def address(writer, tokenizer) -> str:
    page = app.build(writer, tokenizer)
    yield app.launch(page, prevent_thread_lock=True, quiet=True)
    page.close(verbose=False)


@pytest.fixture
def page(browser, address):
    """The page, which must neither complain nor ask another host for anything."""
    page, troubles = browser.new_page(), []
    page.set_default_timeout(20_000)
    page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda request: troubles.append(request.url) if foreign(request.url) else None)

    def foreign(url: str) -> bool:
        return not url.startswith((address, "data:", "blob:"))

    page.goto(address)
    yield page
    page.close()
    assert troubles == []


def press(page, prompt: str, **sliders: int) -> None:
    """Generate two tokens, or as said, and wait for the end."""
    page.get_by_label("Prompt").fill(prompt)
    for label, value in ({"New tokens": 2} | sliders).items():
        page.get_by_label(f"number input for {label}").fill(str(value))
        page.keyboard.press("Tab")
    submit(page, page.get_by_role("button", name="Generate").click)


def submit(page, action: Callable[[], None]) -> None:
    """Start to generate and wait for the end, which has a new link."""
    page.evaluate("document.querySelector('a[download]')?.remove()")
    action()
    page.wait_for_selector("a[download]")


@pytest.mark.slow
def test_page_generates(page, tmp_path):
    press(page, "the cat", **{"New tokens": 3})
    assert page.title() == "NoProp: text out of noise"
    assert page.locator("#text .prompt").text_content() == "the cat"
    assert page.locator("#text .generated").text_content()
    maps = page.locator("#maps table")
    assert maps.count() == 3
    for table in maps.all():
        assert table.locator("tbody tr").count() == 2 and table.locator("thead .taken").count() == 1
    with page.expect_download() as download:
        page.click("a[download]")
    download.value.save_as(tmp_path / "chain.png")
    assert (tmp_path / "chain.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_page_runs_the_first_block_alone(page):
    press(page, "the cat", Blocks=1)
    assert [table.locator("tbody tr").count() for table in page.locator("#maps table").all()] == [1, 1]


@pytest.mark.slow
def test_page_generates_on_enter_and_keeps_a_seed(page):
    seed, kept = page.get_by_label("Seed", exact=True), page.get_by_label("New seed each time")
    kept.uncheck()
    seed.fill("77")
    press(page, "the cat")
    assert seed.input_value() == "77"
    kept.check()
    submit(page, lambda: page.get_by_label("Prompt").press("Enter"))
    drawn, text = seed.input_value(), page.locator("#text .generated").text_content()
    assert drawn != "77"
    kept.uncheck()
    press(page, "the cat")
    assert seed.input_value() == drawn and page.locator("#text .generated").text_content() == text
    page.get_by_label("Prompt").press("Shift+Enter")
    assert page.get_by_label("Prompt").input_value() == "the cat\n"


@pytest.mark.slow
def test_maps_on_a_phone_show_that_they_scroll(page):
    """A pixel at the right edge of a map is darker than one beside it as long as there is more to the right."""
    page.set_viewport_size({"width": 260, "height": 1200})
    press(page, "the cat")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    a_map = page.locator(".map").first
    width, shown = a_map.evaluate("map => [map.scrollWidth, map.clientWidth]")
    assert width > shown

    def edges() -> list[float]:
        """Brightness of the first and of the last columns, as most of their pixels have it."""
        picture = plt.imread(io.BytesIO(a_map.screenshot()))[..., :3].mean(-1)
        return [np.median(picture[:, column]).item() for column in (1, -2)]

    beginning = edges()
    a_map.evaluate("map => map.scrollTo(map.scrollWidth, 0)")
    end = edges()
    assert beginning[0] > beginning[1] + 0.1 and end[1] > end[0] + 0.1


@pytest.mark.slow
def test_page_takes_an_example_and_an_empty_prompt(page):
    page.get_by_role("button", name=app.EXAMPLES[0]).click()
    page.wait_for_function("prompt => document.querySelector('textarea').value === prompt", arg=app.EXAMPLES[0])
    press(page, "")
    assert page.locator("#text .prompt").text_content() == ""
    assert page.locator("#text .generated").text_content() and page.locator("#maps table").count() == 2


@pytest.mark.slow
def test_page_keeps_the_end_of_a_long_prompt(page, tokenizer):
    press(page, LONG)
    kept = page.locator("#text .prompt").text_content()
    assert kept == app.fit_prompt(LONG, tokenizer, WINDOW - 2)
    assert f"too long for the model's window: its last {len(kept)} characters" in page.inner_text("#notice")
    assert page.locator("#text .generated").text_content() and page.locator("#maps table").count() == 2


@pytest.mark.slow
def test_page_shows_html_as_text(page):
    prompt = "<b id=x>${1+1}{{2}}"
    press(page, prompt)
    assert page.locator("#text .prompt").text_content() == prompt
    assert page.locator("#x").count() == 0
