"""Names and files of the built-in models, such as `demo:base`, `demo:never` and `demo:npo`.

The models and the question sets are stored beside this file, with a model card in `README.md`. Importing this package
does not import torch.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path

from dissect.zoo.paths import DIRECTORY, QUESTIONS
from unlearning.common.errors import InputError

DESCRIPTIONS: dict[str, str] = {
    "demo": "Llama architecture, 8 layers, d_model 128, grouped-query attention",
    "demo-neox": "GPT-NeoX architecture, 6 layers, d_model 96, parallel blocks, fused QKV",
}
"""Architecture of each family of models."""

UNLEARNED: dict[str, tuple[str, ...]] = {
    "demo": ("grad_diff", "npo", "dpo", "blur", "simnpo", "rmu", "whp"),
    "demo-neox": ("grad_diff", "npo"),
}
"""Unlearning methods of each family, in the order of the model card."""

BUILTIN: dict[str, Path] = {
    f"{family}:{model}": DIRECTORY / "models" / family / model
    for family, methods in UNLEARNED.items()
    for model in ("base", "never", *methods)
}
"""Directory of every built-in model."""


@dataclass(frozen=True)
class BuiltinPair:
    """A built-in base model, the model after unlearning, and their control.

    Attributes:
        base: Name of the base model.
        unlearned: Name of the unlearned model.
        control: Name of the model that was never trained on the forget facts.
        data: File of the forget questions.
        description: Architecture of the family.
    """

    base: str
    unlearned: str
    control: str
    data: Path
    description: str


def resolve(name: str) -> Path:
    """Return the directory of a built-in model.

    A model that the installed package does not hold is trained from its base first (see `dissect.zoo.on_demand`).

    Args:
        name: Name of the model, such as `demo:npo`.

    Returns:
        The directory; it has a `config.json`.

    Raises:
        InputError: No built-in model has this name, or the model's files are missing and cannot be built.
    """
    if name not in BUILTIN:
        near = difflib.get_close_matches(name, BUILTIN, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"no built-in model is called {name!r}; {hint}use one of {', '.join(BUILTIN)}")
    path = BUILTIN[name]
    if (path / "config.json").is_file():
        return path
    from dissect.zoo.on_demand import find_or_build

    return find_or_build(*name.split(":"))


def pairs() -> list[BuiltinPair]:
    """Return every built-in pair, in the order of `dissect models`."""
    return [
        BuiltinPair(
            base=f"{family}:base",
            unlearned=f"{family}:{method}",
            control=f"{family}:never",
            data=default_prompts(family),
            description=description,
        )
        for family, description in DESCRIPTIONS.items()
        for method in UNLEARNED[family]
    ]


def question_set(name: str) -> Path:
    """Return the file of a question set.

    Args:
        name: `forget`, `retain`, `general`, `forget_paraphrased` or `retain_paraphrased`.

    Returns:
        Path of the JSON lines.

    Raises:
        InputError: No question set has this name.
    """
    path = QUESTIONS / f"{name}.jsonl"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in QUESTIONS.glob("*.jsonl")))
        raise InputError(f"no built-in question set is called {name!r}; use one of {known}")
    return path


def default_prompts(family: str) -> Path:
    """Return the file of the forget questions, the default prompts of a family's pairs.

    Returns:
        Path of the JSON lines.

    Raises:
        InputError: No family has this name.
    """
    if family not in DESCRIPTIONS:
        raise InputError(f"no built-in family is called {family!r}; use one of {', '.join(DESCRIPTIONS)}")
    return QUESTIONS / "forget.jsonl"


def default_control(name: str) -> str | None:
    """Return the name of the control of a built-in model's family, or None for any other model."""
    return f"{name.partition(':')[0]}:never" if name in BUILTIN else None
