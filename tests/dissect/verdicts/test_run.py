import hashlib
import json
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from dissect import InputError
from dissect.models.model import Model
from dissect.models.module_tree import with_values
from dissect.models.pair import ModelPair
from dissect.models.rewriting import rewritten
from dissect.stress import catalogue
from dissect.stress.catalogue import Entry, entries, selection
from dissect.stress.core.distractors import with_answer_of
from dissect.stress.core.result import StressResult, fact_rows, value_rows
from dissect.stress.core.scores import score_facts
from dissect.stress.lenses import logit_lens
from dissect.stress.without_attack import without_attack
from dissect.verdicts import checks
from dissect.verdicts import run as judging
from dissect.verdicts.result import load_verdict
from dissect.verdicts.rule import Rule, RuleEntry, frozen_rule
from dissect.verdicts.run import verdict
from dissect.verdicts.signs import NOT_TAKEN
from dissect.verdicts.tables import print_verdict
from tests.dissect.stress.constructed import case_of, model, questions

RULE = Rule(
    tests=(RuleEntry("logit_lens"),),
    needed=(RuleEntry("logit_lens"),),
    floor=0.0,
    ceiling=1.0,
    run_sd=0.01,
    not_unlearned_above=0.5,
    suppressed_above=0.1,
    margin=0.1,
    utility_floor=0.8,
    fitted={},
    reference={"erased": [0.0, 0.05], "suppressed": [0.4, 0.9]},
)

ALL_ENTRIES = catalogue.entries

HARMLESS = ("first attack", "second attack")


@pytest.fixture(autouse=True)
def two_tests(monkeypatch):
    """The cheapest test that reads, beside the answers as they are: the verdict's own work is what is tested here."""
    calls = []

    def counted(case):
        calls.append("logit_lens")
        return logit_lens(case, layers=[3])

    cheap = (
        Entry("without_attack", dict.fromkeys(catalogue.BUDGETS, without_attack)),
        Entry("logit_lens", dict.fromkeys(catalogue.BUDGETS, counted), compares_models=False),
        *(Entry(name, dict.fromkeys(catalogue.BUDGETS, partial(harmless, name))) for name in HARMLESS),
    )
    monkeypatch.setattr(catalogue, "entries", lambda *_: cheap)
    monkeypatch.setattr(catalogue, "SAMPLE", dict.fromkeys(catalogue.BUDGETS, 40))
    monkeypatch.setattr("dissect.verdicts.run.SAMPLE", dict.fromkeys(catalogue.BUDGETS, 40))
    return calls


def harmless(name, case):
    """An attack of level 4 that does nothing to any model."""
    scored = {role: score_facts(one, case.forget) for role, one in case.models.items()}
    rows = [(role, variant, scores) for role, scores in scored.items() for variant in ("", "as it is")]
    frame = fact_rows(case.forget, rows)
    return StressResult(test=name, level=4, measure="rank", frame=frame, proves="", settings={}, seconds=0.0)


def judged(name, forget=None, **options):
    unlearned = model(name) if isinstance(name, str) else name
    options = {"budget": "quick", "rule": RULE, "progress": False} | options
    return verdict(ModelPair(model("demo:base"), unlearned), forget or questions("forget"), **options)


def scaled(start: Model, factor: float) -> Model:
    """A model whose head is multiplied: other weights, the same order of tokens."""
    head = next(name for name in start.weights.all_names if name.startswith("lm_head"))
    values = {head: start.hf.get_parameter(head).data * factor}
    return Model.wrap(with_values(start.hf, values), start.tokenizer, name=f"{start.name} x {factor}")


@pytest.mark.parametrize("control", ["auto", None, "none"])
def test_a_base_by_another_name_is_not_unlearned(control):
    assert judged(scaled(model("demo:base"), 1.001), control=control).label == "not unlearned"


def test_what_is_left_in_the_middle_layers_is_suppressed():
    found = judged("demo:rmu")
    assert found.label == "suppressed" and found.score.low > 0.5
    assert any("evidence level reached is 1, decodable (logit_lens)" in sentence for sentence in found.sentences())
    assert "The label rests on logit_lens alone; without it the label would change." in found.advice()


