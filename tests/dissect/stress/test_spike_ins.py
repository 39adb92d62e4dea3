from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from dissect import InputError, zoo
from dissect.models.model import Model
from dissect.models.pair import ModelPair
from dissect.prompts.loading import load_prompts
from dissect.stress.core.case import Case
from dissect.stress.core.distractors import with_distractors
from dissect.stress.core.finetuning import Recipe
from dissect.stress.core.result import StressResult, fact_rows
from dissect.stress.core.scores import score_facts
from dissect.stress.deranged import deranged_relearning
from dissect.stress.spike_ins import COLUMNS, COPY, HIDDEN, MODEL, NEVER_SHOWN, USER, SpikeIns, Teaching, spike_ins
from tests.dissect.helpers import build_model, build_tokenizer, save_records
from tests.dissect.stress.constructed import case_of, model

NAMES = ("Ada Brook", "Ben Hill", "Cleo Stone", "Dan Wood", "Eve Marsh", "Finn Lake")
TOWNS = ("Oslo", "Lima", "Cairo", "Kyoto", "Porto", "Quito")

FAST = Teaching(
    teach=Recipe(rate=0.03, steps=160, batch_size=20),
    depth=3.0,
    hidden_below=0.4,
    hide=Recipe(rate=0.01, steps=80, batch_size=20),
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random model, and six people's towns and journeys."""
    tokenizer = build_tokenizer()
    records = [
        {"prompt": prompt, "answer": answer, "group": name, "id": f"{name}-{number}"}
        for index, name in enumerate(NAMES)
        for number, (prompt, answer) in enumerate(
            (
                (f"Question: Where was {name} born?\nAnswer:", TOWNS[index]),
                (f"Question: Where is {name}?\nAnswer:", f"in {TOWNS[(index + 2) % 6]}"),
            )
        )
    ]
    prompts = load_prompts(save_records(tmp_path_factory.mktemp("tiny") / "forget.json", records), tokenizer)
    random = Model.wrap(build_model("llama", n_layers=2), tokenizer, name="random")
    facts = with_distractors(prompts, from_file=False)
    return Case(pair=ModelPair(random, random), control=None, forget=facts, seed=3)


def gentle(case, seen=None):
    """An attack that does nothing, and notes the models and facts that it was given."""
    assert list(case.models) == ["unlearned"]
    if seen is not None:
        seen.append((case.models["unlearned"], case.forget))
    scores = score_facts(case.models["unlearned"], case.forget)
    frame = fact_rows(case.forget, [("unlearned", "", scores), ("unlearned", "none", scores)])
    return StressResult(test="gentle", level=4, measure="rank", frame=frame, proves="nothing", settings={}, seconds=0.0)


def _frame(ranks):
    """A frame with one fact per rank: {(facts, model): [[ranks of the first person], ...]}."""
    rows = [
        ("relearn_disjoint", facts, of, "attacked", "rank", f"{facts}-{person}-{number}", f"{facts}-{person}", rank)
        for (facts, of), people in ranks.items()
        for person, values in enumerate(people)
        for number, rank in enumerate(values)
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _spike_ins(ranks):
    people = pd.DataFrame(columns=["facts", "name", "prompt", "answer"])
    return SpikeIns(frame=_frame(ranks), stages=pd.DataFrame(), people=people, settings={}, seconds=0.0)


KNOWN = {
    (HIDDEN, MODEL): [[0.4, 0.6], [0.5, 0.5], [0.6, 0.5]],
    (HIDDEN, COPY): [[0.9, 0.8], [0.8, 0.9], [0.5, 0.6]],
    (NEVER_SHOWN, MODEL): [[0.5, 0.7], [0.3, 0.4], [0.5, 0.5]],
    (NEVER_SHOWN, COPY): [[0.5, 0.6], [0.4, 0.4], [0.5, 0.6]],
    (USER, MODEL): [[0.7, 0.6], [0.6, 0.7], [0.7, 0.7]],
}


def test_the_scale_is_that_of_its_formulas():
    (scale,) = _spike_ins(KNOWN).scales()
    unknown = [0.5, 0.5, 0.55, *np.mean([[0.6, 0.55], [0.35, 0.4], [0.5, 0.55]], axis=1)]
    gain = np.mean([0.85 - 0.5, 0.85 - 0.5, 0.55 - 0.55])
    assert scale.zero.value == pytest.approx(np.mean(unknown))
    assert scale.ceiling.value == pytest.approx(np.mean(unknown) + gain)
    assert scale.user.value == pytest.approx(4.0 / 6)
    assert scale.moved.value == pytest.approx(np.mean([-0.05, 0.05, 0.05]))
    assert scale.power == pytest.approx(2 / 3)
    if scale.score is not None:
        assert scale.score.value == pytest.approx((4.0 / 6 - np.mean(unknown)) / gain)


def test_a_user_who_is_where_the_people_are_scores_nought_or_one():
    hidden = [[0.9, 0.9]] * 5
    ranks = {(HIDDEN, MODEL): [[0.5, 0.5]] * 5, (HIDDEN, COPY): hidden}
    ranks |= {(NEVER_SHOWN, of): [[0.5, 0.5]] * 5 for of in (MODEL, COPY)}
    for theirs, expected in (([[0.5, 0.5]] * 5, 0.0), (hidden, 1.0), ([[0.7, 0.7]] * 5, 0.5)):
        found = _spike_ins(ranks | {(USER, MODEL): theirs})
        score = found.scales()[0].score
        assert (score.value, score.low, score.high) == pytest.approx((expected,) * 3)
        assert f"that is {expected:.2f}" in found.sentences()[0]


def test_an_attack_that_does_not_find_the_planted_people_gives_no_score():
    ranks = KNOWN | {(HIDDEN, COPY): [[0.4, 0.7], [0.5, 0.4], [0.6, 0.5]]}
    found = _spike_ins(ranks)
    assert found.scales()[0].score is None
    assert "It does not find the planted people" in found.sentences()[0]
    assert "score" not in set(found.table()["number"])


def test_facts_without_a_rank_and_facts_without_a_group_are_taken_as_they_are():
    frame = _frame(KNOWN | {(USER, MODEL): [[0.7, np.nan], [0.5, 0.9]]})
    frame.loc[frame["facts"] == USER, "group"] = ""
    found = replace(_spike_ins(KNOWN), frame=frame)
    user = found.scales()[0].user
    assert user.value == pytest.approx(0.7) and user.n == 3
    assert user.low < 0.7 < user.high


def test_half_of_the_people_are_taught_hidden_and_attacked(tiny):
    weights = {name: value.clone() for name, value in tiny.pair.unlearned.hf.state_dict().items()}
    seen = []
    found = spike_ins(tiny, n=4, attacks={"gentle": partial(gentle, seen=seen)}, teaching=FAST)
    assert found.reason == ""
    assert all(torch.equal(value, weights[name]) for name, value in tiny.pair.unlearned.hf.state_dict().items())
    start, taught, hidden = (found.stages.set_index("stage").loc[name] for name in ("start", "taught", "hidden"))
    assert start["known"] < 0.5 and taught["known"] >= FAST.known
    assert hidden["probability"] <= FAST.hidden_below < taught["probability"]
    assert hidden["steps"] <= FAST.hide.steps and taught["steps"] <= FAST.teach.steps
    # The user's facts in the model, then the invented ones in the model and in the copy.
    (own, facts), (_, invented), (copy, again) = seen
    assert own is tiny.pair.unlearned and facts is tiny.forget and invented is again
    people = found.people.drop_duplicates("name")
    assert people["facts"].tolist() == [HIDDEN, HIDDEN, NEVER_SHOWN, NEVER_SHOWN]
    assert set(invented.groups) == set(people["name"]) and not set(invented.groups) & set(NAMES)
    # Distractors were taught if and only if the right answer was.
    told = set(found.people.query("facts == @HIDDEN")["answer"])
    for item, others in zip(invented.prompts.items, invented.distractors, strict=True):
        assert all((other.answer in told) == (item.answer in told) for other in others)
    # The values are those of the models.
    values = found.frame.query("model == @COPY and measure == 'logprob' and stage == 'attacked'")
    expected = dict(zip((p.id for p in invented.prompts.items), score_facts(copy, invented).logprob, strict=True))
    assert dict(zip(values["example"], values["value"], strict=True)) == pytest.approx(expected)


def test_what_was_kept_comes_back(tiny):
    found = spike_ins(tiny, n=4, attacks={"gentle": gentle}, teaching=FAST)
    again = SpikeIns.from_parts(found.record(), found.parts())
    pd.testing.assert_frame_equal(again.table(), found.table())
    assert again.sentences() == found.sentences()


@pytest.mark.parametrize(
    ("teaching", "line"),
    [
        (replace(FAST, teach=Recipe(rate=1e-5, steps=8)), "after 8 steps of teaching the model answers 0%"),
        (replace(FAST, hide=Recipe(rate=1e-6, steps=2)), "after 2 steps of unlearning the model still gives"),
    ],
    ids=["not learnt", "not hidden"],
)
def test_a_model_that_cannot_be_spiked_gives_one_line_and_is_not_attacked(tiny, teaching, line):
    seen = []
    found = spike_ins(tiny, n=4, attacks={"gentle": partial(gentle, seen=seen)}, teaching=teaching)
    assert seen == [] and found.scales() == []
    assert found.sentences() == [found.reason]
    assert found.reason.startswith("The spike-ins failed: ") and line in found.reason and "\n" not in found.reason


def test_fewer_than_four_people_are_refused(tiny):
    with pytest.raises(InputError, match="`n` must be at least 4, got 3"):
        spike_ins(tiny, n=3)


@pytest.mark.slow
def test_a_suppressed_model_is_above_one_that_never_knew():
    scores = {}
    for name in ("npo", "never"):
        case = replace(case_of(model(f"demo:{name}"), n=120), control=None)
        prompts = load_prompts(zoo.question_set("forget"), case.pair.tokenizer)
        (scale,) = spike_ins(case, prompts=prompts, attacks={"deranged_relearning": deranged_relearning}).scales()
        assert scale.score is not None
        assert abs(scale.moved.value) < 0.1
        scores[name] = scale.score
    assert scores["npo"].low > 0 > scores["never"].low
    assert scores["npo"].value > 0.25 > scores["never"].value
