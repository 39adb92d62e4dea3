"""The schedule against what every intervention does by itself, followed layer by layer."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from dissect.engine.schedule import Schedule, Step, make_schedule
from dissect.interventions.intervention import Intervention, sweep
from dissect.interventions.windows import Window, centred_windows
from dissect.models.sites import PATCH_SITES, SITES, WEIGHT_SITES

N_LAYERS = 5
WINDOW = st.tuples(*[st.integers(0, N_LAYERS - 1)] * 2).map(
    lambda ends: Window(min(ends), tuple(range(min(ends), max(ends) + 1)))
)
ANY_SITES = st.lists(st.sampled_from([*SITES, *WEIGHT_SITES]), min_size=1, max_size=3, unique=True).map(tuple)
INTERVENTIONS = st.lists(st.builds(Intervention, ANY_SITES, WINDOW), min_size=1, max_size=8)

REPLACED_ATTENTION = {"attn_out", "resid_post"}


def history(intervention: Intervention) -> tuple[frozenset[str], ...]:
    return tuple(intervention.sites_at(layer) for layer in range(N_LAYERS))


def way(schedule: Schedule, end: int) -> list[Step]:
    """The steps that lead to a stream, first layer first, found by following parents back."""
    steps: list[Step] = []
    for layer in reversed(schedule.layers):
        (step,) = [step for step in layer if step.branch == end]
        steps.insert(0, step)
        end = step.parent
    assert end == 0
    return steps


@settings(max_examples=200, derandomize=True)
@given(INTERVENTIONS)
def test_every_end_has_gone_through_exactly_its_own_replacements(interventions: list[Intervention]) -> None:
    schedule = make_schedule(interventions, N_LAYERS)
    assert schedule.n_layers == N_LAYERS
    assert len(schedule.ends) == len(interventions)
    for intervention, (end, _) in zip(interventions, schedule.ends, strict=True):
        assert tuple(step.sites for step in way(schedule, end)) == history(intervention)
    assert all(step.sites == frozenset() for step in way(schedule, 0))


@settings(max_examples=200, derandomize=True)
@given(INTERVENTIONS)
def test_nothing_is_computed_twice_or_before_its_window(interventions: list[Intervention]) -> None:
    """One step for every different beginning of a history, the target's own untouched one included."""
    schedule = make_schedule(interventions, N_LAYERS)
    histories = {history(intervention) for intervention in interventions} | {(frozenset(),) * N_LAYERS}
    for layer, steps in enumerate(schedule.layers):
        beginnings = Counter(
            tuple(step.sites for step in way(Schedule({}, schedule.layers[: layer + 1], ()), one.branch))
            for one in steps
        )
        assert set(beginnings) == {one[: layer + 1] for one in histories}
        assert set(beginnings.values()) == {1}
        assert len({step.branch for step in steps}) == len(steps)
    first = min(intervention.window.first for intervention in interventions)
    assert all([step.branch for step in steps] == [0] for steps in schedule.layers[:first])


@settings(max_examples=200, derandomize=True)
@given(INTERVENTIONS)
def test_positions_are_needed_while_some_attention_still_reads_them(interventions: list[Intervention]) -> None:
    """Liveness worked out backwards over the steps, from the logits that need the scored positions only."""
    schedule = make_schedule(interventions, N_LAYERS)
    children_need: set[int] = set()
    for number in reversed(range(N_LAYERS)):
        entering: set[int] = set()
        for step in schedule.layers[number]:
            assert step.needs_all_out == (step.branch in children_need)
            needs_in = step.needs_all_out or not step.sites & REPLACED_ATTENTION
            assert step.needs_all_in == needs_in
            if needs_in:
                entering.add(step.parent)
        children_need = entering


@settings(max_examples=200, derandomize=True)
@given(INTERVENTIONS)
def test_siblings_lend_and_borrow_where_one_goes_untouched(interventions: list[Intervention]) -> None:
    for steps in make_schedule(interventions, N_LAYERS).layers:
        seen: set[int] = set()
        for step in steps:
            siblings = [other for other in steps if other.parent == step.parent and other is not step]
            untouched = [other for other in siblings if not other.sites]
            assert step.shares_attention == (not step.sites and bool(siblings))
            assert step.has_sibling == (bool(step.sites) and bool(untouched))
            if step.has_sibling:  # whom it reuses_attention from went before, and had every position that it needs
                assert untouched[0].branch in seen
                assert untouched[0].needs_all_out or not step.needs_all_out
            seen.add(step.branch)


def step_of(*sites: str, has_sibling: bool = False) -> Step:
    return Step(0, 1, frozenset(sites), False, has_sibling, needs_all_in=True, needs_all_out=True)


def test_what_a_replacement_makes_pointless_is_not_computed() -> None:
    """(computes attention, computes MLP) by what is replaced, alone and beside an untouched sibling."""
    table = {
        (): ((True, True), (False, True)),
        ("attn_out",): ((False, True), (False, True)),
        ("mlp_coef",): ((True, False), (False, False)),
        ("mlp_out",): ((True, False), (False, False)),
        ("mlp_coef", "attn_out"): ((False, False), (False, False)),
        ("resid_post",): ((False, False), (False, False)),
        ("value_vectors",): ((True, True), (False, False)),
        ("attn_out", "value_vectors"): ((False, True), (False, True)),
        ("mlp_coef", "value_vectors"): ((True, False), (False, False)),
        ("key_vectors",): ((True, True), (False, True)),
        ("key_vectors", "value_vectors"): ((True, True), (False, True)),
        ("mlp_coef", "key_vectors"): ((True, False), (False, False)),
        ("attn_weights",): ((True, True), (True, True)),
        ("attn_weights", "value_vectors"): ((True, True), (True, True)),
        ("attn_out", "attn_weights"): ((False, True), (False, True)),
        ("norms", "mlp_coef"): ((True, False), (True, False)),
        ("/regex/",): ((True, True), (True, True)),
    }
    for sites, expected in table.items():
        steps = step_of(*sites), step_of(*sites, has_sibling=True)
        assert tuple((step.computes_attn, step.computes_mlp) for step in steps) == expected, sites


def test_the_streams_of_a_small_sweep_are_those_counted_by_hand() -> None:
    """Three layers, width 3, one site: windows 0..1, 0..2, 1..2.

    layer 0: the target, and one stream for the first two windows
    layer 1: the target, that stream, and one that forks for the third window
    layer 2: the target; the first window ends and parts from the second; the third goes on
    """
    schedule = make_schedule(sweep([("mlp_coef",)], centred_windows(3, 3)), 3)
    assert [len(steps) for steps in schedule.layers] == [2, 3, 4]
    assert schedule.max_branches == 6  # three enter the last layer, four leave it, and the target is both
    ends = {stream for stream, _ in schedule.ends}
    assert len(ends) == 3 and 0 not in ends


def test_the_copies_of_a_sweep_are_no_more_than_its_interventions_and_the_target() -> None:
    interventions = sweep(PATCH_SITES, centred_windows(9, 5))
    schedule = make_schedule(interventions, 9)
    assert max(map(len, schedule.layers)) <= len(interventions) + 1
    assert schedule.max_branches <= 2 * len(interventions) + 1
