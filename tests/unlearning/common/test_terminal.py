import contextlib
import errno
import io
import json
import os
import re
import signal
import sys
import time
import warnings
from typing import Annotated

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text

from unlearning.common.errors import InputError
from unlearning.common.terminal import console, printable, run_app, write_json

app = typer.Typer()


@app.command("train")
def train(
    batch_size: Annotated[int, typer.Option(help="Sequences at a time.")] = 4,
    control: Annotated[str, typer.Option(help="The control.")] = "none",
    shuffle: Annotated[bool, typer.Option("--shuffle/--no-shuffle", help="Shuffle the sequences.")] = False,
) -> None:
    if shuffle:
        raise InputError("batches are in order (`shuffle=False`)")
    if batch_size < 1:
        raise InputError(f"`batch_size` must be at least 1, got {batch_size}; leave `learning_rate` as it is")
    warnings.warn("`control` is small", stacklevel=1)
    typer.echo(f"{batch_size} {control}")


@app.command("other")
def other(control: str = "none") -> None:
    if control == "wrong":
        raise InputError("`batch_size` must be at least 1, got 0; `control` is wrong")
    typer.echo(control)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped, warnings.catch_warnings():
        warnings.simplefilter("always")
        run_app(app, "tool", arguments, interrupted="nothing is lost", renamed={"train": {"--never": "--control"}})
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def test_errors_name_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "--batch-size", "0") == 2
    error = capsys.readouterr().err
    assert error == "tool: --batch-size must be at least 1, got 0; leave learning_rate as it is\n"


def test_errors_name_the_flag_that_switches_an_option_off(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "--shuffle") == 2
    assert "(--no-shuffle)" in capsys.readouterr().err


def test_errors_name_no_flag_of_another_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("other", "--control", "wrong") == 2
    assert capsys.readouterr().err == "tool: batch_size must be at least 1, got 0; --control is wrong\n"


def test_warnings_name_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train") == 0
    assert capsys.readouterr().err == "tool: warning: --control is small\n"


@pytest.mark.parametrize("spelling", [["--never", "N"], ["--never=N"]])
def test_an_old_spelling_works_and_the_new_one_is_named(
    spelling: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", *spelling) == 0
    shown = capsys.readouterr()
    assert shown.out == "4 N\n"
    assert "--never" in shown.err and "--control" in shown.err


def test_an_old_spelling_of_another_command_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("other", "--never", "N") == 2
    assert "--never" in capsys.readouterr().err


def test_an_old_spelling_is_not_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "--help") == 0
    assert "--never" not in capsys.readouterr().out


@app.command("wait")
def wait(number: int, how: str = "signal") -> None:
    if how == "full":
        raise OSError(number, os.strerror(number), "/data/cache")
    os.kill(os.getpid(), number)
    time.sleep(60)


@app.command("clean")
def clean(number: int, error: bool = False) -> None:
    try:
        os.kill(os.getpid(), number)
        time.sleep(60)
    finally:
        os.kill(os.getpid(), number)  # a shell and its terminal both send SIGHUP
        sys.stdout.write("cleaned\n")
        if error:
            raise OSError(errno.EIO, os.strerror(errno.EIO))  # writing to a closed terminal


SIGNALS = [
    (signal.SIGINT, 130, "interrupted"),
    (signal.SIGTERM, 143, "stopped by SIGTERM"),
    (signal.SIGHUP, 129, "stopped by SIGHUP, which a closed terminal sends"),
]


