"""The list of constructed models, without making one, which takes a minute a model."""

import re

import pytest

from analyses.verdict_benchmark.constructions import BY_A_METHOD, METHODS, OPTIONS, SHARES, constructions
from analyses.verdict_benchmark.families import Family
from analyses.verdict_benchmark.recipes import part_of
from dissect.zoo.recipes import new_model
from unlearning.methods import get_method
from unlearning.options import resolve_options


@pytest.fixture(params=["llama", "neox"])
def family(request, tmp_path) -> Family:
    return Family(request.param, 1, tmp_path)


def test_every_model_has_its_own_name_and_a_truth(family):
    made = constructions(family)
    names = [one.name for one in made]
    assert len(set(names)) == len(names)
    by_kind = {kind: [one for one in made if one.truth.kind == kind] for kind in ("erased", "suppressed", "partial")}
    assert all(len(of_kind) >= 5 for of_kind in by_kind.values())
    assert {one.truth.share for one in by_kind["erased"]} == {0.0}


def test_two_seeds_have_every_method_at_both_strengths(tmp_path):
    names = {one.name for seed in (1, 2) for one in constructions(Family("llama", seed, tmp_path))}
    assert {f"{name}-{strength}" for name in OPTIONS for strength in ("mild", "strong")} <= names


def test_the_models_of_the_published_report_stay_what_they_are(family):
    """Another entry before one would change its strength, and with it the model that a name stands for."""
    names = " ".join(one.name for one in constructions(family) if one.made == BY_A_METHOD)
    assert names.startswith(
        "ga-strong grad_diff_kl-mild npo_kl-strong idk-mild kto-strong altpo-mild undial-strong ce_u-mild wga-strong "
        "satimp-mild pdu-strong task_vector-mild grad_diff-strong npo-mild dpo-strong blur-mild simnpo-strong rmu-mild "
        "whp-strong"
    )


def test_every_option_is_one_of_its_method(family):
    for one in constructions(family):
        if "method" in one.recipe:
            method = one.recipe["method"]
            resolve_options(method, get_method(method).options, dict(one.recipe["options"]))
    assert set(METHODS) <= set(OPTIONS)


def test_what_is_trained_to_hide_is_a_small_part_of_the_model(family):
    parameters = dict(new_model(family.recipe, 300).named_parameters())
    whole = sum(value.numel() for value in parameters.values())
    hidden = [one for one in constructions(family) if one.name.startswith("hidden-")]
    assert len(hidden) >= 2
    for one in hidden:
        pattern = one.recipe["options"]["train_parameters"]
        chosen = [name for name in parameters if re.search(pattern, name)]
        assert chosen and sum(parameters[name].numel() for name in chosen) < 0.25 * whole


@pytest.mark.parametrize("share", SHARES)
def test_a_part_of_the_world_is_that_share_of_its_forget_people(family, share):
    part = part_of(family.world, share)
    forget = family.world.having("forget")
    assert len(part.having("forget")) == share * len(forget)
    assert set(part.having("forget")) <= set(forget) and part.having("retain") == family.world.having("retain")
