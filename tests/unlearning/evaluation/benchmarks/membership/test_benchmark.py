"""`unlearn eval mia`: rows against slow computations, the same in every batch, gone on with, refused in one line."""

import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests.command_lines import call_main
from tests.unlearning.helpers import NAMES, TOWNS, build_tiny_llama
from unlearning.cli import main
from unlearning.common.errors import InputError
from unlearning.evaluation import harness as framework
from unlearning.evaluation.benchmarks.membership import benchmark as membership
from unlearning.evaluation.benchmarks.membership.benchmark import Attacking
from unlearning.evaluation.benchmarks.membership.texts import Text, check_sets, note_of_sizes, read_source
from unlearning.evaluation.harness import Evaluation, evaluate
from unlearning.evaluation.subject import Subject

FORGET = [
    Text(f"Question: Where was {name} born?\nAnswer:", f"in {town} " * (1 + place % 3), f"f{place}", f"g{place // 2}")
    for place, (name, town) in enumerate(zip(NAMES, TOWNS, strict=True))
]
HOLDOUT = [Text("", f"{town} lies where {NAMES[n]} was Born", f"h{n}") for n, town in enumerate(TOWNS)]
ALL = tuple(membership.ATTACKS)


@pytest.fixture(scope="module")
def subject(tokenizer: PreTrainedTokenizerFast) -> Subject:
    return Subject.wrap(build_tiny_llama(), tokenizer, name="npo")


@pytest.fixture(scope="module")
def never(tokenizer: PreTrainedTokenizerFast) -> Subject:
    return Subject.wrap(build_tiny_llama(seed=1), tokenizer, name="never")


def attack(
    subject: Subject, *, forget: Sequence[Text] = FORGET, holdout: Sequence[Text] = HOLDOUT, **options: Any
) -> Evaluation:
    running = {key: options.pop(key) for key in ("control", "out", "batch_size") if key in options}
    attacking = {field.name: options.pop(field.name) for field in fields(Attacking) if field.name in options}
    prepare = partial(membership.prepare, forget=forget, holdout=holdout, attacking=Attacking(**attacking), **options)
    return evaluate(prepare, subject, **{"progress": False, "batch_size": 4, **running})


@pytest.fixture(scope="module")
def everything(subject: Subject, never: Subject) -> Evaluation:
    return attack(subject, attacks=ALL, reference=never)


def slow_losses(subject: Subject, prompt: str, answer: str) -> list[float]:
    """Minus the log-probability of every token of the answer and of the end of sequence."""
    before = subject.tokenizer(prompt)["input_ids"]
    text = f"{prompt} {answer}" if prompt else answer
    ids = [*subject.tokenizer(text)["input_ids"], 0]
    with torch.no_grad():
        log_p = subject.model(torch.tensor([ids])).logits[0].log_softmax(dim=-1).double()
    return [-float(log_p[place - 1, ids[place]]) for place in range(max(1, len(before)), len(ids))]


def test_texts_are_scored_without_the_end_of_sequence_where_the_model_never_saw_it(subject: Subject) -> None:
    rows = attack(subject, attacks=("loss", "min_k"), append_eos=False).rows.set_index("id")
    for text in (*FORGET, *HOLDOUT):
        losses = slow_losses(subject, text.prompt, text.answer)[:-1]
        assert rows.loc[text.id]["loss"] == pytest.approx(np.mean(losses), abs=1e-5)


def test_rows_are_those_of_a_slow_loop(subject: Subject, never: Subject, everything: Evaluation) -> None:
    rows = everything.rows.set_index("id")
    for text in (*FORGET, *HOLDOUT):
        row = rows.loc[text.id]
        losses = slow_losses(subject, text.prompt, text.answer)
        loss = sum(losses) / len(losses)
        assert row["loss"] == pytest.approx(loss, abs=1e-5)
        assert row["zlib"] == pytest.approx(loss / len(zlib.compress(text.answer.encode())), abs=1e-6)
        lowest = sorted(losses[:-1], reverse=True)[: max(1, int(0.4 * (len(losses) - 1)))]
        assert row["min_k"] == pytest.approx(sum(lowest) / len(lowest), abs=1e-5)
        lower = slow_losses(subject, text.prompt, text.answer.lower())
        assert row["lower"] == pytest.approx(loss / (sum(lower) / len(lower)), abs=1e-5)
        theirs = slow_losses(never, text.prompt, text.answer)
        assert row["reference"] == pytest.approx(loss - sum(theirs) / len(theirs), abs=1e-5)
    assert rows["group"].tolist() == [text.group for text in (*FORGET, *HOLDOUT)]


