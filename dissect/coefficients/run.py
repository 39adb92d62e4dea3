"""The MLP coefficients of a pair: how far they moved, which ones, and how few of them hold the knowledge back.

2410.06606 (v2) says that the coefficients of the MLPs in the final layers are what unlearning changes. Three questions
are asked of a pair, each on forget and on retain prompts, and of the control beside it:

    where       how far the coefficients of every layer moved, and what share of it sits in the last layers
    which       the neurons that moved most, what they write in the vocabulary, and how much of the base's behaviour
                comes back when k of them are put back (k = 1, 2, 4, ...), against random and norm-matched others
    what for    the last layers' coefficients moved towards the base's by degrees: recovery on forget prompts against
                damage on retain prompts
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
)
from dissect.coefficients.result import ProbeResult, load_probe
from dissect.models.model import Model
from dissect.models.pair import ModelPair, resolve_control
from dissect.prompts.loading import load_prompts
from dissect.prompts.overlap import without_shared
from dissect.prompts.prompts import Prompts, check_fits
from unlearning.common.errors import InputError
from unlearning.common.progress import Progress
from unlearning.common.renamed import renamed_arguments
from unlearning.common.runs import Run, computing, open_run, peak_memory_bytes

TOKENS_SHOWN = 10
"""So many tokens of each neuron's value vector are shown, promoted and demoted."""


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
    """Measure how far the MLP coefficients moved, and what comes back when they are put back.

    Args:
        pair: base and unlearned.
        forget: prompts about what was to be forgotten.
        retain: prompts about what is to stay; those that are forget prompts are left out. None takes the built-in
            retain questions where the base is built in, else there are none, and nothing is said of damage.
        concepts: value vectors that are compared; see `read_concepts`.
        control: a model never trained on the knowledge, from the same pretrained model as the base: a name or a
            loaded model, None for none,
            or `auto`, which knows the built-in pairs' control.
        last_layers: so many of the last layers are scaled.
        top: so many neurons are listed, at most.
        draws: how often random and norm-matched neurons are drawn.
        seed: of the bootstrap draws and of the neurons drawn.
        batch_size: most prompts in one batch; no number depends on it.
        out: run directory to write to while computing; a killed run goes on from there.
        progress: show a progress bar on stderr.

    Raises:
        InputError: retain prompts that are all forget prompts, more layers or neurons than the model has, a
            concept outside it, a mixture of experts, streamed models, a prompt longer than the context, a control
            that cannot be compared, a run directory of another configuration, logits that are not finite.

    Warns:
        UserWarning: some retain prompts are forget prompts.
    """
    _check_numbers(last_layers=last_layers, top=top, draws=draws, seed=seed, batch_size=batch_size)
    check_coefficients(pair.base, pair.unlearned)
    _check_shape(pair.base, last_layers, top)
    for concept in concepts:
        check_place(pair.base, concept)
    if retain is None and pair.base.name in zoo.BUILTIN:
        retain = load_prompts(zoo.question_set("retain"), pair.tokenizer)
    asked = {"forget": forget}
    if retain is not None:
        asked["retain"] = without_shared(forget, retain, "retain")
    control_model = resolve_control(pair, control)
    targets = {"unlearned": pair.unlearned} | ({} if control_model is None else {"control": control_model})
    for model in (pair.base, *targets.values()):
        check_coefficients(model)
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
    """The most changed neurons of the unlearned model, less those that did not change at all.

    Columns: `rank`, `layer`, `neuron`, `score` (see `dissect.coefficients.neurons`), `change` (mean absolute change of
    the coefficient) and `change_rank` by it alone, `mean_base`, `mean_unlearned` and, with a control, `mean_control`
    coefficients, `value_norm`, and the tokens that the base's value vector `promotes` and `demotes` most.
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
    """Every intervention of a probe: on which models and prompts, which neurons and which layers."""

    base: Model
    targets: Mapping[str, Model]
    asked: Mapping[str, Prompts]
    sets: Sequence[NeuronSet]
    layers: range
    batch_size: int

    @property
    def runs(self) -> int:
        """How many interventions on an example there are."""
        n = {name: len(prompts) for name, prompts in self.asked.items()}
        return len(self.targets) * (n["forget"] * len(self.sets) + sum(n.values()) * len(FACTORS))

    def parts(self) -> Iterator[tuple[str, int, Callable[[Advance], Iterator[Row]]]]:
        """Name, number of interventions on an example, and rows of every part that is kept when it is finished."""
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
    """The rows of every part; finished ones are kept in the run."""
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
        least = 0 if name == "seed" else 1
        if value < least:
            raise InputError(f"--{name.replace('_', '-')} {value}: {least} or more")


def _check_shape(base: Model, last_layers: int, top: int) -> None:
    if last_layers > base.n_layers:
        raise InputError(f"--last-layers {last_layers}: {base.name} has {base.n_layers} layers; use as many at most")
    neurons = base.n_layers * len(value_vectors(base, 0))
    if top > neurons:
        raise InputError(f"--top {top}: {base.name} has {neurons} neurons; use as many at most")
