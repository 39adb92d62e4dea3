"""`unlearn eval quality`: is what the model writes still text?"""

from pathlib import Path
from typing import Annotated

import typer

from unlearning.cli.eval import options
from unlearning.cli.eval.running import run_benchmark
from unlearning.common.terminal import unescaped

EXAMPLES = """\b
Examples:
  unlearn eval quality --model runs/npo --prompts forget.json --base demo:base
  unlearn eval quality --model runs/npo --prompts tofu:forget01 --control ./retain99 --data-dir ../data
  unlearn eval quality --model runs/npo --texts generations.jsonl --base ./base --json
  unlearn eval quality --model runs/npo --prompts muse-news:raw:forget --max-new-tokens 200 \\
      --classifier madhurjindal/autonlp-Gibberish-Detector-492513457 --classifier-tokens 512

\b
Gibberish, by a rule without a dictionary: a text that repeats a phrase four times or more (a loop), most of whose words
are not words (x#9}qK, ???), or whose letters hold too few vowels. Real words in random order pass; see perplexity and
entropy.
"""


def command(
    *,
    model: options.Model,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="P",
            help="Prompts to continue: a file of prompts, questions or texts, or a named set (tofu:forget01); of a "
            "document, the first 20 words.",
        ),
    ] = None,
    texts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Texts that the model has written already, instead.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="B", help="Intact model, under which the texts' perplexity is computed.")
    ] = None,
    classifier: Annotated[
        str | None, typer.Option(metavar="C", help="Text classifier of transformers: directory or hub id.")
    ] = None,
    clean_label: Annotated[
        str | None, typer.Option(metavar="LABEL", help="The classifier's class of clean texts.  [default: class 0]")
    ] = None,
    classifier_tokens: Annotated[
        int, typer.Option(metavar="N", help="Tokens of a text that the classifier reads.")
    ] = 32,
    control: options.ControlOptions,
    data_dir: options.DataDir = None,
    template: options.Template = None,
    chat: options.TrainedChat = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Maximum tokens of a continuation.")] = 100,
    limit: options.Limit = None,
    seed: options.Seed = 0,
    run: options.RunOptions,
) -> None:
    """Measure repetition, entropy, gibberish and perplexity of what the model writes."""
    run_benchmark(
        "quality",
        model,
        control,
        run,
        prompts=prompts,
        texts=texts,
        base=base,
        classifier=classifier,
        clean_label=clean_label,
        classifier_tokens=classifier_tokens,
        data_dir=data_dir,
        template=unescaped(template),
        chat=chat,
        max_new_tokens=max_new_tokens,
        limit=limit,
        seed=seed,
    )
