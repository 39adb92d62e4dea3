"""UDS, the unlearning depth score (2605.24614): what the base's upper layers still read in another model's states.

After block l of the base the states at the positions that predict the answer are replaced by a source's:

    delta_l = s - s_l        (s: mean log-probability of the answer's tokens; s_l: with the source's states)
    KE      = {l : delta_l(never) > tau}                                           the layers that encode the knowledge
    UDS     = sum_KE delta_l(never) clip(delta_l(unlearned) / delta_l(never), 0, 1) / sum_KE delta_l(never)

1: the unlearned model's states carry no more than a never-trained one's; 0: as much as the base's own. Results have
1 - UDS, which is higher where more is known.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from dissect.models.model import Model
from dissect.prompts.prompts import Prompt
from dissect.stress.core.case import Case
from dissect.stress.core.distractors import Facts, jaccard, words_of
from dissect.stress.core.residual_stream import (
    even_batches,
    head_logits,
    mean_logprobs,
    patched_logits,
    residual_stream,
    states_at,
)
from dissect.stress.core.result import StressResult, value_rows
from unlearning.common.errors import InputError

TAU = 0.05
"""Nats that the never model's states must cost for their layer to encode the fact (the paper's)."""

ALL_LAYERS = "all layers"
"""The one variant of UDS."""


@dataclass(frozen=True, eq=False)
class Deltas:
    """What a source's states take from the answer's mean log-probability in the base, in nats.

    Attributes:
        patched: by the base's layers above the one whose states are replaced.
        lens: by the base's final norm and head alone (the fixed-decoder logit lens of the same paper).
    """

    patched: Float[np.ndarray, "layer fact"]
    lens: Float[np.ndarray, "layer fact"]


def uds(
    delta_retain: Float[np.ndarray, "layer fact"],
    delta_unlearned: Float[np.ndarray, "layer fact"],
    tau: float = TAU,
) -> Float[np.ndarray, " fact"]:
    """UDS of every fact; NaN where no layer encodes it.

    Args:
        delta_retain: loss of log-probability with the never model's states (stage 1).
        delta_unlearned: the same with the unlearned model's (stage 2).
        tau: see `TAU`.
    """
    weight = np.where(delta_retain > tau, delta_retain, 0.0)
    ratio = np.divide(delta_unlearned, delta_retain, out=np.zeros_like(weight), where=weight > 0)
    total = weight.sum(0)
    erased = (weight * ratio.clip(0, 1)).sum(0)
    return np.divide(erased, total, out=np.full(len(total), np.nan), where=total > 0)


def unlearning_depth(case: Case, *, tau: float = TAU, n_donors: int = 8) -> StressResult:
    """UDS with the never model as the retain model, and a variant that needs none and clips nothing.

    Measures: `kept` decides, by layer: log-probability with a model's states minus that with a donor's, as a share of
    what the base's own states gain over it in the mean of the facts. `uds` is 1 - UDS with the never model as the
    retain model, 0 for it by definition and 1 for the base; `uds_lens` the same read by the base's head alone;
    `uds_donor` the same with the donor in the never model's place. UDS clips every fact at both ends, so that states
    that differ from the never model's by noise alone are above 0: it does not decide.

    A donor is a question of the same kind about someone else, with this question's answer after it, so that all that a
    source can know is there but the fact; the states of several are averaged.

    Args:
        case: models and facts.
        tau: see `TAU`.
        n_donors: other questions for each.

    Raises:
        InputError: a base that cannot be run block by block or does not know the facts, or no question of another
            group to take states from.
    """
    started = time.perf_counter()
    donors = donor_items(case.forget, n_donors)
    found = source_deltas(case, donors)
    donor = found.pop("donor")
    rows: list[tuple[str, str, dict[str, Float[np.ndarray, " fact"]]]] = []
    scale = donor.patched.mean(1)
    for role, deltas in found.items():
        for layer in np.flatnonzero(scale > tau):
            kept = (donor.patched[layer] - deltas.patched[layer]) / scale[layer]
            rows.append((role, f"layer {layer}", {"kept": kept}))
        columns = {"uds_donor": 1 - uds(donor.patched, deltas.patched, tau)}
        if "control" in found:
            columns["uds"] = 1 - uds(found["control"].patched, deltas.patched, tau)
            columns["uds_lens"] = 1 - uds(found["control"].lens, deltas.lens, tau)
        rows.append((role, ALL_LAYERS, columns))
    if not (scale > tau).any():
        raise InputError(
            f"{case.pair.base.name}: states on other questions cost no layer more than {tau} nats, so the base does "
            "not encode these facts: there is nothing to look for"
        )
    stage_1 = "control" if "control" in found else "donor"
    none = int(((found | {"donor": donor})[stage_1].patched <= tau).all(0).sum())
    notes = [f"no layer encodes {none} of {len(case.forget)} facts (tau {tau}): they have no UDS"] if none else []
    return StressResult(
        test="uds",
        level=1,
        measure="kept",
        frame=value_rows(case.forget, rows),
        proves=(
            "Above zero, the base's upper layers read the fact in the unlearned model's states better than in those of "
            "one that never knew it. It does not show that the unlearned model itself can use what they read."
        ),
        settings={"tau": tau, "n_donors": n_donors, "positions": "answer"},
        seconds=time.perf_counter() - started,
        floors={"kept": 0.0},
        notes=tuple(notes),
        seed=case.seed,
        tables={"layers": _curves(found | {"donor": donor}, tau)},
    )


@torch.inference_mode()
def source_deltas(case: Case, donors: Sequence[Sequence[Prompt]]) -> dict[str, Deltas]:
    """What each source's states take from the base, by the source's role, `donor` among them.

    Args:
        case: models and facts.
        donors: for each fact, what the base reads where its states on other questions are the source.
    """
    base, facts = case.pair.base, case.forget
    prompts, items = facts.prompts, facts.prompts.items
    n_layers = base.n_layers
    roles = [*case.models, "donor"]
    losses = {role: Deltas(np.zeros((n_layers, len(facts))), np.zeros((n_layers, len(facts)))) for role in roles}
    for places, batch in even_batches(prompts, items, case.batch_size):
        stream = residual_stream(base, batch)
        lens = [mean_logprobs(stream.logits(layer + 1, base), batch) for layer in range(n_layers)]
        for role in roles:
            if role == "base":
                continue  # its own states: nothing is lost
            if role == "donor":
                states = _mean_states(base, facts, [donors[place] for place in places], case.batch_size)
            else:
                states = residual_stream(case.models[role], batch).states[1:]
            plain, patched = patched_logits(base, batch, states)
            own = mean_logprobs(plain, batch)
            for layer, logits in enumerate(patched):
                losses[role].patched[layer, places] = own - mean_logprobs(logits, batch)
                decoded = head_logits(base, states[layer], as_tuple=stream.as_tuple)
                losses[role].lens[layer, places] = lens[layer] - mean_logprobs(decoded, batch)
    return losses


def donor_items(facts: Facts, n: int) -> list[list[Prompt]]:
    """For each fact the most similar questions of other groups with other answers, and this fact's answer after them.

    Raises:
        InputError: there is none.
    """
    items = facts.prompts.items
    words = [words_of(item) for item in items]
    found = []
    for place, item in enumerate(items):
        others = [
            other
            for other, them in enumerate(items)
            if other != place and them.answer != item.answer and not (item.group and them.group == item.group)
        ]
        if not others:
            raise InputError(f"{item.id}: no other group has a question with another answer; give more prompts")
        # Those after it first, so that equally similar ones are not the same for every fact.
        others.sort(key=lambda other: (-jaccard(words[place], words[other]), (other - place) % len(items)))
        found.append([_asked_of(items[other], item) for other in others[:n]])
    return found


def _asked_of(other: Prompt, item: Prompt) -> Prompt:
    ids = (*other.input_ids[: other.answer_start], *item.input_ids[item.answer_start :])
    return replace(other, answer=item.answer, input_ids=ids, scored=range(other.answer_start - 1, len(ids) - 1))


def _mean_states(
    base: Model, facts: Facts, donors: Sequence[Sequence[Prompt]], batch_size: int
) -> Float[Tensor, "layer scored d_model"]:
    """The base's states on the donors of some facts, the mean over each fact's."""
    flat = [item for several in donors for item in several]
    states = states_at(base, facts.prompts, flat, batch_size=batch_size)[1:]
    counts = [len(item.scored) for item in flat]
    pieces = iter(states.split(counts, dim=1))
    return torch.cat([torch.stack([next(pieces) for _ in several]).mean(0) for several in donors], dim=1)


def _curves(found: dict[str, Deltas], tau: float) -> pd.DataFrame:
    """Means over facts: one row per source and layer."""
    return pd.DataFrame(
        {
            "source": role,
            "layer": layer,
            "delta": float(deltas.patched[layer].mean()),
            "delta_lens": float(deltas.lens[layer].mean()),
            "share_above_tau": float((deltas.patched[layer] > tau).mean()),
        }
        for role, deltas in found.items()
        for layer in range(len(deltas.patched))
    )
