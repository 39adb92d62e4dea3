"""`unlearn methods`: list the methods, their data and their options."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from unlearning.common.terminal import console, write_json

if TYPE_CHECKING:
    from rich.console import Group

# \b keeps the line breaks of the following lines.
EXAMPLES = """\b
Examples:
  unlearn methods
  unlearn methods blur
  unlearn methods --json
"""
_NOTE = (
    "alternates: other answers to the forget prompts, by default refusals\n"
    "reference: outputs of the model before training, computed before the first step"
)

_RECIPE = ("lr 1M", "135M", "1B", "8B", "epochs", "least steps", "step batch", "schedule", "source")
_RECIPE_NOTE = (
    "recipe: what is used unless it is set. lr: learning_rate by number of parameters (of a LoRA adapter)\n"
    "least steps: small data sets are passed over more often. step batch: forget examples of a step, at most"
)


def methods(
    method: Annotated[str | None, typer.Argument(metavar="[METHOD]", help="List only this method.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write a machine-readable list to stdout.")] = False,
) -> None:
    """Show the methods with their needs, losses and options."""
    from unlearning.methods.catalogue import list_methods

    listed = list_methods(method)
    if as_json:
        write_json(listed)
        return

    console().print(_tables(listed))


def _tables(listed: dict[str, Any]) -> "Group":
    from rich import box
    from rich.console import Group
    from rich.table import Table

    methods = Table("method", "needs", "loss", "source", box=box.SIMPLE_HEAD, caption=_NOTE, caption_justify="left")
    own = Table("method", "option", "meaning", "source", box=box.SIMPLE_HEAD)
    for method in listed["methods"]:
        methods.add_row(method["name"], "\n".join(method["needs"]), method["loss"], method["source"])
        for index, option in enumerate(method["options"]):
            name = "" if index else method["name"]
            own.add_row(name, f"{option['name']}={option['default']}", option["help"], option["source"])
    recipes = Table("recipe of", *_RECIPE, box=box.SIMPLE_HEAD, caption=_RECIPE_NOTE, caption_justify="left")
    for method in listed["methods"]:
        recipe = method["recipe"]
        rates = [
            f"{recipe['learning_rate'][size]:g} ({recipe['learning_rate_of_an_adapter'][size]:g})"
            for size in recipe["learning_rate"]
        ]
        recipes.add_row(
            method["name"],
            *rates,
            *(str(recipe[name]) for name in ("epochs", "steps", "step_batch", "lr_schedule", "source")),
        )
    shared = Table("option of every method", "meaning", "source", box=box.SIMPLE_HEAD)
    for option in listed["train_options"]:
        shared.add_row(f"{option['name']}={option['default']}", option["help"], option["source"])
    for table in (methods, own, recipes, shared):
        table.columns[0].no_wrap = True
    return Group(*(table for table in (methods, own, recipes, shared) if table.row_count))
