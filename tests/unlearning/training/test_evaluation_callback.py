"""What is measured during training, and what it decides: stop, keep the best, say a collapse, and nothing else."""

import html
import json
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from transformers import PreTrainedTokenizerFast

from tests.unlearning.helpers import build_examples, build_tiny_llama
from tests.unlearning.small_world import FORGET as PEOPLE
from tests.unlearning.small_world import World, flat_weights
from tests.unlearning.training.test_resume import with_dropout
from unlearning import Example, InputError, train
from unlearning.data.encoding import encode
from unlearning.evaluation.answers import answer_likelihoods, answer_matches
from unlearning.training.evaluation_callback import (
    METRICS,
    EvaluationCallback,
    Measured,
    Rule,
    check_metric,
    higher_is_better,
    parse_rule,
)
from unlearning.training.train import TrainResult

FORGET, RETAIN = build_examples()[:4], build_examples()[4:]
SHARED: dict[str, Any] = {
    "forget": FORGET,
    "retain": RETAIN,
    "batch_size": 2,
    "gradient_accumulation_steps": 1,
    "learning_rate": 3e-2,
    "alpha": 5,
    "lr_schedule": "constant",
    "warmup_ratio": 0,
    "max_steps": 8,
    "logging_steps": 1,
    "progress": False,
    "device": "cpu",
}
OPERATORS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


@given(
    metric=st.sampled_from(METRICS),
    sign=st.sampled_from(sorted(OPERATORS)),
    bound=st.floats(allow_nan=False, allow_infinity=False),
    value=st.floats(allow_nan=False),
    space=st.sampled_from(["", " ", "  "]),
)
def test_a_rule_is_read_back_and_compares(metric: str, sign: str, bound: float, value: float, space: str) -> None:
    rule = parse_rule(f"{space}{metric}{space}{sign}{space}{bound!r}{space}")
    assert rule == Rule(metric, sign, bound)
    assert rule.holds({metric: value}) == OPERATORS[sign](value, bound)


@pytest.mark.parametrize(
    "text", ["", "forget_rouge", "forget_rouge<", "<0.2", "forget_rouge=0.2", "forget_rouge<x", "forget_rouge<0.2<0.3"]
)
def test_what_is_no_rule_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="`stop_when` must be METRIC<NUMBER"):
        parse_rule(text)


def test_an_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(InputError, match="`stop_when`.*'forget_rogue'; did you mean 'forget_rouge'"):
        parse_rule("forget_rogue<0.2")
    with pytest.raises(InputError, match="`keep_best`.*forget_nll, forget_probability.*'utility'"):
        check_metric("utility", "keep_best")


