"""Operations against those that torch itself counts, and bytes against what must at least be held."""

from collections.abc import Sequence

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dissect.engine.costs import costs_of, pass_bytes, pass_flops
from dissect.engine.layer_run import LayerRun, model_state
from dissect.engine.proof import prove_weights_only
from dissect.engine.schedule import make_schedule
from dissect.engine.wavefront import _mlp_traits
from dissect.interventions.donors import Donor, own_activations
from dissect.interventions.intervention import Intervention, sweep
from dissect.interventions.windows import centred_windows
from dissect.models.anatomy import block_of
from dissect.models.model import Model
from dissect.models.pair import ModelPair
from dissect.models.sites import PATCH_SITES
from dissect.prompts.prompts import Batch
from dissect.scoring.forward import scored_logits
from tests.dissect.families import CONFIGURATIONS, build
from tests.dissect.helpers import build_pair, change_weights, run_engine
from tests.unlearning.helpers import build_tokenizer
from unlearning.common.errors import InputError

POSITIONS = 40


def build_eager_pair(family: str) -> ModelPair:
    """The counter knows eager attention's two products."""
    pair = build_pair(family)
    for model in (pair.base, pair.unlearned):
        model.hf.set_attn_implementation("eager")
    return pair


def build_lengths(lengths: Sequence[int], n_scored: int = 3) -> Batch:
    """Right-padded rows of so many tokens, scored at their last positions."""
    ids = torch.arange(len(lengths) * POSITIONS).view(len(lengths), POSITIONS) % 300 + 1
    mask = (torch.arange(POSITIONS) < torch.tensor(lengths)[:, None]).long()
    places = [(row, length - back) for row, length in enumerate(lengths) for back in range(n_scored, 0, -1)]
    rows, columns = torch.tensor(places).T
    return Batch(
        examples=tuple(range(len(lengths))),
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        rows=rows,
        columns=columns,
        next_tokens=torch.ones_like(rows),
    )


BATCHES = {"dense": build_lengths([POSITIONS] * 2), "padded": build_lengths([POSITIONS, 9])}
SITE_SETS = [
    *[("mlp_coef",), ("attn_out",), ("mlp_out",), ("resid_post",), ("mlp_coef", "attn_out"), ("value_vectors",)],
    *[("attn_out", "value_vectors"), ("attn_out", "mlp_out")],
]


def counted(pair: ModelPair, batch: Batch, interventions: Sequence[Intervention], *, targets: int = 1) -> int:
    with FlopCounterMode(display=False) as counter:
        run_engine("wavefront", [pair.base, *[pair.unlearned] * targets], [batch], interventions, chunk_tokens=200)
    return int(counter.get_total_flops())


def proofs(pair: ModelPair, batch: Batch, *, targets: int = 1, layers: Sequence[int] = (0,)) -> int:
    """What finding out about each form of block, and proving the sweep on one row, takes once in a walk."""
    row = batch.pieces(1)[0]
    state = model_state(pair.base, row.trimmed())
    with FlopCounterMode(display=False) as counter:
        for layer in layers:
            _mlp_traits(layer, block_of(pair.base.hf, pair.base.anatomy, layer), state)
        scored_logits(pair.base, row)
        prove_weights_only(pair.base, [pair.unlearned] * targets, batch)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "gemma2", "phi3", "qwen3", "mixtral", "opt", "falcon"])
