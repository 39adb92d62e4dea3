"""What an unlearning method declares about itself: its two losses, what they read, and how they are combined."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from unlearning.data.batches import TokenBatch
from unlearning.methods.stages import Finish, Prepare
from unlearning.objectives.combination import Combination, WeightedSum

Options = TypeVar("Options")


@dataclass(frozen=True)
class Window:
    """Sizes of one optimizer step's window: all of its micro-batches, on all processes.

    A loss divides by these, so that the window's loss is the sum over its micro-batches however it is cut.

    Attributes:
        forget_sequences, alternate_sequences, retain_sequences: sequences of each kind.
        forget_tokens, alternate_tokens, retain_tokens: answer tokens, which are those that a loss predicts.
        forget_positions, retain_positions: all tokens that are not padding.
    """

    forget_sequences: int = 0
    forget_tokens: int = 0
    forget_positions: int = 0
    alternate_sequences: int = 0
    alternate_tokens: int = 0
    retain_sequences: int = 0
    retain_tokens: int = 0
    retain_positions: int = 0


@dataclass(frozen=True)
class Batch:
    """One micro-batch of a window: forget examples for the forget loss, retain examples for the retain loss.

    Attributes:
        window: sizes of the whole window.
        forget: forget examples, where the forget loss reads them.
        alternate: other answers to the same prompts, row by row, where the method needs them.
        retain: retain examples; of the retain loss only.
        statistic: the window's value of `Method.statistic`, where the method has one.
    """

    window: Window
    forget: TokenBatch | None = None
    alternate: TokenBatch | None = None
    retain: TokenBatch | None = None
    statistic: float | None = None


@dataclass(frozen=True)
class Reference:
    """A constant of the start model that a loss reads: computed once, before the first step.

    Attributes:
        data: of which examples.
        quantity: "nll": `TokenBatch.reference_nll`; "logits": `TokenBatch.reference_logits` at the answer positions;
            "hidden": `TokenBatch.reference_hidden`, a block's output at every token.
        layer: of "hidden": the block whose output it is, from 0.
    """

    data: Literal["forget", "alternate", "retain"]
    quantity: Literal["nll", "logits", "hidden"]
    layer: int | None = None


@dataclass(frozen=True)
class Needs:
    """What a method reads under given options; it is refused at the start when it does not get it."""

    forget: bool = True
    retain: bool = False
    alternates: bool = False
    references: tuple[Reference, ...] = ()


Loss = Callable[[PreTrainedModel, Batch, Options], Float[Tensor, ""]]
"""A micro-batch's share of one of the window's two losses, before its weight."""


def weighted_sum(options: Any) -> Combination:
    """J = gamma * forget + alpha * retain, by the options of these names; 1 where there is no such option."""
    return WeightedSum(gamma=getattr(options, "gamma", 1.0), alpha=getattr(options, "alpha", 1.0))


@dataclass(frozen=True)
class Method(Generic[Options]):
    """One way to train, as data.

    Attributes:
        name: what the user types.
        summary: one line with the loss.
        source: the paper.
        options: dataclass of the method's own options, each made by `unlearning.options.option`.
        needs: what it reads under given options; the retain loss is left out where it reads no retain examples.
        needs_note: the same in words, for `unlearn methods`.
        forget_loss, retain_loss: the two losses; the forget loss may be missing (fine-tuning), or the retain loss.
        combination: how the two losses become one update.
        statistic: of a micro-batch, without gradient: a sum and a count, whose ratio over the window is
            `Batch.statistic`; for estimates that belong to the window and not to a micro-batch.
        trains: regular expression of the parameters that the method trains; None where it trains all.
        resolve: fills in options whose default depends on the start model; before needs and losses see them.
        prepare: makes what the method trains on from what the user gives (labels, generated answers).
        finish: makes the final weights from the trained ones.
    """

    name: str
    summary: str
    source: str
    options: type[Options]
    needs: Callable[[Options], Needs]
    needs_note: str
    forget_loss: Loss[Options] | None = None
    retain_loss: Loss[Options] | None = None
    combination: Callable[[Options], Combination] = weighted_sum
    statistic: Callable[[PreTrainedModel, Batch, Options], tuple[float, float]] | None = None
    trains: Callable[[PreTrainedModel, Options], str | None] | None = None
    resolve: Callable[[PreTrainedModel, Options], Options] | None = None
    prepare: Prepare | None = None
    finish: Finish | None = None


AnyMethod = Method[Any]
