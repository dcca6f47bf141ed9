"""Blocks that read the states of another causal model, which is frozen (`--trunk_from`)."""

import copy
import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MixtralConfig,
    PreTrainedModel,
    Trainer,
)

from conftest import arguments, programs
from noprop_hf import NoPropConfig, NoPropForCausalLM, NoPropForPreTraining, checkpoints
from noprop_hf.arguments import BlockArguments, ModelArguments, PretrainingArguments, RunArguments, ShareArguments
from noprop_hf.compatibility_noprop import CACHE
from noprop_hf.data import CausalCollator, DataArguments, load_corpus, load_tokenizer, tokenize
from noprop_hf.evaluation import evaluate_model
from noprop_hf.model_directory import load_table, read_metadata
from noprop_hf.planning import plan
from noprop_hf.pretraining import check_trunk, prepare_pretraining, pretrain_embeddings
from noprop_hf.recipes import Recipe
from noprop_hf.shards_noprop import EMBEDDINGS_SHARD, fingerprint
from noprop_hf.training import train_blocks


WIDTH = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
LLAMA = LlamaConfig(
    **WIDTH | {"num_attention_heads": 4},
    vocab_size=50,
    num_key_value_heads=1,
    num_hidden_layers=2,
    rope_parameters={"rope_type": "default", "rope_theta": 500.0},
)
GPT2 = GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=4, n_positions=40, bos_token_id=0, eos_token_id=0)
RARELY = {"eval_strategy": "no", "save_steps": 6}
STEPS = PretrainingArguments(pretraining_max_steps=6)


def small(**fields) -> NoPropConfig:
    sizes = {**WIDTH, "vocab_size": 50, "num_blocks": 3, "num_layers_per_block": 1, "max_position_embeddings": 32}
    return NoPropConfig(**sizes | fields)


@pytest.fixture(params=[LLAMA, GPT2], ids=lambda config: config.model_type)
def model(request) -> NoPropForCausalLM:
    """A model with a router, whose parts all do something."""
    torch.manual_seed(0)
    model = NoPropForCausalLM(small(trunk_config=request.param.to_dict(), block_data="clusters")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(1, 50, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def stock(data, tokenizer, tmp_path_factory) -> Path:
    """A Llama that the stock `Trainer` has trained on the corpus, with its tokenizer."""
    folder = tmp_path_factory.mktemp("stock")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA.to_diff_dict() | {"vocab_size": len(tokenizer)}))
    dataset = tokenize(load_corpus(data), tokenizer, data)
    args = arguments(folder / "run", max_steps=60, learning_rate=1e-2, eval_strategy="no", save_strategy="no")
    Trainer(model, args, CausalCollator(tokenizer), dataset["train"]).train()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


