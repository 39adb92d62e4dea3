"""Multiple choice: prompts, choices, chance, orders of the options, and the benchmark."""

import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from tests.unlearning.evaluation.benchmarks.multiple_choice.choice_world import (
    RECORDS,
    build_subject,
    letters,
    questions,
    slow_log_likelihood,
)
from unlearning.common.errors import InputError
from unlearning.data.choice_questions import LETTERS, Question, questions_of, read_questions
from unlearning.evaluation.benchmarks.multiple_choice import benchmark as multiple_choice
from unlearning.evaluation.benchmarks.multiple_choice.benchmark import Asking
from unlearning.evaluation.benchmarks.multiple_choice.summary import summarise
from unlearning.evaluation.harness import Benchmark, Evaluation, evaluate
from unlearning.evaluation.metrics.multiple_choice import (
    chance_p_value,
    choose,
    cloze_prompt,
    expected_shares,
    listed_prompt,
    normalised,
    other_orders,
    share_of,
)
from unlearning.evaluation.subject import Subject
from unlearning.evaluation.token_scores import Target, TokenScores

QUESTION = questions()[0]


@pytest.fixture(scope="module")
def subject() -> Subject:
    return build_subject()


def run(
    subject: Subject, asked: Sequence[Question], *, batch_size: int = 4, out: Path | None = None, **options: Any
) -> Evaluation:
    def prepare(model: Subject) -> Benchmark:
        asking = {field.name: options.pop(field.name) for field in fields(Asking) if field.name in options}
        return multiple_choice.prepare(model, sets={"quiz": asked}, asking=Asking(**asking), **options)

    return evaluate(prepare, subject, batch_size=batch_size, out=out, progress=False)


def test_the_listed_prompt_is_wmdps() -> None:
    assert listed_prompt(QUESTION) == (
        "The following are multiple choice questions (with answers) about biology.\n\n"
        "Which moss do the Velm moths eat?\nA. red\nB. blue-green\nC. none\nD. any\nAnswer:"
    )


def test_the_cloze_prompt_shows_no_option() -> None:
    bare = replace(QUESTION, subject="")
    assert cloze_prompt(bare) == (
        "The following are questions (with answers).\n\nQuestion: Which moss do the Velm moths eat?\nAnswer:"
    )


def test_solved_questions_stand_between_description_and_question() -> None:
    first, second = questions()[:2]
    start = "The following are multiple choice questions (with answers) about biology.\n\n"
    bare = listed_prompt(second).removeprefix(start)
    solved = listed_prompt(first).removeprefix(start)
    assert listed_prompt(second, [first]) == f"{start}{solved} B\n\n{bare}"
    assert listed_prompt(second, [first], by_letter=False) == f"{start}{solved} blue-green\n\n{bare}"
    assert f"Velm moths eat?\nAnswer: {first.choices[1]}\n\nQuestion: Where" in cloze_prompt(second, [first])


def test_an_order_of_the_options_moves_their_texts_under_the_letters() -> None:
    assert "A. any\nB. red\nC. blue-green\nD. none\n" in listed_prompt(QUESTION, order=[3, 0, 1, 2])


def test_the_first_of_the_best_options_is_chosen() -> None:
    assert (choose([-2.0, -1.0, -1.0]).place, choose([-2.0, -1.0, -1.0]).n_best) == (1, 2)
    assert (choose([-1e4, -1e4 + 0.1]).place, choose([-1e4, -1e4 + 0.1]).n_best) == (1, 1)
    assert choose([-1.0, -1.0 + 1e-8]).place == 0, "what float32 cannot tell apart is a tie"
    assert choose([0.0, -1e-3]) == choose([0.0, -1.0])


def test_long_options_are_compared_by_token_and_by_character() -> None:
    scores = normalised([-6.0, -4.0, -9.0], n_tokens=[3, 1, 3], choices=["abcdef", "ab", "abcdefghijkl"])
    assert scores["sum"].tolist() == [-6.0, -4.0, -9.0]
    assert scores["per_token"].tolist() == [-2.0, -4.0, -3.0]
    assert scores["per_character"].tolist() == [-1.0, -2.0, -0.75]
    assert [choose(score).place for score in scores.values()] == [1, 0, 2]


