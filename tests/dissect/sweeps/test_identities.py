"""What patches must give when one tensor alone was changed, in float64 (2410.06606's protocol, checked by algebra).

| changed at layer l     | mlp_coef at l           | attn_out at l | mlp_out at l            | layers before l |
|------------------------|-------------------------|---------------|-------------------------|-----------------|
| down projection        | 0                       | 0             | 1                       | 0               |
| gate or up projection  | 1                       | 0             | 1                       | 0               |
| attention              | any (parallel block: 0) | 1             | any (parallel block: 0) | 0               |
| final norm or head     | 0                       | 0             | 0                       | 0               |

What weights must give is simpler: 1 wherever the changed tensor is put back, 0 wherever it is not, in any window.
"""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from dissect import load_prompts, patch, restore
from dissect.models.pair import ModelPair
from dissect.prompts.prompts import Prompts
from dissect.scoring.rows import NO_DIFFERENCE
from tests.dissect.helpers import PLAIN_NAMES, RECORDS, assert_close, build_pair, build_tokenizer, save_records

N_LAYERS = 5
LAYER = 2
FAMILIES = ["llama", "gpt2", "neox"]
SITES = "mlp_coef,attn_out,mlp_out,resid_post,mlp_coef+attn_out,attn_out+mlp_out"
EXACT = 1e-9

DOWN = r"mlp\.(down_proj|dense_4h_to_h|c_proj)\."
KEYS = r"mlp\.(gate_proj|up_proj|dense_h_to_4h|c_fc)\."
OUTER = r"(embed|wte|wpe|lm_head|^model\.norm|final_layer_norm|ln_f)"
HEAD = r"(lm_head|embed_out)"
FINAL_NORM = r"(^model\.norm|final_layer_norm|ln_f)"
SINGLE = {
    ("llama", "down"): [r"mlp\.down_proj\.weight"],
    ("llama", "keys"): [r"mlp\.gate_proj\.weight", r"mlp\.up_proj\.weight"],
    ("llama", "attention"): [rf"self_attn\.{which}_proj\.weight" for which in "qvo"],
    ("gpt2", "down"): [r"mlp\.c_proj\.weight"],
    ("gpt2", "keys"): [r"mlp\.c_fc\.weight"],
    ("gpt2", "attention"): [r"attn\.c_attn\.weight", r"attn\.c_proj\.weight"],
    ("neox", "down"): [r"mlp\.dense_4h_to_h\.weight"],
    ("neox", "keys"): [r"mlp\.dense_h_to_4h\.bias"],
    ("neox", "attention"): [r"attention\.query_key_value\.weight", r"attention\.dense\.weight"],
}


def changes(what: str) -> list[tuple[str, str]]:
    return [(family, tensor) for (family, kind), tensors in SINGLE.items() for tensor in tensors if kind == what]


def at_layer(tensor: str, layer: int = LAYER) -> Callable[[str], bool]:
    return lambda name: re.search(rf"(layers|h)\.{layer}\.{tensor}$", name) is not None


@pytest.fixture
def prompts(tmp_path: Path) -> Prompts:
    return load_prompts(save_records(tmp_path / "prompts.json", RECORDS), build_tokenizer())


@cache
def sweep_table(family: str, tensor: str, prompts_path: str, width: int) -> pd.DataFrame:
    """Sweep a pair that differs in one tensor of one layer; asserts that the two models do differ."""
    changed: list[str] = []

    def chosen(name: str) -> bool:
        hit = at_layer(tensor)(name)
        changed.extend([name] * hit)
        return hit

    pair = build_pair(family, chosen=chosen, n_layers=N_LAYERS, tied=False, dtype=torch.float64)
    assert len(changed) == 1
    prompts = load_prompts(prompts_path, pair.tokenizer)
    frame = patch(pair, prompts, sites=SITES, window=width, control=None, progress=False).frame
    assert (frame["loss_unlearned"] > 1e-4).all()
    assert (frame["undefined"] == "").all()
    return frame


@pytest.fixture(scope="module")
def prompts_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_records(tmp_path_factory.mktemp("identities") / "prompts.json", RECORDS))


def krs(frame: pd.DataFrame, site: str, chosen: pd.Series | None = None) -> np.ndarray:
    rows = frame[(frame["site"] == site) & (True if chosen is None else chosen)]
    assert len(rows) >= len(RECORDS)
    return rows["krs"].to_numpy()


def assert_krs(frame: pd.DataFrame, site: str, expected: float, chosen: pd.Series | None = None) -> None:
    values = krs(frame, site, chosen)
    assert_close(values, np.full_like(values, expected), atol=EXACT)


