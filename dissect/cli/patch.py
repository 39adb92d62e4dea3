"""`dissect patch`: the base's activations in the unlearned model, window by window."""

from pathlib import Path
from typing import Annotated

import typer

from dissect.cli import options
from dissect.cli.loading import ModelOptions, PromptOptions, choice
from dissect.cli.sweeps import DIRECTIONS, Request, run, windows_of

EXAMPLES = """\b
Examples:
  dissect patch --base demo:base --unlearned demo:npo
  dissect patch --base demo:base --unlearned demo:grad_diff --sites mlp_coef,resid_post --window 1 --out runs/single
  dissect patch --base demo:base --unlearned demo:npo --donor other-question,noise --null 3
  dissect patch --base demo:base --unlearned demo:npo --direction unlearned-to-base --prefix
  dissect patch --base ./base --unlearned ./npo --control ./never --data forget.json --format html,pdf
  dissect patch --base demo:base --unlearned demo:npo --show-prompts 3
  dissect patch --base demo:base --unlearned demo:npo --dry-run
  dissect patch --base ./llama-7b --unlearned ./llama-7b-npo --data forget.json --stream --max-memory 6GiB
  dissect patch --base ./base --unlearned ./npo --data concepts.json --scoring notebook --window 5 --json
"""


def command(
    base: options.Base,
    unlearned: options.Unlearned,
    data: options.Data = None,
    sites: Annotated[
        str,
        typer.Option(metavar="LIST", help="What to patch: mlp_coef, attn_out, mlp_out, resid_post; + joins two."),
    ] = "mlp_coef,attn_out,mlp_coef+attn_out",
    window: options.Window = None,
    prefix: options.Prefix = False,
    suffix: options.Suffix = False,
    layers: options.Layers = None,
    control: options.Control = "auto",
    direction: options.Direction = "base-to-unlearned",
    donor: options.Donor = "base",
    null: options.Null = 0,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Run directory.  [default: runs/patch-U...]")] = None,
    scoring: options.Scoring = "answer",
    template: options.Template = None,
    chat: options.Chat = False,
    answers: options.Answers = "given",
    max_new_tokens: options.MaxNewTokens = 30,
    limit: options.Limit = None,
    show_prompts: options.ShowPrompts = None,
    formats: options.Formats = "html",
    engine: options.Engine = "wavefront",
    device: options.Device = None,
    dtype: options.Dtype = None,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 16,
    chunk_tokens: options.ChunkTokens = None,
    max_memory: options.MaxMemory = None,
    stream: options.Stream = None,
    precision: options.Precision = "highest",
    dry_run: options.DryRun = False,
    allow_pickle: options.AllowPickle = False,
    trust_remote_code: options.TrustRemoteCode = False,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Put the base model's activations into the unlearned one, layer window by layer window, and score (KRS)."""
    from dissect.models.sites import parse_sites
    from dissect.runtime.sizes import parse_bytes
    from dissect.sweeps.run import Settings

    settings = Settings(
        sites=parse_sites(sites),
        window=windows_of(window, layers, prefix=prefix, suffix=suffix),
        direction=choice("--direction", direction, *DIRECTIONS),
        null=null,
        engine=choice("--engine", engine, "wavefront", "reference"),
        batch_size=batch_size,
        chunk_tokens=chunk_tokens,
        max_memory=None if max_memory is None else parse_bytes(max_memory),
        precision=choice("--precision", precision, "highest", "high"),
        seed=seed,
    )
    request = Request(
        command="patch",
        base=base,
        unlearned=unlearned,
        control=control,
        donor=donor,
        data=data,
        loading=ModelOptions(device, dtype, stream, settings.max_memory, allow_pickle, trust_remote_code, quiet),
        asking=PromptOptions(scoring, template, chat, answers, max_new_tokens, limit),
        out=out,
        formats=formats,
        show_prompts=show_prompts,
        dry_run=dry_run,
        as_json=as_json,
    )
    run(request, settings)
