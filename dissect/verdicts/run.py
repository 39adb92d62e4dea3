"""Erased or suppressed? A budgeted battery of stress tests, and the frozen rule that turns it into an answer.

from dissect import load_pair, load_prompts, verdict

pair = load_pair("demo:base", "demo:npo")
forget = load_prompts("forget.json", pair.tokenizer)
found = verdict(pair, forget, budget="quick")
found.word, found.score, found.evidence()
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dissect import zoo
from dissect.models.model import Model
from dissect.models.pair import ModelPair
from dissect.prompts.loading import load_prompts
from dissect.prompts.prompts import Prompts
from dissect.stress.catalogue import BUDGETS, SAMPLE, Budget, selection
from dissect.stress.core.case import Case, make_case
from dissect.stress.core.lexical_overlap import lexical_overlap
from dissect.stress.core.result import StressResult
from dissect.stress.core.scores import score_answers
from dissect.stress.core.sharing import attacked
from dissect.stress.core.storage import as_parts, as_record, from_parts
from dissect.verdicts.result import COMMAND, Utility, Verdict, load_verdict
from dissect.verdicts.rule import Rule, frozen_rule, judge
from unlearning.common.errors import InputError, check_at_least
from unlearning.common.progress import Progress
from unlearning.common.renamed import renamed_arguments
from unlearning.common.runs import Run, computing, open_run, peak_memory_bytes

KNOWS = 0.5
"""A never model that gives this share of what the base gives, above chance, is no control."""


@renamed_arguments(never="control", n_facts="limit", facts="limit")
def verdict(
    pair: ModelPair,
    forget: Prompts,
    *,
    retain: Prompts | None = None,
    paraphrases: Prompts | None = None,
    benign: Prompts | None = None,
    control: str | Model | None = "auto",
    budget: Budget = "standard",
    limit: int | None = None,
    rule: Rule | None = None,
    batch_size: int = 64,
    seed: int = 0,
    out: str | Path | None = None,
    shared: str | Path | None = None,
    progress: bool = True,
) -> Verdict:
    """Was the knowledge erased from the parameters, or merely suppressed?

    Args:
        pair: base and unlearned, in memory.
        forget: questions about what was to be forgotten, with their answers.
        retain: questions about what was to stay; None takes the built-in ones where the base is built in. Without any,
            nothing is said of utility and the tests that need them are left out.
        paraphrases: other wordings of the forget questions; None takes the built-in ones where the base is built in.
        benign: questions that have nothing to do with them, to fine-tune on; None as for `paraphrases`.
        never: a model that never knew, from the base's trunk: a name or a loaded model, None for none, or `auto`, which
            knows the built-in pairs' own. Without one the tests are compared with chance where that is known, which is
            weaker: what training on the forget answers alone teaches is then taken for knowledge.
        budget: which tests: `quick`, `standard` or `full` (about 1, 2 and 7 minutes on the built-in pair, two cores).
        limit: most forget facts, and retain facts, that are asked, evenly spaced; by default 120, 240 or 400.
        rule: other numbers than the frozen ones.
        batch_size: most texts in one batch; no number depends on it.
        seed: of everything that is drawn.
        out: run directory to write to while computing; a killed run goes on from there.
        shared: directory to keep what tests give of base and never in, for the next unlearned model of theirs.
        progress: show a progress bar on stderr.

    Raises:
        InputError: an unknown budget, an unlearned model with the base's weights, a base that does not know the forget
            facts, a never model that does, forget prompts with one answer between them, and what `make_case` raises.
    """
    if budget not in BUDGETS:
        raise InputError(f"--budget {budget}: use {', '.join(BUDGETS)}")
    check_at_least("seed", seed, 0)
    check_at_least("batch_size", batch_size, 1)
    rule = rule or frozen_rule()
    if pair.base.sha256 == pair.unlearned.sha256:
        raise InputError(
            f"{pair.base.name} and {pair.unlearned.name} have the same weights: nothing was unlearned; name the "
            "checkpoint after unlearning as --unlearned"
        )
    retain = _built_in(pair, retain, "retain")
    paraphrases = _built_in(pair, paraphrases, "forget_paraphrased")
    benign = _built_in(pair, benign, "general")
    case = make_case(pair, forget, retain=retain, control=control, batch_size=batch_size, seed=seed)
    case = case.at_most(limit or SAMPLE[budget])
    chosen, not_run = selection(budget, case, paraphrases, benign)
    configuration = {
        "command": COMMAND,
        "base_sha256": pair.base.sha256,
        "unlearned_sha256": pair.unlearned.sha256,
        "control_sha256": case.control.sha256 if case.control else None,
        "forget_sha256": case.forget.sha256,
        "retain_sha256": case.retain.sha256 if case.retain else None,
        "paraphrases_sha256": paraphrases.sha256 if paraphrases else None,
        "benign_sha256": benign.sha256 if benign else None,
        "budget": budget,
        "n_facts": len(case.forget),
        "tests": list(chosen),
        "rule": rule.sha256,
        "dtype": pair.base.dtype,
        "device": pair.base.device.type,
        "seed": seed,
    }
    provenance = {
        "command": COMMAND,
        "base": pair.base.name,
        "unlearned": pair.unlearned.name,
        "control": case.control.name if case.control else None,
        "data": {"forget": forget.source, "retain": retain.source if retain else None},
    }
    run = None if out is None else open_run(out, configuration, provenance)
    if run is not None and run.is_complete:
        return load_verdict(run.path)
    ground = None if shared is None else Path(shared) / _of_base_and_control(configuration)
    results = []
    failed: dict[str, str] = {}
    with computing(run) as clock:
        kept, records = _kept(run)
        with Progress(len(chosen), "testing", show=progress) as bar:
            for name, entry in chosen.items():
                if name in records:
                    result = from_parts(records[name], kept)
                else:
                    try:
                        result = attacked(name, entry.runs[budget], case, None if entry.compares_models else ground)
                    except InputError as error:
                        failed[name] = str(error)
                        bar.advance(1)
                        continue
                    _keep(run, result, records)
                if result.test == "without_attack":
                    check_without_attack(result, case)
                results.append(result)
                bar.advance(1)
        utility = _utility(case, rule)
    guessed = None if case.control is not None else lexical_overlap(case.forget)
    word, score = judge(results, rule, utility=utility.share if utility else None, guessing=guessed)
    found = Verdict(
        word=word,
        score=score,
        utility=utility,
        results=results,
        not_run=not_run | failed,
        guessing=guessed,
        rule=rule,
        configuration=configuration,
        provenance=provenance,
        wall_time_s=clock.seconds,
        measured={"peak_memory_bytes": peak_memory_bytes()},
    )
    if run is not None:
        found.write(run)
    return found


def check_without_attack(result: StressResult, case: Case) -> None:
    """Check that there is something to be forgotten, and that the control never knew it.

    Args:
        result: of `dissect.stress.without_attack`.
        case: names the models.

    Raises:
        InputError: the base does not know the facts, or the never model does.
    """
    means = result.frame.groupby(["measure", "role"])["value"].mean()
    base_rank = result.frame.query("measure == 'rank' and role == 'base'").sort_values("example_index")
    if not _above_chance(base_rank):
        raise InputError(
            f"{case.pair.base.name} does not know the forget facts (it puts the right answer above "
            f"{means['rank', 'base']:.0%} of wrong ones, chance is 50 %): there is nothing to unlearn; name the model "
            "that knows as --base"
        )
    if case.control is None:
        return
    for measure, chance in (("rank", 0.5), ("probability", 0.0)):
        known = means[measure, "base"] - chance
        share = (means[measure, "control"] - chance) / known
        if share <= KNOWS:
            return
    raise InputError(
        f"{case.control.name} knows the forget facts ({share:.0%} of the base's probability of the answers): it is no "
        "control; name a model that was never trained on them, or --never none"
    )


def _above_chance(rows: pd.DataFrame) -> bool:
    from unlearning.common.bootstrap import Bootstrap

    found = Bootstrap(rows["group"].tolist()).mean(rows["value"].to_numpy(dtype=np.float64))
    return (found.low if np.isfinite(found.low) else found.value) > 0.5


def _built_in(pair: ModelPair, prompts: Prompts | None, name: str) -> Prompts | None:
    if prompts is not None or pair.base.name not in zoo.BUILTIN:
        return prompts
    return load_prompts(zoo.question_set(name), pair.tokenizer)


def _utility(case: Case, rule: Rule) -> Utility | None:
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
    """The name of a directory for what is the same for every unlearned model."""
    own = ("unlearned_sha256", "tests", "rule")
    # Earlier versions called the control `never`; with that name in the hash their directories are still found.
    renamed = {"control_sha256": "never_sha256"}
    decides = {renamed.get(name, name): value for name, value in configuration.items() if name not in own}
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]


def _kept(run: Run | None) -> tuple[dict[str, pd.DataFrame], dict[str, Mapping[str, Any]]]:
    """The finished tests of a run that was killed: their tables, and what is said of them."""
    if run is None:
        return {}, {}
    records = {record["test"]: record for record in run.record.get("tests", [])}
    return dict(run.parts()), records


def _keep(run: Run | None, result: StressResult, records: dict[str, Mapping[str, Any]]) -> None:
    if run is None:
        return
    for name, frame in as_parts(result).items():
        run.keep_part(name, frame)
    records[result.test] = as_record(result)
    run.note(tests=list(records.values()))
