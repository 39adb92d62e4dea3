"""Evaluation during training: metrics, the rule that stops, the best weights so far, a warning of collapse."""

import json
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.training_args import TrainingArguments

from unlearning.common.errors import InputError, nearest
from unlearning.data.batches import Span, n_predicted
from unlearning.data.chat import ChatFormat
from unlearning.data.question_answer import Example
from unlearning.evaluation.answers import GENERATED, LIKELIHOODS, answer_likelihoods, answer_matches
from unlearning.evaluation.during_training import TrainingBenchmark

QUANTITIES = (*LIKELIHOODS, *GENERATED)
METRICS = tuple(f"{name}_{quantity}" for name in ("forget", "retain", "gap") for quantity in QUANTITIES)
"""Metrics of the training data; a gap is the retain value minus the forget value."""

MARGIN = 8
"""Tokens by which a generated answer may be longer than the longest correct one."""

_RULE = re.compile(r"\s*(\w+)\s*(<=|>=|<|>)\s*([-+0-9.eE]+)\s*")
_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<": lambda value, bound: value < bound,
    "<=": lambda value, bound: value <= bound,
    ">": lambda value, bound: value > bound,
    ">=": lambda value, bound: value >= bound,
}


@dataclass(frozen=True)
class Rule:
    """A bound on a metric, such as `forget_rouge<0.2`."""

    metric: str
    comparison: str
    bound: float

    def __str__(self) -> str:
        """Return the rule as a user writes it."""
        return f"{self.metric}{self.comparison}{self.bound}"

    def holds(self, metrics: dict[str, float]) -> bool:
        """Return True if the metric has passed the bound."""
        return _COMPARISONS[self.comparison](metrics[self.metric], self.bound)


@dataclass(frozen=True)
class Target:
    """The aim of a run: forget answers below a probability, retain answers still about as probable as before.

    Attributes:
        forget: Value of `forget_probability` at which the aim is reached.
        retain: Fraction of the initial `retain_probability` that must be left; training stops below it.
    """

    forget: float
    retain: float

    def reason(self, metrics: dict[str, float], first: dict[str, float]) -> str | None:
        """Return why training stops at these metrics, `first` before the first step; None to go on."""
        forget, retain = metrics["forget_probability"], metrics.get("retain_probability")
        if forget <= self.forget:
            return f"forget_probability {forget:.3g} reached target_forget={self.forget:g}"
        if retain is not None and retain < self.retain * first["retain_probability"]:
            return (
                f"retain_probability {retain:.3g} fell below {self.retain:g} of the {first['retain_probability']:.3g} "
                f"before training; forget_probability is {forget:.3g}, above target_forget={self.forget:g}"
            )
        return None


def parse_rule(text: str, *, benchmark: str | None = None) -> Rule:
    """Read a rule such as `forget_rouge<0.2`.

    Args:
        text: A metric, one of <, >, <= and >=, and a number.
        benchmark: Benchmark that is also measured, such as "tofu:forget05"; None for none.

    Returns:
        The rule.

    Raises:
        InputError: The text has another form, or no metric has this name.
    """
    found = _RULE.fullmatch(text)
    try:
        bound = float(found[3]) if found else None
    except ValueError:
        bound = None
    if found is None or bound is None:
        raise InputError(
            f"`stop_when` must be METRIC<NUMBER or METRIC>NUMBER, got {text!r}. Write, for example, forget_rouge<0.2."
        )
    return Rule(check_metric(found[1], "stop_when", benchmark=benchmark), found[2], bound)


def check_metric(name: str, option: str, *, benchmark: str | None = None) -> str:
    """Check that a metric exists.

    Metrics of a benchmark are known only after its first evaluation: every name with the benchmark's prefix passes.

    Args:
        name: Name of the metric.
        option: Option that gave the name.
        benchmark: Benchmark that is also measured, such as "tofu:forget05"; None for none.

    Returns:
        The name.

    Raises:
        InputError: No metric has this name; the message names the nearest one.
    """
    if name not in METRICS and not (benchmark and name.startswith(f"{benchmark.partition(':')[0]}_")):
        raise InputError(f"`{option}` must name one of {', '.join(METRICS)}, got {name!r}{nearest(name, METRICS)}")
    return name


