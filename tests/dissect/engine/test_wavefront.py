"""The wavefront engine against the reference engine in float32, and against plain hooks to nine digits in float64."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dissect import load_prompts, patch
from dissect.engine import ENGINES
from dissect.interventions.arms import Arm
from dissect.interventions.intervention import Intervention
from dissect.interventions.intervention import sweep as all_in
from dissect.interventions.windows import Window, centred_windows
from dissect.models.model import Model
from dissect.models.pair import ModelPair
from dissect.models.sites import PATCH_SITES, SITES, WEIGHT_SITES, is_weight
from dissect.prompts.prompts import Batch, Prompts
from dissect.sweeps.rows import score_sweep
from tests.dissect.helpers import (
    RECORDS,
    PlainPatcher,
    Swept,
    assert_close,
    build_model,
    build_pair,
    build_prompts,
    change_weights,
    plain_inputs,
    run_engine,
    save_records,
    torch_state,
)
from unlearning.common.errors import InputError


@cache
def cached_pair(family: str, *, n_layers: int = 3, dtype: torch.dtype = torch.float32) -> ModelPair:
    """A pair that no test may change."""
    return build_pair(family, n_layers=n_layers, dtype=dtype)


FAMILIES = [
    *["llama", "mistral", "qwen2", "qwen3", "gpt2", "neox", "neox_sequential", "olmo", "olmo2", "gemma2", "phi3"],
    *["mixtral", "qwen3_moe", "opt", "bloom", "falcon", "gptj"],
]
SITE_SETS = [
    *[(site,) for site in SITES],
    ("mlp_coef", "attn_out"),
    ("attn_out", "mlp_out"),
    ("value_vectors",),
    ("attn_out", "value_vectors"),
    ("mlp_coef", "value_vectors"),
    ("mlp_coef", "attn_out", "value_vectors"),
]
CHUNKS = [1, 30, 600, 10_000]


def offered(model: Model, interventions: Sequence[Intervention]) -> list[Intervention]:
    """Those whose sites the architecture has."""
    places: list[Any] = [*range(model.n_layers), "before", "after"]

    def has(site: str) -> bool:
        return site not in model.missing_sites and (
            not is_weight(site) or any(model.weights.at([site], place) for place in places)
        )

    return [item for item in interventions if all(map(has, item.sites))]


def batches_of(kind: str, folder: Path, pair: ModelPair) -> tuple[Prompts, list[Batch]]:
    """Answer scoring padded left or right, in batches of different widths; or the notebooks' groups."""
    if kind != "notebook":
        prompts = build_prompts(folder)
        return prompts, prompts.batches(3, padding_side="left" if kind == "left" else "right")
    questions = [{"question": record["prompt"], "group": record["group"]} for record in RECORDS]
    path = save_records(folder / "questions.json", questions)
    prompts = load_prompts(
        path, pair.tokenizer, scoring="notebook", answers="base", answers_from=pair.base, max_new_tokens=20
    )
    return prompts, prompts.batches(1)


def krs(swept: Swept, prompts: Prompts, batch: Batch, interventions: Sequence[Intervention]) -> Tensor:
    """Recovery scores of one batch, [intervention * example]."""
    rows = score_sweep(
        swept, prompts, batch, interventions, arm=Arm("main", "unlearned", "base"), model_name="unlearned"
    )  # type: ignore[arg-type]
    return torch.tensor([row["krs"] for row in rows])


def assert_not_degenerate(swept: Swept) -> None:
    """Logits that tell tokens apart, and a target that differs from the base in them."""
    assert swept.base.std() > 0.5
    assert (swept.base - swept.target).square().mean().sqrt() > 0.1
    assert swept.base.std(0).mean() > 0.1  # from position to position


QUICK = ("llama", "neox", "gemma2", "bloom", "falcon")
OTHERS = ("gpt2", "phi3", "mixtral", "qwen3", "olmo2", "neox_sequential")
"""With those, every kind of block; the rest are like one of them."""
CASES = [
    *[
        pytest.param(family, "left", marks=[] if family in (*QUICK, *OTHERS) else pytest.mark.slow)
        for family in FAMILIES
    ],
    *[pytest.param(family, "right", marks=[] if family in QUICK else pytest.mark.slow) for family in FAMILIES],
    *[pytest.param(family, "notebook") for family in ("llama", "gpt2", "neox", "gemma2")],
    *[pytest.param(family, "notebook", marks=pytest.mark.slow) for family in ("mistral", "bloom")],
]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_recovery_scores_equal_the_reference_engine_s(family: str, kind: str, tmp_path: Path) -> None:
    pair = cached_pair(family)
    prompts, batches = batches_of(kind, tmp_path, pair)
    windows = [Window(0, (0,)), Window(2, (1, 2)), Window(1, (0, 1, 2))]
    planned = [item for sites in SITE_SETS for item in all_in([sites], windows, pair.base.weights)]
    items = offered(pair.base, [item for item in planned if item.kind == "patch" or item.window.centre == 2])
    models = [pair.base, pair.unlearned]
    expected = run_engine("reference", models, batches, items)
    for batch, (theirs,) in zip(batches, expected, strict=True):
        assert_not_degenerate(theirs)
        assert len({round(float(score), 3) for score in krs(theirs, prompts, batch, items)}) > len(items) // 2
    for chunk_tokens in CHUNKS:
        found = run_engine("wavefront", models, batches, items, chunk_tokens=chunk_tokens)
        for batch, (ours,), (theirs,) in zip(batches, found, expected, strict=True):
            assert_close(ours.base, theirs.base, atol=1e-4)
            assert_close(krs(ours, prompts, batch, items), krs(theirs, prompts, batch, items), atol=1e-4)


