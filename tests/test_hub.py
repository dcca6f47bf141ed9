"""Pushing to and loading from a Hub over HTTP, with the real `huggingface_hub` client in processes of its own."""

import ast
import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants
from markdown_it import MarkdownIt
from safetensors.torch import load_file

from conftest import ROOT, programs, run_python
from hub_server import TOKEN, Fault, HubServer
from noprop_hf import NoPropConfig, NoPropForCausalLM, NoPropForPreTraining
from noprop_hf.evaluation import ModelNats, results_table
from noprop_hf.hub import model_card, push_model
from noprop_hf.model_directory import create_model_directory, save_block


pytestmark = pytest.mark.slow
INPUT = "torch.arange(12).view(2, 6)"


@pytest.fixture
def server() -> HubServer:
    programs().forget()
    return programs().hub


@pytest.fixture
def model(config, tokenizer) -> NoPropForCausalLM:
    """A model with as many embeddings as the tokenizer has entries."""
    torch.manual_seed(0)
    return NoPropForCausalLM(NoPropConfig(**config.to_dict() | {"vocab_size": len(tokenizer)})).eval()


@pytest.fixture
def directory(model, tokenizer, tmp_path) -> Path:
    """What a run of `scripts/train.py` leaves, without the run."""
    path = tmp_path / "model"
    create_model_directory(path, model.config, tokenizer, model.model.embed_tokens)
    for block in model.model.blocks:
        save_block(path, block, model.model.embed_tokens, {"steps": "7", "seconds": "1.5"})
    NoPropForPreTraining(model.config).save_pretrained(path / "pretraining")
    (path / "checkpoints").mkdir()
    (path / "checkpoints" / "optimizer.pt").write_bytes(b"not to be shared")
    (path / "corpus.yaml").write_text("dataset_name: someone/texts\n")
    nats = ModelNats(2.5, [2.6, 2.7, 2.8], 2.55, [2.6, -0.04, -0.01], [0.1, 0.01, 0.01], 1000)
    rows = [
        ("NoProp, all blocks", {"validation": 2.4, "test": 2.5}),
        ("unigram counts", {"validation": 3, "test": 3.1}),
    ]
    results = {
        "nats_per_token": dict(rows),
        "details": {split: dataclasses.asdict(nats) for split in ("validation", "test")},
        "table": results_table(rows, ["validation", "test"]),
        "samples": [["the cat", ' sat "down"\nand slept'], ["a", "b"]],
    }
    (path / "results.json").write_text(json.dumps(results))
    return path


def test_card_of_a_model_without_samples(directory):
    results = json.loads((directory / "results.json").read_text())
    (directory / "results.json").write_text(json.dumps(results | {"samples": []}))
    assert "tokenizer('The', " in str(model_card(directory, "user/tiny"))


class Page(HTMLParser):
    """What a reader sees of HTML: the text of each element of some kinds, and all kinds of elements."""

    def __init__(self, html: str):
        super().__init__()
        self.texts: dict[str, list[str]] = {"pre": [], "b": [], "h1": [], "h2": []}
        self.tags, self.open = set(), []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag in self.texts:
            self.open.append(tag)
            self.texts[tag].append("")

    def handle_endtag(self, tag):
        if tag in self.texts:
            assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in self.open:
            self.texts[tag][-1] += data


NASTY = [
    ("```", "```\n~~~\n````python\nrm -rf\n```"),
    ("</pre><script>alert(1)</script>", "<!-- \n\n</b></pre>\n<img src=x onerror=alert(1)>\n<h1>big</h1>"),
    ("**bold** _it_", "\n\n# heading\n\n---\n\n- a\n\n| a | b |\n| - | - |\n![x](y) [z](javascript:a) \\* $$x$$"),
    ("{{ config }} {% if %}", "{# no #} &amp; &lt; `x` \t'\" \U0001f63a \u2028 end  "),
    ("\n\nback\\slash 'and' \"quotes\" \U0001f63a", ""),
]


@pytest.mark.parametrize("first", range(len(NASTY)))
def test_no_sample_breaks_the_card(directory, model, first):
    samples = NASTY[first:] + NASTY[:first]  # the first one is the prompt of the example, too
    results = json.loads((directory / "results.json").read_text())
    plain = ModelCard(str(model_card(directory, "user/__tiny__")))
    (directory / "results.json").write_text(json.dumps(results | {"samples": samples}))
    card = ModelCard(str(model_card(directory, "user/__tiny__")))
    assert card.data.to_dict() == plain.data.to_dict()
    markdown = MarkdownIt("commonmark").enable("table")
    tokens = markdown.parse(card.text)
    page, expected = Page(markdown.render(card.text)), Page(markdown.render(plain.text))
    assert page.tags == expected.tags and not page.open
    assert page.texts["h1"] == ["__tiny__"] and page.texts["h2"] == expected.texts["h2"] and len(page.texts["h2"]) > 5
    prompts, texts = page.texts["b"], [text for text in page.texts["pre"] if not text.startswith(("from ", "@"))]
    assert list(zip(prompts, texts, strict=False)) == [(prompt, prompt + text) for prompt, text in samples]
    (example,) = [token.content for token in tokens if token.info == "python"]
    assert samples[0][0] in [node.value for node in ast.walk(ast.parse(example)) if isinstance(node, ast.Constant)]


