"""The trainer against a plain loop, and what it refuses, keeps and leaves behind."""

import copy
import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tests.unlearning.helpers import build_examples, build_tiny_llama, build_tokenizer
from unlearning import Example, InputError, train
from unlearning.methods import METHODS

FORGET = build_examples()[:4]
RETAIN = build_examples()[4:]
# One step is one pass over everything, so that the order of the examples cannot matter.
WHOLE = {
    "batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "warmup_ratio": 0,
    "lr_schedule": "constant",
}
BAD_INPUT: list[tuple[str, dict[str, Any], str]] = [
    ("npoo", {}, "got 'npoo'; did you mean 'npo'?"),
    ("npo", {"forget": None}, "npo needs forget data. Give `forget`"),
    ("npo", {"retain": None}, "npo needs retain data. Give `retain`, or set `alpha` to 0"),
    ("finetune", {}, "finetune does not read forget data. Remove `forget`"),
    ("finetune", {"forget": None, "retain": None}, "finetune needs retain data"),
    ("npo", {"forget": []}, "`forget` must have at least one example"),
    ("npo", {"forget": [("Who?", "Ada")]}, "`forget` must hold examples, got tuple at index 0"),
    ("npo", {"forget": "missing.json"}, "missing.json: no such file"),
    ("npo", {"learning_rat": 1}, "did you mean 'learning_rate'?"),
    ("npo", {"max_length": 4}, "`max_length` is 4"),
    ("npo", {"model": "/nowhere/model"}, "/nowhere/model: no such directory"),
    ("npo", {"model": "nowhere:base"}, "no built-in model 'nowhere:base'"),
]


def slow_sequence_nll(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, example: Example) -> list[Tensor]:
    """Token by token, without padding: prompt and answer as this tokenizer splits them (no token crosses here)."""
    prompt = tokenizer(example.prompt)["input_ids"]
    ids = tokenizer(f"{example.prompt} {example.answer}<eos>")["input_ids"]
    assert ids[: len(prompt)] == prompt
    logits = model(torch.tensor([ids])).logits[0]
    return [-logits[place - 1].log_softmax(-1)[ids[place]] for place in range(len(prompt), len(ids))]


def slow_loss(
    method: str,
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
) -> Tensor:
    forget = [slow_sequence_nll(model, tokenizer, example) for example in FORGET]
    retain = [slow_sequence_nll(model, tokenizer, example) for example in RETAIN]
    with torch.no_grad():
        frozen = [sum(slow_sequence_nll(reference, tokenizer, example)) for example in FORGET]
    retain_ce = sum(sum(tokens) for tokens in retain) / sum(len(tokens) for tokens in retain)
    if method == "finetune":
        return retain_ce
    if method == "grad_diff":
        return -sum(sum(tokens) for tokens in forget) / sum(len(tokens) for tokens in forget) + 2.5 * retain_ce
    terms = [torch.log(torch.sigmoid(0.3 * (sum(ours) - ref))) for ours, ref in zip(forget, frozen, strict=True)]
    return -(2 / 0.3) * sum(terms) / len(terms) + 2.5 * retain_ce


def options_of(method: str) -> dict[str, Any]:
    own: dict[str, dict[str, Any]] = {"finetune": {}, "grad_diff": {"alpha": 2.5}, "npo": {"alpha": 2.5, "beta": 0.3}}
    data: dict[str, Any] = {"retain": RETAIN} if method == "finetune" else {"forget": FORGET, "retain": RETAIN}
    return {**own[method], **data}


def largest_difference(one: PreTrainedModel, other: PreTrainedModel) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def relative_distance(one: PreTrainedModel, other: PreTrainedModel, start: PreTrainedModel) -> float:
    """Distance of two trained models over the distance that training went.

    Adam's first steps are signs of gradients, so single weights with a gradient of rounding size may differ by a
    whole step in two exact computations of the same thing.
    """
    a, b, c = (torch.cat([p.detach().flatten() for p in model.parameters()]) for model in (one, other, start))
    return ((a - b).norm() / (a - c).norm()).item()


