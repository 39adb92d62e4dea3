"""Every method's two losses against plain formulas, token by token and without padding."""

import copy
import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaForCausalLM

from tests.unlearning.methods.helpers import (
    DATA,
    MODEL,
    START,
    Data,
    batch_of,
    build_model,
    build_spans,
    losses_of,
    n_answer,
    slow_hidden,
    slow_logits,
    slow_nll,
    step_batch_of,
)
from unlearning.methods import METHODS
from unlearning.methods.circuit_breakers import CircuitBreakersOptions, kick
from unlearning.methods.method import Batch
from unlearning.methods.rmu import steering_vector
from unlearning.objectives.combination import DualAscent, WeightedSum


def mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean()


def tokens(model: LlamaForCausalLM, spans: list[Any]) -> list[Tensor]:
    return [nll for span in spans for nll in slow_nll(model, span)]


def log_ratios(model: LlamaForCausalLM, spans: list[Any]) -> list[Tensor]:
    """r_b = log p(y_b) - log p_start(y_b)."""
    frozen = [sum(slow_nll(START, span)).detach() for span in spans]
    return [frozen[place] - sum(slow_nll(model, span)) for place, span in enumerate(spans)]


def preferred(scores: list[Tensor], beta: float) -> Tensor:
    return mean([-(2 / beta) * torch.log(torch.sigmoid(beta * score)) for score in scores])


def slow_dpo(model: LlamaForCausalLM, data: Data, beta: float) -> Tensor:
    pairs = zip(log_ratios(model, data.alternate), log_ratios(model, data.forget), strict=True)
    return preferred([win - lose for win, lose in pairs], beta)


def slow_kto(model: LlamaForCausalLM, data: Data, o: Any) -> Tensor:
    estimate = mean(log_ratios(model, data.alternate)).detach()
    ratios = log_ratios(model, data.forget)
    if o.variant == "clamped":
        return preferred([estimate.clamp(min=0) - r for r in ratios], o.beta)
    scores = [torch.sigmoid(estimate - o.beta * r) for r in ratios]
    return 1 - (2 / o.beta) * mean(scores if o.variant == "kto_sigmoid" else [torch.log(score) for score in scores])


def slow_simnpo(model: LlamaForCausalLM, data: Data, o: Any) -> Tensor:
    return preferred([mean(slow_nll(model, span)) - o.delta for span in data.forget], o.beta)


def slow_rmu(model: LlamaForCausalLM, data: Data, o: Any) -> Tensor:
    direction = torch.rand(32, generator=torch.Generator().manual_seed(o.steering_seed))
    target = o.steering_coefficient * direction / direction.square().sum().sqrt()
    return mean([(row - target).square().mean() for span in data.forget for row in slow_hidden(model, span, 0)])


def slow_rmu_retain(model: LlamaForCausalLM, data: Data) -> Tensor:
    pairs = [(slow_hidden(model, s, 0), slow_hidden(START, s, 0).detach()) for s in data.retain]
    return mean([(h - h0).square().mean() for ours, theirs in pairs for h, h0 in zip(ours, theirs, strict=True)])


def slow_undial(model: LlamaForCausalLM, data: Data, o: Any) -> Tensor:
    terms = []
    for span in data.forget:
        ours, theirs = slow_logits(model, span), slow_logits(START, span).detach()
        for p, p_start, y in zip(
            ours.softmax(-1), theirs.softmax(-1), span.input_ids[span.answer_start :], strict=True
        ):
            q = p_start.clone()
            q[y] *= math.exp(-o.beta)
            terms.append(-(q / q.sum() * torch.log(p)).sum())
    return mean(terms)


def slow_ce_u(model: LlamaForCausalLM, data: Data) -> Tensor:
    terms = []
    for span in data.forget:
        rows, answer = slow_logits(model, span), span.input_ids[span.answer_start :]
        for p, y in list(zip(rows.softmax(-1), answer, strict=True))[1:]:
            q = p.detach().clone()
            q[y] = 0
            terms.append(-(q / q.sum() * torch.log(p)).sum())
    return mean(terms)


def slow_satimp(model: LlamaForCausalLM, data: Data, beta1: float, beta2: float) -> Tensor:
    log_p = [-nll for nll in tokens(model, data.forget)]
    return mean([lp.detach().exp() ** beta1 * (1 - lp.detach().exp()) ** beta2 * lp for lp in log_p])


def slow_pdu(model: LlamaForCausalLM, data: Data) -> Tensor:
    rows = [row for span in data.forget for row in slow_logits(model, span)]
    return mean([(row.max() - row.sum() / len(row)) ** 2 for row in rows])


def slow_idk(model: LlamaForCausalLM, spans: list[Any]) -> Tensor:
    return torch.stack(tokens(model, spans)).sum() / (n_answer(DATA.alternate) + n_answer(DATA.retain))


