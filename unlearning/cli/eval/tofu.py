"""`unlearn eval tofu`: TOFU's forget quality, model utility and memorisation."""

from typing import Annotated

import typer

from unlearning.cli.eval import options
from unlearning.cli.eval.running import run_benchmark
from unlearning.common.terminal import unescaped

EXAMPLES = """\b
Examples:
  unlearn eval tofu --model runs/npo --forget forget10 --control ./retain90 --data-dir ../data
  unlearn eval tofu --model runs/npo --forget forget05 --control-result runs/eval-tofu-retain95
  unlearn eval tofu --model runs/npo --forget authors.jsonl --retain others.jsonl --sets forget,retain --json
  unlearn eval tofu --model ./llama-npo --forget forget01 --chat --limit 10 --out runs/quick
"""


def command(
    *,
    model: options.Model,
    forget: Annotated[
        str, typer.Option(metavar="F", help="Forget set: forget01 to forget99, or a file with records of that shape.")
    ] = "forget10",
    retain: Annotated[
        str, typer.Option(metavar="R", help="Retain set: a file with records of that shape, or a split.")
    ] = "retain_perturbed",
    sets: Annotated[
        str, typer.Option(metavar="LIST", help="Sets that are asked; model utility needs all of them.")
    ] = "forget,retain,real_authors,world_facts",
    control: options.ControlOptions,
    data_dir: options.DataDir = None,
    template: options.Template = None,
    chat: options.TrainedChat = None,
    append_eos: options.AppendEos = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Maximum tokens of a generated answer.")] = 200,
    generate: Annotated[
        bool, typer.Option("--generate/--no-generate", help="Generate answers, which ROUGE and model utility need.")
    ] = True,
    limit: options.Limit = None,
    seed: options.Seed = 0,
    run: options.RunOptions,
) -> None:
    """Evaluate on TOFU: forget quality, model utility, truth ratios, ROUGE, memorisation, paraphrases."""
    run_benchmark(
        "tofu",
        model,
        control,
        run,
        forget=forget,
        retain=retain,
        sets=sets,
        data_dir=data_dir,
        template=unescaped(template),
        chat=chat,
        append_eos=append_eos,
        max_new_tokens=max_new_tokens,
        generate=generate,
        limit=limit,
        seed=seed,
    )
