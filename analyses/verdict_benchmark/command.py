"""The ground truth that verdicts are checked against: models of known truth, under every test.

    OUT/models/FAMILY/MODEL/    checkpoints (`analyses.verdict_benchmark.families`)
    OUT/tests/FAMILY/MODEL/     results of every test (`analyses.verdict_benchmark.run_tests`)
    OUT/rewritten/FAMILY/MODEL/ the same of the models written otherwise at random (`--rewritten`)
    OUT/judged.csv              every model of the report with its verdicts and all numbers
    OUT/moved.csv               how far the verdicts of rewritten models are from those of the models as they are
    OUT/rates.csv, labels-*.csv, power-*.csv, table.md, figures/*

A family is an architecture and a seed. The seeds on which the rule is fitted and those of the report are fixed here,
before anything is fitted: `CALIBRATION` and `REPORT`.
"""

import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from unlearning.common.errors import InputError
from unlearning.common.terminal import run_app

CALIBRATION = (3,)
"""Seeds on which the rules and the attacks' constants are fitted.

The form of the first rule was found on seeds 1 to 4: fitted on 1 and 2, without the standard deviation between training
runs, it called 4 of the 32 models of seeds 3 and 4 suppressed that hold nothing.
"""

REPORT = (6, 7)
"""Seeds that are used for nothing but the report."""

QUICK_SEED = 5
QUICK_MODELS = (
    "never-order1",
    "never-order2",
    "never-npo",
    "npo-mild",
    "dpo-strong",
    "hidden-last-mlp",
    "adapter-refusal",
    "part-0.5-npo",
)
"""Models of `--quick`: one family of each architecture, judged with the frozen rule; nothing is fitted."""

_EXAMPLES = """\b
Examples:
  python -m analyses.verdict_benchmark --format html,svg
  python -m analyses.verdict_benchmark --quick
  python -m analyses.verdict_benchmark --seeds 6,7 --tests verdict --rewritten
  python -m analyses.verdict_benchmark --seeds 3 --fit dissect/verdicts/verdict_rule.json
  python -m analyses.verdict_benchmark --seeds 1 --architectures llama --only never-order1,npo-strong
"""

app = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)


def run_family(
    architecture: str,
    seed: int,
    out: Path,
    only: Sequence[str] | None = None,
    tests: Sequence[str] | None = None,
    is_rewritten: bool = False,
) -> None:
    """Build a family's models and run tests on each; existing models and results are kept.

    Args:
        architecture: llama or neox.
        seed: Seed of the family.
        out: Directory of the benchmark.
        only: Names of the models; all by default.
        tests: Names of the tests; all by default.
        is_rewritten: Whether to run the verdict's tests on every model written otherwise as well.
    """
    import logging

    import torch
    from transformers.utils import logging as transformers_logging

    from analyses.verdict_benchmark.constructions import constructions
    from analyses.verdict_benchmark.families import Family, build, build_ground
    from analyses.verdict_benchmark.run_tests import OF_VERDICT, Examiner

    torch.set_num_threads(1)  # sums over a batch depend on the number of threads
    transformers_logging.disable_progress_bar()
    family = Family(architecture, seed, out / "models")
    build_ground(family)
    examiner = Examiner(family, out)
    parent = multiprocessing.parent_process()
    for one in constructions(family):
        if parent is not None and not parent.is_alive():
            # The run was killed. If it is started again, two processes would build every model in the same directory.
            return
        if only is None or one.name in only:
            build(family, one.name, one.make, truth=one.truth, recipe=dict(one.recipe))
            examiner.examine(one.name, tests)
            if is_rewritten:
                examiner.examine(one.name, OF_VERDICT, is_rewritten=True)
            logging.getLogger(__name__).info("%s %s", family.name, one.name)


