"""`unlearn labels`: show the generic labels that a Who's Harry Potter run trained towards, token by token."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unlearning.common.errors import InputError
from unlearning.common.terminal import console as make_console
from unlearning.common.terminal import write_json

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

_ROWS = 60
_SHOW_EXAMPLES = """\b
Examples:
  unlearn labels show runs/whp
  unlearn labels show runs/whp --changed-only --limit 200
  unlearn labels show runs/whp --block 3 --json
"""
_WHY = {
    "start": "first token of the block, which nothing predicts",
    "repeat": "anchor that occurred before in this block",
    "anchor": "inside an anchor, without a counterpart token",
    "unaligned": "no counterpart in the translation",
}

labels_app = typer.Typer(
    help="Show the generic labels of a Who's Harry Potter run.",
    epilog=_SHOW_EXAMPLES,
    rich_markup_mode=None,
    no_args_is_help=True,
)


@labels_app.callback()
def _labels() -> None:
    """Keep `show` a subcommand although it is the only one."""


@labels_app.command(epilog=_SHOW_EXAMPLES)
def show(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Directory of a run of the method whp.")],
    block: Annotated[int | None, typer.Option(metavar="N", help="Show only block N, counted from 0.")] = None,
    changed_only: Annotated[
        bool, typer.Option("--changed-only", help="Show only labels that differ from the original token.")
    ] = False,
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", help=f"Show at most N rows, 0 for all. [default: {_ROWS}; all with --json]"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write machine-readable rows to stdout.")] = False,
) -> None:
    """Show the original token and the generic label at every position: * where they differ, - without a label."""
    if limit is not None and limit < 0:
        raise InputError(f"--limit must be at least 0 (0 shows all rows), got {limit}")

    from unlearning.methods.whp.storage import read_labels

    labels, frame = read_labels(run_dir)
    if block is not None and not 0 <= block < labels.counts.blocks:
        raise InputError(f"--block must be between 0 and {labels.counts.blocks - 1}, got {block}")
    rows = frame[frame["masked"] != "end"]
    rows = rows.assign(changed=(rows["label_id"].notna() & (rows["label_id"] != rows["next_id"])).astype(bool))
    if block is not None:
        rows = rows[rows["block"] == block]
    if changed_only:
        rows = rows[rows["changed"]]
    most = limit if limit is not None else 0 if as_json else _ROWS
    shown = rows[:most] if most else rows
    if as_json:
        from dataclasses import asdict

        records = shown.astype(object).where(shown.notna(), None).to_dict("records")
        write_json({"run": str(run_dir), "counts": asdict(labels.counts), "n_rows": len(rows), "rows": records})
        return

    console = make_console()
    console.print(_table(shown))
    if len(shown) < len(rows):
        left = f"{len(rows) - len(shown)} more rows; --limit 0 shows all"
        console.print(left, markup=False, highlight=False, soft_wrap=True)
    console.print(str(labels.counts), markup=False, highlight=False, soft_wrap=True)


def _table(rows: "pd.DataFrame") -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table("block", "position", "original", "", "label", "anchor", "", box=box.SIMPLE_HEAD)
    for row in rows.itertuples():
        fields: Any = row
        # Colours only repeat the marks, for terminals without colours.
        mark, style = ("-", "dim") if fields.masked else ("*", "bold yellow") if fields.changed else ("", "")
        table.add_row(
            str(fields.block),
            str(fields.position),
            Text(_visible(fields.next)),
            Text(mark, style),
            Text(_visible(fields.label), style),
            Text(fields.anchor),
            Text(_WHY.get(fields.masked, ""), style),
        )
    return table


def _visible(token: str) -> str:
    """Return a token with its white space made visible."""
    return token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·")