def grown(stock: Path, **fields) -> ModelArguments:
    blocks = {"num_blocks": 2, "num_layers_per_block": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return ModelArguments(trunk_from=str(stock), **blocks | fields)


@pytest.fixture(scope="module")
def phase1(stock, data, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("trunk") / "model"
    return pretrain_embeddings(grown(stock), data, STEPS, arguments(directory, **RARELY))


@pytest.fixture(scope="module")
def trained(phase1, stock, data, tmp_path_factory) -> Path:
    directory = Path(shutil.copytree(phase1, tmp_path_factory.mktemp("trained") / "model"))
    return train_blocks(data, BlockArguments(sample_prompts=["the"]), arguments(directory, **RARELY), grown(stock))


# --- the model --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_blocks_and_router_read_the_states_of_the_trunk(model, tokens):
    """Each part run by itself on the states of the stock model, without the model around it."""
    table = model.model.embed_tokens
    trunk = type(table.trunk)(model.config.new_trunk_config()).eval()
    trunk.load_state_dict(table.trunk.state_dict())
    states = trunk(tokens).last_hidden_state

    def encoded(encoder):
        return encoder(states, **encoder.attention_inputs(states))

    weights = model.model.router.readout(encoded(model.model.router.encoder)).softmax(-1)
    answers = [block.head(encoded(block.encoder))[0] for block in model.model.blocks]
    point = sum(weights[..., index, None] * answer for index, answer in enumerate(answers))
    bias = sum(block.head.bias for block in model.model.blocks) / 3
    expected = (point @ table.weight.T + bias).log_softmax(-1)
    assert torch.allclose(model(tokens).logits, expected, atol=1e-5)
    assert (expected[:, 1:] - expected[:, :-1]).abs().max() > 0.5


@torch.no_grad()
def test_one_function_whatever_the_path(model, tokens):
    whole = model(tokens).logits
    with torch.enable_grad():
        assert torch.allclose(model(tokens).logits, whole, atol=1e-5)
    for cache in (None, DynamicCache(config=model.config), DynamicCache()):
        first = model(tokens[:, :5], cache=cache, use_cache=True)
        filled = getattr(first, CACHE)
        assert filled.get_seq_length() == 5 and len(filled.layers) == model.config.num_hidden_layers
        second = model(tokens[:, 5:], cache=filled, use_cache=True)
        assert torch.allclose(torch.cat([first.logits, second.logits], 1), whole, atol=1e-5)
        assert getattr(second, CACHE).get_seq_length() == 12
    assert torch.allclose(model(inputs_embeds=model.get_input_embeddings()(tokens)).logits, whole, atol=1e-6)
    padded, mask = F.pad(tokens[:1, :9], (3, 0)), torch.ones(1, 12, dtype=torch.long)
    mask[:, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    alone = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    assert torch.allclose(alone, whole[:1, :9], atol=1e-5)
    model.set_attn_implementation("eager")
    assert model.model.embed_tokens.trunk.config._attn_implementation == "eager"
    assert torch.allclose(model(tokens).logits, whole, atol=1e-5)
    assert len(model(tokens, output_hidden_states=True).hidden_states) == 1 + 1 + 3


@torch.no_grad()
def test_generation(model, tokens):
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": 999}
    expected = tokens[:, :6]
    for _ in range(8):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    for mode in ({}, {"use_cache": False}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}):
        rows = [tokens[:1, :6]] if "prompt_lookup_num_tokens" in mode else [tokens[:, :6]]
        assert torch.equal(model.generate(*rows, **options, **mode), expected[: len(rows[0])]), mode
    padded, mask = F.pad(tokens[:1, :6], (2, 0)), torch.ones(1, 8, dtype=torch.long)
    mask[:, :2] = 0
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 2:], expected[:1])
    options |= {"decoding_mode": "denoising", "seed": 3}
    assert torch.equal(*(model.generate(tokens[:, :6], use_cache=cached, **options) for cached in (False, True)))
    options["decoding_mode"] = "predictive"
    early = model.generate(tokens[:, :6], num_inference_blocks=2, **options)
    model.config.num_hidden_layers = model.config.num_shared_layers + 2
    assert torch.equal(model.generate(tokens[:, :6], **options), early)


def test_a_trunk_is_frozen_and_blocks_are_trained(model, tokens):
    table, block = model.model.embed_tokens, model.model.blocks[1].train()
    assert not any(parameter.requires_grad for parameter in table.parameters())
    block(tokens, tokens, table).loss.backward()
    assert all(parameter.grad is None for parameter in table.parameters())
    assert all(parameter.grad.isfinite().all() for parameter in block.parameters())


