"""`unlearn eval quality`: worked-out texts, slow recomputation, batches, resume, the command line."""

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
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from tests.command_lines import call_main
from tests.unlearning.helpers import build_examples, build_tiny_llama
from unlearning.cli import main
from unlearning.common.errors import InputError
from unlearning.data.spans import encode_answer
from unlearning.evaluation.benchmarks.quality import benchmark as quality
from unlearning.evaluation.benchmarks.quality.prompts import Asked, read_prompts
from unlearning.evaluation.benchmarks.quality.summary import summarise
from unlearning.evaluation.generation import greedy_answers
from unlearning.evaluation.harness import Evaluation, evaluate
from unlearning.evaluation.metrics.fluency import Classifier, load_classifier
from unlearning.evaluation.subject import Subject

ASKED = [Asked(example.prompt, None, f"q{place}", "ab"[place % 2]) for place, example in enumerate(build_examples())]
GIVEN = [
    Asked("", "a a a a b"),
    Asked("", "   "),
    Asked("", "the town of Halvik " * 9),
    Asked("", "x#9}qK 7$k%2a a}b{c"),
    Asked("", "Oslo"),
]


@pytest.fixture(scope="module")
def subject(tokenizer: PreTrainedTokenizerFast) -> Subject:
    return Subject.wrap(build_tiny_llama(), tokenizer, name="tiny")


@pytest.fixture(scope="module")
def base(tokenizer: PreTrainedTokenizerFast) -> Subject:
    return Subject.wrap(build_tiny_llama(seed=1), tokenizer, name="base")


def run(
    subject: Subject, asked: list[Asked], *, batch_size: int = 3, out: Path | None = None, **options: Any
) -> Evaluation:
    prepare = partial(quality.prepare, asked=asked, max_new_tokens=12, **options)
    return evaluate(prepare, subject, batch_size=batch_size, progress=False, out=out)


def test_given_texts_by_hand(subject: Subject) -> None:
    found = run(subject, GIVEN)
    assert found["empty"] == pytest.approx(1 / 5)
    assert found["loop"] == pytest.approx(1 / 5)
    assert found["broken_words"] == pytest.approx(1 / 5)
    assert found["unpronounceable"] == 0
    assert found["gibberish"] == pytest.approx(2 / 5)  # an empty text is not gibberish
    # aaa aaa aab: a third again; 36 words in a loop of 4: 4 of 34 distinct; three distinct words; "Oslo" has none.
    assert found["repetition_3"] == pytest.approx((1 / 3 + 30 / 34 + 0) / 3)
    assert found["longest_run"] == pytest.approx((4 + 1 + 1 + 1) / 4)
    assert found["length"] == pytest.approx((5 + 0 + 36 + 3 + 1) / 5)
    assert found["distinct_1"] == pytest.approx((2 + 4 + 3 + 1) / (5 + 36 + 3 + 1))
    entropy = -(0.8 * math.log2(0.8) + 0.2 * math.log2(0.2))
    assert found["entropy_1"] == pytest.approx((entropy + 2 + math.log2(3) + 0) / 4)
    left_out = found.summary()["left_out"]
    assert set(left_out) == {"nll_under_base", "perplexity_under_base", "fluency"}
    assert "`base`" in left_out["nll_under_base"] and "`classifier`" in left_out["fluency"]


def test_texts_that_are_all_empty_are_empty_and_nothing_else(subject: Subject, base: Subject) -> None:
    summary = run(subject, [Asked("Say it.", "")] * 3, base=base).summary()
    values = {name: metric["value"] for name, metric in summary["metrics"].items()}
    assert values == {"empty": 1, "gibberish": 0, "loop": 0, "broken_words": 0, "unpronounceable": 0, "length": 0}
    assert summary["left_out"]["nll_under_base"] == "all texts are empty"
    json.dumps(summary, allow_nan=False)


def test_generations_are_the_greedy_ones_and_perplexity_is_that_of_a_plain_forward_pass(
    subject: Subject, base: Subject
) -> None:
    rows = run(subject, ASKED, base=base).rows
    surprises = []
    for asked, row in zip(ASKED, rows.to_dict("records"), strict=True):
        text = greedy_answers(subject.model, subject.tokenizer, [asked.prompt], max_new_tokens=12)[0]
        assert row["text"] == text and row["id"] == asked.id
        span = encode_answer(base.tokenizer, asked.prompt, text)
        with torch.no_grad():
            log_p = base.model(torch.tensor([span.input_ids])).logits[0].log_softmax(-1)
        slow = [-float(log_p[t - 1, span.input_ids[t]]) for t in range(span.answer_start, len(span.input_ids))]
        surprises.append(sum(slow) / len(slow))
        assert row["base_nll"] == pytest.approx(surprises[-1], abs=1e-5)
    found = run(subject, ASKED, base=base)
    assert found["nll_under_base"] == pytest.approx(np.mean(surprises), abs=1e-5)
    assert found["perplexity_under_base"] == pytest.approx(math.exp(np.mean(surprises)), rel=1e-4)


