"""`unlearn eval tofu`: TOFU's forget quality, model utility and memorisation."""

from typing import TYPE_CHECKING, Annotated

import typer

from unlearning.cli.eval import options
from unlearning.cli.eval.running import Loading, Report, Retain, run_benchmark, wrapping_of

if TYPE_CHECKING:
    from unlearning.evaluation.harness import Benchmark
    from unlearning.evaluation.subject import Subject

EXAMPLES = """\b
Examples:
  unlearn eval tofu --model runs/npo --forget forget10 --retain-model ./retain90 --data ../data
  unlearn eval tofu --model runs/npo --forget forget05 --retain-result runs/eval-tofu-retain95
  unlearn eval tofu --model runs/npo --forget authors.jsonl --retain others.jsonl --sets forget,retain --json
  unlearn eval tofu --model ./llama-npo --forget forget01 --chat --limit 10 --out runs/quick
"""


def command(
    model: options.Model,
    forget: Annotated[
        str, typer.Option(metavar="F", help="What was to be forgotten: forget01 to forget99, or a file of that shape.")
    ] = "forget10",
    retain: Annotated[
        str, typer.Option(metavar="R", help="What was to be kept: a file of that shape, or a split.")
    ] = "retain_perturbed",
    ask: Annotated[
        str, typer.Option("--sets", metavar="LIST", help="What is asked; model utility needs all of them.")
    ] = "forget,retain,real_authors,world_facts",
    data: options.Data = None,
    retain_model: options.RetainModel = None,
    retain_result: options.RetainResult = None,
    out: options.Out = None,
    template: options.Template = None,
    chat: options.Chat = False,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Of a generated answer.")] = 200,
    generate: Annotated[
        bool, typer.Option("--generate/--no-generate", help="Generate answers, which ROUGE and model utility need.")
    ] = True,
    limit: options.Limit = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 16,
    allow_pickle: options.AllowPickle = False,
    trust_remote_code: options.TrustRemoteCode = False,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """TOFU: forget quality, model utility with its parts, truth ratios, ROUGE, memorisation, paraphrases."""
    from unlearning.evaluation.benchmarks.tofu.benchmark import prepare
    from unlearning.evaluation.benchmarks.tofu.sets import read_sets

    against = Retain(retain_model, retain_result)
    names = [name.strip() for name in ask.split(",") if name.strip()]
    sets = read_sets(forget, retain=retain, names=names, data_dir=data, limit=limit)

    def prepared(subject: "Subject") -> "Benchmark":
        return prepare(
            subject,
            sets=sets,
            wrapping=wrapping_of(subject, template, chat),
            max_new_tokens=max_new_tokens,
            generate=generate,
            seed=seed,
        )

    run_benchmark(
        "tofu",
        prepared,
        model,
        loading=Loading(device, dtype, allow_pickle, trust_remote_code),
        report=Report(out, quiet, as_json),
        batch_size=batch_size,
        retain=against,
    )
