"""The command line `unlearn`: parses, then imports what is heavy, so that every `--help` is instant."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unlearning.cli.eval import eval_app
from unlearning.cli.labels import labels_app
from unlearning.common.errors import InputError
from unlearning.common.terminal import run_app, write_json

if TYPE_CHECKING:
    from rich.console import Group

    from unlearning.training.train import TrainResult

# \b keeps the lines that follow as they are.
_TRAIN_EXAMPLES = """\b
Examples:
  unlearn train npo --model demo:base --forget forget.json --retain retain.json --out runs/npo
  unlearn train blur --model ./base --forget tofu:forget05 --retain tofu:retain95 --out runs/blur \\
      --set learning_rate=5e-5 --set epochs=5 --save-every 50 --stop-when "forget_rouge<0.2"
  unlearn train blur --model ./base --forget tofu:forget05 --retain tofu:retain95 --out runs/blur \\
      --set learning_rate=5e-5 --set epochs=5 --save-every 50 --stop-when "forget_rouge<0.2" --resume
  unlearn train dpo --model ./base --forget forget.json --alternates refusals.txt --set alpha=0 --out runs/dpo
  unlearn train npo --model ./base --forget forget.csv --retain retain.csv --set lora_rank=8 --out runs/npo-lora
  unlearn train finetune --model ./trunk --retain retain.json --out runs/never --batch-size 32
"""
_METHODS_EXAMPLES = """\b
Examples:
  unlearn methods
  unlearn methods blur
  unlearn methods --json
"""
_EXAMPLES = """\b
Examples:
  unlearn methods
  unlearn train npo --model demo:base --forget forget.json --retain retain.json --out runs/npo
"""

app = typer.Typer(
    help="Train a language model to forget.",
    epilog=_EXAMPLES,
    rich_markup_mode=None,  # rich would join the examples' lines
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


app.add_typer(labels_app, name="labels")
app.add_typer(eval_app, name="eval")


@app.command(epilog=_TRAIN_EXAMPLES)
def train(
    method: Annotated[str, typer.Argument(metavar="METHOD", help="npo, blur, whp, ...; see `unlearn methods`.")],
    model: Annotated[str, typer.Option(metavar="M", help="Directory, hub id or built-in name of the start model.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where to save weights, tokenizer and unlearning.json.")],
    forget: Annotated[
        str | None,
        typer.Option(metavar="F", help="What to forget: .json, .jsonl, .csv, .parquet, .txt, tofu:forget05, hub:..."),
    ] = None,
    retain: Annotated[str | None, typer.Option(metavar="R", help="What to keep, likewise.")] = None,
    alternates: Annotated[
        str | None,
        typer.Option(metavar="A", help="Other answers to the forget prompts: refusals, one a line, or records."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="An option of `unlearn methods`; may be repeated."),
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="Wraps the questions, for example 'Question: {question}\\nAnswer:'.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap prompts in the tokenizer's chat template.")] = False,
    save_every: Annotated[int | None, typer.Option(metavar="N", help="Steps between two checkpoints.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after DIR's last checkpoint; begin where there is none.")
    ] = False,
    eval_every: Annotated[int | None, typer.Option(metavar="N", help="Steps between two evaluations.")] = None,
    keep_best: Annotated[
        str | None, typer.Option(metavar="METRIC", help="Save the weights where it is best, as gap_rouge.")
    ] = None,
    stop_when: Annotated[
        str | None, typer.Option(metavar="RULE", help="Stop where a metric passes a bound: 'forget_rouge<0.2'.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the weights in training: float32 or bfloat16.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the order of the examples and of what is drawn.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Forget examples a micro-batch.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar and no summary.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout.")] = False,
) -> None:
    """Train METHOD from the model M and save the result in DIR.

    On several devices, launch it with accelerate: accelerate launch --num_processes 2 -m unlearning train ...
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise InputError(
            f"--dtype {dtype}: train in float32 or bfloat16; mixed precision is --set precision=bf16_mixed"
        )
    flags = {
        "template": None if template is None else template.replace("\\n", "\n"),
        "chat": chat or None,
        "save_every": save_every,
        "eval_every": eval_every,
        "keep_best": keep_best,
        "stop_when": stop_when,
        "device": device,
        "precision": dtype,
        "seed": seed,
        "batch_size": batch_size,
    }
    options = _options(settings or [], {name: value for name, value in flags.items() if value is not None})

    import unlearning

    result = unlearning.train(
        method,
        model=model,
        forget=forget,
        retain=retain,
        alternates=alternates,
        output_dir=out,
        resume=resume,
        progress=not quiet,
        **options,
    )
    if int(os.environ.get("RANK", "0")):  # one of several processes speaks
        return
    if as_json:
        write_json(_train_report(method, out, result))
    elif not quiet:
        _console().print(_train_summary(method, out, result), markup=False, highlight=False, soft_wrap=True)


