"""`dissect decompose`: what unlearning changed, as weights, coefficients and both, layer by layer."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dissect.cli import options
from dissect.cli.loading import (
    ModelOptions,
    PromptOptions,
    earlier_run,
    figure_formats,
    find_data,
    note,
    open_control,
    open_pair,
    open_prompts,
    short_name,
)
from unlearning.common.terminal import write_json

if TYPE_CHECKING:
    import pandas as pd

    from dissect.decomposition.result import DecompositionResult

EXAMPLES = """\b
Examples:
  dissect decompose --base demo:base --unlearned demo:npo
  dissect decompose --base demo:base --unlearned demo:grad_diff --sites mlp --limit 64 --out runs/split
  dissect decompose --base ./base --unlearned ./npo --control ./never --data forget.json --format html,pdf
  dissect decompose --base ./base --unlearned ./npo --data concepts.json --scoring notebook --json
"""


_PLACE = ["site", "first_layer", "last_layer"]


def command(
    base: options.Base,
    unlearned: options.Unlearned,
    data: options.Data = None,
    sites: Annotated[
        str,
        typer.Option(metavar="LIST", help="mlp (down projection), attn (attention's output projection)."),
    ] = "mlp,attn",
    control: options.Control = "auto",
    null: Annotated[
        int, typer.Option(metavar="N", help="Also split N models with random updates of the unlearned one's norms.")
    ] = 0,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Run directory.  [default: runs/decompose-U]")] = None,
    scoring: options.Scoring = "answer",
    template: options.Template = None,
    chat: options.Chat = False,
    answers: options.Answers = "given",
    max_new_tokens: options.MaxNewTokens = 30,
    limit: options.Limit = None,
    formats: options.Formats = "html",
    device: options.Device = None,
    dtype: options.Dtype = None,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 16,
    stream: options.Stream = None,
    allow_pickle: options.AllowPickle = False,
    trust_remote_code: options.TrustRemoteCode = False,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Split each layer's change into weights, coefficients and both, and add each to the unlearned model (KRS)."""
    wanted = figure_formats(formats)
    asking = PromptOptions(scoring, template, chat, answers, max_new_tokens, limit)
    loading = ModelOptions(device, dtype, stream, None, allow_pickle, trust_remote_code, quiet)
    data = find_data(data, base)

    from dissect.decomposition.run import decompose, parse_decomposed
    from dissect.runtime.processes import ALONE

    known = parse_decomposed(sites)
    pair = open_pair(base, unlearned, loading, ALONE)
    prompts = open_prompts(data, pair, asking)
    out = out or Path("runs") / run_name(unlearned, scoring, null)
    earlier = earlier_run(out)
    result = decompose(
        pair,
        prompts,
        sites=known,
        control=open_control(control, pair, loading),
        null=null,
        batch_size=batch_size,
        seed=seed,
        out=out,
        progress=not quiet,
    )
    if earlier and not quiet:
        note(earlier)
    _report(result, out, wanted, quiet=quiet, as_json=as_json)


def run_name(unlearned: str, scoring: str, null: int) -> str:
    """The directory of a run that was not named."""
    parts = ["decompose", short_name(unlearned), *([f"null{null}"] if null else [])]
    return "-".join([*parts, *([] if scoring == "answer" else [scoring])])


def _report(result: "DecompositionResult", out: Path, formats: list[str], *, quiet: bool, as_json: bool) -> None:
    exported = result.save_figures(out, formats=formats)
    if exported.problem:
        note(exported.problem)
    _note_undefined(result)
    if as_json:
        write_json({**result.summary(), "run": str(out), "figures": [str(path) for path in exported.paths]})
    elif not quiet:
        from dissect.sweeps.tables import console

        _print_layers(result)
        _print_whole(result, "share", "share of the change")
        _print_whole(result, "krs", "KRS")
        _print_reading(result)
        console().print(f"figure  {out / 'figures' / 'krs.html'}", soft_wrap=True, highlight=False)
        console().print(f"run     {out}", soft_wrap=True, highlight=False)


