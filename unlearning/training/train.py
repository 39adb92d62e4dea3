"""`unlearning.train`: resolves and checks the request, runs the training, saves the result."""

import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unlearning.checkpoints.causality import check_causal
from unlearning.checkpoints.hashing import configuration_hash, content_hash
from unlearning.checkpoints.load import load_tokenizer, load_weights, tokenizer_directory
from unlearning.checkpoints.locate import RECORD, check_files, locate_checkpoint, resolved_name
from unlearning.checkpoints.lora import BASE_BITS, BASE_WEIGHTS
from unlearning.checkpoints.quantized import check_plain
from unlearning.checkpoints.storage import dtype_in_memory, stored_dtype
from unlearning.common.errors import InputError, naming
from unlearning.methods import get_method, recipe
from unlearning.methods.method import check_weights
from unlearning.objectives.combination import GradientCombination
from unlearning.options import TrainOptions, resolve_options
from unlearning.training.arguments import check_launch, check_optimizer, resolve_device
from unlearning.training.evaluation_callback import Rule, Target, check_metric, parse_rule
from unlearning.training.inputs import Data, GivenData, Inputs, check_needs, read_inputs
from unlearning.training.job import Job, LoadedModel
from unlearning.training.model_card import model_card
from unlearning.training.named_content import benchmark_content, named_content, tokenizer_hash
from unlearning.training.output_directory import (
    CONTENTS,
    abandon_run,
    begin_run,
    claimed,
    finish_run,
    last_checkpoint,
    library_versions,
    read_run,
    remove_broken_checkpoints,
    saying_disk_full,
    tidy_checkpoints,
)
from unlearning.training.run import run_steps
from unlearning.training.tuning import check_tunable

UNRECORDED = ("device", "save_every", "keep_checkpoints", "reference_budget", "tensorboard")
"""Options that change no number, so that a resumed run may change them."""


