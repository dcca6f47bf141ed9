"""Evaluation: nats per token of a model and of counting baselines, on the same tokens."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .data import CausalCollator
from .modeling_noprop import NoPropForCausalLM


@dataclass
class ModelNats:
    """Nats per predicted token of a model on a dataset.

    Attributes:
        predictive: cross-entropy of the predictive distribution (`logits`).
        context: cross-entropy of each block alone on pure noise.
        bound: variational bound on the negative log-likelihood of the chain.
        block_nats: its split by block; entries after the first are gains when negative.
        block_errors: standard errors of `block_nats`.
        num_tokens: predicted tokens.
    """

    predictive: float
    context: list[float]
    bound: float
    block_nats: list[float]
    block_errors: list[float]
    num_tokens: int


@torch.no_grad()
def evaluate_model(
    model: NoPropForCausalLM,
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 32,
    seed: int = 0,
    description: str = "Evaluating",
) -> ModelNats:
    """Measure a model on tokenized rows. The noise of the bound is fixed by `seed`.

    Args:
        model: the whole model.
        dataset: rows of `input_ids`; every token but the first of a row is predicted.
    """
    model.eval()
    device = model.model.embed_tokens.weight.device
    generator = torch.Generator().manual_seed(seed)
    predictive, context, token_nats, num_tokens = 0.0, 0.0, [], 0
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=CausalCollator(tokenizer))
    for batch in tqdm(loader, desc=description, leave=False):
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        labels = batch.pop("labels")
        logits = model(**batch, use_cache=False).logits[:, :-1]
        predictive += F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum").item()
        bound = model.variational_bound(**batch, labels=labels, generator=generator)
        count = bound.token_nats.shape[1]
        context = context + bound.context_nats.double().cpu() * count
        token_nats.append(bound.token_nats.cpu())
        num_tokens += count
    if num_tokens == 0:
        raise ValueError("There is no token to predict: the dataset is empty.")
    per_token = torch.cat(token_nats, dim=1).double()
    return ModelNats(
        predictive=predictive / num_tokens,
        context=(context / num_tokens).tolist(),
        bound=per_token.sum(0).mean().item(),
        block_nats=per_token.mean(1).tolist(),
        block_errors=(per_token.std(1) / math.sqrt(num_tokens)).tolist(),
        num_tokens=num_tokens,
    )


class CountingBaseline:
    """Unigram counts, and bigram counts interpolated with them.

    Unigrams are smoothed by one. Bigrams lean on them with the strength of `concentration` pseudo-counts (the Dirichlet
    interpolation of MacKay and Peto 1995, "A hierarchical Dirichlet language model", eq. 18), fitted on held-out rows.

    Args:
        dataset: tokenized training rows (`input_ids`).
        vocab_size: size of the vocabulary `V`.
        max_rows: how many rows are counted, for datasets without end.
    """

    def __init__(self, dataset: Dataset | IterableDataset, vocab_size: int, max_rows: int = 1_000_000):
        self.vocab_size = vocab_size
        self.concentration = 1.0
        unigrams = np.ones(vocab_size)
        keys = []
        for rows in _rows(dataset, max_rows):
            for row in rows:
                unigrams += np.bincount(row, minlength=vocab_size)
                keys.append(row[:-1] * vocab_size + row[1:])
        self._pairs, self._pair_counts = np.unique(np.concatenate(keys), return_counts=True)
        self._history_counts = np.bincount(
            self._pairs // vocab_size, weights=self._pair_counts, minlength=vocab_size
        )
        self._unigram = unigrams / unigrams.sum()

    def fit(self, dataset: Dataset | IterableDataset) -> "CountingBaseline":
        """Choose the concentration with the fewest nats on held-out rows."""
        candidates = np.geomspace(1, 10_000, 41)
        scores = []
        for candidate in candidates:
            self.concentration = candidate
            scores.append(self.nats(dataset)[1])
        self.concentration = float(candidates[int(np.argmin(scores))])
        return self

    def nats(self, dataset: Dataset | IterableDataset) -> tuple[float, float]:
        """Nats per token of the unigram and of the interpolated bigram model, on every token but the first of a row."""
        unigram_nats, bigram_nats, num_tokens = 0.0, 0.0, 0
        for rows in _rows(dataset):
            history = np.concatenate([row[:-1] for row in rows])
            target = np.concatenate([row[1:] for row in rows])
            keys = history * self.vocab_size + target
            found = np.minimum(np.searchsorted(self._pairs, keys), len(self._pairs) - 1)
            counts = np.where(self._pairs[found] == keys, self._pair_counts[found], 0)
            unigram = self._unigram[target]
            bigram = (counts + self.concentration * unigram) / (self._history_counts[history] + self.concentration)
            unigram_nats -= np.log(unigram).sum()
            bigram_nats -= np.log(bigram).sum()
            num_tokens += len(target)
        return float(unigram_nats / num_tokens), float(bigram_nats / num_tokens)


def _rows(dataset: Dataset | IterableDataset, max_rows: int | None = None) -> Iterator[list[np.ndarray]]:
    dataset = dataset if max_rows is None else dataset.take(max_rows)
    for batch in dataset.iter(batch_size=1000):
        yield [np.asarray(row, dtype=np.int64) for row in batch["input_ids"]]


def results_table(rows: list[tuple[str, dict[str, float]]], splits: list[str]) -> str:
    """A table in Markdown: nats per token and perplexity of each row on each split.

    Args:
        rows: a name, and nats per token by split.
        splits: the columns.
    """
    names = max(len(name) for name, _ in rows)
    headers = [cell for split in splits for cell in (f"{split} nats", "perplexity")]
    lines = [
        f"| {'':{names}} | " + " | ".join(f"{header:>15}" for header in headers) + " |",
        f"| {'-' * names} | " + " | ".join("-" * 14 + ":" for _ in headers) + " |",
    ]
    for name, nats in rows:
        cells = [cell for split in splits for cell in (f"{nats[split]:15.3f}", f"{math.exp(nats[split]):15.1f}")]
        lines.append(f"| {name:{names}} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
