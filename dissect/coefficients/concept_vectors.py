"""Compare concept vectors: value vectors that ConceptVectors (2406.11614) names for its concepts, in two models.

A record of the benchmark names the layer and dimension (`Layer`, `Dim`) of a concept: one column of a down projection.
If the concept was erased from the parameters, this vector should have changed.
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
    """A concept and its value vector.

    Attributes:
        name: Name of the concept.
        layer: Layer of the value vector.
        neuron: Index of the value vector in the MLP's hidden width.
    """

    name: str
    layer: int
    neuron: int


def read_concepts(path: str | Path) -> tuple[Concept, ...]:
    """Read the concepts that a file of prompts names.

    Args:
        path: File of prompts; in ConceptVectors' format, records have `Layer` and `Dim`.

    Returns:
        One concept per record with `Layer` and `Dim`; empty if no record has them.

    Raises:
        InputError: The file cannot be read, a record has only one of `Layer` and `Dim`, or they are no whole numbers.
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
    """Measure how far each concept's value vector moved from the base's.

    Args:
        base: Base model.
        other: Model of the same shape.
        concepts: Concepts; see `read_concepts`.
        top_tokens: Number of promoted tokens compared, each model with its own final norm and unembedding.

    Returns:
        One row per concept: `concept`, `layer`, `neuron`, `cosine`, `l2` (norm of the difference), `base_norm`,
        `jaccard_unembed` and `jaccard_norm_unembed` (overlap of the promoted tokens, read with the unembedding alone,
        as ConceptVectors publishes it, and with the final norm before it), `top_tokens` (how many tokens were
        compared: at most half of the vocabulary, since all tokens are always the same), and the `promotes` of the
        base and `promotes_after` of the other model: the first ten tokens, read with the final norm, as text. The
        measures are those of `unlearning.evaluation.metrics.concept_vectors.vector_change`.

    Raises:
        InputError: A concept's vector is not in the model, or a model is a mixture of experts or streamed.
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
    """Check that a model has the value vector of a concept.

    Args:
        model: The model.
        concept: The concept.

    Raises:
        InputError: The model has no such layer or neuron.
    """
    if concept.layer >= model.n_layers:
        raise InputError(
            f"the vector of concept {concept.name!r} is in layer {concept.layer}, but {model.name} has layers 0 to "
            f"{model.n_layers - 1}. It was found in another model: leave the concepts out (`concepts=()`)."
        )
    width = len(value_vectors(model, concept.layer))
    if concept.neuron >= width:
        raise InputError(
            f"the vector of concept {concept.name!r} is neuron {concept.neuron}, but the MLPs of {model.name} have "
            f"0 to {width - 1}. It was found in another model: leave the concepts out (`concepts=()`)."
        )