def _note_undefined(result: "DecompositionResult") -> None:
    words = {"krs": "KRS", "share": "share", "direct": "direct contribution"}
    for (arm, number, reason), cell in result.undefined().groupby(["arm", "number", "reason"], sort=False):
        alone = cell[(cell["first_layer"] == cell["last_layer"]) & (number == "share")]
        places = ", ".join(f"{row['site']} {row['first_layer']}" for _, row in alone.iterrows())
        where = f" ({places})" if places else ""
        note(f"{cell['examples'].max()} examples have no {words[str(number)]} in the {arm} arm{where}: {reason}")


def _print_layers(result: "DecompositionResult") -> None:
    """Per layer: how the change is shared out, and what each term brings back beyond the control."""
    from rich import box
    from rich.table import Column, Table

    from dissect.decomposition.terms import EXACT
    from dissect.sweeps.tables import console

    curve = result.curve()
    krs, share = (_lookup(curve, ["arm", *_PLACE, "term"], value) for value in ("krs", "share"))
    net = " (minus control)" if "control" in result.arms else ""
    for site in result.configuration["sites"]:
        table = Table(
            Column("layer", no_wrap=True),
            *(Column(name, justify="right") for name in ("weight", "coef.", "inter.")),
            *(Column(name, justify="right", no_wrap=True) for name in ("weight", "coef.", "all three")),
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            title=f"{result.title}, {site}: shares of the change | KRS{net}",
            title_justify="left",
        )
        for first, last in curve[["first_layer", "last_layer"]].drop_duplicates().itertuples(index=False):
            cells = [f"{share['main', site, first, last, term]:.2f}" for term in EXACT]
            for term in ("weight", "coefficient", "total"):
                ours, theirs = (krs.get((arm, site, first, last, term)) for arm in ("main", "control"))
                cells.append(f"{ours:.2f}" + ("" if ours is None or theirs is None else f" ({ours - theirs:+.2f})"))
            table.add_row(str(first) if first == last else "all", *cells)
        console().print(table)


def _print_whole(result: "DecompositionResult", value: str, label: str) -> None:
    """All layers at once, with intervals, and what is left when other arms are taken off."""
    from rich import box
    from rich.table import Column, Table

    from dissect.decomposition.terms import EXACT, TOTAL
    from dissect.sweeps.tables import console, interval

    curve, contrast = result.curve(), result.contrast()
    others = list(contrast["against"].unique())
    table = Table(
        Column("in all layers", no_wrap=True),
        label,
        *(f"minus {arm}" for arm in others),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    last = curve["last_layer"].max()
    for site in result.configuration["sites"]:
        for term in (*EXACT, TOTAL) if value == "krs" else EXACT:
            here = [
                table[(table["site"] == site) & (table["term"] == term) & (table["first_layer"] == 0)]
                for table in (curve, contrast)
            ]
            ours, theirs = (rows[rows["last_layer"] == last] for rows in here)
            cells = [interval(row, value) for _, row in ours[ours["arm"] == "main"].iterrows()]
            table.add_row(f"{site} {term}", *cells, *(interval(row, value) for _, row in theirs.iterrows()))
    console().print(table)


def _print_reading(result: "DecompositionResult") -> None:
    from dissect.sweeps.tables import console

    said = []
    if "control" in result.arms:
        said.append("What a term gives a model that never knew as well is no sign of knowledge: read the difference.")
    else:
        said.append("No control: what a term gives a model that never knew as well is not known. Give one (--control).")
    if not any(arm.startswith("null") for arm in result.arms):
        said.append(
            "No null: coefficients take most of any diffuse change of the weights. Compare with one (--null 3)."
        )
    n = result.configuration["examples"]
    console().print(
        "\n".join([f"{n} prompts; [95 % intervals], those of every layer in figures/decomposition.csv.", *said]),
        highlight=False,
        soft_wrap=True,
        markup=False,
    )


def _lookup(table: "pd.DataFrame", keys: list[str], value: str) -> dict[tuple[Any, ...], float]:
    return dict(zip(zip(*(table[key] for key in keys), strict=True), table[value].tolist(), strict=True))