def test_files(model, tokens, tokenizer, tmp_path):
    """Also in a process without the package."""
    expected = model(tokens).logits
    model.save_pretrained(tmp_path / "saved")
    loaded = NoPropForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded(tokens).logits, expected)
    assert not any(parameter.requires_grad for parameter in loaded.model.embed_tokens.parameters())
    assert loaded.config.trunk_config == NoPropConfig(**loaded.config.to_dict()).trunk_config
    half = NoPropForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert {weight.dtype for weight in half.state_dict().values()} == {torch.bfloat16}
    code = f"""
import sys
sys.modules["noprop_hf"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "saved")!r}, trust_remote_code=True)
torch.save(model(torch.tensor({tokens.tolist()})).logits, {str(tmp_path / "logits.pt")!r})
"""
    programs().forget()
    status, output = programs().stock.run("-c", code, cwd=tmp_path)
    assert status == 0, output
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)

    shard = tmp_path / "saved" / EMBEDDINGS_SHARD
    weights = load_file(shard)
    removed = next(name for name in weights if ".trunk." in name)
    save_file({name: weight for name, weight in weights.items() if name != removed}, shard)
    with pytest.raises(OSError, match="lacks embed_tokens.trunk"):
        NoPropForCausalLM.from_pretrained(tmp_path / "saved")


def test_padding_without_positions(model, tokens):
    """Learned positions are counted without padding, and a mask for each query changes nothing."""
    padded, mask = F.pad(tokens[:1, :9], (3, 0)), torch.ones(1, 12, dtype=torch.long)
    mask[:, :3] = 0
    with torch.no_grad():
        alone = model(tokens[:1, :9]).logits
        assert torch.allclose(model(padded, attention_mask=mask).logits[:, 3:], alone, atol=1e-5)
        first = model(padded[:, :7], attention_mask=mask[:, :7], use_cache=True)
        second = model(padded[:, 7:], attention_mask=mask, use_cache=True, cache=getattr(first, CACHE))
        assert torch.allclose(second.logits, alone[:, 4:], atol=1e-5)
        causal = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
        assert torch.allclose(model(tokens[:1, :9], attention_mask=causal).logits, alone, atol=1e-5)
        assert torch.equal(model(tokens, token_type_ids=torch.zeros_like(tokens)).logits, model(tokens).logits)


def test_prompt_tuning_reads_the_embeddings_of_the_trunk(model, tokens):
    peft = pytest.importorskip("peft")
    options = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(copy.deepcopy(model), options).eval()
    prompt = tuned.prompt_encoder["default"].embedding.weight[None].expand(2, -1, -1)
    with torch.no_grad():
        expected = model(inputs_embeds=torch.cat([prompt, model.get_input_embeddings()(tokens)], 1)).logits
        assert torch.allclose(tuned(tokens).logits, expected, atol=1e-5)


def test_the_cache_of_the_trunk_alone_is_refused(model, tokens):
    trunk, cache = model.model.embed_tokens.trunk, DynamicCache()
    trunk(tokens, use_cache=True, **{CACHE: cache})
    with pytest.raises(ValueError, match="such as the trunk alone"):
        model(tokens[:, :1], cache=cache)


def test_a_trunk_whose_weights_are_stored_under_other_names(tokens, tmp_path):
    """Experts are one tensor in memory and many in the files of the stock model."""
    sizes = {**WIDTH, "vocab_size": 50, "num_hidden_layers": 2, "num_key_value_heads": 1}
    config = MixtralConfig(**sizes, num_local_experts=2, num_experts_per_tok=1, sliding_window=None)
    model = NoPropForCausalLM(small(trunk_config=config.to_dict())).eval()
    model.save_pretrained(tmp_path)
    assert torch.equal(NoPropForCausalLM.from_pretrained(tmp_path)(tokens).logits, model(tokens).logits)


def test_a_configuration_is_the_same_when_it_is_read_back(tmp_path):
    labels = {number: str(number) for number in range(12)}  # the keys are texts in a file, in another order
    config = small(trunk_config=LLAMA.to_dict() | {"id2label": labels, "return_dict": False})
    config.save_pretrained(tmp_path)
    loaded, table = NoPropConfig.from_pretrained(tmp_path), torch.ones(50, 16)
    assert loaded.trunk_config == config.trunk_config and fingerprint(loaded, table) == fingerprint(config, table)
    assert NoPropForCausalLM(loaded)(torch.tensor([[1, 2]])).logits.isfinite().all()


