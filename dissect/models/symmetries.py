"""Find the rewritings of a model's weights that change no output: by structure, and proven by numbers.

The same function can be written with many weights: a norm's gain can be moved into the matrices that read it, an up
projection can be scaled against its down projection, neurons and heads can change places. `find_symmetries` lists these
freedoms as `Scaling` and `Permutation`. Which tensors belong together is read from a forward pass (which modules
receive a norm's output) and from TransformerLens' adapters, not from a table of architectures; so a candidate may be
wrong for an architecture, and each one is tried with random factors: what changes the logits is dropped and named.

Not listed are mixtures (a rotation of the residual stream, of the channels inside of a head, or of a rotary pair) and
shifts (a norm's bias moved into the biases behind it, a constant added to all channels in front of a LayerNorm).
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from dissect.models.freedoms.candidates import Structure
from dissect.models.freedoms.kinds import (
    KINDS,
    Permutation,
    Scaling,
    Unproven,
    epsilon,
    permute,
    random_factors,
    scale,
    set_epsilon,
)
from unlearning.checkpoints.experts import fit_experts
from unlearning.common.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dissect.models.model import Model

_Freedom = TypeVar("_Freedom", Scaling, Permutation)


_SMALL = 50_000_000
"""Models with fewer parameters are tried in float64; for larger ones a float64 copy would take too much memory."""
_TOLERANCE = 1e-3
"""Largest change of a logit, relative to the spread of the logits, that counts as rounding.

A wrong candidate changes logits by a tenth of their spread or more. Rounding changes them by 1e-6 in a usual model,
also in float64 since norms compute in float32, and by 1e-4 where a model's weights are written so that digits are
lost, such as a gain of 1 + w with w near -1. Scalings that are exact only for a small epsilon are
held to it as well.
"""
_TOLERANCE_HALF = 5e-2
"""The same for dtypes of half precision."""
_TOKENS = (2, 12)
"""Shape of the random input that candidates are tried on."""


@dataclass(frozen=True, eq=False)
class Symmetries:
    """What can be rewritten in a model without a change of its outputs.

    Attributes:
        scalings: Proven scalings.
        permutations: Proven permutations, each before those inside of its units.
        unproven: Candidates that were dropped.
    """

    scalings: tuple[Scaling, ...]
    permutations: tuple[Permutation, ...]
    unproven: tuple[Unproven, ...]

    @property
    def kinds(self) -> set[str]:
        """Kinds that were proven in at least one layer."""
        return {scaling.kind for scaling in self.scalings} | {found.kind for found in self.permutations}


def find_symmetries(model: "Model") -> Symmetries:
    """Find the rewritings of a model's weights that change no output.

    Args:
        model: Model with its weights in memory; it is not changed.

    Returns:
        The scalings and permutations that were proven, and the candidates that were not.

    Raises:
        InputError: The model's weights are not in memory.

    Examples:
        >>> from dissect import load_model
        >>> found = find_symmetries(load_model("demo:base", device="cpu"))
        >>> sorted(found.kinds)
        ['heads', 'mlp', 'neurons', 'norm', 'query', 'query heads', 'stream', 'stream order', 'stream signs', 'value']
    """
    if model.streamed is not None:
        raise InputError(f"`stream` must be off for {model.name}; rewriting its weights needs them in memory")
    trial = _Trial(model)
    structure = Structure(model, trial.hf, trial.ids)
    scalings: list[Scaling] = []
    unproven: list[Unproven] = []
    for candidates in _by_kind(structure.scalings()):
        proven, failed = trial.prove(candidates)
        scalings += proven
        unproven += failed
    permutations: list[Permutation] = []
    single: list[Sequence[Permutation]] = [[permutation] for permutation in structure.permutations()]
    for orders in _by_kind(single):
        found, failed = trial.prove(orders)
        permutations += found
        unproven += failed
    return Symmetries(tuple(scalings), tuple(permutations), (*structure.impossible, *unproven))


def random_tokens(model: "Model") -> Int[Tensor, "batch position"]:
    """Return the random input that a model's candidates are tried on."""
    vocabulary = model.hf.config.get_text_config().vocab_size
    return torch.randint(vocabulary, _TOKENS, generator=torch.Generator().manual_seed(0)).to(model.device)


