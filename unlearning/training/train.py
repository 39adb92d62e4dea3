"""One trainer for every method: resolves and checks what was asked for, has the steps run, saves."""

import contextlib
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unlearning.checkpoints.hashing import content_hash
from unlearning.checkpoints.load import load_tokenizer, load_weights
from unlearning.checkpoints.locate import RECORD, locate_checkpoint
from unlearning.common.errors import InputError
from unlearning.methods import get_method
from unlearning.objectives.combination import Bilevel
from unlearning.options import TrainOptions, resolve_options
from unlearning.training.arguments import (
    check_launch,
    resolve_device,
)
from unlearning.training.evaluation_callback import Rule, check_metric, parse_rule
from unlearning.training.inputs import Data, check_needs, read_inputs
from unlearning.training.model_card import model_card
from unlearning.training.output_directory import (
    abandon_run,
    begin_run,
    finish_run,
    last_checkpoint,
    library_versions,
    read_run,
    remove_broken_checkpoints,
    saying_disk_full,
)
from unlearning.training.run import Job, Loaded, run_steps

UNRECORDED = ("device", "save_every", "keep_checkpoints", "reference_budget", "tensorboard")
"""Options that change no number: a run that is resumed may have others."""


@dataclass(frozen=True)
class TrainResult:
    """A trained model and how it came about.

    Attributes:
        model: in eval mode, on the device that it was trained on; with a LoRA adapter, the adapter in it.
        tokenizer: the one that it was trained with.
        history: every `logging_steps` optimizer steps: step, epoch, loss, its terms before their weights
            (forget_loss, retain_loss), what the method logs (BLUR's xi, PDU's multiplier), grad_norm before clipping,
            learning_rate. Losses are means over the steps since the last line.
        evaluations: before the first step, every `eval_every` steps and after the last: step and metrics.
        final: those of the weights that are returned: the last, or the best (`keep_best`).
        options: all options, resolved.
        notes: what there is to say of the data and of the preparation.
        already_done: true if the output directory held this very run already, and nothing was trained.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    history: list[dict[str, float]]
    options: dict[str, Any]
    evaluations: list[dict[str, float]] = field(default_factory=list)
    final: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    already_done: bool = False


def train(
    method: str,
    *,
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    forget: Data | None,
    retain: Data | None,
    alternates: str | Path | Sequence[Sequence[str]] | None,
    output_dir: str | Path | None,
    resume: bool,
    progress: bool,
    options: Mapping[str, Any],
) -> TrainResult:
    """See `unlearning.train`."""
    chosen = get_method(method)
    method_options, train_options = resolve_options(method, chosen.options, dict(options))
    resolved = {**asdict(method_options), **asdict(train_options)}
    job = Job(
        method=chosen,
        method_options=method_options,
        options=train_options,
        needs=chosen.needs(method_options),
        rule=_rule(train_options),
        device=resolve_device(train_options.device),
        output=None if output_dir is None else Path(output_dir),
        progress=progress,
        train=_train_another,
    )
    check_launch(method, combines_gradients=isinstance(chosen.combination(method_options), Bilevel))
    check_needs(chosen, job.needs, forget=forget, retain=retain, alternates=alternates)
    _check_keeping(job)
    name = str(model.name_or_path if isinstance(model, PreTrainedModel) else model)
    if train_options.lora_rank and job.output is not None and not name:
        raise InputError("a saved adapter names its base, and this model in memory has no name; pass its directory")
    tokenizer = _tokenizer(model, tokenizer)
    inputs = read_inputs(
        job.needs,
        train_options,
        tokenizer,
        makes_alternates=chosen.prepare is not None,
        forget=forget,
        retain=retain,
        alternates=alternates,
    )
    configuration: dict[str, Any] = {
        "method": method,
        "options": {name: value for name, value in resolved.items() if name not in UNRECORDED},
        **inputs.hashes(),
    }
    if job.output is not None:
        _check_resume(read_run(job.output, configuration), job.output, resume)  # refuse before the model is loaded
    model = model.float() if isinstance(model, PreTrainedModel) else load_weights(locate_checkpoint(model))
    configuration["start_weights"] = content_hash(model, name=name)
    if job.output is not None:
        record = read_run(job.output, configuration)
        if record is not None and record["finished"]:
            done = load_weights(job.output, device=job.device)
            return TrainResult(done, tokenizer, already_done=True, options=resolved, **_told(record))
    start = Loaded(model, name, configuration["start_weights"], tokenizer)
    state = PartialState(cpu=job.device.type == "cpu")
    state.wait_for_everyone()  # before the main process writes where the others have just looked
    started = time.perf_counter()
    with _directory(job, configuration, state) as directory:
        outcome = run_steps(job, start, inputs, directory, state)
        record = {
            "finished": True,
            "configuration": configuration,
            "model": name,
            "base_weights": configuration["start_weights"],  # which an adapter is merged into
            "device": str(job.device),
            "processes": state.num_processes,
            "versions": library_versions(),
            "seconds": round(time.perf_counter() - started, 1),
            **outcome.record,
        }
        if job.output is not None:
            finish_run(job.output, outcome.write, record, model_card(chosen, record), is_main=state.is_main_process)
            state.wait_for_everyone()
    return TrainResult(outcome.model, tokenizer, options=resolved, **_told(record))


def _train_another(
    method: str,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    retain: Data,
    progress: bool,
    **options: Any,
) -> PreTrainedModel:
    """Train a model that a method needs before its own training starts (see `Start.train`)."""
    return train(
        method,
        model=model,
        tokenizer=tokenizer,
        forget=None,
        retain=retain,
        alternates=None,
        output_dir=None,
        resume=False,
        progress=progress,
        options=options,
    ).model


@contextlib.contextmanager
def _directory(job: Job, configuration: dict[str, Any], state: PartialState) -> Iterator[Path]:
    """Where checkpoints go: the run's own directory, or one that is gone afterwards."""
    if job.output is None or not job.keeps_files:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
        return
    if state.is_main_process:
        if not (job.output / RECORD).exists():
            begin_run(job.output, configuration)
        remove_broken_checkpoints(job.output)
    state.wait_for_everyone()
    try:
        with saying_disk_full(job.output):
            yield job.output
    except BaseException:
        if state.is_main_process:
            abandon_run(job.output)
        raise


