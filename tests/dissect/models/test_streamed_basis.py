"""Models on disk that are written in another basis: what is said of them is what is said of them in memory."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from dissect import load_pair, patch
from dissect.models.alignment import _known, check_basis, find_differences
from dissect.models.freedoms.candidates import Structure
from dissect.models.freedoms.kinds import KINDS, Scaling
from dissect.models.model import Model, load_model
from dissect.models.rewriting import rewritten
from dissect.models.streamed_basis import _StoredWeights, _Trial
from dissect.models.symmetries import random_tokens
from tests.dissect.families import build
from tests.dissect.helpers import build_prompts, change_weights
from tests.dissect.streaming_helpers import held
from tests.unlearning.helpers import build_tokenizer
from unlearning.common.errors import InputError


def saved(hf: Any, path: Path) -> Path:
    hf.save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


def pair_on_disk(root: Path, name: str, *kinds: str) -> tuple[Path, Path]:
    """A base, and the same with noise on its weights, which are then rewritten without a change of the outputs."""
    hf = build(name)
    tuned = copy.deepcopy(hf)
    change_weights(tuned, scale=0.02)
    other = Model.wrap(tuned, build_tokenizer(), name="tuned")
    if kinds:
        other = rewritten(other, seed=1, largest=20.0, kinds=kinds)
    return saved(hf, root / "base"), saved(other.hf, root / "other")


def found(base: Path, other: Path, *, stream: bool) -> set[Any]:
    _known.clear()  # else the second way would be told what the first one found
    models = [load_model(path, device="cpu", stream=stream) for path in (base, other)]
    differences = {(one.what, one.kind, one.layers) for one in find_differences(*models)}
    _known.clear()
    assert not stream or all(not held(model.streamed) for model in models if model.streamed)
    return differences


_SOME = [("llama", kind) for kind in ("neurons", "stream order", "norm", "")] + [
    ("gpt-oss", "heads"),
    ("gpt-2", "query"),
]
_MORE = [(name, kind) for name in ("llama", "gpt-oss", "gpt-2", "gemma 3", "qwen3") for kind in ("", *KINDS)]


@pytest.mark.parametrize(
    ("name", "kind"),
    [*_SOME, *(pytest.param(*one, marks=pytest.mark.slow) for one in _MORE if one not in _SOME)],
)
def test_the_same_is_found_as_in_memory(name: str, kind: str, tmp_path: Path) -> None:
    paths = pair_on_disk(tmp_path, name, *([kind] if kind else []))
    in_memory = found(*paths, stream=False)
    assert found(*paths, stream=True) == in_memory
    assert bool(in_memory) or not kind or (name, kind) not in _SOME


def test_a_permuted_pair_on_disk_is_refused_with_the_way_out(tmp_path: Path) -> None:
    base, other = pair_on_disk(tmp_path, "llama", "neurons")
    pair = load_pair(base, other, device="cpu", stream=True)
    prompts = build_prompts(tmp_path)
    with pytest.raises(InputError, match=r"order of the MLP neurons of 3 layers.*Turn `stream` off and set `align`"):
        patch(pair, prompts, sites=["mlp_coef"], window=1, progress=False)
    with pytest.raises(InputError, match="Set `align`"):
        check_basis(*(load_model(path, device="cpu") for path in (base, other)))


def test_everything_at_once_is_refused_too(tmp_path: Path) -> None:
    assert found(*pair_on_disk(tmp_path, "llama", *KINDS), stream=True)


def test_only_one_layer_of_a_model_is_kept(tmp_path: Path) -> None:
    model = load_model(saved(build("llama"), tmp_path), device="cpu", stream=True)
    whole = load_model(tmp_path, device="cpu").hf
    assert model.streamed is not None
    weights = _StoredWeights(model.streamed, "model.layers")
    for name, parameter in whole.named_parameters():
        assert torch.equal(weights.get_parameter(name), parameter), name
        layers = {key.split(".")[2] for key in weights._kept}
        assert len(layers) <= 1 and all(key.startswith("model.layers.") for key in weights._kept)


def test_a_candidate_that_changes_outputs_is_not_said(tmp_path: Path) -> None:
    path = saved(build("llama"), tmp_path)
    model, whole = load_model(path, device="cpu", stream=True), load_model(path, device="cpu")
    assert model.streamed is not None
    scalings = [one for several in Structure(whole, whole.hf, random_tokens(whole)).scalings() for one in several]
    real = next(one for one in scalings if one.kind == "mlp")
    half = Scaling(real.kind, real.layer, real.n_channels, tuple(part for part in real.parts if not part.inverse))
    trial, what = _Trial(model, model.streamed), ("scales",)
    assert trial.proven([[(what, half)]]) == []
    assert trial.proven([[(what, half), (what, real)]]) == [(what, real)]
    assert trial.proven([[(what, half)], [(what, real)]]) == [(what, real)]
