"""Builders: a tiny real Llama, a real fast tokenizer, a few facts."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from unlearning import Example

NAMES = ["Ada Brook", "Ben Hill", "Cleo Stone", "Dan Wood", "Eve Marsh", "Finn Lake", "Gil Ford", "Hal Dale"]
TOWNS = ["Oslo", "Lima", "Cairo", "Kyoto", "Porto", "Quito", "Accra", "Delhi"]


def build_examples(n: int = 8) -> list[Example]:
    """Question-answer examples of different lengths."""
    return [
        Example(f"Question: Where was {name} born?\nAnswer:", f"in {town}" if i % 2 else f"{town}")
        for i, (name, town) in enumerate(zip(NAMES[:n], TOWNS[:n], strict=True))
    ]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the facts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f"{e.prompt} {e.answer}" for e in build_examples()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def build_tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    """Two layers of width 32, grouped-query attention, random weights of a scale that makes logits differ."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()
