"""The stages of a run, from a loaded model to a trained one: preparation, reference quantities, training steps."""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from unlearning.checkpoints.quantized_base import quantize_base
from unlearning.checkpoints.save import write_tokenizer
from unlearning.checkpoints.storage import fits, round_to, store_as
from unlearning.common.context import context_of
from unlearning.common.errors import InputError
from unlearning.data.encoding import put_before
from unlearning.methods.recipe import with_recipe
from unlearning.methods.stages import PreparationInputs, PreparedData, RunFacts, Settled
from unlearning.objectives.forward import unwrapped
from unlearning.options import shown
from unlearning.training.arguments import (
    planned_steps,
    state_line,
    step_batch_size,
    tensorboard_callback,
    training_arguments,
)
from unlearning.training.evaluation_callback import METRICS, EvaluationCallback, EvaluationData, Measured
from unlearning.training.inputs import EncodedInputs, Inputs, encode_inputs
from unlearning.training.job import Job, LoadedModel
from unlearning.training.named_models import load_beside
from unlearning.training.output_directory import (
    BEST,
    CHECKPOINTS,
    last_checkpoint,
    saying_disk_full,
)
from unlearning.training.parameters import choose_parameters
from unlearning.training.progress_callback import ProgressBar
from unlearning.training.references import References, ReferenceSettings, compute_references
from unlearning.training.trainer import Diverged, UnlearningTrainer
from unlearning.training.training_set import TrainingSet
from unlearning.training.tuning import tuned


@dataclass(frozen=True)
class Outcome:
    """The result of the training steps.

    Attributes:
        model: The trained model.
        write: Write the model and its tokenizer into a directory.
        record: Entries of the run's record (`unlearning.json`).
    """

    model: PreTrainedModel
    write: Callable[[Path], None]
    record: dict[str, Any]


def run_steps(job: Job, loaded: LoadedModel, inputs: Inputs, directory: Path, state: PartialState) -> Outcome:
    """Train a model in place.

    Args:
        job: The resolved request.
        loaded: The model to train.
        inputs: The data as they were read.
        directory: Directory of the checkpoints.
        state: Rank of this process and number of processes.

    Returns:
        The trained model, a function that writes it, and the record of the steps.

    Raises:
        InputError: The data do not fit the model, training diverged, or the disk is full.
    """
    model, options = loaded.model, job.options
    if job.method.resolve is not None:
        resolved = job.method.resolve(model, job.method_options)
        job = replace(job, method_options=resolved, needs=job.method.needs(resolved))
    if not options.base_bits or options.tune or job.method.prepare is not None:
        # A base in 8 or 4 bit is placed map by map below, in float32 until then, unless stages before compute with it.
        _place(model, job.device, narrow=options.precision == "bfloat16" and not options.base_bits)
    limit = options.max_length or context_of(model)
    prepared = _prepared(job, loaded, inputs, limit, state)
    encoded = encode_inputs(inputs, prepared, job.needs, options, loaded.tokenizer, model, limit)
    job = replace(
        job,
        options=with_recipe(
            options,
            job.method.recipe,
            n_parameters=model.num_parameters(),
            n_examples=encoded.n_items,
            n_processes=state.num_processes,
        ),
    )
    reference = copy.deepcopy(model).cpu() if job.method.finish is not None else None
    bar = ProgressBar(job.method.name, show=job.progress and state.is_main_process)
    if options.tune:
        job = tuned(job, loaded, inputs, encoded, directory, bar.say)
    n_steps = planned_steps(job.options, encoded.n_items, state.num_processes)
    if options.base_bits:
        computes = {"bf16_mixed": torch.bfloat16, "fp16_mixed": torch.float16, "bfloat16": torch.bfloat16}
        compute = computes.get(options.precision, torch.float32)
        bar.say(quantize_base(model, options.base_bits, device=job.device, compute=compute))
        _place(model, job.device, narrow=options.precision == "bfloat16")
    settled = _settled(job, model, encoded, n_steps, state)
    job = replace(job, method_options=settled.options, needs=job.method.needs(settled.options))
    encoded = replace(encoded, notes={**encoded.notes, **settled.notes})
    values = {**asdict(job.method_options), **asdict(job.options)}
    bar.say(" ".join(f"{name}={shown(value)}" for name, value in values.items() if value is not None))
    for line in (*(prepared.said if prepared else ()), *settled.said):
        bar.say(line)
    # The parent switches it off, and the configuration is saved with the model; the first GPT has no such field.
    use_cache = getattr(model.config, "use_cache", None)
    try:
        trainer = _trainer(job, loaded, encoded, inputs.sources, directory, state, bar)
        bar.say(state_line(model, options))
        evaluation = _evaluation(job, trainer, loaded.tokenizer, encoded.evaluated, n_steps, directory)
        checkpoint = last_checkpoint(directory)
        for callback in (evaluation, _Resuming(trainer, evaluation, checkpoint), bar):
            trainer.add_callback(callback)
        if options.tensorboard and state.is_main_process:
            trainer.add_callback(tensorboard_callback(directory / "logs"))
        with _stopping_at_the_last_checkpoint(job, directory):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        bar.close()
        if use_cache is not None:
            model.config.use_cache = use_cache
        elif hasattr(model.config, "use_cache"):
            del model.config.use_cache
        model.zero_grad(set_to_none=True)
        model.eval()
    _check_finite(model, job, directory)
    if options.keep_best is not None:
        trainer._load_from_checkpoint(str(directory / CHECKPOINTS / BEST))
    if job.method.finish is not None:
        assert reference is not None
        job.method.finish(model, reference.to(model.device), job.method_options)  # type: ignore[arg-type]
        _check_finite(model, job, directory)
    saved = _saved_dtype(job, loaded)
    rounded = saved is not None and round_to(model, saved)

    def write(target: Path) -> None:
        trainer.save_model(str(target))
        if state.is_main_process:
            write_tokenizer(loaded.tokenizer, target, loaded.tokenizer_files)
            if saved is not None:
                store_as(target, saved)

    record = _record(job, encoded, trainer, evaluation, rounded=rounded)
    return Outcome(model, write, {**record, "saved_dtype": saved})


