"""`dissect probe`: the MLP coefficients, and how few of them hold the knowledge back."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dissect import zoo
from dissect.cli import options
from dissect.cli.loading import (
    ModelOptions,
    choice,
    earlier_run,
    figure_formats,
    find_data,
    note,
    open_control,
    open_pair,
    short_name,
)
from dissect.runtime.processes import ALONE, join_processes
from unlearning.common.errors import InputError
from unlearning.common.terminal import write_json

if TYPE_CHECKING:
    from dissect.behaviour.prompts import Reading, Sources
    from dissect.coefficients.result import ProbeResult
    from dissect.models.pair import ModelPair
    from dissect.prompts.prompts import Prompts

EXAMPLES = """\b
Examples:
  dissect probe --base demo:base --unlearned demo:npo --limit 60
  dissect probe --base demo:base --unlearned demo:grad_diff --last-layers 1 --out runs/last-layer
  dissect probe --base ./base --unlearned ./npo --control ./never --data forget.json --unrelated retain.json
  dissect probe --base ./llama --unlearned ./llama-npo --data concepts.json --format html,pdf
"""


def command(
    base: options.Base,
    unlearned: options.Unlearned,
    data: options.Data = None,
    unrelated: Annotated[
        Path | None,
        typer.Option(metavar="D2", help="Prompts about anything else.  [default: --data's own, or built-in ones]"),
    ] = None,
    concepts: Annotated[
        bool, typer.Option("--concepts/--no-concepts", help="Compare the value vectors that the data names.")
    ] = True,
    control: options.Control = "auto",
    last_layers: Annotated[int, typer.Option(metavar="N", help="Scale the coefficients of the last N layers.")] = 3,
    top: Annotated[int, typer.Option(metavar="N", help="List the N neurons that changed most.")] = 20,
    draws: Annotated[int, typer.Option(metavar="N", help="Draw random and norm-matched neurons N times.")] = 3,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Run directory.  [default: runs/probe-U]")] = None,
    template: options.Template = None,
    chat: options.Chat = False,
    answers: options.Answers = "given",
    limit: Annotated[int | None, typer.Option(help="Use the first so many prompts of each set only.")] = None,
    formats: options.Formats = "html",
    device: options.Device = None,
    dtype: options.Dtype = None,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 16,
    allow_pickle: options.AllowPickle = False,
    trust_remote_code: options.TrustRemoteCode = False,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Measure how far the MLP coefficients moved, and what comes back when k of them are put back (KRS)."""
    wanted = figure_formats(formats)
    known_answers = choice("--answers", answers, "given", "base")
    data = find_data(data, base)
    if unrelated is not None:
        find_data(unrelated, base)
    loading = ModelOptions(device, dtype, False, None, allow_pickle, trust_remote_code, quiet)
    with join_processes(device=device) as processes:
        if processes.count > 1:
            raise InputError("dissect probe runs in one process; start it without torchrun")
    from dissect.behaviour.prompts import Reading, Sources
    from dissect.coefficients.concept_vectors import read_concepts

    found = read_concepts(data) if concepts else ()
    pair = open_pair(base, unlearned, loading, ALONE)
    forget, others = _prompts(Sources(data, unrelated), Reading(template, chat, known_answers, limit), pair)
    from dissect.coefficients.run import probe

    out = out or Path("runs") / f"probe-{short_name(unlearned)}"
    earlier = earlier_run(out)
    result = probe(
        pair,
        forget,
        unrelated=others,
        concepts=found,
        control=open_control(control, pair, loading),
        last_layers=last_layers,
        top=top,
        draws=draws,
        seed=seed,
        batch_size=batch_size,
        out=out,
        progress=not quiet,
    )
    if earlier and not quiet:
        note(earlier)
    _report(result, out, wanted, quiet=quiet, as_json=as_json)


def _prompts(sources: "Sources", reading: "Reading", pair: "ModelPair") -> "tuple[Prompts, Prompts | None]":
    """Forget and unrelated prompts; a built-in pair's unrelated ones are the retain set unless others are named."""
    from dissect.behaviour.prompts import read_questions
    from dissect.prompts.loading import load_prompts

    if reading.template is not None:
        reading = replace(reading, template=reading.template.replace("\\n", "\n"))
    if sources.unrelated is None and not sources.has_own_unrelated:
        if pair.base.name not in zoo.BUILTIN:
            forget = load_prompts(
                sources.data,
                pair.tokenizer,
                template=reading.template,
                chat=reading.chat,
                answers=reading.answers,
                answers_from=pair.base,
                limit=reading.limit,
            )
            return forget, None
        sources = replace(sources, unrelated=zoo.question_set("retain"))
    asked = read_questions(sources, pair.tokenizer, reading, answers_from=pair.base)
    return asked.forget, asked.unrelated["unrelated"]


def _report(result: "ProbeResult", out: Path, formats: list[str], *, quiet: bool, as_json: bool) -> None:
    from dissect.coefficients.tables import print_probe
    from dissect.sweeps.tables import console

    exported = result.save_figures(out, formats=formats)
    if exported.problem:
        note(exported.problem)
    for _, row in result.undefined().iterrows():
        note(f"{row['examples']} {row['prompts']} examples have no KRS in {row['target']}: {row['undefined']}")
    if as_json:
        write_json({**result.summary(), "run": str(out), "figures": [str(path) for path in exported.paths]})
    elif not quiet:
        print_probe(result)
        console().print(
            f"figures {out / 'figures' / 'neurons.html'} (layers, scaling)", soft_wrap=True, highlight=False
        )
        console().print(f"run     {out}", soft_wrap=True, highlight=False)
