"""The verdicts of every unlearned model of the TOFU pair, on real text, with the control and without.

A second control, which is known to hold nothing, is judged as well.

    TOFU/models/never-twin/         a second control: the control's recipe in another order
    OUT/{with,without}/NAME/        runs of `dissect verdict`
    OUT/base-and-never/             results of base and control, once for all models
    OUT/findings.csv, table.md      one row per verdict
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
  python -m analyses.tofu_pair.verdicts --tofu runs/tofu --methods runs/methods-tofu --budget standard --limit 80
"""

app = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)


def build_twin(models: Path, retain: Path, *, progress: bool = True) -> Path:
    """Train a second control unless it exists.

    Args:
        models: Directory of pretrained model and control, as `analyses.tofu_pair` makes them.
        retain: File that the control was trained on.
        progress: Whether to show a progress bar on stderr.

    Returns:
        The second control's directory.

    Raises:
        InputError: There is no control, or the second control has another recipe.
    """
    import unlearning

    control = models / "never" / "unlearning.json"
    try:
        options = json.loads(control.read_text(encoding="utf-8"))["configuration"]["options"]
    except FileNotFoundError:
        raise InputError(
            f"{models} holds no control. Run `python -m analyses.tofu_pair --out {models.parent}` first"
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
    """Judge every model, with the control and without; finished verdicts are not computed again.

    Args:
        tofu: Directory of the pair, as `analyses.tofu_pair` makes it.
        methods: Directory of the unlearned models, as `analyses.unlearning_methods --tofu` makes it.
        out: Directory with the content of the module's docstring.
        budget: quick, standard or full.
        limit: Maximum number of forget facts.
        progress: Whether to show progress bars on stderr.

    Returns:
        One row per verdict: `model`, `control` (with or without), `verdict`, `score`, `low`, `high`, `utility`,
        `strongest` (entry of the rule), `missing` (entries of the rule without a residual) and `seconds`.

    Raises:
        InputError: There is no pair or no unlearned model, or `out` holds a run of another configuration.
    """
    import pandas as pd

    from dissect import ModelPair, load_model, load_prompts, verdict
    from unlearning.common.runs import write_bytes

    judged = sorted(path.parent for path in (methods / "models").glob("*/config.json"))
    if not judged:
        raise InputError(
            f"{methods} holds no models. Run `python -m analyses.unlearning_methods --tofu {tofu} --out {methods}` "
            "first"
        )
    models, data = tofu / "models", tofu / "data"
    twin = build_twin(models, data / "retain.jsonl", progress=progress)
    base, control = (load_model(models / name) for name in ("base", "never"))
    forget, retain = (load_prompts(data / f"{name}.jsonl", base.tokenizer) for name in ("forget_perturbed", "retain"))
    rows = []
    for path in (twin, *judged):
        pair = ModelPair(base, load_model(path))
        for arm, given in (("with", control), ("without", None)):
            found = verdict(
                pair,
                forget,
                retain=retain,
                control=given,
                budget=budget,  # type: ignore[arg-type]  # checked there
                limit=limit,
                out=out / arm / path.name,
                shared=out / "base-and-never",
                progress=progress,
            )
            rows.append({"model": path.name, "control": arm, **_row(found)})
    frame = pd.DataFrame(rows)
    write_bytes(out / "findings.csv", frame.to_csv(index=False).encode())
    write_bytes(out / "table.md", table(frame).encode())
    return frame


def _row(found: "Verdict") -> dict[str, Any]:
    counted = {str(entry): found.residuals[str(entry)].rho for entry in found.score.used}
    known = {name: rho for name, rho in counted.items() if rho is not None}
    return {
        "verdict": found.label,
        "score": found.score.value,
        "low": found.score.low,
        "high": found.score.high,
        "utility": found.utility.share if found.utility else None,
        "strongest": max(known, key=known.__getitem__) if known else "",
        "missing": ", ".join(map(str, found.score.missing)),
        "seconds": found.wall_time_s,
    }


def table(frame: "pd.DataFrame") -> str:
    """Return both verdicts of every model with their scores, in Markdown.

    Args:
        frame: The findings, as `run` returns them.

    Returns:
        One row per model.
    """
    head = ("model", "utility", "verdict with control", "score [95 %]", "strongest", "without", "score [95 %]")
    lines = [head, ["---"] * len(head)]
    for model, rows in frame.groupby("model", sort=False):
        with_control, without = (rows[rows["control"] == arm].iloc[0] for arm in ("with", "without"))
        cells = [f"`{model}`", f"{with_control['utility']:.2f}", f"**{with_control['verdict']}**", _score(with_control)]
        lines.append([*cells, _strongest(with_control["strongest"]), without["verdict"], _score(without)])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _score(row: "pd.Series") -> str:
    values = (row["score"], row["low"], row["high"])
    return "" if any(value != value or value is None for value in values) else "{:.2f} [{:.2f}, {:.2f}]".format(*values)


def _strongest(test: str) -> str:
    """Return an entry of the rule for a reader."""
    from dissect.verdicts.rule import RuleEntry
    from dissect.verdicts.sentences import entry_name

    return entry_name(RuleEntry.parse(test)) if test else ""


@app.command(epilog=_EXAMPLES)
def command(
    tofu: Annotated[Path, typer.Option(metavar="DIR", help="Directory of the TOFU pair.")] = Path("runs/tofu"),
    methods: Annotated[Path, typer.Option(metavar="DIR", help="Directory of its unlearned models.")] = Path(
        "runs/methods-tofu"
    ),
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Output directory; an interrupted run is resumed from it.")
    ] = Path("runs/tofu-verdicts"),
    budget: Annotated[str, typer.Option(help="quick, standard or full.")] = "quick",
    limit: Annotated[int, typer.Option("--limit", min=4, help="Use at most N forget prompts.")] = 48,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print no progress and no summary.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a machine-readable result on stdout.")] = False,
) -> None:
    """Judge every unlearned model of the TOFU pair, with the control and without."""
    frame = run(tofu, methods, out, budget=budget, limit=limit, progress=not quiet)
    if as_json:
        write_json({"findings": json.loads(frame.to_json(orient="records")), "table": str(out / "table.md")})
    elif not quiet:
        from rich.console import Console

        Console().print((out / "table.md").read_text(encoding="utf-8"), markup=False, highlight=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits 0, 2 on bad input with one line on stderr, 130 on Ctrl-C."""
    run_app(
        app,
        "python -m analyses.tofu_pair.verdicts",
        arguments,
        interrupted="rerun the same command to resume",
        renamed={"": {"--facts": "--limit"}},
    )


if __name__ == "__main__":
    main()
