"""`unlearn eval quality`: is what the model writes still text?"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unlearning.cli.eval import options
from unlearning.cli.eval.running import Loading, Report, Retain, run_benchmark, wrapping_of
from unlearning.common.errors import InputError

if TYPE_CHECKING:
    from unlearning.evaluation.harness import Benchmark
    from unlearning.evaluation.subject import Subject

EXAMPLES = """\b
Examples:
  unlearn eval quality --model runs/npo --prompts forget.json --base demo:base
  unlearn eval quality --model runs/npo --prompts tofu:forget01 --retain-model ./retain99 --data ../data
  unlearn eval quality --model runs/npo --texts generations.jsonl --base ./base --json
  unlearn eval quality --model runs/npo --prompts muse-news:raw:forget --max-new-tokens 200 \\
      --classifier madhurjindal/autonlp-Gibberish-Detector-492513457 --classifier-tokens 512

\b
Gibberish, by a rule without a dictionary: a text that says the same four times or more (a loop), most of whose words
are none (x#9}qK, ???), or whose letters have too few vowels. Words in random order pass; see perplexity and entropy.
"""


def command(
    model: options.Model,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="P",
            help="What to continue: a file of prompts, questions or texts, or a named set (tofu:forget01); of "
            "documents the first 20 words.",
        ),
    ] = None,
    texts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Or texts that the model has written already.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="B", help="A sound model, under which the texts' perplexity is taken.")
    ] = None,
    classifier: Annotated[
        str | None, typer.Option(metavar="C", help="A text classifier of transformers: directory or hub id.")
    ] = None,
    clean_label: Annotated[
        str | None, typer.Option(metavar="LABEL", help="Its class for clean texts.  [default: class 0]")
    ] = None,
    classifier_tokens: Annotated[int, typer.Option(help="Tokens of a text that the classifier reads.")] = 32,
    retain_model: options.RetainModel = None,
    retain_result: options.RetainResult = None,
    data: options.Data = None,
    template: options.Template = None,
    chat: options.Chat = False,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of a continuation.")] = 100,
    limit: options.Limit = None,
    out: options.Out = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 16,
    allow_pickle: options.AllowPickle = False,
    trust_remote_code: options.TrustRemoteCode = False,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Repetition, entropy, gibberish, perplexity: is what the model writes still text?"""
    from unlearning.evaluation.benchmarks import quality
    from unlearning.evaluation.metrics.fluency import load_classifier

    if (prompts is None) == (texts is None):
        raise InputError("give --prompts, what to continue, or --texts, what was written already; one of them")
    written = None if template is None else template.replace("\\n", "\n")
    given = quality.read_texts(texts) if texts is not None else None
    if prompts is not None:  # what is wrong with them is said before a model is loaded
        quality.read_prompts(prompts, template=written, data_dir=data)
    if classifier is None and clean_label is not None:
        raise InputError("--clean-label is a class of --classifier; give that, too")
    loading = Loading(device, dtype, allow_pickle, trust_remote_code)
    judge = None
    if classifier is not None:
        judge = load_classifier(classifier, label=clean_label, max_length=classifier_tokens, batch_size=batch_size)
    sound = None if base is None else loading.open(base)

    def prepare(subject: "Subject") -> "Benchmark":
        form = wrapping_of(subject, template, chat).chat
        asked = (
            given
            if given is not None
            else quality.read_prompts(prompts or "", template=written, chat=form, data_dir=data)
        )
        return quality.prepare(
            subject,
            asked=asked,
            chat=form,
            base=sound,
            classifier=judge,
            max_new_tokens=max_new_tokens,
            limit=limit,
            seed=seed,
        )

    run_benchmark(
        "quality",
        prepare,
        model,
        loading=loading,
        report=Report(out, quiet, as_json),
        batch_size=batch_size,
        retain=Retain(retain_model, retain_result),
    )
