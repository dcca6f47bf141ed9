"""Blocks on clusters of text, and the router that weighs them."""

import copy
import dataclasses
import functools
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch.nn import functional as F

from conftest import MODEL, arguments, tokens
from noprop_hf import (
    DenoisingBlock,
    NoPropConfig,
    NoPropForCausalLM,
    NoPropForPreTraining,
    NoPropForSequenceClassification,
)
from noprop_hf.arguments import BlockArguments, PretrainingArguments, RunArguments, ShareArguments
from noprop_hf.checkpoints import DurableTrainer
from noprop_hf.clusters import (
    assign_clusters,
    find_clusters,
    fit_clusters,
    fit_topics,
    router_fields,
    train_router,
    window_features,
)
from noprop_hf.data import DataArguments, load_corpus, load_tokenizer, tokenize
from noprop_hf.model_directory import load_router, load_table, read_metadata
from noprop_hf.modeling_noprop import NUM_TOPICS, Router
from noprop_hf.planning import Sizes, plan
from noprop_hf.pretraining import pretrain_embeddings
from noprop_hf.recipes import Recipe
from noprop_hf.shards_noprop import EMBEDDINGS_SHARD, block_shard
from noprop_hf.training import BlockRun, train_blocks


KINDS = ("cat dog bird fish cow", "red blue green pink white", "run walk jump swim climb")
CLUSTERED = dataclasses.replace(MODEL, num_blocks=3, block_data="clusters", block_initialization="pretraining")
RARELY = {"eval_strategy": "no", "save_steps": 6}
STEPS = PretrainingArguments(pretraining_max_steps=120)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataArguments:
    """Long texts of three kinds, each of words of its own."""
    choose, path = random.Random(0), tmp_path_factory.mktemp("kinds") / "train.txt"
    texts = [" ".join(choose.choices(KINDS[number % 3].split(), k=60)) for number in range(240)]
    path.write_text("\n".join(texts) + "\n")
    return DataArguments(train_file=str(path), max_length=16, packing=False, validation_split_percentage=10)


