"""The figures of `probe` show the numbers of its tables, the control dashed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dissect.coefficients.result import ProbeResult
from tests.dissect.coefficients.test_run import run_probe
from tests.dissect.helpers import assert_close, build_pair


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> ProbeResult:
    return run_probe(build_pair("llama"), tmp_path_factory.mktemp("probe"))


def lines(figure: Any, axis: str = "x") -> dict[str, Any]:
    """The named lines of a panel."""
    return {trace.name: trace for trace in figure.data if trace.name and (trace.xaxis or "x") == axis}


def test_neurons_figure_has_a_line_per_selection_and_target(result: ProbeResult) -> None:
    found, curve = lines(result.figure()), result.curve()
    assert len(found) == 6
    for label, target in (("most changed", "unlearned"), ("most changed, control", "control")):
        table = curve[(curve["selection"] == "top") & (curve["target"] == target)]
        assert list(found[label].x) == list(table["k"])
        assert_close(np.array(found[label].y), table["krs"].to_numpy(), atol=0)
    assert found["random"].line.dash == "solid"
    assert found["random, control"].line.dash == "dash"
    assert len({trace.line.color for trace in found.values()}) == 3
    assert result.figure().layout.xaxis.ticktext[-1] == "all 144"


def test_layers_figure_shows_changes_and_shares(result: ProbeResult) -> None:
    figure, curve, shares = result.layers_figure(), result.layer_curve(), result.shares()
    for axis, name, table in (("x", "relative_change", curve), ("x2", "cosine", curve), ("x3", "share", shares)):
        line = lines(figure, axis)["retain prompts"]
        ours = table[(table["target"] == "unlearned") & (table["prompts"] == "retain")]
        assert_close(np.array(line.y), ours[name].to_numpy(), atol=0)
    assert list(lines(figure, "x3")["spread evenly"].y) == [1 / 3, 2 / 3, 1]


def test_scaling_figure_sets_recovery_against_damage(result: ProbeResult) -> None:
    scaling = result.scaling()
    ours = scaling[scaling["target"] == "unlearned"]
    line = lines(result.scaling_figure())["unlearned model"]
    assert_close(np.array(line.x), ours[ours["prompts"] == "retain"]["kl_own"].to_numpy(), atol=0)
    assert_close(np.array(line.y), ours[ours["prompts"] == "forget"]["krs"].to_numpy(), atol=0)
    assert list(line.customdata) == ["0", "0.25", "0.5", "0.75", "1", "1.25", "1.5", "1.75", "2"]
    assert "layers 1-2" in str(result.scaling_figure().layout.title.text)


def test_without_retain_prompts_recovery_is_set_against_the_factor(tmp_path: Path) -> None:
    probed = run_probe(build_pair("llama"), tmp_path, retain=None, control=None, draws=1)
    figure = probed.scaling_figure()
    assert list(lines(figure)["unlearned model"].x) == [step / 4 for step in range(9)]
    assert figure.layout.xaxis.title.text == "factor"
