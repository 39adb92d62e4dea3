"""Train the tokenizer of the built-in models: a byte-level BPE on the text of the fictitious world."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dissect.zoo.recipes import BOS_ID, CONTEXT, EOS_ID, PAD_ID

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a fast tokenizer that puts <|bos|> before every text.

    Args:
        texts: Training texts.
        vocabulary: Largest number of tokens, the three special tokens included.

    Returns:
        The tokenizer; <|pad|>, <|bos|> and <|eos|> have the ids 0, 1 and 2.

    Raises:
        RuntimeError: The special tokens did not get these ids.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if [tokenizer.token_to_id(token) for token in (PAD, BOS, EOS)] != [PAD_ID, BOS_ID, EOS_ID]:
        raise RuntimeError("the special tokens must be the first three of the vocabulary")
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
