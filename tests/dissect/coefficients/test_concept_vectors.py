"""Concept vectors: by hand, and as the released files name them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dissect.coefficients.concept_vectors import Concept, concept_vectors, read_concepts
from dissect.coefficients.neurons import value_vectors, vocabulary_scores
from dissect.models.model import Model
from tests.dissect.helpers import assert_close, build_model, build_tokenizer, decoder_blocks
from tests.unlearning.data.helpers import REAL_DATA
from unlearning.common.errors import InputError
from unlearning.evaluation.metrics.concept_vectors import readout

RELEASED = REAL_DATA / "conceptvectors/llama2-7b_concepts_test_30tokens_answers.json"


def write(folder: Path, records: list[dict[str, Any]]) -> Path:
    path = folder / "concepts.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def two_models(family: str = "llama") -> list[Model]:
    return [Model.wrap(build_model(family), build_tokenizer(), name=name) for name in ("base", "unlearned")]


def test_concept_vectors_are_worked_out_by_hand() -> None:
    base, unlearned = two_models()
    ours, theirs = (
        decoder_blocks(model.hf)[1].get_submodule("mlp.down_proj").get_parameter("weight")
        for model in (base, unlearned)
    )
    with torch.no_grad():
        ours[:, 7] = torch.arange(32.0)
        theirs[:, 7] = -torch.arange(32.0)
        theirs[:, 9] *= 3
    frame = concept_vectors(base, unlearned, [Concept("turned", 1, 7), Concept("longer", 1, 9), Concept("same", 2, 7)])
    assert list(frame["concept"]) == ["turned", "longer", "same"]
    assert_close(frame["cosine"].to_numpy(), torch.tensor([-1.0, 1, 1]), atol=1e-6)
    norm = float((torch.arange(32.0) ** 2).sum().sqrt())
    other = float(ours[:, 9].detach().norm())
    assert_close(frame["l2"].to_numpy(), torch.tensor([2 * norm, 2 * other, 0]), atol=1e-4)
    assert_close(frame["base_norm"].to_numpy()[:2], torch.tensor([norm, other]), atol=1e-4)
    # Turned around, a vector promotes what it demoted: with half of the vocabulary compared nothing is shared.
    assert list(frame["jaccard_norm_unembed"]) == [0, 1, 1]
    assert list(frame["jaccard_unembed"]) == [0, 1, 1]
    assert set(frame["top_tokens"]) == {384 // 2}
    assert frame["promotes"][1] == frame["promotes_after"][1]
    before, after = (set(frame[column][0]) - {"\ufffd", ""} for column in ("promotes", "promotes_after"))  # not bytes
    assert before
    assert not before & after
    fewer = concept_vectors(base, unlearned, [Concept("turned", 1, 7)], top_tokens=5)
    assert list(fewer["top_tokens"]) == [5]


@pytest.mark.parametrize("family", "llama gpt2 neox gemma2 olmo olmo2 phi3 opt bloom falcon gptj".split())
def test_norm_unembed_reads_vectors_as_neurons_are_read(family: str) -> None:
    # The final norm that one forward pass finds is the one of TransformerLens' adapter.
    model = two_models(family)[0]
    vector = value_vectors(model, 1)[5].detach()
    theirs = vocabulary_scores(model, vector[None])[0]
    assert_close(readout(model.hf).scores(vector, norm=True), theirs.detach(), atol=1e-3)


def test_zero_vector_has_no_cosine() -> None:
    base, unlearned = two_models()
    with torch.no_grad():
        decoder_blocks(unlearned.hf)[1].get_submodule("mlp.down_proj").get_parameter("weight")[:, 7] = 0
    frame = concept_vectors(base, unlearned, [Concept("gone", 1, 7)])
    assert frame["cosine"].isna().all()
    assert frame["l2"][0] == frame["base_norm"][0] > 0


def test_released_file_names_its_concepts() -> None:
    if not RELEASED.is_file():
        pytest.skip("the released ConceptVectors file is not here")
    concepts = read_concepts(RELEASED)
    assert len(concepts) == 10
    assert concepts[0] == Concept("Valentine's Day", 19, 3279)
    assert concepts[3] == Concept("Harry Potter", 20, 10513)


def test_data_that_names_no_vectors_has_no_concepts(tmp_path: Path) -> None:
    assert read_concepts(write(tmp_path, [{"prompt": "a", "answer": "b"}])) == ()


@pytest.mark.parametrize("place", [{"Layer": 1}, {"Layer": "1", "Dim": 2}, {"Layer": 1, "Dim": -2}])
def test_half_a_place_is_refused(place: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path, [{"Concept": "x", "QA": [], "Layer": 0, "Dim": 0}, {"Concept": "y", "QA": [], **place}])
    with pytest.raises(InputError, match=r"concepts\.json, record 2: Layer .* name no value vector"):
        read_concepts(path)


@pytest.mark.parametrize(
    ("concept", "said"),
    [
        (Concept("Satan", 22, 3), r"Satan.*layer 22.*base.*0 to 2"),
        (Concept("Satan", 1, 1730), r"Satan.*1730.*base.*0 to 47"),
    ],
)
def test_concept_outside_the_model_is_refused(concept: Concept, said: str) -> None:
    base, unlearned = two_models()
    with pytest.raises(InputError, match=said) as refused:
        concept_vectors(base, unlearned, [concept])
    assert "\n" not in str(refused.value)


def test_value_vectors_of_gpt2_are_rows() -> None:
    base, unlearned = two_models("gpt2")
    with torch.no_grad():
        decoder_blocks(unlearned.hf)[0].get_submodule("mlp.c_proj").get_parameter("weight")[4] *= -1
    frame = concept_vectors(base, unlearned, [Concept("here", 0, 4), Concept("elsewhere", 0, 5)])
    assert_close(frame["cosine"].to_numpy(), torch.tensor([-1.0, 1]), atol=1e-6)
