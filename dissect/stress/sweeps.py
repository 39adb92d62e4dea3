"""The causal sweeps as stress tests: what of the base's behaviour comes back, beyond what comes back in any model.

Activations and weights of the base carry the answers with them, so a sweep brings some of the base back into a model
that never knew as well. The same sweep is run into the unlearned and the never model, and rho is what it closes of what
the never model leaves open:

    rho = (KRS of unlearned - KRS of never) / (1 - KRS of never)    with the base's KRS 1 by definition

Variants are sites and windows. Those where the never model gets back more than half are left out (`guard`): there the
base's own states do the answering, and whatever remains is a small difference over a small gap. The unlearned model
has no say in that, so it favours nothing. Of the others the peak counts, the unlearned and the never model's each, as
in every test: where a sweep has its best centre is not known beforehand, and the never model's peak is as free.

`krs_net` is KRS minus what the same patch brings back with the base's states on another question, example by example.
Where those only do harm, nothing is subtracted: harm done by another patch is no merit of this one.
"""

from collections.abc import Callable, Mapping, Sequence
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
"""KRS of the never model above which a place is left out."""

OTHER = "other-question"

Frames = Mapping[str, pd.DataFrame]
"""The table of a sweep into a model, by the model's role, with a column `variant`."""


def patching_sweep(
    case: Case,
    *,
    sites: Sequence[str] = tuple(map(site_label, PATCH_SITES)),
    window: int = 5,
    guard: float = GUARD,
    limit: int = 40,
) -> StressResult:
    """`dissect.patch` into the unlearned and the never model; without the latter, against another question's states.

    Args:
        case: models and facts.
        sites: activations, as `mlp_coef` or `mlp_coef+attn_out`.
        window: layers patched together; fewer where the models have fewer.
        guard: see `GUARD`.
        limit: most facts that are asked.

    Raises:
        InputError: what `patch` raises, or an unlearned model that has nothing to recover.
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

    return _result(
        case,
        facts,
        "patching",
        _swept(case, sweep),
        stand_in=OTHER,
        guard=guard,
        proves=(
            "Above zero: with the base's activations put in, the unlearned model answers more like the base than a "
            "never model does, so the machinery that reads them survives. At zero: no more than in any model; neither "
            "says what the unlearned weights hold."
        ),
        settings={"sites": list(sites), "window": width},
        clock=clock,
    )


def restoration_sweep(
    case: Case,
    *,
    sites: Sequence[str] = ("value_vectors",),
    window: int = 5,
    null: int = 2,
    guard: float = GUARD,
    limit: int = 40,
) -> StressResult:
    """`dissect.restore` into the unlearned and the never model; without the latter, against null models.

    Args:
        case: models and facts.
        sites: weights, as `value_vectors`.
        window: see `patching_sweep`.
        null: models moved from the base at random as far as unlearning moved it, where there is no never model.
        guard: see `GUARD`.
        limit: see `patching_sweep`.

    Raises:
        InputError: what `restore` raises, or an unlearned model that has nothing to recover.
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

    return _result(
        case,
        facts,
        "restoration",
        _swept(case, sweep),
        stand_in="null",
        guard=guard,
        proves=(
            "Above zero: with some of the base's weights put back, the unlearned model answers more like the base than "
            "a never model does, so the rest of what answering takes survives. At zero: no more than in any model."
        ),
        settings={"sites": list(sites), "window": width, "null": null},
        clock=clock,
    )


