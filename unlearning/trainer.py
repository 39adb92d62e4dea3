"""One trainer for every method: checks and prepares, runs the steps, saves."""

import contextlib
import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from unlearning.adapters import save_adapter
from unlearning.arguments import (
    check_launch,
    n_windows,
    optimizer_class,
    resolve_device,
    tensorboard_callback,
    training_arguments,
)
from unlearning.checkpoints import content_hash, load_tokenizer, load_weights, locate_checkpoint, without_bars
from unlearning.combining import Bilevel
from unlearning.errors import InputError
from unlearning.forward import unwrapped
from unlearning.inputs import Data, Inputs, check_needs, encode_inputs, read_inputs
from unlearning.methods import get_method
from unlearning.methods.method import AnyMethod, Needs
from unlearning.methods.stages import Start
from unlearning.model_card import model_card
from unlearning.options import TrainOptions, resolve_options, shown
from unlearning.parameters import choose_parameters
from unlearning.progress import ProgressBar
from unlearning.reference import compute_references
from unlearning.run_directory import (
    CHECKPOINTS,
    RECORD,
    abandon_run,
    begin_run,
    finish_run,
    last_checkpoint,
    library_versions,
    read_run,
    remove_broken_checkpoints,
    saying_disk_full,
)
from unlearning.step import Diverged, UnlearningTrainer
from unlearning.training_set import TrainingSet
from unlearning.watching import METRICS, Rule, Watch, Watched, check_metric, parse_rule

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


