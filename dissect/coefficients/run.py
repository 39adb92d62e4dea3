"""Probe the MLP coefficients of a pair: how far they moved, which of them moved, and how many must be restored.

According to 2410.06606 (v2), unlearning changes the MLP coefficients of the final layers. `probe` measures, for the
unlearned model and for the control:

    layers     how far the coefficients of every layer moved, and the share of this change in the last layers
    neurons    the neurons that changed most, the tokens that their value vectors promote, and the recovery when k of
               them are restored (k = 1, 2, 4, ...), compared with random and with norm-matched neurons
    scaling    the coefficients of the last layers scaled towards the base's: recovery on forget prompts and damage on
               retain prompts
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from dissect import zoo
from dissect.coefficients.changes import coefficient_changes
from dissect.coefficients.concept_vectors import Concept, check_place, concept_vectors
from dissect.coefficients.edits import FACTORS, Advance, Row, restore_neurons, scale_layers
from dissect.coefficients.hooks import check_coefficients
from dissect.coefficients.neurons import (
    NeuronChanges,
    NeuronSet,
    neuron_changes,
    neuron_sets,
    top_tokens,
    value_vectors,
    vocabulary_scores,
)
from dissect.coefficients.result import ProbeResult, load_probe
from dissect.models.alignment import check_basis
from dissect.models.model import Model
from dissect.models.pair import ModelPair, resolve_control
from dissect.prompts.loading import load_prompts
from dissect.prompts.overlap import without_shared
from dissect.prompts.prompts import Prompts, check_fits, check_loaded
from unlearning.common.errors import InputError, check_at_least
from unlearning.common.progress import Progress
from unlearning.common.renamed import renamed_arguments
from unlearning.common.runs import Run, computing, open_run, peak_memory_bytes

TOKENS_SHOWN = 10
"""Number of promoted and of demoted tokens per neuron in the table of neurons."""


@renamed_arguments(unrelated="retain")
def probe(
    pair: ModelPair,
    forget: Prompts,
    *,
    retain: Prompts | None = None,
    concepts: Sequence[Concept] = (),
    control: str | Model | None = "auto",
    last_layers: int = 3,
    top: int = 20,
    draws: int = 3,
    seed: int = 0,
    batch_size: int = 16,
    out: str | Path | None = None,
    progress: bool = True,
) -> ProbeResult:
    """Measure how far the MLP coefficients moved, and the recovery when they are restored.

    Args:
        pair: Base and unlearned model, in memory.
        forget: Forget prompts.
        retain: Retain prompts; prompts that are forget prompts too are dropped. None takes the retain questions of a
            built-in base; for other models, damage is then not measured.
        concepts: Concept vectors to compare; see `dissect.coefficients.concept_vectors.read_concepts`.
        control: Control model, never trained on the forget facts, from the base's pretrained model: a name, a loaded
            model, `none` or None for no control, or `auto` for the control of a built-in pair, if there is one.
        last_layers: Number of last layers whose coefficients are scaled.
        top: Number of most changed neurons to list.
        draws: Number of random and of norm-matched draws of neurons.
        seed: Random seed of the bootstrap and of the draws.
        batch_size: Largest number of prompts per batch; does not change any number.
        out: Run directory, written during the computation; a run that was stopped is resumed. None writes nothing.
        progress: Show a progress bar on stderr.

    Returns:
        The result; see `ProbeResult`.

    Raises:
        InputError: All retain prompts are forget prompts; the model has too few layers or neurons; a concept's vector
            is not in the model; a model is a mixture of experts or streamed; a prompt is longer than the context; the
            control cannot be compared; `out` holds another run; or logits are not finite.

    Warns:
        UserWarning: Some retain prompts are forget prompts.

    Source: 2410.06606 (v2); the controls, the ranking of neurons and the intervals are added here.

    Examples:
        >>> from dissect import load_pair, load_prompts, probe
        >>> from dissect.zoo import question_set
        >>> pair = load_pair("demo:base", "demo:npo")
        >>> forget = load_prompts(question_set("forget"), pair.tokenizer, limit=4)
        >>> retain = load_prompts(question_set("retain"), pair.tokenizer, limit=4)
        >>> result = probe(pair, forget, retain=retain, draws=1, progress=False)
        >>> result.targets, result.sets
        (['unlearned', 'control'], ['forget', 'retain'])
        >>> sorted(set(result.curve()["selection"]))
        ['matched', 'random', 'top']
    """
    _check_numbers(last_layers=last_layers, top=top, draws=draws, seed=seed, batch_size=batch_size)
    check_coefficients(pair.base, pair.unlearned)
    _check_shape(pair.base, last_layers, top)
    vocabulary_scores(pair.base, value_vectors(pair.base, 0)[:1])  # refuses a head of another width before computing
    for concept in concepts:
        check_place(pair.base, concept)
    if retain is None and pair.base.name in zoo.BUILTIN:
        retain = load_prompts(zoo.question_set("retain"), pair.tokenizer)
    check_loaded(forget, "forget")
    asked = {"forget": forget}
    if retain is not None:
        check_loaded(retain, "retain")
        asked["retain"] = without_shared(forget, retain, "retain")
    control_model = resolve_control(pair, control)
    targets = {"unlearned": pair.unlearned} | ({} if control_model is None else {"control": control_model})
    for model in (pair.base, *targets.values()):
        check_coefficients(model)
        check_basis(pair.base, model)
        for name, prompts in asked.items():
            check_fits(model, prompts, name)
    configuration = {
        "command": "probe",
        "base_sha256": pair.base.sha256,
        "unlearned_sha256": pair.unlearned.sha256,
        "control_sha256": control_model.sha256 if control_model else None,
        **{f"{name}_sha256": prompts.sha256 for name, prompts in asked.items()},
        "sets": list(asked),
        "examples": [len(prompts) for prompts in asked.values()],
        "scoring": forget.scoring,
        "concepts": [[concept.name, concept.layer, concept.neuron] for concept in concepts],
        "last_layers": last_layers,
        "n_layers": pair.n_layers,
        "top": top,
        "draws": draws,
        "dtype": pair.base.dtype,
        "device": pair.base.device.type,
        "seed": seed,
    }
    provenance = {
        "command": "probe",
        "base": pair.base.name,
        "unlearned": pair.unlearned.name,
        "control": control_model.name if control_model else None,
        "data": {name: prompts.source for name, prompts in asked.items()},
    }
    run = None if out is None else open_run(out, configuration, provenance)
    if run is not None and run.is_complete:
        return load_probe(run.path)
    with computing(run) as clock:
        layers = _layer_changes(pair.base, targets, asked, batch_size)
        changes = {
            name: neuron_changes(pair.base, model, forget, batch_size=batch_size) for name, model in targets.items()
        }
        sets = neuron_sets(changes["unlearned"], draws=draws, seed=seed)
        work = Work(pair.base, targets, asked, sets, range(pair.n_layers - last_layers, pair.n_layers), batch_size)
        result = ProbeResult(
            frame=_intervene(work, run, progress),
            layers=layers,
            neurons=neuron_table(pair.base, changes, top),
            concepts=concept_vectors(pair.base, pair.unlearned, concepts),
            configuration=configuration,
            provenance=provenance,
            wall_time_s=clock.seconds,
            measured={"peak_memory_bytes": peak_memory_bytes()},
        )
    if run is not None:
        result.write(run)
    return result


def neuron_table(base: Model, changes: Mapping[str, NeuronChanges], top: int) -> pd.DataFrame:
    """Tabulate the neurons of the unlearned model that changed most; neurons that did not change are left out.

    Args:
        base: Base model.
        changes: Changes of all neurons by target, with `unlearned`.
        top: Largest number of rows.

    Returns:
        One row per neuron with the columns `rank`, `layer`, `neuron`, `score` (see `dissect.coefficients.neurons`),
        `change` (mean absolute change of the coefficient), `change_rank` (rank by `change` alone), the mean
        coefficients `mean_base`, `mean_unlearned` and, with a control, `mean_control`, `value_norm`, and the tokens
        that the base's value vector `promotes` and `demotes` most.
    """
    ours = changes["unlearned"]
    width = ours.change.shape[1]
    by_change = (-ours.change.flatten()).argsort(stable=True).argsort()
    rows = []
    for rank, flat in enumerate(ours.ranking()[:top].tolist(), start=1):
        layer, neuron = divmod(flat, width)
        if ours.score[layer, neuron] == 0:
            break
        promotes, demotes = top_tokens(base, layer, neuron, count=TOKENS_SHOWN)
        rows.append(
            {
                "rank": rank,
                "layer": layer,
                "neuron": neuron,
                "score": ours.score[layer, neuron].item(),
                "change": ours.change[layer, neuron].item(),
                "change_rank": int(by_change[flat]) + 1,
                "mean_base": ours.base[layer, neuron].item(),
                **{f"mean_{name}": of.other[layer, neuron].item() for name, of in changes.items()},
                "value_norm": ours.value_norm[layer, neuron].item(),
                "promotes": promotes,
                "demotes": demotes,
            }
        )
    return pd.DataFrame(rows)


@dataclass(frozen=True, eq=False)
class Work:
    """All interventions of a probe.

    Attributes:
        base: Base model.
        targets: Models by name (`unlearned`, `control`).
        asked: Prompts by name (`forget`, `retain`).
        sets: Sets of neurons to restore.
        layers: Layers whose coefficients are scaled.
        batch_size: Largest number of prompts per batch.
    """

    base: Model
    targets: Mapping[str, Model]
    asked: Mapping[str, Prompts]
    sets: Sequence[NeuronSet]
    layers: range
    batch_size: int

    @property
    def runs(self) -> int:
        """Number of interventions on single examples."""
        n = {name: len(prompts) for name, prompts in self.asked.items()}
        return len(self.targets) * (n["forget"] * len(self.sets) + sum(n.values()) * len(FACTORS))

    def parts(self) -> Iterator[tuple[str, int, Callable[[Advance], Iterator[Row]]]]:
        """Yield the parts of the work; each finished part is written to the run directory.

        Yields:
            Name of the part, number of interventions on single examples, and a function that computes its rows.
        """
        for name, prompts in self.asked.items():
            for number, batch in enumerate(prompts.batches(self.batch_size)):
                n = len(batch.examples) * len(self.targets)
                part = f"{name}-{self.batch_size}-{number:05d}"
                if name == "forget":

                    def neurons(advance: Advance, prompts: Prompts = prompts, batch: Any = batch) -> Iterator[Row]:
                        return restore_neurons(self.base, self.targets, prompts, batch, self.sets, advance)

                    yield f"neurons-{part}", n * len(self.sets), neurons

                def scaling(advance: Advance, prompts: Prompts = prompts, batch: Any = batch) -> Iterator[Row]:
                    return scale_layers(self.base, self.targets, prompts, batch, self.layers, FACTORS, advance)

                yield f"scaling-{part}", n * len(FACTORS), scaling


def _layer_changes(
    base: Model, targets: Mapping[str, Model], asked: Mapping[str, Prompts], batch_size: int
) -> pd.DataFrame:
    frames = []
    for name, model in targets.items():
        for prompts_name, prompts in asked.items():
            frame = coefficient_changes(base, model, prompts, batch_size=batch_size)
            frame.insert(0, "prompts", prompts_name)
            frame.insert(0, "target", name)
            frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def _intervene(work: Work, run: Run | None, progress: bool) -> pd.DataFrame:
    """Compute the rows of every part, except parts that the run directory holds already."""
    kept = dict(run.parts()) if run is not None else {}
    frames = []
    with Progress(work.runs, "probing", show=progress) as bar:
        for name, runs, rows in work.parts():
            if name in kept:
                bar.advance(runs)
                frames.append(kept[name])
                continue
            frame = pd.DataFrame(list(rows(bar.advance)))
            frame.insert(1, "prompts", name.split("-")[1])
            if run is not None:
                run.keep_part(name, frame)
            frames.append(frame)
    keys = ["prompts", "intervention", "target", "selection", "k", "draw", "factor", "example_index"]
    return pd.concat(frames, ignore_index=True).sort_values(keys, ignore_index=True)


def _check_numbers(**numbers: int) -> None:
    for name, value in numbers.items():
        check_at_least(name, value, 0 if name == "seed" else 1)


def _check_shape(base: Model, last_layers: int, top: int) -> None:
    if last_layers > base.n_layers:
        raise InputError(f"`last_layers` must be at most {base.n_layers}, the layers of {base.name}, got {last_layers}")
    neurons = base.n_layers * len(value_vectors(base, 0))
    if top > neurons:
        raise InputError(f"`top` must be at most {neurons}, the neurons of {base.name}, got {top}")
