"""Interventions: every set of sites in every window."""

from dissect.interventions.intervention import Intervention, sweep
from dissect.interventions.windows import Window, centred_windows, parse_windows
from dissect.models.sites import PATCH_SITES, RESTORE_SITES
from dissect.models.weights import WeightNames
from tests.dissect.helpers import build_pair


def test_a_sweep_is_every_set_of_sites_in_every_window() -> None:
    sites = [("mlp_coef",), ("mlp_coef", "attn_out")]
    planned = sweep(iter(sites), iter(centred_windows(3, 3)))
    windows = [Window(0, (0, 1), "3"), Window(1, (0, 1, 2), "3"), Window(2, (1, 2), "3")]
    assert planned == [Intervention(site, window) for site in sites for window in windows]
    assert [item.label for item in planned[3:5]] == ["mlp_coef+attn_out @ 0..1", "mlp_coef+attn_out @ 0..2"]


def names_of(family: str) -> WeightNames:
    return build_pair(family).base.weights


def test_what_has_no_layer_is_done_once_and_what_has_one_in_every_window_that_holds_any() -> None:
    windows = parse_windows([1, "layers 0,2"], 3)
    names = names_of("llama")
    outside = {
        ("embed",): ({"embed"}, set()),
        ("unembed",): (set(), {"unembed"}),
        ("embed", "unembed"): ({"embed"}, {"unembed"}),
        ("/lm_head|embed/",): ({"/lm_head|embed/"}, {"/lm_head|embed/"}),
    }
    for sites, (before, after) in outside.items():
        (once,) = sweep([sites], windows, names)
        assert (once.window.kind, once.window.layers) == ("all", (0, 1, 2))
        assert (once.before, once.after) == (before, after)
    for sites in (*RESTORE_SITES, ("attn_weights", "embed")):
        assert [item.window for item in sweep([sites], windows, names)] == windows
    only_second = sweep([(r"/layers\.1\.mlp/",)], windows, names)
    assert [item.window.layers for item in only_second] == [(1,)]
    # Together with an activation there is something to do everywhere.
    assert len(sweep([("mlp_coef", "embed")], windows, names)) == len(windows)
    assert [item.before for item in sweep(PATCH_SITES, windows)] == [frozenset()] * 3 * len(windows)


def test_the_final_norm_belongs_to_windows_with_the_last_layer() -> None:
    items = sweep([("norms",), ("norms", "/^model.norm/")], parse_windows(1, 3), names_of("llama"))
    assert [item.after for item in items[:3]] == [frozenset(), frozenset(), {"norms"}]
    assert all("/^model.norm/" in item.after for item in items[3:])  # asked for by name: always
