"""The terminal output of `dissect verdict`, on stdout."""

import pandas as pd
from rich import box
from rich.table import Column, Table
from rich.text import Text

from dissect.scoring.tidy import pair_title
from dissect.stress.spike_ins.scale import PERCENTAGES
from dissect.verdicts.attacks import remarks
from dissect.verdicts.page import residual_cell
from dissect.verdicts.planning.plan import Plan
from dissect.verdicts.result import Verdict
from unlearning.common.errors import with_flags
from unlearning.common.terminal import console

_FLAGS = {name: f"--{name}" for name in ("budget", "control", "margin", "retain")} | {
    "spike_ins": "--spike-ins",
    "strangers": "--stranger",
}
"""Flags of the arguments that the advice names."""


def print_verdict(verdict: Verdict) -> None:
    """Print the label in sentences, the evidence, what wrecked models, and what would change the label."""
    out = console()
    provenance = verdict.provenance
    control = provenance.get("control")
    names = f"{pair_title(provenance)}, " + (f"control {control}" if control else "no control")
    out.print(names, highlight=False, soft_wrap=True, markup=False)
    out.print(Text.assemble("\nverdict: ", (verdict.label, "bold"), "\n"))
    for sentence in verdict.sentences():
        out.print(with_flags(sentence, _FLAGS), highlight=False, markup=False)
    out.print(_evidence_table(verdict))
    found = verdict.findings
    for test, remark in remarks(found.attacks, found.evidence).items():
        out.print(f"- {test}: {remark}", highlight=False, markup=False)
    others = verdict.base_and_control_s
    if others is not None and others >= 1:
        out.print(
            f"- base and control took {others:.0f} of {verdict.wall_time_s:.0f} seconds, which --shared saves the next "
            "unlearned model",
            highlight=False,
            markup=False,
        )
    if verdict.spike_ins is not None:
        for sentence in verdict.spike_ins.sentences():
            out.print(with_flags(sentence, _FLAGS), highlight=False, markup=False)
        if not verdict.spike_ins.reason:
            out.print(f"{PERCENTAGES}\n", highlight=False, markup=False, style="dim")
    for line in verdict.advice():
        out.print(f"- {with_flags(line, _FLAGS)}", highlight=False, markup=False)


def print_plan(plan: Plan) -> None:
    """Print what a verdict on so many people with so many controls can decide."""
    out = console()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"margin {plan.margin:.2f}", title_justify="left")
    headings = "groups, facts, controls, upper end, margin met, called erased, false alarm, share found, others avoided"
    for heading in headings.split(", "):
        table.add_column(heading, justify="right")
    for row in plan.rows:
        counts = (str(row.people), str(row.facts), str(row.controls))
        chances = (f"{row.power:.0%}", f"{row.false_alarm:.0%}")
        shares = ("none" if n is None else f"{n:.0%}" for n in (row.smallest_share, row.smallest_share_avoiding))
        table.add_row(*counts, f"{row.high:.2f}", f"{row.margin_met:.2f}", *chances, *shares)
    table.caption = (
        "upper end: median, of a model that knows nothing; margin met: with 90 % power; called erased: probability at "
        "this margin; false alarm: probability that it is called suppressed; share found: smallest, with 90 % power; "
        "others avoided: the same where unlearning pushed the other answers below chance"
    )
    out.print(table)
    for sentence in plan.sentences():
        out.print(with_flags(sentence, _FLAGS), highlight=False, markup=False)


def _evidence_table(verdict: Verdict) -> Table:
    """Return the evidence as a table, one row per test."""
    table = Table(
        Column("evidence level", max_width=14),
        Column("test", no_wrap=True),
        Column("rho [95 %]", no_wrap=True, justify="right"),
        Column("strongest variant"),
        Column("s", justify="right"),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    before = None
    for _, row in verdict.evidence().iterrows():
        level = f"{row['level']} {row['claim']}"
        counts = " *" if row["counts"] else ""
        table.add_row(
            level if level != before else "",
            f"{row['test']}{counts}",
            residual_cell(row),
            row["variant"] or ("" if pd.isna(row["rho"]) else "without attack"),
            f"{row['seconds']:.0f}",
        )
        before = level
    zero = "the control" if verdict.has_control else "chance"
    rule = verdict.rule
    table.caption = (
        f"rho: 0 as {zero}, 1 as the base\n"
        f"* counts in the score: the largest rho of these tests, by rank or by accuracy, on a scale from "
        f"{rule.floor:g} (score 0) to {rule.ceiling:g} (score 1)"
    )
    return table
