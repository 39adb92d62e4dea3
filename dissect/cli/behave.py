"""`dissect behave`: what unlearning did to everything else."""

import os
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
from dissect.runtime.processes import ALONE
from unlearning.common.errors import InputError
from unlearning.common.terminal import write_json

if TYPE_CHECKING:
    from dissect.behaviour.prompts import Sources
    from dissect.behaviour.result import BehaviourResult

EXAMPLES = """\b
Examples:
  dissect behave --base demo:base --unlearned demo:npo
  dissect behave --base demo:base --unlearned demo:grad_diff --limit 60 --out runs/damage
  dissect behave --base ./base --unlearned ./npo --control ./never --data forget.json --unrelated retain.json
  dissect behave --base ./llama --unlearned ./llama-npo --data concepts.json --format html,pdf
  dissect behave --base ./base --unlearned ./npo --data a.json --unrelated b.json --completions texts.json --json
"""


def command(
    base: options.Base,
    unlearned: options.Unlearned,
    data: options.Data = None,
    unrelated: Annotated[
        Path | None,
        typer.Option(metavar="D2", help="Prompts about anything else.  [default: --data's own, or built-in ones]"),
    ] = None,
    completions: Annotated[
        Path | None, typer.Option(metavar="D3", help="Texts to go on with.  [default: --data's own, if any]")
    ] = None,
    control: options.Control = "auto",
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Run directory.  [default: runs/behave-U]")] = None,
    template: options.Template = None,
    chat: options.Chat = False,
    answers: options.Answers = "given",
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens that a model says to a prompt.")] = 100,
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
    """Compare what both models say and know, on forget questions, unrelated questions and texts to go on with."""
    wanted = figure_formats(formats)
    known_answers = choice("--answers", answers, "given", "base")
    # Before what is slow to import, or to load.
    sources = _sources(data, unrelated, completions, base)
    loading = ModelOptions(device, dtype, False, None, allow_pickle, trust_remote_code, quiet)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError("dissect behave runs in one process; start it without torchrun, or unset WORLD_SIZE")
    pair = open_pair(base, unlearned, loading, ALONE)
    from dissect.behaviour.prompts import Reading, read_questions
    from dissect.behaviour.run import behave

    reading = Reading(None if template is None else template.replace("\\n", "\n"), chat, known_answers, limit)
    asked = read_questions(sources, pair.tokenizer, reading, answers_from=pair.base)
    out = out or Path("runs") / f"behave-{short_name(unlearned)}"
    earlier = earlier_run(out)
    result = behave(
        pair,
        asked.forget,
        asked.unrelated,
        completions=asked.completion,
        true_answers=asked.true_answers,
        control=open_control(control, pair, loading),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
        out=out,
        progress=not quiet,
    )
    if earlier and not quiet:
        note(earlier)
    _report(result, out, wanted, quiet=quiet, as_json=as_json)


def _sources(data: Path | None, unrelated: Path | None, completions: Path | None, base: str) -> "Sources":
    """The files, checked; a built-in pair's unrelated questions are the retain set unless others are named."""
    data = find_data(data, base)
    from dissect.behaviour.prompts import Sources

    sources = Sources(data, unrelated, completions)
    if unrelated is None and base in zoo.BUILTIN and not sources.has_own_unrelated:
        sources = Sources(data, zoo.question_set("retain"), completions)
    sources.check()
    return sources


def _report(result: "BehaviourResult", out: Path, formats: list[str], *, quiet: bool, as_json: bool) -> None:
    from dissect.behaviour.tables import print_behaviour
    from dissect.sweeps.tables import console

    exported = result.save_figures(out, formats=formats)
    if exported.problem:
        note(exported.problem)
    if as_json:
        write_json({**result.summary(), "run": str(out), "figures": [str(path) for path in exported.paths]})
    elif not quiet:
        print_behaviour(result)
        console().print(f"figure  {out / 'figures' / 'behaviour.html'}", soft_wrap=True, highlight=False)
        console().print(f"run     {out}", soft_wrap=True, highlight=False)