def _rule(options: TrainOptions) -> Rule | None:
    return parse_rule(options.stop_when, benchmark=options.benchmark) if options.stop_when else None


def _check_keeping(job: Job) -> None:
    if job.options.keep_best is not None:
        check_metric(job.options.keep_best, "keep_best", benchmark=job.options.benchmark)
    for name in ("stop_when", "keep_best"):
        if getattr(job.options, name) is not None and job.method.finish is not None:
            raise InputError(f"{job.method.name} makes its weights after the last step; leave {name} out")
    for name in ("save_every", "keep_best", "tensorboard"):
        if getattr(job.options, name) and job.output is None:
            raise InputError(f"{name} needs a directory: give --out DIR (output_dir=... in Python)")


def _check_resume(record: dict[str, Any] | None, output: Path, resume: bool) -> None:
    if record is None or record["finished"] or resume:
        return
    checkpoint = last_checkpoint(output)
    where = f"up to {checkpoint.name}" if checkpoint else "without a checkpoint"
    raise InputError(f"{output}: holds an unfinished run, {where}; add --resume to go on, or remove it")


def _told(record: dict[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in ("history", "evaluations", "final", "notes") if name in record}


def _tokenizer(
    model: str | Path | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase:
    """The one that was given, or the one in the model's directory."""
    if tokenizer is not None:
        return tokenizer
    if not isinstance(model, PreTrainedModel):
        return load_tokenizer(locate_checkpoint(model))
    path = Path(str(model.name_or_path))
    if not model.name_or_path or not path.is_dir():
        raise InputError("a loaded model has no directory to take a tokenizer from; pass tokenizer=...")
    return load_tokenizer(path)
