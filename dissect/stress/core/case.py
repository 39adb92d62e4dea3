"""The input of every stress test: a pair of models, their control, and facts with distractors."""

import time
from collections.abc import ItemsView, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from dissect.models.model import Model
from dissect.models.pair import ModelPair, resolve_control
from dissect.prompts.overlap import without_shared
from dissect.prompts.prompts import Prompts, check_fits, check_loaded
from dissect.stress.core.distractors import N_DISTRACTORS, Facts, with_distractors
from unlearning.common.errors import InputError, naming


@dataclass(frozen=True, eq=False)
class Case:
    """Models, facts and settings that every stress test takes.

    Attributes:
        pair: Base and unlearned model.
        control: Model never trained on the forget facts, from the base's pretrained model; None if there is none. Tests
            that need exactly one control take this one.
        forget: The facts that were to be forgotten.
        retain: Facts that were to stay; None if there are none.
        batch_size: Maximum number of texts in one batch; no number depends on it.
        seed: Random seed of everything that is drawn.
        progress: Whether to show progress bars on stderr.
        only: The one role to attack; None for all roles. In most tests the values of a role depend on no other model
            than the base, so base and control need not be attacked again for every unlearned model. The tests that do
            compare several models are marked `compares_models` in the catalogue.
        further_controls: More controls, which differ from the first by their training run; empty without a `control`.
        given: The case with the models as they were given, if these are in canonical form; else None.
        strangers: Other language models, with tokenizers of their own, that never read about the subjects; only without
            a control. What they guess from a question is the floor of deranged relearning.
        shared: Directory in which tests that search keep what they found for base and control; None to keep nothing.
        seconds: Receives the wall seconds that tests spend on each role; None to measure nothing.
    """

    pair: ModelPair
    control: Model | None
    forget: Facts
    retain: Facts | None = None
    batch_size: int = 64
    seed: int = 0
    progress: bool = False
    only: str | None = None
    further_controls: tuple[Model, ...] = ()
    given: "Case | None" = None
    strangers: tuple[Model, ...] = ()
    shared: Path | None = None
    seconds: dict[str, float] | None = None

    @property
    def as_written(self) -> "Case":
        """The case with the models as they were given, for tests that are about weights as they are written."""
        if self.given is None:
            return self
        theirs = self.given
        return replace(
            self, pair=theirs.pair, control=theirs.control, further_controls=theirs.further_controls, given=None
        )

    @property
    def controls(self) -> tuple[Model, ...]:
        """All controls, the first one first."""
        return () if self.control is None else (self.control, *self.further_controls)

    @property
    def models(self) -> Mapping[str, Model]:
        """The models by role: `base`, `unlearned`, `control`, `control 2` and so on; or the `only` one."""
        found = {"base": self.pair.base, "unlearned": self.pair.unlearned}
        found |= {control_role(number): model for number, model in enumerate(self.controls)}
        chosen = found if self.only is None else {self.only: found[self.only]}
        return chosen if self.seconds is None else _Timed(chosen, self.seconds)

    def at_most(self, n: int) -> "Case":
        """Return the case with at most `n` forget facts and at most `n` retain facts, evenly spaced in each set."""
        retain = None if self.retain is None else spread(self.retain, n)
        return replace(self, forget=spread(self.forget, n), retain=retain)


class _Timed(Mapping[str, Model]):
    """Models by role. A loop over `items` adds the time that it spends on each model to the seconds of its role."""

    def __init__(self, models: Mapping[str, Model], seconds: dict[str, float]) -> None:
        self.models = models
        self.seconds = seconds

    def __getitem__(self, role: str) -> Model:
        return self.models[role]

    def __iter__(self) -> Iterator[str]:
        return iter(self.models)

    def __len__(self) -> int:
        return len(self.models)

    def items(self) -> ItemsView[str, Model]:
        return _TimedItems(self)


