"""The models of a case by role, with several controls."""

import time
from dataclasses import replace

import pytest

from dissect import InputError
from dissect.models.pair import ModelPair
from dissect.stress.core.case import make_case
from tests.dissect.stress.constructed import case_of, model, questions


def made(control):
    pair = ModelPair(model("demo:base"), model("demo:npo"))
    return make_case(pair, questions("forget"), control=control).at_most(4)


def test_each_control_has_its_role():
    never, other = model("demo:never"), model("demo:rmu")
    case = made([never, other])
    assert list(case.models) == ["base", "unlearned", "control", "control 2"]
    assert case.models["control 2"] is other and case.control is never and case.controls == (never, other)
    assert list(replace(case, only="control 2").models) == ["control 2"]
    assert list(made([never]).models) == list(made(never).models) == ["base", "unlearned", "control"]


def test_a_loop_over_the_models_adds_its_time_to_each_role():
    seconds = {"control": 1.0}
    case = replace(made(["demo:never"]), seconds=seconds)
    assert list(case.models.items()) == list(replace(case, seconds=None).models.items()) and len(case.models) == 3
    for role, _ in case.models.items():
        if role == "control":
            break
        time.sleep(0.02 if role == "base" else 0.01)
    assert seconds["base"] >= 0.02 and seconds["unlearned"] >= 0.01 and seconds["control"] > 1.0
    assert list(replace(case, only="unlearned").models.items()) == [("unlearned", case.pair.unlearned)]


@pytest.mark.parametrize("control", [None, "none", []])
def test_without_a_control_there_is_none(control):
    case = made(control)
    assert case.control is None and case.controls == () and list(case.models) == ["base", "unlearned"]
    assert replace(case_of(model("demo:npo"), n=4), control=None).controls == ()


def test_controls_that_say_the_same_are_refused():
    with pytest.raises(InputError, match="demo:never and demo:never have the same weights"):
        made(["demo:never", "demo:never"])
    with pytest.raises(InputError, match="`control` must name models where several are given"):
        made(["demo:never", "auto"])
