"""Arguments of the scripts: recipes (YAML) and command lines, read by `HfArgumentParser`."""

import difflib
import json
import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.utils import CONFIG_NAME, cached_file

from .configuration_noprop import NoPropConfig
from .data import DataArguments
from .parallel import arrange_processes


CORPUS_FILE = "corpus.yaml"  # in a model directory: the data arguments it was trained with


@dataclass
class ModelArguments:
    """The model to build. Sizes that are not given are those of [`NoPropConfig`]."""

    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "A tokenizer of the Hub or a local directory. Default: train a byte-level BPE one."},
    )
    vocab_size: int | None = field(
        default=None, metadata={"help": "Entries of the tokenizer to train (4,096 when not given)."}
    )
    embeddings_from: str | None = field(
        default=None,
        metadata={
            "help": "Take the input embeddings and the tokenizer of this transformers model instead of pretraining."
        },
    )
    hidden_size: int | None = field(default=None, metadata={"help": "Width of the table and of every layer."})
    num_blocks: int | None = field(default=None, metadata={"help": "Number of denoising blocks."})
    num_layers_per_block: int | None = field(default=None, metadata={"help": "Transformer layers in a block."})
    num_attention_heads: int | None = field(default=None, metadata={"help": "Attention heads of a layer."})
    intermediate_size: int | None = field(default=None, metadata={"help": "Width of the feed-forward layers."})
    attention_dropout: float | None = field(default=None, metadata={"help": "Dropout of the attention weights."})
    noise_schedule: str | None = field(
        default=None, metadata={"help": "'information', 'cosine' or 'linear': how noise levels are shared out."}
    )
    loss_type: str | None = field(default=None, metadata={"help": "'cross_entropy' or 'mse'."})
    sampled_softmax: bool | None = field(
        default=None,
        metadata={"help": "Train blocks with a softmax over the tokens of a batch instead of the vocabulary."},
    )
    denoising_weight: float | None = field(
        default=None, metadata={"help": "Weight of the denoising loss against the next-token loss on pure noise."}
    )
    num_pretraining_layers: int | None = field(default=None, metadata={"help": "Layers of the model of phase 1."})
    pretraining_objective: str | None = field(
        default=None,
        metadata={"help": "What the model of phase 1 learns: 'mlm' (masked tokens), 'clm' (next tokens) or 'mixed'."},
    )
    block_initialization: str | None = field(
        default=None, metadata={"help": "Start of every block: 'pretraining' (the model of phase 1) or 'random'."}
    )
    context_source: str | None = field(
        default=None,
        metadata={"help": "What a block reads: 'embeddings' (independent blocks) or 'previous_block' (in order)."},
    )

    def config_fields(self) -> dict[str, Any]:
        """What was given of the fields of [`NoPropConfig`]."""
        names = [name for name in NoPropConfig.__annotations__ if hasattr(self, name)]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass
class PretrainingArguments:
    """Phase 1. What is not given is taken from the training arguments of phase 2."""

    mlm_probability: float = field(
        default=0.15, metadata={"help": "Share of the tokens that are masked ('mlm' and 'mixed')."}
    )
    pretraining_max_steps: int | None = field(default=None, metadata={"help": "Optimizer steps of phase 1."})
    pretraining_num_train_epochs: float | None = field(default=None, metadata={"help": "Epochs of phase 1."})
    pretraining_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of phase 1."})
    pretraining_per_device_train_batch_size: int | None = field(
        default=None, metadata={"help": "Batch size of phase 1."}
    )

    def __post_init__(self):
        if not 0 < self.mlm_probability < 1:
            raise ValueError(f"`mlm_probability` must be between 0 and 1, got {self.mlm_probability}.")

    def training_fields(self) -> dict[str, Any]:
        """What was given of the fields of [`TrainingArguments`]."""
        prefix = "pretraining_"
        given = {name.removeprefix(prefix): value for name, value in vars(self).items() if name.startswith(prefix)}
        return {name: value for name, value in given.items() if value is not None}


@dataclass
class BlockArguments:
    """Phase 2."""

    blocks: str = field(default="all", metadata={"help": "Blocks to train: 'all', or a list such as '0,2-3'."})
    parallelism: str = field(
        default="auto",
        metadata={
            "help": "With several processes: 'blocks' (each trains blocks of its own), 'data' (all train a block "
            "together) or 'auto' ('blocks', or groups of processes when there are fewer blocks).",
            "choices": ["auto", "blocks", "data"],
        },
    )
    take_over: bool = field(
        default=False, metadata={"help": "Train blocks that another worker says on the Hub it trains, if it is gone."}
    )
    sample_prompts: list[str] = field(
        default_factory=lambda: ["The "], metadata={"help": "Prompts that sample text is drawn from."}
    )
    sample_max_new_tokens: int = field(default=40, metadata={"help": "Length of the samples, in tokens."})


