"""What the command line prints for a reader, on stdout."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from dissect import zoo
from dissect.sizes import in_bytes

if TYPE_CHECKING:
    from dissect.engine.plan import Plan
    from dissect.prompts import Prompts
    from dissect.results import PatchingResult


def console() -> Console:
    """Where it goes, as wide as the terminal is."""
    return Console()


def print_plan(plan: "Plan") -> None:
    """What a sweep would compute."""
    record = plan.record()
    table = Table(show_header=False, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    saved = plan.naive_flops / plan.flops
    for label, text in (
        ("passes over the layers", f"{record['passes']}"),
        ("examples in a batch", f"{record['examples_per_batch']} at most"),
        ("interventions in a pass", f"{record['interventions_per_pass']} at most, as {plan.most_copies} streams"),
        ("tokens through a block at once", f"{plan.chunk_tokens}"),
        ("operations", f"{plan.flops / 1e12:.3g} TFLOP, {saved:.1f} times fewer than a forward per intervention"),
        ("memory beside the weights", in_bytes(plan.bytes)),
        ("memory allowed", f"{in_bytes(plan.budget.allowed)}, of which {in_bytes(plan.budget.held)} are held"),
    ):
        table.add_row(label, text)
    console().print(table)


def print_peaks(result: "PatchingResult") -> None:
    peaks = result.peaks()
    if peaks.empty:
        console().print(
            f"{result.title}: no KRS is defined, there is nothing to recover on any prompt", highlight=False
        )
        return
    has_control = "difference" in peaks
    site = Column("site", no_wrap=True)
    table = Table(site, "peak", "KRS", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=result.title)
    table.title_justify = "left"
    if has_control:
        table.add_column("control there")
        table.add_column("difference")
    for _, row in peaks.iterrows():
        cells = [row["site"], f"{row['centre']} ({row['first_layer']}-{row['last_layer']})", interval(row, "krs")]
        if has_control:
            cells += [interval(row, "control_krs"), interval(row, "difference")]
        table.add_row(*cells)
    out = console()
    out.print(table)
    n = result.configuration["examples"]
    if has_control:
        out.print(
            f"{n} prompts; [95 % intervals]. Base activations carry the answer even into a model that never knew it:\n"
            "only the difference to the control can speak of the unlearned model itself.",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )
    else:
        out.print(
            f"{n} prompts; [95 % intervals]. No control: KRS alone cannot tell suppressed from erased, since base\n"
            "activations carry the answer even into a model that never knew it. Give one with --control.",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )


def interval(row: Any, name: str) -> str:
    # Short enough for three of them in 80 columns: 0.85 [.83, .86]
    low, high = (re.sub(r"^(-?)0\.", r"\1.", f"{row[f'{name}_{end}']:.2f}") for end in ("low", "high"))
    return f"{row[name]:.2f} \\[{low}, {high}]"


def print_prompts(prompts: "Prompts", tokenizer: Any, count: int) -> None:
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
    """The built-in pairs."""
    names = [Column(header, no_wrap=True) for header in ("base", "unlearned", "control")]  # to be copied whole
    table = Table(*names, "data", box=box.SIMPLE_HEAD)
    for pair in pairs:
        table.add_row(pair.base, pair.unlearned, pair.control, pair.data.name)
    console().print(table)
    for family, description in zoo.DESCRIPTIONS.items():
        console().print(f"{family}: {description}", soft_wrap=True, highlight=False)
    console().print(f"the world's questions are in {zoo.WORLD_DIRECTORY}", soft_wrap=True, highlight=False)
