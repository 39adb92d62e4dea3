"""Measure what a plan rests on: how residuals of models of known truth vary over people, facts and models.

    python -m analyses.verdict_benchmark.measure_spread dissect/verdicts/planning/spread.json

Plain models never knew the facts, in three orders of training, or were destroyed and distilled. Avoiding models learnt
a part of the people and were unlearned on all of them by NPO or DPO; which people they learnt is known. At a share of
none they are models that never knew, unlearned by the same method. Only calibration families are used.
"""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from jaxtyping import Float

from analyses.verdict_benchmark.command import CALIBRATION
from analyses.verdict_benchmark.constructions import DISTILLED, NEVER_KNEW, PART_METHODS, SHARES, constructions
from analyses.verdict_benchmark.families import Family
from analyses.verdict_benchmark.measured import without_control
from analyses.verdict_benchmark.recipes import part_of
from analyses.verdict_benchmark.run_tests import RECORD, read_results
from dissect.verdicts.planning.measure import FactResiduals, components, fact_residuals, groups_of
from dissect.verdicts.planning.populations import Population, Populations, section_name
from dissect.verdicts.rule import Rule, frozen_rule
from unlearning.common.errors import InputError
from unlearning.common.runs import write_json
from unlearning.common.terminal import run_app

PLAIN_MADE = (NEVER_KNEW, DISTILLED)
"""How plain models were made."""

COMMAND = "python -m analyses.verdict_benchmark.measure_spread FILE"

app = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)


def measured(families: Sequence[Family], out: Path, rule: Rule, *, has_control: bool) -> Populations:
    """Measure the populations on families whose models were built and tested.

    Args:
        families: The families.
        out: Directory of the benchmark.
        rule: The rule, whose entries are measured.
        has_control: Whether residuals are relative to the control, or to chance.

    Returns:
        The populations.
    """
    known, unknown, of_avoiding, of_plain = [], [], [], []
    for family in families:
        for made in constructions(family):
            if made.made in PLAIN_MADE:
                of_plain.append(_facts(family, made.name, out, rule, has_control=has_control))
        for method in PART_METHODS:
            nobody = _facts(family, f"never-{method}", out, rule, has_control=has_control)
            knowing, others = [], [nobody]
            for share in SHARES:
                facts = _facts(family, f"part-{share:g}-{method}", out, rule, has_control=has_control)
                knows = facts.group.isin(people_known(family, share))
                knowing.append(facts.of(knows))
                others.append(facts.of(~knows))
                rho = np.where(knows.to_numpy()[:, None], knowing[-1].rho, others[-1].rho)
                of_avoiding.append(components(facts.apart(rho), groups_of(facts)))
            of_avoiding.append(components(nobody.apart(), groups_of(nobody)))
            known.append(np.average([one.rho for one in knowing], axis=0, weights=[len(one.group) for one in knowing]))
            unknown.append([one.rho for one in others])
    # A model that never knew could be exchanged with its control, so that its mean residual is 0; against chance it is
    # not, since the strongest variant counts.
    nothing = np.zeros(len(rule.tests)) if has_control else np.mean([one.rho for one in of_plain], axis=0)
    of_known = np.array(known)
    return Populations(
        plain=_population(
            [0.0],
            of_known,
            np.broadcast_to(nothing, (len(of_known), 1, len(nothing))),
            [components(one.apart(), groups_of(one)) for one in of_plain],
        ),
        avoiding=_population([0.0, *SHARES], of_known, np.array(unknown), of_avoiding),
    )


def _population(
    shares: Sequence[float],
    known: Float[np.ndarray, "model entry"],
    unknown: Float[np.ndarray, "model share entry"],
    varying: Iterable[tuple[Float[np.ndarray, "entry entry"], Float[np.ndarray, "entry entry"]]],
) -> Population:
    between, within = (np.mean(several, axis=0) for several in zip(*varying, strict=True))
    return Population(np.array(shares), known, unknown, between, within)


def _facts(family: Family, name: str, out: Path, rule: Rule, *, has_control: bool) -> FactResiduals:
    """Return the facts of a model; all of the rule's entries must have a residual."""
    results = list(read_results(out / "tests" / family.name / name).values())
    found = fact_residuals(results if has_control else map(without_control, results), rule)
    if found.ours.shape[1] < len(rule.tests):
        raise InputError(f"{family.name}/{name}: an attack of the rule did not take hold, so it has no spread")
    return found


def people_known(family: Family, share: float) -> set[str]:
    """Return the names of the people that the partly taught base of a family learnt."""
    return {person.name for person in part_of(family.world, share).having("forget")}


def tested(out: Path, architectures: Iterable[str], seeds: Iterable[int]) -> list[Family]:
    """Return the families whose tests were run.

    Args:
        out: Directory of the benchmark.
        architectures: Their architectures.
        seeds: Their seeds.

    Raises:
        InputError: There are none.
    """
    families = [Family(architecture, seed, out / "models") for seed in seeds for architecture in architectures]
    found = [
        family
        for family in families
        if all((out / "tests" / family.name / one.name / RECORD).exists() for one in constructions(family))
    ]
    if not found:
        raise InputError(f"{out}: no family was tested. Run python -m analyses.verdict_benchmark first")
    return found


def record(families: Sequence[Family], out: Path) -> dict[str, Any]:
    """Return the file that ships with `dissect.verdicts.planning`.

    Args:
        families: The families to measure on.
        out: Directory of the benchmark.
    """
    sections = {}
    for has_control in (True, False):
        rule = frozen_rule(has_control=has_control)
        populations = measured(families, out, rule, has_control=has_control)
        names = list(map(str, rule.tests))
        sections[section_name(has_control=has_control)] = {"names": names, **populations.record()}
    n = sum(one.made in PLAIN_MADE for one in constructions(families[0])) + (len(SHARES) + 1) * len(PART_METHODS)
    return {
        "measured": {
            "command": COMMAND,
            "date": datetime.now(UTC).date().isoformat(),
            "families": [family.name for family in families],
            "models": n * len(families),
        },
        **sections,
    }


@app.command()
def command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File to write.")],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Directory of the benchmark, whose calibration families were tested.")
    ] = Path("runs/verdict-benchmark"),
    architectures: Annotated[str, typer.Option(metavar="LIST", help="llama, neox or both.")] = "llama,neox",
) -> None:
    """Measure the spread of residuals on the tested calibration families and write it to FILE."""
    families = tested(out, architectures.split(","), CALIBRATION)
    write_json(file, record(families, out))


if __name__ == "__main__":
    run_app(app, "python -m analyses.verdict_benchmark.measure_spread", None, interrupted="rerun the same command")
