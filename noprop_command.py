"""The command `noprop`. It is beside the package, whose import loads torch, so that `noprop --help` answers at once."""

import sys
from argparse import ArgumentParser
from importlib import import_module
from pathlib import Path


COMMANDS = {
    "train": "the main job from one recipe: pretrain the table, train all blocks, evaluate, write samples",
    "pretrain": "phase 1 alone: make the frozen embedding table and the model directory around it",
    "train-blocks": "phase 2 alone: train all denoising blocks, or some of them",
    "evaluate": "measure the perplexity of a model, and the bound of its chain, split by block",
    "generate": "continue a prompt",
    "watch": "see the chain of blocks turn noise into tokens",
    "plot": "draw the learning curves of a run",
    "status": "list the blocks of a model, and which of them are trained",
    "plan": "forecast data, model, steps, memory, time and disk of a training run",
    "push": "share a model on the Hub",
}


def main() -> None:
    """Run the command that the first word of the command line names. Its arguments follow."""
    is_module = Path(sys.argv[0]).name == "__main__.py"
    description = "Language models trained block by block. `%(prog)s COMMAND --help` explains a command."
    parser = ArgumentParser("python -m noprop_hf" if is_module else "noprop", description=description)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, purpose in COMMANDS.items():
        commands.add_parser(name, help=purpose, add_help=False)
    command = parser.parse_args(sys.argv[1:2]).command
    sys.argv[:2] = [f"{parser.prog} {command}"]  # in help and errors of the command
    import_module(f"noprop_hf.commands.{command.replace('-', '_')}").main()
