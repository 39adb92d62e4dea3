"""Every experiment of "Dissecting Fine-Tuning Unlearning in Large Language Models" (2410.06606), with its controls.

Claims under test: the knowledge comes back when the base's MLP coefficients and attention outputs are restored, and
not when its value vectors are; the coefficients of the final layer do most of it; retained knowledge is damaged. Each
experiment is also done to the control, which never knew, and to models with random updates of the same norms, so that
a claim can rest on a difference.

    OUT/PAIR/{patch,restore,decompose,probe,behave}/   the runs of each pair, gone on with or read where they are
    OUT/findings.csv                                   every number below, one row each, with intervals
    OUT/table.md                                       the same for a reader
    OUT/paper.csv                                      KRS averaged as the paper does: questions, concepts, methods
    OUT/figures/dissecting.*                           that average per family of models

Pairs are the built-in ones, the TOFU pair where `analyses.tofu_pair` has built it, and those of a JSON file: a list of
{"name", "family", "method", "concept", "seed", "base", "unlearned", "control", "forget", "retain"}.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from analyses.dissecting.report import Findings, PairOf
from unlearning.common.errors import InputError
from unlearning.common.terminal import run_app, write_json

if TYPE_CHECKING:
    from dissect import Prompts

_EXAMPLES = """\b
Examples:
  python -m analyses.dissecting
  python -m analyses.dissecting --tofu runs/tofu --limit 64 --format html,svg
  python -m analyses.dissecting --method grad_diff --method npo --limit 64
  python -m analyses.dissecting --pairs pairs.json --no-builtin --out runs/concepts
  python -m analyses.dissecting --limit 24 --null 1 --out runs/quick
"""

app = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)

WINDOWS = (5, "suffix")
"""The paper's width, and the suffixes, of which the first is all layers at once."""


def builtin_pairs() -> list[PairOf]:
    """Return the pairs that come with the toolkit."""
    from dissect import zoo

    return [
        PairOf(
            name=pair.unlearned.replace(":", "-"),
            family=pair.base.partition(":")[0],
            method=pair.unlearned.partition(":")[2],
            concept="world",
            seed=0,
            base=pair.base,
            unlearned=pair.unlearned,
            control=pair.control,
            forget=str(pair.data),
            retain=str(zoo.question_set("retain")),
        )
        for pair in zoo.pairs()
    ]


def tofu_pairs(directory: Path) -> list[PairOf]:
    """Return the pairs that `analyses.tofu_pair` has built.

    Args:
        directory: Its output.

    Returns:
        One pair per unlearning method.

    Raises:
        InputError: A model is missing.
    """
    from analyses.tofu_pair.models import UNLEARNED

    models, data = directory / "models", directory / "data"
    for path in (models / "base", models / "never", *(models / name for name in UNLEARNED)):
        if not (path / "config.json").is_file():
            raise InputError(f"{path}: no model in it; run `python -m analyses.tofu_pair --out {directory}` first")
    return [
        PairOf(
            name=f"tofu-{method}",
            family="TOFU",
            method=method,
            concept="authors",
            seed=0,
            base=str(models / "base"),
            unlearned=str(models / method),
            control=str(models / "never"),
            forget=str(data / "forget.jsonl"),
            retain=str(data / "retain.jsonl"),
        )
        for method in sorted(UNLEARNED)
    ]


def read_pairs(path: Path) -> list[PairOf]:
    """Read the pairs that a JSON file lists.

    Args:
        path: The file.

    Returns:
        The pairs, in the file's order.

    Raises:
        InputError: The file is missing or broken, or a record lacks a field or has one too many.
    """
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--pairs {path}: cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"--pairs {path}: no JSON: {error}") from None
    if not isinstance(records, list) or not records:
        raise InputError(f"--pairs {path}: not a list of pairs")
    pairs = []
    for number, record in enumerate(records, start=1):
        fields = set(PairOf.__dataclass_fields__)
        if isinstance(record, dict) and "unrelated" in record:  # its name in version 0.1
            record["retain"] = record.pop("unrelated")
        if not isinstance(record, dict) or set(record) != fields:
            wrong = sorted(fields ^ set(record)) if isinstance(record, dict) else ["not an object"]
            raise InputError(f"--pairs {path}, pair {number}: wrong or missing: {', '.join(wrong)}")
        pairs.append(PairOf(**record))
    return pairs


