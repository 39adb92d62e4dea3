"""List the freedoms that a model may have, by the structure of its modules."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dissect.models.freedoms.kinds import WHOLE, Part, Permutation, Scaling, Slots, Unproven
from dissect.models.freedoms.norms import Norm, find_norms
from dissect.models.weights import row_dim

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dissect.models.model import Model


@dataclass(frozen=True, eq=False)
class Projection:
    """A matrix and its bias, or the rows of a fused one that belong to one part."""

    weight: str
    out_dim: int
    in_dim: int
    shape: torch.Size
    rows: Int[Tensor, " rows"]
    bias: str | None

    def outputs(self, channels: Int[Tensor, " rows"], *, inverse: bool = False) -> Iterator[Part]:
        """Yield the parts of a scaling of its outputs, given each output's channel."""
        whole = torch.full((self.shape[self.out_dim],), -1)
        whole[self.rows] = channels
        shape = [1] * len(self.shape)
        shape[self.out_dim] = -1
        yield Part(self.weight, whole.view(shape), inverse)
        if self.bias is not None:
            yield Part(self.bias, whole, inverse)

    def inputs(self, channels: Int[Tensor, " columns"], *, inverse: bool = True) -> Part:
        """Return the part of a scaling of its inputs, given each input's channel."""
        shape = [1] * len(self.shape)
        shape[self.in_dim] = -1
        return Part(self.weight, channels.view(shape), inverse)

    def output_slots(self, units: Int[Tensor, "n_units size"], *, identifies: bool = True) -> Iterator[Slots]:
        """Yield where units of its outputs lie, given as numbers of this part's rows."""
        yield Slots(self.weight, self.out_dim, self.rows[units], identifies=identifies)
        if self.bias is not None:
            yield Slots(self.bias, 0, self.rows[units], identifies=identifies)

    def input_slots(self, units: Int[Tensor, "n_units size"], *, identifies: bool = True) -> Slots:
        """Return where units of its inputs lie."""
        return Slots(self.weight, self.in_dim, units, identifies=identifies)


@dataclass(frozen=True, eq=False)
class Mlp:
    """Matrices of an MLP.

    Attributes:
        read: Matrices that read the residual stream: one, or the up projection and the gate.
        down: Matrix that writes to it.
        gate_known: The first of two is known to be the up projection; else either may be the gate.
    """

    read: tuple[Projection, ...]
    down: Projection
    gate_known: bool

    def split(self) -> "Mlp":
        """Take a single matrix of twice as many rows as neurons apart into up projection and gate, half by half."""
        n_neurons = self.down.shape[self.down.in_dim]
        if len(self.read) != 1 or len(self.read[0].rows) != 2 * n_neurons:
            return self
        halves = tuple(replace(self.read[0], rows=rows) for rows in self.read[0].rows.split(n_neurons))
        return Mlp(halves, self.down, gate_known=False)

    def fits(self) -> bool:
        """Return True if every neuron has one row in what reads and one column in what writes."""
        n_neurons = self.down.shape[self.down.in_dim]
        return len(self.read) in (1, 2) and all(len(one.rows) == n_neurons for one in self.read)


