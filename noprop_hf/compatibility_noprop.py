"""Differences between versions of torch and transformers: the newest API, or its counterpart in older versions.

Every difference is detected by an attribute or a signature. The comments name the version of transformers that
introduced it.
"""

import inspect
from dataclasses import is_dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import masking_utils
from transformers.cache_utils import Cache
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer


MASK_PARAMETERS = inspect.signature(masking_utils.create_causal_mask).parameters
CACHE = "cache" if "cache" in MASK_PARAMETERS else "past_key_values"  # 5.24: the name of a key-value cache
INPUTS_EMBEDS = "inputs_embeds" if "inputs_embeds" in MASK_PARAMETERS else "input_embeds"  # 5.2
READS_ROPE_PARAMETERS = hasattr(masking_utils, "create_bidirectional_mask")  # 5.0: the form of saved configurations
# 5.0: weights of some classes are saved under other names than those of the modules.
CONVERTS_WEIGHTS = "save_original_format" in inspect.signature(PreTrainedModel.save_pretrained).parameters
# Until 5.3: masks and layers take the positions of their tokens in the cache.
TAKES_CACHE_POSITION = "cache_position" in inspect.signature(LlamaDecoderLayer.forward).parameters

try:
    from transformers.utils.generic import merge_with_config_defaults
    from transformers.utils.output_capturing import capture_outputs  # 5.2
except ImportError:
    from transformers.utils.generic import check_model_inputs

    capture_outputs = check_model_inputs  # does both

    def merge_with_config_defaults(forward):
        return forward


try:
    from transformers import initialization as init  # 5.0
except ImportError:
    init = SimpleNamespace(
        copy_=torch.Tensor.copy_,
        eye_=nn.init.eye_,
        normal_=nn.init.normal_,
        orthogonal_=nn.init.orthogonal_,
        zeros_=nn.init.zeros_,
    )


def layer_arguments(inputs_embeds: torch.Tensor, cache: Any) -> dict[str, Any]:
    """Return the arguments that pass a cache to layers: a [`Cache`], or a paged cache, always named `cache`."""
    arguments = {CACHE if cache is None or isinstance(cache, Cache) else "cache": cache}
    if TAKES_CACHE_POSITION:
        start = cache.get_seq_length() if isinstance(cache, Cache) else 0
        arguments["cache_position"] = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + start
    return arguments


def create_mask(
    config: Any,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: Any,
    is_causal: bool,
) -> Any:
    """Call `create_causal_mask` of transformers, or its `create_bidirectional_mask`, which takes no cache."""
    arguments = {"config": config, INPUTS_EMBEDS: inputs_embeds, "attention_mask": attention_mask}
    if not is_causal and hasattr(masking_utils, "create_bidirectional_mask"):  # 5.0
        return masking_utils.create_bidirectional_mask(**arguments)
    arguments |= {CACHE: None, "position_ids": position_ids}
    arguments |= {n: v for n, v in layer_arguments(inputs_embeds, cache).items() if n in MASK_PARAMETERS}
    if not is_causal:
        arguments["or_mask_function"] = lambda batch, head, query, key: key >= 0
    return masking_utils.create_causal_mask(**arguments)


try:
    from transformers.configuration_utils import PreTrainedConfig  # 5.0
except ImportError:
    from transformers.configuration_utils import PretrainedConfig as PreTrainedConfig

if not is_dataclass(PreTrainedConfig):  # 5.4
    StockConfig: Any = PreTrainedConfig

    class PreTrainedConfig(StockConfig):  # type: ignore[no-redef]
        """A configuration whose fields are annotations with defaults."""

        rope_parameters: dict | None

        def __init__(self, **kwargs):
            for name in type(self).__annotations__:
                setattr(self, name, kwargs.pop(name, getattr(type(self), name)))
            self.__post_init__(**kwargs)

        def __post_init__(self, **kwargs):
            parameters = dict(kwargs.pop("rope_scaling", None) or self.rope_parameters or {})
            parameters.setdefault("rope_type", parameters.get("type", "default"))
            self.rope_parameters = {"rope_theta": kwargs.pop("rope_theta", 10_000.0)} | parameters
            token_ids = {name: getattr(self, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
            super().__init__(**token_ids, **kwargs)

        # Read by the rotary positions of 4.57.
        rope_theta = property(lambda self: self.rope_parameters["rope_theta"])
        rope_scaling = property(lambda self: self.rope_parameters)
