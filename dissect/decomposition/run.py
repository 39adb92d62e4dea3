"""Split what unlearning changed in each layer's MLP and attention output into weights, coefficients and both.

Per layer, the change of a projection's output between base and target is split into a weight, a coefficient and an
interaction term (`dissect.decomposition.terms`), measured at the answer positions, and added to the target to score the
recovery. Comparing an activation patch with a restored weight would count the interaction on one of the two sides.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from dissect.decomposition.direct_logits import DirectPath, find_path
from dissect.decomposition.result import DecompositionResult, load_decompose
from dissect.decomposition.rows import example_rows, position_rows
from dissect.decomposition.terms import (
    EXACT,
    OLD_SITES,
    SITES,
    TERMS,
    TOTAL,
    Change,
    Recorded,
    Site,
    can_resume,
    logits_with_term,
    record,
    scored,
    site_modules,
)
from dissect.models.alignment import check_basis
from dissect.models.model import Model
from dissect.models.null_models import check_null, null_model
from dissect.models.pair import ModelPair, resolve_control
from dissect.prompts.prompts import Batch, Prompts, check_fits, check_in_memory, check_loaded
from dissect.scoring.rows import RecoveryScorer
from unlearning.common.errors import InputError, check_at_least
from unlearning.common.progress import Progress
from unlearning.common.runs import Run, computing, open_run, peak_memory_bytes

CLOSURE = 1e-3
"""Largest relative gap between the sum of the three terms and the change of a module's output."""

_PURPOSE = "splitting its change"

_MIX = torch.tensor(list(TERMS.values()), dtype=torch.float64)
_TOTAL = list(TERMS).index(TOTAL)
_KEYS = ["arm", "site", "first_layer", "last_layer", "term"]


def decompose(
    pair: ModelPair,
    prompts: Prompts,
    *,
    sites: str | Sequence[str] = SITES,
    control: str | Model | None = "auto",
    null: int = 0,
    batch_size: int = 16,
    padding_side: Literal["left", "right"] = "right",
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
) -> DecompositionResult:
    """Split each layer's change into weight, coefficient and interaction, and add each term to the unlearned model.

    Norms, shares <term, total> / ||total||^2 and direct contributions to the answer token's logit are measured in each
    model's own forward pass, per answer position, and averaged over an example's positions. KRS is that of the
    unlearned model with a term added to the projection's output at every token position of one layer, or of all layers;
    with all layers, a term is computed from the state that earlier additions have led to. So `weight` is the restored
    weight, `coefficient` the patched input and `total` the patched output. The direct path is the target's own: its
    final norm and head, with every norm frozen at the target's states.

    Args:
        pair: The base and the unlearned model.
        prompts: Prompts with answers; see `load_prompts`.
        sites: Outputs to split: `mlp_out` (down projection; its input are the MLP coefficients) and `attn_out`
            (attention output projection).
        control: A model never trained on the knowledge, from the same pretrained model as the base, split in the same
            way: a loaded model, a name or path, None, or `auto` (the control of a built-in pair).
        null: Number of null models that are split in the same way. A null model is the base, moved in random
            directions, each tensor as far as unlearning moved it; it shows what any diffuse change of that size gives.
        batch_size: Largest number of prompts in a batch. No number depends on it.
        padding_side: Side on which batches are padded. No number depends on it.
        seed: Random seed of the bootstrap.
        out: Run directory, written while computing. A run that was killed continues from there.
        progress: Show a progress bar on stderr.

    Returns:
        Norms, shares, direct contributions and recovery of every term, per example and per answer position.

    Raises:
        InputError: A site is unknown or missing in the architecture, a model is streamed, the control cannot be
            compared, a prompt does not fit, a projection is not a plain linear map, the run directory holds another
            configuration, or logits are not finite.

    Examples:
        >>> from dissect import decompose, load_pair, load_prompts
        >>> from dissect.zoo import question_set
        >>> pair = load_pair("demo:base", "demo:npo")
        >>> prompts = load_prompts(question_set("forget"), pair.tokenizer, limit=4)
        >>> result = decompose(pair, prompts, sites="mlp_out", progress=False)
        >>> sorted(set(result.frame["term"]))[:3]
        ['coefficient', 'coefficient_symmetric', 'interaction']
    """
    for name, value, minimum in (("seed", seed, 0), ("batch_size", batch_size, 1), ("null", null, 0)):
        check_at_least(name, value, minimum)
    check_loaded(prompts, "prompts")
    known = parse_decomposed(sites)
    for model in (pair.base, pair.unlearned):
        check_in_memory(model, _PURPOSE)
    control_model = resolve_control(pair, control)
    arms = _arms(pair, control_model, null)
    check_fits(pair.base, prompts)
    for model in (pair.base, pair.unlearned, *([control_model] if control_model else [])):
        check_in_memory(model, _PURPOSE)
        check_basis(pair.base, model)
        _Arm.of("", model, pair.base, known)  # refuses a missing site before anything is computed
    configuration = {
        "command": "decompose",
        "base_sha256": pair.base.sha256,
        "unlearned_sha256": pair.unlearned.sha256,
        "control_sha256": control_model.sha256 if control_model else None,
        "data_sha256": prompts.sha256,
        "examples": len(prompts),
        "scoring": prompts.scoring,
        "sites": list(known),
        "null": null,
        "padding_side": padding_side,
        "dtype": pair.base.dtype,
        "device": pair.base.device.type,
        "seed": seed,
    }
    provenance = {
        "command": "decompose",
        "base": pair.base.name,
        "unlearned": pair.unlearned.name,
        "control": control_model.name if control_model else None,
        "data": prompts.source,
    }
    run = None if out is None else open_run(out, configuration, provenance)
    if run is not None and run.is_complete:
        return load_decompose(run.path)
    batches = [batch.trimmed() for batch in prompts.batches(batch_size, padding_side=padding_side)]
    with computing(run) as clock:
        frame, positions = _run(_Work(pair.base, prompts, known), arms, batches, run, progress=progress)
    result = DecompositionResult(
        frame=frame,
        positions=positions,
        configuration=configuration,
        provenance=provenance,
        wall_time_s=clock.seconds,
        measured={"peak_memory_bytes": peak_memory_bytes()},
    )
    if run is not None:
        result.write(run)
    return result


