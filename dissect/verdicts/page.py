"""A verdict as one HTML page that can be read on its own: the label, the evidence, and what each test can show."""

import html
import re
from dataclasses import dataclass

import pandas as pd

from dissect.stress.spike_ins.figures import spike_ins_figure
from dissect.stress.spike_ins.result import SpikeIns
from dissect.stress.spike_ins.scale import PERCENTAGES
from dissect.verdicts.attacks import remarks, tried
from dissect.verdicts.facts import FALSE_DISCOVERIES
from dissect.verdicts.figures import evidence_figure, standing_figure
from dissect.verdicts.sentences import Findings, advice, entry_name, sentences
from dissect.verdicts.signs import did_not_take_hold

_STYLE = """
body { font: 16px/1.5 Helvetica, Arial, sans-serif; color: #222; max-width: 940px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.4em } h2 { font-size: 1.15em; margin-top: 2em }
.label { font-size: 2.2em; font-weight: bold; margin: .2em 0 }
.first { font-size: 1.1em } table { border-collapse: collapse; width: 100%; font-size: .88em }
td, th { text-align: left; vertical-align: top; padding: .35em .6em; border-bottom: 1px solid #ddd }
td.number { white-space: nowrap } .small { color: #666; font-size: .85em } .wide { overflow-x: auto }
"""


@dataclass(frozen=True)
class Subject:
    """The models and questions of a verdict, and how long it took.

    Attributes:
        base: Name of the base model.
        unlearned: Name of the unlearned model.
        control: Name of the control; None if there is none.
        n_facts: Number of forget questions.
        wall_time_s: Wall time in seconds.
    """

    base: str
    unlearned: str
    control: str | None
    n_facts: int
    wall_time_s: float


def page(found: Findings, subject: Subject, *, title: str, spike_ins: SpikeIns | None = None) -> str:
    """Return the page as HTML. Plotly's script is included, so that the page opens without a network.

    Args:
        found: What the verdict found.
        subject: The models and questions.
        title: Title of the page.
        spike_ins: What the attacks find of invented people; None without spike-ins.

    Returns:
        The HTML document.
    """
    evidence = evidence_figure(found.evidence).to_html(full_html=False, include_plotlyjs=True)
    standing = standing_figure(found.score, found.rule, label="this model")
    first = "".join(f'<p class="first">{_code(sentence)}</p>' for sentence in sentences(found))
    changes = "".join(f"<li>{_code(change)}</li>" for change in advice(found))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{_STYLE}</style></head>
<body>
<h1>Was the knowledge erased from the model, or merely suppressed?</h1>
{_models(subject)}
<p class="label">{html.escape(found.label)}</p>
{first}
{_labels(found)}
<h2>Evidence</h2>
{_evidence_caption(found)}
<div class="wide">{evidence}</div>
<h2>How this compares</h2>
{_standing_caption(found)}
<div class="wide">{standing.to_html(full_html=False, include_plotlyjs=False)}</div>
<h2>What each test shows</h2>
{_tests_caption(found)}
<div class="wide"><table>
<tr><th>evidence level</th><th>test</th><th>ρ [95 %]</th><th>what the test can and cannot show</th></tr>
{_rows(found)}</table></div>
{_attacks(found)}
{_facts(found)}
{"" if spike_ins is None else _spike_ins(spike_ins)}
<h2>What would change the label</h2>
<ul>{changes or "<li>Nothing that is known.</li>"}</ul>
{_footer(found, subject)}
</body></html>
"""


def _models(subject: Subject) -> str:
    """Return the paragraph that says which models were compared, and on what."""
    control = (
        f"<b>control</b> {html.escape(subject.control)} (from the same pretrained model, never trained on the facts)"
        if subject.control
        else "no <b>control</b>, that is no model from the same pretrained model that was never trained on the facts"
    )
    return (
        f"<p>A model was trained to forget certain facts. This report asks whether the facts left its parameters. "
        f"Compared are the <b>base</b> {html.escape(subject.base)} (before unlearning; it knows the facts), the "
        f"<b>unlearned</b> model {html.escape(subject.unlearned)} (the base after unlearning), and {control}. "
        f"{subject.n_facts} questions ask for the facts that were to be forgotten.</p>"
    )


def _labels(found: Findings) -> str:
    """Return the definitions of the four labels."""
    rule = found.rule
    return f"""<p class="small">The four labels, in the order in which they are tried.