def _place(model: PreTrainedModel, device: torch.device, *, narrow: bool) -> None:
    """Move a model to a device in place, in bfloat16 if it is to be narrow."""
    if narrow:
        model.bfloat16()
    model.to(device)  # type: ignore[arg-type]


def _saved_dtype(job: Job, loaded: LoadedModel) -> str | None:
    """Return the data type in which the trained model is saved; None if nothing is."""
    if job.output_dir is None:
        return None
    dtype = loaded.saved_dtype(job.options)
    if not fits(loaded.model, dtype):
        warnings.warn(
            f"a trained weight is beyond what {dtype} can hold, so the model is saved in float32. Set "
            "`save_dtype` bfloat16 for a smaller file.",
            stacklevel=2,
        )
        return "float32"
    return dtype


def _prepared(
    job: Job, loaded: LoadedModel, inputs: Inputs, limit: int | None, state: PartialState
) -> PreparedData | None:
    """Return the data that the method makes; None for a method without a `prepare` stage."""
    if job.method.prepare is None:
        return None
    options = job.options
    stage = PreparationInputs(
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        forget=inputs.forget or [],
        alternates=inputs.alternates,
        max_length=limit,
        training=options,
        batch_size=options.batch_size,
        seed=options.seed,
        output_dir=job.output_dir,
        progress=job.progress and state.is_main_process,
        train=job.train,
    )
    return _broadcast(job.method.prepare(stage, job.method_options), state)


def _settled(job: Job, model: PreTrainedModel, encoded: EncodedInputs, n_steps: int, state: PartialState) -> Settled:
    """Return the method's options, with those that depend on the data and on the length of the run filled in."""
    if job.method.settle is None:
        return Settled(job.method_options)
    facts = RunFacts(forget=encoded.spans["forget"], steps=n_steps, batch_size=job.options.batch_size)
    return _broadcast(job.method.settle(model, facts, job.method_options), state)


def _trainer(
    job: Job,
    loaded: LoadedModel,
    encoded: EncodedInputs,
    sources: Mapping[str, str],
    directory: Path,
    state: PartialState,
    bar: ProgressBar,
) -> UnlearningTrainer:
    """Return the trainer, with reference quantities computed and the parameters that train chosen."""
    options = job.options
    training_set = TrainingSet(
        forget=encoded.spans["forget"],
        alternate=encoded.spans["alternate"],
        retain=encoded.spans["retain"],
        pairs=encoded.pairs,
        references=References({}),
    )
    n_steps = planned_steps(options, len(training_set), state.num_processes)
    arguments = training_arguments(
        options,
        n_steps=n_steps,
        device=job.device,
        output_dir=str(directory / CHECKPOINTS),
        hidden_losses=any(reference.quantity == "hidden" for reference in job.needs.references),
    )
    settings = ReferenceSettings(
        batch_size=options.batch_size,
        budget=options.reference_budget,
        precision=options.precision,
        main_first=state.main_process_first,
        advance=bar.show_references,
        load=lambda name: load_beside(name, loaded),
        put_before=lambda text, span: put_before(loaded.tokenizer, text, span),
        described={
            name: {"model": loaded.name, "data": sources.get(name, "")} for name in ("forget", "alternate", "retain")
        },
    )
    size = step_batch_size(options, state.num_processes)
    read = training_set.read(seed=options.seed, step_batch_size=size, n_steps=n_steps)
    # A quantized base has reference quantities of its own.
    start = f"{loaded.sha256} {options.base_bits} bit" if options.base_bits else loaded.sha256
    references = compute_references(loaded.model, start, encoded.spans, read, job.needs.references, settings)
    choose_parameters(loaded.model, job.method, job.method_options, options, base=loaded.name)
    return UnlearningTrainer(
        method=job.method,
        method_options=job.method_options,
        options=options,
        model=loaded.model,
        args=arguments,
        training_set=replace(training_set, references=references),
    )


