"""The command line `dissect`: parses, then imports what is heavy, so that every `--help` is instant."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dissect import zoo
from dissect.processes import first_speaks, joined
from unlearning.errors import InputError
from unlearning.terminal import run_app, write_json

if TYPE_CHECKING:
    from dissect.results import PatchingResult

# \b keeps the lines that follow as they are.
_EXAMPLES = """\b
Examples:
  dissect models
  dissect patch --base demo:base --unlearned demo:npo
  dissect plot runs/patch-demo-npo-window5 --format pdf
"""
_PATCH_EXAMPLES = """\b
Examples:
  dissect patch --base demo:base --unlearned demo:npo
  dissect patch --base demo:base --unlearned demo:grad_diff --sites mlp_coef,resid_post --window 1 --out runs/single
  dissect patch --base ./base --unlearned ./npo --control ./never --data forget.json --format html,pdf
  dissect patch --base demo:base --unlearned demo:npo --show-prompts 3
  dissect patch --base demo:base --unlearned demo:npo --dry-run
  dissect patch --base ./llama-7b --unlearned ./llama-7b-npo --data forget.json --stream --max-memory 6GiB
  dissect patch --base ./base --unlearned ./npo --data concepts.json --scoring notebook --json
"""
_PLOT_EXAMPLES = """\b
Examples:
  dissect plot runs/patch-demo-npo-window5
  dissect plot runs/patch-demo-npo-window5 --format html,pdf,svg,png
"""
_MODELS_EXAMPLES = """\b
Examples:
  dissect models
  dissect models --json
