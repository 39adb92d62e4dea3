"""Random pairs in memory and the random prompts that they are asked."""

import copy
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.shapes import Shape
from dissect.models.model import Model
from dissect.models.pair import ModelPair
from dissect.prompts.prompts import Prompt, Prompts

NOISE = 0.2
"""Standard deviation of what unlearning changed, in units of the base weights' own."""


def build_config(shape: Shape) -> LlamaConfig:
    """Return the configuration of a model of this shape."""
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=shape.vocab,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_mlp,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        max_position_embeddings=max(256, shape.tokens),
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )


def build_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per word, from `w0` on, so that tokens can be counted by eye."""
    tokenizer = Tokenizer(WordLevel({f"w{token}": token for token in range(vocab)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w0", pad_token="w0", unk_token="w0")


def build_pair(
    shape: Shape, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> ModelPair:
    """Build a random base, and an unlearned model that is the base with noise on every matrix."""
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(seed)
        base = LlamaForCausalLM(build_config(shape)).eval()
        base.to(dtype=dtype)
        unlearned = copy.deepcopy(base)
        _add_noise(unlearned)
    tokenizer = build_tokenizer(shape.vocab)
    return ModelPair(
        base=Model.wrap(base, tokenizer, name="random base"),
        unlearned=Model.wrap(unlearned, tokenizer, name="random unlearned"),
    )


@torch.no_grad()
def _add_noise(model: PreTrainedModel) -> None:
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.add_(torch.randn_like(parameter) * (NOISE * parameter.std()))


def random_prompts(vocab: int, lengths: Sequence[int], *, answer: int, seed: int = 0) -> Prompts:
    """Random tokens; the last `answer` of every row are its answer."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for number, length in enumerate(lengths):
        ids = torch.randint(1, vocab, (length,), generator=generator).tolist()
        start = length - answer
        items.append(
            Prompt(
                id=str(number),
                group="",
                prompt=" ".join(f"w{token}" for token in ids[:start]),
                answer=" ".join(f"w{token}" for token in ids[start:]),
                input_ids=tuple(ids),
                answer_start=start,
                scored=range(start - 1, length - 1),
            )
        )
    return Prompts(items=tuple(items), scoring="answer", pad_token_id=0, source="random tokens")