def parse_decomposed(sites: str | Sequence[str]) -> tuple[Site, ...]:
    """Read a comma-separated list of sites, or a sequence of sites.

    Returns:
        The sites, each once, in the order of `SITES`.

    Raises:
        InputError: No site is named, or a name is unknown.

    Warns:
        UserWarning: A site goes by the name that it had in earlier versions.
    """
    given = [name.strip() for name in (sites.split(",") if isinstance(sites, str) else sites) if name.strip()]
    for name in OLD_SITES.keys() & set(given):
        warnings.warn(
            f"site {name} is now called {OLD_SITES[name]}; the old name works in this version only", stacklevel=3
        )
    names = [OLD_SITES.get(name, name) for name in given]
    for name in names or [""]:
        if name not in SITES:
            raise InputError(f"`sites` must be among {', '.join(SITES)}, got {name!r}")
    return tuple(site for site in SITES if site in names)


@dataclass(frozen=True, eq=False)
class _Work:
    """What all arms have in common."""

    base: Model
    prompts: Prompts
    sites: tuple[Site, ...]

    @property
    def windows(self) -> list[range]:
        """Every single layer, and all layers together."""
        n = self.base.n_layers
        return [*(range(layer, layer + 1) for layer in range(n)), *([range(n)] if n > 1 else [])]


@dataclass(frozen=True, eq=False)
class _Arm:
    """A model that is compared with the base: `main`, `control`, `null-0`."""

    name: str
    model: Model
    changes: Mapping[Site, list[Change]]

    @classmethod
    def of(cls, name: str, model: Model, base: Model, sites: Sequence[Site]) -> "_Arm":
        """Return the arm with the change of every site's modules."""
        modules = {site: zip(site_modules(base, site), site_modules(model, site), strict=True) for site in sites}
        return cls(name, model, {site: [Change.of(*both) for both in pairs] for site, pairs in modules.items()})

    @property
    def target(self) -> str:
        """The kind of model: `unlearned`, `control` or `null`."""
        return {"main": "unlearned", "control": "control"}.get(self.name, "null")