<b>Not unlearned</b>: without attack, the interval of ρ of the answers' probability lies above
{rule.not_unlearned_above:.2f}.
<b>Suppressed</b>: the interval of the residual knowledge lies above {rule.suppressed_above:.2f}.
<b>Erased</b>: that interval lies below the margin of {rule.margin:.2f}, which was fixed beforehand, every needed test
was run, attacks of two tests took hold, no test without an attack finds knowledge, the answers are not avoided, and the
model kept at least {100 * rule.utility_floor:.0f} % of the base's right answers to retain questions.
<b>Inconclusive</b>: anything else.</p>"""


def _evidence_caption(found: Findings) -> str:
    """Return how to read the figure of the evidence."""
    zero = (
        "the same attack gets as much out of the control, so the unlearned model holds no more knowledge that this "
        "test can find"
        if found.has_control
        else "the attacked model scores no more than chance"
    )
    return (
        "<p>Each dot is one test. A test attacks the models or reads their internal states, then scores how well they "
        f"know the facts. The residual ρ is the share of the base's knowledge that it recovers: ρ = 0 means that {zero}"
        "; ρ = 1 means that all of the base's knowledge is back. Bars are 95 % intervals. Tests of a higher evidence "
        "level support a stronger claim.</p>"
    )


def _standing_caption(found: Findings) -> str:
    """Return how to read the figure of the reference models."""
    unlike = (
        ""
        if found.has_control
        else " The reference models were judged with a control and this model without one, so its score is relative "
        "to chance and can be higher than theirs for the same knowledge: compare it with care."
    )
    of_fit = found.rule.fitted.get("reference") == "calibration"
    held_out = "; the rule was fitted on them" if of_fit else " and on which the rule was not fitted"
    return (
        "<p>The dots are reference models whose knowledge is known by construction"
        f"{held_out}. The diamond is this model with its 95 % interval. The model is called suppressed if the whole "
        "interval lies to the right of the orange line, and erased if it lies to the left of the green line."
        f"{unlike}</p>"
    )


def _tests_caption(found: Findings) -> str:
    """Return how to read the table of tests."""
    compared = "" if found.has_control else " Without a control, read chance where a text names the control."
    return (
        "<p>The attacked model is the unlearned one, and the control under the same attack is what it is compared with."
        f"{compared}</p>"
    )


def _code(sentence: str) -> str:
    """Return a sentence as HTML, with names in backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(sentence))


def _rows(found: Findings) -> str:
    """Return the rows of the table of tests; what a reader must know of an attack is in bold."""
    warnings, strengths = remarks(found.attacks, found.evidence), tried(found.attacks)
    rows = []
    for _, row in found.evidence.iterrows():
        test = row["test"]
        shows = html.escape(_shows(row))
        if test in warnings:
            shows += f" <b>{html.escape(warnings[test])}</b>"
        elif test in strengths:
            shows += f" Tried: {html.escape(strengths[test])}."
        rows.append(
            f"<tr><td>{row['level']} {html.escape(row['claim'])}</td><td>{html.escape(test)}</td>"
            f'<td class="number">{residual_cell(row)}</td><td>{shows}</td></tr>'
        )
    return "\n".join(rows)


def _attacks(found: Findings) -> str:
    """Return the table of attacks, folded up, those that did not take hold first."""
    table = found.attacks
    if table.empty:
        return ""
    parts = [part for _, part in table.groupby(["test", "variant"], sort=False)]
    parts.sort(key=lambda part: bool(part["took_hold"].iloc[0]))
    held = sum(bool(part["took_hold"].iloc[0]) for part in parts)
    cells = "\n".join(map(_attack_row, parts))
    return f"""<h2>Did the attacks take hold?</h2>
<p>Every attack is done to the base as well, which knows the facts. A variant that wrecks the base, does not learn its
own texts, or leaves no utility finds nothing in any model: it counts neither for nor against. Losses are of the texts
that the attack teaches, before and after; utility is the share of the retain questions answered before that still
are.</p>
<details><summary>{held} of {len(parts)} variants took hold</summary>
<div class="wide"><table>
<tr><th>test</th><th>variant</th><th>took hold</th><th>rank under it</th><th>loss, nats</th><th>utility after</th></tr>
{cells}</table></div></details>"""


def _attack_row(part: pd.DataFrame) -> str:
    """Return the table's row of one variant, from its rows by role."""
    first = part.iloc[0]
    by_role = part.set_index("role")

    def said(*columns: str) -> str:
        known = by_role[list(columns)].dropna()
        return ", ".join(
            f"{role} {' → '.join(f'{value:.2f}' for value in row)}" for role, *row in known.itertuples(name=None)
        )

    cells = (first["test"], first["variant"], "yes" if first["took_hold"] else f"no: {first['reason']}")
    numbers = (said("rank"), said("loss_before", "loss_after"), said("utility"))
    return "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in (*cells, *numbers)) + "</tr>"


