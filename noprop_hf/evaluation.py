"""Evaluation: nats per token of a model and of counting baselines, on the same tokens."""

import json
import math
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .arguments import BlockArguments, one_line
from .data import CausalCollator, DataArguments, load_corpus, load_tokenizer, tokenize
from .layout import RESULTS_FILE
from .model_directory import read_config
from .modeling_noprop import NoPropForCausalLM


MODEL_ROW = "NoProp, all blocks"


@dataclass
class ModelNats:
    """Nats per predicted token of a model on a dataset.

    Attributes:
        predictive: cross-entropy of the predictive distribution (`logits`).
        context: cross-entropy of each block alone on pure noise.
        bound: variational bound on the negative log-likelihood of the chain.
        block_nats: the terms of the bound, by block; entries after the first are gains when negative.
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
    """Measure a model on tokenized rows.

    Args:
        model: the whole model.
        dataset: rows of `input_ids`; every token but the first of a row is predicted.
        seed: seed of the noise in the bound.

    Raises:
        ValueError: if the dataset is empty.
    """
    model.eval()
    device = model.model.embed_tokens.weight.device
    generator = torch.Generator().manual_seed(seed)
    predictive, context, token_nats, num_tokens = 0.0, torch.zeros(model.config.num_blocks), [], 0
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=CausalCollator(tokenizer))
    for batch in tqdm(loader, desc=description, leave=False):
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        labels = batch.pop("labels")
        bound = model.variational_bound(**batch, labels=labels, generator=generator)
        count = bound.token_nats.shape[1]
        predictive += bound.predictive_nats.item() * count
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

    Unigrams have add-one smoothing. Bigrams are interpolated with them by `concentration` pseudo-counts (MacKay and
    Peto 1995, "A hierarchical Dirichlet language model"), fitted on held-out rows.

    Args:
        dataset: tokenized training rows (`input_ids`).
        vocab_size: size of the vocabulary `V`.
        max_rows: maximum number of rows to count, for endless datasets.
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
        self._history_counts = np.bincount(self._pairs // vocab_size, weights=self._pair_counts, minlength=vocab_size)
        self._unigram = unigrams / unigrams.sum()

    def fit(self, dataset: Dataset | IterableDataset) -> "CountingBaseline":
        """Choose the concentration with the fewest nats on held-out rows, and return `self`."""
        candidates = np.geomspace(1, 10_000, 41)
        scores = []
        for candidate in candidates:
            self.concentration = candidate
            scores.append(self.nats(dataset)[1])
        self.concentration = float(candidates[int(np.argmin(scores))])
        return self

    def nats(self, dataset: Dataset | IterableDataset) -> tuple[float, float]:
        """Compute nats per token of the unigram and of the interpolated bigram model.

        Every token but the first of a row is predicted.
        """
        unigram_nats, bigram_nats, num_tokens = 0.0, 0.0, 0
        for rows in _rows(dataset):
            history = np.concatenate([row[:-1] for row in rows])
            target = np.concatenate([row[1:] for row in rows])
            keys = history * self.vocab_size + target
            positions = np.minimum(np.searchsorted(self._pairs, keys), len(self._pairs) - 1)
            counts = np.where(self._pairs[positions] == keys, self._pair_counts[positions], 0)
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


def perplexity(nats: float) -> float:
    """Return the exponential of nats per token, which is infinite if a training diverged."""
    return torch.tensor(nats, dtype=torch.float64).exp().item()


def results_table(rows: list[tuple[str, dict[str, float]]], splits: list[str]) -> str:
    """Format a Markdown table of nats per token and perplexity, by row and split.

    Args:
        rows: pairs of a name and the nats per token by split.
        splits: the columns.
    """
    names = max(len(name) for name, _ in rows)
    headers = [cell for split in splits for cell in (f"{split} nats", "perplexity")]
    lines = [
        f"| {'':{names}} | " + " | ".join(f"{header:>15}" for header in headers) + " |",
        f"| {'-' * names} | " + " | ".join("-" * 14 + ":" for _ in headers) + " |",
    ]
    for name, nats in rows:
        cells = [cell for split in splits for cell in (f"{nats[split]:15.3f}", f"{perplexity(nats[split]):15.1f}")]
        lines.append(f"| {name:{names}} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def load_model(name_or_path: str, num_inference_blocks: int | None = None) -> NoPropForCausalLM:
    """Load a whole NoProp model, on a GPU if available.

    Args:
        name_or_path: a model directory, or a repository of the Hub.
        num_inference_blocks: number of blocks to run, which the model must have.

    Raises:
        ValueError: if the model does not exist, is of another type, not fully trained or damaged, or has fewer blocks.
    """
    config = read_config(name_or_path)
    if num_inference_blocks is not None and not 0 < num_inference_blocks <= config.num_blocks:
        raise ValueError(
            f"{name_or_path} has {config.num_blocks} blocks: --num_inference_blocks must be between 1 and that, got "
            f"{num_inference_blocks}."
        )
    try:
        model = NoPropForCausalLM.from_pretrained(name_or_path)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "mismatch" not in str(error):
            raise
        raise ValueError(f"Cannot load the model {name_or_path!r}: {one_line(error)}") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def encode_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Encode a prompt as the beginning of a text: `(1, length)` token ids, after bos if the tokenizer has one.

    Raises:
        ValueError: if there is no token to continue from.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"The prompt {prompt[:40]!r} is not text in UTF-8.") from error
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = start + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(
            "The prompt must not be empty: it has no token, and the model was trained without one that begins a text."
        )
    return torch.tensor([ids])


def sample_texts(
    model: NoPropForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    max_new_tokens: int,
    **generate_kwargs,
) -> list[tuple[str, str]]:
    """Continue each prompt by sampling, and return pairs of prompt and continuation."""
    options = {"do_sample": True, "top_k": 50} | generate_kwargs
    texts = []
    for prompt in prompts:
        input_ids = encode_prompt(prompt, tokenizer).to(model.model.embed_tokens.weight.device)
        output = model.generate(input_ids, max_new_tokens=max_new_tokens, **options)
        texts.append((prompt, tokenizer.decode(output[0, input_ids.shape[1] :], skip_special_tokens=True)))
    return texts


def report(directory: Path, data_args: DataArguments, block_args: BlockArguments, batch_size: int, seed: int) -> str:
    """Evaluate a trained model: a table with counting baselines, the bound by block, and samples.

    The results are also written to `results.json` in the model directory.

    Args:
        directory: a model directory with all blocks.
        data_args: the corpus. The model is measured on its validation and test splits; baselines count the training
            split.
        block_args: prompts and length of the samples.

    Returns:
        The report, as text.
    """
    model = NoPropForCausalLM.from_pretrained(directory).eval()
    tokenizer = load_tokenizer(str(directory), model.config.vocab_size)
    if torch.cuda.is_available():
        model.cuda()
    dataset = tokenize(load_corpus(data_args), tokenizer, data_args)
    splits = [split for split in ("validation", "test") if split in dataset]
    measured = {
        split: evaluate_model(model, dataset[split], tokenizer, batch_size, seed, f"Evaluating on {split}")
        for split in splits
    }
    counts = CountingBaseline(dataset["train"], model.config.vocab_size).fit(dataset["validation"])
    unigram, bigram = zip(*(counts.nats(dataset[split]) for split in splits), strict=True)
    rows = [
        (MODEL_ROW, {split: measured[split].predictive for split in splits}),
        ("NoProp, bound of the chain", {split: measured[split].bound for split in splits}),
        ("NoProp, first block alone", {split: measured[split].context[0] for split in splits}),
        ("interpolated bigram counts", dict(zip(splits, bigram, strict=True))),
        ("unigram counts", dict(zip(splits, unigram, strict=True))),
    ]
    last = splits[-1]
    gains = ", ".join(
        f"block {block} {nats:+.4f} ± {error:.4f}"
        for block, (nats, error) in enumerate(zip(measured[last].block_nats, measured[last].block_errors, strict=True))
        if block > 0
    )
    table = results_table(rows, splits)
    lines = [table, ""]
    if gains:
        lines += [f"Change of the bound by each block on {last}: {gains}", ""]
    prompts, max_new_tokens = block_args.sample_prompts, block_args.sample_max_new_tokens
    samples = sample_texts(model, tokenizer, prompts, max_new_tokens, seed=seed)
    lines += [f"Sample: {prompt}|{text!r}" for prompt, text in samples]
    results = {
        "nats_per_token": dict(rows),
        "details": {split: asdict(measured[split]) for split in splits},
        "table": table,
        "samples": samples,
    }
    (directory / RESULTS_FILE).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    command, here = Path(sys.executable).with_name("noprop"), Path.cwd()
    command = command.relative_to(here) if command.is_relative_to(here) else Path("noprop")  # such as .venv/bin/noprop
    prompt = shlex.quote(next(iter(prompts), ""))
    lines += [
        "",
        f"The model is in {directory}. Next steps:",
        f"  {command} generate {directory} {prompt}",
        f"  {command} evaluate {directory}",
        f"  {command} watch {directory} {prompt} --save chain.png",
    ]
    return "\n".join(lines)