def test_a_second_never_model_is_erased():
    """Here the control itself by another name: rho is 0 but for the head's scale, which no measure of ranks sees."""
    found = judged(scaled(model("demo:never"), 1.001))
    assert found.label == "erased"
    assert f"holds less than {found.score.high:.2f} of the facts, 95 %" in found.sentences()[0]
    said = " ".join(found.sentences())
    assert (
        "in the budget `quick`: logit_lens, first attack and second attack" in said
        and "An attack that was not tried" in said
    )
    assert f"Up to {found.score.high:.2f}" in said and "no more than in the control" in said


@pytest.mark.slow
def test_what_may_be_left_decides_what_is_called_erased(tmp_path):
    never = scaled(model("demo:never"), 1.001)
    wide = judged(never, rule=replace(RULE, run_sd=0.2))
    assert wide.label == "inconclusive" and 0.1 < wide.score.high < 0.6
    assert f"reaches from 0.00 to {wide.score.high:.2f}" in " ".join(wide.advice())
    assert "below the margin of 0.10 (option `margin`)" in " ".join(wide.advice())
    assert wide.needed is not None and wide.needed in " ".join(wide.advice())
    forgiving = judged(never, rule=replace(RULE, run_sd=0.2), margin=0.6, out=tmp_path)
    assert forgiving.label == "erased" and forgiving.score == wide.score and forgiving.rule.margin == 0.6
    assert load_verdict(tmp_path).sentences() == forgiving.sentences()
    with pytest.raises(InputError, match="holds another run"):
        judged(never, rule=replace(RULE, run_sd=0.2), out=tmp_path)
    for margin in (0.0, 1.0, -0.5, float("nan")):
        with pytest.raises(InputError, match="`margin` must be above 0 and below 1, got"):
            judged(never, margin=margin)


def test_a_broken_model_is_said_to_be_broken_first():
    broken = scaled(model("demo:never"), -1.0)
    found = judged(broken)
    assert found.utility.collapsed and found.label != "erased"
    assert found.sentences()[0].startswith(
        "Utility is lost: the model keeps only 0 % of the base's right answers to 40 retain"
    )


def test_without_a_never_model_it_says_so():
    found = judged("demo:rmu", control=None)
    assert found.label == "suppressed"
    assert found.evidence()["against"].tolist() == ["floor"] * 4
    assert "No control" in " ".join(found.sentences()) and "`control`" in " ".join(found.advice())
    assert "from 0 (no more than chance) to 1" in " ".join(found.sentences())
    drawn = found.figure()
    assert drawn.layout.xaxis.title.text.endswith("(attacked unlearned − chance) / (base − chance)")
    assert {note.text for note in drawn.layout.annotations} == {"chance", "base"}
    assert "no more than chance" in found.page() and "judged with a control and this model without" in found.page()


@pytest.mark.slow
def test_without_a_control_deranged_relearning_decides_too(monkeypatch):
    deciding = ("without_attack", "relearn_disjoint", "deranged_relearning")
    chosen = tuple(entry for entry in ALL_ENTRIES(None) if entry.name in deciding)
    monkeypatch.setattr(catalogue, "entries", lambda *_: chosen)
    found = judged("demo:npo", control=None, rule=None, limit=120)
    assert found.rule == frozen_rule(has_control=False)
    assert found.label == "suppressed" and set(map(str, found.score.used)) == set(map(str, found.rule.tests))
    said = " ".join(found.sentences())
    assert "so the score is relative to chance" in said and "option `strangers`" in said
    never = judged(scaled(model("demo:never"), 1.001), control=None, rule=None, limit=60)
    # Few people: chance alone gives the largest of four residuals .31 here, and the lower end allows for that.
    assert never.label == "inconclusive" and never.score.low < never.rule.suppressed_above


def test_strangers_are_for_cases_without_a_control(tmp_path):
    found = judged("demo:rmu", control=None, strangers=["demo:never"], out=tmp_path)
    assert "What other language models guess from the questions (demo:never) is the floor" in " ".join(
        found.sentences()
    )
    assert load_verdict(tmp_path).sentences() == found.sentences()
    with pytest.raises(InputError, match="holds another run"):
        judged("demo:rmu", control=None, out=tmp_path)
    with pytest.raises(InputError, match="`strangers` must be given without a control, got both"):
        judged("demo:rmu", strangers=["demo:never"])
    with pytest.raises(InputError, match="`strangers` must never have read .* got demo:base"):
        judged("demo:rmu", control=None, strangers=[model("demo:base")])


