"""NoProp: a causal language model made of independently trained denoising blocks.

    tokens -> frozen table -> context encoder -> h ┐
                                                   ├-> head -> logits = E (W h + s + correction(h, s)) + b
    next token -> clean embedding + noise      -> s ┘

Each [`DenoisingBlock`] is one encoder and one head, trained on its own at its own noise level, without messages or
gradients between blocks. [`NoPropForCausalLM`] holds all blocks: side by side they give a predictive distribution, in
sequence they turn noise into a token.

Method: NoProp (Li, Teh, Pascanu 2025, arXiv 2503.24322), with the noise entering as evidence (see `noise_noprop.py`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.autograd.forward_ad import unpack_dual
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    SequenceClassifierOutput,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.utils import ModelOutput, can_return_tuple

from .cache_noprop import BlockCache
from .compatibility_noprop import (
    CACHE,
    capture_outputs,
    create_mask,
    init,
    layer_arguments,
    merge_with_config_defaults,
)
from .configuration_noprop import NoPropConfig
from .generation_noprop import Beliefs, NoPropGenerationMixin
from .noise_noprop import sample_evidence, standardize
from .shards_noprop import PRETRAINING_FOLDERS, ShardedFilesMixin
from .side_by_side_noprop import (
    LLAMA_FORWARDS,
    encode_side_by_side,
    find_layers,
    is_plain_linear,
    is_unchanged,
    product,
)


LOGITS_AT_ONCE = 2**23  # 32 MB in float32
NUM_TOPICS = 32  # of a router


class VocabularyNats(torch.autograd.Function):
    """Compute [`vocabulary_nats`] in chunks of `chunk_size` rows, each with its gradients while its logits exist.

    The gradient of the sum is the same for every row up to one factor, which the backward pass multiplies with. So no
    logits are kept or computed again, and a frozen table costs two products with the vocabulary. A second derivative
    comes from whole logits.
    """

    @staticmethod
    def forward(ctx, prediction, table, bias, targets, chunk_size, has_gradient):
        nats = prediction.new_empty(targets.shape)
        # The differences of targets and probabilities, weighted by their rows, in sum and by row.
        needed = [has_gradient and needs for needs in ctx.needs_input_grad[:3]]
        pairs = zip((prediction, table, bias), needed, strict=True)
        gradients = [x.new_zeros(x.shape) if needs else None for x, needs in pairs]
        by_prediction, by_table, by_bias = gradients
        for begin in range(0, len(targets), chunk_size):
            rows = slice(begin, begin + chunk_size)
            is_predicted = (targets[rows] != -100)[:, None]
            true = targets[rows, None].clamp(min=0)
            logits = torch.addmm(bias, prediction[rows], table.T)
            logits -= logits.amax(1, keepdim=True)
            true_logit = logits.gather(1, true)
            sums = logits.exp_().sum(1, keepdim=True)
            nats[rows] = ((sums.log() - true_logit) * is_predicted)[:, 0]
            if not any(needed):
                continue
            errors, weights = logits.scatter_(1, true, true_logit.exp() - sums), is_predicted / sums
            if by_prediction is not None:
                torch.mul(errors @ table, weights, out=by_prediction[rows])
            if by_table is not None:
                by_table.addmm_(errors.T, prediction[rows] * weights)
            if by_bias is not None:
                by_bias.addmv_(errors.T, weights[:, 0])
        ctx.save_for_backward(prediction, table, bias, targets, *gradients)
        ctx.mark_non_differentiable(nats)
        return nats.sum(), nats

    @staticmethod
    def backward(ctx, factor, _):
        prediction, table, bias, targets, *gradients = ctx.saved_tensors
        if torch.is_grad_enabled():  # `create_graph=True`
            total = whole_vocabulary_nats(prediction, table, bias, targets).sum()
            pairs = zip((prediction, table, bias), gradients, strict=True)
            needed = [x for x, gradient in pairs if gradient is not None]
            derivatives = iter(torch.autograd.grad(total, needed, create_graph=True))
            gradients = [None if gradient is None else next(derivatives) for gradient in gradients]
        return *(None if gradient is None else factor * gradient for gradient in gradients), None, None, None


def whole_vocabulary_nats(
    prediction: torch.Tensor, table: torch.Tensor, bias: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Compute the nats of [`vocabulary_nats`] from whole logits, for any derivative."""
    return F.cross_entropy(torch.addmm(bias, prediction, table.T), targets, reduction="none")


