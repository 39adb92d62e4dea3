from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dissect import InputError
from dissect.models.module_tree import with_values
from dissect.stress.geometry import geometry, hsic, linear_cka, weight_changes
from tests.dissect.stress.constructed import case_of, gated, model

N = 12


def _normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_hsic_is_the_mean_over_all_quadruples():
    """Gretton et al. 2005: the kernel of HSIC's U-statistic over four different rows."""
    x, y = _normal(6, 3), _normal(6, 2, seed=1)
    k, el = x @ x.T, y @ y.T
    terms = [k[i, j] * (el[i, j] + el[q, r] - 2 * el[i, q]) for i, j, q, r in permutations(range(6), 4)]
    assert hsic(k, el) == pytest.approx(float(np.mean(terms)))


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.floats(0.1, 10), st.floats(-50, 50))
def test_cka_sees_no_rotation_scale_or_shift(seed, scale, shift):
    x, y = _normal(20, 5, seed=seed), _normal(20, 4, seed=seed + 1)
    rotation = torch.linalg.qr(_normal(4, 4, seed=seed + 2)).Q
    assert linear_cka(x, scale * y @ rotation + shift) == pytest.approx(linear_cka(x, y), abs=1e-6)
    assert linear_cka(x, y) == pytest.approx(linear_cka(y, x))
    assert linear_cka(x, scale * x + shift) == pytest.approx(1)


def test_cka_of_unrelated_states_is_about_nothing_and_of_many_rows_the_plain_one():
    wide = [linear_cka(_normal(20, 100, seed=seed), _normal(20, 100, seed=seed + 500)) for seed in range(40)]
    assert abs(np.mean(wide)) < 0.03
    x = _normal(1500, 4)
    y = x @ _normal(4, 3, seed=3) + _normal(1500, 3, seed=4)
    x, y = x - x.mean(0), y - y.mean(0)
    plain = (y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
    assert linear_cka(x, y) == pytest.approx(float(plain), abs=4e-3)


def test_constant_states_have_no_cka():
    assert np.isnan(linear_cka(torch.ones(10, 3), _normal(10, 3)))
    with pytest.raises(InputError, match="4 answer positions.*3"):
        linear_cka(_normal(3, 3), _normal(3, 3))


def test_the_never_model_is_erased_and_the_base_is_not():
    erased, intact = (geometry(case_of(model(name), n=N)) for name in ("demo:never", "demo:base"))
    assert erased.erasure == pytest.approx(1) and intact.erasure == 0
    assert np.allclose(intact.layers["cka_unlearned_base"], 1) and (intact.weights["norm_change"] == 0).all()
    assert np.allclose(erased.layers["cka_unlearned_control"], 1)
    assert (erased.layers["cka_base_control"] < 1).all()


def test_a_gate_in_the_last_layer_moves_that_layer_alone():
    shut, gate = gated()
    found = geometry(case_of(shut, n=N))
    np.testing.assert_allclose(found.layers["cka_unlearned_base"][: gate.layer], 1, atol=1e-6)
    assert found.layers["cka_unlearned_base"][gate.layer] < 0.99
    moved = found.weights[found.weights["norm_change"] > 0]
    assert set(zip(moved["family"], moved["layer"], strict=True)) == {
        ("key_vectors", gate.layer),
        ("value_vectors", gate.layer),
    }


def test_without_a_never_model_there_is_no_score():
    found = geometry(replace(case_of(model("demo-neox:npo"), base="demo-neox:base", n=N), control=None))
    assert found.erasure is None and list(found.layers) == ["layer", "cka_unlearned_base"]
    same = geometry(case_of(model("demo:npo"), control=model("demo:base"), n=N))
    assert same.erasure is None and same.layers["erasure"].isna().all()


def test_changes_of_weights_are_those_that_were_made():
    base = model("demo-neox:base")
    before = {name: tensor.clone() for name, tensor in base.hf.state_dict().items()}
    name = next(name for name in base.weights.at(["value_vectors"], 2) if name.endswith("weight"))
    whole = [base.hf.get_parameter(each).data for each in base.weights.at(["value_vectors"], 2)]
    changed = replace(base, hf=with_values(base.hf, {name: 1.5 * base.hf.get_parameter(name).data}))
    table = weight_changes(base, changed).set_index(["family", "layer"])
    row = table.loc[("value_vectors", 2)]
    assert row["norm_change"] == pytest.approx(float(0.5 * base.hf.get_parameter(name).data.norm()), rel=1e-5)
    assert row["norm_base"] == pytest.approx(sum(float(each.norm()) ** 2 for each in whole) ** 0.5, rel=1e-5)
    assert (table.drop(index=("value_vectors", 2))["norm_change"] == 0).all()
    # Every parameter is in one family.
    total = sum(float(each.data.double().square().sum()) for each in base.hf.parameters())
    assert (table["norm_base"] ** 2).sum() == pytest.approx(total, rel=1e-6)
    geometry(case_of(base, base="demo-neox:base", n=8))
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.hf.state_dict().items())
