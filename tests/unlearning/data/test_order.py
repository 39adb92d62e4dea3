"""What each optimizer step reads: a function of the seed and the step, however many processes share it."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from unlearning.data.order import StepPlan, StepSampler

SIZES = {"n_main": st.integers(1, 12), "n_retain": st.integers(1, 30), "seed": st.integers(0, 99)}


def plans(
    n_main: int,
    n_retain: int,
    *,
    seed: int = 0,
    epoch: int = 0,
    batch_size: int = 2,
    step_batch_size: int = 4,
    rank: int = 0,
    world: int = 1,
) -> list[StepPlan]:
    """One epoch of examples whose lengths go up and down."""
    lengths = [[10 + 7 * place % 11 for place in range(n)] for n in (n_main, n_retain)]
    sampler = StepSampler(
        *lengths, seed=seed, batch_size=batch_size, step_batch_size=step_batch_size, rank=rank, world=world
    )
    sampler.set_epoch(epoch)
    return list(sampler)


@given(**SIZES, n_epochs=st.integers(1, 6), step_batch_size=st.integers(1, 8))
@settings(max_examples=60)
def test_pairing_goes_through_the_whole_retain_set(
    n_main: int, n_retain: int, seed: int, n_epochs: int, step_batch_size: int
) -> None:
    partners: list[int] = []
    for epoch in range(n_epochs):
        steps = plans(n_main, n_retain, seed=seed, epoch=epoch, step_batch_size=step_batch_size)
        assert sorted(main for plan in steps for main in plan.main) == list(range(n_main))
        assert all(len(plan.main) == len(plan.retain) <= step_batch_size for plan in steps)
        partners += [partner for plan in steps for partner in plan.retain]
    for lap in range(0, len(partners) - n_retain + 1, n_retain):
        assert sorted(partners[lap : lap + n_retain]) == list(range(n_retain))
    counts = Counter(partners)
    used = [counts[index] for index in range(n_retain)]
    assert max(used) - min(used) <= 1


@given(**SIZES, world=st.integers(1, 4), batch_size=st.integers(1, 3), accumulation=st.integers(1, 3))
@settings(max_examples=60)
def test_processes_share_the_window_of_one(
    n_main: int, n_retain: int, seed: int, world: int, batch_size: int, accumulation: int
) -> None:
    step_batch_size = world * batch_size * accumulation
    sizes = {"batch_size": batch_size, "step_batch_size": step_batch_size}
    alone = plans(n_main, n_retain, seed=seed, **sizes)
    shares = [
        plans(
            n_main, n_retain, seed=seed, batch_size=batch_size, step_batch_size=step_batch_size, rank=rank, world=world
        )
        for rank in range(world)
    ]
    for whole, *parts in zip(alone, *shares, strict=True):
        for name in ("main", "retain"):
            read = [getattr(part, f"{name}_batches") for part in parts]
            assert len({len(batches) for batches in read}) == 1  # all processes do as many passes
            assert all(len(batch) <= batch_size for batches in read for batch in batches)
            together = sorted(place for batches in read for batch in batches for place in batch)
            assert together == sorted(getattr(whole, name))
            assert all(getattr(part, name) == getattr(whole, name) for part in parts)


def test_micro_batches_hold_examples_of_similar_length() -> None:
    sampler = StepSampler([5, 50, 6, 51, 7, 52], [], seed=0, batch_size=3, step_batch_size=6)
    (plan,) = sampler
    assert sorted(map(sorted, plan.main_batches)) == [[0, 2, 4], [1, 3, 5]]
    assert plan.retain_batches == []


def test_a_window_of_one_micro_batch_keeps_its_order() -> None:
    (plan,) = plans(4, 9, batch_size=4)
    assert plan.main_batches == [plan.main]
    assert plan.retain_batches == [plan.retain]


def test_orders_depend_on_seed_and_epoch_only() -> None:
    assert plans(20, 50, seed=3, epoch=1) == plans(20, 50, seed=3, epoch=1)
    assert plans(20, 50, seed=3, epoch=1) != plans(20, 50, seed=3, epoch=0)
    assert plans(20, 50, seed=3, epoch=1) != plans(20, 50, seed=4, epoch=1)