def slow_kl(model: LlamaForCausalLM, spans: list[Any]) -> Tensor:
    pairs = [(slow_logits(model, span), slow_logits(START, span).detach()) for span in spans]
    rows = [(p, q) for ours, theirs in pairs for p, q in zip(ours.softmax(-1), theirs.softmax(-1), strict=True)]
    return mean([(q * (torch.log(q) - torch.log(p))).sum() for p, q in rows])


def jsd(one: Tensor, other: Tensor) -> Tensor:
    middle = (one + other) / 2
    return sum((torch.special.xlogy(p, p) - torch.special.xlogy(p, middle)).sum() for p in (one, other)) / 2


def slow_jensun(model: LlamaForCausalLM, data: Data) -> Tensor:
    terms = []
    for span in data.alternate:
        for p, y in zip(slow_logits(model, span).softmax(-1), span.input_ids[span.answer_start :], strict=True):
            certain = torch.zeros_like(p)
            certain[y] = 1
            terms.append(jsd(certain, p))
    return mean(terms)


def slow_jensun_retain(model: LlamaForCausalLM, data: Data) -> Tensor:
    pairs = [(slow_logits(model, span), slow_logits(START, span).detach()) for span in data.retain]
    return mean([jsd(p, q) for a, b in pairs for p, q in zip(a.softmax(-1), b.softmax(-1), strict=True)])


def slow_circuit_breakers(model: LlamaForCausalLM, data: Data, options: Any) -> Tensor:
    terms = []
    for layer in map(int, options.layers.split(",")):
        for span in data.forget:
            ours, theirs = slow_hidden(model, span, layer), slow_hidden(START, span, layer).detach()
            for place in range(span.answer_start - 1, len(span.input_ids) - 1):
                h, r = ours[place], theirs[place]
                terms.append((h @ r / (h.square().sum().sqrt() * r.square().sum().sqrt())).clamp(min=0))
    return mean(terms)


def slow_circuit_breakers_retain(model: LlamaForCausalLM, data: Data, options: Any) -> Tensor:
    terms = []
    for layer in map(int, options.layers.split(",")):
        for span in data.retain:
            apart = slow_hidden(model, span, layer) - slow_hidden(START, span, layer).detach()
            terms += [row.square().sum().sqrt() for row in apart]
    return mean(terms)


SLOW: dict[str, Callable[[LlamaForCausalLM, Data, Any], Tensor]] = {
    "ga": lambda model, data, _: -mean(tokens(model, data.forget)),
    "ga_forget_kl": lambda model, data, o: o.kl_weight * slow_kl(model, data.forget) - mean(tokens(model, data.forget)),
    "grad_diff": lambda model, data, _: -mean(tokens(model, data.forget)),
    "idk": lambda model, data, _: slow_idk(model, data.alternate),
    "jensun": lambda model, data, _: slow_jensun(model, data),
    "dpo": lambda model, data, o: slow_dpo(model, data, o.beta),
    "npo": lambda model, data, o: preferred([-r for r in log_ratios(model, data.forget)], o.beta),
    "kto": slow_kto,
    "simnpo": slow_simnpo,
    "rmu": slow_rmu,
    "circuit_breakers": slow_circuit_breakers,
    "undial": slow_undial,
    "elm": lambda model, data, _: slow_kl(model, data.forget),  # to the constants that the batch holds
    "ce_u": lambda model, data, _: slow_ce_u(model, data),
    "wga": lambda model, data, o: slow_satimp(model, data, o.beta, 0),
    "satimp": lambda model, data, o: slow_satimp(model, data, o.beta1, o.beta2),
    "pdu": lambda model, data, _: slow_pdu(model, data),
}
KL = ["grad_diff", "dpo", "npo", "kto", "simnpo", "undial", "wga", "satimp"]

SETTLED: dict[str, dict[str, Any]] = {
    "rmu": {"steering_coefficient": 6.5},
    "circuit_breakers": {"layers": "0,1", "schedule_steps": 8},
    "elm": {"concept": "towns"},
}
"""What a run settles from the data before its first step, or a user must set."""

# Every method as it comes, and what else its options can mean.
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, SETTLED.get(name, {})) for name in SLOW),
    *((name, {"retain_loss": "kl", "alpha": 0.5}) for name in KL),
    ("ga_forget_kl", {"kl_weight": 3.0}),
    ("kto", {"variant": "kto_sigmoid", "beta": 0.7}),
    ("kto", {"variant": "kto_logsigmoid", "beta": 0.7}),
    ("simnpo", {"beta": 0.7, "delta": 1.5}),
    ("rmu", {"layer": 0, "steering_seed": 4, "steering_coefficient": 2.0}),
    ("circuit_breakers", {"layers": "0", "schedule_steps": 8}),
    ("undial", {"beta": 1.0, "alpha": 1.0}),
    ("elm", {"concept": "towns", "retain_loss": "nll"}),
    ("satimp", {"beta1": 0.2, "beta2": 6.0}),  # at the defaults it is next to nothing for a model of random weights
]


