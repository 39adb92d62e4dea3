"""The type of an unlearning method: its two losses, the inputs that they read, and how they are combined."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from unlearning.common.errors import InputError
from unlearning.data.batches import TokenBatch
from unlearning.methods.recipe import Recipe
from unlearning.methods.stages import Finish, Prepare, Settle, Start
from unlearning.objectives.combination import Combination, DualAscent, WeightedSum
from unlearning.objectives.displacement import Displacement

Options = TypeVar("Options")


@dataclass(frozen=True)
class StepBatch:
    """Sizes of one step batch: all examples of one optimizer step, over all micro-batches and processes.

    A loss divides by these sizes. The loss of the step batch is therefore the sum over its micro-batches, however the
    step batch is split.

    Attributes:
        forget_sequences: Forget sequences.
        forget_tokens: Answer tokens of the forget sequences, the tokens that a loss predicts.
        forget_positions: Tokens of the forget sequences, prompts included and padding excluded.
        alternate_sequences: Alternate sequences.
        alternate_tokens: Answer tokens of the alternate sequences.
        retain_sequences: Retain sequences.
        retain_tokens: Answer tokens of the retain sequences.
        retain_positions: Tokens of the retain sequences, prompts included and padding excluded.
        progress: Share of the run's steps that are done before this one, from 0 to below 1.
    """

    forget_sequences: int = 0
    forget_tokens: int = 0
    forget_positions: int = 0
    alternate_sequences: int = 0
    alternate_tokens: int = 0
    retain_sequences: int = 0
    retain_tokens: int = 0
    retain_positions: int = 0
    progress: float = 0.0


@dataclass(frozen=True)
class Batch:
    """One micro-batch of a step batch: forget examples for the forget loss, or retain examples for the retain loss.

    Attributes:
        step_batch: Sizes of the whole step batch.
        forget: Forget examples; None in a batch of retain examples.
        alternate: Alternate answers to the same prompts, row by row; None if the method needs none.
        retain: Retain examples; None in a batch of forget examples.
        statistic: Value of `Method.statistic` over the whole step batch; None if the method has no statistic.
    """

    step_batch: StepBatch
    forget: TokenBatch | None = None
    alternate: TokenBatch | None = None
    retain: TokenBatch | None = None
    statistic: float | None = None


@dataclass(frozen=True)
class Reference:
    """A quantity of the reference model, or of a named one, that a loss reads, computed once before the first step.

    Attributes:
        data: The examples that the quantity is computed on.
        quantity: "nll" fills `TokenBatch.reference_nll`; "logits" fills `TokenBatch.reference_logits` at the answer
            positions; "hidden" fills `TokenBatch.reference_hidden`, a block's output at every token.
        layer: Block whose output "hidden" is, counted from 0, or several blocks in rising order, whose outputs stand
            side by side; None for the other quantities.
        model: Directory, hub id or built-in name of the model; None for the model before training.
        prefixes: Texts that are put before the example, each with a weight: "logits" is then the weighted sum of the
            logits after each text ("" for the example alone). Empty for the quantity as it is.
    """

    data: Literal["forget", "alternate", "retain"]
    quantity: Literal["nll", "logits", "hidden"]
    layer: int | tuple[int, ...] | None = None
    model: str | None = None
    prefixes: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Needs:
    """Inputs that a method reads under given options; a run that lacks one is refused before training.

    Attributes:
        forget: The method reads forget examples.
        retain: The method trains on retain examples.
        alternates: The method reads alternate answers to the forget prompts.
        references: Quantities of the reference model.
    """

    forget: bool = True
    retain: bool = False
    alternates: bool = False
    references: tuple[Reference, ...] = ()


Loss = Callable[[PreTrainedModel, Batch, Options], Float[Tensor, ""]]
"""Compute a micro-batch's share of a loss of the step batch, before the loss is weighted."""


def weighted_sum(options: Any) -> Combination:
    """Return J = gamma * forget + alpha * retain, with the options of these names (1 where there is no such option)."""
    return WeightedSum(gamma=getattr(options, "gamma", 1.0), alpha=getattr(options, "alpha", 1.0))


@dataclass(frozen=True)
class Method(Generic[Options]):
    """An unlearning method, as data.

    Attributes:
        name: Name that the user types.
        summary: The loss, in one line.
        source: The paper.
        options: Dataclass of the method's own options, each made by `unlearning.options.option`.
        needs: Return the inputs that the method reads under given options. Without retain examples the retain loss is
            left out.
        needs_note: The same in words, for `unlearn methods`.
        forget_loss: Loss over forget examples; None for a method that trains on retain examples alone.
        retain_loss: Loss over retain examples; None for a method that has none.
        combination: Return how the two losses become one update.
        displacement: Return how the weights are moved before the forget pass of a step, so that its gradient is taken
            beside the present weights; None to take it at them.
        statistic: Return a sum and a count over a micro-batch, computed without gradient. Their ratio over the step
            batch is `Batch.statistic`, for estimates that must not depend on how the step batch is split.
        statistic_of: The examples that `statistic` reads, and in whose batches it is.
        trains: Return the parameters that the method trains, as a regular expression or by their names; None to train
            all.
        resolve: Fill in options whose default depends on the model, before `needs` and the losses read them.
        settle: Fill in options whose default depends on the data or on the length of the run; called with the reference
            model once the data are tokenised. The values are shown before the first step and kept in the record.
        prepare: Make the training data from what the user gave (generic labels, generated answers).
        start: Change the weights before the first step, after the reference model's quantities are computed.
        finish: Make the final weights from the trained ones.
        recipe: Settings of the trainer that the user need not give.
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
    displacement: Callable[[Options], Displacement] | None = None
    statistic: Callable[[PreTrainedModel, Batch, Options], tuple[float, float]] | None = None
    statistic_of: Literal["forget", "retain"] = "forget"
    trains: Callable[[PreTrainedModel, Options], str | frozenset[str] | None] | None = None
    resolve: Callable[[PreTrainedModel, Options], Options] | None = None
    settle: Settle | None = None
    prepare: Prepare | None = None
    start: Start | None = None
    finish: Finish | None = None
    recipe: Recipe = Recipe()


AnyMethod = Method[Any]


def check_weights(method: AnyMethod, options: Any) -> None:
    """Check that some loss has a weight.

    Args:
        method: The method.
        options: Its options.

    Raises:
        InputError: All weights are 0 and stay so; nothing would be trained.
    """
    combination = method.combination(options)
    ascends = isinstance(combination, DualAscent) and combination.eta > 0
    if any(combination.weights()) or ascends:
        return
    names = [name for name in ("gamma", "alpha", "lambda0", "eta") if hasattr(options, name)]
    listed = " and ".join(f"`{name}`" for name in names)
    raise InputError(f"{listed} must not all be 0 for {method.name}: nothing would be trained. Set one above 0.")
