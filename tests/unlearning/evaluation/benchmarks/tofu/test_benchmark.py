"""TOFU end to end: against one text at a time with the definitions written out, and what must change nothing."""

import json
import math
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import ks_2samp
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.analyses.helpers import needs_tofu
from tests.unlearning.evaluation.benchmarks.tofu.tofu_helpers import (
    MAX_NEW_TOKENS,
    SETS,
    Record,
    Slow,
    build_records,
    teach,
    write_tofu,
)
from tests.unlearning.helpers import build_tiny_llama, build_tokenizer
from unlearning import InputError
from unlearning.evaluation.benchmarks.tofu.benchmark import prepare
from unlearning.evaluation.benchmarks.tofu.sets import QuestionSet, read_sets
from unlearning.evaluation.benchmarks.tofu.summary import summarise
from unlearning.evaluation.harness import Benchmark, Evaluation, Part, Row, evaluate
from unlearning.evaluation.metrics.text_match import rouge_l_recall
from unlearning.evaluation.statistics import Sample
from unlearning.evaluation.subject import Subject

SET_NAMES = {
    "forget": "forget01_perturbed",
    "retain": "retain_perturbed",
    "real_authors": "real_authors_perturbed",
    "world_facts": "world_facts_perturbed",
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNLEARNING_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tofu(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def sets(data: Path) -> list[QuestionSet]:
    return read_sets("forget01", data_dir=data)


@pytest.fixture(scope="module")
def subject(tokenizer: PreTrainedTokenizerFast) -> Subject:
    """Half taught, so that some tokens and some words of its answers are right."""
    model = build_tiny_llama()
    teach(model, tokenizer, [record for file in SETS.values() for record in file], steps=16)
    return Subject.wrap(model, tokenizer, name="model")


@pytest.fixture(scope="module")
def never(tokenizer: PreTrainedTokenizerFast) -> Subject:
    return Subject.wrap(build_tiny_llama(seed=1), tokenizer, name="never")


def run(subject: Subject, sets: Sequence[QuestionSet], **options: Any) -> Evaluation:
    own = {name: options.pop(name) for name in ("generate", "seed") if name in options}
    prepared = partial(prepare, sets=sets, max_new_tokens=MAX_NEW_TOKENS, **own)
    return evaluate(prepared, subject, progress=False, **options)


def left_out(evaluation: Evaluation) -> dict[str, str]:
    return dict(evaluation.summary()["left_out"])


SlowMetrics = tuple[dict[str, float], list[float]]


@pytest.fixture(scope="module")
def ours(subject: Subject) -> SlowMetrics:
    return slow_metrics(subject.model, subject.tokenizer)


@pytest.fixture(scope="module")
def theirs(never: Subject) -> list[float]:
    """The never model's truth ratios."""
    slow = Slow(never.model, never.tokenizer)

    def ratio(record: Record) -> float:
        wrong = [slow.nll(record["question"], text) for text in record["perturbed_answer"]]
        return math.exp(slow.nll(record["question"], record["paraphrased_answer"]) - sum(wrong) / len(wrong))

    return [ratio(record) for record in SETS["forget01_perturbed"]]


def slow_metrics(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> SlowMetrics:
    """Every metric but forget quality by its definition in probabilities, and the forget rows' truth ratios."""
    slow = Slow(model, tokenizer)

    def p(question: str, answer: str) -> float:
        return math.exp(-slow.nll(question, answer))

    found: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    ratios = []
    for name, file in SET_NAMES.items():
        for record in SETS[file]:
            question, answer = record["question"], record["answer"]
            right = record.get("paraphrased_answer", answer)
            wrong = [p(question, text) for text in record["perturbed_answer"]]
            ratio = math.prod(wrong) ** (1 / len(wrong)) / p(question, right)
            add(f"{name}_probability", p(question, answer))
            add(f"{name}_rouge", rouge_l_recall(slow.generate(question), answer))
            arithmetic = sum(wrong) / len(wrong) / p(question, right)
            if name != "forget":
                add(f"{name}_truth_ratio", max(0, 1 - ratio))
                add(f"{name}_truth_ratio_arithmetic", max(0, 1 - arithmetic))
            if name in ("real_authors", "world_facts"):
                add(f"{name}_normalised_probability", p(question, answer) / (p(question, answer) + sum(wrong)))
                continue
            reworded = record["paraphrased_question"]
            add(f"{name}_paraphrased_question_probability", p(reworded, answer))
            add(f"{name}_paraphrased_question_rouge", rouge_l_recall(slow.generate(reworded), answer))
            if name == "forget":
                ratios.append(ratio)
                add("forget_truth_ratio", min(ratio, 1 / ratio))
                add("forget_truth_ratio_arithmetic", min(arithmetic, 1 / arithmetic))
                add("forget_log_truth_ratio", math.log(ratio))
                add("forget_knowledge_truth_ratio", p(question, right) / (p(question, right) * (1 + ratio)))
                add("forget_paraphrased_probability", p(question, right))
                likeliest = [is_likeliest for _, is_likeliest in slow.tokens(question, answer)][:-1]
                n = len(likeliest)
                add("forget_exact_memorisation", sum(likeliest) / n)
                add("forget_extraction_strength", 1 - min(k for k in range(n + 1) if all(likeliest[k:])) / n)
    means = {name: sum(values) / len(values) for name, values in found.items()}
    for form in ("", "_arithmetic"):
        nine = [means[f"retain_{part}"] for part in ("probability", "rouge", f"truth_ratio{form}")]
        for part in ("normalised_probability", "rouge", f"truth_ratio{form}"):
            nine += [means[f"real_authors_{part}"], means[f"world_facts_{part}"]]
        means[f"model_utility{form}"] = statistics.harmonic_mean(nine)
    return means, ratios


def test_every_metric_equals_its_definition_one_text_at_a_time(
    subject: Subject, never: Subject, sets: list[QuestionSet], ours: SlowMetrics, theirs: list[float]
) -> None:
    evaluation = run(subject, sets, control=never)
    test = ks_2samp(ours[1], theirs)
    expected = {**ours[0], "forget_quality": test.pvalue, "forget_quality_statistic": test.statistic}
    values = {metric.name: metric.estimate.value for metric in evaluation.metrics if metric.estimate}
    rest = {"forget_quality_arithmetic", "forget_quality_arithmetic_statistic", "forget_gibberish", "retain_gibberish"}
    assert values.keys() - rest == expected.keys()
    assert {name: values[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert not left_out(evaluation)
    telling = ("exact_memorisation", "extraction_strength", "rouge", "truth_ratio")
    assert all(0 < values[f"forget_{name}"] < 1 for name in telling)
    # The arithmetic mean of the wrong answers is above the geometric one, so its form shows less utility.
    assert 0 < values["model_utility_arithmetic"] < values["model_utility"] < 1
    for name in ("retain", "real_authors", "world_facts"):
        assert values[f"{name}_truth_ratio_arithmetic"] < values[f"{name}_truth_ratio"]
    # Every number is there with an interval, a direction and a meaning; but a p-value has no interval.
    for name, record in evaluation.summary()["metrics"].items():
        is_p_value = name in ("forget_quality", "forget_quality_arithmetic")
        assert (record["low"] is None) == is_p_value, name
        assert is_p_value or record["low"] <= record["high"]
        assert record["direction"] and record["meaning"]


def test_forget_quality_says_floor_and_direction(
    subject: Subject, never: Subject, sets: list[QuestionSet], ours: SlowMetrics, theirs: list[float]
) -> None:
    for model, retain, ratios, others in ((subject, never, ours[1], theirs), (never, subject, theirs, ours[1])):
        meaning = run(model, sets, control=retain, generate=False).summary()["metrics"]["forget_quality"]["meaning"]
        assert "n = 5" in meaning and "at least 7.94e-3 (D = 1)" in meaning  # 2 / C(10, 5)
        is_smaller = ks_2samp(ratios, others).statistic_sign == 1  # the model's distribution function is above
        assert ("smaller: it prefers the right" in meaning) == is_smaller
        assert ("larger: it prefers the wrong" in meaning) != is_smaller


def test_the_interval_of_d_is_of_paired_rows(subject: Subject, never: Subject, sets: list[QuestionSet]) -> None:
    evaluation = run(subject, sets, control=never, generate=False)
    assert evaluation.control_rows is not None
    ours, theirs = (
        rows.query("set == 'forget'")["log_truth_ratio"].to_numpy()
        for rows in (evaluation.rows, evaluation.control_rows)
    )
    found = next(metric for metric in evaluation.metrics if metric.name == "forget_quality_statistic").estimate
    assert found is not None
    for times, drawn in zip(Sample("forget", [""] * 5).weights[:50].astype(int), found.draws, strict=False):
        expected = ks_2samp(np.repeat(ours, times), np.repeat(theirs, times)).statistic
        assert drawn == pytest.approx(expected, abs=1e-12)


def test_batch_size_padding_side_and_order_change_no_number(subject: Subject, data: Path) -> None:
    def rows(sets: list[QuestionSet], tokenizer: PreTrainedTokenizerFast, batch_size: int) -> pd.DataFrame:
        found = run(replace(subject, tokenizer=tokenizer), sets, batch_size=batch_size).rows
        return found.sort_values(["set", "id"]).drop(columns="row").reset_index(drop=True)

    sets = read_sets("forget01", data_dir=data)
    shuffle = np.random.default_rng(3).permutation
    shuffled = [replace(each, questions=[each.questions[i] for i in shuffle(len(each.questions))]) for each in sets]
    left = build_tokenizer()
    left.padding_side = "left"
    base = rows(sets, subject.tokenizer, 16)
    for other in (rows(sets, subject.tokenizer, 1), rows(shuffled, subject.tokenizer, 7), rows(sets, left, 4)):
        pd.testing.assert_frame_equal(other, base, rtol=0, atol=1e-5)


def test_the_order_of_rows_changes_no_metric(subject: Subject, never: Subject, sets: list[QuestionSet]) -> None:
    evaluation = run(subject, sets, control=never)
    assert evaluation.control_rows is not None
    shuffled = summarise(evaluation.rows.sample(frac=1, random_state=1), evaluation.control_rows)
    for ours, other in zip(evaluation.metrics, shuffled, strict=True):
        assert ours.name == other.name and ours.estimate is not None and other.estimate is not None
        assert other.estimate.value == pytest.approx(ours.estimate.value, rel=1e-12)
        assert other.estimate.interval == pytest.approx(ours.estimate.interval, rel=1e-9)


def test_a_collapsed_model_has_finite_numbers_and_none_that_are_missing(
    tokenizer: PreTrainedTokenizerFast, never: Subject, sets: list[QuestionSet]
) -> None:
    model = build_tiny_llama()
    with torch.no_grad():
        model.lm_head.weight *= 3000
    evaluation = run(Subject.wrap(model, tokenizer), sets, control=never)
    assert evaluation.rows["answer_nll"].min() > 1e3  # e to the minus of which is no float
    text = json.dumps(evaluation.summary(), allow_nan=False)
    metrics = json.loads(text)["metrics"]
    assert metrics["forget_probability"]["value"] == metrics["model_utility"]["value"] == 0
    assert metrics["model_utility_arithmetic"]["value"] == 0
    log_ratios = evaluation.rows.query("set == 'forget'")["log_truth_ratio"]
    assert log_ratios.abs().min() > 10 and log_ratios.nunique() == 5  # finite and apart
    assert metrics["forget_truth_ratio"]["value"] == pytest.approx(np.exp(-log_ratios.abs()).mean(), rel=1e-12)


def test_a_model_that_answers_nothing(tokenizer: PreTrainedTokenizerFast, sets: list[QuestionSet]) -> None:
    model = build_tiny_llama()
    model.generation_config.eos_token_id = list(range(384))
    evaluation = run(Subject.wrap(model, tokenizer), sets)
    assert set(evaluation.rows["generated"]) == {""}
    assert evaluation["retain_rouge"] == evaluation["model_utility"] == 0
    assert evaluation["forget_gibberish"] == evaluation["retain_gibberish"] == 1


def test_the_never_model_against_itself_has_forget_quality_one(never: Subject, sets: list[QuestionSet]) -> None:
    evaluation = run(never, sets, control=never)
    assert evaluation["forget_quality"] == 1
    metrics = evaluation.summary()["metrics"]
    statistic = metrics["forget_quality_statistic"]
    assert (statistic["value"], statistic["low"], statistic["high"]) == (0, 0, 0)
    assert "neither model's truth ratios are smaller" in statistic["meaning"]
    compared = [record for name, record in metrics.items() if not name.startswith("forget_quality")]
    assert {(record["difference"], record["difference_low"], record["difference_high"]) for record in compared} == {
        (0, 0, 0)
    }


def test_what_needs_a_retain_model_or_texts_is_left_out_by_name(subject: Subject, sets: list[QuestionSet]) -> None:
    without = left_out(run(subject, sets, generate=False))
    quality = {name for name in without if name.startswith("forget_quality")}
    assert len(quality) == 4
    assert all("`control` or `control_result`" in without[name] for name in quality)
    for form in ("", "_arithmetic"):
        assert without[f"model_utility{form}"] == (
            "needs all of its nine parts; missing: retain_rouge, real_authors_rouge, world_facts_rouge"
        )
    assert "`generate=False`" in without["forget_rouge"]
    assert without.keys() - quality == {
        *(f"{name}_rouge" for name in SET_NAMES),
        *(f"{name}_paraphrased_question_rouge" for name in ("forget", "retain")),
        *("model_utility", "model_utility_arithmetic", "forget_gibberish", "retain_gibberish"),
    }


def test_sets_that_are_not_asked_leave_model_utility_out(
    subject: Subject, never: Subject, sets: list[QuestionSet]
) -> None:
    whole, evaluation = (run(subject, some, control=never) for some in (sets, sets[:2]))
    without = left_out(evaluation)
    assert without["world_facts_truth_ratio"] == "the world_facts questions were not asked"
    assert "real_authors_rouge" in without["model_utility"] and "retain_rouge" not in without["model_utility"]
    facts = {metric.name for metric in whole.metrics if metric.name.startswith(("real_authors", "world_facts"))}
    assert set(without) == {"model_utility", "model_utility_arithmetic", *facts}
    for name in ("forget_quality", "retain_truth_ratio"):
        assert evaluation[name] == pytest.approx(whole[name], rel=1e-6)


def test_a_forget_set_without_perturbed_answers_leaves_its_metrics_out_and_keeps_the_others(
    subject: Subject, never: Subject, data: Path, tmp_path: Path
) -> None:
    bare = [{key: record[key] for key in ("question", "answer")} for record in SETS["forget01_perturbed"]]
    sets = read_sets("forget20", data_dir=write_tofu(tmp_path / "data", forget20=bare))
    evaluation = run(subject, sets, control=never)
    full = run(subject, read_sets("forget01", data_dir=data), control=never)
    without = left_out(evaluation)
    assert set(without) == {
        *(f"forget_quality{form}{part}" for form in ("", "_arithmetic") for part in ("", "_statistic")),
        *(f"forget_{name}" for name in ("truth_ratio", "truth_ratio_arithmetic", "log_truth_ratio")),
        *(f"forget_{name}" for name in ("knowledge_truth_ratio", "paraphrased_probability")),
        *("forget_paraphrased_question_probability", "forget_paraphrased_question_rouge"),
    }
    assert "no row has both a paraphrased_answer and a perturbed_answer" in without["forget_quality"]
    for name in ("forget_probability", "forget_extraction_strength", "model_utility"):
        assert evaluation[name] == pytest.approx(full[name], abs=1e-6)


def killed_at(benchmark: Benchmark, call: int) -> Benchmark:
    """A benchmark that stops in the middle of scoring."""
    calls = []

    def watched(score: Callable[[Sequence[int]], list[Row]], places: Sequence[int]) -> list[Row]:
        calls.append(places)
        if len(calls) == call:
            raise KeyboardInterrupt
        return score(places)

    parts = [Part(part.name, part.costs, partial(watched, part.score), part.at_once) for part in benchmark.parts]
    return replace(benchmark, parts=parts)


def plain(rows: pd.DataFrame) -> pd.DataFrame:
    """Without the differences that parquet makes: missing values of several kinds, arrays for lists."""
    lists = rows["perturbed_answer_nlls"].map(list)
    return rows.astype(object).where(rows.notna(), None).assign(perturbed_answer_nlls=lists)


def test_a_killed_run_resumes_to_the_same_rows_and_metrics(
    subject: Subject, never: Subject, sets: list[QuestionSet], tmp_path: Path
) -> None:
    prepared = partial(prepare, sets=sets, max_new_tokens=MAX_NEW_TOKENS)
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        evaluate(lambda s: killed_at(prepared(s), 4), subject, out=out, batch_size=2, progress=False)
    assert len(list((out / "parts").glob("*.parquet"))) == 3
    whole = evaluate(prepared, subject, control=never, batch_size=2, progress=False)
    for _ in range(2):  # resumed, then read from the finished run
        again = evaluate(prepared, subject, control=never, out=out, batch_size=2, progress=False)
        pd.testing.assert_frame_equal(plain(again.rows), plain(whole.rows))
        assert again.summary() == whole.summary()


def test_a_retain_result_of_another_split_template_or_tokenizer_is_refused(
    subject: Subject, never: Subject, sets: list[QuestionSet], tmp_path: Path
) -> None:
    def refusal(subject: Subject, sets: Sequence[QuestionSet]) -> str:
        with pytest.raises(InputError) as error:
            run(subject, sets, control=tmp_path / "never")
        assert "\n" not in str(error.value)
        return str(error.value)

    run(never, sets, out=tmp_path / "never")
    assert run(subject, sets, control=tmp_path / "never")["forget_quality"] == pytest.approx(
        run(subject, sets, control=never)["forget_quality"]
    )
    directory = write_tofu(tmp_path / "data", forget05_perturbed=build_records([1, 2, 3, 4, 5]))
    larger = read_sets("forget05", data_dir=directory)
    assert "split, got forget01 instead of forget05" in refusal(subject, larger)
    changed = write_tofu(tmp_path / "changed", forget01_perturbed=build_records([1, 2, 3, 4, 5]))
    assert "the same forget, got" in refusal(subject, read_sets("forget01", data_dir=changed))
    spaced = build_tokenizer()
    spaced.add_tokens(["born"])
    assert "same tokenisation, got" in refusal(Subject.wrap(build_tiny_llama(), spaced), sets)


def test_a_tokenizer_that_is_too_large_and_a_text_that_is_too_long_are_refused_before_scoring(
    tokenizer: PreTrainedTokenizerFast, sets: list[QuestionSet], tmp_path: Path
) -> None:
    larger = build_tokenizer()
    larger.add_tokens([f"<{number}>" for number in range(400)] + ["born"])
    with pytest.raises(InputError, match="vocabulary size 384"):
        prepare(Subject.wrap(build_tiny_llama(), larger), sets=sets)
    long: list[Record] = [{**SETS["forget01_perturbed"][0], "perturbed_answer": ["Lima, in fact " * 40]}]
    directory = write_tofu(tmp_path / "data", forget01_perturbed=long)
    with pytest.raises(InputError, match="context of 128"):
        prepare(Subject.wrap(build_tiny_llama(), tokenizer), sets=read_sets("forget01", data_dir=directory))


def test_authors_are_drawn_whole_and_few_of_them_are_said(subject: Subject, tmp_path: Path) -> None:
    records = [{**record, "group": "ab"[place % 2]} for place, record in enumerate(SETS["forget01_perturbed"])]
    sets = read_sets("forget01", data_dir=write_tofu(tmp_path / "data", forget01_perturbed=records))
    evaluation = run(subject, sets, generate=False)
    assert "forget: the bootstrap draws 2 whole authors; intervals over so few are unreliable" in evaluation.notes
    probabilities = np.exp(-evaluation.rows.query("set == 'forget'")["answer_nll"].to_numpy())
    low, high = sorted((probabilities[::2].mean(), probabilities[1::2].mean()))
    record = evaluation.summary()["metrics"]["forget_probability"]
    assert (record["low"], record["high"]) == pytest.approx((low, high))  # one author twice, or the other


@needs_tofu
def test_the_real_files_evaluate_end_to_end(tokenizer: PreTrainedTokenizerFast) -> None:
    def wide(seed: int) -> Subject:
        model = build_tiny_llama(seed)
        model.config.max_position_embeddings = 1024  # the small tokenizer makes many tokens of these texts
        return Subject.wrap(model, tokenizer, name=f"tiny-{seed}")

    sets = read_sets("forget10", data_dir=os.environ["DISSECT_DATA"], limit=4)
    evaluation = run(wide(0), sets, control=wide(1))
    assert dict(evaluation.rows.groupby("set").size()) == dict.fromkeys(SET_NAMES, 4)
    assert not left_out(evaluation)
    assert evaluation.rows.query("set == 'forget'")["perturbed_answer_nlls"].map(len).tolist() == [5] * 4
    assert set(evaluation.rows.query("set == 'forget'")["group"]) == {"author-000"}
