"""Make the table of families in the docs: every site of every tiny model, compared with plain hooks.

`python -m tests.dissect.family_table` writes `docs/families.md`; a slow test makes the table again and compares.
"""

import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

from dissect.models.sites import SITES, WEIGHT_SITES
from tests.dissect.families import CONFIGURATIONS, Row, build, compare
from tests.dissect.helpers import build_batch
from unlearning.common.errors import InputError

PAGE = Path(__file__).parents[2] / "docs" / "families.md"

_HEAD = """\
# Families of models

<!-- Made by `python -m tests.dissect.family_table`; do not edit by hand. -->

Any decoder works whose blocks TransformerLens can describe and each of which has an attention and an MLP. Here each
family is a tiny model with random weights, built from its configuration class. Every site of it was replaced by the
base's, and the logits were compared with plain torch hooks on the Hugging Face model itself; for weights, with a model
whose weights were really exchanged. A number is the **largest difference of a logit** in float32, over layers, a window
of two layers, padded prompts and both engines; the interventions themselves move logits by {moved}.

A dash with a number means that the site is refused, with the reason below the tables. *reference* means that the blocks
cannot be run one by one, so `--engine reference` is needed. What a site is: [glossary](glossary.md).
"""


def compare_all(names: Iterable[str] = CONFIGURATIONS) -> dict[str, list[Row] | str]:
    """Compare every site of every configuration with the oracle.

    Args:
        names: Names of `CONFIGURATIONS`.

    Returns:
        For each name one row for each site, or the line that the whole model is refused with.
    """
    found: dict[str, list[Row] | str] = {}
    with tempfile.TemporaryDirectory() as directory:
        batch = build_batch(Path(directory), "left")
        for name in names:
            try:
                found[name] = compare(build(name), batch)
            except InputError as error:
                found[name] = str(error).removeprefix("base: ")
    return found


def without_numbers(page: str) -> str:
    """Return a page with its differences left out: their last digit depends on the processor."""
    return re.sub(r"(?<=\| )(0|\de-\d\d)(?= )|move logits by [^;.]*", "#", page)


def as_markdown(found: dict[str, list[Row] | str]) -> str:
    """Write the page."""
    supported = {name: rows for name, rows in found.items() if not isinstance(rows, str)}
    reasons: dict[str, int] = {}
    moved = [row.moved for rows in supported.values() for row in rows if not row.refused]
    parts = [
        _HEAD.format(moved=f"{min(moved):.1g} to {max(moved):.0f}"),
        f"{len(supported)} configurations are supported, {len(found) - len(supported)} refused as a whole.\n",
    ]
    for title, sites in (("Activations", list(SITES)), ("Weights", list(WEIGHT_SITES))):
        parts += [f"## {title}\n", _table(supported, sites, reasons)]
    parts += ["## Why a site is refused\n", *(f"{number}. {reason}" for reason, number in reasons.items()), ""]
    parts += ["## Refused as a whole\n", "In one line, and before any weight is read.\n"]
    parts += ["| model | type | line |", "|---|---|---|"]
    parts += [f"| {name} | `{_kind(name)}` | {rows} |" for name, rows in found.items() if isinstance(rows, str)]
    return "\n".join(parts) + "\n"


def _table(supported: dict[str, list[Row]], sites: list[str], reasons: dict[str, int]) -> str:
    lines = [f"| model | type | {' | '.join(f'`{site}`' for site in sites)} |", "|---" * (2 + len(sites)) + "|"]
    for name, rows in supported.items():
        cells = [_cell(row, reasons) for site in sites for row in rows if row.site == site]
        lines.append(f"| {name} | `{_kind(name)}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(row: Row, reasons: dict[str, int]) -> str:
    if row.refused:
        return f"– {reasons.setdefault(row.refused, len(reasons) + 1)}"
    gap, only = max(row.gaps.values()), _only(row)
    return ("0" if gap == 0 else f"{gap:.0e}") + (f" *{only}*" if only else "")


def _only(row: Row) -> str:
    """Return the engine that a site needs, where the other one refuses."""
    return "" if not row.errors else ", ".join(row.gaps)


def _kind(name: str) -> str:
    return CONFIGURATIONS[name][0]


if __name__ == "__main__":
    PAGE.write_text(as_markdown(compare_all()), encoding="utf-8")
