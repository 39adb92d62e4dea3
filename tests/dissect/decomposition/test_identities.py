"""What the split must give by algebra, and what the reference engine and plain hooks give for the same additions.

| changed at layer l      | weight alone at l | coefficient alone at l | all three at l |
|-------------------------|-------------------|------------------------|----------------|
| down projection         | 1, share 1        | 0, share 0             | 1              |
| gate or up projection   | 0, share 0        | 1, share 1             | 1              |
| all of the MLP          | any               | any                    | 1              |
"""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from dissect.decomposition.rows import NO_CHANGE
from dissect.decomposition.run import decompose
from dissect.decomposition.terms import (
    EXACT,
    SITES,
    SYMMETRIC,
    TERMS,
    Change,
    Hook,
    affine,
    can_resume,
    hooked,
    logits_with_term,
    record,
    scored,
    site_modules,
)
from dissect.engine import reference
from dissect.models.pair import ModelPair
from dissect.prompts.prompts import Batch, Prompts
from dissect.scoring.recovery import knowledge_recovery_score, logit_mse, per_example
from dissect.scoring.rows import NO_DIFFERENCE
from tests.dissect.helpers import (
    RECORDS,
    PlainPatcher,
    assert_close,
    build_batch,
    build_pair,
    build_prompts,
    plain_inputs,
    torch_state,
)

FAMILIES = [
    *["llama", "gpt2", "neox", "gemma2", "phi3", "olmo2"],
    *[pytest.param(family, marks=pytest.mark.slow) for family in ("opt", "bloom", "falcon")],
]
EXACT_GAP = 1e-9
LAYER = 1
DOWN = r"mlp\.(down_proj|dense_4h_to_h|c_proj)\."
KEYS = r"mlp\.(gate_proj|up_proj|gate_up_proj|dense_h_to_4h|c_fc)\."


@pytest.fixture
def prompts(tmp_path: Path) -> Prompts:
    return build_prompts(tmp_path)


def only(pattern: str, layer: int = LAYER) -> Callable[[str], bool]:
    return lambda name: re.search(rf"(layers|h)\.{layer}\.{pattern}", name) is not None


def run(pair: ModelPair, prompts: Prompts, **options: object) -> pd.DataFrame:
    if pair.base.adapter.cfg.architecture == "Gemma2ForCausalLM" and pair.base.dtype == "float64":
        options["batch_size"] = 1  # in float64 transformers' eager attention gives NaN on padding
    return decompose(pair, prompts, control=None, progress=False, **options).frame  # type: ignore[arg-type]


def cells(frame: pd.DataFrame, term: str, *, site: str = "mlp_out", layer: int = LAYER) -> pd.DataFrame:
    rows = frame[
        (frame["term"] == term)
        & (frame["site"] == site)
        & (frame["first_layer"] == layer)
        & (frame["last_layer"] == layer)
    ]
    assert len(rows) == len(RECORDS)
    return rows


def assert_all(rows: pd.DataFrame, column: str, expected: float, *, atol: float = EXACT_GAP) -> None:
    assert_close(rows[column].to_numpy(), np.full(len(rows), expected), atol=atol)


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_three_terms_add_up_to_what_the_modules_give(
    family: str, dtype: torch.dtype, relative: float, tmp_path: Path
) -> None:
    """The oracle is each module's own output in its model's own forward, biases included."""
    pair = build_pair(family, dtype=dtype)
    batch = build_batch(tmp_path, "left") if dtype == torch.float32 else build_prompts(tmp_path).batches(1)[0]
    base = record(pair.base, batch, SITES, everywhere=True)
    own = record(pair.unlearned, batch, SITES, everywhere=False)
    for site in SITES:
        for layer, (theirs, ours) in enumerate(
            zip(site_modules(pair.base, site), site_modules(pair.unlearned, site), strict=True)
        ):
            m_base, m_unlearned = scored(base.inputs[site, layer], batch), own.inputs[site, layer]
            with torch.inference_mode():
                whole = theirs(m_base) - ours(m_unlearned)
                change = Change.of(theirs, ours)
                terms = {term: change.term(parts, m_base, m_unlearned) for term, parts in TERMS.items()}
            size = whole.norm()
            assert size > 0.01
            assert (terms["total"] - whole).norm() <= relative * size
            assert (sum(terms[term] for term in EXACT) - whole).norm() <= relative * size
            assert (sum(terms[term] for term in SYMMETRIC) - whole).norm() <= relative * size
            # each of them by what the modules answer to the other's input
            with torch.inference_mode():
                assert (own.outputs[site, layer] - ours(m_unlearned)).norm() <= relative * size
                assert (terms["weight"] - (theirs(m_unlearned) - ours(m_unlearned))).norm() <= relative * size
                assert (terms["coefficient"] - (ours(m_base) - ours(m_unlearned))).norm() <= relative * size


