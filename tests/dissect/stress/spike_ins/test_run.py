from dataclasses import replace
from functools import partial

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
from dissect.stress.spike_ins.planting import Teaching
from dissect.stress.spike_ins.result import SpikeIns
from dissect.stress.spike_ins.run import spike_ins
from dissect.stress.spike_ins.scale import HIDDEN, NEVER_SHOWN
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
    values = found.frame.query("model == 'copy' and measure == 'logprob' and stage == 'attacked'")
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
