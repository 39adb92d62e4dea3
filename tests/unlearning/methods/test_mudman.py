"""MUDMAN: its direction by hand, a training against a plain loop in float64, the maps that train, and resuming."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast, TrainingArguments

from tests.unlearning.helpers import build_tiny_llama
from tests.unlearning.methods.plain import FORGET, RETAIN, RUN, SIZES, answers, negative_entropy, pooled
from tests.unlearning.small_world import at_call, interrupt
from unlearning import InputError, train
from unlearning.methods import METHODS
from unlearning.methods.mudman import MUDMANOptions, trained_parameters
from unlearning.objectives.combination import SignMask
from unlearning.options import TrainOptions
from unlearning.training.trainer import UnlearningTrainer

OWN = {"alpha": 0.7, "retain_momentum": 0.6, "adversary_learning_rate": 0.5, "adversary_every": 3}


def gates(model: PreTrainedModel) -> list[Tensor]:
    return [layer.mlp.gate_proj.weight for layer in model.model.layers]


def slopes(loss: Tensor, weights: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, weights))


def plain_gates(tokenizer: PreTrainedTokenizerFast) -> list[Tensor]:
    """The gates after the steps of RUN."""
    model = build_tiny_llama().double()
    adversary = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(gates(model), lr=RUN["learning_rate"], weight_decay=0)
    average = [torch.zeros_like(weight) for weight in gates(model)]
    for step in range(RUN["max_steps"]):
        if step % OWN["adversary_every"] == 0:
            adversary.load_state_dict(model.state_dict())
        relearns = slopes(pooled(answers(adversary, tokenizer, FORGET)), gates(adversary))
        with torch.no_grad():
            for weight, slope in zip(gates(adversary), relearns, strict=True):
                weight -= OWN["adversary_learning_rate"] * slope
        f = slopes(negative_entropy(answers(adversary, tokenizer, FORGET)), gates(adversary))
        r = slopes(pooled(answers(model, tokenizer, RETAIN)), gates(model))
        average = [
            OWN["retain_momentum"] * a + (1 - OWN["retain_momentum"]) * b for a, b in zip(average, r, strict=True)
        ]
        length = torch.cat([part.flatten() for part in f]).norm()
        for weight, one, other in zip(gates(model), f, average, strict=True):
            weight.grad = torch.where(one.sign() == other.sign(), one / length, 0) + OWN["alpha"] * other
        optimizer.step()
    return gates(model)


def flat(weights: list[Tensor]) -> Tensor:
    return torch.cat([weight.detach().double().flatten() for weight in weights])


@pytest.mark.parametrize("sizes", SIZES, ids=["at once", "one by one"])
def test_a_training(sizes: dict[str, int], tokenizer: PreTrainedTokenizerFast) -> None:
    def trained(**options: Any) -> Tensor:
        model = train("mudman", model=build_tiny_llama(), tokenizer=tokenizer, **RUN, **sizes, **options).model
        return flat(gates(model))

    ours, expected = trained(**OWN), flat(plain_gates(tokenizer))
    # A sign of next to no gradient may be turned by rounding: most weights, not all.
    assert (ours - expected).abs().quantile(0.99) < 1e-5
    for other in (
        {"adversary_learning_rate": 1e-30},
        {"adversary_every": 2},
        {"retain_momentum": 0.0},
        {"alpha": 0.1},
    ):
        assert (trained(**{**OWN, **other}) - expected).abs().quantile(0.9) > 1e-5, other


def test_the_direction_by_hand() -> None:
    mask = SignMask(momentum=0.5, alpha=10.0)
    names = ["one", "other"]
    direction, logs = mask.combine(
        [torch.tensor([3.0, -1.0]), torch.tensor([[-2.0], [0.0]])],
        [torch.tensor([0.2, 0.4]), torch.tensor([[-0.6], [0.8]])],
        names,
    )
    length = 14**0.5  # of f before the mask
    torch.testing.assert_close(direction[0], torch.tensor([3 / length + 1.0, 2.0]))
    torch.testing.assert_close(direction[1], torch.tensor([[-2 / length - 3.0], [4.0]]))
    assert logs == pytest.approx({"forget_grad_norm": length, "passed_share": 13 / 14})
    # The average, not the last gradient, decides: .1 / 2 - .2 / 2 is negative, and .2 / 2 - .1 / 2 is not.
    direction, _ = mask.combine(
        [torch.tensor([1.0, 1.0]), torch.zeros(2, 1)], [torch.tensor([-0.2, -0.1]), torch.zeros(2, 1)], names
    )
    torch.testing.assert_close(direction[0], torch.tensor([-0.5, 1 / 2**0.5 + 0.5]))
    torch.testing.assert_close(direction[1], torch.tensor([[-1.5], [2.0]]))
    still, logs = mask.combine([torch.zeros(2), torch.zeros(2, 1)], [torch.zeros(2), torch.zeros(2, 1)], names)
    torch.testing.assert_close(still[1], torch.tensor([[-0.75], [1.0]]))
    assert logs == {"forget_grad_norm": 0.0, "passed_share": 0.0}


def test_the_maps_that_train() -> None:
    llama = build_tiny_llama()
    gate = {f"model.layers.{index}.mlp.gate_proj.weight" for index in range(len(llama.model.layers))}
    up = {name.replace("gate", "up") for name in gate}
    assert trained_parameters(llama, MUDMANOptions()) == gate
    assert trained_parameters(llama, MUDMANOptions(trained_maps="inputs")) == gate | up
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=2, n_head=2))
    names = {f"transformer.h.{index}.mlp.c_fc.weight" for index in range(2)}
    assert trained_parameters(gpt2, MUDMANOptions(trained_maps="inputs")) == names
    with pytest.raises(InputError, match=r"`trained_maps` gate: gates .* not found in GPT2.*Set `trained_maps` to inp"):
        trained_parameters(gpt2, MUDMANOptions())


@pytest.mark.parametrize("save_every", [2, 3], ids=["within a round", "between two rounds"])
def test_a_killed_run_goes_on_to_the_same_bits(
    save_every: int, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**RUN, **OWN, "model": model_dir, "max_steps": 6, "batch_size": 2, "gradient_accumulation_steps": 2}
    whole = train("mudman", **settings)
    kept: dict[str, Any] = {**settings, "save_every": save_every, "output_dir": tmp_path / "run"}
    with monkeypatch.context() as patched:
        at_call(patched, "mudman", 2 * save_every + 2, interrupt, loss="retain_loss")
        with pytest.raises(KeyboardInterrupt):
            train("mudman", **kept)
    resumed = train("mudman", resume=True, **kept)
    assert resumed.history == whole.history
    for one, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_adapter_trains_too(tokenizer: PreTrainedTokenizerFast) -> None:
    trained = train("mudman", model=build_tiny_llama(), tokenizer=tokenizer, **RUN, lora_rank=2)
    assert {name.split(".")[4] for name, p in trained.model.named_parameters() if p.requires_grad} == {"gate_proj"}
    assert all(0 < line["passed_share"] < 1 for line in trained.history)


@pytest.mark.parametrize("missing", ["retain", "float16"])
def test_what_cannot_work_is_refused_in_one_line(missing: str, tokenizer: PreTrainedTokenizerFast) -> None:
    if missing == "retain":
        without = {name: value for name, value in RUN.items() if name != "retain"}
        with pytest.raises(InputError, match=r"mudman needs retain data\. Give `retain`\.$"):
            train("mudman", model=build_tiny_llama(), tokenizer=tokenizer, **without)
        return
    with pytest.raises(InputError, match="`precision` fp16_mixed is not supported by mudman, .*Set float32 or bf16_m"):
        UnlearningTrainer(
            method=METHODS["mudman"],
            method_options=MUDMANOptions(),
            options=TrainOptions(precision="fp16_mixed", gradient_accumulation_steps=1),
            model=build_tiny_llama(),
            args=TrainingArguments(use_cpu=True, report_to="none"),
            training_set=[],  # type: ignore[arg-type]  # not read: the precision is refused first
        )