def test_a_plain_forward_is_counted_to_the_operation(family: str) -> None:
    pair, batch = build_eager_pair(family), BATCHES["dense"]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        pair.base.hf(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    costs = costs_of(pair.base)
    assert costs.forward(*batch.input_ids.shape) == counter.get_total_flops()
    fewer = 2 * costs.head * (batch.input_ids.numel() - 5)
    assert costs.forward(*batch.input_ids.shape, logits_at=5) == counter.get_total_flops() - fewer


_BY_DEFAULT = (
    *(
        "mixtral",
        "qwen2 mixture",
        "qwen3 mixture, one dense layer",
        "gpt-oss",
        "olmoe",
        "glm 4 mixture",
        "granite mixture",
    ),
    *("deepseek v3", "llama 4", "jet mixture", "gemma 4 mixture", "ernie 4.5 mixture", "opt, projected", "laguna"),
)
_MORE = {"falcon h1": "the scan of its states", "glm 5": "its indexer"}
"""What some families compute beside products with weights and attention scores."""


def eager(name: str) -> Model:
    """A random model whose operations torch can count, without the checks of loading."""
    hf = build(name)
    hf.set_attn_implementation("eager")
    if hf._can_set_experts_implementation():
        hf.set_experts_implementation("eager")  # the grouped product is not counted
    return Model(name, hf, build_tokenizer(), sha256=name)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in _BY_DEFAULT else pytest.mark.slow) for name in CONFIGURATIONS]
)
def test_every_family_s_layers_are_counted_to_the_operation(name: str) -> None:
    """Dense layers beside mixtures, shared experts, latent attention, all names for the number of active experts."""
    model, batch = eager(name), BATCHES["dense"]
    try:
        costs = costs_of(model)
    except InputError as refused:
        pytest.skip(str(refused))
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model.hf(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    counted, expected = costs.forward(*batch.input_ids.shape), counter.get_total_flops()
    assert 0 < counted < expected if name in _MORE else counted == expected


def test_layers_of_different_size_are_told_apart() -> None:
    dense, *mixtures = costs_of(eager("deepseek v3")).layers
    width, inner, expert = 32, 48, 24
    assert dense.mlp == 3 * width * inner
    shared_and_active, router = 3 * width * expert * (1 + 2), 4 * width
    assert [layer.mlp for layer in mixtures] == [shared_and_active + router] * 2
    assert [layer.d_mlp for layer in (dense, *mixtures)] == [inner, 3 * expert, 3 * expert]


@pytest.mark.parametrize("active", [1, 3])
@pytest.mark.parametrize(
    ("name", "field"),
    [
        *[("mixtral", "num_experts_per_tok"), ("ernie 4.5 mixture", "moe_k"), ("gemma 4 mixture", "top_k_experts")],
        *[("gpt-oss", "num_experts_per_tok"), ("deepseek v3", "num_experts_per_tok")],
    ],
)
def test_experts_count_as_often_as_they_are_chosen(name: str, field: str, active: int) -> None:
    """One expert more is one expert's matrices more."""

    def weights(n: int) -> int:
        model = Model(name, build(name, **{field: n}), build_tokenizer(), sha256="")
        return sum(layer.mlp for layer in costs_of(model).layers)

    of_all = sum(p.numel() for key, p in build(name).named_parameters() if p.dim() == 3 and "bias" not in key)
    assert weights(active + 1) - weights(active) == of_all // 4


@pytest.mark.parametrize("name", ["deepseek v3", "glm 4 mixture"])
def test_a_walk_over_dense_and_expert_layers_is_counted_to_the_operation(name: str) -> None:
    base, unlearned = eager(name), eager(name)
    change_weights(unlearned.hf, scale=0.05)
    pair, batch = ModelPair(base, unlearned), BATCHES["padded"]
    assert base.weights.n_layers == unlearned.weights.n_layers == 3  # finding them runs a head once
    once = proofs(pair, batch, layers=(0, 1))
    for sites in [("attn_out",), ("mlp_out",), ("resid_post",)]:
        interventions = sweep([sites], centred_windows(3, 3), base.weights)
        expected = pass_flops(make_schedule(interventions, 3), costs_of(base), batch, 1) + once
        assert counted(pair, batch, interventions) == expected, sites


@pytest.mark.parametrize("padding", BATCHES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "gemma2", "mixtral"])
def test_a_walk_is_counted_to_the_operation(family: str, padding: str) -> None:
    """Everything that is left out is left out of the count, and nothing else."""
    pair, batch = build_eager_pair(family), BATCHES[padding]
    costs = costs_of(pair.base)
    for sites in SITE_SETS:
        if set(sites) & set(pair.base.missing_sites):
            continue
        interventions = sweep([sites], centred_windows(3, 3), pair.base.weights)
        expected = pass_flops(make_schedule(interventions, 3), costs, batch, 1) + proofs(pair, batch)
        assert counted(pair, batch, interventions) == expected, sites


def test_sites_together_and_several_targets_are_counted_to_the_operation() -> None:
    pair, batch = build_eager_pair("llama"), BATCHES["padded"]
    costs = costs_of(pair.base)
    interventions = sweep([*PATCH_SITES, ("value_vectors",)], centred_windows(3, 1), pair.base.weights)
    schedule = make_schedule(interventions, 3)
    one, two = (pass_flops(schedule, costs, batch, targets) for targets in (1, 2))
    assert counted(pair, batch, interventions) == one + proofs(pair, batch)
    assert counted(pair, batch, interventions, targets=2) == two + proofs(pair, batch, targets=2)
    # One base for both targets.
    base = one - (two - one)
    assert 0 < base < costs.forward(*batch.input_ids.shape)


RESTORED = [
    *[
        ("key_vectors",),
        ("attn_weights",),
        ("norms",),
        ("embed",),
        ("unembed",),
        ("W_O",),
        ("mlp_coef", "value_vectors"),
    ],
    *[("attn_out", "key_vectors"), ("mlp_coef", "norms"), ("embed", "attn_weights"), ("/weight/",)],
]


