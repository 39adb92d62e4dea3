"""Windows and sweeps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dissect.interventions.intervention import Intervention, sweep
from dissect.interventions.windows import Window, centred_windows
from unlearning.common.errors import InputError


@given(n_layers=st.integers(1, 40), half=st.integers(0, 20))
def test_a_window_holds_the_layers_near_its_centre(n_layers: int, half: int) -> None:
    width = 2 * half + 1
    if width > n_layers:
        with pytest.raises(InputError, match=f"window.*{n_layers} layers"):
            centred_windows(n_layers, width)
        return
    windows = centred_windows(n_layers, width)
    assert [window.centre for window in windows] == list(range(n_layers))
    for window in windows:
        near = [layer for layer in range(n_layers) if abs(layer - window.centre) <= half]
        assert list(window.layers) == near
        assert window.kind == str(width)


@pytest.mark.parametrize("width", [0, 2, 4, -1, -2])
def test_a_width_without_a_centre_is_refused(width: int) -> None:
    with pytest.raises(InputError, match="odd"):
        centred_windows(8, width)


def test_the_widest_window_that_fits_is_named() -> None:
    with pytest.raises(InputError, match="window.*at most 7.*got 9"):
        centred_windows(8, 9)
    with pytest.raises(InputError, match="window.*at most 5.*got 7"):
        centred_windows(5, 7)


def test_a_sweep_is_every_set_of_sites_in_every_window() -> None:
    sites = [("mlp_coef",), ("mlp_coef", "attn_out")]
    planned = sweep(iter(sites), iter(centred_windows(3, 3)))
    windows = [Window(0, (0, 1), "3"), Window(1, (0, 1, 2), "3"), Window(2, (1, 2), "3")]
    assert planned == [Intervention(site, window) for site in sites for window in windows]
    assert [item.label for item in planned[3:5]] == ["mlp_coef+attn_out @ 0..1", "mlp_coef+attn_out @ 0..2"]
