"""`unlearn eval mia`: can the forget set be told from texts that nobody trained on?"""

from typing import TYPE_CHECKING, Annotated

import typer

from unlearning.cli.eval import options
from unlearning.cli.eval.running import Loading, Report, Retain, run_benchmark, wrapping_of

if TYPE_CHECKING:
    from unlearning.evaluation.harness import Benchmark
    from unlearning.evaluation.subject import Subject

EXAMPLES = """\b
Examples:
  unlearn eval mia --model runs/npo --forget forget.jsonl --holdout unseen.jsonl --retain-model ./never
  unlearn eval mia --model ./npo --forget tofu:forget05 --holdout tofu:holdout05 --retain-model ./retain95
  unlearn eval mia --model ./npo --forget muse-news:privleak:forget --holdout muse-news:privleak:holdout \\
      --data ../data --attacks min_k,min_k_plus_plus,grad_norm
  unlearn eval mia --model ./npo --forget forget.txt --holdout unseen.txt --reference-model ./trunk --max-tokens 256
"""


def command(
    model: options.Model,
    forget: Annotated[
        str, typer.Option(metavar="F", help="What was to be forgotten: a file, tofu:forget05, muse-news:raw:forget...")
    ],
    holdout: Annotated[
        str, typer.Option(metavar="H", help="Texts of the same kind that no model was trained on, likewise.")
    ],
    retain_model: options.RetainModel = None,
    retain_result: options.RetainResult = None,
    reference_model: Annotated[
        str | None, typer.Option(metavar="REF", help="For the attack `reference`: a model without the forget set.")
    ] = None,
    attacks: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Of loss, zlib, lower, min_k, min_k_plus_plus, reference, grad_norm.  [default: all but grad_norm, "
            "which takes a backward pass a text, one at a time]",
        ),
    ] = None,
    min_k: Annotated[float, typer.Option(metavar="K", help="Share of tokens that Min-K and Min-K++ read.")] = 0.4,
    max_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Score the first N tokens of each text only.")
    ] = None,
    data: options.Data = None,
    template: options.Template = None,
    chat: options.Chat = False,
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
    """Attack the forget set by membership inference: AUC -> 1 memorised, 0.5 like unseen texts, -> 0 over-forgotten.

    Good is the retain model's AUC, which is 0.5 only where forget and hold-out texts are of one distribution.
    """
    chosen = None if attacks is None else [name.strip() for name in attacks.split(",") if name.strip()]
    loading = Loading(device, dtype, allow_pickle, trust_remote_code)
    retain = Retain(retain_model, retain_result)

    from unlearning.evaluation.benchmarks.membership import benchmark as membership
    from unlearning.evaluation.benchmarks.membership.texts import check_sets, note_of_sizes, read_source

    membership.chosen_attacks(chosen, has_reference=reference_model is not None)
    membership.check_numbers(fraction=min_k, max_tokens=max_tokens, limit=limit)
    sources = [read_source(name, data) for name in (forget, holdout)]
    check_sets(*(source.texts()[:limit] for source in sources))  # before models are loaded
    reference = None if reference_model is None else loading.open(reference_model)

    def prepare(subject: "Subject") -> "Benchmark":
        wrappings = [wrapping_of(subject, template, chat, default=source.template) for source in sources]
        texts = [source.texts(wrapping) for source, wrapping in zip(sources, wrappings, strict=True)]
        return membership.prepare(
            subject,
            forget=texts[0],
            holdout=texts[1],
            attacks=chosen,
            reference=reference,
            fraction=min_k,
            max_tokens=max_tokens,
            chat=wrappings[0].chat,
            limit=limit,
            seed=seed,
            notes=note_of_sizes(forget, holdout),
        )

    run_benchmark(
        "mia",
        prepare,
        model,
        loading=loading,
        report=Report(out, quiet, as_json),
        batch_size=batch_size,
        retain=retain,
    )
