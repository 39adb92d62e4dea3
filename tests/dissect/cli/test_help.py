"""Every --help is instant and ends with examples that can be pasted."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from typing import Any

import pytest
import typer.main

import dissect.cli
import unlearning.cli
from dissect import zoo
from dissect.cli.loading import short_name
from tests.dissect.cli.helpers import call

HEAVY = ["torch", "transformers", "transformer_lens", "pandas", "plotly", "numpy", "scipy", "pyarrow", "datasets"]

# Runs in a fresh process: --help of the app and of each of its commands, then what had to be imported for it.
SCRIPT = """
import contextlib, io, json, sys
import typer.main
import {module} as cli

helps = {{}}
for words in [[], *([name] for name in typer.main.get_command(cli.app).commands)]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            cli.main([*words, "--help"])
        except SystemExit as stop:
            assert stop.code == 0, (words, stop.code)
    helps[" ".join(words)] = out.getvalue()
print(json.dumps({{"helps": helps, "modules": [name for name in {heavy} if name in sys.modules]}}))
"""

PROGRAMS = {"dissect": dissect.cli, "unlearn": unlearning.cli}


@pytest.fixture(scope="module", params=PROGRAMS)
def helps(request: pytest.FixtureRequest) -> tuple[str, dict[str, str], list[str]]:
    """A program, the help of each of its commands, and the heavy modules that were imported to show it."""
    script = SCRIPT.format(module=PROGRAMS[request.param].__name__, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    return request.param, told["helps"], told["modules"]


def commands(program: str) -> dict[str, Any]:
    """The program's commands by name."""
    app: Any = typer.main.get_command(PROGRAMS[program].app)
    return dict(app.commands)


def examples(text: str) -> list[list[str]]:
    """The words of each command line under `Examples:`, as a shell would read them."""
    lines = text.partition("Examples:\n")[2]
    return [shlex.split(line) for line in re.sub(r"\\\n\s*", "", lines).splitlines() if line.strip()]


def test_help_imports_nothing_heavy(helps: tuple[str, dict[str, str], list[str]]) -> None:
    _, texts, modules = helps
    assert len(texts) > 1
    assert modules == []


def test_every_help_ends_with_examples_of_its_command(helps: tuple[str, dict[str, str], list[str]]) -> None:
    program, texts, _ = helps
    assert set(texts) == {"", *commands(program)}
    for command, text in texts.items():
        lines = examples(text)
        assert lines, f"{program} {command} --help has no examples"
        for words in lines:
            assert words[0] == program, words
            assert not command or words[1] == command, words


def test_examples_can_be_pasted(helps: tuple[str, dict[str, str], list[str]]) -> None:
    program, texts, _ = helps
    for text in texts.values():
        for _, name, *words in examples(text):
            values = commands(program)[name].make_context(name, list(words)).params
            for value in values.values():
                if isinstance(value, str) and value.partition(":")[0] in zoo.DESCRIPTIONS:
                    assert value in zoo.BUILTIN, words


@pytest.mark.parametrize("command", ["patch", "restore"])
def test_examples_of_sweeps_name_sites_windows_and_formats_that_exist(
    command: str,
    helps: tuple[str, dict[str, str], list[str]],
) -> None:
    from dissect.cli.options import SweepOptions
    from dissect.cli.sweeps import window_kinds_of
    from dissect.interventions.windows import parse_windows
    from dissect.models.sites import parse_sites
    from dissect.plotting import check_formats
    from dissect.sweeps.restoration import restored_sites

    program, texts, _ = helps
    if program != "dissect":
        pytest.skip("sites and windows are dissect's")
    for _, name, *words in examples(texts[command]):
        values = commands(program)[name].make_context(name, list(words)).params
        parse_sites(values["sites"]) if name == "patch" else restored_sites(values["sites"], values["parameters"])
        given = {field.name: values[field.name] for field in fields(SweepOptions)}
        assert parse_windows(window_kinds_of(SweepOptions(**given)), 8)
        check_formats(values["formats"].split(","))


def test_default_run_directory_of_the_first_example_is_what_the_plot_example_reads(
    helps: tuple[str, dict[str, str], list[str]],
) -> None:
    program, texts, _ = helps
    if program != "dissect":
        pytest.skip("run directories are dissect's")
    _, name, *words = examples(texts["patch"])[0]
    values = commands(program)[name].make_context(name, list(words)).params
    assert examples(texts["plot"])[0][2] == f"runs/patch-{short_name(values['unlearned'])}"


def test_no_arguments_show_the_help() -> None:
    outcome = call()
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("Usage: dissect ")
    assert "Examples:" in outcome.err


def test_models_lists_every_builtin_pair_with_its_control(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = json.loads(call("models", "--json").out)
    assert {(pair["base"], pair["unlearned"]) for pair in listed} == {
        (f"{family}:base", f"{family}:{method}") for family, methods in zoo.UNLEARNED.items() for method in methods
    }
    for pair in listed:
        assert pair["control"] == zoo.default_control(pair["base"]) in zoo.BUILTIN
    monkeypatch.setenv("COLUMNS", "80")
    table = call("models")
    assert (table.code, table.err) == (0, "")
    for pair in listed:
        assert any(
            line.split()[:3] == [pair["base"], pair["unlearned"], pair["control"]] for line in table.out.splitlines()
        )