def assert_any(frame: pd.DataFrame, site: str, chosen: pd.Series) -> None:
    """The patch does something here, and it is not the whole repair."""
    values = krs(frame, site, chosen)
    assert (np.abs(values) > 1e-6).all() and (np.abs(values - 1) > 1e-6).all()


@pytest.mark.parametrize(("family", "tensor"), [*changes("down"), *changes("keys"), *changes("attention")])
def test_patches_before_the_changed_layer_do_nothing(family: str, tensor: str, prompts_path: str) -> None:
    frame = sweep_table(family, tensor, prompts_path, 1)
    for site in SITES.split(","):
        assert_krs(frame, site, 0, frame["last_layer"] < LAYER)


@pytest.mark.parametrize(("family", "tensor"), [*changes("down"), *changes("keys"), *changes("attention")])
def test_the_residual_stream_from_the_changed_layer_on_restores_all(
    family: str, tensor: str, prompts_path: str
) -> None:
    frame = sweep_table(family, tensor, prompts_path, 1)
    assert_krs(frame, "resid_post", 1, frame["first_layer"] >= LAYER)


@pytest.mark.parametrize(("family", "tensor"), changes("down"))
def test_a_changed_down_projection_is_out_of_reach_of_coefficients(family: str, tensor: str, prompts_path: str) -> None:
    frame = sweep_table(family, tensor, prompts_path, 1)
    here, after = frame["centre"] == LAYER, frame["centre"] > LAYER
    for site in ("mlp_coef", "attn_out", "mlp_coef+attn_out"):
        assert_krs(frame, site, 0, here)
    for site in ("mlp_out", "attn_out+mlp_out"):
        assert_krs(frame, site, 1, here)
    assert_any(frame, "mlp_coef+attn_out", after)


@pytest.mark.parametrize(("family", "tensor"), changes("keys"))
def test_a_changed_key_is_repaired_by_the_coefficients_alone(family: str, tensor: str, prompts_path: str) -> None:
    frame = sweep_table(family, tensor, prompts_path, 1)
    here, after = frame["centre"] == LAYER, frame["centre"] > LAYER
    for site in ("mlp_coef", "mlp_coef+attn_out", "mlp_out", "attn_out+mlp_out"):
        assert_krs(frame, site, 1, here)
    assert_krs(frame, "attn_out", 0, here)
    assert_any(frame, "attn_out", after)


@pytest.mark.parametrize(("family", "tensor"), changes("attention"))
def test_changed_attention_is_repaired_by_its_output_alone(family: str, tensor: str, prompts_path: str) -> None:
    frame = sweep_table(family, tensor, prompts_path, 1)
    here, after = frame["centre"] == LAYER, frame["centre"] > LAYER
    for site in ("attn_out", "mlp_coef+attn_out", "attn_out+mlp_out"):
        assert_krs(frame, site, 1, here)
    for site in ("mlp_coef", "mlp_out"):
        if family == "neox":  # in a parallel block the MLP does not read the attention's output
            assert_krs(frame, site, 0, here)
        else:
            assert_any(frame, site, here)
    assert_any(frame, "attn_out", after)


@pytest.mark.parametrize(
    ("family", "tensor", "sites"),
    [
        ("llama", SINGLE["llama", "down"][0], ["mlp_out", "resid_post"]),
        ("llama", SINGLE["llama", "keys"][0], ["mlp_coef", "mlp_out", "mlp_coef+attn_out", "resid_post"]),
        ("llama", SINGLE["llama", "attention"][0], ["attn_out", "mlp_coef+attn_out", "resid_post"]),
        ("gpt2", SINGLE["gpt2", "keys"][0], ["mlp_coef", "mlp_out", "mlp_coef+attn_out"]),
        ("gpt2", SINGLE["gpt2", "attention"][0], ["attn_out", "mlp_coef+attn_out"]),
        ("neox", SINGLE["neox", "keys"][0], ["mlp_coef", "mlp_out", "mlp_coef+attn_out"]),
        ("neox", SINGLE["neox", "attention"][0], ["attn_out", "mlp_coef+attn_out"]),
    ],
)
def test_every_window_that_holds_the_changed_layer_restores_all(
    family: str, tensor: str, sites: list[str], prompts_path: str
) -> None:
    for width in (3, 5) if family == "llama" else (3,):
        frame = sweep_table(family, tensor, prompts_path, width)
        holds = (frame["first_layer"] <= LAYER) & (frame["last_layer"] >= LAYER)
        for site in sites:
            assert_krs(frame, site, 1, holds)
            if width == 3:
                assert_krs(frame, site, 0, frame["last_layer"] < LAYER)


def all_layers(frame: pd.DataFrame) -> pd.Series:
    return (frame["first_layer"] == 0) & (frame["last_layer"] == N_LAYERS - 1)


