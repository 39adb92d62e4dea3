"""The table of defaults, as rows and as Markdown."""

from collections.abc import Sequence
from dataclasses import asdict

import pandas as pd

from analyses.defaults.run import Row

WHY = {
    "ga": "nothing keeps the rest: stop it early (target_forget)",
    "ga_forget_kl": "nothing keeps the rest: stop it early (target_forget)",
    "jensun": "where a model is sure of its answer, the divergence has hardly a gradient",
    "grad_diff": "its forget loss has no bound: raise alpha, or stop it early (target_forget)",
    "idk": "learns the refusal; the old answer's own probability falls only as far as that asks",
    "tar": "the rest needs a larger alpha on long answers",
    "undial": "long answers are not quite down to a fifth",
    "rmu": "the retain weight that a model needs differs: alpha=30 leaves 0.17 / 0.88 of the TOFU pair's",
    "ce_u": "the first token of an answer carries no loss, and nothing keeps the rest",
    "task_vector": "nothing keeps the rest: choose scaling by hand",
    "oracle": "needs a control, a model that never knew",
    "whp": "forgets a text that it is given, through a dictionary of the text's names",
}
"""Why a method is not expected to reach the aim."""


def frame_of(rows: Sequence[Row]) -> pd.DataFrame:
    """Return one line a row, with the fractions that are left and whether the aim was reached."""
    frame = pd.DataFrame([asdict(row) for row in rows])
    frame["forget_left"] = frame["forget_after"] / frame["forget_before"]
    frame["retain_left"] = frame["retain_after"] / frame["retain_before"]
    frame["reached"] = [row.forgot and row.kept for row in rows]
    return frame


def markdown(rows: Sequence[Row]) -> str:
    """Return a table of a line a method: what is left of forget and retain answers in every world."""
    worlds = list(dict.fromkeys(row.world for row in rows))
    found = {(row.world, row.method): row for row in rows}
    head = ["method", *(f"{world}: forget / retain left" for world in worlds), "if not reached, why"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    for method in dict.fromkeys(row.method for row in rows):
        tried = [found.get((world, method)) for world in worlds]
        reached = all(row is None or (row.forgot and row.kept) for row in tried)
        cells = [_cell(row) for row in tried]
        lines.append("| " + " | ".join([f"`{method}`", *cells, "" if reached else WHY.get(method, "")]) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row.refused is not None:
        return "not run"
    left = f"{row.forget_after / row.forget_before:.2f} / {row.retain_after / row.retain_before:.2f}"
    return left if row.forgot and row.kept else f"*{left}*"
