"""Search of the learning rate: short runs on a sample of the data, from the recipe's rate upwards or downwards."""

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

from accelerate import PartialState
from transformers import PreTrainedModel

from unlearning.common.errors import InputError
from unlearning.evaluation.during_training import evenly_spaced
from unlearning.methods.method import AnyMethod
from unlearning.training.arguments import planned_steps
from unlearning.training.inputs import EncodedInputs, Inputs
from unlearning.training.job import Job, LoadedModel
from unlearning.training.output_directory import saying_disk_full, write_json

T = TypeVar("T")

FORGOTTEN, KEPT = 0.2, 0.9
"""Aim of the search: at most and at least these fractions of forget_probability and retain_probability are left."""

FACTOR = 3.0
"""Ratio of one rate to the next, until one is too low and one too high."""

MOST_TRIALS = 5
SAMPLE = 64
"""Largest number of forget examples, and of retain examples, of a trial."""

MOST_STEPS = 120
FILE = "tuning.json"
AIM = f"at most {FORGOTTEN:.0%} of forget_probability and at least {KEPT:.0%} of retain_probability left"
OF_THE_RUN = (
    *("learning_rate", "max_steps", "tune", "target_forget", "target_retain", "stop_when", "keep_best", "eval_every"),
    *("save_every", "keep_checkpoints", "tensorboard", "save_dtype"),
    *("benchmark", "benchmark_control", "benchmark_rows", "benchmark_generate"),
)
"""Options that a trial does not share with its run."""


@dataclass(frozen=True)
class Trial:
    """A short run.

    Attributes:
        learning_rate: Its peak learning rate.
        forget: Fraction of forget_probability that was left.
        retain: Fraction of retain_probability that was left; 1 without retain data.
    """

    learning_rate: float
    forget: float
    retain: float

    @property
    def good(self) -> bool:
        """True if the trial reached the aim."""
        return self.forget <= FORGOTTEN and self.retain >= KEPT


def search_rate(run: Callable[[float], Trial], start: float) -> tuple[Trial, list[Trial]]:
    """Search a learning rate at which enough is forgotten and enough is kept.

    A rate is too high where too much is lost, and too low where too little is forgotten. The next rate is a third of
    the lowest that is too high, three times the highest that is too low, or, if there are both, their geometric mean.

    Args:
        run: Make a trial at a rate.
        start: First rate.

    Returns:
        The chosen trial (the first good one, else the one where most is kept beyond what is left of the forget
        answers), and all trials in order.
    """
    trials: list[Trial] = []
    low, high = 0.0, math.inf
    rate = start
    while len(trials) < MOST_TRIALS and not (trials and trials[-1].good):
        trials.append(run(float(f"{rate:.1e}")))
        if trials[-1].retain < KEPT:
            high = min(high, rate)
        else:
            low = max(low, rate)
        rate = math.sqrt(low * high) if low > 0 and high < math.inf else low * FACTOR if low > 0 else high / FACTOR
    return max(trials, key=lambda trial: (trial.good, trial.retain - trial.forget)), trials


def check_tunable(method: AnyMethod) -> None:
    """Check that a rate can be searched for a method.

    Args:
        method: The unlearning method.

    Raises:
        InputError: The method makes its own training data, or reads no forget data.
    """
    if method.prepare is not None:
        raise InputError(f"`tune` is not supported by {method.name}, which makes data before it trains. Remove `tune`.")
    if method.forget_loss is None:
        raise InputError(f"`tune` needs a method that forgets, got {method.name}. Remove `tune`.")


def tuned(
    job: Job,
    loaded: LoadedModel,
    inputs: Inputs,
    encoded: EncodedInputs,
    directory: Path,
    say: Callable[[str], None],
) -> Job:
    """Return the request with a searched learning rate.

    A trial trains a copy of the model as the run would, on a sample of its data and for `MOST_STEPS` steps at most. The
    rate is kept in the run's directory, where a resumed run finds it.

    Args:
        job: The request, with the recipe's learning rate.
        loaded: The model to train, which stays as it is.
        inputs: The data as they were read.
        encoded: The tokenised data.
        directory: Directory of the run.
        say: Show a line to the user.

    Returns:
        The request with another learning rate.
    """
    kept = directory / FILE
    rate = _read(kept)
    if rate is None:
        chosen, trials = search_rate(lambda rate: _trial(job, loaded, inputs, encoded, rate, say), _rate(job))
        rate = chosen.learning_rate
        if not chosen.good:
            say(f"tune: no rate reached the aim ({AIM}); learning_rate={rate:g} came nearest")
        with saying_disk_full(directory):
            write_json(kept, {"learning_rate": rate, "trials": [asdict(trial) for trial in trials]})
    return replace(job, options=replace(job.options, learning_rate=rate))


def _rate(job: Job) -> float:
    assert job.options.learning_rate is not None
    return job.options.learning_rate


def _trial(
    job: Job, loaded: LoadedModel, inputs: Inputs, encoded: EncodedInputs, rate: float, say: Callable[[str], None]
) -> Trial:
    """Train a copy of the model on a sample, and measure what is left."""

    def measure(model: PreTrainedModel) -> dict[str, float]:
        return encoded.evaluated.measure(
            model, loaded.tokenizer, generate=False, batch_size=job.options.batch_size
        ).values

    options = {name: value for name, value in asdict(job.options).items() if name not in OF_THE_RUN}
    steps = planned_steps(job.options, encoded.n_items, PartialState().num_processes)
    model = job.train(
        job.method.name,
        model=copy.deepcopy(loaded.model),
        tokenizer=loaded.tokenizer,
        progress=False,
        forget=_sampled(inputs.forget),
        retain=_sampled(inputs.retain),
        alternates=_sampled(inputs.alternates),
        **asdict(job.method_options),
        **options,
        learning_rate=rate,
        max_steps=min(steps, MOST_STEPS),
    )
    first, now = measure(loaded.model), measure(model)
    left = {name: now[name] / first[name] for name in ("forget_probability", "retain_probability") if name in now}
    trial = Trial(rate, left["forget_probability"], left.get("retain_probability", 1.0))
    say(f"tune: learning_rate={rate:g} leaves " + ", ".join(f"{part:.0%} of {name}" for name, part in left.items()))
    return trial


def _sampled(items: Sequence[T] | None) -> list[T] | None:
    """Return `SAMPLE` evenly spaced items; all of them if there are no more, None for None."""
    return None if items is None else evenly_spaced(items, SAMPLE)


def _read(path: Path) -> float | None:
    """Read the rate that a run had found before it was stopped; None if there is none."""
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["learning_rate"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
