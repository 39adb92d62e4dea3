"""Builders: tiny real models of many families, pairs that differ in named weights, record files."""

import copy
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from dissect import load_prompts
from dissect.engine import find_engine
from dissect.engine.chunk import Chunk
from dissect.engine.layers import InMemory
from dissect.interventions.donors import Donor, own_activations
from dissect.interventions.intervention import Intervention
from dissect.models.model import Model
from dissect.models.pair import ModelPair
from dissect.prompts.prompts import Batch, Prompts
from tests.unlearning.helpers import build_tokenizer

__all__ = [
    "assert_close",
    "build_batch",
    "build_model",
    "build_pair",
    "build_prompts",
    "build_tokenizer",
    "change_weights",
    "plain_inputs",
    "run_engine",
    "save_records",
    "torch_state",
]

RECORDS = [
    {"prompt": "Question: Where was Ada Brook born?\nAnswer:", "answer": "in Oslo", "group": "Ada", "id": "a0"},
    {"prompt": "Where was Ada", "answer": "Lima", "group": "Ada", "id": "a1"},
    {"prompt": "Question: Ben Hill born?\nAnswer:", "answer": "Kyoto in Porto", "group": "Ben", "id": "b0"},
    {"prompt": "Answer:", "answer": "Cleo Stone", "group": "Cleo", "id": "c0"},
    {"prompt": "Question: Where was Cleo Stone born?\nAnswer:", "answer": "Delhi", "group": "Cleo", "id": "c1"},
]
"""Prompts and answers of different lengths, so that every batch of them is padded."""


def build_model(
    family: str,
    *,
    seed: int = 0,
    n_layers: int = 3,
    vocab_size: int = 384,
    context: int = 128,
    tied: bool | None = None,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """A random model of width 32 (MLP 48, four heads), its weights large enough that logits differ clearly.

    Llama has grouped-query attention and tied embeddings, NeoX parallel blocks and a fused QKV, GPT-2 Conv1D.
    `tied` overrides the family's tying of embeddings and head.
    """
    shape: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 4,
        "max_position_embeddings": context,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    grouped = {"num_key_value_heads": 2}
    no_ends = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    wide = {"vocab_size": vocab_size, "n_embd": 32, "n_inner": 48, "n_layer": n_layers, "n_head": 4, **no_ends}
    tall = {"vocab_size": vocab_size, "hidden_size": 32, "num_hidden_layers": n_layers, "num_attention_heads": 4}
    experts = {"num_experts_per_tok": 2}
    builders: dict[str, Callable[[], PreTrainedModel]] = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**shape, **grouped, tie_word_embeddings=tied is not False)),
        "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**shape, tie_word_embeddings=tied is True)),
        "neox_sequential": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**shape, use_parallel_residual=False)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**wide, n_positions=context, tie_word_embeddings=tied is not False)),
        "gemma2": lambda: Gemma2ForCausalLM(
            Gemma2Config(
                **shape,
                **grouped,
                head_dim=8,
                sliding_window=4,
                attn_logit_softcapping=2.0,
                final_logit_softcapping=5.0,
            )
        ),
        "olmo": lambda: OlmoForCausalLM(OlmoConfig(**shape)),
        "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(**shape)),
        "phi3": lambda: Phi3ForCausalLM(Phi3Config(**shape)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**shape, **grouped)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**shape, **grouped, head_dim=8)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**shape, **grouped, sliding_window=4)),
        "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**shape, **grouped, **experts, num_local_experts=4)),
        "qwen3_moe": lambda: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**shape, **grouped, **experts, head_dim=8, num_experts=4, moe_intermediate_size=24)
        ),
        "opt": lambda: OPTForCausalLM(
            OPTConfig(**tall, **no_ends, ffn_dim=128, word_embed_proj_dim=32, max_position_embeddings=context)
        ),
        "bloom": lambda: BloomForCausalLM(BloomConfig(**tall, **no_ends)),
        "falcon": lambda: FalconForCausalLM(FalconConfig(**tall, **no_ends)),
        "gptj": lambda: GPTJForCausalLM(
            GPTJConfig(**wide, n_positions=context, rotary_dim=4, tie_word_embeddings=False)
        ),
    }
    model = builders[family]()
    if family in ("mixtral", "qwen3_moe"):
        model.set_experts_implementation("eager")  # the grouped product does not take float64
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return model.to(dtype).eval()


