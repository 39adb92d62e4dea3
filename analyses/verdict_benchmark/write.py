"""Write the benchmark's files: the rule, and the report with its tables and figures."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from analyses.verdict_benchmark import figures as drawing
from analyses.verdict_benchmark import report as reporting
from analyses.verdict_benchmark.fit_rule import fit
from analyses.verdict_benchmark.measured import read_measured
from dissect.plotting import export_all
from dissect.verdicts.rule import Rule
from unlearning.common.errors import InputError
from unlearning.common.runs import write_bytes, write_json

RIVALS = ("score", "1 − UDS", "KRS, patching", "linear probe")
"""Numbers in the figure of scores."""


def fitted_rule(out: Path, architectures: Sequence[str], seeds: Iterable[int]) -> Rule:
    """Fit the rule on some families.

    Args:
        out: Directory of the benchmark.
        architectures: Architectures of the families.
        seeds: Seeds of the families.

    Returns:
        The rule.

    Raises:
        InputError: Some of the families were not tested.
    """
    families = [f"{architecture}-{seed}" for seed in seeds for architecture in architectures]
    models = read_measured(out, architectures, seeds)
    missing = sorted(set(families) - {f"{model.architecture}-{model.seed}" for model in models})
    if missing:
        raise InputError(
            f"{out}: the rule cannot be fitted, because {', '.join(missing)} were not tested. Run their seeds first"
        )
    return fit(models, {"families": families, "command": "python -m analyses.verdict_benchmark --fit FILE"})


def write_rule(rule: Rule, path: Path) -> None:
    """Write a rule as `dissect.verdicts.rule` reads it.

    Args:
        rule: The rule.
        path: File to write.
    """
    write_json(path, rule.record())


def write_report(
    out: Path,
    architectures: Sequence[str],
    calibration: Sequence[int],
    report: Sequence[int],
    rule: Rule,
    *,
    formats: Sequence[str],
) -> Rule:
    """Write tables and figures.

    Args:
        out: Directory of the benchmark.
        architectures: Architectures of the families.
        calibration: Seeds of the families on which the rivals' thresholds are chosen; untested ones are skipped.
        report: Seeds of the families of the report.
        rule: The rule that is compared with the truth.
        formats: File formats of the figures: `html`, `pdf`, `svg`, `png`.

    Returns:
        The rule with the report's scores as its reference.
    """
    before, after = (read_measured(out, architectures, seeds) for seeds in (calibration, report))
    frame = reporting.judged(after, rule)
    rates, labels, power = reporting.rates(before, after, rule), reporting.labels(frame), reporting.power(frame)
    for name, table in (("judged", frame), ("rates", rates), ("labels", labels), ("power", power)):
        write_bytes(out / f"{name}.csv", table.to_csv(index=False).encode())
    families = sorted(set(frame["family"]))
    text = [
        f"Rule {rule.sha256[:12]}: the largest residual of {', '.join(map(str, rule.tests))}, on a scale from "
        f"{rule.floor:.2f} to {rule.ceiling:.2f}; standard deviation between training runs {rule.run_sd:.3f}; "
        f"suppressed if the lower end is above {rule.suppressed_above:.2f}, erased if the upper end is below "
        f"{rule.margin:.2f}.",
        f"Reported on {', '.join(families)}: {len(frame)} models, {int(frame['collapsed'].sum())} of them broken.",
        _markdown(rates),
        _counts(reporting.right_labels(frame)),
        "Without the control: " + _counts(reporting.right_labels(frame, column="label without control")),
        _markdown(labels),
        _markdown(power),
        "Least share found in at least nine of ten: "
        + ", ".join(f"{method} {share}" for method, share in reporting.least_share(power).items()),
        f"The score is {reporting.score_error(frame):.2f} from the true share, root mean square.",
    ]
    write_bytes(out / "table.md", "\n\n".join(text).encode())
    figures = {
        "scores": drawing.scores_figure(frame, rule, numbers=RIVALS),
        "rates": drawing.rates_figure(rates),
        "shares": drawing.shares_figure(power),
    }
    export_all(out, figures, {}, formats=formats)
    return replace(rule, reference=dict(reporting.reference(frame)))


def _counts(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in found.items())


def _markdown(table: pd.DataFrame) -> str:
    """Return a table in Markdown; numbers have at most three decimals."""
    lines = [list(table.columns), ["---"] * len(table.columns)]
    lines += [[_cell(value) for value in row] for row in table.itertuples(index=False)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.3f}".rstrip("0").rstrip(".")
    return str(value)
