"""WMDP's question files, and both multiple-choice commands from end to end."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.unlearning.evaluation.benchmarks.multiple_choice.choice_world import (
    RECORDS,
    build_model,
    slow_log_likelihood,
)
from tests.unlearning.helpers import build_tokenizer
from unlearning.cli import main
from unlearning.common.errors import InputError
from unlearning.data.choice_questions import read_questions
from unlearning.evaluation.metrics.multiple_choice import listed_prompt
from unlearning.evaluation.subject import open_subject


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    build_model().save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """WMDP as the authors hand it out, with questions of our own."""
    for place, name in enumerate(("bio", "chem", "cyber")):
        path = tmp_path / "data" / "wmdp" / f"{name}_questions.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(RECORDS[place : place + 3]))
    (tmp_path / "data" / "wmdp" / "bio-forget-corpus.jsonl").write_text('{"text": "no question"}')
    return tmp_path / "data"


def call(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


def refusal(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    code, out, err = call(capsys, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    return err


def test_the_subject_of_the_prompt_is_the_files(data: Path) -> None:
    for name, subject in (("bio", "biology"), ("chem", "chemistry"), ("cyber", "cybersecurity")):
        found = read_questions(f"wmdp:{name}", data_dir=data)
        assert {question.subject for question in found} == {subject}
        assert len(found) == 3


def test_a_copy_of_the_hubs_data_set_is_read(tmp_path: Path) -> None:
    place = tmp_path / "wmdp" / "wmdp-chem"
    place.mkdir(parents=True)
    pd.DataFrame(RECORDS).to_parquet(place / "test-00000-of-00001.parquet")
    found = read_questions("wmdp:chem", data_dir=tmp_path)
    assert [question.answer for question in found] == [record["answer"] for record in RECORDS]


def test_unknown_sets_name_the_nearest(data: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'chem'"):
        read_questions("wmdp:chemi", data_dir=data)
    with pytest.raises(InputError, match="no such file; did you mean 'wmdp'"):
        read_questions("wmpd:bio")


def test_a_broken_file_is_not_passed_over(data: Path) -> None:
    (data / "wmdp" / "bio_questions.json").write_text("[{")
    with pytest.raises(InputError, match="broken JSON"):
        read_questions("wmdp:bio", data_dir=data)


def test_wmdp_end_to_end(model_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    arguments = ["eval", "wmdp", "--model", model_dir, "--data-dir", data, "--out", out, "--permute", 1, "--json"]
    code, stdout, stderr = call(capsys, *arguments, "--device", "cpu")
    assert (code, stderr) == (0, "")
    summary = json.loads(stdout)
    assert summary["rows"] == {"bio": 3, "chem": 3, "cyber": 3}
    rows = pd.read_parquet(out / "results.parquet")
    subject = open_subject(model_dir, device="cpu")
    right = []
    for name in ("bio", "chem", "cyber"):
        for question in read_questions(f"wmdp:{name}", data_dir=data):
            scores = [slow_log_likelihood(subject, listed_prompt(question), f" {letter}")[0] for letter in "ABCD"]
            right.append(scores.index(max(scores)) == question.answer)
    assert rows["letter_correct"].tolist() == right
    metrics = summary["metrics"]
    assert metrics["all_letter_accuracy"]["value"] == pytest.approx(sum(right) / 9)
    assert metrics["all_letter_accuracy"]["direction"] == "lower is better"
    assert 0 <= metrics["bio_permuted_consistency"]["value"] <= 1
    assert json.loads((out / "run.json").read_text())["configuration"]["chat"] is None
    assert call(capsys, *arguments)[1] == stdout, "a finished run is shown again"
    assert "it holds" not in refusal(capsys, *arguments, "--scoring", "letter")


def test_choice_end_to_end(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quiz.json").write_text(json.dumps(RECORDS[:3]))
    (tmp_path / "dev.json").write_text(json.dumps(RECORDS[3:]))
    code, stdout, _ = call(
        capsys, "eval", "choice", "--model", model_dir, "--questions", "quiz.json", "--questions", "dev.json",
        "--few-shot", "dev.json", "--shots", 1, "--role", "retain", "--scoring", "cloze,letter",
    )  # fmt: skip
    assert code == 0
    assert "quiz_letter_accuracy" in stdout
    assert "all_cloze_per_token_accuracy" in stdout
    summary = json.loads((tmp_path / "runs" / "eval-choice-tiny" / "summary.json").read_text())
    assert summary["metrics"]["quiz_letter_accuracy"]["direction"] == "higher is better"
    assert not any("answer_sum" in name for name in summary["metrics"])


def test_wrong_input_is_told_in_one_line_before_the_model_is_loaded(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quiz = tmp_path / "quiz.json"
    quiz.write_text(json.dumps(RECORDS))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "quiz.json").write_text(json.dumps(RECORDS))
    wmdp = ["eval", "wmdp", "--model", tmp_path, "--data-dir", data]
    choice = ["eval", "choice", "--model", tmp_path, "--questions", quiz]
    assert "did you mean 'bio'" in refusal(capsys, *wmdp, "--sets", "bios")
    assert "--sets must name" in refusal(capsys, *wmdp, "--sets", ",")
    assert "letter,answer,cloze" in refusal(capsys, *wmdp, "--scoring", "letters")
    assert "Add letter to --scoring" in refusal(capsys, *wmdp, "--scoring", "cloze", "--permute", 2)
    assert "--permute must be at least 0, got -1" in refusal(capsys, *wmdp, "--permute", -1)
    assert "no such directory" in refusal(capsys, "eval", "wmdp", "--model", tmp_path, "--data-dir", tmp_path / "none")
    assert "forget, retain, none" in refusal(capsys, *choice, "--role", "good")
    assert "two sets called 'quiz'" in refusal(capsys, *choice, "--questions", tmp_path / "sub" / "quiz.json")
    assert "no such file" in refusal(capsys, "eval", "choice", "--model", tmp_path, "--questions", "gone.json")
    assert "no such file" in refusal(capsys, *choice, "--few-shot", "gone.json")
    assert f"{tmp_path}: " in refusal(capsys, *choice)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom unlearning.cli import main\n"
        "for name in ('wmdp', 'choice', 'lm-eval'):\n"
        "    try: main(['eval', name, '--help'])\n    except SystemExit: pass\n"
        "assert not {'torch', 'lm_eval', 'transformers', 'pandas'} & set(sys.modules), 'heavy'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "wmdp/bio_questions.json" in done.stdout
