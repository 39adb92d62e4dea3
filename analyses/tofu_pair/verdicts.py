"""Erased or suppressed, on real text: the verdict of every unlearned model of the TOFU pair, with the never model and
without, and of a model that is known to hold nothing.

    TOFU/models/never-twin/         a second model that never knew: the control's recipe in another order
    OUT/{with,without}/NAME/        runs of `dissect verdict`
    OUT/base-and-never/             what tests give of these two, once for all
    OUT/findings.csv, table.md      one row a verdict
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unlearning.common.errors import InputError
from unlearning.common.terminal import run_app, write_json

if TYPE_CHECKING:
    import pandas as pd

    from dissect import Verdict

TWIN = "never-twin"
TWIN_SEED = 1

_EXAMPLES = """\b
Examples:
  python -m analyses.tofu_pair.verdicts
  python -m analyses.tofu_pair.verdicts --tofu runs/tofu --methods runs/methods-tofu --budget standard --facts 80
"""

app = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)


def build_twin(models: Path, retain: Path, *, progress: bool = True) -> Path:
    """Train a second model that never knew, unless it is there; returns its directory.

    Args:
        models: holds trunk and never, as `analyses.tofu_pair` makes them.
        retain: what never was trained on.
        progress: a progress bar on stderr.

    Raises:
        InputError: no never model there, or a twin of another recipe.
    """
    import unlearning

    never = models / "never" / "unlearning.json"
    try:
        options = json.loads(never.read_text(encoding="utf-8"))["configuration"]["options"]
    except FileNotFoundError:
        raise InputError(
            f"{models}: no never model in it; run `python -m analyses.tofu_pair --out {models.parent}` first"
        ) from None
    directory = models / TWIN
    unlearning.train(
        "finetune",
        model=models / "trunk",
        retain=retain,
        output_dir=directory,
        progress=progress,
        **{**options, "seed": TWIN_SEED},
    )
    return directory


def run(
    tofu: Path, methods: Path, out: Path, *, budget: str = "quick", limit: int | None = 48, progress: bool = True
) -> "pd.DataFrame":
    """Judge every model, with the never model and without; what was judged is not judged again.

    Args:
        tofu: as `analyses.tofu_pair` makes it.
        methods: as `analyses.unlearning_methods --tofu` makes it.
        out: the directory of the module's docstring.
        budget: quick, standard or full.
        limit: most forget facts that are asked.
        progress: progress bars on stderr.

    Returns:
        One row a verdict: `model`, `never` (with or without), `verdict`, `score`, `low`, `high`, `utility`, `strongest`
        (test of the rule), `missing` (tests of the rule that could not be run) and `seconds`.

    Raises:
        InputError: no pair, no unlearned models, or a run of another configuration in `out`.
    """
    import pandas as pd

    from dissect import ModelPair, load_model, load_prompts, verdict
    from unlearning.common.runs import write_bytes

    judged = sorted(path.parent for path in (methods / "models").glob("*/config.json"))
    if not judged:
        raise InputError(
            f"{methods}: no models in it; run `python -m analyses.unlearning_methods --tofu {tofu} --out {methods}` "
            "first"
        )
    models, data = tofu / "models", tofu / "data"
    twin = build_twin(models, data / "retain.jsonl", progress=progress)
    base, never = (load_model(models / name) for name in ("base", "never"))
    forget, retain = (load_prompts(data / f"{name}.jsonl", base.tokenizer) for name in ("forget_perturbed", "retain"))
    rows = []
    for path in (twin, *judged):
        pair = ModelPair(base, load_model(path))
        for arm, control in (("with", never), ("without", None)):
            found = verdict(
                pair,
                forget,
                retain=retain,
                control=control,
                budget=budget,  # type: ignore[arg-type]  # checked there
                limit=limit,
                out=out / arm / path.name,
                shared=out / "base-and-never",
                progress=progress,
            )
            rows.append({"model": path.name, "never": arm, **_row(found)})
    frame = pd.DataFrame(rows)
    write_bytes(out / "findings.csv", frame.to_csv(index=False).encode())
    write_bytes(out / "table.md", table(frame).encode())
    return frame


def _row(found: "Verdict") -> dict[str, Any]:
    counted = {name: found.residuals[name].rho for name in found.score.used}
    known = {name: rho for name, rho in counted.items() if rho is not None}
    return {
        "verdict": found.word,
        "score": found.score.value,
        "low": found.score.low,
        "high": found.score.high,
        "utility": found.utility.share if found.utility else None,
        "strongest": max(known, key=known.__getitem__) if known else "",
        "missing": ", ".join(found.score.missing),
        "seconds": found.wall_time_s,
    }


def table(frame: "pd.DataFrame") -> str:
    """A row a model, in Markdown: both verdicts with their scores.

    Args:
        frame: as `run` gives it.
    """
    head = ("model", "utility", "verdict with a never model", "score [95 %]", "strongest", "without", "score [95 %]")
    lines = [head, ["---"] * len(head)]
    for model, rows in frame.groupby("model", sort=False):
        with_never, without = (rows[rows["never"] == arm].iloc[0] for arm in ("with", "without"))
        cells = [f"`{model}`", f"{with_never['utility']:.2f}", f"**{with_never['verdict']}**", _score(with_never)]
        lines.append([*cells, _said(with_never["strongest"]), without["verdict"], _score(without)])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _score(row: "pd.Series") -> str:
    values = (row["score"], row["low"], row["high"])
    return "" if any(value != value or value is None for value in values) else "{:.2f} [{:.2f}, {:.2f}]".format(*values)


def _said(test: str) -> str:
    return test.replace("_", " ").replace(":accuracy", " (accuracy)")


@app.command(epilog=_EXAMPLES)
def command(
    tofu: Annotated[Path, typer.Option(metavar="DIR", help="The TOFU pair.")] = Path("runs/tofu"),
    methods: Annotated[Path, typer.Option(metavar="DIR", help="Its unlearned models.")] = Path("runs/methods-tofu"),
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where everything goes; go on where it stopped.")] = Path(
        "runs/tofu-verdicts"
    ),
    budget: Annotated[str, typer.Option(help="quick, standard or full.")] = "quick",
    limit: Annotated[int, typer.Option("--facts", min=4, help="Ask at most so many forget facts.")] = 48,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, no summary.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout.")] = False,
) -> None:
    """Judge every unlearned model of the TOFU pair, with its never model and without."""
    frame = run(tofu, methods, out, budget=budget, limit=limit, progress=not quiet)
    if as_json:
        write_json({"findings": json.loads(frame.to_json(orient="records")), "table": str(out / "table.md")})
    elif not quiet:
        from rich.console import Console

        Console().print((out / "table.md").read_text(encoding="utf-8"), markup=False, highlight=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits 0, 2 on bad input with one line on stderr, 130 on Ctrl-C."""
    run_app(app, "python -m analyses.tofu_pair.verdicts", arguments, interrupted="run the same command again to go on")


if __name__ == "__main__":
    main()
