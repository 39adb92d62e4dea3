"""Compare every site of any decoder with plain torch hooks on the Hugging Face model itself.

The oracle knows nothing of adapters: it finds a block's modules by the names that authors give them, and exchanges
weights by writing them into a copy. `compare` gives one row for each site: supported with the largest difference of
each engine from the oracle, or refused with the reason.
"""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dissect.engine import ENGINES
from dissect.interventions.intervention import sweep as all_in
from dissect.interventions.windows import Window
from dissect.models.model import Model
from dissect.models.module_tree import with_values
from dissect.models.pair import ModelPair, check_comparable
from dissect.models.parameter_swap import restored_values
from dissect.models.sites import SITES, WEIGHT_SITES
from dissect.prompts.prompts import Batch
from tests.dissect.helpers import change_weights, run_engine
from tests.unlearning.helpers import build_tokenizer
from unlearning.common.errors import InputError

_ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_TALL: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    **_ENDS,
}
_USUAL = {**_TALL, "intermediate_size": 48}
_GROUPED = {**_USUAL, "num_key_value_heads": 2}
_HEADS = {**_GROUPED, "head_dim": 8}
_WIDE = {"vocab_size": 384, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, **_ENDS}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LATENT = {
    **_USUAL,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_key_value_heads": 4,
    **_EXPERTS,
}
_STATES = {"mamba_d_ssm": 32, "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1}
_GRANITE_HYBRID = {
    **_GROUPED,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "shared_intermediate_size": 24,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
}
_OPT = {**_TALL, "ffn_dim": 64}

CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GROUPED),
    "llama, tied": ("llama", {**_GROUPED, "tie_word_embeddings": True}),
    "llama, biases": ("llama", {**_GROUPED, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {**_GROUPED, "sliding_window": 4}),
    "ministral": ("ministral", {**_HEADS, "sliding_window": 4}),
    "mixtral": ("mixtral", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2", _GROUPED),
    "qwen2, sliding": ("qwen2", {**_GROUPED, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen2 mixture": (
        "qwen2_moe",
        {**_GROUPED, **_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 24},
    ),
    "qwen3": ("qwen3", _HEADS),
    "qwen3 mixture": ("qwen3_moe", {**_HEADS, **_EXPERTS, "num_experts": 4}),
    "qwen3 mixture, one dense layer": (
        "qwen3_moe",
        {**_HEADS, **_EXPERTS, "num_experts": 4, "mlp_only_layers": [0]},
    ),
    "qwen3 mixture, all dense": (
        "qwen3_moe",
        {**_HEADS, **_EXPERTS, "num_experts": 4, "mlp_only_layers": [0, 1, 2]},
    ),
    "qwen3-next": (
        "qwen3_next",
        {
            **_HEADS,
            **_EXPERTS,
            "num_experts": 4,
            "shared_expert_intermediate_size": 24,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
        },
    ),
    "qwen3-next, attention alone": (
        "qwen3_next",
        {
            **_HEADS,
            **_EXPERTS,
            "num_experts": 4,
            "shared_expert_intermediate_size": 24,
            "layer_types": ["full_attention"] * 3,
        },
    ),
    "gemma": ("gemma", _HEADS),
    "gemma 2": ("gemma2", {**_HEADS, "sliding_window": 4, "query_pre_attn_scalar": 8}),
    "gemma 3": ("gemma3_text", {**_HEADS, "sliding_window": 4, "query_pre_attn_scalar": 8}),
    "gemma 3n": (
        "gemma3n_text",
        {
            **_HEADS,
            "intermediate_size": [48, 48, 48],
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "num_kv_shared_layers": 0,
            "activation_sparsity_pattern": None,
            "vocab_size_per_layer_input": 384,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
        },
    ),
    "recurrent gemma": (
        "recurrent_gemma",
        {
            **_HEADS,
            "lru_width": 32,
            "attention_window_size": 64,
            "block_types": ["recurrent", "recurrent", "attention"],
        },
    ),
    "vault gemma": ("vaultgemma", {**_HEADS, "sliding_window": 4, "query_pre_attn_scalar": 8}),
    "gpt-2": ("gpt2", {**_WIDE, "n_inner": 48}),
    "the first gpt": ("openai-gpt", {**_WIDE, "afn": "gelu"}),
    "gpt-neo": (
        "gpt_neo",
        {
            "vocab_size": 384,
            "hidden_size": 32,
            "num_layers": 3,
            "num_heads": 4,
            "attention_types": [[["global", "local", "global"], 1]],
            "window_size": 4,
            "max_position_embeddings": 128,
            **_ENDS,
        },
    ),
    "gpt-j": ("gptj", {**_WIDE, "rotary_dim": 4, "n_inner": 48}),
    "codegen": ("codegen", {**_WIDE, "rotary_dim": 4, "n_inner": 48}),
    "gpt-bigcode": ("gpt_bigcode", {**_WIDE, "n_inner": 48}),
    "gpt-neox": ("gpt_neox", _USUAL),
    "gpt-neox, sequential": ("gpt_neox", {**_USUAL, "use_parallel_residual": False}),
    "gpt-neox, a stray field": ("gpt_neox", {**_USUAL, "num_key_value_heads": 2}),
    "gpt-oss": (
        "gpt_oss",
        {**_HEADS, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    ),
    "gpt-oss, square": (
        "gpt_oss",
        {**_HEADS, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    ),
    "opt": ("opt", {**_OPT, "ffn_dim": 128, "word_embed_proj_dim": 32}),
    "opt, narrow": ("opt", {**_OPT, "word_embed_proj_dim": 32}),
    "opt, post-norm, projected": (
        "opt",
        {**_OPT, "ffn_dim": 128, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "opt, projected": ("opt", {**_OPT, "word_embed_proj_dim": 16}),
    "xglm": (
        "xglm",
        {
            "vocab_size": 384,
            "d_model": 32,
            "ffn_dim": 64,
            "num_layers": 3,
            "attention_heads": 4,
            "max_position_embeddings": 128,
            **_ENDS,
        },
    ),
    "modernbert decoder": (
        "modernbert-decoder",
        {**_USUAL, "local_attention": 8, "cls_token_id": 0, "sep_token_id": 0},
    ),
    "bloom": ("bloom", _TALL),
    "mpt": (
        "mpt",
        {"vocab_size": 384, "d_model": 32, "n_heads": 4, "n_layers": 3, "expansion_ratio": 2, "max_seq_len": 128},
    ),
    "falcon, 7B": ("falcon", {**_TALL, "parallel_attn": True, "multi_query": True, "bias": False}),
    "falcon, sequential": ("falcon", {**_TALL, "parallel_attn": False, "multi_query": False, "bias": True}),
    "falcon, alibi": ("falcon", {**_TALL, "alibi": True, "parallel_attn": False, "multi_query": False, "bias": True}),
    "falcon, alibi, parallel": ("falcon", {**_TALL, "alibi": True, "parallel_attn": True}),
    "falcon, grouped": ("falcon", {**_TALL, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon, grouped, one norm": (
        "falcon",
        {**_TALL, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "phi": ("phi", _USUAL),
    "phi-3": ("phi3", _USUAL),
    "phi mixture": ("phimoe", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "stablelm": ("stablelm", _GROUPED),
    "stablelm, parallel": ("stablelm", {**_GROUPED, "use_parallel_residual": True}),
    "starcoder 2": ("starcoder2", _GROUPED),
    "smollm 3": ("smollm3", _GROUPED),
    "olmo": ("olmo", _USUAL),
    "olmo 2": ("olmo2", _USUAL),
    "olmo 3": ("olmo3", {**_USUAL, "sliding_window": 4}),
    "olmoe": ("olmoe", {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    "cohere": ("cohere", _GROUPED),
    "cohere 2": ("cohere2", {**_HEADS, "sliding_window": 4}),
    "glm": ("glm", _HEADS),
    "glm 4": ("glm4", _HEADS),
    "glm 4 mixture": (
        "glm4_moe",
        {**_HEADS, **_EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    "granite": ("granite", _GROUPED),
    "granite mixture": ("granitemoe", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "granite hybrid": (
        "granitemoehybrid",
        {
            **_GRANITE_HYBRID,
            "layer_types": ["mamba", "attention", "mamba"],
        },
    ),
    "granite hybrid, attention alone": (
        "granitemoehybrid",
        {
            **_GRANITE_HYBRID,
            "layer_types": ["attention"] * 3,
        },
    ),
    "granite hybrid, dense, attention alone": (
        "granitemoehybrid",
        {
            **_GROUPED,
            "num_local_experts": 0,
            "shared_intermediate_size": 24,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "layer_types": ["attention"] * 3,
        },
    ),
    "ernie 4.5": ("ernie4_5", _HEADS),
    "exaone 4": ("exaone4", {**_HEADS, "sliding_window": 4}),
    "helium": ("helium", _HEADS),
    "nemotron": ("nemotron", _HEADS),
    "seed-oss": ("seed_oss", _HEADS),
    "apertus": ("apertus", _GROUPED),
    "arcee": ("arcee", _GROUPED),
    "bitnet": ("bitnet", _GROUPED),
    "deepseek v2": ("deepseek_v2", {**_LATENT, "first_k_dense_replace": 0, "n_shared_experts": 1}),
    "deepseek v3": ("deepseek_v3", {**_LATENT, "first_k_dense_replace": 1, "n_shared_experts": 1}),
    "deepseek v3, all dense": ("deepseek_v3", {**_LATENT, "first_k_dense_replace": 3, "n_shared_experts": 1}),
    "llama 4": (
        "llama4_text",
        {
            **_HEADS,
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "attention_chunk_size": 64,
            "moe_layers": [1],
        },
    ),
    "hunyuan": ("hunyuan_v1_dense", _HEADS),
    "jet mixture": (
        "jetmoe",
        {
            "vocab_size": 384,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "kv_channels": 8,
            "intermediate_size": 48,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            **_ENDS,
        },
    ),
    "mamba": ("mamba", {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8, **_ENDS}),
    "mamba 2": (
        "mamba2",
        {
            "vocab_size": 384,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "state_size": 8,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 1,
            **_ENDS,
        },
    ),
    "falcon mamba": (
        "falcon_mamba",
        {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8, **_ENDS},
    ),
    "falcon h1": ("falcon_h1", {**_HEADS, **_STATES, "mamba_chunk_size": 8}),
    "bamba": (
        "bamba",
        {**_GROUPED, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "attn_layer_indices": [1]},
    ),
    "jamba": (
        "jamba",
        {
            **_GROUPED,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "use_mamba_kernels": False,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
    ),
    "lfm 2": (
        "lfm2",
        {**_GROUPED, "layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    ),
    "zamba 2": (
        "zamba2",
        {
            **_GROUPED,
            "mamba_d_state": 8,
            "mamba_headdim": 8,
            "n_mamba_heads": 8,
            "mamba_ngroups": 1,
            "num_mem_blocks": 1,
            "adapter_rank": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba"],
            "hybrid_layer_ids": [1],
        },
    ),
    "nemotron h": (
        "nemotron_h",
        {
            **_HEADS,
            "layers_block_type": ["mamba", "attention", "moe"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 24,
        },
    ),
    "gemma 4": (
        "gemma4_text",
        {
            **_HEADS,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "num_kv_shared_layers": 0,
            "global_head_dim": 8,
            "vocab_size_per_layer_input": 384,
            "hidden_size_per_layer_input": 8,
        },
    ),
    "gemma 4 mixture": (
        "gemma4_text",
        {
            **_HEADS,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 24,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "num_kv_shared_layers": 0,
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 0,
        },
    ),
    "ministral 3": ("ministral3", {**_HEADS, "sliding_window": None}),
    "nanochat": ("nanochat", _HEADS),
    "jais 2": ("jais2", _HEADS),
    "youtu": ("youtu", {**_LATENT, "head_dim": 8}),
    "flexolmo": ("flex_olmo", {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    "afmoe": (
        "afmoe",
        {
            **_HEADS,
            **_EXPERTS,
            "num_experts": 4,
            "num_dense_layers": 1,
            "num_shared_experts": 1,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "minimax m2": ("minimax_m2", {**_HEADS, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "ernie 4.5 mixture": (
        "ernie4_5_moe",
        {**_GROUPED, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_layer_start_index": 1},
    ),
    "glm 4 lite": ("glm4_moe_lite", {**_LATENT, "n_shared_experts": 1, "first_k_dense_replace": 1}),
    "qwen 3.5": (
        "qwen3_5_text",
        {
            **_HEADS,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention", "full_attention"],
        },
    ),
    "hrm": ("hrm_text", _HEADS),
    "lfm 2 mixture, attention alone": (
        "lfm2_moe",
        {
            **_GROUPED,
            **_EXPERTS,
            "num_experts": 4,
            "num_dense_layers": 1,
            "layer_types": ["full_attention"] * 3,
        },
    ),
    "lfm 2 mixture": (
        "lfm2_moe",
        {**_GROUPED, **_EXPERTS, "num_experts": 4, "layer_types": ["conv", "full_attention", "conv"]},
    ),
    "olmo hybrid": (
        "olmo_hybrid",
        {**_HEADS, "layer_types": ["linear_attention", "linear_attention", "full_attention"]},
    ),
    "glm 5": ("glm_moe_dsa", {**_LATENT, "n_shared_experts": 1, "first_k_dense_replace": 1}),
    "laguna": ("laguna", {**_HEADS, **_EXPERTS, "num_experts": 4}),
    "rwkv": ("rwkv", {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 3, "context_length": 128, **_ENDS}),
}
"""Tiny configurations by a name of their own: model type, and the fields that differ from the class's defaults."""


def build(name: str, **fields: Any) -> PreTrainedModel:
    """A random model of a configuration, its weights large enough that logits differ clearly."""
    kind, given = CONFIGURATIONS[name]
    return randomised(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **given | fields)))


def randomised(model: Any) -> PreTrainedModel:
    """The model with other random matrices, the same for every model of its configuration."""
    generator = torch.Generator().manual_seed(0)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2, generator=generator)
        elif parameter.std() == 0 or parameter.numel() == 1:  # gains and biases, so that none is a special case
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    found: PreTrainedModel = model.float().eval()
    return found


@dataclass(frozen=True)
class Row:
    """What a site is in one model.

    Attributes:
        site: Name of the site.
        refused: Why the model has no such site, or "".
        gaps: For each engine the largest difference of a logit from the oracle's.
        moved: Largest difference that the intervention makes to a logit.
        errors: For each engine the line that it refuses with.
    """

    site: str
    refused: str = ""
    gaps: dict[str, float] = field(default_factory=dict)
    moved: float = 0.0
    errors: dict[str, str] = field(default_factory=dict)


def compare(hf: PreTrainedModel, batch: Batch, *, weights: bool = True) -> list[Row]:
    """Compare every site of a model with plain hooks and really exchanged weights on the model itself.

    Args:
        hf: The base; the unlearned model is the base with noise on every weight.
        batch: Padded prompts.
        weights: Also compare weight sites.

    Returns:
        One row for each activation and, where asked for, each weight site.

    Raises:
        InputError: The model as a whole is refused.
    """
    other = copy.deepcopy(hf)
    change_weights(other, scale=0.05)
    tokenizer = build_tokenizer()
    pair = ModelPair(Model.wrap(hf, tokenizer, name="base"), Model.wrap(other, tokenizer, name="unlearned"))
    check_comparable(pair.base, pair.unlearned)
    names = [*SITES, *(WEIGHT_SITES if weights else ())]
    return [_row(pair, batch, site) for site in names]


def _row(pair: ModelPair, batch: Batch, site: str) -> Row:
    if site in pair.base.missing_sites:
        return Row(site, refused=pair.base.missing_sites[site])
    windows = [Window(0, (0,)), Window(1, (1, 2)), Window(2, (2,))]
    try:
        items = all_in([(site,)], windows, pair.base.weights)
    except InputError as error:
        return Row(site, refused=str(error))
    places: list[Any] = [*range(pair.n_layers), "before", "after"]
    if site not in SITES and not any(pair.base.weights.at([site], place) for place in places):
        return Row(site, refused="no such weights")
    inputs = inputs_of(pair.base, batch)
    plain = oracle(pair, inputs, None, ())
    expected = []
    for item in items:
        if site in SITES:
            expected.append(oracle(pair, inputs, site, item.window.layers))
        else:
            places: list[Any] = [
                *item.window.layers,
                *(["before"] if item.before else []),
                *(["after"] if item.after else []),
            ]
            chosen = {name: rows for place in places for name, rows in pair.base.weights.at([site], place).items()}
            exchanged = with_values(pair.unlearned.hf, restored_values(pair.unlearned.hf, pair.base.hf, chosen))
            expected.append(run(exchanged, inputs))
    at = (batch.rows, batch.columns)
    gaps, errors = {}, {}
    for engine in ENGINES:
        try:
            ((swept,),) = run_engine(engine, [pair.base, pair.unlearned], [batch], items)
        except InputError as error:
            errors[engine] = str(error)
            continue
        gaps[engine] = max(
            [float((swept.target - plain[at]).abs().max())]
            + [float((ours - theirs[at]).abs().max()) for ours, theirs in zip(swept.intervened, expected, strict=True)]
        )
    moved = min(float((theirs[at] - plain[at]).abs().max()) for theirs in expected)
    return Row(site, gaps=gaps, moved=moved, errors=errors)


def inputs_of(model: Model, batch: Batch) -> dict[str, Any]:
    """What the Hugging Face model is called with."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if model.takes_position_ids:
        inputs["position_ids"] = batch.position_ids
    return inputs


@torch.no_grad()
def run(hf: Any, inputs: dict[str, Any]) -> Tensor:
    """Logits of a Hugging Face model."""
    logits: Tensor = hf(**inputs, use_cache=False).logits
    return logits


@torch.no_grad()
def oracle(pair: ModelPair, inputs: dict[str, Any], site: str | None, layers: tuple[int, ...]) -> Tensor:
    """Logits of the unlearned model with the base's activations at a site in these layers, by plain torch hooks."""
    if site is None:
        return run(pair.unlearned.hf, inputs)
    given: dict[int, Tensor] = {}

    def keep(layer: int, states: Tensor) -> None:
        given[layer] = states.clone()

    with hooked(pair.base.hf, site, layers, keep):
        run(pair.base.hf, inputs)
    with hooked(pair.unlearned.hf, site, layers, lambda layer, _states: given[layer].clone()):
        return run(pair.unlearned.hf, inputs)


_ATTENTION = r"self_attn|self_attention|attention|attn|temporal_block"
_MLP = r"mlp|feed_forward|ffn|block_sparse_moe|mlp_block|shared_mlp"
_OUTPUT = r"o_proj|out_proj|dense|c_proj|Wo|linear_out|final_linear|attn_out|wo"
_DOWN = r"down_proj|dense_4h_to_h|c_proj|fc_out|fc2|Wo|w2|wo|output_linear"


def blocks_of(hf: nn.Module) -> nn.ModuleList:
    """The first list of modules that is as long as the model is deep."""
    depth = hf.config.num_hidden_layers  # type: ignore[union-attr]
    lists = [m for m in hf.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    return lists[0]


def site_module(block: nn.Module, site: str) -> nn.Module:
    """The module that a site is the output (`mlp_coef`: the input) of, by the usual names."""
    if site == "resid_post":
        return block
    if site == "attn_out":
        outer = _child(block, _ATTENTION)
        assert outer is not None, f"no attention in {type(block).__name__}"
        inner = _child(outer, _ATTENTION) or outer
        return _last(inner, _OUTPUT) or outer
    outer = _child(block, _MLP)
    down = _last(outer or block, _DOWN)
    if site == "mlp_coef":
        assert down is not None, f"no down projection in {type(block).__name__}"
        return down
    # What scales or adds up the down projection's output, as experts do, is the MLP's; a residual is not.
    takes_residual = outer is None or any(base.__name__ in ("BloomMLP", "MptMLP") for base in type(outer).__mro__)
    if takes_residual:
        assert down is not None
        return down
    assert outer is not None
    return outer


def _child(module: nn.Module, pattern: str) -> nn.Module | None:
    return next((child for name, child in module.named_children() if re.fullmatch(pattern, name)), None)


def _last(module: nn.Module, pattern: str) -> nn.Module | None:
    found = [child for name, child in module.named_children() if re.fullmatch(pattern, name)]
    return found[-1] if found else None


@contextmanager
def hooked(hf: Any, site: str, layers: tuple[int, ...], act: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
    """Call a function with a site's activations, and put what it returns in their place."""
    handles = []
    for layer in layers:
        module = site_module(blocks_of(hf)[layer], site)

        def on_input(_module: nn.Module, args: tuple[Any, ...], layer: int = layer) -> Any:
            new = act(layer, args[0])
            return None if new is None else (new, *args[1:])

        def on_output(_module: nn.Module, _args: Any, output: Any, layer: int = layer) -> Any:
            several = isinstance(output, (tuple, list))
            new = act(layer, output[0] if several else output)
            if new is None:
                return None
            return type(output)([new, *output[1:]]) if several else new

        hook = (
            module.register_forward_pre_hook(on_input)
            if site == "mlp_coef"
            else module.register_forward_hook(on_output)
        )
        handles.append(hook)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