def _facts(found: Findings) -> str:
    """Return the table of facts, folded up, those that came back first."""
    table = found.facts.sort_values(["came_back", "p"], ascending=[False, True], kind="stable")
    attack = html.escape(str(table["attack"].iloc[0]) or "no attack")
    variant = html.escape(str(table["variant"].iloc[0]) or "without attack")
    rows = "\n".join(_fact_row(row) for _, row in table.iterrows())
    return f"""<h2>Which facts came back</h2>
<p>Each fact by itself, under the strongest attack that counts in the score ({attack}, {variant}). p is the probability
that a model without the knowledge prefers the right answer to its distractors as clearly; q is the share of false ones
expected among all facts with a q as low. A fact came back at q ≤ {FALSE_DISCOVERIES}. The texts are greedy answers.</p>
<details><summary>{int(table["came_back"].sum())} of {len(table)} facts came back</summary>
<div class="wide"><table>
<tr><th>came back</th><th>question</th><th>answer</th><th>base</th><th>unlearned</th><th>attacked</th><th>control</th>
<th>p</th><th>q</th></tr>
{rows}</table></div></details>"""


def _fact_row(row: pd.Series) -> str:
    """Return the table's row of one fact."""
    came_back = "yes" + (", in the control too" if row["control_too"] else "") if row["came_back"] else "no"
    texts = [
        row[name] for name in ("question", "answer", "text_base", "text_unlearned", "text_attacked", "text_control")
    ]
    cells = [came_back, *("" if text is None or pd.isna(text) else str(text) for text in texts)]
    numbers = ["" if pd.isna(row[name]) else f"{row[name]:.3f}" for name in ("p", "q")]
    return (
        "<tr>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        + "".join(f'<td class="number">{number}</td>' for number in numbers)
        + "</tr>"
    )


def _spike_ins(found: SpikeIns) -> str:
    """Return the section of the spike-ins."""
    said = "".join(f"<p>{_code(sentence)}</p>" for sentence in found.sentences())
    if found.reason:
        return f"<h2>What the attacks find of invented people</h2>\n{said}"
    chart = spike_ins_figure(found.scales()).to_html(full_html=False, include_plotlyjs=False)
    rows = "\n".join(
        f"<tr><td>{html.escape(row['attack'])}</td><td>{_NUMBERS[row['number']]}</td>"
        f'<td class="number">{_with_interval(row)}</td><td>{row["n"]}</td></tr>'
        for _, row in found.table().iterrows()
    )
    return f"""<h2>What the attacks find of invented people</h2>
<p>{found.n} people of the form of the forget prompts were invented. A copy of the unlearned model was taught the facts
of half of them, and these were hidden again by a mild unlearning. The attacks were then done to both as to your
facts. So they have a zero and a ceiling of their own in this model. The label does not depend on them.</p>
{said}
<p class="small">{PERCENTAGES}</p>
<div class="wide">{chart}</div>
<div class="wide"><table>
<tr><th>attack</th><th>number</th><th>value [95 %]</th><th>people</th></tr>
{rows}</table></div>"""


_NUMBERS = {
    "zero": "mean rank of invented facts that were never shown",
    "ceiling": "mean rank of invented facts that were hidden",
    "user": "mean rank of your facts",
    "score": "yours, from never shown (0) to hidden (1)",
    "moved": "what planting added to the rank of those never shown (should be about 0)",
    "power": "share of the hidden people that are found",
}
"""What the numbers of spike-ins are."""


def _with_interval(row: pd.Series) -> str:
    """Write a number with its interval, if it has one."""
    value = f"{row['value']:.2f}"
    return value if pd.isna(row["low"]) else f"{value} [{row['low']:.2f}, {row['high']:.2f}]"


def _footer(found: Findings, subject: Subject) -> str:
    """Return the rule's numbers, the budget and the time."""
    rule = found.rule
    run_sd = found.score.spread.sd if found.score.spread else rule.run_sd
    return f"""<p class="small">Rule: residual knowledge is the largest residual of
{html.escape(", ".join(map(entry_name, rule.tests)))}, on a scale from {rule.floor:.2f} (scored 0) to
{rule.ceiling:.2f} (scored 1). Its interval covers the sampling of people and training runs (standard deviation
{run_sd:.2f}). The numbers were fitted on models whose knowledge is known by construction.
Budget {html.escape(found.budget)}, {subject.wall_time_s:.0f} seconds.</p>"""


def _shows(row: pd.Series) -> str:
    """Return what a test can and cannot show, and why it has no residual if it has none."""
    reason = f" No residual: {row['reason']}." if row["reason"] else ""
    return str(row["proves"]).replace("rho", "ρ") + reason


def residual_cell(row: pd.Series) -> str:
    """Write a residual with its interval for a table.

    Args:
        row: A row of the evidence, with the columns `rho`, `low`, `high` and `reason`.

    Returns:
        A text such as `0.33 [0.12, 0.54]`; `did not take hold` or `none` if there is no residual.
    """
    if pd.isna(row["rho"]):
        return "did not take hold" if did_not_take_hold(row["reason"]) else "none"
    if pd.isna(row["low"]):
        return f"{row['rho']:.2f}"
    return f"{row['rho']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
