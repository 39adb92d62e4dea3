"""Restoring weights as a whole: everything is the base, directions mirror, streaming, runs on disk, bad input."""

import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import dissect.sweeps.run
from dissect import load_pair, load_result, patch, restore
from dissect.engine import Sweep, find_engine
from dissect.models.model import Model
from dissect.models.pair import ModelPair
from dissect.prompts.prompts import Prompts
from tests.dissect.helpers import assert_close, build_model, build_pair, build_prompts, change_weights
from unlearning.common.errors import InputError

EVERYTHING = "value_vectors+key_vectors+attn_weights+norms+embed+unembed"
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gpt2", "neox", "olmo", "olmo2", "gemma2", "phi3"]
FAMILIES += ["opt", "bloom", "falcon", "gptj"]
WHOLE = "layers 0-2"


@cache
def cached_pair(family: str = "llama") -> ModelPair:
    """A pair that no test may change."""
    return build_pair(family)


@cache
def control() -> Model:
    hf = build_model("llama")
    change_weights(hf, seed=7)
    return Model.wrap(hf, cached_pair().tokenizer, name="never")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Prompts:
    return build_prompts(tmp_path_factory.mktemp("restoration"))


TYINGS = [*[(family, None) for family in (*FAMILIES, "mixtral")], ("llama", False), ("gpt2", False), ("neox", True)]
QUICK = ("llama", "gpt2", "neox", "phi3", "gemma2")
"""The reference engine restores those always, and the others where there is time."""


@pytest.mark.parametrize(
    ("engine", "family", "tied"),
    [
        *[("wavefront", *tying) for tying in TYINGS],
        *[pytest.param("reference", *tying, marks=[] if tying[0] in QUICK else pytest.mark.slow) for tying in TYINGS],
    ],
)
def test_restoring_everything_is_the_base_to_the_bit(
    family: str, tied: bool | None, engine: str, prompts: Prompts
) -> None:
    """By an expression and by names."""
    pair = build_pair(family, tied=tied)
    frame = restore(
        pair,
        prompts,
        sites=everything(family),
        parameters=".*",
        window=WHOLE,
        control=None,
        engine=engine,
        padding_side="left",
        batch_size=3,
        progress=False,
    ).frame
    assert len(frame) == len(prompts) * 2
    assert (frame["loss_unlearned"] > 1e-3).all()
    assert (frame["loss_intervened"] == 0).all() and (frame["krs"] == 1).all()
    assert (frame["kl_intervened"] == 0).all()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "neox", "falcon"])
def test_everything_beside_less_is_the_base_up_to_rounding_and_less_is_not(family: str, prompts: Prompts) -> None:
    """Streams that have the same done to them go through a block together, and products of other shapes may round
    otherwise."""
    windows = [WHOLE, "prefix", "suffix", "layers 0,2"]
    frame = restore(
        cached_pair(family), prompts, parameters=".", window=windows, control=None, chunk_tokens=300, progress=False
    ).frame
    whole = (frame["first_layer"] == 0) & (frame["last_layer"] == 2) & (frame["window"] != "layers 0,2")
    assert whole.sum() == 3 * len(prompts)
    assert_close(frame.loc[whole, "krs"].to_numpy(), np.ones(whole.sum()), atol=1e-9)
    assert (frame.loc[~whole, "krs"] < 1 - 1e-3).all()


def everything(family: str) -> str:
    """All sites of weights that do not overlap; OLMo's norms have none."""
    sites = f"{EVERYTHING}+router" if family == "mixtral" else EVERYTHING
    return sites.replace("+norms", "") if family == "olmo" else sites


