"""Arguments of the scripts: recipes (YAML) and command lines, read by `HfArgumentParser`."""

import dataclasses
import difflib
import inspect
import json
import os
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
from .parallel import GROUP_VARIABLES, arrange_processes
from .shards_noprop import block_shard


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


@dataclass
class RunArguments:
    """The run as a whole.

    Attributes:
        processes: how many were launched together.
    """

    dry_run: bool = field(
        default=False,
        metadata={"help": "Print data, model, steps, memory, time and disk of the run, and train nothing."},
    )
    processes: int = field(default=1, init=False)


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
    run: RunArguments


def parse_recipe(description: str, arguments: list[str] | None = None, parallelism: str | None = None) -> Recipe:
    """Read `[RECIPE.yaml] [--name value ...]`, by default from the command line of the process.

    Of several processes that were launched together, each is told here whom it works with, since `TrainingArguments`
    connect the processes they find (see [`~noprop_hf.parallel.arrange_processes`]).

    Args:
        parallelism: has precedence over that of the command line.
    """

    processes = int(os.environ.get("WORLD_SIZE", 1))

    def arrange(values: Namespace) -> None:
        if parallelism is not None:
            values.parallelism = parallelism
        if values.dry_run:  # the first process speaks for all
            if int(os.environ.get("RANK", 0)) > 0:
                raise SystemExit(0)
            for name in GROUP_VARIABLES:
                os.environ.pop(name, None)
        config = _known_config(values)
        selected = parse_blocks(values.blocks, values.num_blocks or config.num_blocks)
        arrange_processes(values.parallelism, 1 if _in_order(values, config) else len(selected))

    recipe = Recipe(*parse_arguments(tuple(Recipe.__annotations__.values()), description, arguments, arrange, check))
    recipe.run.processes = processes
    recipe.blocks.parallelism = parallelism or recipe.blocks.parallelism
    return recipe


def check(values: Namespace, given: set[str]) -> None:
    """Refuse arguments that are right one by one and make no sense together. What one dataclass, the configuration or
    transformers tell as early is left to them.

    Args:
        values: all arguments.
        given: the names of those that the recipe or the command line give.

    Raises:
        ValueError: there are some, with what to do about it.
    """
    config = _known_config(values)
    from_model = values.embeddings_from is not None
    if values.push_to_hub and not values.hub_model_id:
        raise ValueError("Say where --push_to_hub goes: --hub_model_id user/name.")
    if values.take_over and not values.push_to_hub:
        raise ValueError(
            "--take_over is for blocks that workers claim on the Hub: add --push_to_hub true --hub_model_id user/name, "
            "or leave it out. On one machine, the claim of a process that is gone does not last."
        )
    if values.streaming and values.max_steps <= 0:
        raise ValueError("A stream has no known length to count epochs by: say how long to train with --max_steps.")
    if values.streaming and not from_model and (values.pretraining_max_steps or values.max_steps) <= 0:
        raise ValueError("A stream has no known length to count epochs by: give a positive --pretraining_max_steps.")
    if "eval_steps" in given and "eval_strategy" not in given:
        raise ValueError("Nothing is evaluated at --eval_steps by default: add --eval_strategy steps, or leave it out.")
    if "validation_split_percentage" in given and values.validation_file is not None:
        raise ValueError(
            "Validation data are either held out (--validation_split_percentage) or a file (--validation_file): leave "
            "one of them out."
        )
    if values.sampled_softmax and values.loss_type == "mse":
        raise ValueError(
            "--loss_type mse has no softmax: leave --sampled_softmax out, or take --loss_type cross_entropy."
        )
    if from_model and values.block_initialization == "pretraining":
        raise ValueError(
            "With --embeddings_from there is no phase 1 for blocks to start from: leave --block_initialization out."
        )
    data = DataArguments(**{field.name: getattr(values, field.name) for field in dataclasses.fields(DataArguments)})
    if "" in values.sample_prompts and not data.has_boundaries:
        raise ValueError(
            "Texts are joined without a token between them, so none can begin an empty prompt: leave it out of "
            "--sample_prompts, or add --append_eos true."
        )
    objective = values.pretraining_objective or config.pretraining_objective
    if "mlm_probability" in given and objective == "clm" and not from_model:
        raise ValueError(
            "Nothing is masked in causal language modelling: leave --mlm_probability out, or take "
            "--pretraining_objective mlm or mixed."
        )
    if _in_order(values, config) and not values.push_to_hub:  # from the Hub, the blocks before can be fetched
        selected = parse_blocks(values.blocks, values.num_blocks or config.num_blocks)
        for index in range(selected[-1]):
            if index not in selected and not Path(values.output_dir or "", block_shard(index)).is_file():
                raise ValueError(
                    f"Block {index + 1} reads block {index}, which is neither trained nor among --blocks "
                    f"{values.blocks}: add it."
                )


