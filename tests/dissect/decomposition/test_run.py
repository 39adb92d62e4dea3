"""The decomposition as users meet it: its tables, intervals, controls, runs on disk, figures, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal

import dissect.decomposition.run
from dissect import load_prompts
from dissect.decomposition.result import DecompositionResult, load_decompose
from dissect.decomposition.run import decompose, parse_decomposed
from dissect.decomposition.terms import EXACT, SITES, TERMS, affine
from dissect.models.model import Model
from dissect.models.pair import ModelPair
from dissect.prompts.prompts import Prompts
from dissect.scoring.recovery import LOSS_FLOOR
from tests.dissect.helpers import (
    RECORDS,
    assert_close,
    build_model,
    build_pair,
    build_prompts,
    build_tokenizer,
    change_weights,
    save_records,
)
from unlearning.common.errors import InputError

N_LAYERS = 3


@pytest.fixture
def prompts(tmp_path: Path) -> Prompts:
    return build_prompts(tmp_path)


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return build_pair("llama")


def build_control() -> Model:
    model = build_model("llama")
    change_weights(model, scale=0.05, seed=5)
    return Model.wrap(model, build_tokenizer(), name="control")


@pytest.fixture(scope="module")
def result(pair: ModelPair, tmp_path_factory: pytest.TempPathFactory) -> DecompositionResult:
    prompts = build_prompts(tmp_path_factory.mktemp("prompts"))
    return decompose(pair, prompts, control=build_control(), null=2, progress=False)


def test_one_row_per_arm_site_place_term_and_example(result: DecompositionResult) -> None:
    frame = result.frame
    assert result.arms == ["main", "control", "null-0", "null-1"]
    places = N_LAYERS + 1
    assert len(frame) == 4 * len(SITES) * places * len(TERMS) * len(RECORDS)
    keys = ["arm", "site", "first_layer", "last_layer", "term", "example"]
    assert not frame.duplicated(keys).any()
    assert dict(frame.groupby("arm")["target"].first()) == {
        "main": "unlearned",
        "control": "control",
        "null-0": "null",
        "null-1": "null",
    }
    first = frame[(frame["arm"] == "main") & (frame["site"] == "mlp_out") & (frame["term"] == "weight")]
    order = first.drop_duplicates(["first_layer", "last_layer"])[["first_layer", "last_layer"]].to_numpy().tolist()
    assert order == [[0, 0], [1, 1], [2, 2], [0, 2]]
    assert first["example"].tolist() == [record["id"] for record in RECORDS] * places


def test_numbers_of_an_example_are_means_over_its_positions(result: DecompositionResult) -> None:
    keys = ["arm", "site", "first_layer", "last_layer", "term", "example_index"]
    columns = ["norm", "base_norm", "share", "direct", "direct_centred"]
    means = result.positions.groupby(keys)[columns].mean()
    assert_close(result.frame.set_index(keys)[columns].sort_index().to_numpy(), means.to_numpy(), atol=1e-9)
    counts = result.positions.groupby(keys)["position"].agg(["size", "max"])
    assert (counts["size"] == counts["max"] + 1).all()
    by_key = result.frame.set_index(keys).sort_index()["n_answer_tokens"]
    assert (counts["size"] == by_key).all()


def test_positions_name_the_token_that_they_predict(result: DecompositionResult, prompts: Prompts) -> None:
    rows = result.positions
    rows = rows[(rows["arm"] == "main") & (rows["site"] == "mlp_out") & (rows["term"] == "weight")]
    rows = rows[(rows["first_layer"] == 0) & (rows["last_layer"] == 0)]
    answers = [token for item in prompts.items for token in item.input_ids[item.answer_start :]]
    assert rows["token"].tolist() == answers


def test_curve_means_are_those_of_the_table_with_intervals_around_them(result: DecompositionResult) -> None:
    curve = result.curve()
    keys = ["arm", "site", "first_layer", "last_layer", "term"]
    main = result.frame[result.frame["arm"] == "main"].groupby(keys)[["krs", "share", "direct", "direct_centred"]]
    ours = curve[curve["arm"] == "main"].set_index(keys).sort_index()
    for name in ("krs", "share", "direct", "direct_centred"):
        assert_close(ours[name].to_numpy(), main.mean()[name].to_numpy(), atol=1e-12)
        assert ((ours[f"{name}_low"] <= ours[name]) & (ours[name] <= ours[f"{name}_high"])).all()
    wide = curve.pivot(index=["arm", "site", "first_layer", "last_layer"], columns="term", values="share_pooled")
    assert_close(wide[list(EXACT)].sum(axis=1).to_numpy(), np.ones(len(wide)), atol=1e-12)
    assert (curve["n"] == len(RECORDS)).all() and (curve["n_undefined"] == 0).all()


def test_null_models_are_one_line_their_mean(result: DecompositionResult) -> None:
    curve, frame = result.curve(), result.frame
    assert list(curve["arm"].unique()) == ["main", "control", "null"]
    here = ["site", "first_layer", "last_layer", "term"]
    means = frame[frame["target"] == "null"].groupby(here)["krs"].mean()
    assert_close(curve[curve["arm"] == "null"].set_index(here).sort_index()["krs"].to_numpy(), means, atol=1e-12)
    single = frame[(frame["arm"] == "null-0") & (frame["term"] == "total")]["krs"].to_numpy()
    assert (
        np.abs(single - frame[(frame["arm"] == "null-1") & (frame["term"] == "total")]["krs"].to_numpy()).max() > 1e-3
    )


def test_contrast_is_the_paired_difference_to_each_other_arm(result: DecompositionResult) -> None:
    contrast, curve = result.contrast(), result.curve()
    here = ["site", "first_layer", "last_layer", "term"]
    assert set(contrast["against"]) == {"control", "null"}
    by_arm = {arm: rows.set_index(here).sort_index() for arm, rows in curve.groupby("arm")}
    for against, rows in contrast.groupby("against"):
        for name in ("krs", "share", "direct_centred"):
            expected = by_arm["main"][name] - by_arm[str(against)][name]
            found = rows.set_index(here).sort_index()
            assert_close(found[name].to_numpy(), expected.to_numpy(), atol=1e-12)
            assert ((found[f"{name}_low"] <= found[name]) & (found[name] <= found[f"{name}_high"])).all()


def test_a_decomposition_without_other_arms_has_no_contrast(pair: ModelPair, prompts: Prompts) -> None:
    alone = decompose(pair, prompts, sites="attn_out", control=None, progress=False)
    assert alone.arms == ["main"] and alone.contrast().empty
    assert set(alone.frame["site"]) == {"attn_out"}


def test_the_control_is_decomposed_as_if_it_were_unlearned(pair: ModelPair, prompts: Prompts) -> None:
    control = build_control()
    both = decompose(pair, prompts, control=control, progress=False).frame
    alone = decompose(ModelPair(pair.base, control), prompts, control=None, progress=False).frame
    there = both[both["arm"] == "control"].reset_index(drop=True)
    assert_frame_equal(there.drop(columns=["arm", "target"]), alone.drop(columns=["arm", "target"]))


def test_notebook_scoring_scores_the_last_positions_and_groups(pair: ModelPair, tmp_path: Path) -> None:
    records = [{"question": record["prompt"], "group": record["group"]} for record in RECORDS]
    path = save_records(tmp_path / "p.json", records)
    prompts = load_prompts(
        path, pair.tokenizer, scoring="notebook", answers="base", answers_from=pair.base, max_new_tokens=12
    )
    result = decompose(pair, prompts, sites="mlp_out", control=None, progress=False)
    assert result.frame["n_answer_tokens"].tolist()[: len(RECORDS)] == [item.n_answer_tokens for item in prompts.items]
    last = result.positions.groupby("example_index").tail(1)
    assert (last["token"] == -1).all() and last["direct"].isna().all()  # nothing follows the last position
    assert not result.frame["direct"].isna().any() and not result.frame["krs"].isna().any()
    curve = result.curve()
    here = (curve["term"] == "total") & (curve["first_layer"] == 0) & (curve["last_layer"] == 0)
    frame = result.frame
    rows = frame[(frame["term"] == "total") & (frame["first_layer"] == 0) & (frame["last_layer"] == 0)]
    assert curve[here]["krs"].item() == pytest.approx(rows.groupby("group")["krs"].mean().mean(), abs=1e-12)


def test_mixtures_of_experts_have_no_down_projection_but_an_attention(prompts: Prompts) -> None:
    pair = build_pair("mixtral")
    with pytest.raises(InputError, match="base: its blocks have no down projection .*site mlp_out cannot be split"):
        decompose(pair, prompts, control=None, progress=False)
    frame = decompose(pair, prompts, sites="attn_out", control=None, progress=False).frame
    assert not frame["krs"].isna().any() and (frame["direct_undefined"] == "").all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sites": "mlp_out,mlq"}, "sites.*'mlq'"),
        ({"sites": " , "}, "sites.*''"),
        ({"batch_size": 0}, "batch_size.*0"),
        ({"seed": -1}, "seed.*-1"),
        ({"null": -1}, "null.*-1"),
    ],
)
def test_bad_options_are_refused(pair: ModelPair, prompts: Prompts, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        decompose(pair, prompts, control=None, progress=False, **options)


def test_a_control_of_another_shape_is_refused(pair: ModelPair, prompts: Prompts) -> None:
    other = Model.wrap(build_model("llama", n_layers=2), build_tokenizer(), name="small")
    with pytest.raises(InputError, match="base and small differ in layers: 3 and 2"):
        decompose(pair, prompts, control=other, progress=False)


def test_a_prompt_longer_than_the_context_is_refused(tmp_path: Path) -> None:
    pair = build_pair("gpt2")
    long = build_prompts(tmp_path, [{"prompt": "Ada " * 200, "answer": "Oslo", "id": "long"}])
    with pytest.raises(InputError, match=r"prompt long has \d+ tokens with its answer, and the context of base is 128"):
        decompose(pair, long, control=None, progress=False)


def test_streamed_models_are_refused_in_one_line(pair: ModelPair, prompts: Prompts) -> None:
    streamed: Any = object()
    model = Model(name="big", hf=pair.base.hf, tokenizer=pair.tokenizer, sha256="0", streamed=streamed)
    with pytest.raises(InputError, match="big is streamed from disk, .*`stream`"):
        decompose(ModelPair(pair.base, model), prompts, control=None, progress=False)


def test_a_projection_that_does_more_than_its_weights_is_refused(prompts: Prompts) -> None:
    pair = build_pair("llama")
    module = pair.unlearned.hf.model.layers[1].mlp.down_proj
    forward = module.forward
    module.forward = lambda m: forward(m) + 0.1 * m.sum(-1, keepdim=True)  # as an adapter does
    with pytest.raises(InputError, match="mlp_out.*layer 1"):
        decompose(pair, prompts, control=None, progress=False)
    with pytest.raises(InputError, match="Embedding.*linear"):
        affine(torch.nn.Embedding(3, 4))


@pytest.mark.parametrize("broken", ["base", "unlearned"])
def test_logits_that_are_not_finite_are_refused_by_the_models_name(broken: str, prompts: Prompts) -> None:
    pair = build_pair("llama", tied=False)
    with torch.no_grad():
        getattr(pair, broken).hf.lm_head.weight[3] = torch.inf
    with pytest.raises(InputError, match=f"^{broken} gives logits that are not finite; is the checkpoint sound"):
        decompose(pair, prompts, control=None, progress=False)


def test_a_run_is_read_back_whole_and_not_computed_again(
    pair: ModelPair, prompts: Prompts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    first = decompose(pair, prompts, control=build_control(), out=out, progress=False)
    assert sorted(path.name for path in out.iterdir()) == [
        "positions.parquet",
        "results.parquet",
        "run.json",
        "summary.json",
    ]
    record = json.loads((out / "run.json").read_text())
    assert record["configuration"]["command"] == "decompose" and record["status"] == "complete"
    told = json.loads((out / "summary.json").read_text())
    assert len(told["curve"]) == len(first.curve()) and told["examples"] == len(RECORDS)

    def never(*_arguments: object, **_options: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(dissect.decomposition.run, "record", never)
    again = decompose(pair, prompts, control=build_control(), out=out, progress=False)
    for loaded in (again, load_decompose(out)):
        assert_frame_equal(loaded.frame, first.frame)
        assert_frame_equal(loaded.positions, first.positions)
        assert_frame_equal(loaded.curve(), first.curve())
        assert loaded.title == first.title == "base → unlearned"


def test_another_configuration_is_refused(pair: ModelPair, prompts: Prompts, tmp_path: Path) -> None:
    decompose(pair, prompts, sites="attn_out", control=None, out=tmp_path / "run", progress=False)
    with pytest.raises(InputError, match="holds another run: its sites is attn_out, not mlp_out"):
        decompose(pair, prompts, sites="mlp_out", control=None, out=tmp_path / "run", progress=False)


@pytest.mark.parametrize(
    ("batch_size", "still_to_do"), [(1, [(2,), (3,), (4,)]), (2, [(2, 3), (4,)]), (3, [(0, 1, 2), (3, 4)])]
)
def test_a_killed_run_goes_on_where_it_stopped_even_with_other_batches(
    batch_size: int,
    still_to_do: list[tuple[int, ...]],
    pair: ModelPair,
    prompts: Prompts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = decompose(pair, prompts, sites="mlp_out", control=None, null=1, batch_size=2, progress=False)
    real, calls = dissect.decomposition.run.record, []

    def stops(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments[1].examples)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(dissect.decomposition.run, "record", stops)
    options: dict[str, Any] = {
        "sites": "mlp_out",
        "control": None,
        "null": 1,
        "out": tmp_path / "run",
        "progress": False,
    }
    with pytest.raises(KeyboardInterrupt):
        decompose(pair, prompts, batch_size=2, **options)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "running"
    with pytest.raises(InputError, match="not finished.*`dissect decompose`"):
        load_decompose(tmp_path / "run")
    calls.clear()
    calls.extend([()] * 10)  # no more stops
    resumed = decompose(pair, prompts, batch_size=batch_size, **options)
    every = [batch.examples for batch in prompts.batches(batch_size)]  # of the null model, which had not begun
    assert calls[10:] == [examples for examples in still_to_do + every for _model in range(2)]
    assert {key for key in zip(resumed.frame["arm"], resumed.frame["example_index"], strict=True)} == {
        (arm, i) for arm in ("main", "null-0") for i in range(len(RECORDS))
    }
    assert len(resumed.frame) == len(whole.frame) and len(resumed.positions) == len(whole.positions)
    number = resumed.frame.select_dtypes(np.float64)
    assert_close(number.to_numpy(), whole.frame[number.columns].to_numpy(), atol=1e-4)
    assert_frame_equal(resumed.frame[["arm", "term", "example"]], whole.frame[["arm", "term", "example"]])


def test_runs_of_earlier_versions_load_with_today_s_names_of_sites(
    pair: ModelPair, prompts: Prompts, tmp_path: Path
) -> None:
    result = decompose(pair, prompts, control=None, out=tmp_path / "run", progress=False)
    old_names = {"mlp_out": "mlp", "attn_out": "attn"}
    for name in ("results", "positions"):
        file = tmp_path / "run" / f"{name}.parquet"
        pd.read_parquet(file).replace({"site": old_names}).to_parquet(file)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record["configuration"]["sites"] = ["mlp", "attn"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    loaded = load_decompose(tmp_path / "run")
    assert_frame_equal(loaded.frame, result.frame)
    assert_frame_equal(loaded.positions, result.positions)
    assert loaded.configuration == result.configuration


def test_old_names_of_sites_still_work_and_name_the_new_ones() -> None:
    with pytest.warns(UserWarning, match="mlp.*mlp_out"):
        assert parse_decomposed("attn_out,mlp") == ("mlp_out", "attn_out")


def test_a_directory_of_another_command_is_not_read(tmp_path: Path) -> None:
    record = {"format": 1, "status": "complete", "configuration": {"command": "patch"}, "wall_time_s": 1.0}
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="a run of `dissect patch`, not of `dissect decompose`"):
        load_decompose(tmp_path)


def test_a_broken_table_is_told_by_name(pair: ModelPair, prompts: Prompts, tmp_path: Path) -> None:
    decompose(pair, prompts, sites="mlp_out", control=None, out=tmp_path / "run", progress=False)
    (tmp_path / "run" / "positions.parquet").write_bytes(b"cut")
    with pytest.raises(InputError, match=r"positions.parquet: cannot be read"):
        load_decompose(tmp_path / "run")


def test_figures_show_every_arm_with_its_numbers(result: DecompositionResult, tmp_path: Path) -> None:
    curve = result.curve()
    figures = {"krs": result.figure(), "share": result.shares_figure(), "direct_centred": result.direct_figure()}
    for value, figure in figures.items():
        lines = {trace.name: trace for trace in figure.data if trace.name and trace.xaxis == "x"}
        for name, term, arm in [
            ("weight", "weight", "main"),
            ("coefficient, control", "coefficient", "control"),
            ("interaction, random update", "interaction", "null"),
        ]:
            rows = curve[(curve["site"] == "mlp_out") & (curve["term"] == term) & (curve["arm"] == arm)]
            rows = rows[rows["first_layer"] == rows["last_layer"]]
            assert list(lines[name].x) == [0, 1, 2]
            assert_close(np.asarray(lines[name].y), rows[value].to_numpy(), atol=0)
        assert lines["weight"].line.dash == "solid"
        assert lines["weight, control"].line.dash == "dash"
        single = [trace for trace in figure.data if trace.error_y.array is not None]
        assert bool(single) == (value != "direct_centred")
        names = [trace.name for trace in figure.data if trace.showlegend]
        assert len(names) == len(set(names))
    exported = result.save_figures(tmp_path)
    assert [path.name for path in exported.paths] == ["krs.html", "shares.html", "direct.html", "decomposition.csv"]
    table = pd.read_csv(tmp_path / "figures" / "decomposition.csv")
    assert_close(table["krs"].to_numpy(), curve["krs"].to_numpy(), atol=1e-12)


def test_every_loss_is_far_above_what_counts_as_none(result: DecompositionResult) -> None:
    assert (result.frame["loss_unlearned"] > 1e4 * LOSS_FLOOR).all()  # so the tests above have something to recover
