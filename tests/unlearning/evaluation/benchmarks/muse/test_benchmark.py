"""`unlearn eval muse` on invented data: against slow computations, and everything that may be missing."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tests.command_lines import call_main
from tests.unlearning.evaluation.benchmarks.muse.muse_world import (
    build_long_llama,
    muse_parts,
    write_hub,
    write_repository,
)
from tests.unlearning.helpers import build_tiny_llama
from unlearning.cli import main
from unlearning.common.errors import InputError
from unlearning.data import hub
from unlearning.evaluation.benchmarks.muse import benchmark as muse
from unlearning.evaluation.benchmarks.muse.data import MuseData, read_muse
from unlearning.evaluation.generation import greedy_answers
from unlearning.evaluation.harness import Evaluation, evaluate
from unlearning.evaluation.metrics.text_match import rouge_l_f1
from unlearning.evaluation.metrics.text_quality import first_tokens
from unlearning.evaluation.subject import Subject

WORDS = st.lists(st.sampled_from(["oslo", "lima", "cairo", "kyoto"]), min_size=0, max_size=6)


def subsequence(a: list[str], b: list[str]) -> int:
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return subsequence(a[:-1], b[:-1]) + 1
    return max(subsequence(a[:-1], b), subsequence(a, b[:-1]))


@given(generated=WORDS, answer=WORDS)
@settings(max_examples=60)
def test_rouge_l_f1_is_the_harmonic_mean_of_both_shares(generated: list[str], answer: list[str]) -> None:
    common = subsequence(generated, answer)
    expected = 2 * common / (len(generated) + len(answer)) if common else 0.0
    found = rouge_l_f1(" ".join(generated), " ".join(answer))
    assert found == (pytest.approx(expected) if answer else None)


def test_rouge_l_f1_does_not_stem() -> None:
    assert rouge_l_f1("She was writing books", "books she was Writing") == 0.75
    assert rouge_l_f1("writing", "write") == 0.0
    assert rouge_l_f1("", "write") == 0.0


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_download(repository: str, _patterns: Any) -> Path:
        raise InputError(f"{repository}: the hub cannot be reached")

    monkeypatch.setattr(hub, "download", no_download)
    monkeypatch.delenv("DISSECT_DATA", raising=False)
    monkeypatch.setenv("UNLEARNING_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_hub(root / "muse-news", muse_parts())
    return root


@pytest.fixture(scope="module")
def data(directory: Path) -> MuseData:
    return read_muse("news", directory)


@pytest.fixture(scope="module")
def subject(tokenizer: PreTrainedTokenizerFast) -> Subject:
    return Subject.wrap(build_long_llama().double(), tokenizer, name="npo")


@pytest.fixture(scope="module")
def never(tokenizer: PreTrainedTokenizerFast) -> Subject:
    return Subject.wrap(build_long_llama(seed=1).double(), tokenizer, name="never")


def ask(subject: Subject, data: MuseData, **options: Any) -> Evaluation:
    running = {key: options.pop(key) for key in ("control", "out", "batch_size") if key in options}
    prepare = partial(muse.prepare, data=data, **options)
    return evaluate(prepare, subject, **{"progress": False, "batch_size": 4, **running})


@pytest.fixture(scope="module")
def everything(subject: Subject, data: MuseData) -> Evaluation:
    return ask(subject, data)


def slow_continuation(subject: Subject, prompt: str, limit: int) -> str:
    ids = list(subject.tokenizer(prompt)["input_ids"])
    start = len(ids)
    while len(ids) < start + limit:
        with torch.no_grad():
            token = int(subject.model(torch.tensor([ids])).logits[0, -1].argmax())
        if token == 0:
            break
        ids.append(token)
    return subject.tokenizer.decode(ids[start:])


def test_worked_examples_come_before_the_question_to_the_very_white_space() -> None:
    prompt = muse.knowledge_prompt("Who kept it?", [("Who built it?", "Ines"), ("When?", "In March")])
    assert prompt == (
        "Question: Who built it?\nAnswer: Ines\n\nQuestion: When?\nAnswer: In March\n\nQuestion: Who kept it?\nAnswer: "
    )


def test_generated_rows_are_those_of_a_slow_loop(subject: Subject, everything: Evaluation) -> None:
    parts, rows = muse_parts(), everything.rows
    verbatim = rows[rows["set"] == "verbmem"]
    for record, row in zip(parts["verbmem"]["forget"][:2], verbatim.to_dict("records"), strict=False):
        assert row["generated"] == slow_continuation(subject, record["prompt"], 128).strip()
        ids = subject.tokenizer(record["gt"])["input_ids"]
        assert row["reference"] == subject.tokenizer.decode(ids[:128])
        assert row["rouge_l"] == rouge_l_f1(row["generated"], row["reference"])
    for kind in ("forget", "retain"):
        questions, worked = parts["knowmem"][f"{kind}_qa"], parts["knowmem"][f"{kind}_qa_icl"]
        prefix = "".join(f"Question: {one['question']}\nAnswer: {one['answer']}\n\n" for one in worked)
        found = rows[rows["set"] == f"{kind}_knowmem"].to_dict("records")
        assert len(found) == len(questions)
        for record, row in zip(questions[:3], found, strict=False):
            text = slow_continuation(subject, f"{prefix}Question: {record['question']}\nAnswer: ", 32)
            for stop in ("\n\n", "\nQuestion", "Question:"):
                text = text.split(stop)[0]
            assert row["generated"] == text.strip()
            assert row["reference"] == record["answer"]
        assert everything[f"{kind}_knowmem"] == pytest.approx(sum(row["rouge_l"] for row in found) / len(found))
    assert len({row["generated"] for row in rows.to_dict("records")}) > 5


def test_texts_are_scored_whole_and_without_an_end(subject: Subject, everything: Evaluation) -> None:
    rows = everything.rows
    scores: dict[str, list[float]] = {}
    for name in ("forget", "holdout"):
        scores[name] = []
        for record in muse_parts()["privleak"][name]:
            ids = subject.tokenizer(record["text"])["input_ids"]
            with torch.no_grad():
                log_p = subject.model(torch.tensor([ids])).logits[0].float().log_softmax(dim=-1).double()
            each = sorted(float(log_p[place - 1, ids[place]]) for place in range(1, len(ids)))
            lowest = each[: int(len(each) * 0.4)]
            scores[name].append(-sum(lowest) / len(lowest))
        assert rows.loc[rows["set"] == f"privleak_{name}", "min_k"].tolist() == pytest.approx(scores[name], abs=1e-5)
    below = [float(h < f) for f in scores["forget"] for h in scores["holdout"]]
    assert everything["privleak_auc"] == pytest.approx(sum(below) / len(below))


def test_answers_stop_before_the_stop_texts(subject: Subject) -> None:
    prompts = ["The lamp of Oslo", "Who was"]
    whole = greedy_answers(subject.model, subject.tokenizer, prompts, max_new_tokens=12)
    stop = whole[0][3:5]
    cut = greedy_answers(subject.model, subject.tokenizer, prompts, max_new_tokens=12, stop_texts=(stop, "~~~"))
    assert cut == [text.split(stop)[0].strip() for text in whole] and cut != whole


def test_answers_are_cut_and_continuations_are_not(
    subject: Subject, data: MuseData, everything: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert muse.STOP_TEXTS == ("\n\n", "\nQuestion", "Question:")
    whole = everything.rows.set_index(["set", "row"])["generated"]
    stop = whole.loc["retain_knowmem", 0][4:6]
    monkeypatch.setattr(muse, "STOP_TEXTS", (stop,))  # the tiny model writes none of the real ones
    questions = {name: data.found[name] for name in ("verbmem", "retain_knowmem")}
    found = ask(subject, MuseData("news", questions), batch_size=2).rows.set_index(["set", "row"])["generated"]
    cut = [text.split(stop)[0].strip() for text in whole.loc["retain_knowmem"]]
    assert found.loc["retain_knowmem"].tolist() == cut != whole.loc["retain_knowmem"].tolist()
    assert found.loc["verbmem"].tolist() == whole.loc["verbmem"].tolist()


def test_a_collapsed_model_scores_zero_and_its_numbers_are_finite(
    tokenizer: PreTrainedTokenizerFast, data: MuseData
) -> None:
    model = build_long_llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.norm.weight.fill_(1e4)
        model.lm_head.weight[tokenizer("\n")["input_ids"][0]] = 1.0  # its logit is +-1e4 or so, the others' 0
    found = ask(Subject.wrap(model, tokenizer, name="collapsed"), data, auc_retain=0.5)
    assert found["forget_verbmem"] == found["forget_knowmem"] == found["retain_knowmem"] == 0
    assert found["privleak_auc"] is not None and found["privleak"] is not None
    assert found.rows["min_k"].dropna().max() > 1e3
    assert json.dumps(found.summary(), allow_nan=False)


def test_no_number_depends_on_the_batch_or_the_order(subject: Subject, data: MuseData, everything: Evaluation) -> None:
    keys = ["set", "reference", "prompt", "n_tokens", "loss"]
    turned = MuseData(
        data.corpus,
        {name: tuple(texts if name.endswith("knowmem") and place else texts[::-1] for place, texts in enumerate(sets))
         for name, sets in data.found.items()},
    )  # fmt: skip
    expected = everything.rows.drop(columns="row").sort_values(keys, ignore_index=True)
    for other, batch_size in ((data, 1), (turned, 7)):
        rows = ask(subject, other, batch_size=batch_size).rows.drop(columns="row")
        pd.testing.assert_frame_equal(rows.sort_values(keys, ignore_index=True), expected, atol=1e-5)


def test_killed_run_goes_on_to_the_same_rows(
    subject: Subject, data: MuseData, everything: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = muse.greedy_answers, []

    def killed(*arguments: Any, **options: Any) -> list[str]:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(muse, "greedy_answers", killed)
    with pytest.raises(KeyboardInterrupt):
        ask(subject, data, out=tmp_path / "run", batch_size=2)
    monkeypatch.setattr(muse, "greedy_answers", original)
    assert len(list((tmp_path / "run" / "parts").iterdir())) == 3
    found = ask(subject, data, out=tmp_path / "run", auc_retain=0.5)
    shown = ["set", "row", "generated", "rouge_l", "min_k"]
    pd.testing.assert_frame_equal(found.rows[shown], everything.rows[shown])
    assert found["retain_knowmem"] == everything["retain_knowmem"]


def test_retain_model_or_its_auc_gives_privacy_leakage(
    subject: Subject, never: Subject, data: MuseData, everything: Evaluation
) -> None:
    data = MuseData("news", {"privleak": data.found["privleak"]})
    theirs = ask(never, data)["privleak_auc"]
    ours = everything["privleak_auc"]
    assert theirs is not None and ours is not None and theirs != ours
    found = ask(subject, data, control=never)
    assert found["privleak"] == pytest.approx(100 * (ours - theirs) / theirs)
    assert ask(subject, data, auc_retain=theirs)["privleak"] == pytest.approx(found["privleak"])
    assert found.summary()["left_out"] == dict.fromkeys(
        ("forget_verbmem", "forget_knowmem", "retain_knowmem"), "its data was not given"
    )
    same = ask(never, data, control=never)
    assert same["privleak"] == 0 and same.summary()["metrics"]["privleak_auc"]["difference"] == 0
    reason = everything.summary()["left_out"]["privleak"]
    assert "`control`" in reason and "0.4772" in reason  # told, and not used
    with pytest.raises(InputError, match="`auc_retain`.*0"):
        ask(subject, data, auc_retain=0)


def hand_made(forget: list[float], holdout: list[float]) -> pd.DataFrame:
    rows = [{"set": f"privleak_{name}", "group": "", "min_k": score, "rouge_l": None}
            for name, scores in (("forget", forget), ("holdout", holdout)) for score in scores]  # fmt: skip
    rows += [{"set": name, "group": "", "rouge_l": value} for name in ("verbmem", "forget_knowmem", "retain_knowmem")
             for value in (0.25, 0.75)]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("forget", "auc", "leakage"),
    [([0.1, 0.2], 0.0, -100.0), ([8.0, 9.0], 1.0, 100 * (1 - 0.4772) / 0.4772), ([1.0, 1.0], 0.25, -47.6111)],
)
def test_rows_made_by_hand_have_muses_direction(forget: list[float], auc: float, leakage: float) -> None:
    rows = hand_made(forget, [1.0, 2.0])
    metrics = {metric.name: metric.estimate for metric in muse._summarise(
        rows, None, corpus="news", missing={}, auc_retain=0.4772, seed=0)}  # fmt: skip
    assert metrics["privleak_auc"].value == auc
    assert metrics["privleak"].value == pytest.approx(leakage, abs=1e-3)
    assert metrics["forget_verbmem"].value == metrics["retain_knowmem"].value == 0.5


def test_retain_model_that_remembers_everything_gives_a_reason() -> None:
    memorised = hand_made([0.1, 0.2], [1.0, 2.0])
    metrics = muse._summarise(memorised, memorised, corpus="news", missing={}, auc_retain=None, seed=0)
    (leakage,) = [metric for metric in metrics if metric.name == "privleak"]
    assert leakage.estimate is None and leakage.reason == "the control's A is 0, and PrivLeak divides by it"


def test_what_is_missing_is_left_out_by_name(subject: Subject, tmp_path: Path) -> None:
    parts = muse_parts(2)
    del parts["privleak"]["holdout"], parts["knowmem"]["retain_qa_icl"], parts["verbmem"]
    write_hub(tmp_path / "muse-news", parts)
    found = ask(subject, read_muse("news", tmp_path))
    left_out = found.summary()["left_out"]
    assert set(left_out) == {"forget_verbmem", "retain_knowmem", "privleak", "privleak_auc"}
    assert left_out["privleak"].startswith(f"muse-news:privleak:holdout: {tmp_path} does not hold it")
    assert set(found.summary()["metrics"]) == {"forget_knowmem"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="MUSE-Books.*muse-books:verbmem:forget: "):
        read_muse("books", tmp_path / "empty")


@pytest.mark.parametrize("name", ["bbc", "news", "MUSE-News"])
def test_other_layouts_are_the_same_data(tmp_path: Path, data: MuseData, name: str) -> None:
    write_repository(tmp_path / name, muse_parts())
    assert read_muse("news", tmp_path) == data


def test_limit_keeps_all_worked_examples(directory: Path) -> None:
    found = read_muse("news", directory, limit=2).found
    assert [len(texts) for texts in found["forget_knowmem"]] == [2, 3]
    assert [len(texts) for texts in found["privleak"]] == [2, 2]


def test_broken_data_is_refused(tmp_path: Path) -> None:
    def refusal(**changes: list[dict[str, str]]) -> str:
        parts = muse_parts(2)
        for where, records in changes.items():
            config, _, split = where.partition("_")
            parts[config][split] = records
        write_repository(tmp_path / "news", parts)
        with pytest.raises(InputError) as error:
            read_muse("news", tmp_path)
        return str(error.value)

    assert "muse-news:verbmem:forget, record 1: must be prompt and answer" in refusal(verbmem_forget=[{"text": "a"}])
    assert "privleak:holdout, record 1: must be a text" in refusal(privleak_holdout=[{"prompt": "a", "gt": "b"}])
    assert "knowmem:forget_qa, record 1: the answer is empty" in refusal(
        knowmem_forget_qa=[{"question": "a", "answer": ""}]
    )
    assert "2 of the 2 forget rows are in the hold-out set too" in refusal(
        privleak_holdout=muse_parts(2)["privleak"]["forget"]
    )


def test_prompts_that_leave_no_room_are_told_or_refused(tokenizer: PreTrainedTokenizerFast, data: MuseData) -> None:
    small = build_tiny_llama()
    small.config.max_position_embeddings = 132
    verbatim = MuseData("news", {"verbmem": data.found["verbmem"]})
    (note,) = muse.prepare(Subject.wrap(small, tokenizer), verbatim).notes
    assert note.startswith("verbmem: ") and "fewer than 128 tokens in the model's context of 132" in note
    small.config.max_position_embeddings = 16
    with pytest.raises(InputError, match="forget_knowmem row .*context of 16 tokens, got"):
        muse.prepare(Subject.wrap(small, tokenizer), MuseData("news", {"forget_knowmem": data.found["forget_knowmem"]}))
    with pytest.raises(InputError, match="privleak_forget row 1: .*context of 16"):
        muse.prepare(Subject.wrap(small, tokenizer), MuseData("news", {"privleak": data.found["privleak"]}))


def test_first_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "Where was Ada Brook born?"
    ids = tokenizer(text)["input_ids"]
    assert first_tokens(tokenizer, text, len(ids)) == text
    assert first_tokens(tokenizer, text, 3) == tokenizer.decode(ids[:3])


@pytest.fixture(scope="module")
def long_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    path = tmp_path_factory.mktemp("models") / "long"
    build_long_llama().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_command_writes_what_it_shows(long_dir: Path, directory: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ("eval", "muse", "--corpus", "news", "--model", long_dir, "--data-dir", directory, "--limit", "2")
    done = call_main(main, *command, "--auc-retain", "0.4772", "--out", out, "--json", "--quiet")
    assert done.code == 0, done.err
    summary = json.loads(done.out)
    auc = summary["metrics"]["privleak_auc"]["value"]
    assert summary["metrics"]["privleak"]["value"] == pytest.approx(100 * (auc - 0.4772) / 0.4772)
    assert summary["rows"] == {
        "verbmem": 2, "forget_knowmem": 2, "retain_knowmem": 2, "privleak_forget": 2, "privleak_holdout": 2
    }  # fmt: skip
    again = call_main(main, *command, "--out", out)  # the rows are there; another summary
    assert again.code == 0 and "left out: privleak (it is relative to the control" in again.out
    assert "forget_verbmem" in again.out


def test_bad_input_ends_with_one_line(long_dir: Path, directory: Path, tmp_path: Path) -> None:
    command = ["eval", "muse", "--model", long_dir, "--out", tmp_path / "run"]
    news = [*command, "--corpus", "news"]
    cases: list[tuple[list[Any], str]] = [
        (command, "--corpus"),
        ([*command, "--corpus", "new"], "did you mean 'news'"),
        ([*news, "--data-dir", tmp_path / "no"], "no such directory"),
        ([*news, "--data-dir", tmp_path], "MUSE-News"),
        ([*news, "--data-dir", directory, "--limit", "0"], "--limit.*0"),
        ([*news, "--data-dir", directory, "--auc-retain", "1.5"], "--auc-retain.*1.5"),
        ([*news, "--data-dir", directory, "--auc-retain", "0.5", "--control", "a"], "--auc-retain.*control"),
        ([*news, "--data-dir", directory, "--control-result", tmp_path], "--control-result.*no run.json"),
    ]
    for arguments, message in cases:
        done = call_main(main, *arguments)
        assert done.code == 2 and re.search(message, done.err), (arguments, done.err)
        assert len(done.err.strip().splitlines()) == 1, done.err
