"""Choose an implementation of mixtures of experts that computes in a model's dtype."""

import torch
from transformers import PreTrainedModel


def fit_experts(model: PreTrainedModel) -> None:
    """Let a model in float64 compute its experts one after the other; the grouped product does not take float64.

    Args:
        model: The model; one without stacked experts, or in another dtype, is left as it is.
    """
    stacked = any(parameter.dim() == 3 and parameter.dtype == torch.float64 for parameter in model.parameters())
    if stacked and model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
