"""lm-evaluation-harness: tasks by name, data in a directory, and the same numbers as its own and as ours."""

import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("lm_eval")

from transformers import PreTrainedTokenizerFast

from tests.unlearning.data.helpers import CHAT_TEMPLATES
from tests.unlearning.evaluation.benchmarks.multiple_choice.choice_world import (
    RECORDS,
    build_model,
    build_subject,
    questions,
)
from tests.unlearning.helpers import build_tokenizer
from unlearning.cli import main
from unlearning.common.errors import InputError
from unlearning.data import template_sandbox
from unlearning.data.chat import DEFAULT_CHAT_DATE, chat_format
from unlearning.evaluation.benchmarks.lm_eval import benchmark as lm_eval
from unlearning.evaluation.benchmarks.lm_eval import tasks as lm_eval_tasks
from unlearning.evaluation.benchmarks.lm_eval.benchmark import Tasks
from unlearning.evaluation.benchmarks.multiple_choice import benchmark as multiple_choice
from unlearning.evaluation.benchmarks.multiple_choice.benchmark import Asking
from unlearning.evaluation.harness import Benchmark, Evaluation, evaluate
from unlearning.evaluation.subject import Subject

TOWNS = ["Velm", "Orrin", "Tarn", "Pell", "Quess", "Marrow"]

# The columns of the hub's data sets, with text of our own.
ARC = [
    {
        "id": f"arc{place}",
        "question": f"What is found in {town}?",
        "choices": {"text": ["salt", f"the {town} bell", "two grey owls"], "label": ["A", "B", "C"]},
        "answerKey": "ABC"[place % 3],
    }
    for place, town in enumerate(TOWNS)
]
BOOLQ = [
    {"passage": f"{town} lies by the sea.", "question": f"is {town} on a hill", "idx": place, "label": place % 2}
    for place, town in enumerate(TOWNS)
]
PIQA = [
    {"goal": f"To reach {town}", "sol1": "walk along the wall", "sol2": "row", "label": place % 2}
    for place, town in enumerate(TOWNS)
]
WINOGRANDE = [
    {
        "sentence": f"Ada sold Bea the house in {town} because _ needed money.",
        "option1": "Ada",
        "option2": "Bea",
        "answer": str(1 + place % 2),
    }
    for place, town in enumerate(TOWNS)
]
HELLASWAG = [
    {
        "activity_label": "Sailing",
        "ctx_a": f"A boat leaves {town}.",
        "ctx_b": "the crew",
        "endings": ["raises the sail.", "sleeps [title] badly.", "sings.", "is late."],
        "label": str(place % 4),
    }
    for place, town in enumerate(TOWNS)
]
OPENBOOKQA = [
    {"question_stem": row["question"], "choices": row["choices"], "answerKey": row["answerKey"]} for row in ARC
]
ENDINGS = ("raises the sail.", "sleeps. badly.", "sings.", "is late.")  # as lm-evaluation-harness cleans them
MMLU = [{**record, "subject": "anatomy"} for record in RECORDS]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By the tasks' names and as copies of the hub's data sets, in every format."""
    root = tmp_path_factory.mktemp("data")
    write(root / "arc_easy" / "test.jsonl", ARC)
    write(root / "ai2_arc" / "ARC-Challenge" / "test-00000-of-00001.parquet", ARC)
    write(root / "super_glue" / "boolq" / "validation-00000-of-00001.parquet", BOOLQ)
    write(root / "piqa" / "validation.jsonl", PIQA)
    write(root / "piqa" / "train.jsonl", PIQA[::-1])
    write(root / "winogrande" / "winogrande_xl" / "validation.json", WINOGRANDE)
    write(root / "hellaswag" / "data" / "validation-00000-of-00001.parquet", HELLASWAG)
    write(root / "openbookqa" / "main" / "test.jsonl", OPENBOOKQA)
    write(root / "mmlu" / "anatomy" / "test-00000-of-00001.parquet", MMLU)
    write(root / "mmlu" / "anatomy" / "dev-00000-of-00001.parquet", MMLU[::-1])
    write(root / "quiz" / "test.jsonl", RECORDS)
    write(root / "short_quiz" / "test.jsonl", RECORDS[:2])
    return root


QUIZ = """
task: NAME
dataset_path: nobody/nothing
test_split: test
num_fewshot: 0
output_type: multiple_choice
description: "The following are multiple choice questions (with answers) about biology.\\n\\n"
doc_to_text: "{{question.strip()}}\\nA. {{choices[0]}}\\nB. {{choices[1]}}\\nC. {{choices[2]}}\\nD. \
{{choices[3]}}\\nAnswer:"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
GROUP = """
group: both
task: [quiz, short_quiz]
aggregate_metric_list:
  - {metric: acc, weight_by_size: BY_SIZE}
"""


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tasks")
    for name in ("quiz", "short_quiz"):
        (root / f"{name}.yaml").write_text(QUIZ.replace("NAME", name))
    (root / "both.yaml").write_text(GROUP.replace("BY_SIZE", "true"))
    (root / "alike.yaml").write_text(GROUP.replace("BY_SIZE", "false").replace("both", "alike"))
    return root


