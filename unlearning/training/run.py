"""The steps of a run, from a loaded model to a trained one: prepares, computes constants, trains, watches."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from unlearning.common.errors import InputError
from unlearning.methods.method import AnyMethod, Needs
from unlearning.methods.stages import Start
from unlearning.objectives.forward import unwrapped
from unlearning.options import TrainOptions, shown
from unlearning.training.arguments import (
    n_windows,
    optimizer_class,
    tensorboard_callback,
    training_arguments,
)
from unlearning.training.evaluation_callback import METRICS, Measured, Rule, Watch, Watched
from unlearning.training.inputs import EncodedInputs, Inputs, encode_inputs
from unlearning.training.output_directory import (
    CHECKPOINTS,
    last_checkpoint,
    saying_disk_full,
)
from unlearning.training.parameters import choose_parameters
from unlearning.training.progress_callback import ProgressBar
from unlearning.training.references import compute_references
from unlearning.training.trainer import Diverged, UnlearningTrainer
from unlearning.training.training_set import TrainingSet


@dataclass(frozen=True)
class Job:
    """What was asked for, resolved."""

    method: AnyMethod
    method_options: Any
    options: TrainOptions
    needs: Needs
    rule: Rule | None
    device: torch.device
    output: Path | None
    progress: bool
    train: Callable[..., PreTrainedModel]

    @property
    def keeps_files(self) -> bool:
        """Whether the directory is in use before the end: checkpoints, or what the method makes first."""
        wanted = self.options.save_every or self.options.keep_best or self.options.tensorboard or self.method.prepare
        return self.output is not None and bool(wanted)


@dataclass(frozen=True)
class Outcome:
    """What the steps left: the model, what writes it, and what the record says."""

    model: PreTrainedModel
    write: Callable[[Path], None]
    record: dict[str, Any]


@dataclass(frozen=True)
class Loaded:
    """The start model: its name, content hash and tokenizer."""

    model: PreTrainedModel
    name: str
    sha256: str
    tokenizer: PreTrainedTokenizerBase


def run_steps(job: Job, start: Loaded, inputs: Inputs, directory: Path, state: PartialState) -> Outcome:
    """Train the start model, in place.

    Args:
        job: what was asked for.
        start: the start model, in float32.
        inputs: the data as they were read.
        directory: gets the checkpoints.
        state: this process among how many.

    Raises:
        InputError: the data do not fit the model, training diverged, or the disk is full.
    """
    model, options = start.model, job.options
    if job.method.resolve is not None:
        resolved = job.method.resolve(model, job.method_options)
        job = replace(job, method_options=resolved, needs=job.method.needs(resolved))
    if options.precision == "bfloat16":
        model.bfloat16()
    model.to(job.device)  # type: ignore[arg-type]
    encoded = _encoded(job, start, inputs, state)
    start_model = copy.deepcopy(model).cpu() if job.method.finish is not None else None
    bar = ProgressBar(job.method.name, show=job.progress and state.is_main_process)
    values = {**asdict(job.method_options), **asdict(options)}
    bar.say(" ".join(f"{name}={shown(value)}" for name, value in values.items() if value is not None))
    use_cache = model.config.use_cache  # the parent switches it off in the configuration, which is saved
    try:
        trainer = _trainer(job, start, encoded, directory, state, bar)
        watch = _watch(job, trainer, start.tokenizer, encoded.watched, directory)
        checkpoint = last_checkpoint(directory)
        for callback in (watch, _Resuming(trainer, watch, checkpoint), bar):
            trainer.add_callback(callback)
        if options.tensorboard and state.is_main_process:
            trainer.add_callback(tensorboard_callback(directory / "logs"))
        with _stopping_at_the_last_checkpoint(job, directory):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        bar.close()
        model.config.use_cache = use_cache
        model.zero_grad(set_to_none=True)
        model.eval()
    _check_finite(model, job, directory)
    if options.keep_best is not None:
        trainer._load_from_checkpoint(str(directory / CHECKPOINTS / "best"))
    if job.method.finish is not None:
        assert start_model is not None
        job.method.finish(model, start_model.to(model.device), job.method_options)  # type: ignore[arg-type]
        _check_finite(model, job, directory)

    def write(target: Path) -> None:
        trainer.save_model(str(target))
        if state.is_main_process:
            start.tokenizer.save_pretrained(target)

    return Outcome(model, write, _record(job, encoded, trainer, watch))


def _encoded(job: Job, start: Loaded, inputs: Inputs, state: PartialState) -> EncodedInputs:
    """The tokenised data, after the method has made what it trains on."""
    options = job.options
    limit = options.max_length or getattr(start.model.config, "max_position_embeddings", None)
    prepared = None
    if job.method.prepare is not None:
        stage = Start(
            model=start.model,
            tokenizer=start.tokenizer,
            forget=inputs.forget or [],
            alternates=inputs.alternates,
            max_length=limit,
            training=options,
            batch_size=options.batch_size,
            seed=options.seed,
            output_dir=job.output,
            progress=job.progress and state.is_main_process,
            train=job.train,
        )
        prepared = _alike(job.method.prepare(stage, job.method_options), state)
    return encode_inputs(inputs, prepared, job.needs, options, start.tokenizer, start.model, limit)


def _trainer(
    job: Job, start: Loaded, encoded: EncodedInputs, directory: Path, state: PartialState, bar: ProgressBar
) -> UnlearningTrainer:
    """The trainer over the data with their constants, and with the parameters chosen that train."""
    options = job.options
    window = options.batch_size * options.gradient_accumulation_steps * state.num_processes
    arguments = training_arguments(
        options,
        n_windows=n_windows(len(encoded.pairs) or len(encoded.spans["retain"]), window),
        device=job.device,
        output_dir=str(directory / CHECKPOINTS),
        hidden_losses=any(reference.quantity == "hidden" for reference in job.needs.references),
    )
    references = compute_references(
        start.model,
        start.sha256,
        encoded.spans,
        job.needs.references,
        batch_size=options.batch_size,
        budget=options.reference_budget,
        precision=options.precision,
        autocast=lambda: _autocast(options.precision, job.device),
        main_first=state.main_process_first,
        advance=bar.preparing,
    )
    choose_parameters(start.model, job.method, job.method_options, options, base=start.name)
    return UnlearningTrainer(
        method=job.method,
        method_options=job.method_options,
        model=start.model,
        args=arguments,
        training_set=TrainingSet(
            forget=encoded.spans["forget"],
            alternate=encoded.spans["alternate"],
            retain=encoded.spans["retain"],
            pairs=encoded.pairs,
            references=references,
        ),
        batch_size=options.batch_size,
        window=window,
        keep_checkpoints=options.keep_checkpoints,
        callbacks=[],
        optimizer=optimizer_class(options),
    )


def _record(job: Job, encoded: EncodedInputs, trainer: UnlearningTrainer, watch: Watch) -> dict[str, Any]:
    """What `unlearning.json` says of the steps."""
    lines = trainer.state.log_history
    evaluations = [dict(line) for line in lines if not METRIC_NAMES.isdisjoint(line)]
    if job.method.finish is not None:  # what was measured last is not what is saved
        evaluations[-1] |= watch.measure().values
        watch.note_collapse(evaluations[-1], trainer.state.global_step)
    best = _best(job, watch)
    final = next((line for line in evaluations if best and line["step"] == best["step"]), evaluations[-1])
    return {
        "history": [dict(line) for line in lines if "loss" in line],
        "evaluations": evaluations,
        "final": final,
        "notes": encoded.notes,
        "resolved": asdict(job.method_options),
        "steps": trainer.state.global_step,
        "examples": {name: len(spans) for name, spans in encoded.spans.items() if spans},
        "evaluated_examples": encoded.watched.counts(),
        "best": best,
        "stop_rule": job.options.stop_when,
        "stopped_at": watch.stopped_at,
        "collapsed_at": watch.collapsed_at,
    }


METRIC_NAMES = frozenset(METRICS)


class _Resuming(TrainerCallback):
    """Gives the step and the watch what a checkpoint kept of them, once the parent has set up its own."""

    def __init__(self, trainer: UnlearningTrainer, watch: Watch, checkpoint: Path | None) -> None:
        self.trainer = trainer
        self.watch = watch
        self.checkpoint = checkpoint

    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Restore."""
        if self.checkpoint is not None:
            self.trainer.restore_step(self.checkpoint)
            self.watch.restore(self.checkpoint)
            control.should_training_stop = self.watch.stopped_at is not None


