"""`unlearn methods`: the list of methods, for a reader and for a program."""

import json

import pytest

from tests.unlearning.cli.test_train import run
from unlearning.methods import METHODS


def test_methods_lists_needs_defaults_and_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("methods", "--json") == 0
    listed = {method["name"]: method for method in json.loads(capsys.readouterr().out)["methods"]}
    assert list(listed) == list(METHODS)
    assert listed["npo"]["needs"] == ["forget", "reference", "retain unless alpha=0"]
    assert all(method["source"] for name, method in listed.items() if name != "finetune")
    beta = listed["npo"]["options"][0]
    assert (beta["name"], beta["default"], beta["source"]) == ("beta", "0.1", "NPO 2404.05868")
    assert run("methods") == 0
    table = capsys.readouterr().out
    assert "beta=0.1" in table
    assert "gradient_accumulation_steps=none" in table