def test_the_right_letters_share_is_finite_in_collapsed_models() -> None:
    assert share_of([-1.0, -1.0, -1.0, -1.0], 2) == pytest.approx(0.25)
    assert share_of([-1e4, -1e4 - math.log(3)], 0) == pytest.approx(0.75)
    assert share_of([-1e4, -1.0], 0) == 0


@given(st.integers(1, 60), st.data(), st.integers(2, 6))
@settings(max_examples=60)
def test_chance_is_tested_by_the_binomial_test(n: int, data: st.DataObject, kind: int) -> None:
    right = data.draw(st.integers(0, n))
    assert chance_p_value(right, [kind] * n) == pytest.approx(binomtest(right, n, 1 / kind).pvalue, rel=1e-9)


@pytest.mark.parametrize("right", range(6))
def test_chance_with_mixed_numbers_of_options_equals_counting_all_outcomes(right: int) -> None:
    sizes = [2, 4, 3, 2, 5]
    likelihoods = Counter()
    for outcome in itertools.product([0, 1], repeat=len(sizes)):
        likelihoods[sum(outcome)] += math.prod(
            1 / size if hit else 1 - 1 / size for hit, size in zip(outcome, sizes, strict=True)
        )
    as_unlikely = [value for value in likelihoods.values() if value <= likelihoods[right] * (1 + 1e-9)]
    assert chance_p_value(right, sizes) == pytest.approx(sum(as_unlikely))


def test_accuracies_far_below_chance_are_no_chance() -> None:
    assert chance_p_value(250, [4] * 1000) > 0.9
    assert chance_p_value(150, [4] * 1000) < 1e-12
    assert chance_p_value(1273, [4] * 1273) == 0


@given(st.lists(st.integers(2, 26), min_size=1, max_size=40))
def test_expected_shares_are_those_of_even_choices(sizes: list[int]) -> None:
    shares = expected_shares(sizes)
    slow = np.zeros(max(sizes))
    for size in sizes:
        for place in range(size):
            slow[place] += 1 / size / len(sizes)
    np.testing.assert_allclose(shares, slow)
    assert shares.sum() == pytest.approx(1)


@given(st.integers(2, 5), st.integers(0, 12), st.integers(0, 5))
def test_orders_are_distinct_and_none_is_the_questions_own(n_choices: int, n: int, seed: int) -> None:
    question = Question("Which?", tuple(f"option {place}" for place in range(n_choices)), 0)
    orders = other_orders(question, n, seed=seed)
    assert len({tuple(order) for order in orders}) == len(orders) == min(n, math.factorial(n_choices) - 1)
    assert all(sorted(order) == list(range(n_choices)) for order in orders)
    assert list(range(n_choices)) not in orders
    assert orders == other_orders(replace(question, id="elsewhere"), n, seed=seed)


def test_orders_depend_on_the_seed() -> None:
    assert other_orders(QUESTION, 3, seed=0) != other_orders(QUESTION, 3, seed=1)


