"""Freedoms of a model's weights: which each family has, and that what is listed changes no output."""

import copy
from dataclasses import replace

import pytest
import torch

from dissect import InputError
from dissect.models.freedoms.kinds import Scaling, permute, random_factors, scale
from dissect.models.model import Model
from dissect.models.symmetries import Symmetries, find_symmetries
from tests.dissect.families import build
from tests.dissect.models.rewriting_helpers import FAMILIES, logit_gap, random_model
from tests.unlearning.helpers import build_tokenizer

DENSE = {"norm", "stream", "stream order", "value", "query", "heads", "neurons"}
"""What every decoder has; MLPs with a gate or ReLU have `mlp`, and RMS norms let channels change their signs."""
RELU = DENSE | {"mlp"}
GATED = RELU | {"stream signs"}
GROUPED = GATED | {"query heads"}
KINDS = {
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED | {"normalised"},  # queries and keys are normalised
    "gpt2": DENSE,
    "neox": DENSE,
    "neox_sequential": DENSE,
    "olmo": RELU - {"norm", "stream"},  # norms without gains, and with an epsilon that nobody can change
    "olmo2": GATED | {"normalised"},  # queries, keys and what the blocks write are normalised
    "gemma2": GROUPED | {"normalised"},  # what the blocks write is normalised
    "phi3": GATED,
    "mixtral": GROUPED | {"experts"},
    "qwen3_moe": GROUPED | {"experts", "normalised"},
    "opt": RELU,
    "bloom": DENSE - {"heads"} | {"normalised"},  # ALiBi: each head has its own slope; embeddings are normalised
    "falcon": DENSE - {"heads"} | {"query heads"},  # a single key-value head
    "gptj": DENSE,
}
LAYER_NORMS = {"gpt2", "neox", "neox_sequential", "olmo", "opt", "bloom", "falcon", "gptj"}
"""Families whose norms subtract the mean, which knows the channels' signs."""
FAILED = {family: {"stream signs"} for family in LAYER_NORMS}
for _family in LAYER_NORMS - {"olmo", "opt"}:
    FAILED[_family] |= {"mlp"}
FAILED["olmo"] |= {"stream"}
FAILED["bloom"] |= {"heads"}


def gap_of(model: Model, found: Symmetries, *, largest: float = 2.0) -> dict[str, float]:
    """How far each kind alone moves the logits."""
    gaps = {}
    for kind in found.kinds:
        generator = torch.Generator().manual_seed(3)
        hf = copy.deepcopy(model.hf)
        for scaling in found.scalings:
            if scaling.kind == kind:
                scale(hf, scaling, random_factors(scaling, largest=largest, generator=generator))
        for permutation in found.permutations:
            if permutation.kind == kind:
                permute(hf, permutation, torch.randperm(permutation.n_units, generator=generator))
        gaps[kind] = logit_gap(model, replace(model, hf=hf))
    return gaps


@pytest.mark.parametrize("name", ["deepseek v3", "gpt-oss", "gemma 4 mixture"])
def test_a_candidate_that_does_not_fit_a_tensor_is_no_freedom(name: str) -> None:
    model = Model.wrap(build(name), build_tokenizer(), name=name)
    before = copy.deepcopy(model.hf.state_dict())
    found = find_symmetries(model)
    assert "norm" in found.kinds
    assert max(gap_of(model, found).values(), default=0.0) < 1e-4
    assert all("inf" not in candidate.reason and "nan" not in candidate.reason for candidate in found.unproven)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.hf.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_has_the_freedoms_of_its_architecture(family: str) -> None:
    model = random_model(family)
    found = find_symmetries(model)
    assert found.kinds == KINDS[family]
    assert {candidate.kind for candidate in found.unproven} == FAILED.get(family, set())
    for kind in found.kinds:
        layers = {freedom.layer for freedom in (*found.scalings, *found.permutations) if freedom.kind == kind}
        assert layers in ({0, 1}, {0, 1, None}, {None})  # every layer has what one has
    assert max(gap_of(model, found).values()) < 1e-4


@pytest.mark.parametrize(("family", "channels"), [("llama", 8), ("gptj", 24), ("neox", 28), ("gpt2", 32), ("qwen3", 4)])
def test_queries_have_one_factor_for_what_positions_rotate_together(family: str, channels: int) -> None:
    """Four heads of eight channels: four pairs for each of two groups; two pairs and four channels; one pair and six
    channels; channels; four pairs of gains for all heads."""
    found = [scaling for scaling in find_symmetries(random_model(family)).scalings if scaling.kind == "query"]
    assert [scaling.n_channels for scaling in found] == [channels, channels]


def test_an_untied_head_reads_the_final_norm_and_a_tied_one_cannot_be_scaled() -> None:
    outside = {
        tied: [found for found in find_symmetries(random_model("llama", tied=tied)).scalings if found.layer is None]
        for tied in (True, False)
    }
    assert [found.kind for found in outside[True]] == ["stream", "stream signs"]
    assert [found.kind for found in outside[False]] == ["norm", "stream", "stream signs"]
    touched = {tied: {part.parameter for part in outside[tied][-2].parts} for tied in outside}
    assert touched[True] - touched[False] == {"model.norm.weight"}  # tied: the final norm takes the factor back


@pytest.mark.parametrize(("family", "tied"), [(name, tied) for name in ("llama", "gpt2") for tied in (True, False)])
def test_freedoms_of_tied_and_untied_embeddings_change_no_output(family: str, tied: bool) -> None:
    model = random_model(family, tied=tied)
    assert max(gap_of(model, find_symmetries(model), largest=100.0).values()) < 1e-4


def test_finding_leaves_the_model_as_it_is() -> None:
    model = random_model("qwen3")
    before = {name: values.clone() for name, values in model.hf.state_dict().items()}
    epsilons = [module.variance_epsilon for module in model.hf.modules() if hasattr(module, "variance_epsilon")]
    find_symmetries(model)
    assert all(torch.equal(values, before[name]) for name, values in model.hf.state_dict().items())
    assert epsilons == [m.variance_epsilon for m in model.hf.modules() if hasattr(m, "variance_epsilon")]


def test_a_wrong_candidate_is_dropped_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias that is left out of a scaling: the others of its kind stay proven."""
    from dissect.models.freedoms.candidates import Structure

    whole = Structure.scalings

    def wrong(self: Structure) -> list[list[Scaling]]:
        found = [list(alternatives) for alternatives in whole(self)]
        for (candidate, *_), alternatives in zip(list(found), found, strict=True):
            if (candidate.kind, candidate.layer) == ("value", 1):
                alternatives[:] = [replace(candidate, parts=candidate.parts[:1] + candidate.parts[2:])]
        return found

    monkeypatch.setattr(Structure, "scalings", wrong)
    found = find_symmetries(random_model("qwen2"))
    assert [(dropped.kind, dropped.layer) for dropped in found.unproven] == [("value", 1)]
    assert "moves logits by" in found.unproven[0].reason
    assert [scaling.layer for scaling in found.scalings if scaling.kind == "value"] == [0]


def test_weights_on_disk_are_refused() -> None:
    model = replace(random_model("llama"), streamed=object())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="`stream` must be off for llama"):
        find_symmetries(model)
