import gzip
import json
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDatasetDict
from transformers import AutoTokenizer

from conftest import run_python, sentences
from noprop_hf import data
from noprop_hf.data import (
    CausalCollator,
    DataArguments,
    PretrainingCollator,
    count_tokens,
    cpython_docs,
    load_corpus,
    load_tokenizer,
    tokenize,
    train_tokenizer,
)


@pytest.fixture(scope="module")
def docs() -> list[dict[str, str]]:
    return list(cpython_docs())


def test_cpython_docs(docs):
    texts = [row["text"] for row in docs]
    assert sum(map(len, texts)) > 1_500_000
    assert len(set(texts)) == len(texts)
    splits = ("train", "validation", "test")
    shares = {split: sum(row["split"] == split for row in docs) / len(docs) for split in splits}
    assert shares["train"] == pytest.approx(0.9, abs=0.02)
    assert shares["validation"] == pytest.approx(0.05, abs=0.01)
    assert any("The compound statements" in text or "compound statement" in text for text in texts)


def test_cpython_docs_depend_on_the_sources_alone(docs, tmp_path, monkeypatch):
    """Not on the order in which a file system lists them, and not on what is left out."""
    library, found = Path(sysconfig.get_path("stdlib")), []
    left_out = tmp_path / "two" / "test" / "test_json.py"
    left_out.parent.mkdir(parents=True)
    left_out.write_text('"""A text of a test."""')
    sources = [path.relative_to(library) for folder in ("email", "json") for path in library.glob(f"{folder}/*.py")]
    for name, order in (("one", sources), ("two", sources[::-1])):
        root = tmp_path / name
        for path in order:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library / path, root / path)
        monkeypatch.setattr(sysconfig, "get_path", lambda _, root=root: str(root))
        found.append(list(cpython_docs()))
    assert found[0] == found[1]
    assert len(found[0]) > 300 and {row["text"] for row in found[0]} < {row["text"] for row in docs}


def test_a_document_stays_in_its_split(docs):
    """The split is told by the text alone: known texts, known splits."""
    import hashlib

    for row in docs[::50]:
        bucket = int.from_bytes(hashlib.sha256(row["text"].encode()).digest(), "big") % 20
        assert row["split"] == ["validation", "test"][bucket] if bucket < 2 else row["split"] == "train"


def test_tokenizer_round_trip_and_special_tokens(tmp_path):
    tokenizer = train_tokenizer(sentences(200), 320, 64)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.is_fast and len(loaded) <= 320
    for text in ("the cat sat.", "  Ünïcode\n\tand  spaces — 漢字 🙂", ""):
        assert loaded.decode(loaded(text)["input_ids"]) == text
    for token in (loaded.pad_token, loaded.mask_token, loaded.bos_token, loaded.eos_token):
        assert len(loaded(token)["input_ids"]) == 1
    assert loaded.pad_token_id != loaded.eos_token_id


def test_packed_windows_are_the_raw_text(tokenizer):
    texts = [*sentences(50), "", "  two  spaces "]
    splits = DatasetDict(train=Dataset.from_dict({"text": texts}))
    args = DataArguments(dataset_name="some/documents", max_length=16)
    rows = tokenize(splits, tokenizer, args)["train"]["input_ids"]
    assert all(len(row) == 16 for row in rows)
    joined = "".join(text + tokenizer.eos_token for text in texts if text)
    packed = tokenizer.decode([token for row in rows for token in row])
    assert joined.startswith(packed)
    left = tokenizer(joined[len(packed) :])["input_ids"]
    assert len(left) < 16


def test_lines_of_a_text_file_are_joined_as_they_were(tmp_path, tokenizer):
    text = "\n".join(sentences(60)[:30] + ["", "  indented"] + sentences(60)[30:]) + "\n"
    (tmp_path / "text.txt").write_text(text)
    args = DataArguments(
        train_file=str(tmp_path / "text.txt"), validation_file=str(tmp_path / "text.txt"), max_length=8
    )
    rows = tokenize(load_corpus(args), tokenizer, args)["train"]["input_ids"]
    packed = tokenizer.decode([token for row in rows for token in row])
    assert text.startswith(packed) and len(text) - len(packed) < 40


