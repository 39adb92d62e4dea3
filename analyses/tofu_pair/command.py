"""The real pair: real TOFU authors, a model that knew some of them, and two ways to make it forget.

Trains a pretrained model (`trunk`), a base, a control (`never`), and the unlearned models npo and grad_diff
(`analyses.tofu_pair.models`), measures what they answer, and patches the base's activations into both unlearned models
and into the control.

    OUT/data/{forget,retain}.jsonl          the questions, with their authors
    OUT/data/{forget,retain}_perturbed.jsonl  those of TOFU's evaluation about these authors, for `unlearn eval tofu`
    OUT/models/{trunk,base,never,npo,grad_diff}
    OUT/quality.json                        how the models answer, what they cost
    OUT/patch-{npo,grad_diff}/              runs of `dissect patch`
"""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from analyses.tofu_pair.data import find_tofu, perturbed, select_authors
from unlearning.common.errors import InputError
from unlearning.common.terminal import run_app, write_json
from unlearning.data.records import Record

if TYPE_CHECKING:
    from rich.table import Table

    from analyses.tofu_pair.models import Recipe, Workshop
    from dissect import SweepResult

WINDOW = 5
SITES = ("mlp_coef", "attn_out", "mlp_coef+attn_out")

_EXAMPLES = """\b
Examples:
  python -m analyses.tofu_pair --data ../shared/data
  DISSECT_DATA=../shared/data python -m analyses.tofu_pair --out runs/tofu --device cuda
  python -m analyses.tofu_pair --data ../shared/data --authors 20 --out runs/tofu-20 --json
"""

app = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)


def run(
    recipe: "Recipe", *, data: str | Path | None, out: Path, device: str = "auto", progress: bool = True
) -> dict[str, Any]:
    """Do everything that is not done yet.

    Args:
        recipe: Numbers of authors, sizes and schedules.
        data: TOFU's folder or the directory that holds it; None reads $DISSECT_DATA.
        out: Directory with the content of the module's docstring.
        device: auto, cpu or cuda.
        progress: Whether to show progress bars on stderr.

    Returns:
        The content of the summary tables.

    Raises:
        InputError: TOFU's files are missing, `out` holds another configuration, or a model misses the recipe's aims.
    """
    from analyses.tofu_pair.models import Workshop

    tofu = find_tofu(data)
    subset = select_authors(
        tofu,
        trunk=recipe.trunk_authors,
        late=recipe.late_authors,
        forget=recipe.forget_authors,
        seed=recipe.seed,
    )
    write_data({"forget": subset.forget, "retain": subset.retain, **perturbed(tofu, subset)}, out / "data")
    workshop = Workshop(recipe, subset, out / "models", device=device, progress=progress)
    stages = workshop.build()
    quality = measure(workshop, stages, out / "quality.json")
    results = patch_models(out, device=device, progress=progress)
    peaks = {name: json.loads(result.peaks().to_json(orient="records")) for name, result in results.items()}
    return {
        "quality": quality,
        "patching": peaks,
        "examples": len(subset.forget),
        "window": _window(results),
        "figures": {name: str(out / f"patch-{name}" / "figures" / "krs.html") for name in results},
    }


def write_data(sets: Mapping[str, Sequence[Record]], folder: Path) -> None:
    """Write sets of questions as JSON lines, each under its name.

    Args:
        sets: Records by the name of the set.
        folder: Directory to write to.

    Raises:
        InputError: The directory holds other questions.
    """
    from unlearning.common.runs import write_bytes

    for name, records in sets.items():
        path = folder / f"{name}.jsonl"
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
        if path.exists():
            if path.read_bytes() != lines:
                raise InputError(
                    f"{path}: holds other authors' questions. Give another `out`, or remove {folder.parent}"
                )
        else:
            write_bytes(path, lines)


def measure(workshop: "Workshop", stages: dict[str, dict[str, Any]], path: Path) -> dict[str, Any]:
    """Answer all forget and retain questions greedily with every model, and write `quality.json`.

    Models that the file already contains are not measured again.

    Args:
        workshop: The models.
        stages: Record of each model's stage.
        path: The file.

    Returns:
        The content of the file.
    """
    from dataclasses import asdict

    from analyses.tofu_pair.models import measure_quality
    from unlearning.checkpoints.load import load_tokenizer, load_weights
    from unlearning.common.runs import write_json as write_file

    known = json.loads(path.read_text(encoding="utf-8"))["models"] if path.is_file() else {}
    tokenizer = load_tokenizer(workshop.directory("trunk"))
    subset = workshop.subset
    found: dict[str, Any] = {}
    for name, stage in stages.items():
        if known.get(name, {}).get("stage", {}).get("fingerprint") == stage["fingerprint"]:
            found[name] = known[name]
            continue
        start = time.perf_counter()
        model = load_weights(workshop.directory(name))
        model.to(workshop.torch_device)  # type: ignore[arg-type]
        parameters = sum(parameter.numel() for parameter in model.parameters())
        found[name] = {
            "parameters": parameters,
            "forget": asdict(measure_quality(model, tokenizer, subset.forget)),
            "retain": asdict(measure_quality(model, tokenizer, subset.retain)),
            "retain_late": asdict(measure_quality(model, tokenizer, subset.late)),
            "seconds_to_measure": round(time.perf_counter() - start, 1),
            "stage": stage,
        }
    quality = {
        "authors": {part: sorted({r["group"] for r in getattr(subset, part)}) for part in ("trunk", "late", "forget")},
        "seconds_to_train": round(sum(stage["seconds"] for stage in stages.values()), 1),
        "models": found,
    }
    write_file(path, quality)
    return quality


