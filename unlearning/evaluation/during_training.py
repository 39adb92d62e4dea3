"""A benchmark of `unlearn eval`, evaluated during training on a few rows of each of its sets."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unlearning.common.errors import InputError, nearest
from unlearning.common.hashing import hash_json
from unlearning.common.runs import is_run
from unlearning.data.question_answer import Wrapping
from unlearning.evaluation.harness import Prepare, evaluate, remembered
from unlearning.evaluation.statistics import Metric
from unlearning.evaluation.subject import Subject, open_subject

T = TypeVar("T")


@dataclass(frozen=True)
class Reading:
    """How a benchmark's data are read during training.

    Attributes:
        data_dir: Directory of named data sets.
        wrapping: Text around each question, as in training.
        rows: Number of rows of each set, evenly spaced.
        generate: Also compute the metrics that need generated answers.
        append_eos: Score answers with the end-of-sequence token, as in training.
    """

    data_dir: str | Path | None
    wrapping: Wrapping
    rows: int
    generate: bool
    append_eos: bool = True


def evenly_spaced(items: Sequence[T], count: int) -> list[T]:
    """Return N of the items at equal distances, beginning with the first; all items if there are no more than N.

    Args:
        items: The items.
        count: Number of items to return.

    Returns:
        Items, in their order.
    """
    if count >= len(items):
        return list(items)
    return [items[place * len(items) // count] for place in range(count)]


def _tofu(split: str, reading: Reading) -> Prepare:
    from unlearning.evaluation.benchmarks.tofu import benchmark as tofu
    from unlearning.evaluation.benchmarks.tofu.sets import SETS, read_sets

    names = (
        SETS if reading.generate else SETS[:2]
    )  # the other sets are for model utility, which needs generated answers
    sets = read_sets(split or "forget10", names=names, data_dir=reading.data_dir)
    sets = [replace(each, questions=evenly_spaced(each.questions, reading.rows)) for each in sets]
    return lambda subject: tofu.prepare(
        subject, sets=sets, wrapping=reading.wrapping, append_eos=reading.append_eos, generate=reading.generate
    )


def _muse(corpus: str, reading: Reading) -> Prepare:
    from unlearning.evaluation.benchmarks.muse import benchmark as muse
    from unlearning.evaluation.benchmarks.muse.data import PARTS, read_muse

    data = read_muse(corpus, reading.data_dir)
    found = {
        name: tuple(
            texts if part.endswith("_icl") else evenly_spaced(texts, reading.rows)  # all solved examples are shown
            for part, texts in zip(PARTS[name], sets, strict=True)
        )
        for name, sets in data.found.items()
    }
    return lambda subject: muse.prepare(subject, replace(data, found=found))


def _wmdp(name: str, reading: Reading) -> Prepare:
    return _multiple_choice("wmdp", name, f"wmdp:{name}", reading)


def _choice(source: str, reading: Reading) -> Prepare:
    return _multiple_choice("choice", "questions", source, reading)


def _multiple_choice(benchmark: str, name: str, source: str, reading: Reading) -> Prepare:
    from unlearning.data.choice_questions import read_questions
    from unlearning.evaluation.benchmarks.multiple_choice import benchmark as multiple_choice

    questions = evenly_spaced(read_questions(source, data_dir=reading.data_dir), reading.rows)
    asking = multiple_choice.Asking(scoring=["letter"], chat=reading.wrapping.chat is not None)
    return lambda subject: multiple_choice.prepare(
        subject, sets={name: questions}, asking=asking, name=benchmark, role="forget"
    )


def _familiarity(source: str, reading: Reading) -> Prepare:
    from unlearning.evaluation.benchmarks.familiarity import benchmark as familiarity

    prompts = evenly_spaced(familiarity.read_prompts(source), reading.rows)
    return lambda subject: familiarity.prepare(subject, prompts=prompts)


def _quality(source: str, reading: Reading) -> Prepare:
    from unlearning.evaluation.benchmarks.quality import benchmark as quality
    from unlearning.evaluation.benchmarks.quality.prompts import read_prompts

    chat = reading.wrapping.chat
    template = None if chat is not None else reading.wrapping.template
    asked = read_prompts(source, template=template, chat=chat, data_dir=reading.data_dir)
    return lambda subject: quality.prepare(subject, asked=evenly_spaced(asked, reading.rows), chat=chat)


BENCHMARKS: dict[str, Callable[[str, Reading], Prepare]] = {
    "tofu": _tofu,
    "muse": _muse,
    "wmdp": _wmdp,
    "choice": _choice,
    "familiarity": _familiarity,
    "quality": _quality,
}
"""Reader of each benchmark by the text before the first colon of option `benchmark`; called with the text after it."""


@dataclass(frozen=True)
class TrainingBenchmark:
    """A benchmark and the control that its numbers are compared with.

    Attributes:
        name: Prefix of its metrics' names, such as `tofu` in `tofu_forget_quality`.
        prepare: Makes the benchmark ready for a model.
        control: Run directory of the control's evaluation; None without a control.
        batch_size: Number of rows scored at a time.
    """

    name: str
    prepare: Prepare
    control: Path | None
    batch_size: int

    def has(self, metric: str) -> bool:
        """Return whether a metric of this name belongs to this benchmark."""
        return metric.startswith(f"{self.name}_")

    def metrics(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Metric]:
        """Return the metrics of the model in its present state; the model keeps its training mode.

        Args:
            model: The model in training.
            tokenizer: Its tokenizer.

        Returns:
            Metrics by full name; those without a value are left out.
        """
        was_training = model.training
        # The next step changes the weights, so no result is kept under their hash and none is computed.
        subject = Subject(name="the model in training", model=model.eval(), tokenizer=tokenizer, sha256="")
        try:
            found = evaluate(
                self.prepare, subject, control=self.control, batch_size=self.batch_size, progress=False
            ).metrics
        finally:
            model.train(was_training)
        return {f"{self.name}_{metric.name}": metric for metric in found if metric.estimate is not None}


def open_benchmark(
    spec: str, reading: Reading, *, control: str | None, device: str | None, batch_size: int
) -> TrainingBenchmark:
    """Read a benchmark's data, and evaluate the control unless that was done before.

    Args:
        spec: NAME:PART, such as `tofu:forget05`, `muse:news`, `wmdp:bio`, `choice:FILE`, `familiarity:FILE`,
            `quality:PROMPTS`.
        reading: How the data are read.
        control: The control, or the run directory of its evaluation on the same rows; None without a control.
        device: Device of the control.
        batch_size: Number of rows scored at a time.

    Returns:
        The benchmark, ready to be evaluated during training.

    Raises:
        InputError: The benchmark is unknown, its data is not found, or the control cannot be evaluated.
    """
    name, prepare = _read(spec, reading)
    results = None
    if control is not None:
        results = Path(control)
        if not is_run(results):
            results = remembered(prepare, open_subject(control, device=device), batch_size=batch_size, progress=False)
    return TrainingBenchmark(name, prepare, results, batch_size)


def benchmark_hash(spec: str, reading: Reading, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash the data of a benchmark and how they are asked.

    Args:
        spec: NAME:PART, as `open_benchmark` takes it.
        reading: How the data are read.
        model: The model to train.
        tokenizer: Its tokenizer.

    Returns:
        SHA-256 in hexadecimal; the same data under another name give the same hash.

    Raises:
        InputError: The benchmark is unknown, or its data is not found.
    """
    name, prepare = _read(spec, reading)
    benchmark = prepare(Subject(name="the model in training", model=model, tokenizer=tokenizer, sha256=""))
    sets = [[part.name, len(part.costs)] for part in benchmark.parts]
    return hash_json([name, sets, benchmark.configuration])


def _read(spec: str, reading: Reading) -> tuple[str, Prepare]:
    """Return the name of a benchmark and the function that prepares it."""
    name, _, part = spec.partition(":")
    if name not in BENCHMARKS:
        hint = nearest(name, BENCHMARKS) or ";"
        raise InputError(f"`benchmark` must begin with one of {', '.join(BENCHMARKS)}, got {spec!r}{hint.rstrip(';')}")
    return name, BENCHMARKS[name](part, reading)
