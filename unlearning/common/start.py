"""Start a command line: from its first moment on, a signal ends it in one line. Imports the standard library only."""

import contextlib
import functools
import importlib
import os
import signal
from types import FrameType

STOPPING = {signal.SIGINT: "interrupted", signal.SIGTERM: "stopped by SIGTERM"}
"""Signals that end a command, and what is said of them."""
if hasattr(signal, "SIGHUP"):  # Windows has none
    STOPPING[signal.SIGHUP] = "stopped by SIGHUP, which a closed terminal sends"


def start(name: str, module: str) -> None:
    """Import a module, which takes a moment, and run its `main`.

    A signal that the module does not handle ends the process at once: an exception would pass through half-imported
    modules, which may turn it into another one, and nothing has been begun that would have to be cleaned up.

    Args:
        name: Name of the command line, such as `dissect`.
        module: The module.
    """
    for number in STOPPING:
        if is_default(number):
            signal.signal(number, functools.partial(_stop, name))
    importlib.import_module(module).main()


def is_default(number: signal.Signals) -> bool:
    """Return whether a signal does what it does in any Python, or what `start` set; otherwise the caller handles it."""
    handler = signal.getsignal(number)
    return handler in (signal.SIG_DFL, signal.default_int_handler) or getattr(handler, "func", None) is _stop


def _stop(name: str, number: int, _frame: FrameType | None) -> None:
    with contextlib.suppress(OSError):  # the terminal was closed
        os.write(2, f"{name}: {STOPPING[signal.Signals(number)]}\n".encode())
    os._exit(128 + number)
