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
from analyses.verdict_benchmark.run_tests import REWRITTEN
from dissect.plotting import export_all
from dissect.verdicts.rule import Rule, Rules
from unlearning.common.errors import InputError
from unlearning.common.runs import write_bytes, write_json

IN_FIGURE = ("score", "score without control", "1 − UDS", "KRS, patching", "linear probe", "truth ratio")
"""Numbers in the figure of scores; those of tests that were not run are left out."""


def fitted_rules(out: Path, architectures: Sequence[str], seeds: Iterable[int]) -> Rules:
    """Fit the rules on some families.

    Args:
        out: Directory of the benchmark.
        architectures: Architectures of the families.
        seeds: Seeds of the families.

    Returns:
        The rules.

    Raises:
        InputError: Some of the families were not tested.
    """
    families = [f"{architecture}-{seed}" for seed in seeds for architecture in architectures]
    models = read_measured(out, architectures, seeds)
    missing = sorted(set(families) - {f"{model.architecture}-{model.seed}" for model in models})
    if missing:
        raise InputError(
            f"{out}: the rules cannot be fitted, because {', '.join(missing)} were not tested. Run their seeds first"
        )
    return fit(models, {"families": families, "command": "python -m analyses.verdict_benchmark --fit FILE"})


def write_rules(rules: Rules, path: Path) -> None:
    """Write the rules as `dissect.verdicts.rule` reads them.

    Args:
        rules: The rules.
        path: File to write.
    """
    write_json(path, rules.record())


def write_report(
    out: Path,
    architectures: Sequence[str],
    calibration: Sequence[int],
    report: Sequence[int],
    rules: Rules,
    *,
    formats: Sequence[str],
) -> Rules:
    """Write tables and figures.

    Args:
        out: Directory of the benchmark.
        architectures: Architectures of the families.
        calibration: Seeds of the families on which the rivals' thresholds are chosen; untested ones are skipped.
        report: Seeds of the families of the report.
        rules: The rules that are compared with the truth.
        formats: File formats of the figures: `html`, `pdf`, `svg`, `png`.

    Returns:
        The rules with the report's scores as their reference.
    """
    before, after = (read_measured(out, architectures, seeds) for seeds in (calibration, report))
    frame = reporting.judged(after, rules)
    tables = {"judged": frame, "rates": reporting.rates(before, after, rules)}
    text = [_said_of(rules.with_control, "With a control"), _said_of(rules.without_control, "Without a control")]
    rewritten = read_measured(out, architectures, report, kept=REWRITTEN)
    if rewritten:
        tables["moved"] = reporting.moved(frame, reporting.judged(rewritten, rules))
    families = sorted(set(frame["family"]))
    text += [
        f"Reported on {', '.join(families)}: {len(frame)} models, {int(frame['collapsed'].sum())} of them broken.",
        _markdown(tables["rates"]),
    ]
    for said, name in (("", "with"), (" without control", "without")):
        labels, power = reporting.labels(frame, column=f"label{said}"), reporting.power(frame, said=said)
        tables |= {f"labels-{name}-control": labels, f"power-{name}-control": power}
        text += [
            f"{name.capitalize()} a control: {_counts(reporting.right_labels(frame, column=f'label{said}'))}",
            _markdown(labels),
            _markdown(power),
            "Least share found in at least nine of ten: "
            + ", ".join(f"{method} {share}" for method, share in reporting.least_share(power).items()),
            f"The score is {reporting.score_error(frame, column=f'score{said}'):.2f} from the true share, root mean "
            "square.",
        ]
    if "moved" in tables:
        text.append(_said_of_rewritten(tables["moved"]))
    for name, table in tables.items():
        write_bytes(out / f"{name}.csv", table.to_csv(index=False).encode())
    write_bytes(out / "table.md", "\n\n".join(text).encode())
    shown = [name for name in IN_FIGURE if name in frame and frame[name].notna().any()]
    figures = {
        "scores": drawing.scores_figure(frame, rules.with_control, numbers=shown),
        "rates": drawing.rates_figure(tables["rates"]),
        "shares": drawing.shares_figure(tables["power-with-control"]),
    }
    export_all(out, figures, {}, formats=formats)
    return Rules(
        replace(rules.with_control, reference=dict(reporting.reference(frame))),
        replace(rules.without_control, reference=dict(reporting.reference(frame, column="score without control"))),
    )


def _said_of(rule: Rule, when: str) -> str:
    return (
        f"{when}, rule {rule.sha256[:12]}: the largest residual of {', '.join(map(str, rule.tests))}, on a scale from "
        f"{rule.floor:.2f} to {rule.ceiling:.2f}; standard deviation between training runs {rule.run_sd:.3f}; "
        f"suppressed if the lower end is above {rule.suppressed_above:.2f}, erased if the upper end is below "
        f"{rule.margin:.2f}."
    )


def _said_of_rewritten(moved: pd.DataFrame) -> str:
    """Return how far the verdicts of rewritten models are from those of the models as they are."""
    parts = []
    for said, name in (("", "with"), (" without control", "without")):
        others = moved[moved[f"label{said}"] != moved[f"label{said} rewritten"]]
        parts.append(
            f"{name} a control, {len(others)} labels differ and no score moves by more than "
            f"{moved[f'score{said} moved'].max():.4f}"
        )
    return (
        f"{len(moved)} of these models written otherwise at random: {'; '.join(parts)}; no residual of any test moves "
        f"by more than {moved['rho moved'].max():.4f}."
    )


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
