"""Rows of the results table against a loop over logits that were made up."""

import math

import pytest
import torch
from torch import Tensor

from dissect.engine import Sweep
from dissect.interventions.arms import Arm
from dissect.interventions.intervention import Intervention
from dissect.interventions.windows import Window
from dissect.prompts.prompts import Batch, Prompt, Prompts
from dissect.scoring.rows import NO_DIFFERENCE
from dissect.sweeps.rows import score_sweep
from tests.dissect.helpers import assert_close
from unlearning.common.errors import InputError

LENGTHS = [3, 1, 2]
INTERVENTIONS = [
    Intervention(("mlp_coef", "attn_out"), Window(1, (0, 1, 2))),
    Intervention(("value_vectors",), Window(2, (2,))),
]
ITEMS = tuple(
    Prompt(f"q{i}", f"g{i % 2}", "", "", tuple(range(9)), 9 - n, range(8 - n, 8)) for i, n in enumerate(LENGTHS)
)
PROMPTS = Prompts(ITEMS, "answer", 0, "nowhere")
ROWS = [row for row, n in enumerate(LENGTHS[1:]) for _ in range(n)]
"""A batch of the second and the third prompt."""
BATCH = Batch(
    examples=(1, 2),
    input_ids=torch.zeros(2, 8, dtype=torch.long),
    attention_mask=torch.ones(2, 8, dtype=torch.long),
    position_ids=None,
    rows=torch.tensor(ROWS),
    columns=torch.tensor([7, 6, 7]),
    next_tokens=torch.tensor([4, 0, 2]),
)


def made_up(seed: int) -> Tensor:
    return torch.randn(3, 5, generator=torch.Generator().manual_seed(seed)) * 3


def rows_of(base: Tensor, target: Tensor, *intervened: Tensor) -> list[dict[str, object]]:
    sweep = Sweep(base, target, iter(intervened))
    return list(
        score_sweep(sweep, PROMPTS, BATCH, INTERVENTIONS, arm=Arm("control", "control", "base"), model_name="never")
    )


def by_hand(base: Tensor, other: Tensor, row: int) -> dict[str, float]:
    """Loss, centred loss, log-probability and divergence of one example, in double precision."""
    found: dict[str, list[float]] = {"loss": [], "centred_loss": [], "logprob": [], "kl": []}
    for place in [place for place, of in enumerate(ROWS) if of == row]:
        p, q = base[place].double(), other[place].double()
        gap = p - q
        found["loss"].append(float((gap**2).mean()))
        found["centred_loss"].append(float(((gap - gap.mean()) ** 2).mean()))
        found["logprob"].append(float(q.log_softmax(-1)[BATCH.next_tokens[place]]))
        found["kl"].append(float((p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum()))
    return {name: sum(values) / len(values) for name, values in found.items()}


def test_rows_are_what_a_loop_gives() -> None:
    base, target, first, second = (made_up(seed) for seed in range(4))
    rows = rows_of(base, target, first, second)
    assert len(rows) == 2 * 2
    places = [(number, row) for number in range(2) for row in range(2)]
    for found, (number, row) in zip(rows, places, strict=True):
        item, prompt = INTERVENTIONS[number], ITEMS[BATCH.examples[row]]
        labels = {
            "arm": "control",
            "target": "control",
            "donor": "base",
            "kind": item.kind,
            "site": ["mlp_coef+attn_out", "value_vectors"][number],
            "window": item.window.kind,
            "centre": item.window.centre,
            "first_layer": item.window.first,
            "last_layer": item.window.last,
            "example": prompt.id,
            "example_index": BATCH.examples[row],
            "group": prompt.group,
            "n_answer_tokens": LENGTHS[BATCH.examples[row]],
            "undefined": "",
        }
        assert {name: found[name] for name in labels} == labels
        own, before, after = (by_hand(base, other, row) for other in (base, target, (first, second)[number]))
        lost = own["logprob"] - before["logprob"]
        expected = {
            "loss_unlearned": before["loss"],
            "loss_intervened": after["loss"],
            "krs": 1 - after["loss"] / before["loss"],
            "centred_loss_unlearned": before["centred_loss"],
            "centred_loss_intervened": after["centred_loss"],
            "logprob_base": own["logprob"],
            "logprob_unlearned": before["logprob"],
            "logprob_intervened": after["logprob"],
            "logprob_recovery": (after["logprob"] - before["logprob"]) / lost if lost > 0 else math.nan,
            "kl_unlearned": before["kl"],
            "kl_intervened": after["kl"],
            "kl_recovery": 1 - after["kl"] / before["kl"],
        }
        assert found.keys() == labels.keys() | expected.keys()
        for name, value in expected.items():
            assert_close(found[name], value, atol=1e-4)  # type: ignore[arg-type]


def test_a_target_that_is_the_base_has_nothing_to_recover() -> None:
    base = made_up(0)
    for row in rows_of(base, base.clone(), made_up(1), base):
        assert row["undefined"] == NO_DIFFERENCE
        assert math.isnan(row["krs"])  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("which", "what"),
    [
        (1, "its own logits, without any intervention, are"),
        (2, r"mlp_coef\+attn_out @ 0..2 gives logits that are"),
        (3, "value_vectors @ 2..2 gives logits that are"),
    ],
)
def test_logits_that_are_not_finite_are_refused_by_the_model_s_name(which: int, what: str, bad: float) -> None:
    logits = [made_up(seed) for seed in range(4)]
    logits[which][2, 1] = bad
    with pytest.raises(InputError, match=f"never: {what} not finite; is the checkpoint sound"):
        rows_of(*logits)
