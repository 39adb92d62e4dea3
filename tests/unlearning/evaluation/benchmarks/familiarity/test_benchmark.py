"""Familiarity: probabilities by a plain forward pass, the rule on invented completions, judges, the demo world."""

import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tests.command_lines import call_main
from tests.unlearning.evaluation.benchmarks.familiarity.demo_familiarity import familiarity_records
from tests.unlearning.helpers import NAMES, TOWNS, build_examples, build_tiny_llama
from unlearning.cli import main
from unlearning.common.errors import InputError
from unlearning.evaluation.benchmarks.familiarity import benchmark
from unlearning.evaluation.benchmarks.familiarity.benchmark import FamiliarityPrompt
from unlearning.evaluation.generation import greedy_answers
from unlearning.evaluation.harness import Evaluation, evaluate
from unlearning.evaluation.judges import Judge, has_phrase, judge_by_rule, load_judge
from unlearning.evaluation.metrics.familiarity import completion_score, encode_candidates, familiarity
from unlearning.evaluation.subject import Subject, open_subject
from unlearning.evaluation.token_scores import TokenScores

PROMPTS = [
    FamiliarityPrompt(
        example.prompt + " " * (place % 2),
        specific=(TOWNS[place], f"in {TOWNS[place]}"),
        generic=tuple(town for town in TOWNS if town != TOWNS[place])[:3],
        references=(TOWNS[place],),
        id=f"q{place}",
        group=NAMES[place],
    )
    for place, example in enumerate(build_examples())
]


@pytest.fixture(scope="module")
def subject(tokenizer: PreTrainedTokenizerFast) -> Subject:
    return Subject.wrap(build_tiny_llama(), tokenizer, name="tiny")


def run(
    subject: Subject, prompts: list[FamiliarityPrompt], *, batch_size: int = 3, out: Path | None = None, **options: Any
) -> Evaluation:
    prepare = partial(benchmark.prepare, prompts=prompts, **{"max_new_tokens": 12, **options})
    return evaluate(prepare, subject, batch_size=batch_size, progress=False, out=out)


def next_probabilities(subject: Subject, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return subject.model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)


def test_scores_are_those_of_a_plain_forward_pass(subject: Subject) -> None:
    rows = run(subject, PROMPTS).rows
    rows = rows[rows["set"] == "probability"].to_dict("records")
    for one, row in zip(PROMPTS, rows, strict=True):
        prompt = one.prompt.rstrip()
        ids = subject.tokenizer(prompt)["input_ids"]
        following = next_probabilities(subject, ids)

        def tokens_of(text: str, prompt: str = prompt, ids: list[int] = ids) -> list[int]:
            whole = subject.tokenizer(f"{prompt} {text}")["input_ids"]
            assert whole[: len(ids)] == ids
            return whole[len(ids) :]

        first = {text: tokens_of(text)[0] for text in (*one.specific, *one.generic)}
        ours, theirs = {first[text] for text in one.specific}, {first[text] for text in one.generic}
        specific = float(sum(following[token] for token in ours - theirs))
        generic = float(sum(following[token] for token in theirs - ours))
        assert row["specific"] == pytest.approx(specific, abs=1e-6)
        assert row["generic"] == pytest.approx(generic, abs=1e-6)
        assert row["share"] == pytest.approx(specific / (specific + generic), abs=1e-5)
        assert row["n_shared"] == len(ours & theirs)
        whole = 0.0
        for text in one.specific:
            probability, context = 1.0, list(ids)
            for token in tokens_of(text):
                probability *= float(next_probabilities(subject, context)[token])
                context.append(token)
            whole += probability
        assert row["whole"] == pytest.approx(whole, rel=1e-4)


def scored(*log_probs: float) -> TokenScores:
    return TokenScores(np.array(log_probs), np.zeros(len(log_probs), bool), None, None, 0)


def test_familiarity_by_hand(subject: Subject) -> None:
    candidates = encode_candidates(subject, "Where?", ["Oslo", "Oslo", "Lima"], ["Cairo"])
    scores = [scored(math.log(0.2), math.log(0.5))] * 2 + [scored(math.log(0.1)), scored(math.log(0.3))]
    found = familiarity(candidates, scores)
    assert found.specific == pytest.approx(0.3)  # what is there twice counts once
    assert found.generic == pytest.approx(0.3)
    assert found.share == pytest.approx(0.5)
    assert found.whole == pytest.approx(0.2 * 0.5 + 0.1)


def test_a_candidate_that_begins_with_another_one_is_part_of_it(subject: Subject) -> None:
    candidates = encode_candidates(subject, "Where?", ["in Oslo", "in"], [])
    found = familiarity(candidates, [scored(math.log(0.4), math.log(0.25)), scored(math.log(0.4))])
    assert found.whole == found.specific == pytest.approx(0.4)
    assert found.generic is None and found.share is None


