"""The causal sweeps as stress tests: how much of the base's behaviour comes back, beyond what comes back in any model.

Activations and weights of the base carry the answers with them, so a sweep restores some of the base's behaviour even
in the control. The same sweep is therefore run into the unlearned model and into the control, and rho is the share
that it closes of what the control leaves open:

    rho = (KRS of unlearned - KRS of control) / (1 - KRS of control)    with the base's KRS 1 by definition

Variants are sites and windows. Variants under which the control's KRS exceeds `guard` are left out: there the base's
own states give the answer, and what remains is a small difference over a small gap. The unlearned model has no part in
this choice, so the choice does not favour it. Of the other variants the strongest counts, chosen separately for the
unlearned model and the control as in every test, because the best centre of a sweep is not known beforehand.

`krs_net` is KRS minus the KRS of the same patch with the base's states on another question, example by example. A
negative KRS of the other patch is not subtracted: harm done by another patch is no merit of this one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from dissect.decomposition.run import decompose
from dissect.models.pair import ModelPair
from dissect.models.sites import PATCH_SITES, site_label
from dissect.stress.core.case import Case, spread
from dissect.stress.core.distractors import Facts
from dissect.stress.core.result import StressResult, value_rows
from dissect.sweeps.patching import patch
from dissect.sweeps.restoration import restore
from unlearning.common.errors import InputError
from unlearning.common.runs import Stopwatch

GUARD = 0.5
"""KRS of the control above which a variant is left out."""

OTHER = "other-question"

Frames = Mapping[str, pd.DataFrame]
"""The table of a sweep into a model, with a column `variant`, by the model's role."""


def patching_sweep(
    case: Case,
    *,
    sites: Sequence[str] = tuple(map(site_label, PATCH_SITES)),
    window: int = 5,
    guard: float = GUARD,
    limit: int = 40,
) -> StressResult:
    """Run `dissect.patch` into the unlearned model and the control.

    Without a control, the result is compared with patching the base's states on another question.

    Args:
        case: Models and facts.
        sites: Activation sites to patch, such as `mlp_coef` or `mlp_coef+attn_out`.
        window: Number of layers patched together; reduced if the models have fewer.
        guard: KRS of the control above which a variant is left out.
        limit: Use at most this many facts.

    Returns:
        The result of the test `patching`.

    Raises:
        InputError: `dissect.patch` raises it, or the unlearned model has nothing to recover.
    """
    clock, facts = Stopwatch(), spread(case.forget, limit)
    width = _widest(case, window)

    def sweep(pair: ModelPair) -> pd.DataFrame:
        return patch(
            pair,
            facts.prompts,
            sites=sites,
            window=width,
            control=None,
            donor=OTHER,
            batch_size=case.batch_size,
            seed=case.seed,
            progress=case.progress,
        ).frame

    described = _Sweep(
        test="patching",
        stand_in=OTHER,
        proves=(
            "rho > 0: with the base's activations patched in, the unlearned model answers more like the base than "
            "the control does, so the machinery that reads these activations survives. rho = 0: the patch helps no "
            "more than in the control. Neither shows what the unlearned weights hold."
        ),
        settings={"sites": list(sites), "window": width},
    )
    return _result(case, facts, _swept(case, sweep), described, guard=guard, clock=clock)


