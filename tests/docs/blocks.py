"""The code blocks of README and docs: found, expanded as a shell would, run or checked.

A block runs unless the line above it says otherwise:

    <!-- slow -->             it takes minutes, and runs with the slow tests
    <!-- not run: REASON -->  it cannot run here; its command lines are checked by the real parsers, Python is compiled
"""

import contextlib
import importlib
import io
import os
import re
import runpy
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if path.is_file()
}

_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*?) -->\n)?^```(?P<language>sh|python)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)
_CALLS = """
called() { printf '%s\\0' "$#" "$@" >>"$CALLS"; }
for name in dissect unlearn python make torchrun accelerate; do eval "$name() { called $name \\"\\$@\\"; }"; done
command_not_found_handle() { called "$@"; }
"""


@dataclass(frozen=True)
class Block:
    """A code block.

    Attributes:
        page: Path of its page from the repository's root.
        line: Line number of its first line of code.
        language: `sh` or `python`.
        code: Its text.
        slow: Whether it runs with the slow tests only.
        not_run: Why it cannot run here; None for a block that runs.
    """

    page: str
    line: int
    language: str
    code: str
    slow: bool
    not_run: str | None


def blocks_of(page: str) -> list[Block]:
    """Return the code blocks of a page, in order."""
    text = PAGES[page].read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        mark = match["mark"] or ""
        kind, _, reason = mark.partition(": ")
        assert mark in ("", "slow") or (kind == "not run" and reason), f"{page}: unknown mark {mark!r}"
        line = text[: match.start("code")].count("\n") + 1
        not_run = reason if kind == "not run" else None
        found.append(Block(page, line, match["language"], match["code"], mark == "slow", not_run))
    return found


def calls_of(code: str, scratch: Path) -> list[list[str]]:
    """Return the argument lists of the programs that a shell block calls, variables and loops expanded."""
    calls = scratch / "calls"
    calls.write_bytes(b"")
    found = subprocess.run(
        ["/bin/bash", "-u", "-c", _CALLS + code],
        env={"PATH": "/nonexistent", "CALLS": str(calls)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    words = calls.read_bytes().decode().split("\0")[:-1]
    several = []
    while words:
        n = int(words[0])
        several.append(words[1 : n + 1])
        words = words[n + 1 :]
    return several


def run_python(block: Block, namespace: dict[str, Any]) -> None:
    """Run a Python block in the page's namespace; errors name the page's line."""
    padding = "\n" * (block.line - 1)
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(padding + block.code, block.page, "exec"), namespace)


def run_call(words: Sequence[str]) -> None:
    """Run one command line in this process, and check that it succeeds."""
    program, arguments = words[0], list(words[1:])
    out, err = io.StringIO(), io.StringIO()
    shown, argv, environment = warnings.showwarning, sys.argv, dict(os.environ)
    code: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            if program in _APPS:
                importlib.import_module(_APPS[program]).main(arguments)
            else:
                assert program == "python" and arguments[0] == "-m", f"{program} is not run here"
                sys.argv = arguments[1:]
                runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        code = stop.code
    finally:
        warnings.showwarning, sys.argv = shown, argv
        os.environ.clear()
        os.environ.update(environment)
    assert code in (0, None), f"{' '.join(words)}\n{err.getvalue()}"


def check_call(words: Sequence[str]) -> None:
    """Check a command line by the program's own parser, without running it."""
    program, arguments = words[0], list(words[1:])
    if program in ("torchrun", "accelerate"):
        program, arguments = "python", arguments[arguments.index("-m") :]
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(arguments) <= set(targets), f"make {' '.join(arguments)}: the Makefile has no such target"
    elif program == "python":
        assert arguments[0] == "-m", f"cannot check {' '.join(words)}"
        _parse(_app_of(arguments[1]), arguments[2:])
    else:
        assert program in _APPS, f"{program}: what is it?"
        _parse(importlib.import_module(_APPS[program]).app, arguments)


_APPS = {"dissect": "dissect.cli", "unlearn": "unlearning.cli"}


def _app_of(module: str) -> Any:
    """Return the typer application behind `python -m MODULE`."""
    known = {"dissect": "dissect.cli", "unlearning": "unlearning.cli"}
    for name in (known.get(module, module), f"{module}.command"):
        with contextlib.suppress(ModuleNotFoundError):
            found = importlib.import_module(name)
            if hasattr(found, "app"):
                return found.app
    raise AssertionError(f"python -m {module}: no such command")


def _parse(app: Any, arguments: list[str]) -> None:
    """Parse arguments down to the last subcommand; its own errors are those of the real command line."""
    from typer.main import get_command

    command: Any = get_command(app)
    context = None
    while getattr(command, "commands", None):
        name, arguments = arguments[0], arguments[1:]
        assert name in command.commands, f"no command {name}; there are {', '.join(command.commands)}"
        context = command.make_context("", [], parent=context, resilient_parsing=True)
        command = command.commands[name]
    parsed = command.make_context("", arguments, parent=context).params
    if "method" in parsed and "settings" in parsed:
        _check_settings(parsed["method"], parsed["settings"] or [])


def _check_settings(method: str, settings: Sequence[str]) -> None:
    """Check the `--set` options of a training by name, type and range."""
    from unlearning.methods import get_method
    from unlearning.options import resolve_options

    given = dict(setting.split("=", 1) for setting in settings)
    resolve_options(method, get_method(method).options, given)


@contextlib.contextmanager
def registries_restored() -> Iterator[None]:
    """Take off again whatever a page registers."""
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory

    from dissect.models.sites import SITES
    from unlearning.methods import METHODS

    registries: list[dict[Any, Any]] = [METHODS, SITES, ArchitectureAdapterFactory._adapters]
    before = [dict(registry) for registry in registries]
    try:
        yield
    finally:
        for registry, kept in zip(registries, before, strict=True):
            registry.clear()
            registry.update(kept)
