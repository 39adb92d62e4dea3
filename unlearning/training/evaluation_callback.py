"""Evaluation during training: metrics, a rule that stops, the best weights so far, a collapse that is said."""

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
"""What can be watched; a gap is retain minus forget."""

MARGIN = 8
"""Tokens that a watched answer may be longer than the longest right one."""

_RULE = re.compile(r"\s*(\w+)\s*(<=|>=|<|>)\s*([-+0-9.eE]+)\s*")
_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<": lambda value, bound: value < bound,
    "<=": lambda value, bound: value <= bound,
    ">": lambda value, bound: value > bound,
    ">=": lambda value, bound: value >= bound,
}


@dataclass(frozen=True)
class Rule:
    """A bound on a metric, as `forget_rouge<0.2`."""

    metric: str
    comparison: str
    bound: float

    def holds(self, metrics: dict[str, float]) -> bool:
        """Whether the metric has passed the bound."""
        return _COMPARISONS[self.comparison](metrics[self.metric], self.bound)


def parse_rule(text: str, *, benchmark: str | None = None) -> Rule:
    """Read `METRIC<NUMBER` (or >, <=, >=).

    Args:
        text: to read.
        benchmark: what is measured besides, as `tofu:forget05`.

    Raises:
        InputError: it is not of this form, or there is no such metric.
    """
    found = _RULE.fullmatch(text)
    try:
        bound = float(found[3]) if found else None
    except ValueError:
        bound = None
    if found is None or bound is None:
        raise InputError(f"stop_when={text!r}: write METRIC<NUMBER or METRIC>NUMBER, as forget_rouge<0.2")
    return Rule(check_metric(found[1], "stop_when", benchmark=benchmark), found[2], bound)


def check_metric(name: str, option: str, *, benchmark: str | None = None) -> str:
    """The name, if there is such a metric, or if a benchmark may have one: it says so when it is first measured.

    Raises:
        InputError: there is none; names the nearest one.
    """
    if name not in METRICS and not (benchmark and name.startswith(f"{benchmark.partition(':')[0]}_")):
        hint = nearest(name, METRICS) or ";"
        raise InputError(f"{option}: no metric {name!r}{hint} there are {', '.join(METRICS)}")
    return name


def higher_is_better(metric: str) -> bool:
    """Whether more of one of `METRICS` is the better unlearning: more retained, less of the forget set."""
    part, _, quantity = metric.partition("_")
    return (part != "forget") != (quantity == "nll")


@dataclass(frozen=True)
class Measured:
    """What one evaluation gave: values by metric, and what is better of each."""

    values: dict[str, float]
    directions: dict[str, str]


_BETTER = {True: "higher is better", False: "lower is better"}


@dataclass(frozen=True)
class Watched:
    """What is measured on: examples and the same tokenised, empty where there are none, and the chat they are in; and a
    benchmark, where one was asked for."""

    examples: dict[str, Sequence[Example]]
    spans: dict[str, Sequence[Span]]
    chat: ChatFormat | None = None
    benchmark: TrainingBenchmark | None = None

    def names(self) -> list[str]:
        """The metrics that these data give, beside those of the benchmark."""
        parts = [name for name in ("forget", "retain") if self.spans.get(name)]
        if len(parts) == 2:
            parts.append("gap")
        quantities = QUANTITIES if self.generates() else LIKELIHOODS
        return [f"{part}_{quantity}" for part in parts for quantity in quantities]

    def counts(self) -> dict[str, int]:
        """How many examples there are of each set."""
        return {name: len(spans) for name, spans in self.spans.items() if spans}

    def generates(self) -> bool:
        """Whether there are prompts to answer: plain text has none."""
        return all(example.prompt for examples in self.examples.values() for example in examples)

    def measure(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, generate: bool, batch_size: int
    ) -> Measured:
        """All metrics; those of generated answers only if `generate`."""
        metrics: dict[str, float] = {}
        for name, spans in self.spans.items():
            if not spans:
                continue
            values = answer_likelihoods(model, spans, batch_size=batch_size)
            if generate:
                # A collapsed model never ends by itself; what goes on beyond the longest answer is none of them.
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


