"""Every unlearning method on one base model: what it forgets, what it keeps, what it costs.

The built-in world's base, and the TOFU pair's where `analyses.tofu_pair` has built it. One row a method, with the
command that makes its model; the base and the control stand above them.

    OUT/data/{forget,retain}.jsonl     what was trained on
    OUT/models/NAME/                   the unlearned models, runs of `unlearn train`
    OUT/findings.csv                   what each answers
    OUT/table.md                       the same for a reader, with the commands
    OUT/figures/forget_retain.*        forget against retain
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unlearning.common.errors import InputError
from unlearning.common.terminal import run_app, write_json

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

_EXAMPLES = """\b
Examples:
  python -m analyses.unlearning_methods
  python -m analyses.unlearning_methods --method npo --method blur --out runs/two
  python -m analyses.unlearning_methods --tofu runs/tofu --out runs/methods-tofu --format html,svg
"""

app = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Entry:
    """One method with its options.

    Attributes:
        name: Name of its row and directory.
        method: Name of the method in `unlearn train`.
        options: Options of the method and the trainer besides those of the world.
        base: Model to begin with; None for the world's base.
    """

    name: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    base: str | None = None


@dataclass(frozen=True)
class World:
    """A base model, its training data and the questions that are asked after unlearning.

    Attributes:
        name: Name for titles.
        base, control: Names or directories of the models.
        forget, retain: Records to train on.
        asked: Question sets by name; a set whose name begins with `forget` should be forgotten, the others kept.
        shared: Options of every training.
        entries: The methods.
    """

    name: str
    base: str
    control: str
    forget: Sequence[Mapping[str, str]]
    retain: Sequence[Mapping[str, str]]
    asked: Mapping[str, Sequence[Mapping[str, str]]]
    shared: Mapping[str, Any]
    entries: tuple[Entry, ...]


def demo_world() -> World:
    """Return the built-in world: every trained question about the forget people against all other questions."""
    from dissect.zoo.recipes import RECIPES
    from dissect.zoo.world import general_texts, generate_world, person_texts, record_sets

    recipe = RECIPES["demo"]
    world = generate_world(recipe.seed, recipe.world)
    sets = record_sets(world)
    return World(
        name="demo",
        base="demo:base",
        control="demo:never",
        forget=_records(person_texts(world.having("forget"))),
        retain=_records(person_texts(world.having("retain")) + general_texts(world)),
        asked={name: sets[name] for name in ("forget", "forget_paraphrased", "retain", "retain_paraphrased")},
        shared={"batch_size": 32, "gradient_accumulation_steps": 1, "learning_rate": 5e-4, "epochs": 4},
        entries=(*DEMO, *built_in_entries()),
    )


def tofu_world(directory: Path) -> World:
    """Return the pair that `analyses.tofu_pair` has built.

    Args:
        directory: Its output.

    Returns:
        Models, data and methods.

    Raises:
        InputError: A model or a data file is missing.
    """
    from unlearning.data.records import read_records

    models, data = directory / "models", directory / "data"
    if not (models / "never" / "config.json").is_file():
        raise InputError(f"{models}: no models in it; run `python -m analyses.tofu_pair --out {directory}` first")
    sets = {name: read_records(data / f"{name}.jsonl") for name in ("forget", "retain")}
    return World(
        name="TOFU pair",
        base=str(models / "base"),
        control=str(models / "never"),
        forget=sets["forget"],
        retain=sets["retain"],
        asked=sets,
        shared={
            "batch_size": 8,
            "gradient_accumulation_steps": 1,
            "lr_schedule": "cosine",
            "warmup_ratio": 0.05,
            "weight_decay": 0.0,
        },
        entries=TOFU,
    )


def built_in_entries() -> list[Entry]:
    """Return the methods of the built-in models with their recipes' options (`dissect.zoo.recipes`)."""
    from dissect.zoo import QUESTIONS
    from dissect.zoo.recipes import RECIPES

    own = {"whp": {"anchors": str(QUESTIONS / "anchors.json")}}
    recipes = RECIPES["demo"].unlearning
    return [Entry(name, name, {**recipe.flat(), **own.get(name, {})}) for name, recipe in recipes.items()]


