"""`unlearn train`: train a model with an unlearning method."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unlearning.common.errors import InputError
from unlearning.common.terminal import console, unescaped, write_json

if TYPE_CHECKING:
    from unlearning.training.train import TrainResult

# \b keeps the line breaks of the following lines.
EXAMPLES = """\b
On several devices, launch the command with accelerate:
  accelerate launch --num_processes 2 -m unlearning train npo --model ./base ...

\b
Examples:
  unlearn train npo --model demo:base --forget forget.json --retain retain.json --out runs/npo
  unlearn train blur --model ./base --forget tofu:forget05 --retain tofu:retain95 --out runs/blur \\
      --set learning_rate=5e-5 --set epochs=5 --save-every 50 --stop-when "forget_rouge<0.2"
  unlearn train blur --model ./base --forget tofu:forget05 --retain tofu:retain95 --out runs/blur \\
      --set learning_rate=5e-5 --set epochs=5 --save-every 50 --stop-when "forget_rouge<0.2" --resume
  unlearn train npo --model ./base --forget forget.json --retain retain.json --out runs/npo --tune \\
      --set target_forget=0.1
  unlearn train dpo --model ./base --forget forget.json --alternates refusals.txt --set alpha=0 --out runs/dpo
  unlearn train npo --model ./base --forget forget.csv --retain retain.csv --set lora_rank=8 --out runs/npo-lora
  unlearn train finetune --model ./pretrained --retain retain.json --out runs/control --batch-size 32
"""

NOTHING, LITTLE, KEPT = 0.9, 0.5, 0.9
"""Fractions of a probability before training: of the forget answers above which nothing or little was forgotten, and of
the retain answers below which the model was damaged."""


def train(
    method: Annotated[
        str, typer.Argument(metavar="METHOD", help="Method, such as npo, blur or whp; `unlearn methods` lists them.")
    ],
    model: Annotated[
        str,
        typer.Option(metavar="M", help="Model to train: a directory, a hub id or a built-in name (demo:base)."),
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Directory for weights, tokenizer, unlearning.json and a model card.")
    ],
    forget: Annotated[
        str | None,
        typer.Option(
            metavar="F",
            help="Data to forget: a .json, .jsonl, .csv, .parquet or .txt file, tofu:forget05, hub:...",
        ),
    ] = None,
    retain: Annotated[str | None, typer.Option(metavar="R", help="Data to keep, in the same forms.")] = None,
    alternates: Annotated[
        str | None,
        typer.Option(
            metavar="A",
            help="Other answers to the forget prompts: refusals (a text file, one per line) or records. "
            "[default: built-in refusals]",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Set an option that `unlearn methods` lists; may be repeated."),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            help="Wrap questions in this text. [default: the data set's own, else 'Question: {question}\\nAnswer:']"
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Wrap prompts in the tokenizer's chat template instead.")
    ] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="Search the learning rate first, in short runs on a sample of the data.")
    ] = False,
    save_every: Annotated[
        int | None, typer.Option(metavar="N", help="Save a checkpoint every N optimizer steps. [default: never]")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint in DIR; start if there is none.")
    ] = False,
    eval_every: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Evaluate every N optimizer steps. [default: before and after training only]",
        ),
    ] = None,
    keep_best: Annotated[
        str | None,
        typer.Option(
            metavar="METRIC", help="Save the weights of the step where this metric is best, such as gap_rouge."
        ),
    ] = None,
    stop_when: Annotated[
        str | None, typer.Option(metavar="RULE", help="Stop when a metric passes a bound, such as 'forget_rouge<0.2'.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Train on auto, cpu or cuda. [default: auto]")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Train with weights in float32 or bfloat16. [default: float32]")
    ] = None,
    save_dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE", help="Save weights in float32, bfloat16 or float16. [default: as M; an adapter: float32]"
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Random seed (order of the examples, random draws). [default: 0]")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", help="Use N forget examples per micro-batch. [default: 4]")
    ] = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read pickled .bin weights.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress bar and no summary.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write a machine-readable result to stdout.")] = False,
) -> None:
    """Train the model M with METHOD and save the result in DIR."""
    if dtype not in (None, "float32", "bfloat16"):
        raise InputError(
            f"--dtype must be float32 or bfloat16, got {dtype}. For mixed precision use --set precision=bf16_mixed."
        )
    flags = {
        "template": unescaped(template),
        "chat": chat or None,
        "tune": tune or None,
        "save_every": save_every,
        "eval_every": eval_every,
        "keep_best": keep_best,
        "stop_when": stop_when,
        "device": device,
        "precision": dtype,
        "save_dtype": save_dtype,
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
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
        **options,
    )
    if int(os.environ.get("RANK", "0")):  # of several processes only the main one writes
        return
    if as_json:
        write_json(_report(method, out, result))
    elif not quiet:
        console().print(_summary(method, out, result), markup=False, highlight=False, soft_wrap=True)


def _options(settings: list[str], flags: dict[str, Any]) -> dict[str, Any]:
    options = dict(flags)
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise InputError(f"--set must be KEY=VALUE, got {setting}")
        if name in options:
            raise InputError(f"{name} must be given only once, got --set {setting} as well. Remove one of the two.")
        options[name] = value
    return options


def _report(method: str, out: Path, result: "TrainResult") -> dict[str, Any]:
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


def _changed(method: str, first: dict[str, float], final: dict[str, float], options: dict[str, Any]) -> list[str]:
    """Return the lines that say how much was forgotten and how much else was lost."""
    left = {
        name: final[f"{name}_probability"] / first[f"{name}_probability"]
        for name in ("forget", "retain")
        if first.get(f"{name}_probability", 0.0) > 0 and f"{name}_probability" in final
    }
    if method == "finetune" or "forget" not in left:
        return []
    lines = []
    if left["forget"] > NOTHING:
        lines.append(
            f"nothing was forgotten: {left['forget']:.0%} of forget_probability is left. Set a higher learning_rate "
            f"(now {options['learning_rate']:g}), more epochs (now {options['epochs']}), or --tune."
        )
    elif left["forget"] > LITTLE:
        lines.append(f"little was forgotten: {left['forget']:.0%} of forget_probability is left")
    if left.get("retain", 1.0) < KEPT:
        lines.append(
            f"the rest suffered: {left['retain']:.0%} of retain_probability is left. Set a lower learning_rate (now "
            f"{options['learning_rate']:g}), a higher weight of the retain loss, or target_forget=0.1."
        )
    return lines


def _summary(method: str, out: Path, result: "TrainResult") -> str:
    if result.already_done:
        return f"{out} already holds this run; nothing was trained"
    last = result.history[-1]
    losses = ", ".join(f"{name} {value:.4g}" for name, value in last.items() if name.endswith("loss"))
    lines = [f"{method}: {int(last['step'])} optimizer steps; at the end {losses}"]
    if result.stopped_by is not None:
        lines.append(f"stopped: {result.stopped_by}")
    if result.evaluations:
        first, final = result.evaluations[0], result.final
        names = [name for name in final if name.endswith(("probability", "rouge")) and not name.startswith("gap")]
        changes = (f"{name} {first[name]:.3f} -> {final[name]:.3f}" for name in names if name in first)
        lines.append("before -> after training: " + ", ".join(changes))
        lines += _changed(method, first, final, result.options)
    lines += [f"{name}: {note}" for name, notes in result.notes.items() if isinstance(notes, list) for note in notes]
    return "\n".join([*lines, f"saved in {out}"])
