"""The benchmark's files: the rule, and the report with its tables and figures."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
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
"""What the figure of scores shows."""


def fitted_rule(out: Path, architectures: Sequence[str], seeds: Iterable[int]) -> Rule:
    """The rule, fitted on these families.

    Raises:
        InputError: some of them were not tested.
    """
    families = [f"{architecture}-{seed}" for seed in seeds for architecture in architectures]
    models = read_measured(out, architectures, seeds)
    missing = sorted(set(families) - {f"{model.architecture}-{model.seed}" for model in models})
    if missing:
        raise InputError(f"{out}: no tested models of {', '.join(missing)} to fit the rule on; run their seeds first")
    return fit(models, {"families": families, "command": "python -m analyses.verdict_benchmark --fit FILE"})


def write_rule(rule: Rule, path: Path) -> None:
    """Write a rule as `dissect.verdicts.rule` reads it."""
    write_json(path, asdict(rule))


def write_report(
    out: Path,
    architectures: Sequence[str],
    calibration: Sequence[int],
    report: Sequence[int],
    rule: Rule,
    *,
    formats: Sequence[str],
) -> Rule:
    """Write tables and figures; returns the rule with the report's scores as its reference.

    Args:
        out: of the benchmark.
        architectures: of the families.
        calibration: seeds of the families that rivals' thresholds are chosen on; those that were tested.
        report: seeds of the families that the report is of.
        rule: that is held to the truth.
        formats: of the figures.
    """
    before, after = (read_measured(out, architectures, seeds) for seeds in (calibration, report))
    frame = reporting.judged(after, rule)
    rates, words, power = reporting.rates(before, after, rule), reporting.words(frame), reporting.power(frame)
    for name, table in (("judged", frame), ("rates", rates), ("words", words), ("power", power)):
        write_bytes(out / f"{name}.csv", table.to_csv(index=False).encode())
    families = sorted(set(frame["family"]))
    text = [
        f"Rule {rule.sha256[:12]}: the largest residual of {', '.join(rule.tests)}, from {rule.nothing:.2f} (nothing) "
        f"to {rule.everything:.2f} (everything), {rule.spread:.3f} from run to run; suppressed where the lower end is "
        f"above {rule.suppressed_above:.2f}, erased where the upper end is below {rule.erased_below:.2f}.",
        f"Reported on {', '.join(families)}: {len(frame)} models, {int(frame['collapsed'].sum())} of them broken.",
        _markdown(rates),
        _counts(reporting.right_words(frame)),
        "Without the never model: " + _counts(reporting.right_words(frame, said="word alone")),
        _markdown(words),
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
    """A table of Markdown, numbers with two decimals, three where the second says too little."""
    lines = [list(table.columns), ["---"] * len(table.columns)]
    lines += [[_cell(value) for value in row] for row in table.itertuples(index=False)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.3f}".rstrip("0").rstrip(".")
    return str(value)