def test_a_term_far_smaller_than_the_outputs_keeps_its_digits() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.nn.Linear(64, 32), torch.nn.Linear(64, 32)
    with torch.inference_mode():
        theirs.weight.copy_(ours.weight + 1e-4 * torch.randn(32, 64, generator=generator))
        m_u = torch.randn(5, 64, generator=generator)
        m_b = m_u + 1e-3 * torch.randn(5, 64, generator=generator)
        found = Change.of(theirs, ours).term(TERMS["interaction"], m_b, m_u)
        exact = (m_b.double() - m_u.double()) @ (theirs.weight.double() - ours.weight.double()).T
        naive = (theirs(m_b) - theirs(m_u)) - (ours(m_b) - ours(m_u))
    assert (found - exact).norm() <= 1e-3 * exact.norm()  # as a difference of outputs it would be noise
    assert (naive - exact).norm() > 0.05 * exact.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_shares_add_up_to_one_at_every_position(family: str, prompts: Prompts) -> None:
    result = decompose(build_pair(family), prompts, control=None, progress=False)
    keys = ["site", "first_layer", "last_layer", "example_index", "position"]
    wide = result.positions.pivot(index=keys, columns="term", values="share")
    assert not wide.isna().any(axis=None)
    for terms in (EXACT, SYMMETRIC):
        assert_close(wide[list(terms)].sum(axis=1).to_numpy(), np.ones(len(wide)), atol=1e-12)
    assert_close(wide["total"].to_numpy(), np.ones(len(wide)), atol=1e-12)
    by_example = result.frame.pivot(index=keys[:-1], columns="term", values="share")
    assert_close(by_example[list(EXACT)].sum(axis=1).to_numpy(), np.ones(len(by_example)), atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "gemma2", "phi3", "olmo2"])
def test_all_three_restore_all_where_one_layers_mlp_changed(family: str, prompts: Prompts) -> None:
    frame = run(build_pair(family, chosen=only(r"mlp\."), tied=False, dtype=torch.float64), prompts)
    assert (frame["loss_unlearned"] > 1e-4).all()
    assert_all(cells(frame, "total"), "krs", 1)
    for term in EXACT:
        assert (np.abs(cells(frame, term)["krs"]) > 1e-6).all()
    before = frame[(frame["last_layer"] < LAYER)]
    assert_all(before, "krs", 0)  # nothing differs there, so nothing is added
    assert (before["share_undefined"] == NO_CHANGE).all() and before["share"].isna().all()


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "gemma2", "phi3", "olmo2"])
def test_a_changed_down_projection_is_all_weight(family: str, prompts: Prompts) -> None:
    frame = run(build_pair(family, chosen=only(DOWN), tied=False, dtype=torch.float64), prompts)
    assert_all(cells(frame, "weight"), "krs", 1)
    assert_all(cells(frame, "weight"), "share", 1)
    for term in ("coefficient", "interaction"):
        for column in ("krs", "share", "norm", "direct"):
            assert_all(cells(frame, term), column, 0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "gemma2", "phi3", "olmo2"])
def test_a_changed_key_is_all_coefficient(family: str, prompts: Prompts) -> None:
    frame = run(build_pair(family, chosen=only(KEYS), tied=False, dtype=torch.float64), prompts)
    assert_all(cells(frame, "coefficient"), "krs", 1)
    assert_all(cells(frame, "coefficient"), "share", 1)
    for term in ("weight", "interaction"):
        for column in ("krs", "share", "norm", "direct"):
            assert_all(cells(frame, term), column, 0)


@pytest.mark.parametrize(
    ("family", "pattern"),
    [("llama", r"self_attn\.o_proj"), ("gpt2", r"attn\.c_proj"), ("neox", r"attention\.dense"), ("olmo2", "o_proj")],
)
def test_a_changed_output_projection_is_all_weight_of_the_attention(
    family: str, pattern: str, prompts: Prompts
) -> None:
    frame = run(build_pair(family, chosen=only(rf".*{pattern}"), tied=False, dtype=torch.float64), prompts)
    for column in ("krs", "share"):
        assert_all(cells(frame, "weight", site="attn_out"), column, 1)
        assert_all(cells(frame, "coefficient", site="attn_out"), column, 0)
    assert_all(cells(frame, "total", site="attn_out"), "krs", 1)


