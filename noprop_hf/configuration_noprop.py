"""NoProp model configuration."""

import copy
import json
import math

from transformers import CONFIG_MAPPING
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .compatibility_noprop import READS_ROPE_PARAMETERS, PreTrainedConfig
from .noise_noprop import prior_levels


class NoPropConfig(PreTrainedConfig):
    r"""Configuration of [`NoPropForCausalLM`], [`NoPropModel`], [`DenoisingBlock`] and [`NoPropForPreTraining`].

    The defaults give ten blocks of three layers over a BERT vocabulary.

    Args:
        vocab_size (`int`, defaults to 30522): number of rows of the embedding table.
        hidden_size (`int`, defaults to 384): width of the table and of every layer.
        num_blocks (`int`, defaults to 10): number of denoising blocks, trained independently.
        num_layers_per_block (`int`, defaults to 3): transformer layers in each block.
        num_attention_heads (`int`, defaults to 4): attention heads of each layer.
        num_key_value_heads (`int`, *optional*): heads of the keys and values; `num_attention_heads` when not given.
        intermediate_size (`int`, defaults to 1344): width of the gated feed-forward layer.
        correction_size (`int`, *optional*): width of the head's correction MLP; `hidden_size` when not given.
        num_pretraining_layers (`int`, *optional*): layers of the model of phase 1; `num_layers_per_block` when not
            given.
        pretraining_objective (`str`, defaults to `"clm"`): objective of phase 1: `"mlm"` (masked tokens) or `"clm"`
            (next tokens).
        block_initialization (`str`, defaults to `"random"`): initial weights of blocks: `"random"`, or `"pretraining"`
            (the layers of the model of phase 1), which is better for one or two epochs.
        block_data (`str`, defaults to `"shared"`): text that a block is trained on: `"shared"` (all of it), or
            `"clusters"` (the windows of one of `num_blocks` clusters of similar text, so that blocks know different
            things; a router, a small encoder of its own, weighs the blocks by the prefix). Clusters are better where
            text is plentiful and of several kinds.
        trunk_config (`dict`, *optional*): configuration of a trunk, a causal model of transformers as wide as
            `hidden_size`. It is frozen and saved with the table, and the encoders of phase 1, of the blocks and of the
            router read its last hidden states instead of rows of the table.
        max_position_embeddings (`int`, defaults to 512): longest sequence that the model is trained for. Positions are
            rotary, so this is not a hard limit.
        noise_schedule (`str`, defaults to `"information"`): `"information"` or `"cosine"`.
        noise_levels (`list[float]`, *optional*): signal-to-noise ratio of each block, block 0 (pure noise, 0) first,
            non-decreasing. Resolved from `noise_schedule` when not given; phase 1 refines the information schedule
            with the table and the token counts.
        loss_type (`str`, defaults to `"cross_entropy"`): `"cross_entropy"`, or `"mse"` between the clean embedding
            and the block's mean embedding (NoProp, arXiv 2503.24322, eq. 8).
        sampled_softmax (`bool`, defaults to `True`): train blocks with a softmax over the tokens that a batch predicts
            (importance-weighted), instead of the whole vocabulary, whose cost every block would repeat. For
            `loss_type="cross_entropy"`; phase 1 and evaluation use the whole vocabulary.
        denoising_weight (`float`, defaults to 0.5): weight of the loss at the block's own noise level; the remaining
            weight is that of the loss on pure noise, which makes every block a language model as well.
        initializer_range (`float`, defaults to 0.02): standard deviation of the initial weights.
        mask_token_id (`int`, *optional*): id of the tokenizer's mask token, which a model of phase 1 with the objective
            `"clm"` refuses to fill.

    The remaining arguments are those of [`LlamaConfig`], since blocks consist of Llama layers.
    """

    model_type = "noprop"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    vocab_size: int = 30522
    hidden_size: int = 384
    num_blocks: int = 10
    num_layers_per_block: int = 3
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int = 1344
    correction_size: int | None = None
    num_pretraining_layers: int | None = None
    pretraining_objective: str = "clm"
    block_initialization: str = "random"
    block_data: str = "shared"
    trunk_config: dict | None = None
    max_position_embeddings: int = 512
    noise_schedule: str = "information"
    noise_levels: list[float] | None = None
    loss_type: str = "cross_entropy"
    sampled_softmax: bool = True
    denoising_weight: float = 0.5
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    attention_dropout: float = 0.0
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_parameters: dict | None = None
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    mask_token_id: int | None = None

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.correction_size is None:
            self.correction_size = self.hidden_size
        if self.num_pretraining_layers is None:
            self.num_pretraining_layers = self.num_layers_per_block
        self._check_choices()
        self._check_sizes()
        self._check_trunk()
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.noise_levels is None:
            self.noise_levels = prior_levels(self.noise_schedule, self.num_blocks, self.vocab_size, self.hidden_size)
        self.noise_levels = [float(level) for level in self.noise_levels]
        self._check_noise()
        self._check_fractions()
        num_labels = kwargs.get("num_labels")
        if num_labels is not None and (not isinstance(num_labels, int) or not 0 <= num_labels <= 2**20):
            raise ValueError(f"`num_labels` must be an integer of at most {2**20}, got {str(num_labels)[:40]}.")
        if kwargs.pop("context_source", "embeddings") != "embeddings":
            raise ValueError(
                "`context_source` was removed, with blocks that read other blocks: such a model needs an earlier "
                "version of noprop_hf. Leave it out to train independent blocks."
            )
        try:
            super().__post_init__(**kwargs)  # which checks rotary positions in some versions of transformers
            self._check_positions()
        except KeyError as error:
            raise ValueError(
                f"`rope_parameters` {self.rope_parameters} do not fit their `rope_type`: {error}."
            ) from error

    @property
    def num_router_layers(self) -> int:
        """Layers of the router, which are as many as those of a block; 0 without clusters."""
        return self.num_layers_per_block if self.block_data == "clusters" else 0

    @property
    def num_trunk_layers(self) -> int:
        """Layers of the trunk, which are the first ones in a key-value cache; 0 without a trunk."""
        if self.trunk_config is None:
            return 0
        names = CONFIG_MAPPING[self.trunk_config["model_type"]].attribute_map
        return self.trunk_config[names.get("num_hidden_layers", "num_hidden_layers")]

    @property
    def num_shared_layers(self) -> int:
        """Layers before those of block 0 in a key-value cache: those of the trunk, then those of the router."""
        return self.num_trunk_layers + self.num_router_layers

    @property
    def num_running_blocks(self) -> int:
        """Blocks that run: all, unless `num_hidden_layers` is set to fewer layers."""
        return (self.num_hidden_layers - self.num_shared_layers) // self.num_layers_per_block

    @property
    def num_hidden_layers(self) -> int:
        """Layers that run: those of trunk, router and blocks unless set. Early exit sets fewer, in whole blocks."""
        every_layer = self.num_shared_layers + self.num_blocks * self.num_layers_per_block
        return self.__dict__.get("_num_hidden_layers", every_layer)

    @num_hidden_layers.setter
    def num_hidden_layers(self, value: int) -> None:
        step, shared = self.num_layers_per_block, self.num_shared_layers
        blocks, rest = divmod(value - shared, step)
        if rest or not 1 <= blocks <= self.num_blocks:
            raise ValueError(
                f"`num_hidden_layers` follows from `num_blocks` ({self.num_blocks}) and `num_layers_per_block` "
                f"({step}). For early exit after some blocks, give a multiple of {step} from {step + shared} to "
                f"{self.num_blocks * step + shared}, got {value}."
            )
        self.__dict__.pop("_num_hidden_layers", None)
        if blocks < self.num_blocks:
            self.__dict__["_num_hidden_layers"] = value

    def _check_choices(self) -> None:
        for name, choices in {
            "noise_schedule": ("information", "cosine"),
            "loss_type": ("cross_entropy", "mse"),
            "pretraining_objective": ("mlm", "clm"),
            "block_initialization": ("pretraining", "random"),
            "block_data": ("shared", "clusters"),
            "hidden_act": tuple(ACT2FN),
        }.items():
            value = getattr(self, name)
            if value not in choices:
                listed = ", ".join(repr(choice) for choice in choices[:-1])
                raise ValueError(f"`{name}` must be {listed} or {choices[-1]!r}, got {value!r}.")

    def _check_sizes(self) -> None:
        # Limits far beyond any model, so that an untrusted configuration cannot take all memory or time.
        for limit, names in {
            2**31: "vocab_size max_position_embeddings",
            2**20: "hidden_size intermediate_size correction_size num_attention_heads num_key_value_heads",
            1_000: "num_blocks num_layers_per_block num_pretraining_layers",
        }.items():
            for name in names.split():
                value = getattr(self, name)
                if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= limit:
                    raise ValueError(f"`{name}` must be a positive integer of at most {limit}, got {str(value)[:40]}.")
        if self.num_blocks * self.num_layers_per_block > 1_000:
            raise ValueError(
                f"{self.num_blocks} blocks of {self.num_layers_per_block} layers are more than 1,000 layers: lower "
                "`num_blocks` or `num_layers_per_block`."
            )
        if self.block_initialization == "pretraining" and self.num_pretraining_layers != self.num_layers_per_block:
            raise ValueError(
                f"Blocks of {self.num_layers_per_block} layers cannot start from the {self.num_pretraining_layers} "
                "layers of phase 1: make `num_pretraining_layers` equal, or set `block_initialization='random'`."
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of `num_attention_heads` "
                f"({self.num_attention_heads})."
            )
        head_dim = self.head_dim if self.head_dim is not None else self.hidden_size // self.num_attention_heads
        if not 2 <= head_dim <= 2**20 or head_dim % 2:
            raise ValueError(
                f"The size of an attention head must be even for rotary positions, and at most {2**20}: got {head_dim}."
            )
        assert self.num_key_value_heads is not None
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_attention_heads` ({self.num_attention_heads}) must be a multiple of `num_key_value_heads` "
                f"({self.num_key_value_heads})."
            )

    def _check_trunk(self) -> None:
        if self.trunk_config is None:
            return
        if not READS_ROPE_PARAMETERS:
            raise ValueError("A model with a trunk needs transformers 5 or newer: update transformers.")
        kind = self.trunk_config.get("model_type") if isinstance(self.trunk_config, dict) else None
        if kind not in CONFIG_MAPPING or kind == self.model_type:
            raise ValueError(
                f"`trunk_config` must be the configuration of a model of transformers, with its `model_type`: got "
                f"{str(kind)[:40]!r}."
            )
        self.trunk_config = json.loads(json.dumps(self.trunk_config))  # as it is read back from a file
        try:
            trunk = self.new_trunk_config()
            width, layers, vocab_size = trunk.hidden_size, self.num_trunk_layers, trunk.vocab_size
        except (AttributeError, KeyError, TypeError, ArithmeticError) as error:
            raise ValueError(
                f"`trunk_config` is not that of a text model with a plain width and layers: {type(error).__name__} "
                f"{error}."
            ) from error
        if not self.vocab_size <= vocab_size <= 2**31:
            raise ValueError(
                f"The trunk has {vocab_size} tokens, and the table {self.vocab_size}: it must have them all."
            )
        if getattr(trunk, "quantization_config", None) is not None:
            raise ValueError(
                "A trunk cannot be quantized by itself: leave `quantization_config` out of `trunk_config`."
            )
        kinds = getattr(trunk, "layer_types", None)
        if kinds is None:
            windows = (getattr(trunk, name, None) for name in ("sliding_window", "attention_chunk_size"))
            kinds = ["windows" for window in windows if window is not None]
        if any(kind != "full_attention" for kind in kinds):
            raise ValueError(
                "Every layer of a trunk must attend to all earlier tokens, since its masks and caches are those of the "
                f"blocks: a trunk of type {kind!r} with these settings does not."
            )
        if width != self.hidden_size:
            raise ValueError(f"The trunk is {width} wide: `hidden_size` must be equal, got {self.hidden_size}.")
        if not isinstance(layers, int) or not 0 < layers <= 1_000:
            raise ValueError(f"The trunk must have from 1 to 1,000 layers, got {str(layers)[:40]}.")
        if self.pretraining_objective != "clm":
            raise ValueError(
                "A trunk reads from left to right and cannot fill masks: set `pretraining_objective='clm'`."
            )

    def new_trunk_config(self) -> PreTrainedConfig:
        """Create the configuration object of the trunk."""
        assert self.trunk_config is not None
        return CONFIG_MAPPING[self.trunk_config["model_type"]].from_dict(copy.deepcopy(self.trunk_config))

    def _check_positions(self) -> None:
        parameters = self.rope_parameters or {}
        kind, theta = parameters.get("rope_type", "default"), parameters.get("rope_theta", 1.0)
        if not isinstance(theta, int | float) or not 0 < theta < math.inf:
            raise ValueError(f"`rope_theta` in `rope_parameters` must be positive and finite, got {str(theta)[:40]}.")
        if kind == "default":
            return
        if not isinstance(kind, str) or kind not in ROPE_INIT_FUNCTIONS:
            known = ", ".join(sorted({"default", *ROPE_INIT_FUNCTIONS}))
            raise ValueError(f"`rope_type` in `rope_parameters` must be one of {known}: got {kind!r}.")
        try:
            ROPE_INIT_FUNCTIONS[kind](self, "cpu")
        except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise ValueError(
                f"`rope_parameters` {parameters} do not fit their `rope_type`: {type(error).__name__} {error}."
            ) from error

    def _check_noise(self) -> None:
        levels = self.noise_levels or []
        if len(levels) != self.num_blocks:
            raise ValueError(
                f"`noise_levels` must hold one signal-to-noise ratio per block: got {len(levels)} for "
                f"{self.num_blocks} blocks."
            )
        if not all(math.isfinite(level) and level >= 0 for level in levels):
            raise ValueError(f"`noise_levels` must be finite and not negative, got {levels}.")
        if levels[0] != 0:
            raise ValueError(
                f"`noise_levels[0]` must be 0, since the chain starts from pure noise at block 0; got {levels[0]}."
            )
        if any(after < before for before, after in zip(levels, levels[1:], strict=False)):
            raise ValueError(
                f"`noise_levels` are signal-to-noise ratios and must not decrease from block to block, got {levels}."
            )

    def _check_fractions(self) -> None:
        for name in ("denoising_weight", "attention_dropout", "rms_norm_eps", "initializer_range"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ValueError(f"`{name}` must be between 0 and 1, got {value}.")


__all__ = ["NoPropConfig"]