def dissect_pair(pair: PairOf, out: Path, *, limit: int | None, null: int, progress: bool) -> Findings:
    """Run every experiment on a pair, or read those that are finished."""
    from dissect import behave, decompose, load_model, load_pair, load_prompts, patch, probe, restore

    models = load_pair(pair.base, pair.unlearned)
    control = None if pair.control is None else load_model(pair.control)
    forget, retain = (evenly_spaced(load_prompts(path, models.tokenizer), limit) for path in (pair.forget, pair.retain))
    shared: dict[str, Any] = {"control": control, "progress": progress}
    findings = Findings(
        pair,
        patched=patch(models, forget, window=WINDOWS, null=null, out=out / "patch", **shared),
        restored=restore(models, forget, window=WINDOWS, null=null, out=out / "restore", **shared),
        decomposed=decompose(models, forget, null=null, out=out / "decompose", **shared),
        probed=probe(models, forget, retain=retain, out=out / "probe", **shared),
        behaved=behave(models, forget, retain, out=out / "behave", **shared),
    )
    findings.patched.save_figures(out / "patch")
    findings.restored.save_figures(out / "restore")
    findings.decomposed.save_figures(out / "decompose")
    findings.probed.save_figures(out / "probe")
    findings.behaved.save_figures(out / "behave")
    return findings


def evenly_spaced(prompts: "Prompts", limit: int | None) -> "Prompts":
    """Return at most `limit` prompts, evenly spaced over the file, so that no group is left out by its position."""
    step = 1 if limit is None else -(-len(prompts) // limit)
    return replace(prompts, items=prompts.items[::step])


@app.command(epilog=_EXAMPLES)
def command(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Runs, tables and figures.")] = Path("runs/dissecting"),
    builtin: Annotated[bool, typer.Option("--builtin/--no-builtin", help="Include the built-in pairs.")] = True,
    tofu: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Directory of the TOFU pair (analyses.tofu_pair).")
    ] = None,
    pairs: Annotated[Path | None, typer.Option(metavar="FILE", help="JSON file of more pairs.")] = None,
    method: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Use only pairs of this method; may be repeated.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Use at most N prompts of each set, evenly spaced.")] = None,
    null: Annotated[int, typer.Option(metavar="N", help="Number of models with random updates of the same norm.")] = 3,
    formats: Annotated[
        str, typer.Option("--format", metavar="LIST", help="Formats of the figures: html, pdf, svg, png.")
    ] = "html",
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress bar and no table.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write the findings to stdout as JSON.")] = False,
) -> None:
    """Run every experiment of the paper on every pair, and put its controls beside each number."""
    from analyses.dissecting.report import findings_table, markdown, paper_average
    from dissect.plotting import check_formats, export
    from dissect.sweeps.figures import comparison_figure
    from unlearning.common.runs import write_bytes

    wanted = [name.strip() for name in formats.split(",") if name.strip()]
    check_formats(wanted)
    chosen = [*(builtin_pairs() if builtin else []), *(tofu_pairs(tofu) if tofu is not None else [])]
    chosen += read_pairs(pairs) if pairs is not None else []
    if method:
        known = sorted({pair.method for pair in chosen})
        for name in method:
            if name not in known:
                raise InputError(f"--method {name}: no pair was unlearned by it; there are {', '.join(known)}")
        chosen = [pair for pair in chosen if pair.method in method]
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit}: at least 1")
    if not chosen:
        raise InputError("no pairs: leave --no-builtin out, or name some with --pairs or --tofu")
    twice = sorted({pair.name for pair in chosen if sum(pair.name == other.name for other in chosen) > 1})
    if twice:
        raise InputError(f"two pairs are called {twice[0]}; give each its own name")
    findings = []
    for number, pair in enumerate(chosen, start=1):
        if not quiet:
            sys.stderr.write(f"{pair.name} ({number} of {len(chosen)})\n")
        findings.append(dissect_pair(pair, out / pair.name, limit=limit, null=null, progress=not quiet))
    table, average = findings_table(findings), paper_average(findings)
    text = markdown(table)
    for name, content in (("findings.csv", table.to_csv(index=False)), ("paper.csv", average.to_csv(index=False))):
        write_bytes(out / name, content.encode())
    write_bytes(out / "table.md", text.encode())
    by_family = {str(family): curve for family, curve in average.groupby("family", sort=False)}
    figure = comparison_figure(by_family, columns=len(by_family))
    exported = export(figure, out / "figures" / "dissecting", formats=wanted)
    if exported.problem:
        sys.stderr.write(f"dissecting: {exported.problem}\n")
    if as_json:
        write_json(
            {"findings": json.loads(table.to_json(orient="records")), "figures": [str(p) for p in exported.paths]}
        )
    elif not quiet:
        sys.stdout.write(text)
        sys.stdout.writelines(f"{path}\n" for path in (out / "findings.csv", out / "table.md", *exported.paths))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the analysis; exits 0, 2 on bad input with one line on stderr, 130 on Ctrl-C."""
    run_app(app, "python -m analyses.dissecting", arguments, interrupted="rerun the same command to resume")
