"""The command line: results on stdout, one line on stderr for bad input, exit codes, instant help."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

import unlearning
from tests.unlearning.helpers import build_examples
from unlearning.cli import main


@pytest.fixture
def data(tmp_path: Path) -> tuple[str, str]:
    records = [asdict(example) for example in build_examples()]
    forget, retain = tmp_path / "forget.json", tmp_path / "retain.jsonl"
    forget.write_text(json.dumps(records[:4]))
    retain.write_text("\n".join(json.dumps(record) for record in records[4:]))
    return str(forget), str(retain)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)


def test_train_saves_and_reports_json_on_stdout(
    data: tuple[str, str], model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forget, retain = data
    out = tmp_path / "run"
    arguments = ["train", "grad_diff", "--model", str(model_dir), "--forget", forget, "--retain", retain]
    arguments += ["--out", str(out), "--set", "epochs=1", "--set", "alpha=2", "--batch-size", "2", "--seed", "3"]
    assert run(*arguments, "--json") == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["options"]["alpha"] == 2.0
    assert report["options"]["seed"] == 3
    assert report["history"] == json.loads((out / "unlearning.json").read_text())["history"]
    assert "grad_diff" in captured.err  # the progress bar

    assert run(*arguments) == 0
    assert "nothing was trained" in capsys.readouterr().out
    assert run(*arguments, "--quiet") == 0
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "npo"], "Missing option '--model'"),
        (["train", "npo", "--model", "m", "--out", "o"], "npo needs forget data. Give --forget"),
        (["train", "nop", "--model", "m", "--out", "o"], "method must name a method, got 'nop'; did you mean 'npo'?"),
        (["train", "npo", "--model", "m", "--out", "o", "--set", "beta"], "--set must be KEY=VALUE, got beta"),
        (["train", "npo", "--model", "m", "--out", "o", "--set", "bta=1"], "did you mean 'beta'?"),
        (
            ["train", "npo", "--model", "m", "--out", "o", "--seed", "1", "--set", "seed=2"],
            "seed must be given only once, got --set seed=2",
        ),
        (
            ["train", "npo", "--model", "m", "--out", "o", "--dtype", "float16"],
            "--dtype must be float32 or bfloat16, got float16",
        ),
        (
            ["train", "npo", "--model", "m", "--out", "o", "--save-dtype", "int8"],
            "--save-dtype must be float32, bfloat16, float16 or none, got 'int8'",
        ),
        (["train", "ga", "--model", "demo:base", "--out", "o", "--forget", "no.json"], "no.json: no such file"),
        (["train", "ga", "--model", "m", "--out", "o", "--forget", "f.json"], "m: no such directory"),
        (["trian"], "No such command 'trian'"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_broken_line_is_named(
    data: tuple[str, str], model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "a", "answer": \n')
    arguments = ["--model", str(model_dir), "--forget", str(broken), "--retain", data[1], "--out", str(tmp_path / "o")]
    assert run("train", "npo", *arguments) == 2
    assert "broken.jsonl, line 2" in capsys.readouterr().err


def test_control_c_exits_130(
    data: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(unlearning, "train", interrupted)
    assert run("train", "npo", "--model", "m", "--forget", data[0], "--out", "o") == 130
    error = capsys.readouterr().err
    assert error.startswith("unlearn: interrupted; ") and "--resume" in error and error.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["methods", "--help"]])
def test_help_ends_with_examples(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 0
    examples = capsys.readouterr().out.rpartition("Examples:\n")[2]
    assert all(line.startswith(("    unlearn ", "        --")) for line in examples.splitlines())
    assert "unlearn" in examples


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom unlearning.cli import main\n"
        "try: main(['train', '--help'])\nexcept SystemExit: pass\n"
        "sys.exit(str(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)) or ''))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.stderr.strip() == ""
    assert "Examples:" in ended.stdout