@dataclass(frozen=True)
class _Job:
    """What was asked for, resolved."""

    method: AnyMethod
    method_options: Any
    options: TrainOptions
    needs: Needs
    rule: Rule | None
    device: torch.device
    output: Path | None
    progress: bool

    @property
    def keeps_files(self) -> bool:
        """Whether the directory is in use before the end: checkpoints, or what the method makes first."""
        wanted = self.options.save_every or self.options.keep_best or self.options.tensorboard or self.method.prepare
        return self.output is not None and bool(wanted)


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
    job = _Job(
        method=chosen,
        method_options=method_options,
        options=train_options,
        needs=chosen.needs(method_options),
        rule=parse_rule(train_options.stop_when) if train_options.stop_when else None,
        device=resolve_device(train_options.device),
        output=None if output_dir is None else Path(output_dir),
        progress=progress,
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
    state = PartialState(cpu=job.device.type == "cpu")
    state.wait_for_everyone()  # before the main process writes where the others have just looked
    started = time.perf_counter()
    with _directory(job, configuration, state) as directory:
        outcome = _train(job, model, name, tokenizer, inputs, configuration["start_weights"], directory, state)
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


@dataclass(frozen=True)
class _Outcome:
    """What the steps left: the model, what writes it, and what the record says."""

    model: PreTrainedModel
    write: Callable[[Path], None]
    record: dict[str, Any]


def _train(
    job: _Job,
    model: PreTrainedModel,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Inputs,
    start_hash: str,
    directory: Path,
    state: PartialState,
) -> _Outcome:
    if job.method.resolve is not None:
        resolved = job.method.resolve(model, job.method_options)
        job = replace(job, method_options=resolved, needs=job.method.needs(resolved))
    options = job.options
    if options.precision == "bfloat16":
        model.bfloat16()
    model.to(job.device)  # type: ignore[arg-type]
    limit = options.max_length or getattr(model.config, "max_position_embeddings", None)
    prepared = None
    if job.method.prepare is not None:
        start = Start(
            model=model,
            tokenizer=tokenizer,
            forget=inputs.forget or [],
            alternates=inputs.alternates,
            max_length=limit,
            training=options,
            batch_size=options.batch_size,
            seed=options.seed,
            output_dir=job.output,
            progress=job.progress and state.is_main_process,
        )
        prepared = _alike(job.method.prepare(start, job.method_options), state)
    encoded = encode_inputs(inputs, prepared, job.needs, options, tokenizer, model, limit)
    start_model = copy.deepcopy(model).cpu() if job.method.finish is not None else None
    window = options.batch_size * options.gradient_accumulation_steps * state.num_processes
    n_items = len(encoded.pairs) or len(encoded.spans["retain"])
    arguments = training_arguments(
        options,
        n_windows=n_windows(n_items, window),
        device=job.device,
        output_dir=str(directory / CHECKPOINTS),
        hidden_losses=any(reference.quantity == "hidden" for reference in job.needs.references),
    )
    bar = ProgressBar(job.method.name, show=job.progress and state.is_main_process)
    values = {**asdict(job.method_options), **asdict(options)}
    bar.say(" ".join(f"{name}={shown(value)}" for name, value in values.items() if value is not None))
    use_cache = model.config.use_cache  # the parent switches it off in the configuration, which is saved
    try:
        references = compute_references(
            model,
            start_hash,
            encoded.spans,
            job.needs.references,
            batch_size=options.batch_size,
            budget=options.reference_budget,
            precision=options.precision,
            autocast=lambda: _autocast(options.precision, job.device),
            main_first=state.main_process_first,
            advance=bar.preparing,
        )
        choose_parameters(model, job.method, job.method_options, options, base=name)
        training_set = TrainingSet(
            forget=encoded.spans["forget"],
            alternate=encoded.spans["alternate"],
            retain=encoded.spans["retain"],
            pairs=encoded.pairs,
            references=references,
        )
        trainer = UnlearningTrainer(
            method=job.method,
            method_options=job.method_options,
            model=model,
            args=arguments,
            training_set=training_set,
            batch_size=options.batch_size,
            window=window,
            keep_checkpoints=options.keep_checkpoints,
            callbacks=[],
            optimizer=optimizer_class(options),
        )
        watch = _watch(job, trainer, tokenizer, encoded.watched, directory)
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
    best = _best(job, watch)
    if best is not None:
        trainer._load_from_checkpoint(str(directory / CHECKPOINTS / "best"))
    if job.method.finish is not None:
        assert start_model is not None
        job.method.finish(model, start_model.to(model.device), job.method_options)  # type: ignore[arg-type]
        trainer.log(watch.measure())  # of the weights that are saved
        _check_finite(model, job, directory)

    def write(target: Path) -> None:
        _save_model(trainer, target)
        if state.is_main_process:
            tokenizer.save_pretrained(target)

    lines = trainer.state.log_history
    evaluations = [dict(line) for line in lines if not METRIC_NAMES.isdisjoint(line)]
    if job.method.finish is not None:  # what was measured last is not what is saved
        evaluations[-1] |= watch.measure()
        watch.note_collapse(evaluations[-1], trainer.state.global_step)
    final = next((line for line in evaluations if best and line["step"] == best["step"]), evaluations[-1])
    return _Outcome(
        model,
        write,
        {
            "history": [dict(line) for line in lines if "loss" in line],
            "evaluations": evaluations,
            "final": final,
            "notes": encoded.notes,
            "resolved": asdict(job.method_options),
            "steps": trainer.state.global_step,
            "examples": {name: len(spans) for name, spans in encoded.spans.items() if spans},
            "evaluated_examples": encoded.watched.counts(),
            "best": best,
            "stop_rule": options.stop_when,
            "stopped_at": watch.stopped_at,
            "collapsed_at": watch.collapsed_at,
        },
    )


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
    job: _Job, trainer: UnlearningTrainer, tokenizer: PreTrainedTokenizerBase, watched: Watched, directory: Path
) -> Watch:
    options = job.options
    wanted = [name for name in (options.keep_best, job.rule.metric if job.rule else None) if name]
    for name in wanted:
        if name not in watched.names():
            raise InputError(f"{name} cannot be measured on these data; there are {', '.join(watched.names())}")
    every = options.eval_every
    if every is None and wanted:
        every = max(1, trainer.planned_steps() // 10)
    generate = any(name.endswith(("rouge", "exact")) for name in wanted) or (
        options.eval_every is not None and watched.generates()
    )

    def measure() -> dict[str, float]:
        assert trainer.model is not None
        return watched.measure(unwrapped(trainer.model), tokenizer, generate=generate, batch_size=options.batch_size)

    def save_best() -> None:
        with saying_disk_full(directory):
            _save_model(trainer, directory / CHECKPOINTS / "best")

    return Watch(
        measure=measure,
        every=every,
        rule=job.rule,
        best=options.keep_best,
        save_best=save_best,
        collapse_below=options.collapse_below,
        log=trainer.log,
    )


def _best(job: _Job, watch: Watch) -> dict[str, Any] | None:
    if job.options.keep_best is None:
        return None
    return {"metric": job.options.keep_best, "step": watch.best_step, "value": watch.best_value}


def _save_model(trainer: UnlearningTrainer, target: Path) -> None:
    """Weights and configuration, from whatever wrapper holds them; collective under FSDP."""
    assert trainer.model is not None
    with without_bars():
        if trainer.args.should_save and hasattr(trainer.model, "peft_config") and not trainer.is_fsdp_enabled:
            save_adapter(unwrapped(trainer.model), target)
        else:
            trainer.save_model(str(target))
    (target / "training_args.bin").unlink(missing_ok=True)  # a pickle that nobody reads


@contextlib.contextmanager
def _directory(job: _Job, configuration: dict[str, Any], state: PartialState) -> Iterator[Path]:
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


@contextlib.contextmanager
def _stopping_at_the_last_checkpoint(job: _Job, directory: Path) -> Iterator[None]:
    try:
        with saying_disk_full(directory):
            yield
    except Diverged as error:
        raise InputError(f"{error}: training diverged, {_kept(job, directory)}; lower learning_rate") from None


def _kept(job: _Job, directory: Path) -> str:
    checkpoint = last_checkpoint(directory) if job.keeps_files else None
    return f"the last good checkpoint is {checkpoint}" if checkpoint else "nothing was saved"


def _check_finite(model: PreTrainedModel, job: _Job, directory: Path) -> None:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise InputError(f"{name} is not finite after the last step, {_kept(job, directory)}; lower learning_rate")


def _check_keeping(job: _Job) -> None:
    if job.options.keep_best is not None:
        check_metric(job.options.keep_best, "keep_best")
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


def _alike(made: Any, state: PartialState) -> Any:
    """What the main process made, on every process: each made its own, which rounding may have turned."""
    every = [made]
    if state.num_processes > 1:
        torch.distributed.broadcast_object_list(every)
    return every[0]


def _autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    dtype = {"bf16_mixed": torch.bfloat16, "fp16_mixed": torch.float16}.get(precision)
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


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
