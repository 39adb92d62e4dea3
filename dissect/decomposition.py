"""Coefficients or value vectors: the exact split of what unlearning changed in each layer's MLP and attention output.

Per layer the change of a projection's output between base and target is split into a weight, a coefficient and an
interaction term (`decomposition_terms`), measured where the answer is predicted, and added to the target to see what
of the base's behaviour comes back. It takes no side, as comparing an activation patch with a weight swap does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from dissect import zoo
from dissect.decomposition_results import DecompositionResult, load_decompose
from dissect.decomposition_scoring import Scorer, example_rows, position_rows
from dissect.decomposition_terms import (
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
from dissect.direct_logits import DirectPath, find_path
from dissect.pairs import Model, ModelPair, check_comparable, load_model
from dissect.progress import Progress
from dissect.prompts import Batch, Prompts
from dissect.runs import Run, Stopwatch, open_run, peak_memory_bytes
from unlearning.errors import InputError

CLOSURE = 1e-3
"""Relative gap above which the three terms do not explain what the modules gave."""

_MIX = torch.tensor(list(TERMS.values()), dtype=torch.float64)
_TOTAL = list(TERMS).index(TOTAL)
_PLACE = ["target", "site", "first_layer", "last_layer", "term"]


def decompose(
    pair: ModelPair,
    prompts: Prompts,
    *,
    sites: str | Sequence[str] = SITES,
    control: str | Model | None = "auto",
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
    clock = Stopwatch()
    if seed < 0:
        raise InputError(f"--seed {seed}: 0 or more")
    if batch_size < 1:
        raise InputError(f"--batch-size {batch_size}: at least 1")
    known = parse_decomposed(sites)
    control_model = _find_control(pair, control)
    targets = {"unlearned": pair.unlearned} | ({} if control_model is None else {"control": control_model})
    changes = _changes(pair.base, targets, known)
    _check_tokens(pair.base, prompts)
    configuration = {
        "command": "decompose",
        "base_sha256": pair.base.sha256,
        "unlearned_sha256": pair.unlearned.sha256,
        "control_sha256": control_model.sha256 if control_model else None,
        "data_sha256": prompts.sha256,
        "examples": len(prompts),
        "scoring": prompts.scoring,
        "sites": list(known),
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
    work = _Work(pair.base, targets, changes, prompts, known)
    try:
        frame, positions = _run(work, batches, run, progress=progress)
    except BaseException:
        if run is not None:
            run.pause(wall_time_s=clock.seconds)
        raise
    measured = {"peak_memory_bytes": peak_memory_bytes()}
    result = DecompositionResult(frame, positions, configuration, provenance, clock.seconds, measured)
    if run is not None:
        result.write(run)
        result.wall_time_s = run.record["wall_time_s"]
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
    targets: Mapping[str, Model]
    changes: Mapping[tuple[str, Site], list[Change]]
    prompts: Prompts
    sites: tuple[Site, ...]

    @property
    def windows(self) -> list[range]:
        """Every layer alone, and all of them."""
        n = self.base.n_layers
        return [*(range(layer, layer + 1) for layer in range(n)), *([range(n)] if n > 1 else [])]


def _find_control(pair: ModelPair, control: str | Model | None) -> Model | None:
    for model in (pair.base, pair.unlearned):
        _check_in_memory(model)
    if control == "auto":
        control = zoo.default_control(pair.base.name)
    if isinstance(control, str):
        control = load_model(control, device=str(pair.base.device), dtype=pair.base.dtype)
    if control is not None:
        check_comparable(pair.base, control)
        _check_in_memory(control)
    return control


def _check_in_memory(model: Model) -> None:
    if model.streamed is not None:
        raise InputError(
            f"{model.name} is streamed from disk, and a split needs the weights of both models; load it (--no-stream)"
        )


def _check_tokens(model: Model, prompts: Prompts) -> None:
    vocabulary = model.hf.config.get_text_config().vocab_size
    for item in prompts.items:
        if len(item.input_ids) > model.context:
            raise InputError(
                f"prompt {item.id} has {len(item.input_ids)} tokens with its answer, and the context of {model.name} "
                f"is {model.context}; shorten or remove it"
            )
        if max(item.input_ids) >= vocabulary:
            raise InputError(
                f"prompt {item.id} has the token {max(item.input_ids)}, and {model.name} has {vocabulary} of them; "
                "the tokenizer is not this model's: copy its own beside the base's weights"
            )


def _changes(base: Model, targets: Mapping[str, Model], sites: Sequence[Site]) -> dict[tuple[str, Site], list[Change]]:
    return {
        (name, site): [
            Change.of(theirs, ours)
            for theirs, ours in zip(site_modules(base, site), site_modules(target, site), strict=True)
        ]
        for site in sites
        for name, target in targets.items()
    }


def _run(
    work: _Work, batches: Sequence[Batch], run: Run | None, *, progress: bool
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of all examples and of all positions; batches that a run holds already are not computed again."""
    kept = [] if run is None else run.parts()
    frames = [frame for name, frame in kept if name.startswith("examples-")]
    positions = [frame for name, frame in kept if name.startswith("positions-")]
    done = {example for frame in frames for example in frame["example_index"]}
    pending = [batch for batch in batches if not done.issuperset(batch.examples)]
    paths: dict[str, DirectPath] = {}
    n_runs = len(pending) * len(work.targets) * len(work.sites) * len(work.windows) * len(TERMS)
    with Progress(n_runs, "decomposing", show=progress) as bar:
        for batch in pending:
            batch = batch.to(work.base.device)
            base = record(work.base, batch, work.sites, everywhere=True)
            made: list[tuple[pd.DataFrame, pd.DataFrame]] = []
            for name, target in work.targets.items():
                if name not in paths:
                    paths[name] = find_path(target, batch, work.sites)
                made.append(_split(work, batch, name, paths[name], base, bar))
            # Positions first: examples that are there say that both are.
            for what, table, index in (("positions", positions, 1), ("examples", frames, 0)):
                table.append(pd.concat([parts[index] for parts in made], ignore_index=True))
                if run is not None:
                    run.keep_part(f"{what}-{batch.examples[0]:05d}-{len(batch.examples)}", table[-1])
    return _in_order(frames, ["example_index"], work), _in_order(positions, ["example_index", "position"], work)


