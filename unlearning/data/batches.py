"""Padded tensors from tokenised examples."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from unlearning.data.spans import AnswerSpan


@dataclass(frozen=True)
class LabelledSpan:
    """One tokenised text whose labels are not its own next tokens.

    Attributes:
        input_ids: The tokens of the text.
        targets: At each position the token to predict instead of the next token.
        mask: Whether the position carries loss.
    """

    input_ids: list[int]
    targets: list[int]
    mask: list[bool]


Span = AnswerSpan | LabelledSpan


@dataclass(frozen=True)
class TokenBatch:
    """Right-padded sequences; masks come from lengths, so the pad token may also occur inside a text.

    The constants of the reference model are set if the method asks for them (`unlearning.methods.method.Reference`).

    Attributes:
        input_ids: Token ids, right-padded.
        attention_mask: 1 on tokens, 0 on padding.
        predicts_answer: True at position t if the prediction made there carries loss: the token at t + 1 belongs to the
            answer, or t has a label.
        targets: Token to predict at each position; None if it is the next token.
        index: Number of each sequence in its data set; None if that is not known.
        reference_nll: Summed negative log-likelihood of each answer under the reference model, in nats.
        reference_logits: The reference model's logits at the positions that carry loss, sequence after sequence.
        reference_hidden: Output of one or several of the reference model's blocks at every token that is not padding,
            sequence after sequence.
    """

    input_ids: Int[Tensor, "batch position"]
    attention_mask: Int[Tensor, "batch position"]
    predicts_answer: Bool[Tensor, "batch position"]
    targets: Int[Tensor, "batch position"] | None = None
    index: Int[Tensor, " batch"] | None = None
    reference_nll: Float[Tensor, " batch"] | None = None
    reference_logits: Float[Tensor, "token vocab"] | None = None
    reference_hidden: Float[Tensor, "all_token width"] | None = None

    @property
    def n_sequences(self) -> int:
        """Number of sequences."""
        return self.input_ids.shape[0]

    def to(self, device: torch.device) -> "TokenBatch":
        """Return the same batch on another device."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items() if tensor is not None})


def n_predicted(span: Span) -> int:
    """Return the number of a span's tokens that carry loss."""
    if isinstance(span, LabelledSpan):
        return sum(span.mask)
    return len(span.input_ids) - max(span.answer_start, 1)  # nothing predicts the very first token


def inserted(span: Span, tokens: list[int], at: int) -> Span:
    """Put tokens that carry no loss into a span; the tokens that carried loss still do.

    Args:
        span: The span.
        tokens: The tokens to put in.
        at: Index of the first of them, which comes before all tokens that carry loss.

    Returns:
        The longer span.
    """
    input_ids = [*span.input_ids[:at], *tokens, *span.input_ids[at:]]
    if isinstance(span, LabelledSpan):
        targets = [*span.targets[:at], *([0] * len(tokens)), *span.targets[at:]]
        mask = [*span.mask[:at], *([False] * len(tokens)), *span.mask[at:]]
        return LabelledSpan(input_ids, targets, mask)
    # The very first token carried no loss, and has something before it now.
    return replace(span, input_ids=input_ids, answer_start=max(span.answer_start, 1) + len(tokens))


def collate(spans: Sequence[Span]) -> TokenBatch:
    """Pad spans on the right into one batch.

    The padding's token (0) is never read: attention and loss are masked.

    Args:
        spans: All of one kind.

    Returns:
        The batch, on the CPU.
    """
    lengths = torch.tensor([len(span.input_ids) for span in spans])
    input_ids = pad_sequence([torch.tensor(span.input_ids) for span in spans], batch_first=True)
    position = torch.arange(input_ids.shape[1])
    attention_mask = (position < lengths[:, None]).long()
    labelled = [span for span in spans if isinstance(span, LabelledSpan)]
    if labelled:
        assert len(labelled) == len(spans)
        mask = pad_sequence([torch.tensor(span.mask) for span in labelled], batch_first=True)
        targets = pad_sequence([torch.tensor(span.targets) for span in labelled], batch_first=True)
        return TokenBatch(input_ids, attention_mask, predicts_answer=mask, targets=targets)
    starts = torch.tensor([max(span.answer_start, 1) for span in spans if isinstance(span, AnswerSpan)])
    predicts = (position + 1 >= starts[:, None]) & (position + 1 < lengths[:, None])
    return TokenBatch(input_ids, attention_mask, predicts_answer=predicts)