def patch_models(out: Path, *, device: str = "auto", progress: bool = True) -> dict[str, "SweepResult"]:
    """Patch the base's activations on the forget questions into each unlearned model and into the control.

    Args:
        out: Directory of the analysis.
        device: auto, cpu or cuda.
        progress: Whether to show progress bars on stderr.

    Returns:
        The result for each unlearned model.
    """
    from analyses.tofu_pair.models import UNLEARNED
    from dissect import load_pair, load_prompts, patch

    models = out / "models"
    results = {}
    for name in UNLEARNED:
        pair = load_pair(models / "base", models / name, device=None if device == "auto" else device)
        prompts = load_prompts(out / "data" / "forget.jsonl", pair.tokenizer)
        results[name] = patch(
            pair,
            prompts,
            sites=SITES,
            window=min(WINDOW, pair.n_layers - 1 + pair.n_layers % 2),
            control=str(models / "never"),
            out=out / f"patch-{name}",
            progress=progress,
        )
        results[name].save_figures(out / f"patch-{name}")
    return results


def quality_table(quality: dict[str, Any]) -> "Table":
    """Return a table of how the models answer."""
    from rich.table import Table

    first = next(iter(quality["models"].values()))
    title = f"Greedy answers: ROUGE-L recall (exact match); {first['parameters'] / 1e6:.1f} million parameters"
    table = Table("model", "forget", "retain", "late retain", "steps", "seconds", title=title)
    for name, model in quality["models"].items():
        asked = [model[key] for key in ("forget", "retain", "retain_late")]
        cells = [f"{part['rouge_l_recall']:.2f} ({part['exact_match']:.2f})" for part in asked]
        table.add_row(name, *cells, str(model["stage"]["steps"]), f"{model['stage']['seconds']:.0f}")
    return table


def peaks_table(peaks: dict[str, list[dict[str, Any]]], examples: int, window: int) -> "Table":
    """Return a table of the peaks of recovery, and of how much of it comes back in the control.

    Args:
        peaks: Rows of the peaks by unlearned model.
        examples: Number of forget questions.
        window: Number of layers patched together.

    Returns:
        The table.
    """
    from rich.box import SIMPLE
    from rich.table import Table

    title = f"Patched from the base: {examples} forget questions, window {window}"
    table = Table(box=SIMPLE, title=title, padding=(0, 1, 0, 0))
    for heading in ("unlearned", "site", "peak", "KRS", "control", "difference (95 % CI)"):
        table.add_column(heading, no_wrap=True)
    for name, rows in peaks.items():
        for row in rows:
            gap, low, high = (_signed(row[f"difference{end}"]) for end in ("", "_low", "_high"))
            scores = [f"{row[key]:.3f}" for key in ("krs", "control_krs")]
            table.add_row(name, row["site"], str(row["centre"]), *scores, f"{gap} ({low} to {high})")
        table.add_section()
    return table


@app.command(epilog=_EXAMPLES)
def command(
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Directory that holds tofu/.  [default: $DISSECT_DATA]")
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Output directory; an interrupted run is resumed from it.")
    ] = Path("runs/tofu"),
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seed: Annotated[int, typer.Option(help="Random seed of the authors, the weights and the orders.")] = 0,
    authors: Annotated[int | None, typer.Option(metavar="N", help="Number of authors in all.  [default: 40]")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print no progress and no summary.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a machine-readable result on stdout.")] = False,
) -> None:
    """Build a pair from the real TOFU data, and measure what patching brings back."""
    find_tofu(data)  # before the slow imports
    from dataclasses import replace

    from analyses.tofu_pair.models import Recipe

    recipe = Recipe() if authors is None else Recipe().with_authors(authors)
    if not quiet:
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        logging.getLogger("analyses").setLevel(logging.INFO)
    report = run(replace(recipe, seed=seed), data=data, out=out, device=device, progress=not quiet)
    if as_json:
        write_json(report)
    elif not quiet:
        from rich.console import Console

        console = Console()
        console.print(quality_table(report["quality"]))
        console.print(peaks_table(report["patching"], report["examples"], report["window"]))
        for figure in report["figures"].values():
            console.print(f"figure: {figure}", soft_wrap=True, highlight=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits 0, 2 on bad input with one line on stderr, 130 on Ctrl-C."""
    run_app(app, "python -m analyses.tofu_pair", arguments, interrupted="rerun the same command to resume")


def _signed(value: float | None) -> str:
    """Return a number with its sign; an interval of only one group has no ends."""
    return "-" if value is None else f"{value:+.3f}"


def _window(results: dict[str, "SweepResult"]) -> int:
    return int(next(iter(results.values())).configuration["windows"][0])
