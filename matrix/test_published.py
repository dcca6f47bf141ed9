"""A published model in the versions that are installed, without `noprop_hf`: the same tokens and the same perplexity.

`matrix/run.py` runs it in every cell, and as a script in the newest one, which says what to expect:

    python matrix/test_published.py DIRECTORY > expected.json
    PUBLISHED=DIRECTORY EXPECTED=expected.json python -m pytest matrix/test_published.py
"""

import importlib.util
import json
import os
import sys

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    pipeline,
)


PROMPT = "The model is"
TEXT = "A change of the model goes into a file of its own, with a test against an independent reference."
# Ways to write that need no random numbers, by their arguments, and ways that do.
WAYS: dict[str, dict] = {
    "greedy": {},
    "greedy, static cache": {"cache_implementation": "static"},
    "greedy, no cache": {"use_cache": False},
    "three beams": {"num_beams": 3},
    "first block alone": {"num_inference_blocks": 1},
}
SAMPLED: dict[str, dict] = {
    "sampled": {"do_sample": True, "top_k": 20},
    "chain": {"do_sample": True, "decoding_mode": "denoising", "num_trajectories": 2},
}


def load(directory: str):
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    return model, AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


def write(model, tokenizer, **options) -> list[int]:
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0} | options
    return model.generate(**tokenizer(PROMPT, return_tensors="pt"), **options)[0].tolist()


@torch.no_grad()
def observe(directory: str) -> dict:
    """What must be the same in all versions."""
    model, tokenizer = load(directory)
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    masked = AutoModelForMaskedLM.from_pretrained(directory, trust_remote_code=True)
    return {
        "tokens": {name: write(model, tokenizer, **options) for name, options in WAYS.items()},
        "text": tokenizer.decode(write(model, tokenizer)),
        "ids": ids.tolist(),
        "perplexity": model(ids, labels=ids).loss.exp().item(),
        "bound": model.variational_bound(ids, generator=torch.Generator().manual_seed(0)).bound.item(),
        "phase_1": masked(ids).logits[0, -1, :5].tolist(),
    }


@pytest.fixture(scope="module")
def directory() -> str:
    return os.environ["PUBLISHED"]


@pytest.fixture(scope="module")
def expected() -> dict:
    with open(os.environ["EXPECTED"], encoding="utf-8") as file:
        return json.load(file)


@pytest.fixture(scope="module")
def observed(directory) -> dict:
    return observe(directory)


@pytest.fixture(scope="module")
def model(directory):
    return load(directory)[0]


@pytest.fixture(scope="module")
def tokenizer(directory):
    return load(directory)[1]


def test_the_package_is_not_installed(model):
    assert importlib.util.find_spec("noprop_hf") is None
    assert type(model).__module__.startswith("transformers_modules.")


@pytest.mark.parametrize("way", WAYS)
def test_same_tokens(observed, expected, way):
    assert observed["tokens"][way] == expected["tokens"][way]
    assert observed["ids"] == expected["ids"] and observed["text"] == expected["text"]


def test_static_cache_and_none_change_nothing(observed):
    tokens = observed["tokens"]
    assert tokens["greedy"] == tokens["greedy, static cache"] == tokens["greedy, no cache"]


@pytest.mark.parametrize("name", ["perplexity", "bound", "phase_1"])
def test_same_numbers(observed, expected, name):
    assert observed[name] == pytest.approx(expected[name], rel=1e-4)


@pytest.mark.parametrize("way", SAMPLED)
def test_sampling_is_reproducible(model, tokenizer, way):
    """The same in one version, with and without a cache; versions of torch draw differently."""
    first, *others = (write(model, tokenizer, seed=3, use_cache=use, **SAMPLED[way]) for use in (True, True, False))
    assert all(other == first for other in others)
    assert write(model, tokenizer, seed=4, **SAMPLED[way]) != first


def test_sampling_follows_the_logits(model, tokenizer):
    prompt = tokenizer(PROMPT, return_tensors="pt")
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 1, "num_return_sequences": 4000, "pad_token_id": 0}
    drawn = model.generate(**prompt, seed=0, **options)[:, -1].bincount(minlength=model.config.vocab_size) / 4000
    with torch.no_grad():
        probabilities = model(**prompt).logits[0, -1].exp()
    error = (probabilities * (1 - probabilities) / 4000).sqrt()
    assert ((drawn - probabilities).abs() <= 5 * error + 1e-3).all()


def test_output_embeddings(model, tokenizer):
    """What a tool computes with the weight and the bias of the output layer is what the model answers."""
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    output = model.get_output_embeddings()
    with torch.no_grad():
        logits = model.model(ids).last_hidden_state @ output.weight.T + output.bias
        torch.testing.assert_close(logits.log_softmax(-1), model(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("auto", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_classifiers(directory, tmp_path, model, tokenizer, auto):
    classifier = auto.from_pretrained(directory, num_labels=3, trust_remote_code=True).eval()
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = classifier(ids).logits
        expected = classifier.score(model.model(ids).last_hidden_state)
        expected = expected[:, -1] if auto is AutoModelForSequenceClassification else expected
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
        classifier.save_pretrained(tmp_path)
        assert torch.equal(auto.from_pretrained(tmp_path, trust_remote_code=True)(ids).logits, logits)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_both_names_of_the_cache(model, tokenizer, name):
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        whole = model(ids).logits
        output = model(ids[:, :5], use_cache=True)
        field = next(field for field in ("cache", "past_key_values") if field in output)
        rest = model(ids[:, 5:], **{name: output[field]}).logits
    torch.testing.assert_close(rest, whole[:, 5:], atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        given = model(ids[:, :1], use_cache=True)[field]
        full = {"input_ids": ids[:, :6], "do_sample": False, "max_new_tokens": 3, "pad_token_id": 0}
        assert torch.equal(model.generate(**full, **{name: given}), model.generate(**full))


def test_pipeline(directory, expected):
    write_text = pipeline("text-generation", model=directory, trust_remote_code=True)
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
    assert write_text(PROMPT, **options)[0]["generated_text"] == expected["text"]


def test_two_steps_of_training(directory):
    """Of the whole model by its loss, and of one block by its own."""
    model, tokenizer = load(directory)
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    block, table = model.model.blocks[1], model.model.embed_tokens
    for compute in (
        lambda: model.train()(ids, labels=ids).loss,
        lambda: block.train()(ids, ids, table, generator=torch.Generator().manual_seed(0)).loss,
    ):
        optimizer, losses = torch.optim.Adam(block.parameters(), lr=1e-2), []
        for _ in range(3):
            optimizer.zero_grad()
            losses.append(compute())
            losses[-1].backward()
            optimizer.step()
        assert losses[2] < losses[0]
    assert table.weight.grad is None


def test_save_and_load_again(directory, tmp_path, model, tokenizer):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    copy, copied_tokenizer = load(str(tmp_path))
    for name, tensor in model.state_dict().items():
        assert torch.equal(copy.state_dict()[name], tensor)
    assert write(copy, copied_tokenizer) == write(model, tokenizer)
    names = sorted(file for file in os.listdir(tmp_path) if file.endswith((".safetensors", "_noprop.py")))
    assert names == sorted(file for file in os.listdir(directory) if file.endswith((".safetensors", "_noprop.py")))


if __name__ == "__main__":
    print(json.dumps(observe(sys.argv[1])))
