"""NoProp-HF: language models trained block by block, without end-to-end backpropagation."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from .configuration_noprop import NoPropConfig
from .modeling_noprop import DenoisingBlock, NoPropForCausalLM, NoPropForMaskedLM, NoPropModel


AutoConfig.register(NoPropConfig.model_type, NoPropConfig)
AutoModel.register(NoPropConfig, NoPropModel)
AutoModelForCausalLM.register(NoPropConfig, NoPropForCausalLM)
AutoModelForMaskedLM.register(NoPropConfig, NoPropForMaskedLM)
NoPropConfig.register_for_auto_class()
NoPropModel.register_for_auto_class("AutoModel")
NoPropForCausalLM.register_for_auto_class("AutoModelForCausalLM")
NoPropForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")

__version__ = "0.1.0"
__all__ = ["DenoisingBlock", "NoPropConfig", "NoPropForCausalLM", "NoPropForMaskedLM", "NoPropModel"]
