"""Old spellings of the options of `unlearn eval` work, hidden, with one line that names the new one."""

from pathlib import Path

import pytest

from tests.command_lines import call_main
from unlearning.cli import main
from unlearning.cli.eval import COMMANDS, RENAMED


@pytest.mark.parametrize(("old", "new"), list(RENAMED.items()))
def test_an_old_spelling_is_taken_for_the_new_one(old: str, new: str, model_dir: Path) -> None:
    texts = ["--texts", "nowhere.json", "--model", model_dir]
    before, now = (call_main(main, "eval", "quality", *texts, name, "nowhere") for name in (old, new))
    assert before.code == now.code == 2
    told, *error = before.err.splitlines(keepends=True)
    assert old in told and new in told
    assert "".join(error) == now.err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_the_new_spellings_only(command: str) -> None:
    shown = call_main(main, "eval", command, "--help").out
    assert "--control" in shown
    assert all(f"{old} " not in shown for old in RENAMED)
