"""MUSE's scalability and sustainability (2407.06460, C5 and C6): does unlearning hold as the requests grow?

    scal    forget sets 1 to 4, each holding the one before it; each is unlearned from the base
    sust    four disjoint requests, unlearned one after the other, each from the model that the last one left

Every model is evaluated as `unlearn eval muse` does. A method that scales and sustains keeps its KnowMem on retain.

    OUT/models/{scal,sust}-N/          runs of `unlearn train`
    OUT/eval/{start,scal-N,sust-N}/    runs of `unlearn eval muse`
    OUT/findings.csv                   one row a model and metric
    OUT/table.md                       the same for a reader, with the commands
    OUT/figures/muse_runs.*            the curves
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from analyses.muse_runs.report import KINDS, figure, table
from unlearning.common.errors import InputError
from unlearning.common.terminal import run_app, write_json

if TYPE_CHECKING:
    import pandas as pd

    from unlearning.data.question_answer import Example
    from unlearning.evaluation.harness import Evaluation

N_SETS = 4
RETAIN = "muse-news:raw:retain1"

_EXAMPLES = """\b
Examples:
  python -m analyses.muse_runs --model muse-bench/MUSE-News_target --method npo --set alpha=1 --set epochs=5
  python -m analyses.muse_runs --model ./news --method simnpo --data ../data --control ./news-retrained
  python -m analyses.muse_runs --model ./news --method ga --kind sust --out runs/ga --format html,svg
"""

app = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Study:
    """The settings of a study.

    Attributes:
        model: The model that unlearning starts from, trained on all forget sets.
        method: Name of the method in `unlearn train`.
        options: Options of the method and of the trainer.
        data: Directory that holds `muse-news/`; None reads $DISSECT_DATA, then the hub.
        retain: Retain data, as `unlearn train` reads them.
        control: Control, for PrivLeak and for comparison.
        auc_retain: AUC of the control, if the model itself is not available.
        kinds: Members of `KINDS`.
        limit: Ask only the first `limit` rows of each of MUSE's sets.
    """

    model: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    data: Path | None = None
    retain: str = RETAIN
    control: str | None = None
    auc_retain: float | None = None
    kinds: Sequence[str] = tuple(KINDS)
    limit: int | None = None


@dataclass(frozen=True)
class Request:
    """One forget set, and the model that unlearning it gives.

    Attributes:
        kind: `scal` or `sust`.
        number: 1 to 4.
        start: Model that unlearning starts from.
        documents: Number of documents.
        repeated: Number of documents that are also in an earlier set of the kind.
    """

    kind: str
    number: int
    start: str
    documents: int
    repeated: int

    @property
    def name(self) -> str:
        """Of its directories."""
        return f"{self.kind}-{self.number}"

    @property
    def source(self) -> str:
        """Of its forget data."""
        return f"muse-news:{self.kind}:forget_{self.number}"


def run(
    study: Study, out: Path, *, device: str | None = None, batch_size: int = 16, progress: bool = True
) -> "pd.DataFrame":
    """Train and evaluate what is not there yet.

    Args:
        study: what is run.
        out: the directory of the module's docstring.
        device: auto, cpu or cuda.
        batch_size: rows of an evaluation at a time; no number depends on it.
        progress: progress bars on stderr.

    Returns:
        One row a model and metric: `run`, `kind` (start, scal, sust, retain), `number`, `documents`, `repeated`,
        `metric`, `value`, `low`, `high`, `n`, `steps`, `seconds`.

    Raises:
        InputError: what training or evaluation refuses; `out` holds another study.
    """
    import pandas as pd

    import unlearning
    from unlearning.common.runs import write_bytes

    _check(study)
    sets = {kind: _forget_sets(kind, study.data) for kind in study.kinds}
    retain = _read(study.retain, study.data)
    evaluate = _Evaluator(study, out, device=device, batch_size=batch_size, progress=progress)
    first = evaluate(study.model, "start")
    rows = _rows(first, {"run": "start", "kind": "start", "number": 0, "documents": 0, "repeated": 0})
    rows += _retain_rows(first)
    requests = [request for kind in study.kinds for request in _requests(kind, sets[kind], study.model, out)]
    for request in requests:
        directory = out / "models" / request.name
        unlearning.train(
            study.method,
            model=request.start,
            forget=sets[request.kind][request.number - 1],
            retain=retain,
            output_dir=directory,
            resume=True,
            progress=progress,
            **{**study.options, **({} if device is None else {"device": device})},
        )
        record = json.loads((directory / "unlearning.json").read_text(encoding="utf-8"))
        about = {
            "run": request.name,
            "kind": request.kind,
            "number": request.number,
            "documents": request.documents,
            "repeated": request.repeated,
            "steps": record["steps"],
            "seconds": record["seconds"],
        }
        rows += _rows(evaluate(str(directory), request.name), about)
    frame = pd.DataFrame(rows).astype(dict.fromkeys(("value", "low", "high"), float))
    write_bytes(out / "findings.csv", frame.to_csv(index=False).encode())
    write_bytes(out / "table.md", table(frame, [command_line(study, request, out) for request in requests]).encode())
    return frame


def _check(study: Study) -> None:
    if not study.kinds:
        raise InputError(f"--kind: name one of {', '.join(KINDS)}")
    for kind in study.kinds:
        if kind not in KINDS:
            raise InputError(f"--kind {kind}: there are {', '.join(KINDS)}")
    if study.auc_retain is not None and study.control is not None:
        raise InputError("--auc-retain takes the place of --control, and both are given; give one of them")


def _read(source: str, data: Path | None) -> "list[Example]":
    from unlearning.data.sources import read_training_data

    return read_training_data(source, data_dir=data).examples


def _forget_sets(kind: str, data: Path | None) -> "list[list[Example]]":
    return [_read(f"muse-news:{kind}:forget_{number}", data) for number in range(1, N_SETS + 1)]


def _requests(kind: str, sets: "Sequence[Sequence[Example]]", model: str, out: Path) -> list[Request]:
    requests: list[Request] = []
    seen: set[str] = set()
    for number, examples in enumerate(sets, start=1):
        start = str(out / "models" / f"{kind}-{number - 1}") if kind == "sust" and number > 1 else model
        texts = [example.answer for example in examples]
        requests.append(Request(kind, number, start, len(texts), sum(text in seen for text in texts)))
        seen.update(texts)
    return requests


class _Evaluator:
    """Evaluates a model by name, into `OUT/eval/NAME`."""

    def __init__(self, study: Study, out: Path, *, device: str | None, batch_size: int, progress: bool) -> None:
        from unlearning.evaluation.benchmarks.muse.data import read_muse
        from unlearning.evaluation.subject import open_subject

        self._out, self._batch_size, self._progress = out, batch_size, progress
        self._auc_retain = study.auc_retain
        self._data = read_muse("news", study.data, limit=study.limit)
        self._open = partial(open_subject, device=device if device != "auto" else None)
        self._control = None if study.control is None else self._open(study.control)

    def __call__(self, model: str, name: str) -> "Evaluation":
        from unlearning.evaluation.benchmarks.muse import benchmark as muse
        from unlearning.evaluation.harness import evaluate

        return evaluate(
            partial(muse.prepare, data=self._data, auc_retain=self._auc_retain),
            self._open(model),
            control=self._control,
            out=self._out / "eval" / name,
            batch_size=self._batch_size,
            progress=self._progress,
        )


def _rows(evaluation: "Evaluation", about: Mapping[str, Any]) -> list[dict[str, Any]]:
    metrics = evaluation.summary()["metrics"]
    keys = ("value", "low", "high", "n")
    return [{**about, "metric": name, **{key: record[key] for key in keys}} for name, record in metrics.items()]


def _retain_rows(evaluation: "Evaluation") -> list[dict[str, Any]]:
    """Return the control's own numbers."""
    metrics = evaluation.summary()["metrics"]
    return [
        {"run": "retain", "kind": "retain", "metric": name, "value": record["control"], "n": record["n"]}
        for name, record in metrics.items()
        if record.get("control") is not None
    ]


