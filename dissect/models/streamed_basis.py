"""Find in what the bases of two models on disk differ, with no more than a layer of each in memory.

As in `dissect.models.alignment`, units are recognised by their weights, and only what is proven to change no output
counts: here by forward passes that read the weights again, rewritten at random while they are read. Nothing is undone,
so of several differences those count that are seen beside the others.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dissect.models.canonical import folding_factors
from dissect.models.comparison import Freedom, differs, gains_differ
from dissect.models.freedoms.candidates import Structure
from dissect.models.freedoms.kinds import (
    HasParameters,
    Part,
    Permutation,
    Scaling,
    epsilon,
    permute,
    random_factors,
    scale_parts,
    set_epsilon,
    squared_mean,
)
from dissect.models.model import Model
from dissect.models.streamed_forward import weights_on_demand
from dissect.models.streamed_model import StreamedModel
from dissect.models.symmetries import random_tokens, tolerance_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def differing_on_disk(base: Model, other: Model) -> list[tuple[str, Freedom]]:
    """Find what differs between the bases of two models that are streamed from disk.

    Args:
        base: The base.
        other: A model of the same architecture.

    Returns:
        `order`, `signs` or `scales` with each freedom that differs; empty if the bases agree.
    """
    of_base, of_other = base.streamed, other.streamed
    if of_base is None or of_other is None:
        raise ValueError("both models must be streamed")
    ids = random_tokens(base)[:1, :2]  # what each module reads and writes is kept, so few tokens
    with weights_on_demand(of_base, blocks=base.anatomy.blocks):
        structure = Structure(base, base.hf, ids)
    candidates: list[list[Freedom]] = [[*alternatives] for alternatives in structure.scalings()]
    candidates += [[permutation] for permutation in structure.permutations()]
    candidates.sort(key=lambda alternatives: -1 if alternatives[0].layer is None else alternatives[0].layer)
    stored, stored_other = (_StoredWeights(model, base.anatomy.blocks) for model in (of_base, of_other))
    if not any(_is_suspicious(stored, stored_other, one) for one in _all(_changed(candidates, of_base, of_other))):
        return []
    norms = [one for one in _all(candidates) if isinstance(one, Scaling) and one.kind == "norm"]
    plain, plain_other = stored.folded(norms), stored_other.folded(norms)
    found: list[list[tuple[tuple[str, ...], Freedom]]] = []
    for alternatives in candidates:
        ours, theirs = (stored, stored_other) if alternatives[0].kind == "norm" else (plain, plain_other)
        found.append([(what, one) for one in alternatives if (what := differs(ours, theirs, one))])
    proven = _Trial(other, of_other).proven([alternatives for alternatives in found if alternatives])
    return [(each, one) for what, one in proven for each in what]


def _all(candidates: Iterable[Sequence[Freedom]]) -> Iterator[Freedom]:
    return (one for alternatives in candidates for one in alternatives)


def _parameters(one: Freedom) -> set[str]:
    places: Sequence[Part] | Sequence[object] = one.slots if isinstance(one, Permutation) else one.parts
    return {place.parameter for place in places}  # type: ignore[attr-defined]


def _changed(candidates: Iterable[Sequence[Freedom]], base: StreamedModel, other: StreamedModel) -> list[list[Freedom]]:
    """Return the candidates with a parameter whose values differ; only those need be read."""
    changed = {key for key, sha256 in base.hashes.items() if other.hashes.get(key) != sha256}
    kept = [[one for one in alternatives if not changed.isdisjoint(_parameters(one))] for alternatives in candidates]
    return [alternatives for alternatives in kept if alternatives]


def _is_suspicious(base: HasParameters, other: HasParameters, one: Freedom) -> bool:
    if isinstance(one, Scaling) and one.kind == "norm" and gains_differ(base, other, one):
        return True
    return bool(differs(base, other, one))


class _StoredWeights:
    """The parameters of a model on disk, read when they are asked for; those of the last layer are kept."""

    def __init__(self, model: StreamedModel, blocks: str) -> None:
        self._model, self._blocks = model, blocks
        self._layer = ""
        self._kept: dict[str, nn.Parameter] = {}
        self._folded: dict[str, list[tuple[Part, Tensor]]] = {}

    def get_parameter(self, target: str) -> nn.Parameter:
        """Return a parameter with its values."""
        if not target.startswith(f"{self._blocks}."):
            return self._read(target)
        layer = target.removeprefix(f"{self._blocks}.").partition(".")[0]
        if layer != self._layer:
            self._layer, self._kept = layer, {}
        if target not in self._kept:
            self._kept[target] = self._read(target)
        return self._kept[target]

    def _read(self, name: str) -> nn.Parameter:
        values = self._model.files.read(self._model.stored[name]).to(self._model.dtype(name))
        one = _OneParameter({name: nn.Parameter(values, requires_grad=False)})
        for part, factors in self._folded.get(name, ()):
            scale_parts(one, [part], factors)
        return one[name]

    def folded(self, norms: Iterable[Scaling]) -> "_StoredWeights":
        """Return the same weights with gains of 1: they are multiplied into what reads them."""
        plain = _StoredWeights(self._model, self._blocks)
        for norm in norms:
            factors = folding_factors(self, norm)
            for part in norm.parts:
                plain._folded.setdefault(part.parameter, []).append((part, factors))
        return plain


class _OneParameter(dict[str, nn.Parameter]):
    """A parameter with its name."""

    def get_parameter(self, target: str) -> nn.Parameter:
        """Return the parameter."""
        return self[target]


class _Trial:
    """Forward passes of a model on disk, on whose way freedoms are tried."""

    def __init__(self, model: Model, streamed: StreamedModel) -> None:
        self._hf: PreTrainedModel = model.hf
        self._streamed, self._blocks = streamed, model.anatomy.blocks
        self._ids = random_tokens(model)
        self._tolerance = tolerance_of(model.hf)
        self._expected: Tensor | None = None

    def proven(
        self, found: Sequence[Sequence[tuple[tuple[str, ...], Freedom]]]
    ) -> list[tuple[tuple[str, ...], Freedom]]:
        """Return of each candidate the first alternative that changes no output: all of a kind at once, else singly."""
        by_kind = groupby(sorted(found, key=_kind), key=_kind)
        return [one for _, alike in by_kind for one in self._proven_of_kind(list(alike))]

    def _proven_of_kind(
        self, found: Sequence[Sequence[tuple[tuple[str, ...], Freedom]]]
    ) -> list[tuple[tuple[str, ...], Freedom]]:
        for number in range(max(map(len, found))):
            chosen = [alternatives[min(number, len(alternatives) - 1)] for alternatives in found]
            if self._holds([one for _, one in chosen]):
                return chosen
        proven = []
        for alternatives in found:
            proven += [first for first in alternatives if self._holds([first[1]])][:1]
        return proven

    def _holds(self, chosen: Sequence[Freedom]) -> bool:
        """Return True if random factors and orders change no more than rounding does."""
        if self._expected is None:
            self._expected = self._logits([])
        gap = (self._logits(chosen) - self._expected).abs().max() / self._expected.std()
        return float(gap) <= self._tolerance

    @torch.no_grad()
    def _logits(self, chosen: Sequence[Freedom]) -> Tensor:
        """Return logits; while weights are in memory, random factors and orders are written into them."""
        generator = torch.Generator().manual_seed(1)
        drawn: list[tuple[Freedom, Tensor]] = []
        for one in chosen:
            if isinstance(one, Permutation):
                cycle = torch.randperm(one.n_units, generator=generator)  # every unit moves, also one of two
                drawn.append((one, cycle.roll(1)[cycle.argsort()]))
            else:
                drawn.append((one, random_factors(one, largest=2.0, generator=generator)))
        scalings = [(one, factors) for one, factors in drawn if isinstance(one, Scaling)]
        epsilons = {path: epsilon(self._hf, path) for one, _ in scalings for path in one.eps}
        for one, factors in scalings:
            for path in one.eps:
                set_epsilon(self._hf, path, epsilon(self._hf, path) * squared_mean(factors))
        try:
            with weights_on_demand(self._streamed, blocks=self._blocks, act=lambda: self._rewrite(drawn)):
                logits: Tensor = self._hf(input_ids=self._ids, use_cache=False).logits
        finally:
            for path, value in epsilons.items():
                set_epsilon(self._hf, path, value)
        return logits.double()

    def _rewrite(self, drawn: Iterable[tuple[Freedom, Tensor]]) -> None:
        """Write the part of a rewriting into memory that belongs to the weights that are there."""
        there = {key for key, p in self._hf.named_parameters(remove_duplicate=False) if not p.is_meta}
        for one, numbers in drawn:
            if isinstance(one, Permutation):
                slots = tuple(each for each in one.slots if each.parameter in there)
                permute(self._hf, Permutation(one.kind, one.layer, one.n_units, slots, one.part), numbers)
            else:
                scale_parts(self._hf, [part for part in one.parts if part.parameter in there], numbers)


def _kind(alternatives: Sequence[tuple[tuple[str, ...], Freedom]]) -> str:
    return alternatives[0][1].kind