@dataclass(frozen=True)
class TrainResult:
    """A trained model, with the history of its training.

    Attributes:
        model: The trained model, in eval mode, on the device that it was trained on. With `lora_rank` the adapter is
            part of the model.
        tokenizer: The tokenizer that it was trained with.
        history: One line every `logging_steps` optimizer steps: step, epoch, loss, the two losses before their weights
            (forget_loss, retain_loss), values that the method logs (BLUR's xi, PDU's multiplier), grad_norm before
            clipping, learning_rate. Losses are means over the steps since the previous line.
        evaluations: Step and metrics before the first step, every `eval_every` steps and after the last step.
        final: Metrics of the returned weights: those after the last step, or the best ones (`keep_best`).
        options: All options, resolved.
        notes: Remarks about the data and about data that the method made.
        stopped_by: What stopped the training before its last planned step; None if nothing did.
        already_done: True if the output directory already held this run, so that nothing was trained.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    history: list[dict[str, float]]
    options: dict[str, Any]
    evaluations: list[dict[str, float]] = field(default_factory=list)
    final: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    stopped_by: str | None = None
    already_done: bool = False


def train(
    method: str,
    *,
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    forget: Data | None = None,
    retain: Data | None = None,
    alternates: str | Path | Sequence[Sequence[str]] | None = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    **options: Any,
) -> TrainResult:
    """Train a model with an unlearning method.

    Args:
        method: Name of a method, such as "npo", "grad_diff" or "finetune"; `list_methods` returns all of them.
        model: A directory, a hub id, a built-in name such as "demo:base", or a loaded model. A loaded model is
            converted to float32 and trained in place.
        tokenizer: Tokenizer of a loaded model; by default the one in the model's directory.
        forget: Examples to forget: `Example` objects, a file of records (question and answer, or prompt and answer),
            a text file, or a named data set such as "tofu:forget05".
        retain: Examples to keep, in the same forms. A method that does not train on them is evaluated on them.
        alternates: Other answers to the forget prompts, for methods that prefer them (dpo, altpo, idk, kto): a text
            file of refusals, one per line, a file of records, or a list of answers for each forget example. By default
            altpo generates them and the other methods draw built-in refusals.
        output_dir: Directory for weights, tokenizer, `unlearning.json` and a model card. By default nothing is saved.
        resume: Continue an unfinished run of the same configuration in `output_dir` after its last checkpoint (option
            `save_every`).
        progress: Show progress bars on stderr.
        trust_remote_code: Run Python code that comes with the model.
        allow_pickle: Read pickled `.bin` weights if there are no safetensors. Unpickling can run code.
        **options: Options of the method and of the trainer, such as `learning_rate` or `max_steps`; `list_methods`
            returns all of them with their defaults. Values may also be strings, as on the command line.

    Returns:
        The trained model, its tokenizer, the history of losses and metrics, and the resolved options.

    Raises:
        InputError: An option or the data are wrong, data that the method needs are missing, a loss is not finite, or
            the output directory holds something else.

    Examples:
        >>> from unlearning import Example, train
        >>> forget = [Example("The capital of Norway is", "Oslo"), Example("The capital of Peru is", "Lima")]
        >>> result = train("ga", model="demo:base", forget=forget, max_steps=2, progress=False)
        >>> [line["step"] for line in result.evaluations]
        [0, 2]
        >>> "forget_loss" in result.history[-1]
        True
    """
    given = GivenData(forget, retain, alternates)
    chosen = get_method(method)
    method_options, train_options = resolve_options(method, chosen.options, options)
    check_weights(chosen, method_options)
    resolved = {**asdict(method_options), **asdict(train_options)}
    job = Job(
        method=chosen,
        method_options=method_options,
        options=train_options,
        needs=chosen.needs(method_options),
        rule=_rule(train_options),
        target=_target(train_options),
        device=resolve_device(train_options.device),
        output_dir=None if output_dir is None else Path(output_dir),
        progress=progress,
        train=_train_another,
    )
    check_optimizer(train_options.optimizer, job.device)
    check_launch(method, combines_gradients=isinstance(chosen.combination(method_options), GradientCombination))
    check_needs(chosen, job.needs, given)
    if train_options.tune:
        check_tunable(chosen)
    if train_options.lora_dropout and job.needs.references:
        raise InputError(
            f"`lora_dropout` has no effect with {method}, which compares the model with its start and trains without "
            "dropout. Remove it."
        )
    _check_keeping(job)
    name = str(model.name_or_path if isinstance(model, PreTrainedModel) else model)
    if train_options.lora_rank and job.output_dir is not None and not name:
        raise InputError(
            "`model` must be a directory or a hub id to save an adapter, which records the name of its base, got a "
            "loaded model without a name"
        )
    if isinstance(model, PreTrainedModel):
        check_plain(model, name=name or "`model`")
    loading: dict[str, Any] = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    files = None if tokenizer is not None else _tokenizer_files(model, allow_pickle=allow_pickle)
    if files is not None:
        tokenizer = load_tokenizer(files, trust_remote_code=trust_remote_code)
    assert tokenizer is not None
    inputs = read_inputs(job.needs, train_options, tokenizer, given, makes_alternates=chosen.prepare is not None)
    configuration: dict[str, Any] = {
        "method": method,
        "options": {name: value for name, value in resolved.items() if name not in UNRECORDED},
        "recipe": asdict(chosen.recipe) if recipe.is_asked(train_options) else None,
        **inputs.hashes(),
        CONTENTS: named_content(train_options, method_options),
    }
    with claimed(job.output_dir):
        if job.output_dir is not None:
            _check_resume(read_run(job.output_dir, configuration), job.output_dir, resume)  # before the model is loaded
        if isinstance(model, PreTrainedModel):
            stored = dtype_in_memory(model)
            start = model.float()
        else:
            path = locate_checkpoint(model)
            start, name = load_weights(path, **loading), resolved_name(name, path)
            stored = stored_dtype(path, allow_pickle=allow_pickle)
        configuration["start_weights"] = content_hash(start, name=name)
        configuration["tokenizer"] = tokenizer_hash(tokenizer, chat=train_options.chat)
        configuration["start_configuration"] = configuration_hash(start)
        configuration[CONTENTS] |= benchmark_content(train_options, start, tokenizer, inputs.chat)
        check_causal(start.eval(), name)
        if job.output_dir is not None:
            record = read_run(job.output_dir, configuration)
            if record is not None and record["finished"]:
                done = load_weights(job.output_dir, device=job.device, **loading)
                return TrainResult(done, tokenizer, already_done=True, **_recorded(record, resolved))
        loaded = LoadedModel(start, name, configuration["start_weights"], tokenizer, files, stored)
        return _trained(job, loaded, inputs, configuration)


def _trained(job: Job, loaded: LoadedModel, inputs: Inputs, configuration: dict[str, Any]) -> TrainResult:
    """Train the loaded model and write the run."""
    state = PartialState(cpu=job.device.type == "cpu")
    state.wait_for_everyone()  # until all have read the directory that the main process writes into
    started = time.perf_counter()
    with _directory(job, configuration, state) as directory:
        outcome = run_steps(job, loaded, inputs, directory, state)
        record = {
            "finished": True,
            "configuration": configuration,
            "model": loaded.name,
            BASE_WEIGHTS: loaded.sha256,  # weights that an adapter is merged into
            **({BASE_BITS: job.options.base_bits} if job.options.base_bits else {}),
            "device": str(job.device),
            "processes": state.num_processes,
            "versions": library_versions(),
            "seconds": round(time.perf_counter() - started, 1),
            **outcome.record,
        }
        if job.output_dir is not None:
            card = model_card(job.method, record)
            finish_run(job.output_dir, outcome.write, record, card, is_main=state.is_main_process)
            state.wait_for_everyone()
    told = _recorded(record, {})
    if job.output_dir is not None and state.is_main_process:
        left = tidy_checkpoints(job.output_dir, job.options.keep_checkpoints)
        told["notes"] = {**told["notes"], **({"checkpoints": [left]} if left else {})}
    return TrainResult(outcome.model, loaded.tokenizer, **told)


def _train_another(method: str, **arguments: Any) -> PreTrainedModel:
    """Train a model that a method needs before its own training (see `PreparationInputs.train`)."""
    return train(method, **arguments).model


@contextlib.contextmanager
def _directory(job: Job, configuration: dict[str, Any], state: PartialState) -> Iterator[Path]:
    """Yield the directory of the checkpoints: that of the run, or a temporary one."""
    if job.output_dir is None or not job.keeps_files:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
        return
    if state.is_main_process:
        if not (job.output_dir / RECORD).exists():
            begin_run(job.output_dir, configuration)
        remove_broken_checkpoints(job.output_dir)
    state.wait_for_everyone()
    try:
        with saying_disk_full(job.output_dir):
            yield job.output_dir
    except BaseException:
        if state.is_main_process:
            abandon_run(job.output_dir)
        raise


def _rule(options: TrainOptions) -> Rule | None:
    return parse_rule(options.stop_when, benchmark=options.benchmark) if options.stop_when else None


def _target(options: TrainOptions) -> Target | None:
    if options.target_forget is None:
        return None
    if options.stop_when is not None:
        raise InputError("`target_forget` and `stop_when` cannot be combined: both stop the training. Remove one.")
    return Target(options.target_forget, options.target_retain)


def _check_keeping(job: Job) -> None:
    if job.options.keep_best is not None:
        check_metric(job.options.keep_best, "keep_best", benchmark=job.options.benchmark)
    for name in ("stop_when", "target_forget", "keep_best"):
        if getattr(job.options, name) is not None and job.method.finish is not None:
            raise InputError(
                f"`{name}` is not supported by {job.method.name}, which edits the weights after the last step. "
                f"Remove `{name}`."
            )
    for name in ("save_every", "keep_best", "tensorboard", "save_dtype"):
        if getattr(job.options, name) and job.output_dir is None:
            raise InputError(f"`{name}` needs a directory. Give `output_dir`.")


def _check_resume(record: dict[str, Any] | None, output_dir: Path, resume: bool) -> None:
    if record is None or record["finished"] or resume:
        return
    checkpoint = last_checkpoint(output_dir)
    where = f"up to {checkpoint.name}" if checkpoint else "without a checkpoint"
    raise InputError(
        f"`output_dir` {output_dir} holds an unfinished run, {where}. Set `resume` to continue it, or remove it."
    )


def _recorded(record: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of the result that a run's record holds; an older record lacks some of the resolved options."""
    kept: dict[str, Any] = {
        name: record[name] for name in ("history", "evaluations", "final", "notes", "stopped_by") if name in record
    }
    return {**kept, "options": {**given, **record.get("resolved", {})}}


def _tokenizer_files(model: str | Path | PreTrainedModel, *, allow_pickle: bool) -> Path:
    """Return the directory of a model's tokenizer; check the model's files first, if it is not loaded yet."""
    if not isinstance(model, PreTrainedModel):
        with naming("model"):
            path = locate_checkpoint(model)
        check_files(path, allow_pickle=allow_pickle)
    else:
        path = Path(str(model.name_or_path))
        if not model.name_or_path or not path.is_dir():
            raise InputError("`tokenizer` must be given with a loaded model that was not loaded from a directory")
    return tokenizer_directory(path)
