"""All models of a case in canonical form: no score depends on how the unlearned model's weights are written."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dissect.models.model import Model
from dissect.models.pair import ModelPair
from dissect.models.rewriting import rewritten
from dissect.stress.catalogue import entries
from dissect.stress.core.canonical_case import in_canonical_form
from dissect.stress.core.case import Case
from dissect.stress.core.scores import score_facts
from tests.dissect.stress.constructed import case_of, model


def case() -> Case:
    return case_of(model("demo:npo"), n=12)


def rewritten_case(seed: int) -> Case:
    given = case()
    other = rewritten(given.pair.unlearned, seed=seed)
    return replace(given, pair=ModelPair(given.pair.base, other))


def largest_difference(one: Model, other: Model) -> float:
    """Largest difference of a weight, relative to the root mean square of its tensor."""
    pairs = zip(one.hf.parameters(), other.hf.parameters(), strict=True)
    return max(float((a - b).abs().max() / b.square().mean().sqrt()) for a, b in pairs)


def test_a_rewritten_model_gives_the_same_case() -> None:
    given, other = (in_canonical_form(one) for one in (case(), rewritten_case(seed=3)))
    for role, ours in given.case.models.items():
        assert largest_difference(other.case.models[role], ours) < 1e-4, role
    assert given.moved == {}
    assert other.moved["unlearned"]["neurons"] > 100 and set(other.moved) == {"unlearned"}


def test_the_canonical_models_score_facts_as_the_given_ones_do() -> None:
    given = rewritten_case(seed=4)
    form = in_canonical_form(given).case
    for role, ours in given.models.items():
        expected, found = (score_facts(one, given.forget).logprob for one in (ours, form.models[role]))
        np.testing.assert_allclose(found, expected, atol=1e-3)


def test_the_case_as_written_has_the_given_models_and_the_present_settings() -> None:
    given = case()
    form = replace(in_canonical_form(given).case.at_most(5), only="unlearned")
    written = form.as_written
    assert written.pair is given.pair and written.control is given.control and written.given is None
    assert len(written.forget) == 5 and written.only == "unlearned"
    assert given.as_written is given


@pytest.mark.parametrize("name", ["quantisation", pytest.param("weight_noise", marks=pytest.mark.slow)])
def test_tests_about_weights_as_written_run_on_the_given_models(name: str) -> None:
    form = in_canonical_form(rewritten_case(seed=5)).case.at_most(4)
    tests = {entry.name: entry.runs["full"] for entry in entries(None)}
    found = tests[f"{name}_as_written"](form)
    assert found.test == f"{name}_as_written" and "as they were given" in found.proves
    assert torch.equal(
        torch.tensor(found.frame["value"].to_numpy()),
        torch.tensor(tests[name](form.as_written).frame["value"].to_numpy()),
    )
    assert not found.frame["value"].equals(tests[name](form).frame["value"])