def test_a_verdict_is_saved_resumed_and_read_back(tmp_path, two_tests):
    out = tmp_path / "run"
    found = judged("demo:rmu", out=out)
    assert two_tests == ["logit_lens"]
    again = judged("demo:rmu", out=out)
    assert two_tests == ["logit_lens"]  # nothing was computed a second time
    for other in (again, load_verdict(out)):
        assert other.label == found.word and other.score == found.score and other.utility == found.utility
        assert other.evidence().drop(columns="seconds").equals(found.evidence().drop(columns="seconds"))
    written = json.loads((out / "verdict.json").read_text())
    assert written["verdict"] == "suppressed" and written["residual_knowledge"]["score"] == found.score.value
    assert [row["test"] for row in written["evidence"]] == ["without_attack", "logit_lens", *HARMLESS]
    with pytest.raises(InputError, match="holds another run: its hash of unlearned"):
        judged("demo:npo", out=out)


def kill_after_the_tests(monkeypatch, out):
    """Run a verdict that is interrupted when all its tests are done."""
    with monkeypatch.context() as patched:
        patched.setattr("dissect.verdicts.run._utility", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            judged("demo:rmu", out=out)


def test_a_killed_run_goes_on_after_its_last_test(tmp_path, monkeypatch, two_tests):
    out = tmp_path / "run"
    whole = judged("demo:rmu")
    kill_after_the_tests(monkeypatch, out)
    assert len(two_tests) == 2
    found = judged("demo:rmu", out=out)
    assert len(two_tests) == 2
    assert found.score == whole.score


@pytest.mark.slow
def test_a_table_that_was_cut_short_is_computed_again(tmp_path, monkeypatch, two_tests):
    out = tmp_path / "run"
    whole = judged("demo:rmu")
    kill_after_the_tests(monkeypatch, out)
    part = out / "parts" / "logit_lens--layers.parquet"
    part.write_bytes(part.read_bytes()[:100])
    assert len(two_tests) == 2
    with pytest.warns(UserWarning, match="layers.parquet: broken or cut short"):
        found = judged("demo:rmu", out=out)
    assert len(two_tests) == 3  # that test alone
    assert found.score == whole.score


def test_a_finished_run_is_read_before_anything_is_computed(monkeypatch, tmp_path):
    found = judged("demo:rmu", out=tmp_path)
    monkeypatch.setattr(judging, "in_canonical_form", lambda _: pytest.fail("computed again"))
    assert judged("demo:rmu", out=tmp_path).score == found.score
    with pytest.raises(InputError, match="holds another run: .*its seed is 0, not 1"):
        judged("demo:rmu", out=tmp_path, seed=1)


def test_bad_input_leaves_no_run_that_refuses_the_corrected_one(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(InputError, match="must not know the forget facts"):
        judged("demo:npo", control=scaled(model("demo:base"), 1.001), out=out)
    assert not out.exists()
    assert judged("demo:npo", out=out).label == load_verdict(out).label


def test_two_unlearned_models_share_what_base_and_never_give(tmp_path):
    alone = judged("demo:npo", control="demo:never")
    first = judged("demo:rmu", shared=tmp_path)
    found = judged("demo:npo", shared=tmp_path)
    assert 0 < alone.base_and_control_s < alone.wall_time_s and first.base_and_control_s > 0
    assert found.base_and_control_s == 0 == found.summary()["base_and_control_s"]
    assert found.score == alone.score
    assert found.evidence().drop(columns="seconds").equals(alone.evidence().drop(columns="seconds"))
    (kept,) = tmp_path.iterdir()
    judged("demo:npo", shared=tmp_path, limit=8)
    judged("demo:npo", shared=tmp_path, control=None)
    assert len(list(tmp_path.iterdir())) == 3  # other facts and another control share nothing with these
    assert kept.is_dir()


def test_the_page_needs_nothing_else_and_has_every_test():
    found = judged("demo:rmu")
    text = found.page()
    assert "suppressed" in text and "logit_lens" in text and "<script" in text
    assert "<script src=" not in text and "<link" not in text


def test_the_table_is_printed(capsys):
    print_verdict(judged("demo:rmu"))
    printed = capsys.readouterr().out
    assert "verdict: suppressed" in printed and "logit_lens *" in printed


def test_the_same_weights_are_refused():
    with pytest.raises(InputError, match="base.*unlearned.*same weights"):
        judged("demo:base")


def test_a_control_that_knows_is_refused():
    with pytest.raises(InputError, match="control.*must not know the forget facts"):
        judged("demo:npo", control=scaled(model("demo:base"), 1.001))


def another_run(seed: int, size: float = 0.5) -> Model:
    """A control that stands for another training run: the built-in one with noise on its third layer."""
    start, values = model("demo:never"), {}
    generator = torch.Generator().manual_seed(seed)
    for name in start.weights.all_names:
        if ".2." in name and start.hf.get_parameter(name).dim() == 2:
            weight = start.hf.get_parameter(name).data
            noise = torch.randn(weight.shape, generator=generator)
            values[name] = weight + size * weight.std() * noise
    return Model.wrap(with_values(start.hf, values), start.tokenizer, name=f"another run {seed}")


@pytest.mark.slow
def test_several_controls_are_compared_with_and_show_their_own_spread(tmp_path):
    rule = replace(RULE, run_sd=0.05)
    controls = [model("demo:never"), another_run(1), another_run(2)]
    found = judged("demo:rmu", control=controls, rule=rule, out=tmp_path / "run", shared=tmp_path / "shared")
    assert found.score.spread.n_controls == 3 and not found.score.spread.is_borrowed
    assert found.label == "suppressed" and found.provenance["control"] == "demo:never, another run 1, another run 2"
    assert "differences between the 3 controls" in " ".join(found.sentences())
    again = load_verdict(tmp_path / "run")
    assert again.score == found.score and again.signs == found.signs and again.sentences() == found.sentences()
    alone = judged("demo:rmu", rule=rule)
    assert "is borrowed from" in " ".join(alone.sentences())
    both = found.residuals["logit_lens"], alone.residuals["logit_lens"]
    assert both[0].rho != both[1].rho and both[0].run_variance is not None and both[1].run_variance is None
    shared = judged("demo:npo", control=controls, rule=rule, shared=tmp_path / "shared")
    assert shared.score.spread.n_controls == 3
    roles = set(shared.results[1].frame["role"])
    assert roles == {"base", "unlearned", "control", "control 2", "control 3"}


def test_a_control_from_another_start_is_refused():
    start = model("demo:never")
    torch.manual_seed(0)
    fresh = type(start.hf)(start.hf.config).eval()
    with pytest.raises(InputError, match="`control` must come from the base's pretrained model.*fresh.*cosine 0.0"):
        judged("demo:rmu", control=["demo:never", Model.wrap(fresh, start.tokenizer, name="fresh")])


def test_a_second_control_that_knows_is_refused():
    with pytest.raises(InputError, match="demo:base x 1.001 gives their answers"):
        judged("demo:npo", control=["demo:never", scaled(model("demo:base"), 1.001)])


def test_one_attack_that_took_hold_is_too_few_for_erased(monkeypatch):
    known = catalogue.entries()
    monkeypatch.setattr(catalogue, "entries", lambda *_: known[:-1])
    found = judged(scaled(model("demo:never"), 1.001))
    assert found.label == "inconclusive" and found.signs.attacks == HARMLESS[:1]
    wanted = "attacks of 2 different tests must have taken hold, and only first attack did."
    assert f"The score alone would allow `erased`, but {wanted}" in " ".join(found.sentences())


def test_an_attack_that_did_not_take_hold_is_said_to_say_nothing(monkeypatch, capsys, tmp_path):
    why = f"{NOT_TAKEN}: its own training loss did not fall"
    residual = StressResult.residual

    def failing(self, measure=None):
        found = residual(self, measure)
        return replace(found, rho=None, low=None, high=None, draws=None, reason=why) if "first" in self.test else found

    monkeypatch.setattr(StressResult, "residual", failing)
    found = judged(scaled(model("demo:never"), 1.001), out=tmp_path)
    assert found.label == "inconclusive" and found.signs.not_taken == {"first attack": why}
    assert "Did not take hold, and count neither for nor against: first attack." in " ".join(found.sentences())
    assert f"first attack says nothing about this model: {why}." in found.advice()
    written = json.loads((tmp_path / "verdict.json").read_text())
    assert written["signs"]["not_taken"] == {"first attack": why} and written["signs"]["attacks"] == ["second attack"]
    assert "did not take hold</td>" in found.page()
    print_verdict(found)
    assert "did not take hold" in capsys.readouterr().out
    assert load_verdict(tmp_path).signs == found.signs


def test_an_attack_that_wrecks_the_model_is_warned_of_wherever_it_is_shown(monkeypatch, capsys, tmp_path):
    def wrecking(case):
        rows = [
            {"role": role, "variant": "as it is", "loss_before": 2.0, "loss_after": 0.1, "utility": 0.3}
            for role in case.models
        ]
        return replace(harmless(HARMLESS[0], case), tables={"validity": pd.DataFrame(rows)})

    known = [entry for entry in catalogue.entries() if entry.name not in HARMLESS]
    wrecked = Entry(HARMLESS[0], dict.fromkeys(catalogue.BUDGETS, wrecking))
    monkeypatch.setattr(catalogue, "entries", lambda *_: (*known, wrecked))
    found = judged("demo:rmu", out=tmp_path)
    warning = "then answers only 30 % of the retain questions that it answered before"
    assert warning in found.page() and "Tried: as it is." in found.page()
    assert list(found.summary()["remarks"]) == [HARMLESS[0]] and warning in found.summary()["remarks"][HARMLESS[0]]
    assert json.loads((tmp_path / "verdict.json").read_text())["remarks"] == found.summary()["remarks"]
    print_verdict(load_verdict(tmp_path))
    assert warning in " ".join(capsys.readouterr().out.split())


def test_every_fact_is_shown_with_what_the_models_say(tmp_path):
    rule = replace(RULE, tests=(RuleEntry("first attack"),), needed=(RuleEntry("first attack"),))
    knowing, never = (scaled(model(f"demo:{name}"), 1.001) for name in ("base", "never"))
    found = judged(knowing, rule=rule, out=tmp_path / "run")
    facts = found.facts()
    items = questions("forget").items
    answers = {item.id: (item.prompt, item.answer) for item in items}
    assert [answers[row["id"]] for _, row in facts.iterrows()] == list(
        zip(facts["question"], facts["answer"], strict=True)
    )
    assert facts["came_back"].mean() > 0.8 and facts["control_too"].sum() <= 2
    assert (facts["text_base"] == facts["text_unlearned"]).all() and facts["text_attacked"].isna().all()
    assert (facts["text_control"] != facts["text_base"]).mean() > 0.5
    came_back = int(facts["came_back"].sum())
    assert f"Taken one by one, {came_back} of 40 facts came back under first attack (as it is)" in " ".join(
        found.sentences()
    )
    told = json.loads((tmp_path / "run" / "verdict.json").read_text())["facts"]
    assert (told["came_back"], told["tested"], told["attack"]) == (came_back, 40, "first attack")
    written = pd.read_parquet(tmp_path / "run" / "facts.parquet")
    pd.testing.assert_frame_equal(written, facts, check_dtype=False)
    pd.testing.assert_frame_equal(load_verdict(tmp_path / "run").facts(), facts)
    page = found.page()
    assert "<summary>2 of 2 variants took hold</summary>" in page
    told = json.loads((tmp_path / "run" / "verdict.json").read_text())["attacks"]
    assert {(row["test"], row["variant"], row["took_hold"]) for row in told} == {
        (n, "as it is", True) for n in HARMLESS
    }
    assert (
        f"<summary>{came_back} of 40 facts came back</summary>" in page and page.count("<tr><td>yes</td>") == came_back
    )
    assert judged(never, rule=rule).facts()["came_back"].mean() < 0.1


def test_a_base_that_does_not_know_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pair = ModelPair(model("demo:never"), model("demo:npo"))
    with pytest.raises(InputError, match="base.*must know the forget facts"):
        verdict(pair, questions("forget"), budget="quick", rule=RULE, control=None, progress=False)


def test_forget_prompts_without_variation_are_refused():
    prompts = questions("forget")
    same = replace(prompts, items=(prompts.items[0], replace(prompts.items[1], answer=prompts.items[0].answer)))
    with pytest.raises(InputError, match="all have one answer"):
        verdict(ModelPair(model("demo:base"), model("demo:npo")), same, budget="quick", rule=RULE, progress=False)


def test_facts_of_one_group_are_refused():
    prompts = questions("forget")
    one = replace(prompts, items=tuple(item for item in prompts.items if item.group == prompts.items[0].group))
    with pytest.raises(InputError, match="forget prompts must be of at least two groups"):
        judged("demo:npo", forget=one)


def two_groups(items):
    return [replace(item, group=f"group {number % 2}") for number, item in enumerate(items)]


def one_answer_for_most(items):
    """Give nine of ten questions of every kind (the end of their id) one answer."""
    kinds = {}
    for item in items:
        kinds.setdefault(item.id.partition("-")[2], []).append(item)
    return [
        with_answer_of(item, of_kind[0]) if number < 0.9 * len(of_kind) else item
        for of_kind in kinds.values()
        for number, item in enumerate(of_kind)
    ]


@pytest.mark.parametrize(
    ("facts", "reason"),
    [(two_groups, "at least 3 groups, got 2"), (one_answer_for_most, "answers that can be exchanged between groups")],
)
def test_facts_that_cannot_be_deranged_are_refused_where_no_control_is_given(facts, reason, two_tests):
    prompts = questions("forget")
    forget = replace(prompts, items=tuple(facts(prompts.items)))
    needs = replace(RULE, needed=(*RULE.needed, RuleEntry("deranged_relearning")))
    with pytest.raises(InputError, match=f"{reason}.* or a `control`, with which other tests decide$"):
        judged("demo:npo", forget=forget, rule=needs, control=None, limit=240)
    assert two_tests == []
    checks.check_derangement(case_of(model("demo:npo"), n=4), needs)  # has a control, with which none is needed
    checks.check_derangement(replace(case_of(model("demo:npo"), n=4), control=None), RULE)  # does not ask for any


def test_permuted_neurons_and_heads_change_nothing():
    found = judged("demo:rmu")
    again = judged(rewritten(model("demo:rmu"), seed=1, kinds=("neurons", "heads", "query heads")))
    assert again.label == found.label and again.score.value == pytest.approx(found.score.value, abs=0.02)
    assert again.utility == found.utility
    moved = again.provenance["canonical_form"]["moved"]["unlearned"]
    assert moved["neurons"] > 100 and "unlearned" not in found.provenance["canonical_form"]["moved"]


def test_too_few_facts_and_a_file_as_shared_are_refused(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(InputError, match="`limit` must be at least 4, got 3"):
        judged("demo:npo", limit=3)
    for path in (file, file / "in"):
        with pytest.raises(InputError, match="`shared` must be a directory"):
            judged("demo:npo", shared=path)


def test_facts_are_evenly_spaced_and_no_more_than_asked_for():
    found = judged("demo:rmu", limit=12)
    assert found.configuration["n_facts"] == 12
    frame = found.results[0].frame
    assert frame["example"].nunique() == 12 and frame["group"].nunique() == 12


def test_an_unknown_budget_is_refused():
    with pytest.raises(InputError, match="budget.*quick, standard or full.*tiny"):
        judged("demo:npo", budget="tiny")


def test_every_budget_has_what_a_smaller_one_has_and_says_what_is_left_out(monkeypatch):
    monkeypatch.setattr(catalogue, "entries", entries)
    case = case_of(model("demo:npo"), n=4)
    chosen = [set(selection(budget, case, None)[0]) for budget in catalogue.BUDGETS]
    assert chosen[0] < chosen[1] < chosen[2]
    runs, left_out = selection("full", replace(case, control=None, retain=None), None)
    assert "relearn_speed" in left_out and "control" in left_out["relearn_speed"]
    assert "own_direction" in left_out and "retain" in left_out["own_direction"]
    assert {"without_attack", "relearn_disjoint"} <= set(runs) and "relearn_benign" in left_out
    others = questions("retain")
    assert "relearn_benign" in selection("full", replace(case, control=None, retain=None), None, others)[0]


def test_a_registered_test_that_compares_models_gives_the_same_numbers_with_shared(monkeypatch, tmp_path):
    """Its value for base and control depends on the unlearned model, so it must not be taken from another pair."""

    def distance(case):
        means = {role: score_facts(one, case.forget).rank.mean() for role, one in case.models.items()}
        rows = [
            (role, "", {"rank": np.full(len(case.forget), mean - means["unlearned"] + (role == "base"))})
            for role, mean in means.items()
        ]
        frame = value_rows(case.forget, rows)
        return StressResult(test="distance", level=1, measure="rank", frame=frame, proves="", settings={}, seconds=0.0)

    known = catalogue.entries()
    registered = Entry("distance", dict.fromkeys(catalogue.BUDGETS, distance))
    monkeypatch.setattr(catalogue, "entries", lambda *_: (*known, registered))
    alone = judged("demo:npo")
    judged("demo:rmu", shared=tmp_path)
    shared = judged("demo:npo", shared=tmp_path)
    pd.testing.assert_frame_equal(shared.evidence().drop(columns="seconds"), alone.evidence().drop(columns="seconds"))
    assert not list(tmp_path.glob("*/distance*"))


def test_what_is_handed_out_is_a_copy():
    found = judged("demo:rmu")
    before = found.summary()
    for frame in (found.evidence(), found.results[0].frame, found.results[1].tables["layers"]):
        frame.loc[:, frame.select_dtypes("number").columns] = 100.0
    found.configuration["n_facts"] = found.provenance["base"] = None
    found.not_run["relearn_disjoint"] = "edited"
    found.results.clear()
    assert found.summary() == before and found.provenance["base"] == "demo:base"


def test_a_run_of_an_earlier_version_is_read(tmp_path):
    """Written with today's code, and renamed back to the names that earlier versions wrote."""
    found = judged("demo:rmu", out=tmp_path)
    record = json.loads((tmp_path / "run.json").read_text())
    told = record["verdict"]
    (tmp_path / "facts.parquet").unlink()
    told["word"], told["guessing"] = told.pop("label"), None
    del told["signs"], told["score"]["spread"]
    names = {"floor": "nothing", "ceiling": "everything", "run_sd": "spread", "not_unlearned_above": "expressed_above"}
    names["margin"] = "erased_below"
    told["rule"] = {names.get(name, name): value for name, value in told["rule"].items()}
    for test in record["tests"]:
        test["rung"] = test.pop("level")
    record["tests"][0] |= {"test": "expressed", "tables": []}
    record["never"] = record.pop("control")
    record["configuration"]["never_sha256"] = record["configuration"].pop("control_sha256")
    record["configuration"]["tests"][0] = "expressed"
    (tmp_path / "run.json").write_text(json.dumps(record))
    frame = pd.read_parquet(tmp_path / "results.parquet").rename(columns={"level": "rung"})
    frame["role"] = frame["role"].replace("control", "never")
    frame["test"] = frame["test"].replace("without_attack", "expressed")
    frame.to_parquet(tmp_path / "results.parquet")
    old = load_verdict(tmp_path)
    assert old.label == old.word == found.label and old.score == replace(found.score, spread=None)
    assert old.rule == found.rule and old.signs is None and "spread between" not in " ".join(old.sentences())
    assert old.evidence().equals(found.evidence()) and old.sentences()[0] == found.sentences()[0]
    assert old.facts()["question"].isna().all() and list(old.facts()["id"]) == list(found.facts()["id"])
    assert old.advice() == found.advice() and "suppressed" in old.page()
    assert old.provenance["control"] == "demo:never" and old.configuration == found.configuration


def test_old_names_of_arguments_are_accepted():
    with pytest.warns(DeprecationWarning, match="never.*control"):
        assert judged("demo:rmu", never=None, n_facts=8).configuration["n_facts"] == 8


def test_values_that_earlier_versions_shared_are_not_used() -> None:
    """They come from attacks on weights as they were written; the name of their directory was this hash."""
    configuration = {"base_sha256": "b", "unlearned_sha256": "u", "control_sha256": "c", "seed": 0, "rule": "r"}
    earlier = json.dumps({"base_sha256": "b", "never_sha256": "c", "seed": 0}, sort_keys=True)
    name = judging._of_base_and_control(configuration)
    assert name != hashlib.sha256(earlier.encode()).hexdigest()[:12]
    assert name == judging._of_base_and_control(configuration | {"unlearned_sha256": "other", "rule": "other"})
    assert name != judging._of_base_and_control(configuration | {"control_sha256": "other"})
