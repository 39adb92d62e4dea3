"""Plan what a sweep computes in every layer, before anything is computed.

All interventions go through the layers together. A branch is the target's residual stream under one set of
replacements; branch 0 is the target itself, without any replacement. An intervention follows branch 0 until its window
begins and forks from it there. Two interventions that have replaced the same sites so far (their windows are cut off
by the model's first layer) share one branch until they differ. So no layer before a window is computed for a branch,
and nothing is computed twice.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from dissect.interventions.intervention import NO_SITES, Intervention, weights_among
from dissect.models.sites import leaves_unchanged

WHOLE = frozenset({"resid_post"})
"""Sites whose replacement makes everything else in their block irrelevant."""


@dataclass(frozen=True)
class Step:
    """One branch through one layer.

    Attributes:
        parent: Branch that enters the layer.
        branch: Branch that leaves the layer.
        sites: Sites that are replaced in this layer.
        shares_attention: True if other branches that fork from the same parent in this layer use this one's attention
            output or coefficients.
        has_sibling: True if another branch leaves the same parent without any replacement.
        needs_all_in: True if every position of the parent is needed, False if the scored ones are enough.
        needs_all_out: True if a later attention reads every position of the branch.
    """

    parent: int
    branch: int
    sites: frozenset[str]
    shares_attention: bool
    has_sibling: bool
    needs_all_in: bool
    needs_all_out: bool

    @property
    def weights(self) -> frozenset[str]:
        """Weight sites among the replaced sites."""
        return weights_among(self.sites)

    @property
    def reuses_attention(self) -> bool:
        """True if the attention output equals that of the sibling without replacements."""
        return self.has_sibling and leaves_unchanged(self.weights, "attn_out")

    @property
    def computes_attn(self) -> bool:
        """True if the block's attention has to be run for this branch."""
        return not (self.reuses_attention or "attn_out" in self.sites or self.sites & WHOLE)

    @property
    def computes_mlp(self) -> bool:
        """True if the block's whole MLP has to be run for this branch."""
        return not (self.replaces_mlp or self.restores_down_proj_only)

    @property
    def replaces_mlp(self) -> bool:
        """True if the MLP's output is the same for every branch with these replacements."""
        return bool(self.sites & ({"mlp_coef", "mlp_out"} | WHOLE))

    @property
    def restores_down_proj_only(self) -> bool:
        """True if only the down projection has to be run, on the coefficients that the sibling computed."""
        if self.replaces_mlp or "attn_out" in self.sites or not self.weights:
            return False
        return self.reuses_attention and leaves_unchanged(self.weights, "mlp_coef")


@dataclass(frozen=True)
class Schedule:
    """Way of every branch through the layers.

    Attributes:
        starts: Branches that enter the first layer, each with the weight sites that are restored before that layer.
        layers: Steps of each layer; steps that share their attention stand first.
        ends: For each intervention its last branch, and the weight sites that are restored after the last layer.
    """

    starts: Mapping[int, frozenset[str]]
    layers: tuple[tuple[Step, ...], ...]
    ends: tuple[tuple[int, frozenset[str]], ...]

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def max_branches(self) -> int:
        """Largest number of branches in memory at once: those that enter a layer and those that leave it."""
        return max(len({s.parent for s in steps} | {s.branch for s in steps}) for steps in self.layers)


def make_schedule(interventions: Sequence[Intervention], n_layers: int) -> Schedule:
    """Assign every intervention to a branch in every layer.

    Args:
        interventions: Interventions that are run together.
        n_layers: Number of layers of the model.

    Returns:
        The schedule; `ends` is in the order of the interventions.
    """
    last_attention = [_last_layer_with_attention(item, n_layers) for item in interventions]
    before = sorted({item.before for item in interventions} - {NO_SITES}, key=sorted)
    starts = dict(enumerate([NO_SITES, *before]))
    members: dict[int, list[int]] = {
        branch: [index for index, item in enumerate(interventions) if item.before == sites]
        for branch, sites in starts.items()
    }

    def reads_all(branch: int, indices: Sequence[int], layer: int) -> bool:
        """Return True if attention in this layer or a later one reads all positions of a branch."""
        return (branch == 0 and layer < n_layers) or any(layer <= last_attention[index] for index in indices)

    layers: list[tuple[Step, ...]] = []
    n_branches = len(starts)
    for layer in range(n_layers):
        steps: list[Step] = []
        members_after: dict[int, list[int]] = {}
        for parent, forks in _forks(members, interventions, layer):
            for sites, indices in forks:
                if parent == 0 and not sites:
                    branch = 0
                else:
                    branch, n_branches = n_branches, n_branches + 1
                members_after[branch] = indices
                is_forked = len(forks) > 1
                steps.append(
                    Step(
                        parent=parent,
                        branch=branch,
                        sites=sites,
                        shares_attention=is_forked and not sites,
                        has_sibling=is_forked and not forks[0][0] and bool(sites),
                        needs_all_in=reads_all(branch, indices, layer),
                        needs_all_out=reads_all(branch, indices, layer + 1),
                    )
                )
        members = members_after
        layers.append(tuple(sorted(steps, key=lambda step: not step.shares_attention)))
    ends = {index: branch for branch, indices in members.items() for index in indices}
    return Schedule(starts, tuple(layers), tuple((ends[i], item.after) for i, item in enumerate(interventions)))


def _forks(
    members: Mapping[int, Sequence[int]], interventions: Sequence[Intervention], layer: int
) -> Iterator[tuple[int, list[tuple[frozenset[str], list[int]]]]]:
    """Yield every branch with the sets of sites that are replaced in it in this layer, the empty set first.

    Each set comes with the indices of its interventions. Branch 0 always goes on without replacements.
    """
    for parent, indices in members.items():
        by_sites: dict[frozenset[str], list[int]] = {frozenset(): []} if parent == 0 else {}
        for index in indices:
            by_sites.setdefault(interventions[index].sites_at(layer), []).append(index)
        yield parent, sorted(by_sites.items(), key=lambda item: (len(item[0]), sorted(item[0])))


def _last_layer_with_attention(intervention: Intervention, n_layers: int) -> int:
    """Return the last layer whose attention is computed under an intervention, -1 if there is none.

    After this layer no position reads another one, so only the scored positions are needed.
    """
    replaced = {"attn_out"} | WHOLE
    reading = [layer for layer in range(n_layers) if not intervention.sites_at(layer) & replaced]
    return max(reading, default=-1)