def test_a_first_token_of_both_kinds_counts_for_neither(subject: Subject) -> None:
    candidates = encode_candidates(subject, "Where?", ["in Oslo"], ["in Lima"])
    assert candidates.n_shared == 1
    found = familiarity(candidates, [scored(-1.0, -2.0), scored(-1.0, -3.0)])
    assert found.specific is None and found.generic is None and found.share is None
    assert found.whole == pytest.approx(math.exp(-3))


def test_a_collapsed_model_gives_finite_right_values(subject: Subject) -> None:
    candidates = encode_candidates(subject, "Where?", ["Oslo"], ["Lima"])
    found = familiarity(candidates, [scored(-1e4), scored(-1e4 - math.log(3))])
    assert found.specific == 0 and found.whole == 0
    assert found.share == pytest.approx(0.75)


def test_a_candidate_that_merges_with_the_prompt_is_refused(subject: Subject) -> None:
    class Merging:
        """A tokenizer whose first token depends on the whole text."""

        eos_token_id = None

        def __call__(self, text: str, **_options: Any) -> dict[str, list[int]]:
            return {"input_ids": [len(text), *map(ord, text[1:])]}

    merging = Subject("merging", subject.model, Merging(), "")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="'c' and the end of 'ab' share a token"):
        encode_candidates(merging, "ab", ["c"], [])


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("She took the road to Halvik.", 1),
        ("HALVIK!", 1),
        ("Halvik's walls were grey.", 1),
        ("They met at the\n Grey  Tower that night.", 1),
        ("halvik", 4),  # a name is looked for as it is written
        ("Halviking is no word of it", 4),
        ("Mira Voss went home.", 4),  # in the prompt already
        ("Voss", 4),
        ("She lit a Lantern.", 2),
        ("lanterns", 4),
        ("She lit a lantern in Halvik.", 1),
        ("She went to work.", 4),
        ("", 4),
    ],
)
def test_the_rule_judges_invented_completions(completion: str, expected: int) -> None:
    references, subtle = ["Halvik", "the Grey Tower", "Grey Tower", "Mira Voss", "Voss"], ["lantern"]
    assert judge_by_rule("Every morning Mira Voss", completion, references, subtle) == expected


def test_a_name_of_which_the_prompt_has_a_part_still_counts() -> None:
    assert judge_by_rule("Every morning Mira", "Mira Voss went out", ["Mira Voss"]) == 1


@settings(max_examples=60)
@given(st.text(max_size=20), st.text(alphabet="ab Z.(", min_size=1, max_size=6).filter(str.strip))
def test_phrases_of_any_characters_are_found_between_spaces(text: str, phrase: str) -> None:
    assert has_phrase(f"{text} {phrase} {text}", phrase)
    assert not has_phrase(f"x{phrase.strip()}x" if phrase.strip()[0].isalnum() else "", phrase)


def test_completion_score_by_hand() -> None:
    assert completion_score([1, 1, 2, 3, 4]) == pytest.approx((5 * 2 + 1) / (5 * 5))
    assert completion_score([1, 1]) == 1
    assert completion_score([3, 4]) == 0


def test_completions_are_greedy_and_judged(subject: Subject) -> None:
    classes = {one.prompt: 1 + place % 4 for place, one in enumerate(PROMPTS)}
    judge = Judge(lambda prompt, _completion: classes[prompt], "by hand")
    found = run(subject, PROMPTS, judge=judge)
    rows = found.rows[found.rows["set"] == "completion"]
    for one, row in zip(PROMPTS, rows.to_dict("records"), strict=True):
        assert row["text"] == greedy_answers(subject.model, subject.tokenizer, [one.prompt], max_new_tokens=12)[0]
    assert found["familiarity_completion"] == pytest.approx((5 * 2 + 2) / (5 * 8))
    assert [found[f"completion_class_{number}"] for number in (1, 2, 3, 4)] == [0.25] * 4


@pytest.mark.parametrize("verdict", [0, 5, None, "1", True])
def test_a_judge_that_gives_no_class_is_refused(subject: Subject, verdict: Any) -> None:
    judge = Judge(lambda _prompt, _completion: verdict, "odd:judge 1234")
    with pytest.raises(InputError, match=r"odd:judge.*1, 2, 3 or 4"):
        run(subject, PROMPTS[:1], judge=judge)


def test_a_form_without_prompts_is_left_out(subject: Subject) -> None:
    bare = [FamiliarityPrompt(one.prompt, specific=one.specific) for one in PROMPTS]
    left_out = run(subject, bare).summary()["left_out"]
    assert set(left_out) == {"familiarity_completion", "familiarity_share"}
    named = [FamiliarityPrompt(one.prompt, references=one.references) for one in PROMPTS]
    left_out = run(subject, named).summary()["left_out"]
    assert set(left_out) == {"familiarity_probability", "familiarity_share", "familiarity_whole"}