@pytest.mark.parametrize("width", [1, 3, 5, 6])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_sweeps_of_every_width_equal_the_reference_engine_s(family: str, width: int, tmp_path: Path) -> None:
    """Six layers: windows cut off at both ends share their streams; 6 is the whole model at once."""
    pair = cached_pair(family, n_layers=6)
    prompts, (batch,) = build_prompts(tmp_path), build_prompts(tmp_path).batches(16)
    windows = [Window(3, (0, 1, 2, 3, 4, 5))] if width == 6 else centred_windows(6, width)
    items = all_in([*PATCH_SITES, ("resid_post",), ("value_vectors",)], windows, pair.base.weights)
    models = [pair.base, pair.unlearned]
    ((ours,),) = run_engine("wavefront", models, [batch], items, chunk_tokens=300)
    ((theirs,),) = run_engine("reference", models, [batch], items)
    assert_close(krs(ours, prompts, batch, items), krs(theirs, prompts, batch, items), atol=1e-4)


def test_two_targets_at_once_are_each_what_it_is_alone(tmp_path: Path) -> None:
    pair, prompts = cached_pair("llama"), build_prompts(tmp_path)
    hf = build_model("llama")
    change_weights(hf, seed=5)
    control = Model.wrap(hf, pair.tokenizer, name="control")
    batches = prompts.batches(2)
    items = [Intervention(sites, Window(1, (1, 2))) for sites in SITE_SETS]
    together = run_engine("wavefront", [pair.base, pair.unlearned, control], batches, items, chunk_tokens=50)
    for number, target in enumerate((pair.unlearned, control)):
        alone = run_engine("wavefront", [pair.base, target], batches, items, chunk_tokens=50)
        for by_target, (ours,) in zip(together, alone, strict=True):
            assert torch.equal(by_target[number].target, ours.target)
            for both, one in zip(by_target[number].intervened, ours.intervened, strict=True):
                assert torch.equal(both, one)
    assert not torch.equal(together[0][0].target, together[0][1].target)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_coefficients_of_a_mixture_of_experts_are_refused_by_name(family: str, tmp_path: Path) -> None:
    pair, prompts = cached_pair(family), build_prompts(tmp_path)
    with pytest.raises(InputError, match="base.*mlp_coef"):
        patch(pair, prompts, window=1, control=None, progress=False)
    assert set(pair.base.missing_sites) == {"mlp_coef", "W_in", "W_gate"}


N_LAYERS = 4
WINDOW = st.sets(st.integers(0, N_LAYERS - 1), min_size=1).map(lambda some: Window(min(some), tuple(sorted(some))))
EXPRESSIONS = ["/weight/", "/norm|ln_/", r"/\.2\..*(proj|query|c_)/", "/embed|wte|lm_head/"]
ANY_SITES = st.lists(st.sampled_from([*SITES, *WEIGHT_SITES, *EXPRESSIONS]), min_size=1, max_size=3, unique=True).map(
    tuple
)
ANYTHING = st.lists(st.tuples(ANY_SITES, WINDOW), min_size=1, max_size=6)


