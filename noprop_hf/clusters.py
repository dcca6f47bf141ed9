"""Clusters of similar text, one for each block, and the training of the router that tells them apart.

With `block_data="clusters"` each block is trained on the windows of one cluster, so that blocks know different things
(Gururangan et al. 2023, "Scaling expert language models with unsupervised domain discovery", arXiv 2303.14177). Phase 1
finds the clusters and trains the router, which is published with the table. Any worker can then assign windows.
"""

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch.nn import functional as F
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, TrainingArguments, set_seed

from .arguments import PretrainingArguments
from .checkpoints import DurableTrainer, trainer_arguments
from .configuration_noprop import NoPropConfig
from .data import data_identity
from .modeling_noprop import NUM_TOPICS, ContextEncoder, Router, TokenTable
from .shards_noprop import clusters_hash, fingerprint
from .tracking import track


SAMPLE_WINDOWS = 50_000  # topics and centroids are fitted to at least as many windows, at equal distances
ITERATIONS = 50
PRICE_RATE = 1 / 6  # change of a price, per spread of the similarities and logarithm of the cluster's relative size
ROUTER_SHARE = 0.1  # steps of the router, for each step of phase 1


def fit_topics(windows: list[list[int]], vocab_size: int, seed: int) -> torch.Tensor:
    """Fit topics by latent semantic analysis: the singular vectors of the windows' weighted counts of tokens.

    A count is multiplied by the token's inverse document frequency `log((1 + n) / (1 + df))`, where `df` of the `n`
    windows contain the token, and every window is divided by its norm (Deerwester et al. 1990, "Indexing by latent
    semantic analysis"; tf-idf and a truncated decomposition are the features of arXiv 2303.14177, too).

    Args:
        windows: token ids, in windows of any length.

    Returns:
        `torch.Tensor` of shape `(vocab_size, NUM_TOPICS)`: the topics of each token, times its inverse document
        frequency. With fewer windows or tokens than topics, the last topics are 0.
    """
    lengths = torch.tensor([len(window) for window in windows])
    tokens = torch.from_numpy(np.concatenate([np.asarray(window, dtype=np.int64) for window in windows]))
    places = torch.stack([torch.arange(len(windows)).repeat_interleave(lengths), tokens])
    shape = (len(windows), vocab_size)
    counts = torch.sparse_coo_tensor(places, torch.ones(len(tokens)), shape, check_invariants=True).coalesce()
    rows, columns = counts.indices()
    frequencies = columns.bincount(minlength=vocab_size)
    weights = ((1 + len(windows)) / (1 + frequencies)).log()
    values = counts.values() * weights[columns]
    norms = torch.zeros(len(windows)).index_add_(0, rows, values.square()).sqrt().clamp(min=1e-12)
    counts = torch.sparse_coo_tensor(
        counts.indices(), values / norms[rows], shape, is_coalesced=True, check_invariants=True
    )
    topics = torch.zeros(vocab_size, NUM_TOPICS)
    rank = min(NUM_TOPICS, *shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        topics[:, :rank] = torch.svd_lowrank(counts, rank)[2]
    return weights[:, None] * topics


def window_features(windows: list[list[int]], topics: torch.Tensor) -> torch.Tensor:
    """Compute the feature of each window: the sum of its tokens' topics, divided by its norm.

    Args:
        windows: token ids, in windows of any length.
        topics: the result of [`fit_topics`].

    Returns:
        `torch.Tensor` of shape `(num_windows, NUM_TOPICS)`.
    """
    tokens = torch.from_numpy(np.concatenate([np.asarray(window, dtype=np.int64) for window in windows]))
    starts = torch.tensor([0, *(len(window) for window in windows)][:-1]).cumsum(0)
    return F.normalize(F.embedding_bag(tokens, topics, starts, mode="sum"), dim=-1)


def fit_clusters(features: torch.Tensor, num_clusters: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit clusters of a similar size by spherical k-means, where large clusters become expensive.

    Args:
        features (`(num_windows, NUM_TOPICS)`): features of norm 1.

    Returns:
        Centroids of norm 1, `(num_clusters, NUM_TOPICS)`, and prices `(num_clusters,)`; see [`Router`].
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(features), generator=generator).tolist()
    first: dict[tuple[float, ...], int] = {}  # by feature, since no two centroids may begin alike
    for row in order:
        first.setdefault(tuple(features[row].tolist()), row)
        if len(first) == num_clusters:
            break
    centroids = features[[*first.values(), *order][:num_clusters]]
    prices = torch.zeros(num_clusters)
    fitted, best = (centroids, prices), (False, False, 0)
    for iteration in range(ITERATIONS + 1):
        similarities = features @ centroids.T
        nearest = (similarities - prices).argmax(-1)
        counts = nearest.bincount(minlength=num_clusters)
        smallest = int(counts.min())
        rank = (smallest > 0, iteration >= ITERATIONS // 2, smallest)
        if rank >= best:  # sizes may swing to the end, so the most even late clusters are kept
            fitted, best = (centroids, prices), rank
        # Where windows are much alike, small changes of a price already move many of them.
        spread = (similarities - similarities.mean(-1, keepdim=True)).square().mean().sqrt()
        prices = prices + PRICE_RATE * spread * (num_clusters * counts / len(features)).clamp(min=0.05).log()
        sums = torch.zeros_like(centroids).index_add_(0, nearest, features)
        centroids = torch.where((counts > 0)[:, None], F.normalize(sums, dim=-1), centroids)
        for empty in torch.nonzero(counts == 0).flatten():  # begins again at the feature that all centroids fit least
            fits = (features @ centroids.T).amax(-1)
            centroids[empty], prices[empty] = features[fits.argmin()], prices[counts > 0].mean()
    return fitted


class Clusters(NamedTuple):
    """Topics, centroids and prices, which assign windows to clusters; see [`Router`]."""

    topics: torch.Tensor
    centroids: torch.Tensor
    prices: torch.Tensor


def find_clusters(
    config: NoPropConfig, dataset: Mapping[str, Dataset], seed: int
) -> tuple[Clusters, dict[str, np.ndarray]]:
    """Find the clusters of a training split.

    Returns:
        The clusters, and the result of [`assign_clusters`] for each split.

    Raises:
        ValueError: if no training window belongs to some cluster.
    """
    rows = dataset["train"]
    sample = rows.select(range(0, len(rows), max(1, len(rows) // SAMPLE_WINDOWS)))
    windows = sample["input_ids"][:]
    topics = fit_topics(windows, config.vocab_size, seed)
    clusters = Clusters(topics, *fit_clusters(window_features(windows, topics), config.num_blocks, seed))
    labels = {name: assign_clusters(rows, clusters) for name, rows in dataset.items()}
    for block_index in range(config.num_blocks):
        select_cluster(dataset, labels, block_index)  # raises if the cluster is empty
    return clusters, labels


def assign_clusters(rows: Dataset, clusters: Clusters | Router) -> np.ndarray:
    """Return the cluster of each window of a tokenized split, `(num_windows,)`."""
    topics, centroids, prices = clusters.topics, clusters.centroids, clusters.prices
    assigned = [
        (window_features(batch["input_ids"], topics) @ centroids.T - prices).argmax(-1).numpy()
        for batch in rows.iter(batch_size=4096)
    ]
    return np.concatenate(assigned) if assigned else np.zeros(0, dtype=np.int64)


def select_cluster(
    dataset: Mapping[str, Dataset], clusters: Mapping[str, np.ndarray], block_index: int
) -> dict[str, Dataset]:
    """Select the windows that a block is trained and evaluated on.

    A validation split without a window of the cluster is used as a whole.

    Args:
        clusters: the result of [`assign_clusters`] for each split.

    Raises:
        ValueError: if no training window belongs to the cluster.
    """
    chosen = {name: np.flatnonzero(clusters[name] == block_index) for name in dataset}
    if len(chosen["train"]) == 0:
        raise ValueError(
            f"No window of the training split belongs to the cluster of block {block_index}: give more text, or start "
            "again with fewer blocks (--num_blocks) or --block_data shared."
        )
    return {name: rows if len(chosen[name]) == 0 else rows.select(chosen[name]) for name, rows in dataset.items()}


def check_clustered_data(config: NoPropConfig, rows: Dataset | IterableDataset) -> None:
    """Check that a training split can be divided into clusters.

    Raises:
        ValueError: if the split is a stream, or has fewer windows than clusters.
    """
    if config.block_data != "clusters":
        return
    if isinstance(rows, IterableDataset):
        raise ValueError("A stream cannot be divided into clusters: leave --streaming out, or use --block_data shared.")
    if len(rows) < config.num_blocks:
        raise ValueError(
            f"The training split has {len(rows)} windows, too few for {config.num_blocks} clusters: give more text, "
            "fewer --num_blocks, or use --block_data shared."
        )


def router_fields(pretraining_args: PretrainingArguments, training_args: TrainingArguments) -> dict[str, Any]:
    """Return the training arguments that the router replaces: a tenth of the steps of phase 1, and its other fields."""
    fields = pretraining_args.training_fields()
    if training_args.warmup_steps >= 1:  # a number of steps, not a share of them
        fields["warmup_steps"] = math.ceil(ROUTER_SHARE * training_args.warmup_steps)
    for name in ("max_steps", "num_train_epochs"):
        value = ROUTER_SHARE * fields.get(name, getattr(training_args, name))
        fields[name] = value if name == "num_train_epochs" else math.ceil(value) if value > 0 else -1
    return fields


def train_router(
    config: NoPropConfig,
    clusters: Clusters,
    labels: Mapping[str, np.ndarray],
    start: ContextEncoder | None,
    table: TokenTable,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Mapping[str, Dataset],
    data: str,
    pretraining_args: PretrainingArguments,
    training_args: TrainingArguments,
) -> Router:
    """Train a router to predict the cluster of a window from each of its prefixes.

    Args:
        clusters, labels: the result of [`find_clusters`].
        start: the encoder of the model of phase 1, which the router starts from if it has as many layers.
        data: the fingerprint of the training split.
    """
    args = trainer_arguments(training_args, "router", **router_fields(pretraining_args, training_args))
    set_seed(args.seed)
    router = Router(copy.deepcopy(config))
    router.topics.copy_(clusters.topics)
    router.centroids.copy_(clusters.centroids)
    router.prices.copy_(clusters.prices)
    labelled = {name: rows.add_column("label", labels[name]) for name, rows in dataset.items()}

    if start is not None and len(start.layers) == len(router.encoder.layers):
        router.encoder.load_state_dict(start.state_dict())
    trainer = DurableTrainer(
        router,
        frozen={"table": table},
        identity={
            "fingerprint": fingerprint(config, table.weight),
            "clusters": clusters_hash(router.state_dict()),
            **data_identity(data, dataset, args),
        },
        args=args,
        train_dataset=labelled["train"],
        eval_dataset=labelled["validation"],
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    with track(trainer, Path(training_args.output_dir), "router", "router", in_nats=False):
        trainer.train_durably()
    trainer.save_state()
    return router.cpu().eval()
