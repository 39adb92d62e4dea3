"""The card says what was done, with what, and what came of it; nothing that is not so."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from tests.unlearning.helpers import build_examples
from unlearning import train
from unlearning.methods import METHODS
from unlearning.training.output_directory import hash_examples

FORGET, RETAIN = build_examples()[:4], build_examples()[4:7]
SHARED: dict[str, Any] = {
    "forget": FORGET,
    "batch_size": 2,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "max_steps": 2,
    "progress": False,
    "device": "cpu",
}


def rows_of(card: str, heading: str) -> dict[str, list[str]]:
    """The table under the line that begins so: first column to the others."""
    lines = card[card.index(heading) :].splitlines()[2:]
    rows = {}
    for line in lines:
        if not line.startswith("|"):
            break
        first, *others = (cell.strip() for cell in line.strip("|").split("|"))
        rows[first] = others
    return rows


@pytest.mark.parametrize("method", ["npo", "dpo", "ga"])
def test_a_card_has_all_that_a_reader_asks_for(method: str, model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    retain = {} if method == "ga" else {"retain": RETAIN}
    result = train(method, model=model_dir, output_dir=out, seed=7, **retain, **SHARED)
    card = (out / "README.md").read_text()
    record = json.loads((out / "unlearning.json").read_text())
    head = yaml.safe_load(card.split("---")[1])
    assert head == {
        "base_model": str(model_dir),
        "library_name": "transformers",
        "tags": ["machine-unlearning", method],
    }
    assert f"# {model_dir} after {method}" in card
    described = METHODS[method]
    assert described.summary in card and described.source in card
    assert "2 optimizer steps, " in card and "Random\nseed: 7." in card
    assert record["configuration"]["start_weights"] in card

    data = rows_of(card, "| data | examples |")
    assert data["forget"] == ["4", f"`{hash_examples(FORGET)}`"]
    assert ("retain" in data) == (method != "ga")
    assert ("alternate" in data) == (method == "dpo")
    if method != "ga":
        assert data["retain"] == ["3", f"`{hash_examples(RETAIN)}`"]

    options = rows_of(card, "| option | value |")
    assert options["`seed`"] == ["7"] and options["`learning_rate`"] == ["0.001"]
    assert set(options) == {f"`{name}`" for name in record["configuration"]["options"]}
    assert set(described.options.__dataclass_fields__) <= {name.strip("`") for name in options}

    metrics = rows_of(card, "| metric | before |")
    assert set(metrics) == set(result.final) - {"step", "epoch"}
    for name, (before, after) in metrics.items():
        assert before == f"{result.evaluations[0][name]:.4f}"
        assert after == f"{result.final[name]:.4f}"
    for name, module in (("torch", torch), ("transformers", transformers)):
        assert f"{name} {module.__version__}" in card
    assert "dissect-unlearning " in card


def test_retain_data_that_is_only_measured_is_said_to_be(model_dir: Path, tmp_path: Path) -> None:
    train("ga", model=model_dir, retain=RETAIN, output_dir=tmp_path / "run", **SHARED)
    card = (tmp_path / "run" / "README.md").read_text()
    assert rows_of(card, "| data | examples |")["retain"][0] == "for evaluation only"
    assert "on 4 forget and 3 retain examples" in card