def higher_is_better(metric: str) -> bool:
    """Return True if a higher value of one of `METRICS` means better unlearning: retain kept, forget set forgotten."""
    part, _, quantity = metric.partition("_")
    return (part != "forget") != (quantity == "nll")


@dataclass(frozen=True)
class Measured:
    """Result of one evaluation.

    Attributes:
        values: Value of each metric.
        directions: For each metric "higher is better", "lower is better", or a benchmark's own words.
    """

    values: dict[str, float]
    directions: dict[str, str]


_BETTER = {True: "higher is better", False: "lower is better"}


@dataclass(frozen=True)
class EvaluationData:
    """The data of an evaluation during training.

    Attributes:
        examples: Forget and retain examples by name; a set that was not given is missing.
        spans: The same examples, tokenised.
        chat: Chat template that wraps the prompts; None for none.
        benchmark: Benchmark that is also measured; None for none.
    """

    examples: dict[str, Sequence[Example]]
    spans: dict[str, Sequence[Span]]
    chat: ChatFormat | None = None
    benchmark: TrainingBenchmark | None = None

    def names(self) -> list[str]:
        """Return the metrics that these data give, without those of the benchmark."""
        parts = [name for name in ("forget", "retain") if self.spans.get(name)]
        if len(parts) == 2:
            parts.append("gap")
        quantities = QUANTITIES if self.has_prompts() else LIKELIHOODS
        return [f"{part}_{quantity}" for part in parts for quantity in quantities]

    def counts(self) -> dict[str, int]:
        """Return the number of examples of each set."""
        return {name: len(spans) for name, spans in self.spans.items() if spans}

    def has_prompts(self) -> bool:
        """Return True if answers can be generated: plain text has no prompts."""
        return all(example.prompt for examples in self.examples.values() for example in examples)

    def measure(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, generate: bool, batch_size: int
    ) -> Measured:
        """Measure all metrics.

        Args:
            model: The model, as it is now.
            tokenizer: Its tokenizer.
            generate: Also measure the metrics of generated answers.
            batch_size: Sequences per batch.

        Returns:
            The value and the direction of each metric.
        """
        metrics: dict[str, float] = {}
        for name, spans in self.spans.items():
            if not spans:
                continue
            values = answer_likelihoods(model, spans, batch_size=batch_size)
            if generate:
                # A collapsed model may never end an answer; text beyond the longest correct answer cannot match.
                longest = max(n_predicted(span) for span in spans)
                values |= answer_matches(
                    model,
                    tokenizer,
                    self.examples[name],
                    batch_size=batch_size,
                    max_new_tokens=longest + MARGIN,
                    chat=self.chat,
                )
            metrics |= {f"{name}_{quantity}": value for quantity, value in values.items()}
        for quantity in QUANTITIES:
            if f"forget_{quantity}" in metrics and f"retain_{quantity}" in metrics:
                metrics[f"gap_{quantity}"] = metrics[f"retain_{quantity}"] - metrics[f"forget_{quantity}"]
        directions = {name: _BETTER[higher_is_better(name)] for name in metrics}
        if self.benchmark is not None:
            for name, metric in self.benchmark.metrics(model, tokenizer).items():
                assert metric.estimate is not None
                metrics[name], directions[name] = metric.estimate.value, metric.direction
        return Measured(metrics, directions)


