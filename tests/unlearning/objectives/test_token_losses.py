"""Losses over tokens and hidden states against slow loops in float64 and against their identities."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unlearning.objectives.test_losses import random_case
from unlearning.objectives import losses

SEEDS = st.integers(0, 10_000)
LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=4)


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(z) for z in row)
    return [math.exp(z) / total for z in row]


def slow_kl(ours: list[float], theirs: list[float]) -> float:
    return sum(q * (math.log(q) - math.log(p)) for p, q in zip(softmax(ours), softmax(theirs), strict=True))


def slow_undial(ours: list[float], theirs: list[float], target: int, beta: float) -> float:
    """By the closed form of the teacher: what y loses goes to the others in proportion."""
    p_ref = softmax(theirs)
    left = 1 - p_ref[target] * (1 - math.exp(-beta))
    teacher = [p / left for p in p_ref]
    teacher[target] *= math.exp(-beta)
    return -sum(q * math.log(p) for p, q in zip(softmax(ours), teacher, strict=True))


def slow_ce_u(row: list[float], target: int) -> float:
    """H(q) - log(1 - p_y)."""
    p = softmax(row)
    q = [value / (1 - p[target]) for place, value in enumerate(p) if place != target]
    return -sum(value * math.log(value) for value in q) - math.log(1 - p[target])


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(loss, of, retain_graph=True)[0]


@given(seed=SEEDS, lengths=LENGTHS)
@settings(max_examples=30)
def test_divergence_equals_a_loop(seed: int, lengths: list[int]) -> None:
    logits, _, _ = random_case(seed, lengths)
    reference, _, _ = random_case(seed + 1, lengths)
    fast = losses.token_divergence(logits, reference)
    slow = [slow_kl(ours, theirs) for ours, theirs in zip(logits.tolist(), reference.tolist(), strict=True)]
    assert fast.tolist() == pytest.approx(slow, abs=1e-10)
    assert (fast >= 0).all()


def test_divergence_from_itself_is_zero_with_zero_gradient() -> None:
    logits = random_case(0, [5])[0].requires_grad_(True)
    divergence = losses.token_divergence(logits, logits.detach() + 3).sum()  # logits are defined up to a constant
    assert divergence.item() == pytest.approx(0, abs=1e-14)
    assert gradient(divergence, logits).abs().max() < 1e-15


def test_divergence_gradient_is_the_difference_of_distributions() -> None:
    logits, reference = random_case(0, [5])[0].requires_grad_(True), random_case(1, [5])[0].requires_grad_(True)
    divergence = losses.token_divergence(logits, reference).sum()
    torch.testing.assert_close(gradient(divergence, logits), (logits.softmax(-1) - reference.softmax(-1)).detach())
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        gradient(divergence, reference)


@given(seed=SEEDS, lengths=LENGTHS, beta=st.sampled_from([0.0, 1.0, 3.0, 10.0]))
@settings(max_examples=30)
def test_undial_equals_a_loop(seed: int, lengths: list[int], beta: float) -> None:
    logits, targets, _ = random_case(seed, lengths)
    reference, _, _ = random_case(seed + 1, lengths)
    rows = zip(logits.tolist(), reference.tolist(), targets.tolist(), strict=True)
    slow = [slow_undial(ours, theirs, target, beta) for ours, theirs, target in rows]
    fast = losses.undial(logits, reference, targets, beta=beta, n_tokens=len(slow)).item()
    assert fast == pytest.approx(sum(slow) / len(slow), abs=1e-9)


def test_undial_gradient_is_the_difference_from_the_teacher() -> None:
    logits, targets, _ = random_case(0, [5])
    reference, _, _ = random_case(1, [5])
    logits.requires_grad_(True)
    loss = losses.undial(logits, reference, targets, beta=3.0, n_tokens=5)
    teacher = (reference - 3.0 * torch.nn.functional.one_hot(targets, 11)).softmax(-1)
    torch.testing.assert_close(gradient(loss, logits), (logits.detach().softmax(-1) - teacher) / 5)


def test_undial_with_an_unchanged_teacher_has_no_gradient_at_the_start() -> None:
    logits, targets, _ = random_case(0, [5])
    logits.requires_grad_(True)
    loss = losses.undial(logits, logits.detach(), targets, beta=0.0, n_tokens=5)
    assert gradient(loss, logits).abs().max() < 1e-15


def test_undial_is_smallest_at_its_teacher() -> None:
    reference, targets, _ = random_case(1, [5])
    teacher = reference - 3.0 * torch.nn.functional.one_hot(targets, 11)
    at_teacher = losses.undial(teacher, reference, targets, beta=3.0, n_tokens=5)
    p = teacher.softmax(-1)
    assert at_teacher.item() == pytest.approx(-(p * p.log()).sum().item() / 5, abs=1e-12)  # the teacher's entropy
    for seed in range(5):
        elsewhere = losses.undial(teacher + 0.1 * random_case(seed, [5])[0], reference, targets, beta=3.0, n_tokens=5)
        assert elsewhere > at_teacher


@given(seed=SEEDS, lengths=LENGTHS)
@settings(max_examples=30)
def test_ce_u_equals_a_loop_that_skips_first_tokens(seed: int, lengths: list[int]) -> None:
    logits, targets, sequence = random_case(seed, lengths)
    slow, before = [], -1
    for row, target, place in zip(logits.tolist(), targets.tolist(), sequence.tolist(), strict=True):
        if place == before:
            slow.append(slow_ce_u(row, target))
        before = place
    later = losses.follows_another(sequence)
    fast = losses.ce_u(logits[later], targets[later], n_tokens=len(slow)).item()
    assert fast == pytest.approx(sum(slow) / len(slow) if slow else 0, abs=1e-9)


def test_ce_u_of_answers_of_one_token_is_zero_with_zero_gradient() -> None:
    logits, targets, sequence = random_case(0, [1, 1])
    logits.requires_grad_(True)
    later = losses.follows_another(sequence)
    loss = losses.ce_u(logits[later], targets[later], n_tokens=0)
    assert loss.item() == 0
    assert (gradient(loss, logits) == 0).all()


def test_ce_u_gradient_is_odds_weighted_gradient_ascent() -> None:
    logits, targets, _ = random_case(0, [5])
    logits.requires_grad_(True)
    ours = gradient(losses.ce_u(logits, targets, n_tokens=5), logits)
    log_p = -losses.token_nll(logits, targets)
    p = log_p.detach().exp()
    torch.testing.assert_close(ours, gradient((p / (1 - p) * log_p).mean(), logits))
    torch.testing.assert_close(5 * ours.gather(1, targets[:, None])[:, 0], p)  # bounded, unlike the odds


@given(seed=SEEDS, lengths=LENGTHS, beta1=st.sampled_from([0.0, 0.5, 5.0]), beta2=st.sampled_from([0.0, 1.0, 2.5]))
@settings(max_examples=30)
def test_satimp_equals_a_loop(seed: int, lengths: list[int], beta1: float, beta2: float) -> None:
    logits, targets, _ = random_case(seed, lengths)
    p = [softmax(row)[target] for row, target in zip(logits.tolist(), targets.tolist(), strict=True)]
    slow = sum(value**beta1 * (1 - value) ** beta2 * math.log(value) for value in p) / len(p)
    nll = losses.token_nll(logits, targets)
    assert losses.satimp(nll, beta1=beta1, beta2=beta2, n_tokens=len(p)).item() == pytest.approx(slow, abs=1e-9)


def test_weights_without_powers_leave_gradient_ascent() -> None:
    nll = torch.tensor([0.0, 1e-9, 0.3, 7.0, 1e4], dtype=torch.float64, requires_grad=True)
    ascent = -losses.pooled_cross_entropy(nll, 5)
    for loss in (losses.wga(nll, beta=0, n_tokens=5), losses.satimp(nll, beta1=0, beta2=0, n_tokens=5)):
        assert loss.item() == pytest.approx(ascent.item(), abs=1e-12)
        torch.testing.assert_close(gradient(loss, nll), gradient(ascent, nll))


def test_satimp_without_importance_is_wga() -> None:
    nll = losses.token_nll(*random_case(0, [6])[:2])
    torch.testing.assert_close(
        losses.satimp(nll, beta1=1.7, beta2=0, n_tokens=6), losses.wga(nll, beta=1.7, n_tokens=6)
    )


def test_weights_carry_no_gradient() -> None:
    nll = torch.tensor([0.05, 0.3, 7.0], dtype=torch.float64, requires_grad=True)
    p = (-nll.detach()).exp()
    torch.testing.assert_close(gradient(losses.wga(nll, beta=0.7, n_tokens=3), nll), -(p**0.7) / 3)
    satimp = losses.satimp(nll, beta1=5, beta2=1, n_tokens=3)
    torch.testing.assert_close(gradient(satimp, nll), -(p**5) * (1 - p) / 3)


@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_wga_is_bounded_below(beta: float) -> None:
    nll = torch.linspace(0, 100, 10_001, dtype=torch.float64)
    values = torch.stack([losses.wga(value[None], beta=beta, n_tokens=1) for value in nll[::50]])
    assert values.min() >= -1 / (math.e * beta) - 1e-12
    at_bound = losses.wga(torch.tensor([1 / beta], dtype=torch.float64), beta=beta, n_tokens=1)
    assert at_bound.item() == pytest.approx(-1 / (math.e * beta), abs=1e-12)


@given(seed=SEEDS, lengths=LENGTHS, constant=st.floats(-50, 50))
@settings(max_examples=30)
def test_pdu_equals_a_loop_and_ignores_a_constant(seed: int, lengths: list[int], constant: float) -> None:
    logits, _, _ = random_case(seed, lengths)
    slow = [(max(row) - sum(row) / len(row)) ** 2 for row in logits.tolist()]
    for shift in (0, constant):
        fast = losses.pdu(logits + shift, n_tokens=len(slow)).item()
        assert fast == pytest.approx(sum(slow) / len(slow), rel=1e-9)


def test_pdu_is_zero_for_equal_logits_only() -> None:
    equal = torch.full((3, 7), 2.5, dtype=torch.float64)
    assert losses.pdu(equal, n_tokens=3).item() == 0
    equal[1, 4] += 1e-3
    assert losses.pdu(equal, n_tokens=3).item() > 0


@given(lengths=LENGTHS, seed=SEEDS)
@settings(max_examples=30)
def test_rmu_equals_a_loop_over_tokens_of_unequal_sequences(lengths: list[int], seed: int) -> None:
    hidden, _, _ = random_case(seed, lengths, vocab=6)
    target = torch.linspace(0, 1, 6, dtype=torch.float64)
    squares = [(h - u) ** 2 for row in hidden.tolist() for h, u in zip(row, target.tolist(), strict=True)]
    fast = losses.rmu(hidden, target, n_positions=sum(lengths)).item()
    assert fast == pytest.approx(sum(squares) / len(squares), abs=1e-9)
    assert losses.rmu(hidden, target.expand_as(hidden), n_positions=sum(lengths)).item() == fast


def test_rmu_is_the_published_squared_norm_over_the_width() -> None:
    hidden, _, _ = random_case(0, [4], vocab=6)
    other, _, _ = random_case(1, [4], vocab=6)
    norms = (hidden - other).norm(dim=-1) ** 2
    assert 6 * losses.rmu(hidden, other, n_positions=4).item() == pytest.approx(norms.mean().item(), abs=1e-12)
    assert losses.rmu(hidden, hidden, n_positions=4).item() == 0


@pytest.mark.parametrize("piece", [1, 20, 10**6])
def test_divergence_by_pieces_equals_autograd(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(losses.PIECE, "cpu", piece)
    draw = torch.Generator().manual_seed(3)
    ours, theirs = (5 * torch.randn(7, 9, generator=draw, dtype=torch.float64) for _ in range(2))
    weights = torch.randn(7, generator=draw, dtype=torch.float64)
    values, gradients = [], []
    for loss in (
        losses.token_divergence,
        lambda a, b: F.kl_div(a.log_softmax(-1), b.log_softmax(-1), reduction="none", log_target=True).sum(-1),
    ):
        logits = ours.clone().requires_grad_()
        values.append(loss(logits, theirs))
        (values[-1] * weights).sum().backward()
        gradients.append(logits.grad)
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("piece", [1, 60, 10**6])
def test_nll_by_pieces_is_cross_entropy_to_the_bit(
    piece: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(losses.PIECE, "cpu", piece)
    draw = torch.Generator().manual_seed(4)
    start = (5 * torch.randn(9, 19, generator=draw)).to(dtype)
    rows, targets = torch.tensor([0, 2, 3, 5, 8]), torch.tensor([3, 18, 0, 7, 7])
    weights = torch.randn(5, generator=draw)
    values, gradients = [], []
    for loss in (
        lambda logits: losses.token_nll(logits, targets, rows),
        lambda logits: F.cross_entropy(logits[rows].float(), targets, reduction="none"),
    ):
        logits = start.clone().requires_grad_()
        values.append(loss(logits))
        (values[-1] * weights).sum().backward()
        gradients.append(logits.grad)
    assert torch.equal(values[0], values[1]) and torch.equal(gradients[0], gradients[1])
    assert gradients[0][[1, 4, 6, 7]].count_nonzero() == 0, "rows that nobody asked for"


def test_nll_of_no_token_is_empty() -> None:
    nothing = torch.zeros(0, dtype=torch.long)
    logits = torch.randn(3, 7, requires_grad=True)
    nll = losses.token_nll(logits, nothing, nothing)
    assert nll.shape == (0,)
    assert gradient(nll.sum(), logits).count_nonzero() == 0


def test_divergence_of_some_rows_is_that_of_their_copies() -> None:
    logits, rows = random_case(0, [6])[0].requires_grad_(True), torch.tensor([1, 2, 5])
    reference = random_case(1, [3])[0]
    weights = torch.tensor([1.0, -2.0, 0.5])
    chosen, copied = losses.token_divergence(logits, reference, rows), losses.token_divergence(logits[rows], reference)
    assert torch.equal(chosen, copied)
    assert torch.equal(gradient((weights * chosen).sum(), logits), gradient((weights * copied).sum(), logits))


class Sizes(TorchDispatchMode):
    """Elements of every tensor that is made and has memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = function(*args, **(kwargs or {}))
        given = {argument.untyped_storage().data_ptr() for argument in args if isinstance(argument, Tensor)}
        for tensor in made if isinstance(made, tuple) else (made,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.made.append(tensor.numel())
        return made


@pytest.mark.parametrize(
    ("loss", "other"),
    [(losses.token_nll, torch.zeros(40, dtype=torch.long)), (losses.token_divergence, torch.ones(40, 100))],
)
def test_a_token_loss_makes_one_tensor_of_the_logits_size_which_is_their_gradient(
    loss: Callable[[Tensor, Tensor], Tensor], other: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(losses.PIECE, "cpu", 2 * 100)
    logits = torch.randn(40, 100, requires_grad=True)
    with Sizes() as forward:
        values = loss(logits, other)
    with Sizes() as backward:
        values.sum().backward()
    assert max(forward.made) == 2 * 100
    assert sorted(backward.made)[-2:] == [2 * 100, 40 * 100]
