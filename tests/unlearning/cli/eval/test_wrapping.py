"""A refused chat template names only what the command has."""

import inspect

import pytest

from unlearning.cli.eval import eval_app

COMMANDS = {command.name or command.callback.__name__: command.callback for command in eval_app.registered_commands}


def test_commands_that_chat_without_a_template_are_those_that_say_so() -> None:
    """A command beside these has to say `leave chat out` too (see `chat_format`), or has to have a template."""
    options = {name: set(inspect.signature(callback).parameters) for name, callback in COMMANDS.items()}
    without = {name for name, names in options.items() if "chat" in names and "template" not in names}
    assert without == {"wmdp", "choice", "lm-eval"}


@pytest.mark.parametrize("name", ["quality", "tofu", "mia"])
def test_commands_with_a_template_have_both(name: str) -> None:
    assert {"chat", "template"} <= set(inspect.signature(COMMANDS[name]).parameters)