def tolerance_of(hf: "PreTrainedModel") -> float:
    """Return the largest change of a logit, relative to the logits' spread, that counts as a model's rounding."""
    half = next(hf.parameters()).dtype in (torch.bfloat16, torch.float16)
    return _TOLERANCE_HALF if half else _TOLERANCE


def _by_kind(candidates: Iterable[Sequence[_Freedom]]) -> list[list[Sequence[_Freedom]]]:
    groups: dict[str, list[Sequence[_Freedom]]] = {}
    for alternatives in candidates:
        groups.setdefault(alternatives[0].kind, []).append(alternatives)
    return [groups[kind] for kind in KINDS if kind in groups]


class _Trial:
    """A copy of a model on which candidates are tried."""

    def __init__(self, model: "Model") -> None:
        self.original = model.hf
        n_parameters = sum(parameter.numel() for parameter in model.hf.parameters())
        self.hf = copy.deepcopy(model.hf)
        if n_parameters < _SMALL and model.device.type == "cpu":
            self.hf.double()
            fit_experts(self.hf)
        self.ids = random_tokens(model)
        try:
            self.expected = self._logits()
        except RuntimeError:  # a model that fills its mask with the lowest float64 cannot be run in it
            self.hf.float()
            self.expected = self._logits()
        self.tolerance = tolerance_of(self.hf)

    @torch.no_grad()
    def _logits(self) -> Tensor:
        logits: Tensor = self.hf(input_ids=self.ids, use_cache=False).logits
        return logits.double()

    def gap(self, chosen: Sequence[Scaling | Permutation]) -> float:
        """Return how far random factors and orders move the logits, relative to their spread; nothing stays changed."""
        generator = torch.Generator().manual_seed(1)
        epsilons: dict[str, float] = {}
        touched: set[str] = set()
        for found in chosen:
            if isinstance(found, Permutation):
                touched |= {slots.parameter for slots in found.slots}
                cycle = torch.randperm(found.n_units, generator=generator)  # every unit moves, also one of two
                permute(self.hf, found, cycle.roll(1)[cycle.argsort()])
            else:
                touched |= {part.parameter for part in found.parts}
                for path in found.eps:
                    epsilons.setdefault(path, epsilon(self.hf, path))
                scale(self.hf, found, random_factors(found, largest=2.0, generator=generator))
        gap = float((self._logits() - self.expected).abs().max() / self.expected.std())
        with torch.no_grad():
            for name in touched:
                self.hf.get_parameter(name).copy_(self.original.get_parameter(name))
        for path, value in epsilons.items():
            set_epsilon(self.hf, path, value)
        return gap

    def holds(self, chosen: Sequence[Scaling | Permutation]) -> bool:
        """Return True if random factors and orders change no more than rounding does."""
        return self.gap(chosen) <= self.tolerance

    def prove(self, candidates: Sequence[Sequence[_Freedom]]) -> tuple[list[_Freedom], list[Unproven]]:
        """Return the first alternative of each candidate that changes nothing: tried all at once, else one by one."""
        for number in range(max(map(len, candidates))):
            chosen = [alternatives[min(number, len(alternatives) - 1)] for alternatives in candidates]
            if self.holds(chosen):
                return chosen, []
        proven, failed = [], []
        for alternatives in candidates:
            found = next((candidate for candidate in alternatives if self.holds([candidate])), None)
            if found is not None:
                proven.append(found)
                continue
            reason = f"it moves logits by {self.gap([alternatives[-1]]):.1g} of their spread"
            failed.append(Unproven(alternatives[0].kind, alternatives[0].layer, reason))
        return proven, failed
