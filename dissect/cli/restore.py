"""`dissect restore`: replace weights of the unlearned model by the base's, window by window."""

from typing import Annotated

import typer

from dissect.cli import options
from dissect.cli.sweeps import run_sweep

EXAMPLES = """\b
Examples:
  dissect restore --base demo:base --unlearned demo:npo
  dissect restore --base demo:base --unlearned demo:npo --sites value_vectors,key_vectors,attn_weights --suffix
  dissect restore --base demo:base --unlearned demo:npo --sites value_vectors+mlp_coef --window 5 --null 3
  dissect restore --base demo:base --unlearned demo:npo --sites embed,unembed,norms
  dissect restore --base demo:base --unlearned demo:npo --parameters 'mlp\\.(up|gate)_proj' --layers 5-7
  dissect restore --base ./base --unlearned ./npo --control ./control --data forget.json --format html,pdf
"""


def command(
    *,
    pair: options.PairOptions,
    data: options.Data = None,
    sites: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Weights: value_vectors, key_vectors (or W_gate, W_in), router (of a mixture of experts), "
            "attn_weights (or W_Q, W_K, W_V, W_O), norms, embed, unembed; + restores several together, also with sites "
            "of dissect patch.  [default: value_vectors]",
        ),
    ] = None,
    parameters: Annotated[
        str | None, typer.Option(metavar="REGEX", help="Weights whose Hugging Face parameter names match REGEX.")
    ] = None,
    sweep: options.SweepOptions,
    prompts: options.PromptOptions,
    models: options.ModelOptions,
    output: options.OutputOptions,
) -> None:
    """Restore the base model's weights in the unlearned model, window by window, and score the recovery (KRS)."""
    from dissect.sweeps.restoration import restored_sites

    chosen = restored_sites(sites, parameters)
    run_sweep("restore", chosen, data, pair=pair, sweep=sweep, prompts=prompts, models=models, output=output)