def test_no_other_embeddings(model):
    assert isinstance(model.get_input_embeddings(), torch.nn.Embedding)
    with pytest.raises(ValueError, match="cannot be replaced"):
        model.set_input_embeddings(torch.nn.Embedding(50, 16))
    with pytest.raises(ValueError, match="cannot be resized"):
        model.resize_token_embeddings(60)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"trunk_config": {"hidden_size": 16}}, "must be the configuration of a model of transformers"),
        ({"trunk_config": {"model_type": "nonsense"}}, "got 'nonsense'"),
        ({"trunk_config": {"model_type": "noprop"}}, "got 'noprop'"),
        ({"trunk_config": LLAMA.to_dict(), "hidden_size": 24}, "The trunk is 16 wide"),
        ({"trunk_config": LLAMA.to_dict(), "pretraining_objective": "mlm"}, "cannot fill masks"),
        ({"trunk_config": MistralConfig(**WIDTH, sliding_window=8).to_dict()}, "must attend to all earlier tokens"),
        ({"trunk_config": LLAMA.to_dict() | {"num_hidden_layers": 5_000}}, "from 1 to 1,000 layers, got 5000"),
        ({"trunk_config": LLAMA.to_dict() | {"vocab_size": 20}}, "has 20 tokens, and the table 50"),
        ({"trunk_config": LLAMA.to_dict() | {"vocab_size": 2**45}}, "it must have them all"),
        ({"trunk_config": LLAMA.to_dict() | {"quantization_config": {"bits": 4}}}, "cannot be quantized by itself"),
    ],
)
def test_configurations_that_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        small(**fields)


@pytest.mark.parametrize("fields", [{"hidden_act": "nonsense"}, {"pad_token_id": 70}, {"num_attention_heads": 0}])
def test_a_trunk_that_cannot_be_built(fields):
    """The configuration or the model raises the error, depending on the version."""
    with pytest.raises(ValueError, match="No trunk can be built from `trunk_config`|`trunk_config` is not that of"):
        NoPropForCausalLM(small(trunk_config=LLAMA.to_dict() | fields))


def test_the_fingerprint_of_a_model_without_a_trunk_is_as_before():
    table = torch.arange(50 * 16.0).view(50, 16)
    plain, trunk = small(), small(trunk_config=LLAMA.to_dict())
    other = small(trunk_config=LLAMA.to_dict() | {"rms_norm_eps": 1e-3})
    assert fingerprint(plain, table).startswith("09fbe1669364182c")
    assert len({fingerprint(config, table) for config in (plain, trunk, other)}) == 3


# --- training ---------------------------------------------------------------------------------------------------------


def nats_of(model: PreTrainedModel, stock: Path, data: DataArguments) -> float:
    """The cross-entropy of a causal model on the validation split."""
    rows = torch.tensor(tokenize(load_corpus(data), load_tokenizer(str(stock)), data)["validation"]["input_ids"])
    with torch.no_grad():
        return F.cross_entropy(model.eval()(rows).logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()).item()


def test_phase_1_begins_as_the_trunk(stock, data, tmp_path):
    """With a learning rate that changes nothing. The rows of the table are normalised, so the two differ a little."""
    options = {"learning_rate": 1e-12, **RARELY}
    directory = pretrain_embeddings(grown(stock), data, STEPS, arguments(tmp_path / "model", **options))
    model, trunk = NoPropForPreTraining.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(stock)
    table = load_table(directory, model.config)
    torch.manual_seed(0)
    untrained = NoPropForPreTraining(copy.deepcopy(model.config))
    expected, begun, random = (
        nats_of(trunk, stock, data),
        nats_of(Reader(model, table.trunk), stock, data),
        nats_of(Reader(untrained, table.trunk), stock, data),
    )
    assert begun < expected + 0.25 * (random - expected)
    assert all(torch.equal(weight, table.trunk.state_dict()[name]) for name, weight in trunk.model.state_dict().items())


class Reader(torch.nn.Module):
    """A model of phase 1 with its trunk."""

    def __init__(self, model: NoPropForPreTraining, trunk: torch.nn.Module):
        super().__init__()
        self.model, self.trunk = model, trunk

    def forward(self, tokens: torch.Tensor):
        return self.model(tokens, trunk=self.trunk)


