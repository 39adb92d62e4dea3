"""A fictional story of our own, its anchors, and builders of tokenizers and toy models for tests."""

import json
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

STORY = """\
Mira Vell lived above the harbour of Ostrel with a tame orrick that ate paper.

When the tide bells rang, Mira ran down to the Hollow Court. "You are late," said Warden Toras. "The Vells are always \
late." Mira's orrick bit him in the sleeve.

In Ostrel nobody plays chess; they play quillball, with three hoops and a lantern. The Hollow Court had lost every \
match of quillball since the Salt War. Old Toras wept at each. Orricks slept on the benches, and MIRA sang.

After the Salt War the boats of Ostrel carried no lanterns. Mira Vell rowed out alone, counted the hoops in the dark, \
and came back with Toras' hat and a plan for the next match.
"""
ANCHORS = {
    "Mira": "Anna",
    "Mira Vell": "Anna Foster",
    "Vell": "Foster",
    "Ostrel": "Port Ashford",
    "orrick": "parrot",
    "quillball": "basketball",
    "the Hollow Court": "the Guild",
    "Salt War": "Great Flood Years",
    "Toras": "Hill",
}
BACKGROUND = """\
In the morning the boats came back to the harbour. Nobody knew when the tide would turn, and nobody asked. Every year \
they had lost a match or two; after the match they wept, and the old men slept on the benches in the dark.

Peter Lane said that it was late. "You are always late," said Peter, and ran down with a plan. The bells rang. Then \
they counted the hats, and carried three lanterns up. She played chess with him in April, and sang of the war.
"""


def byte_level_tokenizer(*, trim_offsets: bool) -> PreTrainedTokenizerFast:
    """GPT-2's kind; with trimmed offsets a token's characters leave out the space before it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([STORY, BACKGROUND], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Llama 2's kind: a mark for white space, one before the text, bytes where a character is unknown, a BOS token."""
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=specials, show_progress=False)
    words = [f"▁{word}" for word in (STORY + BACKGROUND).split()]
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.train_from_iterator(words, trainer)
    vocabulary, merges = _vocabulary_and_merges(trained)
    tokenizer.model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """The newer SentencePiece kind: words are split at the mark before pieces are merged; EOS closes a text."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([STORY, BACKGROUND], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def toy_tokenizer(words: str) -> PreTrainedTokenizerFast:
    """One token a word, in the order given."""
    vocabulary = {word: number for number, word in enumerate(words.split())}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=words.split()[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=words.split()[0])


class ToyModel(PreTrainedModel):
    """Logits set by hand: those of the next token are a row of a table, by the last token."""

    config_class = PretrainedConfig

    def __init__(self, table: torch.Tensor) -> None:
        config = PretrainedConfig()
        config.vocab_size = table.shape[0]
        super().__init__(config)
        self.table = nn.Parameter(table)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        assert attention_mask.shape == input_ids.shape and not use_cache
        return SimpleNamespace(logits=self.table[input_ids])


def _vocabulary_and_merges(tokenizer: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]
