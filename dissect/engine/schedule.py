"""What a sweep has to compute, layer by layer, before anything is computed.

All interventions go through the layers together. A stream is the target's residual stream under one set of
replacements; stream 0 is the target itself, untouched. An intervention follows stream 0 until its window begins,
forks from it there, and two interventions that have done the same so far (windows cut off by the model's first
layer) share one stream until they part. So nothing before a window is computed, and nothing is computed twice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dissect.interventions.intervention import NOWHERE, Intervention, weights_among
from dissect.models.sites import spared

WHOLE = frozenset({"resid_post"})
"""Sites that make everything else in their block pointless."""


@dataclass(frozen=True)
class Step:
    """One stream through one layer.

    Attributes:
        parent: the stream that enters.
        stream: the stream that leaves.
        sites: what is replaced on the way.
        lends: other streams that leave the same parent here use this one's attention output or coefficients.
        has_sibling: another stream goes untouched from the same parent.
        needs_all_in: whether every position of the parent is needed, or only the scored ones.
        needs_all_out: whether every position is needed afterwards: some later attention reads them.
    """

    parent: int
    stream: int
    sites: frozenset[str]
    lends: bool
    has_sibling: bool
    needs_all_in: bool
    needs_all_out: bool

    @property
    def weights(self) -> frozenset[str]:
        """Those of the sites that are weights."""
        return weights_among(self.sites)

    @property
    def borrows(self) -> bool:
        """Whether its untouched sibling has the attention output of this one too."""
        return self.has_sibling and spared(self.weights, "attn_out")

    @property
    def computes_attn(self) -> bool:
        """Whether the block's attention has to be run for it."""
        return not (self.borrows or "attn_out" in self.sites or self.sites & WHOLE)

    @property
    def computes_mlp(self) -> bool:
        """Whether the block's whole MLP has to be run for it."""
        return not (self.replaces_mlp or self.restores_borrowed)

    @property
    def replaces_mlp(self) -> bool:
        """Whether what the MLP writes is the same for every stream that has this replaced."""
        return bool(self.sites & ({"mlp_coef", "mlp_out"} | WHOLE))

    @property
    def restores_borrowed(self) -> bool:
        """Whether only the down projection has to be run, on coefficients that its sibling computed."""
        if self.replaces_mlp or "attn_out" in self.sites or not self.weights:
            return False
        return self.borrows and spared(self.weights, "mlp_coef")


@dataclass(frozen=True)
class Schedule:
    """Every stream's way through the layers.

    Attributes:
        starts: the streams that enter the first layer, with the weights that are restored before it.
        layers: the steps of each layer; those that lend stand first.
        ends: the stream that each intervention ends in, and the weights that are restored after the last layer.
    """

    starts: Mapping[int, frozenset[str]]
    layers: tuple[tuple[Step, ...], ...]
    ends: tuple[tuple[int, frozenset[str]], ...]

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def most_streams(self) -> int:
        """How many streams exist at once at most, those that enter and those that leave a layer together."""
        return max(len({s.parent for s in steps} | {s.stream for s in steps}) for steps in self.layers)


def make_schedule(interventions: Sequence[Intervention], n_layers: int) -> Schedule:
    """Let every intervention find its stream through every layer."""
    everyone = range(len(interventions))
    needs_all = [_attention_reads_from(item, n_layers) for item in interventions]
    before = sorted({item.before for item in interventions} - {NOWHERE}, key=sorted)
    starts = dict(enumerate([NOWHERE, *before]))
    followers: dict[int, list[int]] = {
        stream: [i for i in everyone if interventions[i].before == sites] for stream, sites in starts.items()
    }
    layers: list[tuple[Step, ...]] = []
    n_streams = len(starts)
    for layer in range(n_layers):
        steps: list[Step] = []
        arrived: dict[int, list[int]] = {}
        for parent, group in followers.items():
            by_sites: dict[frozenset[str], list[int]] = {frozenset(): []} if parent == 0 else {}
            for index in group:
                by_sites.setdefault(interventions[index].sites_at(layer), []).append(index)
            forks = len(by_sites) > 1
            for sites in sorted(by_sites, key=lambda names: (len(names), sorted(names))):
                members = by_sites[sites]
                if parent == 0 and not sites:
                    stream = 0
                else:
                    stream, n_streams = n_streams, n_streams + 1
                arrived[stream] = members
                has_plain = frozenset() in by_sites
                is_target = stream == 0

                def reads_after(layer: int, members: list[int] = members, is_target: bool = is_target) -> bool:
                    """Whether attention in this layer or a later one reads all positions of this stream."""
                    return (is_target and layer < n_layers) or any(layer <= needs_all[i] for i in members)

                steps.append(
                    Step(
                        parent=parent,
                        stream=stream,
                        sites=sites,
                        lends=forks and not sites,
                        has_sibling=forks and has_plain and bool(sites),
                        needs_all_in=reads_after(layer),
                        needs_all_out=reads_after(layer + 1),
                    )
                )
        followers = arrived
        layers.append(tuple(sorted(steps, key=lambda step: not step.lends)))
    ends = {index: stream for stream, members in followers.items() for index in members}
    return Schedule(starts, tuple(layers), tuple((ends[index], interventions[index].after) for index in everyone))


def _attention_reads_from(intervention: Intervention, n_layers: int) -> int:
    """The last layer whose attention is computed under an intervention, -1 where there is none.

    Once no attention is computed any more, positions do not meet and only the scored ones are needed.
    """
    replaced = {"attn_out"} | WHOLE
    reading = [layer for layer in range(n_layers) if not intervention.sites_at(layer) & replaced]
    return max(reading, default=-1)
