"""`dissect verdict`: was the knowledge erased, or merely suppressed?"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dissect.cli import options
from dissect.cli.loading import (
    check_data,
    check_one_process,
    find_data,
    open_control,
    open_pair,
    open_prompts,
    short_name,
)
from dissect.cli.report import earlier_run, figure_formats, report
from dissect.runtime.processes import ALONE

if TYPE_CHECKING:
    from dissect.models.pair import ModelPair
    from dissect.prompts.prompts import Prompts

EXAMPLES = """\b
Examples:
  dissect verdict --base demo:base --unlearned demo:npo
  dissect verdict --base demo:base --unlearned demo:rmu --budget quick --control none
  dissect verdict --base ./base --unlearned ./npo --control ./control --data forget.json --retain retain.json
  dissect verdict --base ./base --unlearned ./npo --control ./control --data forget.json --budget full --format pdf
  dissect verdict --base ./base --unlearned ./npo --data tofu.json --retain retain.json --budget quick --limit 48
  dissect verdict --base ./base --unlearned ./npo --control ./control --data forget.json --shared runs/shared
  dissect verdict --base ./base --unlearned ./npo --control ./control --data forget.json --margin 0.2
"""


def command(
    *,
    pair: options.PairOptions,
    data: options.Data = None,
    retain: Annotated[
        Path | None, typer.Option(metavar="R", help="File of retain prompts.  [default: a built-in pair's own]")
    ] = None,
    general: Annotated[
        Path | None,
        typer.Option(
            metavar="G", help="File of general prompts, for benign fine-tuning.  [default: a built-in pair's own]"
        ),
    ] = None,
    paraphrases: Annotated[
        Path | None,
        typer.Option(
            metavar="P", help="File of other wordings of the forget prompts.  [default: a built-in pair's own]"
        ),
    ] = None,
    budget: Annotated[
        str,
        typer.Option(help="quick, standard or full: about 1, 2 or 7 minutes on the built-in pair with two cores."),
    ] = "standard",
    limit: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=4,
            help="Use at most N forget prompts and N retain prompts, evenly spaced.  "
            "[default: 120, 240 or 400 by budget]",
        ),
    ] = None,
    margin: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Call a model erased only if less than this share of the base's knowledge can be left (upper end of "
            "the 95 % interval).  [default: 0.1]",
        ),
    ] = None,
    shared: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep results of base and control in DIR; most tests of another unlearned model then take a third "
            "of the time.",
        ),
    ] = None,
    template: options.Template = None,
    chat: options.Chat = False,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 64,
    models: options.ModelOptions,
    output: options.OutputOptions,
) -> None:
    """Decide whether knowledge was erased from the parameters or merely suppressed, and show the evidence."""
    formats = figure_formats(output.formats)
    chosen = options.choice("--budget", budget, "quick", "standard", "full")
    data = find_data(data, pair.base)
    for flag, file in (("--retain", retain), ("--general", general), ("--paraphrases", paraphrases)):
        check_data(flag, file)
    check_one_process("verdict")
    opened = open_pair(pair, models, ALONE, quiet=output.quiet)
    from dissect.verdicts.run import verdict
    from dissect.verdicts.tables import print_verdict

    out = output.out or Path("runs") / f"verdict-{short_name(pair.unlearned)}"
    earlier = earlier_run(out)
    prompts = options.PromptOptions(template=template, chat=chat)
    found = verdict(
        opened,
        open_prompts(data, opened, prompts),
        retain=_optional(retain, opened, prompts),
        paraphrases=_optional(paraphrases, opened, prompts),
        general=_optional(general, opened, prompts),
        control=open_control(pair.control, opened, models, quiet=output.quiet),
        budget=chosen,
        limit=limit,
        margin=margin,
        batch_size=batch_size,
        seed=seed,
        out=out,
        shared=shared,
        progress=not output.quiet,
    )
    report(found, out, formats, output, print_tables=print_verdict, page=("page", "verdict.html"), earlier=earlier)


def _optional(file: Path | None, pair: "ModelPair", prompts: options.PromptOptions) -> "Prompts | None":
    """Read the prompts of a file, or return None if there is no file."""
    return None if file is None else open_prompts(file, pair, prompts)