class Watch(TrainerCallback, ExportableState):
    """Measures before the first step, every `every` steps and after the last, and acts on what it finds.

    Args:
        measure: the present metrics.
        every: steps between two evaluations; None: only before and after.
        rule: stops the training where it holds.
        best: metric of which the best weights are kept.
        save_best: writes the present weights.
        collapse_below: share of its first value under which `retain_probability` counts as collapsed.
        log: takes what was measured into the history.
    """

    def __init__(
        self,
        *,
        measure: Callable[[], Measured],
        every: int | None,
        rule: Rule | None,
        best: str | None,
        save_best: Callable[[], None],
        collapse_below: float,
        log: Callable[[dict[str, float]], None],
    ) -> None:
        self.measure = measure
        self.every = every
        self.rule = rule
        self.best = best
        self.save_best = save_best
        self.collapse_below = collapse_below
        self.log = log
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.best_value: float | None = None
        self.best_step: int | None = None
        self.collapsed_at: int | None = None
        self.stopped_at: int | None = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        attributes = {
            "first": self.first,
            "best_value": self.best_value,
            "best_step": self.best_step,
            "collapsed_at": self.collapsed_at,
            "stopped_at": self.stopped_at,
        }
        return {"args": {}, "attributes": attributes}

    def restore(self, checkpoint: Path) -> None:
        """Take a checkpoint's state."""
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        for name, value in state["stateful_callbacks"][type(self).__name__]["attributes"].items():
            setattr(self, name, value)

    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """The start model's own metrics."""
        if state.global_step == 0:
            self._evaluate(state, control)
            if self.stopped_at is not None:
                raise InputError("stop_when holds before the first step: there is nothing to train; set another bound")

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Measure where it is time."""
        last = state.global_step >= state.max_steps
        if last or (self.every and state.global_step % self.every == 0):
            self._evaluate(state, control)

    def _evaluate(self, state: TrainerState, control: TrainerControl) -> None:
        measured = self.measure()
        metrics = self.last = measured.values
        self._check_named(measured)
        self.first = self.first or metrics
        due = control.should_log
        self.log(metrics)
        control.should_log = due  # which a line in the log takes back, and the loss's own is still to come
        self.note_collapse(metrics, state.global_step)
        if self.best is not None and self._is_better(metrics[self.best], measured.directions[self.best]):
            self.best_value, self.best_step = metrics[self.best], state.global_step
            self.save_best()
        if self.rule is not None and self.rule.holds(metrics):
            self.stopped_at = state.global_step
            control.should_training_stop = True
            control.should_log = True

    def note_collapse(self, metrics: dict[str, float], step: int) -> None:
        """Say where a model that answered retain questions does so no more."""
        utility = "retain_probability"
        if self.collapsed_at is None and metrics.get(utility, 1.0) < self.collapse_below * self.first.get(utility, 0.0):
            self.collapsed_at = step
            warnings.warn(
                f"collapse at step {step}: {utility} is {metrics[utility]:.3g}, it was "
                f"{self.first[utility]:.3g} before training; lower learning_rate, give the retain loss more weight, "
                "or stop earlier (stop_when)",
                stacklevel=2,
            )

    def _check_named(self, measured: Measured) -> None:
        """Whether the metrics of the rule and of the best are there: a benchmark's are only known now."""
        for option, name in (("stop_when", self.rule.metric if self.rule else None), ("keep_best", self.best)):
            if name is not None and name not in measured.values:
                hint = nearest(name, measured.values) or ";"
                raise InputError(f"{option}: {name} was not measured{hint} there are {', '.join(measured.values)}")
        if self.best is not None and measured.directions[self.best] not in _BETTER.values():
            raise InputError(f"keep_best: of {self.best}, {measured.directions[self.best]}; name another metric")

    def _is_better(self, value: float, direction: str) -> bool:
        if value != value:
            return False
        if self.best_value is None:
            return True
        return value > self.best_value if direction == _BETTER[True] else value < self.best_value
