import json
from dataclasses import replace
from functools import partial

import pandas as pd
import pytest

from dissect import InputError
from dissect.models.pair import ModelPair
from dissect.stress import catalogue
from dissect.stress.catalogue import Entry
from dissect.stress.core.finetuning import Recipe
from dissect.stress.core.result import StressResult, fact_rows
from dissect.stress.core.scores import score_facts
from dissect.stress.spike_ins.planting import Teaching
from dissect.stress.spike_ins.result import SpikeIns
from dissect.stress.spike_ins.run import spike_ins
from dissect.stress.spike_ins.scale import USER
from dissect.stress.without_attack import without_attack
from dissect.verdicts import spiked as spiking
from dissect.verdicts.result import load_verdict
from dissect.verdicts.rule import RuleEntry
from dissect.verdicts.run import verdict
from dissect.verdicts.spiked import check_number, read_spike_ins, spiked
from dissect.verdicts.tables import print_verdict
from tests.dissect.stress.constructed import case_of, model, questions
from tests.dissect.verdicts.test_run import RULE as OF_TESTS
from unlearning.common.runs import open_run

RULE = replace(OF_TESTS, tests=(RuleEntry("gentle"),), needed=(RuleEntry("gentle"),))

FAST = Teaching(depth=1.0, hidden_below=0.5)

DEAF = Teaching(teach=Recipe(rate=1e-5, steps=8))

RESULT = StressResult(test="gentle", level=4, measure="rank", frame=pd.DataFrame(), proves="", settings={}, seconds=0.0)


@pytest.fixture(autouse=True)
def attacks(monkeypatch):
    """One attack that does nothing, and notes whom it was asked about and what it was done to."""
    seen = []

    def gentle(case):
        seen.append((case.forget, list(case.models)))
        rows = [
            (role, variant, score_facts(one, case.forget))
            for role, one in case.models.items()
            for variant in ("", "as it is")
        ]
        frame = fact_rows(case.forget, rows)
        return StressResult(test="gentle", level=4, measure="rank", frame=frame, proves="", settings={}, seconds=0.0)

    tests = (
        Entry("without_attack", dict.fromkeys(catalogue.BUDGETS, without_attack)),
        Entry("gentle", dict.fromkeys(catalogue.BUDGETS, gentle)),
    )
    monkeypatch.setattr(catalogue, "entries", lambda *_: tests)
    monkeypatch.setattr(spiking, "ATTACKS", {"gentle": gentle})
    monkeypatch.setattr(spiking, "spike_ins", partial(spike_ins, teaching=FAST))
    return seen


def judged(forget=None, **options):
    pair = ModelPair(model("demo:base"), model("demo:npo"))
    options = {"budget": "quick", "rule": RULE, "limit": 20, "progress": False} | options
    return verdict(pair, forget or questions("forget"), **options)


def assert_same(one, other):
    pd.testing.assert_frame_equal(one.table(), other.table())
    assert one.sentences() == other.sentences() and one.record() == other.record()
    for name, table in one.parts().items():
        pd.testing.assert_frame_equal(other.parts()[name], table, check_dtype=False)


def test_spike_ins_are_added_to_a_finished_run_once_and_read_back(attacks, tmp_path, capsys):
    plain = judged(out=tmp_path / "run")
    assert plain.spike_ins is None and load_verdict(tmp_path / "run").spike_ins is None
    assert json.loads((tmp_path / "run" / "verdict.json").read_text())["spike_ins"] is None
    assert len(attacks) == 1 and "invented" not in plain.page().partition("<script")[0]
    found = judged(out=tmp_path / "run", spike_ins=4)
    # The user's facts were attacked by the verdict; the invented people in the model, and in its copy.
    (_, whole), (invented, first), (again, second) = attacks
    assert whole == ["base", "unlearned", "control"] and first == second == ["unlearned"] and invented is again
    assert found.spike_ins.reason == "" and set(invented.groups) == set(found.spike_ins.people["name"])
    users = found.spike_ins.frame.query(f"facts == '{USER}' and stage == 'attacked'")
    theirs = found.results[1].frame.query("role == 'unlearned' and variant == 'as it is'")
    assert users["value"].tolist() == theirs["value"].tolist()
    # Everything else stays, and everything shows them.
    assert (found.label, found.score, found.signs) == (plain.label, plain.score, plain.signs)
    assert found.wall_time_s > plain.wall_time_s
    (line,) = found.spike_ins.sentences()
    assert line.startswith("In this model gentle brings back ")
    told = json.loads((tmp_path / "run" / "verdict.json").read_text())["spike_ins"]
    assert (told["n"], told["failed"], told["sentences"]) == (4, None, [line])
    assert line.partition(". ")[0] in (tmp_path / "run" / "verdict.html").read_text()
    assert set(found.figures()) == {"evidence", "standing", "spike_ins"} and "spike_ins" in found.tables()
    print_verdict(found)
    assert "In this model gentle brings back" in capsys.readouterr().out
    # Nothing is computed again.
    assert_same(load_verdict(tmp_path / "run").spike_ins, found.spike_ins)
    for options in ({"spike_ins": 4}, {}):
        assert_same(judged(out=tmp_path / "run", **options).spike_ins, found.spike_ins)
    load_verdict(tmp_path / "run").save(tmp_path / "elsewhere")
    assert_same(load_verdict(tmp_path / "elsewhere").spike_ins, found.spike_ins)
    with pytest.raises(InputError, match="`spike_ins` must be 4 in .*, which holds the spike-ins of so many.*got 6"):
        judged(out=tmp_path / "run", spike_ins=6)
    assert len(attacks) == 3