def test_one_line_is_one_sample(corpus_file, tokenizer):
    args = DataArguments(train_file=corpus_file, packing=False, max_length=6)
    rows = tokenize(load_corpus(args), tokenizer, args)
    assert len(rows["train"]) + len(rows["validation"]) == 400
    assert max(map(len, rows["train"]["input_ids"])) <= 6
    wide = DataArguments(train_file=corpus_file, packing=False, max_length=64)
    rows = tokenize(load_corpus(wide), tokenizer, wide)["train"]
    first = rows[0]["input_ids"]
    assert first[0] == tokenizer.bos_token_id and first[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(first[1:-1]) == sentences(400)[0]
    batch = CausalCollator(tokenizer)([rows[i] for i in range(8)])
    padding = batch["attention_mask"] == 0
    assert padding.any()
    assert (batch["input_ids"][padding] == tokenizer.pad_token_id).all()
    assert torch.equal(batch["labels"] == -100, padding)
    assert torch.equal(batch["labels"][~padding], batch["input_ids"][~padding])


def test_end_of_text_is_learnt_even_where_it_pads(corpus_file, tokenizer):
    import copy

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    batch = CausalCollator(tokenizer)([{"input_ids": [5, 6, tokenizer.eos_token_id]}, {"input_ids": [5]}])
    assert batch["labels"].tolist() == [[5, 6, tokenizer.eos_token_id], [5, -100, -100]]


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet", "csv", "jsonl.gz"])
def test_file_formats(tmp_path, ending):
    rows = Dataset.from_dict({"body": sentences(40), "other": list(range(40))})
    path = str(tmp_path / f"data.{ending}")
    if ending == "parquet":
        rows.to_parquet(path)
    elif ending == "csv":
        rows.to_csv(path)
    else:
        with (gzip.open if ending.endswith("gz") else open)(path, "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    corpus = load_corpus(DataArguments(train_file=path, text_column_name="body", validation_split_percentage=10))
    assert corpus["train"]["body"] == sentences(40)[:36]
    assert corpus["validation"]["body"] == sentences(40)[36:]


def test_a_local_dataset_directory(tmp_path, tokenizer):
    for split in ("train", "validation", "test"):
        Dataset.from_dict({"text": sentences(30)}).to_parquet(str(tmp_path / f"{split}.parquet"))
    corpus = load_corpus(DataArguments(dataset_name=str(tmp_path)))
    assert set(corpus) == {"train", "validation", "test"}


def test_streaming_gives_the_same_windows(corpus_file, tokenizer):
    args = DataArguments(train_file=corpus_file, validation_file=corpus_file, max_length=16)
    stored = tokenize(load_corpus(args), tokenizer, args)["train"]
    args.streaming = True
    streamed = tokenize(load_corpus(args), tokenizer, args)["train"]
    rows = [row["input_ids"] for row in streamed]
    assert rows == stored["input_ids"][: len(rows)] and len(rows) == len(stored)
    assert torch.equal(count_tokens(streamed, len(tokenizer)), count_tokens(stored, len(tokenizer)))


def test_tokens_are_cached_for_later_processes(corpus_file, tmp_path):
    """The same rows from the same file, by name of the cache files: where the tokenizer is trained, where its copy is
    loaded, and where that has been used in other ways before."""
    folder = str(tmp_path / "tokenizer")
    train = f"tokenizer = train_tokenizer(corpus['train']['text'], 300, 16); tokenizer.save_pretrained({folder!r})"
    load = f"tokenizer = load_tokenizer({folder!r})"
    names = []
    for first in (train, load, f"{load}; tokenizer(['a b c', 'a'], truncation=True, max_length=2, padding=True)"):
        code = f"""
import datasets
from noprop_hf.data import DataArguments, load_corpus, load_tokenizer, tokenize, train_tokenizer
datasets.config.HF_DATASETS_CACHE = {str(tmp_path / "cache")!r}
args = DataArguments(train_file={corpus_file!r}, max_length=16)
corpus = load_corpus(args)
{first}
tokens = tokenize(corpus, tokenizer, args)
print([file["filename"] for rows in tokens.values() for file in rows.cache_files])
"""
        names.append(run_python("-c", code, cwd=tmp_path).splitlines()[-1])
    assert names[0] == names[1] == names[2] and names[0].count(f"{tmp_path / 'cache'}/") == 2


def test_other_tokens_are_not_taken_from_the_cache(corpus_file, tokenizer):
    """Neither those of another tokenizer, nor of other windows, nor of rows that are put together in another way."""
    other = train_tokenizer(sentences(50), 280, 16)
    args = DataArguments(train_file=corpus_file, max_length=16)
    rows = []
    for used, changes in (
        (tokenizer, {}),
        (other, {}),
        (tokenizer, {"max_length": 12}),
        (tokenizer, {"append_eos": True}),
        (tokenizer, {"packing": False}),
    ):
        changed = DataArguments(**vars(args) | changes)
        rows.append(tokenize(load_corpus(changed), used, changed)["train"]["input_ids"][:20])
    assert all(one != another for i, one in enumerate(rows) for another in rows[:i])


@pytest.mark.parametrize(("tokens_at_once", "streaming"), [(1, False), (1000, False), (100, True), (2**17, True)])
def test_windows_are_those_of_the_joined_text(tokenizer, monkeypatch, tokens_at_once, streaming):
    """Joining everything and cutting it is the reference, whatever is read at once; most rows are shorter than one."""
    monkeypatch.setattr(data, "TOKENS_AT_ONCE", tokens_at_once)
    texts = [" ".join(text.split()[: index % 5]) or None for index, text in enumerate(sentences(1500))]
    splits = DatasetDict(train=Dataset.from_dict({"text": texts}))
    if streaming:
        splits = IterableDatasetDict(train=splits["train"].to_iterable_dataset(num_shards=3))
    args = DataArguments(dataset_name="some/documents", max_length=12, streaming=streaming)
    windows = tokenize(splits, tokenizer, args)["train"]
    encoded = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts if text]
    joined = [token for row in encoded for token in row]
    expected = [joined[i : i + 12] for i in range(0, len(joined) - 11, 12)]
    assert [row["input_ids"] for row in windows] == expected and len(expected) > 100
    assert [row["input_ids"] for row in windows.skip(7)] == expected[7:]  # what a run that goes on reads


def test_a_stream_of_rows_that_are_too_short_for_a_window_by_the_thousand(tokenizer):
    rows = Dataset.from_dict({"text": ["a"] * 2500})
    args = DataArguments(dataset_name="some/lines", max_length=1200, streaming=True, append_eos=False)
    stream = IterableDatasetDict(train=rows.to_iterable_dataset())
    assert [len(row["input_ids"]) for row in tokenize(stream, tokenizer, args)["train"]] == [1200, 1200]
    args.max_length = 4000
    with pytest.raises(ValueError, match="too little text for one window of 4000 tokens"):
        tokenize(stream, tokenizer, args)


def test_windows_do_not_depend_on_the_number_of_workers(corpus_file, tokenizer):
    rows = []
    for workers in (None, 2):
        args = DataArguments(train_file=corpus_file, max_length=16, preprocessing_num_workers=workers)
        rows.append(tokenize(load_corpus(args), tokenizer, args)["train"]["input_ids"])
    assert rows[0] == rows[1]


def test_count_tokens(tokenizer):
    rows = Dataset.from_dict({"input_ids": [[1, 2, 2], [5, 2, 1]]})
    assert count_tokens(rows, 7).tolist() == [0, 2, 3, 0, 0, 1, 0]


def test_masks_come_from_the_batch_and_the_seed(tokenizer):
    batch = [{"input_ids": list(range(i, i + 200))} for i in range(10, 30)]
    torch.manual_seed(0)
    collate = PretrainingCollator(tokenizer, mlm_probability=0.3, run_seed=5)
    state = torch.get_rng_state()
    first = collate(batch)
    assert torch.equal(state, torch.get_rng_state())  # the random numbers of training are left alone
    torch.manual_seed(1)
    again = PretrainingCollator(tokenizer, mlm_probability=0.3, run_seed=5)(batch)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["labels"], PretrainingCollator(tokenizer, mlm_probability=0.3)(batch)["labels"])
    assert not torch.equal(first["labels"], collate(batch[::-1])["labels"].flip(0))
    masked = first["labels"] != -100
    assert masked.float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert (first["input_ids"][masked] == tokenizer.mask_token_id).float().mean().item() == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize("text", ["x" * 600, "one line of words, " * 60, "two long lines\nof words " * 40])
