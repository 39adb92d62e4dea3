"""What there is to train with, as plain data."""

import dataclasses
from typing import Any

from unlearning.methods import METHODS, get_method
from unlearning.options import TrainOptions, shown


def list_methods(name: str | None = None) -> dict[str, Any]:
    """Every method, or the named one, with its loss, its needs and its options; and the trainer's, which all share.

    Raises:
        InputError: there is no such method.
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