def restoration_sweep(
    case: Case,
    *,
    sites: Sequence[str] = ("value_vectors",),
    window: int = 5,
    null: int = 2,
    guard: float = GUARD,
    limit: int = 40,
) -> StressResult:
    """Run `dissect.restore` into the unlearned model and the control.

    Without a control, the result is compared with null models.

    Args:
        case: Models and facts.
        sites: Weight sites to restore, such as `value_vectors`.
        window: Number of layers restored together; reduced if the models have fewer.
        null: Without a control, number of null models: the base moved at random as far as unlearning moved it.
        guard: KRS of the control above which a variant is left out.
        limit: Use at most this many facts.

    Returns:
        The result of the test `restoration`.

    Raises:
        InputError: `dissect.restore` raises it, or the unlearned model has nothing to recover.
    """
    clock, facts = Stopwatch(), spread(case.forget, limit)
    width = _widest(case, window)

    def sweep(pair: ModelPair) -> pd.DataFrame:
        return restore(
            pair,
            facts.prompts,
            sites=sites,
            window=width,
            control=None,
            null=null if case.control is None else 0,
            batch_size=case.batch_size,
            seed=case.seed,
            progress=case.progress,
        ).frame

    described = _Sweep(
        test="restoration",
        stand_in="null",
        proves=(
            "rho > 0: with some of the base's weights restored, the unlearned model answers more like the base than"
            " the control does, so the other weights that the answers need survive. rho = 0: restoring them helps "
            "no more than in the control."
        ),
        settings={"sites": list(sites), "window": width, "null": null},
    )
    return _result(case, facts, _swept(case, sweep), described, guard=guard, clock=clock)


def decomposition_sweep(
    case: Case,
    *,
    sites: Sequence[str] = ("mlp_out", "attn_out"),
    terms: Sequence[str] = ("weight", "coefficient"),
    null: int = 2,
    guard: float = GUARD,
    limit: int = 16,
) -> StressResult:
    """Run `dissect.decompose` on the unlearned model and the control.

    Without a control, the result is compared with null models.

    Args:
        case: Models and facts.
        sites: Outputs to decompose (see `dissect.decompose`).
        terms: Terms of the decomposition; each is a variant at every layer and in all layers.
        null: Without a control, number of null models: the base moved at random as far as unlearning moved it.
        guard: KRS of the control above which a variant is left out.
        limit: Use at most this many facts.

    Returns:
        The result of the test `decomposition`.

    Raises:
        InputError: `dissect.decompose` raises it, a term is unknown, or the unlearned model has nothing to recover.
    """
    clock, facts = Stopwatch(), spread(case.forget, limit)

    def sweep(pair: ModelPair) -> pd.DataFrame:
        frame = decompose(
            pair,
            facts.prompts,
            sites=sites,
            control=None,
            null=null if case.control is None else 0,
            batch_size=case.batch_size,
            seed=case.seed,
            progress=case.progress,
        ).frame
        known = list(frame["term"].unique())
        if not terms or not set(terms) <= set(known):
            raise InputError(f"`terms` must be some of {', '.join(known)}, got {', '.join(terms) or 'none'}")
        return frame[frame["term"].isin(terms)]

    described = _Sweep(
        test="decomposition",
        stand_in="null",
        proves=(
            "rho > 0: with the change of a layer's weights or coefficients undone, the unlearned model answers more"
            " like the base than the control does, so the other parts that the answers need survive. rho = 0: "
            "undoing the change helps no more than in the control."
        ),
        settings={"sites": list(sites), "terms": list(terms), "null": null},
    )
    return _result(case, facts, _swept(case, sweep), described, guard=guard, clock=clock)


@dataclass(frozen=True)
class _Sweep:
    """Description of a sweep.

    Attributes:
        test: Name of the test.
        stand_in: The arm that replaces the control if there is none.
        proves: What the test can and cannot show.
        settings: Everything that the numbers depend on besides models and facts.
    """

    test: str
    stand_in: str
    proves: str
    settings: Mapping[str, Any]


def _swept(case: Case, sweep: Callable[[ModelPair], pd.DataFrame]) -> Frames:
    """Run the same sweep into every model but the base, which is the donor."""
    base = case.pair.base
    return {role: _named(sweep(ModelPair(base, model))) for role, model in case.models.items() if role != "base"}


def _widest(case: Case, window: int) -> int:
    """Return the window, or the largest odd number of layers that the models have."""
    n = case.pair.n_layers
    return min(window, n if n % 2 else n - 1)


