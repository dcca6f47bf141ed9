"""The notebook for a free T4: its cells, run in a kernel on the CPU, with a small text in the place of the download."""

import ast
import math
import re
import shutil
import sys
import threading
import time
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.nn import functional as F

from conftest import ROOT, programs, sentences
from hub_server import TOKEN, HubServer
from noprop_hf import NoPropForCausalLM
from noprop_hf.data import load_tokenizer
from noprop_hf.recipes import parse_recipe
from warm_python import WarmPython


nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")

RECIPE = """
num_blocks: 2
vocab_size: 300
hidden_size: 16
num_layers_per_block: 1
num_attention_heads: 2
intermediate_size: 24
max_length: 32
pretraining_max_steps: 4
max_steps: 40
eval_strategy: steps
eval_steps: 20
logging_steps: 20
sample_prompts: [the cat]
sample_max_new_tokens: 2
"""


def read() -> Any:
    return nbformat.read(ROOT / "notebooks" / "t4.ipynb", as_version=4)


def parameters_cell(notebook: Any) -> int:
    [index] = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    return index


def parameters() -> dict:
    notebook = read()
    values: dict = {}
    exec(notebook.cells[parameters_cell(notebook)].source, {}, values)
    return values


def cell_with(notebook: Any, word: str) -> int:
    [index] = [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code" and word in cell.source]
    return index


def printed(cell: Any) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


def test_no_outputs_are_kept():
    code = [cell for cell in read().cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)


def test_the_parameters_are_assignments_alone():
    """So that papermill, or a person, replaces them and nothing else."""
    notebook = read()
    body = ast.parse(notebook.cells[parameters_cell(notebook)].source).body
    assert all(isinstance(statement, ast.Assign) for statement in body)


def test_the_changes_fit_the_recipe(tmp_path):
    """The small run replaces them, so they are read here as the commands read them."""
    values = parameters()
    words = [values["recipe"], f"--output_dir={tmp_path}", "--fp16=False"]
    recipe = parse_recipe("", [*words, *(f"--{name}={value}" for name, value in values["changes"].items())])
    text = "".join(cell.source for cell in read().cells if cell.cell_type == "markdown")
    steps, length = recipe.training.max_steps, recipe.data.max_length
    assert recipe.training.warmup_steps < steps and recipe.training.save_steps <= steps
    row = re.search(r"^\| steps of (\d+) windows of (\d+) tokens \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|", text, re.M)
    stated = [int(figure.replace(",", "")) for figure in row.groups()]
    first = recipe.pretraining.pretraining_max_steps
    batch = recipe.training.per_device_train_batch_size
    assert stated == [batch, length, first, steps, first + steps * recipe.model.num_blocks]


# What `!` starts in the notebook, in the place of `accelerate launch -m noprop_hf`: it hands a command to `serve`.
LAUNCHER = """
import os, sys
from multiprocessing.connection import Client

with Client(sys.argv[1]) as connection:
    connection.send((sys.argv[2:], os.getcwd(), os.environ["HF_TOKEN"]))
    status, output = connection.recv()
print(output)
sys.exit(status)
"""


def serve(listener: Listener, python: WarmPython) -> None:
    """Run commands in a process that has loaded the libraries, which takes most of the time otherwise."""
    while True:
        with listener.accept() as connection:
            words, folder, token = connection.recv()
            program = ("-c", "from noprop_command import main; main()", *words)
            connection.send(python.run(*program, cwd=Path(folder), variables=[{"HF_TOKEN": token}]))


def kill_when_published(server: HubServer, shard: str, python: WarmPython) -> None:
    """Kill what runs, as a disconnect does, as soon as a file is published."""
    while shard not in server.repositories["user/tiny"].files("main"):
        time.sleep(0.01)
    for process in psutil.Process(python.process.pid).children():
        process.kill()


@pytest.mark.slow
def test_run_all(tmp_path, monkeypatch):
    """With a Hub, as two sessions: the first is cut off between the blocks, and only what it published is left."""
    for name, count in (("train", 300), ("validation", 40), ("test", 40)):
        (tmp_path / f"{name}.txt").write_text("\n".join(sentences(count, count)) + "\n")
    files = "".join(f"{name}_file: {tmp_path / name}.txt\n" for name in ("train", "validation", "test"))
    (tmp_path / "small.yaml").write_text(files + RECIPE)
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    values = {
        "output_dir": str(tmp_path / "model"),
        "recipe": str(tmp_path / "small.yaml"),
        "changes": {"use_cpu": True},
        "hub_model_id": "user/tiny",
        "prompt": "the cat",
        "text": "the cat sat on a mat while old dogs slept near warm stones and birds sang over green hills.",
        "launcher": f"{sys.executable} -S {tmp_path / 'launcher.py'} {tmp_path / 'socket'}",
    }
    assert values.keys() <= parameters().keys()
    notebook = read()
    replaced = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    notebook.cells.insert(parameters_cell(notebook) + 1, nbformat.v4.new_code_cell(replaced))
    blocks = cell_with(notebook, 'noprop("train-blocks")')

    programs().forget()
    server, python = programs().hub, programs().ours
    with Listener(str(tmp_path / "socket")) as listener:
        folders = {name: str(tmp_path / name) for name in ("HF_HOME", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR")}
        for name, value in {**programs().environment, **folders, "HF_TOKEN": TOKEN}.items():
            monkeypatch.setenv(name, value)
        threading.Thread(target=serve, args=(listener, python), daemon=True).start()
        client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
        with client.setup_kernel():
            for index, cell in enumerate(notebook.cells):
                if index == blocks:
                    arguments = (server, "block-00.safetensors", python)
                    killer = threading.Thread(target=kill_when_published, args=arguments, daemon=True)
                    killer.start()
                    with pytest.raises(nbclient.exceptions.CellExecutionError, match="noprop train-blocks failed"):
                        client.execute_cell(cell, index)
                    killer.join()
                    first = server.repositories["user/tiny"].files("main")
                    assert "block-01.safetensors" not in first
                    shutil.rmtree(values["output_dir"])
                client.execute_cell(cell, index)
        repository = server.repositories["user/tiny"]
        files = repository.files("main")

    assert files["block-00.safetensors"] == first["block-00.safetensors"]
    assert "block 1 (2 of 2)" in printed(notebook.cells[blocks])
    for cell in (blocks, cell_with(notebook, 'noprop("train")')):
        assert "Block 0 is trained already: skipped" in printed(notebook.cells[cell])
        assert "block 0 (1 of 2)" not in printed(notebook.cells[cell])
    assert repository.messages.count("Table, tokenizer and configuration") == 1
    assert "block-01.safetensors" in files and "workers/block-01.json" not in files
    for word in ("curves.png", "chain.png"):
        [picture] = [out for out in notebook.cells[cell_with(notebook, word)].outputs if "data" in out]
        assert "image/png" in picture["data"]
    tables = notebook.cells[cell_with(notebook, 'noprop("train")')].outputs
    table = next(out["data"]["text/markdown"] for out in tables if "data" in out)
    assert "NoProp, all blocks" in table and table in files["README.md"].decode()

    stated = float(re.search(r"perplexity ([\d.]+)", printed(notebook.cells[cell_with(notebook, "Perplexity()")]))[1])
    assert stated == pytest.approx(by_hand(Path(values["output_dir"]), values["text"]), abs=0.01)
    back = printed(notebook.cells[cell_with(notebook, "trust_remote_code=True")])
    assert float(re.search(r"difference .*: ([\d.e-]+)", back)[1]) < 1e-6
    assert "\nthe cat" in back


def by_hand(directory: Path, text: str) -> float:
    """The perplexity of a text that is longer than the window: each token after the first predicted once."""
    model, tokenizer = NoPropForCausalLM.from_pretrained(directory).eval(), load_tokenizer(str(directory))
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    window = model.config.max_position_embeddings
    assert len(ids) > window and tokenizer.bos_token_id is None
    nats, known = 0.0, 1
    for begin in range(0, len(ids), window // 2):
        end = min(begin + window, len(ids))
        with torch.no_grad():
            logits = model(ids[None, begin:end]).logits[0]
        for position in range(max(known, begin + 1), end):
            nats += F.cross_entropy(logits[position - 1 - begin], ids[position]).item()
        known = max(known, end)
    return math.exp(nats / (len(ids) - 1))
