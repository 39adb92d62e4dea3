"""Training of bfloat16 weights: no step is lost, and the path is that of float32 weights but for rounding."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.unlearning.helpers import build_examples, build_tiny_llama
from tests.unlearning.small_world import flat_weights
from unlearning import InputError, train
from unlearning.options import TrainOptions
from unlearning.training import bfloat16_optimizer
from unlearning.training.arguments import state_line, training_arguments
from unlearning.training.bfloat16_optimizer import Bfloat16Optimizer, Update, round_stochastically

UPDATES: list[Update] = ["stochastic", "master"]


def drawn(values: Tensor, seed: int) -> Tensor:
    return round_stochastically(values, torch.Generator().manual_seed(seed))


@given(value=st.floats(-(2.0**127), 2.0**127, width=32), seed=st.integers(0, 2**40))
def test_a_value_is_rounded_to_one_of_its_two_neighbours(value: float, seed: int) -> None:
    values = torch.tensor([value])
    found = drawn(values, seed)
    near = values.bfloat16()
    # Two neighbours differ in the last bit of their patterns, whatever their sign.
    assert torch.isfinite(found)
    assert abs(int(found.view(torch.int16)) - int(near.view(torch.int16))) <= 1
    assert abs(found.float() - values) <= values.abs() / 128 + 1e-40
    assert torch.equal(drawn(near.float(), seed), near)  # what needs no rounding stays


@pytest.mark.parametrize("value", [0.3, -0.3, 1.003, 1e-30, -7.77, 0.0])
def test_rounding_is_right_in_the_mean(value: float) -> None:
    n = 100_000
    values = torch.full((n,), value)
    found = drawn(values, 0).double()
    spacing = float(found.max() - found.min())
    assert abs(float(found.mean()) - float(values[0])) <= 5 * spacing / (2 * n**0.5)


def test_what_is_not_finite_stays_so() -> None:
    values = torch.tensor([float("inf"), float("-inf"), float("nan")])
    assert torch.equal(drawn(values, 0).isfinite(), torch.zeros(3, dtype=torch.bool))


def parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    shapes = [(40, 30), (50,), (7, 11, 2)]
    return [torch.nn.Parameter((0.02 * torch.randn(shape)).bfloat16().to(dtype)) for shape in shapes]


def made(params: list[torch.nn.Parameter], update: Update, lr: float = 1e-5) -> Bfloat16Optimizer:
    return Bfloat16Optimizer(params, inner=torch.optim.AdamW, update=update, seed=3, lr=lr, weight_decay=0.01)


def give_gradients(params: list[torch.nn.Parameter], step: int, *, dtype: torch.dtype) -> None:
    torch.manual_seed(step)
    for parameter in params:
        parameter.grad = (torch.randn(parameter.shape) + 1).bfloat16().to(dtype)


@pytest.mark.parametrize("update", UPDATES)
def test_the_path_is_that_of_float32_weights(update: Update, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against torch's AdamW on float32 weights with the same gradients; torch's on bfloat16 weights stands still."""
    monkeypatch.setattr(bfloat16_optimizer, "AT_ONCE", 1000)  # in two parts
    n_steps = 60
    wide, ours, plain = parameters(torch.float32), parameters(torch.bfloat16), parameters(torch.bfloat16)
    start = torch.cat([p.detach().flatten() for p in wide]).clone()
    reference = torch.optim.AdamW(wide, lr=1e-5, weight_decay=0.01)
    naive = torch.optim.AdamW(plain, lr=1e-5, weight_decay=0.01)
    optimizer = made(ours, update)
    for step in range(n_steps):
        for params, dtype, one in (
            (wide, torch.float32, reference),
            (ours, torch.bfloat16, optimizer),
            (plain, torch.bfloat16, naive),
        ):
            give_gradients(params, step, dtype=dtype)
            one.step()
    theirs, found, still = (torch.cat([p.detach().float().flatten() for p in each]) for each in (wide, ours, plain))
    moved = (theirs - start).norm()
    if update == "master":  # the kept weights are float32's, to rounding, and the model's are the nearest to them
        masters = torch.cat([p.detach().flatten() for g in optimizer.inner.param_groups for p in g["params"]])
        assert (masters - theirs).norm() < 1e-3 * moved
        assert torch.equal(masters.bfloat16().float(), found)
    # Every weight is off by at most a few spacings of bfloat16, and the mean by none: the noise is independent.
    assert (found - theirs).abs().mean() < 1.5 * (theirs.bfloat16().float() - theirs).abs().mean() + 2e-4
    assert abs((found - theirs).mean()) < 0.15 * (theirs - start).mean().abs()
    assert abs((still - theirs).mean()) > 0.5 * (theirs - start).mean().abs()
    assert (found != start).float().mean() > 0.9 > (still != start).float().mean()
    for state in optimizer.inner.state.values():
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32


