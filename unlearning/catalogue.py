"""What there is to train with, as plain data."""

import dataclasses
from typing import Any

from unlearning.methods import METHODS
from unlearning.options import TrainOptions


def list_methods() -> dict[str, Any]:
    """Every method with its loss, its needs and its options; and the trainer's options, which all methods share."""
    return {
        "methods": [
            {
                "name": method.name,
                "loss": method.summary,
                "source": method.source,
                "needs": method.needs_note.split(", "),
                "options": _describe(method.options),
            }
            for method in METHODS.values()
        ],
        "train_options": _describe(TrainOptions),
    }


def _describe(options: type[Any]) -> list[dict[str, str]]:
    return [
        {
            "name": field.name,
            "default": _shown(field.default),
            "help": field.metadata["help"],
            "source": field.metadata["source"],
        }
        for field in dataclasses.fields(options)
    ]


def _shown(default: Any) -> str:
    if default is None:
        return "none"
    if isinstance(default, bool):
        return str(default).lower()
    return default.replace("\n", "\\n") if isinstance(default, str) else f"{default:g}"