@pytest.mark.parametrize("bytes_only", [False, True], ids=["merged tokens", "one token a byte"])
def test_scores_equal_a_float64_model_asked_one_by_one(bytes_only: bool) -> None:
    subject = build_subject(bytes_only=bytes_only)
    asked = questions()[1:3]
    found = run(subject, asked, permute=2).rows
    for question, row in zip(asked, found.to_dict("records"), strict=True):
        prompt = listed_prompt(question)
        slow = [slow_log_likelihood(subject, prompt, letter)[0] for letter in letters(4)]
        np.testing.assert_allclose(row["letter_log_likelihoods"], slow, atol=1e-4)
        assert row["letter_choice"] == int(np.argmax(slow))
        assert row["letter_correct"] == (int(np.argmax(slow)) == question.answer)
        for kind, before in (("answer", prompt), ("cloze", cloze_prompt(question))):
            pairs = [slow_log_likelihood(subject, before, f" {choice}") for choice in question.choices]
            np.testing.assert_allclose(row[f"{kind}_log_likelihoods"], [pair[0] for pair in pairs], atol=5e-4)
            assert list(row[f"{kind}_n_tokens"]) == [pair[1] for pair in pairs]
            per_character = [pair[0] / len(choice) for pair, choice in zip(pairs, question.choices, strict=True)]
            assert row[f"{kind}_per_character_correct"] == (int(np.argmax(per_character)) == question.answer)
        chosen = []
        for order in other_orders(question, 2, seed=0):
            before = listed_prompt(question, order=order)
            scores = [slow_log_likelihood(subject, before, letter)[0] for letter in letters(4)]
            chosen.append(order[int(np.argmax(scores))])
        assert list(row["permuted_choices"]) == chosen


def rigged(monkeypatch: pytest.MonkeyPatch, log_prob: Any) -> None:
    """Let every continuation's log-likelihood be a function of its text: prompt and answer."""

    def score(subject: Subject, targets: Sequence[Target], *, batch_size: int) -> list[TokenScores]:
        texts = [subject.tokenizer.decode(target.span.input_ids) for target in targets]
        assert batch_size >= 1
        return [TokenScores(np.array([log_prob(text)], dtype=float), np.array([True]), None, None, 0) for text in texts]

    monkeypatch.setattr(multiple_choice, "score_tokens", score)


