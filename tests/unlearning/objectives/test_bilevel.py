"""BLUR's direction against its identities, in float64: methods.md, section 5."""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from unlearning.objectives.bilevel import Clamp, Scope, combine
from unlearning.objectives.gradients import GradientAccumulator

NAMES = [
    "model.embed_tokens.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.1.mlp.down_proj.weight",
    "model.layers.1.mlp.experts.0.weight",
    "lm_head.weight",
]
LAYERS = [[0, 5], [1, 2], [3, 4]]
SHAPES = [(5, 3), (3, 4), (3,), (3, 4), (2, 2), (3, 5)]

seeds = st.integers(0, 2**32 - 1)
gammas = st.floats(0, 10)
scales = st.floats(1e-3, 1e3)


def gradients(seed: int) -> list[Tensor]:
    """Gaussian tensors of the shapes above, in float64."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in SHAPES]


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def direction(f: Sequence[Tensor], r: Sequence[Tensor], gamma: float, **options: Any) -> Tensor:
    """d as one vector; the arguments are left as they are."""
    return flat(combine(f, [tensor.clone() for tensor in r], names=NAMES, gamma=gamma, **options)[0])


def rejected(r: Tensor, f: Tensor) -> Tensor:
    """What of r is orthogonal to f."""
    return r - (r @ f) / (f @ f) * f


@given(seeds, seeds, gammas, scales)
@settings(max_examples=60)
def test_the_forget_progress_is_gamma_whatever_the_retain_gradient(
    one: int, other: int, gamma: float, scale: float
) -> None:
    f, r = gradients(one), [scale * tensor for tensor in gradients(other)]
    d, report = combine(f, [tensor.clone() for tensor in r], names=NAMES, gamma=gamma)
    vector, f_, r_ = flat(d), flat(f), flat(r)
    tolerance = 1e-12 * (1 + scale)
    assert (vector @ f_ / (f_ @ f_)).item() == pytest.approx(gamma, abs=tolerance)
    assert report.forget_progress == pytest.approx(gamma, abs=tolerance)
    squared = gamma**2 * (f_ @ f_) + rejected(r_, f_).square().sum()
    assert (vector @ vector).item() == pytest.approx(squared.item(), rel=1e-9)
    assert report.forget_grad_norm == pytest.approx(f_.norm().item())
    assert report.retain_grad_norm == pytest.approx(r_.norm().item())
    assert report.cosine == pytest.approx(torch.cosine_similarity(f_, r_, dim=0).item())
    assert report.xi == report.xi_min == report.xi_max
    assert report.xi == pytest.approx(gamma - (r_ @ f_ / (f_ @ f_)).item(), abs=tolerance)


@given(seeds, st.floats(-100, 100), gammas)
@settings(max_examples=30)
def test_of_a_parallel_retain_gradient_nothing_is_left(seed: int, multiple: float, gamma: float) -> None:
    """Also where it points the same way: the projection is unconditional. r = 0 is the multiple 0."""
    f = gradients(seed)
    found = direction(f, [multiple * tensor for tensor in f], gamma)
    torch.testing.assert_close(found, gamma * flat(f), rtol=0, atol=1e-12 * (1 + abs(multiple)))


@given(seeds, seeds, gammas)
@settings(max_examples=30)
def test_an_orthogonal_retain_gradient_is_kept_whole(one: int, other: int, gamma: float) -> None:
    f = gradients(one)
    r = [tensor - (flat(gradients(other)) @ flat(f)) / (flat(f) @ flat(f)) * g for tensor, g in zip_of(other, f)]
    torch.testing.assert_close(direction(f, r, gamma), flat(r) + gamma * flat(f), rtol=0, atol=1e-12)


def zip_of(seed: int, f: Sequence[Tensor]) -> Any:
    return zip(gradients(seed), f, strict=True)


@given(seeds, seeds, gammas, scales)
@settings(max_examples=30)
def test_scaling_the_forget_loss_scales_the_gamma_term_only(one: int, other: int, gamma: float, scale: float) -> None:
    f, r = gradients(one), gradients(other)
    scaled = direction([scale * tensor for tensor in f], r, gamma)
    torch.testing.assert_close(scaled - direction(f, r, gamma), (scale - 1) * gamma * flat(f), rtol=1e-9, atol=1e-11)


@given(seeds, seeds, st.floats(0.1, 2000))
@settings(max_examples=30)
def test_the_rmu_form_is_alpha_times_gamma_of_one_over_alpha(one: int, other: int, alpha: float) -> None:
    """d = f + alpha (r - f <r, f> / ||f||^2)."""
    f, r = gradients(one), gradients(other)
    expected = flat(f) + alpha * rejected(flat(r), flat(f))
    torch.testing.assert_close(alpha * direction(f, r, 1 / alpha), expected, rtol=1e-9, atol=1e-9)


def test_the_two_gradients_are_not_interchangeable() -> None:
    """Swapped, it is the forget gradient that loses its component along the other one."""
    f, r = gradients(0), [2 * tensor + one for tensor, one in zip_of(1, gradients(0))]
    ours, swapped = direction(f, r, 1.0), direction(r, f, 1.0)
    assert (ours - swapped).norm() > 0.1 * ours.norm()
    torch.testing.assert_close(swapped, flat(r) + rejected(flat(f), flat(r)))


@given(seeds, seeds, gammas, st.sampled_from(get_args(Scope)), st.sampled_from(get_args(Clamp)))
@settings(max_examples=40)
def test_swapped_is_the_same_rule_with_the_gradients_exchanged(
    one: int, other: int, gamma: float, scope: Scope, clamp: Clamp
) -> None:
    f, r = gradients(one), gradients(other)
    options: dict[str, Any] = {"names": NAMES, "gamma": gamma, "scope": scope, "clamp": clamp}
    kept = [tensor.clone() for tensor in r]
    overwritten = [tensor.clone() for tensor in f]
    d, report = combine(overwritten, kept, first="retain", **options)
    assert all(ours is theirs for ours, theirs in zip(d, overwritten, strict=True))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(kept, r, strict=True))
    torch.testing.assert_close(flat(d), direction(r, f, gamma, scope=scope, clamp=clamp), rtol=0, atol=0)
    assert report.forget_grad_norm == pytest.approx(flat(f).norm().item())
    assert report.retain_grad_norm == pytest.approx(flat(r).norm().item())
    assert report.forget_progress is None
    if scope == "global" and clamp == "none":
        assert (flat(d) @ flat(r)).item() == pytest.approx(gamma * (flat(r) @ flat(r)).item(), abs=1e-9)
        assert report.retain_progress == pytest.approx(gamma, abs=1e-9)
        torch.testing.assert_close(flat(d), gamma * flat(r) + rejected(flat(f), flat(r)), rtol=0, atol=1e-9)


@pytest.mark.parametrize("clamp", get_args(Clamp))
@pytest.mark.parametrize("scope", get_args(Scope))
def test_scopes_and_clamps_against_the_definition(scope: Scope, clamp: Clamp) -> None:
    groups = {"global": [[*range(6)]], "layer": LAYERS, "tensor": [[place] for place in range(6)]}[scope]
    signs = set()
    for seed in range(6):
        f, r, gamma = gradients(2 * seed), gradients(2 * seed + 1), 0.2
        expected = [tensor.clone() for tensor in r]
        coefficients = []
        for places in groups:
            f_, r_ = flat([f[place] for place in places]), flat([r[place] for place in places])
            dot, squared = (r_ @ f_).item(), (f_ @ f_).item()
            xi = {
                "none": gamma - dot / squared,
                "nonnegative": max(0.0, gamma - dot / squared),
                "pcgrad": gamma - (dot / squared if dot < 0 else 0.0),
            }[clamp]
            coefficients.append(xi)
            signs.add(dot < 0)
            for place in places:
                expected[place] += xi * f[place]
        d, report = combine(f, r, names=NAMES, gamma=gamma, scope=scope, clamp=clamp)
        torch.testing.assert_close(d, expected)
        assert report.xi == pytest.approx(sum(coefficients) / len(coefficients))
        assert (report.xi_min, report.xi_max) == pytest.approx((min(coefficients), max(coefficients)))
        progress = (flat(expected) @ flat(f) / (flat(f) @ flat(f))).item()
        assert report.forget_progress == pytest.approx(progress)
        if clamp == "none":  # each group moves gamma along its own forget gradient, and so do all
            assert report.forget_progress == pytest.approx(gamma)
        else:  # both only ever add forgetting
            assert report.forget_progress >= gamma - 1e-12
    assert signs == {True, False}, "the case distinguishes the clamps"


def test_pcgrad_leaves_an_agreeing_retain_gradient_alone() -> None:
    f = gradients(0)
    r = [0.5 * tensor for tensor in f]
    torch.testing.assert_close(direction(f, r, 1.0, clamp="pcgrad"), 1.5 * flat(f))
    torch.testing.assert_close(direction(f, r, 1.0), flat(f))
    torch.testing.assert_close(direction(f, [-tensor for tensor in r], 1.0, clamp="pcgrad"), flat(f))
    torch.testing.assert_close(direction(f, [3 * tensor for tensor in f], 1.0, clamp="nonnegative"), 3 * flat(f))


def test_without_a_forget_gradient_the_retain_gradient_is_all() -> None:
    f, r = [torch.zeros(shape) for shape in SHAPES], [tensor.float() for tensor in gradients(1)]
    kept = flat(r).clone()
    d, report = combine(f, r, names=NAMES)
    assert torch.equal(flat(d), kept)
    assert report.as_logs() == {"forget_grad_norm": 0.0, "retain_grad_norm": pytest.approx(kept.norm().item())}


def test_a_group_without_a_forget_gradient_is_the_only_one_left_alone() -> None:
    """As are the blocks above the layer that an activation loss reads."""
    f, r = gradients(0), gradients(1)
    for place in LAYERS[2]:
        f[place].zero_()
    kept = flat([r[place] for place in LAYERS[2]]).clone()
    d, report = combine(f, r, names=NAMES, scope="layer", gamma=2.0)
    assert torch.equal(flat([d[place] for place in LAYERS[2]]), kept)
    assert report.forget_progress == pytest.approx(2.0)
    assert set(report.as_logs()) == set(vars(report)) - {"retain_progress"}


def test_the_direction_is_written_over_the_retain_gradient() -> None:
    f, r = gradients(0), gradients(1)
    kept = flat(f).clone()
    d, _ = combine(f, r, names=NAMES)
    assert [tensor.data_ptr() for tensor in d] == [tensor.data_ptr() for tensor in r]
    assert torch.equal(flat(f), kept)


def test_values_whose_squares_underflow_float32_are_projected_all_the_same() -> None:
    f = [(1e-30 * tensor).float() for tensor in gradients(0)]
    r = [tensor.float() for tensor in gradients(1)]

    def overlap(tensors: Sequence[Tensor]) -> float:
        return abs((flat(tensors).double() @ flat(gradients(0))).item())

    before = overlap(r)
    d, report = combine(f, r, names=NAMES, gamma=1.0, eps=0.0)
    assert overlap(d) < 1e-5 < before
    assert report.forget_grad_norm == pytest.approx(1e-30 * flat(gradients(0)).norm().item())


@pytest.mark.parametrize("clamp", get_args(Clamp))
def test_a_forget_gradient_that_is_not_finite_shows(clamp: Clamp) -> None:
    f, r = gradients(0), gradients(1)
    f[3][0, 0] = math.nan
    d, report = combine(f, r, names=NAMES, clamp=clamp)
    assert not flat(d).isfinite().all()
    assert math.isnan(report.forget_grad_norm)


# From losses to the direction of a window: a small network, losses normalised by the window.


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def window() -> tuple[Tensor, Tensor]:
    """Inputs and targets of the forget and the retain side, 8 rows each, of different kinds."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(2, 8, 4, dtype=torch.float64, generator=generator)
    targets = torch.randn(2, 8, 2, dtype=torch.float64, generator=generator)
    targets[1, ::2] *= -5
    return inputs, targets


