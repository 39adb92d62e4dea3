"""The sweep as a whole: nothing leaks between prompts, statistics by hand, runs on disk."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import dissect.sweeps.run
from dissect import load_prompts, load_result, patch
from dissect.engine import ENGINES, Sweep, find_engine
from dissect.engine.layers import Layers
from dissect.models.model import Model
from dissect.models.pair import ModelPair
from dissect.prompts.prompts import Batch, Prompts
from dissect.sweeps.result import SweepResult
from tests.dissect.helpers import RECORDS, assert_close, build_model, build_pair, change_weights, save_records
from unlearning.common.errors import InputError

COLUMNS = [
    "arm",
    "target",
    "donor",
    "kind",
    "site",
    "window",
    "centre",
    "first_layer",
    "last_layer",
    "example",
    "group",
    "n_answer_tokens",
    "loss_unlearned",
    "loss_intervened",
    "krs",
    "logprob_recovery",
    "kl_recovery",
]
"""The columns that DESIGN.md promises."""


def build_control(pair: ModelPair) -> Model:
    hf = build_model("llama")
    change_weights(hf, seed=7)
    return Model.wrap(hf, pair.tokenizer, name="never")


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return build_pair("llama")


@pytest.fixture(scope="module")
def control(pair: ModelPair) -> Model:
    return build_control(pair)


@pytest.fixture(scope="module")
def prompts(pair: ModelPair, tmp_path_factory: pytest.TempPathFactory) -> Prompts:
    return load_prompts(save_records(tmp_path_factory.mktemp("data") / "prompts.json", RECORDS), pair.tokenizer)


@pytest.fixture(scope="module")
def result(pair: ModelPair, prompts: Prompts, control: Model) -> SweepResult:
    return patch(pair, prompts, window=3, control=control, progress=False)


def test_both_engines_fill_the_same_table(
    pair: ModelPair, prompts: Prompts, control: Model, result: SweepResult
) -> None:
    reference = patch(pair, prompts, window=3, control=control, engine="reference", progress=False).frame
    labels = COLUMNS[: COLUMNS.index("loss_unlearned")]
    numbers = COLUMNS[COLUMNS.index("loss_unlearned") :]
    pd.testing.assert_frame_equal(result.frame[labels], reference[labels])
    assert_close(result.frame[numbers].to_numpy(), reference[numbers].to_numpy(), atol=1e-4)


SCORES = ["loss_unlearned", "loss_intervened", "krs", "kl_recovery", "logprob_intervened"]


def by_example(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.set_index(["target", "site", "centre", "example"]).sort_index()[SCORES]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", ["llama", "neox", "gpt2"])
def test_a_score_depends_on_its_own_prompt_only(
    family: str, engine: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Padding left or right, alone or in a batch, in any order: the same numbers for the same example."""
    pair = build_pair(family)
    path = tmp_path_factory.mktemp("order") / "prompts.json"

    def run(records: Sequence[dict[str, Any]], batch_size: int, side: Any) -> pd.DataFrame:
        prompts = load_prompts(save_records(path, list(records)), pair.tokenizer)
        found = patch(
            pair,
            prompts,
            sites="mlp_coef+attn_out,resid_post",
            window=1,
            control=None,
            engine=engine,
            batch_size=batch_size,
            chunk_tokens=100,
            padding_side=side,
            progress=False,
        )
        return by_example(found.frame)

    alone = run(RECORDS, 1, "right")

    @settings(max_examples=5, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(
        records=st.permutations(RECORDS),
        batch_size=st.integers(2, len(RECORDS)),
        side=st.sampled_from(["left", "right"]),
    )
    def check(records: list[dict[str, Any]], batch_size: int, side: str) -> None:
        together = run(records, batch_size, side)
        assert together.index.equals(alone.index)
        assert_close(together.to_numpy(), alone.to_numpy(), atol=2e-5)

    check()


def test_the_table_has_the_promised_columns_and_rows(result: SweepResult, prompts: Prompts) -> None:
    frame = result.frame
    assert [column for column in COLUMNS if column not in frame.columns] == []
    assert len(frame) == 2 * 3 * 3 * len(prompts)
    assert not frame.duplicated(["target", "site", "centre", "example_index"]).any()
    assert frame["krs"].notna().all()
    assert (frame["kind"] == "patch").all()
    for column in ("loss_unlearned", "loss_intervened", "krs"):
        assert frame[column].dtype == np.float64
    assert_close(1 - frame["loss_intervened"] / frame["loss_unlearned"], frame["krs"], atol=1e-12)
    lengths = {item.id: item.n_answer_tokens for item in prompts.items}
    assert (frame["example"].map(lengths) == frame["n_answer_tokens"]).all()


@torch.no_grad()
def test_the_scores_of_a_row_are_those_of_its_models(pair: ModelPair, prompts: Prompts, result: SweepResult) -> None:
    """Losses and log-probabilities before any patch, by a loop over the Hugging Face models' own logits."""
    first = result.frame[result.frame["target"] == "unlearned"].drop_duplicates("example_index")
    for (_, row), item in zip(first.iterrows(), prompts.items, strict=True):
        ids = torch.tensor([item.input_ids])
        base, target = pair.base.hf(ids).logits[0].double(), pair.unlearned.hf(ids).logits[0].double()
        losses, base_logprobs, logprobs, divergences = [], [], [], []
        for position in range(item.answer_start - 1, len(item.input_ids) - 1):
            p, q = base[position].log_softmax(-1), target[position].log_softmax(-1)
            losses.append(((base[position] - target[position]) ** 2).mean().item())
            base_logprobs.append(p[item.input_ids[position + 1]].item())
            logprobs.append(q[item.input_ids[position + 1]].item())
            divergences.append((p.exp() * (p - q)).sum().item())
        for column, values in (
            ("loss_unlearned", losses),
            ("logprob_base", base_logprobs),
            ("logprob_unlearned", logprobs),
            ("kl_unlearned", divergences),
        ):
            assert_close(row[column], float(np.mean(values)), atol=2e-5)


def test_a_curve_is_the_mean_over_examples(result: SweepResult) -> None:
    curve = result.curve().set_index(["target", "site", "centre"])
    for place, cell in result.frame.groupby(["target", "site", "centre"]):
        row = curve.loc[place]
        assert_close(row["krs"], cell["krs"].mean(), atol=1e-12)
        assert_close(row["krs_median"], cell["krs"].median(), atol=1e-12)
        before, after = cell["loss_unlearned"].sum(), cell["loss_intervened"].sum()
        assert_close(row["krs_ratio_of_means"], 1 - after / before, atol=1e-12)
        centred = cell["centred_loss_intervened"].sum() / cell["centred_loss_unlearned"].sum()
        assert_close(row["krs_centred"], 1 - centred, atol=1e-12)
        assert_close(row["kl_recovery"], 1 - cell["kl_intervened"].sum() / cell["kl_unlearned"].sum(), atol=1e-12)
        lost = (cell["logprob_base"] - cell["logprob_unlearned"]).sum()
        back = (cell["logprob_intervened"] - cell["logprob_unlearned"]).sum()
        assert_close(row["logprob_recovery"], back / lost, atol=1e-9)
        assert row["krs_low"] <= row["krs"] <= row["krs_high"]
        assert row["n"] == len(RECORDS) and row["n_undefined"] == 0


def test_a_notebook_curve_is_the_mean_over_groups_of_their_means(result: SweepResult) -> None:
    replica = replace(result, configuration={**result.configuration, "scoring": "notebook"})
    curve = replica.curve().set_index(["target", "site", "centre"])["krs"]
    for place, cell in result.frame.groupby(["target", "site", "centre"]):
        of_groups = cell.groupby("group")["krs"].mean()
        assert len(of_groups) == 3
        assert_close(curve.loc[place], of_groups.mean(), atol=1e-12)
        assert abs(of_groups.mean() - cell["krs"].mean()) > 1e-6


def test_the_contrast_is_the_paired_difference_to_the_control(result: SweepResult) -> None:
    contrast = result.contrast().set_index(["site", "centre"])
    assert len(contrast) == 3 * 3
    wide = result.frame.pivot(index=["site", "centre", "example"], columns="target", values="krs")
    gap = (wide["unlearned"] - wide["control"]).groupby(["site", "centre"])
    for place, differences in gap:
        row = contrast.loc[place]
        assert_close(row["difference"], differences.mean(), atol=1e-12)
        assert row["difference_low"] <= row["difference"] <= row["difference_high"]
        assert (
            differences.min() - 1e-12 <= row["difference_low"] and row["difference_high"] <= differences.max() + 1e-12
        )
        assert row["n"] == len(RECORDS)


def test_a_run_without_a_control_has_no_contrast(pair: ModelPair, prompts: Prompts) -> None:
    alone = patch(pair, prompts, sites="mlp_out", window=1, control=None, progress=False)
    assert alone.arms == ["main"]
    assert alone.contrast().empty
    assert not [column for column in alone.peaks().columns if column.startswith(("control", "difference"))]


def test_a_control_equal_to_the_unlearned_model_makes_no_difference(pair: ModelPair, prompts: Prompts) -> None:
    twin = patch(pair, prompts, window=1, control=pair.unlearned, progress=False)
    contrast = twin.contrast()
    for column in ("difference", "difference_low", "difference_high"):
        assert (contrast[column] == 0).all()


def test_a_peak_is_where_the_mean_is_highest(result: SweepResult) -> None:
    peaks = result.peaks().set_index("site")
    means = result.frame.groupby(["target", "site", "centre"])["krs"].mean()
    assert list(peaks.index) == ["mlp_coef", "attn_out", "mlp_coef+attn_out"]
    for site, row in peaks.iterrows():
        ours, theirs = means["unlearned"][site], means["control"][site]
        assert row["centre"] == ours.idxmax()
        assert_close(row["krs"], ours.max(), atol=1e-12)
        assert_close(row["control_krs"], theirs[row["centre"]], atol=1e-12)
        assert_close(row["difference"], ours.max() - theirs[row["centre"]], atol=1e-12)


def engine_that(engine: str, before: Callable[[str, Batch], None]) -> Callable[[str], Any]:
    """A `find_engine` that does something first for every target of every batch."""

    def sweep(layers: Layers, batches: Sequence[Batch], *rest: Any) -> Iterator[list[Sweep]]:
        names = [model.name for model in layers.models[1:]]
        sweeps = find_engine(engine)(layers, batches, *rest)
        for batch, by_target in zip(batches, sweeps, strict=True):
            yield [
                Sweep(swept.base, swept.target, noted(swept, name, batch))
                for name, swept in zip(names, by_target, strict=True)
            ]

    def noted(swept: Sweep, name: str, batch: Batch) -> Iterator[Tensor]:
        before(name, batch)
        yield from swept.intervened

    return lambda _name: sweep


@pytest.mark.parametrize("n_finished", [1, 2, 4])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_killed_run_goes_on_where_it_stopped(
    engine: str,
    n_finished: int,
    pair: ModelPair,
    prompts: Prompts,
    control: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between batches, and between the targets of one batch."""

    def run(folder: str, *, batch_size: int = 2) -> SweepResult:
        out = tmp_path / folder
        # Measured chunks would differ between the runs, and with them the last bits.
        return patch(
            pair,
            prompts,
            window=3,
            control=control,
            engine=engine,
            batch_size=batch_size,
            chunk_tokens=64,
            out=out,
            progress=False,
        )

    whole = run("whole")
    computed: list[tuple[str, tuple[int, ...]]] = []

    def die(name: str, batch: Batch) -> None:
        if len(computed) == n_finished:
            raise KeyboardInterrupt
        computed.append((name, batch.examples))

    monkeypatch.setattr(dissect.sweeps.run, "find_engine", engine_that(engine, die))
    with pytest.raises(KeyboardInterrupt):
        run("killed")
    left = {file.name for file in (tmp_path / "killed").rglob("*") if file.is_file()}
    assert "run.json" in left and "results.parquet" not in left
    assert len([name for name in left if name.endswith(".parquet")]) == n_finished
    assert not [name for name in left if name.endswith(".part")]
    with pytest.raises(InputError, match="not finished"):
        load_result(tmp_path / "killed")

    again: list[tuple[str, tuple[int, ...]]] = []

    monkeypatch.setattr(
        dissect.sweeps.run,
        "find_engine",
        engine_that(engine, lambda name, batch: again.append((name, batch.examples))),
    )
    shutil.copytree(tmp_path / "killed", tmp_path / "cut otherwise")
    resumed = run("killed")
    parts = [(name, examples) for examples in ((0, 1), (2, 3), (4,)) for name in ("unlearned", "never")]
    assert computed == parts[:n_finished] and again == parts[n_finished:]
    pd.testing.assert_frame_equal(resumed.frame, whole.frame, check_exact=True)
    pd.testing.assert_frame_equal(
        pd.read_parquet(tmp_path / "killed" / "results.parquet"),
        pd.read_parquet(tmp_path / "whole" / "results.parquet"),
        check_exact=True,
    )
    summaries = [(tmp_path / name / "summary.json").read_text() for name in ("killed", "whole")]
    assert summaries[0] == summaries[1]
    assert not (tmp_path / "killed" / "parts").exists()
    # No number depends on how the work is cut, so another cut may go on with it.
    otherwise = run("cut otherwise", batch_size=3)
    assert by_example(otherwise.frame).index.equals(by_example(whole.frame).index)
    assert_close(by_example(otherwise.frame).to_numpy(), by_example(whole.frame).to_numpy(), atol=2e-5)


def test_a_run_that_goes_on_keeps_the_chunk_that_was_measured(
    pair: ModelPair, prompts: Prompts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    measured = []

    def measure(*_arguments: Any) -> int:
        measured.append(1)
        return 77

    def die(_name: str, _batch: Batch) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dissect.engine.plan.measure_chunk", measure)
    with monkeypatch.context() as killed:
        killed.setattr(dissect.sweeps.run, "find_engine", engine_that("wavefront", die))
        with pytest.raises(KeyboardInterrupt):
            patch(pair, prompts, window=1, control=None, out=out, progress=False)
    assert json.loads((out / "run.json").read_text())["plan"]["chunk_tokens"] == 77
    patch(pair, prompts, window=1, control=None, out=out, progress=False)
    assert json.loads((out / "run.json").read_text())["chunk_tokens"] == 77
    assert len(measured) == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_a_batch_that_dies_halfway_leaves_no_part(
    engine: str, pair: ModelPair, prompts: Prompts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def dying(*arguments: Any) -> Iterator[list[Sweep]]:
        for by_target in find_engine(engine)(*arguments):
            yield [Sweep(swept.base, swept.target, some(swept)) for swept in by_target]

    def some(swept: Sweep) -> Iterator[Tensor]:
        started.append(1)
        yield next(swept.intervened)
        raise RuntimeError("killed")

    monkeypatch.setattr(dissect.sweeps.run, "find_engine", lambda _name: dying)
    with pytest.raises(RuntimeError, match="killed"):
        patch(pair, prompts, window=1, control=None, out=tmp_path / "run", progress=False)
    assert started == [1]
    assert not list((tmp_path / "run").rglob("*.parquet"))


def test_a_complete_run_is_read_not_computed(
    pair: ModelPair, prompts: Prompts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = patch(pair, prompts, window=1, control=None, out=tmp_path / "run", progress=False)

    def never(*_arguments: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(dissect.sweeps.run, "find_engine", lambda _name: never)
    second = patch(pair, prompts, window=1, control=None, out=tmp_path / "run", progress=False)
    pd.testing.assert_frame_equal(second.frame, first.frame, check_exact=True)
    assert second.wall_time_s == first.wall_time_s


def test_a_run_of_another_configuration_is_refused_and_told_apart(
    pair: ModelPair, prompts: Prompts, control: Model, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    patch(pair, prompts, sites="mlp_out", window=1, control=None, out=out, progress=False)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    with pytest.raises(InputError, match="its windows is 1, not 3"):
        patch(pair, prompts, sites="mlp_out", window=3, control=None, out=out, progress=False)
    with pytest.raises(InputError, match="its sites is mlp_out, not mlp_coef"):
        patch(pair, prompts, sites="mlp_coef", window=1, control=None, out=out, progress=False)
    with pytest.raises(InputError, match="its hash of control is None, not "):
        patch(pair, prompts, sites="mlp_out", window=1, control=control, out=out, progress=False)
    other = ModelPair(base=pair.base, unlearned=control)
    with pytest.raises(InputError, match="its hash of base is"):
        patch(ModelPair(control, pair.unlearned), prompts, sites="mlp_out", window=1, control=None, out=out)
    with pytest.raises(InputError, match="its hash of unlearned is"):
        patch(other, prompts, sites="mlp_out", window=1, control=None, out=out, progress=False)
    fewer = Prompts(prompts.items[:-1], prompts.scoring, prompts.pad_token_id, prompts.source)
    with pytest.raises(InputError, match="its hash of data is"):
        patch(pair, fewer, sites="mlp_out", window=1, control=None, out=out, progress=False)
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before


def test_a_saved_result_reads_back_the_same(result: SweepResult, tmp_path: Path) -> None:
    path = result.save(tmp_path / "run")
    assert {"run.json", "results.parquet", "summary.json"} <= {file.name for file in path.iterdir()}
    assert list((path / "figures").glob("*.html"))
    back = load_result(path)
    pd.testing.assert_frame_equal(back.frame, result.frame, check_exact=True)
    assert back.configuration == result.configuration
    assert back.provenance == result.provenance
    pd.testing.assert_frame_equal(back.curve(), result.curve(), check_exact=True)
    pd.testing.assert_frame_equal(back.contrast(), result.contrast(), check_exact=True)


def test_a_control_of_another_shape_is_refused(pair: ModelPair, prompts: Prompts) -> None:
    other = Model.wrap(build_model("llama", n_layers=2), pair.tokenizer, name="other")
    with pytest.raises(InputError, match="base and other differ in"):
        patch(pair, prompts, window=1, control=other, progress=False)


def test_a_prompt_longer_than_the_context_is_refused(tmp_path: Path) -> None:
    pair = build_pair("llama")
    long = [{"prompt": "Where was Ada Brook born? " * 40, "answer": "Oslo", "id": "long"}]
    prompts = load_prompts(save_records(tmp_path / "p.json", long), pair.tokenizer)
    assert len(prompts.items[0].input_ids) > 128
    with pytest.raises(InputError, match=r"prompt long has \d+ tokens .* the context of base is 128 tokens; shorten"):
        patch(pair, prompts, window=1, control=None, progress=False)
    pair.base.hf.config.rope_parameters = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    with pytest.raises(InputError, match=r"128 tokens \(beyond 128, its dynamic rotary scaling .*; shorten"):
        patch(pair, prompts, window=1, control=None, progress=False)


def test_a_site_that_the_architecture_lacks_is_refused_with_the_reason(prompts: Prompts) -> None:
    pair = build_pair("llama")
    pair.unlearned.missing_sites["attn_out"] = "its blocks have no attention"
    with pytest.raises(InputError, match="unlearned has no site attn_out: its blocks have no attention"):
        patch(pair, prompts, window=1, control=None, progress=False)
    assert len(patch(pair, prompts, sites="mlp_out", window=1, control=None, progress=False).frame) == 3 * len(prompts)