def slow_retain(name: str, model: LlamaForCausalLM, options: Any) -> Tensor | None:
    if not METHODS[name].needs(options).retain:
        return None
    if name == "rmu":
        return slow_rmu_retain(model, DATA)
    if name == "circuit_breakers":
        return slow_circuit_breakers_retain(model, DATA, options)
    if name == "idk":
        return slow_idk(model, DATA.retain)
    if name == "jensun":
        return slow_jensun_retain(model, DATA)
    if getattr(options, "retain_loss", "nll") == "kl":
        return slow_kl(model, DATA.retain)
    return mean(tokens(model, DATA.retain))


@pytest.mark.parametrize(("name", "given_options"), CASES)
def test_losses_and_gradients_equal_plain_formulas(name: str, given_options: dict[str, Any]) -> None:
    method = METHODS[name]
    options = method.options(**given_options)
    model, slow_model = build_model(), build_model()
    fast = losses_of(method, options, DATA, model=model)
    slow = SLOW[name](slow_model, DATA, options), slow_retain(name, slow_model, options)
    for ours, theirs, weight in zip(fast, slow, (1.0, 0.3), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert ours.item() == pytest.approx(theirs.item(), rel=1e-7, abs=1e-9)
            (weight * ours).backward()
            (weight * theirs).backward()
    moved = 0.0
    for one, other in zip(model.parameters(), slow_model.parameters(), strict=True):
        a, b = (torch.zeros_like(p) if p.grad is None else p.grad for p in (one, other))
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)
        moved += b.abs().sum().item()
    assert moved > 0


