"""`dissect patch`: the base's activations in the unlearned model, window by window."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dissect.cli import options
from dissect.cli.opening import (
    ModelOptions,
    PromptOptions,
    choice,
    figure_formats,
    find_data,
    note,
    open_control,
    open_pair,
    open_prompts,
    short_name,
)
from dissect.processes import joined
from unlearning.errors import InputError
from unlearning.terminal import write_json

if TYPE_CHECKING:
    from dissect.results import PatchingResult

EXAMPLES = """\b
Examples:
  dissect patch --base demo:base --unlearned demo:npo
  dissect patch --base demo:base --unlearned demo:grad_diff --sites mlp_coef,resid_post --window 1 --out runs/single
  dissect patch --base ./base --unlearned ./npo --control ./never --data forget.json --format html,pdf
  dissect patch --base demo:base --unlearned demo:npo --show-prompts 3
  dissect patch --base demo:base --unlearned demo:npo --dry-run
  dissect patch --base ./llama-7b --unlearned ./llama-7b-npo --data forget.json --stream --max-memory 6GiB
  dissect patch --base ./base --unlearned ./npo --data concepts.json --scoring notebook --json
"""


def command(
    base: options.Base,
    unlearned: options.Unlearned,
    data: options.Data = None,
    sites: Annotated[
        str,
        typer.Option(metavar="LIST", help="What to patch: mlp_coef, attn_out, mlp_out, resid_post; + joins two."),
    ] = "mlp_coef,attn_out,mlp_coef+attn_out",
    window: Annotated[int, typer.Option(help="Layers patched together, odd; clipped at the model's ends.")] = 5,
    control: options.Control = "auto",
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Run directory.  [default: runs/patch-U-windowW]")
    ] = None,
    scoring: options.Scoring = "answer",
    template: options.Template = None,
    chat: options.Chat = False,
    answers: options.Answers = "given",
    max_new_tokens: options.MaxNewTokens = 30,
    limit: options.Limit = None,
    show_prompts: Annotated[
        int | None, typer.Option(metavar="N", help="Show N prompts with their answer positions, and stop.")
    ] = None,
    formats: options.Formats = "html",
    engine: Annotated[str, typer.Option(help="How interventions are run: wavefront or reference.")] = "wavefront",
    device: options.Device = None,
    dtype: options.Dtype = None,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 16,
    chunk_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens through a block at once.  [default: measured]")
    ] = None,
    max_memory: options.MaxMemory = None,
    stream: options.Stream = None,
    precision: Annotated[str, typer.Option(help="Of float32 on a GPU: highest, or high for TF32.")] = "highest",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be computed, and stop.")] = False,
    allow_pickle: options.AllowPickle = False,
    trust_remote_code: options.TrustRemoteCode = False,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Put the base model's activations into the unlearned one, layer window by layer window, and score (KRS)."""
    from dissect.interventions import centred_windows
    from dissect.sites import parse_sites
    from dissect.sizes import parse_bytes

    if show_prompts is not None and show_prompts < 1:
        raise InputError(f"--show-prompts {show_prompts}: show at least one")
    wanted = figure_formats(formats)
    parse_sites(sites)
    centred_windows(max(window, 1), window)  # odd and positive, before anything is loaded
    asking = PromptOptions(scoring, template, chat, answers, max_new_tokens, limit)
    known_precision = choice("--precision", precision, "highest", "high")
    allowed = None if max_memory is None else parse_bytes(max_memory)
    loading = ModelOptions(device, dtype, stream, allowed, allow_pickle, trust_remote_code, quiet)
    if chunk_tokens is not None and chunk_tokens < 1:
        raise InputError(f"--chunk-tokens {chunk_tokens}: at least 1")
    choice("--engine", engine, "wavefront", "reference")
    data = find_data(data, base)

    with joined(device=device) as processes:
        pair = open_pair(base, unlearned, loading, processes)
        prompts = open_prompts(data, pair, asking)
        from dissect.patching import patch, plan_patch
        from dissect.tables import print_plan, print_prompts

        if show_prompts is not None:
            print_prompts(prompts, pair.tokenizer, show_prompts)
            return
        control_model = open_control(control, pair, loading)
        if dry_run:
            plan = plan_patch(
                pair,
                prompts,
                sites=sites,
                window=window,
                control=control_model,
                batch_size=batch_size,
                chunk_tokens=chunk_tokens,
                max_memory=allowed,
                processes=processes,
            )
            write_json(plan.record()) if as_json else print_plan(plan)
            return
        out = out or Path("runs") / run_name(unlearned, window, scoring)
        earlier = _earlier(out)
        result = patch(
            pair,
            prompts,
            sites=sites,
            window=window,
            control=control_model,
            engine=engine,
            batch_size=batch_size,
            chunk_tokens=chunk_tokens,
            max_memory=allowed,
            precision=known_precision,
            seed=seed,
            out=out,
            progress=not quiet,
            processes=processes,
        )
        if processes.rank > 0:
            return
        if earlier and not quiet:
            note(earlier)
        _report(result, out, wanted, quiet=quiet, as_json=as_json)


def run_name(unlearned: str, window: int, scoring: str) -> str:
    """The directory of a run that was not named."""
    return f"patch-{short_name(unlearned)}-window{window}" + ("" if scoring == "answer" else f"-{scoring}")


def _earlier(out: Path) -> str | None:
    """What a run directory holds already of the run that is about to go on there."""
    from dissect.runs import Run, read_record

    if not (out / "run.json").is_file():
        return None
    run = Run(out, read_record(out))
    if run.is_complete:
        return f"{out} holds this very run already; nothing was computed again"
    return f"went on in {out}, where {run.n_parts} batches were finished"


def _report(result: "PatchingResult", out: Path, formats: list[str], *, quiet: bool, as_json: bool) -> None:
    from dissect.tables import console, print_peaks

    exported = result.save_figures(out, formats=formats)
    if exported.problem:
        note(exported.problem)
    for _, row in result.undefined().iterrows():
        note(f"{row['examples']} examples have no KRS in {row['target']}: {row['undefined']}")
    if as_json:
        write_json({**result.summary(), "run": str(out), "figures": [str(path) for path in exported.paths]})
    elif not quiet:
        print_peaks(result)
        console().print(f"figure  {out / 'figures' / 'krs.html'}", soft_wrap=True, highlight=False)
        console().print(f"run     {out}", soft_wrap=True, highlight=False)
