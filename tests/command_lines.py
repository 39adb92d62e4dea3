"""Command lines run in this process."""

import contextlib
import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """What a command did: exit status and both streams."""

    code: int
    out: str
    err: str


def call_main(main: Callable[[Sequence[str]], Any], *arguments: str | Path) -> Outcome:
    """Run a command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    show = warnings.showwarning
    code: int | str | None = None
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    finally:
        warnings.showwarning = show
    assert isinstance(code, int), f"main left with {code!r}"
    return Outcome(code, out.getvalue(), err.getvalue())
