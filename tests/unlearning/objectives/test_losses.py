"""Losses against slow loops in float64 and against their identities."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unlearning.objectives import losses


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
@settings(max_examples=40)
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
@settings(max_examples=60)
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


def shifted(nll: list[float], shift: float) -> list[float]:
    return [value + shift * (place + 1) / len(nll) for place, value in enumerate(nll)]


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def wide(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


NLLS = st.lists(st.floats(0, 60), min_size=1, max_size=6)
SHIFTS = st.floats(-20, 20)
BETAS = st.sampled_from([0.05, 0.1, 1.0, 2.5])


@given(nll=NLLS, lose_shift=SHIFTS, win_shift=SHIFTS, beta=BETAS)
@settings(max_examples=40)
def test_dpo_equals_a_loop(nll: list[float], lose_shift: float, win_shift: float, beta: float) -> None:
    win, win_reference = [value / 2 for value in nll], shifted([value / 2 for value in nll], win_shift)
    reference = shifted(nll, lose_shift)
    terms = []
    for w, w_ref, ours, ref in zip(win, win_reference, nll, reference, strict=True):
        r_win, r_lose = -(w - w_ref), -(ours - ref)
        terms.append(log_sigmoid(beta * (r_win - r_lose)))
    fast = losses.dpo(wide(win), wide(win_reference), wide(nll), wide(reference), beta=beta, n_sequences=len(nll))
    assert fast.item() == pytest.approx(-(2 / beta) * sum(terms) / len(terms), abs=1e-9)
    assert fast.item() >= 0


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_dpo_at_the_reference_is_two_over_beta_log_two(beta: float) -> None:
    win, lose = wide([4.0, 1.0]), wide([7.0, 30.0])
    value = losses.dpo(win, win, lose, lose, beta=beta, n_sequences=2).item()
    assert value == pytest.approx(2 / beta * math.log(2), abs=1e-12)


def test_dpo_of_an_answer_against_itself_is_constant() -> None:
    nll = wide([3.0, 9.0]).requires_grad_(True)
    reference = wide([1.0, 20.0])
    loss = losses.dpo(nll, reference, nll, reference, beta=0.3, n_sequences=2)
    assert loss.item() == pytest.approx(2 / 0.3 * math.log(2), abs=1e-12)
    (gradient,) = torch.autograd.grad(loss, nll)
    assert gradient.tolist() == [0, 0]


def test_dpo_without_the_winning_term_is_npo() -> None:
    nll, reference, nothing = wide([3.0, 9.0]), wide([1.0, 20.0]), wide([0.0, 0.0])
    dpo = losses.dpo(nothing, nothing, nll, reference, beta=0.3, n_sequences=2)
    torch.testing.assert_close(dpo, losses.npo(nll, reference, beta=0.3, n_sequences=2))


def test_dpo_raises_the_winner_as_much_as_it_lowers_the_loser() -> None:
    win, lose = wide([2.0, 5.0]).requires_grad_(True), wide([3.0, 9.0]).requires_grad_(True)
    losses.dpo(win, wide([4.0, 1.0]), lose, wide([1.0, 20.0]), beta=0.3, n_sequences=2).backward()
    assert win.grad is not None and lose.grad is not None
    torch.testing.assert_close(win.grad, -lose.grad)
    assert (win.grad > 0).all()  # minimising lowers the winner's negative log-likelihood


@given(nll=NLLS, shift=SHIFTS, estimate=st.floats(-5, 5), beta=BETAS)
@settings(max_examples=40)
def test_kto_equals_a_loop(nll: list[float], shift: float, estimate: float, beta: float) -> None:
    reference = shifted(nll, shift)
    ratios = [ref - ours for ours, ref in zip(nll, reference, strict=True)]
    z = max(0.0, estimate)
    expected = {
        "clamped": [-(2 / beta) * log_sigmoid(beta * (z - r)) for r in ratios],
        "kto_sigmoid": [1 - (2 / beta) / (1 + math.exp(-(estimate - beta * r))) for r in ratios],
        "kto_logsigmoid": [1 - (2 / beta) * log_sigmoid(estimate - beta * r) for r in ratios],
    }
    for variant, terms in expected.items():
        fast = losses.kto(
            wide(nll),
            wide(reference),
            kl_estimate=estimate,
            beta=beta,
            n_sequences=len(nll),
            variant=variant,  # type: ignore[arg-type]
        )
        assert fast.item() == pytest.approx(sum(terms) / len(terms), abs=1e-9)


@pytest.mark.parametrize("estimate", [0.0, -3.0])
def test_kto_at_the_reference_is_npo_at_the_reference(estimate: float) -> None:
    nll = wide([3.0, 50.0, 0.2]).requires_grad_(True)
    loss = losses.kto(nll, nll.detach(), kl_estimate=estimate, beta=0.1, n_sequences=3)
    assert loss.item() == pytest.approx(13.8629, abs=1e-4)
    (gradient,) = torch.autograd.grad(loss, nll)
    torch.testing.assert_close(gradient, wide([-1 / 3] * 3))  # of -mean_b L_b = mean_b log p


def test_kto_forgets_less_eagerly_the_further_the_model_has_drifted() -> None:
    nll, reference = wide([3.0]).requires_grad_(True), wide([3.0])

    def push(estimate: float) -> float:
        loss = losses.kto(nll, reference, kl_estimate=estimate, beta=0.5, n_sequences=1)
        return abs(torch.autograd.grad(loss, nll)[0].item())

    assert push(4.0) < push(1.0) < push(0.0) == push(-4.0)


def test_sequence_mean_divides_by_each_sequences_own_length() -> None:
    logits, targets, sequence = random_case(3, [1, 5, 2])
    sums = slow_sequence_nll(logits, targets, sequence, 3)
    means = losses.sequence_mean_nll(losses.token_nll(logits, targets), sequence, 3)
    assert means.tolist() == pytest.approx([sums[0], sums[1] / 5, sums[2] / 2], abs=1e-10)


@given(mean=st.lists(st.floats(0, 12), min_size=1, max_size=6), beta=BETAS, delta=st.sampled_from([0.0, 0.5, 3.0]))
@settings(max_examples=40)
def test_simnpo_equals_a_loop(mean: list[float], beta: float, delta: float) -> None:
    terms = [log_sigmoid(beta * (value - delta)) for value in mean]
    fast = losses.simnpo(wide(mean), beta=beta, delta=delta, n_sequences=len(mean))
    assert fast.item() == pytest.approx(-(2 / beta) * sum(terms) / len(terms), abs=1e-9)
    assert fast.item() >= 0


def test_simnpo_at_the_margin_is_two_over_beta_log_two() -> None:
    value = losses.simnpo(wide([1.5, 1.5]), beta=4.5, delta=1.5, n_sequences=2).item()
    assert value == pytest.approx(2 / 4.5 * math.log(2), abs=1e-12)


def test_simnpo_gradient_is_the_closed_form() -> None:
    mean = wide([0.1, 2.0, 9.0]).requires_grad_(True)
    losses.simnpo(mean, beta=2.5, delta=0.7, n_sequences=3).backward()
    expected = -2 * torch.sigmoid(-2.5 * (mean.detach() - 0.7)) / 3
    assert mean.grad is not None
    torch.testing.assert_close(mean.grad, expected)


def test_simnpo_approaches_gradient_ascent_on_token_means_as_beta_vanishes() -> None:
    logits, targets, sequence = random_case(2, [1, 4, 2])
    logits.requires_grad_(True)
    mean = losses.sequence_mean_nll(losses.token_nll(logits, targets), sequence, 3)
    (gradient,) = torch.autograd.grad(losses.simnpo(mean, beta=1e-8, delta=0, n_sequences=3), logits, retain_graph=True)
    (ascent,) = torch.autograd.grad(-mean.mean(), logits)
    torch.testing.assert_close(gradient, ascent, atol=1e-7, rtol=0)


def test_a_sequence_twice_as_long_at_equal_loss_weighs_the_same_in_simnpo() -> None:
    logits, targets, sequence = random_case(5, [3, 2])
    first = sequence == 0
    doubled = [torch.cat([tensor[first], tensor]) for tensor in (logits, targets, sequence)]

    def value(logits: Tensor, targets: Tensor, sequence: Tensor) -> float:
        mean = losses.sequence_mean_nll(losses.token_nll(logits, targets), sequence, 2)
        return losses.simnpo(mean, beta=2.5, delta=0.0, n_sequences=2).item()

    assert value(*doubled) == pytest.approx(value(logits, targets, sequence), abs=1e-12)


Case = tuple[Tensor, Tensor, Tensor, Tensor]  # logits, reference logits, targets, sequence


def of_sequences(case: Case) -> tuple[Tensor, Tensor]:
    logits, reference, targets, sequence = case
    n_sequences = int(sequence.max()) + 1
    ours = losses.sequence_nll(losses.token_nll(logits, targets), sequence, n_sequences)
    return ours, losses.sequence_nll(losses.token_nll(reference, targets), sequence, n_sequences)


def of_tokens(case: Case) -> Tensor:
    return losses.token_nll(case[0], case[2])


def ce_u(case: Case) -> Tensor:
    logits, _, targets, sequence = case
    later = losses.follows_another(sequence)
    return losses.ce_u(logits[later], targets[later], n_tokens=9 - 3)


def simnpo(case: Case) -> Tensor:
    mean = losses.sequence_mean_nll(of_tokens(case), case[3], int(case[3].max()) + 1)
    return losses.simnpo(mean, beta=2.5, delta=0.1, n_sequences=3)


# Every loss of a window of 3 sequences with 2, 3 and 4 tokens; a case may be some of its tokens, whole sequences.
# The winning answer of a pair is the same tokens under other logits.
ALL: dict[str, Callable[[Case], Tensor]] = {
    "cross_entropy": lambda case: losses.pooled_cross_entropy(of_tokens(case), 9),
    "kl": lambda case: losses.token_divergence(case[0], case[1]).sum() / 9,
    "npo": lambda case: losses.npo(*of_sequences(case), beta=0.4, n_sequences=3),
    "dpo": lambda case: losses.dpo(*of_sequences((-case[0], *case[1:])), *of_sequences(case), beta=0.4, n_sequences=3),
    "kto": lambda case: losses.kto(*of_sequences(case), kl_estimate=0.7, beta=0.4, n_sequences=3),
    "kto_sigmoid": lambda case: losses.kto(
        *of_sequences(case), kl_estimate=0.7, beta=0.4, n_sequences=3, variant="kto_sigmoid"
    ),
    "kto_logsigmoid": lambda case: losses.kto(
        *of_sequences(case), kl_estimate=0.7, beta=0.4, n_sequences=3, variant="kto_logsigmoid"
    ),
    "simnpo": simnpo,
    "undial": lambda case: losses.undial(case[0], case[1], case[2], beta=3.0, n_tokens=9),
    "ce_u": ce_u,
    "wga": lambda case: losses.wga(of_tokens(case), beta=1.0, n_tokens=9),
    "satimp": lambda case: losses.satimp(of_tokens(case), beta1=5.0, beta2=1.0, n_tokens=9),
    "pdu": lambda case: losses.pdu(case[0], n_tokens=9),
    "rmu": lambda case: losses.rmu(case[0], case[1], n_positions=9),
}
WEIGHTED = {"ce_u", "wga", "satimp"}  # stop-gradient: their gradient is not that of their value


def whole_case(seed: int = 7) -> Case:
    logits, targets, sequence = random_case(seed, [2, 3, 4])
    reference, _, _ = random_case(seed + 1, [2, 3, 4])
    return logits, reference, targets, sequence


@pytest.mark.parametrize("name", ALL)
@given(seed=st.integers(0, 1000), permutation=st.permutations(range(3)), cut=st.integers(1, 2))
@settings(max_examples=10)
def test_neither_order_nor_cut_of_a_window_changes_any_loss(
    name: str, seed: int, permutation: list[int], cut: int
) -> None:
    case = whole_case(seed)

    def pick(sequences: list[int]) -> Case:
        places = torch.cat([(case[3] == sequence).nonzero().squeeze(1) for sequence in sequences])
        renamed = torch.cat([torch.full((2 + s,), row) for row, s in enumerate(sequences)])
        return case[0][places], case[1][places], case[2][places], renamed

    whole = ALL[name](case)
    torch.testing.assert_close(ALL[name](pick(permutation)), whole)
    shares = [ALL[name](pick(piece)) for piece in (permutation[:cut], permutation[cut:])]
    torch.testing.assert_close(sum(shares), whole)


@pytest.mark.parametrize("name", sorted(ALL.keys() - WEIGHTED))
def test_gradients_equal_finite_differences(name: str) -> None:
    logits, *rest = whole_case()
    assert torch.autograd.gradcheck(lambda z: ALL[name]((z, *rest)), logits.requires_grad_(True))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_the_loss_of_float32(name: str, dtype: torch.dtype) -> None:
    logits, reference, targets, sequence = whole_case()
    half = ALL[name]((logits.to(dtype), reference.to(dtype), targets, sequence))
    assert half.dtype == torch.float32
    exact = ALL[name]((logits.to(dtype).double(), reference.to(dtype).double(), targets, sequence))
    assert exact.dtype == torch.float64
    torch.testing.assert_close(half.double(), exact, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_collapsed_model_has_finite_losses_and_gradients(name: str, sign: int) -> None:
    """Log-probabilities of -10000, and of 0 for a token that is all but certain."""
    _, reference, targets, sequence = whole_case()
    logits = (sign * 1e4 * torch.nn.functional.one_hot(targets, 11)).float().requires_grad_(True)
    assert {1.0: 0.0, -1.0: 1e4}[sign] == pytest.approx(losses.token_nll(logits, targets).max().item(), abs=3)
    value = ALL[name]((logits, reference.float(), targets, sequence))
    value.backward()
    assert value.isfinite()
    assert logits.grad is not None and logits.grad.isfinite().all()
