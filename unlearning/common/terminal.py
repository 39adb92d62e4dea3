"""What all command lines share: exit codes, errors in one line, old spellings of flags, machine-readable results."""

import contextlib
import ctypes
import errno
import io
import json
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from unlearning.common.errors import InputError, shortened, with_flags
from unlearning.common.start import STOPPING, is_default

if TYPE_CHECKING:
    import typer
    from rich.console import Console

FLAGS = {"prompts": "--data", "output_dir": "--out", "formats": "--format", "concepts=()": "--no-concepts"}
"""Flags of Python arguments whose names differ from the options'; all others follow from the command's options."""

# Parameters of mallopt, from malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def _tune_process() -> None:
    """Set the environment and malloc for fast matrix products on a CPU, before torch is imported."""
    # Number of times that an OpenMP thread spins at a barrier before it sleeps. Seconds of the demo sweep on two cores,
    # alone and beside one busy process: 300,000 (default): 5 and over 60; 5,000: 6 and 15; 0: 13 and 8.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    # Put large tensors into huge pages, and keep freed memory: otherwise the results of every chunk go into newly
    # mapped pages. With both, a product of [1260, 1024] by [1024, 2752] takes 69 ms instead of 84 ms.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    with contextlib.suppress(OSError, AttributeError):  # the C library is not glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(_M_TRIM_THRESHOLD, 256 * 2**20)


def _quieten() -> None:
    """Silence bitsandbytes, which warns on every start of kernels that are missing and not needed."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def run_app(
    app: "typer.Typer",
    name: str,
    arguments: Sequence[str] | None,
    *,
    interrupted: str,
    renamed: Mapping[str, Mapping[str, str]] | None = None,
) -> None:
    """Run a command line and exit: with 0, 2 on bad input (one line on stderr), 128 and its number on a signal.

    Args:
        app: The typer application.
        name: Name of the command line, such as `dissect`; begins every line on stderr.
        arguments: The arguments; None takes those of the process.
        interrupted: Sentence for Ctrl-C: what was kept and what to do.
        renamed: By command (such as "verdict" or "eval"), old spellings of flags and their new ones. An old spelling
            still works, and one line names the new one.
    """
    _tune_process()
    _quieten()
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a sign shows its number
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    given = list(sys.argv[1:] if arguments is None else arguments)
    flags = {**FLAGS, **_flags_of(app, given)}

    def warn(message: object, *_args: object, **_kwargs: object) -> None:
        tell(name, f"warning: {with_flags(str(message), flags)}")

    warnings.showwarning = warn
    stopped: list[signal.Signals] = []
    try:
        with _interrupted_by_signals(stopped):
            code = app(args=_with_new_names(name, given, renamed or {}), prog_name=name, standalone_mode=False)
    except InputError as error:
        code = _fail(name, with_flags(str(error), flags), 2)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader of stdout has gone, as in `dissect ... | head`.
        sys.stderr.close()
        code = 1
    except Exception as error:
        if not stopped:  # else a library turned the interruption into its own error, or the terminal is gone
            code = _code_of(name, error)
    if stopped or code == 128 + signal.SIGINT:
        number = stopped[0] if stopped else signal.SIGINT
        code = _fail(name, f"{STOPPING[number]}; {interrupted}", 128 + number)
    sys.exit(code if isinstance(code, int) else 0)


def _code_of(name: str, error: Exception) -> int:
    """Tell of an error that is none of this package's own, and return the exit code; raise it if it is a bug."""
    if isinstance(error, OSError):  # of a library, or of stdout
        if error.errno == errno.ENAMETOOLONG:
            return _fail(name, f"{error.filename}: the name is too long; choose a shorter one", 2)
        if error.errno in _NOT_WRITABLE:
            return _fail(name, f"{error.filename or 'stdout'}: cannot be written: {error.strerror}", 2)
    # A usage error of typer, such as a misspelt flag; its class is private to typer.
    if not hasattr(error, "format_message"):
        raise error
    message = error.format_message()
    if message.startswith("Usage:"):  # the help, which typer raises if there are no arguments
        sys.stderr.write(message + "\n")
        return 2
    return _fail(name, message, 2)


_NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