@pytest.mark.parametrize("method", ["finetune", "grad_diff", "npo"])
def test_training_equals_a_plain_loop(method: str, tokenizer: PreTrainedTokenizerFast) -> None:
    start = build_tiny_llama()
    reference, slow = copy.deepcopy(start), copy.deepcopy(start)
    result = train(
        method,
        model=copy.deepcopy(start),
        tokenizer=tokenizer,
        progress=False,
        max_steps=4,
        weight_decay=0,
        logging_steps=1,
        **options_of(method),
        **WHOLE,
    )
    optimizer = torch.optim.AdamW(slow.parameters(), lr=1e-3, weight_decay=0)
    values = []
    for _ in range(4):
        loss = slow_loss(method, slow, reference, tokenizer)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(slow.parameters(), 1.0)
        optimizer.step()
        values.append(loss.item())
    assert [line["loss"] for line in result.history] == pytest.approx(values, rel=1e-4)
    assert largest_difference(result.model, start) > 3e-3
    assert relative_distance(result.model, slow, start) < 1e-3


def test_the_same_seed_gives_the_same_weights(model_dir: Path) -> None:
    def run(seed: int) -> LlamaForCausalLM:
        return train(
            "grad_diff",
            model=model_dir,
            forget=FORGET,
            retain=RETAIN,
            progress=False,
            seed=seed,
            epochs=2,
            batch_size=1,
            gradient_accumulation_steps=1,
            learning_rate=1e-3,
        ).model

    first = run(0)
    assert largest_difference(first, run(0)) == 0
    assert largest_difference(first, run(1)) > 1e-5


