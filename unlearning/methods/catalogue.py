"""The methods and their options as plain data."""

import dataclasses
from typing import Any

from unlearning.methods import METHODS, get_method
from unlearning.methods.recipe import Recipe
from unlearning.options import TrainOptions, shown


def list_methods(name: str | None = None) -> dict[str, Any]:
    """Return the methods with their losses, needs and options, and the options that all methods share.

    Args:
        name: Return only this method; None for all.

    Returns:
        A dictionary with two keys. "methods" holds one entry per method with its name, loss, source, needs (a list of
        texts), options and recipe; "train_options" holds the options of the trainer. An option has a name, a default
        (as typed on the command line), a help text and the source of the default. A recipe has the epochs, the least
        number of steps, the examples of a step, the schedule of the learning rate, the source, and the learning rates
        by number of parameters, of the weights and of an adapter.

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
                "recipe": _recipe(method.recipe),
            }
            for method in methods
        ],
        "train_options": _describe(TrainOptions),
    }


SIZES = {"1M": 10**6, "135M": 135 * 10**6, "1B": 10**9, "8B": 8 * 10**9}
"""Numbers of parameters for which a recipe's learning rate is shown."""


def _recipe(recipe: Recipe) -> dict[str, Any]:
    return {
        "epochs": recipe.epochs,
        "steps": recipe.steps,
        "step_batch": recipe.step_batch,
        "lr_schedule": recipe.lr_schedule,
        "source": recipe.source,
        "learning_rate": {name: recipe.rate(size) for name, size in SIZES.items()},
        "learning_rate_of_an_adapter": {name: recipe.rate(size, adapter=True) for name, size in SIZES.items()},
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