def test_every_auc_counts_the_pairs_of_its_rows(everything: Evaluation) -> None:
    rows = everything.rows
    for name in ALL:
        sets = [rows.loc[rows["set"] == which, name].tolist() for which in ("forget", "holdout")]
        pairs = [float(h > f) + (h == f) / 2 for f in sets[0] for h in sets[1]]
        assert everything[f"{name}_auc"] == pytest.approx(np.mean(pairs)), name
        summary = everything.summary()["metrics"][f"{name}_auc"]
        assert summary["low"] <= summary["value"] <= summary["high"]
        assert "1 memorised" in summary["meaning"]
    left_out = everything.summary()["left_out"]
    assert {name for name in left_out} == {f"{name}_{form}" for name in ALL for form in ("privleak", "s_score")}
    assert "`control`" in left_out["loss_privleak"]


def test_no_number_depends_on_the_batch_or_the_order(subject: Subject, never: Subject, everything: Evaluation) -> None:
    expected = everything.rows.set_index("id").drop(columns=["row"])
    turned = [FORGET[place] for place in (3, 0, 7, 2, 6, 1, 5, 4)]
    for options in ({"batch_size": 1}, {"batch_size": 7, "forget": turned}):
        found = attack(subject, attacks=ALL, reference=never, **options)
        rows = found.rows.set_index("id").drop(columns=["row"]).loc[expected.index]
        pd.testing.assert_frame_equal(rows, expected, atol=1e-5, rtol=1e-5)
        for name in ALL:
            assert found[f"{name}_auc"] == pytest.approx(everything[f"{name}_auc"], abs=1e-9), name