@app.command(epilog=_METHODS_EXAMPLES)
def methods(
    method: Annotated[str | None, typer.Argument(metavar="[METHOD]", help="Only this one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable list on stdout.")] = False,
) -> None:
    """List the methods: what each needs, its options, their defaults and their source."""
    from unlearning.methods.catalogue import list_methods

    catalogue = list_methods(method)
    if as_json:
        write_json(catalogue)
    else:
        _console().print(_methods_tables(catalogue))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits 0, 2 on bad input with one line on stderr, 130 on Ctrl-C."""
    run_app(app, "unlearn", arguments, interrupted="nothing is kept but checkpoints; --resume goes on")


def _options(settings: list[str], flags: dict[str, Any]) -> dict[str, Any]:
    options = dict(flags)
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise InputError(f"--set {setting}: write it as --set KEY=VALUE")
        if name in options:
            raise InputError(f"{name} is given twice; give it once")
        options[name] = value
    return options


def _train_report(method: str, out: Path, result: "TrainResult") -> dict[str, Any]:
    return {
        "method": method,
        "output_dir": str(out),
        "already_done": result.already_done,
        "options": result.options,
        "history": result.history,
        "evaluations": result.evaluations,
        "final": result.final,
        "notes": result.notes,
    }


def _train_summary(method: str, out: Path, result: "TrainResult") -> str:
    if result.already_done:
        return f"{out} holds this very run already; nothing was trained"
    last = result.history[-1]
    losses = ", ".join(f"{name} {value:.4g}" for name, value in last.items() if name.endswith("loss"))
    lines = [f"{method}: {int(last['step'])} steps, {losses}"]
    if result.evaluations:
        first, final = result.evaluations[0], result.final
        names = [name for name in final if name.endswith(("probability", "rouge")) and not name.startswith("gap")]
        changes = (f"{name} {first[name]:.3f} -> {final[name]:.3f}" for name in names if name in first)
        lines.append(", ".join(changes))
    lines += [f"{name}: {note}" for name, notes in result.notes.items() if isinstance(notes, list) for note in notes]
    return "\n".join([*lines, f"saved in {out}"])


def _methods_tables(catalogue: dict[str, Any]) -> "Group":
    from rich import box
    from rich.console import Group
    from rich.table import Table

    methods = Table("method", "needs", "what it minimises", "source", box=box.SIMPLE_HEAD)
    own = Table("method", "option", "what", "source", box=box.SIMPLE_HEAD)
    for method in catalogue["methods"]:
        methods.add_row(method["name"], "\n".join(method["needs"]), method["loss"], method["source"])
        for place, option in enumerate(method["options"]):
            name = "" if place else method["name"]
            own.add_row(name, f"{option['name']}={option['default']}", option["help"], option["source"])
    shared = Table("option of every method", "what", "source", box=box.SIMPLE_HEAD)
    for option in catalogue["train_options"]:
        shared.add_row(f"{option['name']}={option['default']}", option["help"], option["source"])
    for table in (methods, own, shared):
        table.columns[0].no_wrap = True
    return Group(*(table for table in (methods, own, shared) if table.row_count))


def _console() -> Any:
    from rich.console import Console

    return Console()