def test_batch_size_and_order_change_no_number(subject: Subject, base: Subject) -> None:
    one, seven = (run(subject, ASKED, base=base, batch_size=size).rows for size in (1, 7))
    back = run(subject, ASKED[::-1], base=base, batch_size=3).rows[::-1].reset_index(drop=True)
    for other in (seven, back):
        assert one["text"].tolist() == other["text"].tolist()
        np.testing.assert_allclose(one["base_nll"], other["base_nll"], atol=1e-5)
        pd.testing.assert_frame_equal(one.drop(columns=["row", "base_nll"]), other.drop(columns=["row", "base_nll"]))


def test_a_collapsed_base_gives_finite_numbers_or_says_why_not(subject: Subject, base: Subject) -> None:
    found = run(subject, GIVEN[:1], base=base)
    frame = found.rows.assign(base_nll=[1e4])
    metrics = {metric.name: metric for metric in summarise(frame, seed=0, has_base=True, has_classifier=False)}
    assert metrics["nll_under_base"].estimate.value == 1e4
    assert metrics["perplexity_under_base"].estimate is None
    assert "nll_under_base" in metrics["perplexity_under_base"].reason


def test_a_killed_run_goes_on_to_the_same_rows(
    subject: Subject, base: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(subject, ASKED, base=base).rows
    calls = []

    def failing(*arguments: Any, **options: Any) -> list[str]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return greedy_answers(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(quality, "greedy_answers", failing)
        with pytest.raises(KeyboardInterrupt):
            run(subject, ASKED, base=base, out=tmp_path / "run")
    resumed = run(subject, ASKED, base=base, out=tmp_path / "run").rows
    pd.testing.assert_frame_equal(resumed, whole, check_dtype=False, atol=1e-5)


def test_the_retain_model_is_measured_alike(
    subject: Subject, base: Subject, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("UNLEARNING_CACHE", str(tmp_path))
    prepare = partial(quality.prepare, asked=ASKED, max_new_tokens=12)
    summary = evaluate(prepare, subject, control=base, progress=False).summary()
    alone = run(base, ASKED)
    for name, metric in summary["metrics"].items():
        assert metric["control"] == pytest.approx(alone[name])
        assert metric["difference"] == pytest.approx(metric["value"] - alone[name])


@pytest.fixture(scope="module")
def classifier_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random text classifier as the published one is shaped."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("classifier")
    config = BertConfig(
        vocab_size=384,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
        initializer_range=0.5,
        id2label={0: "clean", 1: "mild gibberish", 2: "noise"},
        label2id={"clean": 0, "mild gibberish": 1, "noise": 2},
    )
    BertForSequenceClassification(config).eval().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_the_classifier_gives_the_softmax_of_class_0_of_the_first_tokens(
    classifier_dir: Path, tokenizer: PreTrainedTokenizerFast, subject: Subject
) -> None:
    model = BertForSequenceClassification.from_pretrained(classifier_dir)
    texts = [example.prompt for example in build_examples(4)] + ["Oslo " * 40]
    slow = []
    for text in texts:
        ids = tokenizer(text)["input_ids"][:8]
        with torch.no_grad():
            slow.append(float(model(torch.tensor([ids])).logits[0].softmax(-1)[0]))
    for batch_size in (1, 3):
        classifier = load_classifier(classifier_dir, max_length=8, batch_size=batch_size)
        assert classifier.probabilities(texts) == pytest.approx(slow, abs=1e-6)
    other = load_classifier(classifier_dir, label="noise", max_length=8)
    assert other.probabilities(texts) != pytest.approx(slow, abs=1e-3)
    found = run(subject, [Asked("", text) for text in [*texts, ""]], classifier=classifier)
    assert found["fluency"] == pytest.approx(np.mean(slow), abs=1e-6)  # the empty text is left out
    with pytest.raises(InputError, match="`clean_label`.*'noisy'; did you mean 'noise'"):
        load_classifier(classifier_dir, label="noisy")


def test_any_function_can_be_the_classifier(subject: Subject) -> None:
    judge = Classifier(lambda texts: [float(text == "Oslo") for text in texts], {"name": "oslo"})
    assert run(subject, GIVEN, classifier=judge)["fluency"] == pytest.approx(1 / 4)


def test_prompts_come_from_files_of_any_shape_without_answers(tmp_path: Path) -> None:
    records = [{"question": "Where?", "id": 7, "group": "g"}, {"prompt": "Go on"}, " ".join(map(str, range(30)))]
    (tmp_path / "prompts.json").write_text(json.dumps(records))
    asked = read_prompts(tmp_path / "prompts.json")
    assert [one.prompt for one in asked] == [
        "Question: Where?\nAnswer:",
        "Go on",
        " ".join(map(str, range(20))),
    ]
    assert (asked[0].id, asked[0].group) == ("7", "g")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(" ".join(map(str, range(30))))
    assert read_prompts(tmp_path / "texts") == [Asked(" ".join(map(str, range(20))))]


def test_a_smaller_vocabulary_than_the_tokenizers_is_refused(subject: Subject) -> None:
    model = build_tiny_llama()
    model.resize_token_embeddings(200)
    small = Subject.wrap(model, subject.tokenizer, name="small")
    with pytest.raises(InputError, match="vocabulary size 200"):
        quality.prepare(small, asked=ASKED)


def test_the_command_measures_and_writes(model_dir: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": one.prompt}) for one in ASKED))
    arguments = ["eval", "quality", "--model", model_dir, "--prompts", prompts, "--base", model_dir, "--limit", "3"]
    arguments += ["--max-new-tokens", "5", "--out", tmp_path / "run", "--json"]
    outcome = call_main(main, *arguments)
    assert outcome.code == 0, outcome.err
    summary = json.loads(outcome.out)
    assert summary["rows"] == {"texts": 3}
    rows = pd.read_parquet(tmp_path / "run" / "results.parquet")
    assert summary["metrics"]["nll_under_base"]["n"] == rows["base_nll"].notna().sum() > 0
    assert rows["base_nll"].mean() == pytest.approx(summary["metrics"]["nll_under_base"]["value"])
    # Its generations can be read back as texts.
    again = ["eval", "quality", "--model", model_dir, "--texts", tmp_path / "run" / "results.parquet", "--json"]
    given = json.loads(call_main(main, *again, "--out", tmp_path / "again").out)
    assert given["metrics"]["length"]["value"] == summary["metrics"]["length"]["value"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--prompts.*--texts"),
        (["--prompts", "PROMPTS", "--texts", "PROMPTS"], "--prompts.*--texts"),
        (["--prompts", "nowhere.json"], "no such file"),
        (["--texts", "nowhere.json"], "no such file"),
        (["--texts", "PROMPTS"], "record 1: .*generated"),
        (["--prompts", "EMPTY"], "the file is empty"),
        (["--prompts", "PROMPTS", "--limit", "0"], "--limit.*0"),
        (["--prompts", "PROMPTS", "--max-new-tokens", "0"], "--max-new-tokens.*0"),
        (["--prompts", "PROMPTS", "--chat"], "no chat template"),
        (["--prompts", "PROMPTS", "--template", "Hm"], "{question}.*Hm"),
        (["--prompts", "PROMPTS", "--clean-label", "x"], "--clean-label.*--classifier"),
        (["--prompts", "PROMPTS", "--classifier", "MODEL/.."], "--classifier.*safetensors"),
        (["--prompts", "PROMPTS", "--base", "/nowhere"], "no such directory"),
        (["--prompts", "KEYS"], "record 1: .*prompt"),
    ],
)
def test_bad_input_is_one_line(model_dir: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "prompts.json").write_text(json.dumps([{"prompt": "Where?"}]))
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "keys.json").write_text('[{"q": "Where?"}]')
    places = {"PROMPTS": "prompts.json", "EMPTY": "empty.json", "KEYS": "keys.json"}
    written = [
        str(tmp_path / places[one]) if one in places else one.replace("MODEL", str(model_dir)) for one in arguments
    ]
    outcome = call_main(main, "eval", "quality", "--model", model_dir, "--out", tmp_path / "run", *written)
    assert outcome.code == 2
    assert re.search(message, outcome.err) and outcome.err.count("\n") == 1
