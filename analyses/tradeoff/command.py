"""Forget quality against utility: the paths of unlearning runs over their steps, and the front of the best.

On TOFU's own files, for the splits forget01, forget05 and forget10, each against a control that never knew that split
(`analyses.tradeoff.models`); or on any finished runs of `unlearn train` that measured `--set benchmark=tofu:SPLIT`.

    OUT/models/                 trunk, base, never01, never05, never10
    OUT/never/SPLIT/            what the control answers, a run of `unlearn eval tofu`
    OUT/runs/SPLIT/NAME-seedN/  runs of `unlearn train`
    OUT/trajectories.csv        one row an evaluation
    OUT/findings.csv            each run at its best, at its end, and at the same forget probability as all others
    OUT/table.md                the same over the seeds, for a reader, with the commands
    OUT/figures/tradeoff.*
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unlearning.common.errors import InputError
from unlearning.common.terminal import run_app, write_json

if TYPE_CHECKING:
    import pandas as pd

_EXAMPLES = """\b
Examples:
  python -m analyses.tradeoff --data ../shared/data
  python -m analyses.tradeoff --data ../shared/data --split forget05 --name npo_rt --name blur_npo --seeds 0,1,2
  python -m analyses.tradeoff --run runs/npo-seed0 --run runs/blur-seed0 --out runs/mine --format html,pdf
"""

app = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Entry:
    """One method with its options.

    Attributes:
        name: Name of its rows and directories.
        method: Name of the method in `unlearn train`.
        options: Options besides those that all entries share.
        retains: Train on retain examples too.
    """

    name: str
    method: str
    options: Mapping[str, Any]
    retains: bool = True


ENTRIES = (
    Entry("ga", "ga", {"learning_rate": 7e-5}, retains=False),
    Entry("npo", "npo", {"alpha": 0, "learning_rate": 7e-5}, retains=False),
    Entry("grad_diff", "grad_diff", {"gamma": 0.05, "alpha": 1.0, "learning_rate": 2.5e-4}),
    Entry("dpo", "dpo", {"beta": 0.01, "alpha": 100, "learning_rate": 1.5e-4}),
    Entry("npo_rt", "npo", {"alpha": 30, "learning_rate": 1.5e-4}),
    Entry("npo_rt_10", "npo", {"alpha": 10, "learning_rate": 1.5e-4}),
    Entry("npo_rt_100", "npo", {"alpha": 100, "learning_rate": 1.5e-4}),
    Entry("simnpo", "simnpo", {"beta": 1, "gamma": 0.2, "learning_rate": 2e-4}),
    Entry("blur_npo", "blur", {"gamma": 0.05, "learning_rate": 1.5e-4}),
    Entry("blur_npo_02", "blur", {"gamma": 0.02, "learning_rate": 1.5e-4}),
    Entry("blur_npo_20", "blur", {"gamma": 0.2, "learning_rate": 1.5e-4}),
)
"""The options that `analyses.unlearning_methods --tofu` has for its pair; they were not searched for again here. NPO
with a retain loss and BLUR have two more weights each, a third of theirs and three to four times theirs, so that one
combination of the losses is compared with the other and not one weight with another."""

STEPS = {"forget01": 120, "forget05": 120, "forget10": 160}
EVALUATIONS = 6
"""Of a run, at equal distances, beside the one before its first step."""

LEVEL = 0.3
"""Forget probability at which methods are compared: the base's is near .9, and almost every run comes below it."""

SHARED: Mapping[str, Any] = {
    "batch_size": 8,
    "gradient_accumulation_steps": 1,
    "lr_schedule": "constant",
    "warmup_ratio": 0.05,
    "weight_decay": 0.0,
    "eval_examples": 8,
}


