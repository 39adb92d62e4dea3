"""`unlearn eval choice`: any multiple-choice file."""

from pathlib import Path
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
  unlearn eval choice --model runs/npo --questions quiz.json
  unlearn eval choice --model runs/npo --questions birthdays.jsonl --role forget --permute 5
  unlearn eval choice --model runs/npo --questions anatomy_test.csv --few-shot anatomy_dev.csv --subject anatomy
  unlearn eval choice --model runs/npo --questions a.json --questions b.parquet --questions wmdp:bio --scoring letter

\b
A record has "question", "choices" (2 to 26 texts; or one under each of "A", "B", ...) and "answer": the place of the
right one, from 0, or its letter. "subject", "group" (drawn whole for intervals) and "id" are used where given.
"""


def command(
    model: options.Model,
    questions: Annotated[
        list[str],
        typer.Option(metavar="FILE", help="Questions: .json, .jsonl, .csv, .parquet, wmdp:bio, hub:owner/name:config."),
    ],
    data: options.Data = None,
    role: Annotated[
        str, typer.Option(help="What a good unlearned model does with them: forget or retain; none to leave it open.")
    ] = "none",
    scoring: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="letter: options listed, letters scored; answer: listed, texts scored; cloze: not listed.",
        ),
    ] = "letter,answer,cloze",
    permute: Annotated[int, typer.Option(metavar="N", help="Ask again in N other orders of the options.")] = 0,
    subject: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What the prompt says they are about.  [default: each record's]")
    ] = None,
    few_shot: Annotated[
        str | None, typer.Option(metavar="FILE", help="Show solved questions of the same subject from this file.")
    ] = None,
    shots: Annotated[int, typer.Option(metavar="K", help="How many of them: the first K.")] = 5,
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
    """Any multiple-choice questions, by letter, by the options' texts, and without showing the options."""
    retain = Retain(retain_model, retain_result)
    from unlearning.data.choice_questions import read_questions
    from unlearning.evaluation.benchmarks.multiple_choice import benchmark as multiple_choice

    kinds = multiple_choice.check_scoring([kind.strip() for kind in scoring.split(",")], permute)
    expected = multiple_choice.check_role(role)
    sets = {}
    for source in questions:
        name = _set_name(source)
        if name in sets:
            raise InputError(f"--questions {source}: a second set called {name!r}; give the file another name")
        sets[name] = read_questions(source, data_dir=data, subject=subject)
    solved = read_questions(few_shot, data_dir=data, subject=subject) if few_shot else []

    def prepare(evaluated: "Subject") -> "Benchmark":
        return multiple_choice.prepare(
            evaluated,
            sets=sets,
            role=expected,
            scoring=kinds,
            permute=permute,
            few_shot=solved,
            n_shots=shots,
            chat=chat,
            limit=limit,
            seed=seed,
        )

    run_benchmark(
        "choice",
        prepare,
        model,
        loading=Loading(device, dtype, allow_pickle, trust_remote_code),
        report=Report(out, quiet, as_json),
        batch_size=batch_size,
        retain=retain,
    )


def _set_name(source: str) -> str:
    """A set's name in the metrics: the file's, or the last word of a data set's."""
    prefix, colon, rest = source.partition(":")
    if colon and not Path(source).exists():
        return rest.split("/")[-1].replace(":", "_")
    return Path(source).stem
