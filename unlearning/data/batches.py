"""From examples to padded tensors, and the order in which forget and retain examples meet."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase

from unlearning.data.question_answer import Example
from unlearning.data.spans import AnswerSpan, encode_answer
from unlearning.errors import InputError


@dataclass(frozen=True)
class TokenBatch:
    """Right-padded sequences; masks come from lengths, so the pad token may also occur inside a text.

    Attributes:
        input_ids: [batch, position].
        attention_mask: 1 on tokens, 0 on padding.
        predicts_answer: true at position t if the token at t + 1 belongs to the answer.
        reference_nll: summed negative log-likelihood of each answer under the reference model, in nats, where
            the method asks for it.
    """

    input_ids: Int[Tensor, "batch position"]
    attention_mask: Int[Tensor, "batch position"]
    predicts_answer: Bool[Tensor, "batch position"]
    reference_nll: Float[Tensor, " batch"] | None = None

    @property
    def n_sequences(self) -> int:
        """How many sequences there are."""
        return self.input_ids.shape[0]

    @property
    def n_answer_tokens(self) -> int:
        """How many tokens carry loss, over all sequences."""
        return int(self.predicts_answer.sum())

    def to(self, device: torch.device) -> "TokenBatch":
        """The same batch on another device."""
        reference = None if self.reference_nll is None else self.reference_nll.to(device)
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            predicts_answer=self.predicts_answer.to(device),
            reference_nll=reference,
        )


def encode_examples(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    append_eos: bool,
    max_length: int | None,
) -> list[AnswerSpan]:
    """Tokenise examples once, before training.

    Raises:
        InputError: an example is longer than `max_length` tokens, its answer is empty, or the end-of-sequence token
            is to be appended and the tokenizer has none.
    """
    if append_eos and tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end-of-sequence token; set append_eos=false, or give it one")
    spans = []
    for number, example in enumerate(examples, start=1):
        span = encode_answer(tokenizer, example.prompt, example.answer, append_eos=append_eos)
        if max_length is not None and len(span.input_ids) > max_length:
            raise InputError(
                f"example {number} ({example.prompt[:40]!r}) has {len(span.input_ids)} tokens, more than "
                f"max_length {max_length}; split the text or raise max_length"
            )
        if len(span.input_ids) < 2:
            raise InputError(
                f"example {number} ({example.answer!r}) is one token, so nothing predicts it; make it longer"
            )
        spans.append(span)
    return spans


def collate(spans: Sequence[AnswerSpan], *, reference_nll: Float[Tensor, " batch"] | None = None) -> TokenBatch:
    """Pad spans on the right into one batch. The padding's token (0) is never read: attention and loss are masked."""
    lengths = torch.tensor([len(span.input_ids) for span in spans])
    input_ids = pad_sequence([torch.tensor(span.input_ids) for span in spans], batch_first=True)
    position = torch.arange(input_ids.shape[1])
    starts = torch.tensor([max(span.answer_start, 1) for span in spans])  # nothing predicts the very first token
    predicts = (position + 1 >= starts[:, None]) & (position + 1 < lengths[:, None])
    return TokenBatch(
        input_ids=input_ids,
        attention_mask=(position < lengths[:, None]).long(),
        predicts_answer=predicts,
        reference_nll=reference_nll,
    )


class PairSampler(Sampler[tuple[int, int]]):
    """The order of one epoch: each main example once, each paired with the next element of the retain stream.

    Item k of epoch e is (permutation of the main set of epoch e)[k] and element e * n_main + k of the retain stream,
    which therefore goes on across epochs instead of starting again.

    Args:
        n_main: how many examples make an epoch (the forget set, or the retain set where a method has no other).
        n_retain: size of the retain set to pair with; 0 where there is nothing to pair.
        seed: of both orders.
    """

    def __init__(self, n_main: int, n_retain: int, *, seed: int) -> None:
        self.n_main = n_main
        self.n_retain = n_retain
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer at the start of every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n_main

    def __iter__(self) -> Iterator[tuple[int, int]]:
        retain: dict[int, list[int]] = {}  # the stream's permutations that this epoch reaches into
        for place, index in enumerate(_permutation(self.n_main, (self.seed, 0, self.epoch))):
            if not self.n_retain:
                yield index, -1
                continue
            lap, offset = divmod(self.epoch * self.n_main + place, self.n_retain)
            if lap not in retain:
                retain[lap] = _permutation(self.n_retain, (self.seed, 1, lap))
            yield index, retain[lap][offset]


def _permutation(n: int, seed: tuple[int, int, int]) -> list[int]:
    return np.random.default_rng(seed).permutation(n).tolist()