def command_line(study: Study, request: Request, out: Path) -> str:
    """Return the command that makes a request's model."""
    words = ["unlearn", "train", study.method, "--model", request.start, "--forget", request.source]
    words += ["--retain", study.retain, "--out", str(out / "models" / request.name)]
    for option, value in study.options.items():
        words += ["--set", f"{option}={value}"]
    where = f"DISSECT_DATA={shlex.quote(str(study.data))} " if study.data is not None else ""
    return where + shlex.join(words)


@app.command(epilog=_EXAMPLES)
def command(
    model: Annotated[str, typer.Option(metavar="M", help="Model to start from: directory, hub id or built-in name.")],
    method: Annotated[str, typer.Option(metavar="METHOD", help="Method, such as npo; see `unlearn methods`.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Option of the method or the trainer; may be repeated."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Directory that holds muse-news/.  [default: $DISSECT_DATA, then the hub]"),
    ] = None,
    retain: Annotated[str, typer.Option(metavar="R", help="Retain data, as `unlearn train` reads it.")] = RETAIN,
    control: Annotated[
        str | None, typer.Option(metavar="N", help="Control, trained without any forget set; for PrivLeak.")
    ] = None,
    auc_retain: Annotated[
        float | None,
        typer.Option(metavar="NUMBER", help="AUC of the control, in its place (MUSE's released News model: 0.4772)."),
    ] = None,
    kind: Annotated[list[str] | None, typer.Option(help="scal or sust; may be repeated.  [default: both]")] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Use only the first N rows of each set.")] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Output directory; a stopped study continues.")] = Path(
        "runs/muse"
    ),
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows per batch of an evaluation.")] = 16,
    formats: Annotated[
        str, typer.Option("--format", metavar="LIST", help="Formats of the figure: html, svg, pdf.")
    ] = "html",
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress and no summary.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write the result to stdout as JSON.")] = False,
) -> None:
    """Unlearn MUSE-News in forget sets of four sizes, and in four requests one after the other."""
    from dissect.plotting import check_formats, export

    wanted = formats.split(",")
    check_formats(wanted)
    options = {}
    for setting in settings or []:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise InputError(f"--set {setting}: write it as --set KEY=VALUE")
        options[name] = value
    study = Study(model, method, options, data, retain, control, auc_retain, tuple(dict.fromkeys(kind or KINDS)), limit)
    frame = run(study, out, device=device, batch_size=batch_size, progress=not quiet)
    exported = export(figure(frame, f"MUSE-News, {method}"), out / "figures" / "muse_runs", formats=wanted)
    if as_json:
        write_json({"findings": json.loads(frame.to_json(orient="records")), "table": str(out / "table.md")})
    elif not quiet:
        from rich.console import Console

        console = Console()
        console.print((out / "table.md").read_text(encoding="utf-8"), markup=False, highlight=False, soft_wrap=True)
        for path in exported.paths:
            console.print(f"figure: {path}", soft_wrap=True, highlight=False)
        if exported.problem:
            console.print(exported.problem, soft_wrap=True, highlight=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits 0, 2 on bad input with one line on stderr, 130 on Ctrl-C."""
    run_app(
        app,
        "python -m analyses.muse_runs",
        arguments,
        interrupted="rerun the same command to resume",
        renamed={"": {"--retain-model": "--control"}},
    )
