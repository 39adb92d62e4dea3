"""The table and the figure that put raw KRS beside its control."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analyses.raw_krs import command_line, markdown_table, read_tofu
from dissect.figures import comparison_figure
from dissect.results import SweepResult
from unlearning.errors import InputError

KRS = {
    # target -> one row of values per centre, over four examples in two groups
    "unlearned": [[0.1, 0.1, 0.3, 0.3], [0.6, 0.6, 0.8, 0.8]],
    "control": [[0.0, 0.0, 0.2, 0.2], [0.5, 0.5, 0.7, 0.7]],
}


def build_result() -> SweepResult:
    """A sweep of one site over two layers in which the unlearned model is 0.1 above the control everywhere."""
    rows = [
        {
            "target": target,
            "kind": "patch",
            "site": "mlp_coef",
            "centre": centre,
            "first_layer": 0,
            "last_layer": 1,
            "example": str(index),
            "example_index": index,
            "group": f"g{index // 2}",
            "n_answer_tokens": 3,
            "loss_unlearned": 1.0,
            "loss_intervened": 1 - krs,
            "krs": krs,
            "logprob_recovery": krs,
            "kl_recovery": krs,
            "centred_loss_unlearned": 1.0,
            "centred_loss_intervened": 1 - krs,
            "logprob_base": 0.0,
            "logprob_unlearned": -1.0,
            "logprob_intervened": krs - 1,
            "kl_unlearned": 1.0,
            "kl_intervened": 1 - krs,
            "undefined": "",
        }
        for target, centres in KRS.items()
        for centre, values in enumerate(centres)
        for index, krs in enumerate(values)
    ]
    configuration = {"window": 3, "seed": 0, "scoring": "answer", "examples": 4}
    provenance = {"base": "demo:base", "unlearned": "demo:npo", "control": "demo:never"}
    return SweepResult(pd.DataFrame(rows), configuration, provenance, 0.0)


def test_table_states_peak_control_and_paired_difference() -> None:
    header, rule, row = markdown_table({"demo:npo": build_result()}).splitlines()
    assert header.count("|") == rule.count("|") == row.count("|") == 7
    # Peak at centre 1: mean of .6 .6 .8 .8; drawing two groups gives .6, .7 or .8. The difference has no spread.
    assert row == "| demo:npo | `mlp_coef` | 1 | 0.70 [0.60, 0.80] | 0.60 [0.50, 0.70] | 0.10 [0.10, 0.10] |"


def test_comparison_figure_has_a_panel_a_pair_and_one_legend() -> None:
    curve = build_result().curve()
    figure = comparison_figure({"one": curve, "two": curve, "three": curve})
    assert [note.text for note in figure.layout.annotations] == ["one", "two", "three"]
    lines = [trace for trace in figure.data if trace.name]
    assert len(lines) == 6
    assert [trace.showlegend for trace in lines] == [True, True, False, False, False, False]
    assert [trace.line.dash for trace in lines[:2]] == ["solid", "dash"]
    np.testing.assert_allclose(lines[0].y, [0.2, 0.7])
    assert len({trace.xaxis for trace in lines}) == 3


def test_missing_tofu_run_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="analyses.tofu_pair"):
        read_tofu(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        command_line(["--tofu", str(tmp_path), "--out", str(tmp_path / "out")])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "analyses.tofu_pair" in error
    assert not (tmp_path / "out").exists()
