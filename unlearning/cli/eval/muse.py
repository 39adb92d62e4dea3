"""`unlearn eval muse`: verbatim and knowledge memorisation, privacy leakage and utility on News or Books."""

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
  unlearn eval muse --corpus news --model runs/npo --retain-model ./news-retrained --data ../data
  unlearn eval muse --corpus books --model runs/npo --auc-retain 0.5393
  unlearn eval muse --corpus news --model runs/npo --retain-result runs/eval-muse-retrained --limit 20 --json
"""


def command(
    model: options.Model,
    corpus: Annotated[str, typer.Option(metavar="NAME", help="news or books.")],
    retain_model: options.RetainModel = None,
    retain_result: options.RetainResult = None,
    auc_retain: Annotated[
        float | None,
        typer.Option(
            metavar="NUMBER",
            help="A_retain for PrivLeak where there is no retain model (Min-40 % of MUSE's released ones: news 0.4772, "
            "books 0.5393; they hold for no other model or data).",
        ),
    ] = None,
    data: options.Data = None,
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
    """Evaluate on MUSE: VerbMem, KnowMem on forget and retain questions, PrivLeak.

    The directory of --data holds muse-news/ or muse-books/, laid out as on the hub (muse-bench/MUSE-News): verbmem/,
    knowmem/, privleak/. What it lacks is left out by name.
    """
    loading = Loading(device, dtype, allow_pickle, trust_remote_code)
    retain = Retain(retain_model, retain_result)
    if auc_retain is not None and (retain.model or retain.result):
        raise InputError("--auc-retain stands in for a retain model, and one is named too; give one of them")

    from unlearning.evaluation.benchmarks.muse import benchmark as muse
    from unlearning.evaluation.benchmarks.muse.data import read_muse

    muse.check_auc(auc_retain)
    found = read_muse(corpus, data, limit=limit)

    def prepare(subject: "Subject") -> "Benchmark":
        return muse.prepare(subject, found, auc_retain=auc_retain, seed=seed)

    run_benchmark(
        "muse",
        prepare,
        model,
        loading=loading,
        report=Report(out, quiet, as_json),
        batch_size=batch_size,
        retain=retain,
    )