@pytest.mark.parametrize(("number", "code", "how"), SIGNALS)
def test_a_signal_ends_in_one_line(number: int, code: int, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    assert run("wait", str(int(number))) == code
    assert capsys.readouterr().err == f"tool: {how}; nothing is lost\n"
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("options", [(), ("--error",)])
@pytest.mark.parametrize(("number", "code", "how"), SIGNALS[1:])
def test_a_second_signal_does_not_interrupt_the_cleaning_up(
    number: int, code: int, how: str, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("clean", str(int(number)), *options) == code
    assert capsys.readouterr() == ("cleaned\n", f"tool: {how}; nothing is lost\n")


def test_a_handler_of_the_callers_own_stays(capsys: pytest.CaptureFixture[str]) -> None:
    def ours(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, ours)
    try:
        assert run("wait", "15") == 130
        assert signal.getsignal(signal.SIGTERM) == ours
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_nothing_is_told_of_in_one_line(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("wait", str(number), "--how", "full") == 2
    assert capsys.readouterr().err == f"tool: /data/cache: cannot be written: {os.strerror(number)}\n"


def test_a_name_that_is_too_long_for_a_file_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("wait", str(errno.ENAMETOOLONG), "--how", "full") == 2
    assert capsys.readouterr().err == "tool: /data/cache: the name is too long; choose a shorter one\n"


def test_other_errors_of_the_system_are_not_hidden() -> None:
    with pytest.raises(OSError, match="Is a directory"):
        run_app(app, "tool", ["wait", str(errno.EISDIR), "--how", "full"], interrupted="")


HOSTILE = "\x1b[31mred\x1b]8;;http://x\x07[bold]x[/] [/nothing] \x9b2J \u202eabc\r[link=http://x]y"


def test_a_console_shows_texts_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    for out in (console(width=200), console(width=200, force_terminal=True, color_system="truecolor")):
        table = Table(title=HOSTILE)
        table.add_column(HOSTILE)
        table.add_row(HOSTILE)
        out.print(table)
        out.print(HOSTILE)
        out.print(Text(HOSTILE, style="bold"))
        shown = capsys.readouterr().out
        without_styles = re.sub(r"\x1b\[[0-9;]*m", "", shown)  # rich's own
        assert "[bold]x[/] [/nothing]" in without_styles and "[link=http://x]y" in without_styles
        assert not set(without_styles) & set("\x1b\x9b\x07\u202e\r")
        assert "\x1b[31m" not in shown


def test_errors_do_not_repeat_a_long_argument(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (("--batch-size", "9" * 5000), ("--" + "x" * 100_000,), ("--batch-size", "x" * 100_000)):
        assert run("train", *arguments) == 2
        error = capsys.readouterr().err
        assert len(error) < 400 and error.count("\n") == 1


def test_errors_hold_no_escape_sequences(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("other", "--" + HOSTILE) == 2
    assert not set(capsys.readouterr().err) & set("\x1b\x9b\x07\u202e\r")


@given(st.text())
def test_printable_text_stays_and_nothing_else_comes_through(text: str) -> None:
    shown = printable(text)
    assert len(shown) == len(text)
    for ours, theirs in zip(shown, text, strict=True):
        assert ours == theirs or (ours == "\ufffd" and not theirs.isprintable())
        assert ours.isprintable() or ours in "\n\t\u200c\u200d"


@given(st.dictionaries(st.text(), st.text() | st.lists(st.text())))
def test_json_steers_no_terminal_and_parses_to_the_same_values(content: dict[str, object]) -> None:
    content |= {HOSTILE: [HOSTILE, "\x7f\x9b2J\ud83d\U000e0001\u2028 \u200d é"]}
    for encoding in ("utf-8", "ascii", "latin-1"):
        out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        with contextlib.redirect_stdout(out):
            write_json(content)
        out.seek(0)
        shown = out.read()
        assert printable(shown) == shown and json.loads(shown) == content


@app.command("show")
def show(text: str) -> None:
    console(width=200).print(text)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_sign_that_a_terminal_lacks_is_shown_by_its_number(encoding: str) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    with contextlib.redirect_stdout(out):
        assert run("show", "Осло") == 0
    out.seek(0)
    assert out.read().strip() == ("Осло" if encoding == "utf-8" else r"\u041e\u0441\u043b\u043e")