@pytest.mark.parametrize(("part", "width"), [(HEAD, 1), (FINAL_NORM, N_LAYERS)])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_patch_reaches_the_head_or_the_final_norm(family: str, part: str, width: int, prompts: Prompts) -> None:
    pair = build_pair(
        family,
        chosen=lambda name: re.search(part, name) is not None,
        n_layers=N_LAYERS,
        tied=False,
        dtype=torch.float64,
    )
    frame = patch(pair, prompts, sites=SITES, window=width, control=None, progress=False).frame
    assert (frame["loss_unlearned"] > 1e-4).all()
    for site in SITES.split(","):
        assert_krs(frame, site, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_outputs_of_all_layers_restore_all_when_only_blocks_changed(family: str, prompts: Prompts) -> None:
    pair = build_pair(
        family,
        chosen=lambda name: not re.search(OUTER, name),
        n_layers=N_LAYERS,
        tied=False,
        dtype=torch.float64,
    )
    frame = patch(pair, prompts, sites=SITES, window=N_LAYERS, control=None, progress=False).frame
    whole = all_layers(frame)
    assert_krs(frame, "attn_out+mlp_out", 1, whole)
    assert_any(frame, "mlp_coef+attn_out", whole)  # the down projections changed too
    assert_any(frame, "mlp_out", whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_coefficients_and_attention_of_all_layers_restore_all_when_value_vectors_did_not_change(
    family: str, prompts: Prompts
) -> None:
    pair = build_pair(
        family,
        chosen=lambda name: not re.search(f"{OUTER}|{DOWN}", name),
        n_layers=N_LAYERS,
        tied=False,
        dtype=torch.float64,
    )
    frame = patch(pair, prompts, sites=SITES, window=N_LAYERS, control=None, progress=False).frame
    whole = all_layers(frame)
    assert_krs(frame, "mlp_coef+attn_out", 1, whole)
    assert_any(frame, "mlp_coef", whole)
    assert_any(frame, "attn_out", whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_residual_stream_restores_all_when_norm_and_head_did_not_change(family: str, prompts: Prompts) -> None:
    pair = build_pair(
        family,
        chosen=lambda name: not re.search(f"{HEAD}|{FINAL_NORM}", name),
        n_layers=N_LAYERS,
        tied=False,
        dtype=torch.float64,
    )
    frame = patch(pair, prompts, sites=SITES, window=1, control=None, progress=False).frame
    last = frame["centre"] == N_LAYERS - 1
    assert_krs(frame, "resid_post", 1, last)
    assert_any(frame, "attn_out+mlp_out", last)


RESTORED = {
    "llama": "value_vectors,key_vectors,attn_weights,norms,W_Q,W_K,W_V,W_O,W_gate,W_in,embed,unembed",
    "gpt2": "value_vectors,key_vectors,attn_weights,norms,W_O,W_in,embed,unembed",
    "neox": "value_vectors,key_vectors,attn_weights,norms,W_O,W_in,embed,unembed",
}
NORMS = {"llama": r"input_layernorm\.weight", "gpt2": r"ln_2\.weight", "neox": r"post_attention_layernorm\.weight"}
RESTORE_WINDOWS = {"wavefront": [1, 3, "prefix", "suffix", "layers 0,2,4"], "reference": ["layers 2", "layers 3-4"]}


def restored_table(pair: ModelPair, prompts: Prompts, engine: str, sites: str) -> pd.DataFrame:
    windows = RESTORE_WINDOWS[engine]
    frame = restore(pair, prompts, sites=sites, window=windows, control=None, engine=engine, progress=False).frame
    assert (frame["loss_unlearned"] > 1e-4).all()
    return frame


def layers_of(row: pd.Series) -> set[int]:
    gaps = {"layers 0,2,4": {0, 2, 4}}
    return gaps.get(row["window"], set(range(row["first_layer"], row["last_layer"] + 1)))


CHANGED = [*changes("down"), *changes("keys"), *changes("attention"), *NORMS.items()]
BOTH_ENGINES = {"neox": ["down", "attention"], "gpt2": ["keys"], "llama": ["down"]}
"""What the reference engine is quick enough for."""
QUICK = {(family, SINGLE[family, kind][0]) for family, kinds in BOTH_ENGINES.items() for kind in kinds}


@pytest.mark.parametrize(
    ("family", "tensor", "engine"),
    [
        *[(*one, "wavefront") for one in CHANGED],
        *[pytest.param(*one, "reference", marks=[] if one in QUICK else pytest.mark.slow) for one in CHANGED],
    ],
)
def test_a_changed_tensor_is_restored_where_it_is_put_back_and_nowhere_else(
    family: str, tensor: str, engine: str, prompts: Prompts
) -> None:
    pair = build_pair(family, chosen=at_layer(tensor), n_layers=N_LAYERS, tied=False, dtype=torch.float64)
    sites = RESTORED[family] if engine == "wavefront" else "value_vectors,key_vectors,attn_weights,norms"
    frame = restored_table(pair, prompts, engine, sites)
    name = tensor.replace("\\", "")
    holding = {site for site in frame["site"].unique() if re.search(PLAIN_NAMES.get(site, "$^"), name)}
    assert holding & {"value_vectors", "key_vectors", "attn_weights", "norms"}
    put_back = frame["site"].isin(holding) & frame.apply(lambda row: LAYER in layers_of(row), axis=1)
    assert put_back.any() and not put_back.all()
    assert_close(frame["krs"].to_numpy(), put_back.astype(float).to_numpy(), atol=EXACT)


@pytest.mark.parametrize("engine", ["wavefront", "reference"])
@pytest.mark.parametrize(
    ("part", "site"), [(HEAD, "unembed"), (FINAL_NORM, "norms"), ("embed_tokens|embed_in|wte", "embed")]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_outside_the_blocks_is_restored_by_its_own_name_alone(
    family: str, part: str, site: str, engine: str, prompts: Prompts
) -> None:
    """The final norm in every window that holds the last layer."""
    pair = build_pair(
        family,
        chosen=lambda name: re.search(part, name) is not None,
        n_layers=N_LAYERS,
        tied=False,
        dtype=torch.float64,
    )
    sites = RESTORED[family] if engine == "wavefront" else "value_vectors,norms,embed,unembed"
    frame = restored_table(pair, prompts, engine, sites)
    put_back = frame["site"] == site
    if site == "norms":
        put_back &= frame["last_layer"] == N_LAYERS - 1
    assert set(frame.loc[frame["site"].isin(["embed", "unembed"]), "window"]) == {"all"}
    assert put_back.any() and not put_back.all()
    assert_close(frame["krs"].to_numpy(), put_back.astype(float).to_numpy(), atol=EXACT)


@pytest.mark.parametrize("engine", ["wavefront", "reference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_value_vectors_coefficients_and_attention_rebuild_the_residual_stream(
    family: str, engine: str, prompts: Prompts
) -> None:
    """All layers at once, every tensor of the blocks changed; with one of the three left out, or layers, it is less."""
    pair = build_pair(
        family, chosen=lambda name: not re.search(OUTER, name), n_layers=N_LAYERS, tied=False, dtype=torch.float64
    )
    sites = "value_vectors+mlp_coef+attn_out,value_vectors+mlp_coef,value_vectors+attn_out"
    windows = ["layers 0-4", "layers 0-2,4"]
    frame = restore(pair, prompts, sites=sites, window=windows, control=None, engine=engine, progress=False).frame
    whole = frame["window"] == windows[0]
    labels = list(frame["site"].unique())
    assert_krs(frame, labels[0], 1, whole)
    assert_any(frame, labels[0], ~whole)
    for label in labels[1:]:
        assert_any(frame, label, whole)


@pytest.mark.parametrize("scoring", ["answer", "notebook"])
@pytest.mark.parametrize("family", FAMILIES)
def test_identical_models_have_no_recovery_and_say_so(family: str, scoring: str, tmp_path: Path) -> None:
    """The loss between base and target is zero: nan with a reason, never a number and never infinity."""
    pair = build_pair(family, scale=0.0)
    records = [{"question": record["prompt"], "group": record["group"]} for record in RECORDS]
    if scoring == "answer":
        prompts = load_prompts(save_records(tmp_path / "p.json", RECORDS), pair.tokenizer)
    else:
        prompts = load_prompts(
            save_records(tmp_path / "p.json", records),
            pair.tokenizer,
            scoring="notebook",
            answers="base",
            answers_from=pair.base,
        )
    result = patch(pair, prompts, window=1, control=pair.unlearned, progress=False)
    assert set(result.arms) == {"main", "control"}
    for column in ("krs", "kl_recovery", "logprob_recovery"):
        assert result.frame[column].isna().all()
    assert (result.frame["undefined"] == NO_DIFFERENCE).all()
    curve = result.curve()
    for column in ("krs", "krs_low", "krs_high", "krs_ratio_of_means", "krs_centred", "kl_recovery"):
        assert curve[column].isna().all()
    assert (curve["n"] == len(RECORDS)).all() and (curve["n_undefined"] == len(RECORDS)).all()
    assert result.contrast()["difference"].isna().all()
    assert result.peaks().empty
    undefined = result.undefined()
    assert undefined["undefined"].tolist() == [NO_DIFFERENCE] * 2
    assert undefined["examples"].tolist() == [len(RECORDS)] * 2
    for table in (result.frame, curve, result.contrast()):
        assert not np.isinf(table.select_dtypes("number").to_numpy(np.float64)).any()
