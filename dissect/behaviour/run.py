"""Compare the behaviour of base and unlearned model: on forget prompts, retain prompts and texts to continue.

Generations of the unlearned model are compared with the base's (BLEU, ROUGE-L) and with the answer (exact match). With
teacher forcing, the probability and the perplexity of the answer and KL(base || unlearned) are computed per answer
token. The change of the MLP coefficients by layer shows whether the mechanism is specific to the forget prompts.

The control is compared with the base in the same way. On forget prompts, its distance is that of a model without the
knowledge; on retain prompts, that of training without the forget set.

Source: 2410.06606 and 2406.11614 compare generations on questions about the concept, on unrelated questions and on
texts to continue; the intervals, the control and the difference between the sets are added here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from dissect.behaviour.prompts import COMPLETION, FORGET, RETAIN, Questions
from dissect.behaviour.result import NO_COEFFICIENTS, BehaviourResult, load_behave
from dissect.behaviour.rows import Models, example_rows
from dissect.coefficients.changes import coefficient_changes
from dissect.models.alignment import check_basis
from dissect.models.model import Model
from dissect.models.pair import ModelPair, resolve_control
from dissect.prompts.overlap import without_shared
from dissect.prompts.prompts import Prompts, check_fits, check_in_memory, check_loaded
from unlearning.common.errors import InputError, check_at_least
from unlearning.common.progress import Progress
from unlearning.common.renamed import renamed_arguments
from unlearning.common.runs import Run, computing, open_run, peak_memory_bytes


@renamed_arguments(unrelated="retain")
def behave(
    pair: ModelPair,
    forget: Prompts,
    retain: Prompts | Mapping[str, Prompts],
    *,
    completions: Prompts | None = None,
    true_answers: Sequence[str] | None = None,
    control: str | Model | None = "auto",
    max_new_tokens: int = 100,
    batch_size: int = 16,
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
) -> BehaviourResult:
    """Compare what the unlearned model and the base say and know, on forget prompts and on retain prompts.

    Args:
        pair: Base and unlearned model, in memory.
        forget: Forget prompts.
        retain: Retain prompts, or several sets by name, which are reported separately; prompts that are forget prompts
            too are dropped.
        completions: Texts to continue; the answers are their continuations.
        true_answers: Names of the sets whose answers are true, so that exact match is computed; None for all sets but
            the completions. Leave out sets whose answers were written by a model.
        control: Control model, never trained on the forget facts, from the base's pretrained model: a name, a loaded
            model, `none` or None for no control, or `auto` for the control of a built-in pair, if there is one.
        max_new_tokens: Length of a generation, in tokens.
        batch_size: Largest number of prompts per batch; does not change any score.
        seed: Random seed of the bootstrap.
        out: Run directory, written during the computation; a run that was stopped is resumed. None writes nothing.
        progress: Show a progress bar on stderr.

    Returns:
        The result; see `BehaviourResult`.

    Raises:
        InputError: All retain prompts are forget prompts; a prompt is longer than the context; prompts have notebook
            scoring; a model is streamed, or written in another basis than the base; the control cannot be compared;
            `out` holds another run; or logits are not finite.

    Warns:
        UserWarning: Some retain prompts are forget prompts.

    Examples:
        >>> from dissect import behave, load_pair, load_prompts
        >>> from dissect.zoo import question_set
        >>> pair = load_pair("demo:base", "demo:npo")
        >>> forget = load_prompts(question_set("forget"), pair.tokenizer, limit=4)
        >>> retain = load_prompts(question_set("retain"), pair.tokenizer, limit=4)
        >>> result = behave(pair, forget, retain, max_new_tokens=8, progress=False)
        >>> result.targets, result.sets
        (['unlearned', 'control'], ['forget', 'retain'])
        >>> len(result.frame)  # 2 targets, 8 prompts
        16
    """
    check_at_least("seed", seed, 0)
    check_at_least("batch_size", batch_size, 1)
    check_at_least("max_new_tokens", max_new_tokens, 1)
    asked = _questions(forget, retain, completions, true_answers)
    for model in (pair.base, pair.unlearned):
        _check(model, asked)
    targets = {"unlearned": pair.unlearned}
    control_model = resolve_control(pair, control)
    if control_model is not None:
        _check(control_model, asked)
        targets["control"] = control_model
    if pair.base.anatomy.down_proj is not None:  # coefficients are compared place by place
        for model in targets.values():
            check_basis(pair.base, model)
    models = Models(pair.base, targets)
    configuration = _configuration(models, asked, max_new_tokens, seed)
    provenance = {
        "command": "behave",
        "base": pair.base.name,
        "unlearned": pair.unlearned.name,
        "control": control_model.name if control_model else None,
        "data": {name: prompts.source for name, prompts in asked.by_name.items()},
    }
    run = None if out is None else open_run(out, configuration, provenance)
    if run is not None and run.is_complete:
        return load_behave(run.path)
    with computing(run) as clock:
        frame = _ask(models, asked, max_new_tokens, batch_size, run, progress)
        coefficients = _coefficients(models, asked, batch_size)
    result = BehaviourResult(
        frame=frame,
        coefficients=coefficients,
        configuration=configuration,
        provenance=provenance,
        wall_time_s=clock.seconds,
        measured={"peak_memory_bytes": peak_memory_bytes()},
    )
    if run is not None:
        result.write(run)
    return result


def _questions(
    forget: Prompts,
    retain: Prompts | Mapping[str, Prompts],
    completions: Prompts | None,
    true_answers: Sequence[str] | None,
) -> Questions:
    """Collect the sets, without the retain prompts that are forget prompts.

    Returns:
        The sets, with the names of those that have true answers.

    Raises:
        InputError: A retain set has the name of another set, or `true_answers` names an unknown set.
    """
    named = dict(retain) if isinstance(retain, Mapping) else {RETAIN: retain}
    for name, prompts in (("forget", forget), *(("retain", prompts) for prompts in named.values())):
        check_loaded(prompts, name)
    if not named or named.keys() & {FORGET, COMPLETION}:
        raise InputError(f"`retain` must hold sets of other names than {FORGET} and {COMPLETION}, got {list(named)}")
    kept = {name: without_shared(forget, prompts, name) for name, prompts in named.items()}
    asked = Questions(forget, kept, completions, ())
    names = [name for name in asked.by_name if name != COMPLETION]
    wanted = names if true_answers is None else true_answers
    for name in wanted:
        if name not in asked.by_name:
            raise InputError(f"`true_answers` must name sets among {', '.join(asked.by_name)}, got {name!r}")
    return replace(asked, true_answers=tuple(name for name in asked.by_name if name in wanted))


def _configuration(models: Models, asked: Questions, max_new_tokens: int, seed: int) -> dict[str, Any]:
    """Return everything that the numbers depend on."""
    hashes = {name: model.sha256 for name, model in models.targets.items()}
    return {
        "command": "behave",
        "base_sha256": models.base.sha256,
        "unlearned_sha256": hashes["unlearned"],
        "control_sha256": hashes.get("control"),
        **{f"{name}_sha256": prompts.sha256 for name, prompts in asked.by_name.items()},
        "sets": list(asked.by_name),
        "retain_sets": list(asked.retain),
        "examples": [len(prompts) for prompts in asked.by_name.values()],
        "true_answers": list(asked.true_answers),
        "max_new_tokens": max_new_tokens,
        "dtype": models.base.dtype,
        "device": models.base.device.type,
        "seed": seed,
    }


def _check(model: Model, asked: Questions) -> None:
    """Check, before anything is computed, that a model can process all prompts."""
    check_in_memory(model, "generating text")
    for name, prompts in asked.by_name.items():
        if prompts.scoring != "answer":
            raise InputError(f"`scoring` of the {name} prompts must be 'answer', got {prompts.scoring!r}")
        check_fits(model, prompts, name)


def _ask(
    models: Models, asked: Questions, max_new_tokens: int, batch_size: int, run: Run | None, progress: bool
) -> pd.DataFrame:
    """Compute the rows of all sets, in order, except batches that the run directory holds already."""
    frames = [frame for _, frame in run.parts()] if run is not None else []
    done = {key for frame in frames for key in zip(frame["set"], frame["example_index"], strict=True)}
    sets = asked.by_name
    pending = {
        name: [index for index in range(len(prompts)) if (name, index) not in done] for name, prompts in sets.items()
    }
    with Progress(sum(map(len, pending.values())), "asking", show=progress) as bar:
        for name, prompts in sets.items():
            # Batches of prompts of similar length need little padding.
            order = sorted(pending[name], key=lambda index: len(prompts.items[index].input_ids))
            for first in range(0, len(order), batch_size):
                indices = order[first : first + batch_size]
                rows = example_rows(
                    models,
                    prompts,
                    indices,
                    set_name=name,
                    true_answers=name in asked.true_answers,
                    max_new_tokens=max_new_tokens,
                )
                frames.append(pd.DataFrame(rows))
                if run is not None:
                    run.keep_part(f"{list(sets).index(name)}-{min(indices):06d}", frames[-1])
                bar.advance(len(indices))
    return _in_order(pd.concat(frames, ignore_index=True), list(models.targets), list(sets))


def _coefficients(models: Models, asked: Questions, batch_size: int) -> pd.DataFrame:
    """Measure the change of the MLP coefficients per target, set, example and layer."""
    if models.base.anatomy.down_proj is None:  # a mixture of experts
        return NO_COEFFICIENTS
    frames = []
    for target, model in models.targets.items():
        for name, prompts in asked.by_name.items():
            changes = coefficient_changes(models.base, model, prompts, batch_size=batch_size)
            changes.insert(0, "target", target)
            changes.insert(1, "set", name)
            frames.append(changes)
    return pd.concat(frames, ignore_index=True)


def _in_order(frame: pd.DataFrame, targets: list[str], sets: list[str]) -> pd.DataFrame:
    """Sort the table by target, set and example."""
    keys = pd.DataFrame(
        {
            "target": frame["target"].map(targets.index),
            "set": frame["set"].map(sets.index),
            "example": frame["example_index"],
        }
    )
    return frame.loc[keys.sort_values(["target", "set", "example"]).index].reset_index(drop=True)
