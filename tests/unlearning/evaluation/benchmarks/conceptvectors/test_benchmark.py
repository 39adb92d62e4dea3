"""ConceptVectors: vectors against a slow computation, texts against the vanilla model's, noise that leaves no trace."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tests.command_lines import call_main
from tests.unlearning.data.helpers import REAL_DATA, needs_real
from tests.unlearning.helpers import NAMES, TOWNS, build_tiny_llama
from unlearning.checkpoints.hashing import content_hash
from unlearning.cli import main
from unlearning.common.errors import InputError
from unlearning.data.concept_vectors import find_concepts
from unlearning.evaluation.benchmarks.conceptvectors import benchmark
from unlearning.evaluation.benchmarks.conceptvectors.benchmark import Base, Concept, concepts_of
from unlearning.evaluation.benchmarks.conceptvectors.summary import summarise
from unlearning.evaluation.generation import greedy_answers
from unlearning.evaluation.harness import Evaluation, evaluate
from unlearning.evaluation.metrics.stop_words import STOP_WORDS
from unlearning.evaluation.metrics.text_similarity import bleu, rouge_l
from unlearning.evaluation.metrics.value_vectors import Place
from unlearning.evaluation.subject import Subject

RECORDS: list[dict[str, Any]] = [
    {
        "Concept": f"The town of {town}",
        "Layer": place % 2,
        "Dim": 7 * place,
        "QA": [f" Where is {town}?\n", f"Who was born in {town}?"],
        "text_completion": [{"First_half": f"{name} was born in", "Second_half": f"{town}."}],
        "unrelated_QA": [f"Where was {other} born?" for other in (other, NAMES[7])],
        "wikipedia_content": f"{name} was born in {town}, and {town} was the home of Ben Hill and Dan Wood.",
    }
    for place, (name, other, town) in enumerate(zip(NAMES[:3], NAMES[3:6], TOWNS[:3], strict=True))
]


@pytest.fixture(scope="module")
def vanilla(tokenizer: PreTrainedTokenizerFast) -> Subject:
    return Subject.wrap(build_tiny_llama(), tokenizer, name="vanilla")


@pytest.fixture(scope="module")
def unlearned(tokenizer: PreTrainedTokenizerFast) -> Subject:
    """The vanilla model with every weight a little other."""
    model = build_tiny_llama()
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn_like(weight)
    return Subject.wrap(model, tokenizer, name="unlearned")


def run(
    subject: Subject, vanilla: Subject, *, batch_size: int = 4, out: Path | None = None, **options: Any
) -> Evaluation:
    concepts = options.pop("concepts", concepts_of(RECORDS, "records"))
    prepare = partial(benchmark.prepare, concepts=concepts, base=Base(vanilla), **{"max_new_tokens": 5, **options})
    return evaluate(prepare, subject, batch_size=batch_size, progress=False, out=out)


@pytest.fixture(scope="module")
def found(vanilla: Subject, unlearned: Subject) -> Evaluation:
    """The unlearned model against the vanilla one."""
    return run(unlearned, vanilla)


def slow_top(model: PreTrainedModel, vector: torch.Tensor) -> list[int]:
    scores = [float(row.double() @ vector.double()) for row in model.lm_head.weight.detach()]
    return sorted(range(len(scores)), key=lambda token: (-scores[token], token))[: min(200, len(scores) // 2)]


def test_vectors_are_compared_as_the_paper_says(vanilla: Subject, unlearned: Subject, found: Evaluation) -> None:
    rows = found.rows
    rows = rows[rows["set"] == "vectors"].to_dict("records")
    assert [row["group"] for row in rows] == [record["Concept"] for record in RECORDS]
    for record, row in zip(RECORDS, rows, strict=True):
        v, w = (
            subject.model.model.layers[record["Layer"]].mlp.down_proj.weight.detach().double()[:, record["Dim"]]
            for subject in (vanilla, unlearned)
        )
        assert row["cosine"] == pytest.approx(float(v @ w / v.norm() / w.norm()), abs=1e-12)
        assert row["l2"] == pytest.approx(float((v - w).norm()), abs=1e-12)
        p, q = set(slow_top(vanilla.model, v)), set(slow_top(unlearned.model, w))
        kept = re.sub(r"\b(was|in|and|the|of)\b", "", record["wikipedia_content"])
        words = {
            token
            for token in vanilla.tokenizer(kept)["input_ids"]
            if re.search("[a-zA-Z]", text := vanilla.tokenizer.decode([token]).strip())
            and text.lower() not in STOP_WORDS
        }
        assert row["n_top"] == 192 == len(p)
        assert row["jaccard_unembed"] == pytest.approx(len(p & q) / len(p | q))
        p_norm, q_norm = (
            set(slow_top(subject.model, subject.model.model.norm(vector[None].float())[0]))
            for subject, vector in ((vanilla, v), (unlearned, w))
        )
        assert row["jaccard_norm_unembed"] == pytest.approx(len(p_norm & q_norm) / len(p_norm | q_norm))
        assert row["preciser"] == pytest.approx(len(q & words) / len(p & words))
        assert row["related"] == pytest.approx(len(p & q & words) / len(p & words))
        assert row["promotes_unembed"].startswith(vanilla.tokenizer.decode([slow_top(vanilla.model, v)[0]]))


def test_texts_are_compared_with_the_vanilla_models_own(
    vanilla: Subject, unlearned: Subject, found: Evaluation
) -> None:
    rows = found.rows[found.rows["set"] != "vectors"]
    assert dict(rows["set"].value_counts()) == {"qa": 6, "completion": 3, "unrelated": 6}
    first = rows.iloc[0]
    assert first["prompt"] == "Question:  Where is Oslo?\n\n Answer:"  # the question verbatim, as released
    completion = rows[rows["set"] == "completion"].iloc[0]["prompt"]
    assert completion == "Please complete the following paragraph: Ada Brook was born in"
    for row in rows.to_dict("records"):
        new, old = (
            greedy_answers(subject.model, subject.tokenizer, [row["prompt"]], max_new_tokens=5)[0]
            for subject in (unlearned, vanilla)
        )
        assert (row["text"], row["base_text"]) == (new, old)
        assert row["bleu"] == bleu(new, old) and row["rouge_l"] == rouge_l(new, old)


def test_bleu_takes_the_vanilla_text_as_its_reference() -> None:
    # A short text against a long reference pays for its brevity; turned around it would not.
    concept = Concept("c", {}, None, "")
    question = benchmark._Question("qa", 0, "p", "i")
    row = benchmark._text_rows([concept], [question], ["a b"], ["a b c d"])[0]
    assert row["bleu"] == pytest.approx(np.exp(1 - 4 / 2))


def test_summary_means_and_differences_by_hand(found: Evaluation) -> None:
    rows = found.rows.copy()
    scores = {"qa": 0.2, "completion": 0.8, "unrelated": 0.9}
    rows["bleu"] = rows["set"].map(scores)
    metrics = {metric.name: metric for metric in summarise(rows, noise=(), vectors=True, seed=0)}
    value = {name: metric.estimate.value for name, metric in metrics.items() if metric.estimate}
    assert value["qa_bleu"] == pytest.approx(0.2) and value["completion_bleu"] == pytest.approx(0.8)
    assert value["target_bleu"] == pytest.approx((6 * 0.2 + 3 * 0.8) / 9)  # a mean over prompts
    assert value["difference_bleu"] == pytest.approx(0.9 - 0.4)
    vectors = rows[rows["set"] == "vectors"]
    assert value["vector_cosine"] == pytest.approx(vectors["cosine"].mean())
    assert value["vector_related_token_rate"] == pytest.approx(vectors["related"].astype(float).mean())


def test_rows_of_earlier_versions_are_read(found: Evaluation) -> None:
    old = found.rows.drop(columns="jaccard_norm_unembed").rename(columns={"jaccard_unembed": "jaccard"})
    metrics = {metric.name: metric for metric in summarise(old, noise=(), vectors=True, seed=0)}
    now = metrics["vector_jaccard_unembed"].estimate
    assert now is not None and now.value == found["vector_jaccard_unembed"]
    missing = metrics["vector_jaccard_norm_unembed"]
    assert missing.estimate is None and missing.reason


def test_concepts_are_drawn_whole(found: Evaluation) -> None:
    rows = found.rows.copy()
    # Every prompt of a concept scores alike: with 3 concepts, a draw's mean is one of a few values.
    rows["bleu"] = rows["group"].map({record["Concept"]: float(place) for place, record in enumerate(RECORDS)})
    metrics = {metric.name: metric for metric in summarise(rows, noise=(), vectors=True, seed=0)}
    draws = metrics["qa_bleu"].estimate.draws
    assert np.allclose(draws * 3, np.round(draws * 3))
    # Target and unrelated prompts of a concept are drawn together: as they score alike, nothing is left between them.
    assert np.allclose(metrics["difference_bleu"].estimate.draws, 0)


def test_the_vanilla_model_against_itself_has_lost_nothing(vanilla: Subject) -> None:
    found = run(vanilla, vanilla)
    assert found["vector_jaccard_unembed"] == found["vector_preciser_jaccard"] == found["target_bleu"] == 1
    assert found["vector_l2"] == found["difference_rouge_l"] == 0


def test_noise_starts_from_clean_weights_for_every_concept(vanilla: Subject, unlearned: Subject) -> None:
    before = content_hash(vanilla.model, name="vanilla")
    found = run(unlearned, vanilla, noise=[0.0, 8.0])
    assert content_hash(vanilla.model, name="vanilla") == before
    rows = found.rows
    silent, loud = rows[rows["set"] == "noise-0"], rows[rows["set"] == "noise-8"]
    assert (silent["text"] == silent["base_text"]).all() and found["noise_0_target_bleu"] == 1
    assert (loud["text"] != loud["base_text"]).any()
    # The last concept alone, on a fresh model: what came before it has left nothing behind.
    fresh = Subject.wrap(build_tiny_llama(), vanilla.tokenizer, name="vanilla")
    last = RECORDS[-1]["Concept"]
    alone = run(unlearned, fresh, noise=[8.0], concepts=concepts_of(RECORDS[-1:], "records"), batch_size=1).rows
    alone = alone[alone["set"] == "noise-8"]
    assert alone["text"].tolist() == loud[loud["group"] == last]["text"].tolist()
    assert found["noise_8_target_bleu"] == pytest.approx(loud[loud["kind"] != "unrelated"]["bleu"].mean())
    assert found["noise_8_unrelated_bleu"] == pytest.approx(loud[loud["kind"] == "unrelated"]["bleu"].mean())


def test_records_without_layer_and_dim_leave_the_vectors_out_by_name(vanilla: Subject, unlearned: Subject) -> None:
    bare = [{key: value for key, value in record.items() if key not in ("Layer", "Dim")} for record in RECORDS[:1]]
    left_out = run(unlearned, vanilla, concepts=concepts_of(bare, "bare")).summary()["left_out"]
    measures = ("cosine", "l2", "jaccard_unembed", "jaccard_norm_unembed", "preciser_jaccard", "related_token_rate")
    assert set(left_out) == {f"vector_{name}" for name in measures}
    assert "Layer and Dim" in left_out["vector_cosine"]
    assert (
        "`vectors=False`"
        in run(unlearned, vanilla, vectors=False, concepts=concepts_of(RECORDS[:1], "one")).summary()["left_out"][
            "vector_cosine"
        ]
    )
    with pytest.raises(InputError, match="no record names one"):
        run(unlearned, vanilla, concepts=concepts_of(bare, "bare"), noise=[0.1])


def test_sets_that_are_not_there_are_left_out(vanilla: Subject, unlearned: Subject) -> None:
    bare = [{"Concept": "c", "QA": ["Where?"], "Layer": 0, "Dim": 0}]
    summary = run(unlearned, vanilla, concepts=concepts_of(bare, "bare")).summary()
    missing = {f"{kind}_{name}" for kind in ("completion", "unrelated", "difference") for name in ("bleu", "rouge_l")}
    missing |= {"unrelated_empty"}
    assert set(summary["left_out"]) == missing | {"vector_preciser_jaccard", "vector_related_token_rate"}
    assert summary["metrics"]["target_bleu"]["n"] == 1
    json.dumps(summary, allow_nan=False)


def test_batch_size_and_order_change_no_number(vanilla: Subject, unlearned: Subject) -> None:
    one, seven = (run(unlearned, vanilla, batch_size=size, noise=[4.0]).rows for size in (1, 7))
    pd.testing.assert_frame_equal(one, seven, atol=1e-5)
    back = run(unlearned, vanilla, batch_size=3, noise=[4.0], concepts=concepts_of(RECORDS[::-1], "records")).rows
    keys = ["set", "id"]
    one, back = (frame.sort_values(keys).drop(columns="row").reset_index(drop=True) for frame in (one, back))
    pd.testing.assert_frame_equal(one, back, atol=1e-5)


def test_a_killed_run_goes_on_to_the_same_rows(
    vanilla: Subject, unlearned: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(unlearned, vanilla, noise=[4.0])
    calls = []

    def failing(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return original(*arguments)

    original = benchmark.continuations
    with monkeypatch.context() as patched:
        patched.setattr(benchmark, "continuations", failing)
        with pytest.raises(KeyboardInterrupt):
            run(unlearned, vanilla, noise=[4.0], out=tmp_path / "run")
    resumed = run(unlearned, vanilla, noise=[4.0], out=tmp_path / "run")
    pd.testing.assert_frame_equal(resumed.rows, whole.rows, check_dtype=False, atol=1e-9)
    first, second = (found.summary()["metrics"] for found in (whole, resumed))
    assert {name: metric["value"] for name, metric in first.items()} == pytest.approx(
        {name: metric["value"] for name, metric in second.items()}
    )


def test_the_retain_model_is_measured_alike(
    vanilla: Subject, unlearned: Subject, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("UNLEARNING_CACHE", str(tmp_path))
    prepare = partial(benchmark.prepare, concepts=concepts_of(RECORDS, "records"), base=Base(vanilla), max_new_tokens=5)
    metrics = evaluate(prepare, unlearned, control=vanilla, progress=False).summary()["metrics"]
    assert metrics["target_bleu"]["control"] == 1 and metrics["vector_l2"]["control"] == 0
    assert metrics["vector_l2"]["difference"] == metrics["vector_l2"]["value"] > 0


@needs_real
def test_the_released_file_is_read() -> None:
    found = find_concepts(REAL_DATA)
    concepts = concepts_of([record for record, _ in found.values()], "released")
    assert len(concepts) == 10
    assert {len(concept.prompts["qa"]) for concept in concepts} == {10}
    assert {len(concept.prompts["unrelated"]) for concept in concepts} == {50}
    valentine = next(concept for concept in concepts if concept.name == "Valentine's Day")
    assert valentine.place == Place(19, 3279)
    assert valentine.prompts["qa"][0].startswith("Question:  What date is") and valentine.article
    assert all(prompt.endswith("\n Answer:") for prompt in valentine.prompts["qa"])


def test_the_released_layers_are_refused_by_a_small_model_in_one_line(vanilla: Subject, unlearned: Subject) -> None:
    far = concepts_of([{**RECORDS[0], "Layer": 19, "Dim": 3279}], "released")
    with pytest.raises(InputError, match=r"layer.*at most 1 in vanilla, got 19.*`vectors=False`"):
        run(unlearned, vanilla, concepts=far)
    with pytest.raises(InputError, match=r"dimension.*at most 63.*vanilla, got 3279.*`vectors=False`"):
        run(unlearned, vanilla, concepts=concepts_of([{**RECORDS[0], "Dim": 3279}], "released"))


def test_the_command_measures_and_writes(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "conceptvectors").mkdir()
    (tmp_path / "conceptvectors" / "concepts.json").write_text(json.dumps(RECORDS))
    arguments = ["eval", "conceptvectors", "--model", model_dir, "--base", model_dir, "--data-dir", tmp_path]
    arguments += ["--limit", "2", "--per-concept", "1", "--max-new-tokens", "4", "--noise", "0,.1"]
    outcome = call_main(main, *arguments, "--out", tmp_path / "run", "--json")
    assert outcome.code == 0, outcome.err
    summary = json.loads(outcome.out)
    assert summary["rows"] == {"qa": 2, "completion": 2, "unrelated": 2, "vectors": 2, "noise-0": 6, "noise-0.1": 6}
    names = ("vector_jaccard_unembed", "vector_jaccard_norm_unembed", "noise_0_target_bleu")
    assert all(summary["metrics"][name]["value"] == 1 for name in names)
    assert (tmp_path / "run" / "results.parquet").is_file()


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, ["--base", "/nowhere"], "no such directory"),
        ({}, ["--noise", "a"], "--noise.* a"),
        ({}, ["--noise", "-1"], "--noise.*-1"),
        ({}, ["--noise", "0.1", "--no-vectors"], "--noise.*--no-vectors"),
        ({}, ["--limit", "0"], "--limit.*0"),
        ({}, ["--per-concept", "0"], "--per-concept.*0"),
        ({}, ["--max-new-tokens", "0"], "--max-new-tokens.*0"),
        ({"QA": None}, [], "record 1: QA must"),
        ({"text_completion": ["half"]}, [], "record 1: text_completion"),
        ({"unrelated_QA": [1]}, [], "record 1: unrelated_QA must"),
        ({"Dim": None}, [], "give two whole numbers, or neither"),
        ({"Layer": 19}, [], "layer.*19.*--no-vectors"),
    ],
)
def test_bad_input_is_one_line(
    model_dir: Path, tmp_path: Path, changes: dict[str, Any], options: list[str], message: str
) -> None:
    (tmp_path / "concepts.json").write_text(json.dumps([{**RECORDS[0], **changes}]))
    arguments = ["--concepts", tmp_path / "concepts.json", "--out", tmp_path / "run", "--base", model_dir, *options]
    outcome = call_main(main, "eval", "conceptvectors", "--model", model_dir, *arguments)
    assert outcome.code == 2
    assert re.search(message, outcome.err) and outcome.err.count("\n") == 1


def test_what_is_missing_altogether_is_one_line(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('[{"question": "Where?", "answer": "Here"}]')
    start = ["eval", "conceptvectors", "--model", model_dir, "--concepts", tmp_path / "other.json"]
    outcome = call_main(main, *start)
    assert outcome.code == 2 and "--base" in outcome.err
    outcome = call_main(main, *start, "--base", model_dir)
    assert outcome.code == 2 and '"Concept" and "QA"' in outcome.err
    assert outcome.err.count("\n") == 1