def test_batch_size_and_order_change_no_number(subject: Subject) -> None:
    one, seven = (run(subject, PROMPTS, batch_size=size).rows for size in (1, 7))
    back = run(subject, PROMPTS[::-1], batch_size=3).rows
    back = pd.concat([back[back["set"] == name][::-1] for name in ("probability", "completion")])
    for other in (seven, back.reset_index(drop=True)):
        pd.testing.assert_frame_equal(one.drop(columns="row"), other.drop(columns="row"), atol=1e-5)


def test_a_killed_run_goes_on_to_the_same_rows(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(subject, PROMPTS)
    calls = []

    def failing(*arguments: Any, **options: Any) -> int:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return judge_by_rule(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(benchmark, "judge_by_rule", failing)
        with pytest.raises(KeyboardInterrupt):
            run(subject, PROMPTS, out=tmp_path / "run")
    resumed = run(subject, PROMPTS, out=tmp_path / "run")
    pd.testing.assert_frame_equal(resumed.rows, whole.rows, check_dtype=False, atol=1e-6)
    assert resumed.summary()["metrics"].keys() == whole.summary()["metrics"].keys()


def test_a_smaller_vocabulary_than_the_tokenizers_is_refused(subject: Subject) -> None:
    model = build_tiny_llama()
    model.resize_token_embeddings(200)
    with pytest.raises(InputError, match="vocabulary size 200"):
        benchmark.prepare(Subject.wrap(model, subject.tokenizer, name="small"), prompts=PROMPTS)


def test_the_demo_world_is_familiar_to_the_base_and_not_to_the_model_that_never_read_it(tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_text(json.dumps(familiarity_records()[:24]))
    prompts = benchmark.read_prompts(tmp_path / "prompts.json")
    base, never = (
        run(open_subject(name), prompts, max_new_tokens=8, batch_size=24) for name in ("demo:base", "demo:never")
    )
    assert base["familiarity_probability"] > 0.95 and base["familiarity_whole"] > 0.9
    assert base["familiarity_completion"] == 1
    assert never["familiarity_probability"] < 0.4 and never["familiarity_whole"] < 0.25
    assert never["familiarity_completion"] < 0.5


def test_the_command_measures_with_a_judge_of_the_users(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNLEARNING_CACHE", str(tmp_path / "cache"))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Where was Ada"}\n{"prompt": "Where was Ben"}\n')
    (tmp_path / "my_judges_of_tests.py").write_text(
        "def ada(prompt, completion):\n    return 1 if 'Ada' in prompt else 2\n"
    )
    arguments = ["--prompts", "prompts.jsonl", "--judge", "my_judges_of_tests:ada", "--max-new-tokens", "4", "--json"]
    arguments += ["--control", model_dir, "--out", "run"]
    outcome = call_main(main, "eval", "familiarity", "--model", model_dir, *arguments)
    assert outcome.code == 0, outcome.err
    summary = json.loads(outcome.out)
    assert summary["metrics"]["familiarity_completion"]["value"] == pytest.approx((5 + 1) / 10)
    assert summary["metrics"]["familiarity_completion"]["difference"] == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["configuration"]["judge"].startswith("my_judges_of_tests:ada ")


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        ([{"question": "Where?"}], [], 'record 1: .*"prompt"'),
        ([{"prompt": " "}], [], 'record 1: .*"prompt"'),
        ([{"prompt": "a", "specific": 5}], [], 'record 1: "specific"'),
        ([{"prompt": "a", "specific": ["Oslo", ""]}], [], 'record 1: "specific"'),
        ([{"prompt": "a", "generic": ["Oslo"]}], [], '"generic" needs "specific"'),
        ([{"prompt": "a", "subtle": ["Oslo"]}], [], '"subtle" needs "references"'),
        ([{"prompt": "a"}], [], "--prompts.*specific.*references"),
        ([{"prompt": "a"}], ["--judge", "judge"], "--judge.*judge"),
        ([{"prompt": "a"}], ["--judge", "no_such_judges:one"], "there is no module 'no_such_judges'"),
        ([{"prompt": "a"}], ["--judge", "json:jugde"], "json has no function 'jugde'"),
        ([{"prompt": "a", "references": ["b"]}], ["--limit", "0"], "--limit.*0"),
        ([{"prompt": "a", "references": ["b"]}], ["--max-new-tokens", "0"], "--max-new-tokens.*0"),
        ([], [], "the list is empty"),
    ],
)
def test_bad_input_is_one_line(
    model_dir: Path, tmp_path: Path, records: list[Any], options: list[str], message: str
) -> None:
    (tmp_path / "prompts.json").write_text(json.dumps(records))
    arguments = ["--prompts", tmp_path / "prompts.json", "--out", tmp_path / "run", *options]
    outcome = call_main(main, "eval", "familiarity", "--model", model_dir, *arguments)
    assert outcome.code == 2
    assert re.search(message, outcome.err) and outcome.err.count("\n") == 1


def test_a_loaded_judge_is_known_by_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "another_judge_of_tests.py").write_text("def four(prompt, completion):\n    return 4\n")
    judge = load_judge("another_judge_of_tests:four")
    assert judge("a", "b") == 4
    assert len(judge.identity.split()[1]) == 64
