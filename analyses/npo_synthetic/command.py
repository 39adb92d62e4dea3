"""NPO's synthetic experiment: unlearning two-class logistic regression on random features.

Claims under test: NPO forgets without the damage that gradient ascent does; its divergence from the fine-tuned model
grows as the logarithm of the steps, that of gradient ascent as a line; and NPO goes to gradient ascent as beta goes
to 0.

    OUT/run.json            configuration, versions, wall time
    OUT/results.parquet     a row an evaluation: experiment, alpha, method, beta, learning_rate, seed, step, the metrics
    OUT/summary.json        medians, orderings at the end, fits of the growth with intervals
    OUT/table.md            the same for a reader
    OUT/figures/*           distances over steps, trade-off, the limit, the growth

Source: Negative Preference Optimization, arXiv 2404.05868, sections 3.2 and 4.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unlearning.common.errors import InputError
from unlearning.common.terminal import run_app, write_json

if TYPE_CHECKING:
    import pandas as pd

    from analyses.npo_synthetic.methods import Method, Trajectories
    from analyses.npo_synthetic.world import Protocol

_EXAMPLES = """\b
Examples:
  python -m analyses.npo_synthetic
  python -m analyses.npo_synthetic --format html,svg,pdf
  python -m analyses.npo_synthetic --seeds 1000,2000 --steps 500 --out runs/npo-short
  python -m analyses.npo_synthetic --quick --json --out runs/npo-quick
"""

app = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)

COMPARISON, LIMIT = "comparison", "limit"
LEAST_LIMIT_STEPS = 100
_SECONDS = {"finetune": 13.0, COMPARISON: 17.0, LIMIT: 37.0}
"""What the parts take of each other, for the progress bar."""


def full_protocol() -> "Protocol":
    """Return the paper's protocol."""
    from analyses.npo_synthetic.world import Protocol

    return Protocol()


def quick_protocol() -> "Protocol":
    """Return a small protocol that runs in seconds; its numbers mean nothing."""
    from analyses.npo_synthetic.world import Protocol

    return Protocol(
        seeds=(1000, 2000),
        steps=60,
        limit_steps=200,
        finetuning_steps=2500,
        n_features=16,
        n_retain=200,
        n_forget=40,
        n_evaluation=50,
    )


def run(protocol: "Protocol", out: Path, *, progress: bool = True) -> "pd.DataFrame":
    """Run the experiment, continue it, or read its results if it is finished.

    Args:
        protocol: Seeds, sizes and lengths.
        out: The directory that the module's docstring describes.
        progress: Show a progress bar on stderr.

    Returns:
        The rows of `results.parquet`.

    Raises:
        InputError: `out` holds another run, or a model did not converge or has weights that are not finite.
    """
    import pandas as pd

    from analyses.npo_synthetic.methods import COMPARED, LIMIT_ALPHA, unlearn
    from analyses.npo_synthetic.methods import LIMIT as LIMIT_METHODS
    from analyses.npo_synthetic.report import summary
    from analyses.npo_synthetic.world import draw_world, finetune
    from unlearning.common.progress import Progress
    from unlearning.common.runs import Stopwatch, open_run, peak_memory_bytes, read_frame

    directory = open_run(out, _configuration(protocol), {})
    if directory.is_complete:
        return read_frame(out / "results.parquet")
    watch, done = Stopwatch(), dict(directory.parts())
    plan = {alpha: [(COMPARISON, methods)] for alpha, methods in COMPARED.items()}
    plan[LIMIT_ALPHA].append((LIMIT, LIMIT_METHODS))
    left = {alpha: [part for part in parts if _part(part[0], alpha) not in done] for alpha, parts in plan.items()}
    seconds = sum(_SECONDS["finetune"] + sum(_SECONDS[name] for name, _ in parts) for parts in left.values() if parts)
    try:
        with Progress(seconds, "unlearning", show=progress) as bar, _one_thread():
            for alpha, parts in left.items():
                if not parts:
                    continue
                world = draw_world(alpha, protocol)
                models = finetune(world, protocol, _share(bar.advance, _SECONDS["finetune"]))
                for name, methods in parts:
                    is_limit = name == LIMIT
                    trajectories = unlearn(
                        world,
                        models,
                        methods,
                        steps=protocol.limit_steps if is_limit else protocol.steps,
                        evaluate_every=protocol.limit_evaluate_every if is_limit else protocol.evaluate_every,
                        advance=_share(bar.advance, _SECONDS[name]),
                    )
                    rows = tidy(trajectories, methods, protocol.seeds).assign(experiment=name, alpha=alpha)
                    done[_part(name, alpha)] = rows
                    directory.keep_part(_part(name, alpha), rows)
    except BaseException:
        directory.pause(wall_time_s=watch.seconds)
        raise
    frame = pd.concat([done[_part(name, alpha)] for alpha, parts in plan.items() for name, _ in parts])
    frame = frame[["experiment", "alpha", *(name for name in frame if name not in ("experiment", "alpha"))]]
    frame = frame.reset_index(drop=True)
    directory.finish(
        frame,
        summary(frame, protocol.limit_steps),
        wall_time_s=watch.seconds,
        measured={"peak_memory_bytes": peak_memory_bytes()},
    )
    return frame