def _watch(
    job: Job, trainer: UnlearningTrainer, tokenizer: PreTrainedTokenizerBase, watched: Watched, directory: Path
) -> Watch:
    options = job.options
    wanted = [name for name in (options.keep_best, job.rule.metric if job.rule else None) if name]
    for name in wanted:
        of_benchmark = watched.benchmark is not None and watched.benchmark.has(name)
        if name not in watched.names() and not of_benchmark:
            raise InputError(f"{name} cannot be measured on these data; there are {', '.join(watched.names())}")
    every = options.eval_every
    if every is None and (wanted or options.benchmark):
        every = max(1, trainer.planned_steps() // 10)
    generate = any(name.endswith(("rouge", "exact")) for name in wanted) or (
        options.eval_every is not None and watched.generates()
    )

    def measure() -> Measured:
        assert trainer.model is not None
        return watched.measure(unwrapped(trainer.model), tokenizer, generate=generate, batch_size=options.batch_size)

    def save_best() -> None:
        with saying_disk_full(directory):
            trainer.save_model(str(directory / CHECKPOINTS / "best"))

    return Watch(
        measure=measure,
        every=every,
        rule=job.rule,
        best=options.keep_best,
        save_best=save_best,
        collapse_below=options.collapse_below,
        log=trainer.log,
    )


def _best(job: Job, watch: Watch) -> dict[str, Any] | None:
    if job.options.keep_best is None:
        return None
    return {"metric": job.options.keep_best, "step": watch.best_step, "value": watch.best_value}


@contextlib.contextmanager
def _stopping_at_the_last_checkpoint(job: Job, directory: Path) -> Iterator[None]:
    try:
        with saying_disk_full(directory):
            yield
    except Diverged as error:
        raise InputError(f"{error}: training diverged, {_kept(job, directory)}; lower learning_rate") from None


def _kept(job: Job, directory: Path) -> str:
    checkpoint = last_checkpoint(directory) if job.keeps_files else None
    return f"the last good checkpoint is {checkpoint}" if checkpoint else "nothing was saved"


def _check_finite(model: PreTrainedModel, job: Job, directory: Path) -> None:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise InputError(f"{name} is not finite after the last step, {_kept(job, directory)}; lower learning_rate")


def _alike(made: Any, state: PartialState) -> Any:
    """What the main process made, on every process: each made its own, which rounding may have turned."""
    every = [made]
    if state.num_processes > 1:
        torch.distributed.broadcast_object_list(every)
    return every[0]


def _autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    dtype = {"bf16_mixed": torch.bfloat16, "fp16_mixed": torch.float16}.get(precision)
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)