class _TimedItems(ItemsView[str, Model]):
    """The items of `_Timed`."""

    _mapping: _Timed

    def __iter__(self) -> Iterator[tuple[str, Model]]:
        seconds = self._mapping.seconds
        for role, model in self._mapping.models.items():
            started = time.perf_counter()
            try:
                yield role, model
            finally:
                seconds[role] = seconds.get(role, 0.0) + time.perf_counter() - started


def control_role(number: int) -> str:
    """Return the role of a control by its number from 0: `control`, `control 2`, `control 3` and so on."""
    return f"control {number + 1}" if number else "control"


def spread(facts: Facts, n: int) -> Facts:
    """Return at most `n` of the facts, evenly spaced.

    Args:
        facts: The facts to choose from.
        n: Maximum number of facts.

    Returns:
        The chosen facts in their order; `facts` itself if there are at most `n`.
    """
    if len(facts.prompts) <= n:
        return facts
    return facts.select(np.linspace(0, len(facts.prompts) - 1, n).round().astype(int).tolist())


def make_case(
    pair: ModelPair,
    forget: Prompts,
    *,
    retain: Prompts | None = None,
    control: str | Model | Sequence[str | Model] | None = "auto",
    n_distractors: int = N_DISTRACTORS,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> Case:
    """Check models and prompts, and find distractors for every question.

    Distractors that a file gives are used only with a control. Without one, results are compared with chance, and
    chance is known only for distractors that are the right answers to other questions.

    Args:
        pair: Base and unlearned model, in memory.
        forget: Questions about what was to be forgotten, with their answers.
        retain: Questions about what was to stay; those that are forget prompts as well are left out.
        control: A loaded model, a name or path, a list of several, `auto` (the control of a built-in pair, if any), or
            `none` or None for no control.
        n_distractors: Maximum number of distractors per question.
        batch_size: Maximum number of texts in one batch; no number depends on it.
        seed: Random seed of everything that is drawn.
        progress: Whether to show progress bars on stderr.

    Returns:
        The case.

    Raises:
        InputError: A model is streamed, the control cannot be compared with the base, the prompts have `notebook`
            scoring or do not fit a model, all retain prompts are forget prompts, or the forget or retain prompts leave
            no distractors (`with_distractors`).

    Warns:
        UserWarning: Some retain prompts are forget prompts.
    """
    for name, prompts in (("forget", forget), ("retain", retain)):
        if prompts is not None:
            check_loaded(prompts, name)
    if retain is not None:
        retain = without_shared(forget, retain, "retain")
    controls = _resolved(pair, control)
    find = partial(with_distractors, from_file=bool(controls), n=n_distractors, seed=seed)
    case = Case(
        pair=pair,
        control=controls[0] if controls else None,
        forget=find(forget, name="forget"),
        retain=None if retain is None else find(retain, name="retain"),
        batch_size=batch_size,
        seed=seed,
        progress=progress,
        further_controls=tuple(controls[1:]),
    )
    for model in case.models.values():
        if model.streamed is not None:
            raise InputError(
                f"{model.name} is streamed from disk, but stress tests change models. Load it with stream=False."
            )
        for name, prompts in (("forget", forget), ("retain", retain)):
            if prompts is not None:
                check_fits(model, prompts, name)
    return case


def _resolved(pair: ModelPair, control: str | Model | Sequence[str | Model] | None) -> list[Model]:
    """Return the controls, loaded and checked; an empty list if there is none.

    Raises:
        InputError: One of several controls is none, or two have the same weights.
    """
    given = [control] if control is None or isinstance(control, str | Model) else list(control)
    if len(given) > 1 and ("none" in given or "auto" in given):
        raise InputError(
            "`control` must name models where several are given, got auto or none among them. Leave auto and none out, "
            "or give one of them alone"
        )
    with naming("control"):
        found = [resolve_control(pair, one) for one in given]
    controls = [model for model in found if model is not None]
    names: dict[str, str] = {}
    for model in controls:
        if model.sha256 in names:
            raise InputError(
                f"`control` must be different models, but {names[model.sha256]} and {model.name} have the same "
                "weights. Give controls that were trained in different runs"
            )
        names[model.sha256] = model.name
    return controls
