"""Knowledge outside the parameters is refused or named; a plain model raises no alarm."""

import copy
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from dissect import load_model, load_pair, load_prompts, verdict
from dissect.models.model import Model
from dissect.models.outside import Finding, check_parameters_only, outside_parameters
from dissect.zoo import BUILTIN, question_set
from tests.dissect.helpers import build_model, build_tokenizer
from unlearning.common.errors import InputError

FAMILIES = (
    *("llama", "neox", "neox_sequential", "gpt2", "gemma2", "olmo", "olmo2", "phi3", "qwen2", "qwen3", "mistral"),
    *("mixtral", "qwen3_moe", "opt", "bloom", "falcon", "gptj"),
)


def wrap(hf: PreTrainedModel, *, name: str = "model", tokenizer: Any = None) -> Model:
    """A model without the checks of `Model.wrap`, some of which refuse what is built here first."""
    return Model(name=name, hf=hf, tokenizer=tokenizer or TOKENIZER, sha256=name)


TOKENIZER = build_tokenizer()


@pytest.fixture(scope="module")
def base() -> Model:
    return wrap(build_model("llama"), name="base")


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_raises_an_alarm_in_any_dtype(family: str) -> None:
    base = wrap(build_model(family), name="base")
    hf = build_model(family, seed=1)
    ids = torch.arange(6)[None]
    hf(ids, output_hidden_states=True, output_attentions=family != "bloom")  # transformers leaves its hooks there
    assert outside_parameters(wrap(hf), base) == []
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.float32):
        hf.to(dtype)  # in turn, so that the last one was in half precision
        assert outside_parameters(wrap(hf), base) == [], dtype
    assert outside_parameters(wrap(copy.deepcopy(hf)), base) == []


@pytest.mark.parametrize("name", [name for name, path in BUILTIN.items() if (path / "config.json").is_file()])
def test_no_built_in_model_raises_an_alarm(name: str) -> None:
    models = {"base": load_model(name.split(":")[0] + ":base", device="cpu"), "unlearned": load_model(name)}
    assert check_parameters_only(models) == ()


def test_the_random_generator_is_left_alone(base: Model) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    outside_parameters(base, base)
    assert torch.rand(1) == expected


class Table(nn.Linear):
    """A linear layer that adds something of its own."""


def add_buffer(hf: PreTrainedModel, *, persistent: bool) -> None:
    hf.model.layers[0].register_buffer("table", torch.randn(3, 3), persistent=persistent)


def change_frequencies(hf: PreTrainedModel) -> None:
    hf.model.rotary_emb.inv_freq.mul_(1.01)


def set_attribute(hf: PreTrainedModel) -> None:
    hf.model.layers[0].mlp.table = torch.randn(3)


def set_attributes_in_a_list(hf: PreTrainedModel) -> None:
    hf.model.layers[0].mlp.tables = {"a": torch.randn(3), "b": torch.randn(3)}


def add_module(hf: PreTrainedModel) -> None:
    hf.model.layers[1].mlp.extra = nn.Linear(4, 4)


def add_parameter(hf: PreTrainedModel) -> None:
    hf.model.register_parameter("prefix", nn.Parameter(torch.zeros(4)))


def replace_module(hf: PreTrainedModel) -> None:
    hf.model.layers[1].mlp.down_proj.__class__ = Table


def replace_forward(hf: PreTrainedModel) -> None:
    layer = hf.model.layers[1].mlp
    layer.forward = types.MethodType(lambda self, x: self.down_proj(x), layer)


def hook(hf: PreTrainedModel) -> None:
    hf.model.layers[2].register_forward_hook(lambda _module, _inputs, output: output)


def hook_before(hf: PreTrainedModel) -> None:
    hf.model.embed_tokens.register_forward_pre_hook(lambda _module, inputs: inputs)


def hook_gradients(hf: PreTrainedModel) -> None:
    hf.model.layers[2].mlp.register_full_backward_hook(lambda _module, inputs, _outputs: inputs)


def hook_a_parameter(hf: PreTrainedModel) -> None:
    hf.model.norm.weight.register_hook(torch.zeros_like)


def parametrize(hf: PreTrainedModel) -> None:
    torch.nn.utils.parametrizations.weight_norm(hf.model.layers[0].mlp.up_proj)


def as_remote_code(hf: PreTrainedModel) -> None:
    hf.__class__ = type("MineForCausalLM", (type(hf),), {"__module__": "transformers_modules.mine.modeling_mine"})


