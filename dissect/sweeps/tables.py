"""Tables that the command line prints on stdout."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Column, Table
from rich.text import Text

from dissect import zoo
from dissect.runtime.sizes import in_bytes
from unlearning.common.terminal import console

if TYPE_CHECKING:
    from dissect.engine.plan import Plan
    from dissect.prompts.prompts import Prompts
    from dissect.sweeps.result import SweepResult


def print_plan(plan: "Plan") -> None:
    """Print what a sweep would compute."""
    record = plan.record()
    table = Table(show_header=False, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    saved = plan.naive_flops / plan.flops
    for label, text in (
        ("passes over the layers", f"{record['passes']}"),
        ("examples in a batch", f"{record['examples_per_batch']} at most"),
        ("interventions in a pass", f"{record['interventions_per_pass']} at most, in {plan.max_branches} branches"),
        ("tokens through a block at once", f"{plan.chunk_tokens}"),
        ("operations", f"{plan.flops / 1e12:.3g} TFLOP, {saved:.1f} times fewer than a forward per intervention"),
        ("memory beside the weights", in_bytes(plan.bytes)),
        ("memory allowed", f"{in_bytes(plan.budget.allowed)}, of which {in_bytes(plan.budget.held)} are held"),
    ):
        table.add_row(label, text)
    console().print(table)


def print_peaks(result: "SweepResult") -> None:
    """Print where recovery is highest, the other arms' recovery there, and the differences."""
    from dissect.sweeps.result import difference_name  # needs pandas, which `dissect models` does without

    peaks = result.peaks()
    if peaks.empty:
        console().print(
            f"{result.title}: KRS is not defined on any prompt; there is nothing to recover", highlight=False
        )
        return
    has_control = "difference" in peaks
    out = console()
    columns = [("KRS", "krs")]
    if has_control:
        columns += [("control", "control_krs"), ("difference", "difference")]
    out.print(_peak_table(peaks, columns, result.title))
    others = [arm for arm in result.curve()["arm"].unique() if arm not in ("main", "control")]
    for first in range(0, len(others), 3):  # three fit next to each other in 80 columns
        some = others[first : first + 3]
        out.print(_peak_table(peaks, [(f"KRS - {arm}", difference_name(arm)) for arm in some], ""))
    if has_control:
        text = (
            "The base's activations or weights carry the answer even into a model that was never trained on it:\n"
            "only the difference to the control says something about the unlearned model."
        )
    else:
        text = (
            "No control: KRS alone cannot tell suppressed from erased, since the base's activations or weights\n"
            "carry the answer even into a model that was never trained on it. Give one with --control."
        )
    n = result.configuration["examples"]
    out.print(f"{n} prompts; [95 % intervals]. {text}", highlight=False, soft_wrap=True, markup=False)


def _peak_table(peaks: Any, columns: Sequence[tuple[str, str]], title: str) -> Table:
    """Return a table with a line per site and kind of window; the cell of an arm without KRS is empty."""
    table = Table(Column("window: peak", overflow="fold"), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.title, table.title_justify = title or None, "left"
    for header, _ in columns:
        table.add_column(header, no_wrap=True)
    for site, rows in peaks.groupby("site", sort=False):
        table.add_row(Text(str(site), style="bold"))
        for _, row in rows.iterrows():
            cells = [interval(row, name) if isinstance(row[name], float) else "" for _, name in columns]
            table.add_row(f"  {row['window']}: {_layers(row)}", *cells)
    return table


def _layers(row: Any) -> str:
    first, last = row["first_layer"], row["last_layer"]
    return f"{first}" if first == last else f"{first}-{last}"


def interval(row: Any, name: str) -> str:
    """Return an estimate with its interval as text.

    Args:
        row: A row of a result table.
        name: Name of the estimate's column.

    Returns:
        A text such as `0.85 [.83, .86]`, with the bracket escaped for rich.
    """
    # Short enough for three in 80 columns.
    low, high = (re.sub(r"^(-?)0\.", r"\1.", f"{row[f'{name}_{end}']:.2f}") for end in ("low", "high"))
    return f"{row[name]:.2f} [{low}, {high}]"


def print_prompts(prompts: "Prompts", tokenizer: Any, count: int) -> None:
    """Print the first prompts with their answers, answer tokens and scored positions.

    Args:
        prompts: The prompts.
        tokenizer: Their tokenizer.
        count: Number of prompts to print.
    """
    out = console()
    for item in prompts.items[:count]:
        tokens = [tokenizer.decode([token]) for token in item.input_ids]
        text = Text(f"[{item.id}] {item.group}\n", style="bold")
        text.append("".join(tokens[: item.answer_start]), style="default not bold")
        for token in tokens[item.answer_start :]:
            text.append("|", style="dim not bold")
            text.append(token, style="green bold")
        text.append(
            f"|\n{len(tokens) - item.answer_start} answer tokens from token {item.answer_start}; scored: the logits of "
            f"positions {item.scored.start} to {item.scored.stop - 1}\n",
            style="dim not bold",
        )
        out.print(text, soft_wrap=True)


def print_pairs(pairs: Sequence[zoo.BuiltinPair]) -> None:
    """Print the built-in pairs."""
    names = [Column(header, no_wrap=True) for header in ("base", "unlearned", "control")]  # easy to copy
    table = Table(*names, "data", box=box.SIMPLE_HEAD)
    for pair in pairs:
        table.add_row(pair.base, pair.unlearned, pair.control, pair.data.name)
    console().print(table)
    for family, description in zoo.DESCRIPTIONS.items():
        console().print(f"{family}: {description}", soft_wrap=True, highlight=False)
    console().print(f"the world's questions are in {zoo.QUESTIONS}", soft_wrap=True, highlight=False)
