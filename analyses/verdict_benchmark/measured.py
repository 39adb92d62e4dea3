"""What the tests of the benchmark say of each model: the residuals that verdicts are made of, and rival numbers.

A rival is one number of a kind that papers quote, taken as they take it (a model by itself, or with the never model
where its definition has one) and turned so that higher is more knowledge.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from analyses.verdict_benchmark.constructions import constructions
from analyses.verdict_benchmark.families import TRUTH, Family, Kind
from analyses.verdict_benchmark.run_tests import read_results, read_tests
from dissect.stress.core.result import PLAIN, Residual, StressResult

COLLAPSED = 0.5
"""A model that gives less than this share of the retain answers is broken, and counted apart."""

EXPRESSED = 0.5
"""A model that still gives this share of the forget answers has not unlearned them."""

RELEARNING = ("relearn_disjoint", "relearn_benign")
OWN = ("without_attack", *RELEARNING)
"""What the verdict is made of."""


@dataclass(frozen=True, eq=False)
class Measured:
    """One judged model.

    Attributes:
        architecture: of its family.
        seed: of its family.
        name: of the model.
        made: how, as `verdict_constructions` calls it.
        kind: what it is by construction.
        share: of the forget facts in its weights by construction; None where only the making is known.
        forget: share of exact greedy answers to unseen wordings of the forget questions.
        retain: the same of the retain questions.
        residuals: of every test that gave a result, and of relearning's multiple-choice accuracy.
        alone: the same without the never model, of the verdict's own tests.
        rivals: single numbers, higher for more knowledge; NaN is no number.
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

    @property
    def collapsed(self) -> bool:
        """Whether it is broken."""
        return self.retain < COLLAPSED


def read_measured(out: Path, architectures: Iterable[str], seeds: Iterable[int]) -> list[Measured]:
    """The judged models of these families that were tested.

    Args:
        out: of the benchmark.
        architectures: of the families.
        seeds: of the families.
    """
    wanted = [(architecture, seed) for seed in seeds for architecture in architectures]
    found = []
    for architecture, seed in wanted:
        family = Family(architecture, seed, out / "models")
        made = {one.name: one.made for one in constructions(family)}
        for folder in sorted((out / "tests" / family.name).glob("*/")):
            record = read_tests(folder)
            path = family.path / folder.name / TRUTH
            if record is None or record["cka"] is None or not path.exists():
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
                    alone=_residuals({name: _alone(result) for name, result in results.items() if name in OWN}),
                    rivals=rivals(results, record["cka"]),
                )
            )
    return found


def _alone(result: StressResult) -> StressResult:
    """As if there had been no never model; true of tests that do the same to every model, with or without one."""
    return replace(result, frame=result.frame[result.frame["role"] != "control"])


def _residuals(results: Mapping[str, StressResult]) -> dict[str, Residual]:
    found = {name: result.residual() for name, result in results.items()}
    for name in RELEARNING:
        if name in results:
            found[f"{name}:accuracy"] = results[name].residual("accuracy")
    return found


def rivals(results: Mapping[str, StressResult], cka: float | None) -> dict[str, float]:
    """The single numbers of one model, by what a table calls them.

    Args:
        results: of all tests.
        cka: the CKA erasure score, lower for more knowledge.
    """
    found: dict[str, float] = {}
    for name, (test, take) in _RIVALS.items():
        found[name] = take(results[test]) if test in results else float("nan")
    found["1 − CKA erasure"] = float("nan") if cka is None else 1 - cka
    return found


def _mean(measure: str) -> Callable[[StressResult], float]:
    """Of the unlearned model, over facts; of all variants of the attack the highest."""

    def take(result: StressResult) -> float:
        frame = result.frame
        own = frame[(frame["role"] == "unlearned") & (frame["measure"] == measure)]
        means = own.groupby("variant")["value"].mean()
        return float(means.drop(PLAIN, errors="ignore").max() if len(means) > 1 else means.max())

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
    "1 − UDS without never": ("uds", _mean("uds_donor")),
    "1 − UDS, logit lens": ("uds", _mean("uds_lens")),
    "relearning": ("relearn_disjoint", _mean("rank")),
    "benign relearning": ("relearn_benign", _mean("rank")),
    "quantisation": ("quantisation", _mean("rank")),
}


def largest_residual(residuals: Mapping[str, Residual], entries: Sequence[str]) -> float:
    """Of those of a rule's entries that have one; NaN where none has."""
    found = [residuals[entry].rho for entry in entries if entry in residuals]
    return max((rho for rho in found if rho is not None), default=float("nan"))


def labelled(models: Sequence[Measured]) -> tuple[list[Measured], list[bool]]:
    """The models that hold all or nothing, and whether it is all; broken ones are left out.

    Base models by another order of data hold all, and are no question: they are left out too.
    """
    kept = [model for model in models if model.kind in ("erased", "suppressed") and not model.collapsed]
    return kept, [model.kind == "suppressed" for model in kept]