def test_card_tells_how_blocks_were_trained(directory, model):
    """Each by what its own worker noted, which may be anything."""
    notes = ["optim: a\ntorch: 2", "</pre> `# \n\n# b", "optim: a\ntorch: 2"]
    for block, note in zip(model.model.blocks, notes, strict=True):
        save_block(directory, block, model.model.embed_tokens, {"steps": "7", "seconds": "1.5", "training": note})
    text = ModelCard(str(model_card(directory, "user/tiny"))).text
    page = Page(MarkdownIt("commonmark").render(text))
    assert page.texts["pre"][-3:-1] == notes[:2]
    assert "versions of block 0, block 2:" in text and "versions of block 1:" in text and len(page.texts["h1"]) == 1
    assert f"{model.num_parameters():,} parameters, {sum(p.numel() for p in model.model.blocks.parameters()):,}" in text
    bibtex = re.search("```bibtex\n(.*?)```", text, re.DOTALL)[1]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    for title in (citation["title"], citation["references"][0]["title"]):
        assert f"title   = {{{title}}}," in bibtex
    for name, value in (("version", citation["version"]), ("year   ", citation["date-released"].year)):
        assert f"{name} = {{{value}}}" in bibtex
    assert "https://huggingface.co/user/tiny/blob/main/modeling_noprop.py" in text


def push(directory: Path, *options: str, token: str | None = TOKEN, fails: bool = False) -> str:
    command = ["scripts/push_to_hub.py", str(directory), "user/tiny", *options]
    return run_python(*command, fails=fails, **({} if token is None else {"HF_TOKEN": token}))


def load(tmp_path: Path, code: str, fails: bool = False) -> str:
    """Run code in a process without `noprop_hf`, against this Hub."""
    preamble = f"""
import sys
sys.modules["noprop_hf"] = None
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, pipeline
options = dict(trust_remote_code=True)
inputs = {INPUT}
"""
    status, output = programs().stock.run("-c", preamble + code, cwd=tmp_path)
    assert (status != 0) == fails, output
    return output


def test_push_and_load_back(server, directory, model, tmp_path):
    output = push(directory, "--license", "apache-2.0", "--language", "en")
    assert "Uploaded: http" in output
    repository = server.repositories["user/tiny"]
    assert repository.messages == ["initial commit", "Upload NoProp model"]  # all in one commit
    files = repository.files("main")
    for name in ("README.md", "config.json", "tokenizer.json", "modeling_noprop.py", "block-02.safetensors"):
        assert files[name] == (directory / name).read_bytes()
    assert "pretraining/model.safetensors" in files and not any("checkpoints" in name for name in files)
    first = repository.head

    load(
        tmp_path,
        f"""
model = AutoModelForCausalLM.from_pretrained("user/tiny", **options)
torch.save(model(inputs).logits, {str(tmp_path / "logits.pt")!r})
AutoModel.from_pretrained("user/tiny", **options)
AutoModelForMaskedLM.from_pretrained("user/tiny", **options)
AutoTokenizer.from_pretrained("user/tiny", **options)
""",
    )
    assert torch.equal(torch.load(tmp_path / "logits.pt"), model(eval(INPUT)).logits)

    # another version; the first one is still there by its revision
    shard = load_file(directory / "block-00.safetensors")
    from safetensors.torch import save_file

    save_file(
        {name: tensor + 0.5 for name, tensor in shard.items()}, directory / "block-00.safetensors", {"format": "pt"}
    )
    assert "already holds a model. Use --update" in push(directory, fails=True)
    push(directory, "--update", "--commit_message", "second")
    assert repository.messages[-1] == "second"
    code = f"""
for revision in ({first!r}, "main"):
    model = AutoModelForCausalLM.from_pretrained("user/tiny", revision=revision, code_revision=revision, **options)
    torch.save(model(inputs).logits, {str(tmp_path)!r} + f"/{{revision}}.pt")
"""
    load(tmp_path, code)
    assert torch.equal(torch.load(tmp_path / f"{first}.pt"), model(eval(INPUT)).logits)
    assert not torch.allclose(torch.load(tmp_path / "main.pt"), model(eval(INPUT)).logits)
    message = load(
        tmp_path, 'AutoModelForCausalLM.from_pretrained("user/tiny", revision="nope", **options)', fails=True
    )
    assert "nope" in message and "revision" in message.lower()


