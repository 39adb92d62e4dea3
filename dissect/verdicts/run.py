"""`verdict`: run a budget of stress tests on a pair, and apply the frozen rule to their residuals."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from dissect import zoo
from dissect.models.model import Model
from dissect.models.outside import check_parameters_only
from dissect.models.pair import ModelPair
from dissect.prompts.loading import load_prompts
from dissect.prompts.overlap import without_shared
from dissect.prompts.prompts import Prompts, check_loaded
from dissect.stress.catalogue import BUDGETS, SAMPLE, Budget, Entry, Run, selection
from dissect.stress.core.canonical_case import in_canonical_form
from dissect.stress.core.case import Case, make_case
from dissect.stress.core.result import StressResult
from dissect.stress.core.scores import score_answers, score_facts
from dissect.stress.core.sharing import attacked
from dissect.stress.core.storage import as_parts, as_record, from_parts, has_parts
from dissect.stress.core.strangers import facts_read_by, guessed_by, raised
from dissect.stress.spike_ins.result import SpikeIns
from dissect.verdicts.checks import DERANGED, check_derangement, check_same_start, check_without_attack, with_strangers
from dissect.verdicts.facts import QUESTIONS
from dissect.verdicts.planning.needs import needed_for
from dissect.verdicts.result import COMMAND, Verdict, load_verdict
from dissect.verdicts.rule import Rule, Utility, frozen_rule, judge, with_margin
from dissect.verdicts.signs import WITHOUT_ATTACK
from dissect.verdicts.spiked import check_number, holds_all, spiked
from unlearning.common.errors import InputError, check_at_least
from unlearning.common.progress import Progress
from unlearning.common.renamed import renamed_arguments
from unlearning.common.runs import Run as RunDirectory
from unlearning.common.runs import computing, is_run, open_run, peak_memory_bytes

_OF_OTHERS = "base_and_control_s"
"""In the record of a finished test: seconds that it spent on base and control."""

MINIMUM = 4
"""Smallest number of facts that `limit` may leave."""


@renamed_arguments(never="control", benign="general", n_facts="limit", facts="limit")
def verdict(
    pair: ModelPair,
    forget: Prompts,
    *,
    retain: Prompts | None = None,
    paraphrases: Prompts | None = None,
    general: Prompts | None = None,
    control: str | Model | Sequence[str | Model] | None = "auto",
    strangers: Sequence[str | Model] = (),
    budget: Budget = "standard",
    limit: int | None = None,
    margin: float | None = None,
    rule: Rule | None = None,
    batch_size: int = 64,
    seed: int = 0,
    out: str | Path | None = None,
    shared: str | Path | None = None,
    spike_ins: int | None = None,
    progress: bool = True,
) -> Verdict:
    """Decide whether knowledge was erased from the parameters or merely suppressed.

    Args:
        pair: Base and unlearned model, in memory.
        forget: Questions about what was to be forgotten, with their answers.
        retain: Questions about what was to stay. None takes the built-in ones for a built-in base; for another base,
            utility is then not measured, and tests that need retain questions are left out.
        paraphrases: Other wordings of the forget questions. None takes the built-in ones for a built-in base.
        general: General questions, related to neither the forget nor the retain questions, to fine-tune on. None takes
            the built-in ones for a built-in base, and the retain questions for another base.
        control: A model never trained on the forget facts, from the base's pretrained model: a loaded model, a name or
            path, a list of several, `auto` (the control of a built-in pair, if any), or `none` or None for no control.
            With two or more, the spread between training runs is also estimated from their differences. Without a
            control, tests are compared with chance where it is known, and deranged relearning decides beside relearning
            on other facts. What a question gives away then counts as knowledge.
        strangers: Without a control: other language models, loaded or by name or path, that never read about the
            subjects, with any tokenizer. What they guess from the questions is then the floor in place of chance.
        budget: `quick`, `standard` or `full`: about 1, 2 and 7 minutes on the built-in pair and two cores.
        limit: Use at most this many forget facts and as many retain facts, evenly spaced; at least 4. None takes
            120, 240 or 400, by budget.
        margin: Share of the base's knowledge below which a remainder does not matter, above 0 and below 1, chosen
            beforehand: the model is called erased only if the upper end of the score is below it. None takes the
            rule's, .10.
        rule: Another rule than the frozen one.
        batch_size: Maximum number of texts in one batch; no number depends on it.
        seed: Random seed of everything that is drawn.
        out: Run directory, written during the computation; an interrupted run is resumed from it.
        shared: Directory that keeps the tests' values for base and control, for the next unlearned model of the same
            base and control.
        spike_ins: Also invent so many people, an even number of at least 4, such as 20, and plant half of them in a
            copy of the unlearned model (`dissect.stress.spike_ins`). No label depends on them. A finished run in `out`
            gets them added; no test is run again.
        progress: Whether to show a progress bar on stderr.

    Returns:
        The label with its evidence.

    Raises:
        InputError: The budget is unknown, the margin is not between 0 and 1, the two models have the same weights, the
            base does not know the forget facts, a control does or comes from another pretrained model, two controls
            have the same weights, strangers are given beside a control or are the pair's own models, all forget prompts
            have the same answer or are of one group, a model is streamed or cannot be compared with the base, a model
            keeps something outside its parameters that can hold knowledge (`dissect.models.outside`), the prompts do
            not fit the models, `out` holds another run, `shared` is a file, or `spike_ins` is odd or below 4.

    Examples:
        >>> from dissect import load_pair, load_prompts, verdict
        >>> from dissect.zoo import question_set
        >>> pair = load_pair("demo:base", "demo:npo", progress=False)
        >>> prompts = load_prompts(question_set("forget"), pair.tokenizer)
        >>> found = verdict(pair, prompts, budget="quick", progress=False)  # doctest: +SKIP
        >>> found.label  # doctest: +SKIP
        'suppressed'
    """
    if budget not in BUDGETS:
        raise InputError(f"`budget` must be {', '.join(BUDGETS[:-1])} or {BUDGETS[-1]}, got {budget}")
    check_at_least("seed", seed, 0)
    check_at_least("batch_size", batch_size, 1)
    if limit is not None:
        check_at_least("limit", limit, MINIMUM)
    check_number(spike_ins)
    if shared is not None and any(path.is_file() for path in (Path(shared), *Path(shared).parents)):
        raise InputError(f"`shared` must be a directory, got {shared}, which is a file or in a file")
    if pair.base.sha256 == pair.unlearned.sha256:
        raise InputError(
            f"`base` and `unlearned` must be different models, but {pair.base.name} and {pair.unlearned.name} have the "
            "same weights. Give the checkpoint after unlearning as `unlearned`"
        )
    retain = _built_in(pair, retain, "retain")
    case = make_case(pair, forget, retain=retain, control=control, batch_size=batch_size, seed=seed)
    rule = with_margin(rule or frozen_rule(has_control=case.control is not None), margin)
    case = with_strangers(case, strangers)
    questions = _questions(pair, forget, paraphrases, general)
    named = check_parameters_only(case.models)
    case = case.at_most(limit or SAMPLE[budget])
    check_derangement(case, rule)
    chosen, not_run = selection(budget, case, questions.paraphrases, questions.general)
    configuration = _configuration(case, questions, budget, chosen, rule)
    if out is not None and is_run(Path(out)) and holds_all(open_run(out, configuration, {}), spike_ins):
        return load_verdict(out)
    canonical = in_canonical_form(case)
    check_same_start(canonical.case)
    provenance = {
        "command": COMMAND,
        "base": pair.base.name,
        "unlearned": pair.unlearned.name,
        "control": ", ".join(model.name for model in case.controls) or None,
        "strangers": [model.name for model in case.strangers],
        "data": {"forget": forget.source, "retain": retain.source if retain else None},
        "outside_parameters": list(named),
        "canonical_form": {"moved": canonical.moved, "not_fixed": canonical.unproven},
    }
    run = None if out is None else open_run(out, configuration, provenance)
    plant = partial(
        spiked,
        spike_ins,
        replace(canonical.case, progress=progress),
        tests={name: entry.runs[budget] for name, entry in chosen.items()},
        prompts=forget,
        run=run,
    )
    if run is not None and run.is_complete:
        return _with_spike_ins(load_verdict(run.path), plant, run)
    ground = None if shared is None else Path(shared) / _of_base_and_control(configuration)
    tests = {name: _sharing(entry, budget, ground) for name, entry in chosen.items()}
    independent = {name for name, entry in chosen.items() if not entry.compares_models}
    try:
        with computing(run) as clock:
            ran = _run_tests(tests, canonical.case, run, independent=independent, progress=progress)
            results = _above_guesses(ran.results, case)
            utility = _utility(case, rule)
            planted = plant(results)
    except InputError:
        if run is not None:
            run.abandon()
        raise
    label, score, signs = judge(results, rule, utility=utility.share if utility else None)
    found = Verdict(
        label=label,
        score=score,
        utility=utility,
        signs=signs,
        results=results,
        not_run=not_run | ran.failed,
        rule=rule,
        needed=_needed(results, rule) if label == "inconclusive" else None,
        questions=pd.DataFrame(
            [(item.id, item.group, item.prompt, item.answer) for item in case.forget.prompts.items],
            columns=list(QUESTIONS),
            dtype=object,
        ),
        spike_ins=planted,
        configuration=configuration,
        provenance=provenance,
        wall_time_s=clock.seconds,
        base_and_control_s=ran.base_and_control_s,
        measured={"peak_memory_bytes": peak_memory_bytes()},
    )
    if run is not None:
        found.write(run)
    return found


def _with_spike_ins(
    found: Verdict, plant: Callable[[Sequence[StressResult]], SpikeIns | None], run: RunDirectory
) -> Verdict:
    """Add spike-ins to a finished run that has none."""
    with computing(run) as clock:
        found.spike_ins = plant(found.results)
    found.wall_time_s = clock.seconds
    found.write(run)
    return found


@dataclass(frozen=True)
class Questions:
    """Further questions that some tests use.

    Attributes:
        paraphrases: Other wordings of the forget questions; None if there are none.
        general: General questions to fine-tune on; None if there are none.
    """

    paraphrases: Prompts | None
    general: Prompts | None


def _questions(pair: ModelPair, forget: Prompts, paraphrases: Prompts | None, general: Prompts | None) -> Questions:
    """Return the further questions, the built-in ones for None and a built-in base.

    Raises:
        InputError: A set is not loaded, or all general prompts are forget prompts.
    """
    found = Questions(_built_in(pair, paraphrases, "forget_paraphrased"), _built_in(pair, general, "general"))
    for name, prompts in (("paraphrases", found.paraphrases), ("general", found.general)):
        if prompts is not None:
            check_loaded(prompts, name)
    return found if found.general is None else replace(found, general=without_shared(forget, found.general, "general"))


def _needed(results: Sequence[StressResult], rule: Rule) -> str | None:
    """Return what it would take to decide; None if no attack took hold or all facts are of one group."""
    try:
        return needed_for(results, rule).text
    except InputError:
        return None


def _configuration(
    case: Case, questions: Questions, budget: Budget, chosen: Mapping[str, Entry], rule: Rule
) -> dict[str, Any]:
    """Return everything that the numbers depend on."""
    base = case.pair.base
    # Named only where there are several controls, so that directories of runs with one control are still found.
    further = {"further_controls_sha256": [model.sha256 for model in case.further_controls]}
    further = further if case.further_controls else {}
    if case.strangers:
        further["strangers_sha256"] = [model.sha256 for model in case.strangers]
    return {
        "command": COMMAND,
        "base_sha256": base.sha256,
        "unlearned_sha256": case.pair.unlearned.sha256,
        "control_sha256": case.control.sha256 if case.control else None,
        "forget_sha256": case.forget.sha256,
        "retain_sha256": case.retain.sha256 if case.retain else None,
        "paraphrases_sha256": questions.paraphrases.sha256 if questions.paraphrases else None,
        "general_sha256": questions.general.sha256 if questions.general else None,
        "budget": budget,
        "n_facts": len(case.forget),
        "tests": list(chosen),
        "rule": rule.sha256,
        "dtype": base.dtype,
        "device": base.device.type,
        "seed": case.seed,
    } | further


def _sharing(entry: Entry, budget: Budget, ground: Path | None) -> Run:
    """Return the test of a budget; with a directory, base and control are attacked only once for all verdicts."""
    return lambda case: attacked(entry.name, entry.runs[budget], case, ground, compares_models=entry.compares_models)


def _above_guesses(results: Sequence[StressResult], case: Case) -> list[StressResult]:
    """Return the results with the floors that strangers set; deranged relearning has its own already."""
    guessed = guessed_by(
        case.strangers,
        lambda stranger: score_facts(stranger, facts_read_by(stranger, case.forget), batch_size=case.batch_size),
    )
    return [
        result if result.test == DERANGED else replace(result, floors=raised(result.floors, guessed))
        for result in results
    ]


@dataclass(frozen=True, eq=False)
class _Ran:
    """What came of the tests.

    Attributes:
        results: The results.
        failed: The reason by name for each test that could not be run.
        base_and_control_s: Wall seconds spent on base and control in tests whose values `shared` keeps.
    """

    results: list[StressResult]
    failed: dict[str, str]
    base_and_control_s: float


def _run_tests(
    tests: Mapping[str, Run], case: Case, run: RunDirectory | None, *, independent: Set[str], progress: bool
) -> _Ran:
    """Run the tests, or read those that an interrupted run has finished.

    Args:
        tests: The tests by name.
        case: Models and facts.
        run: The open run directory that keeps every finished test; None to keep none.
        independent: Names of the tests whose values for base and control do not depend on the unlearned model.
        progress: Whether to show a progress bar on stderr.

    Returns:
        The results, and which tests could not be run.

    Raises:
        InputError: The base does not know the facts or a control does; nothing is kept then.
    """
    results: list[StressResult] = []
    failed: dict[str, str] = {}
    parts = {} if run is None else dict(run.parts())
    records = {} if run is None else {record["test"]: record for record in run.record.get("tests", [])}
    records = {name: record for name, record in records.items() if has_parts(record, parts)}
    total = 0.0
    with Progress(len(tests), "testing", show=progress) as bar:
        for name, test in tests.items():
            seconds: dict[str, float] = {}
            try:
                result = from_parts(records[name], parts) if name in records else test(replace(case, seconds=seconds))
            except InputError as error:
                if name == WITHOUT_ATTACK:  # there is no label without it
                    raise
                failed[name] = str(error)
                bar.advance(1)
                continue
            if result.test == WITHOUT_ATTACK:
                check_without_attack(result, case)
            if name not in records:
                of_others = sum(spent for role, spent in seconds.items() if role != "unlearned")
                records[name] = as_record(result) | {_OF_OTHERS: of_others}
                if run is not None:
                    for part, frame in as_parts(result).items():
                        run.keep_part(part, frame)
                    run.note(tests=list(records.values()))
            # Tests that search a strength keep their values for base and control by themselves.
            if name in independent or "tried" in result.settings:
                total += records[name].get(_OF_OTHERS, 0.0)
            results.append(result)
            bar.advance(1)
    return _Ran(results, failed, round(total, 3))


def _built_in(pair: ModelPair, prompts: Prompts | None, name: str) -> Prompts | None:
    """Return the prompts; for None and a built-in base, return the built-in question set of that name."""
    if prompts is not None or pair.base.name not in zoo.BUILTIN:
        return prompts
    return load_prompts(zoo.question_set(name), pair.tokenizer)


def _utility(case: Case, rule: Rule) -> Utility | None:
    """Measure how much of the retained knowledge is left; None if the base answers no retain question."""
    if case.retain is None:
        return None
    prompts = case.retain.prompts
    base, unlearned = (
        score_answers(model, prompts, prompts.items, batch_size=case.batch_size)[1] == 1
        for model in (case.pair.base, case.pair.unlearned)
    )
    if not base.any():
        return None
    share = float((base & unlearned).sum() / base.sum())
    return Utility(share=share, n=int(base.sum()), collapsed=share < rule.utility_floor)


def _of_base_and_control(configuration: Mapping[str, Any]) -> str:
    """Return the name of the directory for everything that is the same for all unlearned models."""
    own = ("unlearned_sha256", "tests", "rule")
    decides = {name: value for name, value in configuration.items() if name not in own}
    # Values of earlier versions, which attacked weights as they were written, must not be mixed with those of now.
    decides["attacks"] = "canonical forms"
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
