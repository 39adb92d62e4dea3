"""`behave`: every score against a slow forward of one example, identities, batches, resuming, bad input."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal
from tokenizers.processors import TemplateProcessing

from dissect.behaviour import run as behaviour
from dissect.behaviour.result import AGAINST_BASE, CHANGES, BehaviourResult, load_behave
from dissect.behaviour.rows import is_answer
from dissect.behaviour.run import behave
from dissect.models.model import Model
from dissect.models.pair import ModelPair
from dissect.prompts.loading import load_prompts
from dissect.prompts.prompts import Prompts
from tests.dissect.helpers import RECORDS, build_model, build_pair, build_prompts, build_tokenizer, save_records
from unlearning.common.errors import InputError
from unlearning.common.terminal import plain
from unlearning.data.concept_vectors import cut_continuation
from unlearning.evaluation.generation import greedy_answers

OTHERS = [
    {"prompt": "Question: Where was Dan Hill born?\nAnswer:", "answer": "Quito", "group": "Dan", "id": "d0"},
    {"prompt": "Where was Eve", "answer": "in Accra by the sea", "group": "Eve", "id": "e0"},
    {"prompt": "Dan", "answer": "Delhi", "group": "Dan", "id": "d1"},
]
TEXTS = [
    {"prompt": "Ada Brook was born in", "answer": "Oslo and went to Lima", "id": "t0"},
    {"prompt": "Cleo", "answer": "Stone was born", "id": "t1"},
]
TOKENS = 6
NUMBERS = ["bleu", "rouge_l", "exact_match", "logprob", "logprob_base", "perplexity", "perplexity_base", "kl"]


def build_others(folder: Path, records: list[dict[str, Any]] = OTHERS, name: str = "others.json") -> Prompts:
    return load_prompts(save_records(folder / name, records), build_tokenizer())


def run(pair: ModelPair, folder: Path, **options: Any) -> BehaviourResult:
    given = {"max_new_tokens": TOKENS, "progress": False, **options}
    texts = build_others(folder, TEXTS, "texts.json")
    return behave(pair, build_prompts(folder), build_others(folder), completions=texts, **given)


def value(frame: pd.DataFrame, column: str, **where: str) -> float:
    for name, wanted in where.items():
        frame = frame[frame[name] == wanted]
    (found,) = frame[column]
    return float(found)


@torch.no_grad()
def slow_logprobs(model: Model, prompt: str, answer: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (float64) that predict the answer's tokens, from one unpadded forward, and those tokens."""
    tokenizer = model.tokenizer
    before, ids = tokenizer(prompt)["input_ids"], tokenizer(f"{prompt} {answer}")["input_ids"]
    start = len(before)
    assert ids[:start] == before
    logits = model.hf(torch.tensor([ids])).logits[0, start - 1 : -1].double()
    return logits.log_softmax(-1), torch.tensor(ids[start:])


@pytest.mark.parametrize("family", ["llama", "neox"])
def test_scores_are_those_of_one_slow_forward_per_example(family: str, tmp_path: Path) -> None:
    pair = build_pair(family, scale=0.1)
    frame = run(pair, tmp_path, batch_size=3).frame
    assert list(frame["set"]) == ["forget"] * 5 + ["retain"] * 3 + ["completion"] * 2
    assert list(frame["example"]) == [record["id"] for record in (*RECORDS, *OTHERS, *TEXTS)]
    for _, row in frame.iterrows():
        base, tokens = slow_logprobs(pair.base, row["prompt"], row["answer"])
        ours, _ = slow_logprobs(pair.unlearned, row["prompt"], row["answer"])
        place = torch.arange(len(tokens))
        assert row["n_answer_tokens"] == len(tokens)
        for suffix, logprobs in (("_base", base), ("", ours)):
            chosen = logprobs[place, tokens]
            assert row[f"logprob{suffix}"] == pytest.approx(float(chosen.mean()), abs=1e-5)
            geometric = float(chosen.exp().prod() ** (1 / len(tokens)))
            assert row[f"probability{suffix}"] == pytest.approx(geometric, rel=1e-5)
            assert row[f"perplexity{suffix}"] == pytest.approx(1 / geometric, rel=1e-5)
        kl = float((base.exp() * (base - ours)).sum(-1).mean())
        assert row["kl"] == pytest.approx(kl, abs=1e-5)
        assert row["kl"] > 1e-3


