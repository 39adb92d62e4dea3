"""Optimizers, precisions, checkpointed activations, TensorBoard, and launchers that are not supported."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.unlearning.helpers import build_examples, build_tiny_llama
from tests.unlearning.small_world import flat_weights
from tests.unlearning.training.test_train import WHOLE, options_of
from unlearning import InputError, train
from unlearning.checkpoints.load import load_weights
from unlearning.options import TrainOptions
from unlearning.training.arguments import optimizer_class, state_line
from unlearning.training.trainer import UnlearningTrainer

FORGET, RETAIN = build_examples()[:4], build_examples()[4:]
SHARED: dict[str, Any] = {
    "forget": FORGET,
    "retain": RETAIN,
    "batch_size": 2,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "warmup_ratio": 0,
    "max_steps": 3,
    "logging_steps": 1,
    "progress": False,
    "device": "cpu",
}


def one_step_of(optimizer: str, weights: torch.Tensor, gradient: torch.Tensor, rate: float, decay: float) -> Any:
    """The first step from zero moments, as the papers have it."""
    shrunk = weights * (1 - rate * decay)
    if optimizer == "lion":
        return shrunk - rate * gradient.sign()
    return shrunk - rate * gradient / (gradient.abs() + 1e-8)


def noting(create: Any, made: list[Any]) -> Any:
    """Return a function that also keeps what another returns."""

    def created(*args: Any, **settings: Any) -> Any:
        made.append(create(*args, **settings))
        return made[-1]

    return created


@pytest.mark.filterwarnings("ignore:Paged optimizers")
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lion"])
def test_an_optimizer_makes_its_first_step(optimizer: str, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and after of one step against the papers' formulas; of 8-bit Adam the small tensors are in float32.

    On a CPU a paged optimizer does the same without pages.
    """
    monkeypatch.setattr("unlearning.training.train.check_optimizer", lambda *_: None)
    made: list[Any] = []
    monkeypatch.setattr(UnlearningTrainer, "create_optimizer", noting(UnlearningTrainer.create_optimizer, made))
    model = load_weights(model_dir)
    gradients: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: gradients.update({name: p.grad.clone()}))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    settings = {**SHARED, "max_steps": 1, "weight_decay": 0.1, "max_grad_norm": 0, "batch_size": 4}
    train("npo", model=model, optimizer=optimizer, **settings)
    for name, parameter in model.named_parameters():
        decay = 0.0 if "norm" in name else 0.1  # the parent leaves norms and biases out of it
        wanted = one_step_of(optimizer, before[name], gradients[name], 1e-3, decay)
        touched = gradients[name].abs() > 1e-5
        assert touched.any()
        off = (parameter - wanted).abs()[touched]
        assert off.max() < (2e-4 if optimizer.endswith("8bit") else 2e-6), name
    kept = {key: value for key, value in vars(made[0]).items() if key in ("is_paged", "args")}
    assert kept.get("is_paged", False) == optimizer.startswith("paged")
    assert getattr(kept.get("args"), "optim_bits", 32) == (8 if optimizer.endswith("8bit") else 32)


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_bfloat16_weights_are_trained_by_the_same_optimizer(optimizer: Any) -> None:
    made = optimizer_class(TrainOptions(optimizer=optimizer, learning_rate=1e-3), bfloat16=True)
    assert made is not None
    inner = made[0]([torch.nn.Parameter(torch.ones(2).bfloat16())], **made[1]).inner
    assert (inner.is_paged, inner.args.optim_bits) == ("paged" in optimizer, 8 if "8bit" in optimizer else 32)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_moments_in_8_bit_are_said_as_they_are_kept(
    precision: Any, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the state that the optimizer has after a step."""
    made: list[Any] = []
    monkeypatch.setattr(UnlearningTrainer, "create_optimizer", noting(UnlearningTrainer.create_optimizer, made))
    options: dict[str, Any] = {"precision": precision, "optimizer": "adamw_8bit"}
    model = train("npo", model=model_dir, **options, **{**SHARED, "max_steps": 1}).model
    moments = sum(
        value.nbytes
        for state in getattr(made[0], "inner", made[0]).state.values()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and not name.startswith("qmap")  # tables of values, the same for all
    )
    assert f"4 gradients + {moments / model.num_parameters():.3g} moments" in state_line(model, TrainOptions(**options))


@pytest.mark.parametrize("precision", ["bf16_mixed", "bfloat16"])
@pytest.mark.parametrize("method", ["npo", "blur"])
def test_half_precision_is_near_float32(precision: str, method: str, model_dir: Path, tmp_path: Path) -> None:
    exact = train(method, model=model_dir, **SHARED)
    rounded = train(method, model=model_dir, precision=precision, output_dir=tmp_path / "run", **SHARED)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    assert {parameter.dtype for parameter in rounded.model.parameters()} == {dtype}
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run", dtype="auto")
    assert saved.dtype == torch.float32  # that of the checkpoint before training
    for line, other in zip(rounded.history, exact.history, strict=True):
        assert line["loss"] != other["loss"]
        assert line["loss"] == pytest.approx(other["loss"], rel=0.05)
    if precision == "bf16_mixed":
        start = flat_weights(build_tiny_llama())
        went, exactly = flat_weights(rounded.model) - start, flat_weights(exact.model) - start
        assert torch.cosine_similarity(went, exactly, dim=0) > 0.95


@pytest.mark.parametrize("method", ["npo", "blur", "rmu"])
def test_checkpointed_activations_change_nothing(method: str, model_dir: Path) -> None:
    plain = train(method, model=model_dir, **SHARED)
    recomputed = train(method, model=model_dir, gradient_checkpointing=True, **SHARED)
    assert recomputed.history == plain.history
    torch.testing.assert_close(flat_weights(recomputed.model), flat_weights(plain.model), atol=0, rtol=0)
    assert recomputed.model.config.use_cache


def test_activations_are_really_computed_again(model_dir: Path) -> None:
    def passes(**options: Any) -> int:
        model = load_weights(model_dir)
        calls: list[int] = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        train("npo", model=model, **{**SHARED, "max_steps": 1}, **options)
        return len(calls)

    passes()  # which leaves the start model's losses in the cache
    assert passes(gradient_checkpointing=True) == passes() + 2  # one for the forget and one for the retain batch


def test_deepspeed_is_refused_by_name(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(InputError, match=r"DeepSpeed is not supported.*--use_fsdp"):
        train("npo", model=model_dir, forget=build_examples(), alpha=0, progress=False)


def test_blur_refuses_the_first_fsdp(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(InputError, match=r"FSDP 1 is not supported by blur.*--fsdp_version 2"):
        train("blur", model=model_dir, forget=build_examples(4), retain=build_examples()[4:], progress=False)


def test_the_history_goes_to_tensorboard(model_dir: Path, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result = train(
        "npo",
        model=model_dir,
        output_dir=tmp_path / "out",
        tensorboard=True,
        max_steps=3,
        progress=False,
        **{**options_of("npo"), **WHOLE, "logging_steps": 1},
    )
    read = events.EventAccumulator(str(tmp_path / "out" / "logs"))
    read.Reload()
    logged = [event.value for event in read.Scalars("train/forget_loss")]
    assert logged == pytest.approx([line["forget_loss"] for line in result.history], rel=1e-6)
    with pytest.raises(InputError, match="`tensorboard` needs a directory"):
        train("npo", model=model_dir, tensorboard=True, progress=False, **options_of("npo"))
