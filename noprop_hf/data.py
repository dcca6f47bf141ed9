"""Data pipeline from text to windows of tokens: corpora, tokenizers, packing, collators."""

import ast
import codecs
import copy
import gzip
import hashlib
import json
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    List,
    Value,
    load_dataset,
)
from datasets.exceptions import DatasetsError
from datasets.fingerprint import Hasher
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    TrainingArguments,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.utils import logging

from .arguments import CPYTHON_DOCS, DataArguments, file_format, is_compressed


logger = logging.get_logger(__name__)

END_OF_TEXT = "<|endoftext|>"
PROBE = "A text, 2 lines\n of na\u00efve \u6f22\u5b57."  # a text on which tokenizers are compared
TOKENS_AT_ONCE = 2**17  # tokens per batch while windows are cut


# --- corpora ----------------------------------------------------------------------------------------------------------


def cpython_docs() -> Iterator[dict[str, str]]:
    """Yield the documentation of the running Python: its language reference, then docstrings of its standard library.

    Source files are read without importing them, in a fixed order, and duplicate texts are dropped. Tests, and packages
    that distributors ship separately, are excluded, so that a Python version always gives the same corpus. A hash of
    the text decides its split, which therefore does not depend on other texts.

    Yields:
        `{"text": ..., "split": "train" | "validation" | "test"}`, with 90, 5 and 5 percent of the texts.
    """
    from pydoc_data.topics import topics  # 500 kB, for this corpus alone

    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "tkinter", "turtledemo", "lib2to3"}
    left_out |= {"distutils", "ensurepip", "pydoc_data", "__phello__", "lib-dynload"}
    texts = [topics[name] for name in sorted(topics)]
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if left_out.intersection(parts) or parts[0].startswith("config-"):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:  # templates that are not Python yet
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                texts.append(ast.get_docstring(node) or "")
    for text in dict.fromkeys(text.strip() for text in texts):
        if text:
            bucket = int(hashlib.sha256(text.encode()).hexdigest(), 16) % 20
            yield {"text": text, "split": {0: "validation", 1: "test"}.get(bucket, "train")}


def load_corpus(args: DataArguments) -> DatasetDict | IterableDatasetDict:
    """Load the raw text of every split of a corpus.

    Returns:
        A dictionary with the splits `train`, `validation` and, if the corpus has one, `test`; each has a column
        `args.text_column_name`.

    Raises:
        ValueError: if the corpus cannot be read, the text column is missing or holds no text, or a split is empty.
    """
    if args.dataset_name == CPYTHON_DOCS:
        rows = list(cpython_docs())
        splits = DatasetDict()
        for split in ("train", "validation", "test"):
            texts = [row["text"] for row in rows if row["split"] == split]
            splits[split] = Dataset.from_dict({args.text_column_name: texts})
        if args.streaming:
            splits = IterableDatasetDict({split: rows.to_iterable_dataset() for split, rows in splits.items()})
    elif args.dataset_name is not None:
        if Path(args.dataset_name).is_file():
            raise ValueError(f"{args.dataset_name!r} is a file: give it as --train_file.")
        with _readable(f"the dataset {args.dataset_name!r} (a name on the Hub, or a directory of data files)"):
            splits = load_dataset(args.dataset_name, args.dataset_config_name, streaming=args.streaming)
    else:
        splits = (IterableDatasetDict if args.streaming else DatasetDict)()
    for split, file in args.files().items():
        splits[split] = _load_file(file, args)

    if "train" not in splits:
        raise ValueError(f"The dataset has no 'train' split, only {sorted(splits)}.")
    for split in [name for name in splits if name not in ("train", "validation", "test")]:
        del splits[split]
    for split, rows in splits.items():
        source = args.files().get(split) or args.dataset_name
        _check_texts(rows, args.text_column_name, f"The {split} split ({source})")
    if "validation" not in splits:
        splits = _hold_out(splits, args)
    for split, rows in splits.items():
        limit = args.max_train_samples if split == "train" else args.max_eval_samples
        if limit is not None:
            splits[split] = rows.take(limit) if args.streaming else rows.select(range(min(limit, len(rows))))
        if not args.streaming and len(splits[split]) == 0:
            raise ValueError(f"The {split} split is empty.")
    return splits