@pytest.mark.parametrize("command", [patch, restore])
def test_the_reverse_direction_is_the_swapped_pair_row_by_row(command: Any, prompts: Prompts) -> None:
    pair = cached_pair()
    swapped = ModelPair(base=pair.unlearned, unlearned=pair.base)
    options: dict[str, Any] = {"window": [1, "prefix"], "chunk_tokens": 100, "progress": False}
    options["sites"] = "mlp_coef,attn_out" if command is patch else "value_vectors,attn_weights+embed"
    back = command(pair, prompts, direction="unlearned-to-base", control=control(), null=1, **options)
    forth = command(swapped, prompts, control=None, **options)
    assert back.arms == ["main", "control", "null-0"]
    arms = back.frame.drop_duplicates("arm").set_index("arm")
    assert arms[["target", "donor"]].to_dict("index") == {
        "main": {"target": "base", "donor": "unlearned"},
        "control": {"target": "base", "donor": "control"},
        "null-0": {"target": "base", "donor": "null"},
    }
    labels = ["target", "donor"]
    main = back.frame[back.frame["arm"] == "main"].reset_index(drop=True)
    pd.testing.assert_frame_equal(main.drop(columns=labels), forth.frame.drop(columns=labels), check_exact=True)
    # The control gives what it has to the base, and scores say how much like the control the base becomes.
    given = command(ModelPair(base=control(), unlearned=pair.base), prompts, control=None, **options)
    ours = back.frame[back.frame["arm"] == "control"].reset_index(drop=True)
    drop = ["arm", *labels]
    pd.testing.assert_frame_equal(ours.drop(columns=drop), given.frame.drop(columns=drop), check_exact=True)


