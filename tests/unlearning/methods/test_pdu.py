"""PDU: its multiplier against a plain loop, at its normal state 0, and its warm-up as a share of the run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.unlearning.helpers import build_examples, build_tiny_llama
from tests.unlearning.small_world import at_call, interrupt
from unlearning import Example, train
from unlearning.data.encoding import encode

FORGET, RETAIN = build_examples()[:4], build_examples()[4:]
RUN: dict[str, Any] = {
    "forget": FORGET,
    "retain": RETAIN,
    "batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 2e-3,
    "lr_schedule": "constant",
    "warmup_ratio": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "logging_steps": 1,
    "progress": False,
    "device": "cpu",
}


def mean_over_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> Any:
    """The logits and the tokens of all answers, text by text and without padding."""
    spans = encode(tokenizer, examples, append_eos=True, max_length=None).spans
    logits = [model(torch.tensor([s.input_ids])).logits[0, s.answer_start - 1 : -1] for s in spans]
    return torch.cat(logits), torch.tensor([token for s in spans for token in s.input_ids[s.answer_start :]])


def plain_run(tokenizer: PreTrainedTokenizerFast, *, steps: int, warmup: int, **o: float) -> list[tuple[float, float]]:
    """Losses of a loop in float64: (retain loss of the step, multiplier after it)."""
    model = build_tiny_llama().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RUN["learning_rate"], weight_decay=0)
    multiplier, seen = o["lambda0"], []
    for step in range(1, steps + 1):
        logits, _ = mean_over_tokens(model, tokenizer, FORGET)
        flat = ((logits.max(-1).values - logits.mean(-1)) ** 2).mean()
        logits, targets = mean_over_tokens(model, tokenizer, RETAIN)
        retain = -logits.log_softmax(-1)[torch.arange(len(targets)), targets].mean()
        optimizer.zero_grad()
        (o["gamma"] * flat + multiplier * retain).backward()
        optimizer.step()
        if step > warmup:
            multiplier = max(0.0, multiplier + o["eta"] * (retain.item() - o["epsilon"]))
        seen.append((retain.item(), multiplier))
    return seen


@pytest.mark.parametrize(
    ("shift", "lambda0", "at_zero"), [(-3.0, 0.2, "never"), (2.0, 0.2, "at the end"), (-3.0, 0.0, "at the start")]
)
def test_the_multiplier_is_that_of_a_plain_loop(
    shift: float, lambda0: float, at_zero: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with torch.no_grad():
        logits, targets = mean_over_tokens(build_tiny_llama(), tokenizer, RETAIN)
    start = torch.nn.functional.cross_entropy(logits, targets).item()
    own = {"epsilon": start + shift, "lambda0": lambda0, "eta": 1.5, "gamma": 1.0}
    result = train(
        "pdu", model=build_tiny_llama(), tokenizer=tokenizer, max_steps=9, **RUN, **own, dual_warmup_ratio=0.25
    )
    expected = plain_run(tokenizer, steps=9, warmup=2, **own)
    seen = [(line["retain_loss"], line["retain_multiplier"]) for line in result.history]
    for (loss, multiplier), (their_loss, their_multiplier) in zip(seen, expected, strict=True):
        assert loss == pytest.approx(their_loss, rel=1e-4)
        assert multiplier == pytest.approx(their_multiplier, abs=2e-3)
    zero = [multiplier == 0 for _, multiplier in seen]
    assert (zero[0], zero[-1]) == (at_zero == "at the start", at_zero == "at the end")


def test_a_run_killed_at_multiplier_0_goes_on_to_the_same_bits(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**RUN, "model": model_dir, "max_steps": 8, "epsilon": 50.0, "lambda0": 1.0, "eta": 0.01}
    whole = train("pdu", **settings)
    assert [line["retain_multiplier"] for line in whole.history] == pytest.approx(
        [1, 1, 0.56, 0.12, 0, 0, 0, 0], abs=0.05
    )
    kept: dict[str, Any] = {**settings, "save_every": 5, "output_dir": tmp_path / "run"}
    with monkeypatch.context() as patched:
        at_call(patched, "pdu", 7, interrupt, loss="retain_loss")
        with pytest.raises(KeyboardInterrupt):
            train("pdu", **kept)
    resumed = train("pdu", resume=True, **kept)
    assert resumed.history == whole.history
    for one, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("given", "steps", "warmup"),
    [
        ({"max_steps": 9, "dual_warmup_ratio": 0.5}, 9, 4),
        ({"epochs": 3, "batch_size": 2}, 6, 1),  # a quarter of six steps
        ({"max_steps": 3, "dual_warmup_steps": 2}, 3, 2),
        ({"max_steps": 2, "dual_warmup_ratio": 0.0}, 2, 0),
    ],
    ids=str,
)
def test_the_warmup_is_a_share_of_the_run(
    given: dict[str, Any], steps: int, warmup: int, model_dir: Path, tmp_path: Path
) -> None:
    import json

    out = tmp_path / "run"
    settings = {**RUN, "epsilon": 0.0, "lambda0": 0.0, "eta": 0.01, **given}
    history = train("pdu", model=model_dir, output_dir=out, **settings).history
    assert len(history) == steps
    assert [line["retain_multiplier"] > 0 for line in history] == [step > warmup for step in range(1, steps + 1)]
    record = json.loads((out / "unlearning.json").read_text())
    assert record["resolved"]["dual_warmup_steps"] == warmup