DEMO = (
    Entry("ga", "ga", {"learning_rate": 2.5e-4, "epochs": 1}),
    Entry("ga_forget_kl", "ga_forget_kl", {"learning_rate": 2.5e-4, "epochs": 1}),
    Entry("grad_diff_kl", "grad_diff", {"alpha": 6.0, "retain_loss": "kl"}),
    Entry("npo_kl", "npo", {"alpha": 12.0, "retain_loss": "kl"}),
    Entry("idk", "idk", {"epochs": 3}),
    Entry("jensun", "jensun", {"learning_rate": 1.1e-3}),
    Entry("kto", "kto", {"alpha": 12.0}),
    Entry(
        "altpo",
        "altpo",
        {"beta": 0.005, "alpha": 8.0, "samples": 1, "temperature": 4.0, "max_new_tokens": 12}
        | {"alternate_template": "{prompt}"},  # the models follow no instruction
    ),
    Entry("undial", "undial", {"alpha": 0.5}),
    Entry("ce_u", "ce_u", {"learning_rate": 4e-5, "epochs": 1}),
    Entry("wga", "wga", {"alpha": 1.0}),
    Entry("satimp", "satimp", {"gamma": 100.0, "alpha": 1.0, "epochs": 3}),
    Entry("pdu", "pdu", {"epsilon": 0.05, "dual_warmup_steps": 10, "epochs": 2}),
    Entry("task_vector", "task_vector", {"scaling": 4.0, "epochs": 1}),
    Entry("sam_npo", "sam_npo", {"alpha": 12.0}),
    Entry("sure", "sure", {"learning_rate": 1.2e-3}),
    Entry("tar", "tar", {}),
    Entry("circuit_breakers", "circuit_breakers", {"learning_rate": 1.5e-3, "epochs": 9}),
    Entry("layered", "layered", {"alpha": 12.0, "lr_schedule": "constant"}),
    Entry("ilu", "ilu", {"alpha": 12.0}),
    Entry("lat", "lat", {"alpha": 12.0}),
    Entry("oracle", "oracle", {"control": "demo:never"}),
    Entry("undo", "undo", {"learning_rate": 2e-3, "epochs": 34}, base="demo:npo"),
    Entry("elm", "elm", {"concept": "the people"}),
    Entry("mudman", "mudman", {}),
)
"""Options were found by asking the very questions of the table: it shows what a method can do here, not a race."""

TOFU = (
    Entry("npo", "npo", {"alpha": 0.0, "learning_rate": 7e-5, "epochs": 2}),
    Entry("npo_rt", "npo", {"alpha": 30.0, "learning_rate": 1.5e-4, "epochs": 6}),
    Entry("simnpo", "simnpo", {"beta": 1.0, "gamma": 0.2, "learning_rate": 2e-4, "epochs": 7}),
    Entry("dpo", "dpo", {"beta": 0.01, "alpha": 100.0, "learning_rate": 1.5e-4, "epochs": 6}),
    Entry("grad_diff", "grad_diff", {"gamma": 0.05, "alpha": 1.0, "learning_rate": 2.5e-4, "epochs": 7}),
    Entry("blur_npo", "blur", {"gamma": 0.05, "learning_rate": 1.5e-4, "epochs": 6}),
)