def test_generations_are_transformers_own_greedy_ones(tmp_path: Path) -> None:
    pair = build_pair("llama", scale=0.1)
    frame = run(pair, tmp_path, batch_size=4).frame
    for _, row in frame.iterrows():
        for column, model in (("text_base", pair.base), ("text", pair.unlearned)):
            ids = torch.tensor([model.tokenizer(row["prompt"])["input_ids"]])
            generate: Any = model.hf.generate
            said = generate(ids, do_sample=False, max_new_tokens=TOKENS, attention_mask=torch.ones_like(ids))
            expected = model.tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True).strip()
            assert row[column] == expected
    assert (frame["text"] != frame["text_base"]).any()


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "bloom", "opt", "gemma2", "mixtral"])
def test_batches_with_left_padding_give_what_single_examples_give(family: str, tmp_path: Path) -> None:
    pair = build_pair(family, scale=0.1)
    alone, together = (run(pair, tmp_path, batch_size=size).frame for size in (1, 16))
    assert list(alone["text"]) == list(together["text"])
    assert list(alone["text_base"]) == list(together["text_base"])
    for name in NUMBERS:
        np.testing.assert_allclose(alone[name], together[name], rtol=2e-5, atol=2e-6)


def test_identical_models_are_alike_in_everything(tmp_path: Path) -> None:
    model = build_pair("llama").base
    result = run(ModelPair(model, model), tmp_path)
    frame = result.frame
    assert (frame["bleu"] == 1).all()
    assert (frame["rouge_l"] == 1).all()
    assert (frame["kl"] == 0).all()
    for score in ("logprob", "probability", "perplexity"):
        assert (frame[score] == frame[f"{score}_base"]).all()
    contrasts = result.contrasts()
    assert set(contrasts["metric"]) == {*AGAINST_BASE, *CHANGES}
    for column in ("difference", "difference_low", "difference_high", "cliffs_delta"):
        assert (contrasts[column] == 0).all()


