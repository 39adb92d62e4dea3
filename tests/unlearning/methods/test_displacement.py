"""SAM-NPO and TAR against plain loops in float64, and what holds of every displacement."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.unlearning.helpers import build_tiny_llama
from tests.unlearning.methods.plain import (
    ALPHA,
    BETA,
    FORGET,
    RHO,
    RUN,
    SIZES,
    answers,
    assert_close,
    negative_entropy,
    npo,
    plain_loop,
    pooled,
    slopes,
)
from tests.unlearning.small_world import at_call, interrupt
from unlearning import InputError, train
from unlearning.objectives.displacement import Ascent, Noise


@pytest.mark.parametrize("sizes", SIZES, ids=["at once", "one by one"])
def test_sam_takes_the_gradient_uphill(sizes: dict[str, int], tokenizer: PreTrainedTokenizerFast) -> None:
    def uphill(model: PreTrainedModel, _step: int, reference: list[Tensor]) -> list[Tensor]:
        first = slopes(npo(answers(model, tokenizer, FORGET), reference), model)
        length = math.sqrt(sum(float(part.square().sum()) for part in first))
        with torch.no_grad():
            for parameter, part in zip(model.parameters(), first, strict=True):
                parameter += RHO * part / length
        return slopes(npo(answers(model, tokenizer, FORGET), reference), model)

    own = {"rho": RHO, "beta": BETA, "alpha": ALPHA}
    trained = train("sam_npo", model=build_tiny_llama(), tokenizer=tokenizer, **RUN, **sizes, **own)
    unmoved = plain_loop(tokenizer, lambda m, _, r: slopes(npo(answers(m, tokenizer, FORGET), r), m))
    assert_close(trained.model, plain_loop(tokenizer, uphill), unmoved)


@pytest.mark.parametrize("sizes", SIZES, ids=["at once", "one by one"])
@pytest.mark.parametrize("loss", ["entropy", "npo"])
def test_tar_takes_the_gradient_after_an_attack(
    loss: str, sizes: dict[str, int], tokenizer: PreTrainedTokenizerFast
) -> None:
    counts = []

    def attacked(model: PreTrainedModel, step: int, reference: list[Tensor]) -> list[Tensor]:
        attacker = torch.optim.Adam(model.parameters(), lr=5e-3)
        counts.append(int(torch.randint(4, (), generator=torch.Generator().manual_seed(7 * 1_000_003 + step))))
        for _ in range(counts[-1]):
            attacker.zero_grad()
            pooled(answers(model, tokenizer, FORGET)).backward()
            attacker.step()
        found = answers(model, tokenizer, FORGET)
        return slopes(negative_entropy(found) if loss == "entropy" else npo(found, reference), model)

    own = {"attack_steps": 3, "attack_learning_rate": 5e-3, "attack_seed": 7, "alpha": ALPHA, "forget_loss": loss}
    own |= {"beta": BETA} if loss == "npo" else {}
    trained = train("tar", model=build_tiny_llama(), tokenizer=tokenizer, **RUN, **sizes, **own)
    expected = plain_loop(tokenizer, attacked)
    own["attack_learning_rate"] = 1e-30
    unmoved = train("tar", model=build_tiny_llama(), tokenizer=tokenizer, **RUN, **sizes, **own)
    assert_close(trained.model, expected, list(unmoved.model.parameters()))
    assert [line["attack_steps"] for line in trained.history] == counts
    assert max(counts) > 0


def test_the_weights_are_put_back_to_the_bit(tokenizer: PreTrainedTokenizerFast) -> None:
    before = [parameter.clone() for parameter in build_tiny_llama().parameters()]
    still = {**RUN, "learning_rate": 1e-30, "batch_size": 4, "gradient_accumulation_steps": 1}
    for method, own in (("sam_npo", {"rho": 5.0}), ("sam_npo", {"smoothing": "noise", "sigma": 3.0}), ("tar", {})):
        trained = train(method, model=build_tiny_llama(), tokenizer=tokenizer, **still, **own)
        for ours, theirs in zip(trained.model.parameters(), before, strict=True):
            assert torch.equal(ours, theirs)


def test_lengths() -> None:
    weights, gradient = [torch.zeros(3), torch.zeros(2, 2)], [torch.tensor([3.0, 0, 0]), torch.full((2, 2), 2.0)]
    moved = [weight.clone() for weight in weights]
    assert Ascent(rho=0.5).move(moved, lambda _: gradient, 0) == {"ascent_grad_norm": 5.0}
    assert torch.cat([part.flatten() for part in moved]).norm().item() == pytest.approx(0.5)
    still = [weight.clone() for weight in weights]
    Ascent(rho=0.5).move(still, lambda _: weights, 0)  # no gradient
    assert all(torch.equal(one, other) for one, other in zip(still, weights, strict=True))
    noisy = [torch.zeros(300, 300)]
    Noise(sigma=0.2, seed=0).move(noisy, lambda _: [], 3)
    assert noisy[0].std().item() == pytest.approx(0.2, rel=0.02)
    again, other = [torch.zeros(300, 300)], [torch.zeros(300, 300)]
    Noise(sigma=0.2, seed=0).move(again, lambda _: [], 3)
    Noise(sigma=0.2, seed=0).move(other, lambda _: [], 4)
    assert torch.equal(noisy[0], again[0])
    assert not torch.equal(noisy[0], other[0])


@pytest.mark.parametrize(
    ("method", "own"), [("sam_npo", {}), ("sam_npo", {"smoothing": "noise"}), ("tar", {})], ids=str
)
def test_a_killed_run_goes_on_to_the_same_bits(
    method: str, own: dict[str, Any], model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**RUN, "model": model_dir, "max_steps": 6, "batch_size": 2, "gradient_accumulation_steps": 2, **own}
    whole = train(method, **settings)
    kept: dict[str, Any] = {**settings, "save_every": 2, "output_dir": tmp_path / "run"}
    with monkeypatch.context() as patched:
        at_call(patched, method, 9, interrupt, loss="retain_loss")
        with pytest.raises(KeyboardInterrupt):
            train(method, **kept)
    resumed = train(method, resume=True, **kept)
    assert resumed.history == whole.history
    for one, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("method", ["sam_npo", "tar"])
def test_bfloat16_weights_are_refused(method: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match=r"`precision` bfloat16 is not supported by .*Set float32 or bf16_mixed"):
        train(method, model=build_tiny_llama(), tokenizer=tokenizer, **RUN, precision="bfloat16")
