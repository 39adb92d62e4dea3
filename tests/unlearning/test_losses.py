"""Losses against slow loops in float64 and against their identities."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unlearning import losses


def random_case(seed: int, lengths: list[int], vocab: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    n_tokens = sum(lengths)
    logits = 3 * torch.randn(n_tokens, vocab, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocab, (n_tokens,), generator=generator)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return logits, targets, sequence


def slow_sequence_nll(logits: Tensor, targets: Tensor, sequence: Tensor, n_sequences: int) -> list[float]:
    sums = [0.0] * n_sequences
    for row, target, place in zip(logits.tolist(), targets.tolist(), sequence.tolist(), strict=True):
        log_z = math.log(sum(math.exp(z) for z in row))
        sums[place] += log_z - row[target]
    return sums


def slow_npo(nll: list[float], reference: list[float], beta: float) -> float:
    terms = [math.log(1 / (1 + math.exp(-beta * (ours - ref)))) for ours, ref in zip(nll, reference, strict=True)]
    return -(2 / beta) * sum(terms) / len(terms)


@given(seed=st.integers(0, 10_000), lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_sequence_nll_equals_a_loop(seed: int, lengths: list[int]) -> None:
    logits, targets, sequence = random_case(seed, lengths)
    fast = losses.sequence_nll(losses.token_nll(logits, targets), sequence, len(lengths))
    assert fast.tolist() == pytest.approx(slow_sequence_nll(logits, targets, sequence, len(lengths)), abs=1e-10)


def test_pooled_cross_entropy_weighs_tokens_not_sequences() -> None:
    logits, targets, sequence = random_case(0, [1, 5])
    sums = slow_sequence_nll(logits, targets, sequence, 2)
    pooled = losses.pooled_cross_entropy(losses.token_nll(logits, targets), 6).item()
    assert pooled == pytest.approx(sum(sums) / 6, abs=1e-12)
    assert pooled != pytest.approx((sums[0] / 1 + sums[1] / 5) / 2, abs=1e-3)


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits, targets, _ = random_case(1, [4])
    half = losses.token_nll(logits.bfloat16(), targets)
    assert half.dtype == torch.float32
    exact = losses.token_nll(logits.bfloat16().double(), targets)
    torch.testing.assert_close(half.double(), exact, atol=1e-5, rtol=0)


@given(
    nll=st.lists(st.floats(0, 60), min_size=1, max_size=6),
    shift=st.floats(-20, 20),
    beta=st.sampled_from([0.05, 0.1, 1.0, 2.5]),
)
@settings(max_examples=60, deadline=None)
def test_npo_equals_a_loop(nll: list[float], shift: float, beta: float) -> None:
    reference = [value + shift * (place + 1) / len(nll) for place, value in enumerate(nll)]
    fast = losses.npo(
        torch.tensor(nll, dtype=torch.float64),
        torch.tensor(reference, dtype=torch.float64),
        beta=beta,
        n_sequences=len(nll),
    )
    assert fast.item() == pytest.approx(slow_npo(nll, reference, beta), abs=1e-9)
    assert fast.item() >= 0


def test_npo_is_not_a_log_sigmoid_of_the_batch_mean() -> None:
    nll, reference = [1.0, 30.0], [20.0, 2.0]
    value = losses.npo(torch.tensor(nll), torch.tensor(reference), beta=0.5, n_sequences=2).item()
    of_the_mean = slow_npo([sum(nll) / 2], [sum(reference) / 2], 0.5)
    assert value > of_the_mean + 1  # Jensen: -log sigmoid is convex


@pytest.mark.parametrize(("beta", "value"), [(0.1, 13.8629), (1.0, 1.3863)])
def test_npo_at_the_reference_is_two_over_beta_log_two(beta: float, value: float) -> None:
    nll = torch.tensor([3.0, 50.0, 0.2])
    assert losses.npo(nll, nll, beta=beta, n_sequences=3).item() == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize("beta", [0.1, 1.0, 4.5])
def test_npo_gradient_at_the_reference_is_gradient_ascent_on_sequence_sums(beta: float) -> None:
    logits, targets, sequence = random_case(2, [1, 4, 2])
    logits.requires_grad_(True)
    nll = losses.sequence_nll(losses.token_nll(logits, targets), sequence, 3)
    (npo_gradient,) = torch.autograd.grad(
        losses.npo(nll, nll.detach(), beta=beta, n_sequences=3), logits, retain_graph=True
    )
    (ascent,) = torch.autograd.grad(-nll.mean(), logits, retain_graph=True)
    torch.testing.assert_close(npo_gradient, ascent, atol=1e-12, rtol=0)
    (pooled,) = torch.autograd.grad(-nll.sum() / 7, logits)
    assert not torch.allclose(npo_gradient, pooled)


def test_npo_gradient_carries_the_papers_weights() -> None:
    nll = torch.tensor([1.0, 9.0, 40.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([2.0, 4.0, 5.0], dtype=torch.float64)
    losses.npo(nll, reference, beta=0.3, n_sequences=3).backward()
    p, p_ref = (-nll.detach()).exp(), (-reference).exp()
    weight = 2 * p**0.3 / (p**0.3 + p_ref**0.3)
    assert nll.grad is not None
    torch.testing.assert_close(nll.grad, -weight / 3, atol=1e-12, rtol=0)


def test_npo_approaches_gradient_ascent_as_beta_vanishes() -> None:
    nll = torch.tensor([1.0, 9.0, 4.0], dtype=torch.float64)
    reference = torch.tensor([2.0, 4.0, 5.0], dtype=torch.float64)
    log_ratio = -(nll - reference).mean()

    def error(beta: float) -> float:
        value = losses.npo(nll, reference, beta=beta, n_sequences=3) - (2 / beta) * math.log(2)
        return abs((value - log_ratio).item())

    assert error(1e-3) < 2e-2
    assert error(1e-3) / error(1e-2) == pytest.approx(0.1, rel=0.01)  # of the order of beta


@given(cut=st.integers(1, 5), seed=st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_a_windows_loss_does_not_depend_on_how_it_is_cut(cut: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    nll = 10 * torch.rand(6, generator=generator, dtype=torch.float64)
    reference = 10 * torch.rand(6, generator=generator, dtype=torch.float64)
    pieces = list(zip(nll.split([cut, 6 - cut]), reference.split([cut, 6 - cut]), strict=True))
    whole = losses.npo(nll, reference, beta=0.4, n_sequences=6)
    torch.testing.assert_close(sum(losses.npo(a, b, beta=0.4, n_sequences=6) for a, b in pieces), whole)
    torch.testing.assert_close(
        sum(losses.pooled_cross_entropy(a, 6) for a, _ in pieces), losses.pooled_cross_entropy(nll, 6)
    )