@pytest.mark.parametrize("update", UPDATES)
def test_restored_it_goes_on_to_the_same_bits(update: Update) -> None:
    ours = parameters(torch.bfloat16)
    optimizer = made(ours, update)
    for step in range(6):
        if step == 3:
            kept, state = copy.deepcopy(ours), copy.deepcopy(optimizer.state_dict())
        give_gradients(ours, step, dtype=torch.bfloat16)
        optimizer.param_groups[0]["lr"] = 1e-3 / (step + 1)  # as a schedule does
        optimizer.step()
    resumed = made(kept, update)
    resumed.load_state_dict(state)
    assert resumed.param_groups[0]["lr"] == 1e-3 / 3
    for step in range(3, 6):
        give_gradients(kept, step, dtype=torch.bfloat16)
        resumed.param_groups[0]["lr"] = 1e-3 / (step + 1)
        resumed.step()
    assert all(torch.equal(one, other) for one, other in zip(kept, ours, strict=True))


def test_a_parameter_without_a_gradient_stays() -> None:
    ours = parameters(torch.bfloat16)
    before = ours[1].detach().clone()
    give_gradients(ours, 0, dtype=torch.bfloat16)
    ours[1].grad = None
    optimizer = made(ours, "stochastic", lr=1.0)
    optimizer.step()
    assert torch.equal(ours[1], before) and not torch.equal(ours[0], parameters(torch.bfloat16)[0])


@pytest.mark.parametrize("update", UPDATES)
def test_training_moves_nearly_all_weights(update: Update, model_dir: Path) -> None:
    """The whole way, against a run with float32 weights."""
    settings: dict[str, Any] = {
        "model": model_dir,
        "forget": build_examples()[:4],
        "batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": 20,
        "learning_rate": 1e-4,
        "lr_schedule": "constant",
        "warmup_ratio": 0,
        "progress": False,
        "device": "cpu",
    }
    start = flat_weights(build_tiny_llama())
    wide = flat_weights(train("ga", **settings).model) - start
    found = train("ga", precision="bfloat16", bfloat16_update=update, **settings)
    assert {p.dtype for p in found.model.parameters()} == {torch.bfloat16}
    narrow = flat_weights(found.model) - start.bfloat16().float()
    moves = wide.abs() > 1e-3  # half the way of every step; others have gradients of changing sign
    # A weight that was rounded up and down again stands where it was.
    assert (narrow[moves] != 0).float().mean() > {"stochastic": 0.8, "master": 0.95}[update]
    assert torch.nn.functional.cosine_similarity(narrow, wide, dim=0) > {"stochastic": 0.75, "master": 0.95}[update]


def test_an_adapter_on_a_bfloat16_base_is_float32(model_dir: Path) -> None:
    result = train(
        "ga",
        model=model_dir,
        forget=build_examples()[:4],
        precision="bfloat16",
        lora_rank=2,
        max_steps=2,
        progress=False,
        device="cpu",
    )
    kinds = {parameter.requires_grad: set() for parameter in result.model.parameters()}
    for parameter in result.model.parameters():
        kinds[parameter.requires_grad].add(parameter.dtype)
    assert kinds == {True: {torch.float32}, False: {torch.bfloat16}}


