"""`dissect patch`: replace activations of the unlearned model by the base's, window by window."""

from typing import Annotated

import typer

from dissect.cli import options
from dissect.cli.sweeps import run_sweep

EXAMPLES = """\b
Examples:
  dissect patch --base demo:base --unlearned demo:npo
  dissect patch --base demo:base --unlearned demo:grad_diff --sites mlp_coef,resid_post --window 1 --out runs/single
  dissect patch --base demo:base --unlearned demo:npo --donor other-question,noise --null 3
  dissect patch --base demo:base --unlearned demo:npo --direction unlearned-to-base --prefix
  dissect patch --base ./base --unlearned ./npo --control ./control --data forget.json --format html,pdf
  dissect patch --base demo:base --unlearned demo:npo --show-prompts 3
  dissect patch --base demo:base --unlearned demo:npo --dry-run
  dissect patch --base ./llama-7b --unlearned ./llama-7b-npo --data forget.json --stream --max-memory 6GiB
  dissect patch --base ./base --unlearned ./npo --data concepts.json --scoring notebook --window 5 --json
"""


def command(
    *,
    pair: options.PairOptions,
    data: options.Data = None,
    sites: Annotated[
        str,
        typer.Option(
            metavar="LIST", help="Activations: mlp_coef, attn_out, mlp_out, resid_post; + patches several together."
        ),
    ] = "mlp_coef,attn_out,mlp_coef+attn_out",
    sweep: options.SweepOptions,
    prompts: options.PromptOptions,
    models: options.ModelOptions,
    output: options.OutputOptions,
) -> None:
    """Patch the base model's activations into the unlearned model, window by window, and score the recovery (KRS)."""
    from dissect.models.sites import parse_sites

    run_sweep("patch", parse_sites(sites), data, pair=pair, sweep=sweep, prompts=prompts, models=models, output=output)