def train_runs(
    data: Path | None,
    out: Path,
    *,
    splits: Sequence[str],
    entries: Sequence[Entry],
    seeds: Sequence[int],
    rows: int,
    device: str = "auto",
    progress: bool = True,
    steps: Mapping[str, int] = STEPS,
) -> list[Path]:
    """Train the runs that are missing, seed by seed.

    Args:
        data: TOFU's folder or the directory that holds it; None reads $DISSECT_DATA.
        out: The directory that the module's docstring describes.
        splits: Forget splits.
        entries: Methods with their options.
        seeds: Random seeds.
        rows: Rows of each question set in an evaluation.
        device: Where to train.
        progress: Show progress bars on stderr.
        steps: Steps of a run, by split.

    Returns:
        The runs' directories.

    Raises:
        InputError: The data are missing, or a directory holds something else.
    """
    import unlearning
    from analyses.tofu_pair.data import as_examples, find_tofu
    from analyses.tradeoff.models import build_models, read_world

    tofu = find_tofu(data)
    build_models(data, out / "models", device=device, progress=progress)
    _, world = read_world(data)
    runs = []
    for seed in seeds:
        for split in splits:
            control = ask_control(tofu, out, split, rows=rows, device=device, progress=progress)
            forget, retain = (as_examples(part) for part in (world[split].forget, world[split].retain))
            for entry in entries:
                run = out / "runs" / split / f"{entry.name}-seed{seed}"
                unlearning.train(
                    entry.method,
                    model=out / "models" / "base",
                    forget=forget,
                    retain=retain if entry.retains else None,
                    output_dir=run,
                    progress=progress,
                    device=device,
                    seed=seed,
                    **options_of(entry, split, steps[split], rows),
                    data_dir=str(tofu.parent),
                    benchmark_control=str(control),
                )
                runs.append(run)
    return runs


