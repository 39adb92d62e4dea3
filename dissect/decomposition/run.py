"""Coefficients or value vectors: the exact split of what unlearning changed in each layer's MLP and attention output.

Per layer the change of a projection's output between base and target is split into a weight, a coefficient and an
interaction term (`decomposition_terms`), measured where the answer is predicted, and added to the target to see what
of the base's behaviour comes back. It takes no side, as comparing an activation patch with a weight swap does.
"""

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
from dissect.models.model import Model
from dissect.models.null_models import check_null, null_model
from dissect.models.pair import ModelPair, resolve_control
from dissect.prompts.prompts import Batch, Prompts, check_fits, check_in_memory
from dissect.scoring.rows import RecoveryScorer
from unlearning.common.errors import InputError
from unlearning.common.progress import Progress
from unlearning.common.runs import Run, computing, open_run, peak_memory_bytes

CLOSURE = 1e-3
"""Relative gap above which the three terms do not explain what the modules gave."""

_PURPOSE = "splitting its change"

_MIX = torch.tensor(list(TERMS.values()), dtype=torch.float64)
_TOTAL = list(TERMS).index(TOTAL)
_PLACE = ["arm", "site", "first_layer", "last_layer", "term"]


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
    """Split each layer's change into weight, coefficient and interaction, and add each to the unlearned model.

    Norms, shares <term, total> / ||total||^2 and direct contributions to the answer token's logit are taken on each
    model's own forward, per answer position, and averaged over each example's positions. KRS is that of the
    unlearned model with a term added to the projection's output at every token position of one layer, or of all; in
    all layers a term is taken at the state that the earlier additions have led to. So `weight` is the restored
    weight, `coefficient` the patched input and `total` the patched output. The direct path is the target's own: its
    final norm and head, every norm frozen at the states it is in.

    Args:
        pair: base and unlearned.
        prompts: what to ask; see `load_prompts`.
        sites: `mlp` (down projection and coefficients) and `attn` (output projection and its input).
        control: a model that never knew, of the base's trunk, split in the same way; see `patch`.
        null: how many models to split in the same way that were moved from the base in random directions, each tensor
            as far as unlearning moved it: what any diffuse change of that size looks like.
        batch_size: most prompts in one batch; no number depends on it.
        padding_side: no number depends on it; for tests of exactly that.
        seed: of the bootstrap draws.
        out: run directory to write to while computing; a killed run goes on from there.
        progress: show a progress bar on stderr.

    Raises:
        InputError: an unknown site or one that an architecture does not have, streamed models, a control that cannot
            be compared, a prompt that does not fit, a projection that is no plain linear map, a run directory of
            another configuration, logits that are not finite.
    """
    if seed < 0:
        raise InputError(f"--seed {seed}: 0 or more")
    if batch_size < 1:
        raise InputError(f"--batch-size {batch_size}: at least 1")
    if null < 0:
        raise InputError(f"--null {null}: 0 or more")
    known = parse_decomposed(sites)
    for model in (pair.base, pair.unlearned):
        check_in_memory(model, _PURPOSE)
    control_model = resolve_control(pair, control)
    arms = _arms(pair, control_model, null)
    check_fits(pair.base, prompts)
    for model in (pair.base, pair.unlearned, *([control_model] if control_model else [])):
        check_in_memory(model, _PURPOSE)
        _Arm.of("", model, pair.base, known)  # tells of a missing site before anything is computed
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
    """Read a comma-separated list of sites, or a sequence of them.

    Raises:
        InputError: nothing is named, or a name is unknown.
    """
    names = [name.strip() for name in (sites.split(",") if isinstance(sites, str) else sites) if name.strip()]
    for name in names:
        if name not in SITES:
            raise InputError(f"unknown site {name!r}: what can be split are {' and '.join(SITES)}")
    if not names:
        raise InputError(f"no site is named; what can be split are {' and '.join(SITES)}")
    return tuple(site for site in SITES if site in names)


@dataclass(frozen=True, eq=False)
class _Work:
    base: Model
    prompts: Prompts
    sites: tuple[Site, ...]

    @property
    def windows(self) -> list[range]:
        """Every layer alone, and all of them."""
        n = self.base.n_layers
        return [*(range(layer, layer + 1) for layer in range(n)), *([range(n)] if n > 1 else [])]


@dataclass(frozen=True, eq=False)
class _Arm:
    """One model that is compared with the base: `main`, `control`, `null-0`."""

    name: str
    model: Model
    changes: Mapping[Site, list[Change]]

    @classmethod
    def of(cls, name: str, model: Model, base: Model, sites: Sequence[Site]) -> "_Arm":
        modules = {site: zip(site_modules(base, site), site_modules(model, site), strict=True) for site in sites}
        return cls(name, model, {site: [Change.of(*both) for both in pairs] for site, pairs in modules.items()})

    @property
    def target(self) -> str:
        """Which kind of model it is."""
        return {"main": "unlearned", "control": "control"}.get(self.name, "null")