@pytest.mark.parametrize("streaming", [False, True])
def test_few_rows_are_held_out_from_by_text(tmp_path, tokenizer, text, streaming):
    (tmp_path / "few.txt").write_text(text)
    file = str(tmp_path / "few.txt")
    args = DataArguments(train_file=file, max_length=4, validation_split_percentage=5)
    if streaming:
        args.streaming, args.validation_file = True, file
    corpus = load_corpus(args)
    assert all(next(iter(rows), None) for rows in tokenize(corpus, tokenizer, args).values())
    if not streaming:
        assert "".join([*corpus["train"]["text"], *corpus["validation"]["text"]]) == text
        assert len("".join(corpus["validation"]["text"])) == pytest.approx(0.05 * len(text), abs=20)


@pytest.mark.parametrize("ending", ["txt", "csv", "jsonl"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_compressed_file_gives_the_windows_of_the_file(tmp_path, tokenizer, ending, streaming):
    content = json_lines(sentences(60)) if ending == "jsonl" else "\n".join(["text", *sentences(60)]).encode()
    (tmp_path / f"plain.{ending}").write_bytes(content)
    (tmp_path / f"packed.{ending}.GZ").write_bytes(gzip.compress(content))
    windows = []
    for name in (f"plain.{ending}", f"packed.{ending}.GZ"):
        file = str(tmp_path / name)
        args = DataArguments(train_file=file, validation_file=file, streaming=streaming, max_length=16)
        windows.append([row["input_ids"] for row in tokenize(load_corpus(args), tokenizer, args)["train"]])
    assert windows[0] == windows[1] and len(windows[0]) > 20


@pytest.mark.parametrize("ending", ["txt", "csv", "jsonl"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_byte_order_mark_is_no_text(tmp_path, ending, streaming):
    lines = {"txt": sentences(40), "csv": ["text", *sentences(40)]}
    lines["jsonl"] = [json.dumps({"text": text}) for text in sentences(40)]
    path = tmp_path / f"data.{ending}"
    path.write_text("\n".join(lines[ending]), encoding="utf-8-sig")
    args = DataArguments(train_file=str(path), validation_file=str(path), streaming=streaming)
    assert next(iter(load_corpus(args)["train"]))["text"].rstrip("\n") == sentences(1)[0]


# --- bad input --------------------------------------------------------------------------------------------------------


def test_empty_file(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="is empty"):
        load_corpus(DataArguments(train_file=str(tmp_path / "empty.txt")))


def test_empty_split(tmp_path):
    Dataset.from_dict({"text": sentences(3)}).to_parquet(str(tmp_path / "train.parquet"))
    args = DataArguments(train_file=str(tmp_path / "train.parquet"), validation_split_percentage=0)
    with pytest.raises(ValueError, match="hold out"):
        load_corpus(args)
    args.validation_split_percentage, args.max_train_samples = 40, 0
    with pytest.raises(ValueError, match="train split is empty"):
        load_corpus(args)


def test_too_little_text(tmp_path, tokenizer):
    (tmp_path / "short.txt").write_text("the cat\nsat\n")
    args = DataArguments(train_file=str(tmp_path / "short.txt"), validation_split_percentage=50, max_length=64)
    with pytest.raises(ValueError, match="too little text"):
        tokenize(load_corpus(args), tokenizer, args)


def json_lines(values) -> bytes:
    return "".join(json.dumps({"id": 1, "text": value}) + "\n" for value in values).encode()


TEXTS = sentences(40)
UNREADABLE = [
    ("numbers.csv", "text\n1\n2\n3\n", "holds (Value\\('int64'\\)|int) in its column 'text', not text"),
    ("numbers.jsonl", json_lines(range(40)), "in its column 'text', not text"),
    ("lists.jsonl", json_lines([["a", "b"]] * 40), "in its column 'text', not text"),
    ("chat.jsonl", json_lines([[{"role": "user", "content": text}] for text in TEXTS]), "chat messages"),
    ("mixed.jsonl", json_lines([*TEXTS, 3]), "--text_column_name"),
    ("only_none.jsonl", json_lines([None] * 40), "too little text"),
    ("cut.jsonl", json_lines(TEXTS)[:-9], "cut.jsonl.*(line 40 is not JSON|Missing a closing quotation)"),
    ("array.json", json.dumps([{"text": text} for text in TEXTS])[:-9].encode(), "Cannot read .*array.json"),
    ("scalars.jsonl", b"1\n2\n", "Cannot read .*scalars.jsonl"),
    ("ragged.csv", "text,b\na,b\nc,d,e\n", "Cannot read .*ragged.csv.* line 3"),
    ("header.csv", "text\n", "header.csv.*(no rows|is empty)"),
    ("latin1.txt", "\n".join([*TEXTS, "caf\u00e9"]).encode("latin-1"), "latin1.txt.* not UTF-8 text, first in line 41"),
    ("utf16.txt", "\n".join(TEXTS).encode("utf-16"), "not UTF-8 text.* utf-16"),
    ("utf16.jsonl", "\n".join(TEXTS).encode("utf-16-le"), "not UTF-8 text.* utf-16"),
    ("cut.txt", "\n".join([*TEXTS, "caf\u00e9"]).encode()[:-1], "not UTF-8 text, first in line 41"),
    ("packed.txt", gzip.compress(b"the cat " * 90), "not UTF-8 text.* compressed"),
    ("cut.jsonl.gz", gzip.compress(json_lines(TEXTS))[:-20], "Cannot read .*cut.jsonl.gz.* may have been cut off"),
    ("cut.txt.gz", gzip.compress("\n".join(TEXTS).encode())[:40], "Cannot read .*cut.txt.gz.* may have been cut off"),
    ("damaged.csv.gz", gzip.compress(b"text\n" * 999)[:-9] + b"x" * 9, "Cannot read .*damaged.csv.gz.*"),
    ("cut_line.jsonl.gz", gzip.compress(json_lines(TEXTS)[:-9]), "cut_line.*(line 40 is not JSON|closing quotation)"),
    ("plain.jsonl.gz", json_lines(TEXTS), "Cannot read .*plain.jsonl.gz.* [Nn]ot a gzip"),
    ("nothing.jsonl.gz", gzip.compress(b""), "nothing.jsonl.gz' is empty"),
    ("latin1.txt.gz", gzip.compress("caf\u00e9".encode("latin-1")), "latin1.txt.gz.* not UTF-8 text, first in line 1"),
    ("rows.parquet.gz", gzip.compress(b"PAR1"), "Cannot infer the format of .*rows.parquet.gz"),
    ("no.parquet", b"PAR1 and nothing more", "Cannot read .*no.parquet"),
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("name", "content", "message"), UNREADABLE, ids=[case[0] for case in UNREADABLE])
def test_files_that_hold_no_text(tmp_path, tokenizer, name, content, message, streaming):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    args = DataArguments(train_file=str(path), validation_file=str(path), streaming=streaming, max_length=16)
    with pytest.raises(ValueError, match=message):
        for rows in tokenize(load_corpus(args), tokenizer, args).values():
            list(rows)


def test_none_is_skipped(tmp_path, tokenizer):
    (tmp_path / "some.jsonl").write_bytes(json_lines([None, *TEXTS, None]))
    args = DataArguments(train_file=str(tmp_path / "some.jsonl"), packing=False, max_length=64)
    assert sum(map(len, tokenize(load_corpus(args), tokenizer, args).values())) == 40


@pytest.mark.parametrize(
    ("dataset", "message"),
    [("no/such", "Cannot read the dataset 'no/such'"), ("a.txt", "--train_file"), ("empty", "any data files")],
)
def test_unknown_datasets(tmp_path, monkeypatch, dataset, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        load_corpus(DataArguments(dataset_name=dataset))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_directory_with_a_file_that_was_cut_off(tmp_path, streaming):
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(json_lines(TEXTS))[:-20])
    with pytest.raises(ValueError, match=f"{tmp_path}.* it may have been cut off"):
        load_corpus(DataArguments(dataset_name=str(tmp_path), streaming=streaming))


@pytest.mark.parametrize("name", ["max_train_samples", "max_eval_samples", "preprocessing_num_workers"])
def test_numbers_of_nothing(name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1"):
        DataArguments(dataset_name="x", **{name: 0})


def test_missing_column(corpus_file):
    with pytest.raises(ValueError, match="no column 'body'; it has \\['text'\\]"):
        load_corpus(DataArguments(train_file=corpus_file, text_column_name="body"))


def test_missing_file():
    with pytest.raises(ValueError, match="no file 'nowhere.txt'"):
        load_corpus(DataArguments(train_file="nowhere.txt"))


def test_unknown_ending(tmp_path):
    (tmp_path / "data.xyz").write_text("text")
    with pytest.raises(ValueError, match="use one of the endings"):
        load_corpus(DataArguments(train_file=str(tmp_path / "data.xyz")))


def test_unknown_tokenizer():
    with pytest.raises(ValueError, match="Cannot load the tokenizer 'no/such-tokenizer'"):
        load_tokenizer("no/such-tokenizer")


def test_no_source_of_data():
    with pytest.raises(ValueError, match="Give a `dataset_name`"):
        DataArguments()


def test_files_take_the_place_of_splits(corpus_file, docs, monkeypatch):
    monkeypatch.setattr(data, "cpython_docs", lambda: iter(docs))
    with pytest.raises(ValueError, match="not both"):
        DataArguments(dataset_name="cpython-docs", train_file=corpus_file)
    own = load_corpus(DataArguments(dataset_name="cpython-docs", test_file=corpus_file))
    plain = load_corpus(DataArguments(dataset_name="cpython-docs"))
    assert len(own["test"]) == 400 and own["validation"]["text"] == plain["validation"]["text"]


def test_held_out_lines_are_tokenized_as_those_they_were_held_out_from(tmp_path):
    """Lines of one text file: no split of it gets an end of text after every line."""
    (tmp_path / "train.txt").write_text("".join(f"line {number} of a play,\n" for number in range(400)))
    args = DataArguments(train_file=str(tmp_path / "train.txt"), max_length=16, validation_split_percentage=25)
    corpus = load_corpus(args)
    tokenizer = train_tokenizer(corpus["train"]["text"], 300, 16)
    tokens = tokenize(corpus, tokenizer, args)
    for split in ("train", "validation"):
        text = "".join(tokenizer.decode(row) for row in tokens[split]["input_ids"])
        assert text and "".join(corpus[split]["text"]).startswith(text)
