from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import gmean

from dissect.stress.core.distractors import Facts
from dissect.stress.core.scores import score_answers
from dissect.stress.without_attack import without_attack
from tests.dissect.stress.constructed import case_of, model


@pytest.fixture(scope="module")
def case():
    return case_of(model("demo:npo"), n=10)


def test_probability_and_truth_ratio_are_those_of_one_answer_at_a_time(case):
    found = without_attack(case).frame.pivot_table(index=["role", "example_index"], columns="measure", values="value")
    for role, of in case.models.items():
        for place, item in enumerate(case.forget.prompts.items):
            right, *wrong = np.exp(score_answers(of, case.forget.prompts, [item, *case.forget.distractors[place]])[0])
            row = found.loc[role, place]
            assert row["probability"] == pytest.approx(right, rel=1e-4)
            assert row["truth_ratio"] == pytest.approx(right / (right + gmean(wrong)), rel=1e-4)


def test_a_fact_without_wrong_answers_has_no_truth_ratio(case):
    one = case.forget
    bare = replace(case, forget=Facts(one.prompts, ((), *one.distractors[1:])))
    rows = without_attack(bare).frame.query("measure == 'truth_ratio' and role == 'base'").sort_values("example_index")
    assert np.isnan(rows["value"].to_numpy()).tolist() == [True] + [False] * 9


def test_a_truth_ratio_is_compared_with_a_half_without_a_never_model(case):
    found = without_attack(replace(case, control=None)).residual("truth_ratio")
    values = without_attack(case).frame.query("measure == 'truth_ratio'").groupby("role")["value"].mean()
    assert found.against == "floor"
    assert found.rho == pytest.approx((values["unlearned"] - 0.5) / (values["base"] - 0.5))


def test_a_probability_is_a_share_of_the_base_s_without_a_never_model(case):
    found = without_attack(replace(case, control=None)).residual()
    values = without_attack(case).frame.query("measure == 'probability'").groupby("role")["value"].mean()
    assert found.rho == pytest.approx(values["unlearned"] / values["base"])
