"""`dissect verdict`: was the knowledge erased, or merely suppressed?"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dissect.cli import options
from dissect.cli.loading import (
    ModelOptions,
    PromptOptions,
    choice,
    earlier_run,
    figure_formats,
    find_data,
    note,
    open_control,
    open_pair,
    open_prompts,
    short_name,
)
from dissect.runtime.processes import ALONE
from unlearning.common.errors import InputError
from unlearning.common.terminal import write_json

if TYPE_CHECKING:
    from dissect.verdicts.result import Verdict

EXAMPLES = """\b
Examples:
  dissect verdict --base demo:base --unlearned demo:npo
  dissect verdict --base demo:base --unlearned demo:rmu --budget quick --never none
  dissect verdict --base ./base --unlearned ./npo --never ./never --data forget.json --retain retain.json
  dissect verdict --base ./base --unlearned ./npo --never ./never --data forget.json --budget full --format html,pdf
  dissect verdict --base ./base --unlearned ./npo --data tofu.json --retain retain.json --budget quick --facts 48
  dissect verdict --base ./base --unlearned ./npo --never ./never --data forget.json --shared runs/base-and-never
"""


def command(
    base: options.Base,
    unlearned: options.Unlearned,
    never: Annotated[
        str,
        typer.Option(
            metavar="N",
            help="A model that never knew, from the base's trunk; `none` for none, which makes the answer weaker.  "
            "[default: a built-in pair's own]",
            show_default=False,
        ),
    ] = "auto",
    data: options.Data = None,
    retain: Annotated[
        Path | None,
        typer.Option(metavar="R", help="Questions about what was to stay.  [default: a built-in pair's own]"),
    ] = None,
    paraphrases: Annotated[
        Path | None,
        typer.Option(metavar="P", help="Other wordings of the forget questions.  [default: a built-in pair's own]"),
    ] = None,
    benign: Annotated[
        Path | None,
        typer.Option(metavar="Q", help="Questions on other things, to fine-tune on.  [default: a built-in pair's own]"),
    ] = None,
    budget: Annotated[
        str, typer.Option(help="quick, standard or full: about 1, 2, 7 minutes on the built-in pair, two cores.")
    ] = "standard",
    limit: Annotated[
        int | None,
        typer.Option(
            "--facts",
            min=4,
            help="Ask at most so many forget facts, evenly spaced.  [default: 120, 240, 400 by budget]",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Run directory.  [default: runs/verdict-U]")] = None,
    shared: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep there what tests give of base and never: for the next unlearned model of theirs, most tests "
            "then take a third of the time.",
        ),
    ] = None,
    template: options.Template = None,
    chat: options.Chat = False,
    formats: options.Formats = "html",
    device: options.Device = None,
    dtype: options.Dtype = None,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 64,
    allow_pickle: options.AllowPickle = False,
    trust_remote_code: options.TrustRemoteCode = False,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Say whether knowledge was erased from the parameters or merely suppressed, with the evidence."""
    wanted = figure_formats(formats)
    chosen = choice("--budget", budget, "quick", "standard", "full")
    # Before what is slow to import, or to load.
    data = find_data(data, base)
    loading = ModelOptions(device, dtype, False, None, allow_pickle, trust_remote_code, quiet)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError("dissect verdict runs in one process; start it without torchrun, or unset WORLD_SIZE")
    pair = open_pair(base, unlearned, loading, ALONE)
    reading = PromptOptions("answer", template, chat, "given", 30, None)
    from dissect.verdicts.run import verdict

    out = out or Path("runs") / f"verdict-{short_name(unlearned)}"
    earlier = earlier_run(out)
    found = verdict(
        pair,
        open_prompts(data, pair, reading),
        retain=None if retain is None else open_prompts(retain, pair, reading),
        paraphrases=None if paraphrases is None else open_prompts(paraphrases, pair, reading),
        benign=None if benign is None else open_prompts(benign, pair, reading),
        control=open_control(never, pair, loading),
        budget=chosen,
        limit=limit,
        batch_size=batch_size,
        seed=seed,
        out=out,
        shared=shared,
        progress=not quiet,
    )
    if earlier and not quiet:
        note(earlier)
    _report(found, out, wanted, quiet=quiet, as_json=as_json)


def _report(found: "Verdict", out: Path, formats: list[str], *, quiet: bool, as_json: bool) -> None:
    from dissect.sweeps.tables import console
    from dissect.verdicts.tables import print_verdict

    exported = found.save_figures(out, formats=formats)
    if exported.problem:
        note(exported.problem)
    if as_json:
        write_json({**found.summary(), "run": str(out), "figures": [str(path) for path in exported.paths]})
    elif not quiet:
        print_verdict(found)
        console().print(f"page    {out / 'verdict.html'}", soft_wrap=True, highlight=False)
        console().print(f"run     {out}", soft_wrap=True, highlight=False)