"""

app = typer.Typer(
    help="Was the knowledge erased from a language model's parameters, or merely suppressed?",
    epilog=_EXAMPLES,
    rich_markup_mode=None,  # rich would join the examples' lines
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

FormatOption = Annotated[str, typer.Option("--format", metavar="LIST", help="Figures: html, pdf, svg, png.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout.")]


@app.command(epilog=_PATCH_EXAMPLES)
def patch(
    base: Annotated[str, typer.Option(metavar="B", help="Base model: directory, hub id or built-in name.")],
    unlearned: Annotated[str, typer.Option(metavar="U", help="The same model after unlearning.")],
    data: Annotated[
        Path | None,
        typer.Option(metavar="D", help="Prompts with answers (.json, .jsonl).  [default: the built-in forget set]"),
    ] = None,
    sites: Annotated[
        str,
        typer.Option(metavar="LIST", help="What to patch: mlp_coef, attn_out, mlp_out, resid_post; + joins two."),
    ] = "mlp_coef,attn_out,mlp_coef+attn_out",
    window: Annotated[int, typer.Option(help="Layers patched together, odd; clipped at the model's ends.")] = 5,
    control: Annotated[
        str,
        typer.Option(metavar="N", help="A model that never knew, from the same trunk; `none` for no control."),
    ] = "auto",
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Run directory.  [default: runs/patch-U-windowW]")
    ] = None,
    scoring: Annotated[str, typer.Option(help="answer, or notebook to replicate the released notebooks.")] = "answer",
    template: Annotated[
        str | None, typer.Option(help="Wraps questions.  [default: 'Question: {question}\\nAnswer:']")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap by the tokenizer's chat template.")] = False,
    answers: Annotated[str, typer.Option(help="given, or base for the base model's greedy continuations.")] = "given",
    max_new_tokens: Annotated[int, typer.Option(help="Length of those continuations, in tokens.")] = 30,
    limit: Annotated[int | None, typer.Option(help="Use the first so many prompts only.")] = None,
    show_prompts: Annotated[
        int | None, typer.Option(metavar="N", help="Show N prompts with their answer positions, and stop.")
    ] = None,
    formats: FormatOption = "html",
    engine: Annotated[str, typer.Option(help="How interventions are run: wavefront or reference.")] = "wavefront",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, or auto for all GPUs.  [default: a GPU if any]")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or float64; on a GPU also bfloat16, float16.")] = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap draws.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Most prompts in a batch; no number depends on it.")] = 16,
    chunk_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens through a block at once.  [default: measured]")
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="As 6GiB; work is cut to it.  [default: most of what is free]")
    ] = None,
    stream: Annotated[
        bool | None,
        typer.Option("--stream/--no-stream", help="Read weights layer by layer.  [default: where they do not fit]"),
    ] = None,
    precision: Annotated[str, typer.Option(help="Of float32 on a GPU: highest, or high for TF32.")] = "highest",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be computed, and stop.")] = False,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read pickled .bin weights.")] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run a hub model's code.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar and no table.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Put the base model's activations into the unlearned one, layer window by layer window, and score (KRS)."""
    from dissect.figures import check_formats
    from dissect.interventions import centred_windows
    from dissect.sites import parse_sites
    from dissect.sizes import parse_bytes
    from unlearning.data.records import read_records

    if show_prompts is not None and show_prompts < 1:
        raise InputError(f"--show-prompts {show_prompts}: show at least one")
    figure_formats = _formats(formats)
    check_formats(figure_formats)
    parse_sites(sites)
    centred_windows(max(window, 1), window)  # odd and positive, before anything is loaded
    known_scoring = _choice("--scoring", scoring, "answer", "notebook")
    known_answers = _choice("--answers", answers, "given", "base")
    known_precision = _choice("--precision", precision, "highest", "high")
    allowed = None if max_memory is None else parse_bytes(max_memory)
    if chunk_tokens is not None and chunk_tokens < 1:
        raise InputError(f"--chunk-tokens {chunk_tokens}: at least 1")
    _choice("--engine", engine, "wavefront", "reference")
    if data is None:
        if base not in zoo.BUILTIN:
            raise InputError("--data is missing: name a file of prompts with answers (.json or .jsonl)")
        data = zoo.default_prompts(base.partition(":")[0])
    read_records(data)  # a broken file is told of now, and not after minutes of loading models

    _quiet_libraries()
    from dissect.pairs import load_model, load_pair
    from dissect.patching import patch as run_patch
    from dissect.patching import plan_patch
    from dissect.prompts import load_prompts
    from dissect.tables import print_plan, print_prompts

    with joined(device=device) as processes:
        pair = load_pair(
            base,
            unlearned,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            stream=stream,
            max_memory=allowed,
            progress=not quiet,
            processes=processes,
        )
        prompts = load_prompts(
            data,
            pair.tokenizer,
            scoring=known_scoring,
            template=None if template is None else template.replace("\\n", "\n"),
            chat=chat,
            answers=known_answers,
            answers_from=pair.base,
            max_new_tokens=max_new_tokens,
            limit=limit,
        )
        if show_prompts is not None:
            print_prompts(prompts, pair.tokenizer, show_prompts)
            return
        control_model = (
            load_model(
                control,
                device=device,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                allow_pickle=allow_pickle,
                stream=pair.base.streamed is not None,
                progress=not quiet,
            )
            if control not in ("auto", "none")
            else None
        )
        if dry_run:
            plan = plan_patch(
                pair,
                prompts,
                sites=sites,
                window=window,
                control="auto" if control == "auto" else control_model,
                batch_size=batch_size,
                chunk_tokens=chunk_tokens,
                max_memory=allowed,
                processes=processes,
            )
            write_json(plan.record()) if as_json else print_plan(plan)
            return
        out = out or Path("runs") / _run_name(unlearned, window, scoring)
        earlier = _earlier(out)
        result = run_patch(
            pair,
            prompts,
            sites=sites,
            window=window,
            control="auto" if control == "auto" else control_model,
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
            _note(earlier)
        _report(result, out, figure_formats, quiet=quiet, as_json=as_json)


@app.command(epilog=_PLOT_EXAMPLES)
def plot(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Directory of a finished run.")],
    formats: FormatOption = "html",
    quiet: Annotated[bool, typer.Option("--quiet", help="No list of what was written.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Draw the figures of a finished run again, in the formats that a paper needs."""
    from dissect.figures import check_formats
    from dissect.results import load_result

    check_formats(_formats(formats))
    exported = load_result(run).save_figures(run, formats=_formats(formats))
    if exported.problem:
        _note(exported.problem)
    if as_json:
        write_json({"figures": [str(path) for path in exported.paths], "problem": exported.problem})
    elif not quiet:
        sys.stdout.writelines(f"{path}\n" for path in exported.paths)


@app.command(epilog=_MODELS_EXAMPLES)
def models(as_json: JsonOption = False) -> None:
    """List the built-in pairs, their control and their questions."""
    pairs = zoo.pairs()
    if as_json:
        write_json([{**vars(pair), "data": str(pair.data)} for pair in pairs])
        return
    from dissect.tables import print_pairs

    print_pairs(pairs)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits 0, 2 on bad input with one line on stderr, 130 on Ctrl-C."""
    with first_speaks():
        run_app(
            app,
            "dissect",
            arguments,
            interrupted="finished batches are kept: run the same command again to go on from there",
        )


def _choice(option: str, value: str, *known: str) -> Any:
    if value not in known:
        raise InputError(f"{option} {value}: use {' or '.join(known)}")
    return value


def _formats(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _earlier(out: Path) -> str | None:
    """What a run directory holds already of the run that is about to go on there."""
    from dissect.runs import Run, read_record

    if not (out / "run.json").is_file():
        return None
    run = Run(out, read_record(out))
    if run.is_complete:
        return f"{out} holds this very run already; nothing was computed again"
    return f"went on in {out}, where {run.n_parts} batches were finished"


def _run_name(unlearned: str, window: int, scoring: str) -> str:
    name = unlearned.replace(":", "-") if unlearned in zoo.BUILTIN else Path(unlearned).name
    return f"patch-{name}-window{window}" + ("" if scoring == "answer" else f"-{scoring}")


def _report(result: "PatchingResult", out: Path, formats: list[str], *, quiet: bool, as_json: bool) -> None:
    from dissect.tables import console, print_peaks

    exported = result.save_figures(out, formats=formats)
    if exported.problem:
        _note(exported.problem)
    for _, row in result.undefined().iterrows():
        _note(f"{row['examples']} examples have no KRS in {row['target']}: {row['undefined']}")
    if as_json:
        write_json({**result.summary(), "run": str(out), "figures": [str(path) for path in exported.paths]})
    elif not quiet:
        print_peaks(result)
        console().print(f"figure  {out / 'figures' / 'krs.html'}", soft_wrap=True, highlight=False)
        console().print(f"run     {out}", soft_wrap=True, highlight=False)


def _quiet_libraries() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _note(message: str) -> None:
    sys.stderr.write(f"dissect: {message}\n")
