"""Evaluate a model on a benchmark by name: read the data, load the models, score and compute the metrics."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unlearning.checkpoints.locate import locate_offline
from unlearning.common.errors import InputError, naming
from unlearning.common.runs import is_run
from unlearning.common.terminal import tell
from unlearning.data.chat import DEFAULT_CHAT_DATE
from unlearning.evaluation import harness
from unlearning.evaluation.catalogue import settings_of
from unlearning.evaluation.harness import Evaluation, Prepare
from unlearning.evaluation.settings import Settings, given
from unlearning.evaluation.subject import Runtime, Subject
from unlearning.evaluation.trained_wrapping import choose_wrapping

AnyModel = str | Path | PreTrainedModel


def evaluate(
    benchmark: str | Prepare,
    *,
    model: AnyModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    control: AnyModel | None = None,
    control_result: str | Path | None = None,
    output_dir: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    batch_size: int = 16,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: bool = True,
    **options: Any,
) -> Evaluation:
    """Evaluate a model on a benchmark, next to a control if one is given.

    Args:
        benchmark: Name of a benchmark, such as "tofu", "quality" or "mia"; `list_benchmarks` lists them. Or a function
            that takes an `unlearning.evaluation.subject.Subject` and returns your own
            `unlearning.evaluation.harness.Benchmark`.
        model: A directory, an adapter, a hub id, a built-in name, or a loaded model.
        tokenizer: Tokenizer of loaded models; models by name bring their own.
        control: A model never trained on the forget set, given like `model`. Its results are cached under hashes of
            model, data and options. None or "none" for no control.
        control_result: Run directory of the control's evaluation with the same options, instead of `control`.
        output_dir: Run directory; an unfinished run in it resumes. Nothing is written without it.
        device: One of cpu, cuda, cuda:1, or auto for all GPUs; None for a GPU if there is one.
        dtype: One of float32 (the default), float64, bfloat16 and float16.
        batch_size: Number of rows scored at a time; no number depends on it.
        allow_pickle: Read pickled .bin weights.
        trust_remote_code: Run the code of a hub model.
        progress: Show a progress bar on stderr.
        **options: Options of the benchmark; `list_benchmarks` lists them. Without `template` and `chat`, a model in a
            directory of `unlearn train` is asked as it was trained, as one line on stderr says.

    Returns:
        The metrics with 95 % bootstrap intervals (`frame`, `summary()`, `result["metric_name"]`) and the rows behind
        them (`rows`). Returned tables are copies.

    Raises:
        InputError: There is no such benchmark or option, data or a model cannot be read, `output_dir` holds another
            run, or the control's results were computed with other options.

    Warns:
        UserWarning: The model is asked otherwise than it was trained (see
            `unlearning.evaluation.trained_wrapping.choose_wrapping`).

    Examples:
        >>> from dissect.zoo import question_set
        >>> from unlearning import evaluate
        >>> result = evaluate(
        ...     "quality",
        ...     model="demo:npo",
        ...     prompts=question_set("forget"),
        ...     max_new_tokens=4,
        ...     limit=4,
        ...     progress=False,
        ... )
        >>> result.frame.loc["length", "direction"]
        'descriptive, no direction'
        >>> len(result.rows), sorted(result.rows["set"].unique())
        (4, ['texts'])
    """
    named = given(control) if isinstance(control, str) else control
    if named is not None and control_result is not None:
        raise InputError("`control` and `control_result` both give the control's numbers. Give one of them.")
    if control_result is not None and not is_run(Path(control_result)):
        raise InputError(f"`control_result` must be a run directory, got {control_result} (no run.json in it)")
    for role, name in (("model", model), ("control", named)):
        if isinstance(name, str | Path):
            with naming(role):
                locate_offline(name)  # before the benchmark's data are read
    runtime = Runtime(device, dtype, allow_pickle, trust_remote_code, batch_size)
    if isinstance(benchmark, str):
        names = [name for name in (model, named) if isinstance(name, str | Path)]
        prepare = _as_trained(settings_of(benchmark, options), names, show=progress).open(runtime)
    elif options:
        raise InputError(f"a benchmark given as a function takes no options, got {', '.join(options)}")
    else:
        prepare = benchmark
    return harness.evaluate(
        prepare,
        _opened(model, tokenizer, runtime),
        control=control_result if named is None else _opened(named, tokenizer, runtime),
        out=output_dir,
        batch_size=batch_size,
        progress=progress,
    )


def _as_trained(settings: Settings, names: Sequence[str | Path], *, show: bool) -> Settings:
    """Return settings that ask as the models were trained, where the user does not say how to ask."""
    asks: Any = settings
    if not hasattr(settings, "chat_date") or getattr(settings, "texts", None) is not None:
        return settings  # fixed prompts, or texts that the model has written already
    has_eos = hasattr(settings, "append_eos")
    chosen = choose_wrapping(asks.template, asks.chat, names, append_eos=asks.append_eos if has_eos else None)
    if chosen.note is not None and show:
        tell("unlearn", chosen.note)
    found = chosen.wrapping
    date = found.chat_date if asks.chat_date == DEFAULT_CHAT_DATE else asks.chat_date
    closing = {"append_eos": found.append_eos} if has_eos else {}
    return cast("Settings", replace(asks, template=found.template, chat=found.chat, chat_date=date, **closing))


def _opened(model: AnyModel, tokenizer: PreTrainedTokenizerBase | None, runtime: Runtime) -> Subject:
    """Return a model by name, or a loaded one with its tokenizer, ready to be evaluated."""
    if not isinstance(model, PreTrainedModel):
        return runtime.open(model)
    if tokenizer is None:
        raise InputError("`tokenizer` must be given with a model that is loaded already")
    return Subject.wrap(model, tokenizer)
