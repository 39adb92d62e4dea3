"""Report a finished run: figures, then tables or JSON."""

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from dissect.cli.loading import split_names
from dissect.cli.options import OutputOptions
from unlearning.common.terminal import console, write_json


def figure_formats(text: str) -> list[str]:
    """Split a comma-separated list of figure formats, and check them.

    Returns:
        Names of formats, such as `html`.

    Raises:
        InputError: A format is unknown.
    """
    from dissect.plotting import check_formats

    formats = split_names(text)
    check_formats(formats)
    return formats


def earlier_run(out: Path, *, adds: str | None = None) -> str | None:
    """Return a line that says how much of the run is in its directory already, or None if nothing is.

    Args:
        out: The run directory.
        adds: Entry of `run.json` that is added to a finished run that lacks it, such as `spike_ins`.
    """
    from unlearning.common.runs import Run, has_whole_record, is_run, read_record

    if not is_run(out) or not has_whole_record(out):  # `open_run` says what it does about a broken one
        return None
    run = Run(out, read_record(out))
    if run.is_complete and adds is not None and adds not in run.record:
        return f"{out} holds this run already; only its {adds.replace('_', '-')} were added"
    if run.is_complete:
        return f"{out} holds this run already; nothing was computed again"
    return f"resumed the run in {out}, of which {run.n_parts} parts were finished"


def note(message: str) -> None:
    """Write one line to stderr."""
    sys.stderr.write(f"dissect: {message}\n")


def report(
    result: Any,
    out: Path,
    formats: Sequence[str],
    output: OutputOptions,
    *,
    print_tables: Callable[[Any], None],
    page: tuple[str, str],
    earlier: str | None,
    notes: Iterable[str] = (),
) -> None:
    """Write the figures of a run, then print its tables or its summary as JSON.

    Args:
        result: Result of an experiment.
        out: Run directory.
        formats: Formats of the figures.
        output: Whether to print tables, JSON or nothing.
        print_tables: Function that prints the tables of the result.
        page: Label and path, relative to `out`, of the page to open first.
        earlier: Line that says how much of the run existed before; None if nothing did.
        notes: More lines for stderr.
    """
    exported = result.save_figures(out, formats=formats)
    if earlier and not output.quiet:
        note(earlier)
    for line in (*([exported.problem] if exported.problem else []), *notes):
        note(line)
    if output.as_json:
        write_json({**result.summary(), "run": str(out), "figures": [str(path) for path in exported.paths]})
    elif not output.quiet:
        print_tables(result)
        label, file = page
        console().print(f"{label:8}{out / file}", soft_wrap=True, highlight=False)
        console().print(f"{'run':8}{out}", soft_wrap=True, highlight=False)
