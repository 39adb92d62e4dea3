"""Old spellings of flags still work, are not in any help, and one line names the new one."""

from pathlib import Path

import pytest
import typer.main

from dissect.cli import RENAMED, app
from tests.dissect.cli.helpers import call

PAIR = ("--base", "demo:base", "--unlearned", "demo:npo")
VALUES = {"--never": "none", "--facts": "8", "--benign": "/no/where.json", "--unrelated": "/no/where.json"}
SPELLINGS = [(command, old, new) for command, flags in RENAMED.items() for old, new in flags.items()]


@pytest.mark.parametrize(("command", "old", "new"), SPELLINGS)
def test_old_flag_is_hidden_and_its_new_name_exists(command: str, old: str, new: str) -> None:
    options = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    flags = {flag for option in options for flag in option.opts}
    assert new in flags and old not in flags
    assert old not in call(command, "--help").out


@pytest.mark.parametrize(("command", "old", "new"), SPELLINGS)
def test_old_flag_is_read_as_the_new_one_with_one_line_about_it(
    command: str, old: str, new: str, tmp_path: Path
) -> None:
    wrong = ("--format", "gif") if VALUES[old] != "/no/where.json" else ()
    old_call = call(command, *PAIR, old, VALUES[old], *wrong, "--out", tmp_path / "run")
    new_call = call(command, *PAIR, new, VALUES[old], *wrong, "--out", tmp_path / "run")
    line, *rest = old_call.err.splitlines()
    assert old in line and new in line
    assert rest == new_call.err.splitlines() and len(rest) == 1
    assert old_call.code == new_call.code == 2
