"""`dissect behave`: what both models say and know, on forget and on retain prompts."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dissect import zoo
from dissect.cli import options
from dissect.cli.loading import (
    check_data,
    check_one_process,
    choose_reading,
    find_data,
    open_control,
    open_pair,
    short_name,
)
from dissect.cli.report import earlier_run, figure_formats, report
from dissect.runtime.processes import ALONE

if TYPE_CHECKING:
    from dissect.behaviour.prompts import Sources

EXAMPLES = """\b
Examples:
  dissect behave --base demo:base --unlearned demo:npo
  dissect behave --base demo:base --unlearned demo:grad_diff --limit 60 --out runs/damage
  dissect behave --base ./base --unlearned ./npo --control ./control --data forget.json --retain retain.json
  dissect behave --base ./llama --unlearned ./llama-npo --data concepts.json --format html,pdf
  dissect behave --base ./base --unlearned ./npo --data a.json --retain b.json --completions texts.json --json
"""


def command(
    *,
    pair: options.PairOptions,
    data: options.Data = None,
    retain: options.Retain = None,
    completions: Annotated[
        Path | None,
        typer.Option(metavar="T", help="File of texts to continue.  [default: those in --data, if there are any]"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of a generation, in tokens.")] = 100,
    prompts: options.PromptOptions,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 16,
    models: options.ModelOptions,
    output: options.OutputOptions,
) -> None:
    """Compare what both models say and know, on forget prompts, retain prompts and texts to continue."""
    formats = figure_formats(output.formats)
    data = find_data(data, pair.base)
    for flag, file in (("--retain", retain), ("--completions", completions)):
        check_data(flag, file)
    sources = _sources(data, retain, completions, pair.base)
    check_one_process("behave")
    reading = choose_reading(prompts, pair, quiet=output.quiet)
    opened = open_pair(pair, models, ALONE, quiet=output.quiet)
    from dissect.behaviour.prompts import read_questions
    from dissect.behaviour.run import behave
    from dissect.behaviour.tables import print_behaviour

    asked = read_questions(sources, opened.tokenizer, reading, answers_from=opened.base)
    out = output.out or Path("runs") / f"behave-{short_name(pair.unlearned)}"
    earlier = earlier_run(out)
    result = behave(
        opened,
        asked.forget,
        asked.retain,
        completions=asked.completion,
        true_answers=asked.true_answers,
        control=open_control(pair.control, opened, models, quiet=output.quiet, align=pair.align),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
        out=out,
        progress=not output.quiet,
    )
    page = ("figure", "figures/behaviour.html")
    report(result, out, formats, output, print_tables=print_behaviour, page=page, earlier=earlier)


def _sources(data: Path, retain: Path | None, completions: Path | None, base: str) -> "Sources":
    """Return the files, checked; the retain prompts of a built-in pair are its own unless others are named."""
    from dissect.behaviour.prompts import Sources

    sources = Sources(data, retain, completions)
    if retain is None and base in zoo.BUILTIN and not sources.has_own_retain:
        sources = Sources(data, zoo.question_set("retain"), completions)
    sources.check()
    return sources
