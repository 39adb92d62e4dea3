"""`unlearn eval conceptvectors`: concepts' value vectors, and what the model still says of the concepts."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unlearning.cli.eval import options
from unlearning.cli.eval.running import Loading, Report, Retain, run_benchmark
from unlearning.common.errors import InputError

if TYPE_CHECKING:
    from unlearning.data.records import Record
    from unlearning.evaluation.harness import Benchmark
    from unlearning.evaluation.subject import Subject

EXAMPLES = """\b
Examples:
  unlearn eval conceptvectors --model runs/npo --base meta-llama/Llama-2-7b-chat-hf --data ../data
  unlearn eval conceptvectors --model runs/npo --base ./base --concepts concepts.json --noise 0,.1,.3
  unlearn eval conceptvectors --model runs/npo --base ./base --concepts concepts.json --no-vectors --limit 5 --json

\b
A record is ConceptVectors' own: {"Concept", "QA": [...], "text_completion": [{"First_half"}, ...],
"unrelated_QA": [...], "Layer", "Dim", "wikipedia_content"}. Layer and Dim belong to the model in which the vectors
were found; for any other give --no-vectors. --noise disturbs the base's vectors, one concept at a time: what it says
of that concept should change, and nothing else.
"""


def command(
    model: options.Model,
    base: Annotated[
        str | None, typer.Option(metavar="B", help="The model before unlearning, which every score compares with.")
    ] = None,
    concepts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="ConceptVectors' records.  [default: those in --data]")
    ] = None,
    vectors: Annotated[
        bool, typer.Option("--vectors/--no-vectors", help="Look at the value vectors that the records name.")
    ] = True,
    noise: Annotated[
        str, typer.Option(metavar="S,S", help="Standard deviations of noise on the base's vectors; the paper's: 0.1.")
    ] = "",
    retain_model: options.RetainModel = None,
    retain_result: options.RetainResult = None,
    data: options.Data = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of a text.")] = 100,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Use the first N concepts only.")] = None,
    per_concept: Annotated[
        int | None, typer.Option(metavar="N", help="Use the first N questions of each kind per concept only.")
    ] = None,
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
    """ConceptVectors: were concepts erased from the parameters, and from what the model says?"""
    if base is None:
        raise InputError("give --base, the model before unlearning: every score compares with it")
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit}: 1 or more")
    scales = _scales(noise)
    if scales and not vectors:
        raise InputError("--noise changes the vectors that --no-vectors leaves out; give one of them")

    from unlearning.evaluation.benchmarks import conceptvectors

    records, source = _records(concepts, data)
    read = conceptvectors.concepts_of(records[:limit], source, per_concept=per_concept)
    loading = Loading(device, dtype, allow_pickle, trust_remote_code)
    vanilla = conceptvectors.Vanilla(loading.open(base))

    def prepare(subject: "Subject") -> "Benchmark":
        return conceptvectors.prepare(
            subject,
            concepts=read,
            vanilla=vanilla,
            vectors=vectors,
            noise=scales,
            max_new_tokens=max_new_tokens,
            seed=seed,
        )

    run_benchmark(
        "conceptvectors",
        prepare,
        model,
        loading=loading,
        report=Report(out, quiet, as_json),
        batch_size=batch_size,
        retain=Retain(retain_model, retain_result),
    )


def _scales(noise: str) -> list[float]:
    try:
        scales = [float(one) for one in noise.split(",") if one.strip()]
    except ValueError:
        raise InputError(f"--noise {noise}: numbers with commas between, as 0,0.1,0.3") from None
    return list(dict.fromkeys(scales))


def _records(concepts: Path | None, data: Path | None) -> tuple[list["Record"], str]:
    from unlearning.data.concept_vectors import find_concepts
    from unlearning.data.named import data_directory
    from unlearning.data.records import read_records

    if concepts is not None:
        return read_records(concepts), str(concepts)
    found = find_concepts(data_directory(data))
    return [found[name][0] for name in sorted(found)], ", ".join(sorted({str(file) for _, file in found.values()}))
