"""UDS, the unlearning depth score (2605.24614): what the base's upper layers can still read in another model's states.

After block l of the base, the states at the positions that predict the answer are replaced by those of a source:

    delta_l = s - s_l        (s: mean log-probability of the answer's tokens; s_l: the same with the source's states)
    KE      = {l : delta_l(control) > tau}                                  the layers that encode the knowledge
    UDS     = sum_KE delta_l(control) clip(delta_l(unlearned) / delta_l(control), 0, 1) / sum_KE delta_l(control)

UDS = 1: the unlearned model's states carry no more than the control's. UDS = 0: they carry as much as the base's own.
Results hold 1 - UDS, which is higher for more knowledge.
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
"""Loss of log-probability, in nats, above which a layer encodes a fact (the value of the paper)."""

ALL_LAYERS = "all layers"
"""The only variant of UDS."""


@dataclass(frozen=True, eq=False)
class Deltas:
    """Loss of the answer's mean log-probability in the base through a source's states, in nats.

    Attributes:
        patched: Read by the base's layers above the replaced states.
        lens: Read by the base's final norm and head alone (the fixed-decoder logit lens of the same paper).
    """

    patched: Float[np.ndarray, "layer fact"]
    lens: Float[np.ndarray, "layer fact"]


def uds(
    delta_retain: Float[np.ndarray, "layer fact"],
    delta_unlearned: Float[np.ndarray, "layer fact"],
    tau: float = TAU,
) -> Float[np.ndarray, " fact"]:
    """Return the UDS of every fact.

    Args:
        delta_retain: Loss of log-probability with the control's states (stage 1), in nats.
        delta_unlearned: Loss of log-probability with the unlearned model's states (stage 2), in nats.
        tau: Loss above which a layer encodes the fact, in nats.

    Returns:
        UDS from 0 to 1; NaN for a fact that no layer encodes.
    """
    weight = np.where(delta_retain > tau, delta_retain, 0.0)
    ratio = np.divide(delta_unlearned, delta_retain, out=np.zeros_like(weight), where=weight > 0)
    total = weight.sum(0)
    erased = (weight * ratio.clip(0, 1)).sum(0)
    return np.divide(erased, total, out=np.full(len(total), np.nan), where=total > 0)


def unlearning_depth(case: Case, *, tau: float = TAU, n_donors: int = 8) -> StressResult:
    """Compute UDS with the control as its retain model, and a measure that needs no control and clips nothing.

    Measures: `kept` decides, layer by layer: log-probability with a model's states minus that with a donor's states, as
        a
    share of the same difference for the base's own states, averaged over facts. `uds` is 1 - UDS with the control as
    the retain model: 0 for the control by definition, and 1 for the base. `uds_lens` is the same, read by the base's
    head alone. `uds_donor` has the donor in place of the control. UDS does not decide because it clips every fact at
    both ends: states that differ from the control's by noise alone score above 0.

    A donor is a question of the same kind about another person, followed by this question's answer, so that its states
    contain everything but the fact. The states of several donors are averaged.

    Args:
        case: Models and facts.
        tau: Loss above which a layer encodes the fact, in nats.
        n_donors: Number of donor questions per fact.

    Returns:
        The result of the test `uds`.

    Raises:
        InputError: The base cannot be run block by block or does not know the facts, or no question of another group
            can be a donor.
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
            f"{case.pair.base.name} does not encode these facts: with states on other questions, no layer loses more "
            f"than {tau} nats"
        )
    stage_1 = "control" if "control" in found else "donor"
    none = int(((found | {"donor": donor})[stage_1].patched <= tau).all(0).sum())
    notes = [f"{none} of {len(case.forget)} facts are encoded in no layer (tau {tau}) and have no UDS"] if none else []
    return StressResult(
        test="uds",
        level=1,
        measure="kept",
        frame=value_rows(case.forget, rows),
        proves=(
            "rho > 0: the base's upper layers read the fact from the unlearned model's states better than from the "
            "control's. It does not show that the unlearned model itself can use what they read. rho = 0 does not "
            "rule out that the states encode the fact in a form that the base's layers do not read."
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
    """Compute every source's losses, with the states of each model, and of the donors as source `donor`.

    Args:
        case: Models and facts.
        donors: Donor prompts of each fact, as `donor_items` returns them.

    Returns:
        The losses by source.

    Raises:
        InputError: The base cannot be run block by block.
    """
    base, facts = case.pair.base, case.forget
    prompts, items = facts.prompts, facts.prompts.items
    n_layers = base.n_layers
    roles = [*case.models, "donor"]
    losses = {role: Deltas(np.zeros((n_layers, len(facts))), np.zeros((n_layers, len(facts)))) for role in roles}
    for indices, batch in even_batches(prompts, items, case.batch_size):
        stream = residual_stream(base, batch)
        lens = [mean_logprobs(stream.logits(layer + 1, base), batch) for layer in range(n_layers)]
        for role in roles:
            if role == "base":
                continue  # the base's own states lose nothing
            if role == "donor":
                states = _mean_states(base, facts, [donors[index] for index in indices], case.batch_size)
            else:
                states = residual_stream(case.models[role], batch).states[1:]
            plain, patched = patched_logits(base, batch, states)
            own = mean_logprobs(plain, batch)
            for layer, logits in enumerate(patched):
                losses[role].patched[layer, indices] = own - mean_logprobs(logits, batch)
                decoded = head_logits(base, states[layer], as_tuple=stream.as_tuple)
                losses[role].lens[layer, indices] = lens[layer] - mean_logprobs(decoded, batch)
    return losses


def donor_items(facts: Facts, n: int) -> list[list[Prompt]]:
    """Find the most similar questions of other groups with other answers, each followed by this fact's answer.

    Args:
        facts: The facts.
        n: Maximum number of donors per fact.

    Returns:
        The donor prompts of each fact.

    Raises:
        InputError: A fact has no donor.
    """
    items = facts.prompts.items
    words = [words_of(item) for item in items]
    found = []
    for index, item in enumerate(items):
        others = [
            other
            for other, them in enumerate(items)
            if other != index and them.answer != item.answer and not (item.group and them.group == item.group)
        ]
        if not others:
            raise InputError(f"{item.id}: no question of another group has another answer. Give more prompts")
        # Among equally similar questions those after the fact come first, so that they differ between facts.
        others.sort(key=lambda other: (-jaccard(words[index], words[other]), (other - index) % len(items)))
        found.append([_asked_of(items[other], item) for other in others[:n]])
    return found


def _asked_of(other: Prompt, item: Prompt) -> Prompt:
    """Return another question followed by this fact's answer."""
    ids = (*other.input_ids[: other.answer_start], *item.input_ids[item.answer_start :])
    return replace(other, answer=item.answer, input_ids=ids, scored=range(other.answer_start - 1, len(ids) - 1))


def _mean_states(
    base: Model, facts: Facts, donors: Sequence[Sequence[Prompt]], batch_size: int
) -> Float[Tensor, "layer scored d_model"]:
    """Return the base's states on the donors of some facts, averaged over each fact's donors."""
    flat = [item for several in donors for item in several]
    states = states_at(base, facts.prompts, flat, batch_size=batch_size)[1:]
    counts = [len(item.scored) for item in flat]
    pieces = iter(states.split(counts, dim=1))
    return torch.cat([torch.stack([next(pieces) for _ in several]).mean(0) for several in donors], dim=1)


def _curves(found: dict[str, Deltas], tau: float) -> pd.DataFrame:
    """Return the means over facts: one row per source and layer."""
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