@dataclass
class ShareArguments:
    """What the model card says of the model with `--push_to_hub`, beside what was measured."""

    license: str | None = field(default=None, metadata={"help": "Licence of the model, by its identifier on the Hub."})
    language: str | None = field(default=None, metadata={"help": "Language of the text, by its ISO 639-1 code."})


def parse_blocks(blocks: str, num_blocks: int) -> list[int]:
    """Read a selection of blocks such as `"0,2-3"` or `"all"`.

    Raises:
        ValueError: it cannot be read, or names a block that is not there.
    """
    if blocks == "all":
        return list(range(num_blocks))
    selected: set[int] = set()
    for part in blocks.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"Cannot read the blocks {blocks!r}: write 'all', or a list such as '0,2-3'.")
        selected.update(range(int(first), int(last if dash else first) + 1))
    outside = sorted(index for index in selected if index >= num_blocks)
    if outside or not selected:
        raise ValueError(
            f"There is no block {outside[0] if outside else blocks!r}: the model has {num_blocks} blocks, "
            f"0 to {num_blocks - 1}."
        )
    return sorted(selected)


class Recipe(NamedTuple):
    """All arguments of a training run."""

    model: ModelArguments
    data: DataArguments
    pretraining: PretrainingArguments
    blocks: BlockArguments
    share: ShareArguments
    training: TrainingArguments


def parse_recipe(description: str, arguments: list[str] | None = None, parallelism: str | None = None) -> Recipe:
    """Read `[RECIPE.yaml] [--name value ...]`, by default from the command line of the process.

    Of several processes that were launched together, each is told here whom it works with, since `TrainingArguments`
    connect the processes they find (see [`~noprop_hf.parallel.arrange_processes`]).

    Args:
        parallelism: has precedence over that of the command line.
    """

    def arrange(known: Namespace) -> None:
        config = Path(known.output_dir or "", CONFIG_NAME)
        kept = NoPropConfig.from_pretrained(known.output_dir) if config.is_file() else NoPropConfig()
        num_blocks = known.num_blocks or kept.num_blocks
        in_order = (known.context_source or kept.context_source) == "previous_block"
        selected = parse_blocks(known.blocks, num_blocks)
        arrange_processes(parallelism or known.parallelism, 1 if in_order else len(selected))

    return Recipe(*parse_arguments(tuple(Recipe.__annotations__.values()), description, arguments, prepare=arrange))


def parse_arguments(
    dataclasses: Sequence[type],
    description: str,
    arguments: list[str] | None = None,
    model: bool = False,
    prepare: Callable[[Namespace], None] | None = None,
) -> tuple:
    """Read a recipe and a command line into dataclasses; the command line has the last word.

    Args:
        dataclasses: the dataclass types to fill.
        description: what the script does, for `--help`.
        arguments: `[RECIPE.yaml] [--name value ...]`; those of the process when not given.
        model: instead of a recipe, the first word is a model, whose own `corpus.yaml` is read where it has one.
        prepare: sees the values before any dataclass is made of them.

    Returns:
        One instance per dataclass, in order; with `model`, its name comes first.
    """
    parser = HfArgumentParser(dataclasses, description=description, formatter_class=RawDescriptionHelpFormatter)
    if model:
        parser.add_argument("model", help="A model directory, or a repository of the Hub.")
    else:
        parser.add_argument("recipe", nargs="?", default=None, help="A recipe: a YAML file of the arguments below.")
    arguments = sys.argv[1:] if arguments is None else arguments
    first = arguments[0] if arguments and not arguments[0].startswith("-") else None
    try:
        recipe = first if not model or first is None else find_corpus_file(first)
        if recipe is not None:
            parser.set_defaults(**_read_recipe(Path(recipe), parser))
        if prepare is not None:
            prepare(parser.parse_known_args(arguments)[0])
        *parsed, rest = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    except (OSError, yaml.YAMLError, ValueError) as error:
        parser.error(str(error))
    return (rest.model, *parsed) if model else tuple(parsed)


def find_corpus_file(model: str) -> str | None:
    """Where a model says what it was trained on, if it does.

    Raises:
        OSError: there is no such model.
    """
    return cached_file(model, CORPUS_FILE, _raise_exceptions_for_missing_entries=False)


def _read_recipe(path: Path, parser: HfArgumentParser) -> dict[str, Any]:
    """The values of a recipe, as `argparse` takes defaults: words, which it converts like those of a command line."""
    if not path.is_file():
        raise ValueError(f"There is no recipe {str(path)!r}.")
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a recipe: it must be a YAML file of `name: value` lines.")
    known = [action.dest for action in parser._actions if action.option_strings and action.dest != "help"]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{path}: there is no argument {name!r}.{hint}")
    words = {dict: json.dumps, list: list}
    return {name: words.get(type(value), str)(value) for name, value in values.items() if value is not None}
