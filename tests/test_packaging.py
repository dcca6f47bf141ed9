"""The package as it is installed: its command, and the files that come with it."""

import json
import os
import re
import runpy
import sys
from importlib import import_module
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from conftest import ROOT, copy_project, programs, run_process, sentences
from noprop_command import COMMANDS, main
from noprop_hf.arguments import PACKAGE


SIZES = "--vocab_size 300 --hidden_size 16 --num_blocks 2 --num_layers_per_block 1 --intermediate_size 24"
STEPS = "--max_length 16 --pretraining_max_steps 2 --max_steps 2 --warmup_steps 0 --sample_max_new_tokens 2"


def test_scripts_are_the_commands():
    scripts = {runpy.run_path(str(path))["main"] for path in (ROOT / "scripts").glob("*.py")}
    assert scripts == {import_module(f"noprop_hf.commands.{name.replace('-', '_')}").main for name in COMMANDS}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("called", "shown"), [("/opt/bin/noprop", "noprop"), (str(PACKAGE / "__main__.py"), "python -m noprop_hf")]
)
def test_help_names_the_command_as_it_was_called(monkeypatch, capsys, command, called, shown):
    monkeypatch.setattr(sys, "argv", [called, command, "--help"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    usage, *examples = re.findall(rf"^(?:usage:)? *{shown} {command} .+", capsys.readouterr().out, re.MULTILINE)
    assert usage.startswith("usage:") and examples


@pytest.mark.parametrize("words", [[], ["trian"], ["recipes/demo.yaml"], ["--max_steps", "3"]])
def test_no_such_command(monkeypatch, capsys, words):
    monkeypatch.setattr(sys, "argv", ["noprop", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "noprop: error:" in capsys.readouterr().err


def test_messages_name_what_their_reader_has():
    """The installed command, and in the files that travel with a model not even that."""
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"\b(scripts|launch|benchmarks)/", text), path
        known = set() if path.match("*_noprop.py") else {*COMMANDS, "COMMAND"}
        assert set(re.findall(r"`noprop ([\w-]+)", text)) <= known, path


@pytest.mark.slow
def test_an_installation_from_the_source_distribution(tmp_path):
    """In a folder of its own, and run from an empty one, without a clone."""
    source, site, empty = (tmp_path / name for name in ("source", "site", "empty"))
    copy_project(source)
    empty.mkdir()
    build = [sys.executable, "-c", "from setuptools import build_meta; build_meta.build_sdist('.')"]
    install = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", "--target"]
    for command in (build, [*install, str(site), "noprop_hf-0.1.0.tar.gz"]):
        status, output = run_process(command, source)
        assert status == 0, output

    for name in ("recipes/demo.yaml", "recipes/seed.yaml", "recipes/t4_wikitext103.yaml", "model_card.md"):
        assert (site / "noprop_hf" / name).read_bytes() == (ROOT / name).read_bytes()
    assert (site / "noprop_hf" / "py.typed").is_file()
    metadata = Distribution.at(next(site.glob("*.dist-info"))).metadata
    assert metadata["Name"] == "noprop-hf" and metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text().strip()

    noprop, path = site / "bin" / "noprop", {"PYTHONPATH": str(site)}
    # Where no library can be found: help needs none.
    status, output = run_process([sys.executable, "-S", str(noprop), "--help"], empty, os.environ | path)
    assert status == 0 and {*COMMANDS} <= {*output.split()}, output

    (empty / "text.txt").write_text("\n".join(sentences(200)) + "\n")

    def run(*command: str) -> str:
        status, output = programs().stock.run(*command, cwd=empty, variables=[path])
        assert status == 0, output
        return output

    assert Path(run("-c", "import noprop_hf; print(noprop_hf.__file__)").strip()).is_relative_to(site)
    options = f"--train_file text.txt --use_cpu true {SIZES} {STEPS}".split()
    assert "The model is in runs/demo" in run(str(noprop), "train", "demo", *options)
    results = json.loads((empty / "runs" / "demo" / "results.json").read_text())["nats_per_token"]
    output = run(str(noprop), "evaluate", "runs/demo", "--split", "validation")
    value = float(re.search(r"predictive distribution +([\d.]+) nats", output)[1])
    assert value == pytest.approx(results["NoProp, all blocks"]["validation"], abs=1e-3)
    output = run(str(noprop), "generate", "runs/demo", "the cat", "--max_new_tokens", "2")
    assert "\nthe cat" in f"\n{output}"
