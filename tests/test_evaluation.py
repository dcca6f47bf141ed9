import math
from collections import Counter

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F

from noprop_hf.evaluation import CountingBaseline, encode_prompt, evaluate_model, results_table, sample_texts


def rows(count: int, length: int, vocab_size: int, seed: int) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    return Dataset.from_dict({"input_ids": torch.randint(vocab_size, (count, length), generator=generator).tolist()})


def reference_counts(train: Dataset, test: Dataset, vocab_size: int, concentration: float) -> tuple[float, float]:
    """The same two models, token by token with dictionaries."""
    unigrams, bigrams = Counter(), Counter()
    for row in train["input_ids"]:
        unigrams.update(row)
        bigrams.update(zip(row[:-1], row[1:], strict=True))
    total = sum(unigrams.values()) + vocab_size
    histories = Counter()
    for (history, _), count in bigrams.items():
        histories[history] += count
    unigram_nats = bigram_nats = tokens = 0
    for row in test["input_ids"]:
        for history, token in zip(row[:-1], row[1:], strict=True):
            unigram = (unigrams[token] + 1) / total
            bigram = (bigrams[history, token] + concentration * unigram) / (histories[history] + concentration)
            unigram_nats -= math.log(unigram)
            bigram_nats -= math.log(bigram)
            tokens += 1
    return unigram_nats / tokens, bigram_nats / tokens


def test_counting_baselines():
    train, test = rows(40, 9, 12, 0), rows(10, 9, 12, 1)
    counts = CountingBaseline(train, 12)
    counts.concentration = 2.5
    assert counts.nats(test) == pytest.approx(reference_counts(train, test, 12, 2.5))


def test_fitted_concentration_is_the_best_of_its_grid():
    train, test = rows(40, 9, 12, 0), rows(30, 9, 12, 1)
    counts = CountingBaseline(train, 12).fit(test)
    best = counts.nats(test)[1]
    for concentration in (1.0, 10.0, 100.0, 1000.0, 10_000.0):
        assert best <= reference_counts(train, test, 12, concentration)[1] + 1e-12


def test_evaluate_model(model, tokenizer):
    data = Dataset.from_dict({"input_ids": [[1, 2, 3, 4, 5], [6, 7, 8], [9, 10, 11, 12, 13]]})
    nats = evaluate_model(model, data, tokenizer, batch_size=2)
    log_likelihood, first = 0.0, 0.0
    for row in data["input_ids"]:
        ids = torch.tensor([row])
        for total, options in (("model", {}), ("first", {"num_inference_blocks": 1})):
            value = F.cross_entropy(model(ids, **options).logits[0, :-1], ids[0, 1:], reduction="sum").item()
            if total == "model":
                log_likelihood += value
            else:
                first += value
    assert nats.num_tokens == 10
    assert nats.predictive == pytest.approx(log_likelihood / 10, abs=1e-5)
    assert nats.context[0] == pytest.approx(first / 10, abs=1e-5)
    assert nats.block_nats[0] == pytest.approx(first / 10, abs=1e-5)
    assert sum(nats.block_nats) == pytest.approx(nats.bound, abs=1e-6)
    assert nats == evaluate_model(model, data, tokenizer, batch_size=2)


def test_nothing_to_evaluate(model, tokenizer):
    with pytest.raises(ValueError, match="empty"):
        evaluate_model(model, Dataset.from_dict({"input_ids": [[3]]}), tokenizer)


def test_a_model_that_diverged_is_reported():
    assert "inf" in results_table([("model", {"test": 710.0})], ["test"])


def test_results_table():
    table = results_table([("model", {"test": 1.0}), ("counts", {"test": 2.0})], ["test"])
    assert [cell.strip() for cell in table.splitlines()[2].split("|")[1:-1]] == ["model", "1.000", "2.7"]
    assert len({len(line) for line in table.splitlines()}) == 1


def test_prompts_begin_with_bos(tokenizer):
    ids = encode_prompt("the cat", tokenizer)[0].tolist()
    assert ids == [tokenizer.bos_token_id, *tokenizer("the cat")["input_ids"]]
    assert encode_prompt("", tokenizer).tolist() == [[tokenizer.bos_token_id]]


def test_samples_are_text(model, tokenizer):
    model.config.vocab_size = 50
    small = [prompt for prompt in ("", "!") if encode_prompt(prompt, tokenizer).max() < 50]
    samples = sample_texts(model, tokenizer, small, 3)
    assert [prompt for prompt, _ in samples] == small
    assert all(isinstance(text, str) for _, text in samples)