@dataclass(frozen=True, eq=False)
class _ArmGroup:
    """Arms that are in memory together; null models are built on demand, one at a time."""

    names: tuple[str, ...]
    models: Callable[[], tuple[Model, ...]]


def _arms(pair: ModelPair, control: Model | None, null: int) -> list[_ArmGroup]:
    given = {"main": pair.unlearned} | ({} if control is None else {"control": control})
    groups = [_ArmGroup(tuple(given), lambda: tuple(given.values()))]
    if null:
        check_null(pair.base, pair.unlearned)
        for seed in range(null):
            make = partial(null_model, pair.base, pair.unlearned, seed=seed)
            groups.append(_ArmGroup((f"null-{seed}",), lambda make=make: (make(),)))  # type: ignore[misc]
    return groups


def _run(
    work: _Work, groups: Sequence[_ArmGroup], batches: Sequence[Batch], run: Run | None, *, progress: bool
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the rows of all examples and of all positions; batches that the run already holds are not recomputed."""
    kept = [] if run is None else run.parts()
    frames = [frame for name, frame in kept if name.startswith("examples-")]
    positions = [frame for name, frame in kept if name.startswith("positions-")]
    done = {key for frame in frames for key in zip(frame["arm"], frame["example_index"], strict=True)}
    names = [name for group in groups for name in group.names]
    pending = {
        group.names: [
            batch for batch in batches if not done.issuperset((name, i) for name in group.names for i in batch.examples)
        ]
        for group in groups
    }
    n_batches = sum(len(group.names) * len(pending[group.names]) for group in groups)
    with Progress(n_batches * len(work.sites) * len(work.windows), "decomposing", show=progress) as bar:
        for group in groups:
            todo = pending[group.names]
            models = group.models() if todo else ()
            arms = [
                _Arm.of(name, model, work.base, work.sites) for name, model in zip(group.names, models, strict=False)
            ]
            paths = {arm.name: find_path(arm.model, todo[0].to(work.base.device), work.sites) for arm in arms}
            for batch in todo:
                batch = batch.to(work.base.device)
                base = record(work.base, batch, work.sites, everywhere=True)
                made = [_split(work, batch, arm, paths[arm.name], base, bar) for arm in arms]
                # Positions are written first, so that a batch whose examples are on disk is complete.
                for what, table, index in (("positions", positions, 1), ("examples", frames, 0)):
                    table.append(pd.concat([parts[index] for parts in made], ignore_index=True))
                    if run is not None:
                        indices = f"{batch.examples[0]:05d}-{len(batch.examples)}"
                        run.keep_part(f"{what}-{group.names[0]}-{indices}", table[-1])
    orders: dict[str, list[str]] = {"arm": names, "site": list(work.sites), "term": list(TERMS)}
    return _in_order(frames, ["example_index"], orders), _in_order(positions, ["example_index", "position"], orders)


def _in_order(frames: Sequence[pd.DataFrame], within: list[str], orders: Mapping[str, list[str]]) -> pd.DataFrame:
    """Return one table by arm, site, layers, term and example, however the work was split; each row once."""
    frame = pd.concat(frames, ignore_index=True).drop_duplicates([*_KEYS, *within])
    keys = frame[[*_KEYS, *within]].assign(
        several=frame["last_layer"] > frame["first_layer"],  # all layers together come after the last single layer
        **{name: frame[name].map(order.index) for name, order in orders.items()},
    )
    keys = keys.sort_values(["arm", "site", "several", "first_layer", "term", *within])
    return frame.loc[keys.index].reset_index(drop=True)


@dataclass(frozen=True, eq=False)
class _Geometry:
    """Norms and products of the terms at the scored positions; over several layers, their sums.

    Attributes:
        square: ||term||^2.
        dot: <term, total>.
        base_square: ||base's output||^2.
        direct: Contribution to the answer token's logit, and to that logit minus the vocabulary's mean.
    """

    square: Float[Tensor, "term scored"]
    dot: Float[Tensor, "term scored"]
    base_square: Float[Tensor, " scored"]
    direct: Float[Tensor, "two term scored"]

    def __add__(self, other: "_Geometry") -> "_Geometry":
        """Return the sums, as if the layers' outputs were concatenated."""
        return _Geometry(
            self.square + other.square,
            self.dot + other.dot,
            self.base_square + other.base_square,
            self.direct + other.direct,
        )


@torch.inference_mode()
def _geometry(
    change: Change, site: Site, layer: int, batch: Batch, base: Recorded, own: Recorded, path: DirectPath
) -> _Geometry:
    key = (site, layer)
    m_base = scored(base.inputs[key], batch)
    exact = torch.stack([change.term(TERMS[term], m_base, own.inputs[key]).double() for term in EXACT])
    terms = torch.einsum("tk,ksd->tsd", _MIX.to(exact.device), exact)
    ours, theirs = own.outputs[key].double(), base.outputs[key].double()
    if not (theirs - ours - terms[_TOTAL]).norm() <= CLOSURE * theirs.norm():
        raise InputError(
            f"{path.model.name}: the projection of {site} in layer {layer} is more than its weight and bias "
            "(an adapter, a quantised weight), so its change cannot be split"
        )
    direct = torch.full((2, *terms.shape[:2]), torch.nan, dtype=torch.float64, device=terms.device)
    if not path.problem:
        direct = path.contributions(
            terms,
            site=site,
            layer=layer,
            output=own.outputs[key],
            final_state=own.final_state,
            tokens=batch.next_tokens,
        )
    return _Geometry(
        square=terms.square().sum(-1),
        dot=(terms * terms[_TOTAL]).sum(-1),
        base_square=theirs.square().sum(-1),
        direct=direct,
    )


def _split(
    work: _Work, batch: Batch, arm: _Arm, path: DirectPath, base: Recorded, bar: Progress
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the rows of one batch and arm: per example, and per position."""
    target = arm.model
    own = record(target, batch, work.sites, everywhere=False)
    scorer = RecoveryScorer(base.logits, own.logits, batch, name=target.name)
    resumed = own if can_resume(target, batch, own) else None
    examples, positions = [], []
    for site in work.sites:
        changes = arm.changes[site]
        layers = [_geometry(change, site, i, batch, base, own, path) for i, change in enumerate(changes)]
        for window in work.windows:
            geometry = layers[window.start]
            for layer in window[1:]:
                geometry = geometry + layers[layer]
            floor = 10 * torch.finfo(own.logits.dtype).eps
            changed = geometry.square[_TOTAL].sqrt() > floor * geometry.base_square.sqrt()
            share = geometry.dot / torch.where(changed, geometry.square[_TOTAL], torch.nan)
            for number, term in enumerate(TERMS):
                where = {
                    "arm": arm.name,
                    "target": arm.target,
                    "kind": "decompose",
                    "site": site,
                    "first_layer": window[0],
                    "last_layer": window[-1],
                    "term": term,
                }
                measures = {
                    "norm": geometry.square[number].sqrt(),
                    "base_norm": geometry.base_square.sqrt(),
                    "share": share[number],
                    "dot_total": geometry.dot[number],
                    "square_total": geometry.square[_TOTAL],
                    "direct": geometry.direct[0, number],
                    "direct_centred": geometry.direct[1, number],
                }
                logits = logits_with_term(target, batch, {i: changes[i] for i in window}, site, term, base, resumed)
                recovery = scorer.columns(logits, f"{term} of {site} in layers {window[0]} to {window[-1]}")
                positions.append(position_rows(where, batch, measures, work.prompts))
                examples.append(example_rows(where, batch, measures, recovery, path.problem, work.prompts))
            bar.advance(1)
    return pd.concat(examples, ignore_index=True), pd.concat(positions, ignore_index=True)
