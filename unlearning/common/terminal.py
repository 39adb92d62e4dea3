"""What every command line here does alike: exit codes, one-line errors, machine-readable results."""

import contextlib
import ctypes
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from unlearning.common.errors import InputError

if TYPE_CHECKING:
    import typer

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


def run_app(app: "typer.Typer", name: str, arguments: Sequence[str] | None, *, interrupted: str) -> None:
    """Run a command line and exit: 0, 2 on bad input with one line on stderr, 130 on Ctrl-C.

    Args:
        app: the typer application.
        name: what its user typed.
        arguments: instead of those of the process.
        interrupted: what Ctrl-C leaves behind and what to do, one line.
    """
    _tune_process()
    _quieten()
    warnings.showwarning = lambda message, *_args, **_kwargs: _tell(name, f"warning: {message}")
    try:
        code = app(args=arguments, prog_name=name, standalone_mode=False)
    except InputError as error:
        code = _fail(name, str(error), 2)
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
