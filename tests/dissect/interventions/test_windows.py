"""Windows: how they are named, which layers they hold, and what is refused."""

import itertools
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dissect.interventions.windows import (
    DEFAULT_WINDOWS,
    Window,
    centred_windows,
    parse_layers,
    parse_windows,
    prefix_windows,
    suffix_windows,
    whole_model,
    window_kinds,
)
from unlearning.common.errors import InputError


@given(st.integers(1, 40))
def test_prefixes_and_suffixes_hold_everything_on_one_side_of_their_layer(n_layers: int) -> None:
    prefixes, suffixes = prefix_windows(n_layers), suffix_windows(n_layers)
    for layer in range(n_layers):
        assert prefixes[layer] == Window(layer, tuple(range(layer + 1)), "prefix")
        assert suffixes[layer] == Window(layer, tuple(range(layer, n_layers)), "suffix")
        # The layers of a prefix and of the suffix behind it are all layers, each once.
        behind = suffixes[layer + 1].layers if layer + 1 < n_layers else ()
        assert prefixes[layer].layers + behind == tuple(range(n_layers))
    assert len(prefixes) == len(suffixes) == n_layers
    assert whole_model(n_layers).layers == prefixes[-1].layers == suffixes[0].layers


@given(st.sets(st.integers(0, 60), min_size=1), st.booleans(), st.randoms())
def test_a_list_of_layers_is_read_back_however_it_is_written(layers: set[int], in_runs: bool, random: object) -> None:
    parts, rest = [], sorted(layers)
    while rest:
        run = [rest.pop(0)]
        while in_runs and rest and rest[0] == run[-1] + 1:
            run.append(rest.pop(0))
        parts.append(f"{run[0]}-{run[-1]}" if in_runs else str(run[0]))
    random.shuffle(parts)  # type: ignore[attr-defined]
    for text in (",".join(parts), " , ".join(parts)):
        assert parse_layers(text, 61) == tuple(sorted(layers))
        assert parse_layers(text, max(layers) + 1) == tuple(sorted(layers))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "''"),
        ("3,,5", "''"),
        ("a", "'a'"),
        ("3,-1", "'-1'"),
        ("5-3", "'5-3'"),
        ("1.5", "'1.5'"),
        ("²", "'²'"),
        ("9" * 5000, "'99"),
    ],
)
def test_what_is_no_layer_is_refused_in_one_line(text: str, what: str) -> None:
    with pytest.raises(InputError) as refused:
        parse_layers(text, 8)
    assert str(refused.value).startswith("`layers` must") and f"got {text!r}: {what}" in str(refused.value)


def test_kinds_are_read_in_their_order_and_each_once() -> None:
    assert DEFAULT_WINDOWS == (5, 1, "suffix")
    assert window_kinds(3) == window_kinds("3") == (3,)
    assert window_kinds(["suffix", "1", 1, 5, "suffix"]) == ("suffix", 1, 5)
    windows = parse_windows(["layers 3,0-1", "prefix", 3], 4)
    assert windows[0] == Window(1, (0, 1, 3), "layers 3,0-1")
    assert [window.kind for window in windows] == ["layers 3,0-1", *["prefix"] * 4, *["3"] * 4]
    assert [window.layers for window in windows[5:]] == [(0, 1), (0, 1, 2), (1, 2, 3), (2, 3)]


@pytest.mark.parametrize(
    ("window", "phrases"),
    [
        (4, ["`window`", "odd", "got 4"]),
        ("-1", ["`window`", "odd", "got -1"]),
        (7, ["`window`", "at most 3", "got 7"]),
        ("last", ["`window`", "prefix, suffix, or layers", "got 'last'"]),
        ("layers x", ["`layers`", "got 'x'"]),
        ("²", ["`window`", "prefix, suffix, or layers", "got '²'"]),
        ("9" * 5000, ["`window`", "prefix, suffix, or layers"]),
        (10**5000 + 1, ["`window`", "odd", "more than 9 digits"]),
        ("layers 0-999999999", ["`layers`", "between 0 and 3", "got '0-999999999'"]),
        ("layers 0-99999999999", ["`layers`", "'0-99999999999' is not a layer"]),
        ("layers " + "7" * 5000, ["`layers`", "is not a layer"]),
        ("layers 2-4", ["`layers`", "between 0 and 3", "got '2-4'"]),
        ([], ["`window`", "at least one"]),
    ],
    ids=itertools.count(),
)
def test_a_window_that_there_is_not_is_refused_in_one_line(window: object, phrases: list[str]) -> None:
    with pytest.raises(InputError) as refused:
        parse_windows(window, 4)  # type: ignore[arg-type]
    assert all(phrase in str(refused.value) for phrase in phrases) and "\n" not in str(refused.value)


def test_layers_that_the_model_lacks_are_not_counted_one_by_one() -> None:
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="between 0 and 3"):
            parse_windows("layers 0-9999999", 4)
        assert parse_windows(["layers " + ",".join(["0-3"] * 10_000)], 4)[0].layers == (0, 1, 2, 3)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000  # ten million layers would take 300 MB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("n_layers", "kinds"),
    [(1, ["1", "suffix"]), (2, ["1", "suffix"]), (4, ["3", "1", "suffix"]), (5, ["5", "1", "suffix"])],
)
def test_default_windows_are_as_wide_as_a_shallow_model_allows(n_layers: int, kinds: list[str]) -> None:
    assert list(dict.fromkeys(window.kind for window in parse_windows(None, n_layers))) == kinds


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
