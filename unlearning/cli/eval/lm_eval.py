"""`unlearn eval lm-eval`: what else a model can do, by lm-evaluation-harness."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unlearning.cli.eval import options
from unlearning.cli.eval.running import Loading, Report, Retain, run_benchmark

if TYPE_CHECKING:
    from unlearning.evaluation.harness import Benchmark
    from unlearning.evaluation.subject import Subject

EXAMPLES = """\b
Examples:
  unlearn eval lm-eval --model runs/npo --tasks mmlu,winogrande,hellaswag --limit 200
  unlearn eval lm-eval --model runs/npo --tasks arc_easy,arc_challenge,boolq,piqa,openbookqa --data ./benchmarks
  unlearn eval lm-eval --model runs/npo --tasks my_quiz --tasks-dir ./tasks --num-fewshot 5

\b
Needs lm-evaluation-harness: pip install 'dissect-unlearning[eval]'.
--data DIR is looked through for each task's splits, as .parquet, .jsonl or .json with the hub's columns:
  DIR/arc_easy/test.jsonl                  by the task's name (train.jsonl too, where solved examples are shown)
  DIR/mmlu/anatomy/test-00000-of-00001.parquet   a copy of the hub's data set, by its name and configuration
What is not there comes from the hub, unless HF_HUB_OFFLINE=1.
"""


def command(
    model: options.Model,
    tasks: Annotated[
        str, typer.Option(metavar="LIST", help="Tasks, groups or tags of lm-evaluation-harness.")
    ] = "mmlu,winogrande,hellaswag,arc_challenge,arc_easy,boolq,piqa,openbookqa",
    tasks_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Tasks of your own (.yaml).")] = None,
    data: options.Data = None,
    num_fewshot: Annotated[
        int | None, typer.Option(metavar="K", min=0, help="Solved examples to show.  [default: each task's own]")
    ] = None,
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
    """MMLU, WinoGrande, HellaSwag, ARC, BoolQ, PIQA, OpenBookQA and every other task of lm-evaluation-harness."""
    retain = Retain(retain_model, retain_result)
    from unlearning.data.named import data_directory
    from unlearning.evaluation.benchmarks.lm_eval.tasks import check_installed

    check_installed()
    from unlearning.evaluation.benchmarks.lm_eval import benchmark as lm_eval

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    directory = data_directory(data)
    lm_eval.check_tasks(names, tasks_dir)

    def prepare(subject: "Subject") -> "Benchmark":
        return lm_eval.prepare(
            subject,
            tasks=names,
            tasks_dir=tasks_dir,
            data_dir=directory,
            num_fewshot=num_fewshot,
            limit=limit,
            chat=chat,
            seed=seed,
            batch_size=batch_size,
        )

    run_benchmark(
        "lm-eval",
        prepare,
        model,
        loading=Loading(device, dtype, allow_pickle, trust_remote_code),
        report=Report(out, quiet, as_json),
        batch_size=batch_size,
        retain=retain,
    )
