"""Concept vectors: the value vectors that ConceptVectors (2406.11614) names for its concepts, in two models.

A record of that benchmark names where its concept was found, `Layer` and `Dim`: one column of a down projection. If a
concept was erased from the parameters, that vector should have changed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from dissect.coefficients.neurons import value_vectors, vocabulary_scores
from dissect.models.model import Model
from unlearning.common.errors import InputError
from unlearning.data.concept_vectors import ConceptRecord
from unlearning.data.records import read_records

TOP_TOKENS = 200
"""As many of the tokens that a vector promotes are compared."""


@dataclass(frozen=True)
class Concept:
    """Where a concept is said to be.

    Attributes:
        name: of the concept.
        layer: of its value vector.
        neuron: its index in the MLP's hidden width.
    """

    name: str
    layer: int
    neuron: int


def read_concepts(path: str | Path) -> tuple[Concept, ...]:
    """The concepts that a file of prompts names; none where its records have no `Layer` and `Dim`.

    Raises:
        InputError: an unreadable file, or a record with one of the two only, or with what is no number there.
    """
    found = []
    for number, record in enumerate(read_records(path), start=1):
        concept = ConceptRecord(record, f"{path}, record {number}")
        if concept.vector is not None:
            name = str(number - 1) if concept.name is None else concept.name
            found.append(Concept(name, *concept.vector))
    return tuple(found)


def concept_vectors(
    base: Model, other: Model, concepts: Sequence[Concept], *, top_tokens: int = TOP_TOKENS
) -> pd.DataFrame:
    """How far each concept's value vector lies from the base's.

    Args:
        base: what is compared to.
        other: a model of the same shape.
        concepts: see `read_concepts`.
        top_tokens: most promoted tokens of both that are compared, each model by its own norm and unembedding.

    Returns:
        One row per concept: `concept`, `layer`, `neuron`, `cosine`, `l2` (norm of the difference), `base_norm`,
        `jaccard` (tokens among both models' top ones, as a share of those among either's), `top_tokens` (how many
        were compared: at most half of the vocabulary, since all tokens are always the same), and the `promotes` of
        the base and `promotes_after` of the other model: the first ten, as text.

    Raises:
        InputError: a concept outside the model, a mixture of experts, a streamed model.
    """
    rows = []
    for concept in concepts:
        check_place(base, concept)
        ours, theirs = (value_vectors(model, concept.layer)[concept.neuron].detach() for model in (base, other))
        theirs = theirs.to(ours.device)
        scores = [vocabulary_scores(model, vector[None])[0] for model, vector in ((base, ours), (other, theirs))]
        count = min(top_tokens, max(1, len(scores[0]) // 2))
        tokens = [one.topk(count).indices.tolist() for one in scores]
        texts = [[str(base.tokenizer.decode([token])) for token in ids[:10]] for ids in tokens]
        wide = ours.double(), theirs.double()
        rows.append(
            {
                "concept": concept.name,
                "layer": concept.layer,
                "neuron": concept.neuron,
                "cosine": float(torch.dot(*wide) / (wide[0].norm() * wide[1].norm())),
                "l2": float((wide[1] - wide[0]).norm()),
                "base_norm": float(wide[0].norm()),
                "jaccard": jaccard(*tokens),
                "top_tokens": count,
                "promotes": texts[0],
                "promotes_after": texts[1],
            }
        )
    return pd.DataFrame(rows)


def check_place(model: Model, concept: Concept) -> None:
    """Check that a model has the value vector that a concept names.

    Raises:
        InputError: it has not.
    """
    if concept.layer >= model.n_layers:
        raise InputError(
            f"concept {concept.name!r} is in layer {concept.layer}, and {model.name} has layers 0 to "
            f"{model.n_layers - 1}; its vectors were found in another model: leave them out (--no-concepts)"
        )
    width = len(value_vectors(model, concept.layer))
    if concept.neuron >= width:
        raise InputError(
            f"concept {concept.name!r} is dimension {concept.neuron}, and the MLPs of {model.name} have 0 to "
            f"{width - 1}; its vectors were found in another model: leave them out (--no-concepts)"
        )


def jaccard(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """Size of the intersection of two sets by that of their union."""
    return len({*ours} & {*theirs}) / len({*ours} | {*theirs})
