"""The built-in models by name: `demo:base`, `demo:never`, `demo:npo` and so on. Light: loads no torch.

The models and the world's question sets lie beside this file; `README.md` there is their card.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path

from unlearning.common.errors import InputError

DIRECTORY = Path(__file__).parent
QUESTIONS = DIRECTORY / "questions"

DESCRIPTIONS: dict[str, str] = {
    "demo": "Llama architecture, 8 layers, d_model 128, grouped-query attention",
    "demo-neox": "GPT-NeoX architecture, 6 layers, d_model 96, parallel blocks, fused QKV",
}
"""The families."""

UNLEARNED: dict[str, tuple[str, ...]] = {
    "demo": ("grad_diff", "npo", "dpo", "blur", "simnpo", "rmu", "whp"),
    "demo-neox": ("grad_diff", "npo"),
}
"""The unlearning methods of each family."""

BUILTIN: dict[str, Path] = {
    f"{family}:{model}": DIRECTORY / "models" / family / model
    for family, methods in UNLEARNED.items()
    for model in ("base", "never", *methods)
}
"""Directory of every built-in model."""


@dataclass(frozen=True)
class BuiltinPair:
    """A base model and what became of it, with the control that goes with it."""

    base: str
    unlearned: str
    control: str
    data: Path
    description: str


def is_builtin(name: str) -> bool:
    """Whether a model's name is meant as a built-in one: `FAMILY:MODEL`, with the name of a family."""
    return name.partition(":")[1] == ":" and name.partition(":")[0] in DESCRIPTIONS


def resolve(name: str) -> Path:
    """The directory of a built-in model.

    Raises:
        InputError: there is no built-in model of this name, or its files are missing.
    """
    if name not in BUILTIN:
        near = difflib.get_close_matches(name, BUILTIN, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"no built-in model {name!r}; {hint}there are {', '.join(BUILTIN)}")
    path = BUILTIN[name]
    if not (path / "config.json").is_file():
        raise InputError(f"{name}: its files are missing from {path}; run `python -m dissect.zoo.build`")
    return path


def pairs() -> list[BuiltinPair]:
    """Every built-in pair, as `dissect models` lists them."""
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
    """One of the world's question sets: forget, retain, general, forget_paraphrased, retain_paraphrased.

    Raises:
        InputError: there is no such set.
    """
    path = QUESTIONS / f"{name}.jsonl"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in QUESTIONS.glob("*.jsonl")))
        raise InputError(f"no built-in question set {name!r}; there are {known}")
    return path


def default_prompts(family: str) -> Path:
    """The forget questions, which a built-in pair is dissected on where no data is given.

    Raises:
        InputError: there is no such family.
    """
    if family not in DESCRIPTIONS:
        raise InputError(f"no built-in family {family!r}; there are {', '.join(DESCRIPTIONS)}")
    return QUESTIONS / "forget.jsonl"


def default_control(name: str) -> str | None:
    """The never model of a built-in model's family, or None for a model that is not built in."""
    return f"{name.partition(':')[0]}:never" if name in BUILTIN else None
