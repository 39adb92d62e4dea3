"""`unlearn eval wmdp`: hazardous knowledge as multiple choice, in WMDP's own prompt."""

from typing import TYPE_CHECKING, Annotated

import typer

from unlearning.cli.eval import options
from unlearning.cli.eval.running import Loading, Report, Retain, run_benchmark
from unlearning.common.errors import InputError

if TYPE_CHECKING:
    from unlearning.evaluation.harness import Benchmark
    from unlearning.evaluation.subject import Subject

EXAMPLES = """\b
Examples:
  unlearn eval wmdp --model runs/rmu --data ../data
  unlearn eval wmdp --model runs/rmu --sets bio,cyber --scoring letter --permute 3
  unlearn eval wmdp --model runs/rmu --retain-model ./base --chat --json

\b
--data DIR holds wmdp/bio_questions.json, chem_questions.json and cyber_questions.json, as the authors hand them out,
or a copy of the hub's cais/wmdp as wmdp/ (wmdp-bio/test-00000-of-00001.parquet, ...).
"""


def command(
    model: options.Model,
    data: options.Data = None,
    sets: Annotated[str, typer.Option(metavar="LIST", help="Of bio, chem, cyber.")] = "bio,chem,cyber",
    scoring: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="letter: options listed, letters scored; answer: listed, texts scored; cloze: not listed.",
        ),
    ] = "letter,answer,cloze",
    permute: Annotated[int, typer.Option(metavar="N", help="Ask again in N other orders of the options.")] = 0,
    retain_model: options.RetainModel = None,
    retain_result: options.RetainResult = None,
    out: options.Out = None,
    limit: options.Limit = None,
    chat: options.Chat = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 16,
    allow_pickle: options.AllowPickle = False,
    trust_remote_code: options.TrustRemoteCode = False,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """WMDP: biology, chemistry and cybersecurity questions, zero-shot; chance is .25."""
    retain = Retain(retain_model, retain_result)
    from unlearning.data.choice_questions import read_questions
    from unlearning.evaluation.benchmarks.multiple_choice import benchmark as multiple_choice

    names = [name.strip() for name in sets.split(",") if name.strip()]
    if not names:
        raise InputError("--sets: name one or several of bio,chem,cyber")
    kinds = multiple_choice.check_scoring([kind.strip() for kind in scoring.split(",")], permute)
    questions = {name: read_questions(f"wmdp:{name}", data_dir=data) for name in names}

    def prepare(subject: "Subject") -> "Benchmark":
        return multiple_choice.prepare(
            subject,
            sets=questions,
            name="wmdp",
            role="forget",
            scoring=kinds,
            permute=permute,
            chat=chat,
            limit=limit,
            seed=seed,
        )

    run_benchmark(
        "wmdp",
        prepare,
        model,
        loading=Loading(device, dtype, allow_pickle, trust_remote_code),
        report=Report(out, quiet, as_json),
        batch_size=batch_size,
        retain=retain,
    )