@pytest.mark.parametrize(
    ("name", "given_options"),
    [
        *((name, SETTLED.get(name, {})) for name in SLOW),
        ("npo", {"retain_loss": "kl"}),
        ("kto", {"variant": "kto_sigmoid"}),
    ],
)
@given(
    order=st.permutations(range(3)),
    cuts=st.sampled_from([(), (1,), (2,), (1, 2)]),
    padding=st.integers(0, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=3)
@torch.no_grad()
def test_neither_order_nor_cut_nor_padding_changes_a_step_batch(
    name: str, given_options: dict[str, Any], order: list[int], cuts: tuple[int, ...], padding: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = [(p + 1, a + 1) for p, a in torch.randint(5, (9, 2), generator=generator).tolist()]
    data = Data(*(build_spans(lengths[i : i + 3], seed=seed + i) for i in (0, 3, 6)))
    method = METHODS[name]
    options = method.options(**given_options)
    plain = losses_of(method, options, data)
    other = losses_of(method, options, data, order=order, cuts=cuts, padding=padding)
    for one, two in zip(plain, other, strict=True):
        assert (one is None) == (two is None)
        if one is not None and two is not None:
            assert two.item() == pytest.approx(one.item(), rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("name", ["dpo", "npo", "kto"])
@pytest.mark.parametrize("beta", [0.1, 0.5])
@torch.no_grad()
def test_preferences_begin_at_two_over_beta_log_two(name: str, beta: float) -> None:
    forget, _ = losses_of(METHODS[name], METHODS[name].options(beta=beta), DATA, model=START)
    assert forget is not None
    assert forget.item() == pytest.approx(2 / beta * math.log(2), abs=1e-7)


@pytest.mark.parametrize(
    ("name", "given_options"),
    [
        *SETTLED.items(),
        ("jensun", {}),
        *((name, {"retain_loss": "kl", "alpha": 1.0}) for name in KL),
    ],
)
@torch.no_grad()
def test_what_is_kept_is_at_its_minimum_at_the_start(name: str, given_options: dict[str, Any]) -> None:
    method = METHODS[name]
    at_start = losses_of(method, method.options(**given_options), DATA, model=START)[1]
    later = losses_of(method, method.options(**given_options), DATA, model=MODEL)[1]
    assert at_start is not None and later is not None
    assert at_start.item() == pytest.approx(0, abs=1e-12)
    assert later > 1e-3


def test_ga_with_forget_kl_begins_as_ga() -> None:
    """The divergence and its gradient are 0 at the start, whatever its weight; without the weight it is ga anywhere."""
    for start, weight in ((START, 7.0), (MODEL, 0.0)):
        gradients = []
        for name, options in (("ga", {}), ("ga_forget_kl", {"kl_weight": weight})):
            method, model = METHODS[name], copy.deepcopy(start)
            forget, _ = losses_of(method, method.options(**options), DATA, model=model)
            assert forget is not None
            forget.backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        torch.testing.assert_close(*gradients, atol=1e-10, rtol=1e-7)


@torch.no_grad()
def test_idk_is_the_cross_entropy_of_both_sets_together() -> None:
    forget, retain = losses_of(METHODS["idk"], METHODS["idk"].options(), DATA)
    assert forget is not None and retain is not None
    assert (forget + retain).item() == pytest.approx(
        mean(tokens(MODEL, [*DATA.alternate, *DATA.retain])).item(), rel=1e-9
    )


@torch.no_grad()
def test_ktos_estimate_is_of_the_step_batch_not_of_its_pieces() -> None:
    method, options = METHODS["kto"], METHODS["kto"].options(variant="kto_sigmoid")
    assert method.statistic is not None
    parts = []
    for place in range(3):
        alternate = batch_of([DATA.alternate[place]], method.needs(options).references, "alternate")
        batch = Batch(step_batch_of(DATA), alternate=alternate)
        parts.append(method.statistic(MODEL, batch, options))
    expected = [ratio.item() for ratio in log_ratios(MODEL, DATA.alternate)]
    assert [total for total, _ in parts] == pytest.approx(expected, abs=1e-9)
    assert [count for _, count in parts] == [1, 1, 1]


@torch.no_grad()
def test_ce_u_of_answers_of_one_token_is_zero() -> None:
    data = Data(forget=build_spans([(3, 1), (4, 1)], seed=5), alternate=[], retain=[])
    forget, _ = losses_of(METHODS["ce_u"], METHODS["ce_u"].options(), data)
    assert forget is not None
    assert forget.item() == 0


def test_rmus_direction_is_a_unit_vector_that_its_seed_decides() -> None:
    direction = steering_vector(64, seed=3)
    assert direction.norm().item() == pytest.approx(1, abs=1e-6)
    assert (direction >= 0).all()
    assert torch.equal(direction, steering_vector(64, seed=3))
    assert not torch.equal(direction, steering_vector(64, seed=4))


def test_pdus_retain_loss_is_held_by_dual_ascent() -> None:
    method = METHODS["pdu"]
    combination = method.combination(method.options(epsilon=0.5, eta=2.0, lambda0=1.0, dual_warmup_steps=2, gamma=0.7))
    assert isinstance(combination, DualAscent)
    seen = []
    for retain_loss in (3.0, 3.0, 1.5, 0.25, -9.0):
        combination.after_step(retain_loss)
        seen.append(combination.weights())
    multipliers = [1.0, 1.0, 1.0 + 2 * 1.0, 3.0 - 2 * 0.25, 0.0]  # never below 0
    assert seen == [(0.7, multiplier) for multiplier in multipliers]


@pytest.mark.parametrize("name", SLOW)
def test_weights_are_left_to_the_combination(name: str) -> None:
    method = METHODS[name]
    names = {field.name for field in fields(method.options)}
    given_options = {key: value for key, value in (("gamma", 0.3), ("alpha", 7.0)) if key in names}
    options = method.options(**given_options, **SETTLED.get(name, {}))
    if name == "circuit_breakers":
        combination, seen = method.combination(options), []
        for _ in range(9):
            seen.append(combination.weights())
            combination.after_step(None)
        shares = [min(step, 8) / 16 for step in range(1, 10)]
        assert seen == [(0.3 * (1 - share), 7.0 * share) for share in shares]
    elif name != "pdu":
        assert method.combination(options) == WeightedSum(
            given_options.get("gamma", 1.0), given_options.get("alpha", 1.0)
        )
    with torch.no_grad():
        forget, _ = losses_of(method, options, DATA)
        plain, _ = losses_of(method, method.options(**SETTLED.get(name, {})), DATA)
    assert forget is not None and plain is not None
    assert torch.equal(forget, plain)


@pytest.mark.parametrize("name", sorted({*KL, "rmu"}))
def test_without_a_weight_nothing_is_asked_of_the_retain_set(name: str) -> None:
    method = METHODS[name]
    needs = method.needs(method.options(alpha=0))
    assert not needs.retain
    assert not any(reference.data == "retain" for reference in needs.references)


def test_the_kick_hangs_on_names_and_moves_zeros_too() -> None:
    weights = {"a": torch.full((40, 50), 3.0), "b": torch.zeros(40, 50)}
    moved = {name: weight.clone() for name, weight in weights.items()}
    kick(list(moved.items()), CircuitBreakersOptions())
    assert (moved["a"] - weights["a"]).std().item() == pytest.approx(0.03, rel=0.1)
    assert moved["b"].std().item() == pytest.approx(0.01 / 50**0.5, rel=0.1)
    again = {name: weight.clone() for name, weight in reversed(weights.items())}
    kick(list(again.items()), CircuitBreakersOptions())
    assert all(torch.equal(again[name], moved[name]) for name in weights)
