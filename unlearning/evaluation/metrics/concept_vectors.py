"""Concept vectors (ConceptVectors, 2406.11614): how far a concept's value vector moved, and what it promotes now.

A concept's record names a layer and a dimension: the vector v is that column of the layer's down projection in the
vanilla model, v' the same column of the unlearned one. E and E' are the two models' unembeddings. P are the tokens of
the `TOP_TOKENS` largest entries of E v, P' those of E' v' (each model by its own head, no norm between), and W the
tokens of the concept's article that are no stop words.

    cosine       cos(v, v'), at most 1             low where the concept was erased
    l2           |v - v'|                          high
    jaccard      #(P and P') / #(P or P')          low
    preciser     #(P' and W) / #(P and W)          low; a ratio, may exceed 1
    related      #(P' and P and W) / #(P and W)    low
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from unlearning.common.errors import InputError
from unlearning.evaluation.metrics.stop_words import STOP_WORDS
from unlearning.objectives.forward import blocks

TOP_TOKENS = 200
"""As many promoted tokens are compared; of a small vocabulary half, since all tokens are always the same."""

_NAMES = ("down_proj", "ff_out", "fc2", "fc_out", "c_proj", "dense_4h_to_h", "w2")
"""What down projections are called, for the blocks whose shapes leave a doubt."""


_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class Place:
    """Where a value vector is.

    Attributes:
        layer: from 0.
        dim: index into the MLP's hidden width, from 0.
    """

    layer: int
    dim: int


@dataclass(frozen=True)
class VectorChange:
    """What became of one concept's value vector; the measures are those of this module.

    Attributes:
        cosine: None where a vector is zero.
        l2: of the difference.
        vanilla_norm: of v.
        jaccard: of the promoted tokens.
        preciser: None where P and W have no token in common, or there is no article.
        related: likewise.
        n_top: how many promoted tokens were compared.
        promotes, promotes_after: the first ten of P and P', as text.
    """

    cosine: float | None
    l2: float
    vanilla_norm: float
    jaccard: float
    preciser: float | None
    related: float | None
    n_top: int
    promotes: str
    promotes_after: str


def down_projections(model: PreTrainedModel) -> list[nn.Module]:
    """The down projection of every block: what maps the MLP's hidden width to the residual stream.

    Found as the block's one linear layer outside its attention that gives the residual stream's width; where there
    are several (an MLP no wider than the stream), by its name.

    Raises:
        InputError: a block has none or several, as a mixture of experts does.
    """
    width = int(model.config.get_text_config().hidden_size)
    return [_down_projection(block, width, type(model).__name__) for block in blocks(model)]


def value_vector(projection: nn.Module, dim: int) -> Float[Tensor, " d_model"]:
    """One value vector, as a view of the weight: writing to it changes the model."""
    weight = projection.weight
    assert isinstance(weight, Tensor)
    return weight.data[dim] if isinstance(projection, Conv1D) else weight.data[:, dim]


def check_place(model: PreTrainedModel, place: Place, *, concept: str, name: str) -> None:
    """Check that a model has a value vector.

    Raises:
        InputError: it has not.
    """
    projections = down_projections(model)
    advice = "its vector was found in another model: leave the vectors out (--no-vectors)"
    if place.layer >= len(projections):
        raise InputError(
            f"concept {concept!r} is in layer {place.layer}, and {name} has layers 0 to {len(projections) - 1}; "
            f"{advice}"
        )
    weight = projections[place.layer].weight
    assert isinstance(weight, Tensor)
    width = weight.numel() // int(model.config.get_text_config().hidden_size)
    if place.dim >= width:
        raise InputError(
            f"concept {concept!r} is dimension {place.dim}, and the MLPs of {name} have 0 to {width - 1}; {advice}"
        )


def vector_change(
    vanilla: PreTrainedModel,
    unlearned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    place: Place,
    *,
    article: frozenset[int] = frozenset(),
) -> VectorChange:
    """Compare a concept's value vector in two models of one shape, in float64.

    Args:
        vanilla: the model before unlearning.
        unlearned: after it.
        tokenizer: of both.
        place: of the vector.
        article: the tokens W of the concept's article; see `article_tokens`.

    Raises:
        InputError: the two models have not the same width.
    """
    before, after = (
        value_vector(down_projections(model)[place.layer], place.dim).double().cpu() for model in (vanilla, unlearned)
    )
    if before.shape != after.shape:
        raise InputError(
            f"--base has vectors of {len(before)} numbers and the model of {len(after)}: not one another's"
        )
    norms = float(before.norm()), float(after.norm())
    tops = [_promoted(model, vector) for model, vector in ((vanilla, before), (unlearned, after))]
    ours, theirs = map(frozenset, tops)
    return VectorChange(
        cosine=min(1.0, float(before @ after) / (norms[0] * norms[1])) if all(norms) else None,
        l2=float((before - after).norm()),
        vanilla_norm=norms[0],
        jaccard=jaccard(ours, theirs),
        preciser=_ratio(len(theirs & article), len(ours & article)),
        related=_ratio(len(theirs & ours & article), len(ours & article)),
        n_top=len(ours),
        promotes=_text(tokenizer, tops[0]),
        promotes_after=_text(tokenizer, tops[1]),
    )


def jaccard(ours: frozenset[int], theirs: frozenset[int]) -> float:
    """Size of the intersection by that of the union; 1 for two empty sets."""
    return len(ours & theirs) / len(ours | theirs) if ours | theirs else 1.0


def article_tokens(tokenizer: PreTrainedTokenizerBase, article: str) -> frozenset[int]:
    """W: the tokens of an article without its stop words.

    Stop words are taken out before the text is tokenised, and so are tokens of longer words whose text is a stop word
    ("Berl|in") or has neither letter nor digit.
    """
    kept = _WORD.sub(lambda word: "" if word[0].lower() in STOP_WORDS else word[0], article)
    ids = set(tokenizer(kept, add_special_tokens=False, verbose=False)["input_ids"])
    texts = {token: str(tokenizer.decode([token])).strip().lower() for token in ids}
    return frozenset(
        token for token, text in texts.items() if text not in STOP_WORDS and any(sign.isalnum() for sign in text)
    )


@contextmanager
def noised(vector: Float[Tensor, " d_model"], *, scale: float, seed: Sequence[int]) -> Iterator[None]:
    """Add Gaussian noise N(0, scale^2) to a value vector in place; afterwards it is what it was, bit for bit.

    Args:
        vector: a view of a weight; see `value_vector`.
        scale: standard deviation of the noise.
        seed: of the noise, which is the same on every device.
    """
    noise = torch.from_numpy(np.random.default_rng(seed).standard_normal(vector.shape[0]) * scale)
    clean = vector.clone()
    vector += noise.to(vector)
    try:
        yield
    finally:
        vector.copy_(clean)


def _down_projection(block: nn.Module, width: int, name: str) -> nn.Module:
    found = {}
    for path, module in block.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and "attn" not in path and "attention" not in path:
            weight = module.weight if isinstance(module, Conv1D) else module.weight.T  # [in, out]
            if weight.shape[1] == width:
                found[path] = (module, weight.shape[0])
    wider = {path: module for path, (module, inputs) in found.items() if inputs != width}
    named = {path: module for path, (module, _) in found.items() if path.rpartition(".")[2] in _NAMES}
    for candidates in (wider, named):
        if len(candidates) == 1:
            return next(iter(candidates.values()))
    what = "several" if found else "no"
    raise InputError(
        f"{name}: a block has {what} linear layers that could be its down projection (a mixture of experts?), so that "
        "a concept's vector cannot be found; leave the vectors out (--no-vectors)"
    )


def _promoted(model: PreTrainedModel, vector: Float[Tensor, " d_model"]) -> list[int]:
    """The tokens of the largest entries of E v, the largest first; of equals the one of the lower number."""
    head = model.get_output_embeddings()
    weight = head.weight.detach()
    scores = torch.cat([rows.double().cpu() @ vector for rows in weight.split(8192)])
    count = min(TOP_TOKENS, max(1, len(scores) // 2))
    return scores.sort(descending=True, stable=True).indices[:count].tolist()


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _text(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return " | ".join(str(tokenizer.decode([token])) for token in tokens[:10])
