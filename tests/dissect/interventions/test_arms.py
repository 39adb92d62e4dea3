"""Arms: who gives to whom, what stands beside the claim, and what is refused before anything is computed."""

from functools import cache

import pytest

from dissect.interventions.arms import Arm, ArmGroup, make_arm_groups, resolve_donors
from dissect.models.model import Model
from dissect.models.pair import ModelPair
from dissect.prompts.prompts import Prompts
from tests.dissect.helpers import build_model, build_pair, build_prompts
from unlearning.common.errors import InputError


@cache
def pair() -> ModelPair:
    return build_pair("llama")


@cache
def third() -> Model:
    return Model.wrap(build_model("llama", seed=3), pair().tokenizer, name="third")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Prompts:
    return build_prompts(tmp_path_factory.mktemp("arms"))


def told(group: ArmGroup) -> list[tuple[Arm, str, str, str]]:
    """Each arm with the models that it is scored by, given by and run on, by name."""
    arm_models = group.load_models()
    assert len(arm_models.targets) == len(group.arms)
    assert (
        arm_models.models[0] is arm_models.base
        and tuple(arm_models.models[-len(arm_models.targets) :]) == arm_models.targets
    )
    assert (arm_models.donor.model in arm_models.models) and len(arm_models.models) <= 1 + 1 + len(arm_models.targets)
    return [
        (arm, arm_models.base.name, arm_models.donor.model.name, target.name)
        for arm, target in zip(group.arms, arm_models.targets, strict=True)
    ]


def test_into_the_unlearned_model_the_base_gives_and_is_what_scores_compare_with(prompts: Prompts) -> None:
    donors = ["other-question", "noise", third()]
    found = make_arm_groups(
        pair(), prompts, control=third(), direction="base-to-unlearned", donor=donors, null=2, seed=0
    )
    assert [row for group in found for row in told(group)] == [
        (Arm("main", "unlearned", "base"), "base", "base", "unlearned"),
        (Arm("control", "control", "base"), "base", "base", "third"),
        (Arm("null-0", "null", "base"), "base", "base", "null 0"),
        (Arm("null-1", "null", "base"), "base", "base", "null 1"),
        (Arm("other-question", "unlearned", "other-question"), "base", "base", "unlearned"),
        (Arm("noise", "unlearned", "noise"), "base", "base", "unlearned"),
        (Arm("donor", "unlearned", "third"), "base", "third", "unlearned"),
    ]
    # Two forwards are read from where the donor reads or computes something else than the base.
    assert [group.n_sources for group in found] == [1, 1, 1, 2, 1, 2]


def test_into_the_base_each_arm_is_scored_by_the_one_that_gives(prompts: Prompts) -> None:
    donors = ["other-question", third()]
    found = make_arm_groups(
        pair(), prompts, control=third(), direction="unlearned-to-base", donor=donors, null=1, seed=0
    )
    assert [row for group in found for row in told(group)] == [
        (Arm("main", "base", "unlearned"), "unlearned", "unlearned", "base"),
        (Arm("control", "base", "control"), "third", "third", "base"),
        (Arm("null-0", "base", "null"), "null 0", "null 0", "base"),
        (Arm("other-question", "base", "other-question"), "unlearned", "unlearned", "base"),
        (Arm("donor", "base", "third"), "unlearned", "third", "base"),
    ]


def test_null_models_are_made_when_they_are_asked_for(prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def counting(base: Model, _unlearned: Model, *, seed: int) -> Model:
        made.append(seed)
        return base

    monkeypatch.setattr("dissect.interventions.arms.null_model", counting)
    _, first, second = make_arm_groups(
        pair(), prompts, control=None, direction="base-to-unlearned", donor=[], null=2, seed=0
    )
    assert made == []
    second.load_models()
    first.load_models()
    assert made == [1, 0]


def test_donors_are_each_run_once_and_the_base_is_always_there() -> None:
    assert resolve_donors(pair(), "base") == resolve_donors(pair(), []) == resolve_donors(pair(), None) == []
    assert resolve_donors(pair(), "none") == resolve_donors(pair(), ["none"]) == []
    assert resolve_donors(pair(), ["noise", "base", "noise", "other-question"]) == ["noise", "other-question"]
    assert resolve_donors(pair(), third()) == [third()]
    with pytest.raises(InputError, match="`donor`.*got 2"):
        resolve_donors(pair(), [third(), pair().unlearned])


def test_impossible_arms_are_refused_before_any_is_made(prompts: Prompts) -> None:
    for options, message in (
        ({"direction": "sideways"}, "direction.*base-to-unlearned, unlearned-to-base.*sideways"),
        ({"null": -1}, "null.*-1"),
    ):
        defaults = {"control": None, "direction": "base-to-unlearned", "donor": [], "null": 0, "seed": 0}
        with pytest.raises(InputError, match=message):
            make_arm_groups(pair(), prompts, **(defaults | options))  # type: ignore[arg-type]
    same = build_pair("llama", scale=0.0)
    with pytest.raises(InputError, match="null.* the same weights"):
        make_arm_groups(same, prompts, control=None, direction="base-to-unlearned", donor=[], null=1, seed=0)
