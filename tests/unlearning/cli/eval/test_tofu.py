"""`unlearn eval tofu` as a user types it."""

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

from tests.unlearning.evaluation.benchmarks.tofu.tofu_helpers import SETS, write_lines, write_tofu
from tests.unlearning.helpers import build_tiny_llama, build_tokenizer
from unlearning.cli import main


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNLEARNING_CACHE", str(tmp_path / "cache"))
    return write_tofu(tmp_path / "data")


@pytest.fixture(scope="module")
def never_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "never"
    build_tiny_llama(seed=1).save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


def tofu(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["eval", "tofu", *map(str, arguments)])
    return int(ended.value.code or 0)


def test_evaluates_against_a_retain_model_and_then_against_its_results(
    model_dir: Path, never_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = ["--forget", "forget01", "--data-dir", data, "--max-new-tokens", "4", "--batch-size", "4"]
    against = ["--model", model_dir, *shared, "--control", never_dir, "--out", tmp_path / "out", "--json"]
    assert tofu(*against) == 0
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    assert summary["rows"] == {"forget": 5, "retain": 6, "real_authors": 3, "world_facts": 4}
    assert summary["left_out"] == {} and summary["run"] == str(tmp_path / "out")
    assert 0 < summary["metrics"]["forget_quality"]["value"] <= 1
    assert "forget quality of 5 rows cannot be below 7.94e-3 (at D = 1)" in summary["notes"]
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["metrics"] == summary["metrics"]
    rows = pd.read_parquet(tmp_path / "out" / "results.parquet")
    assert {"id", "group", "answer_nll", "log_truth_ratio", "generated", "rouge"} <= set(rows.columns)

    assert tofu("--model", never_dir, *shared, "--out", tmp_path / "never", "--quiet") == 0
    assert capsys.readouterr().out == ""
    stored = ["--model", model_dir, *shared, "--control-result", tmp_path / "never", "--out", tmp_path / "out"]
    assert tofu(*stored, "--json") == 0  # the finished run, compared with the same rows from elsewhere
    assert json.loads(capsys.readouterr().out)["metrics"] == summary["metrics"]

    assert tofu(*stored) == 0
    table = capsys.readouterr().out
    for shown in ("forget_quality", "model_utility", "world_facts_truth_ratio", "difference [95 %]", "(at D = 1)"):
        assert shown in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--forget", "forget1"], "no such split; did you mean 'forget10'"),
        (["--forget", "no.jsonl"], "no.jsonl: no such file"),
        (["--forget", "some.jsonl"], "some.jsonl, record 2: no perturbed_answer, which other records have"),
        (["--retain", "no.jsonl"], "no.jsonl: no such file"),
        (["--data-dir", "nowhere"], "--data-dir.*nowhere"),
        (["--limit", "0"], "--limit.*0"),
        (["--max-new-tokens", "0"], "--max-new-tokens.*0"),
        (["--batch-size", "0"], "--batch-size.*0"),
        (["--template", "{q}"], "{question}.*{q}"),
        (["--template", "{question}", "--chat"], "--template and --chat both wrap the question"),
        (["--chat"], "the tokenizer has no chat template"),
        (["--control", "m", "--control-result", "r"], "--control and --control-result"),
        (["--control-result", "nowhere"], "--control-result.*nowhere"),
        (["--dtype", "int8"], "--dtype.*int8"),
        (["--model", "no-such-model"], "no-such-model"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(
    arguments: list[str],
    message: str,
    model_dir: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    records = SETS["forget01_perturbed"]
    write_lines(tmp_path / "some.jsonl", [records[0], {**records[1], "perturbed_answer": None}])
    given = ["--model", str(model_dir), "--forget", "forget01", "--data-dir", str(data)]
    assert tofu(*given, *arguments) == 2  # where an option is given twice, the last counts
    captured = capsys.readouterr()
    assert re.search(message, captured.err) and captured.err.count("\n") == 1 and captured.out == ""


def recorded(model: Path, where: Path, **options: object) -> Path:
    """A copy of a model with the record of a training run beside it."""
    shutil.copytree(model, where)
    record = {"finished": True, "configuration": {"options": options}}
    (where / "unlearning.json").write_text(json.dumps(record), encoding="utf-8")
    return where


def test_a_model_is_asked_as_it_was_trained_unless_the_command_line_says_otherwise(
    model_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = "Q: {question}\nA:"
    model = recorded(model_dir, tmp_path / "npo", template=template, append_eos=False)
    shared = ["--forget", "forget01", "--sets", "forget", "--data-dir", data, "--no-generate", "--json"]

    def probability(model: Path, *more: str) -> tuple[float, str]:
        out = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        assert tofu("--model", model, *shared, "--out", out, *more) == 0
        captured = capsys.readouterr()
        return json.loads(captured.out)["metrics"]["forget_probability"]["value"], captured.err

    plain, silent = probability(model_dir)
    own, said = probability(model_dir, "--template", template, "--no-append-eos")
    assert silent == said == ""
    found, said = probability(model)
    assert found == own != plain
    assert said.count("\n") == 1 and said.startswith("unlearn: asked as ") and str(model) in said
    found, said = probability(model, "--no-chat", "--append-eos")
    assert found == plain
    assert said.count("\n") == 1 and said.startswith("unlearn: warning: ") and repr(template) in said


def test_a_control_is_asked_as_the_model_was_trained(
    model_dir: Path, never_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = recorded(model_dir, tmp_path / "npo", template="Q: {question}\nA:")
    control = recorded(never_dir, tmp_path / "control", template="{question}")
    shared = ["--forget", "forget01", "--sets", "forget", "--data-dir", data, "--no-generate", "--json"]
    values = []
    for number, (name, given) in enumerate(
        ((control, []), (never_dir, []), (control, ["--template", "Q: {question}\\nA:"]))
    ):
        out = tmp_path / f"out-{number}"
        assert tofu("--model", model, "--control", name, *shared, "--out", out, *given) == 0
        captured = capsys.readouterr()
        values.append(json.loads(captured.out)["metrics"]["forget_probability"]["control"])
        lines = captured.err.splitlines()
        warned = [line for line in lines if "warning" in line]
        assert len(warned) == (name == control) and all(str(control) in line for line in warned)
        assert len(lines) - len(warned) == (not given)
    assert len(set(values)) == 1


def test_a_hostile_record_is_one_line_and_exit_code_two(
    model_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = recorded(model_dir, tmp_path / "npo", template="\x1b[2J\nno question " * 1000)
    assert tofu("--model", model, "--forget", "forget01", "--data-dir", data) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err[:-1].isprintable()
    assert "unlearning.json" in captured.err and "--template" in captured.err and len(captured.err) < 1600