def test_a_run_is_saved_whole_and_recognised(model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "npo"
    settings: dict[str, Any] = {**options_of("npo"), **WHOLE, "progress": False, "output_dir": out}
    result = train("npo", model=model_dir, max_steps=12, **settings)
    assert not result.already_done
    assert [int(line["step"]) for line in result.history] == [1, 10, 12]
    assert {"loss", "forget_loss", "retain_loss", "grad_norm", "learning_rate", "epoch"} <= set(result.history[-1])
    last = result.history[-1]
    assert last["loss"] == pytest.approx(last["forget_loss"] + 2.5 * last["retain_loss"], rel=1e-5)

    record = json.loads((out / "unlearning.json").read_text())
    assert record["history"] == result.history
    assert record["configuration"]["options"]["beta"] == 0.3
    assert len(record["configuration"]["forget_data"]) == 64
    assert record["versions"]["torch"] == torch.__version__
    saved = AutoModelForCausalLM.from_pretrained(out)
    assert largest_difference(saved, result.model) == 0
    assert saved.config.use_cache is True
    assert not result.model.training
    assert [path.name for path in out.parent.iterdir()] == ["npo"]

    again = train("npo", model=model_dir, max_steps=12, **settings)
    assert again.already_done
    assert again.history == result.history
    assert largest_difference(again.model, result.model) == 0

    with pytest.raises(InputError, match="another configuration: max_steps is 12 there, 13 now"):
        train("npo", model=model_dir, max_steps=13, **settings)
    with pytest.raises(InputError, match="another configuration: its forget data"):
        train("npo", model=model_dir, max_steps=12, **{**settings, "forget": FORGET[:2]})
    with pytest.raises(InputError, match="another configuration: its weights before training"):
        train("npo", model=out, max_steps=12, **settings)


def test_a_directory_with_other_files_is_refused(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="`output_dir`.*other files"):
        train("npo", model=model_dir, output_dir=tmp_path, progress=False, **options_of("npo"))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_weights_that_are_not_finite_after_the_last_step_are_not_saved(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not finite after the last step; nothing was saved"):
        train(
            "grad_diff",
            model=model_dir,
            output_dir=tmp_path / "out",
            progress=False,
            max_steps=1,
            **{**options_of("grad_diff"), **WHOLE, "learning_rate": 1e30, "weight_decay": 1e30},
        )
    assert list(tmp_path.iterdir()) == []


def test_control_c_leaves_nothing(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npo = METHODS["npo"]
    steps = []

    def interrupted(model: PreTrainedModel, batch: Any, options: Any) -> Any:
        steps.append(1)
        if len(steps) == 2:
            signal.raise_signal(signal.SIGINT)
        return npo.forget_loss(model, batch, options)

    monkeypatch.setitem(METHODS, "npo", replace(npo, forget_loss=interrupted))
    with pytest.raises(KeyboardInterrupt):
        train("npo", model=model_dir, output_dir=tmp_path / "out", progress=False, **options_of("npo"), **WHOLE)
    assert len(steps) == 2
    assert list(tmp_path.iterdir()) == []


def test_control_c_while_saving_leaves_nothing(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    present = []

    def interrupted(_: PreTrainedTokenizerFast, directory: Path, *_more: object) -> None:
        present.extend(path.name for path in Path(directory).iterdir())
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("unlearning.training.run.write_tokenizer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(
            "npo",
            model=model_dir,
            output_dir=tmp_path / "out",
            progress=False,
            max_steps=1,
            **options_of("npo"),
            **WHOLE,
        )
    assert "model.safetensors" in present  # half of it was written
    assert list(tmp_path.iterdir()) == []


def test_a_bfloat16_checkpoint_is_trained_in_float32(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    build_tiny_llama().bfloat16().save_pretrained(tmp_path / "half")
    tokenizer.save_pretrained(tmp_path / "half")
    result = train("npo", model=tmp_path / "half", max_steps=1, progress=False, **options_of("npo"), **WHOLE)
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.float32}
    assert result.history[0]["forget_loss"] == pytest.approx(2 / 0.3 * 0.693147, abs=1e-4)


@pytest.mark.parametrize(("method", "changes", "message"), BAD_INPUT, ids=[message[:30] for *_, message in BAD_INPUT])
def test_bad_input_is_refused(method: str, changes: dict[str, Any], message: str, model_dir: Path) -> None:
    given: dict[str, Any] = {"model": model_dir, "forget": FORGET, "retain": RETAIN, "progress": False}
    with pytest.raises(InputError) as error:
        train(method, **{**given, **changes})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_incomplete_checkpoints_are_refused(tmp_path: Path, model_dir: Path) -> None:
    def refused(directory: Path) -> str:
        with pytest.raises(InputError) as error:
            train("npo", model=directory, progress=False, **options_of("npo"))
        assert "\n" not in str(error.value)
        return str(error.value)

    def copied(name: str, *, without: tuple[str, ...] = ()) -> Path:
        target = tmp_path / name
        target.mkdir()
        for path in model_dir.iterdir():
            if path.name not in without:
                (target / path.name).write_bytes(path.read_bytes())
        return target

    assert "no config.json" in refused(copied("config", without=("config.json",)))
    no_tokenizer = copied("tokenizer", without=("tokenizer.json", "tokenizer_config.json"))
    assert "no tokenizer; copy tokenizer.json" in refused(no_tokenizer)
    assert "weights are read from safetensors files" in refused(copied("weights", without=("model.safetensors",)))
    half = copied("half")
    weights = half / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cut short" in refused(half)
    fewer = copied("fewer")
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights_of(fewer))
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, weights_of(fewer), metadata={"format": "pt"})
    assert "1 missing keys in its weights, such as model.layers.1.mlp.down_proj.weight" in refused(fewer)


def weights_of(directory: Path) -> Path:
    return directory / "model.safetensors"


@pytest.mark.parametrize("method", ["npo", "undial"])
def test_a_model_that_is_kept_gives_the_same_training_as_its_constants(model_dir: Path, method: str) -> None:
    settings: dict[str, Any] = {**WHOLE, "max_steps": 3, "progress": False, "forget": FORGET, "retain": RETAIN}
    settings |= {"alpha": 2.0, "retain_loss": "kl"}
    stored, kept = (train(method, model=model_dir, reference_budget=budget, **settings) for budget in (1.0, 0.0))
    start = build_tiny_llama()
    assert relative_distance(stored.model, kept.model, start) < 1e-6
    assert [line["loss"] for line in stored.history] == pytest.approx([line["loss"] for line in kept.history], rel=1e-6)


def test_a_model_without_the_field_use_cache_is_trained_and_keeps_none() -> None:
    config = OpenAIGPTConfig(vocab_size=384, n_embd=32, n_layer=2, n_head=4, n_positions=128)
    model = OpenAIGPTLMHeadModel(config)
    result = train("ga", model=model, tokenizer=build_tokenizer(), forget=FORGET, max_steps=1, progress=False)
    assert not hasattr(result.model.config, "use_cache")