@pytest.fixture(scope="module")
def subject() -> Subject:
    return build_subject()


def run(subject: Subject, *tasks: str, out: Path | None = None, **options: Any) -> Evaluation:
    def prepare(model: Subject) -> Benchmark:
        own = {field.name: options[field.name] for field in fields(Tasks) if field.name in options}
        rest = {name: value for name, value in options.items() if name not in own}
        return lm_eval.prepare(model, Tasks(tasks, **own), **rest)

    return evaluate(prepare, subject, out=out, progress=False)


@pytest.fixture(scope="module", autouse=True)
def no_look_at_the_machine() -> Iterator[None]:
    """simple_evaluate lists the machine's packages and drivers, which takes half a minute."""
    from lm_eval import evaluator

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator, "add_env_info", lambda _results: None)
        yield


USUAL = ["mmlu_anatomy", "winogrande", "hellaswag", "arc_challenge", "arc_easy", "boolq", "piqa", "openbookqa"]


@pytest.fixture(scope="module")
def usual(subject: Subject, data: Path) -> Evaluation:
    """The utility tasks, all from a directory."""
    return run(subject, *USUAL, data_dir=data)


def test_every_mean_is_lm_evals_own(subject: Subject, data: Path, usual: Evaluation) -> None:
    from lm_eval import simple_evaluate

    plan = lm_eval_tasks.plan_tasks(USUAL)
    with lm_eval._quiet():
        tasks = [lm_eval_tasks.load_task(plan, name, data, num_fewshot=None, seed=0) for name in USUAL]
        wrapped = lm_eval._wrap(subject, 4)
        theirs = simple_evaluate(wrapped, tasks=tasks, task_manager=plan.manager, bootstrap_iters=0)["results"]
    checked = 0
    for task in USUAL:
        for key, value in theirs[task].items():
            name, _, kind = key.partition(",")
            if kind and "stderr" not in name:
                assert usual[f"{task}_{name}"] == pytest.approx(value, abs=1e-12), (task, key)
                checked += 1
    assert checked == 8 + 5  # acc everywhere, acc_norm where texts of different lengths are compared
    metric = usual.summary()["metrics"]["arc_easy_acc_norm"]
    assert metric["direction"] == "higher is better"
    assert metric["low"] <= metric["value"] <= metric["high"]


def test_rows_hold_what_the_model_said(usual: Evaluation) -> None:
    rows = usual.rows[usual.rows["set"] == "arc_easy"]
    assert rows["id"].tolist() == [f"arc{place}" for place in range(6)]
    assert rows["row"].tolist() == list(range(6))
    for record, row in zip(ARC, rows.to_dict("records"), strict=True):
        scores = np.array(row["log_likelihoods"])
        right = "ABC".index(record["answerKey"])
        assert row["acc"] == (scores.argmax() == right)
        lengths = [len(text) for text in record["choices"]["text"]]
        assert row["acc_norm"] == ((scores / lengths).argmax() == right)
    assert dict(usual.rows["set"].value_counts())["mmlu_anatomy"] == len(MMLU)


