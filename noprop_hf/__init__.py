"""NoProp-HF: language models trained block by block, without end-to-end backpropagation."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_noprop import NoPropConfig
from .modeling_noprop import (
    DenoisingBlock,
    NoPropForCausalLM,
    NoPropForMaskedLM,
    NoPropForPreTraining,
    NoPropForSequenceClassification,
    NoPropForTokenClassification,
    NoPropModel,
)


AutoConfig.register(NoPropConfig.model_type, NoPropConfig)
NoPropConfig.register_for_auto_class()
for auto, model in (
    (AutoModel, NoPropModel),
    (AutoModelForCausalLM, NoPropForCausalLM),
    (AutoModelForMaskedLM, NoPropForPreTraining),
    (AutoModelForPreTraining, NoPropForPreTraining),
    (AutoModelForSequenceClassification, NoPropForSequenceClassification),
    (AutoModelForTokenClassification, NoPropForTokenClassification),
):
    auto.register(NoPropConfig, model)
    model.register_for_auto_class(auto.__name__)

__version__ = "0.1.0"
__all__ = [
    "DenoisingBlock",
    "NoPropConfig",
    "NoPropForCausalLM",
    "NoPropForMaskedLM",
    "NoPropForPreTraining",
    "NoPropForSequenceClassification",
    "NoPropForTokenClassification",
    "NoPropModel",
]