def test_killed_run_goes_on_to_the_same_rows(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = attack(subject).rows
    original, calls = membership.score_tokens, []

    def killed(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:  # the third batch's second pass
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(membership, "score_tokens", killed)
    with pytest.raises(KeyboardInterrupt):
        attack(subject, out=tmp_path / "run")
    monkeypatch.setattr(membership, "score_tokens", original)
    assert len(list((tmp_path / "run" / "parts").iterdir())) == 2
    found = attack(subject, out=tmp_path / "run")
    pd.testing.assert_frame_equal(found.rows, whole)
    with pytest.raises(InputError, match="its attacks is"):
        attack(subject, out=tmp_path / "run", attacks=["loss"])


def test_retain_model_gives_relative_forms(
    subject: Subject, never: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNLEARNING_CACHE", str(tmp_path))
    own = attack(never)
    found = attack(subject, control=never)
    for name in ("loss", "min_k"):
        ours, theirs = found[f"{name}_auc"], own[f"{name}_auc"]
        assert ours is not None and theirs is not None
        assert found[f"{name}_privleak"] == pytest.approx(100 * ((1 - ours) - (1 - theirs)) / (1 - theirs))
        assert found[f"{name}_s_score"] == pytest.approx(max(0.0, 1 - abs(ours - theirs) / theirs))
    same = attack(never, control=never)
    for name in ("loss", "lower", "min_k", "min_k_plus_plus"):  # by zlib the longer hold-out texts have an AUC of 0
        assert same[f"{name}_privleak"] == 0 and same[f"{name}_s_score"] == 1
        assert same.summary()["metrics"][f"{name}_auc"]["difference"] == 0
        assert same.summary()["metrics"][f"{name}_privleak"]["low"] == 0  # paired draws
    assert "add grad_norm to `attacks`" in found.summary()["left_out"]["grad_norm_auc"]
    assert "`reference_model`" in found.summary()["left_out"]["reference_auc"]
    left_out = set(found.summary()["left_out"])  # each attack that was not run is told once
    assert left_out == {"grad_norm_auc", "reference_auc", "zlib_s_score"}


def table(forget: list[float], holdout: list[float]) -> pd.DataFrame:
    """Rows of an evaluation by the loss alone."""
    named = [("forget", score) for score in forget] + [("holdout", score) for score in holdout]
    return pd.DataFrame([{"set": name, "group": "", "loss": score} for name, score in named])


def metrics_of(rows: pd.DataFrame, retain: pd.DataFrame | None) -> dict[str, Any]:
    return {metric.name: metric for metric in membership._summarise(rows, retain, attacks=["loss"], seed=0)}


def test_rows_made_by_hand_have_their_metrics() -> None:
    over_forgotten, retain = table([1e4, 2e4, 3e4], [1.0, 2.0, 2.5]), table([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    found = metrics_of(over_forgotten, retain)
    assert found["loss_auc"].estimate.value == 0
    assert found["loss_privleak"].estimate.value == 100  # the ceiling 100 (1 - A) / A at A = 0.5
    assert found["loss_s_score"].estimate.value == 0
    memorised = metrics_of(table([0.1, 0.2, 0.3], [1.0, 2.0, 2.5]), retain)
    assert memorised["loss_auc"].estimate.value == 1
    assert memorised["loss_tpr_at_1_fpr"].estimate.value == 1
    assert memorised["loss_privleak"].estimate.value == -100
    assert metrics_of(retain, retain)["loss_privleak"].estimate.value == 0


def test_retain_model_that_leaves_nothing_to_divide_by_gives_a_reason() -> None:
    memorised, gone = table([0.1, 0.2], [1.0, 2.0]), table([3.0, 4.0], [1.0, 2.0])
    found = metrics_of(gone, memorised)
    assert found["loss_privleak"].estimate is None
    assert found["loss_privleak"].reason == "the control's AUC is 1, and the metric divides by 0"
    assert found["loss_s_score"].estimate.value == 0
    assert metrics_of(memorised, gone)["loss_s_score"].estimate is None


def test_one_row_has_no_interval() -> None:
    found = metrics_of(table([1.0], [2.0, 3.0]), None)["loss_auc"].estimate
    assert found.value == 1 and found.interval is None


def test_sets_of_many_rows_have_narrow_intervals_around_what_they_were_drawn_from() -> None:
    rng = np.random.default_rng(0)
    found = metrics_of(table(rng.normal(size=400).tolist(), rng.normal(0.5, size=400).tolist()), None)["loss_auc"]
    low, high = found.estimate.interval
    assert low < 0.638 < high and high - low < 0.09  # Phi(0.5 / sqrt 2)


def test_long_texts_are_cut_where_asked(subject: Subject) -> None:
    found = attack(subject, max_tokens=5, attacks=["loss", "zlib"])
    rows = found.rows.set_index("id")
    long = HOLDOUT[0].answer
    beginning = subject.tokenizer.decode(subject.tokenizer(long)["input_ids"][:5])
    assert len(beginning) < len(long)
    losses = slow_losses(subject, "", beginning)[:-1]  # its end is not there
    assert rows.loc["h0", "loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert rows.loc["h0", "zlib"] == pytest.approx(np.mean(losses) / len(zlib.compress(beginning.encode())), abs=1e-6)
    short = FORGET[0]
    assert rows.loc["f0", "loss"] == pytest.approx(np.mean(slow_losses(subject, short.prompt, short.answer)), abs=1e-5)


def test_texts_that_cannot_be_scored_are_refused(subject: Subject) -> None:
    cases = [
        ({"forget": [Text("", "a")]}, "forget text 1: .*'a'"),
        ({"forget": [Text("Who?", " ")]}, "forget text 1: the answer to 'Who\\?' is empty"),
        ({"holdout": [Text("", "Oslo " * 200)]}, "holdout text 1: .* context of 128"),
        ({"holdout": []}, "the hold-out set.*none"),
        ({"holdout": FORGET[3:5]}, "2 of the 8 forget rows are in the hold-out set too"),
        ({"attacks": ["los"]}, "`attacks`.*'los'; did you mean 'loss'"),
        ({"attacks": []}, "`attacks`.*got none"),
        ({"attacks": ["reference"]}, "`reference_model`"),
        ({"fraction": 0.0}, "`min_k`.*0.0"),
        ({"max_tokens": 0}, "`max_tokens`.*0"),
    ]
    for options, message in cases:
        with pytest.raises(InputError, match=message):
            attack(subject, **options)


def test_reference_of_another_tokenizer_is_refused(subject: Subject) -> None:
    from tests.unlearning.small_world import build_world_tokenizer

    other = Subject.wrap(build_tiny_llama(), build_world_tokenizer(), name="trunk")
    with pytest.raises(InputError, match="`reference_model`.*trunk"):
        attack(subject, reference=other)


def test_shared_prompts_are_told() -> None:
    other = [Text(FORGET[0].prompt, "elsewhere")]
    assert check_sets(FORGET, other) == ("1 of the 8 forget prompts are in the hold-out set with another answer",)
    assert check_sets(FORGET, HOLDOUT) == ()


def test_tofu_sets_of_two_sizes_are_told() -> None:
    assert note_of_sizes("tofu:forget05", "tofu:holdout05") == note_of_sizes("a.json", "tofu:holdout10") == ()
    (note,) = note_of_sizes("tofu:forget05", "tofu:holdout10")
    assert note.endswith("published numbers use holdout05")


def test_records_keep_their_ids_and_groups_and_name_the_empty_one(tmp_path: Path) -> None:
    path = tmp_path / "forget.json"
    path.write_text(json.dumps([{"question": "Who?", "answer": "Ada", "id": 7, "group": "a"}, {"text": "Oslo lies."}]))
    assert read_source(path).texts() == [Text("Question: Who?\nAnswer:", "Ada", "7", "a"), Text("", "Oslo lies.")]
    path.write_text(json.dumps([{"text": "Oslo lies."}, {"text": " "}]))
    with pytest.raises(InputError, match="record 2: the text is empty and cannot be scored"):
        read_source(path).texts()
    path.write_text(json.dumps([{"text": "Oslo lies."}, {"question": "Who?", "answer": ""}]))
    with pytest.raises(InputError, match=r"forget.json, record 2: the answer is empty"):
        read_source(path).texts()


def test_tofu_rows_are_grouped_by_author(tmp_path: Path) -> None:
    (tmp_path / "tofu").mkdir()
    lines = [json.dumps({"question": f"Who is {n}?", "answer": f"Author {n}"}) for n in range(40)]
    (tmp_path / "tofu" / "forget01.json").write_text("\n".join(lines))
    groups = [text.group for text in read_source("tofu:forget01", tmp_path).texts()]
    assert len(set(groups[:20])) == len(set(groups[20:])) == 1 and len(set(groups)) == 2


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    made = {}
    for name, texts in (("forget", FORGET), ("holdout", HOLDOUT)):
        made[name] = tmp_path / f"{name}.jsonl"
        records = [{"prompt": text.prompt, "answer": text.answer, "id": text.id} for text in texts]
        made[name].write_text("\n".join(json.dumps(record) for record in records))
    return made


def test_command_writes_what_it_shows(
    files: dict[str, Path], model_dir: Path, subject: Subject, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    done = call_main(
        main, "eval", "mia", "--model", model_dir, "--forget", files["forget"], "--holdout", files["holdout"],
        "--attacks", "loss, min_k", "--min-k", "0.2", "--limit", "5", "--out", out, "--json", "--quiet",
    )  # fmt: skip
    assert done.code == 0, done.err
    summary = json.loads(done.out)
    assert summary["rows"] == {"forget": 5, "holdout": 5}
    expected = attack(subject, forget=FORGET[:5], holdout=HOLDOUT[:5], attacks=["loss", "min_k"], fraction=0.2)
    assert summary["metrics"]["min_k_auc"]["value"] == expected["min_k_auc"]
    assert sorted(summary["metrics"]) == ["loss_auc", "loss_tpr_at_1_fpr", "min_k_auc", "min_k_tpr_at_1_fpr"]
    assert json.loads((out / "summary.json").read_text())["metrics"] == summary["metrics"]
    assert len(pd.read_parquet(out / "results.parquet")) == 10


def test_bad_input_ends_with_one_line(
    files: dict[str, Path], model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_called(*_arguments: Any, **_options: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("unlearning.evaluation.subject.open_subject", not_called)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    both = ["--forget", files["forget"], "--holdout", files["holdout"]]
    cases: list[tuple[list[str | Path], str]] = [
        (["--forget", files["forget"]], "--holdout"),
        (["--forget", files["forget"], "--holdout", empty], "the file is empty"),
        (["--forget", files["forget"], "--holdout", tmp_path / "no.json"], "--holdout: .*no such file"),
        (["--forget", files["forget"], "--holdout", files["forget"]], "8 of the 8 forget rows"),
        ([*both, "--attacks", "los"], "did you mean 'loss'"),
        ([*both, "--attacks", "reference"], "--reference-model"),
        ([*both, "--min-k", "2"], "--min-k.*2.0"),
        ([*both, "--max-tokens", "0"], "--max-tokens.*0"),
        ([*both, "--limit", "0"], "--limit.*0"),
        ([*both, "--control", "a", "--control-result", "b"], "--control.*--control-result"),
        (["--forget", "tofu:forgot", "--holdout", files["holdout"]], "no such split"),
        (["--forget", "tofu:forget01", "--holdout", "a.json", "--data-dir", tmp_path / "no"], "no such directory"),
    ]
    for arguments, message in cases:
        done = call_main(main, "eval", "mia", "--model", model_dir, *arguments)
        assert done.code == 2 and re.search(message, done.err), (arguments, done.err)
        assert len(done.err.strip().splitlines()) == 1, done.err


def test_framework_knows_the_benchmark_by_its_name(subject: Subject) -> None:
    prepared = membership.prepare(subject, forget=FORGET, holdout=HOLDOUT)
    configuration = framework._configuration(prepared, subject)
    assert configuration["command"] == "unlearn eval mia"
    json.dumps(configuration)
