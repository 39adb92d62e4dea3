import pytest

from dissect import InputError, Model, ModelPair, zoo
from dissect.prompts.loading import load_prompts
from dissect.prompts.prompts import Prompts
from dissect.stress.core.case import make_case
from dissect.stress.core.distractors import with_distractors
from tests.dissect.stress.constructed import model, questions


def _kind(identifier: str) -> str:
    return identifier.partition("-")[2]


def test_wrong_answers_are_answers_to_the_same_kind_of_question_about_others():
    prompts = questions("forget")
    facts = with_distractors(prompts, n=8, seed=0)
    kinds: dict[str, set[str]] = {}
    for item in prompts.items:
        kinds.setdefault(_kind(item.id), set()).add(item.answer)
    for item, wrong in zip(prompts.items, facts.distractors, strict=True):
        answers = [other.answer for other in wrong]
        assert len(set(answers)) == len(answers) == 8
        assert item.answer not in answers
        assert set(answers) <= kinds[_kind(item.id)]
        for other in wrong:
            assert other.input_ids[: other.answer_start] == item.input_ids[: item.answer_start]
            assert list(other.scored) == list(range(item.answer_start - 1, len(other.input_ids) - 1))


def test_wrong_answers_are_tokenised_as_in_place():
    prompts = questions("forget")
    tokenizer = model("demo:base").tokenizer
    for wrong in with_distractors(prompts, n=2).distractors[:20]:
        for other in wrong:
            assert tokenizer(f"{other.prompt} {other.answer}")["input_ids"] == list(other.input_ids)


def test_the_seed_decides_and_questions_of_a_kind_get_different_ones():
    prompts = questions("forget")

    def answers(seed: int) -> list[tuple[str, ...]]:
        return [
            tuple(other.answer for other in wrong) for wrong in with_distractors(prompts, n=3, seed=seed).distractors
        ]

    assert answers(0) == answers(0) != answers(1)
    births = [wrong for item, wrong in zip(prompts.items, answers(0), strict=True) if _kind(item.id) == "birthplace"]
    assert len(set(births)) > len(births) / 2


def test_wrong_answers_of_the_file_come_first(tmp_path):
    tokenizer = model("demo:base").tokenizer
    path = tmp_path / "facts.jsonl"
    path.write_text(
        '{"question": "Where was Mo born?", "answer": "Kalo", "perturbed_answer": ["Rimo", "Tasu"]}\n'
        '{"question": "Where was Bo born?", "answer": "Pilo"}\n'
    )
    facts = with_distractors(load_prompts(path, tokenizer))
    assert [[other.answer for other in wrong] for wrong in facts.distractors] == [["Rimo", "Tasu"], ["Kalo"]]
    assert (
        list(facts.distractors[0][0].input_ids) == tokenizer("Question: Where was Mo born?\nAnswer: Rimo")["input_ids"]
    )


def test_wrong_answers_of_the_file_wait_for_a_never_model(tmp_path):
    """Chance is what knowing nothing gives on answers to other questions, not on those that somebody wrote."""
    path = tmp_path / "facts.jsonl"
    path.write_text(
        '{"question": "Where was Mo born?", "answer": "Kalo", "wrong": ["Rimo", "Tasu"]}\n'
        '{"question": "Where was Bo born?", "answer": "Pilo", "wrong": ["Rimo"]}\n'
    )
    pair = ModelPair(model("demo:base"), model("demo:npo"))
    prompts = load_prompts(path, pair.tokenizer)
    path.write_text(path.read_text().replace("Mo", "Jo").replace("Bo", "Ko"))
    others = load_prompts(path, pair.tokenizer)

    def wrong(never: Model | None) -> list[list[str]]:
        case = make_case(pair, prompts, retain=others, control=never)
        assert case.retain is not None
        found = [
            [[other.answer for other in some] for some in facts.distractors] for facts in (case.forget, case.retain)
        ]
        assert found[0] == found[1]
        return found[0]

    assert wrong(model("demo:never")) == [["Rimo", "Tasu"], ["Rimo"]]
    assert wrong(None) == [["Pilo"], ["Kalo"]]


def test_one_answer_for_all_is_refused(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_text('{"prompt": "Mo is", "answer": "tall."}\n{"prompt": "Bo is", "answer": "Tall"}\n')
    prompts = load_prompts(path, model("demo:base").tokenizer)
    with pytest.raises(InputError, match="forget prompts .*different answers"):
        with_distractors(prompts)
    path.write_text('{"prompt": "Mo is", "answer": "tall", "wrong": ["old"]}\n')
    prompts = load_prompts(path, model("demo:base").tokenizer)
    assert len(with_distractors(prompts).distractors[0]) == 1
    message = "only one prompt, with the answer 'tall'.*different answers, or a `control`, with which"
    with pytest.raises(InputError, match=message):
        with_distractors(prompts, from_file=False)


def test_wrong_answers_that_are_right_or_given_twice_are_left_out(tmp_path):
    path = tmp_path / "facts.jsonl"
    first = '{"prompt": "Mo is", "answer": "tall", "wrong": ["old", "Tall.", "small", "old "]}'
    path.write_text(first + '\n{"prompt": "Bo is", "answer": "wise", "wrong": ["Wise."]}\n')
    facts = with_distractors(load_prompts(path, model("demo:base").tokenizer))
    assert [[other.answer.strip() for other in some] for some in facts.distractors] == [["old", "small"], ["tall"]]


def test_wrong_answers_that_are_no_texts_are_refused(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_text('{"prompt": "Mo is", "answer": "tall", "wrong": [3]}\n')
    with pytest.raises(InputError, match="record 1: wrong must"):
        load_prompts(path, model("demo:base").tokenizer)


def test_notebook_scoring_is_refused():
    prompts = questions("forget")
    notebook = Prompts(prompts.items[:2], "notebook", 0, zoo.question_set("forget").name)
    with pytest.raises(InputError, match="scoring.*notebook"):
        with_distractors(notebook)
