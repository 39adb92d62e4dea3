"""The constructed models are what they are said to be."""

import pytest

from dissect.stress.core.scores import score_facts
from tests.dissect.stress.constructed import case_of, gated, model, opened


@pytest.mark.parametrize("name", ["demo:base", "demo-neox:base"])
def test_the_gate_shuts_off_every_answer_and_opens(name):
    shut, gate = gated(name)
    case = case_of(shut, base=name, n=30)
    for facts in (case.forget, case.retain):
        assert score_facts(shut, facts).correct.mean() == 0
        base, again = (score_facts(each, facts) for each in (model(name), opened(shut, gate, name)))
        assert again.correct.mean() >= base.correct.mean() - 0.05
        assert abs(again.logprob - base.logprob).mean() < 0.2