def decomposition_sweep(
    case: Case,
    *,
    sites: Sequence[str] = ("mlp_out", "attn_out"),
    terms: Sequence[str] = ("weight", "coefficient"),
    null: int = 2,
    guard: float = GUARD,
    limit: int = 16,
) -> StressResult:
    """`dissect.decompose` of the unlearned and the never model; without the latter, against null models.

    Args:
        case: models and facts.
        sites: see `decompose`.
        terms: of the split; each is a variant at every layer and in all of them.
        null: see `restoration_sweep`.
        guard: see `GUARD`.
        limit: see `patching_sweep`.

    Raises:
        InputError: what `decompose` raises, unknown terms, or an unlearned model that has nothing to recover.
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
        unknown = sorted(set(terms) - set(frame["term"]))
        if unknown or not terms:
            raise InputError(f"decomposition sweep: unknown term {unknown}; known are {list(frame['term'].unique())}")
        return frame[frame["term"].isin(terms)]

    return _result(
        case,
        facts,
        "decomposition",
        _swept(case, sweep),
        stand_in="null",
        guard=guard,
        proves=(
            "Above zero: with the change of a layer's weights or coefficients undone, the unlearned model answers more "
            "like the base than a never model does, so the rest survives. At zero: no more than in any model."
        ),
        settings={"sites": list(sites), "terms": list(terms), "null": null},
        clock=clock,
    )


def _swept(case: Case, sweep: Callable[[ModelPair], pd.DataFrame]) -> Frames:
    """The same sweep into every model but the base, which it is taken from."""
    base = case.pair.base
    return {role: _named(sweep(ModelPair(base, model))) for role, model in case.models.items() if role != "base"}


def _widest(case: Case, window: int) -> int:
    n = case.pair.n_layers
    return min(window, n if n % 2 else n - 1)


def _named(frame: pd.DataFrame) -> pd.DataFrame:
    """A sweep's table with the name of each place in a column `variant`."""
    layers = np.where(
        frame["first_layer"] == frame["last_layer"],
        "layer " + frame["first_layer"].astype(str),
        "layers " + frame["first_layer"].astype(str) + "-" + frame["last_layer"].astype(str),
    )
    what = frame["site"] if "term" not in frame else frame["site"] + " " + frame["term"]
    return frame.assign(variant=what + ", " + layers)


def _values(frame: pd.DataFrame, arm: str, measure: str) -> pd.DataFrame:
    """One arm's values, examples by variants; several null models are averaged."""
    here = frame[frame["arm"].str.startswith(arm)]
    table = here.groupby(["example_index", "variant"], sort=False)[measure].mean().unstack("variant")
    return table.sort_index()[list(dict.fromkeys(frame["variant"]))]


def _result(
    case: Case,
    facts: Facts,
    test: str,
    frames: Frames,
    *,
    stand_in: str,
    guard: float,
    proves: str,
    settings: dict[str, Any],
    clock: Stopwatch,
) -> StressResult:
    """The result of the same sweep into every model.

    Args:
        stand_in: the arm that tells what the sweep gives to anything, where there is no never model.
    """
    found = {
        role: {measure: _values(frame, "main", measure) for measure in ("krs", "logprob_recovery")}
        for role, frame in frames.items()
    }
    if found["unlearned"]["krs"].isna().all(axis=None):
        raise InputError(
            f"{test}: {case.pair.unlearned.name} gives the base's logits on every fact; there is nothing to recover"
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
                f"left out: {len(variants) - len(kept)} of {len(variants)} places, where the never model's KRS is "
                f"above {guard:g}: there the base's own part does the answering"
            )
    else:
        what = "the base's states on another question" if stand_in == OTHER else "models moved at random as far"
        floors = {"krs": max(0.0, float(given.max()))} | ({"krs_net": 0.0} if others else {})
        notes.append(
            f"no never model: {what} stand in (KRS {given.max():.2f} at best). The base's part carries answers into "
            "any model, so a residual above zero is no more than a hint"
        )
    control = others.get("control", others.get("unlearned"))
    rows = []
    for name in kept:
        all_back = {"krs": np.ones(len(facts)), "logprob_recovery": np.ones(len(facts))}
        if control is not None:
            all_back["krs_net"] = 1 - control[name].clip(lower=0).to_numpy()
        rows.append(("base", name, all_back))
        for role, measures in found.items():
            rows.append((role, name, {measure: table[name].to_numpy() for measure, table in measures.items()}))
    places = pd.DataFrame({role: measures["krs"].mean() for role, measures in found.items()}).rename_axis("variant")
    for role, other in others.items():
        places[f"{role} from {OTHER}"] = other.mean()
    if "control" not in found and stand_in != OTHER:
        places[stand_in] = given
    return StressResult(
        test=test,
        level=2,
        measure="krs",
        frame=value_rows(facts, rows),
        proves=proves,
        settings=settings | {"guard": guard, "n_facts": len(facts), "seed": case.seed},
        seconds=clock.seconds,
        floors=floors,
        notes=tuple(notes),
        seed=case.seed,
        tables={"places": places.assign(kept=places.index.isin(kept)).reset_index()},
    )