@torch.no_grad()
def change_weights(
    model: PreTrainedModel, chosen: Callable[[str], bool] = lambda _name: True, *, scale: float = 0.05, seed: int = 1
) -> list[str]:
    """Add noise in place to the weights and biases whose name is chosen; returns their names."""
    generator = torch.Generator().manual_seed(seed)
    changed = []
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
        if chosen(name):
            parameter.add_(noise.to(parameter.dtype))
            changed.append(name)
    assert changed, "no weight was chosen"
    return changed


def build_pair(
    family: str,
    *,
    chosen: Callable[[str], bool] = lambda _name: True,
    n_layers: int = 3,
    tied: bool | None = None,
    scale: float = 0.05,
    dtype: torch.dtype = torch.float32,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> ModelPair:
    """A random base and a copy of it with noise on the chosen weights."""
    tokenizer = tokenizer or build_tokenizer()
    base, unlearned = (build_model(family, n_layers=n_layers, tied=tied, dtype=dtype) for _ in range(2))
    change_weights(unlearned, chosen, scale=scale)
    return ModelPair(
        base=Model.wrap(base, tokenizer, name="base"), unlearned=Model.wrap(unlearned, tokenizer, name="unlearned")
    )


def save_records(path: Path, records: list[dict[str, Any]]) -> Path:
    """Write records as a JSON list."""
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def build_prompts(folder: Path, records: list[dict[str, Any]] = RECORDS) -> Prompts:
    """Prompts of these records, tokenised by the tests' tokenizer."""
    return load_prompts(save_records(folder / "prompts.json", records), build_tokenizer())


def build_batch(folder: Path, side: Any) -> Batch:
    """All of `RECORDS` in one padded batch."""
    prompts = build_prompts(folder)
    (batch,) = prompts.batches(len(prompts), padding_side=side)
    assert (batch.attention_mask == 0).any()
    return batch


@dataclass(frozen=True, eq=False)
class Swept:
    """A `Sweep` with its interventions run."""

    base: Tensor
    target: Tensor
    intervened: list[Tensor]


def run_engine(
    engine: str,
    models: Sequence[Model],
    batches: Sequence[Batch],
    interventions: Sequence[Intervention],
    *,
    chunk_tokens: int = 600,
    donor: Donor | None = None,
) -> list[list[Swept]]:
    """Run an engine of that name to its end: for each batch one `Swept` of each target; the base gives by default."""
    donor = donor or own_activations(models[0])
    sweep = find_engine(engine)
    sweeps = sweep(InMemory(models), batches, interventions, donor, Chunk(chunk_tokens), lambda _share: None)
    return [[Swept(one.base, one.target, list(one.intervened)) for one in by_target] for by_target in sweeps]


def torch_state(model: Model) -> dict[str, Any]:
    """What an engine may touch and must put back: hooks and forwards of modules, where every weight lies."""
    state: dict[str, Any] = {}
    for name, module in model.hf.named_modules():
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
        state[name] = (hooks, "forward" in vars(module))
    for name, parameter in model.hf.named_parameters():
        state[f"{name} data"] = parameter.data_ptr()
    return state


def assert_close(ours: Tensor | np.ndarray | float, theirs: Tensor | np.ndarray | float, *, atol: float) -> None:
    """Equal shapes, NaN in the same places, and no element further apart than `atol`."""
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=0, atol=atol, strict=False)