def test_models_that_say_nothing_do_not_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A collapsed pair is not a perfect match: its scores are 0, and the share of empty texts says why."""
    pair = build_pair("llama", scale=0.1)
    places = {record["prompt"]: place for place, record in enumerate(RECORDS)}
    base, unlearned = ["", "Oslo", "", "?", " "], ["", "", "Oslo", "!", "\n"]

    def answers(model: Any, _tokenizer: Any, prompts: list[str], **_options: Any) -> list[str]:
        said = base if model is pair.base.hf else unlearned
        return [said[places[prompt]] if prompt in places else "Lima" for prompt in prompts]

    monkeypatch.setattr("dissect.behaviour.rows.greedy_answers", answers)
    result = run(pair, tmp_path, batch_size=16)
    forget = result.frame[result.frame["set"] == "forget"]
    assert len(forget) == 5
    assert forget["bleu"].tolist() == [0] * 5
    assert forget["rouge_l"].fillna(-1).tolist() == [0, 0, 0, -1, 0]  # "?" has no word to count
    assert (forget["exact_match"] == 0).all() and (forget["exact_match_base"] <= forget["text_base"].str.len()).all()
    means = result.means()
    for model in ("base", "unlearned"):
        assert value(means, "value", set="forget", model=model, metric="empty") == pytest.approx(3 / 5)
    assert value(means, "value", set="forget", model="unlearned", metric="rouge_l") == 0


def test_exact_match_asks_both_models_and_only_where_answers_are_true(tmp_path: Path) -> None:
    pair = build_pair("llama", scale=0.2)
    said = run(pair, tmp_path).frame
    # Give every question the base's own words as answer: the base is right wherever those are an answer.
    records = [
        {"prompt": row["prompt"], "answer": row["text_base"], "id": row["example"]}
        for _, row in said[said["set"] == "forget"].iterrows()
    ]
    prompts = build_others(tmp_path, records, "own.json")
    options: dict[str, Any] = {"max_new_tokens": TOKENS, "progress": False}
    asked = behave(pair, prompts, build_others(tmp_path), **options).frame
    forget = asked[asked["set"] == "forget"]
    assert (forget["exact_match_base"] == 1).all()
    expected = [float(text == base) for text, base in zip(forget["text"], forget["text_base"], strict=True)]
    assert list(forget["exact_match"]) == expected
    assert 0 in expected
    silent = behave(pair, prompts, build_others(tmp_path), true_answers=["retain"], **options)
    assert silent.frame.loc[silent.frame["set"] == "forget", ["exact_match", "exact_match_base"]].isna().all(None)
    assert silent.frame.loc[silent.frame["set"] == "retain", "exact_match"].notna().all()
    assert said.loc[said["set"] == "completion", "exact_match"].isna().all()


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("Oslo", True),
        (" Oslo \nQuestion: Who?", True),
        ("Oslo Question: Who?", True),
        ("Oslo, I think", False),
        ("oslo", False),
    ],
)
def test_running_on_does_not_make_an_answer_wrong(text: str, right: bool) -> None:
    assert is_answer(text, "Oslo") is right


def test_control_goes_through_the_same_and_identical_to_the_unlearned_scores_the_same(tmp_path: Path) -> None:
    pair = build_pair("llama", scale=0.1)
    frame = run(pair, tmp_path, control=pair.unlearned).frame
    ours, control = (frame[frame["target"] == name].reset_index(drop=True) for name in ("unlearned", "control"))
    assert_frame_equal(ours.drop(columns="target"), control.drop(columns="target"))
    base_as_control = run(pair, tmp_path, control=pair.base)
    frame = base_as_control.frame
    assert (frame.loc[frame["target"] == "control", "kl"] == 0).all()
    beyond, means = base_as_control.beyond_control(), base_as_control.means()
    for name in base_as_control.sets:
        excess = value(beyond, "difference", set=name, metric="kl")
        assert excess == pytest.approx(value(means, "value", set=name, model="unlearned", metric="kl"), abs=1e-12)
        lost = value(beyond, "difference", set=name, metric="logprob")
        change = value(means, "value", set=name, model="unlearned", metric="logprob_change")
        assert lost == pytest.approx(change, abs=1e-12)
    assert run(pair, tmp_path).beyond_control().empty


def test_means_are_the_frame_s_and_perplexity_is_the_whole_set_s(tmp_path: Path) -> None:
    result = run(build_pair("llama", scale=0.1), tmp_path)
    means = result.means()
    for name, cell in result.frame.groupby("set"):
        for metric in AGAINST_BASE:
            found = value(means, "value", set=str(name), model="unlearned", metric=metric)
            assert found == pytest.approx(cell[metric].mean(), abs=1e-12)
        for model, column in (("base", "logprob_base"), ("unlearned", "logprob")):
            loss = -(cell[column] * cell["n_answer_tokens"]).sum() / cell["n_answer_tokens"].sum()
            found = value(means, "value", set=str(name), model=model, metric="perplexity")
            assert found == pytest.approx(np.exp(loss), rel=1e-12)
    numbers = means.dropna()
    assert ((numbers["low"] <= numbers["value"] + 1e-12) & (numbers["value"] <= numbers["high"] + 1e-12)).all()


def test_contrast_is_forget_minus_retain(tmp_path: Path) -> None:
    result = run(build_pair("llama", scale=0.1), tmp_path)
    frame, contrasts = result.frame, result.contrasts()
    frame["logprob_change"] = frame["logprob"] - frame["logprob_base"]
    for metric in ("kl", "logprob_change"):
        means = frame.groupby("set")[metric].mean()
        found = value(contrasts, "difference", metric=metric)
        assert found == pytest.approx(means["forget"] - means["retain"], abs=1e-12)
    assert set(contrasts["pairing"]) == {"none"}


def test_sets_with_the_same_ids_are_paired_but_not_by_mere_numbers(tmp_path: Path) -> None:
    pair = build_pair("llama", scale=0.1)
    options: dict[str, Any] = {"max_new_tokens": 2, "progress": False}
    named = [{**other, "id": record["id"]} for other, record in zip(OTHERS, RECORDS[:3], strict=True)]
    prompts = build_prompts(tmp_path, RECORDS[:3])
    paired = behave(pair, prompts, build_others(tmp_path, named), **options)
    assert set(paired.contrasts()["pairing"]) == {"ids"}
    numbered = [
        [{key: record[key] for key in ("prompt", "answer")} for record in records] for records in (RECORDS[:3], OTHERS)
    ]
    loose = behave(pair, build_prompts(tmp_path, numbered[0]), build_others(tmp_path, numbered[1]), **options)
    assert list(loose.frame["example"]) == ["0", "1", "2"] * 2
    assert set(loose.contrasts()["pairing"]) == {"none"}


def test_several_retain_sets_stand_beside_each_other(tmp_path: Path) -> None:
    pair = build_pair("llama", scale=0.1)
    sets = {"retain": build_others(tmp_path), "general": build_others(tmp_path, TEXTS, "general.json")}
    result = behave(pair, build_prompts(tmp_path), sets, max_new_tokens=2, progress=False)
    assert result.sets == ["forget", "retain", "general"]
    assert list(result.contrasts()["set"].unique()) == ["retain", "general"]


def test_killed_run_goes_on_where_it_stopped_with_another_batch_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = build_pair("llama", scale=0.1)
    whole = run(pair, tmp_path, out=tmp_path / "whole")
    real, calls = behaviour.example_rows, []

    def dies(*arguments: Any, **options: Any) -> Any:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(arguments)
        return real(*arguments, **options)

    monkeypatch.setattr(behaviour, "example_rows", dies)
    with pytest.raises(KeyboardInterrupt):
        run(pair, tmp_path, out=tmp_path / "run", batch_size=2)
    done = {index for call in calls for index in call[2]}
    assert len(done) == 4

    def counts(*arguments: Any, **options: Any) -> Any:
        assert options["set_name"] != "forget" or not done & set(arguments[2])
        return real(*arguments, **options)

    monkeypatch.setattr(behaviour, "example_rows", counts)
    resumed = run(pair, tmp_path, out=tmp_path / "run", batch_size=3)
    assert_frame_equal(resumed.frame, whole.frame, rtol=1e-4, atol=1e-6)
    assert not (tmp_path / "run" / "parts").exists()


def test_finished_run_is_read_back_and_another_configuration_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = build_pair("llama", scale=0.1)
    first = run(pair, tmp_path, out=tmp_path / "run")
    monkeypatch.setattr(behaviour, "example_rows", None)
    again = run(pair, tmp_path, out=tmp_path / "run")
    assert_frame_equal(again.frame, first.frame)
    assert plain(again.summary()) == plain(first.summary())
    with pytest.raises(InputError, match="its max new tokens is 6, not 7"):
        run(pair, tmp_path, out=tmp_path / "run", max_new_tokens=7)


def test_saved_result_loads_with_its_figures(tmp_path: Path) -> None:
    result = run(build_pair("llama", scale=0.1), tmp_path)
    path = result.save(tmp_path / "run")
    loaded = load_behave(path)
    assert_frame_equal(loaded.frame, result.frame)
    assert_frame_equal(loaded.means(), result.means())
    summary = json.loads((path / "summary.json").read_text())
    assert summary["configuration"]["command"] == "behave"
    assert len(summary["means"]) == len(result.means())
    exported = loaded.save_figures(path)
    assert {file.name for file in exported.paths} >= {"behaviour.html", "behaviour.csv"}
    assert all(file.stat().st_size > 100 for file in exported.paths)


def test_figure_shows_every_mean(tmp_path: Path) -> None:
    result = run(build_pair("llama", scale=0.1), tmp_path)
    shown = sorted(y for trace in result.figure().data for y in trace.y)
    means = result.means()
    wanted = means[~means["metric"].isin((*CHANGES, "empty"))]["value"].dropna()
    assert shown == pytest.approx(sorted(wanted), abs=1e-12)


def test_retain_prompts_that_are_forget_prompts_are_refused_or_left_out(tmp_path: Path) -> None:
    pair, forget = build_pair("llama"), build_prompts(tmp_path)
    options: dict[str, Any] = {"max_new_tokens": 1, "progress": False}
    with pytest.raises(InputError, match="`retain`.*all 5"):
        behave(pair, forget, forget, **options)
    mixed = build_others(tmp_path, [*OTHERS, RECORDS[0]])
    with pytest.warns(UserWarning, match="1 of the 4 retain prompts"):
        frame = behave(pair, forget, mixed, **options).frame
    assert list(frame.loc[frame["set"] == "retain", "example"]) == ["d0", "e0", "d1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed.*-1"),
        ({"batch_size": 0}, "batch_size.*0"),
        ({"max_new_tokens": 0}, "max_new_tokens.*0"),
        ({"true_answers": ["other"]}, "true_answers.*'other'"),
    ],
)
def test_bad_options_are_refused_in_one_line(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as told:
        run(build_pair("llama"), tmp_path, **options)
    assert "\n" not in str(told.value)


def test_retain_set_may_not_take_another_set_s_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="`retain`.*forget"):
        behave(build_pair("llama"), build_prompts(tmp_path), {"forget": build_others(tmp_path)})


def test_notebook_scoring_and_prompts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    pair = build_pair("llama")
    forget, others = build_prompts(tmp_path), build_others(tmp_path)
    with pytest.raises(InputError, match="scoring.*retain.*notebook"):
        behave(pair, forget, replace(others, scoring="notebook"))
    short = Model.wrap(build_model("llama", context=8), build_tokenizer(), name="short")
    with pytest.raises(InputError, match="forget prompt a0 has .* tokens with its answer, and the context of short"):
        behave(ModelPair(short, short), forget, others)


def test_logits_that_are_not_finite_are_told_of(tmp_path: Path) -> None:
    pair = build_pair("llama")
    with torch.no_grad():
        pair.unlearned.hf.get_output_embeddings().weight[3] = torch.inf
    with pytest.raises(InputError, match="unlearned.*logits.*not finite"):
        run(pair, tmp_path)


def test_coefficients_stand_beside_behaviour_and_selectivity_is_their_ratio(tmp_path: Path) -> None:
    pair = build_pair("llama", scale=0.1)
    result = run(pair, tmp_path, out=tmp_path / "run")
    for name, prompts in (("forget", build_prompts(tmp_path)), ("retain", build_others(tmp_path))):
        cell = result.coefficients[result.coefficients["set"] == name]
        assert len(cell) == len(prompts) * 3
        for item, (_, rows) in zip(prompts.items, cell.groupby("example_index"), strict=True):
            base, ours = (slow_coefficients(model, item.input_ids) for model in (pair.base, pair.unlearned))
            answers = slice(item.scored.start, item.scored.stop)
            change = (ours - base)[:, answers].norm(dim=-1) / base[:, answers].norm(dim=-1)
            np.testing.assert_allclose(rows["relative_change"], change.mean(-1), rtol=1e-4)
    last = result.coefficients[result.coefficients["layer"] == 2].groupby("set")["relative_change"].mean()
    (told,) = json.loads((tmp_path / "run" / "summary.json").read_text())["selectivity_last_layer"]
    assert told["layer"] == 2
    assert told["selectivity"] == pytest.approx(last["forget"] / last["retain"], rel=1e-9)
    assert told["selectivity_low"] <= told["selectivity"] <= told["selectivity_high"]
    loaded = load_behave(tmp_path / "run")
    assert_frame_equal(loaded.coefficients, result.coefficients)
    (line,) = loaded.coefficient_figure().select_traces({"name": "forget"})
    forget = result.coefficient_curve().query("set == 'forget'")
    assert list(line.y) == pytest.approx(list(forget["value"]))


@torch.no_grad()
def slow_coefficients(model: Model, input_ids: tuple[int, ...]) -> torch.Tensor:
    """What goes into each down projection of a Llama [layer, position, d_mlp], float64, from one unpadded forward."""
    kept: list[torch.Tensor] = []
    hooks = [
        block.mlp.down_proj.register_forward_pre_hook(lambda _module, args: kept.append(args[0][0].double()))
        for block in model.hf.model.layers
    ]
    try:
        model.hf(torch.tensor([input_ids]))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(kept)


def test_mixture_of_experts_has_behaviour_and_no_coefficients(tmp_path: Path) -> None:
    result = run(build_pair("mixtral", scale=0.1), tmp_path, out=tmp_path / "run")
    assert len(result.frame) == 10
    assert result.coefficient_curve().empty
    assert result.selectivity().empty
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["selectivity_last_layer"] == []
    names = {path.name for path in load_behave(tmp_path / "run").save_figures(tmp_path / "run").paths}
    assert names == {"behaviour.html", "behaviour.csv"}


def test_coefficients_of_identical_models_did_not_move(tmp_path: Path) -> None:
    model = build_pair("llama").base
    result = run(ModelPair(model, model), tmp_path)
    assert (result.coefficient_curve()["value"] == 0).all()
    assert result.selectivity()["selectivity"].isna().all()


def test_run_of_another_command_is_refused(tmp_path: Path) -> None:
    result = run(build_pair("llama"), tmp_path)
    path = result.save(tmp_path / "run")
    record = json.loads((path / "run.json").read_text())
    record["configuration"]["command"] = "patch"
    (path / "run.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="a run of `dissect patch`, not of `dissect behave`"):
        load_behave(path)


@pytest.mark.parametrize("chat", [False, True])
def test_prompts_are_said_with_the_special_tokens_that_they_were_scored_with(tmp_path: Path, chat: bool) -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}Question: {{ m['content'] }}{% endfor %} Answer:"
    pair = build_pair("llama", scale=0.1, tokenizer=tokenizer)
    records = [{"question": "Where was Ada born?", "answer": "Oslo"}, {"question": "Who is Ben?", "answer": "Hill"}]
    path = save_records(tmp_path / "chat.json", records)
    prompts = load_prompts(path, tokenizer, chat=chat)
    frame = behave(pair, prompts, build_others(tmp_path), max_new_tokens=TOKENS, progress=False).frame
    for item, said in zip(prompts.items, frame["text_base"], strict=False):
        assert item.input_ids.count(tokenizer.bos_token_id) == 1
        ids = torch.tensor([item.input_ids[: item.answer_start]])
        generate: Any = pair.base.hf.generate
        expected = generate(ids, do_sample=False, max_new_tokens=TOKENS, attention_mask=torch.ones_like(ids))
        assert said == tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_streamed_models_are_refused_with_what_helps(tmp_path: Path) -> None:
    pair = build_pair("llama")
    streamed: Any = replace(pair.unlearned, streamed=object())
    with pytest.raises(InputError, match="unlearned is streamed from disk.*`stream`"):
        run(ModelPair(pair.base, streamed), tmp_path)


def test_runs_of_earlier_versions_load_with_today_s_names(tmp_path: Path) -> None:
    result = run(build_pair("llama"), tmp_path, out=tmp_path / "run")
    for name in ("results", "coefficients"):
        file = tmp_path / "run" / f"{name}.parquet"
        pd.read_parquet(file).replace({"set": {"retain": "unrelated"}}).to_parquet(file)
    record = tmp_path / "run" / "run.json"
    record.write_text(re.sub('"retain(_sha256|_sets|)"', r'"unrelated\1"', record.read_text()))
    loaded = load_behave(tmp_path / "run")
    assert (loaded.configuration, loaded.provenance) == (result.configuration, result.provenance)
    assert plain(loaded.summary()) == plain(result.summary() | {"configuration": loaded.configuration})


def test_the_end_of_a_turn_ends_what_both_packages_generate(tmp_path: Path) -> None:
    """As a chat's turn, and not by the end-of-sequence token: generation configurations often lack the turn's."""
    tokenizer = build_tokenizer()
    pair = build_pair("llama", scale=0.1, tokenizer=tokenizer)
    prompt = "[user] Who is Ben?[assistant]"
    free = greedy_answers(pair.base.hf, tokenizer, [prompt], max_new_tokens=TOKENS)[0]
    end = free[len(free) // 2 :][:3]
    assert end.strip() and free.index(end) > 0
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% if m.role == 'assistant' %}"
        f"{end}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    path = save_records(tmp_path / "chat.json", [{"question": "Who is Ben?", "answer": "Hill"}])
    prompts = load_prompts(path, tokenizer, chat=True)
    assert prompts.items[0].prompt == prompt and prompts.chat is not None and prompts.chat.turn_end == end.rstrip()
    frame = behave(pair, prompts, build_others(tmp_path), max_new_tokens=TOKENS, progress=False).frame
    said = frame[frame["set"] == "forget"]["text_base"].iloc[0]
    assert said == free.split(end.strip())[0].strip()
    own = load_prompts(path, tokenizer, chat=True, answers="base", answers_from=pair.base, max_new_tokens=TOKENS)
    assert own.items[0].answer == cut_continuation(said)