@pytest.mark.parametrize("family", ["gpt2", "neox"])
def test_streamed_models_restore_the_same(family: str, prompts: Prompts, tmp_path: Path) -> None:
    """Blocks, embeddings, head, norms and expressions, of checkpoints that are never whole in memory."""
    pair = build_pair(family)
    paths = []
    for model in (pair.base, pair.unlearned):
        path = tmp_path / model.name
        model.hf.save_pretrained(path)
        pair.tokenizer.save_pretrained(path)
        paths.append(str(path))
    options: dict[str, Any] = {
        "sites": "value_vectors,attn_weights,W_V,norms,embed,unembed,embed+norms+mlp_coef",
        "parameters": "ln_|norm|lm_head",
        "window": [1, "suffix"],
        "control": None,
        "batch_size": 2,
        "chunk_tokens": 100,
        "progress": False,
    }
    whole = restore(load_pair(*paths), prompts, **options).frame
    streamed_pair = load_pair(*paths, stream=True)
    assert streamed_pair.base.streamed is not None
    streamed = restore(streamed_pair, prompts, **options).frame
    numbers = [name for name in whole if whole[name].dtype == np.float64]
    pd.testing.assert_frame_equal(streamed.drop(columns=numbers), whole.drop(columns=numbers))
    assert_close(streamed[numbers].to_numpy(), whole[numbers].to_numpy(), atol=2e-5)
    assert len(whole["site"].unique()) == 8 and whole["krs"].nunique() > len(whole) // 3
    donors = ["other-question", "noise", str(tmp_path / "unlearned")]
    given: dict[str, Any] = {"sites": "mlp_coef,attn_out", "window": 1, "control": None, "progress": False}
    whole, streamed = (
        patch(one, prompts, donor=donors, direction="unlearned-to-base", batch_size=2, **given).frame
        for one in (load_pair(*paths), streamed_pair)
    )
    assert len(streamed["arm"].unique()) == 4
    assert_close(streamed["krs"].to_numpy(), whole["krs"].to_numpy(), atol=2e-5)
    for options, match in (({"null": 1}, "null"), ({"engine": "reference"}, "engine.*in memory")):
        with pytest.raises(InputError, match=match):
            restore(streamed_pair, prompts, window=1, control=None, progress=False, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("n_finished", [0, 1, 4, 7])
def test_a_killed_run_of_several_arms_goes_on_where_it_stopped(
    n_finished: int, prompts: Prompts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between batches, between arms that share a walk, and between arms that do not."""

    def run(folder: str) -> Any:
        return patch(
            cached_pair(),
            prompts,
            sites="mlp_coef",
            window=["prefix", "layers 0,2"],
            control=control(),
            donor=["other-question", "noise"],
            null=1,
            batch_size=3,
            chunk_tokens=64,
            out=tmp_path / folder,
            progress=False,
        )

    whole = run("whole")
    assert whole.arms == ["main", "control", "null-0", "other-question", "noise"]
    computed: list[int] = []

    def dying(*arguments: Any) -> Iterator[list[Sweep]]:
        for by_target in find_engine("wavefront")(*arguments):
            yield [Sweep(swept.base, swept.target, counted(swept)) for swept in by_target]

    def counted(swept: Sweep) -> Iterator[torch.Tensor]:
        if len(computed) == n_finished:
            raise KeyboardInterrupt
        computed.append(1)
        yield from swept.intervened

    with monkeypatch.context() as killed:
        killed.setattr(dissect.sweeps.run, "find_engine", lambda _name: dying)
        with pytest.raises(KeyboardInterrupt):
            run("killed")
        assert len(list((tmp_path / "killed").rglob("*.parquet"))) == n_finished
        with pytest.raises(InputError, match="not finished"):
            load_result(tmp_path / "killed")
        shutil.copytree(tmp_path / "killed", tmp_path / "again")
        computed.clear()
        n_finished, done = 5 * 2, n_finished  # five arms, two batches
        resumed = run("again")
    assert len(computed) == 5 * 2 - done
    pd.testing.assert_frame_equal(resumed.frame, whole.frame, check_exact=True)
    assert (tmp_path / "again" / "summary.json").read_text() == (tmp_path / "whole" / "summary.json").read_text()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_a_restored_score_depends_on_its_own_prompt_only(side: Any, batch_size: int, prompts: Prompts) -> None:
    options: dict[str, Any] = {
        "sites": "key_vectors,norms+embed,value_vectors+attn_out",
        "window": [1],
        "control": None,
    }
    expected = restore(cached_pair("gpt2"), prompts, batch_size=1, progress=False, **options).frame
    found = restore(
        cached_pair("gpt2"), prompts, batch_size=batch_size, padding_side=side, progress=False, **options
    ).frame
    for column in ("krs", "kl_recovery", "logprob_intervened"):
        assert_close(found[column].to_numpy(), expected[column].to_numpy(), atol=2e-5)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        (
            "llama",
            {"parameters": "mlp.down_prj"},
            "`parameters` mlp.down_prj matches no parameter of base; the nearest names are model.layers.",
        ),
        ("llama", {"parameters": "(mlp"}, "`parameters` must be a regular expression, got '(mlp': missing )"),
        ("llama", {"parameters": ""}, "`parameters` must not be empty"),
        ("gpt2", {"sites": "W_gate"}, "base has no W_gate: its blocks (GPT2LMHeadModel) have no such weights"),
        ("olmo", {"sites": "norms"}, "base has no norms: its blocks (OlmoForCausalLM) have no such weights"),
        (
            "mixtral",
            {"sites": "W_in"},
            "base has no site W_in: the blocks of MixtralForCausalLM are mixtures of experts",
        ),
        ("mixtral", {"sites": "attn_weights+mlp_coef"}, "base has no site mlp_coef: "),
        ("llama", {"sites": "mlp_coef"}, "value_vectors+mlp_coef"),
        ("llama", {"sites": "value_vector"}, "'value_vector'; did you mean 'value_vectors'"),
        (
            "llama",
            {"parameters": r"layers\.1\.mlp", "window": "layers 0,2"},
            r"/layers\.1\.mlp/",
        ),
        ("llama", {"null": -1}, "`null` must be at least 0, got -1"),
        ("llama", {"direction": "backwards"}, "got 'backwards'"),
    ],
)
def test_bad_input_is_refused_in_one_line(family: str, options: dict[str, Any], message: str, prompts: Prompts) -> None:
    with pytest.raises(InputError) as refused:
        restore(cached_pair(family), prompts, **{"window": 1, "control": None, "progress": False} | options)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_the_nearest_names_are_near(prompts: Prompts) -> None:
    """A slip in the middle of a name finds names of that kind."""
    with pytest.raises(InputError) as refused:
        restore(cached_pair(), prompts, parameters=r"^model\.layers\.1\.self_attn\.q_prj\.weight$", window=1)
    assert "model.layers.1.self_attn.q_proj.weight" in str(refused.value)


def test_a_patch_does_not_take_weights(prompts: Prompts) -> None:
    with pytest.raises(InputError, match="sites.*value_vectors; use dissect restore"):
        patch(cached_pair(), prompts, sites="value_vectors", window=1, control=None)