def test_the_card_is_made_of_what_was_measured(server, directory):
    pytest.importorskip("matplotlib")
    push(directory, "--license", "mit", "--language", "en")
    files = server.repositories["user/tiny"].files("main")
    card = ModelCard(files["README.md"].decode())
    data = card.data.to_dict()
    assert data["license"] == "mit" and data["language"] == "en" and data["datasets"] == ["someone/texts"]
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert "base_model" not in data
    results = {(r.dataset_split, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert results["test", "nats_per_token"] == 2.5 and results["test", "perplexity"] == pytest.approx(12.1825)
    assert "| NoProp, all blocks |" in card.text and "![Bound by block](bound.png)" in card.text
    assert files["bound.png"].startswith(b"\x89PNG")
    assert re.search(r"^\| 1 \| [\d.]+ \| -0\.0400 \| 7 \| 1\.5 \|$", card.text, re.MULTILINE)
    assert "<pre><b>the cat</b> sat &#34;down&#34;\nand slept</pre>" in card.text
    assert 'from_pretrained("user/tiny", trust_remote_code=True)' in card.text
    assert "{{" not in card.text and yaml.safe_load(card.content.split("---")[1])


def test_the_card_s_example_runs(server, directory, tmp_path, model, tokenizer):
    push(directory)
    text = server.repositories["user/tiny"].files("main")["README.md"].decode()
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    # the fixture's model has fewer tokens than the tokenizer; the example is run up to generating
    load(tmp_path, example.split("prompt =")[0])


def test_private_and_dry_run(server, directory, tmp_path):
    output = push(directory, "--dry_run")
    assert re.search(r"[\d,]+  block-01.safetensors", output) and "to be uploaded to user/tiny" in output
    assert not server.repositories
    push(directory, "--private")
    assert server.repositories["user/tiny"].private
    message = load(tmp_path, 'AutoModelForCausalLM.from_pretrained("user/tiny", **options)', fails=True)
    assert "user/tiny" in message and "not a valid model identifier" in message


def test_no_token(server, directory):
    assert "hf auth login" in push(directory, token=None, fails=True)
    assert "hf auth login" in push(directory, token="wrong", fails=True)
    assert not server.repositories


def test_half_trained_models_stay_at_home(server, directory):
    (directory / "block-01.safetensors").unlink()
    assert "not fully trained: block-01.safetensors missing" in push(directory, fails=True)
    assert not server.repositories


@pytest.mark.parametrize(
    "fault",
    [
        Fault("PUT", "/lfs/", status=400),
        Fault("POST", "/commit/", status=500),
        Fault("POST", "/commit/"),
        Fault("POST", "/preupload/", status=403),
    ],
    ids=["upload refused", "commit refused", "commit dropped", "preupload refused"],
)
def test_a_push_that_fails_on_the_way(server, directory, monkeypatch, fault):
    """Nothing is visible, and a second push sends what is missing and finishes."""
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    server.faults.append(fault)
    with pytest.raises(Exception):  # noqa: B017  of the client, as it is
        push_model(directory, "user/tiny", token=TOKEN)
    repository = server.repositories["user/tiny"]
    assert list(repository.files("main")) == [".gitattributes"]
    arrived = set(server.objects)
    server.faults.clear()
    server.requests.clear()
    push_model(directory, "user/tiny", token=TOKEN)
    assert set(repository.files("main")) > {"config.json", "block-02.safetensors"}
    assert len(repository.commits) == 2
    sent_again = {path.removeprefix("/lfs/") for method, path in server.requests if method == "PUT"}
    assert not sent_again & arrived


def test_faults_that_pass_are_ridden_out(server, directory):
    """A server that is busy for a moment is asked again by the client."""
    server.faults += [
        Fault("PUT", "/lfs/", status=503),
        Fault("PUT", "/lfs/"),
        Fault("POST", "objects/batch", status=503),
    ]
    push(directory)
    assert "block-00.safetensors" in server.repositories["user/tiny"].files("main")


def test_a_corrupted_shard_is_told(server, directory, tmp_path):
    push(directory)
    files = server.repositories["user/tiny"].files("main")
    files["block-01.safetensors"] = files["block-01.safetensors"][:-100]
    message = load(tmp_path, 'AutoModelForCausalLM.from_pretrained("user/tiny", **options)', fails=True)
    assert "block-01" in message


@pytest.mark.parametrize("how", ["cut", "flipped bit", "empty", "no header"])
def test_a_shard_corrupted_on_disk_is_told(server, directory, how):
    from transformers import AutoModelForCausalLM

    path = directory / "block-01.safetensors"
    content = bytearray(path.read_bytes())
    content[-20] ^= 4
    path.write_bytes({"cut": content[:-100], "flipped bit": content, "empty": b"", "no header": b"x" * 99}[how])
    if how == "cut":
        assert "corrupted: block-01.safetensors" in push(directory, fails=True)
    with pytest.raises(OSError, match=r"corrupted: block-01\.safetensors\."):
        AutoModelForCausalLM.from_pretrained(directory)


def test_a_repository_with_missing_blocks(server, directory, tmp_path):
    push(directory)
    del server.repositories["user/tiny"].files("main")["block-01.safetensors"]
    message = load(tmp_path, 'AutoModelForCausalLM.from_pretrained("user/tiny", **options)', fails=True)
    assert "block-01.safetensors" in message