def options_of(entry: Entry, split: str, steps: int, rows: int) -> dict[str, Any]:
    """Return the options that decide a run, besides its seed and its paths."""
    return {
        **SHARED,
        **entry.options,
        "max_steps": steps,
        "eval_every": max(1, steps // EVALUATIONS),
        "benchmark": f"tofu:{split}",
        "benchmark_rows": rows,
    }


def ask_control(tofu: Path, out: Path, split: str, *, rows: int, device: str, progress: bool) -> Path:
    """Evaluate the split's control on the rows that the runs are asked, unless it was before."""
    from unlearning.data.question_answer import Wrapping
    from unlearning.evaluation.during_training import BENCHMARKS, Reading
    from unlearning.evaluation.harness import evaluate
    from unlearning.evaluation.subject import open_subject

    prepare = BENCHMARKS["tofu"](split, Reading(tofu.parent, Wrapping(), rows, generate=False))
    name = split.replace("forget", "never")
    subject = open_subject(out / "models" / name, device=None if device == "auto" else device)
    path = out / "never" / split
    evaluate(prepare, subject, out=path, progress=progress)
    return path


def control_metrics(out: Path, splits: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the control's metrics by split, for the splits that were evaluated."""
    found = {}
    for split in splits:
        path = out / "never" / split / "summary.json"
        if path.is_file():
            metrics = json.loads(path.read_text(encoding="utf-8"))["metrics"]
            found[split] = {name: metric["value"] for name, metric in metrics.items()}
    return found


def report(runs: Sequence[Path], out: Path, *, level: float = LEVEL, formats: Sequence[str]) -> dict[str, Any]:
    """Read the runs, and write tables and figure.

    Args:
        runs: Directories of finished runs.
        out: Where tables and figure go.
        level: Forget probability at which all runs are compared.
        formats: Formats of the figure.

    Returns:
        Paths of the files by name.

    Raises:
        InputError: A run is not finished or measured nothing, or a format is unknown.
    """
    import numpy as np

    from analyses.tradeoff.figures import tradeoff_figure
    from analyses.tradeoff.report import UTILITY_PARTS, findings, over_seeds, read_trajectories
    from dissect.plotting import export
    from unlearning.common.runs import write_bytes
    from unlearning.evaluation.metrics.model_utility import harmonic_mean

    trajectories = read_trajectories(runs)
    control = control_metrics(out, list(dict.fromkeys(trajectories["split"])))
    utility = {
        split: float(harmonic_mean(*(np.array([metrics[part]]) for part in UTILITY_PARTS))[0])
        for split, metrics in control.items()
    }
    found = findings(trajectories, level)
    write_bytes(out / "trajectories.csv", trajectories.to_csv(index=False).encode())
    write_bytes(out / "findings.csv", found.to_csv(index=False).encode())
    write_bytes(out / "table.md", _table(over_seeds(found), level).encode())
    chart = tradeoff_figure(trajectories, control_utility=utility, title="Forget quality against utility, step by step")
    exported = export(chart, out / "figures" / "tradeoff", formats=formats)
    return {
        "runs": len(runs),
        "findings": json.loads(found.to_json(orient="records")),
        "table": str(out / "table.md"),
        "figures": [str(path) for path in exported.paths],
        "problem": exported.problem,
    }


def _table(seeds: "pd.DataFrame", level: float) -> str:
    """Write the findings over the seeds as Markdown."""
    from analyses.tradeoff.report import ranged

    lines = [
        "| split | method | seeds | highest forget quality (p) | its D | retain utility there | retain utility where "
        f"the forget probability is {level:g} | forget quality at the end | retain utility at the end |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    columns = (
        "forget_quality",
        "forget_quality_statistic",
        "retain_utility",
        "utility_at_level",
        "last_forget_quality",
        "last_retain_utility",
    )
    for _, row in seeds.iterrows():
        cells = [str(row["split"]), f"`{row['name']}`", str(row["seeds"]), *(ranged(row, name) for name in columns)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\n" + "\n".join(_commands()) + "\n"


def _commands() -> list[str]:
    """Return the `unlearn train` commands that make each entry's runs."""
    lines = ["```sh"]
    for entry in ENTRIES:
        options = options_of(entry, "SPLIT", 0, 0)
        given = {name: options[name] for name in (*SHARED, *entry.options)}
        sets = " ".join(
            f"--set {name}={shlex.quote(f'{value:g}' if isinstance(value, float) else str(value))}"
            for name, value in given.items()
        )
        retain = " --retain RETAIN" if entry.retains else ""
        lines.append(f"unlearn train {entry.method} --model base --forget FORGET{retain} --out {entry.name} {sets}")
    return [*lines, "```"]


@app.command(epilog=_EXAMPLES)
def command(
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Directory that holds tofu/.  [default: $DISSECT_DATA]")
    ] = None,
    run: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="Read only these finished runs; may be repeated.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Output directory; a stopped study continues.")] = Path(
        "runs/tradeoff"
    ),
    split: Annotated[
        list[str] | None, typer.Option(metavar="SPLIT", help="forget01, forget05, forget10; may be repeated.")
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Run only this method; may be repeated.")
    ] = None,
    seeds: Annotated[str, typer.Option(metavar="LIST", help="Random seeds of the runs.")] = "0,1,2",
    level: Annotated[
        float, typer.Option(metavar="P", help="Forget probability at which the methods' utilities are compared.")
    ] = LEVEL,
    rows: Annotated[int, typer.Option(metavar="N", help="Rows of each set in an evaluation, evenly spaced.")] = 40,
    formats: Annotated[
        str, typer.Option("--format", metavar="LIST", help="Formats of the figure: html, pdf, svg, png.")
    ] = "html",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress and no summary.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write the result to stdout as JSON.")] = False,
) -> None:
    """Draw unlearning runs' forget quality against their utility."""
    splits, entries, numbers = _chosen(split, tuple(STEPS), "--split"), _entries(name), _seeds(seeds)
    if not run:
        from analyses.tofu_pair.data import find_tofu

        find_tofu(data)  # before the slow imports
    runs = run or train_runs(
        data,
        out,
        splits=splits,
        entries=entries,
        seeds=numbers,
        rows=rows,
        device=device,
        progress=not quiet,
    )
    result = report(runs, out, level=level, formats=formats.split(","))
    if as_json:
        write_json(result)
    elif not quiet:
        from rich.console import Console

        console = Console()
        console.print(Path(result["table"]).read_text(encoding="utf-8"), markup=False, highlight=False, soft_wrap=True)
        for path in [*result["figures"], *([result["problem"]] if result["problem"] else [])]:
            console.print(path, soft_wrap=True, highlight=False, markup=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits 0, 2 on bad input with one line on stderr, 130 on Ctrl-C."""
    run_app(app, "python -m analyses.tradeoff", arguments, interrupted="rerun the same command to resume")


def _chosen(names: Sequence[str] | None, known: Sequence[str], option: str) -> list[str]:
    from unlearning.common.errors import nearest

    for name in names or ():
        if name not in known:
            raise InputError(
                f"{option} {name}: there is none{nearest(name, known) or ';'} there are {', '.join(known)}"
            )
    return list(names or known)


def _entries(names: Sequence[str] | None) -> list[Entry]:
    by_name = {entry.name: entry for entry in ENTRIES}
    return [by_name[name] for name in _chosen(names, tuple(by_name), "--name")]


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--seeds {text}: write numbers, as 0,1,2") from None
    return list(dict.fromkeys(seeds))
