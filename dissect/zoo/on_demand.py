"""Build a built-in model that the installed package does not hold.

The wheel holds the models that the documentation uses most. Every other built-in model is a shipped base after
unlearning: it is trained from the base where it is first asked for, and kept in the user's cache directory. On another
machine than the one that built the repository's models, rounding may make it differ from theirs in the last digits.
"""

import sys
from pathlib import Path

from dissect.zoo.paths import DIRECTORY, QUESTIONS
from dissect.zoo.recipes import RECIPES
from unlearning.common.cache import cache_directory
from unlearning.common.errors import InputError


def find_or_build(family: str, model: str) -> Path:
    """Return the directory of an unlearned built-in model, and train the model first if that was not done yet.

    Args:
        family: Name of the family, such as `demo`.
        model: Name of the model in the family: an unlearning method.

    Returns:
        Directory of the model, in the cache.

    Raises:
        InputError: The model is not an unlearned one, or the family's base is missing too.
    """
    recipe, base = RECIPES[family], DIRECTORY / "models" / family / "base"
    if model not in recipe.unlearning or not (base / "config.json").is_file():
        raise InputError(f"the files of {family}:{model} are missing. Run: python -m dissect.zoo.build")
    # The recipe's hash is part of the path, so that a model of an older recipe is never mistaken for this one.
    path = cache_directory("models") / family / recipe.fingerprint(model) / model
    if (path / "config.json").is_file():
        return path
    from dissect.zoo.builder import build_unlearned

    sys.stderr.write(
        f"{family}:{model} is not part of the installed package: training it from {family}:base, once, into {path} "
        "(about two minutes)\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    build_unlearned(recipe, model, path, base=base, dictionary=QUESTIONS / "anchors.json", progress=sys.stderr.isatty())
    return path