def _in_order(frames: Sequence[pd.DataFrame], within: list[str], work: _Work) -> pd.DataFrame:
    """One table by target, site, place, term and example, however the work was cut; each row once."""
    frame = pd.concat(frames, ignore_index=True).drop_duplicates([*_PLACE, *within])
    ranks: dict[str, list[str]] = {"target": list(work.targets), "site": list(work.sites), "term": list(TERMS)}
    keys = frame[[*_PLACE, *within]].assign(
        # All layers together come after the last one alone.
        first_layer=frame["first_layer"] + (frame["last_layer"] > frame["first_layer"]) * work.base.n_layers,
        **{name: frame[name].map(order.index) for name, order in ranks.items()},
    )
    return frame.loc[keys.sort_values([*_PLACE, *within]).index].reset_index(drop=True)


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
    if (theirs - ours - terms[_TOTAL]).norm() > CLOSURE * theirs.norm():
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
    work: _Work, batch: Batch, name: str, path: DirectPath, base: Recorded, bar: Progress
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of one batch and target: per example, and per position."""
    target = work.targets[name]
    own = record(target, batch, work.sites, everywhere=False)
    score = Scorer.of(base, batch)
    before = score(own.logits, f"{target.name}: no intervention")
    resumed = own if can_resume(target, batch, own) else None
    examples, positions = [], []
    for site in work.sites:
        changes = work.changes[name, site]
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
                    "target": name,
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
                after = score(logits, f"{target.name}: {term} of {site} in layers {window[0]} to {window[-1]}")
                positions.append(position_rows(where, batch, measures, work.prompts))
                examples.append(example_rows(where, batch, measures, before, after, path.problem, work.prompts))
                bar.advance(1)
    return pd.concat(examples, ignore_index=True), pd.concat(positions, ignore_index=True)