def _named(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a sweep's table with a column `variant`: site (and term) and layers."""
    layers = np.where(
        frame["first_layer"] == frame["last_layer"],
        "layer " + frame["first_layer"].astype(str),
        "layers " + frame["first_layer"].astype(str) + "-" + frame["last_layer"].astype(str),
    )
    what = frame["site"] if "term" not in frame else frame["site"] + " " + frame["term"]
    return frame.assign(variant=what + ", " + layers)


def _values(frame: pd.DataFrame, arm: str, measure: str) -> pd.DataFrame:
    """Return one arm's values, examples as rows and variants as columns; several null models are averaged."""
    here = frame[frame["arm"].str.startswith(arm)]
    table = here.groupby(["example_index", "variant"], sort=False)[measure].mean().unstack("variant")
    return table.sort_index()[list(dict.fromkeys(frame["variant"]))]


def _result(case: Case, facts: Facts, frames: Frames, sweep: _Sweep, *, guard: float, clock: Stopwatch) -> StressResult:
    """Make the result of the same sweep into every model.

    Args:
        case: Models and facts.
        facts: The facts that were scored.
        frames: The sweep's table for every model but the base.
        sweep: Description of the sweep.
        guard: KRS of the control above which a variant is left out.
        clock: Stopwatch that was started with the test.

    Returns:
        The result.

    Raises:
        InputError: The unlearned model gives the base's logits on every fact.
    """
    stand_in = sweep.stand_in
    found = {
        role: {measure: _values(frame, "main", measure) for measure in ("krs", "logprob_recovery")}
        for role, frame in frames.items()
    }
    if found["unlearned"]["krs"].isna().all(axis=None):
        raise InputError(
            f"{sweep.test}: {case.pair.unlearned.name} gives the base's logits on every fact, so there is nothing to "
            "recover"
        )
    others = {role: _values(frame, OTHER, "krs") for role, frame in frames.items() if OTHER in set(frame["arm"])}
    for role, other in others.items():
        found[role]["krs_net"] = found[role]["krs"] - other.clip(lower=0)
    notes, floors = [], {}
    variants = list(found["unlearned"]["krs"].columns)
    given = (found["control"]["krs"] if "control" in found else _values(frames["unlearned"], stand_in, "krs")).mean()
    kept = variants
    if "control" in found:
        kept = (
            [name for name in variants if given[name] <= guard] or list(given.dropna().nsmallest(1).index) or variants
        )
        if len(kept) < len(variants):
            notes.append(
                f"{len(variants) - len(kept)} of {len(variants)} variants were left out, because the control's KRS is "
                f"above {guard:g}: there the base's own states or weights give the answer"
            )
    else:
        what = "the base's states on another question" if stand_in == OTHER else "models moved at random"
        floors = {"krs": max(0.0, float(given.max()))} | ({"krs_net": 0.0} if others else {})
        notes.append(
            f"there is no control, so {what} are used instead (highest KRS {given.max():.2f}); what comes from the "
            "base carries answers into any model, so a residual above zero is only a hint"
        )
    other_question = others.get("control", others.get("unlearned"))
    rows = []
    for name in kept:
        all_back = {"krs": np.ones(len(facts)), "logprob_recovery": np.ones(len(facts))}
        if other_question is not None:
            all_back["krs_net"] = 1 - other_question[name].clip(lower=0).to_numpy()
        rows.append(("base", name, all_back))
        for role, measures in found.items():
            rows.append((role, name, {measure: table[name].to_numpy() for measure, table in measures.items()}))
    conditions = pd.DataFrame({role: measures["krs"].mean() for role, measures in found.items()}).rename_axis("variant")
    for role, other in others.items():
        conditions[f"{role} from {OTHER}"] = other.mean()
    if "control" not in found and stand_in != OTHER:
        conditions[stand_in] = given
    return StressResult(
        test=sweep.test,
        level=2,
        measure="krs",
        frame=value_rows(facts, rows),
        proves=sweep.proves,
        settings=dict(sweep.settings) | {"guard": guard, "n_facts": len(facts), "seed": case.seed},
        seconds=clock.seconds,
        floors=floors,
        notes=tuple(notes),
        seed=case.seed,
        tables={"variants": conditions.assign(kept=conditions.index.isin(kept)).reset_index()},
    )