@dataclass(frozen=True, eq=False)
class _Troupe:
    """Arms that are in memory together; null models are made when they are asked for, one at a time."""

    names: tuple[str, ...]
    models: Callable[[], tuple[Model, ...]]


def _arms(pair: ModelPair, control: Model | None, null: int) -> list[_Troupe]:
    given = {"main": pair.unlearned} | ({} if control is None else {"control": control})
    troupes = [_Troupe(tuple(given), lambda: tuple(given.values()))]
    if null:
        check_null(pair.base, pair.unlearned)
        for seed in range(null):
            make = partial(null_model, pair.base, pair.unlearned, seed=seed)
            troupes.append(_Troupe((f"null-{seed}",), lambda make=make: (make(),)))  # type: ignore[misc]
    return troupes


def _run(
    work: _Work, troupes: Sequence[_Troupe], batches: Sequence[Batch], run: Run | None, *, progress: bool
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of all examples and of all positions; batches that a run holds already are not computed again."""
    kept = [] if run is None else run.parts()
    frames = [frame for name, frame in kept if name.startswith("examples-")]
    positions = [frame for name, frame in kept if name.startswith("positions-")]
    done = {key for frame in frames for key in zip(frame["arm"], frame["example_index"], strict=True)}
    names = [name for troupe in troupes for name in troupe.names]
    pending = {
        troupe.names: [
            batch
            for batch in batches
            if not done.issuperset((name, i) for name in troupe.names for i in batch.examples)
        ]
        for troupe in troupes
    }
    n_batches = sum(len(troupe.names) * len(pending[troupe.names]) for troupe in troupes)
    with Progress(n_batches * len(work.sites) * len(work.windows), "decomposing", show=progress) as bar:
        for troupe in troupes:
            todo = pending[troupe.names]
            models = troupe.models() if todo else ()
            arms = [
                _Arm.of(name, model, work.base, work.sites) for name, model in zip(troupe.names, models, strict=False)
            ]
            paths = {arm.name: find_path(arm.model, todo[0].to(work.base.device), work.sites) for arm in arms}
            for batch in todo:
                batch = batch.to(work.base.device)
                base = record(work.base, batch, work.sites, everywhere=True)
                made = [_split(work, batch, arm, paths[arm.name], base, bar) for arm in arms]
                # Positions first: examples that are there say that both are.
                for what, table, index in (("positions", positions, 1), ("examples", frames, 0)):
                    table.append(pd.concat([parts[index] for parts in made], ignore_index=True))
                    if run is not None:
                        place = f"{batch.examples[0]:05d}-{len(batch.examples)}"
                        run.keep_part(f"{what}-{troupe.names[0]}-{place}", table[-1])
    orders: dict[str, list[str]] = {"arm": names, "site": list(work.sites), "term": list(TERMS)}
    return _in_order(frames, ["example_index"], orders), _in_order(positions, ["example_index", "position"], orders)


def _in_order(frames: Sequence[pd.DataFrame], within: list[str], orders: Mapping[str, list[str]]) -> pd.DataFrame:
    """One table by arm, site, place, term and example, however the work was cut; each row once."""
    frame = pd.concat(frames, ignore_index=True).drop_duplicates([*_PLACE, *within])
    keys = frame[[*_PLACE, *within]].assign(
        several=frame["last_layer"] > frame["first_layer"],  # all layers together come after the last one alone
        **{name: frame[name].map(order.index) for name, order in orders.items()},
    )
    keys = keys.sort_values(["arm", "site", "several", "first_layer", "term", *within])
    return frame.loc[keys.index].reset_index(drop=True)


@dataclass(frozen=True, eq=False)
class _Geometry:
    """What the terms are like at the scored positions of one place; over several layers they stand side by side.

    Attributes:
        square: ||term||^2.
        dot: <term, total>.
        base_square: ||base's output||^2.
        direct: contribution to the answer token's logit, and to it minus the vocabulary's mean.
    """

    square: Float[Tensor, "term scored"]
    dot: Float[Tensor, "term scored"]
    base_square: Float[Tensor, " scored"]
    direct: Float[Tensor, "two term scored"]

    def __add__(self, other: "_Geometry") -> "_Geometry":
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
    place = (site, layer)
    m_base = scored(base.inputs[place], batch)
    exact = torch.stack([change.term(TERMS[term], m_base, own.inputs[place]).double() for term in EXACT])
    terms = torch.einsum("tk,ksd->tsd", _MIX.to(exact.device), exact)
    ours, theirs = own.outputs[place].double(), base.outputs[place].double()
    if not (theirs - ours - terms[_TOTAL]).norm() <= CLOSURE * theirs.norm():
        raise InputError(
            f"{path.model.name}: the {site} projection of layer {layer} is more than its weight and bias "
            "(an adapter, a quantised weight), so its change cannot be split"
        )
    direct = torch.full((2, *terms.shape[:2]), torch.nan, dtype=torch.float64, device=terms.device)
    if not path.problem:
        direct = path.contributions(
            terms,
            site=site,
            layer=layer,
            output=own.outputs[place],
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
    """The rows of one batch and arm: per example, and per position."""
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
