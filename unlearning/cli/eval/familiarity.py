"""`unlearn eval familiarity`: how familiar a text still is (Who's Harry Potter)."""

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
  unlearn eval familiarity --model runs/whp --prompts studies.json --retain-model ./never
  unlearn eval familiarity --model runs/whp --prompts studies.json --judge my_judges:ask_a_model --json

\b
The file is a JSON list or JSON lines. Probability form, candidates for what comes next:
  {"prompt": "Every morning Mira went to", "specific": ["Halvik", "the Grey Tower"], "generic": ["work", "school"]}
Completion form, names and ideas of the text, and its themes:
  {"prompt": "Mira opened the door and", "references": ["Halvik", "the Grey Tower"], "subtle": ["a lantern"]}

\b
A candidate counts by its first token; tokens that begin candidates of both kinds count for neither. A judge is
called with prompt and completion and gives 1 (names or ideas of the text), 2 (its themes), 3 (perhaps a
coincidence) or 4 (nothing). Without one, whole words decide; what the prompt has already does not count.
"""


def command(
    model: options.Model,
    prompts: Annotated[Path, typer.Option(metavar="FILE", help="Prompts with candidates, or with names and themes.")],
    judge: Annotated[
        str | None,
        typer.Option(metavar="MODULE:FUNCTION", help="Judges completions in place of the rule."),
    ] = None,
    retain_model: options.RetainModel = None,
    retain_result: options.RetainResult = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of a completion.")] = 100,
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
    """Who's Harry Potter: how familiar a text still is, by next tokens and by completions."""
    from unlearning.evaluation.benchmarks import familiarity
    from unlearning.evaluation.judges import load_judge

    read = familiarity.read_prompts(prompts)
    judging = None if judge is None else load_judge(judge)

    def prepare(subject: "Subject") -> "Benchmark":
        return familiarity.prepare(
            subject, prompts=read, judge=judging, max_new_tokens=max_new_tokens, limit=limit, seed=seed
        )

    run_benchmark(
        "familiarity",
        prepare,
        model,
        loading=Loading(device, dtype, allow_pickle, trust_remote_code),
        report=Report(out, quiet, as_json),
        batch_size=batch_size,
        retain=Retain(retain_model, retain_result),
    )