def _record(
    job: Job, encoded: EncodedInputs, trainer: UnlearningTrainer, evaluation: EvaluationCallback, *, rounded: bool
) -> dict[str, Any]:
    """Return the entries of `unlearning.json` that describe the steps; `rounded` weights are measured again."""
    lines = trainer.state.log_history
    # Sorted, because a checkpoint sorts them: a resumed run writes the same file as one that was never stopped.
    evaluations = [dict(sorted(line.items())) for line in lines if not METRIC_NAMES.isdisjoint(line)]
    if job.method.finish is not None:  # the last evaluation was before `finish` changed the weights
        evaluations[-1] |= evaluation.measure().values
        evaluation.note_collapse(evaluations[-1], trainer.state.global_step)
    best = _best(job, evaluation)
    final = next((line for line in evaluations if best and line["step"] == best["step"]), evaluations[-1])
    if rounded and job.method.finish is None:
        final = final | dict(sorted(evaluation.measure().values.items()))
    return {
        "history": [dict(sorted(line.items())) for line in lines if "loss" in line],
        "evaluations": evaluations,
        "final": final,
        "notes": encoded.notes,
        "resolved": {**asdict(job.method_options), **asdict(job.options)},
        "steps": trainer.state.global_step,
        "examples": {name: len(spans) for name, spans in encoded.spans.items() if spans},
        "evaluated_examples": encoded.evaluated.counts(),
        "best": best,
        "stopped_at": evaluation.stopped_at,
        "stopped_by": evaluation.stopped_by,
        "collapsed_at": evaluation.collapsed_at,
    }


METRIC_NAMES = frozenset(METRICS)


class _Resuming(TrainerCallback):
    """Restores the state of the step and of the evaluation from a checkpoint, after the parent has restored its own."""

    def __init__(self, trainer: UnlearningTrainer, evaluation: EvaluationCallback, checkpoint: Path | None) -> None:
        """Keep the arguments; `checkpoint` is None for a run that starts at the first step."""
        self.trainer = trainer
        self.evaluation = evaluation
        self.checkpoint = checkpoint

    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Restore the state, and stop at once if the run had been stopped by its rule."""
        if self.checkpoint is not None:
            self.trainer.restore_step(self.checkpoint)
            self.evaluation.restore(self.checkpoint)
            control.should_training_stop = self.evaluation.stopped_at is not None


def _evaluation(
    job: Job,
    trainer: UnlearningTrainer,
    tokenizer: PreTrainedTokenizerBase,
    data: EvaluationData,
    n_steps: int,
    directory: Path,
) -> EvaluationCallback:
    """Return the callback that evaluates during training, after checking that the wanted metrics can be measured."""
    options = job.options
    asked = {
        "keep_best": options.keep_best,
        "stop_when": job.rule.metric if job.rule else None,
        "target_forget": "forget_probability" if job.target else None,
    }
    wanted = {option: name for option, name in asked.items() if name}
    for option, name in wanted.items():
        of_benchmark = data.benchmark is not None and data.benchmark.has(name)
        if name not in data.names() and not of_benchmark:
            raise InputError(
                f"`{option}` must name a metric that can be measured on these data, got {name}. "
                f"Choose one of {', '.join(data.names())}."
            )
    every = options.eval_every
    if every is None and (wanted or options.benchmark):
        every = max(1, n_steps // (20 if job.target else 10))
    generate = any(name.endswith(("rouge", "exact")) for name in wanted.values()) or (
        options.eval_every is not None and data.has_prompts()
    )

    def measure() -> Measured:
        assert trainer.model is not None
        return data.measure(unwrapped(trainer.model), tokenizer, generate=generate, batch_size=options.batch_size)

    def save_best() -> None:
        with saying_disk_full(directory):
            trainer.save_model(str(directory / CHECKPOINTS / BEST))

    return EvaluationCallback(
        measure=measure,
        every=every,
        rule=job.rule,
        target=job.target,
        best=options.keep_best,
        save_best=save_best,
        collapse_below=options.collapse_below,
        log=trainer.log,
    )


def _best(job: Job, evaluation: EvaluationCallback) -> dict[str, Any] | None:
    if job.options.keep_best is None:
        return None
    return {"metric": job.options.keep_best, "step": evaluation.best_step, "value": evaluation.best_value}


@contextlib.contextmanager
def _stopping_at_the_last_checkpoint(job: Job, directory: Path) -> Iterator[None]:
    try:
        with saying_disk_full(directory):
            yield
    except Diverged as error:
        raise InputError(f"training diverged: {error}; {_kept(job, directory)}. Set a lower `learning_rate`.") from None


def _kept(job: Job, directory: Path) -> str:
    checkpoint = last_checkpoint(directory) if job.keeps_files else None
    return f"the last good checkpoint is {checkpoint}" if checkpoint else "nothing was saved"


def _check_finite(model: PreTrainedModel, job: Job, directory: Path) -> None:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise InputError(
                f"training diverged: {name} is not finite after the last step; {_kept(job, directory)}. "
                "Set a lower `learning_rate`."
            )


def _broadcast(made: Any, state: PartialState) -> Any:
    """Broadcast the main process's result: every rank computed its own, and rounding may have made them differ."""
    results = [made]
    if state.num_processes > 1:
        torch.distributed.broadcast_object_list(results)
    return results[0]
