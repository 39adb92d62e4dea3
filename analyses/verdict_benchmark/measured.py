"""What the benchmark's tests measure on each model: the residuals that verdicts are made of, and rival numbers.

A rival is one number of a kind that papers report, computed as they compute it (from the model alone, or with the
control if its definition has one) and oriented so that higher means more knowledge.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from analyses.verdict_benchmark.constructions import constructions
from analyses.verdict_benchmark.families import TRUTH, Family, Kind
from analyses.verdict_benchmark.run_tests import TESTED, read_results, read_tests
from dissect.stress.core.result import PLAIN, Residual, StressResult
from dissect.verdicts.rule import RuleEntry

COLLAPSED = 0.5
"""A model that gives less than this share of the retain answers is broken and counted separately."""

STILL_ANSWERS = 0.5
"""A model that gives more than this share of the forget answers has not unlearned them."""

RELEARNING = ("relearn_disjoint", "relearn_benign", "deranged_relearning")
OWN = ("without_attack", "logit_lens", *RELEARNING)
"""The tests that a verdict without a control also runs, with the floor of each."""


@dataclass(frozen=True, eq=False)
class Measured:
    """One judged model.

    Attributes:
        architecture: Architecture of its family.
        seed: Seed of its family.
        name: Name of the model.
        made: How it was made, as `analyses.verdict_benchmark.constructions` calls it.
        kind: What it is by construction.
        share: Share of the forget facts in its weights by construction; None if only the making is known.
        forget: Share of exact greedy answers to unseen wordings of the forget questions.
        retain: Share of exact greedy answers to unseen wordings of the retain questions.
        residuals: Residual of every test that gave a result, and of relearning's multiple-choice accuracy.
        alone: The same without the control, for the tests that have a floor without one.
        results: The results of the tests, which also hold the signs beside the score; empty where only residuals
            were kept.
        rivals: Single numbers, higher for more knowledge; NaN if there is none.
    """

    architecture: str
    seed: int
    name: str
    made: str
    kind: Kind
    share: float | None
    forget: float
    retain: float
    residuals: Mapping[str, Residual]
    alone: Mapping[str, Residual]
    rivals: Mapping[str, float]
    results: tuple[StressResult, ...] = ()

    @property
    def collapsed(self) -> bool:
        """Whether the model is broken."""
        return self.retain < COLLAPSED


def read_measured(
    out: Path, architectures: Iterable[str], seeds: Iterable[int], *, kept: str = TESTED
) -> list[Measured]:
    """Read the tested models of some families.

    Args:
        out: Directory of the benchmark.
        architectures: Architectures of the families.
        seeds: Seeds of the families.
        kept: Directory of the results: of the models as they are, or rewritten.

    Returns:
        One object per tested model.
    """
    wanted = [(architecture, seed) for seed in seeds for architecture in architectures]
    found = []
    for architecture, seed in wanted:
        family = Family(architecture, seed, out / "models")
        made = {one.name: one.made for one in constructions(family)}
        for folder in sorted((out / kept / family.name).glob("*/")):
            record = read_tests(folder)
            path = family.path / folder.name / TRUTH
            if record is None or not path.exists():
                continue
            truth = json.loads(path.read_text(encoding="utf-8"))
            results = read_results(folder)
            found.append(
                Measured(
                    architecture=architecture,
                    seed=seed,
                    name=folder.name,
                    made=made[folder.name],
                    kind=truth["kind"],
                    share=truth["share"],
                    forget=truth["answers"]["forget"],
                    retain=truth["answers"]["retain"],
                    residuals=_residuals(results),
                    alone=_residuals({name: without_control(results[name]) for name in OWN if name in results}),
                    rivals=rivals(results, record["cka"]),
                    results=tuple(results.values()),
                )
            )
    return found


def without_control(result: StressResult) -> StressResult:
    """Return the result without the rows of the control.

    It equals a result without a control for tests that treat every model alike, with or without a control.

    Args:
        result: The result of a test.

    Returns:
        The result without the control.
    """
    return replace(result, frame=result.frame[result.frame["role"] != "control"])


def _residuals(results: Mapping[str, StressResult]) -> dict[str, Residual]:
    """Return the residuals of all results, and those of relearning's accuracy."""
    found = {name: result.residual() for name, result in results.items()}
    for name in RELEARNING:
        if name in results:
            found[str(RuleEntry(name, "accuracy"))] = results[name].residual("accuracy")
    return found


