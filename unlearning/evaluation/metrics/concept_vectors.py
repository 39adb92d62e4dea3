"""Concept vectors (ConceptVectors, 2406.11614): how far a concept's value vector moved, and what it promotes now.

A concept's record names a layer and a dimension: the vector v is that column of the layer's down projection in the
base model (the paper's vanilla model), v' the same column of the unlearned model. E and E' are the two models'
unembeddings, N and N' their final norms, each without its bias: N(v) = norm(v) - norm(0). P are the tokens of the
`TOP_TOKENS` largest entries of E v, P' those of E' v', and Q and Q' those of E N(v) and E' N'(v'). W are the tokens of
the concept's article that are no stop words.

    measure                formula                       unit, range     an erased concept   source
    cosine                 cos(v, v')                    -1 to 1         lower               2406.11614
    l2                     |v - v'|                      of the weights  higher              2406.11614
    jaccard_unembed        #(P and P') / #(P or P')      0 to 1          lower               2406.11614
    jaccard_norm_unembed   #(Q and Q') / #(Q or Q')      0 to 1          lower               this package
    preciser               #(P' and W) / #(P and W)      0 or more       lower               2406.11614
    related                #(P' and P and W) / #(P and W)  0 to 1        lower               2406.11614

The published Jaccard similarity reads a vector with the unembedding alone. The logit lens reads the residual stream
through the final norm first, whose weight scales each dimension; the two therefore rank tokens differently.
"""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unlearning.common.errors import InputError
from unlearning.evaluation.metrics.stop_words import STOP_WORDS
from unlearning.objectives.forward import blocks

TOP_TOKENS = 200
"""Number of promoted tokens compared; half of the vocabulary if it is smaller, since all tokens are always the same."""

