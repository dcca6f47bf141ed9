"""Every command and every program of the documents, read from them and run.

What is written is run as it stands, in a copy of the project whose recipes are small ones of the same names. What
cannot run here (`ELSEWHERE`) is named with what is run in its place.
"""

import ast
import configparser
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

from conftest import ROOT, copy_project, programs, run_process, sentences
from hub_server import TOKEN
from noprop_hf.arguments import BlockArguments


# Later commands use what earlier ones made, so all of them run in one process (`--dist loadfile`).
pytestmark = pytest.mark.slow

DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/method.md",
    "docs/quality.md",
    "docs/performance.md",
    "docs/tools.md",
    "space/README.md",
)
SMALL = {
    "train_file": "my.txt",
    "validation_file": "validation.txt",
    "test_file": "test.txt",
    "vocab_size": 300,
    "hidden_size": 16,
    "num_blocks": 4,
    "num_layers_per_block": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_length": 48,
    "pretraining_max_steps": 2,
    "max_steps": 2,
    "per_device_train_batch_size": 8,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "logging_steps": 1,
    "save_steps": 1,
    "sample_prompts": ["the cat"],
    "sample_max_new_tokens": 2,
}
# Placeholders of the documents.
FILL = {
    r"\bRECIPE\b": "recipes/demo.yaml",
    r"\bDIR\b": "corpora",
}
# Commands that are not run as they stand, and what is run instead.
ELSEWHERE = {
    "make demo": "make --dry-run demo",  # installs, and then is the command that makes runs/demo here
    "make test": "make --dry-run test",  # would run this test
    "make lint": "make --dry-run lint",
    ".venv/bin/python -m pytest": ".venv/bin/python -m pytest --collect-only -qq tests/test_noise.py",
    "make gpu": "make --dry-run gpu",  # tests/test_benchmarks.py runs what it starts
    "launch/8_gpus.yaml": None,  # needs eight GPUs; tests/test_parallel.py reads the launch files with accelerate
    "noprop train demo": None,  # the whole demo; tests/test_packaging.py installs the command and runs it small
    "pip install": None,  # would change the environment of the tests, which has it all
    "space/app.py": None,  # serves a page without end; tests/test_space.py opens it
    "hf upload": None,  # needs an account on the Hub
    "hf repos": None,
}


def blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_documents_draw_the_same_picture_of_the_chain():
    texts = [(ROOT / document).read_text() for document in DOCUMENTS]
    found = [seed for text in texts for seed in re.findall(r"watch.py .* --seed (\d+) --save docs/chain.png", text)]
    assert len(found) == 2 and len(set(found)) == 1


