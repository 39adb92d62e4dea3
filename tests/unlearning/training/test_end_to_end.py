"""Every method, on a model that knows a small world: it forgets, keeps the rest, and a killed run comes to the same."""

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, PreTrainedModel

from tests.unlearning.small_world import FORGET, NAMES, RETAIN, World, at_call, interrupt
from unlearning import train
from unlearning.methods import METHODS

STRANGERS = "Rose Moss Pond Reed Glen Cove Peak Vale Bay Holt Fell Dell Isle Cape Loch Mead".split()
SHARED: dict[str, Any] = {
    "batch_size": 16,
    "gradient_accumulation_steps": 1,
    "warmup_ratio": 0,
    "weight_decay": 0,
    "logging_steps": 3,
    "progress": False,
    "device": "cpu",
}


@dataclass(frozen=True)
class Case:
    """Options under which a method unlearns the small world in a few steps, and what is left then.

    Attributes:
        options: of the run.
        forget: the share of forget questions answered exactly must be below it, and their probability too.
        retain: the share of retain questions answered exactly must be above it; None where the method has no retain
            loss and takes the retain set along, the facts being so alike.
    """

    options: dict[str, Any] = field(default_factory=dict)
    forget: float = 0.6
    retain: float | None = 0.75


LINES = {"concept": "towns", "novice": "None of {concept}:", "expert": "All of {concept}:"}
"""Short enough for the context of the small world's model."""
STOPPED: dict[str, Any] = {"stop_when": "forget_probability<0.5"}
CASES = {
    "ga": Case({"learning_rate": 2e-3, "max_steps": 10, **STOPPED}, forget=0.7, retain=None),
    "ga_forget_kl": Case({"learning_rate": 2e-3, "max_steps": 10, **STOPPED}, forget=0.7, retain=None),
    "grad_diff": Case({"learning_rate": 3e-3, "max_steps": 12, "alpha": 2}),
    "idk": Case({"learning_rate": 4e-3, "max_steps": 20}),
    "jensun": Case({"learning_rate": 4e-3, "max_steps": 40, "alpha": 0.3}),
    "dpo": Case({"learning_rate": 6e-3, "max_steps": 18, "beta": 0.01}, forget=0.3),
    "altpo": Case(
        {"learning_rate": 5e-3, "max_steps": 14, "beta": 0.02, "alpha": 4, "samples": 1}
        | {"max_new_tokens": 4, "temperature": 3, "alternate_template": "{prompt}"}
    ),
    "npo": Case({"learning_rate": 4e-3, "max_steps": 14, "beta": 1, "alpha": 3}),
    "sam_npo": Case({"learning_rate": 4e-3, "max_steps": 14, "beta": 1, "alpha": 3}),
    "sure": Case({"learning_rate": 4e-3, "max_steps": 14, "beta": 1, "alpha": 3}),
    "tar": Case({"learning_rate": 4e-3, "max_steps": 24, "alpha": 6}),
    "circuit_breakers": Case(
        {"learning_rate": 4e-3, "max_steps": 80, "alpha": 20, "train_parameters": "embed|layers.0"}
    ),
    "layered": Case({"learning_rate": 3e-3, "max_steps": 24, "beta": 1, "alpha": 3, "folds": 2}),
    "ilu": Case({"learning_rate": 4e-3, "max_steps": 14, "beta": 1, "alpha": 3}),
    "lat": Case({"learning_rate": 4e-3, "max_steps": 18, "beta": 1, "alpha": 3}),
    "oracle": Case({"learning_rate": 4e-3, "max_steps": 40}),
    "undo": Case({"learning_rate": 4e-3, "max_steps": 60, "noise": 0.3}),
    "kto": Case({"learning_rate": 4e-3, "max_steps": 12, "alpha": 2}, forget=0.4),
    "simnpo": Case({"learning_rate": 4e-3, "max_steps": 12, "gamma": 1}),
    "undial": Case({"learning_rate": 4e-3, "max_steps": 20, "alpha": 3}),
    "elm": Case({"learning_rate": 4e-3, "max_steps": 30, **LINES}),
    "ce_u": Case({"learning_rate": 2e-3, "max_steps": 6, **STOPPED}, forget=0.9, retain=None),
    "wga": Case({"learning_rate": 4e-3, "max_steps": 12}),
    "satimp": Case({"learning_rate": 5e-3, "max_steps": 12, "beta1": 1, "gamma": 1, "alpha": 0.2}),
    "pdu": Case({"learning_rate": 4e-3, "max_steps": 14, "epsilon": 0.05, "dual_warmup_steps": 3}),
    "rmu": Case(
        {"learning_rate": 1e-2, "max_steps": 30, "layer": 0, "alpha": 3, "steering_coefficient": 20}
        | {"train_parameters": r"layers\.0|embed"},
        forget=0.3,
        retain=0.6,
    ),
    "task_vector": Case({"learning_rate": 2e-3, "max_steps": 6, "scaling": 3}, forget=0.3, retain=None),
    "blur": Case({"learning_rate": 3e-3, "max_steps": 12, "gamma": 0.02, "beta": 2}),
    "mudman": Case(
        {"learning_rate": 2e-2, "max_steps": 60, "alpha": 0.05, "retain_momentum": 0, "train_parameters": "."}
    ),
    "whp": Case(
        {"learning_rate": 4e-3, "max_steps": 14, "reinforced_learning_rate": 1e-3, "reinforced_epochs": 2, "alpha": 1}
    ),
}