def _known_config(values: Namespace) -> NoPropConfig:
    """The configuration in `output_dir`, or else what is known of it before the data are read.

    Raises:
        ValueError: values that there are not, or sizes that do not fit together.
    """
    if Path(values.output_dir or "", CONFIG_NAME).is_file():
        return NoPropConfig.from_pretrained(values.output_dir)
    model = ModelArguments(**{field.name: getattr(values, field.name) for field in dataclasses.fields(ModelArguments)})
    fields = model.config_fields()
    if values.embeddings_from is not None:  # the width is that model's: any that fits will do
        fields.setdefault("hidden_size", 2 * fields.get("num_attention_heads", NoPropConfig.num_attention_heads))
    return NoPropConfig(**fields)


def _in_order(values: Namespace, config: NoPropConfig) -> bool:
    return (values.context_source or config.context_source) == "previous_block"


def parse_arguments(
    types: Sequence[type],
    description: str,
    arguments: list[str] | None = None,
    prepare: Callable[[Namespace], None] | None = None,
    check: Callable[[Namespace, set[str]], None] | None = None,
    model: bool = False,
) -> tuple:
    """Read a recipe and a command line into dataclasses; the command line has the last word.

    Args:
        types: the dataclasses to fill.
        description: what the script does, for `--help`.
        arguments: `[RECIPE.yaml] [--name value ...]`; those of the process when not given.
        prepare: sees the values before any dataclass is made of them.
        check: sees the values, and the names of those that are given, when every dataclass has taken its own.
        model: instead of a recipe, the first word is a model, whose own `corpus.yaml` is read where it has one.

    Returns:
        One instance per dataclass, in order; with `model`, its name comes first.
    """
    first_word = "MODEL" if model else "[RECIPE.yaml]"
    usage = f"%(prog)s {first_word} [--name value ...]"
    parser = HfArgumentParser(types, usage=usage, description=description, formatter_class=RawDescriptionHelpFormatter)
    _group(parser, types)
    if model:
        parser.add_argument("model", help="A model directory, or a repository of the Hub.")
    else:
        parser.add_argument("recipe", nargs="?", default=None, help="A recipe: a YAML file of the arguments below.")
    arguments = sys.argv[1:] if arguments is None else arguments
    first = arguments[0] if arguments and not arguments[0].startswith("-") else None
    try:
        recipe = first if not model or first is None else find_corpus_file(first)
        defaults = {} if recipe is None else _read_recipe(Path(recipe), parser)
        parser.set_defaults(**defaults)
        values, unknown = parser.parse_known_args(arguments)
        if unknown:
            raise ValueError(_no_argument(unknown[0].partition("=")[0], _names(parser), "--"))
        if prepare is not None:
            prepare(values)
        *parsed, rest = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
        if check is not None:
            blank = Namespace(**dict.fromkeys(_names(parser)))
            named = vars(parser.parse_known_args(arguments, blank)[0])
            check(values, {name for name, value in named.items() if value is not None} | defaults.keys())
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
    for name in values:
        if name not in _names(parser):
            raise ValueError(f"{path}: {_no_argument(str(name), _names(parser))}")
    words: dict[type, Callable[[Any], Any]] = {dict: json.dumps, list: list}
    return {name: words.get(type(value), str)(value) for name, value in values.items() if value is not None}


def _names(parser: HfArgumentParser) -> list[str]:
    return [action.dest for action in parser._actions if action.option_strings and action.dest != "help"]


def _no_argument(name: str, known: list[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name.removeprefix(prefix), known, n=1)
    return f"there is no argument {name!r}." + (f" Did you mean {prefix + near[0]!r}?" if near else "")


def _group(parser: HfArgumentParser, types: Sequence[type]) -> None:
    """Show the arguments of each dataclass under the first line of what it says of itself."""
    actions = parser._optionals._group_actions
    for dtype in sorted(types, key=lambda dtype: dtype is not RunArguments):  # that one is short, and comes first
        title = inspect.cleandoc(dtype.__doc__ or "").splitlines()[0].removesuffix(".")
        if title.startswith(f"{dtype.__name__}("):  # it says nothing, and Python lists its fields
            title = dtype.__name__
        names = {field.name for field in dataclasses.fields(dtype)}
        parser.add_argument_group(title)._group_actions += [action for action in actions if action.dest in names]
        actions[:] = [action for action in actions if action.dest not in names]
