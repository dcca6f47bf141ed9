"""Parse recipes (YAML) and command lines with `HfArgumentParser`, and wrap the `main` of every command."""

import dataclasses
import difflib
import functools
import inspect
import json
import logging
import math
import os
import sys
from argparse import ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.utils import CONFIG_NAME, cached_file

from .arguments import (
    PACKAGE,
    BlockArguments,
    DataArguments,
    ModelArguments,
    PretrainingArguments,
    RunArguments,
    ShareArguments,
    check_training_arguments,
    is_users,
    one_line,
    parse_blocks,
    refuse_unsupported,
)
from .configuration_noprop import NoPropConfig
from .layout import CORPUS_FILE
from .model_directory import read_config
from .parallel import GROUP_VARIABLES, arrange_processes


NO_MATPLOTLIB = "plots need matplotlib, which is not installed: pip install matplotlib"
RECIPES = PACKAGE / "recipes"
DATA_SOURCES = ("dataset_name", "dataset_config_name", "train_file", "validation_file", "test_file")
LARGEST_RECIPE = 2**16  # bytes: YAML is slow to parse, and a repository of the Hub may hold a file of any size


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

    Assigns every launched process to its group (see [`~noprop_hf.parallel.arrange_processes`]). This must precede
    `TrainingArguments`, which initialise `torch.distributed` from the environment.

    Args:
        parallelism: overrides the value of the command line.
    """

    processes = int(os.environ.get("WORLD_SIZE", 1))

    def arrange(values: Namespace) -> None:
        refuse_unsupported(values)  # before `TrainingArguments` fail on them with another message
        check_values(values)
        if parallelism is not None:
            values.parallelism = parallelism
        if values.dry_run:  # only the first process plans
            if int(os.environ.get("RANK", 0)) > 0:
                raise SystemExit(0)
            for name in GROUP_VARIABLES:
                os.environ.pop(name, None)
        config = _known_config(values)
        selected = parse_blocks(values.blocks, values.num_blocks or config.num_blocks)
        arrange_processes(values.parallelism, len(selected))
        if values.ddp_backend is not None and int(os.environ.get("WORLD_SIZE", 1)) == 1:
            raise ValueError(
                "--ddp_backend needs processes that train together: launch several with --parallelism data, or leave "
                "it out."
            )

    recipe = Recipe(
        *parse_arguments(tuple(Recipe.__annotations__.values()), description, arguments, arrange, validate_arguments)
    )
    recipe.run.processes = processes
    recipe.blocks.parallelism = parallelism or recipe.blocks.parallelism
    return recipe


def check_values(values: Namespace) -> None:
    """Check values that `TrainingArguments` would fail on, and `output_dir`.

    Raises:
        ValueError: if steps are not finite, or `output_dir` is not writable.
    """
    for name in ("logging_steps", "eval_steps", "save_steps"):
        if not math.isfinite(getattr(values, name) or 0):
            raise ValueError(f"--{name} must be positive and finite, got {getattr(values, name)}.")
    if values.output_dir == "":
        raise ValueError("--output_dir must not be empty: name a directory for the model.")
    if values.output_dir is not None:
        folder = Path(values.output_dir).expanduser().absolute()
        while not folder.exists() and not folder.is_symlink():
            folder = folder.parent
        if not folder.is_dir():
            raise ValueError(f"--output_dir {values.output_dir} cannot be created: {folder} is not a directory.")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ValueError(f"--output_dir {values.output_dir} cannot be written: no permission in {folder}.")


def _lies_in(value: float, low: float, high: float, excluded: bool) -> bool:
    return math.isfinite(value) and (low < value <= high or (value == low and not excluded))


def _words_of(low: float, high: float, excluded: bool) -> str:
    words = f"more than {low:g}" if excluded else f"at least {low:g}"
    return words + (" and finite" if high == math.inf else f" and at most {high:.10g}")


def validate_arguments(values: Namespace, given: set[str], recipe: Recipe) -> None:
    """Reject combinations of arguments that are valid alone but not together.

    Checks that the dataclasses, the configuration or transformers make before training are not repeated here.

    Args:
        values: all arguments.
        given: the names of the arguments in the recipe or on the command line.
        recipe: the dataclasses with these arguments.

    Raises:
        ValueError: if arguments exclude one another; the message names the flag to change.
    """
    check_training_arguments(recipe.training, recipe.pretraining)
    config = _known_config(values)
    from_model = values.embeddings_from is not None
    if values.push_to_hub and not values.hub_model_id:
        raise ValueError("--push_to_hub needs the name of a repository: add --hub_model_id user/name.")
    for name in ("take_over", "back_up"):
        if getattr(values, name) and not values.push_to_hub:
            raise ValueError(
                f"--{name} is for blocks that workers claim on the Hub: add --push_to_hub true --hub_model_id "
                "user/name, or leave it out. On one machine, the lock of a process ends with it."
            )
    if values.streaming and values.max_steps <= 0:
        raise ValueError("A stream has no known length to count epochs by: give a positive --max_steps.")
    if values.streaming and not from_model and (values.pretraining_max_steps or values.max_steps) <= 0:
        raise ValueError("A stream has no known length to count epochs by: give a positive --pretraining_max_steps.")
    if "eval_steps" in given and "eval_strategy" not in given:
        raise ValueError("Nothing is evaluated at --eval_steps by default: add --eval_strategy steps, or leave it out.")
    if "validation_split_percentage" in given and values.validation_file is not None:
        raise ValueError(
            "Validation data are either held out (--validation_split_percentage) or a file (--validation_file): leave "
            "one argument out."
        )
    if values.sampled_softmax and values.loss_type == "mse":
        raise ValueError(
            "--loss_type mse has no softmax: leave --sampled_softmax out, or use --loss_type cross_entropy."
        )
    if from_model and values.block_initialization == "pretraining":
        raise ValueError(
            "With --embeddings_from there is no phase 1 for blocks to start from: add --block_initialization random."
        )
    data = DataArguments(**{field.name: getattr(values, field.name) for field in dataclasses.fields(DataArguments)})
    if "" in values.sample_prompts and not data.has_boundaries:
        raise ValueError(
            "Texts are joined without a token between them, so an empty prompt has no token to begin with: remove it "
            "from --sample_prompts, or add --append_eos true."
        )
    objective = values.pretraining_objective or config.pretraining_objective
    if "mlm_probability" in given and objective == "clm" and not from_model:
        raise ValueError(
            "Nothing is masked in causal language modelling: leave --mlm_probability out, or use "
            "--pretraining_objective mlm."
        )


def _known_config(values: Namespace) -> NoPropConfig:
    """Return the configuration in `output_dir`, or else one from the arguments, before the data are read.

    Raises:
        ValueError: if a value is invalid, or sizes do not fit together.
    """
    if Path(values.output_dir or "", CONFIG_NAME).is_file():
        return read_config(values.output_dir)
    model = ModelArguments(**{field.name: getattr(values, field.name) for field in dataclasses.fields(ModelArguments)})
    fields = model.config_fields()
    if model.embeddings_from is not None or model.trunk_from is not None:
        # The width is that of the other model: any valid value does here.
        fields.setdefault("hidden_size", 2 * fields.get("num_attention_heads", NoPropConfig.num_attention_heads))
    return NoPropConfig(**fields)


def command_line(description: str, types: Sequence[type] = (), usage: str | None = None) -> HfArgumentParser:
    """Create a parser whose help and errors name the command as the user called it.

    Args:
        description: text of `--help`; `%(prog)s` stands for the command.
        types: dataclasses whose fields are arguments.
        usage: the first line of the help; default: that of `argparse`.
    """
    program = f"python {sys.argv[0]}" if sys.argv[0].endswith(".py") else sys.argv[0]
    return HfArgumentParser(
        types, prog=program, usage=usage, description=description, formatter_class=RawDescriptionHelpFormatter
    )


def parse_arguments(
    types: Sequence[type],
    description: str,
    arguments: list[str] | None = None,
    prepare: Callable[[Namespace], None] | None = None,
    check: Callable[[Namespace, set[str], Any], None] | None = None,
    model: bool = False,
) -> tuple:
    """Read a recipe and a command line, which has precedence, into dataclasses.

    Args:
        types: the dataclasses to fill.
        description: text of `--help`, see [`command_line`].
        arguments: `[RECIPE.yaml] [--name value ...]`; default: those of the process.
        prepare: called with the values before the dataclasses are created.
        check: called last, with the values, the names of the given arguments, and the dataclasses.
        model: whether the first word is a model instead of a recipe; its `corpus.yaml`, if any, gives defaults.

    Returns:
        One instance per dataclass, in order; with `model`, its name comes first.
    """
    first_word = "MODEL" if model else "[RECIPE.yaml]"
    parser = command_line(description, types, f"%(prog)s {first_word} [--name value ...]")
    _group(parser, types)
    if model:
        parser.add_argument("model", help="A model directory, or a repository of the Hub.")
    else:
        help = "A recipe: a YAML file of the arguments below, or the name of one, such as demo."
        parser.add_argument("recipe", nargs="?", default=None, help=help)
    arguments = sys.argv[1:] if arguments is None else arguments
    first = arguments[0] if arguments and not arguments[0].startswith("-") else None
    try:
        find = find_corpus_file if model else find_recipe
        recipe = None if first is None else find(first)
        defaults = {} if recipe is None else _read_recipe(Path(recipe), parser, types)
        blank = Namespace(**dict.fromkeys(_names(parser)))
        values, _ = parser.parse_known_args(arguments, blank)
        named = {name: value for name, value in vars(values).items() if value is not None}
        if {"train_file", "dataset_name"} & named.keys():  # other data than those of the recipe
            defaults = {name: value for name, value in defaults.items() if name not in DATA_SOURCES}
        parser.set_defaults(**defaults)
        values, unknown = parser.parse_known_args(arguments)
        if unknown:
            raise ValueError(_no_argument(unknown[0].partition("=")[0], _names(parser), "--"))
        if first is None and (values.model if model else values.recipe) is not None:
            raise ValueError(f"Give the {first_word.strip('[]')} before all options.")
        if prepare is not None:
            prepare(values)
        try:
            *parsed, rest = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
        except json.JSONDecodeError as error:
            raise ValueError(f"{error.doc!r} is not JSON: {error}.") from error
        except (
            TypeError,
            ArithmeticError,
            ImportError,
            NotImplementedError,
        ) as error:  # raised by transformers for values of its arguments
            raise ValueError(one_line(error)) from error
        if check is not None:
            check(values, named.keys() | defaults.keys(), Recipe(*parsed))
    except (OSError, ValueError) as error:
        parser.error(one_line(error))
    return (rest.model, *parsed) if model else tuple(parsed)


def find_recipe(word: str) -> Path:
    """Find a recipe: a file, or else one of this package by a name such as `demo`."""
    shipped = {name: path for path in RECIPES.glob("*.yaml") for name in (Path(path.stem), Path("recipes", path.name))}
    path = Path(word)
    return path if path.is_file() else shipped.get(path, path)


def find_corpus_file(model: str) -> str | None:
    """Find the file that describes the corpus of a model's training, if the model has one.

    Raises:
        ValueError: if the model does not exist.
    """
    read_config(model)
    return cached_file(model, CORPUS_FILE, _raise_exceptions_for_missing_entries=False)


class _RecipeLoader(yaml.SafeLoader):
    """Load YAML without duplicate names, and without aliases of lists or mappings, whose size can explode."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a name must be a word", key.start_mark)
            if key.value in names:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            names.add(key.value)
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        is_alias = self.check_event(yaml.AliasEvent)
        mark = self.peek_event().start_mark
        node = super().compose_node(parent, index)
        if is_alias and not isinstance(node, yaml.ScalarNode):
            raise yaml.composer.ComposerError(None, None, "an alias must stand for a single value", mark)
        return node


