"""Concept vectors: the value vectors that ConceptVectors (2406.11614) names for its concepts, in two models.

A record of that benchmark names where its concept was found, `Layer` and `Dim`: one column of a down projection. If a
concept was erased from the parameters, that vector should have changed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from dissect.coefficients.neurons import value_vectors
from dissect.models.model import Model
from unlearning.common.errors import InputError
from unlearning.data.concept_vectors import ConceptRecord
from unlearning.data.records import read_records
from unlearning.evaluation.metrics.concept_vectors import TOP_TOKENS, readout, vector_change


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
        top_tokens: number of promoted tokens compared, each model with its own final norm and unembedding.

    Returns:
        One row per concept: `concept`, `layer`, `neuron`, `cosine`, `l2` (norm of the difference), `base_norm`,
        `jaccard_unembed` and `jaccard_norm_unembed` (overlap of the promoted tokens, read with the unembedding alone,
        as ConceptVectors publishes it, and with the final norm before it), `top_tokens` (how many tokens were
        compared: at most half of the vocabulary, since all tokens are always the same), and the `promotes` of the
        base and `promotes_after` of the other model: the first ten tokens, read with the final norm, as text. The
        measures are those of `unlearning.evaluation.metrics.concept_vectors.vector_change`.

    Raises:
        InputError: a concept outside the model, a mixture of experts, a streamed model.
    """
    for concept in concepts:
        check_place(base, concept)
    if not concepts:
        return pd.DataFrame()
    readouts = readout(base.hf), readout(other.hf)
    rows = []
    for concept in concepts:
        ours, theirs = (value_vectors(model, concept.layer)[concept.neuron] for model in (base, other))
        change = vector_change(ours, theirs, readouts, top_tokens=top_tokens)
        texts = [
            [str(base.tokenizer.decode([token])) for token in tokens[:10]]
            for tokens in (change.promoted_norm, change.promoted_norm_after)
        ]
        rows.append(
            {
                "concept": concept.name,
                "layer": concept.layer,
                "neuron": concept.neuron,
                "cosine": np.nan if change.cosine is None else change.cosine,
                "l2": change.l2,
                "base_norm": change.base_norm,
                "jaccard_unembed": change.jaccard_unembed,
                "jaccard_norm_unembed": change.jaccard_norm_unembed,
                "top_tokens": change.n_top,
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