@pytest.fixture(scope="module")
def phase1(data, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("clusters") / "model"
    return pretrain_embeddings(CLUSTERED, data, STEPS, arguments(directory, **RARELY))


@pytest.fixture(scope="module")
def trained(phase1, data, tmp_path_factory) -> Path:
    directory = Path(shutil.copytree(phase1, tmp_path_factory.mktemp("trained") / "model"))
    return train_blocks(data, BlockArguments(sample_prompts=["cat"]), arguments(directory, max_steps=12, **RARELY))


def rows_of(directory: Path, data: DataArguments) -> dict[str, Dataset]:
    return tokenize(load_corpus(data), load_tokenizer(str(directory)), data)


def kind_of(text: str) -> int:
    return next(kind for kind, words in enumerate(KINDS) if text.split()[1] in words)


def routed_config(**fields) -> NoPropConfig:
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_blocks": 3, "num_layers_per_block": 1}
    return NoPropConfig(
        **sizes | {"num_attention_heads": 2, "intermediate_size": 24, "block_data": "clusters"} | fields
    )


def tf_idf(windows: list[list[int]], vocab_size: int) -> np.ndarray:
    """Counts times `log((1 + n) / (1 + df))`, `(num_windows, vocab_size)`, in rows of norm 1."""
    counts = np.array([np.bincount(window, minlength=vocab_size) for window in windows], dtype=float)
    weighted = counts * np.log((1 + len(windows)) / (1 + (counts > 0).sum(0)))
    return weighted / np.linalg.norm(weighted, axis=1, keepdims=True)


def test_features_are_those_of_latent_semantic_analysis():
    """Few kinds of windows span all topics; with many, the topics keep nearly as much as exact singular vectors."""
    choose = np.random.default_rng(0)
    mixtures = choose.dirichlet([0.3] * 6, 400) @ choose.dirichlet([0.05] * 60, 6)
    windows = [choose.choice(60, choose.integers(5, 40), p=mixture).tolist() for mixture in mixtures]
    matrix, kinds = tf_idf(windows, 60), windows[:20] * 5
    assert np.linalg.matrix_rank(matrix) > NUM_TOPICS
    features, few = window_features(kinds, fit_topics(kinds, 60, seed=0)), tf_idf(kinds, 60)
    assert np.allclose(features @ features.T, few @ few.T, atol=1e-5)
    weights = np.log(401 / (1 + (matrix > 0).sum(0)))
    topics = fit_topics(windows, 60, seed=0)
    kept = np.linalg.norm(matrix @ (topics.numpy() / weights[:, None])) ** 2
    exact = (np.linalg.svd(matrix, compute_uv=False)[:NUM_TOPICS] ** 2).sum()
    assert 0.98 * exact < kept < 1.0001 * exact
    features = window_features(windows, topics)
    assert torch.equal(features, window_features(windows, fit_topics(windows, 60, seed=0)))


def test_topics_of_few_windows_are_padded_with_zeros():
    windows = [[1, 2, 2], [5], [7, 1, 29, 4, 4]]
    features = window_features(windows, fit_topics(windows, 30, seed=0))
    assert features.shape == (3, NUM_TOPICS) and (features[:, 3:] == 0).all()
    matrix = tf_idf(windows, 30)  # of full rank: nothing is lost
    assert np.allclose(features @ features.T, matrix @ matrix.T, atol=1e-5)


def test_clusters_are_of_similar_size_whatever_the_kinds():
    """Nine in ten points are of one kind: plain k-means would give it one of three clusters."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.tensor([0] * 900 + [1] * 100)
    points = F.normalize(torch.eye(6)[kinds] + 0.3 * torch.randn(1000, 6, generator=generator), dim=-1)
    for seed in range(5):
        centroids, prices = fit_clusters(points, 3, seed)
        assert torch.allclose(centroids.norm(dim=-1), torch.ones(3))
        clusters = (points @ centroids.T - prices).argmax(-1)
        assert (clusters.bincount(minlength=3) > 270).all()
    again = fit_clusters(points, 3, seed)
    assert torch.equal(again[0], centroids) and torch.equal(again[1], prices)


@pytest.mark.parametrize("common", [0.0, 1.0, 6.0])
@pytest.mark.parametrize("num_clusters", [2, 10])
def test_clusters_are_of_similar_size_however_much_alike(common, num_clusters):
    """A common part of the features makes similarities differ less, by up to a hundred times."""
    points = torch.randn(2000, 32, generator=torch.Generator().manual_seed(0))
    points = F.normalize(points + common, dim=-1)
    centroids, prices = fit_clusters(points, num_clusters, seed=0)
    counts = (points @ centroids.T - prices).argmax(-1).bincount(minlength=num_clusters)
    assert counts.min() > 0.8 * 2000 / num_clusters and counts.max() < 1.2 * 2000 / num_clusters


def test_clusters_are_the_kinds_of_text(phase1, data):
    config = NoPropConfig.from_pretrained(phase1)
    router = load_router(phase1, config)
    tokenizer = load_tokenizer(str(phase1))
    rows = rows_of(phase1, data)["train"]
    kinds = [kind_of(tokenizer.decode(row)) for row in rows["input_ids"]]
    clusters = assign_clusters(rows, router)
    pairs = set(zip(kinds, clusters.tolist(), strict=True))
    assert len(pairs) == 3, pairs  # one cluster for each kind


def test_the_router_tells_clusters_apart_by_a_prefix(phase1, data):
    config = NoPropConfig.from_pretrained(phase1)
    table, router = load_table(phase1, config), load_router(phase1, config)
    rows = rows_of(phase1, data)["validation"]
    clusters = assign_clusters(rows, router)
    input_ids = torch.tensor([row[:8] for row in rows["input_ids"]])
    embeds = table(input_ids)
    with torch.no_grad():
        logits = router(inputs_embeds=embeds, **router.encoder.attention_inputs(embeds))
    assert (logits[:, -1].argmax(-1).numpy() == clusters).mean() > 0.8
    changed = input_ids.clone()
    changed[:, 5:] = changed[:, 5:].roll(1, 0)
    embeds = table(changed)
    with torch.no_grad():
        others = router(inputs_embeds=embeds, **router.encoder.attention_inputs(embeds))
    assert torch.allclose(others[:, :5], logits[:, :5], atol=1e-5)  # it reads no later token


def test_a_block_is_trained_on_the_windows_of_its_cluster(trained, phase1, data, tmp_path, monkeypatch):
    config = NoPropConfig.from_pretrained(phase1)
    router = load_router(phase1, config)
    seen = []
    plain = DenoisingBlock.forward

    @functools.wraps(plain)
    def watch(self, input_ids=None, *args, **kwargs):
        if self.training and input_ids is not None:
            seen.extend(input_ids.tolist())
        return plain(self, input_ids, *args, **kwargs)

    directory = Path(shutil.copytree(phase1, tmp_path / "model"))
    monkeypatch.setattr(DenoisingBlock, "forward", watch)
    train_blocks(data, BlockArguments(blocks="1", sample_prompts=[]), arguments(directory, max_steps=12, **RARELY))
    assert len(seen) == 12 * 4
    rows = Dataset.from_dict({"input_ids": seen})
    assert {*assign_clusters(rows, router).tolist()} == {1}
    alone, together = (load_file(folder / block_shard(1)) for folder in (directory, trained))
    assert all(torch.equal(together[name], tensor) for name, tensor in alone.items())  # blocks are independent


def test_all_blocks_have_the_bias_of_phase_1(trained):
    bias = NoPropForPreTraining.from_pretrained(trained).bias
    model = NoPropForCausalLM.from_pretrained(trained)
    assert all(torch.equal(block.head.bias, bias) for block in model.model.blocks)


def test_the_prediction_is_the_weighted_mean_of_the_blocks(trained, data):
    """By hand, block by block; and the model knows every kind of text, a block its own better than others."""
    model = NoPropForCausalLM.from_pretrained(trained).eval()
    rows = rows_of(trained, data)["validation"]
    input_ids = torch.tensor([row[:14] for row in rows["input_ids"]])
    table, router = model.model.embed_tokens, model.model.router
    embeds = table(input_ids)
    inputs = router.encoder.attention_inputs(embeds)
    with torch.no_grad():
        weights = router.readout(router.encoder(embeds, **inputs)).softmax(-1)
        answers = [block.head(block.encoder(embeds, **inputs)) for block in model.model.blocks]
        mixed = sum(weights[..., index, None] * point for index, (point, _) in enumerate(answers))
        expected = (mixed @ table.weight.T + answers[0][1]).log_softmax(-1)
        assert torch.allclose(model(input_ids).logits, expected, atol=1e-5)
    outputs = model.variational_bound(input_ids)
    targets = input_ids[:, 1:]
    nats = F.cross_entropy(expected[:, :-1].transpose(1, 2), targets)
    assert outputs.predictive_nats.item() == pytest.approx(nats.item(), abs=1e-4)
    assert outputs.predictive_nats < outputs.context_nats.mean()


@pytest.mark.parametrize("sure_of", [0, 2])
def test_a_sure_router_leaves_one_block(trained, sure_of):
    model = NoPropForCausalLM.from_pretrained(trained).eval()
    with torch.no_grad():
        model.model.router.readout.weight.zero_()
        model.model.router.readout.bias.copy_(200.0 * F.one_hot(torch.tensor(sure_of), 3))
    input_ids = tokens(2, 12)
    outputs = model.variational_bound(input_ids, generator=torch.Generator().manual_seed(0))
    assert outputs.predictive_nats.item() == pytest.approx(outputs.context_nats[sure_of].item(), abs=1e-4)
    assert outputs.token_nats.isfinite().all()
    if sure_of == 0:  # later blocks change nothing
        assert torch.allclose(outputs.block_nats[1:], torch.zeros(2), atol=1e-4)
        assert outputs.bound.item() == pytest.approx(outputs.context_nats[0].item(), abs=1e-4)
    text = model.generate(input_ids, max_new_tokens=3, decoding_mode="denoising", num_trajectories=2, pad_token_id=0)
    assert text.shape == (2, 15)


def test_an_interrupted_router_ends_with_the_same_bits(phase1, data, tmp_path, monkeypatch):
    directory, compute_loss, steps = tmp_path / "model", DurableTrainer.compute_loss, iter(range(8))

    def stop(self, model, *args, **kwargs):
        if isinstance(model, Router) and model.training and next(steps, None) is None:
            raise KeyboardInterrupt
        return compute_loss(self, model, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DurableTrainer, "compute_loss", stop)
        pretrain_embeddings(CLUSTERED, data, STEPS, arguments(directory, **RARELY))
    assert not (directory / EMBEDDINGS_SHARD).exists()
    pretrain_embeddings(CLUSTERED, data, STEPS, arguments(directory, **RARELY))
    resumed, straight = (load_file(path / EMBEDDINGS_SHARD) for path in (directory, phase1))
    assert any("router" in name for name in straight)
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)
    assert (
        read_metadata(directory / EMBEDDINGS_SHARD)["clusters"] == read_metadata(phase1 / EMBEDDINGS_SHARD)["clusters"]
    )


def test_the_router_resumes_only_the_run_of_its_configuration(phase1, data, tmp_path):
    """With --embeddings_from, another configuration can have the same table and clusters."""
    config = NoPropConfig.from_pretrained(phase1)
    table, tokenizer, rows = load_table(phase1, config), load_tokenizer(str(phase1)), rows_of(phase1, data)
    args = arguments(tmp_path, **RARELY)
    steps = PretrainingArguments(pretraining_max_steps=20)
    found = find_clusters(config, rows, args.seed)
    train_router(config, *found, None, table, tokenizer, rows, "data", steps, args)
    config.rms_norm_eps = 1e-4
    with pytest.raises(ValueError, match="the embedding table or the configuration changed"):
        train_router(config, *found, None, table, tokenizer, rows, "data", steps, args)


@pytest.mark.parametrize(("given", "expected"), [(0, 0), (0.3, 0.3), (1, 1), (25, 3)])
def test_the_router_warms_up_in_a_tenth_of_the_steps(tmp_path, given, expected):
    args = arguments(tmp_path, warmup_steps=given)
    fields = router_fields(PretrainingArguments(pretraining_max_steps=100), args)
    assert fields["max_steps"] == 10 and fields.get("warmup_steps", given) == expected


def test_an_empty_cluster_is_an_error_before_any_block_is_trained(phase1, data, tmp_path, monkeypatch):
    directory = Path(shutil.copytree(phase1, tmp_path / "model"))
    two = property(lambda run: {name: np.arange(len(rows)) % 2 for name, rows in run.dataset.items()})
    monkeypatch.setattr(BlockRun, "clusters", two)
    with pytest.raises(ValueError, match="cluster of block 2"):
        train_blocks(data, BlockArguments(sample_prompts=[]), arguments(directory, max_steps=2, **RARELY))
    assert not (directory / block_shard(0)).exists()


def test_an_empty_cluster_is_found_before_phase_1(tmp_path):
    text = tmp_path / "same.txt"
    text.write_text("the same line\n" * 200)
    data = DataArguments(train_file=str(text), max_length=16, packing=False)
    args = arguments(tmp_path / "model", **RARELY)
    with pytest.raises(ValueError, match="fewer blocks"):
        pretrain_embeddings(CLUSTERED, data, STEPS, args)
    assert not (tmp_path / "model" / "checkpoints" / "pretraining").exists()
    pretrain_embeddings(dataclasses.replace(CLUSTERED, num_blocks=1), data, STEPS, args)  # the advice works


@pytest.mark.parametrize("command", ["train", "plan"])
def test_a_cluster_without_a_batch_is_found_before_phase_1(phase1, data, tmp_path, command):
    rows = len(rows_of(phase1, data)["train"])
    args = arguments(tmp_path / "model", dataloader_drop_last=True, per_device_train_batch_size=rows - 1, **RARELY)
    blocks = BlockArguments(sample_prompts=[])
    with pytest.raises(ValueError, match=f"cluster of block 0 has .* rows, too few for one batch of {rows - 1}"):
        if command == "train":
            pretrain_embeddings(CLUSTERED, data, STEPS, args, blocks)
        else:
            plan(Recipe(CLUSTERED, data, STEPS, blocks, ShareArguments(), args, RunArguments()))
    assert not (tmp_path / "model" / "checkpoints" / "pretraining").exists()


@pytest.mark.parametrize(("count", "num_clusters", "repeated"), [(300, 100, 0.5), (1000, 50, 0.5), (61, 3, 0.9)])
def test_no_cluster_is_empty_where_many_windows_are_alike(count, num_clusters, repeated):
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        windows = torch.randint(300, (count, 16), generator=generator)
        windows[torch.rand(count, generator=generator) < repeated] = windows[0].clone()
        features = window_features(windows.tolist(), fit_topics(windows.tolist(), 300, seed))
        centroids, prices = fit_clusters(features, num_clusters, seed)
        sizes = (features @ centroids.T - prices).argmax(-1).bincount(minlength=num_clusters)
        assert sizes.min() > 0


@pytest.mark.parametrize("kept", [[0, 2], [1, 2], [2]])
def test_the_weights_of_the_router_stay_with_their_blocks(kept):
    torch.manual_seed(0)
    model = NoPropForCausalLM(routed_config()).eval()
    with torch.no_grad():
        model.model.router.readout.bias.copy_(torch.tensor([0.0, 3.0, -2.0]))
    input_ids = tokens(2, 12)
    outputs = model.model(input_ids)
    embeds, encoder = model.model.embed_tokens(input_ids), model.model.blocks[0].encoder
    inputs = encoder.attention_inputs(embeds, None, None)
    answers = [block.head(block.encoder(embeds, **inputs))[0] for block in model.model.blocks]
    model.model.blocks = torch.nn.ModuleList([model.model.blocks[index] for index in kept])
    weights = outputs.block_logits[..., kept].softmax(-1)
    expected = sum(weights[..., [place]] * answers[index] for place, index in enumerate(kept))
    for context in (torch.no_grad, torch.enable_grad):
        with context():
            found = model.model(input_ids, use_cache=False).last_hidden_state
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("block_data", ["clusters", "shared"])
def test_the_bound_of_the_blocks_that_the_configuration_runs(block_data):
    torch.manual_seed(0)
    model = NoPropForCausalLM(routed_config(block_data=block_data)).eval()
    input_ids = tokens(2, 12)
    bound = model.variational_bound(input_ids, generator=torch.Generator().manual_seed(0))
    per_block = model.config.num_layers_per_block
    model.config.num_hidden_layers = (2 + (block_data == "clusters")) * per_block
    shorter = model.variational_bound(input_ids, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(shorter.block_nats, bound.block_nats[:2])
    torch.testing.assert_close(shorter.bound, bound.block_nats[:2].sum())


def test_a_classifier_with_adapters_leaves_the_router_frozen():
    """peft trains every module that has a name of the usual classifiers."""
    peft = pytest.importorskip("peft")
    model = NoPropForSequenceClassification(routed_config())
    for target in ("all-linear", ["q_proj"]):
        adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(task_type="SEQ_CLS", target_modules=target))
        trained = [name for name, weight in adapted.named_parameters() if weight.requires_grad and "lora" not in name]
        assert trained and all("score" in name for name in trained)


@pytest.mark.parametrize("lost", ["router", "layers of the router", "block 0"])
def test_a_cache_without_its_first_layer_is_refused(lost):
    """It has no token in that layer, where the next position is counted."""
    torch.manual_seed(0)
    model = NoPropForCausalLM(routed_config(block_data="shared" if lost == "block 0" else "clusters")).eval()
    if lost == "router":
        model.model.router = None
    elif lost == "block 0":
        model.model.blocks = model.model.blocks[1:]
    else:
        model.model.router.encoder.layers = model.model.router.encoder.layers[:0]
    input_ids = tokens(2, 6)
    for context in (torch.no_grad, torch.enable_grad):
        with context():
            model(input_ids, use_cache=False)
            cache = model(input_ids[:, :4], use_cache=True).past_key_values
            with pytest.raises(ValueError, match="lost that layer"):
                model(input_ids[:, 4:], past_key_values=cache)


def test_the_plan_counts_the_parameters_of_the_router():
    model = NoPropForCausalLM(routed_config())
    assert Sizes.of(model.config).parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_blocks_refuse_a_stream_of_clustered_text(phase1, data, tmp_path):
    directory = Path(shutil.copytree(phase1, tmp_path / "model"))
    streamed = dataclasses.replace(data, streaming=True, validation_file=data.train_file)
    with pytest.raises(ValueError, match="leave --streaming out"):
        train_blocks(streamed, BlockArguments(sample_prompts=[]), arguments(directory, max_steps=2, **RARELY))


def test_data_that_cannot_be_clustered_are_refused(data, tmp_path):
    for message, options in {
        "leave --streaming out": {"streaming": True, "validation_file": data.train_file},
        "has 2 windows, too few for 3 clusters": {"max_train_samples": 2},
    }.items():
        directory = tmp_path / "model"
        with pytest.raises(ValueError, match=message):
            pretrain_embeddings(CLUSTERED, dataclasses.replace(data, **options), STEPS, arguments(directory, **RARELY))
        assert not (directory / "checkpoints" / "pretraining").exists()
