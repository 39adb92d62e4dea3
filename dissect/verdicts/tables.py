"""What `dissect verdict` prints for a reader, on stdout."""

from typing import TYPE_CHECKING

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Column, Table

from dissect.scoring.tidy import pair_title
from dissect.verdicts.page import residual_cell
from dissect.verdicts.sentences import advice, sentences

if TYPE_CHECKING:
    from dissect.verdicts.result import Verdict


def print_verdict(verdict: "Verdict") -> None:
    """The answer in sentences, the evidence, and what would change the answer."""
    out = Console()
    control = verdict.provenance.get("control")
    names = f"{pair_title(verdict.provenance)}, " + (f"control {control}" if control else "no control")
    out.print(names, highlight=False, soft_wrap=True, markup=False)
    out.print(f"\nverdict: [bold]{verdict.word}[/bold]\n", highlight=False)
    for sentence in sentences(verdict):
        out.print(sentence, highlight=False, markup=False)
    out.print(_evidence_table(verdict))
    for line in advice(verdict):
        out.print(f"- {line}", highlight=False, markup=False)


def _evidence_table(verdict: "Verdict") -> Table:
    table = Table(
        Column("level", max_width=12),
        Column("test", no_wrap=True),
        Column("rho [95 %]", no_wrap=True, justify="right"),
        Column("strongest"),
        Column("s", justify="right"),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    before = None
    for _, row in verdict.evidence().iterrows():
        rung = f"{row['level']} {row['claim']}"
        weighs = " *" if row["counts"] else ""
        table.add_row(
            rung if rung != before else "",
            f"{row['test'].replace('_', ' ')}{weighs}",
            residual_cell(row),
            row["variant"] or ("" if pd.isna(row["rho"]) else "as it is"),
            f"{row['seconds']:.0f}",
        )
        before = rung
    table.caption = f"* counts in the score; rho: 0 as {verdict.nothing}, 1 as the base"
    return table