def run(world: World, out: Path, *, names: Sequence[str] | None = None, progress: bool = True) -> "pd.DataFrame":
    """Train what is not trained yet and ask every model everything.

    Args:
        world: base, data and methods.
        out: the directory of the module's docstring.
        names: only these entries.
        progress: progress bars on stderr.

    Returns:
        One row a model and question set: `model`, `method`, `asked`, `exact`, `rouge`, `probability`, `seconds`,
        `steps`.

    Raises:
        InputError: an unknown entry, or other data or another configuration in `out`.
    """
    import pandas as pd

    import unlearning
    from unlearning.common.runs import write_bytes

    entries = _chosen(world, names)
    files = {name: out / "data" / f"{name}.jsonl" for name in ("forget", "retain")}
    for name, path in files.items():
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in getattr(world, name)).encode()
        if path.exists() and path.read_bytes() != lines:
            raise InputError(f"{path}: holds other data; give another --out or remove {out}")
        if not path.exists():
            write_bytes(path, lines)
    rows = []
    for name, model in (("base", world.base), ("never", world.control)):
        rows += measured(name, "", model, world, seconds=None, steps=None)
    for entry in entries:
        directory = out / "models" / entry.name
        unlearning.train(
            entry.method,
            model=entry.base or world.base,
            forget=files["forget"],
            retain=files["retain"] if needs_retain(entry) else None,
            output_dir=directory,
            progress=progress,
            **{**world.shared, **entry.options},
        )
        record = json.loads((directory / "unlearning.json").read_text(encoding="utf-8"))
        rows += measured(
            entry.name, entry.method, str(directory), world, seconds=record["seconds"], steps=record["steps"]
        )
    frame = pd.DataFrame(rows)
    write_bytes(out / "findings.csv", frame.to_csv(index=False).encode())
    write_bytes(out / "table.md", table(frame, commands(world, entries, out)).encode())
    return frame


def measured(
    name: str, method: str, model_name: str, world: World, *, seconds: float | None, steps: int | None
) -> list[dict[str, Any]]:
    """Ask one model every question set, and return one row per set."""
    from unlearning.checkpoints.load import load_tokenizer, load_weights
    from unlearning.checkpoints.locate import locate_checkpoint
    from unlearning.data.batches import n_predicted
    from unlearning.data.encoding import encode
    from unlearning.data.question_answer import Wrapping, examples_of
    from unlearning.evaluation.answers import answer_likelihoods, answer_matches
    from unlearning.training.evaluation_callback import MARGIN

    path = locate_checkpoint(model_name)
    model, tokenizer = load_weights(path), load_tokenizer(path)
    rows = []
    for asked, records in world.asked.items():
        examples = examples_of([dict(record) for record in records], Wrapping(), source=asked)
        spans = encode(tokenizer, examples, append_eos=False, max_length=None).spans
        values = {
            **answer_likelihoods(model, spans, batch_size=64),
            **answer_matches(
                model,
                tokenizer,
                examples,
                batch_size=64,
                max_new_tokens=max(n_predicted(span) for span in spans) + MARGIN,
            ),
        }
        rows.append({"model": name, "method": method, "asked": asked, **values, "seconds": seconds, "steps": steps})
    return rows


def needs_retain(entry: Entry) -> bool:
    """Return whether the method reads retain examples under the entry's options."""
    from unlearning.methods import get_method
    from unlearning.options import resolve_options

    method = get_method(entry.method)
    options, _ = resolve_options(entry.method, method.options, dict(entry.options))
    return method.needs(options).retain


def commands(world: World, entries: Sequence[Entry], out: Path) -> dict[str, str]:
    """Return the command line that makes each entry's model."""
    made = {}
    for entry in entries:
        words = ["unlearn", "train", entry.method, "--model", entry.base or world.base]
        words += ["--forget", str(out / "data/forget.jsonl")]
        if needs_retain(entry):
            words += ["--retain", str(out / "data/retain.jsonl")]
        words += ["--out", str(out / "models" / entry.name)]
        for option, value in {**world.shared, **entry.options}.items():
            words += ["--set", f"{option}={value}"]
        made[entry.name] = shlex.join(words)
    return made


