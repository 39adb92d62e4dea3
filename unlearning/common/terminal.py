"""What every command line here does alike: exit codes, one-line errors, machine-readable results."""

import contextlib
import ctypes
import json
import logging
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from unlearning.common.errors import InputError, with_flags

if TYPE_CHECKING:
    import typer

FLAGS = {"prompts": "--data", "output_dir": "--out", "formats": "--format"}
"""Flags of the Python arguments that the command line calls otherwise; all others follow from the commands' options."""

# Of malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def _tune_process() -> None:
    """What makes products of matrices fast on a CPU and cannot be told to torch later."""
    # How long an OpenMP thread spins at a barrier. Measured on the demo sweep, two cores, idle and beside one busy
    # process: the default (300,000) 5 s and over 60 s, 5,000 6 s and 15 s, sleeping at once 13 s and 8 s.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    # Large tensors in huge pages, where Linux lends them; and memory that is freed is kept, since every chunk's
    # results would be written into pages mapped anew. An MLP of [1260, 1024] by 2752 took 84 ms, with both 69 ms.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(_M_TRIM_THRESHOLD, 256 * 2**20)


def _quieten() -> None:
    """bitsandbytes, which accelerate imports wherever it is installed, asks on every start for kernels it can do
    without."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def run_app(
    app: "typer.Typer",
    name: str,
    arguments: Sequence[str] | None,
    *,
    interrupted: str,
    renamed: Mapping[str, Mapping[str, str]] | None = None,
) -> None:
    """Run a command line and exit: 0, 2 on bad input with one line on stderr, 130 on Ctrl-C.

    Args:
        app: The typer application.
        name: What its user typed.
        arguments: Arguments in place of those of the process.
        interrupted: One line for Ctrl-C: what it leaves behind and what to do.
        renamed: Old spellings of flags by command (such as "verdict" or "eval"), each with its new one. An old
            spelling still works, and one line names the new one.
    """
    _tune_process()
    _quieten()
    flags = {**_flags_of(app), **FLAGS}

    def warn(message: object, *_args: object, **_kwargs: object) -> None:
        _tell(name, f"warning: {with_flags(str(message), flags)}")

    warnings.showwarning = warn
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(args=_with_new_names(name, given, renamed or {}), prog_name=name, standalone_mode=False)
    except InputError as error:
        code = _fail(name, with_flags(str(error), flags), 2)
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        # `dissect ... | head`: nobody reads any more.
        sys.stderr.close()
        code = 1
    except Exception as error:
        # Typer's usage errors, whose class is private to it: missing or misspelt arguments.
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message()
        if message.startswith("Usage:"):  # no arguments at all: the help
            sys.stderr.write(message + "\n")
            code = 2
        else:
            code = _fail(name, message, 2)
    if code == 130:
        _fail(name, f"interrupted; {interrupted}", 130)
    sys.exit(code if isinstance(code, int) else 0)


def _flags_of(app: "typer.Typer") -> dict[str, str]:
    """Return the longest flag of every option of every command, by the option's name in Python.

    The flag that switches an option off (`--no-vectors`) stands under `name=False`.
    """
    from typer.main import get_command

    flags: dict[str, str] = {}
    waiting: list[Any] = [get_command(app)]
    while waiting:
        command = waiting.pop()
        waiting += getattr(command, "commands", {}).values()
        for parameter in command.params:
            if parameter.name and parameter.opts and parameter.opts[0].startswith("-"):
                flags.setdefault(parameter.name, max(parameter.opts, key=len))
                if parameter.secondary_opts:
                    flags.setdefault(f"{parameter.name}=False", max(parameter.secondary_opts, key=len))
    return flags


def _with_new_names(name: str, arguments: Sequence[str], renamed: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return the arguments with old spellings of flags replaced, and say so once for each."""
    command = next((words for words in renamed if list(arguments[: len(words.split())]) == words.split()), None)
    if command is None:
        return list(arguments)
    new = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        now = renamed[command].get(flag)
        if now is not None:
            _tell(name, f"{flag} is now called {now}; the old name works in this version only")
        new.append(f"{now or flag}{equals}{value}")
    return new


def write_json(content: Any) -> None:
    """Write a machine-readable result to stdout; what is not a number becomes null."""
    sys.stdout.write(json.dumps(plain(content), ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """JSON's own types, with null for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def _fail(name: str, message: str, code: int) -> int:
    _tell(name, message)
    return code


def _tell(name: str, message: object) -> None:
    sys.stderr.write(f"{name}: {' '.join(str(message).split())}\n")