def test_a_killed_run_does_not_make_its_spike_ins_again(attacks, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("dissect.verdicts.run.judge", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            judged(out=tmp_path, spike_ins=4)
    assert len(attacks) == 3
    found = judged(out=tmp_path, spike_ins=4)
    assert len(attacks) == 3 and found.spike_ins.reason == ""


def test_a_model_that_learns_nobody_says_so_in_one_line_and_keeps_its_label(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(spiking, "spike_ins", partial(spike_ins, teaching=DEAF))
    label = judged(out=tmp_path).label
    found = judged(out=tmp_path, spike_ins=4)
    assert found.label == label == load_verdict(tmp_path).label
    (line,) = found.spike_ins.sentences()
    assert line.startswith("The spike-ins failed: after 8 steps of teaching the model answers") and "\n" not in line
    told = json.loads((tmp_path / "verdict.json").read_text())["spike_ins"]
    assert told["failed"] == line and told["numbers"] == []
    assert "The spike-ins failed: " in (tmp_path / "verdict.html").read_text().rpartition("<script")[2]
    assert set(found.figures()) == {"evidence", "standing"} and set(found.tables()) == {"evidence"}
    print_verdict(found)
    assert "The spike-ins failed: " in capsys.readouterr().out
    assert_same(load_verdict(tmp_path).spike_ins, found.spike_ins)


@pytest.mark.parametrize(
    ("grouped", "n", "line"),
    [
        (False, 4, "the `forget` prompts must name whom they ask about"),
        (True, 5000, "`spike_ins` must be at most"),
    ],
    ids=["no groups", "too many"],
)
def test_people_that_nobody_can_invent_are_one_line(grouped, n, line, tmp_path):
    forget = questions("forget")
    if not grouped:
        forget = replace(forget, items=tuple(replace(item, group="") for item in forget.items))
    run = open_run(tmp_path, {"command": "verdict"}, {})
    made = spiked(n, case_of(model("demo:npo"), n=20), [RESULT], {"gentle": len}, forget, run)
    (said,) = made.sentences()
    assert said.startswith("The spike-ins failed: ") and line in said and "\n" not in said
    again = read_spike_ins(tmp_path, run.record)
    assert (again.sentences(), again.n, again.scales(), again.summary()["failed"]) == ([said], n, [], said)


def test_ranks_among_written_distractors_are_not_compared_with_invented_people(monkeypatch):
    start = case_of(model("demo:npo"), n=20)
    written = replace(start.forget.prompts.items[0], wrong=(("nobody", (1, 2, 3)),))
    items = (written, *start.forget.prompts.items[1:])
    theirs = replace(start.forget, prompts=replace(start.forget.prompts, items=items))
    given = []
    monkeypatch.setattr(
        spiking, "spike_ins", lambda case, **options: given.append((case, options)) or SpikeIns.failed("", n=4)
    )
    for forget, control in ((start.forget, start.control), (theirs, start.control), (theirs, None)):
        case = replace(start, forget=forget, control=control)
        spiked(4, case, [RESULT], {"gentle": len}, questions("forget"), None)
    (_, plain), (case, again), (alone, unchanged) = given
    assert plain["found"] == unchanged["found"] == {"gentle": RESULT} and alone.forget is theirs
    assert again["found"] == {}
    assert all(other.answer in {item.answer for item in items} for other in case.forget.distractors[0])


def test_a_verdict_without_their_attacks_has_no_spike_ins_but_a_reason():
    found = spiked(4, case_of(model("demo:npo"), n=20), [], {}, questions("forget"), None)
    assert found.sentences() == [
        "The spike-ins failed: the verdict ran none of the attacks that can be done to them (gentle)"
    ]


@pytest.mark.parametrize(
    ("n", "line"),
    [(3, "`spike_ins` must be at least 4, got 3"), (-1, "at least 4, got -1"), (7, "must be even, got 7.*Give 8")],
)
def test_numbers_that_cannot_be_halved_are_refused(n, line):
    with pytest.raises(InputError, match=line):
        check_number(n)
    with pytest.raises(InputError, match=line):
        judged(spike_ins=n)
    check_number(None)