def _read_recipe(path: Path, parser: HfArgumentParser, types: Sequence[type]) -> dict[str, Any]:
    """Read the values of a recipe as defaults for `argparse`: strings, which it converts like those of a command line.

    Raises:
        ValueError: if the file cannot be read, or an argument is unknown, given twice or of the wrong type.
    """
    if not path.is_file():
        names = ", ".join(sorted(shipped.stem for shipped in RECIPES.glob("*.yaml")))
        fault = f"There is no recipe {str(path)!r}." + " It is a directory." * path.is_dir()
        raise ValueError(f"{fault} Give a YAML file, or the name of one: {names}.")
    if path.stat().st_size > LARGEST_RECIPE:
        raise ValueError(f"{path} is not a recipe: it has more than {LARGEST_RECIPE:,} bytes.")
    try:
        values = yaml.load(path.read_text(encoding="utf-8-sig"), _RecipeLoader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{line}: {error.problem}. A recipe is a YAML file of `name: value` lines.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a recipe, a YAML file of `name: value` lines: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a recipe: it must be a YAML file of `name: value` lines.")
    actions = {action.dest: action for action in parser._actions}
    hints = {name: hint for kind in types for name, hint in get_type_hints(kind).items()}
    words: dict[str, str | list[str]] = {}
    for name, value in values.items():
        if name not in _names(parser):
            raise ValueError(f"{path}: {_no_argument(str(name), _names(parser))}")
        if isinstance(value, list):
            if "list" not in str(hints[name]) or any(isinstance(item, list | dict | None) for item in value):
                raise ValueError(f"{path}: {name} must not be this list: give " + _expected(hints[name]))
            words[name] = [str(item) for item in value]
        elif isinstance(value, dict):
            if "dict" not in str(hints[name]):
                raise ValueError(f"{path}: {name} must not be a mapping: give " + _expected(hints[name]))
            words[name] = json.dumps(value, default=str)
        elif value is not None:
            words[name] = [str(value)] if actions[name].nargs == "+" else str(value)
    return words


def _expected(hint: Any) -> str:
    return "a list of words." if "list" in str(hint) else "a single value."


def _names(parser: HfArgumentParser) -> list[str]:
    return [action.dest for action in parser._actions if action.option_strings and action.dest != "help"]


def _no_argument(name: str, known: list[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name.removeprefix(prefix), known, n=1)
    return f"there is no argument {name!r}." + (f" Did you mean {prefix + near[0]!r}?" if near else "")


def _group(parser: HfArgumentParser, types: Sequence[type]) -> None:
    """Group the arguments in the help by dataclass, under the first line of its docstring."""
    actions = parser._optionals._group_actions
    for dtype in sorted(types, key=lambda dtype: dtype is not RunArguments):  # the short one comes first
        title = inspect.cleandoc(dtype.__doc__ or "").splitlines()[0].removesuffix(".")
        if title.startswith(f"{dtype.__name__}("):  # no docstring: Python generates one
            title = dtype.__name__
        names = {field.name for field in dataclasses.fields(dtype)}
        parser.add_argument_group(title)._group_actions += [action for action in actions if action.dest in names]
        actions[:] = [action for action in actions if action.dest not in names]


# --- commands --------------------------------------------------------------------------------------------------------


def entry_point(main: Callable[[], None]) -> Callable[[], None]:
    """Decorate the `main` of a command with error handling.

    An error that the user can correct ends the process with one sentence and status 1, an interruption (Ctrl-C) with
    status 130. Every other error keeps its traceback.
    """

    @functools.wraps(main)
    def run() -> None:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # a terminal may lack characters of a text
        try:
            with _logging_to_stderr():
                main()
        except KeyboardInterrupt:
            raise SystemExit(128 + 2) from None  # the status of a process that SIGINT ended
        except Exception as error:
            if not is_users(error):
                raise
            raise SystemExit(one_line(error)) from error

    return run


@contextmanager
def _logging_to_stderr() -> Iterator[None]:
    """Print the log of this package to stderr, from level INFO."""
    logger, handler = logging.getLogger(PACKAGE.name), logging.StreamHandler()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def number(kind: Callable[[str], Any], low: float, high: float = math.inf, excluded: bool = False) -> Callable:
    """Create a type for `argparse`: a number of at least (with `excluded`, more than) `low`, and at most `high`."""

    def read(word: str) -> float:
        value = kind(word)
        if not _lies_in(value, low, high, excluded):
            raise ArgumentTypeError(f"must be {_words_of(low, high, excluded)}: got {word}")
        return value

    read.__name__ = getattr(kind, "__name__", "number")  # "invalid int value"
    return read


def picture(word: str) -> Path:
    """Return the path of an image that matplotlib can write; a type for `argparse`.

    Raises:
        ArgumentTypeError: if matplotlib is not installed, the folder does not exist, or the ending is unknown.
    """
    path = Path(word)
    try:
        from matplotlib.backend_bases import FigureCanvasBase  # of the extra `plot`
    except ModuleNotFoundError as error:
        raise ArgumentTypeError(NO_MATPLOTLIB) from error
    endings = FigureCanvasBase.get_supported_filetypes()
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ArgumentTypeError(f"{word} cannot be written: it is a directory, or its directory does not exist")
    if path.suffix.lstrip(".").lower() not in endings:
        raise ArgumentTypeError(f"{word} must end in one of {', '.join(endings)}")
    return path