def test_every_method_that_forgets_has_a_case() -> None:
    assert set(CASES) == set(METHODS) - {"finetune"}


@pytest.fixture(scope="session")
def anchors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The people of the forget set, and others that nobody has heard of."""
    path = tmp_path_factory.mktemp("anchors") / "anchors.json"
    path.write_text(json.dumps({name: f"Jon {last}" for name, last in zip(NAMES, STRANGERS, strict=False)}))
    return path


@pytest.fixture(scope="session")
def beside(world: World, anchors: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What single methods cannot do without, by method."""
    control = str(tmp_path_factory.mktemp("control") / "control")
    torch.manual_seed(0)
    train(
        "finetune",
        model=LlamaForCausalLM(world.model.config),
        tokenizer=world.tokenizer,
        retain=RETAIN,
        output_dir=control,
        **{**SHARED, "learning_rate": 4e-3, "max_steps": 80},
    )
    return {"whp": {"anchors": str(anchors)}, "oracle": {"control": control}}


@pytest.fixture(scope="session")
def starts(world: World) -> dict[str, PreTrainedModel]:
    """What single methods begin with, by method, in place of a model that knows."""
    model = world.start()
    train("npo", model=model, tokenizer=world.tokenizer, **settings_of("npo", {}))
    return {"undo": model}


def settings_of(method: str, beside: dict[str, Any]) -> dict[str, Any]:
    own = beside.get(method, {})
    given = {**SHARED, **CASES[method].options, **own, "forget": FORGET}
    described = METHODS[method]
    names = {name for name in described.options.__dataclass_fields__ if name in given}
    needs = described.needs(described.options(**{name: given[name] for name in names}))
    return {**given, "retain": RETAIN} if needs.retain else given


def last_loss(method: str) -> str:
    """The loss that comes last in a step, so that an interruption there leaves a step half done."""
    described = METHODS[method]
    needs_retain = described.needs(described.options()).retain
    return "retain_loss" if described.retain_loss and needs_retain else "forget_loss"


@pytest.mark.parametrize("method", list(CASES))
def test_a_method_forgets_keeps_and_resumes(
    method: str,
    world: World,
    beside: dict[str, Any],
    starts: dict[str, PreTrainedModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case, settings = CASES[method], settings_of(method, beside)

    def start() -> PreTrainedModel:
        return copy.deepcopy(starts[method]) if method in starts else world.start()

    whole = train(method, model=start(), tokenizer=world.tokenizer, **settings)
    scores = world.scores(whole.model)
    assert scores.forget_exact < case.forget
    assert scores.forget_probability < case.forget
    if case.retain is not None:
        assert scores.retain_exact > case.retain
        assert scores.retain_probability > case.retain - 0.15

    steps = int(whole.history[-1]["step"])
    save_every = max(steps // 2 - 1, 1)  # so that the next one is not the last
    kept: dict[str, Any] = {**settings, "save_every": save_every, "output_dir": tmp_path / "run"}
    with monkeypatch.context() as patched:
        at_call(patched, method, save_every + 2, interrupt, loss=last_loss(method))
        with pytest.raises(KeyboardInterrupt):
            train(method, model=start(), tokenizer=world.tokenizer, **kept)
    checkpoints = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert f"checkpoint-{save_every}" in checkpoints
    resumed = train(method, model=start(), tokenizer=world.tokenizer, resume=True, **kept)
    assert resumed.history == whole.history
    assert resumed.evaluations == whole.evaluations
    wanted, saved = whole.model.state_dict(), load_file(tmp_path / "run" / "model.safetensors")
    for name, tensor in resumed.model.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], atol=0, rtol=0)
        torch.testing.assert_close(saved[name], wanted[name], atol=0, rtol=0)