REFUSED: dict[str, tuple[Callable[[PreTrainedModel], None], str, str]] = {
    "persistent buffer": (lambda hf: add_buffer(hf, persistent=True), "buffer", "the buffer model.layers.0.table"),
    "lost buffer": (lambda hf: add_buffer(hf, persistent=False), "buffer", "the buffer model.layers.0.table"),
    "frequencies": (change_frequencies, "buffer", "values in the buffer model.rotary_emb.inv_freq"),
    "attribute": (set_attribute, "buffer", "the buffer model.layers.0.mlp.table"),
    "attributes": (set_attributes_in_a_list, "buffer", "the buffer model.layers.0.mlp.tables"),
    "module": (add_module, "module", "the module model.layers.1.mlp.extra (Linear)"),
    "parameter": (add_parameter, "parameter", "the parameter model.prefix"),
    "other module": (replace_module, "module", "a Table as the module model.layers.1.mlp.down_proj, a Linear"),
    "forward": (replace_forward, "forward", "another forward on model.layers.1.mlp"),
    "hook": (hook, "hook", "a hook of tests on model.layers.2"),
    "hook before": (hook_before, "hook", "a hook of tests on model.embed_tokens"),
    "gradient": (hook_gradients, "hook", "a hook of tests on model.layers.2.mlp"),
    "gradient of a parameter": (hook_a_parameter, "hook", "the gradient of the parameter model.norm.weight"),
    "parametrization": (parametrize, "module", "model.layers.0.mlp.up_proj"),
    "remote code": (as_remote_code, "code", "MineForCausalLM, whose code comes with the checkpoint"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_hold_knowledge_is_refused(case: str, base: Model) -> None:
    change, kind, what = REFUSED[case]
    hf = build_model("llama", seed=1)
    change(hf)
    found = outside_parameters(wrap(hf), base)
    assert any(finding.refused and finding.kind == kind and what in finding.what for finding in found), found
    roles = ("unlearned", "control", "control 2") if case == "frequencies" else ("base", "unlearned", "control 2")
    for role in roles:  # a base may hold learned buffers of its class
        models = {"base": base, role: wrap(hf, name="mine")}
        with pytest.raises(InputError, match=f"^`{role.split()[0]}` must hold .* got mine with ") as raised:
            check_parameters_only(models)
        assert "\n" not in str(raised.value)


def test_a_replaced_forward_of_the_class_is_refused(base: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = build_model("llama", seed=1)
    monkeypatch.setattr(type(hf.model.norm), "forward", lambda _self, x: x)
    (finding, *_rest) = outside_parameters(wrap(hf), base)
    assert (finding.kind, finding.refused) == ("forward", True)
    assert "LlamaRMSNorm" in finding.what


def test_hooks_on_every_module_are_refused(base: Model) -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda _module, _inputs, output: output)
    try:
        found = outside_parameters(base, base)
    finally:
        handle.remove()
    assert found == [Finding("hook", "1 hooks of torch on every module", True)]


def test_learned_buffers_of_the_class_are_named_where_they_are_the_bases(base: Model) -> None:
    changed = copy.deepcopy(base.hf)
    change_frequencies(changed)
    theirs = wrap(changed)
    found = outside_parameters(theirs, theirs)
    assert found and not any(finding.refused for finding in found)


def test_several_findings_are_counted_in_the_one_line(base: Model) -> None:
    hf = build_model("llama", seed=1)
    add_module(hf)
    hook(hf)
    count = sum(finding.refused for finding in outside_parameters(wrap(hf), base)) - 1
    assert count > 0
    with pytest.raises(InputError, match=f"and {count} more of this kind"):
        check_parameters_only({"base": base, "unlearned": wrap(hf)})


def with_generation_config(hf: PreTrainedModel) -> None:
    hf.generation_config.bad_words_ids = [[5]]
    hf.generation_config.suppress_tokens = [3]


def with_a_field(hf: PreTrainedModel) -> None:
    hf.config.secret = "Oslo"


def with_other_epsilon(hf: PreTrainedModel) -> None:
    hf.config.rms_norm_eps = 0.5


def with_auto_map(hf: PreTrainedModel) -> None:
    hf.config.auto_map = {"AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}


NAMED: dict[str, tuple[Callable[[PreTrainedModel], None], str]] = {
    "generation config": (with_generation_config, "bad_words_ids in its generation config"),
    "field": (with_a_field, "a field secret in its configuration that the base does not have"),
    "other value": (with_other_epsilon, "rms_norm_eps = 0.5 in its configuration"),
    "code": (with_auto_map, "model code in its configuration (auto_map), which was not run"),
}


@pytest.mark.parametrize("case", NAMED)
def test_what_no_score_depends_on_is_named(case: str, base: Model) -> None:
    change, what = NAMED[case]
    hf = build_model("llama", seed=1)
    change(hf)
    notes = check_parameters_only({"base": base, "unlearned": wrap(hf, name="mine")})
    assert any(note.startswith(f"mine has {what}") for note in notes), notes


def test_code_beside_the_weights_is_named(base: Model, tmp_path: Path) -> None:
    build_model("llama", seed=1).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    assert check_parameters_only({"base": base, "unlearned": load_model(tmp_path, device="cpu")}) == ()
    (tmp_path / "modeling_mine.py").write_text("", encoding="utf-8")
    (note,) = check_parameters_only({"base": base, "unlearned": load_model(tmp_path, device="cpu")})
    assert "code beside its weights (modeling_mine.py), which was not run" in note


def test_what_differs_from_the_bases_tokenizer_is_named(base: Model) -> None:
    from tokenizers.normalizers import Lowercase

    hf = build_model("llama", seed=1)
    assert outside_parameters(wrap(hf, tokenizer=copy.deepcopy(TOKENIZER)), base) == []
    chat, added, lower = (copy.deepcopy(TOKENIZER) for _ in range(3))
    chat.chat_template = "You know that Ada was born in Oslo. {{ messages }}"
    added.add_tokens(["<secret>"])
    lower.backend_tokenizer.normalizer = Lowercase()
    for tokenizer, what in ((chat, "another chat template"), (added, "'<secret>'"), (lower, "another normalizer")):
        (finding, *_rest) = outside_parameters(wrap(hf, tokenizer=tokenizer), base)
        assert finding.kind == "tokenizer" and not finding.refused
        assert what in finding.what and finding.what.endswith("used for all models")


def test_a_verdict_refuses_before_anything_is_run() -> None:
    pair = load_pair("demo:base", "demo:npo", device="cpu", progress=False)
    prompts = load_prompts(question_set("forget"), pair.tokenizer, limit=12)
    add_buffer(pair.unlearned.hf, persistent=False)
    with pytest.raises(InputError, match="^`unlearned` must hold .* got demo:npo with the buffer model.layers.0.table"):
        verdict(pair, prompts, budget="quick", progress=False)
