"""Groups of options become one option per field, and come back as groups."""

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from dissect.cli.options import PromptOptions, SweepOptions, choice
from unlearning.common.errors import InputError
from unlearning.common.option_groups import expand_groups


@dataclass(frozen=True, kw_only=True)
class Size:
    """A group of options."""

    width: Annotated[int, typer.Option(help="Width.")]
    height: Annotated[int, typer.Option("--tall", help="Height.")] = 2


def test_a_group_is_one_option_per_field_and_is_handed_to_the_command() -> None:
    seen: list[object] = []

    @expand_groups
    def command(*, size: Size, name: Annotated[str, typer.Option()] = "x") -> None:
        """Take a group and a single option."""
        seen.extend([size, name])

    app = typer.Typer()
    app.command()(command)
    assert CliRunner().invoke(app, ["--width", "3", "--tall", "4", "--name", "y"]).exit_code == 0
    assert CliRunner().invoke(app, ["--width", "3"]).exit_code == 0
    assert seen == [Size(width=3, height=4), "y", Size(width=3, height=2), "x"]
    assert CliRunner().invoke(app, []).exit_code == 2


def test_a_group_checks_its_values() -> None:
    with pytest.raises(InputError, match="--answers.*given or base.*guessed"):
        PromptOptions(answers="guessed")
    with pytest.raises(InputError, match="--chunk-tokens.*0"):
        SweepOptions(chunk_tokens=0)
    assert choice("--answers", "base", "given", "base") == "base"