def commands(document: str) -> list[str]:
    lines = [line for block in blocks(document, "bash") for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`(\.venv/bin/[^`]+)`", (ROOT / document).read_text())
    return [command for line in [*lines, *inline] if (command := line.partition("  #")[0].strip())]


ALL = [(document, command) for document in DOCUMENTS for command in commands(document)]


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The project as somebody has it who cloned it, installed it and ran the demo."""
    folder = tmp_path_factory.mktemp("copy")
    copy_project(folder)
    (folder / ".venv").symlink_to(sys.prefix)
    for recipe in (folder / "recipes").glob("*.yaml"):
        output_dir = yaml.safe_load(recipe.read_text())["output_dir"]
        recipe.write_text(yaml.safe_dump(SMALL | {"output_dir": output_dir}))
    for name, count in (("my", 300), ("validation", 60), ("test", 60)):
        (folder / f"{name}.txt").write_text("\n".join(sentences(count, count)) + "\n")
    corpora = folder / "corpora"
    (corpora / "wikitext2").mkdir(parents=True)
    for name in ("shakespeare.txt", "wikitext2/test.txt", "wikitext2/validation.txt"):
        (corpora / name).write_text("\n".join(sentences(1500, 3)) + "\n")
    return folder


@pytest.fixture(scope="module")
def run(copy):
    variables = {"HF_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}

    def run(command: list[str]) -> str:
        if command[0] in (".venv/bin/python", ".venv/bin/accelerate"):
            words = command[1:] if command[0] == ".venv/bin/python" else command  # a launcher is a script itself
            status, output = programs().ours.run(*words, cwd=copy, variables=[variables], timeout=500)
        else:
            status, output = run_process(command, copy, programs().environment | variables)
        assert status == 0, f"{shlex.join(command)}\n{output}"
        return output

    programs().forget()
    run([".venv/bin/python", "scripts/train.py", "recipes/demo.yaml"])
    return run


@pytest.fixture(scope="module")
def options(run):
    """The help of a benchmark, asked for once."""
    return cache(lambda script: run([".venv/bin/python", script, "--help"]))


def test_the_demo_installs_what_pictures_need():
    """These tests run with the extra `dev`, a reader of the README with what `make demo` installs."""
    planned = subprocess.run(["make", "--dry-run", "demo", "VENV=absent"], cwd=ROOT, capture_output=True, text=True)
    assert "--editable '.[plot]'" in planned.stdout


def test_documents_have_commands():
    assert len(ALL) > 20
    missing = [part for part in ELSEWHERE if not any(part in command for _, command in ALL)]
    assert not missing, f"no document speaks of {missing} any more"


def test_readme_begins_with_code_and_true_badges():
    text = (ROOT / "README.md").read_text()
    assert "from_pretrained" in "".join(text.splitlines()[:25])
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    floors = dict(line.split(">=") for line in setup["options"]["install_requires"].split())
    floors["Python"] = setup["options"]["python_requires"].removeprefix(">=")
    badges = re.findall(r"\[(\w+)\]\(https://img.shields.io/badge/([^)]+)-\w+\)", text)
    shown = {name: unquote(badge).partition("-")[2].replace("--", "-") for name, badge in badges}
    for name in ("Python", "torch", "transformers"):
        assert shown[name] == f"\u2265 {floors[name]}"
    assert shown["license"] == setup["metadata"]["license_expression"]


def test_no_prompt_ends_in_a_blank():
    """A byte-level tokenizer makes the blank the beginning of the next word."""
    lines = [command for _, command in ALL]
    for path in (ROOT / "noprop_hf" / "commands").glob("*.py"):
        lines += re.findall(r"^%\(prog\)s (.*)", path.read_text(), re.MULTILINE)
    prompts = [word for line in lines for word in shlex.split(line)]
    programs = [program for document in DOCUMENTS for program in blocks(document, "python")]
    programs += re.findall(r"^EXAMPLES = .*", (ROOT / "space" / "app.py").read_text(), re.MULTILINE)
    for program in programs:
        prompts += [node.value for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Constant)]
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        prompts += yaml.safe_load(recipe.read_text()).get("sample_prompts", [])
    assert {"Return the", "The song", "If the file does not exist,"} < set(prompts)
    assert not [
        prompt for prompt in [*prompts, *BlockArguments().sample_prompts] if str(prompt) != str(prompt).rstrip()
    ]


def test_tests_that_documents_name_exist():
    named = [
        name for document in DOCUMENTS for name in re.findall(r"(tests/\w+\.py)::(\w+)", (ROOT / document).read_text())
    ]
    assert len(named) > 20
    missing = [name for name in named if f"def {name[1]}(" not in (ROOT / name[0]).read_text()]
    assert not missing


@pytest.mark.parametrize("command", list(dict.fromkeys(command for _, command in ALL)))
def test_command(run, options, command):
    for part, instead in ELSEWHERE.items():
        if part in command:
            if instead is None:
                pytest.skip(f"{part} cannot run here")
            command = instead
    for placeholder, value in FILL.items():
        command = re.sub(placeholder, value, command)
    words = shlex.split(command)
    if "benchmarks/" in command:  # tests/test_benchmarks.py and others run them, small
        assert words[0] == ".venv/bin/python"
        assert all(word in options(words[1]) for word in words if word.startswith("--"))
    else:
        run(words)


@pytest.mark.parametrize(
    "document, program", [(document, program) for document in DOCUMENTS for program in blocks(document, "python")]
)
def test_program(run, document, program):
    run([".venv/bin/python", "-c", program])