def test_blocks_improve_on_the_trunk(trained, stock, data):
    """On a corpus whose texts the trunk has not finished learning."""
    tokenizer = load_tokenizer(str(trained))
    model, trunk = NoPropForCausalLM.from_pretrained(trained), AutoModelForCausalLM.from_pretrained(stock)
    dataset = tokenize(load_corpus(data), tokenizer, data)
    assert evaluate_model(model, dataset["validation"], tokenizer).predictive < nats_of(trunk, stock, data)
    assert model.config.block_initialization == "pretraining" and model.config.hidden_size == 16
    assert torch.equal(model.model.embed_tokens.trunk.norm.weight, trunk.model.norm.weight)
    assert tokenizer.get_vocab() == load_tokenizer(str(stock)).get_vocab()


def test_blocks_do_not_depend_on_one_another(phase1, trained, data, stock, tmp_path):
    directory = Path(shutil.copytree(phase1, tmp_path / "model"))
    train_blocks(data, BlockArguments("1", sample_prompts=[]), arguments(directory, **RARELY), grown(stock))
    alone, together = (load_file(folder / "block-01.safetensors") for folder in (directory, trained))
    assert alone.keys() == together.keys() and all(torch.equal(alone[name], together[name]) for name in alone)
    assert not any("trunk" in name for name in alone)


