"""`unlearn eval mia`: can the forget set be told apart from texts that no model was trained on?"""

from typing import Annotated

import typer

from unlearning.cli.eval import options
from unlearning.cli.eval.running import run_benchmark
from unlearning.common.terminal import unescaped

EXAMPLES = """\b
Examples:
  unlearn eval mia --model runs/npo --forget forget.jsonl --holdout unseen.jsonl --control ./control
  unlearn eval mia --model ./npo --forget tofu:forget05 --holdout tofu:holdout05 --control ./retain95
  unlearn eval mia --model ./npo --forget muse-news:privleak:forget --holdout muse-news:privleak:holdout \\
      --data-dir ../data --attacks min_k,min_k_plus_plus,grad_norm
  unlearn eval mia --model ./npo --forget forget.txt --holdout unseen.txt --reference-model ./other --max-tokens 256

\b
AUC: 1 memorised, 0.5 indistinguishable from unseen texts, 0 over-forgotten. The goal is the control's AUC, which is 0.5
only if forget and hold-out texts have the same distribution.
"""


def command(
    *,
    model: options.Model,
    forget: Annotated[
        str, typer.Option(metavar="F", help="Forget set: a file, tofu:forget05, muse-news:raw:forget, ...")
    ],
    holdout: Annotated[
        str,
        typer.Option(metavar="H", help="Texts of the same kind that no model was trained on: a file or a named set."),
    ],
    control: options.ControlOptions,
    reference_model: Annotated[
        str | None,
        typer.Option(metavar="REF", help="Model not trained on the forget set, for the attack `reference`."),
    ] = None,
    attacks: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Attacks, of loss, zlib, lower, min_k, min_k_plus_plus, reference, grad_norm.  [default: all but "
            "grad_norm, which takes one backward pass per text]",
        ),
    ] = None,
    min_k: Annotated[float, typer.Option(metavar="K", help="Share of the tokens that Min-K and Min-K++ read.")] = 0.4,
    max_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Score only the first N tokens of each text.")
    ] = None,
    data_dir: options.DataDir = None,
    template: options.Template = None,
    chat: options.TrainedChat = None,
    append_eos: options.AppendEos = None,
    limit: options.Limit = None,
    seed: options.Seed = 0,
    run: options.RunOptions,
) -> None:
    """Attack the forget set by membership inference."""
    run_benchmark(
        "mia",
        model,
        control,
        run,
        forget=forget,
        holdout=holdout,
        reference_model=reference_model,
        attacks=attacks,
        min_k=min_k,
        max_tokens=max_tokens,
        data_dir=data_dir,
        template=unescaped(template),
        chat=chat,
        append_eos=append_eos,
        limit=limit,
        seed=seed,
    )