def reference_krs(pair: ModelPair, batch: Batch, hooks: list[tuple[str, reference.Hook]], base: torch.Tensor) -> object:
    before, after = (
        per_example(logit_mse(base, logits), batch.rows, len(batch.examples))
        for logits in (
            reference.scored_logits(pair.unlearned, batch, []),
            reference.scored_logits(pair.unlearned, batch, hooks),
        )
    )
    return knowledge_recovery_score(after, before)


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "gemma2", "phi3", "olmo2"])
@pytest.mark.parametrize(
    ("site", "term", "hook"),
    [
        ("mlp_out", "total", "blocks.{}.mlp.hook_out"),
        ("mlp_out", "coefficient", "blocks.{}.mlp.out.hook_in"),
        ("attn_out", "total", "blocks.{}.attn.hook_out"),
    ],
)
def test_terms_are_what_the_reference_engine_patches(
    family: str, site: str, term: str, hook: str, prompts: Prompts
) -> None:
    """In one layer and in all: all three are the patched output, the coefficient term is the patched input."""
    pair = build_pair(family)
    (batch,) = prompts.batches(len(prompts))
    points = [hook.format(layer) for layer in range(pair.n_layers)]
    base, donor = reference.record(pair.base, batch, points)
    frame = run(pair, prompts)
    for first, last in [(0, 0), (1, 1), (2, 2), (0, 2)]:
        hooks: list[tuple[str, reference.Hook]] = [
            (point, lambda _activation, hook: donor[hook.name]) for point in points[first : last + 1]
        ]
        expected = reference_krs(pair, batch, hooks, base)
        here = (frame["first_layer"] == first) & (frame["last_layer"] == last)
        found = frame[here & (frame["site"] == site) & (frame["term"] == term)]["krs"].to_numpy()
        assert_close(found, expected, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox"])
def test_the_weight_term_is_the_restored_weight(family: str, prompts: Prompts) -> None:
    """In one layer and in all, by plain hooks that let the base's down projection answer."""
    pair = build_pair(family)
    (batch,) = prompts.batches(len(prompts))
    patcher = PlainPatcher(pair.base.hf, pair.unlearned.hf, plain_inputs(pair.unlearned, batch))
    base, before = (scored(logits, batch) for logits in (patcher.base_logits(), patcher.logits()))
    frame = run(pair, prompts, sites="mlp_out")
    for first, last in [(0, 0), (1, 1), (2, 2), (0, 2)]:
        after = scored(patcher.logits(("value_vectors",), range(first, last + 1)), batch)
        expected = knowledge_recovery_score(
            *(per_example(logit_mse(base, logits), batch.rows, len(batch.examples)) for logits in (after, before))
        )
        here = (frame["first_layer"] == first) & (frame["last_layer"] == last) & (frame["term"] == "weight")
        assert_close(frame[here]["krs"].to_numpy(), expected, atol=1e-5)


def test_over_all_layers_terms_stand_side_by_side(prompts: Prompts) -> None:
    pair = build_pair("llama")
    positions = decompose(pair, prompts, control=None, progress=False).positions
    keys = ["site", "term", "example_index", "position"]
    single = positions[positions["first_layer"] == positions["last_layer"]]
    summed = single.assign(square=single["norm"] ** 2).groupby(keys)[["square", "direct"]].sum()
    whole = positions[positions["first_layer"] < positions["last_layer"]].set_index(keys).sort_index()
    assert_close(whole["norm"].to_numpy() ** 2, summed["square"].to_numpy(), atol=1e-8)
    assert_close(whole["direct"].to_numpy(), summed["direct"].to_numpy(), atol=1e-10)


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox"])
def test_identical_models_have_no_score_and_no_share_and_say_so(family: str, prompts: Prompts) -> None:
    pair = build_pair(family, scale=0.0)
    result = decompose(pair, prompts, control=pair.unlearned, progress=False)
    assert result.arms == ["main", "control"]
    frame = result.frame
    assert frame["krs"].isna().all() and (frame["undefined"] == NO_DIFFERENCE).all()
    assert frame["share"].isna().all() and (frame["share_undefined"] == NO_CHANGE).all()
    assert (frame["norm"] == 0).all() and (frame["direct"] == 0).all()
    curve = result.curve()
    for column in ("krs", "krs_low", "krs_ratio_of_means", "share", "share_pooled", "kl_recovery"):
        assert curve[column].isna().all()
    assert (curve["n_undefined"] == len(RECORDS)).all() and (curve["n_share_undefined"] == len(RECORDS)).all()
    assert result.contrast()["krs"].isna().all()
    reasons = result.undefined()
    assert set(reasons["number"]) == {"krs", "share"}
    assert (reasons["examples"] == len(RECORDS)).all()
    for table in (frame, curve, result.contrast()):
        assert not np.isinf(table.select_dtypes("number").to_numpy(np.float64)).any()


def test_a_change_of_rounding_size_is_none(prompts: Prompts) -> None:
    """Shares of noise would be noise: below ten epsilons of the output there is nothing to share out."""
    pair = build_pair("llama", chosen=only(DOWN), scale=1e-16, dtype=torch.float64)
    frame = run(pair, prompts, sites="mlp_out")
    here = cells(frame, "weight")
    assert (here["norm"] > 0).all() and (here["norm"] < 1e-14 * here["base_norm"]).all()
    assert here["share"].isna().all() and (here["share_undefined"] == NO_CHANGE).all()
    assert here["krs"].isna().all() and (here["undefined"] == NO_DIFFERENCE).all()
    larger = build_pair("llama", chosen=only(DOWN), scale=1e-12, dtype=torch.float64)
    assert_all(cells(run(larger, prompts, sites="mlp_out"), "weight"), "share", 1, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_batch_size_order_and_padding_side_change_nothing(family: str, tmp_path: Path) -> None:
    pair = build_pair(family, dtype=torch.float64)
    together = build_prompts(tmp_path)
    backwards = build_prompts(tmp_path, RECORDS[::-1])
    keys = ["site", "first_layer", "last_layer", "term", "example"]
    frames = [
        run(pair, together),
        run(pair, together, padding_side="left"),
        run(pair, together, batch_size=1),
        run(pair, backwards, batch_size=2, padding_side="left"),
    ]
    first, *others = [frame.set_index(keys).sort_index().select_dtypes(np.float64) for frame in frames]
    for other in others:
        assert_close(other.to_numpy(), first.to_numpy(), atol=1e-9)


def test_models_are_left_as_they_were(prompts: Prompts) -> None:
    pair = build_pair("llama")
    before = [torch_state(model) for model in (pair.base, pair.unlearned)]
    run(pair, prompts)
    assert [torch_state(model) for model in (pair.base, pair.unlearned)] == before


def test_a_biased_transposed_projection_is_read_as_a_linear_one() -> None:
    (module,) = site_modules(build_pair("gpt2", n_layers=1).base, "mlp_out")
    weight, bias = affine(module)
    m = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(0))
    assert bias is not None
    with torch.inference_mode():
        assert_close(m @ weight.T + bias, module(m), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_before_the_first_addition_are_left_out_and_change_nothing(family: str, tmp_path: Path) -> None:
    pair = build_pair(family)
    batch = build_batch(tmp_path, "left")
    base = record(pair.base, batch, ("mlp_out",), everywhere=True)
    own = record(pair.unlearned, batch, ("mlp_out",), everywhere=False)
    assert can_resume(pair.unlearned, batch, own)
    modules = site_modules(pair.unlearned, "mlp_out")
    changes = {2: Change.of(site_modules(pair.base, "mlp_out")[2], modules[2])}
    ran: list[int] = []
    hooks: list[Hook] = [
        (module, "pre", lambda _module, _args, layer=layer: ran.append(layer)) for layer, module in enumerate(modules)
    ]
    with hooked(hooks):
        whole = logits_with_term(pair.unlearned, batch, changes, "mlp_out", "total", base)
        short = logits_with_term(pair.unlearned, batch, changes, "mlp_out", "total", base, own)
    assert ran == [0, 1, 2, 2]
    assert (whole - own.logits).abs().max() > 1e-2
    assert_close(short, whole, atol=1e-5)


def test_a_model_that_passes_more_than_states_between_its_blocks_is_run_whole(
    prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last block adds what the first one's MLP left behind, which a skipped block would not leave."""
    pair = build_pair("llama")
    left: dict[str, torch.Tensor] = {}
    first, last = pair.unlearned.hf.model.layers[0], pair.unlearned.hf.model.layers[2]
    first.mlp.register_forward_hook(lambda _module, _args, output: left.__setitem__("output", output))
    last.register_forward_hook(lambda _module, _args, output: output + left.pop("output", torch.zeros(())))
    (batch,) = prompts.batches(len(prompts))
    assert not can_resume(pair.unlearned, batch, record(pair.unlearned, batch, ("mlp_out",), everywhere=False))
    found = run(pair, prompts, sites="mlp_out")
    monkeypatch.setattr("dissect.decomposition.run.can_resume", lambda *_arguments: False)
    assert_close(found["krs"].to_numpy(), run(pair, prompts, sites="mlp_out")["krs"].to_numpy(), atol=0)
    monkeypatch.setattr("dissect.decomposition.run.can_resume", lambda *_arguments: True)
    assert (found["krs"] - run(pair, prompts, sites="mlp_out")["krs"]).abs().max() > 1e-2