_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True, eq=False)
class Readout:
    """What turns a vector of a model's residual stream into one score per token.

    Attributes:
        unembedding: Weight of the output head, in its own dtype and on its own device.
        final_norm: Copy of the norm between the last block and the head, in float64; None if the model has none.
    """

    unembedding: Float[Tensor, "vocab d_model"]
    final_norm: nn.Module | None

    def scores(self, vector: Float[Tensor, " d_model"], *, norm: bool) -> Float[Tensor, " vocab"]:
        """Return E v, or E N(v).

        Args:
            vector: A vector of the residual stream.
            norm: Apply the final norm N before the unembedding E.

        Returns:
            One score per token, in float64 on the CPU.

        Raises:
            InputError: The head reads vectors of another width than the residual stream's.
        """
        vector = vector.double().cpu()
        if norm and self.final_norm is not None:
            vector = self.final_norm(vector[None])[0] - self.final_norm(torch.zeros_like(vector)[None])[0]
        if self.unembedding.shape[1] != len(vector):
            raise InputError(
                f"the output head reads vectors of {self.unembedding.shape[1]} numbers and the value vectors have "
                f"{len(vector)}, so they cannot be read in the vocabulary. Leave the vectors out (`vectors=False`)."
            )
        return torch.cat([rows.double().cpu() @ vector for rows in self.unembedding.split(8192)])

    def promoted(self, vector: Float[Tensor, " d_model"], *, norm: bool, top_tokens: int = TOP_TOKENS) -> list[int]:
        """Return the tokens of the highest scores, highest first; of equal scores the lower token number first.

        Args:
            vector: A vector of the residual stream.
            norm: Apply the final norm before the unembedding.
            top_tokens: Number of tokens; at most half of the vocabulary is returned.

        Returns:
            Token numbers.
        """
        scores = self.scores(vector, norm=norm)
        count = min(top_tokens, max(1, len(scores) // 2))
        return scores.sort(descending=True, stable=True).indices[:count].tolist()


@dataclass(frozen=True)
class VectorChange:
    """Change of one concept's value vector; the module's docstring defines the measures.

    Attributes:
        cosine: Cosine of the two vectors; None if one of them is zero.
        l2: Norm of the difference.
        base_norm: Norm of the base's vector.
        jaccard_unembed: Overlap of the promoted tokens, read with the unembedding alone, as published.
        jaccard_norm_unembed: Overlap of the promoted tokens, read with the final norm and the unembedding.
        preciser: None if no promoted token is in the article, or there is no article.
        related: None in the same cases.
        n_top: Number of promoted tokens compared.
        promoted: Tokens P that the base's vector promotes without the final norm, highest first.
        promoted_after: Tokens P' of the unlearned model's vector.
        promoted_norm: Tokens Q that the base's vector promotes with the final norm.
        promoted_norm_after: Tokens Q' of the unlearned model's vector.
    """

    cosine: float | None
    l2: float
    base_norm: float
    jaccard_unembed: float
    jaccard_norm_unembed: float
    preciser: float | None
    related: float | None
    n_top: int
    promoted: tuple[int, ...]
    promoted_after: tuple[int, ...]
    promoted_norm: tuple[int, ...]
    promoted_norm_after: tuple[int, ...]


def readout(model: PreTrainedModel) -> Readout:
    """Return a model's unembedding and a copy of its final norm.

    The final norm is the norm that runs after the last block and before the head; one forward pass of a single token
    finds it. A norm that follows the MLP inside a block (OLMo-2, Gemma-2) is not part of it.

    Returns:
        The readout; its unembedding is the model's own weight.

    Raises:
        InputError: More than one norm runs between the last block and the head.
    """
    norms = _norms_after_blocks(model)
    if len(norms) > 1:
        raise InputError(
            f"{type(model).__name__}: {len(norms)} norms run between the last block and the output head, so value "
            "vectors cannot be read in the vocabulary. Leave the vectors out (`vectors=False`)."
        )
    head: Any = model.get_output_embeddings()
    return Readout(
        head.weight.detach(), copy.deepcopy(norms[0]).double().cpu().requires_grad_(False) if norms else None
    )


@torch.inference_mode()
def vector_change(
    before: Float[Tensor, " d_model"],
    after: Float[Tensor, " d_model"],
    readouts: tuple[Readout, Readout],
    *,
    article: frozenset[int] = frozenset(),
    top_tokens: int = TOP_TOKENS,
) -> VectorChange:
    """Compare a concept's value vector in two models of one shape, in float64.

    Each model's vector is read with that model's own final norm and unembedding.

    Args:
        before: The base's value vector.
        after: The unlearned model's value vector.
        readouts: Readouts of the base and of the unlearned model; see `readout`.
        article: Tokens W of the concept's article; see `article_tokens`.
        top_tokens: Number of promoted tokens compared.

    Returns:
        The measures of this module.

    Raises:
        InputError: The two vectors have different widths.

    Source: ConceptVectors (2406.11614); `jaccard_norm_unembed` is this package's.
    """
    before, after = before.double().cpu(), after.double().cpu()
    if before.shape != after.shape:
        raise InputError(
            f"`base` and `model` must have the same hidden size, got {len(before)} and {len(after)}. "
            "Give the model before unlearning as `base`."
        )
    norms = float(before.norm()), float(after.norm())
    ours, theirs, ours_norm, theirs_norm = (
        tuple(read.promoted(vector, norm=norm, top_tokens=top_tokens))
        for norm in (False, True)
        for read, vector in zip(readouts, (before, after), strict=True)
    )
    p, p_after = frozenset(ours), frozenset(theirs)
    return VectorChange(
        cosine=min(1.0, float(before @ after) / (norms[0] * norms[1])) if all(norms) else None,
        l2=float((before - after).norm()),
        base_norm=norms[0],
        jaccard_unembed=jaccard(p, p_after),
        jaccard_norm_unembed=jaccard(frozenset(ours_norm), frozenset(theirs_norm)),
        preciser=_ratio(len(p_after & article), len(p & article)),
        related=_ratio(len(p_after & p & article), len(p & article)),
        n_top=len(ours),
        promoted=ours,
        promoted_after=theirs,
        promoted_norm=ours_norm,
        promoted_norm_after=theirs_norm,
    )


def jaccard(ours: frozenset[int], theirs: frozenset[int]) -> float:
    """Return the size of the intersection over the size of the union; 1 for two empty sets."""
    return len(ours & theirs) / len(ours | theirs) if ours | theirs else 1.0


def article_tokens(tokenizer: PreTrainedTokenizerBase, article: str) -> frozenset[int]:
    """Return W: the tokens of an article without its stop words.

    Stop words are removed before the text is tokenised. Tokens of longer words whose text is a stop word ("Berl|in"),
    or has neither letter nor digit, are removed as well.

    Args:
        tokenizer: The models' tokenizer.
        article: Text of the article; may be empty.

    Returns:
        Token numbers.
    """
    kept = _WORD.sub(lambda word: "" if word[0].lower() in STOP_WORDS else word[0], article)
    ids = set(tokenizer(kept, add_special_tokens=False, verbose=False)["input_ids"])
    texts = {token: str(tokenizer.decode([token])).strip().lower() for token in ids}
    return frozenset(
        token for token, text in texts.items() if text not in STOP_WORDS and any(sign.isalnum() for sign in text)
    )


def _norms_after_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Return the norms that run after the last block, in order; one forward pass of a single token finds them."""
    layers = blocks(model)
    within = set(layers.modules())
    outside = [module for module in model.modules() if module not in within and "norm" in type(module).__name__.lower()]
    with _calls(layers[-1], *outside) as called, torch.inference_mode():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    return called[called.index(layers[-1]) + 1 :]


@contextmanager
def _calls(*modules: nn.Module) -> Iterator[list[nn.Module]]:
    """Record the order in which modules run."""
    called: list[nn.Module] = []
    handles = [module.register_forward_hook(lambda ran, *_: called.append(ran)) for module in modules]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
