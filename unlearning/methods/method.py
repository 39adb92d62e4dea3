"""What an unlearning method declares about itself."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from unlearning.data.batches import TokenBatch

Options = TypeVar("Options")


@dataclass(frozen=True)
class Window:
    """Sizes of one accumulation window: all the micro-batches between two optimizer steps.

    Attributes:
        forget_sequences, forget_tokens: sequences and answer tokens of the window's forget examples.
        retain_sequences, retain_tokens: the same of its retain examples.
    """

    forget_sequences: int = 0
    forget_tokens: int = 0
    retain_sequences: int = 0
    retain_tokens: int = 0


@dataclass(frozen=True)
class Batch:
    """One micro-batch: forget examples and the retain examples that they were paired with."""

    forget: TokenBatch | None
    retain: TokenBatch | None
    window: Window


@dataclass(frozen=True)
class StepLoss:
    """A micro-batch's share of the window's loss.

    Attributes:
        total: what is minimised.
        forget, retain: its two terms before their weights, for the history.
    """

    total: Float[Tensor, ""]
    forget: Float[Tensor, ""] | None = None
    retain: Float[Tensor, ""] | None = None


@dataclass(frozen=True)
class Method(Generic[Options]):
    """One way to train, as data.

    Attributes:
        name: what the user types.
        summary: one line with the loss.
        options: dataclass of the method's own options, each made by `unlearning.options.option`.
        step: a micro-batch's share of the loss; sums to the window's loss over the window's micro-batches.
        uses_forget: whether it reads forget examples.
        uses_retain: whether it reads retain examples under the given options.
        uses_reference: whether the forget batches carry the start model's log-likelihoods.
        retain_note: what `unlearn methods` says about the retain data.
    """

    name: str
    summary: str
    options: type[Options]
    step: Callable[[PreTrainedModel, Batch, Options], StepLoss]
    uses_forget: bool
    uses_retain: Callable[[Options], bool]
    uses_reference: bool = False
    retain_note: str = "retain"


AnyMethod = Method[Any]