def rivals(results: Mapping[str, StressResult], cka: float | None) -> dict[str, float]:
    """Return the single numbers of one model.

    Args:
        results: Results of all tests by name.
        cka: The CKA erasure score, lower for more knowledge; None if there is none.

    Returns:
        The numbers by their name in tables.
    """
    found: dict[str, float] = {}
    for name, (test, take) in _RIVALS.items():
        found[name] = take(results[test]) if test in results else float("nan")
    found["1 − CKA erasure"] = float("nan") if cka is None else 1 - cka
    return found


def _mean(measure: str) -> Callable[[StressResult], float]:
    """Return a function to the unlearned model's mean over facts, the highest over the variants of the attack."""

    def take(result: StressResult) -> float:
        frame = result.frame
        own = frame[(frame["role"] == "unlearned") & (frame["measure"] == measure)]
        means = own.groupby("variant")["value"].mean()
        return float(means.drop(PLAIN, errors="ignore").max() if len(means) > 1 else means.max())

    return take


def _of_permutation(column: str) -> Callable[[StressResult], float]:
    """Return a function to a number of the unlearned model's permutation test."""

    def take(result: StressResult) -> float:
        tests = result.tables["permutation"]
        return float(tests.loc[tests["role"] == "unlearned", column].iloc[0])

    return take


_RIVALS: Mapping[str, tuple[str, Callable[[StressResult], float]]] = {
    "answer probability": ("without_attack", _mean("probability")),
    "exact answers": ("without_attack", _mean("correct")),
    "truth ratio": ("without_attack", _mean("truth_ratio")),
    "paraphrases": ("rewording", _mean("rank")),
    "logit lens": ("logit_lens", _mean("rank")),
    "linear probe": ("linear_probes", _mean("rank")),
    "KRS, patching": ("patching", _mean("krs")),
    "KRS, restoration": ("restoration", _mean("krs")),
    "1 − UDS": ("uds", _mean("uds")),
    "1 − UDS without control": ("uds", _mean("uds_donor")),
    "1 − UDS, logit lens": ("uds", _mean("uds_lens")),
    "relearning": ("relearn_disjoint", _mean("rank")),
    "benign relearning": ("relearn_benign", _mean("rank")),
    "deranged relearning": ("deranged_relearning", _mean("rank")),
    "crossover": ("crossover", _of_permutation("effect")),
    "crossover, z": ("crossover", _of_permutation("z")),
    "quantisation": ("quantisation", _mean("rank")),
}


def largest_residual(residuals: Mapping[str, Residual], entries: Sequence[RuleEntry]) -> float:
    """Return the largest residual of a rule's entries.

    Args:
        residuals: Residuals by `TEST` or `TEST:MEASURE`.
        entries: Entries of the rule.

    Returns:
        The largest one; NaN if no entry has a residual.
    """
    found = [residuals[str(entry)].rho for entry in entries if str(entry) in residuals]
    return max((rho for rho in found if rho is not None), default=float("nan"))


def labelled(models: Sequence[Measured]) -> tuple[list[Measured], list[bool]]:
    """Choose the models that hold all of the knowledge or none; broken models are left out.

    Base models trained in another order hold all of the knowledge and pose no question, so they are left out as well.

    Args:
        models: The models to choose from.

    Returns:
        The chosen models, and for each whether it holds the knowledge.
    """
    kept = [model for model in models if model.kind in ("erased", "suppressed") and not model.collapsed]
    return kept, [model.kind == "suppressed" for model in kept]
