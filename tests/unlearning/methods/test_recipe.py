"""The recipe's rule: rates fall with the size, small data sets get enough steps, processes share a step."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unlearning.methods import METHODS
from unlearning.methods.recipe import Recipe, with_recipe
from unlearning.options import TrainOptions

SIZES = st.integers(10**5, 10**11)
COUNTS = st.integers(1, 5000)


def test_the_rate_meets_the_published_one() -> None:
    """8e-4 for a million parameters, and 1e-5 where the papers use it, at 6 to 8 billion."""
    recipe = Recipe(learning_rate=8e-4)
    assert recipe.rate(10**6) == 8e-4
    assert recipe.rate(7 * 10**9) == pytest.approx(1e-5, rel=0.1)
    assert recipe.rate(10**6, adapter=True) == 8e-3


@given(SIZES, SIZES)
def test_the_rate_never_rises_with_the_number_of_parameters(one: int, other: int) -> None:
    small, large = sorted((one, other))
    assert Recipe().rate(small) >= Recipe().rate(large) > 0


@given(COUNTS, st.integers(1, 64), st.sampled_from(sorted(METHODS)))
def test_every_run_has_the_steps_of_the_recipe(n_examples: int, batch_size: int, method: str) -> None:
    recipe = METHODS[method].recipe
    options = with_recipe(
        TrainOptions(batch_size=batch_size), recipe, n_parameters=10**6, n_examples=n_examples, n_processes=1
    )
    assert options.epochs is not None and options.gradient_accumulation_steps is not None
    step = batch_size * options.gradient_accumulation_steps
    assert math.ceil(n_examples / step) * options.epochs >= recipe.steps
    assert options.epochs >= recipe.epochs
    assert step <= max(recipe.step_batch, batch_size)


@given(COUNTS, st.integers(1, 8))
def test_processes_share_the_step_of_one(n_examples: int, batch_size: int) -> None:
    one = with_recipe(TrainOptions(batch_size=2 * batch_size), Recipe(), n_parameters=10**6, n_examples=n_examples)
    two = with_recipe(
        TrainOptions(batch_size=batch_size), Recipe(), n_parameters=10**6, n_examples=n_examples, n_processes=2
    )
    assert (one.epochs, one.gradient_accumulation_steps) == (two.epochs, two.gradient_accumulation_steps)


def test_what_the_user_sets_stays() -> None:
    given_options = TrainOptions(learning_rate=0.5, epochs=3, gradient_accumulation_steps=7, lr_schedule="cosine")
    assert with_recipe(given_options, Recipe(), n_parameters=10**9, n_examples=5) == given_options
