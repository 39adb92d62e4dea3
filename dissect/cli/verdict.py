"""`dissect verdict`: was the knowledge erased, or merely suppressed?"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dissect.cli import options
from dissect.cli.loading import (
    check_data,
    check_one_process,
    choose_reading,
    find_data,
    open_control,
    open_pair,
    open_prompts,
    open_strangers,
    short_name,
)
from dissect.cli.report import earlier_run, figure_formats, report
from dissect.runtime.processes import ALONE
from unlearning.common.errors import InputError

if TYPE_CHECKING:
    from dissect.behaviour.prompts import Reading
    from dissect.models.model import Model
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
  dissect verdict --base ./base --unlearned ./npo --control none --stranger ./other-model --data forget.json
  dissect verdict --base demo:base --unlearned demo:npo --budget quick --check-invariance
  dissect verdict --base ./base --unlearned ./npo --control ./control --data forget.json --margin 0.2
  dissect verdict --base ./base --unlearned ./npo --control ./control --data forget.json --plan
  dissect verdict --base ./base --unlearned ./npo --data forget.json --retain retain.json --spike-ins 20
  dissect verdict --base ./base --unlearned ./npo --control ./control-1 --control ./control-2 --data forget.json
"""


def command(
    *,
    base: options.Base,
    unlearned: options.Unlearned,
    control: Annotated[
        list[str] | None,
        typer.Option(
            metavar="C",
            help="Control: never trained on the forget facts, from the base's pretrained model; may be given several "
            "times; none for no control.  [default: a built-in pair's own]",
            show_default=False,
        ),
    ] = None,
    strangers: Annotated[
        list[str] | None,
        typer.Option(
            "--stranger",
            metavar="M",
            help="Without a control: another language model that never read about the subjects; what it guesses from "
            "the questions is the floor in place of chance. May be given several times.",
            show_default=False,
        ),
    ] = None,
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
    spike_ins: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Also invent N people, such as 20, teach half of them to a copy of the unlearned model and hide them "
            "again: what the attacks find of them is their zero and ceiling in this model. Can be added to a finished "
            "run.",
        ),
    ] = None,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Only show how many groups of prompts and how many controls it takes to decide; loads no model.",
        ),
    ] = False,
    invariance: Annotated[
        bool,
        typer.Option(
            "--check-invariance",
            help="Also rewrite the unlearned model at random without changing its outputs, judge it again, and tell "
            "whether anything moved; takes about as long again.",
        ),
    ] = False,
    template: options.Template = None,
    chat: options.Chat = None,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 64,
    models: options.ModelOptions,
    output: options.OutputOptions,
) -> None:
    """Decide whether knowledge was erased from the parameters or merely suppressed, and show the evidence."""
    formats = figure_formats(output.formats)
    chosen = options.choice("--budget", budget, "quick", "standard", "full")
    names = control or ["auto"]
    if len(names) > 1 and {"auto", "none"} & set(names):
        raise InputError(
            f"--control must name models where it is given several times, got {', '.join(names)}. Leave auto and none "
            "out, or give one of them alone"
        )
    data = find_data(data, base)
    for flag, file in (("--retain", retain), ("--general", general), ("--paraphrases", paraphrases)):
        check_data(flag, file)
    if plan:
        from dissect.stress.catalogue import SAMPLE

        _show_plan(data, 0 if names == ["none"] else len(names), margin, limit or SAMPLE[chosen], output)
        return
    check_one_process("verdict")
    from dissect.verdicts.rule import check_margin
    from dissect.verdicts.run import verdict
    from dissect.verdicts.spiked import check_number

    if margin is not None:
        check_margin(margin)
    check_number(spike_ins)
    pair = options.PairOptions(base=base, unlearned=unlearned)
    reading = choose_reading(options.PromptOptions(template=template, chat=chat), pair, quiet=output.quiet)
    opened = open_pair(pair, models, ALONE, quiet=output.quiet)
    from dissect.verdicts.tables import print_verdict

    out = output.out or Path("runs") / f"verdict-{short_name(unlearned)}"
    earlier = earlier_run(out, adds=None if spike_ins is None else "spike_ins")
    forget = open_prompts(data, opened, reading)
    chosen_options: dict[str, Any] = {
        "retain": _optional(retain, opened, reading),
        "paraphrases": _optional(paraphrases, opened, reading),
        "general": _optional(general, opened, reading),
        "control": _opened(names, opened, models, quiet=output.quiet),
        "strangers": open_strangers(strangers or [], opened, models, quiet=output.quiet),
        "budget": chosen,
        "limit": limit,
        "margin": margin,
        "batch_size": batch_size,
        "seed": seed,
        "shared": shared,
    }
    found = verdict(opened, forget, out=out, spike_ins=spike_ins, progress=not output.quiet, **chosen_options)
    notes = []
    if invariance:
        from dissect.verdicts.invariance import check_invariance
        from unlearning.common.runs import write_bytes

        checked = check_invariance(found, opened, forget, **chosen_options)
        write_bytes(out / "invariance.json", checked.frame.to_json(orient="records", indent=1).encode())
        notes.append(checked.sentence())
    report(
        found,
        out,
        formats,
        output,
        print_tables=print_verdict,
        page=("page", "verdict.html"),
        earlier=earlier,
        notes=notes,
    )


def _show_plan(data: Path, n_controls: int, margin: float | None, facts: int, output: options.OutputOptions) -> None:
    """Print what a verdict on these prompts can decide, before anything is run.

    Args:
        data: File of forget prompts.
        n_controls: Number of controls; 0 without a control.
        margin: The margin; None takes the rule's.
        facts: Use at most so many of the prompts, evenly spaced.
        output: Whether to print a table, JSON or nothing.
    """
    import numpy as np

    from dissect.prompts.records import questions
    from dissect.verdicts.planning.plan import plan
    from dissect.verdicts.rule import frozen_rule, with_margin
    from dissect.verdicts.tables import print_plan
    from unlearning.common.bootstrap import clusters
    from unlearning.common.terminal import write_json
    from unlearning.data.records import read_records

    groups = [question.group for question in questions(read_records(data), data, None, None, answers=False)]
    chosen = sorted(set(np.linspace(0, len(groups) - 1, min(facts, len(groups))).round().astype(int).tolist()))
    people = len(set(clusters([groups[index] for index in chosen])))
    rule = with_margin(frozen_rule(has_control=n_controls > 0), margin)
    found = plan(rule, people=people, facts=len(chosen), controls=n_controls)
    if output.as_json:
        needs = {name: vars(getattr(found, name)) for name in ("needed", "to_find_a_part", "to_find_a_part_avoiding")}
        write_json({"plan": found.table().to_dict("records"), **needs, "margin": found.margin})
    elif not output.quiet:
        print_plan(found)


def _opened(
    names: Sequence[str], pair: "ModelPair", models: options.ModelOptions, *, quiet: bool
) -> "Sequence[Model | str] | Model | str | None":
    """Load the controls; one alone may be `auto` or `none`."""
    found = [open_control(name, pair, models, quiet=quiet) for name in names]
    return found[0] if len(found) == 1 else [model for model in found if model is not None]


def _optional(file: Path | None, pair: "ModelPair", reading: "Reading") -> "Prompts | None":
    """Read the prompts of a file, or return None if there is no file."""
    return None if file is None else open_prompts(file, pair, reading)
