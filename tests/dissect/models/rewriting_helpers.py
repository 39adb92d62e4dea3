"""Random models in which no weight is trivially 0 or 1, and how far two models are apart."""

import torch
from torch import Tensor

from dissect.models.model import Model
from tests.dissect.helpers import build_model, build_tokenizer

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gpt2", "neox", "neox_sequential", "olmo", "olmo2", "gemma2", "phi3"]
FAMILIES += ["mixtral", "qwen3_moe", "opt", "bloom", "falcon", "gptj"]


def random_model(
    family: str, *, seed: int = 0, dtype: torch.dtype = torch.float64, tied: bool | None = None, n_layers: int = 2
) -> Model:
    """A model with random norm gains and biases as well."""
    hf = build_model(family, seed=seed, n_layers=n_layers, dtype=dtype, tied=tied)
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in hf.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
    return Model.wrap(hf, build_tokenizer(), name=family)


@torch.no_grad()
def logits(model: Model) -> Tensor:
    """Logits of other tokens than those that candidates are tried on."""
    ids = torch.randint(
        model.hf.config.get_text_config().vocab_size, (3, 20), generator=torch.Generator().manual_seed(7)
    )
    found: Tensor = model.hf(ids).logits
    return found.double()


def logit_gap(ours: Model, theirs: Model) -> float:
    """Largest difference of a logit, relative to the spread of logits."""
    expected = logits(ours)
    return float((logits(theirs) - expected).abs().max() / expected.std())


def weight_gap(ours: Model, theirs: Model) -> float:
    """Largest difference of a weight, relative to the largest weight of its tensor."""
    return max(weight_gaps(ours, theirs).values())


@torch.no_grad()
def weight_gaps(ours: Model, theirs: Model) -> dict[str, float]:
    """The same for each tensor; the difference itself where all of its weights are 0."""
    other = dict(theirs.hf.named_parameters())
    gaps = {}
    for name, values in ours.hf.named_parameters():
        gap, size = float((values - other[name]).abs().max()), float(values.abs().max())
        gaps[name] = gap / (size or 1.0)
        assert gap == gap, name
    return gaps