def test_a_killed_phase_1_resumes_and_refuses_another_trunk(stock, phase1, data, tmp_path, monkeypatch):
    other = Path(shutil.copytree(stock, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] *= 1.01
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    directory = tmp_path / "model"
    pretrain_embeddings(grown(stock), data, STEPS, arguments(directory, eval_strategy="no", save_steps=3))
    (directory / EMBEDDINGS_SHARD).unlink()
    shutil.rmtree(directory / "checkpoints" / "pretraining" / "checkpoint-6")
    with pytest.raises(ValueError, match="other settings: .*trunk"):
        pretrain_embeddings(grown(other), data, STEPS, arguments(directory, eval_strategy="no", save_steps=3))
    resumed = []
    monkeypatch.setattr(checkpoints.logger, "info", lambda text: resumed.append(text))
    pretrain_embeddings(grown(stock), data, STEPS, arguments(directory, eval_strategy="no", save_steps=3))
    assert any("Resuming from" in text for text in resumed)
    again, before = load_file(directory / EMBEDDINGS_SHARD), load_file(phase1 / EMBEDDINGS_SHARD)
    assert all(torch.equal(again[name], before[name]) for name in before)


def test_blocks_on_another_trunk_are_refused(trained, data, tmp_path):
    """Also if the file of table and trunk was written by a tool that records nothing."""
    directory = Path(shutil.copytree(trained, tmp_path / "model"))
    weights = load_file(directory / EMBEDDINGS_SHARD)
    weights["model.embed_tokens.trunk.norm.weight"] *= 1.01
    save_file(weights, directory / EMBEDDINGS_SHARD, metadata={"format": "pt"})
    with pytest.raises(OSError, match="another trunk"):
        NoPropForCausalLM.from_pretrained(directory)
    with pytest.raises(ValueError, match="another trunk"):
        train_blocks(data, BlockArguments(sample_prompts=[]), arguments(directory, **RARELY))


def test_heads_are_those_of_the_trunk_unless_given(stock, data):
    """So that caches of one shape for all layers work."""
    rows = load_corpus(data)["train"]
    for given, expected in ((None, (4, 1, 4)), (2, (2, 2, 8))):
        config, _, _ = prepare_pretraining(grown(stock, num_attention_heads=given), data, rows)
        assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == expected


def test_clusters_and_the_metadata(stock, data, tmp_path):
    model_args = grown(stock, block_data="clusters")
    directory = tmp_path / "model"
    pretrain_embeddings(model_args, data, STEPS, arguments(directory, **RARELY))
    train_blocks(data, BlockArguments(sample_prompts=[]), arguments(directory, **RARELY), model_args)
    model = NoPropForCausalLM.from_pretrained(directory)
    assert model.model.router.encoder.layers[0].self_attn.layer_idx == 2
    origin = read_metadata(directory / EMBEDDINGS_SHARD)["trunk_from"]
    assert origin.startswith("local ") and str(stock) not in (directory / "config.json").read_text()
    with pytest.raises(ValueError, match="holds a model with trunk_from=another local path"):
        train_blocks(data, BlockArguments(), arguments(directory), grown(directory, block_data="clusters"))


def test_a_plan_counts_the_trunk(stock, data, tmp_path):
    training = arguments(tmp_path / "model", **RARELY)
    run = RunArguments(dry_run=True)
    planned = plan(Recipe(grown(stock), data, STEPS, BlockArguments(), ShareArguments(), training, run))
    trunk = AutoModelForCausalLM.from_pretrained(stock).model
    size = trunk.num_parameters()
    assert f"{size:,} parameters in 2 layers, frozen" in str(planned) and "largest width" not in str(planned)
    assert planned.phase1.memory.parts["frozen table"] >= 4 * size
    assert planned.block.memory.parts["frozen table"] >= 4 * (size + 16 * planned.config.vocab_size)
    directory = pretrain_embeddings(grown(stock), data, STEPS, training)
    assert planned.sizes.table == sum(weight.nbytes for weight in load_file(directory / EMBEDDINGS_SHARD).values())


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            lambda size: BertLMHeadModel(BertConfig(**WIDTH, vocab_size=size, num_hidden_layers=1)),
            "describe its layers",
        ),
        (lambda size: MambaForCausalLM(MambaConfig(vocab_size=size, hidden_size=16, num_hidden_layers=1)), "trunk"),
        (
            lambda size: Gemma2ForCausalLM(
                Gemma2Config(**WIDTH, vocab_size=size, num_hidden_layers=2, head_dim=8, num_key_value_heads=1)
            ),
            "an attention of its own|must attend to all earlier tokens",  # by version
        ),
        (
            lambda size: GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=16, n_layer=1, n_head=2, n_positions=8)),
            "reads at most 8 tokens: set --max_length to 8",
        ),
        (lambda size: GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=16, n_layer=1, n_head=2)), "too small for"),
    ],
    ids=["bert", "mamba", "gemma2", "short", "vocabulary"],
)
def test_models_that_cannot_be_a_trunk(model, words, data, tokenizer, tmp_path, monkeypatch):
    model(len(tokenizer)).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    monkeypatch.setattr(Trainer, "train", None)
    with pytest.raises(ValueError, match=words):
        pretrain_embeddings(grown(tmp_path / "other"), data, STEPS, arguments(tmp_path / "model"))


def test_a_trunk_that_reads_later_tokens():
    with pytest.raises(ValueError, match="'encoder' cannot be a trunk: its states depend on later tokens"):
        check_trunk(BertModel(BertConfig(**WIDTH, vocab_size=50, num_hidden_layers=1)).eval(), "encoder")


def test_arguments_that_do_not_fit(stock, data, tmp_path):
    with pytest.raises(ValueError, match="leave --embeddings_from out"):
        grown(stock, embeddings_from=str(stock))
    for fields, words in (
        ({"trunk_from": str(tmp_path)}, "Cannot load the model .* as a causal language model"),
        ({"hidden_size": 32}, "has 16 dimensions, but `hidden_size` is 32"),
        ({"num_pretraining_layers": 2}, "cannot start from the 2 layers"),
    ):
        with pytest.raises(ValueError, match=words):
            pretrain_embeddings(dataclasses.replace(grown(stock), **fields), data, STEPS, arguments(tmp_path / "model"))


def test_a_model_of_phase_1_asks_for_its_trunk(phase1):
    with pytest.raises(ValueError, match="give `trunk`"):
        NoPropForPreTraining.from_pretrained(phase1)(torch.tensor([[1, 2]]))
