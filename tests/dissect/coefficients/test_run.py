"""`probe` as a whole: its tables say what was done by hand, runs resume and load, and bad input is one line."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from dissect.coefficients import edits as coefficient_edits
from dissect.coefficients.concept_vectors import Concept
from dissect.coefficients.result import NO_CHANGE, ProbeResult, load_probe
from dissect.coefficients.run import probe
from dissect.models.model import Model
from dissect.models.pair import ModelPair
from dissect.prompts.loading import load_prompts
from dissect.prompts.prompts import Prompts
from dissect.scoring.rows import NO_DIFFERENCE
from tests.dissect.coefficients.test_edits import one_batch, reference_krs
from tests.dissect.coefficients.test_neurons import SCALED, hand_scaled_pair
from tests.dissect.helpers import (
    assert_close,
    build_model,
    build_pair,
    build_prompts,
    build_tokenizer,
    save_records,
    torch_state,
)
from unlearning.common.errors import InputError
from unlearning.common.terminal import plain

RETAIN = [
    {"prompt": "Question: Where is Lima?\nAnswer:", "answer": "in Peru", "group": "Lima", "id": "l0"},
    {"prompt": "Where is Oslo", "answer": "in Norway", "group": "Oslo", "id": "o0"},
    {"prompt": "Answer: Delhi", "answer": "is in India", "group": "Delhi", "id": "d0"},
]


def retain_prompts(folder: Path) -> Prompts:
    folder = folder / "retain"
    folder.mkdir(exist_ok=True)
    return load_prompts(save_records(folder / "prompts.json", RETAIN), build_tokenizer())


def run_probe(pair: ModelPair, folder: Path, **options: Any) -> ProbeResult:
    defaults: dict[str, Any] = {
        "retain": retain_prompts(folder),
        "control": Model.wrap(build_model("llama", seed=5), build_tokenizer(), name="never"),
        "last_layers": 2,
        "top": 8,
        "draws": 2,
        "progress": False,
    }
    return probe(pair, build_prompts(folder), **defaults | options)


def at(frame: pd.DataFrame, column: str, **where: object) -> float:
    """The one number of a table in that column where others have these values."""
    for name, value in where.items():
        frame = frame[frame[name] == value]
    return float(frame[column].item())


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> ProbeResult:
    """A probe of a pair that differs everywhere."""
    return run_probe(build_pair("llama"), tmp_path_factory.mktemp("probe"))


def test_hand_scaled_neurons_are_listed_in_order_and_alone(tmp_path: Path) -> None:
    probed = run_probe(hand_scaled_pair(tmp_path), tmp_path)
    table = probed.neurons
    assert list(zip(table["layer"], table["neuron"], strict=True)) == [(2, neuron) for neuron in SCALED]
    assert list(table["rank"]) == [1, 2, 3, 4, 5]
    assert_close(table["score"].to_numpy(), np.array(list(SCALED.values())), atol=1e-4)
    assert_close(table["change"].to_numpy() * table["value_norm"].to_numpy(), table["score"].to_numpy(), atol=1e-9)
    assert sorted(table["change_rank"]) == [1, 2, 3, 4, 5]
    assert all(len(tokens) == 10 for column in ("promotes", "demotes") for tokens in table[column])
    half = probed.half()
    assert at(half, "k_half", target="unlearned", selection="top") <= 4
    assert_close(at(half, "krs_all", target="unlearned", selection="top"), 1, atol=1e-6)
    assert np.isnan(at(half, "k_half", target="unlearned", selection="matched"))  # none of them was changed
    assert_close(at(probed.contrasts(), "difference", against="matched", k=8), 1, atol=1e-6)
    # Everything that changed is in the last layer; the control differs everywhere.
    shares = probed.shares()
    ours = shares[(shares["target"] == "unlearned") & (shares["prompts"] == "forget")]
    assert_close(ours["share"].to_numpy(), np.ones(3), atol=0)
    assert at(shares, "share", target="control", prompts="forget", last_layers=1) < 0.99


def test_ends_of_the_curves_are_the_patches_of_the_reference_engine(tmp_path: Path) -> None:
    pair, prompts = build_pair("llama"), build_prompts(tmp_path)
    probed = run_probe(pair, tmp_path)
    batch = one_batch(prompts)
    curve = probed.curve()
    whole = curve[(curve["target"] == "unlearned") & (curve["k"] == 144)]["krs"].item()
    assert_close(whole, reference_krs(pair, batch, range(3)).mean().item(), atol=1e-5)
    scaling = probed.scaling()
    where = {"target": "unlearned", "prompts": "forget"}
    assert at(scaling, "krs", factor=0, **where) == at(scaling, "kl_own", factor=0, **where) == 0
    for factor in (1, 2):
        expected = reference_krs(pair, batch, [1, 2], factor).mean().item()
        assert_close(at(scaling, "krs", factor=factor, **where), expected, atol=1e-5)


def test_frame_holds_every_intervention(result: ProbeResult) -> None:
    frame = result.frame
    ks = [1, 2, 4, 8, 16, 32, 64, 128, 144]
    neurons = frame[(frame["intervention"] == "neurons") & (frame["target"] == "control")]
    assert set(frame["target"]) == {"unlearned", "control"}
    assert set(neurons["prompts"]) == {"forget"}
    assert sorted(neurons.loc[neurons["selection"] == "top", "k"].unique()) == ks
    assert sorted(neurons.loc[neurons["selection"] == "random", "k"].unique()) == ks[:-1]
    assert (neurons[neurons["selection"] == "random"].groupby(["k", "example_index"]).size() == 2).all()
    scaled = frame[frame["intervention"] == "scaling"]
    assert set(scaled["selection"]) == {"layers 1-2"}
    assert set(scaled["k"]) == {96}
    assert sorted(scaled["factor"].unique()) == [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2]
    ours = scaled[scaled["target"] == "unlearned"]
    assert dict(ours["prompts"].value_counts()) == {"forget": 5 * 9, "retain": 3 * 9}


def test_statistics_are_means_over_examples_of_means_over_draws(result: ProbeResult) -> None:
    frame, curve = result.frame, result.curve()
    ours = frame[(frame["selection"] == "random") & (frame["k"] == 8) & (frame["target"] == "unlearned")]
    found = curve[(curve["selection"] == "random") & (curve["k"] == 8) & (curve["target"] == "unlearned")].iloc[0]
    per_example = ours.groupby("example_index")["krs"].mean()
    assert_close(found["krs"], per_example.mean(), atol=1e-12)
    assert found["krs_low"] <= found["krs"] <= found["krs_high"]
    assert (found["draws"], found["n"], found["share"]) == (2, 5, 8 / 144)
    top = frame[(frame["selection"] == "top") & (frame["k"] == 8) & (frame["target"] == "unlearned")]
    gap = at(result.contrasts(), "difference", against="random", k=8)
    assert_close(gap, top["krs"].mean() - per_example.mean(), atol=1e-12)
    never = frame[(frame["selection"] == "top") & (frame["k"] == 8) & (frame["target"] == "control")]
    gap = at(result.contrasts(), "difference", against="control", k=8)
    assert_close(gap, top["krs"].mean() - never["krs"].mean(), atol=1e-12)


def test_selectivity_is_the_ratio_of_the_means(result: ProbeResult) -> None:
    table, curve = result.selectivity(), result.layer_curve()
    means = curve.set_index(["target", "prompts", "layer"])["relative_change"]
    assert len(table) == 6
    for _, row in table.iterrows():
        expected = means[row["target"], "forget", row["layer"]] / means[row["target"], "retain", row["layer"]]
        assert_close(row["selectivity"], expected, atol=1e-12)
        assert row["selectivity_low"] < row["selectivity"] < row["selectivity_high"]


def test_half_is_the_first_k_that_reaches_half(result: ProbeResult) -> None:
    curve = result.curve()
    line = curve[(curve["target"] == "unlearned") & (curve["selection"] == "top")].set_index("k")["krs"]
    half, where = result.half(), {"target": "unlearned", "selection": "top"}
    assert at(half, "krs_all", **where) == line[144]
    first = min(k for k in line.index if line[k] >= line[144] / 2)
    assert at(half, "k_half", **where) == first
    assert at(half, "share", **where) == first / 144
    assert at(half, "krs_half", **where) == line[first]


def test_half_is_worked_out_by_hand(result: ProbeResult, monkeypatch: pytest.MonkeyPatch) -> None:
    ks, top = [1, 2, 144], {"unlearned": [0.2, 0.3, 0.5], "control": [-0.1, -0.3, -0.2]}
    table = pd.concat(
        pd.DataFrame({"target": target, "selection": "top", "k": ks, "share": np.array(ks) / 144, "krs": krs})
        for target, krs in top.items()
    )
    monkeypatch.setattr(ProbeResult, "curve", lambda _self: table)
    half = result.half()
    where = {"target": "unlearned", "selection": "top"}
    assert (at(half, "k_half", **where), at(half, "krs_half", **where), at(half, "krs_all", **where)) == (2, 0.3, 0.5)
    assert np.isnan(at(half, "k_half", target="unlearned", selection="random"))
    assert np.isnan(at(half, "k_half", target="control", selection="top"))  # nothing comes back there


def test_beyond_control_is_where_every_larger_k_is_above(monkeypatch: pytest.MonkeyPatch) -> None:
    def beyond(lows: list[float], against: str = "control") -> int | None:
        table = pd.DataFrame({"k": [1, 2, 4, 8], "against": against, "difference_low": lows})
        monkeypatch.setattr(ProbeResult, "contrasts", lambda _self: table)
        empty = pd.DataFrame()
        tables = dict.fromkeys(("frame", "layers", "neurons", "concepts"), empty)
        made = ProbeResult(**tables, configuration={}, provenance={}, wall_time_s=0.0, measured={})
        return made.beyond_control()

    assert beyond([0.1, -0.1, 0.1, 0.2]) == 4
    assert beyond([0.1, 0.1, 0.1, 0.2]) == 1
    assert beyond([0.1, 0.1, 0.1, -0.2]) is None
    assert beyond([0.1, 0.1, 0.1, np.nan]) is None
    assert beyond([0.1, 0.1, 0.1, 0.2], against="random") is None


def test_identical_models_say_why_there_is_nothing(tmp_path: Path) -> None:
    base = Model.wrap(build_model("llama"), build_tokenizer(), name="base")
    probed = run_probe(ModelPair(base, base), tmp_path, control=None, draws=1)
    assert probed.neurons.empty
    assert probed.summary()["no_neurons"] == NO_CHANGE
    assert probed.curve()["krs"].isna().all()
    assert probed.half()["k_half"].isna().all()
    assert probed.shares()["share"].isna().all()
    assert probed.selectivity()["selectivity"].isna().all()
    assert set(probed.undefined()["undefined"]) == {NO_DIFFERENCE}
    assert list(probed.undefined()["examples"]) == [5, 3]
    json.dumps(probed.summary())
    probed.figure()
    probed.layers_figure()
    probed.scaling_figure()


def test_run_is_written_loaded_and_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, out = build_pair("llama"), tmp_path / "run"
    concepts = [Concept("x", 1, 7)]
    probed = run_probe(pair, tmp_path, out=out, concepts=concepts)
    files = {path.name for path in out.iterdir()}
    assert files == {
        "run.json",
        "results.parquet",
        "summary.json",
        "layers.parquet",
        "neurons.parquet",
        "concepts.parquet",
    }
    loaded = load_probe(out)
    for name in ("frame", "layers", "neurons", "concepts"):
        ours, theirs = getattr(probed, name), getattr(loaded, name)
        pd.testing.assert_frame_equal(ours, theirs, check_dtype=False)
    monkeypatch.setattr(coefficient_edits, "edited_logits", None)  # nothing is computed again
    again = run_probe(pair, tmp_path, out=out, concepts=concepts)
    assert plain(again.summary()) == plain(loaded.summary())  # null for NaN, which equals nothing
    assert json.loads((out / "summary.json").read_text())["concepts"][0]["concept"] == "x"
    old = probed.concepts.drop(columns="jaccard_unembed").rename(columns={"jaccard_norm_unembed": "jaccard"})
    old.to_parquet(out / "concepts.parquet")  # as earlier versions wrote it
    reread = load_probe(out).concepts
    assert list(reread) == list(probed.concepts)
    assert list(reread["jaccard_norm_unembed"]) == list(probed.concepts["jaccard_norm_unembed"])
    assert reread["jaccard_unembed"].isna().all()
    exported = loaded.save_figures(out)
    names = {path.name for path in exported.paths}
    assert names == {f"{name}.{kind}" for name in ("neurons", "layers", "scaling") for kind in ("html", "csv")}
    with pytest.raises(InputError, match="its top is 8, not 3"):
        run_probe(pair, tmp_path, out=out, concepts=concepts, top=3)


def test_killed_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, out = build_pair("llama"), tmp_path / "run"
    whole = run_probe(pair, tmp_path, batch_size=2)
    done: list[Any] = []
    scale = coefficient_edits.scale_layers

    def stop(*arguments: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(arguments)
        return scale(*arguments)

    monkeypatch.setattr("dissect.coefficients.run.scale_layers", stop)
    with pytest.raises(KeyboardInterrupt):
        run_probe(pair, tmp_path, out=out, batch_size=2)
    kept = {path.stem for path in (out / "parts").iterdir()}
    assert kept == {
        f"{part}-forget-2-0000{n}" for part, n in (("neurons", 0), ("scaling", 0), ("neurons", 1), ("scaling", 1))
    } | {"neurons-forget-2-00002"}
    with pytest.raises(InputError, match="not finished"):
        load_probe(out)
    asked: list[str] = []

    def count(*arguments: Any) -> Any:
        asked.append("scaling")
        return scale(*arguments)

    monkeypatch.setattr("dissect.coefficients.run.scale_layers", count)
    resumed = run_probe(pair, tmp_path, out=out, batch_size=2)
    assert len(asked) == 5 - 2
    pd.testing.assert_frame_equal(resumed.frame, whole.frame)
    assert not (out / "parts").exists()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_no_table_depends_on_batches(batch_size: int, result: ProbeResult, tmp_path: Path) -> None:
    other = run_probe(build_pair("llama"), tmp_path, batch_size=batch_size)
    for name, scores in (("curve", "krs"), ("contrasts", "difference"), ("selectivity", "selectivity")):
        ours, theirs = (getattr(one, name)() for one in (other, result))
        assert_close(ours[scores].to_numpy(), theirs[scores].to_numpy(), atol=1e-4)
    assert list(other.neurons["neuron"]) == list(result.neurons["neuron"])


def test_models_are_left_as_they_were(tmp_path: Path) -> None:
    pair = build_pair("gpt2")
    before = torch_state(pair.base), torch_state(pair.unlearned)
    run_probe(pair, tmp_path, control=None, draws=1)
    assert (torch_state(pair.base), torch_state(pair.unlearned)) == before


def test_without_retain_prompts_nothing_is_said_of_damage(tmp_path: Path) -> None:
    probed = run_probe(build_pair("neox"), tmp_path, retain=None, control=None, draws=1)
    assert probed.sets == ["forget"]
    assert probed.selectivity().empty
    assert set(probed.scaling()["prompts"]) == {"forget"}
    probed.scaling_figure()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"last_layers": 4}, "last_layers.*3.*4"),
        ({"last_layers": 0}, "last_layers.*0"),
        ({"top": 145}, "top.*144.*145"),
        ({"draws": 0}, "draws.*0"),
        ({"seed": -1}, "seed.*-1"),
        ({"batch_size": 0}, "batch_size.*0"),
        ({"concepts": [Concept("Satan", 22, 3)]}, "Satan.*layer 22"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said) as refused:
        run_probe(build_pair("llama"), tmp_path, control=None, **options)
    assert "\n" not in str(refused.value)


def test_retain_prompts_that_are_the_forget_prompts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="`retain`.*forget prompts") as refused:
        run_probe(build_pair("llama"), tmp_path, retain=build_prompts(tmp_path), control=None)
    assert "\n" not in str(refused.value)


def test_mixture_of_experts_is_refused_by_name(tmp_path: Path) -> None:
    model = Model.wrap(build_model("mixtral"), build_tokenizer(), name="mixture")
    with pytest.raises(InputError, match=r"^mixture has no MLP coefficients"):
        run_probe(ModelPair(model, model), tmp_path)


def test_prompt_longer_than_the_context_is_refused(tmp_path: Path) -> None:
    prompts = retain_prompts(tmp_path)
    long = replace(prompts.items[0], input_ids=tuple([5] * 200))
    with pytest.raises(InputError, match="retain prompt l0 has 200 tokens"):
        run_probe(build_pair("llama"), tmp_path, retain=replace(prompts, items=(long,)), control=None)


def test_control_of_another_shape_is_refused(tmp_path: Path) -> None:
    control = Model.wrap(build_model("llama", n_layers=2), build_tokenizer(), name="short")
    with pytest.raises(InputError, match="base and short differ in layers: 3 and 2"):
        run_probe(build_pair("llama"), tmp_path, control=control)


def test_logits_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    pair = build_pair("llama", tied=False)
    with torch.no_grad():
        pair.unlearned.hf.get_submodule("lm_head").get_parameter("weight")[3] = torch.inf
    with pytest.raises(InputError, match="unlearned: .*logits.*not finite"):
        run_probe(pair, tmp_path, control=None)


def test_runs_of_earlier_versions_load_with_today_s_names(tmp_path: Path) -> None:
    result = run_probe(build_pair("llama"), tmp_path, out=tmp_path / "run")
    for name in ("results", "layers"):
        file = tmp_path / "run" / f"{name}.parquet"
        pd.read_parquet(file).replace({"prompts": {"retain": "unrelated"}}).to_parquet(file)
    record = tmp_path / "run" / "run.json"
    record.write_text(re.sub('"retain(_sha256|_sets|)"', r'"unrelated\1"', record.read_text()))
    loaded = load_probe(tmp_path / "run")
    assert (loaded.configuration, loaded.provenance) == (result.configuration, result.provenance)
    assert plain(loaded.summary()) == plain(result.summary() | {"configuration": loaded.configuration})
