"""The models of known truth: their knowledge was never there, is hidden, or is partly there.

erased        the pretrained model trained on without the facts, in several orders; such models with unlearning steps on
              the facts that they never knew; the base shrunk and noised until hardly anything of it is left, and then
              distilled from a model without the knowledge (UNDO, 2506.06278)
suppressed    every unlearning method, mild or strong; a few parameters alone trained to hide: the last layer's MLP (a
              gate), the key vectors of the last three layers (their coefficients), the biases (a steering vector baked
              in); adapters of low rank, with refusals or wrong answers, over intact weights
partial       bases that learnt a part of the facts, suppressed on all of them; the base with noise in its weights
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from analyses.unlearning_methods import DEMO
from analyses.verdict_benchmark import recipes as making
from analyses.verdict_benchmark.families import Family, Truth, finetuned
from dissect.zoo.builder import base_texts
from dissect.zoo.recipes import RECIPES

ERASED, SUPPRESSED = Truth("erased", 0.0), Truth("suppressed", 1.0)
BY_METHOD = Truth("suppressed", None)

SHARES = (0.125, 0.25, 0.5, 0.75)
"""Shares of the forget people that the bases of the partial models learnt."""

PART_METHODS = ("npo", "dpo")
"""Methods that then unlearn all of them: one that leaves little of the knowledge, and one that leaves much."""

NOISES = (0.4, 0.6, 0.8)
"""Standard deviations of weight noise, as shares of each matrix's own root mean square."""

BY_METHODS = (
    *("ga", "grad_diff_kl", "npo_kl", "idk", "kto", "altpo", "undial", "ce_u", "wga", "satimp", "pdu", "task_vector"),
    *("grad_diff", "npo", "dpo", "blur", "simnpo", "rmu", "whp"),
)
"""Entries that the benchmark's models are made by; a place decides the strength, so a new one belongs at the end."""

_KNOWN: dict[str, dict[str, Any]] = {
    **{entry.name: {"learning_rate": 5e-4, "epochs": 4, **entry.options} for entry in DEMO},
    **{name: dict(unlearning.flat()) for name, unlearning in RECIPES["demo"].unlearning.items()},
}
OPTIONS = {name: _KNOWN[name] for name in BY_METHODS}
"""As the built-in models and `analyses.unlearning_methods` have them; found on the built-in world, not on these."""
OPTIONS["rmu"] |= {"layer": 3, "steering_coefficient": 50.0, "learning_rate": 3e-3, "alpha": 30.0}
"""These models are narrower and shallower than those that RMU's options were found on."""

NEOX_RMU: dict[str, Any] = {
    "layer": 4,
    "steering_coefficient": 100.0,
    "alpha": 10.0,
    "train_parameters": r"gpt_neox\.layers\.[2-4]\.",
}
"""Options for NeoX, where the down projections alone hardly steer anything."""

STRENGTHS = {"mild": 0.5, "strong": 2.0}
"""Factors of the usual number of epochs."""

NEVER_KNEW, NEVER_DAMAGED = "never knew", "never knew, then unlearned"
DISTILLED = "destroyed and distilled"
BY_A_METHOD, BY_HAND = "unlearned by a method", "hidden by hand"
PARTLY_TAUGHT, NOISED, TRAINED_ANEW = "partly taught, then ", "noised", "trained anew"
"""How models are made; after `PARTLY_TAUGHT` stands the method."""

METHODS = {"grad_diff_kl": "grad_diff", "npo_kl": "npo"}
"""Methods of the entries that have other names."""

BLOCKS = {"llama": r"model\.layers", "neox": r"gpt_neox\.layers"}
KEYS = {"llama": "gate_proj|up_proj", "neox": "dense_h_to_4h"}
HIDE: dict[str, Any] = {**OPTIONS["npo"], "learning_rate": 5e-3, "epochs": 6, "alpha": 8.0}
"""Options of NPO on a few parameters, which leaves all others unchanged, with everything that they hold."""


@dataclass(frozen=True)
class Construction:
    """One way to make a model.

    Attributes:
        name: Name of its directory.
        made: How it is made, in a few words for tables and figures.
        truth: What it is.
        make: Function from the family to the model.
        recipe: Everything that decides the model, besides the family.
    """

    name: str
    made: str
    truth: Truth
    make: Callable[[Family], PreTrainedModel]
    recipe: Mapping[str, Any]