class EvaluationCallback(TrainerCallback, ExportableState):
    """Evaluates before the first step, every `every` steps and after the last step, and acts on the result.

    Args:
        measure: Return the present metrics.
        every: Steps between two evaluations; None to evaluate only before and after training.
        rule: Rule that stops the training; None for none.
        target: Aim at which training stops; None for none.
        best: Metric whose best weights are kept; None for none.
        save_best: Write the present weights.
        collapse_below: Fraction of the initial `retain_probability` below which the model counts as collapsed.
        log: Add metrics to the history.
    """

    def __init__(
        self,
        *,
        measure: Callable[[], Measured],
        every: int | None,
        rule: Rule | None,
        target: Target | None,
        best: str | None,
        save_best: Callable[[], None],
        collapse_below: float,
        log: Callable[[dict[str, float]], None],
    ) -> None:
        """Keep the arguments."""
        self.measure = measure
        self.every = every
        self.rule = rule
        self.target = target
        self.best = best
        self.save_best = save_best
        self.collapse_below = collapse_below
        self.log = log
        self.first: dict[str, float] = {}
        self.best_value: float | None = None
        self.best_step: int | None = None
        self.collapsed_at: int | None = None
        self.stopped_at: int | None = None
        self.stopped_by: str | None = None

    def state(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps."""
        attributes = {
            "first": self.first,
            "best_value": self.best_value,
            "best_step": self.best_step,
            "collapsed_at": self.collapsed_at,
            "stopped_at": self.stopped_at,
            "stopped_by": self.stopped_by,
        }
        return {"args": {}, "attributes": attributes}

    def restore(self, checkpoint: Path) -> None:
        """Restore the state from a checkpoint."""
        callbacks = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["stateful_callbacks"]
        kept = callbacks.get(type(self).__name__) or callbacks["Watch"]  # the name in checkpoints of earlier versions
        for name, value in kept["attributes"].items():
            setattr(self, name, value)

    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Measure the model before training; raise if the rule already holds."""
        if state.global_step == 0:
            self._evaluate(state, control)
            if self.stopped_at is not None:
                name = "stop_when" if self.target is None else "target_forget"
                raise InputError(
                    f"`{name}` must not hold before the first step, or there is nothing to train: {self.stopped_by}. "
                    "Set another bound."
                )

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Evaluate at the last step and at every multiple of `every`."""
        last = state.global_step >= state.max_steps
        if last or (self.every and state.global_step % self.every == 0):
            self._evaluate(state, control)

    def _evaluate(self, state: TrainerState, control: TrainerControl) -> None:
        measured = self.measure()
        metrics = measured.values
        self._check_named(measured)
        self.first = self.first or metrics
        due = control.should_log
        self.log(metrics)
        control.should_log = due  # `log` resets it, and the line with the losses is still to be logged
        self.note_collapse(metrics, state.global_step)
        if self.best is not None and self._is_better(metrics[self.best], measured.directions[self.best]):
            self.best_value, self.best_step = metrics[self.best], state.global_step
            self.save_best()
        self.stopped_by = self._reason(metrics)
        if self.stopped_by is not None:
            self.stopped_at = state.global_step
            control.should_training_stop = True
            control.should_log = True

    def _reason(self, metrics: dict[str, float]) -> str | None:
        """Return why training stops now; None to go on."""
        if self.rule is not None and self.rule.holds(metrics):
            return f"{self.rule} holds"
        return None if self.target is None else self.target.reason(metrics, self.first)

    def note_collapse(self, metrics: dict[str, float], step: int) -> None:
        """Warn once if `retain_probability` fell below `collapse_below` times its initial value."""
        utility = "retain_probability"
        if self.collapsed_at is None and metrics.get(utility, 1.0) < self.collapse_below * self.first.get(utility, 0.0):
            self.collapsed_at = step
            warnings.warn(
                f"collapse at step {step}: {utility} is {metrics[utility]:.3g}, and was {self.first[utility]:.3g} "
                "before training. Set a lower `learning_rate`, a higher weight of the retain loss, or `stop_when`.",
                stacklevel=2,
            )

    def _check_named(self, measured: Measured) -> None:
        """Check that the metrics of `stop_when` and `keep_best` were measured: a benchmark's are only known now."""
        for option, name in (("stop_when", self.rule.metric if self.rule else None), ("keep_best", self.best)):
            if name is not None and name not in measured.values:
                hint = (
                    "; no answer of these data has a word that it could count"
                    if name in METRICS and name.endswith("_rouge")
                    else nearest(name, measured.values)
                )
                raise InputError(f"`{option}` must name one of {', '.join(measured.values)}, got {name}{hint}")
        if self.best is not None and measured.directions[self.best] not in _BETTER.values():
            raise InputError(
                f"`keep_best` must name a metric of which higher or lower is better, got {self.best} "
                f"({measured.directions[self.best]})"
            )

    def _is_better(self, value: float, direction: str) -> bool:
        if value != value:
            return False
        if self.best_value is None:
            return True
        return value > self.best_value if direction == _BETTER[True] else value < self.best_value
