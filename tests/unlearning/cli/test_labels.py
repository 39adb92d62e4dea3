"""`unlearn labels show`: what a person reads, what a program reads, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from transformers import PreTrainedTokenizerFast

from tests.unlearning.methods.whp.story import ANCHORS, STORY
from tests.unlearning.methods.whp.test_labels import little_llama
from unlearning.cli.labels import labels_app
from unlearning.common.terminal import run_app
from unlearning.methods.whp.anchors import Anchors
from unlearning.methods.whp.labels import LabelOptions, Labels, make_labels
from unlearning.methods.whp.storage import save_labels


@pytest.fixture
def made(tokenizers: dict[str, PreTrainedTokenizerFast], tmp_path: Path) -> Labels:
    tokenizer = tokenizers["byte level"]
    models = [little_llama(len(tokenizer), seed) for seed in (0, 1)]
    labels = make_labels(*models, tokenizer, [STORY], Anchors(ANCHORS), LabelOptions(block_size=64))
    save_labels(tmp_path, labels, tokenizer)
    return labels


def run(*arguments: str) -> int:
    app = typer.Typer()
    app.add_typer(labels_app, name="labels")
    with pytest.raises(SystemExit) as ended:
        run_app(app, "unlearn", ["labels", "show", *arguments], interrupted="nothing was done")
    return int(ended.value.code or 0)


def test_rows_are_those_of_the_labels(made: Labels, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(tmp_path), "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["n_rows"] == len(report["rows"]) == made.counts.tokens - made.counts.blocks
    assert report["counts"]["changed"] == made.counts.changed == sum(row["changed"] for row in report["rows"])
    for row in report["rows"]:
        block = made.blocks[row["block"]]
        assert row["next_id"] == block.input_ids[row["position"] + 1]
        assert row["masked"] == block.reasons[row["position"]]
        assert row["label_id"] == (None if row["masked"] else block.targets[row["position"]])

    assert run(str(tmp_path), "--json", "--changed-only", "--block", "1", "--limit", "2") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["n_rows"] == sum(made.blocks[1].changed)
    assert [row["block"] for row in report["rows"]] == [1, 1] and all(row["changed"] for row in report["rows"])


def test_the_table_shows_original_and_label(
    made: Labels, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert run(str(tmp_path), "--limit", "0") == 0
    shown = capsys.readouterr().out
    assert str(made.counts) in shown
    assert "occurred before in this block" in shown and "more rows" not in shown
    lines = [line.split() for line in shown.splitlines()]
    assert len([line for line in lines if len(line) > 3 and line[3] == "*"]) == made.counts.changed
    assert len([line for line in lines if len(line) > 3 and line[3] == "-"]) == sum(made.counts.masked.values())
    first = made.blocks[0]
    assert lines[3][:2] == ["0", "0"] or ["0", "0"] in [line[:2] for line in lines]
    assert f"{len(first.input_ids) - 2}" in [line[1] for line in lines if line[:1] == ["0"]]

    assert run(str(tmp_path)) == 0
    shown = capsys.readouterr().out
    assert f"{made.counts.tokens - made.counts.blocks - 60} more rows; --limit 0 shows all" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no such directory; name the directory of a whp run"),
        (["{run}", "--block", "99"], "--block must be between 0 and "),
        (["{run}", "--limit", "-1"], "--limit must be at least 0 (0 shows all rows), got -1"),
        (["{run}/empty"], "has no labels.parquet; only runs of the method whp have labels"),
    ],
)
@pytest.mark.usefixtures("made")
def test_bad_input_is_one_line_and_exit_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert run(*(argument.format(run=tmp_path) for argument in arguments)) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_importing_it_imports_nothing_heavy() -> None:
    code = (
        "import sys, unlearning.cli.labels; sys.exit(str({'torch', 'pandas', 'rich.table'} & set(sys.modules) or ''))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.stderr.strip() == ""
