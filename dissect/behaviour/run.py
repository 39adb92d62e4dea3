"""What unlearning did to everything else: what both models say and know, on forget and on retain prompts.

Greedy generations of the unlearned model against the base's (BLEU, ROUGE-L), both models' against the answer (exact
match), and the answer's probability, perplexity and KL(base || unlearned) per answer token, teacher-forced; and how
far the MLP coefficients moved, layer by layer: does the mechanism touch what it should not?

The control goes through the same: how far it is from the base on forget prompts is what
knowing nothing looks like, and on retain prompts what training without the forget set alone does.

Source: 2410.06606 and 2406.11614 compare generations on questions about the concept, on unrelated questions and on
texts to go on with; intervals, the control and the difference between the sets are added here.
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
from dissect.models.model import Model
from dissect.models.pair import ModelPair, resolve_control
from dissect.prompts.overlap import without_shared
from dissect.prompts.prompts import Prompts, check_fits, check_in_memory
from unlearning.common.errors import InputError
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
    """Compare what the unlearned model says and knows with the base, on forget and on retain prompts.

    Args:
        pair: base and unlearned.
        forget: prompts about what was to be forgotten.
        retain: prompts about what is to stay; several sets by name are reported beside each other. A prompt that
            is also a forget prompt is left out.
        completions: texts to go on with; their answers are how they go on.
        true_answers: names of the sets whose answers are true ones, so that exact match means something; by
            default all but the completions. Leave out sets whose answers a model wrote.
        control: a model never trained on the knowledge, from the same pretrained model as the base: a name or a
            loaded model, None for none,
            or `auto`, which knows the built-in pairs' control.
        max_new_tokens: most tokens of a generation.
        batch_size: most prompts in one batch; no score depends on it.
        seed: of the bootstrap draws.
        out: run directory to write to while computing; a killed run goes on from there.
        progress: show a progress bar on stderr.

    Raises:
        InputError: retain prompts that are all forget prompts, a prompt longer than the context, notebook
            scoring, streamed models, a control that cannot be compared, a run directory of another configuration,
            logits that are not finite.

    Warns:
        UserWarning: some retain prompts are forget prompts.
    """
    for option, value, least in (
        ("--seed", seed, 0),
        ("--batch-size", batch_size, 1),
        ("--max-new-tokens", max_new_tokens, 1),
    ):
        if value < least:
            raise InputError(f"{option} {value}: {least} or more")
    asked = _questions(forget, retain, completions, true_answers)
    for model in (pair.base, pair.unlearned):
        _check(model, asked)
    targets = {"unlearned": pair.unlearned}
    control_model = resolve_control(pair, control)
    if control_model is not None:
        _check(control_model, asked)
        targets["control"] = control_model
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
    """The sets, with retain sets free of forget prompts.

    Raises:
        InputError: a set's name that means another set, or one of `true_answers` that is none.
    """
    named = {RETAIN: retain} if isinstance(retain, Prompts) else dict(retain)
    if not named or named.keys() & {FORGET, COMPLETION}:
        raise InputError(f"`retain` must hold sets of other names than {FORGET} and {COMPLETION}, got {list(named)}")
    kept = {name: without_shared(forget, prompts, name) for name, prompts in named.items()}
    asked = Questions(forget, kept, completions, ())
    names = [name for name in asked.by_name if name != COMPLETION]
    wanted = names if true_answers is None else true_answers
    for name in wanted:
        if name not in asked.by_name:
            raise InputError(f"true_answers: there is no set {name!r}; there are {', '.join(asked.by_name)}")
    return replace(asked, true_answers=tuple(name for name in asked.by_name if name in wanted))


def _configuration(models: Models, asked: Questions, max_new_tokens: int, seed: int) -> dict[str, Any]:
    """Everything that the numbers depend on."""
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
    """Check all that a model may be unable to do before anything is computed."""
    check_in_memory(model, "generating text")
    for name, prompts in asked.by_name.items():
        if prompts.scoring != "answer":
            raise InputError(f"the {name} prompts have {prompts.scoring} scoring; load them with scoring='answer'")
        check_fits(model, prompts, name)


def _ask(
    models: Models, asked: Questions, max_new_tokens: int, batch_size: int, run: Run | None, progress: bool
) -> pd.DataFrame:
    """The rows of all sets, in order; batches that are finished are kept in the run."""
    frames = [frame for _, frame in run.parts()] if run is not None else []
    done = {key for frame in frames for key in zip(frame["set"], frame["example_index"], strict=True)}
    sets = asked.by_name
    pending = {
        name: [index for index in range(len(prompts)) if (name, index) not in done] for name, prompts in sets.items()
    }
    with Progress(sum(map(len, pending.values())), "asking", show=progress) as bar:
        for name, prompts in sets.items():
            # Prompts of one length together: little padding.
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
    """How far the MLP coefficients are from the base's, per target, set, example and layer."""
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
    """The table by target, set and example, however the work was cut."""
    keys = pd.DataFrame(
        {
            "target": frame["target"].map(targets.index),
            "set": frame["set"].map(sets.index),
            "example": frame["example_index"],
        }
    )
    return frame.loc[keys.sort_values(["target", "set", "example"]).index].reset_index(drop=True)