def decoder_blocks(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The blocks of an untouched Hugging Face model."""
    for path in ("model.layers", "gpt_neox.layers", "transformer.h", "model.decoder.layers"):
        try:
            found = model.get_submodule(path)
        except AttributeError:
            continue
        assert isinstance(found, torch.nn.ModuleList)
        return found
    raise AssertionError(f"no blocks in {type(model).__name__}")


def site_module(block: torch.nn.Module, site: str) -> torch.nn.Module:
    """The Hugging Face module that a site belongs to: its input for `mlp_coef`, its output for activations."""
    if site == "resid_post":
        return block
    names = {
        "mlp_coef": ("mlp.down_proj", "mlp.dense_4h_to_h", "mlp.c_proj"),
        "attn_out": ("self_attn.o_proj", "attention.dense", "attn.c_proj"),
        "mlp_out": ("mlp",),
    }[site]
    for name in names:
        try:
            return block.get_submodule(name)
        except AttributeError:
            continue
    raise AssertionError(f"no {site} in {type(block).__name__}")


def plain_inputs(model: Model, batch: Batch) -> dict[str, Tensor]:
    """What a Hugging Face model is called with for this batch."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if model.takes_position_ids and batch.position_ids is not None:
        inputs["position_ids"] = batch.position_ids
    return inputs


PLAIN_NAMES = {
    "value_vectors": r"^(mlp\.(experts\.)?(down_proj|dense_4h_to_h|c_proj|fc_out)|fc2)(\.|$)",
    "key_vectors": r"^(mlp\.(experts\.)?(gate_proj|up_proj|gate_up_proj|dense_h_to_4h|c_fc|fc_in)|fc1)(\.|$)",
    "router": r"^mlp\.gate\.",
    "W_gate": r"^mlp\.(gate_proj|gate_up_proj)\.",
    "W_in": r"^(mlp\.(up_proj|gate_up_proj|dense_h_to_4h|c_fc|fc_in)|fc1)\.",
    "attn_weights": r"^(self_attn|self_attention|attention|attn)\.(?!\w*norm)",
    "W_Q": r"attn\.q_proj\.|query_key_value|c_attn|qkv_proj",
    "W_K": r"attn\.k_proj\.|query_key_value|c_attn|qkv_proj",
    "W_V": r"attn\.v_proj\.|query_key_value|c_attn|qkv_proj",
    "W_O": r"(attn\.(o_proj|out_proj|c_proj)|attention\.dense)\.",
    "norms": r"norm|^ln_",
}
"""Which of a block's parameters a weight site means, by their names in Hugging Face's families."""
PLAIN_OUTSIDE = {
    "norms": r"^(model\.norm|gpt_neox\.final_layer_norm|transformer\.ln_f|model\.decoder\.final_layer_norm)\.",
    "embed": r"embed_tokens|embed_positions|embed_in|wte|wpe|word_embeddings",
    "unembed": r"^(lm_head|embed_out)\.",
}
"""The same outside of the blocks; the final norm counts to the last layer."""


def plain_rows(model: PreTrainedModel, name: str, site: str) -> Any:
    """Which outputs of a fused parameter belong to a part of it, worked out by hand; all of them where it is whole."""
    config = model.config
    heads, width = config.num_attention_heads, config.hidden_size
    each = width // heads
    if "gate_up_proj" in name and site in ("W_gate", "W_in"):
        inner = config.intermediate_size
        return slice(0, inner) if site == "W_gate" else slice(inner, None)
    if not re.search("query_key_value|c_attn|qkv_proj", name) or site not in ("W_Q", "W_K", "W_V"):
        return slice(None)
    part = ("W_Q", "W_K", "W_V").index(site)
    if config.model_type in ("gpt_neox", "bloom"):  # head by head: its query, key and value
        return [row for row in range(3 * width) if row // each % 3 == part]
    if config.model_type == "falcon":  # all queries, then the one key and the one value
        return (slice(0, width), slice(width, width + each), slice(width + each, None))[part]
    return slice(part * width, (part + 1) * width)


def plain_restored(
    target: PreTrainedModel, base: PreTrainedModel, sites: Sequence[str], layers: Sequence[int]
) -> PreTrainedModel:
    """A copy of the target with the base's values written into the parameters of these sites and layers, one by one."""
    copied = copy.deepcopy(target)
    last = len(decoder_blocks(target)) - 1
    theirs = dict(base.named_parameters(remove_duplicate=False))
    for name in theirs:
        in_block = re.search(r"\.(?:layers|h)\.(\d+)\.(.+)$", name)
        for site in sites:
            if site.startswith("/"):
                chosen = re.search(site.strip("/"), name) and (not in_block or int(in_block[1]) in layers)
            elif in_block:
                chosen = int(in_block[1]) in layers and re.search(PLAIN_NAMES.get(site, "$^"), in_block[2])
            else:
                chosen = re.search(PLAIN_OUTSIDE.get(site, "$^"), name) and (site != "norms" or last in layers)
            if not chosen:
                continue
            module, key = copied.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            value, rows = module.get_parameter(key).detach().clone(), plain_rows(target, name, site)
            if value.dim() == 2 and target.config.model_type == "gpt2" and "c_attn" in name:
                value[:, rows] = theirs[name].detach()[:, rows]
            else:
                value[rows] = theirs[name].detach()[rows]
            setattr(module, key, torch.nn.Parameter(value))  # a tied one under this name alone
    return copied


class PlainPatcher:
    """Record and replace activations by plain torch hooks, without TransformerLens: the tests' own oracle."""

    def __init__(
        self,
        base: PreTrainedModel,
        target: PreTrainedModel,
        inputs: dict[str, Tensor],
        donor_inputs: dict[str, Tensor] | None = None,
    ) -> None:
        self.base, self.target, self.inputs = base, target, inputs
        self.donor_inputs = donor_inputs or inputs

    @torch.no_grad()
    def logits(self, sites: Sequence[str] = (), layers: Sequence[int] = ()) -> Tensor:
        """Logits of the target with the base's activations and weights at these sites and layers, everywhere."""
        weights = [site for site in sites if site in PLAIN_NAMES or site in PLAIN_OUTSIDE or site.startswith("/")]
        places = [(site, layer) for layer in layers for site in sites if site not in weights]
        donor: dict[tuple[str, int], Tensor] = {}
        if places:
            self._run(
                self.base, places, lambda place, value: donor.__setitem__(place, value.clone()), self.donor_inputs
            )
        target = plain_restored(self.target, self.base, weights, layers) if weights else self.target
        return self._run(target, places, lambda place, _value: donor[place], self.inputs)

    @torch.no_grad()
    def base_logits(self) -> Tensor:
        """Logits of the base."""
        return self.base(**self.inputs).logits

    def _run(
        self,
        model: PreTrainedModel,
        places: list[tuple[str, int]],
        act: Callable[..., Tensor | None],
        inputs: dict[str, Tensor],
    ) -> Tensor:
        handles = [self._hook(model, place, act) for place in places]
        try:
            return model(**inputs, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()

    @staticmethod
    def _hook(model: PreTrainedModel, place: tuple[str, int], act: Callable[..., Tensor | None]) -> Any:
        site, layer = place
        module = site_module(decoder_blocks(model)[layer], site)
        if site == "mlp_coef":

            def on_input(_module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
                new = act(place, args[0])
                return None if new is None else (new, *args[1:])

            return module.register_forward_pre_hook(on_input)

        def on_output(_module: torch.nn.Module, _args: Any, output: Any) -> Any:
            new = act(place, output[0] if isinstance(output, tuple) else output)
            if new is None:
                return None
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return module.register_forward_hook(on_output)


def save_model(path: Path, family: str, *, dtype: torch.dtype = torch.float32, shard: str = "5GB") -> Path:
    model = build_model(family, dtype=dtype)
    model.save_pretrained(path, max_shard_size=shard)
    build_tokenizer().save_pretrained(path)
    return path