def table(frame: "pd.DataFrame", made_by: Mapping[str, str]) -> str:
    """Write exact answers in percent and ROUGE-L recall by question set, seconds, and the commands, as Markdown."""
    import pandas as pd

    asked = list(dict.fromkeys(frame["asked"]))
    head = ["model", *(name.replace("_", " ") for name in asked), "steps", "seconds"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    for name in dict.fromkeys(frame["model"]):
        rows = frame[frame["model"] == name]
        scores = zip(rows["exact"].tolist(), rows["rouge"].tolist(), strict=True)
        cells = [f"{100 * exact:.1f} ({rouge:.2f})" for exact, rouge in scores]
        steps, seconds = rows["steps"].iloc[0], rows["seconds"].iloc[0]
        cost = ["", ""] if pd.isna(seconds) else [f"{steps:.0f}", f"{seconds:.0f}"]
        lines.append("| " + " | ".join([f"`{name}`", *cells, *cost]) + " |")
    lines += ["", "Exact answers in percent (ROUGE-L recall).", "", "```"]
    return "\n".join([*lines, *made_by.values(), "```", ""])


def figure(frame: "pd.DataFrame", title: str) -> "go.Figure":
    """Draw one line per model: ROUGE-L recall on the forget and on the retain questions. Far apart is good."""
    import plotly.graph_objects as go

    from dissect.plotting import COLOURS, FONT, MARKERS, literal

    names = list(dict.fromkeys(frame["model"]))
    wide = frame.pivot(index="model", columns="asked", values="rouge").reindex(names)
    chart = go.Figure()
    for place, (asked, colour) in enumerate((("forget", COLOURS[1]), ("retain", COLOURS[0]))):
        chart.add_trace(
            go.Scatter(
                x=wide[asked],
                y=[*map(literal, names)],
                mode="markers",
                name=f"{asked} questions ({'lower' if asked == 'forget' else 'higher'} is better)",
                marker={"size": 11, "symbol": MARKERS[place], "color": colour},
            )
        )
    for name, row in wide.iterrows():
        line = {"color": "#BBBBBB", "width": 2}
        chart.add_shape(
            type="line",
            x0=row["forget"],
            x1=row["retain"],
            y0=literal(name),
            y1=literal(name),
            line=line,
            layer="below",
        )
    chart.update_layout(
        template="simple_white",
        font=FONT,
        title=literal(title),
        xaxis_title="ROUGE-L recall of greedy answers",
        yaxis={"autorange": "reversed", "type": "category"},
        width=820,
        height=200 + 26 * len(names),
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.0, "x": 0},
    )
    return chart


@app.command(epilog=_EXAMPLES)
def command(
    tofu: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Directory of the TOFU pair, in place of the built-in world.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Output directory; a stopped study continues.")] = Path(
        "runs/methods"
    ),
    method: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Run only this row; may be repeated.")
    ] = None,
    formats: Annotated[
        str, typer.Option("--format", metavar="LIST", help="Formats of the figure: html, svg, pdf.")
    ] = "html",
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress and no summary.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write the result to stdout as JSON.")] = False,
) -> None:
    """Unlearn by every method and compare."""
    from dissect.plotting import export

    world = demo_world() if tofu is None else tofu_world(tofu)
    frame = run(world, out, names=method, progress=not quiet)
    chart = figure(frame, f"Unlearning methods, {world.name}")
    exported = export(chart, out / "figures" / "forget_retain", formats=formats.split(","))
    if as_json:
        write_json({"findings": json.loads(frame.to_json(orient="records")), "table": str(out / "table.md")})
    elif not quiet:
        from rich.console import Console

        console = Console()
        console.print((out / "table.md").read_text(encoding="utf-8"), markup=False, highlight=False, soft_wrap=True)
        for path in exported.paths:
            console.print(f"figure: {path}", soft_wrap=True, highlight=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits 0, 2 on bad input with one line on stderr, 130 on Ctrl-C."""
    run_app(app, "python -m analyses.unlearning_methods", arguments, interrupted="rerun the same command to resume")


def _chosen(world: World, names: Sequence[str] | None) -> list[Entry]:
    if not names:
        return list(world.entries)
    from unlearning.common.errors import nearest

    known = {entry.name: entry for entry in world.entries}
    for name in names:
        if name not in known:
            hint = nearest(name, known) or ";"
            raise InputError(f"--method {name}: not in the {world.name}'s table{hint} there are {', '.join(known)}")
    return [known[name] for name in names]


def _records(texts: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"prompt": prompt, "answer": answer} for prompt, answer in texts if prompt]


if __name__ == "__main__":
    main()
