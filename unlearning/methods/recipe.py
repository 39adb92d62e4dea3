"""Recipes: the settings of the trainer that a method uses unless the user sets them.

One learning rate does not fit all models: 1e-5, which the papers use for 1 to 8 billion parameters, makes a model of a
million parameters forget nothing. A recipe states a method's rate for a million parameters, and the rate falls with the
number of parameters.
"""

import math
from dataclasses import dataclass, replace

from unlearning.options import LearningRateSchedule, TrainOptions

EXPONENT = -0.5
"""Power of the number of parameters by which the learning rate falls: 8e-4 at 1 million gives 1e-5 at 6 billion."""

ADAPTER_FACTOR = 10.0
"""Factor of the learning rate of a LoRA adapter, whose matrices begin at zero."""


@dataclass(frozen=True)
class Recipe:
    """Default settings of a method.

    Attributes:
        learning_rate: Peak learning rate for a model of a million parameters whose weights are all trained.
        epochs: Passes over the forget examples (finetune: over the retain examples).
        steps: Smallest number of optimizer steps; a small data set is passed over more often, in smaller steps.
        step_batch: Largest number of forget examples of an optimizer step, over all processes.
        lr_schedule: Learning rate after the warm-up.
        source: Source of the settings, or the measurement behind them.
    """

    learning_rate: float = 8e-4
    epochs: int = 10
    steps: int = 80
    step_batch: int = 32
    lr_schedule: LearningRateSchedule = "linear"
    source: str = "10 epochs of 32 examples: open-unlearning; rates: measured"

    def rate(self, n_parameters: int, *, adapter: bool = False) -> float:
        """Return the peak learning rate.

        Args:
            n_parameters: Number of parameters of the model, frozen ones included.
            adapter: True if a LoRA adapter is trained instead of the weights.

        Returns:
            The rate, rounded to two digits.
        """
        rate = self.learning_rate * (n_parameters / 1e6) ** EXPONENT * (ADAPTER_FACTOR if adapter else 1.0)
        return float(f"{rate:.1e}")

    def micro_batches(self, n_examples: int, size: int) -> int:
        """Return the number of micro-batches of an optimizer step.

        Args:
            n_examples: Number of forget examples.
            size: Forget examples of a micro-batch, over all processes.

        Returns:
            As many as `step_batch` allows; fewer where the examples would not give `steps` steps in `epochs` passes.
        """
        examples = min(self.step_batch, n_examples * self.epochs // max(1, self.steps))
        return max(1, examples // size)

    def passes(self, n_examples: int, size: int) -> int:
        """Return the number of passes over the data.

        Args:
            n_examples: Number of forget examples.
            size: Forget examples of an optimizer step.

        Returns:
            `epochs`, or as many as `steps` optimizer steps need.
        """
        return max(self.epochs, math.ceil(self.steps / math.ceil(n_examples / size)))


def is_asked(options: TrainOptions) -> bool:
    """Return whether the user left an option to the recipe (see `with_recipe`)."""
    asked = (options.learning_rate, options.gradient_accumulation_steps, options.epochs, options.lr_schedule)
    return None in asked


def with_recipe(
    options: TrainOptions, recipe: Recipe, *, n_parameters: int, n_examples: int, n_processes: int = 1
) -> TrainOptions:
    """Fill in the options that the user left to the recipe.

    Args:
        options: The trainer's options.
        recipe: The method's recipe.
        n_parameters: Number of parameters of the model, frozen ones included.
        n_examples: Number of examples of an epoch.
        n_processes: Number of processes that share an optimizer step.

    Returns:
        Options in which the learning rate, the epochs and the micro-batches of a step are set.
    """
    adapter = options.lora_rank > 0
    rate = options.learning_rate or recipe.rate(n_parameters, adapter=adapter)
    size = options.batch_size * n_processes
    micro_batches = options.gradient_accumulation_steps or recipe.micro_batches(n_examples, size)
    epochs = options.epochs or recipe.passes(n_examples, size * micro_batches)
    return replace(
        options,
        learning_rate=rate,
        gradient_accumulation_steps=micro_batches,
        epochs=epochs,
        lr_schedule=options.lr_schedule or recipe.lr_schedule,
    )