def tidy(trajectories: "Trajectories", methods: "Sequence[Method]", seeds: Sequence[int]) -> "pd.DataFrame":
    """Return one row per evaluation, in the order of methods, seeds and steps."""
    import pandas as pd

    from analyses.npo_synthetic.methods import METRICS

    values = trajectories.values.permute(3, 2, 0, 1)  # method, seed, evaluation, metric
    keys = [
        (method.name, float("nan") if method.beta is None else method.beta, method.learning_rate, seed, step)
        for method in methods
        for seed in seeds
        for step in trajectories.steps
    ]
    named = pd.DataFrame(keys, columns=["method", "beta", "learning_rate", "seed", "step"])
    return named.join(pd.DataFrame(values.flatten(0, 2).numpy(), columns=list(METRICS)))


@app.command(epilog=_EXAMPLES)
def command(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Results, tables and figures.")] = Path("runs/npo-synthetic"),
    seeds: Annotated[
        str | None, typer.Option(metavar="LIST", help="Random seeds, such as 1000,2000.  [default: the paper's five]")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of unlearning in the comparison.  [default: 2000]")] = None,
    limit_steps: Annotated[
        int | None, typer.Option(help="Steps of unlearning in the limit of small beta.  [default: 10000]")
    ] = None,
    finetuning_steps: Annotated[
        int | None, typer.Option(help="Steps of fine-tuning before unlearning.  [default: 20000]")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Use small sizes: they test the command, their numbers mean nothing.")
    ] = False,
    formats: Annotated[
        str, typer.Option("--format", metavar="LIST", help="Formats of the figures: html, svg, pdf, png.")
    ] = "html",
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress bar and no table.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write the summary to stdout as JSON.")] = False,
) -> None:
    """Compare the unlearning methods where the retrained model is known, and measure how they diverge."""
    from analyses.npo_synthetic.figures import figures
    from analyses.npo_synthetic.fits import growth_table
    from analyses.npo_synthetic.report import markdown, summary
    from dissect.plotting import check_formats, export
    from unlearning.common.runs import write_bytes

    wanted = [name.strip() for name in formats.split(",") if name.strip()]
    check_formats(wanted)
    protocol = quick_protocol() if quick else full_protocol()
    if seeds is not None:
        protocol = replace(protocol, seeds=read_seeds(seeds))
    for option, number, least in (
        ("--steps", steps, 1),
        ("--limit-steps", limit_steps, LEAST_LIMIT_STEPS),
        ("--finetuning-steps", finetuning_steps, 1),
    ):
        if number is not None and number < least:
            raise InputError(f"{option} {number}: at least {least}")
    protocol = replace(
        protocol,
        steps=steps or protocol.steps,
        limit_steps=limit_steps or protocol.limit_steps,
        finetuning_steps=finetuning_steps or protocol.finetuning_steps,
    )

    frame = run(protocol, out, progress=not quiet)
    found = summary(frame, protocol.limit_steps)
    text = markdown(found)
    write_bytes(out / "table.md", text.encode())
    comparison, limit = (frame[frame["experiment"] == name] for name in (COMPARISON, LIMIT))
    paths: list[Path] = []
    problem = None
    for name, figure in figures(comparison, limit, growth_table(limit, protocol.limit_steps)).items():
        exported = export(figure, out / "figures" / name, formats=wanted)
        paths += exported.paths
        problem = problem or exported.problem
    if problem:
        sys.stderr.write(f"npo_synthetic: {problem}\n")
    if as_json:
        write_json({**found, "figures": [str(path) for path in paths]})
    elif not quiet:
        sys.stdout.write(text)
        sys.stdout.writelines(f"{path}\n" for path in (out / "table.md", *paths))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits 0, 2 on bad input with one line on stderr, 130 on Ctrl-C."""
    run_app(app, "python -m analyses.npo_synthetic", arguments, interrupted="rerun the same command to resume")


def read_seeds(text: str) -> tuple[int, ...]:
    """Read a comma-separated list of seeds.

    Args:
        text: The list.

    Returns:
        The seeds.

    Raises:
        InputError: The list is empty, or holds a seed twice or something that is not a whole number from 0 on.
    """
    try:
        seeds = tuple(int(word) for word in text.split(","))
    except ValueError:
        raise InputError(f"--seeds {text}: whole numbers with commas between them, such as 1000,2000") from None
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise InputError(f"--seeds {text}: whole numbers from 0, each once")
    return seeds


def _configuration(protocol: "Protocol") -> dict[str, Any]:
    """Return everything that the numbers depend on, as JSON reads it back."""
    from analyses.npo_synthetic.methods import COMPARED
    from analyses.npo_synthetic.methods import LIMIT as LIMIT_METHODS
    from unlearning.common.hashing import hash_json

    methods = [*(method for alpha in COMPARED for method in COMPARED[alpha]), *LIMIT_METHODS]
    made: dict[str, Any] = json.loads(json.dumps(asdict(protocol)))
    return {"command": "npo_synthetic", **made, "methods": hash_json([asdict(method) for method in methods])}


def _part(name: str, alpha: float) -> str:
    return f"{name}-{alpha:g}"


def _share(advance: Callable[[float], None], whole: float) -> Callable[[float], None]:
    return lambda share: advance(share * whole)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread: the products are so small that two threads take longer than one."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
