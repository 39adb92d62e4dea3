"""`dissect probe`: how far the MLP coefficients moved, and how many of them must be restored for recovery."""

from dataclasses import replace
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
    from dissect.behaviour.prompts import Reading, Sources
    from dissect.coefficients.result import ProbeResult
    from dissect.models.pair import ModelPair
    from dissect.prompts.prompts import Prompts

EXAMPLES = """\b
Examples:
  dissect probe --base demo:base --unlearned demo:npo --limit 60
  dissect probe --base demo:base --unlearned demo:grad_diff --last-layers 1 --out runs/last-layer
  dissect probe --base ./base --unlearned ./npo --control ./control --data forget.json --retain retain.json
  dissect probe --base ./llama --unlearned ./llama-npo --data concepts.json --format html,pdf
"""


def command(
    *,
    pair: options.PairOptions,
    data: options.Data = None,
    retain: options.Retain = None,
    concepts: Annotated[
        bool, typer.Option("--concepts/--no-concepts", help="Compare the value vectors that the data names.")
    ] = True,
    last_layers: Annotated[int, typer.Option(metavar="N", help="Scale the coefficients of the last N layers.")] = 3,
    top: Annotated[int, typer.Option(metavar="N", help="List the N neurons that changed most.")] = 20,
    draws: Annotated[int, typer.Option(metavar="N", help="Draw random and norm-matched neurons N times.")] = 3,
    prompts: options.PromptOptions,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 16,
    models: options.ModelOptions,
    output: options.OutputOptions,
) -> None:
    """Measure how far the MLP coefficients moved, and the recovery when k of them are restored (KRS)."""
    formats = figure_formats(output.formats)
    data = find_data(data, pair.base)
    check_data("--retain", retain)
    check_one_process("probe")
    from dissect.behaviour.prompts import Sources
    from dissect.coefficients.concept_vectors import read_concepts

    named = read_concepts(data) if concepts else ()
    reading = choose_reading(prompts, pair, quiet=output.quiet)
    opened = open_pair(pair, models, ALONE, quiet=output.quiet)
    forget, retained = _read_prompts(Sources(data, retain), reading, opened)
    from dissect.coefficients.run import probe
    from dissect.coefficients.tables import print_probe

    out = output.out or Path("runs") / f"probe-{short_name(pair.unlearned)}"
    earlier = earlier_run(out)
    result = probe(
        opened,
        forget,
        retain=retained,
        concepts=named,
        control=open_control(pair.control, opened, models, quiet=output.quiet, align=pair.align),
        last_layers=last_layers,
        top=top,
        draws=draws,
        seed=seed,
        batch_size=batch_size,
        out=out,
        progress=not output.quiet,
    )
    page = ("figure", "figures/neurons.html")
    report(result, out, formats, output, print_tables=print_probe, page=page, earlier=earlier, notes=_undefined(result))


def _read_prompts(sources: "Sources", reading: "Reading", pair: "ModelPair") -> "tuple[Prompts, Prompts | None]":
    """Read forget and retain prompts; without retain prompts, the second is None."""
    from dissect.behaviour.prompts import read_questions
    from dissect.prompts.loading import load_prompts

    if sources.retain is None and not sources.has_own_retain:
        if pair.base.name not in zoo.BUILTIN:
            forget = load_prompts(
                sources.data,
                pair.tokenizer,
                template=reading.template,
                chat=reading.chat,
                chat_date=reading.chat_date,
                answers=reading.answers,
                answers_from=pair.base,
                limit=reading.limit,
            )
            return forget, None
        sources = replace(sources, retain=zoo.question_set("retain"))
    asked = read_questions(sources, pair.tokenizer, reading, answers_from=pair.base)
    return asked.forget, asked.retain["retain"]


def _undefined(result: "ProbeResult") -> list[str]:
    return [
        f"{row['examples']} {row['prompts']} examples have no KRS in {row['target']}: {row['undefined']}"
        for _, row in result.undefined().iterrows()
    ]