def test_a_model_that_knows_is_right_in_every_order(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    right = {question.choices[question.answer] for question in questions()}

    def knows(text: str) -> float:
        options = dict(line.split(". ", 1) for line in text.split("\n") if line[1:3] == ". ")
        return -1.0 if options[text[-1]] in right else -9.0

    rigged(monkeypatch, knows)
    found = run(subject, questions(), scoring=["letter"], permute=5)
    names = ["letter_accuracy", "letter_above_chance", "permuted_accuracy", "permuted_consistency", "letter_ties"]
    assert [found[f"quiz_{name}"] for name in names] == [1, 0.75, 1, 1, 0]
    assert found["quiz_letter_chance_p_value"] == pytest.approx(0.25**5)
    assert [found[f"quiz_letter_share_{letter}"] for letter in "ABCD"] == [0.2, 0.4, 0.2, 0.2]
    assert found["quiz_letter_imbalance"] == pytest.approx((0.05 * 3 + 0.15) / 2)


def test_a_model_that_always_says_b_is_seen_through(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    rigged(monkeypatch, lambda text: 0.0 if text.endswith(" B") else -1e4)
    found = run(subject, questions(), scoring=["letter"], permute=23)
    assert found["quiz_letter_accuracy"] == 0.4
    assert found["quiz_letter_share_B"] == 1
    assert found["quiz_letter_imbalance"] == 0.75
    assert found["quiz_permuted_consistency"] == 0
    # In all 24 orders the right option is under B in 6; a question that is right in its own order has 5 others.
    assert found["quiz_permuted_accuracy"] == pytest.approx((2 * 5 + 3 * 6) / (5 * 23))


def test_one_other_order_is_compared_with_the_questions_own(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    rigged(monkeypatch, lambda text: 0.0 if text.endswith(" B") else -1e4)
    found = run(subject, questions(), scoring=["letter"], permute=1)
    same = [other_orders(question, 1, seed=0)[0][1] == 1 for question in questions()]
    assert found.rows["permuted_consistent"].tolist() == same
    assert found["quiz_permuted_consistency"] == np.mean(same) < 1


def test_ties_go_to_the_first_option_and_are_counted(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    rigged(monkeypatch, lambda _text: -1e4)
    found = run(subject, questions())
    assert found["quiz_letter_ties"] == 1
    assert found["quiz_letter_share_A"] == 1
    assert found["quiz_letter_accuracy"] == found["quiz_answer_sum_accuracy"] == 0.2
    assert found["quiz_letter_probability"] == pytest.approx(0.25)
    assert "first of them" in found.notes[0]


def rows_of(correct: dict[str, list[int]]) -> pd.DataFrame:
    return pd.DataFrame(
        {"set": name, "row": row, "group": "", "n_choices": 4, "answer": 0}
        | {"letter_correct": bool(value), "letter_choice": 1 - value, "letter_n_best": 1, "letter_probability": 0.5}
        for name, values in correct.items()
        for row, value in enumerate(values)
    )


def test_the_score_over_all_sets_weighs_them_by_size() -> None:
    rows = rows_of({"bio": [1] * 6 + [0] * 2, "chem": [0] * 12})
    found = {metric.name: metric for metric in summarise(rows, scoring=["letter"], permute=0, role="forget", seed=0)}
    values = {name: metric.estimate.value for name, metric in found.items() if metric.estimate}
    assert values["bio_letter_accuracy"] == 0.75
    assert values["chem_letter_accuracy"] == 0
    assert values["all_letter_accuracy"] == 6 / 20
    assert values["bio_letter_standard_error"] == pytest.approx(math.sqrt(0.75 * 0.25 / 7))
    assert values["bio_letter_standard_error"] == pytest.approx(np.std([1] * 6 + [0] * 2, ddof=1) / math.sqrt(8))
    assert values["chem_letter_chance_p_value"] == pytest.approx(binomtest(0, 12, 0.25).pvalue)
    assert values["all_letter_above_chance"] == pytest.approx(0.05)
    assert values["all_letter_share_A"] == 6 / 20
    assert found["all_letter_accuracy"].direction == "lower is better"
    assert found["all_letter_above_chance"].direction == "closer to 0 is better"
    # A set whose rows are all alike does not vary; the other one's variation, weighed by size, is all there is.
    low, high = found["all_letter_accuracy"].estimate.interval
    assert 0 < low < 0.3 < high <= 8 / 20


def test_the_interval_covers_the_accuracy_as_the_standard_error_says() -> None:
    rows = rows_of({"quiz": [1] * 300 + [0] * 700})
    found = {metric.name: metric for metric in summarise(rows, scoring=["letter"], permute=0, role="none", seed=0)}
    low, high = found["quiz_letter_accuracy"].estimate.interval
    assert (high - low) / 2 == pytest.approx(1.96 * found["quiz_letter_standard_error"].estimate.value, rel=0.1)
    assert found["quiz_letter_accuracy"].direction == "descriptive, no direction"


def assert_same(ours: Evaluation, theirs: Evaluation) -> None:
    assert list(ours.rows.columns) == list(theirs.rows.columns)
    for name in ours.rows.columns:
        for mine, yours in zip(ours.rows[name], theirs.rows[name], strict=True):
            if isinstance(mine, str | bool):
                assert mine == yours
            else:
                np.testing.assert_allclose(mine, yours, atol=1e-5)


def test_no_number_depends_on_batches_or_on_the_order_of_questions(subject: Subject) -> None:
    asked = [*questions(), Question("Is it?", ("yes", "no"), 1), Question("Or?", ("a", "b", "c"), 2)]
    whole = run(subject, asked, permute=2, batch_size=7)
    assert_same(run(subject, asked, permute=2, batch_size=1), whole)
    backwards = run(subject, asked[::-1], permute=2, batch_size=3)
    flipped = backwards.rows.iloc[::-1].assign(row=range(len(asked))).reset_index(drop=True)
    assert_same(replace(backwards, _rows=flipped), whole)


def test_solved_questions_of_the_same_subject_are_shown(subject: Subject) -> None:
    other = [replace(question, subject="law") for question in questions()]
    asked = [questions()[0], other[1]]
    shots = [*other[2:], *questions()[3:]]
    found = run(subject, asked, few_shot=shots, n_shots=1, scoring=["letter"]).rows
    for question, shot, row in zip(asked, (questions()[3], other[2]), found.to_dict("records"), strict=True):
        prompt = listed_prompt(question, [shot])
        slow = [slow_log_likelihood(subject, prompt, letter)[0] for letter in letters(4)]
        np.testing.assert_allclose(row["letter_log_likelihoods"], slow, atol=1e-4)


def test_solved_questions_show_the_kind_of_answer_that_is_asked_for(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    shot, asked = questions()[:2]
    texts = []
    rigged(monkeypatch, lambda text: texts.append(text) or -1.0)
    run(subject, [asked], few_shot=[shot], permute=1)
    shown = [text.split("Answer:")[1].split("\n")[0] for text in texts]
    assert shown == [" B"] * 4 + [" blue-green"] * 8 + [" B"] * 4


def test_a_chat_template_wraps_the_whole_prompt_and_is_recorded(subject: Subject) -> None:
    template = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    tokenizer = build_subject().tokenizer
    tokenizer.chat_template = template
    chatting = replace(subject, tokenizer=tokenizer)
    row = run(chatting, questions()[:1], scoring=["letter"], chat=True).rows.iloc[0]
    prompt = f"<user>{listed_prompt(QUESTION)}<assistant>"
    slow = [slow_log_likelihood(chatting, prompt, letter.strip())[0] for letter in letters(4)]
    np.testing.assert_allclose(row["letter_log_likelihoods"], slow, atol=1e-4)
    benchmark = multiple_choice.prepare(chatting, sets={"quiz": questions()}, asking=Asking(chat=True))
    assert benchmark.configuration["chat"]["date"] == "26 Jul 2024"
    assert multiple_choice.prepare(subject, sets={"quiz": questions()}).configuration["chat"] is None
    with pytest.raises(InputError, match="no chat template; leave `chat` out$"):
        multiple_choice.prepare(subject, sets={"quiz": questions()}, asking=Asking(chat=True))


def test_a_killed_run_goes_on_where_it_stopped(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One empty option, so that a column has gaps that have to survive on disk.
    asked = [*questions(), replace(questions()[0], choices=("red", "", "none", "any"))]
    whole = run(subject, asked, permute=1, batch_size=2)
    calls = []
    real = multiple_choice.score_tokens

    def failing(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(multiple_choice, "score_tokens", failing)
    with pytest.raises(KeyboardInterrupt):
        run(subject, asked, permute=1, batch_size=2, out=tmp_path / "run")
    resumed = run(subject, asked, permute=1, batch_size=2, out=tmp_path / "run")
    again = run(subject, asked, permute=1, batch_size=2, out=tmp_path / "run")
    assert len(calls) == 4
    for other in (resumed, again):
        assert other.summary() == whole.summary()


def test_the_retain_model_is_asked_the_same(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNLEARNING_CACHE", str(tmp_path))

    def prepare(model: Subject) -> Benchmark:
        return multiple_choice.prepare(model, sets={"quiz": questions()}, asking=Asking(scoring=["letter"]))

    found = evaluate(prepare, subject, control=subject, progress=False).summary()["metrics"]["quiz_letter_accuracy"]
    assert (found["difference"], found["difference_low"], found["difference_high"]) == (0, 0, 0)


def test_an_empty_option_is_scored_by_letter_only(subject: Subject) -> None:
    blank = replace(questions()[0], choices=("red", " ", "none", "any"))
    found = run(subject, [blank, questions()[1]])
    metrics = found.summary()["metrics"]
    assert [metrics[f"quiz_{name}"]["n"] for name in ("letter_accuracy", "answer_sum_accuracy")] == [2, 1]
    for name in ("answer_per_token", "cloze_sum", "cloze_per_character"):
        assert metrics[f"quiz_{name}_accuracy"]["value"] == found.rows[f"{name}_correct"].iloc[1]
    assert "1 questions with an empty option" in " ".join(found.notes)
    alone = run(subject, [blank]).summary()
    assert "empty option" in alone["left_out"]["quiz_cloze_sum_accuracy"]
    assert alone["metrics"]["quiz_letter_accuracy"]["n"] == 1
    assert "two questions" in alone["left_out"]["quiz_letter_standard_error"]


def test_a_question_beyond_the_models_context_is_left_out_by_name() -> None:
    small = build_subject(context=160)
    long = replace(questions()[0], text="which " * 60)
    found = run(small, [long, *questions()[1:3]], scoring=["cloze"])
    assert found.rows["id"].tolist() == ["q1", "q2"]
    assert "1 of 3 questions do not fit" in " ".join(found.notes)
    with pytest.raises(InputError, match="no question fits"):
        run(small, [long])


def test_every_kind_of_record_is_read(tmp_path: Path) -> None:
    by_number = read_questions(write(tmp_path / "a.json", json.dumps(RECORDS)))
    letter = [{**record, "answer": "abcd"[record["answer"]]} for record in RECORDS]
    by_letter = read_questions(write(tmp_path / "b.jsonl", "\n".join(map(json.dumps, letter))))
    pd.DataFrame(RECORDS).to_parquet(tmp_path / "c.parquet")
    columns = [
        {"question": record["question"], **dict(zip("ABCD", record["choices"], strict=True)), "answer": place}
        for record, place in zip(RECORDS, "BC1DB", strict=True)
    ]
    pd.DataFrame(columns).to_csv(tmp_path / "d.csv", index=False)
    pd.DataFrame(columns).to_csv(tmp_path / "mmlu.csv", index=False, header=False)
    assert by_number == by_letter == read_questions(tmp_path / "c.parquet")
    assert [question.answer for question in by_number] == [1, 0, 2, 3, 1]
    found = read_questions(tmp_path / "d.csv")
    bare = read_questions(tmp_path / "mmlu.csv")
    assert [(one.choices, one.answer) for one in bare] == [(one.choices, one.answer) for one in found]
    assert [one.text for one in bare] == [record["question"].strip() for record in RECORDS]
    assert [question.answer for question in found] == [1, 2, 1, 3, 1]
    assert [question.choices for question in found] == [question.choices for question in by_number]


def test_years_are_options_too_and_a_records_subject_is_used() -> None:
    record = {"question": "When?", "choices": [1984, 1985], "answer": 0, "subject": "high_school_physics", "id": 7}
    (question,) = questions_of([record], source="x")
    assert question == Question("When?", ("1984", "1985"), 0, "high school physics", id="7")
    (named,) = questions_of([record], source="x", subject="time")
    assert named.subject == "time"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer": None}, '"answer" is missing'),
        ({"answer": 4}, "the answer 4 is no option; give 0 to 3, or A to D"),
        ({"answer": -1}, "the answer -1 is no option"),
        ({"answer": "E"}, "the answer 'E' is no option"),
        ({"answer": "red"}, "the answer 'red' is no option"),
        ({"answer": True}, "the answer True is no option"),
        ({"answer": 1.0}, "the answer 1.0 is no option"),
        ({"choices": ["only"]}, "2 to 26 options, this one 1"),
        ({"choices": list(LETTERS) + ["more"]}, "2 to 26 options, this one 27"),
        ({"choices": "red, green"}, '"choices" must be a list of texts, got str'),
        ({"choices": ["red", None, "none", "any"]}, "option B must be text, got NoneType"),
        ({"question": " "}, "needs its question"),
    ],
)
def test_a_wrong_record_is_refused_by_its_number(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as refused:
        questions_of([RECORDS[0], {**RECORDS[1], **change}], source="quiz.json")
    assert str(refused.value).startswith("quiz.json, record 2: ")
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_records_without_options_are_refused() -> None:
    with pytest.raises(InputError, match='options under "choices", or under "A"'):
        questions_of([{"question": "Which?", "answer": 0}], source="quiz.json")


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path