def test_letters_score_as_ours_do(subject: Subject, data: Path, tasks_dir: Path) -> None:
    theirs = run(subject, "quiz", data_dir=data, tasks_dir=tasks_dir)
    ours = evaluate(
        lambda model: multiple_choice.prepare(model, sets={"quiz": questions()}, asking=Asking(scoring=["letter"])),
        subject,
        progress=False,
    )
    assert theirs["quiz_acc"] == ours["quiz_letter_accuracy"]
    for mine, yours in zip(ours.rows["letter_log_likelihoods"], theirs.rows["log_likelihoods"], strict=True):
        np.testing.assert_allclose(mine, yours, atol=1e-4)


def test_the_cloze_scores_as_mmlu_continuation_does(subject: Subject, data: Path, tmp_path: Path) -> None:
    content = QUIZ.replace("NAME", "quiz").replace('["A", "B", "C", "D"]', '"{{choices}}"')
    prompt = content[content.index("doc_to_text") :].splitlines()[0]
    content = content.replace(prompt, 'doc_to_text: "Question: {{question.strip()}}\\nAnswer:"')
    content = content.replace("multiple choice questions", "questions").replace(
        "higher_is_better: true", "higher_is_better: true\n  - {metric: acc_norm, aggregation: mean}"
    )
    (tmp_path / "quiz.yaml").write_text(content)
    theirs = run(subject, "quiz", data_dir=data, tasks_dir=tmp_path)
    ours = evaluate(
        lambda model: multiple_choice.prepare(model, sets={"quiz": questions()}, asking=Asking(scoring=["cloze"])),
        subject,
        progress=False,
    )
    assert theirs["quiz_acc"] == ours["quiz_cloze_sum_accuracy"]
    assert theirs["quiz_acc_norm"] == ours["quiz_cloze_per_character_accuracy"]
    for mine, yours in zip(ours.rows["cloze_log_likelihoods"], theirs.rows["log_likelihoods"], strict=True):
        np.testing.assert_allclose(mine, yours, atol=5e-4)


