"""`python -m analyses.resistance`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from unlearning.common.errors import InputError, nearest
from unlearning.common.terminal import console, run_app, write_json

_EXAMPLES = """\b
Examples:
  python -m analyses.resistance
  python -m analyses.resistance --method npo --method tar --seeds 0,1,2 --out runs/two
  python -m analyses.resistance --tofu runs/tofu --model ./SmolLM2-135M-Instruct --format html,svg
"""

app = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)


@app.command(epilog=_EXAMPLES)
def command(
    tofu: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also study the TOFU pair that analyses.tofu_pair built in DIR.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="M", help="Also study a language model that knows capitals; may be repeated."),
    ] = None,
    demo: Annotated[bool, typer.Option("--demo/--no-demo", help="Study the built-in world, or leave it out.")] = True,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Output directory; a stopped study continues.")] = Path(
        "runs/resistance"
    ),
    method: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Study only this method; may be repeated.")
    ] = None,
    seeds: Annotated[str, typer.Option(metavar="LIST", help="Random seeds.")] = "0",
    level: Annotated[
        float, typer.Option(metavar="P", help="Probability of the forget answers at which every training stops.")
    ] = 0.1,
    verdict: Annotated[bool, typer.Option("--verdict/--no-verdict", help="Judge every model too, or not.")] = True,
    formats: Annotated[str, typer.Option("--format", metavar="LIST", help="Formats of the figure.")] = "html",
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress and no table.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write one row per model to stdout as JSON.")] = False,
) -> None:
    """Attack models that forgot to a common level, and compare how soon they recover."""
    import json

    from analyses.resistance.attacks import CURVE
    from analyses.resistance.figures import resistance_figure
    from analyses.resistance.models import COMPARED
    from analyses.resistance.run import curves_of, run
    from analyses.resistance.tables import markdown, models_of
    from analyses.resistance.worlds import demo_world, language_model_world, tofu_world
    from dissect.plotting import check_formats, export
    from unlearning.common.runs import write_bytes

    for name in method or []:
        if name not in COMPARED:
            hint = nearest(name, COMPARED) or f"; there are {', '.join(COMPARED)}"
            raise InputError(f"--method must name a method with a retain loss, got {name!r}{hint}")
    if not 0 < level < 1:
        raise InputError(f"--level must be between 0 and 1, got {level:g}")
    numbers = _seeds(seeds)
    check_formats(formats.split(","))
    worlds = [demo_world()] if demo else []
    if tofu is not None:
        worlds.append(tofu_world(tofu))
    worlds += [language_model_world(name, out) for name in model or []]
    if not worlds:
        raise InputError("--no-demo leaves nothing to study. Give --tofu or --model")
    chosen = method or COMPARED
    found = [
        one
        for world in worlds
        for one in run(
            world,
            out,
            methods=[name for name in chosen if name != "oracle" or world.control],
            seeds=numbers,
            level=level,
            judge=verdict,
            progress=not quiet,
        )
    ]
    models = models_of(found)
    table = markdown(models, CURVE[-1])
    write_bytes(out / "curves.csv", curves_of(found).to_csv(index=False).encode())
    write_bytes(out / "models.csv", models.to_csv(index=False).encode())
    write_bytes(out / "table.md", table.encode())
    drawn = resistance_figure(models, most_steps=CURVE[-1])
    exported = export(drawn, out / "figures" / "resistance", formats=formats.split(","))
    if as_json:
        write_json(json.loads(models.to_json(orient="records")))
    elif not quiet:
        console().print(table, markup=False, highlight=False, soft_wrap=True)
        if exported.problem:
            console().print(exported.problem, markup=False, highlight=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits 0, 2 on bad input with one line on stderr, 130 on Ctrl-C."""
    run_app(app, "python -m analyses.resistance", arguments, interrupted="rerun the same command to resume")


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--seeds must be whole numbers such as 0,1,2, got {text}") from None
    return list(dict.fromkeys(seeds))