def vocabulary_nats(
    prediction: torch.Tensor, table: torch.Tensor, bias: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the cross-entropy of `softmax(prediction E^T + bias)`, in nats, without holding all logits at once.

    The computation is in float32 under autocast too: the evidence makes logits of tens (hundreds with the cosine
    schedule), where float16 resolves a tenth of a nat at best.

    Args:
        prediction (`(..., hidden_size)`), table (`(vocab_size, hidden_size)`), bias (`(vocab_size,)`).
        targets (`(...)`): token ids; -100 is ignored and gives 0.

    Returns:
        The sum over the tokens, which has a gradient, and the nats of each token `(...)`, which have none.
    """
    with torch.autocast(prediction.device.type, enabled=False):
        inputs = (prediction.float().flatten(0, -2), table.float(), bias.float())
        if is_transformed(*inputs):
            nats = whole_vocabulary_nats(*inputs, targets.flatten())
            return nats.sum(), nats.detach().view(targets.shape)
        rows_at_once = max(1, LOGITS_AT_ONCE // max(1, len(table)))
        total, nats = VocabularyNats.apply(*inputs, targets.flatten(), rows_at_once, torch.is_grad_enabled())
    return total, nats.view(targets.shape)


def is_transformed(*tensors: torch.Tensor) -> bool:
    """Check whether a transform of `torch.func` is active, or a tensor has a derivative in forward mode."""
    return torch._C._are_functorch_transforms_active() or any(unpack_dual(x).tangent is not None for x in tensors)


def predicted_places(targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the positions that predict a token.

    The host waits for the device once, to learn their number. Indexing with a mask waits for every tensor.

    Args:
        targets (`(batch, sequence)`): the token to predict at each position; -100 for none.

    Returns:
        Their indices `(num_tokens,)` in tensors whose first two dimensions are flattened, and their targets.
    """
    targets = targets.flatten()
    indices = (targets != -100).nonzero()[:, 0]
    return indices, targets[indices]


def next_tokens(labels: torch.Tensor) -> torch.Tensor:
    """Shift labels `(batch, sequence)` so that each position has the token after it, and the last one -100."""
    return F.pad(labels[:, 1:], (0, 1), value=-100)


def sampled_candidates(
    targets: torch.Tensor, log_prior: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Reduce the softmax of a batch from the whole vocabulary to the tokens that the batch predicts.

    A token `j` of unigram probability `q_j` is among `n` targets with probability `pi_j = 1 - (1 - q_j)^n`. With
    `log pi_j` subtracted from its logit, the sum over the candidates equals in expectation the sum over the vocabulary
    (importance sampling of the partition function; Bengio and Senecal 2008, "Adaptive importance sampling to accelerate
    training of a neural probabilistic language model", IEEE TNN 19(4)).

    Args:
        targets (`(num_tokens,)`): the tokens that the batch predicts.
        log_prior (`(vocab_size,)`): log-probabilities of all tokens in the training data, up to a constant.

    Returns:
        The candidates `(num_candidates,)`, the targets as indices into the candidates `(num_tokens,)`, and the
        correction to add to the candidates' logits, `-log pi`, `(num_candidates,)`.
    """
    tokens, indices = targets.unique(return_inverse=True)
    probabilities = log_prior.float().softmax(-1)[tokens]
    inclusion = -torch.expm1(len(targets) * torch.log1p(-probabilities))
    return tokens, indices, -inclusion.log()


def new_trunk(config: NoPropConfig) -> PreTrainedModel | None:
    """Create the trunk of a model, frozen and with random weights; None unless the configuration has one."""
    if config.trunk_config is None:
        return None
    options = {"attn_implementation": config._attn_implementation, "dtype": torch.get_default_dtype()}
    try:
        trunk = AutoModel.from_config(config.new_trunk_config(), **options)
    except (KeyError, AssertionError, ArithmeticError) as error:
        raise ValueError(f"No trunk can be built from `trunk_config`: {type(error).__name__} {error}.") from error
    return trunk.requires_grad_(False).eval()


def trunk_states(
    trunk: nn.Module,
    input_ids: torch.LongTensor | None = None,
    inputs_embeds: torch.FloatTensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.LongTensor | None = None,
    cache: Cache | None = None,
    **kwargs,
) -> torch.Tensor:
    """Compute the last hidden states of a trunk, `(batch, sequence, hidden_size)`.

    Args:
        input_ids (`(batch, sequence)`): token ids; or `inputs_embeds`, rows of the embeddings of the trunk.
        position_ids (`(batch, sequence)`, *optional*): by default they follow from a mask `(batch, all tokens)`, since
            learned positions must not depend on padding.
        cache: the cache of the whole model, whose first layers are those of the trunk.
    """
    if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
        inputs = inputs_embeds if input_ids is None else input_ids
        assert inputs is not None
        length = inputs.shape[1]
        position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    name = CACHE if cache is None or isinstance(cache, Cache) else "cache"
    return trunk(
        input_ids=input_ids,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        position_ids=position_ids,
        use_cache=cache is not None,
        return_dict=True,
        **{name: cache},
        **kwargs,
    ).last_hidden_state


class TokenTable(nn.Module):
    """The frozen embedding table, used at the input and at the output, with unigram statistics and the trunk.

    `weight` (`(vocab_size, hidden_size)`) has standardized rows and takes no gradient; `log_prior` (`(vocab_size,)`)
    holds the log-probability of each token in the training data (zeros when unknown), the initial value of every bias.
    With a `trunk`, which is frozen as well, the table is used at the output only.
    """

    def __init__(self, config: NoPropConfig):
        super().__init__()
        self.num_embeddings, self.embedding_dim = config.vocab_size, config.hidden_size
        self.weight = nn.Parameter(torch.zeros(config.vocab_size, config.hidden_size))
        self.register_buffer("log_prior", torch.zeros(config.vocab_size))
        self.trunk = new_trunk(config)
        if self.trunk is not None:  # what transformers asks the parts of a model for
            self._no_split_modules = self.trunk._no_split_modules

    def encode(self, input_ids: torch.LongTensor, **inputs) -> torch.Tensor:
        """Compute what encoders read: the rows of tokens `(batch, sequence)` or, with a trunk, its states for them.

        Args:
            inputs: see [`trunk_states`].

        Returns:
            `torch.Tensor` of shape `(batch, sequence, hidden_size)`.
        """
        return self(input_ids) if self.trunk is None else trunk_states(self.trunk, input_ids, **inputs)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Keep the table frozen when loading replaces the parameter."""
        super().register_parameter(name, None if param is None else param.requires_grad_(False))

    def forward(
        self,
        inputs: torch.Tensor,
        bias: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        are_targets: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Look up tokens, or compare points with the table.

        Every use of the table is a call of `forward`, since tools that offload weights load them for `forward` only.

        Args:
            inputs: token ids `(...)`, or points in embedding space `(..., hidden_size)`.
            bias (`(vocab_size,)`, *optional*): added to the logits.
            targets (`(...)`, *optional*): token ids; -100 is ignored.
            are_targets: whether the token ids are to be predicted, and not read.

        Returns:
            For token ids, their rows `(..., hidden_size)`, with a trunk those of its embeddings unless they are targets
            (tools such as prompt tuning take the first table of the vocabulary for the embeddings). For points, the
            logits `(..., vocab_size)`, or with `targets` the cross-entropies in nats, their sum and `(...)` (see
            [`vocabulary_nats`]).
        """
        if not inputs.is_floating_point():
            if self.trunk is not None and not are_targets:
                return self.trunk.get_input_embeddings()(inputs)
            return F.embedding(inputs, self.weight)
        if targets is not None:
            return vocabulary_nats(inputs, self.weight, bias, targets)
        weight = self.weight.to(inputs.dtype)
        return product(inputs, weight, None if bias is None else bias.to(inputs.dtype))


def linear(in_features: int, out_features: int, initialize: Callable[[torch.Tensor], torch.Tensor]) -> nn.Linear:
    """Create a linear layer without bias that carries the initializer of its weight."""
    layer = nn.Linear(in_features, out_features, bias=False)
    layer.initialize = initialize
    return layer


class ContextEncoder(nn.Module):
    """Pre-norm transformer over clean token embeddings, with rotary positions.

    Args:
        first_layer_idx: index of the first layer in a key-value cache shared by all blocks.
    """

    def __init__(self, config: NoPropConfig, num_layers: int, first_layer_idx: int = 0):
        super().__init__()
        self.config = config
        self.input_projection = linear(config.hidden_size, config.hidden_size, init.eye_)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, first_layer_idx + i) for i in range(num_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)

    def attention_inputs(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        is_causal: bool = True,
    ) -> dict:
        """Compute mask and positions, which are the same for every block: a model of many blocks needs them once.

        Args:
            is_causal: whether a position attends to itself and earlier positions only. Phase 1 can also attend to later
                ones.
        """
        # Before positions are made up: `create_mask` looks for packed texts in given ones, where the host has to wait
        # for the device.
        mask = create_mask(self.config, inputs_embeds, attention_mask, position_ids, cache, is_causal)
        if position_ids is None:
            start = cache.get_seq_length() if cache is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + start)[None]
        inputs = {
            "attention_mask": mask,
            "position_ids": position_ids,
            "position_embeddings": self.rotary_emb(inputs_embeds, position_ids),
        }
        return inputs if is_causal else inputs | {"is_causal": False}  # the layers are causal by default

    def forward(self, inputs_embeds: torch.Tensor, **attention_inputs) -> torch.Tensor:
        """Map clean embeddings `(batch, sequence, hidden_size)` to context states of the same shape."""
        # Scale rows of norm sqrt(d) to norm 1: at full scale the embeddings dominate the layers' contributions.
        hidden_states = self.input_projection(inputs_embeds / math.sqrt(inputs_embeds.shape[-1]))
        for layer in self.layers:
            hidden_states = layer(hidden_states, **attention_inputs)
        return self.norm(hidden_states)


class DenoisingHead(nn.Module):
    """Map a context state and the evidence about the next token to a point `u` in embedding space.

    `u = W h + s + correction(h, s)`, and the block's logits are `u E^T + bias`. As all rows have the same norm, `s E^T`
    is exactly the term that Bayes' rule adds to the logits of the context, and the head learns only a correction to it.
    """

    def __init__(self, config: NoPropConfig, level: float):
        super().__init__()
        assert config.correction_size is not None
        self.evidence_scale = math.sqrt(level**2 + level)  # root mean square of the evidence at this level
        self.readout = linear(config.hidden_size, config.hidden_size, init.orthogonal_)
        self.correction = nn.Sequential(
            nn.Linear(2 * config.hidden_size, config.correction_size),
            ACT2FN[config.hidden_act],
            linear(config.correction_size, config.hidden_size, init.zeros_),  # start as Bayes' rule
        )
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, context: torch.Tensor, evidence: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the block's answer.

        Args:
            context (`(..., hidden_size)`): states of the context encoder.
            evidence (`(..., hidden_size)`, *optional*): noised next token at the block's level; pure noise when not
                given.

        Returns:
            The point `u`, `(..., hidden_size)`, in float32 when evidence is given, and the bias, `(vocab_size,)`.
        """
        if self.evidence_scale == 0:
            evidence = None
        # Answers of norm 1, so that an optimizer step changes logits as with an ordinary tied table. Without the
        # factor it changes them sqrt(d) times as much: 0.1 nats worse on held-out text after eight epochs.
        factor = 1 / math.sqrt(context.shape[-1])
        if evidence is None:
            return (self.readout(context) + self._correct(context)) * factor, self.bias
        answer = self.readout(context) + self._correct(context, (evidence / self.evidence_scale).to(context.dtype))
        return torch.add(evidence, answer, alpha=factor), self.bias  # float32 evidence keeps the sum in float32

    def _correct(self, context: torch.Tensor, evidence: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the correction; a plain first layer computes nothing for missing evidence and no gradient of it."""
        first, *others = self.correction
        size = context.shape[-1]
        is_plain = is_unchanged(self.correction, {nn.Sequential: nn.Sequential.forward}) and is_plain_linear(first)
        if not is_plain:
            inputs = F.pad(context, (0, size)) if evidence is None else torch.cat([context, evidence], dim=-1)
            return self.correction(inputs)
        hidden = F.linear(context, first.weight[:, :size], first.bias)
        if evidence is not None:
            hidden = hidden + F.linear(evidence, first.weight[:, size:])
        for module in others:
            hidden = module(hidden)
        return hidden


class NoPropPreTrainedModel(ShardedFilesMixin, PreTrainedModel):
    """Base of all models: what transformers asks of a model class, and the initial weights."""

    config: NoPropConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DenoisingBlock", "Router"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": LlamaDecoderLayer, "attentions": LlamaAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TokenTable):
            init.copy_(module.weight, standardize(torch.randn_like(module.weight)))
            init.zeros_(module.log_prior)
        elif isinstance(module, Router):
            init.zeros_(module.topics)
            init.zeros_(module.centroids)
            init.zeros_(module.prices)
        elif isinstance(module, DenoisingHead):
            init.zeros_(module.bias)
        elif hasattr(module, "initialize"):
            module.initialize(module.weight)

    def get_input_embeddings(self) -> nn.Module:
        """Return the table or, with a trunk, the embeddings of the trunk."""
        embeddings = super().get_input_embeddings()
        trunk = getattr(embeddings, "trunk", None)
        return embeddings if trunk is None else trunk.get_input_embeddings()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Load a model; see [`ShardedFilesMixin.from_pretrained`]. The trunk stays frozen."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for module in model.modules():
            if isinstance(module, TokenTable) and module.trunk is not None:
                module.trunk.requires_grad_(False)
        return loaded

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Reject other embeddings: every block is trained for the frozen table.

        Raises:
            ValueError: if `value` is not a [`TokenTable`].
        """
        if isinstance(super().get_input_embeddings(), TokenTable) and not isinstance(value, TokenTable):
            raise ValueError(
                "The embeddings are the frozen table that every block was trained for and cannot be replaced. "
                "Pretrain a new table instead."
            )
        super().set_input_embeddings(value)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args, **kwargs
    ) -> nn.Module:
        """Reject another size: table, noise levels and blocks are made for one vocabulary.

        Raises:
            ValueError: if the size would change.
        """
        new_num_tokens = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of:
            new_num_tokens += -new_num_tokens % pad_to_multiple_of
        if new_num_tokens != self.config.vocab_size:
            raise ValueError(
                f"The embedding table is frozen at {self.config.vocab_size} tokens, and every block is trained for it: "
                f"it cannot be resized to {new_num_tokens}. Pretrain a new table with the tokenizer you need."
            )
        return self.get_input_embeddings()

    @classmethod
    def _weight_shapes(cls, config: NoPropConfig) -> dict[str, torch.Size]:
        return weight_shapes(config)


class SeparateModel(NoPropPreTrainedModel):
    """Base of the models that are saved on their own: a block, the router and the model of phase 1."""

    @classmethod
    def _weight_shapes(cls, config: NoPropConfig) -> dict[str, torch.Size]:
        with torch.device("meta"):
            return {name: tensor.shape for name, tensor in cls(config).state_dict().items()}


def weight_shapes(config: NoPropConfig) -> dict[str, torch.Size]:
    """Return the shapes of the weights of table, router and blocks, by their names in [`NoPropModel`]."""
    with torch.device("meta"):
        parts = {"embed_tokens": TokenTable(config), "router": new_router(config)}
        block = DenoisingBlock(config)  # all blocks have the same shapes
    parts |= {f"blocks.{index}": block for index in range(config.num_blocks)}
    return {
        f"{name}.{weight}": tensor.shape
        for name, part in parts.items()
        if part is not None
        for weight, tensor in part.state_dict().items()
    }


@dataclass
class DenoisingBlockOutput(ModelOutput):
    """Losses of a block.

    Args:
        loss (`torch.Tensor`): the training loss: the weighted mean of the two terms below, per token.
        denoising_loss (`torch.Tensor`): the term at the block's own level, over the positions that carry it (nan for
            block 0 in training, where no position does); in nats, or with `loss_type="mse"` the squared error per
            coordinate.
        context_loss (`torch.Tensor`): the term on pure noise, in the same unit.
        context_nats, denoising_nats (`torch.Tensor`): in evaluation mode, the two cross-entropies in nats per token,
            whatever the loss.
        bound_nats (`torch.Tensor`): in evaluation mode, the variational bound of a chain of this block alone (on pure
            noise, then at its own level), which every worker can compute without the other blocks.
    """

    loss: torch.Tensor | None = None
    denoising_loss: torch.Tensor | None = None
    context_loss: torch.Tensor | None = None
    context_nats: torch.Tensor | None = None
    denoising_nats: torch.Tensor | None = None
    bound_nats: torch.Tensor | None = None


class DenoisingBlock(SeparateModel):
    """One block: a causal context encoder and a denoising head, trained on its own.

    `forward` computes the training objective, or without labels the block's answer. The frozen table is an argument and
    not part of the block, which depends on no other block.
    """

    accepts_loss_kwargs = True  # for `Trainer`: the loss is divided by `num_items_in_batch`

    def __init__(self, config: NoPropConfig, block_index: int = 0):
        super().__init__(config)
        if not 0 <= block_index < config.num_blocks:
            raise ValueError(f"`block_index` must be in [0, {config.num_blocks}), got {block_index}.")
        self.block_index = block_index
        assert config.noise_levels is not None  # resolved by the configuration
        self.level = config.noise_levels[block_index]
        num_layers = config.num_layers_per_block
        self.encoder = ContextEncoder(config, num_layers, config.num_shared_layers + block_index * num_layers)
        self.head = DenoisingHead(config, self.level)
        self.gradient_checkpointing = False
        self.post_init()
        # `Trainer` counts predicted tokens as for any causal model, without position 0, which is not predicted.
        self.loss_type = "ForCausalLM"

    def enable_input_require_grads(self) -> None:
        """Do nothing if `input_projection` is trained: its output, the input of the layers, requires gradients already.

        If it is frozen, as with adapters, transformers warns that a block has no embeddings whose output could.
        """
        if not any(parameter.requires_grad for parameter in self.encoder.input_projection.parameters()):
            super().enable_input_require_grads()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        table: TokenTable | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        generator: torch.Generator | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        kept: slice | torch.Tensor = slice(None),
        **attention_inputs,
    ) -> DenoisingBlockOutput | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute the local loss: recover the next token from its noised embedding and the clean context.

        In training, each position carries one of the two terms, drawn at random by their weight: the same loss on
        average for half the vocabulary products. With `config.sampled_softmax`, the softmax is over the tokens that the
        batch predicts (see [`sampled_candidates`]). In evaluation mode every position carries both terms, over the
        whole vocabulary.

        Args:
            input_ids (`(batch, sequence)`): clean tokens.
            labels (`(batch, sequence)`): the same tokens, not shifted; -100 is not predicted.
            table: the frozen table.
            num_items_in_batch: divisor of the summed losses (gradient accumulation); the number of predicted tokens of
                this batch when not given.
            generator: source of randomness; torch's global one when not given.
            inputs_embeds (`(batch, sequence, hidden_size)`), kept, attention_inputs: instead of tokens and labels,
                rows of the table, the positions to answer, and the result of [`ContextEncoder.attention_inputs`].

        Returns:
            With labels, the losses. Without, the context states `(batch, sequence, hidden_size)` and the head's answer
            at the positions `kept`.
        """
        if labels is None:
            positions = {"attention_mask": attention_mask, "position_ids": position_ids}
            context = self.encoder(inputs_embeds, **positions, **attention_inputs)
            return context, *self.head(context[:, kept])
        assert table is not None
        # First everything whose size depends on the batch: the host waits for the device to learn it, and would leave
        # the device idle later in the step.
        predicted, targets = predicted_places(next_tokens(labels))
        is_sampled = self.training and self.config.sampled_softmax and self.config.loss_type == "cross_entropy"
        candidates = sampled_candidates(targets, table.log_prior) if is_sampled else None

        inputs_embeds = table.encode(input_ids, attention_mask=attention_mask, position_ids=position_ids)
        attention_inputs = self.encoder.attention_inputs(inputs_embeds, attention_mask, position_ids)
        context = self.encoder(inputs_embeds, **attention_inputs).flatten(0, 1).index_select(0, predicted)
        count = len(targets) if num_items_in_batch is None else num_items_in_batch
        weight = self.config.denoising_weight if self.level > 0 else 0.0  # on pure noise the two terms are equal

        if self.training:
            is_noised = torch.rand(targets.shape, generator=generator, device=targets.device) < weight
            clean = table(targets, are_targets=True)
            evidence = sample_evidence(clean, self.level, generator).mul_(is_noised[:, None])
            answer, bias = self.head(context, evidence)
            embeddings = table.weight
            if candidates is not None:
                tokens, targets, correction = candidates
                embeddings, bias = embeddings[tokens], bias.index_select(0, tokens) + correction
            total, losses = self._local_loss(answer, embeddings, bias, targets)
            return DenoisingBlockOutput(
                loss=total / count,
                context_loss=(losses * ~is_noised).sum() / (~is_noised).sum(),
                denoising_loss=(losses * is_noised).sum() / is_noised.sum(),
            )

        evidence = sample_evidence(table(targets, are_targets=True), self.level, generator)
        (alone, bias), (informed, _) = self.head(context), self.head(context, evidence)
        context_nats, denoising_nats, updated_nats = (
            vocabulary_nats(prediction, table.weight, bias, targets)[0] / count
            for prediction in (alone, informed, alone + evidence)  # the last is Bayes' rule
        )
        context_loss, denoising_loss = context_nats, denoising_nats
        if self.config.loss_type != "cross_entropy":
            context_loss, denoising_loss = (
                self._local_loss(prediction, table.weight, bias, targets)[0] / count for prediction in (alone, informed)
            )
        return DenoisingBlockOutput(
            loss=torch.lerp(context_loss, denoising_loss, weight),
            denoising_loss=denoising_loss,
            context_loss=context_loss,
            context_nats=context_nats,
            denoising_nats=denoising_nats,
            bound_nats=context_nats + denoising_nats - updated_nats,
        )

    def _local_loss(
        self, prediction: torch.Tensor, embeddings: torch.Tensor, bias: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the loss for `config.loss_type` of `(num_tokens,)` predicted tokens: the sum, and for each token."""
        if self.config.loss_type == "cross_entropy":
            return vocabulary_nats(prediction, embeddings, bias, targets)
        # NoProp, arXiv 2503.24322, eq. 8: the block's answer is the mean embedding of its distribution. Computed in
        # chunks, whose logits the backward pass recomputes, to bound the memory.
        chunks = zip(prediction.split(1024), targets.split(1024), strict=True)
        errors = [checkpoint(self._squared_error, u, embeddings, bias, y, use_reentrant=False) for u, y in chunks]
        losses = torch.cat(errors)
        return losses.sum(), losses.detach()

    @staticmethod
    def _squared_error(prediction: torch.Tensor, embeddings: torch.Tensor, bias: torch.Tensor, targets: torch.Tensor):
        with torch.autocast(prediction.device.type, enabled=False):
            embeddings = embeddings.float()
            probabilities = (prediction.float() @ embeddings.T + bias.float()).softmax(-1)
            return (probabilities @ embeddings - embeddings[targets]).pow(2).mean(-1)


class Router(SeparateModel):
    """Weigh the blocks of a model with `block_data="clusters"` by the text so far.

    A window of text belongs to the cluster that maximises `feature . centroid - price`, where the feature is the sum of
    its tokens' rows of `topics`, divided by its norm. Block b is trained on the windows of cluster b. The router has an
    encoder of its own and predicts from a prefix alone the cluster of the whole window. (After Gururangan et al. 2023,
    "Scaling expert language models with unsupervised domain discovery", arXiv 2303.14177, where the weights follow from
    the distances of the prefix to the centroids.)

    `topics` (`(vocab_size, NUM_TOPICS)`) come from latent semantic analysis, `centroids` (`(num_blocks, NUM_TOPICS)`)
    have norm 1, and `prices` (`(num_blocks,)`) keep clusters of similar size.
    """

    accepts_loss_kwargs = False  # for `Trainer`: the loss is a mean

    def __init__(self, config: NoPropConfig):
        super().__init__(config)
        self.encoder = ContextEncoder(config, config.num_layers_per_block, config.num_trunk_layers)
        self.readout = nn.Linear(config.hidden_size, config.num_blocks)
        self.register_buffer("topics", torch.zeros(config.vocab_size, NUM_TOPICS))
        self.register_buffer("centroids", torch.zeros(config.num_blocks, NUM_TOPICS))
        self.register_buffer("prices", torch.zeros(config.num_blocks))
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        table: TokenTable | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        kept: slice | torch.Tensor = slice(None),
        **attention_inputs,
    ) -> SequenceClassifierOutput | torch.Tensor:
        """Compute a logit for each block at each position, or the training loss.

        Args:
            input_ids (`(batch, sequence)`): tokens.
            labels (`(batch,)`): clusters of the windows.
            table: the frozen table.
            inputs_embeds (`(batch, sequence, hidden_size)`), kept, attention_inputs: as in [`DenoisingBlock.forward`].

        Returns:
            With labels, the cross-entropy at all positions. Without, the logits at the positions `kept`, `(batch,
            positions, num_blocks)`.
        """
        if labels is None:
            positions = {"attention_mask": attention_mask, "position_ids": position_ids}
            return self.readout(self.encoder(inputs_embeds, **positions, **attention_inputs)[:, kept])
        assert table is not None
        inputs_embeds = table.encode(input_ids, attention_mask=attention_mask, position_ids=position_ids)
        attention_inputs = self.encoder.attention_inputs(inputs_embeds, attention_mask, position_ids)
        logits = self.readout(self.encoder(inputs_embeds, **attention_inputs)).float()
        targets = labels[:, None].expand(logits.shape[:-1])
        if attention_mask is not None:
            targets = targets.masked_fill(attention_mask == 0, -100)
        return SequenceClassifierOutput(loss=F.cross_entropy(logits.flatten(0, 1), targets.flatten()), logits=logits)


def new_router(config: NoPropConfig) -> Router | None:
    """Create the router of a model, with random weights; None unless blocks are trained on clusters."""
    return Router(config) if config.block_data == "clusters" else None


@dataclass
class NoPropModelOutput(BaseModelOutputWithPast):
    """Output of [`NoPropModel`].

    Args:
        last_hidden_state (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): the blocks' answers on
            pure noise, averaged with the weights of the blocks: a prediction of the embedding of the next token.
        context_states (`tuple[torch.Tensor]`): the context states of each block, `(batch_size, sequence_length,
            hidden_size)` each.
        bias (`torch.Tensor` of shape `(vocab_size,)`): the mean of the blocks' biases.
        block_logits (`torch.Tensor` of shape `(batch_size, sequence_length, num_blocks)`, *optional*): logits of the
            blocks' weights, from the router; None if all blocks weigh the same.

    `hidden_states` and `attentions`, when requested, list the layers of the router, if there is one, then those of
    block 0, block 1, and so on.
    """

    context_states: tuple[torch.Tensor, ...] | None = None
    bias: torch.Tensor | None = None
    block_logits: torch.Tensor | None = None


class NoPropModel(NoPropPreTrainedModel):
    """The frozen table, all blocks and, if blocks are trained on clusters, the router that weighs them.

    The blocks read the same clean context and do not depend on one another.
    """

    _is_sharded = True
    # Forward passes that are bypassed when blocks run side by side.
    _forwards: Mapping[type, Callable] = {
        **LLAMA_FORWARDS,
        DenoisingBlock: DenoisingBlock.forward,
        Router: Router.forward,
        ContextEncoder: ContextEncoder.forward,
    }

    def __init__(self, config: NoPropConfig):
        super().__init__(config)
        self.embed_tokens = TokenTable(config)
        self.blocks = nn.ModuleList(DenoisingBlock(config, index) for index in range(config.num_blocks))
        self.router = new_router(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        num_inference_blocks: int | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> NoPropModelOutput:
        """Encode the context with every block and average the answers on pure noise, with the router's weights.

        Args:
            input_ids (`(batch_size, sequence_length)`): token ids; or `inputs_embeds`, their rows of the table or, with
                a trunk, of the embeddings of the trunk.
            logits_to_keep (`int` or `torch.Tensor`): return the states of the last positions only; 0 is all.
            num_inference_blocks (`int`, *optional*): run only the first blocks; all when not given, and never more than
                `config.num_hidden_layers` allows.
            cache, past_key_values (`Cache`, *optional*): two names of one argument.
        """
        cache = past_key_values if cache is None else cache
        kwargs.pop("cache_position", None)  # follows from the cache
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if num_inference_blocks is None:
            num_inference_blocks = len(self.blocks)
        if not isinstance(num_inference_blocks, int) or not 1 <= num_inference_blocks <= len(self.blocks):
            raise ValueError(
                f"`num_inference_blocks` must be an integer from 1 to {len(self.blocks)}, got {num_inference_blocks}."
            )
        num_inference_blocks = min(num_inference_blocks, self.config.num_running_blocks)
        trunk, given = self.embed_tokens.trunk, inputs_embeds
        if inputs_embeds is None:  # with a trunk, only for their shape
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and cache is None:
            is_compiling = torch.compiler.is_compiling()  # export knows the stock cache only
            cache = (DynamicCache if is_compiling else BlockCache)(config=self.config)

        blocks = self.blocks[:num_inference_blocks]
        parts = [*blocks] if self.router is None else [self.router, *blocks]
        self._check_cache(cache, parts)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        attention_inputs = blocks[0].encoder.attention_inputs(inputs_embeds, attention_mask, position_ids, cache)
        layer_inputs = layer_arguments(inputs_embeds, cache)
        if trunk is not None:  # last, since it fills its layers of the cache, of which the first counts the tokens
            others = {
                name: value
                for name, value in kwargs.items()
                if not name.startswith("output_") and name != "token_type_ids"
            }
            if position_ids is None and attention_mask is not None and attention_mask.ndim > 2:
                position_ids = attention_inputs["position_ids"]  # some trunks would count the tokens of a mask
            inputs_embeds = trunk_states(trunk, input_ids, given, attention_mask, position_ids, cache, **others)
        recorded = {f"output_{name}": getattr(self.config, f"output_{name}", None) for name in self._can_record_outputs}
        layers = None if self.training else find_layers(parts, self._forwards, cache, recorded | kwargs)
        block_logits = None
        if layers is not None:
            states = encode_side_by_side(
                [part.encoder for part in parts],
                layers,
                inputs_embeds,
                attention_inputs["attention_mask"],
                attention_inputs["position_embeddings"],
                cache,
                last_only=isinstance(logits_to_keep, int) and logits_to_keep == 1,
            )[:, :, kept]
            if self.router is not None:
                block_logits = self.router.readout(states[0])
                states = states[1:]
            answers = [(context, *block.head(context)) for block, context in zip(blocks, states, strict=True)]
        else:
            inputs = attention_inputs | kwargs | layer_inputs
            inputs |= {"inputs_embeds": inputs_embeds, "kept": kept, "use_cache": use_cache}
            if self.router is not None:
                block_logits = self.router(**inputs)
            answers = [block(**inputs) for block in blocks]
            answers = [(context[:, kept], *answer) for context, *answer in answers]
        context_states, predictions, biases = zip(*answers, strict=True)
        device = inputs_embeds.device  # blocks may lie on several devices
        predictions = torch.stack([prediction.to(device) for prediction in predictions])
        if block_logits is None:
            prediction = predictions.mean(0)
        else:
            block_logits = block_logits[..., [block.block_index for block in blocks]].to(device)
            weights = block_logits.float().softmax(-1).to(predictions.dtype)
            prediction = torch.einsum("...b,b...d->...d", weights, predictions)
        return NoPropModelOutput(
            last_hidden_state=prediction,
            context_states=context_states,
            bias=torch.stack([bias.to(device) for bias in biases]).mean(0),
            block_logits=block_logits,
            **{CACHE: cache},
        )

    @staticmethod
    def _check_cache(cache: Cache | None, parts: Sequence[nn.Module]) -> None:
        """Check that a cache holds the same tokens for all blocks, and the router, that will read it.

        Raises:
            ValueError: if the cache was filled by fewer blocks, or without the first layer, which counts the tokens.
        """
        if not isinstance(cache, Cache) or torch.compiler.is_compiling():  # paged caches track their own lengths
            return
        lengths = [
            (part, cache.get_seq_length(layer.self_attn.layer_idx))
            for part in parts
            for layer in part.encoder.layers[:1]
            if hasattr(layer, "self_attn")
        ]
        if not lengths:
            return
        if lengths[0][1] != cache.get_seq_length():
            raise ValueError(
                "The first layer of a cache counts its tokens, and router or block 0 have another number of them. "
                "Either the cache is that of another model, such as the trunk alone: use a new one. Or this model has "
                "lost that layer: use `use_cache=False`, or give every `self_attn.layer_idx` a new number from 0 on."
            )
        if any(length != lengths[0][1] for _, length in lengths):
            blocks = [length for part, length in lengths if not isinstance(part, Router)]
            raise ValueError(
                f"The cache was filled with `num_inference_blocks={blocks.count(blocks[0])}`, and {len(blocks)} blocks "
                "cannot continue from it: use as many blocks, or a new cache."
            )


@dataclass
class NoPropBoundOutput(ModelOutput):
    """Variational bound and cross-entropies of a model.

    Args:
        bound (`torch.Tensor`): variational bound on the negative log-likelihood, in nats per token.
        block_nats (`torch.Tensor` of shape `(num_blocks,)`): the bound split by block. Entry 0 is the cross-entropy of
            block 0 on pure noise; entry b is the change by block b against a Bayes update of the belief before it
            (negative is a gain).
        token_nats (`torch.Tensor` of shape `(num_blocks, num_tokens)`): the same for every predicted token.
        context_nats (`torch.Tensor` of shape `(num_blocks,)`): cross-entropy of each block alone on pure noise.
        predictive_nats (`torch.Tensor`): cross-entropy of the predictive distribution, the average of the blocks on
            pure noise.
    """

    bound: torch.Tensor | None = None
    block_nats: torch.Tensor | None = None
    token_nats: torch.Tensor | None = None
    context_nats: torch.Tensor | None = None
    predictive_nats: torch.Tensor | None = None


def log_probability_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """Compute `ForCausalLMLoss` of transformers without its softmax, since the logits are log-probabilities."""
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.flatten().to(logits.device)
    reduction = "mean" if num_items_in_batch is None else "sum"
    nats = F.nll_loss(logits.view(-1, vocab_size), targets, ignore_index=ignore_index, reduction=reduction)
    return nats if num_items_in_batch is None else nats / torch.as_tensor(num_items_in_batch, device=nats.device)


class OutputEmbeddings(nn.Module):
    """The output layer: maps points in embedding space to logits, `u E^T + b`.

    The layer holds no weights, so that a checkpoint stores each of them once. `weight` (`(vocab_size, hidden_size)`) is
    the frozen table and `bias` (`(vocab_size,)`) the differentiable mean of the blocks' biases, for tools that compute
    logits from `last_hidden_state` themselves.
    """

    def __init__(self, model: NoPropModel):
        super().__init__()
        self.__dict__["model"] = model  # not a submodule, which would give the weights a second name

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Reject parameters other than the table, which transformers 4 ties by setting it as the weight."""
        if name != "weight" or param is not self.weight:
            raise ValueError("The output layer is the frozen table with the blocks' biases: it takes no parameters.")

    @property
    def weight(self) -> nn.Parameter:
        return self.model.embed_tokens.weight

    @property
    def bias(self) -> torch.Tensor:
        config, device = self.model.config, self.weight.device  # blocks may lie on several devices
        blocks = self.model.blocks[: config.num_running_blocks]
        return torch.stack([block.head.bias.to(device) for block in blocks]).mean(0)

    def forward(self, points: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Compute logits.

        Args:
            points (`(..., hidden_size)`).
            bias (`(vocab_size,)`, *optional*): another bias, such as that of the blocks that ran.

        Returns:
            The logits `(..., vocab_size)`.
        """
        # `forward`, since hooks on the input embeddings are not meant for logits.
        return self.model.embed_tokens.forward(points, self.bias if bias is None else bias)


class NoPropForCausalLM(NoPropPreTrainedModel, NoPropGenerationMixin):
    """The language model: a predictive distribution over the next token, a chain that samples it, and a bound."""

    def __init__(self, config: NoPropConfig):
        super().__init__(config)
        self.model = NoPropModel(config)
        self.output_embeddings = OutputEmbeddings(self.model)
        self.loss_function = log_probability_loss
        self.post_init()

    def get_output_embeddings(self) -> OutputEmbeddings:
        """Return the layer that maps points in embedding space to logits: the frozen table and the mean bias."""
        if self.output_embeddings.model is not self.model:  # replaced, or replicated by `nn.DataParallel`
            self.output_embeddings.__dict__["model"] = self.model
        return self.output_embeddings

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Reject other embeddings; see `set_input_embeddings`."""
        if new_embeddings is not self.output_embeddings:
            self.set_input_embeddings(new_embeddings)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_inference_blocks: int | None = None,
        decoding_mode: str = "predictive",
        num_trajectories: int = 1,
        generator: torch.Generator | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Compute log-probabilities of the next tokens.

        Args:
            input_ids (`(batch_size, sequence_length)`): token ids.
            labels (`(batch_size, sequence_length)`, *optional*): the same tokens, not shifted; -100 is ignored.
            logits_to_keep (`int` or `torch.Tensor`): compute the logits of the last positions only; 0 is all. In the
                predictive mode the loss is that of all `labels` all the same, without the memory of all logits; labels
                of the kept positions only are possible too.
            num_inference_blocks (`int`, *optional*): run only the first blocks; all when not given.
            decoding_mode (`str`): with `"predictive"`, `logits` are the log-probabilities of a normalised, causal,
                deterministic distribution: the normalised geometric mean of the blocks' distributions given the context
                alone. With `"denoising"` they are those of the last block at the end of a chain sampled from pure
                noise, for generation: random, and not a measure of likelihood (`variational_bound` is).
            num_trajectories (`int`): chains to average in the denoising mode.
            generator (`torch.Generator`, *optional*): source of randomness of the denoising mode.
            cache, past_key_values (`Cache`, *optional*): two names of one argument.
        """
        is_predictive = decoding_mode == "predictive"
        is_scored_whole = (
            is_predictive
            and labels is not None
            and not (isinstance(logits_to_keep, int) and logits_to_keep == 0)
            and any(tokens is not None and tokens.shape[:2] == labels.shape for tokens in (input_ids, inputs_embeds))
            and self.loss_function is log_probability_loss
        )
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            num_inference_blocks=num_inference_blocks,
            logits_to_keep=0 if is_scored_whole else logits_to_keep,
            **kwargs,
        )
        if is_predictive:
            points = outputs.last_hidden_state
            if is_scored_whole:
                points = points[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]
            logits = self._log_probabilities(points, outputs.bias)
        elif decoding_mode == "denoising":
            logits = self.denoise(outputs.context_states, num_trajectories, generator, outputs.block_logits)
        else:
            raise ValueError(f"`decoding_mode` must be 'predictive' or 'denoising', got {decoding_mode!r}.")

        loss = None
        if is_scored_whole:
            targets = kwargs.get("shift_labels")
            targets = (next_tokens(labels) if targets is None else targets).to(outputs.last_hidden_state.device)
            total, _ = self.model.embed_tokens.forward(outputs.last_hidden_state, outputs.bias, targets)
            count = kwargs.get("num_items_in_batch")
            loss = total / ((targets != -100).sum() if count is None else torch.as_tensor(count, device=total.device))
        elif labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
        )

    def _log_probabilities(self, points: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Compute the normalised logits of points `(..., hidden_size)`, in float32.

        They are the largest tensor. So they are normalised in place, and those of half precision are computed in
        pieces, unless a gradient, vmap, forward mode or a hook may still use them.
        """
        output_embeddings = self.get_output_embeddings()
        is_shared = (
            (torch.is_grad_enabled() and any(x.requires_grad for x in (points, bias, output_embeddings.weight)))
            or not is_unchanged(output_embeddings, {OutputEmbeddings: OutputEmbeddings.forward})
            or not is_unchanged(self.model.embed_tokens, {TokenTable: TokenTable.forward})
            or torch.compiler.is_compiling()
            or is_transformed(points, bias)
        )
        if is_shared:
            return output_embeddings(points, bias).float().log_softmax(-1)
        if points.dtype == torch.float32:
            logits = output_embeddings(points, bias)
        else:
            logits = points.new_empty((*points.shape[:-1], len(bias)), dtype=torch.float32)
            at_once = max(1, LOGITS_AT_ONCE // len(bias))
            for piece, rows in zip(
                logits.flatten(0, -2).split(at_once), points.flatten(0, -2).split(at_once), strict=True
            ):
                piece.copy_(output_embeddings(rows, bias))
        return torch.log_softmax(logits, -1, out=logits)

    @torch.no_grad()
    def variational_bound(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        generator: torch.Generator | None = None,
    ) -> NoPropBoundOutput:
        r"""Estimate an upper bound on the negative log-likelihood of the chain of `decoding_mode="denoising"`.

        With the evidence `s_b` on the true path of the next token `y`, the logits `l_b` of the belief at block b (see
        [`Beliefs`]), and `l_{b-1} -> s_b` the logits of the belief before, updated by Bayes' rule to `s_b`,

            -log p(y) <= CE(l_0; s_0) + sum_{b>=1} [ CE(l_b; s_b) - CE(l_{b-1} -> s_b; s_b) ]

        in expectation over the path: the negative evidence lower bound of a chain whose step draws a token from the
        belief at block b-1 and moves on with its embedding (after NoProp, arXiv 2503.24322, section 2, with that
        transition).

        Args:
            input_ids, attention_mask (`(batch_size, sequence_length)`).
            labels (`(batch_size, sequence_length)`, *optional*): not shifted; `input_ids` where not padded by default.
            generator: source of the path's noise; torch's global one when not given.

        Returns:
            The bound, its split by block and by token, and the cross-entropies on pure noise.
        """
        if labels is None:
            labels = input_ids if attention_mask is None else input_ids.masked_fill(attention_mask == 0, -100)
        outputs = self.model(input_ids, attention_mask=attention_mask, use_cache=False)
        predicted, targets = predicted_places(next_tokens(labels))
        table, blocks = self.model.embed_tokens.forward, self.model.blocks[: len(outputs.context_states)]
        clean = table(targets, are_targets=True)

        evidence = torch.zeros_like(clean, dtype=torch.float32)
        level, token_nats, context_nats = 0.0, [], []
        block_logits = outputs.block_logits
        beliefs = Beliefs(None if block_logits is None else block_logits.flatten(0, 1)[predicted])
        previous = None
        for block, states in zip(blocks, outputs.context_states, strict=True):
            context = states.flatten(0, 1)[predicted]
            if block.level > level:
                evidence = evidence + sample_evidence(clean, block.level - level, generator)
                level = block.level
            belief, bias, alone = beliefs.refine(block.head, context, evidence)
            _, nats = table(belief + evidence, bias, targets)
            if previous is not None:  # the belief before, updated to the evidence at this block
                nats = nats - table(previous[0] + evidence, previous[1], targets)[1]
            token_nats.append(nats)
            context_nats.append(table(*alone, targets)[1].mean())
            previous = (belief, bias)
        token_nats = torch.stack(token_nats)
        mean_answer = outputs.last_hidden_state.flatten(0, 1)[predicted]
        return NoPropBoundOutput(
            bound=token_nats.sum(0).mean(),
            block_nats=token_nats.mean(1),
            token_nats=token_nats,
            context_nats=torch.stack(context_nats),
            predictive_nats=table(mean_answer, outputs.bias, targets)[1].mean(),
        )


# The constructors of the stock heads create their base model with `AutoModel`, which does not find the code of a model
# directory. The classes below skip these constructors and keep the rest.


class NoPropForSequenceClassification(GenericForSequenceClassification, NoPropPreTrainedModel):
    """The stock text classifier, which reads `last_hidden_state` at the last token."""

    def __init__(self, config: NoPropConfig):
        super(GenericForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = NoPropModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class NoPropForTokenClassification(GenericForTokenClassification, NoPropPreTrainedModel):
    """The stock token classifier, which reads `last_hidden_state` at each token."""

    def __init__(self, config: NoPropConfig):
        super(GenericForTokenClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = NoPropModel(config)
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", 0.1))
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class NoPropForPreTraining(SeparateModel):
    """The model of phase 1: a shallow encoder whose tied input and output table becomes the frozen table of the blocks.

    With `config.pretraining_objective="mlm"` the model learns to fill masks from both directions, with `"clm"` to
    predict the next token from the previous ones. The rows of the table are centred and scaled at the input *and* at
    the output, so that the table is trained in the geometry in which the blocks use it. With a trunk, the encoder reads
    its states instead of the rows; the trunk is an argument and not part of the model.
    """

    _subfolders = PRETRAINING_FOLDERS

    def __init__(self, config: NoPropConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.pretraining_objective == "clm":
            # Rows are scaled to one norm wherever they are used: the shorter they are, the further a step turns them.
            # Next tokens are learnt faster so (0.08 nats in the demo), and masked tokens much slower.
            self.embed_tokens.initialize = partial(init.normal_, std=config.initializer_range / 20)
        assert config.num_pretraining_layers is not None
        self.encoder = ContextEncoder(config, config.num_pretraining_layers)
        self.readout = linear(config.hidden_size, config.hidden_size, init.orthogonal_)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            init.zeros_(self.bias)

    def token_table(self) -> torch.Tensor:
        """Return the standardized table, `(vocab_size, hidden_size)`."""
        return standardize(self.embed_tokens.weight)

    @can_return_tuple
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        trunk: nn.Module | None = None,
        **kwargs,
    ) -> MaskedLMOutput:
        """Compute the loss of phase 1 and, outside of training, logits.

        Args:
            input_ids (`(batch_size, sequence_length)`): tokens, for `"mlm"` with some of them masked.
            labels (`(batch_size, sequence_length)`, *optional*): the masked tokens, -100 everywhere else; for `"clm"`,
                all tokens. In training, logits are computed only where the loss needs them, and are not returned.
            trunk: the trunk, if the configuration has one.

        Raises:
            ValueError: if the trunk is missing, or the model shall fill masks and was never trained to.
        """
        if trunk is None and self.config.trunk_config is not None:
            raise ValueError(
                "This model reads the states of a trunk: give `trunk`, which the whole model has as "
                "`model.model.embed_tokens.trunk`."
            )
        mask = self.config.mask_token_id
        never_masked = labels is None and self.config.pretraining_objective == "clm"
        if never_masked and mask is not None and (input_ids == mask).any():
            raise ValueError(
                "This model was pretrained to predict next tokens and has never seen a mask: generate text with "
                "AutoModelForCausalLM, or pretrain with `pretraining_objective='mlm'` to fill masks."
            )
        table = self.token_table()
        prediction = self._encode(input_ids, table, attention_mask, position_ids, trunk, **kwargs)
        logits = None
        if labels is None or not self.training:
            logits = F.linear(prediction, table.to(prediction.dtype), self.bias.to(prediction.dtype))
        if labels is None:
            return MaskedLMOutput(logits=logits)
        targets = labels
        if self.config.pretraining_objective == "clm":
            targets = input_ids if attention_mask is None else input_ids.masked_fill(attention_mask == 0, -100)
            targets = next_tokens(targets)
        loss = self._mean_nats(prediction, table, targets)
        if num_items_in_batch is not None:  # weight by this batch's share of the accumulated gradient
            loss = loss * ((labels != -100).sum() / num_items_in_batch)
        return MaskedLMOutput(loss=loss, logits=logits)

    def _encode(self, input_ids, table, attention_mask, position_ids, trunk, **kwargs):
        """Compute predictions `(batch_size, sequence_length, hidden_size)`; with `"mlm"` from both directions."""
        is_causal = self.config.pretraining_objective == "clm"
        if trunk is None:
            inputs_embeds = F.embedding(input_ids, table)
        else:
            inputs_embeds = trunk_states(trunk, input_ids, attention_mask=attention_mask, position_ids=position_ids)
        attention_inputs = self.encoder.attention_inputs(inputs_embeds, attention_mask, position_ids, None, is_causal)
        states = self.encoder(inputs_embeds, **attention_inputs, **kwargs)
        return self.readout(states) / math.sqrt(states.shape[-1])  # as in [`DenoisingHead`]

    def _mean_nats(self, prediction: torch.Tensor, table: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        predicted, targets = predicted_places(targets)
        prediction = prediction.flatten(0, 1).index_select(0, predicted)
        return vocabulary_nats(prediction, table, self.bias, targets)[0] / len(targets)


NoPropForMaskedLM = NoPropForPreTraining  # the name until 0.1


__all__ = [
    "DenoisingBlock",
    "NoPropForCausalLM",
    "NoPropForMaskedLM",
    "NoPropForPreTraining",
    "NoPropForSequenceClassification",
    "NoPropForTokenClassification",
    "NoPropModel",
    "NoPropPreTrainedModel",
]