@pytest.mark.parametrize("group", ["both", "alike"])
def test_groups_are_averaged_as_lm_eval_does(
    subject: Subject, data: Path, tasks_dir: Path, group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run(subject, group, data_dir=data, tasks_dir=tasks_dir)
    from lm_eval import simple_evaluate
    from lm_eval.api.task import ConfigurableTask

    def download(task: ConfigurableTask, *_arguments: Any, **_options: Any) -> None:
        import datasets

        rows = [json.loads(line) for line in (data / task.config.task / "test.jsonl").read_text().splitlines()]
        task.dataset = datasets.DatasetDict(test=datasets.Dataset.from_list(rows))

    monkeypatch.setattr(ConfigurableTask, "download", download)
    manager = lm_eval_tasks.plan_tasks([group], tasks_dir).manager
    with lm_eval._quiet():
        wrapped = lm_eval._wrap(subject, 4)
        theirs = simple_evaluate(wrapped, tasks=[group], task_manager=manager, bootstrap_iters=0)
    assert found[f"{group}_acc"] == pytest.approx(theirs["groups"][group]["acc,none"])
    by_size = {"both": [5, 2], "alike": [1, 1]}[group]
    parts = [found["quiz_acc"], found["short_quiz_acc"]]
    assert found[f"{group}_acc"] == pytest.approx(np.average(parts, weights=by_size))
    assert found.summary()["metrics"][f"{group}_acc"]["n"] == 7


def test_mmlu_is_57_tasks_in_five_groups() -> None:
    plan = lm_eval_tasks.plan_tasks(["mmlu", "ai2_arc"])
    assert len(plan.tasks) == 57 + 2
    assert {group.name for group in plan.groups} == {
        "mmlu", "mmlu_stem", "mmlu_other", "mmlu_social_sciences", "mmlu_humanities",
    }  # fmt: skip
    assert {len(group.tasks) for group in plan.groups if group.name == "mmlu"} == {57}
    assert all(group.metrics == (("acc", True),) for group in plan.groups)


def test_batches_and_limits(subject: Subject, data: Path, usual: Evaluation) -> None:
    small = run(subject, "arc_easy", "piqa", data_dir=data, limit=4, batch_size=1)
    for task in ("arc_easy", "piqa"):
        ours, theirs = (one.rows[one.rows["set"] == task] for one in (small, usual))
        assert len(ours) == 4
        for mine, yours in zip(ours["log_likelihoods"], theirs["log_likelihoods"], strict=False):
            np.testing.assert_allclose(mine, yours, atol=1e-4)
        assert ours["acc"].tolist() == theirs["acc"].tolist()[:4]


def test_solved_examples_are_shown_and_recorded(subject: Subject, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = []
    real = lm_eval._described

    def seen(sample: Any, *rest: Any) -> Any:
        prompts.append(sample["arguments"][0][0])
        return real(sample, *rest)

    monkeypatch.setattr(lm_eval, "_described", seen)
    found = run(subject, "mmlu_anatomy", "piqa", data_dir=data, num_fewshot=2, limit=3)
    assert all(prompt.count("Answer:") == 3 for prompt in prompts)
    assert prompts[0].startswith("The following are multiple choice questions (with answers) about anatomy.\n\n")
    assert prompts[0].index("quessel") < prompts[0].index("Tin Harbour"), "MMLU shows the first of its dev split"
    assert found.notes == ("mmlu_anatomy: 2-shot", "piqa: 2-shot")


def prepared(subject: Subject, data: Path, **options: Any) -> dict[str, Any]:
    own = {field.name: options.pop(field.name) for field in fields(Tasks) if field.name in options}
    return lm_eval.prepare(subject, Tasks(["piqa"], data_dir=data, **own), **options).configuration


def test_the_configuration_holds_what_the_numbers_depend_on(subject: Subject, data: Path, tmp_path: Path) -> None:
    plain = prepared(subject, data)
    assert prepared(subject, data, batch_size=3) == plain
    assert prepared(subject, data, num_fewshot=1)["tasks"] != plain["tasks"]
    assert prepared(subject, data, num_fewshot=1, seed=1) != prepared(subject, data, num_fewshot=1)
    write(tmp_path / "piqa" / "validation.jsonl", [*PIQA[:-1], {**PIQA[-1], "label": 0}])
    theirs, ours = prepared(subject, tmp_path)["tasks"]["piqa"], plain["tasks"]["piqa"]
    assert theirs["data_sha256"] != ours["data_sha256"]
    json.dumps(plain)


def test_a_killed_run_goes_on_with_the_next_task(
    subject: Subject, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = ("arc_easy", "piqa", "boolq")
    whole = run(subject, *tasks, data_dir=data)
    calls = []
    real = lm_eval._values

    def failing(sample: Any) -> Any:
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return real(sample)

    monkeypatch.setattr(lm_eval, "_values", failing)
    with pytest.raises(KeyboardInterrupt):
        run(subject, *tasks, data_dir=data, out=tmp_path / "run")
    resumed = run(subject, *tasks, data_dir=data, out=tmp_path / "run")
    assert len(calls) == 9 + 12
    assert resumed.summary() == whole.summary()
    assert run(subject, *tasks, data_dir=data, out=tmp_path / "run").summary() == whole.summary()


def test_rows_beyond_the_context_are_counted(data: Path) -> None:
    texts = [[f"Sailing: A boat leaves {town}. The crew {ending}" for ending in ENDINGS] for town in TOWNS]
    longest = [max(map(len, build_tokenizer()(some)["input_ids"])) for some in texts]
    context = sorted(set(longest))[1] - 1  # nothing has to be predicted from the last token
    found = run(build_subject(context=context), "hellaswag", "piqa", data_dir=data)
    rows = found.rows[found.rows["set"] == "hellaswag"]
    assert rows["truncated"].tolist() == [length > context + 1 for length in longest]
    assert 0 < found["hellaswag_truncated"] == np.mean(rows["truncated"].astype(bool)) < 1
    assert "piqa_truncated" not in found.summary()["metrics"]


def test_a_task_that_asks_for_no_solved_examples_shows_none(subject: Subject, data: Path, tasks_dir: Path) -> None:
    found = run(subject, "quiz", "piqa", data_dir=data, tasks_dir=tasks_dir, num_fewshot=1, limit=1)
    assert found.notes == ("quiz: 0-shot", "piqa: 1-shot")


def test_what_is_no_mean_is_left_out_by_name(subject: Subject, data: Path, tmp_path: Path) -> None:
    content = QUIZ.replace("NAME", "quiz").replace(
        "    higher_is_better: true", "    higher_is_better: true\n  - {metric: mcc, higher_is_better: true}"
    )
    (tmp_path / "quiz.yaml").write_text(content)
    summary = run(subject, "quiz", data_dir=data, tasks_dir=tmp_path).summary()
    assert list(summary["metrics"]) == ["quiz_acc"]
    assert "no mean over rows" in summary["left_out"]["quiz_mcc"]


def test_generated_answers_are_kept(subject: Subject, data: Path, tmp_path: Path) -> None:
    (tmp_path / "said.yaml").write_text(
        "task: quiz\ndataset_path: a/b\ntest_split: test\noutput_type: generate_until\n"
        'doc_to_text: "{{question}}"\ndoc_to_target: "{{choices[answer]}}"\n'
        "generation_kwargs: {max_gen_toks: 3, until: [zzz]}\n"
        "metric_list:\n  - {metric: exact_match, aggregation: mean, higher_is_better: true}\n"
    )
    found = run(subject, "quiz", data_dir=data, tasks_dir=tmp_path, limit=2)
    assert found["quiz_exact_match"] == 0
    assert all(isinstance(text, str) for text in found.rows["generated"])


def test_a_wmdp_task_is_better_low(subject: Subject, tmp_path: Path) -> None:
    write(tmp_path / "wmdp_mine" / "test.jsonl", RECORDS)
    (tmp_path / "wmdp_mine.yaml").write_text(QUIZ.replace("NAME", "wmdp_mine"))
    metrics = run(subject, "wmdp_mine", data_dir=tmp_path, tasks_dir=tmp_path).summary()["metrics"]
    assert metrics["wmdp_mine_acc"]["direction"] == "lower is better"


def test_a_chat_template_is_used_and_recorded(subject: Subject, data: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
    chatting = replace(subject, tokenizer=tokenizer)
    plain, wrapped = run(chatting, "piqa", data_dir=data), run(chatting, "piqa", data_dir=data, chat=True)
    assert not np.allclose(plain.rows["log_likelihoods"].tolist(), wrapped.rows["log_likelihoods"].tolist())
    assert prepared(chatting, data, chat=True)["chat"] != prepared(chatting, data)["chat"]
    with pytest.raises(InputError, match="no chat template; leave `chat` out$"):
        prepared(subject, data, chat=True)


TURNS = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TURNS
CONVERSATIONS: list[list[tuple[str, str]]] = [
    [("user", "Who kept the lamp?")],
    [("system", "Be brief."), ("user", "Who kept the lamp?")],
    [("system", "Be brief."), ("user", "Who?"), ("assistant", "Ines"), ("user", "When?")],
    [("user", "Who?"), ("assistant", "Ines"), ("user", "When?"), ("assistant", "In the")],
]


def tokenizer_of(template: str) -> PreTrainedTokenizerFast:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def chatting(subject: Subject, template: str) -> Subject:
    return replace(subject, tokenizer=tokenizer_of(template))


@pytest.mark.parametrize("turns", CONVERSATIONS)
@pytest.mark.parametrize("template", [*CHAT_TEMPLATES.values(), NO_SYSTEM])
def test_several_turns_are_the_text_that_lm_eval_writes(
    subject: Subject, template: str, turns: list[tuple[str, str]]
) -> None:
    from lm_eval.models.huggingface import HFLM

    # its own class asks the clock
    asking = chatting(subject, template.replace("strftime_now('%d %b %Y')", f"'{DEFAULT_CHAT_DATE}'"))
    history = [{"role": role, "content": content} for role, content in turns]
    opened = turns[-1][0] == "user"
    theirs = HFLM(
        pretrained=asking.model, tokenizer=asking.tokenizer, chat_template_args={"date_string": DEFAULT_CHAT_DATE}
    ).apply_chat_template(history, add_generation_prompt=opened)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = lm_eval._wrap(chatting(subject, template), 4, chat_format(tokenizer_of(template)))
    assert ours.apply_chat_template(history, add_generation_prompt=opened) == theirs


def test_no_template_is_rendered_in_this_process(subject: Subject, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: Any, **_options: Any) -> None:
        raise AssertionError("rendered without limits")

    asking = chatting(subject, TURNS)
    monkeypatch.setattr(type(asking.tokenizer), "apply_chat_template", refuse)
    zero = run(asking, "piqa", data_dir=data, chat=True, limit=3)
    one = run(asking, "piqa", data_dir=data, chat=True, limit=3, num_fewshot=2)
    assert not np.allclose(zero.rows["log_likelihoods"].tolist(), one.rows["log_likelihoods"].tolist())


def test_a_template_that_asks_the_clock_gives_the_same_prompts_every_day(subject: Subject, data: Path) -> None:
    rows = [
        run(chatting(subject, date + TURNS), "piqa", data_dir=data, chat=True, limit=2).rows["log_likelihoods"].tolist()
        for date in ("{{ strftime_now('%d %b %Y') }}", DEFAULT_CHAT_DATE)
    ]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("harm", "phrase"),
    [
        ("{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3, "takes more than 0.3 s"),
        ("{{ joiner() }}", "writes two different texts"),
        ("{{ raise_exception('not here') }}", "refuses a question (not here)"),
    ],
)
def test_a_template_that_harms_at_a_row_is_refused_in_one_line(
    subject: Subject, data: Path, harm: str, phrase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_sandbox, "SECONDS", 0.3)
    asking = chatting(subject, TURNS + "{% if 'reach' in messages[-1].content %}" + harm + "{% endif %}")
    with pytest.raises(InputError) as error:
        run(asking, "piqa", data_dir=data, chat=True)
    message = str(error.value)
    assert message.startswith("`chat` cannot be used: the tokenizer's chat template ") and phrase in message


def test_descriptions_that_a_template_leaves_out_are_told_of(subject: Subject, data: Path, tasks_dir: Path) -> None:
    def notes(template: str) -> tuple[str, ...]:
        asked = Tasks(("quiz",), tasks_dir, data)
        return tuple(lm_eval.prepare(chatting(subject, template), asked, chat=True).notes)

    assert notes(TURNS) == ("quiz: 0-shot",)
    assert notes(NO_SYSTEM) == (
        "quiz: 0-shot",
        "the chat template has no system turns: the tasks' descriptions are left out",
    )


def test_wrong_data_names_the_task_and_what_to_do(subject: Subject, tmp_path: Path) -> None:
    write(tmp_path / "piqa" / "validation.jsonl", [{"question": "Who?"}])
    with pytest.raises(InputError, match=r"^piqa: its data cannot be used .* need the columns of baber/piqa"):
        run(subject, "piqa", data_dir=tmp_path)
    (tmp_path / "piqa" / "validation.jsonl").write_text('{"goal": ')
    with pytest.raises(InputError, match="broken JSON"):
        run(subject, "piqa", data_dir=tmp_path)
    write(tmp_path / "piqa" / "validation.jsonl", [{"goal": 1}, {"goal": "a"}])
    with pytest.raises(InputError, match="piqa.*columns"):
        run(subject, "piqa", data_dir=tmp_path)


def test_a_bad_row_deep_in_a_file_is_told_in_one_line(subject: Subject, tmp_path: Path) -> None:
    write(tmp_path / "arc_easy" / "test.jsonl", [*ARC, {**ARC[0], "answerKey": "Z"}])
    with pytest.raises(InputError, match="arc_easy: lm-evaluation-harness stopped at one of the rows 0 to 6") as told:
        run(subject, "arc_easy", data_dir=tmp_path)
    assert "\n" not in str(told.value)


def test_data_that_is_nowhere_is_told_with_the_place_to_put_it(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def unreachable(*_arguments: Any, **_options: Any) -> None:
        raise ConnectionError("the hub cannot be reached\nat all")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(InputError) as told:
        run(subject, "piqa", data_dir=tmp_path)
    assert f"put the files of baber/piqa into {tmp_path}/piqa/ and give `data_dir`" in str(told.value)
    assert "\n" not in str(told.value)


def call(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    build_model().save_pretrained(tmp_path / "tiny")
    build_tokenizer().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_end_to_end_nothing_spoils_the_json(
    model_dir: Path, data: Path, tasks_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", "lm-eval", "--model", model_dir, "--tasks", "boolq,both", "--tasks-dir", tasks_dir]
    arguments += ["--data-dir", data, "--out", tmp_path / "run", "--json", "--device", "cpu"]
    code, stdout, stderr = call(capsys, *arguments)
    assert (code, stderr) == (0, "")
    summary = json.loads(stdout)
    assert set(summary["metrics"]) == {"boolq_acc", "quiz_acc", "short_quiz_acc", "both_acc"}
    assert summary["rows"] == {"boolq": 6, "quiz": 5, "short_quiz": 2}
    assert logging.getLogger("lm_eval").level != logging.ERROR
    code, out, err = call(capsys, *arguments, "--limit", 2)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "holds another run" in err


NO_CHECKPOINT = Path(__file__).parent  # a directory: whether it holds a checkpoint is seen when it is loaded


def refusal(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    code, out, err = call(capsys, "eval", "lm-eval", "--model", NO_CHECKPOINT, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    return err


def test_wrong_input_is_told_before_the_model_is_loaded(
    tasks_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no such directory" in refusal(capsys, "--tasks-dir", tmp_path / "none")
    assert "--tasks must name" in refusal(capsys, "--tasks", ",")
    assert "no such directory" in refusal(capsys, "--data-dir", tmp_path / "none")
    assert str(NO_CHECKPOINT) in refusal(capsys, "--tasks", "piqa")
    few = lm_eval_tasks._manager(tasks_dir, everything=False)
    monkeypatch.setattr(lm_eval_tasks, "_manager", lambda *_arguments, **_options: few)  # all would take long
    assert "did you mean 'hellaswag'?" in refusal(capsys, "--tasks", "hellaswg")


def test_a_group_with_tasks_of_its_own_inside_is_refused(tmp_path: Path) -> None:
    (tmp_path / "inner.yaml").write_text("group: inner\ntask:\n  - {group: new, task: [piqa]}\n")
    with pytest.raises(InputError, match="inner: .*'new'"):
        lm_eval_tasks.plan_tasks(["inner"], tmp_path)


def test_a_task_that_two_groups_change_differently_is_refused(tmp_path: Path) -> None:
    for name, shots in (("one", 1), ("two", 2)):
        (tmp_path / f"{name}.yaml").write_text(f"group: {name}\ntask:\n  - {{task: piqa, num_fewshot: {shots}}}\n")
    assert lm_eval_tasks.plan_tasks(["one"], tmp_path).tasks == {"piqa": {"num_fewshot": 1}}
    with pytest.raises(InputError, match="piqa: .*two ways"):
        lm_eval_tasks.plan_tasks(["one", "two"], tmp_path)


def test_without_lm_eval_one_line_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(
        lm_eval_tasks, "find_spec", lambda name, *rest: None if name == "lm_eval" else real(name, *rest)
    )
    assert "pip install 'dissect-unlearning[eval]'" in refusal(capsys)


@pytest.mark.slow
def test_all_of_lm_evals_names_are_known() -> None:
    plan = lm_eval_tasks.plan_tasks(["wmdp_bio", "gsm8k"])
    assert list(plan.tasks) == ["wmdp_bio", "gsm8k"]
    with pytest.raises(InputError, match="did you mean 'truthfulqa_mc2'"):
        lm_eval_tasks.plan_tasks(["truthfulqa_mc22"])
