"""`spike_ins`: invent people, plant them in a copy of the unlearned model, and attack them and the user's facts."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace

import numpy as np
import pandas as pd

from dissect.models.pair import ModelPair
from dissect.prompts.prompts import Prompts
from dissect.stress.core.case import Case
from dissect.stress.core.distractors import N_DISTRACTORS, Facts
from dissect.stress.core.result import PLAIN, StressResult
from dissect.stress.core.scores import MEASURES
from dissect.stress.core.validity import invalid_variants
from dissect.stress.deranged import deranged_relearning
from dissect.stress.relearning import relearn_disjoint, same_exposure
from dissect.stress.spike_ins.invented import InventedPerson, invented_people
from dissect.stress.spike_ins.planting import Spiked, Teaching, facts_of, spike
from dissect.stress.spike_ins.result import PEOPLE, SpikeIns
from dissect.stress.spike_ins.scale import COLUMNS, COPY, HIDDEN, MODEL, NEVER_SHOWN, USER
from unlearning.common.errors import InputError, check_at_least
from unlearning.common.progress import Progress

N_PEOPLE = 20
"""Default number of invented people; half of them are taught and hidden."""

FEWEST = 4
"""Smallest number of invented people: the attack teaches half of a half and asks the rest."""

Attack = Callable[[Case], StressResult]

ATTACKS: Mapping[str, Attack] = {"relearn_disjoint": relearn_disjoint, "deranged_relearning": deranged_relearning}
"""The default attacks by name."""


def spike_ins(
    case: Case,
    *,
    n: int = N_PEOPLE,
    attacks: Mapping[str, Attack] | None = None,
    teaching: Teaching | None = None,
    found: Mapping[str, StressResult] | None = None,
    prompts: Prompts | None = None,
) -> SpikeIns:
    """Teach invented people to a copy of the unlearned model, hide them again, and attack them and the user's facts.

    Args:
        case: Models and facts; only the unlearned model is used.
        n: Number of invented people; half of them are taught and hidden, the others never shown.
        attacks: The attacks by name; each takes a case, and attacks the role `case.only`.
        teaching: How people are taught and hidden.
        found: Results of the same attacks on the user's facts by name, if they are known already.
        prompts: The prompts to invent people from, where the case holds only some of them; by default the case's.

    Returns:
        What the attacks found, or why the spike-ins failed.

    Raises:
        InputError: `n` is below `FEWEST`, no people can be invented (see `invented_people`), or an attack cannot be
            run on them.

    Examples:
        >>> from dissect import load_pair, load_prompts
        >>> from dissect.stress.core.case import make_case
        >>> from dissect.zoo import question_set
        >>> pair = load_pair("demo:base", "demo:npo", progress=False)
        >>> forget, retain = (load_prompts(question_set(name), pair.tokenizer) for name in ("forget", "retain"))
        >>> case = make_case(pair, forget, retain=retain)
        >>> spike_ins(case.at_most(120), n=20).sentences()  # doctest: +SKIP
    """
    started = time.perf_counter()
    check_at_least("n", n, FEWEST)
    teaching = teaching or Teaching()
    attacks = ATTACKS if attacks is None else attacks
    texts = [] if case.retain is None else [f"{item.prompt}\n{item.answer}" for item in case.retain.prompts.items]
    people = invented_people(prompts or case.forget.prompts, n, seed=case.seed, known=texts)
    set_of = {person.name: HIDDEN if number < n // 2 else NEVER_SHOWN for number, person in enumerate(people)}
    facts = facts_of(people, case)
    planted = [index for index, group in enumerate(facts.groups) if set_of[group] == HIDDEN]
    items = [facts.prompts.items[index] for index in planted]
    facts = same_exposure(facts, [f"{item.prompt} {item.answer}" for item in items])
    facts = Facts(facts.prompts, tuple(others[:N_DISTRACTORS] for others in facts.distractors))
    frames = [pd.DataFrame(columns=list(COLUMNS))]
    with Progress(1 + len(attacks), "spike-ins", show=case.progress) as bar:
        spiked = spike(case, facts.select(planted), teaching)
        bar.advance(1)
        for name, attack in attacks.items() if not spiked.reason else ():
            theirs = (found or {}).get(name) or attack(replace(case, only="unlearned"))
            rows = _rows_of(theirs).assign(facts=USER, model=MODEL)
            frames.append(pd.concat([rows, _invented_rows(attack, case, facts, set_of, spiked)]).assign(attack=name))
            bar.advance(1)
    return SpikeIns(
        frame=pd.concat(frames[1:] or frames, ignore_index=True)[list(COLUMNS)],
        stages=spiked.stages,
        people=people_table(people, set_of),
        settings={"n": n, "attacks": list(attacks), "teaching": asdict(teaching)},
        seconds=time.perf_counter() - started,
        seed=case.seed,
        reason=spiked.reason,
    )


def people_table(people: Sequence[InventedPerson], set_of: Mapping[str, str]) -> pd.DataFrame:
    """Return one row per invented fact with the columns `PEOPLE`.

    Args:
        people: The invented people.
        set_of: Their set by name, `hidden` or `never shown`.

    Returns:
        The table.
    """
    rows = [(set_of[person.name], person.name, prompt, answer) for person in people for prompt, answer in person.facts]
    return pd.DataFrame(rows, columns=list(PEOPLE))


def _invented_rows(attack: Attack, case: Case, facts: Facts, set_of: Mapping[str, str], spiked: Spiked) -> pd.DataFrame:
    """Attack the model and its copy, and return the rows of the invented people."""
    frames = []
    for model, unlearned in ((MODEL, case.pair.unlearned), (COPY, spiked.hidden)):
        pair = ModelPair(spiked.taught, unlearned)
        one = replace(
            case, pair=pair, control=None, further_controls=(), given=None, strangers=(), forget=facts, only="unlearned"
        )
        rows = _rows_of(attack(one))
        frames.append(rows.assign(facts=rows["group"].map(set_of), model=model))
    found = pd.concat(frames)
    ranked = found[(found["measure"] == MEASURES[0]) & found["value"].notna()]
    people = ranked.groupby(["facts", "model"])["group"].nunique()
    if min(people.get((name, model), 0) for name in (HIDDEN, NEVER_SHOWN) for model in (MODEL, COPY)) < FEWEST // 2:
        raise InputError(
            "too few of the invented people have answers that the right one can be compared with. Invent more (`n`)"
        )
    return found


def _rows_of(result: StressResult) -> pd.DataFrame:
    """Return the rows of a result's unlearned model before and under its strongest variant, with their `stage`.

    Only variants that took hold can be the strongest, if there are any.
    """
    frame = result.frame
    frame = frame[frame["role"] == "unlearned"]
    decides = frame[(frame["measure"] == result.measure) & (frame["variant"] != PLAIN)]
    means = decides.groupby("variant")["value"].mean().fillna(0.0)
    valid = means.drop(labels=list(invalid_variants(result)), errors="ignore")
    strongest = (means if valid.empty else valid).idxmax()
    rows = frame[frame["variant"].isin([PLAIN, strongest])]
    return rows.assign(stage=np.where(rows["variant"] == PLAIN, "before", "attacked"))
