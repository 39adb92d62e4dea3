"""A verdict as one HTML page that needs nothing else: the answer, the figures, and what each test can prove."""

import html
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from dissect.scoring.tidy import pair_title
from dissect.verdicts.figures import evidence_figure, standing_figure
from dissect.verdicts.sentences import advice, entry_name, sentences
from unlearning.common.runs import write_bytes

if TYPE_CHECKING:
    from dissect.verdicts.result import Verdict


if TYPE_CHECKING:
    from dissect.verdicts.result import Verdict

_STYLE = """
body { font: 16px/1.5 Helvetica, Arial, sans-serif; color: #222; max-width: 940px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.4em } h2 { font-size: 1.15em; margin-top: 2em }
.word { font-size: 2.2em; font-weight: bold; margin: .2em 0 }
.first { font-size: 1.1em } table { border-collapse: collapse; width: 100%; font-size: .88em }
td, th { text-align: left; vertical-align: top; padding: .35em .6em; border-bottom: 1px solid #ddd }
td.number { white-space: nowrap } .small { color: #666; font-size: .85em }
"""


def write_page(verdict: "Verdict", path: Path) -> None:
    """Write the page whole.

    Raises:
        InputError: the disk is full or the place cannot be written to.
    """
    write_bytes(path, page(verdict).encode())


def page(verdict: "Verdict") -> str:
    """The page's HTML; plotly's script is in it, so that it opens without a network."""
    evidence = verdict.evidence()
    figures = [
        evidence_figure(evidence).to_html(full_html=False, include_plotlyjs=True),
        standing_figure(verdict.score, verdict.rule, label="this model").to_html(
            full_html=False, include_plotlyjs=False
        ),
    ]
    said, changes = sentences(verdict), advice(verdict)
    names = pair_title(verdict.provenance)
    control = verdict.provenance.get("control")
    beyond = "the same test finds in a model that never knew" if control else "guessing gives"
    rows = "\n".join(
        "<tr>"
        + f"<td>{row['level']} {html.escape(row['claim'])}</td><td>{html.escape(row['test'].replace('_', ' '))}</td>"
        + f'<td class="number">{residual_cell(row)}</td><td>{html.escape(row["proves"] + _because(row))}</td></tr>'
        for _, row in evidence.iterrows()
    )
    rule = verdict.rule
    tests = ", ".join(map(entry_name, rule.tests))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(verdict.title)}</title><style>{_STYLE}</style></head>
<body>
<h1>Was the knowledge erased, or merely suppressed?</h1>
<p>{html.escape(names)}{html.escape(f", control {control}" if control else ", no control")}</p>
<p class="word">{html.escape(verdict.word)}</p>
{"".join(f'<p class="first">{html.escape(sentence)}</p>' for sentence in said)}
<h2>Evidence</h2>
<p>Each dot is one test: how much of the base's knowledge comes back or can be read, beyond what
{beyond}. Bars are 95 % intervals. Higher rungs are stronger claims.</p>
{figures[0]}
<h2>How this compares</h2>
<p>Dots are models whose truth is known by construction and that the rule was not fitted on. An interval that lies
wholly to the right of the orange line is called suppressed, one that lies wholly to the left of the green line erased.
</p>
{figures[1]}
<h2>What each test shows</h2>
<table><tr><th>rung</th><th>test</th><th>ρ [95 %]</th><th>what it can and cannot prove</th></tr>
{rows}</table>
<h2>What would change the answer</h2>
<ul>{"".join(f"<li>{html.escape(change)}</li>" for change in changes) or "<li>Nothing that is known.</li>"}</ul>
<p class="small">Rule: the largest residual of {html.escape(tests)}, on a scale from {rule.nothing:.2f} (nothing) to
{rule.everything:.2f} (everything), its interval over people and over training runs (standard deviation
{rule.spread:.2f}); suppressed where the lower end is above {rule.suppressed_above:.2f}, erased where the upper end is
below {rule.erased_below:.2f}. Budget {html.escape(verdict.configuration["budget"])},
{verdict.wall_time_s:.0f} seconds.</p>
</body></html>
"""


def _because(row: pd.Series) -> str:
    return f" No residual: {row['reason']}." if row["reason"] else ""


def residual_cell(row: pd.Series) -> str:
    """A residual with its interval; `none` where there is no residual."""
    if pd.isna(row["rho"]):
        return "none"
    if pd.isna(row["low"]):
        return f"{row['rho']:.2f}"
    return f"{row['rho']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
