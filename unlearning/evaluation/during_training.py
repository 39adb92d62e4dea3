"""A benchmark of `unlearn eval` that is measured while a model trains, on a few rows of each of its sets."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unlearning.common.errors import InputError, nearest
from unlearning.common.runs import is_run
from unlearning.data.question_answer import Wrapping
from unlearning.evaluation.harness import Benchmark, evaluate, remembered
from unlearning.evaluation.statistics import Metric
from unlearning.evaluation.subject import Subject, open_subject

T = TypeVar("T")
Prepare = Callable[[Subject], Benchmark]


@dataclass(frozen=True)
class Reading:
    """How a benchmark's data are read during training.

    Attributes:
        data_dir: where named data sets are.
        wrapping: of the questions, as in training.
        rows: of each set, evenly spaced.
        generate: also measure what needs generated answers.
    """

    data_dir: str | Path | None
    wrapping: Wrapping
    rows: int
    generate: bool


def evenly_spaced(items: Sequence[T], count: int) -> list[T]:
    """So many of the items at equal distances, the first among them; all where there are no more."""
    if count >= len(items):
        return list(items)
    return [items[place * len(items) // count] for place in range(count)]


def _tofu(split: str, reading: Reading) -> Prepare:
    from unlearning.evaluation.benchmarks.tofu import benchmark as tofu
    from unlearning.evaluation.benchmarks.tofu.sets import SETS, read_sets

    names = SETS if reading.generate else SETS[:2]  # model utility, which the others are for, needs generated answers
    sets = read_sets(split or "forget10", names=names, data_dir=reading.data_dir)
    sets = [replace(each, questions=evenly_spaced(each.questions, reading.rows)) for each in sets]
    return lambda subject: tofu.prepare(subject, sets=sets, wrapping=reading.wrapping, generate=reading.generate)


def _muse(corpus: str, reading: Reading) -> Prepare:
    from unlearning.evaluation.benchmarks.muse import benchmark as muse
    from unlearning.evaluation.benchmarks.muse.data import read_muse

    found = read_muse(corpus, reading.data_dir, limit=reading.rows)
    return lambda subject: muse.prepare(subject, found)


def _wmdp(name: str, reading: Reading) -> Prepare:
    return _multiple_choice("wmdp", name, f"wmdp:{name}", reading)


def _choice(source: str, reading: Reading) -> Prepare:
    return _multiple_choice("choice", "questions", source, reading)


def _multiple_choice(benchmark: str, name: str, source: str, reading: Reading) -> Prepare:
    from unlearning.data.choice_questions import read_questions
    from unlearning.evaluation.benchmarks.multiple_choice import benchmark as multiple_choice

    questions = evenly_spaced(read_questions(source, data_dir=reading.data_dir), reading.rows)
    return lambda subject: multiple_choice.prepare(
        subject,
        sets={name: questions},
        name=benchmark,
        role="forget",
        scoring=["letter"],
        chat=reading.wrapping.chat is not None,
    )


def _familiarity(source: str, reading: Reading) -> Prepare:
    from unlearning.evaluation.benchmarks import familiarity

    prompts = evenly_spaced(familiarity.read_prompts(source), reading.rows)
    return lambda subject: familiarity.prepare(subject, prompts=prompts)


def _quality(source: str, reading: Reading) -> Prepare:
    from unlearning.evaluation.benchmarks import quality

    chat = reading.wrapping.chat
    template = None if chat is not None else reading.wrapping.template
    asked = quality.read_prompts(source, template=template, chat=chat, data_dir=reading.data_dir)
    return lambda subject: quality.prepare(subject, asked=evenly_spaced(asked, reading.rows), chat=chat)


BENCHMARKS: dict[str, Callable[[str, Reading], Prepare]] = {
    "tofu": _tofu,
    "muse": _muse,
    "wmdp": _wmdp,
    "choice": _choice,
    "familiarity": _familiarity,
    "quality": _quality,
}
"""By what stands before the first colon of option `benchmark`; given what stands after it."""


@dataclass(frozen=True)
class TrainingBenchmark:
    """A benchmark and what its numbers are compared with.

    Attributes:
        name: what its metrics' names begin with, as `tofu` in `tofu_forget_quality`.
        prepare: makes it ready for a model.
        retain: the retain model's results; None where it has none.
        batch_size: rows at a time.
    """

    name: str
    prepare: Prepare
    retain: Path | None
    batch_size: int

    def has(self, metric: str) -> bool:
        """Whether a metric of this name would be this benchmark's."""
        return metric.startswith(f"{self.name}_")

    def metrics(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Metric]:
        """What can be measured of the model as it is now, by full name; the model keeps its mode."""
        was_training = model.training
        # Nothing is kept under the name of weights that the next step changes, so no hash of them is taken.
        subject = Subject(name="the model in training", model=model.eval(), tokenizer=tokenizer, sha256="")
        try:
            found = evaluate(
                self.prepare, subject, retain=self.retain, batch_size=self.batch_size, progress=False
            ).metrics
        finally:
            model.train(was_training)
        return {f"{self.name}_{metric.name}": metric for metric in found if metric.estimate is not None}


def open_benchmark(
    spec: str, reading: Reading, *, retain: str | None, device: str | None, batch_size: int
) -> TrainingBenchmark:
    """Read a benchmark's data, and evaluate the retain model where it was not before.

    Args:
        spec: NAME:PART, as `tofu:forget05`, `muse:news`, `wmdp:bio`, `choice:FILE`, `familiarity:FILE`,
            `quality:PROMPTS`.
        reading: how its data are read.
        retain: the retain model, or the run directory of its evaluation on the same rows.
        device: of the retain model.
        batch_size: rows at a time.

    Raises:
        InputError: an unknown benchmark, data that are not there, or what evaluating the retain model refuses.
    """
    name, _, part = spec.partition(":")
    if name not in BENCHMARKS:
        hint = nearest(name, BENCHMARKS) or ";"
        raise InputError(f"benchmark={spec}: none of this name is measured in training{hint} {', '.join(BENCHMARKS)}")
    prepare = BENCHMARKS[name](part, reading)
    results = None
    if retain is not None:
        results = Path(retain)
        if not is_run(results):
            results = remembered(prepare, open_subject(retain, device=device), batch_size=batch_size, progress=False)
    return TrainingBenchmark(name, prepare, results, batch_size)
