"""The command `noprop`, outside the package, whose import loads torch, so that `noprop --help` answers at once."""

import sys
from argparse import ArgumentParser
from importlib import import_module
from pathlib import Path


COMMANDS = {
    "train": "run a whole recipe: pretrain the table, train all blocks, evaluate, write samples",
    "pretrain": "phase 1 only: create the frozen embedding table and the model directory",
    "train-blocks": "phase 2 only: train all or some denoising blocks",
    "evaluate": "measure the perplexity of a model, and the bound of its chain, split by block",
    "generate": "continue a prompt",
    "watch": "show how the chain of blocks turns noise into tokens",
    "plot": "plot the learning curves of a run",
    "status": "list the blocks of a model, and which of them are trained",
    "plan": "forecast data, model, steps, memory, time and disk of a training run",
    "push": "upload a model to the Hub",
}


def main() -> None:
    """Run the command named by the first command-line argument, with the arguments that follow."""
    is_module = Path(sys.argv[0]).name == "__main__.py"
    description = "Language models trained block by block. `%(prog)s COMMAND --help` explains a command."
    parser = ArgumentParser("python -m noprop_hf" if is_module else "noprop", description=description)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, purpose in COMMANDS.items():
        commands.add_parser(name, help=purpose, add_help=False)
    command = parser.parse_args(sys.argv[1:2]).command
    sys.argv[:2] = [f"{parser.prog} {command}"]  # in help and errors of the command
    import_module(f"noprop_hf.commands.{command.replace('-', '_')}").main()
