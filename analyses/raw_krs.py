"""Does a high knowledge recovery score show that the knowledge was only suppressed? No: see the control.

Claim under test (2410.06606): unlearned models get their knowledge back when the base's MLP coefficients and attention
outputs are restored, so it was never erased. Here the same sweep goes into a model that never knew, fine-tuned from
the same trunk: on the built-in pairs, and on the TOFU pair where `analyses.tofu_pair` has built it.

    OUT/MODEL/                 a run of `dissect patch` per built-in unlearned model
    OUT/figures/raw_krs.*      every pair beside each other, the control dashed
    OUT/table.md               peak layer and KRS per pair and site, the control there, the difference
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unlearning.errors import InputError
from unlearning.terminal import run_app

if TYPE_CHECKING:
    from dissect import SweepResult

_EXAMPLES = """\b
Examples:
  python -m analyses.raw_krs
  python -m analyses.raw_krs --tofu runs/tofu --out runs/raw_krs --format html,png
"""

app = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)


def sweep_builtin(out: Path, *, progress: bool = True) -> dict[str, "SweepResult"]:
    """The default sweep on every built-in pair; runs that are finished are read."""
    from dissect import load_pair, load_prompts, patch, zoo

    results = {}
    for builtin in zoo.pairs():
        pair = load_pair(builtin.base, builtin.unlearned)
        prompts = load_prompts(builtin.data, pair.tokenizer)
        run = out / builtin.unlearned.replace(":", "-")
        results[builtin.unlearned] = patch(pair, prompts, control=builtin.control, out=run, progress=progress)
        results[builtin.unlearned].save_figures(run)
    return results


def read_tofu(directory: Path) -> dict[str, "SweepResult"]:
    """The finished sweeps of `analyses.tofu_pair`.

    Raises:
        InputError: a sweep is not there or not finished.
    """
    from analyses.tofu_models import UNLEARNED
    from dissect import load_result

    for name in UNLEARNED:
        if not (directory / f"patch-{name}").is_dir():
            raise InputError(
                f"{directory}: no patch-{name} in it; run `python -m analyses.tofu_pair --out {directory}` first"
            )
    return {f"TOFU {name}": load_result(directory / f"patch-{name}") for name in sorted(UNLEARNED)}


def markdown_table(results: dict[str, "SweepResult"]) -> str:
    """Peak layer and KRS per pair and site, with the control in the same layers and the paired difference."""
    lines = [
        "| unlearned model | site | peak centre | KRS | never-trained control | difference |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        for _, row in result.peaks().iterrows():
            cells = [
                f"{row[value]:.2f} [{row[f'{value}_low']:.2f}, {row[f'{value}_high']:.2f}]"
                for value in ("krs", "control_krs", "difference")
            ]
            lines.append(f"| {name} | `{row['site']}` | {row['centre']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@app.command(epilog=_EXAMPLES)
def main(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Runs, table and figure.")] = Path("runs/raw_krs"),
    tofu: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Output of analyses.tofu_pair, to be shown beside them.")
    ] = None,
    formats: Annotated[str, typer.Option("--format", metavar="LIST", help="Figures: html, pdf, svg, png.")] = "html",
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar and no table.")] = False,
) -> None:
    """Put the unlearned models' recovery beside that of a model that never knew."""
    from dissect.figures import check_formats, comparison_figure, export
    from dissect.runs import write_bytes

    names = [name.strip() for name in formats.split(",") if name.strip()]
    check_formats(names)
    results = read_tofu(tofu) if tofu is not None else {}
    results = {**sweep_builtin(out, progress=not quiet), **results}
    table = markdown_table(results)
    write_bytes(out / "table.md", table.encode())
    figure = comparison_figure({name: result.curve() for name, result in results.items()})
    exported = export(figure, out / "figures" / "raw_krs", formats=names)
    if exported.problem:
        sys.stderr.write(f"raw_krs: {exported.problem}\n")
    if not quiet:
        sys.stdout.write(table)
        sys.stdout.writelines(f"{path}\n" for path in (out / "table.md", *exported.paths))


def command_line(arguments: Sequence[str] | None = None) -> None:
    """Run the analysis; exits 0, 2 on bad input with one line on stderr, 130 on Ctrl-C."""
    run_app(app, "python -m analyses.raw_krs", arguments, interrupted="run the same command again to go on")


if __name__ == "__main__":
    command_line()