def test_more_is_better_where_it_is_more_retained() -> None:
    better = {name for name in METRICS if higher_is_better(name)}
    assert better == {"forget_nll"} | {
        f"{part}_{quantity}" for part in ("retain", "gap") for quantity in ("probability", "rouge", "exact")
    }


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_metrics_equal_a_loop_over_tokens(batch_size: int, world: World) -> None:
    """One token after the other, one example after the other, without padding or cache."""
    model, tokenizer = world.start(), world.tokenizer
    with torch.no_grad():  # so that some answers are wrong, and probabilities are between 0 and 1
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.ndim)))
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    nll, probability, rouge, exact = [], [], [], []
    for example in PEOPLE:
        prompt = tokenizer(example.prompt)["input_ids"]
        ids = tokenizer(f"{example.prompt} {example.answer}")["input_ids"]  # the closing token is not counted
        total = 0.0
        for place in range(len(prompt), len(ids)):
            with torch.no_grad():
                logits = model(torch.tensor([ids[:place]])).logits[0, -1]
            total -= float(logits.double().log_softmax(-1)[ids[place]])
        nll.append(total / (len(ids) - len(prompt)))
        probability.append(2.718281828459045 ** -nll[-1])
        said: list[int] = []
        while len(said) < 6:
            with torch.no_grad():
                token = int(model(torch.tensor([prompt + said])).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            said.append(token)
        text = tokenizer.decode(said).strip()
        rouge.append(scorer.score(example.answer, text)["rougeL"].recall)
        exact.append(float(text.split() == example.answer.split()))
    spans = encode(tokenizer, PEOPLE, append_eos=True, max_length=None).spans
    found = answer_likelihoods(model, spans, batch_size=batch_size)
    found |= answer_matches(model, tokenizer, PEOPLE, batch_size=batch_size, max_new_tokens=6)
    for name, values in {"nll": nll, "probability": probability, "rouge": rouge, "exact": exact}.items():
        assert found[name] == pytest.approx(sum(values) / len(values), abs=1e-5), name
    assert 0 < found["exact"] < found["rouge"] < 1


@pytest.mark.parametrize("answers", ["Анна родилась в Осло.", "安娜出生在奥斯陆。", "अन्ना ओस्लो में"])
def test_a_rule_on_rouge_counts_words_of_every_script(
    answers: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unlearning.evaluation.answers.greedy_answers", lambda *_, **__: [answers, "?"])
    found = answer_matches(
        world.model, world.tokenizer, [Example("a", answers), Example("b", "Oslo")], batch_size=2, max_new_tokens=6
    )
    assert found == {"rouge": 0.5, "exact": 0.5}


def test_a_rule_on_rouge_is_refused_where_no_answer_has_a_word(model_dir: Path) -> None:
    """A metric of nothing would be below every bound."""
    signs = [Example(example.prompt, "?!") for example in FORGET]
    with pytest.raises(InputError, match="`stop_when`.* got forget_rouge; no answer of these data has a word"):
        train("npo", model=model_dir, **{**SHARED, "forget": signs}, stop_when="forget_rouge<0.2")


@contextmanager
def no_warnings_of_collapse() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="collapse")
        yield


def card_of(directory: Path) -> str:
    return (directory / "README.md").read_text()


def steps_of(result: TrainResult) -> list[int]:
    return [int(line["step"]) for line in result.evaluations]


def test_a_gap_is_retain_minus_forget_and_all_is_measured_when_asked(model_dir: Path) -> None:
    result = train("npo", model=model_dir, eval_every=3, eval_examples=3, **SHARED)
    assert steps_of(result) == [0, 3, 6, 8]
    for line in result.evaluations:
        assert set(METRICS) <= set(line)
        for quantity in ("nll", "probability", "rouge", "exact"):
            assert line[f"gap_{quantity}"] == line[f"retain_{quantity}"] - line[f"forget_{quantity}"]
    likelihoods = train("npo", model=model_dir, **SHARED).evaluations
    assert [int(line["step"]) for line in likelihoods] == [0, 8]
    assert not any(name.endswith(("rouge", "exact")) for line in likelihoods for name in line)


def test_metrics_are_of_evenly_spaced_examples(model_dir: Path) -> None:
    """Data are often sorted by subject, so the first rows are about the first subject only."""

    def first(examples: list[Example], limit: int) -> dict[str, float]:
        data = {"forget": examples, "retain": list(reversed(build_examples()))}
        options = {**SHARED, **data, "eval_every": 1, "eval_examples": limit, "max_steps": 1}
        return train("npo", model=model_dir, **options).evaluations[0]

    every = [replace(example, answer=f"{example.answer} {i}") for i, example in enumerate(build_examples())]
    watched = {name: value for name, value in first(every, 3).items() if name.startswith("forget")}
    spaced, beginning = (first(some, 9) for some in ([every[0], every[2], every[5]], every[:3]))
    assert watched == pytest.approx({name: spaced[name] for name in watched}, abs=1e-6)
    assert abs(watched["forget_nll"] - beginning["forget_nll"]) > 1e-3


def test_evaluating_changes_no_number_of_the_training(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Not the dropout's, not the lines of the history, wherever an evaluation falls on one."""
    settings = {**SHARED, "logging_steps": 3, "learning_rate": 1e-3, "max_steps": 7}
    plain = train("grad_diff", model=with_dropout(), tokenizer=tokenizer, **settings)
    asked = {"eval_every": 1, "keep_best": "gap_rouge", "stop_when": "forget_nll>1000", "save_every": 3}
    watched = train(
        "grad_diff", model=with_dropout(), tokenizer=tokenizer, output_dir=tmp_path / "w", **settings, **asked
    )
    assert steps_of(watched) == list(range(8))
    assert watched.history == plain.history
    assert [line["step"] for line in plain.history] == [1, 3, 6, 7]
    last = train("grad_diff", model=with_dropout(), tokenizer=tokenizer, **settings, **{"eval_every": 1}).model
    torch.testing.assert_close(flat_weights(last), flat_weights(plain.model), atol=0, rtol=0)


def test_a_rule_stops_at_the_first_step_where_it_holds(model_dir: Path, tmp_path: Path) -> None:
    free = train("npo", model=model_dir, stop_when="forget_nll>1000", **SHARED)
    values = [line["forget_nll"] for line in free.evaluations]
    bound = (max(values[:5]) + values[5]) / 2
    assert values[5] > bound
    stopped = train("npo", model=model_dir, stop_when=f"forget_nll>{bound}", output_dir=tmp_path / "run", **SHARED)
    assert steps_of(stopped) == [0, 1, 2, 3, 4, 5]
    assert stopped.history == free.history[:5]
    short = train("npo", model=model_dir, **{**SHARED, "max_steps": 5})
    torch.testing.assert_close(flat_weights(stopped.model), flat_weights(short.model), atol=0, rtol=0)
    assert f"5 optimizer steps (stopped: forget_nll>{bound} holds)" in html.unescape(card_of(tmp_path / "run"))
    assert "| after step 5 |" in card_of(tmp_path / "run")


def test_training_stops_where_the_target_is_reached(model_dir: Path, tmp_path: Path) -> None:
    settings = {name: value for name, value in SHARED.items() if name != "alpha"}
    free = train("ga", model=model_dir, eval_every=1, **settings)
    values = [line["forget_probability"] for line in free.evaluations]
    target = (values[3] + values[4]) / 2
    assert min(values[:4]) > target > values[4]
    aim = {"target_forget": target, "target_retain": 1e-9, "eval_every": 1}
    reached = train("ga", model=model_dir, output_dir=tmp_path / "run", **aim, **settings)
    assert steps_of(reached) == [0, 1, 2, 3, 4]
    assert reached.stopped_by == f"forget_probability {values[4]:.3g} reached target_forget={target:g}"
    assert html.unescape(reached.stopped_by) in html.unescape(card_of(tmp_path / "run"))
    again = train("ga", model=model_dir, output_dir=tmp_path / "run", **aim, **settings)
    assert again.already_done and again.stopped_by == reached.stopped_by and again.options == reached.options


def test_training_stops_where_too_little_of_the_rest_is_left(model_dir: Path) -> None:
    settings = {name: value for name, value in SHARED.items() if name != "alpha"}
    free = train("ga", model=model_dir, eval_every=1, **settings)
    left = [line["retain_probability"] / free.evaluations[0]["retain_probability"] for line in free.evaluations]
    first = next(step for step, value in enumerate(left) if value < 0.95)
    stopped = train("ga", model=model_dir, eval_every=1, target_forget=1e-9, target_retain=0.95, **settings)
    assert steps_of(stopped)[-1] == first
    assert stopped.stopped_by is not None and "fell below 0.95 of" in stopped.stopped_by


@pytest.mark.parametrize("method", ["npo", "task_vector"])
def test_a_target_goes_with_no_other_rule(method: str, model_dir: Path) -> None:
    rule = {"stop_when": "forget_rouge<0.2"} if method == "npo" else {}
    settings = SHARED if method == "npo" else {name: value for name, value in SHARED.items() if name != "alpha"}
    with pytest.raises(InputError, match="`target_forget`"):
        train(method, model=model_dir, target_forget=0.1, **rule, **settings)
    with pytest.raises(InputError, match="`target_forget`.*before the first step"):
        train("npo", model=model_dir, target_forget=0.999999, **SHARED)


def test_a_rule_that_holds_before_the_first_step_is_refused(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="`stop_when`.*before the first step"):
        train("npo", model=model_dir, stop_when="forget_rouge<0.2", output_dir=tmp_path / "run", **SHARED)
    assert list(tmp_path.iterdir()) == []


def test_the_best_weights_are_kept(model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = train("npo", model=model_dir, keep_best="gap_probability", output_dir=out, **SHARED)
    values = {int(line["step"]): line["gap_probability"] for line in result.evaluations}
    best = max(values, key=lambda step: values[step])
    assert 0 < best < 8  # or nothing was shown
    short = train("npo", model=model_dir, **{**SHARED, "max_steps": best})
    torch.testing.assert_close(flat_weights(result.model), flat_weights(short.model), atol=0, rtol=0)
    assert result.final["gap_probability"] == values[best] == short.final["gap_probability"]
    record = json.loads((out / "unlearning.json").read_text())
    assert record["best"] == {"metric": "gap_probability", "step": best, "value": values[best]}
    card = card_of(out)
    assert f"8 optimizer steps (the weights after step {best} were kept, where gap_probability was best)" in card
    assert f"| gap_probability | {values[0]:.4f} | {values[best]:.4f} |" in card


def test_a_collapse_is_said_once_and_recorded(model_dir: Path, tmp_path: Path) -> None:
    settings = {name: value for name, value in SHARED.items() if name != "alpha"} | {"learning_rate": 2e-2}
    out = tmp_path / "run"
    with pytest.warns(UserWarning, match="collapse at step") as said:
        result = train("ga", model=model_dir, stop_when="forget_nll>1000", output_dir=out, **settings)
    values = [line["retain_probability"] for line in result.evaluations]
    first = next(step for step, value in enumerate(values) if value < 0.1 * values[0])
    assert 0 < first < 8
    collapses = [warning for warning in said if "collapse" in str(warning.message)]
    assert len(collapses) == 1
    assert f"collapse at step {first}: retain_probability is {values[first]:.3g}" in str(collapses[0].message)
    assert json.loads((out / "unlearning.json").read_text())["collapsed_at"] == first
    assert f"collapsed at step {first}" in card_of(out)
    healthy = train("npo", model=model_dir, output_dir=tmp_path / "other", **{**SHARED, "learning_rate": 1e-3})
    assert healthy.evaluations
    assert "ollapse" not in card_of(tmp_path / "other").replace("collapse_below", "")


def test_final_metrics_are_those_of_the_saved_weights(
    model_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Of a task vector the steps learn the forget set; what is saved is made of them afterwards."""
    settings = {name: value for name, value in SHARED.items() if name != "alpha"} | {"max_steps": 3}
    with no_warnings_of_collapse():
        result = train("task_vector", model=model_dir, output_dir=tmp_path / "run", scaling=2, **settings)
    spans = encode(tokenizer, FORGET, append_eos=True, max_length=None).spans
    measured = answer_likelihoods(result.model, spans, batch_size=4)["nll"]
    assert result.final["forget_nll"] == pytest.approx(measured, rel=1e-6)
    assert result.final["forget_nll"] > result.evaluations[0]["forget_nll"]
    assert f"| {result.final['forget_nll']:.4f} |" in card_of(tmp_path / "run")
    for name in ("stop_when", "keep_best"):
        with pytest.raises(InputError, match=f"`{name}`.*task_vector"):
            value = "forget_nll" if name == "keep_best" else "forget_nll>3"
            train("task_vector", model=model_dir, output_dir=tmp_path / "x", **{name: value}, **settings)


def test_plain_text_is_not_answered(model_dir: Path, tmp_path: Path) -> None:
    texts = {"forget": [Example("", f"{example.prompt} {example.answer}") for example in FORGET]}
    for option in ({"stop_when": "forget_rouge<0.2"}, {"keep_best": "gap_exact"}):
        with pytest.raises(InputError) as error:
            train("npo", model=model_dir, output_dir=tmp_path / "run", **{**SHARED, **texts, **option})
        assert f"`{next(iter(option))}`" in str(error.value) and "forget_nll, forget_probability" in str(error.value)
        assert "\n" not in str(error.value)
        assert list(tmp_path.iterdir()) == []
    likelihoods = train("npo", model=model_dir, eval_every=4, **{**SHARED, **texts})
    assert "forget_nll" in likelihoods.final and "forget_rouge" not in likelihoods.final


def test_a_missing_set_has_no_metrics(model_dir: Path) -> None:
    settings = {name: value for name, value in SHARED.items() if name not in ("retain", "alpha")}
    with pytest.raises(InputError, match="`stop_when`.*got retain_nll.*forget_nll"):
        train("ga", model=model_dir, stop_when="retain_nll>5", **settings)


def test_keeping_the_best_needs_a_directory(model_dir: Path) -> None:
    with pytest.raises(InputError, match="`keep_best` needs a directory.*`output_dir`"):
        train("npo", model=model_dir, keep_best="gap_probability", **SHARED)


def test_the_model_before_training_is_measured_unchanged(model_dir: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    first = train("npo", model=model_dir, **{**SHARED, "max_steps": 1}).evaluations[0]
    spans = encode(tokenizer, FORGET, append_eos=True, max_length=None).spans
    assert first["forget_nll"] == pytest.approx(answer_likelihoods(build_tiny_llama(), spans, batch_size=4)["nll"])


@pytest.mark.parametrize("name", ["EvaluationCallback", "Watch"])
def test_the_state_is_read_from_checkpoints_of_this_and_of_earlier_versions(name: str, tmp_path: Path) -> None:
    callback = EvaluationCallback(
        measure=lambda: Measured({}, {}),
        every=None,
        rule=None,
        target=None,
        best=None,
        save_best=lambda: None,
        collapse_below=0.1,
        log=lambda _: None,
    )
    kept = {"attributes": {"first": {"forget_nll": 1.5}, "best_step": 3}}
    (tmp_path / "trainer_state.json").write_text(json.dumps({"stateful_callbacks": {name: kept}}))
    callback.restore(tmp_path)
    assert callback.first == {"forget_nll": 1.5} and callback.best_step == 3
