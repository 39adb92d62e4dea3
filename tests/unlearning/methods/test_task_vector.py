"""The task vector method: learns the forget set, then goes the other way."""

import copy

import pytest
import torch

from tests.unlearning.methods.helpers import DATA, MODEL, START, losses_of, n_answer, slow_nll
from unlearning import InputError
from unlearning.methods.task_vector import TASK_VECTOR, TaskVectorOptions


@torch.no_grad()
def test_the_forget_set_is_learned_first() -> None:
    forget, retain = losses_of(TASK_VECTOR, TaskVectorOptions(), DATA, cuts=(1,))
    total = sum(nll.item() for span in DATA.forget for nll in slow_nll(MODEL, span))
    assert forget is not None and retain is None
    assert forget.item() == pytest.approx(total / n_answer(DATA.forget), rel=1e-9)


def test_the_end_lies_opposite_to_what_was_learned() -> None:
    trained = copy.deepcopy(MODEL)
    assert TASK_VECTOR.finish is not None
    TASK_VECTOR.finish(trained, START, TaskVectorOptions(scaling=2.5))
    for after, learned, before in zip(trained.parameters(), MODEL.parameters(), START.parameters(), strict=True):
        torch.testing.assert_close(after - before, -2.5 * (learned - before))


def test_a_model_that_learned_nothing_is_refused() -> None:
    assert TASK_VECTOR.finish is not None
    with pytest.raises(InputError, match="the task vector is zero"):
        TASK_VECTOR.finish(copy.deepcopy(START), START, TaskVectorOptions())
