"""A signal ends a command line in one line also while its modules are imported."""

import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def python(folder: Path, program: str) -> subprocess.CompletedProcess[str]:
    """Run a program for which the modules in a folder can be imported."""
    paths = os.pathsep.join([str(folder), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": paths},
    )


START = "from unlearning.common.start import start\nstart('tool', 'heavy')"


@pytest.mark.parametrize(
    ("number", "code", "how"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "stopped by SIGTERM"),
        (signal.SIGHUP, 129, "stopped by SIGHUP, which a closed terminal sends"),
    ],
)
def test_a_signal_while_modules_are_imported_ends_in_one_line(number: int, code: int, how: str, tmp_path: Path) -> None:
    (tmp_path / "heavy.py").write_text(
        f"import os, time\ntry:\n    os.kill(os.getpid(), {int(number)})\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    raise ImportError('numpy failed to import') from None\n"
    )
    ended = python(tmp_path, START)
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "", f"tool: {how}\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_before_the_command_begins_ends_in_one_line(number: int, code: int, tmp_path: Path) -> None:
    (tmp_path / "heavy.py").write_text(
        f"import os, time\ndef main():\n    os.kill(os.getpid(), {int(number)})\n    time.sleep(60)\n"
    )
    ended = python(tmp_path, START)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (code, "", 1)


@pytest.mark.parametrize(
    ("before", "code", "out"),
    [("", 129, ""), ("import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n", 0, "x")],
)
def test_a_command_that_nohup_started_outlives_its_terminal(before: str, code: int, out: str, tmp_path: Path) -> None:
    (tmp_path / "heavy.py").write_text(
        "import os, sys, typer\nfrom unlearning.common.terminal import run_app\napp = typer.Typer()\n"
        "@app.command()\ndef command():\n    os.kill(os.getpid(), 1)\n    sys.stdout.write('x')\n"
        "def main():\n    run_app(app, 'tool', [], interrupted='nothing is lost')\n"
    )
    ended = python(tmp_path, before + START)
    assert (ended.returncode, ended.stdout) == (code, out)
    assert ended.stderr == (
        "" if before else "tool: stopped by SIGHUP, which a closed terminal sends; nothing is lost\n"
    )


def test_commands_import_nothing_of_others_before_a_signal_is_caught(tmp_path: Path) -> None:
    program = (
        "import sys\nbefore = set(sys.modules)\nimport dissect.__main__, unlearning.__main__\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - sys.stdlib_module_names))"
    )
    assert python(tmp_path, program).stdout == "['dissect', 'unlearning']\n"


def test_the_installed_commands_start_there() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"dissect": "dissect.__main__:main", "unlearn": "unlearning.__main__:main"}
    for module, name in (("dissect", "dissect"), ("unlearning", "unlearn")):
        shown = subprocess.run(
            [sys.executable, "-m", module, "--help"], capture_output=True, text=True, timeout=60, cwd=ROOT
        )
        assert shown.returncode == 0 and f"Usage: {name}" in shown.stdout
