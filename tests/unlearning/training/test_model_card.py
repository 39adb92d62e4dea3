"""The card says what was done, with what, and what came of it; nothing that is not so."""

import json
import re
from pathlib import Path
from typing import Any

import markdown
import pytest
import torch
import transformers
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from lxml import html

from tests.unlearning.helpers import build_examples
from unlearning import train
from unlearning.methods import METHODS
from unlearning.training.model_card import model_card
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


HOSTILE = (
    "<img src=x onerror=alert(1)>|`b`\x1b[31m\u202e<b>[x](y)"
    "\n---\nlicense: mit\n# *a* __b__ ![c](http://d) &lt; ``` a: b \udce9"
)


def record(model: str, **options: object) -> dict[str, Any]:
    counts = {"forget": 2}
    return {
        "configuration": {
            "method": "npo",
            "options": {"lora_rank": 0, "seed": 1, **options},
            "start_weights": "0" * 64,
            "forget_data": "1" * 64,
            "alternates_data": None,
            "retain_data": None,
        },
        "examples": counts,
        "model": model,
        "versions": {"torch": "2"},
        "steps": 1,
        "seconds": 1.0,
        "device": "cpu",
        "best": None,
        "stopped_at": 1,
        "stopped_by": model,
        "evaluations": [],
    }


def elements(card: str) -> list[str]:
    """Names of all elements of the card as a page."""
    page = html.fromstring(markdown.markdown(ModelCard(card).text, extensions=["tables", "fenced_code"]))
    return [str(element.tag) for element in page.iter()]


@pytest.mark.parametrize(
    "text", [HOSTILE, "a|b", "`", "a: b", "- a", "1. a", "# a", "$x$", "'", '"', "{x}", "~~a~~", "https://d"]
)
def test_names_and_options_are_shown_and_not_read(text: str) -> None:
    card = model_card(METHODS["npo"], record(text, template=text))
    assert elements(card) == elements(model_card(METHODS["npo"], record("plain", template="plain")))
    head = ModelCard(card).data.to_dict()
    assert set(head) == {"base_model", "library_name", "tags"} and len(head["base_model"]) == len(text)
    assert not set(card) & set("\x1b\u202e\udce9")
    shown = html.fromstring(markdown.markdown(ModelCard(card).text, extensions=["tables"])).text_content()
    kept = " ".join(re.sub("[\x1b\u202e\udce9]", "\ufffd", text).split())
    assert f"{kept} after npo" in shown.splitlines()


@given(st.text(min_size=1), st.text())
def test_no_name_adds_an_element_or_metadata(name: str, template: str) -> None:
    card = model_card(METHODS["npo"], record(f"a{name}", template=template))
    assert elements(card) == elements(model_card(METHODS["npo"], record("plain", template="plain")))
    assert set(ModelCard(card).data.to_dict()) == {"base_model", "library_name", "tags"}