@pytest.mark.parametrize(
    ("options", "words", "factor"),
    [
        ({}, "4 weights + 4 gradients + 8 moments = 16 bytes", 16),
        ({"optimizer": "lion"}, "4 weights + 4 gradients + 4 moments = 12 bytes", 12),
        ({"optimizer": "paged_adamw"}, "4 weights + 4 gradients + 8 moments = 16 bytes", 16),
        ({"precision": "bfloat16"}, "2 weights + 4 gradients + 8 moments = 14 bytes", 14),
        (
            {"precision": "bfloat16", "bfloat16_update": "master"},
            "2 weights + 4 float32 weights + 4 gradients + 8 moments = 18 bytes",
            18,
        ),
    ],
)
def test_the_memory_of_the_state_is_said(options: dict[str, Any], words: str, factor: int) -> None:
    model = build_tiny_llama()
    if options.get("precision") == "bfloat16":
        model.bfloat16()
    line = state_line(model, TrainOptions(**options))
    assert words in line and f"{factor * model.num_parameters() / 1e9:.3g} GB" in line
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = 2 if "precision" in options else 4
    total = size * model.num_parameters() + (factor - size) * trained
    assert f"{total / 1e9:.3g} GB" in state_line(model, TrainOptions(**options))


def test_bfloat16_weights_are_refused_under_fsdp(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(InputError, match="`precision` bfloat16 is not supported under FSDP.*bf16_mixed"):
        training_arguments(
            TrainOptions(precision="bfloat16"),
            n_steps=1,
            device=torch.device("cpu"),
            output_dir=str(model_dir),
            hidden_losses=False,
        )


@pytest.mark.parametrize("method", ["ga", "grad_diff"])
def test_gradients_of_micro_batches_are_summed_in_float32(
    method: str, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 times the same micro-batch: against 64 times one gradient, and against autograd's own sum in bfloat16."""
    n = 64
    forget, retain = build_examples()[0], build_examples()[1]
    settings: dict[str, Any] = {
        "model": model_dir,
        "precision": "bfloat16",
        "batch_size": 1,
        "max_steps": 1,
        "max_grad_norm": 0,
        "progress": False,
        "device": "cpu",
    }
    seen: dict[int, list[Tensor]] = {}

    def watched(self: Bfloat16Optimizer, _closure: None = None) -> None:
        seen[len(seen)] = [p.grad.double() for group in self.param_groups for p in group["params"]]

    monkeypatch.setattr(Bfloat16Optimizer, "step", watched)
    for times in (1, n):
        data: dict[str, Any] = {"forget": [forget] * times}
        if method == "grad_diff":
            data["retain"] = [retain] * times
        train(method, gradient_accumulation_steps=times, **data, **settings)
    one, many = (torch.cat([gradient.flatten() for gradient in seen[run]]) for run in (0, 1))
    in_bfloat16 = torch.zeros(len(one), dtype=torch.bfloat16)
    for _ in range(n):
        in_bfloat16 += (one / n).bfloat16()
    error = (many - one).norm() / one.norm()
    assert error < 2**-8
    # One rounding of the sum is left where two losses are added, and none where one is: n is a power of 2.
    assert error == 0 if method == "ga" else error < 0.1 * (in_bfloat16.double() - one).norm() / one.norm()


def test_a_weight_that_no_loss_reaches_stays_without_a_gradient(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weight decay would move it otherwise: with float32 weights it does not."""
    reached: list[bool] = []

    def watched(self: Bfloat16Optimizer, _closure: None = None) -> None:
        reached.extend(p.grad is not None for group in self.param_groups for p in group["params"])

    monkeypatch.setattr(Bfloat16Optimizer, "step", watched)
    settings: dict[str, Any] = {"forget": build_examples()[:2], "retain": build_examples()[2:4], "progress": False}
    settings |= {"layer": 0, "train_parameters": ".", "max_steps": 1, "device": "cpu"}
    train("rmu", model=model_dir, precision="bfloat16", **settings)
    assert True in reached and False in reached