def constructions(family: Family) -> list[Construction]:
    """Return all judged models of a family; each is made from earlier ones, pretrained model, base and control."""
    return [*_erased(family), *_by_methods(family), *_by_hand(family), *_partial(), *_not_unlearned()]


def _options(family: Family, name: str) -> dict[str, Any]:
    own = NEOX_RMU if (family.architecture, name) == ("neox", "rmu") else {}
    return OPTIONS[name] | own


def _erased(family: Family) -> Iterator[Construction]:
    for order in (1, 2, 3):
        yield Construction(
            f"never-order{order}", NEVER_KNEW, ERASED, partial(making.never, order=order), {"order": order}
        )
    for method in ("npo", "grad_diff", "rmu", "dpo"):
        options = _options(family, method)
        damaged = partial(making.unlearned, method=method, options=options, start="never-order1")
        made_by = {"start": "never-order1", "method": method, "options": options}
        yield Construction(f"never-{method}", NEVER_DAMAGED, ERASED, damaged, made_by)
    recipe = {"shrink": making.SHRINK, "rate": making.DISTIL_RATE, "passes": making.DISTIL_PASSES}
    yield Construction("undo", DISTILLED, ERASED, making.distilled, recipe)


def _by_methods(family: Family) -> Iterator[Construction]:
    """Yield every method, mild in one family and strong in the next."""
    for number, name in enumerate(OPTIONS):
        strength = ("mild", "strong")[(number + family.seed) % 2]
        method, options = METHODS.get(name, name), _at_strength(_options(family, name), STRENGTHS[strength])
        yield _unlearned(f"{name}-{strength}", BY_A_METHOD, BY_METHOD, method, options)


def _by_hand(family: Family) -> Iterator[Construction]:
    blocks, last = BLOCKS[family.architecture], family.recipe.architecture.layers - 1
    keys = KEYS[family.architecture]
    only = {
        "last-mlp": rf"{blocks}\.{last}\.mlp\.",
        "coefficients": rf"{blocks}\.({last - 2}|{last - 1}|{last})\.mlp\.({keys})",
        **({"biases": r"bias$"} if family.architecture == "neox" else {}),
    }
    for name, pattern in only.items():
        yield _unlearned(f"hidden-{name}", BY_HAND, SUPPRESSED, "npo", {**HIDE, "train_parameters": pattern})
    for name, make in (("refusal", making.refusing), ("wrong", making.answering_wrong)):
        yield Construction(f"adapter-{name}", BY_HAND, SUPPRESSED, make, {"options": making.ADAPTER})


def _unlearned(name: str, made: str, truth: Truth, method: str, options: dict[str, Any]) -> Construction:
    make = partial(making.unlearned, method=method, options=options)
    return Construction(name, made, truth, make, {"method": method, "options": options})


def _partial() -> Iterator[Construction]:
    for share in SHARES:
        for method in PART_METHODS:
            options = OPTIONS[method]
            make = partial(making.part_known, share=share, method=method, options=options)
            recipe = {"share": share, "method": method, "options": options}
            truth = Truth("partial", share)
            yield Construction(f"part-{share:g}-{method}", PARTLY_TAUGHT + method, truth, make, recipe)
    for noise in NOISES:
        make = partial(making.noised, noise=noise)
        yield Construction(f"noise-{noise:g}", NOISED, Truth("partial", None), make, {"noise": noise})


def _not_unlearned() -> Iterator[Construction]:
    yield Construction("base-order1", TRAINED_ANEW, Truth("not unlearned", 1.0), _base_again, {"order": 1})


def _base_again(family: Family) -> PreTrainedModel:
    return finetuned(family, base_texts(family.world, family.recipe), order=1)


def _at_strength(options: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """Multiply the epochs of the options; below one epoch, the learning rate takes the rest of the factor."""
    epochs = options["epochs"] * factor
    whole = max(1, round(epochs))
    return {**options, "epochs": whole, "learning_rate": options["learning_rate"] * min(1.0, epochs / whole)}