@contextlib.contextmanager
def _interrupted_by_signals(stopped: list[signal.Signals]) -> Iterator[None]:
    """Let every signal that ends a process do so as Ctrl-C does, so that it is cleaned up behind; note that it came.

    Only Ctrl-C interrupts the cleaning up: a shell and its terminal both send SIGHUP.
    """

    def stop(number: int, _frame: object) -> None:
        again = bool(stopped)
        stopped.append(signal.Signals(number))
        if not again or number == signal.SIGINT:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in STOPPING if is_default(number)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _flags_of(app: "typer.Typer", arguments: Sequence[str]) -> dict[str, str]:
    """Return the longest flag of every option of the command that is called, by the option's name in Python.

    Another command's flags are left out: there the same name may be no flag but a `--set` option, as `batch_size` is
    in `unlearn train`. The flag that switches an option off (`--no-vectors`) stands under `name=False`.
    """
    from typer.main import get_command

    command: Any = get_command(app)
    for argument in arguments:
        command = getattr(command, "commands", {}).get(argument, command)
    options = [parameter for parameter in command.params if parameter.name and parameter.opts]
    options = [option for option in options if option.opts[0].startswith("-")]
    on = {option.name: max(option.opts, key=len) for option in options}
    return on | {
        f"{option.name}=False": max(option.secondary_opts, key=len) for option in options if option.secondary_opts
    }


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
            tell(name, f"{flag} is now called {now}; the old name works in this version only")
        new.append(f"{now or flag}{equals}{value}")
    return new


def write_json(content: Any) -> None:
    r"""Write a machine-readable result to stdout as JSON (see `plain`).

    What steers a terminal is written as an escape such as \u202e, which parses to the same value; so is what stdout
    cannot encode.
    """
    text = json.dumps(plain(content), ensure_ascii=False, indent=2, allow_nan=False)
    shown = "".join(sign if _is_shown(sign) else json.dumps(sign)[1:-1] for sign in text)
    try:
        shown.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # a terminal that knows ASCII only
        shown = json.dumps(plain(content), indent=2, allow_nan=False)
    sys.stdout.write(f"{shown}\n")


def _is_shown(sign: str) -> bool:
    """Return whether a sign shows itself, and does nothing else to a terminal."""
    return sign.isprintable() or sign in f"\n\t{_JOINERS}"


_JOINERS = "\u200c\u200d"
"""Signs without a width of their own that words of some scripts hold."""


def printable(text: str) -> str:
    r"""Return a text with what steers a terminal, such as an escape sequence, replaced by a visible sign.

    Names, groups, prompts and answers come from files and models of others.

    Args:
        text: The text; line breaks and tabs stay.

    Returns:
        The text without control characters, characters that change the direction of writing, and half characters.

    Examples:
        >>> printable("Oslo\x1b[2J")
        'Oslo�[2J'
    """
    if text.isprintable():
        return text
    return "".join(sign if _is_shown(sign) else "\ufffd" for sign in text)


def unescaped(template: str | None) -> str | None:
    """Return a template as typed in a shell with the two characters backslash and n replaced by a line break."""
    return None if template is None else template.replace("\\n", "\n")


def console(**options: Any) -> "Console":
    """Return a console that prints texts as they are: without rich's markup, and without control characters.

    Args:
        **options: Options of rich's Console.

    Returns:
        The console, for stdout unless the options say otherwise.
    """
    from rich.console import Console, RenderHook
    from rich.segment import Segment

    class Shown:
        """A renderable whose texts are printable; what steers the terminal comes from rich itself."""

        def __init__(self, of: Any) -> None:
            self.of = of

        def __rich_console__(self, console: Console, options: Any) -> Iterator[Segment]:
            for segment in console.render(self.of, options):
                yield segment if segment.control else Segment(printable(segment.text), segment.style)

    class Printable(RenderHook):
        def process_renderables(self, renderables: list[Any]) -> list[Any]:
            return [Shown(each) for each in renderables]

    made = Console(markup=False, **options)
    made.push_render_hook(Printable())
    return made


def plain(value: Any) -> Any:
    """Convert a value to JSON's own types: tuples to lists, NaN and infinities, which JSON does not have, to None."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def _fail(name: str, message: str, code: int) -> int:
    tell(name, message)
    return code


def tell(name: str, message: object) -> None:
    """Write one line to stderr; what steers a terminal is replaced, and long quotations are cut.

    Args:
        name: Name of the command line, which begins the line.
        message: The line; line breaks become spaces.
    """
    with contextlib.suppress(OSError):  # the terminal was closed
        sys.stderr.write(f"{name}: {printable(shortened(' '.join(str(message).split())))}\n")