@pytest.mark.parametrize(
    "family",
    [
        *["llama", "gpt2", "neox"],
        *[pytest.param(name, marks=pytest.mark.slow) for name in ("mistral", "neox_sequential", "olmo2", "mixtral")],
    ],
)
def test_any_interventions_in_any_batches_and_chunks_equal_plain_hooks(
    family: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """In float64 nothing is left to tolerance: a position, a stream or a layer mixed up shows."""
    pair = cached_pair(family, n_layers=N_LAYERS, dtype=torch.float64)
    prompts = build_prompts(tmp_path_factory.mktemp("anything"))
    models = [pair.base, pair.unlearned, pair.base]

    @settings(max_examples=20, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(
        chosen=ANYTHING,
        order=st.permutations(range(len(prompts))),
        n_prompts=st.integers(1, len(prompts)),
        batch_size=st.integers(1, len(prompts)),
        side=st.sampled_from(["left", "right"]),
        counts_padding=st.booleans(),
        is_trimmed=st.booleans(),
        chunk_tokens=st.sampled_from([1, 7, 30, 64, 200, 600, 10_000]),
    )
    def check(
        chosen: list[tuple[tuple[str, ...], Window]],
        order: list[int],
        n_prompts: int,
        batch_size: int,
        side: Any,
        counts_padding: bool,
        is_trimmed: bool,
        chunk_tokens: int,
    ) -> None:
        planned: list[Intervention] = []
        for sites, window in chosen:
            with suppress(InputError):  # an expression that has nothing in these layers
                planned += all_in([sites], [window], pair.base.weights)
        interventions = offered(pair.base, planned)
        if not interventions:
            return
        some = replace(prompts, items=tuple(prompts.items[index] for index in order[:n_prompts]))
        batches = some.batches(batch_size, padding_side=side)
        if counts_padding:  # as the notebooks do
            batches = [replace(batch, position_ids=None) for batch in batches]
        if is_trimmed:
            batches = [batch.trimmed() for batch in batches]
        found = run_engine("wavefront", models, batches, interventions, chunk_tokens=chunk_tokens)
        for batch, (ours, itself) in zip(batches, found, strict=True):
            oracle = PlainPatcher(pair.base.hf, pair.unlearned.hf, plain_inputs(pair.base, batch))
            scored = batch.rows, batch.columns
            base = oracle.base_logits()[scored]
            assert_close(ours.base, base, atol=1e-9)
            assert_close(ours.target, oracle.logits()[scored], atol=1e-9)
            for item, logits in zip(interventions, ours.intervened, strict=True):
                assert_close(logits, oracle.logits(item.sites, item.window.layers)[scored], atol=1e-9)
            for logits in (itself.target, *itself.intervened):  # base into base
                assert_close(logits, base, atol=1e-9)

    check()


@pytest.mark.parametrize("family", ["neox", "gpt2"])
def test_both_engines_agree_to_nine_digits_in_float64(family: str, tmp_path: Path) -> None:
    """Where eager attention, which the reference engine runs, does not round its softmax to float32."""
    pair = cached_pair(family, dtype=torch.float64)
    batches = build_prompts(tmp_path).batches(3, padding_side="left")
    items = [Intervention(sites, window) for sites in SITE_SETS for window in centred_windows(3, 3)]
    models = [pair.base, pair.unlearned]
    ours, theirs = (run_engine(engine, models, batches, items, chunk_tokens=100) for engine in ENGINES)
    for (mine,), (other,) in zip(ours, theirs, strict=True):
        for logits, expected in zip(mine.intervened, other.intervened, strict=True):
            assert_close(logits, expected, atol=1e-9)


def dispatched(model: Model) -> Model:
    """The model as accelerate leaves it where its layers are spread over devices: hooks around every forward."""
    parts = {name.rpartition(".")[0] for name in model.hf.state_dict()}
    hf = dispatch_model(model.hf, dict.fromkeys(parts, "cpu"), main_device="cpu", force_hooks=True)
    assert sum("forward" in vars(module) for module in hf.modules()) > 3 * model.n_layers
    return Model.wrap(hf, model.tokenizer, name=model.name)


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox"])
def test_models_under_a_device_map_give_the_same_numbers(family: str, tmp_path: Path) -> None:
    prompts = build_prompts(tmp_path)
    batches = prompts.batches(3, padding_side="left")
    items = [Intervention(sites, window) for sites in SITE_SETS for window in centred_windows(3, 3)]
    pair = build_pair(family, tied=False)
    plain = run_engine("wavefront", [pair.base, pair.unlearned], batches, items, chunk_tokens=100)
    models = [dispatched(pair.base), dispatched(pair.unlearned)]
    before = [torch_state(model) for model in models]
    mapped = run_engine("wavefront", models, batches, items, chunk_tokens=100)
    for (ours,), (theirs,) in zip(mapped, plain, strict=True):
        for logits, expected in zip(ours.intervened, theirs.intervened, strict=True):
            assert torch.equal(logits, expected)
    assert [torch_state(model) for model in models] == before
    with pytest.MonkeyPatch.context() as broken:
        broken.setattr("dissect.engine.overrides._override_mlp", fail)
        with pytest.raises(RuntimeError, match="in the middle of a block"):
            run_engine("wavefront", models, batches, items)
    assert [torch_state(model) for model in models] == before


def fail(*_arguments: Any) -> None:
    raise RuntimeError("in the middle of a block")
