"""Every score against slow loops over single numbers, and the properties that its definition promises."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from dissect.scoring.recovery import (
    LOSS_FLOOR,
    answer_logprob,
    centred_logit_mse,
    kl_from_base,
    knowledge_recovery_score,
    logit_mse,
    logprob_recovery,
    per_example,
)
from tests.dissect.helpers import assert_close

ROWS = torch.tensor([0, 0, 0, 1, 3, 3])
NEXT = torch.tensor([4, 0, 2, 6, -1, 5])


def random_logits(seed: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(6, 7, generator=generator, dtype=torch.float64) * 3).to(dtype)


def slow_logprobs(row: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in row)
    return [math.log(math.exp(value) / total) for value in row]


def slow_mse(ours: list[float], theirs: list[float]) -> float:
    return sum((a - b) ** 2 for a, b in zip(ours, theirs, strict=True)) / len(ours)


def slow_centred(ours: list[float], theirs: list[float]) -> float:
    ours = [value - sum(ours) / len(ours) for value in ours]
    theirs = [value - sum(theirs) / len(theirs) for value in theirs]
    return slow_mse(ours, theirs)


def slow_kl(base: list[float], model: list[float]) -> float:
    pairs = zip(slow_logprobs(base), slow_logprobs(model), strict=True)
    return sum(math.exp(p) * (p - q) for p, q in pairs)


def slow_per_example(values: list[float], rows: list[int], n: int) -> list[float]:
    kept = [
        [v for v, r in zip(values, rows, strict=True) if r == example and not math.isnan(v)] for example in range(n)
    ]
    return [sum(part) / len(part) if part else math.nan for part in kept]


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_losses_equal_slow_loops(dtype: torch.dtype, atol: float) -> None:
    base, model = random_logits(0, dtype=dtype), random_logits(1, dtype=dtype)
    rows = list(zip(base.double().tolist(), model.double().tolist(), strict=True))
    expected = torch.tensor([slow_mse(a, b) for a, b in rows], dtype=torch.float64)
    assert_close(logit_mse(base, model), expected, atol=atol)
    expected = torch.tensor([slow_centred(a, b) for a, b in rows], dtype=torch.float64)
    assert_close(centred_logit_mse(base, model), expected, atol=atol)
    kl = kl_from_base(base.log_softmax(-1), model.log_softmax(-1))
    assert_close(kl, torch.tensor([slow_kl(a, b) for a, b in rows], dtype=torch.float64), atol=atol)
    for values in (logit_mse(base, model), centred_logit_mse(base, model), kl):
        assert values.dtype == torch.float64


def test_answer_logprob_is_that_of_the_next_token_and_nan_where_there_is_none() -> None:
    logits = random_logits(2)
    expected = [
        slow_logprobs(row)[token] if token >= 0 else math.nan
        for row, token in zip(logits.tolist(), NEXT.tolist(), strict=True)
    ]
    ours = answer_logprob(logits.log_softmax(-1), NEXT)
    assert_close(ours, torch.tensor(expected, dtype=torch.float64), atol=1e-12)
    assert ours[4].isnan()


def test_means_are_taken_per_example_over_the_numbers_it_has() -> None:
    values = torch.tensor([1.0, math.nan, 3.0, math.nan, 5.0, 8.0], dtype=torch.float64)
    ours = per_example(values, ROWS, 4)
    assert_close(ours, torch.tensor([2.0, math.nan, math.nan, 6.5]), atol=0)
    generator = torch.Generator().manual_seed(0)
    many = torch.randn(200, generator=generator)
    rows = torch.randint(9, (200,), generator=generator).sort().values
    expected = slow_per_example(many.tolist(), rows.tolist(), 9)
    assert_close(per_example(many, rows, 9), torch.tensor(expected, dtype=torch.float64), atol=1e-12)


def losses(intervened: Tensor, base: Tensor) -> Tensor:
    return per_example(logit_mse(base, intervened), ROWS, 4)


def test_krs_is_zero_for_the_targets_logits_and_one_for_the_bases() -> None:
    base, target = random_logits(0), random_logits(1)
    before = losses(target, base)
    assert_close(knowledge_recovery_score(losses(target, base), before), torch.tensor([0, 0, math.nan, 0]), atol=0)
    assert_close(knowledge_recovery_score(losses(base, base), before), torch.tensor([1, 1, math.nan, 1]), atol=0)


def test_krs_of_a_step_towards_the_base_is_one_minus_the_square_of_what_is_left() -> None:
    base, target = random_logits(0), random_logits(1)
    for step, expected in ((0.5, 0.75), (0.9, 0.99), (-1.0, -3.0), (2.0, 0.0)):
        krs = knowledge_recovery_score(losses(target + step * (base - target), base), losses(target, base))
        assert_close(krs[[0, 1, 3]], torch.full((3,), expected, dtype=torch.float64), atol=1e-9)


POSITIVE = st.floats(1e-6, 1e6)


@given(after=POSITIVE, before=POSITIVE, scale=st.floats(1e-3, 1e3))
def test_krs_does_not_change_when_both_losses_are_scaled(after: float, before: float, scale: float) -> None:
    def krs(factor: float) -> float:
        pair = [torch.tensor([value * factor], dtype=torch.float64) for value in (after, before)]
        return knowledge_recovery_score(*pair).item()

    assert math.isclose(krs(1), krs(scale), rel_tol=1e-9, abs_tol=1e-9 * max(1, after / before))


def test_krs_without_a_loss_is_nan_never_infinite() -> None:
    before = torch.tensor([0.0, LOSS_FLOOR, 2 * LOSS_FLOOR, math.nan], dtype=torch.float64)
    krs = knowledge_recovery_score(torch.full((4,), 0.5, dtype=torch.float64), before)
    assert krs.isnan().tolist() == [True, True, False, True]
    assert not krs.isinf().any()


def test_logprob_recovery_is_the_share_of_what_was_lost() -> None:
    base = torch.tensor([-1.0, -1.0, -1.0, -1.0, -3.0], dtype=torch.float64)
    target = torch.tensor([-5.0, -5.0, -5.0, -1.0, -2.0], dtype=torch.float64)
    after = torch.tensor([-1.0, -4.0, -7.0, -2.0, -2.5], dtype=torch.float64)
    expected = torch.tensor([1.0, 0.25, -0.5, math.nan, math.nan])
    assert_close(logprob_recovery(after, target, base), expected, atol=1e-12)


def logit_rows(n: int = 2) -> Any:
    return hnp.arrays(np.float64, (n, 5), elements=st.floats(-20, 20, width=32))


@settings(max_examples=50)
@given(logits=logit_rows(), shift=st.floats(-50, 50))
def test_centred_loss_does_not_see_what_a_softmax_does_not(logits: np.ndarray, shift: float) -> None:
    base, model = torch.from_numpy(logits)
    plain = centred_logit_mse(base[None], model[None])
    assert_close(centred_logit_mse(base[None] + shift, model[None]), plain, atol=1e-8)
    raw = logit_mse(base[None], model[None]).item()
    mean = (base - model).mean().item()
    assert math.isclose(raw, plain.item() + mean**2, rel_tol=1e-9, abs_tol=1e-8)  # variance + squared mean


@settings(max_examples=50)
@given(logits=logit_rows())
def test_kl_is_never_negative_and_bounds_the_distance_of_the_distributions(logits: np.ndarray) -> None:
    base, model = torch.from_numpy(logits).log_softmax(-1)
    kl = kl_from_base(base[None], model[None]).item()
    assert kl >= -1e-12
    total_variation = (base.exp() - model.exp()).abs().sum().item() / 2
    assert kl >= 2 * total_variation**2 - 1e-12  # Pinsker: zero only where the two are equal
    assert kl_from_base(base[None], base[None]).item() == 0
