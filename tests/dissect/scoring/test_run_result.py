"""What results hand out are copies: a user may edit it, and no later number changes."""

import copy
import inspect
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import pytest

from dissect.behaviour.run import behave
from dissect.coefficients.concept_vectors import Concept
from dissect.coefficients.run import probe
from dissect.decomposition.run import decompose
from dissect.models.model import Model
from dissect.prompts.loading import load_prompts
from dissect.sweeps.patching import patch
from tests.dissect.helpers import build_model, build_pair, build_prompts, build_tokenizer, save_records

OTHERS = [
    {"prompt": "Question: Where is Lima?\nAnswer:", "answer": "in Peru", "group": "Lima", "id": "l0"},
    {"prompt": "Where is Oslo", "answer": "in Norway", "group": "Oslo", "id": "o0"},
]


@pytest.fixture(scope="module", params=["patch", "decompose", "probe", "behave"])
def result(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run with every arm and table that its experiment has."""
    folder = tmp_path_factory.mktemp(request.param)
    pair, prompts = build_pair("llama"), build_prompts(folder)
    others = load_prompts(save_records(folder / "others.json", OTHERS), build_tokenizer())
    control = Model.wrap(build_model("llama", seed=5), build_tokenizer(), name="control")
    common: dict[str, Any] = {"control": control, "progress": False}
    if request.param == "patch":
        return patch(pair, prompts, window=[1, "suffix"], null=1, donor="noise", **common)
    if request.param == "decompose":
        return decompose(pair, prompts, null=1, **common)
    if request.param == "probe":
        concepts = [Concept("city", 1, 2)]
        return probe(pair, prompts, retain=others, concepts=concepts, last_layers=2, top=4, draws=2, **common)
    return behave(pair, prompts, others, completions=others, max_new_tokens=4, **common)


def outputs(result: Any) -> dict[str, Any]:
    """Every public attribute, and what every public method without arguments returns, by name."""
    found = {}
    for name in dir(result):
        if name.startswith("_") or name in ("save", "save_figures", "write"):
            continue
        value = getattr(result, name)
        found[name] = value() if inspect.ismethod(value) else value
    return found


def plain(value: Any) -> Any:
    if isinstance(value, pd.DataFrame):
        return value.to_json(double_precision=15), list(value.columns)
    return value.to_json() if isinstance(value, go.Figure) else repr(value)


def edit(value: Any) -> None:
    """Change the object itself in every way that a user might."""
    if isinstance(value, pd.DataFrame):
        for name in value.columns:
            value[name] = value[name] * 100 if value[name].dtype.kind in "if" else "edited"
        value.drop(index=value.index[1:], inplace=True)
    elif isinstance(value, dict):
        value.clear()
    elif isinstance(value, list):
        value.append("edited")


def test_editing_what_a_result_returns_changes_no_later_output(result: Any) -> None:
    untouched = copy.deepcopy(result)
    frames = [name for name, value in outputs(result).items() if isinstance(value, pd.DataFrame) and len(value)]
    assert {"frame"} < set(frames)
    for value in outputs(result).values():
        edit(value)
    expected = outputs(untouched)
    for name, value in outputs(result).items():
        assert plain(value) == plain(expected[name]), name


def test_an_edited_curve_moves_no_peak(tmp_path: Path) -> None:
    swept = patch(build_pair("llama"), build_prompts(tmp_path), window=1, control=None, progress=False)
    peaks = swept.peaks()
    curve = swept.curve()
    curve["krs"] *= 100
    pd.testing.assert_frame_equal(swept.peaks(), peaks)