def backward(model: nn.Module, side: int, rows: slice) -> None:
    """Of the window's loss, the share of these rows."""
    inputs, targets = window()
    (nn.functional.mse_loss(model(inputs[side, rows]), targets[side, rows], reduction="sum") / 8).backward()


def window_direction(sizes: Sequence[int]) -> tuple[Tensor, float | None]:
    """BLUR's direction of the window cut into micro-batches of these sizes, and the measured progress."""
    model = network()
    accumulator = GradientAccumulator(model.parameters())
    sums = []
    for side in (0, 1):
        for start, size in zip(accumulate(sizes, initial=0), sizes, strict=False):
            backward(model, side, slice(start, start + size))
            accumulator.add()
        sums.append(accumulator.take())
    names = [name for name, _ in model.named_parameters()]
    d, report = combine(sums[0], sums[1], names=names, gamma=1.5)
    return flat(d), report.forget_progress


@given(st.lists(st.integers(1, 7), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) <= 8))
@settings(max_examples=15)
def test_a_window_gives_one_direction_however_it_is_cut(sizes: list[int]) -> None:
    whole, progress = window_direction([8])
    cut, cut_progress = window_direction([*sizes, 8 - sum(sizes)] if sum(sizes) < 8 else sizes)
    torch.testing.assert_close(cut, whole, rtol=1e-10, atol=1e-13)
    assert cut_progress == pytest.approx(1.5) and progress == pytest.approx(1.5)


def test_averaging_the_micro_batches_directions_is_something_else() -> None:
    model = network()
    names = [name for name, _ in model.named_parameters()]

    def direction_of(rows: slice) -> Tensor:
        sides = []
        for side in (0, 1):
            model.zero_grad()
            backward(model, side, rows)
            sides.append([parameter.grad.clone() for parameter in model.parameters()])  # type: ignore[union-attr]
        return flat(combine(*sides, names=names, gamma=1.5)[0])

    whole, _ = window_direction([1] * 8)
    torch.testing.assert_close(direction_of(slice(0, 8)), whole)
    pieces = sum((direction_of(slice(row, row + 1)) for row in range(8)), torch.zeros_like(whole))
    assert (pieces - whole).norm() > 0.1 * whole.norm()