@pytest.mark.parametrize("padding", BATCHES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "neox"])
def test_a_walk_that_restores_is_counted_to_the_operation(family: str, padding: str) -> None:
    pair, batch = build_eager_pair(family), BATCHES[padding]
    costs = costs_of(pair.base)
    once = proofs(pair, batch)
    for sites in RESTORED:
        interventions = sweep([sites], centred_windows(3, 3), pair.base.weights)
        expected = pass_flops(make_schedule(interventions, 3), costs, batch, 1) + once
        assert counted(pair, batch, interventions) == expected, sites
    together = sweep(RESTORED, centred_windows(3, 1), pair.base.weights)
    once = proofs(pair, batch, targets=2)
    expected = pass_flops(make_schedule(together, 3), costs, batch, 2) + once
    assert counted(pair, batch, together, targets=2) == expected


@pytest.mark.parametrize("kind", ["other", "third"])
def test_a_donor_s_own_forward_is_counted_to_the_operation(kind: str) -> None:
    pair, batch = build_eager_pair("llama"), BATCHES["padded"]
    interventions = sweep([*PATCH_SITES], centred_windows(3, 3))
    models, donor = [pair.base, pair.unlearned], Donor(pair.base, {0: tuple(range(40)), 1: tuple(range(9))})
    if kind == "third":
        third = build_eager_pair("llama").unlearned
        models, donor = [pair.base, third, pair.unlearned], own_activations(third)
    expected = pass_flops(make_schedule(interventions, 3), costs_of(pair.base), batch, 1, n_sources=2)
    with FlopCounterMode(display=False) as counter:
        run_engine("wavefront", models, [batch], interventions, donor=donor, chunk_tokens=200)
    assert counter.get_total_flops() == expected + proofs(pair, batch)


@pytest.mark.parametrize("family", ["bloom", "opt"])
def test_where_nothing_can_be_left_out_of_the_mlp_the_count_is_a_lower_bound(family: str) -> None:
    pair, batch = build_eager_pair(family), BATCHES["dense"]
    costs = costs_of(pair.base)
    interventions = sweep(PATCH_SITES, centred_windows(3, 3))
    lower = pass_flops(make_schedule(interventions, 3), costs, batch, 1)
    naive = (2 + len(interventions)) * costs.forward(*batch.input_ids.shape)
    assert lower < counted(pair, batch, interventions) < naive


def test_streaming_does_not_change_what_is_counted() -> None:
    """Costs need shapes only: the same on a model whose weights are nowhere."""
    pair = build_pair("llama")
    before = costs_of(pair.base)
    pair.base.hf.to("meta")
    assert costs_of(pair.base) == before


def bytes_of(
    interventions: Sequence[Intervention],
    batches: Sequence[Batch] = (BATCHES["dense"],),
    n_targets: int = 1,
    chunk: int = 100,
    itemsize: int = 4,
) -> int:
    costs = costs_of(PAIR.base)
    return pass_bytes(make_schedule(interventions, 3), costs, batches, n_targets, chunk=chunk, itemsize=itemsize)


PAIR = build_pair("llama")
FEW = sweep([("mlp_coef",)], centred_windows(3, 1))
MANY = sweep(PATCH_SITES, centred_windows(3, 1))


def test_bytes_grow_with_whatever_is_more() -> None:
    least = bytes_of(FEW)
    assert bytes_of(MANY) > least
    assert bytes_of(FEW, batches=[BATCHES["dense"]] * 2) > least
    assert bytes_of(FEW, batches=[build_lengths([POSITIONS] * 4)]) > least
    assert bytes_of(FEW, batches=[build_lengths([POSITIONS] * 2, n_scored=4)]) > least
    assert bytes_of(FEW, n_targets=2) > least
    assert bytes_of(FEW, chunk=1000) > least
    assert least < bytes_of(FEW, itemsize=8) < 2 * least  # logits are float32 in any case


@pytest.mark.parametrize("n_targets", [1, 2])
@pytest.mark.parametrize("interventions", [FEW, MANY], ids=["few", "many"])
def test_bytes_cover_the_streams_that_are_held(
    interventions: Sequence[Intervention], n_targets: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of both models before and after each layer, measured on the way."""
    held: list[int] = []
    run = LayerRun.run

    def noted(layer_run: LayerRun, *arguments: object) -> None:
        before = dict(layer_run.state.branches)
        run(layer_run, *arguments)  # type: ignore[arg-type]
        states = {id(state): state for state in (*before.values(), *layer_run.state.branches.values())}
        held.append(sum(state.numel() * state.element_size() for state in states.values()))

    monkeypatch.setattr(LayerRun, "run", noted)
    batch = BATCHES["dense"]
    run_engine("wavefront", [PAIR.base, *[PAIR.unlearned] * n_targets], [batch], interventions, chunk_tokens=100)
    assert len(held) == 3 * n_targets
    assert n_targets * max(held) < bytes_of(interventions, n_targets=n_targets)