def run_all(
    architectures: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    *,
    workers: int,
    only: Sequence[str] | None,
    tests: Sequence[str] | None = None,
    is_rewritten: bool = False,
) -> None:
    """Run all families, several at a time, each in a process with one thread.

    Args:
        architectures: Architectures of the families.
        seeds: Seeds of the families.
        out: Directory of the benchmark.
        workers: Number of families at a time.
        only: Names of the models; all for None.
        tests: Names of the tests; all for None.
        is_rewritten: Whether to run the verdict's tests on every model written otherwise as well.
    """
    jobs = [(architecture, seed, out, only, tests, is_rewritten) for seed in seeds for architecture in architectures]
    if workers == 1:
        for job in jobs:
            run_family(*job)
        return
    with multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=1) as pool:
        pool.starmap(run_family, jobs, chunksize=1)


@app.command(epilog=_EXAMPLES)
def command(
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Output directory; an interrupted run is resumed from it.",
            show_default="runs/verdict-benchmark, with --quick runs/verdict-quick",
        ),
    ] = None,
    seeds: Annotated[
        str,
        typer.Option(
            metavar="LIST", help="Seeds of the families to build and test; 3 calibrates, the others are reported."
        ),
    ] = ",".join(map(str, (*CALIBRATION, *REPORT))),
    architectures: Annotated[str, typer.Option(metavar="LIST", help="llama, neox or both.")] = "llama,neox",
    only: Annotated[
        str | None, typer.Option(metavar="LIST", help="Build and test only these models of each family.")
    ] = None,
    tests: Annotated[
        str, typer.Option(metavar="all|verdict", help="Run all tests, or only those that verdicts are made of.")
    ] = "all",
    rewritten: Annotated[
        bool, typer.Option("--rewritten", help="Also test every model written otherwise, without changing its outputs.")
    ] = False,
    workers: Annotated[int, typer.Option(help="Number of families at a time, each on one core.")] = 2,
    quick: Annotated[
        bool, typer.Option("--quick", help="Use two small sets of models instead; takes ten minutes.")
    ] = False,
    fit: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Fit the rules on the calibration families and write them to FILE."),
    ] = None,
    formats: Annotated[
        str, typer.Option("--format", metavar="LIST", help="Formats of the figures: html, pdf, svg, png.")
    ] = "html",
) -> None:
    """Build models of known truth, run every test on them, and compare the verdict and every rival with the truth."""
    names = architectures.split(",")
    for name in names:
        if name not in ("llama", "neox"):
            raise InputError(f"--architectures must be llama, neox or both, got {name}")
    try:
        numbers = [int(part) for part in seeds.split(",")]
    except ValueError:
        raise InputError(f"--seeds must be numbers such as 1,2, got {seeds}") from None
    from analyses.verdict_benchmark.constructions import constructions
    from analyses.verdict_benchmark.families import Family
    from analyses.verdict_benchmark.run_tests import OF_VERDICT
    from analyses.verdict_benchmark.write import fitted_rules, write_report, write_rules
    from dissect.plotting import check_formats
    from dissect.verdicts.rule import frozen_rules

    wanted = formats.split(",")
    check_formats(wanted)
    out = out or Path("runs/verdict-quick" if quick else "runs/verdict-benchmark")
    if quick:
        numbers, only = [QUICK_SEED], ",".join(QUICK_MODELS)
    chosen = None if only is None else only.split(",")
    families = [Family(name, number, out) for name in names for number in numbers]
    known = {one.name for family in families for one in constructions(family)}
    for name in chosen or []:
        if name not in known:
            raise InputError(f"--only must be some of {', '.join(sorted(known))}, got {name}")
    if tests not in ("all", "verdict"):
        raise InputError(f"--tests must be all or verdict, got {tests}")
    run_all(
        names,
        numbers,
        out,
        workers=workers,
        only=chosen,
        tests=None if tests == "all" else OF_VERDICT,
        is_rewritten=rewritten,
    )
    report = [seed for seed in numbers if seed not in CALIBRATION]
    rules = frozen_rules() if fit is None else fitted_rules(out, names, CALIBRATION)
    if report:
        rules = write_report(out, names, CALIBRATION, report, rules, formats=wanted)
    if fit is not None:
        write_rules(rules, fit)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits 0, 2 on bad input with one line on stderr, 130 on Ctrl-C."""
    run_app(app, "python -m analyses.verdict_benchmark", arguments, interrupted="rerun the same command to resume")