@contextmanager
def _readable(what: str, file: str | None = None) -> Iterator[None]:
    """Replace errors of `datasets` about unreadable data by one sentence.

    Args:
        what: the name of the data in the message.
        file: the local file, if the data are in one.

    Raises:
        ValueError: if the data cannot be read; the message gives the reason of the innermost error.
    """
    try:
        yield
    except (DatasetsError, OSError, ValueError, ImportError, RuntimeError, EOFError, zlib.error) as error:
        if isinstance(error, RuntimeError) and "Dataset scripts" not in str(error):
            raise
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = (file and _broken_json(file)) or " ".join(str(cause).split())[:300] or type(cause).__name__
        if "corresponds to no data" in reason:
            reason = "it holds no rows"
        if isinstance(cause, EOFError | zlib.error):  # of gzip
            reason = f"{reason.rstrip('.')}; it may have been cut off"
        raise ValueError(f"Cannot read {what}: {reason.rstrip('.!')}.") from error


def _broken_json(file: str) -> str | None:
    """Describe the first line of a JSON lines file that is not JSON, if any."""
    if file_format(file) != "json":
        return None
    with _open(file, "rt", encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if number == 1 and line.lstrip().startswith("["):
                return None  # one array, of any number of lines
            try:
                json.loads(line or "null")
            except ValueError as error:
                if line.strip():
                    return f"line {number} is not JSON ({error}); it may have been cut off"
    return None


def _open(file: str, mode: str, encoding: str | None = None) -> Any:
    return (gzip.open if is_compressed(file) else open)(file, mode, encoding=encoding)


def _check_texts(rows: Dataset | IterableDataset, column: str, what: str) -> None:
    """Check that a column of a split holds text: by its type or, in a stream, by its first rows.

    Raises:
        ValueError: if the column is missing or holds no text, or the split is empty.
    """
    if isinstance(rows, IterableDataset):
        with _readable(what[0].lower() + what[1:]):
            head = list(rows.take(100))
        columns = list(head[0]) if head else [column]
        kinds = {type(row.get(column)).__name__ for row in head} - {"str", "NoneType"}
        number, kind = len(head), ", ".join(sorted(kinds))
    else:
        columns, number = rows.column_names, len(rows)
        feature = rows.features.get(column)
        is_text = isinstance(feature, Value) and feature.dtype in ("string", "large_string", "null")
        kind = "" if is_text else str(feature)
    if number == 0:
        raise ValueError(f"{what} is empty.")
    if column not in columns:
        raise ValueError(
            f"{what} has no column {column!r}; it has {columns}. Give the column that holds the text as "
            "--text_column_name."
        )
    if kind:
        hint = " Convert chat messages to text first." if "role" in kind or kind == "list" else ""
        raise ValueError(
            f"{what} holds {kind} in its column {column!r}, not text. Give a column of strings as --text_column_name, "
            f"one of {columns}, or convert this one.{hint}"
        )


def _load_file(file: str, args: DataArguments) -> Dataset | IterableDataset:
    if Path(file).is_dir():
        raise ValueError(f"{file!r} is a directory, not a file: give a directory of data as --dataset_name.")
    if not Path(file).is_file():
        raise ValueError(f"There is no file {file!r}.")
    if Path(file).stat().st_size == 0:
        raise ValueError(f"The file {file!r} is empty.")
    builder = file_format(file)
    if builder != "parquet":
        _check_encoding(file)
    # With packing, lines are joined again and keep their breaks. A byte order mark is not part of the text.
    options = {"keep_linebreaks": args.packing, "encoding": "utf-8-sig"} if builder == "text" else {}
    with _readable(f"the file {file!r}", file):
        return load_dataset(builder, data_files=file, split="train", streaming=args.streaming, **options)


def _check_encoding(file: str) -> None:
    """Check that a file is text in UTF-8.

    Raises:
        ValueError: if the file is not UTF-8; the message names the first such line. If it is compressed: if it cannot
            be unpacked, or is empty then.
    """
    advice = (
        "Unpack it if it is compressed, or convert it to UTF-8, such as with "
        f"`iconv -f latin1 -t utf-8 {file}` (or -f utf-16)."
    )
    decoder, line = codecs.getincrementaldecoder("utf-8")(), 1
    with _open(file, "rb") as stream:
        while True:
            with _readable(f"the file {file!r}"):
                piece = stream.read(2**20)
            try:
                decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                line += error.object[: error.start].count(b"\n")
                raise ValueError(f"The file {file!r} is not UTF-8 text, first in line {line}. {advice}") from error
            if piece.count(0) * 10 > len(piece):
                raise ValueError(f"The file {file!r} is not UTF-8 text: it is full of zero bytes. {advice}")
            line += piece.count(b"\n")
            if not piece:
                break
        if stream.tell() == 0:
            raise ValueError(f"The file {file!r} is empty.")


def _hold_out(splits: DatasetDict | IterableDatasetDict, args: DataArguments) -> DatasetDict:
    """Hold out the last part of the training split for validation: rows or, if they are few, text.

    Raises:
        ValueError: if the split is a stream, or one of both parts would be empty.
    """
    if args.streaming:
        raise ValueError("A streamed dataset without a validation split needs --validation_file or another dataset.")
    rows, share = splits["train"], args.validation_split_percentage / 100
    if not 0 < share < 1:
        raise ValueError(
            f"Cannot hold out {args.validation_split_percentage}% of the training split for validation. Give a "
            "validation split (--validation_file), or a --validation_split_percentage between 0 and 100."
        )
    held_out = round(len(rows) * share)
    if 0 < held_out < len(rows):
        parts = rows.train_test_split(test_size=held_out, shuffle=False, seed=0)  # the seed makes it cacheable
        return DatasetDict({**splits, "train": parts["train"], "validation": parts["test"]})
    texts = [text for text in rows[args.text_column_name] if text]
    before, after = _cut_texts(texts, share)
    parts = {"train": before, "validation": after}
    if not before or not after:
        raise ValueError(
            f"Cannot hold out {args.validation_split_percentage}% of {sum(map(len, texts))} characters of text for "
            "validation. Give more text, or a validation split (--validation_file)."
        )
    return DatasetDict(
        {**splits, **{split: Dataset.from_dict({args.text_column_name: part}) for split, part in parts.items()}}
    )


def _cut_texts(texts: list[str], share: float) -> tuple[list[str], list[str]]:
    """Cut a list of texts in two, between two words, so that the second part has about `share` of the characters."""
    left = round(sum(map(len, texts)) * (1 - share))
    for index, text in enumerate(texts):
        if left < len(text):
            cut = max(text.rfind(" ", 0, left), text.rfind("\n", 0, left))
            cut = left if cut < 0 else cut
            parts = [*texts[:index], text[:cut]], [text[cut:], *texts[index + 1 :]]
            return [part for part in parts[0] if part], [part for part in parts[1] if part]
        left -= len(text)
    return texts, []


# --- tokenizer --------------------------------------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str], vocab_size: int, model_max_length: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with pad, mask, bos and eos tokens.

    As in GPT-2, one token ends a text and begins the next.
    """
    end, pad, mask = END_OF_TEXT, "<|pad|>", "<|mask|>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[end, pad, mask],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=end,
        eos_token=end,
        pad_token=pad,
        mask_token=mask,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(name_or_path: str, vocab_size: int | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer from the Hub or a local directory, without running code that comes with it.

    Args:
        vocab_size: the number of embeddings of its model.

    Raises:
        ValueError: if no tokenizer can be loaded under that name, or it has more entries than the model.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"Cannot load the tokenizer {name_or_path!r}. Give a directory that holds one, or a name on the Hub "
            "(and a connection to it); leave --tokenizer_name out to train one on the training split."
        ) from error
    if vocab_size is not None and vocabulary_size(tokenizer) > vocab_size:
        raise ValueError(
            f"The tokenizer of {name_or_path} has ids up to {vocabulary_size(tokenizer) - 1}, but the model has "
            f"{vocab_size} embeddings: restore the tokenizer that was saved with the model."
        )
    return tokenizer


def prompt_tokenizer(tokenizer: PreTrainedTokenizerBase, args: DataArguments) -> PreTrainedTokenizerBase:
    """Convert a tokenizer for a causal model, without changing how it cuts text into tokens.

    The result returns `input_ids` and `attention_mask` only, and puts its bos token, if it has one, before a prompt and
    nothing after it. It has an eos and a pad token. A token that is missing is replaced by another one (bos by eos, eos
    by sep or bos, pad by eos, since padding is identified by the attention mask); a tokenizer with no candidate for eos
    gets a new token. The result has a bos token only if texts begin with it in the rows of [`tokenize`].

    Saved with a model, the result is loaded by the stock `AutoTokenizer`, without code of its own.

    Args:
        tokenizer: a tokenizer, as [`load_tokenizer`] returns it.
        args: the data arguments of the model's training.

    Raises:
        ValueError: if no stock class can encode prompts in this way with the given tokenizer.
    """
    for candidate in _prompt_tokenizers(tokenizer, args):
        with TemporaryDirectory() as folder:
            candidate.save_pretrained(folder)
            loaded = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer(PROBE, add_special_tokens=False, verbose=False)["input_ids"]
        prompt = ids if loaded.bos_token_id is None else [loaded.bos_token_id, *ids]
        trained = args.has_boundaries or loaded.bos_token is None
        if trained and dict(loaded(PROBE, verbose=False)) == {"input_ids": prompt, "attention_mask": [1] * len(prompt)}:
            return candidate
    raise ValueError(
        f"{type(tokenizer).__name__} adds special tokens to a prompt that a causal model cannot continue from, and they"
        " cannot be switched off. Use another --tokenizer_name, or leave it out to train a tokenizer."
    )


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of embeddings that a tokenizer needs: its highest id and one more, as ids may have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def _prompt_tokenizers(tokenizer: PreTrainedTokenizerBase, args: DataArguments) -> Iterator[PreTrainedTokenizerBase]:
    """Yield candidates: the common class of fast tokenizers; for a slow tokenizer its own class, then conversions."""
    names = {name: getattr(tokenizer, name) for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES}
    eos = names["eos_token"] or names["sep_token"] or names["bos_token"] or END_OF_TEXT
    names["bos_token"] = (names["bos_token"] or eos) if args.has_boundaries else None
    names |= {"eos_token": eos, "pad_token": names["pad_token"] or eos}
    options = {
        "model_max_length": args.max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "right",  # as training and perplexity need it; pipelines and lm-eval switch to the left
    }
    if tokenizer.is_fast:
        yield _fast_prompt_tokenizer(tokenizer.backend_tokenizer, tokenizer, names, options)
    else:
        yield _slow_prompt_tokenizer(tokenizer, names, options)
        for backend in _conversions(tokenizer):
            yield _fast_prompt_tokenizer(backend, tokenizer, names, options)


def _fast_prompt_tokenizer(
    backend: Tokenizer, tokenizer: PreTrainedTokenizerBase, names: dict[str, str | None], options: dict[str, Any]
) -> PreTrainedTokenizerFast:
    parts = json.loads(backend.to_str())
    parts |= {"padding": None, "truncation": None, "post_processor": None}
    vocab, tokens = parts["model"]["vocab"], [token for token in names.values() if token is not None]
    if isinstance(vocab, dict):  # whose ids may have gaps: added tokens keep their ids, new ones come after all others
        vocab |= {token["content"]: token["id"] for token in parts["added_tokens"]}
        for token in tokens:
            vocab.setdefault(token, max(vocab.values()) + 1)
    backend = Tokenizer.from_str(json.dumps(parts))
    backend.add_special_tokens(tokens)
    bos = names["bos_token"]
    start = [] if bos is None else ["bos"]
    backend.post_processor = processors.TemplateProcessing(
        single=[*start, "$A"],
        pair=[*start, "$A", "$B:1"],
        special_tokens=[] if bos is None else [{"id": "bos", "ids": [backend.token_to_id(bos)], "tokens": [bos]}],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
        chat_template=tokenizer.chat_template,
        extra_special_tokens=tokenizer.extra_special_tokens,
        **names,
        **options,
    )


def _slow_prompt_tokenizer(
    tokenizer: PreTrainedTokenizerBase, names: dict[str, str | None], options: dict[str, Any]
) -> PreTrainedTokenizerBase:
    """Change tokens and options of a slow tokenizer, whose class decides what precedes a prompt."""
    result = copy.deepcopy(tokenizer)
    first = result(PROBE)["input_ids"][:1]
    starts = first != result(PROBE, add_special_tokens=False)["input_ids"][:1]
    names = names | {"bos_token": result.convert_ids_to_tokens(first[0]) if starts else None}
    for name, token in names.items():
        if token is not None and token not in result.get_vocab():
            result.added_tokens_decoder = {vocabulary_size(result): AddedToken(token, special=True)}
        setattr(result, name, token)
    for name, value in options.items():
        setattr(result, name, value)
    result.init_kwargs |= names | options
    return result


def _conversions(tokenizer: PreTrainedTokenizerBase) -> Iterator[Tokenizer]:
    """Yield fast tokenizers that may cut text as a slow one does."""
    vocab, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    if all(chr(byte) in vocab for byte in range(256)):  # tokens are bytes, as in ByT5
        ids = {char: vocab[chr(byte)] for byte, char in bytes_to_unicode().items()}
        backend = Tokenizer(models.BPE(ids | {token.content: index for index, token in added.items()}, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_tokens(list(added.values()))
        yield backend
    file = str(getattr(tokenizer, "vocab_file", ""))
    if file.endswith(".model"):  # of sentencepiece
        yield PreTrainedTokenizerFast(
            **PreTrainedTokenizerFast.convert_to_native_format(vocab_file=file)
        ).backend_tokenizer


# --- tokens -----------------------------------------------------------------------------------------------------------


def tokenize(
    splits: DatasetDict | IterableDatasetDict, tokenizer: PreTrainedTokenizerBase, args: DataArguments
) -> DatasetDict | IterableDatasetDict:
    """Tokenize every split into contiguous windows of `max_length` tokens or, without packing, one sample per row.

    Later phases, blocks and processes find the tokens in the cache of `datasets`.

    Packing joins all rows of a split and drops only the tokens after the last whole window: texts become an Arrow table
    of one token per row, and every `max_length` rows make a window. Neither a split nor its tokens are held in memory.

    Raises:
        ValueError: if a split has too little text for one window, or the tokenizer lacks a pad token that is needed.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if not args.packing and tokenizer.pad_token_id is None:
        raise ValueError("--packing false needs a tokenizer with a pad token, and this one has none.")

    token, row = Value("int32"), List(Value("int32"))
    options: dict[str, Any] = {"batched": True}
    cut_options: dict[str, Any] = {
        "batched": True,
        "batch_size": max(1, TOKENS_AT_ONCE // args.max_length) * args.max_length,  # whole windows
        "fn_kwargs": {"length": args.max_length},
    }
    if not args.streaming:
        options |= {
            "num_proc": args.preprocessing_num_workers,
            "features": Features({"input_ids": token if args.packing else row}),
            "writer_batch_size": TOKENS_AT_ONCE if args.packing else None,
            "desc": "Tokenizing",
        }
        cut_options |= {"features": Features({"input_ids": row}), "desc": "Packing"}

    tokens, behaviour = {}, None if args.streaming else _behaviour(tokenizer)
    for split, rows in splits.items():
        prefix, suffix = ([] if token is None else [token] for token in (bos, eos))
        if args.packing and bos == eos:
            prefix = []  # the end of a text begins the next one
        if args.packing and not args.ends_texts(split):
            prefix, suffix = [], []
        limit = None if args.packing else args.max_length - len(prefix) - len(suffix)
        encode_options = {"tokenizer": tokenizer, "prefix": prefix, "suffix": suffix, "limit": limit}
        encode_options |= {"column": args.text_column_name, "joined": args.packing}
        if not args.streaming:
            known = encode_options | {"tokenizer": behaviour}
            options["new_fingerprint"] = Hasher.hash((rows._fingerprint, _encode, known))
        tokens[split] = rows.with_format("arrow").map(
            _encode,
            remove_columns=rows.column_names or [args.text_column_name],
            fn_kwargs=encode_options,
            **options,
        )
        if args.packing:
            tokens[split] = tokens[split].map(_cut_windows, **cut_options)
        tokens[split] = tokens[split].with_format(None)
        if next(iter(tokens[split]), None) is None:
            what = f"one window of {args.max_length} tokens" if args.packing else "one sample"
            more = ", or hold out more with --validation_split_percentage" * (split == "validation")
            raise ValueError(
                f"The {split} split has too little text for {what}. Give more text or a smaller --max_length{more}."
            )
    return (IterableDatasetDict if args.streaming else DatasetDict)(tokens)


def _behaviour(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the parts of a tokenizer that affect its tokens, as a cache key.

    A tokenizer and its copy in a model directory therefore share cached tokens.
    """
    if not tokenizer.is_fast:
        return Hasher.hash(tokenizer)
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    # As one string: a dictionary takes a second to hash.
    return json.dumps(parts | dict.fromkeys(("truncation", "padding", "post_processor")))


def _encode(
    table: pa.Table,
    tokenizer: PreTrainedTokenizerBase,
    column: str,
    prefix: list[int],
    suffix: list[int],
    limit: int | None,
    joined: bool,
) -> pa.Table:
    """Encode the non-empty texts of a column, cut to `limit` tokens and put between prefix and suffix.

    With `joined`, every row of the result is one token, otherwise the tokens of one text.
    """
    texts = table[column].to_pylist()
    for text in texts:
        if not isinstance(text, str | None):  # in later rows of a stream, which were not checked
            raise ValueError(
                f"The column {column!r} holds {type(text).__name__} in a row ({str(text)[:40]!r}): give a column of "
                "strings as --text_column_name."
            )
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    encoded = tokenizer([text or "" for text in texts], **options)["input_ids"]
    rows = [prefix + row[:limit] + suffix for row in encoded if row]
    if joined:
        return pa.table({"input_ids": pa.array(list(chain.from_iterable(rows)), pa.int32())})
    return pa.table({"input_ids": pa.array(rows, pa.list_(pa.int32()))})


def _cut_windows(table: pa.Table, length: int) -> pa.Table:
    """Cut rows of one token into windows of `length` tokens, and drop the rest."""
    tokens = table["input_ids"].combine_chunks()
    windows = len(tokens) // length
    offsets = pa.array(np.arange(windows + 1) * length, pa.int32())
    return pa.table({"input_ids": pa.ListArray.from_arrays(offsets, tokens[: windows * length])})


def data_fingerprint(rows: Dataset | IterableDataset) -> str:
    """Hash the tokens of a split and its windows; the hash is the same on every machine."""
    digest = hashlib.sha256()
    for batch in rows.with_format("numpy").iter(batch_size=1000):
        for row in batch["input_ids"]:
            digest.update(len(row).to_bytes(8, "little") + np.asarray(row, dtype=np.int64).tobytes())
    return digest.hexdigest()


def data_identity(
    data: str, dataset: Mapping[str, Dataset | IterableDataset], args: TrainingArguments
) -> dict[str, str]:
    """Identify the data that a result depends on.

    They include the validation split if it decides which weights are kept.

    Args:
        data: the fingerprint of the training split.
    """
    identity = {"data": data}
    if args.load_best_model_at_end:
        identity["validation_data"] = data_fingerprint(dataset["validation"])
    return identity


def training_fingerprint(rows: Dataset | IterableDataset, args: DataArguments) -> str:
    """Return the [`data_fingerprint`] of a training split.

    For a stream, which may be endless, it covers the first thousand rows, the size of the file and `max_train_samples`.
    """
    if not isinstance(rows, IterableDataset):
        return data_fingerprint(rows)
    size = None if args.train_file is None else Path(args.train_file).stat().st_size
    parts = ["stream", data_fingerprint(rows.take(1000)), size, args.max_train_samples]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def count_tokens(dataset: Dataset | IterableDataset, vocab_size: int, max_rows: int = 100_000) -> torch.Tensor:
    """Count each token in the first `max_rows` rows, and return a `(vocab_size,)` integer tensor."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for batch in dataset.take(max_rows).iter(batch_size=1000):
        counts += np.bincount(np.concatenate(batch["input_ids"]), minlength=vocab_size)
    return torch.from_numpy(counts)


@dataclass
class CausalCollator(DataCollatorWithPadding):
    """Pad a batch and add labels: the tokens, with padding (by the attention mask, not by the id) ignored."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = super().__call__(features)
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        if bool(batch["attention_mask"].all()):
            del batch["attention_mask"]  # nothing is padded, and attention is faster without a mask
        return batch


@dataclass
class PretrainingCollator(DataCollatorForLanguageModeling):
    """The stock collator for masked language modelling, with masks drawn from `run_seed` and the batch itself.

    Batches are collated ahead of the step that uses them, so masks from torch's global random numbers would differ
    after a resume. These masks do not, with any number of data loader workers.
    """

    run_seed: int = 0

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        tokens = np.concatenate([np.asarray(example["input_ids"], dtype=np.int64) for example in examples])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(tokens.tobytes(), self.run_seed))
            return super().torch_call(examples)
