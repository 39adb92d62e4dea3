"""The methods and their options as plain data."""

import dataclasses
from typing import Any

from unlearning.methods import METHODS, get_method
from unlearning.options import TrainOptions, shown


def list_methods(name: str | None = None) -> dict[str, Any]:
    """Return the methods with their losses, needs and options, and the options that all methods share.

    Args:
        name: Return only this method; None for all.

    Returns:
        A dictionary with two keys. "methods" holds one entry per method with its name, loss, source, needs (a list of
        texts) and options; "train_options" holds the options of the trainer. An option has a name, a default (as typed
        on the command line), a help text and the source of the default.

    Raises:
        InputError: No method has this name.

    Examples:
        >>> from unlearning import list_methods
        >>> npo = list_methods("npo")["methods"][0]
        >>> npo["needs"]
        ['forget', 'reference', 'retain unless alpha=0']
        >>> [option["name"] for option in npo["options"]]
        ['beta', 'gamma', 'alpha', 'retain_loss']
    """
    methods = METHODS.values() if name is None else [get_method(name)]
    return {
        "methods": [
            {
                "name": method.name,
                "loss": method.summary,
                "source": method.source,
                "needs": method.needs_note.split(", "),
                "options": _describe(method.options),
            }
            for method in methods
        ],
        "train_options": _describe(TrainOptions),
    }


def _describe(options: type[Any]) -> list[dict[str, str]]:
    return [
        {
            "name": field.name,
            "default": shown(field.default),
            "help": field.metadata["help"],
            "source": field.metadata["source"],
        }
        for field in dataclasses.fields(options)
    ]
