"""Compare a plan with verdicts: what it predicts for so many people, and the labels that scores get.

    python -m analyses.verdict_benchmark.check_plan

People are drawn from the stored results of models of known truth, without replacement, and the rule scores them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer
from jaxtyping import Float

from analyses.verdict_benchmark.command import CALIBRATION
from analyses.verdict_benchmark.constructions import PART_METHODS, SHARES, constructions
from analyses.verdict_benchmark.families import Family
from analyses.verdict_benchmark.measure_spread import PLAIN_MADE, tested
from analyses.verdict_benchmark.measured import without_control
from analyses.verdict_benchmark.run_tests import read_results
from dissect.stress.core.result import StressResult
from dissect.verdicts.planning.populations import shipped
from dissect.verdicts.planning.simulation import Design, ends
from dissect.verdicts.rule import Rule, frozen_rule, residual_knowledge, residuals_of
from unlearning.common.terminal import run_app

PEOPLE = (8, 16, 24)
"""Numbers of people that are drawn."""

DRAWS = 4
"""Draws of people from each model."""

app = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Cell:
    """Verdicts that one prediction is compared with.

    Attributes:
        what: What the models are.
        share: Share of the facts that they hold.
        models: Family and name of each.
    """

    what: str
    share: float
    models: tuple[tuple[Family, str], ...]


def cells(families: Sequence[Family]) -> Iterator[Cell]:
    """Yield the models without the knowledge, and those with each share of it."""
    made = [(family, one) for family in families for one in constructions(family)]
    yield Cell("knows nothing", 0.0, tuple((family, one.name) for family, one in made if one.made in PLAIN_MADE))
    for share in SHARES:
        names = [f"part-{share:g}-{method}" for method in PART_METHODS]
        found = tuple((family, name) for family in families for name in names)
        yield Cell(f"holds {share:.1%}, others avoided", share, found)


def of_people(result: StressResult, people: Sequence[str]) -> StressResult:
    """Return the result of some people."""
    return replace(result, frame=result.frame[result.frame["group"].isin(people)])


def shares_of_labels(
    low: Float[np.ndarray, " verdict"], high: Float[np.ndarray, " verdict"], rule: Rule
) -> dict[str, float]:
    """Return how often a score alone gives each label."""
    suppressed, erased = low > rule.suppressed_above, high < rule.margin
    found = {"suppressed": suppressed, "inconclusive": ~suppressed & ~erased, "erased": erased & ~suppressed}
    return {name: float(which.mean()) for name, which in found.items()}


def compared(cell: Cell, people: int, out: Path, rule: Rule, *, controls: int) -> dict[str, object]:
    """Return one row: what was observed with so many people, and what the plan predicts.

    Args:
        cell: The models.
        people: Number of people.
        out: Directory of the benchmark.
        rule: The rule.
        controls: 1, or 0 without the control.
    """
    lows, highs = [], []
    tests = {entry.test for entry in rule.tests}
    for number, (family, name) in enumerate(cell.models):
        results = [one for one in read_results(out / "tests" / family.name / name).values() if one.test in tests]
        results = results if controls else [without_control(one) for one in results]
        everybody = sorted(results[0].frame["group"].unique())
        generator = np.random.default_rng(number)
        for _ in range(DRAWS if people < len(everybody) else 1):
            drawn = generator.choice(everybody, size=people, replace=False).tolist()
            score = residual_knowledge(residuals_of([of_people(one, drawn) for one in results], rule), rule)
            if score.low is not None and score.high is not None:
                lows.append(score.low)
                highs.append(score.high)
    models = shipped(rule, has_control=controls > 0)
    population = models.avoiding if cell.share else models.plain
    facts = results[0].frame["example_index"].nunique() * people // len(everybody)
    predicted = ends(Design(people, facts, controls), population, rule, share=cell.share)
    found = np.array(lows), np.array(highs)
    row: dict[str, object] = {"models": cell.what, "people": people, "controls": controls, "verdicts": len(lows)}
    for said, (low, high) in (("observed", found), ("predicted", predicted)):
        row |= {f"{name}, {said}": share for name, share in shares_of_labels(low, high, rule).items()}
        row |= {f"low, {said}": float(np.median(low)), f"high, {said}": float(np.median(high))}
    return row


@app.command()
def command(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Directory of the benchmark.")] = Path(
        "runs/verdict-benchmark"
    ),
    architectures: Annotated[str, typer.Option(metavar="LIST", help="llama, neox or both.")] = "llama,neox",
    seeds: Annotated[str, typer.Option(metavar="LIST", help="Seeds of the families.")] = ",".join(
        map(str, CALIBRATION)
    ),
) -> None:
    """Print what plans predict for the models of known truth beside what their scores say."""
    families = tested(out, architectures.split(","), map(int, seeds.split(",")))
    rows = []
    for controls in (1, 0):
        rule = frozen_rule(has_control=controls > 0)
        rows += [compared(cell, people, out, rule, controls=controls) for cell in cells(families) for people in PEOPLE]
    typer.echo(pd.DataFrame(rows).round(2).to_csv(index=False))


if __name__ == "__main__":
    run_app(app, "python -m analyses.verdict_benchmark.check_plan", None, interrupted="rerun the same command")