class Structure:
    """What a model's modules read and write, and the candidates that follow from it."""

    def __init__(self, model: "Model", hf: "PreTrainedModel", ids: Tensor) -> None:
        self.model, self.hf = model, hf
        self.names = set(model.weights.all_names)
        self.norms, self.ran = find_norms(hf, ids)
        self.blocks = f"{model.weights.blocks}."
        config = hf.config.get_text_config()
        self.d_head = int(model.adapter.cfg.d_head)
        self.rotary = _rotary_widths(config, self.d_head)
        head, embedding = hf.get_output_embeddings(), hf.get_input_embeddings()
        self.tied = head is not None and head.weight is embedding.weight
        self.embedding_norms = [
            norm for norm in self.norms if norm.gain in model.weights.before and norm.source is not None
        ]
        self.width = int(model.adapter.cfg.d_model)  # embeddings may be narrower, and projected to it
        self.impossible: list[Unproven] = []

    def layer_of(self, path: str) -> int | None:
        """Return the index of the layer that a module belongs to; None outside of the blocks."""
        return int(path.removeprefix(self.blocks).partition(".")[0]) if path.startswith(self.blocks) else None

    def projection(self, site: str, layer: int) -> Projection | None:
        """Return the matrix of a weight site in a layer; None if the layer has no such matrix, or more than one."""
        found = {name: rows for name, rows in self.model.weights.at([site], layer).items() if name in self.names}
        vectors, weights = ([name for name in found if self.hf.get_parameter(name).dim() == dim] for dim in (1, 2))
        if len(weights) != 1 or len(vectors) > 1 or len(found) > len(vectors) + 1:  # experts are stacked matrices
            return None
        (weight,) = weights
        bias = vectors[0] if vectors else None
        shape = self.hf.get_parameter(weight).shape
        out_dim = row_dim(self.hf.get_submodule(weight.rpartition(".")[0]))
        rows = found[weight]
        rows = torch.arange(shape[out_dim]) if rows is None else rows.cpu()
        return Projection(weight, out_dim, 1 - out_dim, shape, rows, bias)

    def reading(self, module: str) -> Iterator[Projection]:
        """Yield the matrices of a module that read its input of the residual stream's width."""
        owner = self.hf.get_submodule(module)
        for key, parameter in owner.named_parameters(recurse=False):
            if parameter.dim() < 2 or "down" in key:
                continue
            in_dim = 1 - row_dim(owner) if parameter.dim() == 2 else 2 if parameter.shape[2] == self.width else 1
            rows = torch.arange(parameter.shape[3 - in_dim if parameter.dim() == 3 else 1 - in_dim])
            yield Projection(f"{module}.{key}", parameter.dim() - 1 - in_dim, in_dim, parameter.shape, rows, None)

    def experts(self, layer: int) -> str | None:
        """Return the module with the fused weights of a layer's experts."""
        block = f"{self.blocks}{layer}."
        found = [name for name in self.names if name.startswith(block) and name.endswith(".gate_up_proj")]
        if len(found) != 1 or self.hf.get_parameter(found[0]).dim() != 3:
            return None
        module = found[0].rpartition(".")[0]
        n_inner = self.hf.get_parameter(f"{module}.down_proj").shape[2]
        return module if self.hf.get_parameter(found[0]).shape[1] == 2 * n_inner else None

    def before(self) -> dict[str, int]:
        """Return the parameters that write to the residual stream before the blocks, each with its dimension."""
        found = {}
        for name in self.model.weights.before:
            shape = self.hf.get_parameter(name).shape
            along = [dim for dim in reversed(range(len(shape))) if shape[dim] == self.width]
            if along and name.rpartition(".")[0] in self.ran:
                found[name] = along[0]
        return found

    def mlps(self, layer: int) -> list["Mlp"]:
        """Return the MLPs of a layer that are modules: its own, or those that stand in and beside a mixture."""
        up, down, gate = (self.projection(site, layer) for site in ("W_in", "value_vectors", "W_gate"))
        if up is not None and down is not None:
            found = [Mlp(tuple(one for one in (up, gate) if one is not None), down, gate_known=gate is not None)]
        else:
            names = [name for name in self.model.weights.at(["value_vectors"], layer) if name in self.names]
            downs = [self._whole(name) for name in names if self.hf.get_parameter(name).dim() == 2]
            keys = [name for name in self.model.weights.at(["key_vectors"], layer) if name in self.names]
            found = []
            for down in downs:
                inside = f"{down.weight.rpartition('.')[0].rpartition('.')[0]}."
                read = [name for name in keys if name.startswith(inside) and self.hf.get_parameter(name).dim() == 2]
                found.append(Mlp(tuple(map(self._whole, read)), down, gate_known=False))
        return [mlp.split() for mlp in found if mlp.split().fits()]

    def writers(self, layer: int) -> list[Projection]:
        """Return the matrices of a layer that write to the residual stream, but for stacked experts."""
        whole = [self.projection(site, layer) for site in ("W_O", "value_vectors")]
        found = [*(one for one in whole if one is not None), *(mlp.down for mlp in self.mlps(layer))]
        return list({one.weight: one for one in found}.values())

    def _whole(self, weight: str) -> Projection:
        module, _, key = weight.rpartition(".")
        owner, shape = self.hf.get_submodule(module), self.hf.get_parameter(weight).shape
        out_dim = row_dim(owner)
        bias = f"{module}.bias" if key == "weight" and owner._parameters.get("bias") is not None else None
        return Projection(weight, out_dim, 1 - out_dim, shape, torch.arange(shape[out_dim]), bias)

    # Scalings: lists of alternatives, the finest one first

    def scalings(self) -> Iterator[Sequence[Scaling]]:
        """Yield the candidates, each with alternatives of which the first proven one counts."""
        for alternatives in self._scalings():
            sound = [scaling for scaling in alternatives if scaling.fits(self.hf)]
            if sound:
                yield sound
            else:
                self._misfit(alternatives[0])

    def _misfit(self, candidate: Scaling | Permutation) -> None:
        reason = "the shapes of the weights are not those that this freedom needs"
        self.impossible.append(Unproven(candidate.kind, candidate.layer, reason))

    def _scalings(self) -> Iterator[Sequence[Scaling]]:
        yield from self._norms()
        yield from self._stream()
        # A norm's gain does not see a sign; a bias of what writes to the stream does.
        gains = {part.parameter for norm in self.norms for part in norm.vectors()}
        signs = tuple(Part(name, self._along(name, dim)) for name, dim in self._basis() if name not in gains)
        yield [Scaling("stream signs", None, self.width, signs, magnitudes=False)]
        yield from self._normalised()
        for layer in range(self.model.n_layers):
            yield from self._mlp(layer)
            yield from self._attention(layer)

    def _norms(self) -> Iterator[Sequence[Scaling]]:
        for norm in self.norms:
            read = [projection for module in norm.readers for projection in self.reading(module)]
            tied = self.tied and any(self._is_head(projection.weight) for projection in read)
            if norm.gain is None or not read or tied:
                continue
            width = self.hf.get_parameter(norm.gain).numel()
            channels = torch.arange(width)
            if any(projection.shape[projection.in_dim] != width for projection in read):
                continue
            parts = (*norm.vectors(channels), *(projection.inputs(channels) for projection in read))
            yield [Scaling("norm", self.layer_of(norm.path), width, parts)]

    def _is_head(self, name: str) -> bool:
        return self.hf.get_parameter(name) is self.hf.get_output_embeddings().weight

    def _stream(self) -> Iterator[Sequence[Scaling]]:
        """One factor for all that is added to the residual stream; epsilons follow, readers without a norm divide."""
        parts: list[Part] = []
        if self.embedding_norms:
            for norm in self.embedding_norms:
                parts += norm.vectors()
        else:
            parts += [Part(name, WHOLE) for name in self.before()]
            if self.tied:
                final = [norm for norm in self.norms if norm.gain in self.model.weights.final_norm]
                parts += [part for norm in final for part in norm.vectors(inverse=True)]
        read_by_norm = {module for norm in self.norms for module in norm.readers}
        for layer in range(self.model.n_layers):
            experts = self.experts(layer)
            for written in self.writers(layer):
                parts += self._written(written.weight.rpartition(".")[0], written)
            if experts is not None:
                parts += self._written(experts, None)
            else:
                stacked = [name for name in self.model.weights.at(["value_vectors"], layer) if name in self.names]
                if any(self.hf.get_parameter(name).dim() > 2 for name in stacked):
                    parts += [Part(name, WHOLE) for name in stacked]
            for site in ("W_Q", "W_K", "W_V", "W_gate", "W_in"):
                reader = self.projection(site, layer)
                if reader is not None and reader.weight.rpartition(".")[0] not in read_by_norm:
                    parts.append(reader.inputs(WHOLE.expand(reader.shape[reader.in_dim])))
        inner = {norm.path for norm in self.norms if norm.source and self.layer_of(norm.source) is not None}
        inner |= {norm.path for norm in self.embedding_norms}
        of_stream = [norm for norm in self.norms if norm.path not in inner]
        if any(norm.eps is None for norm in of_stream):
            self.impossible.append(Unproven("stream", None, "the norms' epsilon is fixed, so it cannot be made exact"))
            return
        parts = list({part.parameter: part for part in parts}.values())
        epsilons = tuple(norm.eps for norm in of_stream if norm.eps is not None)
        yield [Scaling("stream", None, 1, tuple(parts), signs=False, eps=epsilons)]

    def _basis(self) -> list[tuple[str, int]]:
        """Return all parameters with a dimension along the residual stream's channels; the embedding is the first."""
        places: dict[str, int] = {}
        written = set()
        places |= self.before()
        for norm in self.norms:
            places |= {matrix.weight: matrix.in_dim for module in norm.readers for matrix in self.reading(module)}
        for layer in range(self.model.n_layers):
            for site in ("W_Q", "W_K", "W_V", "W_gate", "W_in"):
                reader = self.projection(site, layer)
                if reader is not None:
                    places[reader.weight] = reader.in_dim
            for writer in self.writers(layer):
                written.add(writer.weight.rpartition(".")[0])
                places[writer.weight] = writer.out_dim
                places |= {} if writer.bias is None else {writer.bias: 0}
            experts = self.experts(layer)
            if experts is not None:
                written.add(experts)
                places[f"{experts}.down_proj"] = 1
        for norm in self.norms:
            if norm.source is None or norm.source in written or self.layer_of(norm.source) is None:
                places |= {part.parameter: 0 for part in norm.vectors()}
        places = {name: dim for name, dim in places.items() if self.hf.get_parameter(name).shape[dim] == self.width}
        tensors = {id(self.hf.get_parameter(name)): name for name in reversed(places)}  # a tied one once
        return [(name, dim) for name, dim in places.items() if name in tensors.values()]

    def _along(self, name: str, dim: int) -> Int[Tensor, "..."]:
        """Return the channels of the residual stream along a dimension of a parameter."""
        shape = [1] * self.hf.get_parameter(name).dim()
        shape[dim] = -1
        return torch.arange(self.width).view(shape)

    def _written(self, module: str, projection: Projection | None) -> Iterator[Part]:
        """Yield what scales a module's output: the norm that normalises it, else its weight and bias."""
        norm = next((norm for norm in self.norms if norm.source == module), None)
        if norm is not None:
            yield from norm.vectors()
        elif projection is not None:
            yield from projection.outputs(torch.zeros_like(projection.rows))
        else:
            yield Part(f"{module}.down_proj", WHOLE)

    def _normalised(self) -> Iterator[Sequence[Scaling]]:
        """The scale of a matrix whose output goes into a norm and nowhere else."""
        for norm in self.norms:
            layer = None if norm.source is None else self.layer_of(norm.source)
            embedding = norm in self.embedding_norms
            if norm.source is None or norm.eps is None or not (embedding or layer is not None):
                continue
            owner = self.hf.get_submodule(norm.source)
            keys = [key for key, _ in owner.named_parameters(recurse=False) if "up_proj" not in key]
            parts = [Part(f"{norm.source}.{key}", WHOLE) for key in keys]
            if embedding and self.tied:
                final = [last for last in self.norms if last.gain in self.model.weights.final_norm]
                parts += [part for last in final for part in last.vectors(inverse=True)]
            whole = Scaling("normalised", layer, 1, tuple(parts), signs=False, eps=(norm.eps,))
            weight = owner._parameters.get("weight")
            width = None if norm.gain is None else self.hf.get_parameter(norm.gain).numel()
            if embedding or weight is None or isinstance(owner, Conv1D) or width is None:
                yield [whole]
                continue
            rows = torch.arange(weight.shape[0])
            head = rows // self.d_head
            partial = [torch.where(rows < width, 0, -1)]  # the rest, such as a rotated key, is not normalised
            if width == self.d_head:
                partial = [head, torch.where(head % 2 == 0, head // 2, -1), *partial]  # every other one may be a gate
            found = [
                Scaling("normalised", layer, int(channels.max()) + 1, self._by_row(owner, norm.source, channels), False)
                for channels in partial
            ]
            found = [replace(scaling, eps=(norm.eps,)) for scaling in found]
            yield [found[0], whole, *found[1:]] if width == self.d_head else [whole, *found]

    def _by_row(self, owner: nn.Module, module: str, channels: Tensor) -> tuple[Part, ...]:
        return tuple(
            Part(f"{module}.{key}", channels[:, None] if p.dim() == 2 else channels)
            for key, p in owner.named_parameters(recurse=False)
        )

    def _mlp(self, layer: int) -> Iterator[Sequence[Scaling]]:
        for mlp in self.mlps(layer):
            channels = torch.arange(len(mlp.read[0].rows))
            gated = len(mlp.read) > 1
            yield [
                Scaling("mlp", layer, len(channels), (*up.outputs(channels), mlp.down.inputs(channels)), gated)
                for up in (mlp.read[:1] if mlp.gate_known else mlp.read)
            ]
        experts = self.experts(layer)
        if experts is not None:
            n_experts, _, n_inner = self.hf.get_parameter(f"{experts}.down_proj").shape
            channels = torch.arange(n_experts * n_inner).view(n_experts, n_inner)
            ups = torch.cat([torch.full_like(channels, -1), channels], 1)[:, :, None]
            parts = (
                Part(f"{experts}.gate_up_proj", ups),
                Part(f"{experts}.down_proj", channels[:, None, :], inverse=True),
            )
            yield [Scaling("mlp", layer, n_experts * n_inner, parts)]

    def _attention(self, layer: int) -> Iterator[Sequence[Scaling]]:
        q, k, v, o = (self.projection(site, layer) for site in ("W_Q", "W_K", "W_V", "W_O"))
        if v is not None and o is not None:
            channels, n_inputs = torch.arange(len(v.rows)), o.shape[o.in_dim]
            if len(channels) % self.d_head == 0 and n_inputs % len(channels) == 0:
                read = self._grouped(channels, n_inputs)
                yield [Scaling("value", layer, len(channels), (*v.outputs(channels), o.inputs(read)))]
        if q is None or k is None:
            return
        norms = [
            next((norm for norm in self.norms if norm.source == projection.weight.rpartition(".")[0]), None)
            for projection in (q, k)
        ]
        n_groups = len(k.rows) // self.d_head
        gated = o is not None and len(q.rows) == 2 * o.shape[o.in_dim]  # a head's queries, then the gate of its output
        n_heads = len(q.rows) // self.d_head // (2 if gated else 1)
        if not n_groups or not n_heads:
            return
        alternatives: list[Scaling] = []
        for pairs in _pairings(self.d_head, self.rotary):
            n_pairs = int(pairs.max()) + 1
            of_k = torch.cat([pairs + n_pairs * group for group in range(n_groups)])
            gates = torch.full_like(pairs, -1) if gated else pairs[:0]
            of_q = torch.cat(
                [torch.cat([pairs + n_pairs * (head * n_groups // n_heads), gates]) for head in range(n_heads)]
            )
            parts: tuple[Part, ...] = ()
            if all(norms):
                parts = self._gains(norms, pairs, of_q, of_k)
            elif len(of_q) == len(q.rows) and len(of_k) == len(k.rows):
                parts = (*q.outputs(of_q), *k.outputs(of_k, inverse=True))
            if parts:
                n_channels = 1 + max(int(part.channels.max()) for part in parts)
                alternatives.append(Scaling("query", layer, n_channels, parts))
        if alternatives:
            yield alternatives

    def _gains(self, norms: Sequence[Norm | None], pairs: Tensor, of_q: Tensor, of_k: Tensor) -> tuple[Part, ...]:
        """The gains of query norm and key norm against each other."""
        parts: list[Part] = []
        for norm, whole, inverse in zip(norms, (of_q, of_k), (False, True), strict=True):
            if norm is None or norm.gain is None:
                return ()
            width = self.hf.get_parameter(norm.gain).numel()
            if width not in (self.d_head, len(whole)):
                return ()
            parts += norm.vectors(pairs if width == self.d_head else whole, inverse=inverse)
        return tuple(parts)

    def _grouped(self, channels: Tensor, n_inputs: int) -> Tensor:
        """Return the channel of a key-value head for each input of the output projection."""
        n_groups = len(channels) // self.d_head
        return channels.view(n_groups, 1, self.d_head).expand(-1, n_inputs // len(channels), -1).flatten()

    # Permutations, each before those inside of its units

    def permutations(self) -> Iterator[Permutation]:
        """Yield the candidates."""
        for permutation in self._permutations():
            if permutation.fits(self.hf):
                yield permutation
            else:
                self._misfit(permutation)

    def _permutations(self) -> Iterator[Permutation]:
        channels = torch.arange(self.width)[:, None]
        places = self._basis()
        outer = {name for name, _ in places if self.layer_of(name) is None}
        slots = (Slots(name, dim, channels, identifies=name in outer) for name, dim in places)
        yield Permutation("stream order", None, self.width, tuple(slots))
        for layer in range(self.model.n_layers):
            yield from self._heads(layer)
            yield from self._neurons(layer)

    def _heads(self, layer: int) -> Iterator[Permutation]:
        q, k, v, o = (self.projection(site, layer) for site in ("W_Q", "W_K", "W_V", "W_O"))
        if q is None or k is None or v is None or o is None:
            return
        d_head = self.d_head
        n_groups, n_heads = len(k.rows) // d_head, o.shape[o.in_dim] // d_head
        if not n_groups or not n_heads or n_heads % n_groups or len(q.rows) % n_heads:
            return
        each = n_heads // n_groups  # query heads of a group
        in_k = torch.arange(len(k.rows)).view(n_groups, -1)
        in_v = torch.arange(len(v.rows)).view(n_groups, -1)
        # A head of the query projection is as wide as a head, or twice where it holds the gate of the output as well.
        in_q = torch.arange(len(q.rows)).view(n_groups, each, -1)
        in_o = torch.arange(o.shape[o.in_dim]).view(n_groups, each, -1)
        gains = {
            id(projection): norm.gain
            for norm in self.norms
            for projection in (q, k)
            if norm.source == projection.weight.rpartition(".")[0]
            and norm.gain is not None
            and self.hf.get_parameter(norm.gain).numel() == len(projection.rows) > d_head
        }

        by_head = list(self._by_head(layer, n_heads, (q, k, v, o)))

        def of_queries(group: int | None, *, inner: bool) -> Iterator[Slots]:
            def rows(units: Tensor) -> Tensor:
                return units.flatten(1) if group is None else units[group]

            yield from q.output_slots(rows(in_q), identifies=inner)
            yield o.input_slots(rows(in_o), identifies=inner)
            if id(q) in gains:
                yield Slots(gains[id(q)], 0, rows(in_q), identifies=inner)
            for name in by_head:
                units = torch.arange(self.hf.get_parameter(name).shape[0]).view(n_groups, each, -1)
                yield Slots(name, 0, rows(units), identifies=inner)

        if n_groups > 1:
            slots = [*of_queries(None, inner=each == 1), *k.output_slots(in_k), *v.output_slots(in_v)]
            if id(k) in gains:
                slots.append(Slots(gains[id(k)], 0, in_k))
            yield Permutation("heads", layer, n_groups, tuple(slots))
        if each > 1:
            for group in range(n_groups):
                yield Permutation("query heads", layer, each, tuple(of_queries(group, inner=True)), part=group)

    def _by_head(self, layer: int, n_heads: int, known: Sequence[Projection]) -> Iterator[str]:
        """Yield other parameters of an attention with a row, or the rows of a head, for every query head.

        Such as the sinks of GPT-OSS, and the matrices that gate what each head writes.
        """
        names = {name for one in known for name in (one.weight, one.bias)}
        for name, rows in self.model.weights.at(["attn_weights"], layer).items():
            if name not in names and rows is None and name in self.names:
                shape = self.hf.get_parameter(name).shape
                if shape[0] in (n_heads, n_heads * self.d_head) and len(shape) < 3:
                    yield name

    def _neurons(self, layer: int) -> Iterator[Permutation]:
        for number, mlp in enumerate(self.mlps(layer)):
            units = torch.arange(len(mlp.read[0].rows))[:, None]
            slots = [found for up in mlp.read for found in up.output_slots(units)]
            part = None if number == 0 else -number
            yield Permutation("neurons", layer, len(units), (*slots, mlp.down.input_slots(units)), part)
        experts = self.experts(layer)
        if experts is None:
            return
        n_experts, _, n_inner = self.hf.get_parameter(f"{experts}.down_proj").shape
        block, whole = f"{self.blocks}{layer}.", torch.arange(n_experts)[:, None]
        routers = [
            f"{module}.{key}"
            for norm in self.norms
            if norm.path.startswith(block)
            for module in norm.readers
            if module.rpartition(".")[0] == experts.rpartition(".")[0]
            for key, p in self.hf.get_submodule(module).named_parameters(recurse=False)
            if p.shape[0] == n_experts and p.dim() < 3
        ]
        matrices = [f"{experts}.gate_up_proj", f"{experts}.down_proj"]
        outer = [Slots(name, 0, whole) for name in routers]
        outer += [Slots(name, 0, whole, identifies=False) for name in matrices]
        yield Permutation("experts", layer, n_experts, tuple(outer))
        units = torch.arange(n_inner)[:, None]
        for expert in range(n_experts):
            inner = (
                Slots(matrices[0], 0, units, inside=expert),
                Slots(matrices[0], 0, units + n_inner, inside=expert),
                Slots(matrices[1], 1, units, inside=expert),
            )
            yield Permutation("neurons", layer, n_inner, inner, part=expert)


def _rotary_widths(config: Any, d_head: int) -> list[int]:
    """Return how many channels of a head may be rotated: all of them, or what the configuration names."""
    rope = getattr(config, "rope_parameters", None) or {}
    share = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None)
    named = [getattr(config, "rotary_dim", None), None if share is None else int(share * d_head)]
    return list(dict.fromkeys([*(width for width in named if width and width <= d_head), d_head]))


def _pairings(d_head: int, rotary: Sequence[int]) -> list[Int[Tensor, " d_head"]]:
    """Return alternatives for which channels of a head share a factor, the finest one first.

    Each channel has its own where positions do not rotate; channel i and i + width / 2, or 2 i and 2 i + 1, share one
    where they are rotated together; else the whole head.
    """
    found = [torch.arange(d_head)]
    for width in rotary:
        rest = torch.arange(width // 2, width // 2 + d_head - width)
        halves = torch.arange(width // 2)
        found += [torch.cat([halves, halves, rest]), torch.cat([halves.repeat_interleave(2), rest])]
    return [*found, torch.zeros(d_head, dtype=torch.long)]
