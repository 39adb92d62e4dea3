"""`dissect decompose`: split what unlearning changed in each layer into weights, coefficients and both."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dissect.cli import options
from dissect.cli.loading import (
    check_one_process,
    choose_reading,
    find_data,
    open_control,
    open_pair,
    open_prompts,
    short_name,
)
from dissect.cli.report import earlier_run, figure_formats, report
from dissect.runtime.processes import ALONE

if TYPE_CHECKING:
    from dissect.decomposition.result import DecompositionResult

EXAMPLES = """\b
Examples:
  dissect decompose --base demo:base --unlearned demo:npo
  dissect decompose --base demo:base --unlearned demo:grad_diff --sites mlp_out --limit 64 --out runs/split
  dissect decompose --base ./base --unlearned ./npo --control ./control --data forget.json --format html,pdf
  dissect decompose --base ./base --unlearned ./npo --data concepts.json --scoring notebook --json
"""


def command(
    *,
    pair: options.PairOptions,
    data: options.Data = None,
    sites: Annotated[
        str,
        typer.Option(
            metavar="LIST", help="Outputs to split: mlp_out (down projection), attn_out (attention output projection)."
        ),
    ] = "mlp_out,attn_out",
    null: options.Null = 0,
    scoring: options.Scoring = "answer",
    max_new_tokens: options.AnswerTokens = 30,
    prompts: options.PromptOptions,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 16,
    stream: options.Stream = None,
    models: options.ModelOptions,
    output: options.OutputOptions,
) -> None:
    """Split each layer's change into weights, coefficients and both, and add each to the unlearned model (KRS)."""
    formats = figure_formats(output.formats)
    options.choice("--scoring", scoring, "answer", "notebook")
    data = find_data(data, pair.base)
    check_one_process("decompose")
    from dissect.decomposition.run import decompose, parse_decomposed
    from dissect.decomposition.tables import print_decomposition

    known = parse_decomposed(sites)
    reading = choose_reading(prompts, pair, quiet=output.quiet, scoring=scoring)
    opened = open_pair(pair, models, ALONE, quiet=output.quiet, stream=stream)
    asked = open_prompts(
        data,
        opened,
        reading,
        scoring=scoring,  # type: ignore[arg-type]
        max_new_tokens=max_new_tokens,
    )
    out = output.out or Path("runs") / run_name(pair.unlearned, scoring, null)
    earlier = earlier_run(out)
    result = decompose(
        opened,
        asked,
        sites=known,
        control=open_control(pair.control, opened, models, quiet=output.quiet, align=pair.align),
        null=null,
        batch_size=batch_size,
        seed=seed,
        out=out,
        progress=not output.quiet,
    )
    page = ("figure", "figures/krs.html")
    report(
        result,
        out,
        formats,
        output,
        print_tables=print_decomposition,
        page=page,
        earlier=earlier,
        notes=_undefined(result),
    )


def run_name(unlearned: str, scoring: str, null: int) -> str:
    """Return the name of the default run directory.

    Args:
        unlearned: Name of the unlearned model.
        scoring: Positions that are scored.
        null: Number of null models.

    Returns:
        A name such as `decompose-demo-npo-null3`.
    """
    parts = ["decompose", short_name(unlearned), *([f"null{null}"] if null else [])]
    return "-".join([*parts, *([] if scoring == "answer" else [scoring])])


def _undefined(result: "DecompositionResult") -> Iterator[str]:
    names = {"krs": "KRS", "share": "share", "direct": "direct contribution"}
    for (arm, number, reason), cell in result.undefined().groupby(["arm", "number", "reason"], sort=False):
        alone = cell[(cell["first_layer"] == cell["last_layer"]) & (number == "share")]
        layers = ", ".join(f"{row['site']} {row['first_layer']}" for _, row in alone.iterrows())
        where = f" ({layers})" if layers else ""
        yield f"{cell['examples'].max()} examples have no {names[str(number)]} in the {arm} arm{where}: {reason}"
