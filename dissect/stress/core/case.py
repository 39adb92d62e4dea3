"""What is put to the test: a pair of models, a control that never knew, and facts with wrong answers beside them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from dissect.models.model import Model
from dissect.models.pair import ModelPair, resolve_control
from dissect.prompts.prompts import Prompts, check_fits
from dissect.stress.core.alternatives import N_WRONG, Facts, with_wrong_answers
from unlearning.common.errors import InputError


@dataclass(frozen=True, eq=False)
class Case:
    """Models and facts that every stress test takes.

    Attributes:
        pair: base and unlearned.
        never: a model that never knew the forget facts, from the base's trunk; None where there is none.
        forget: the facts that were to be forgotten.
        retain: facts that were to stay; None where there are none.
        batch_size: most texts in one batch; no number depends on it.
        seed: of everything that is drawn.
        progress: show progress bars on stderr.
        only: the one role that is attacked; None for all. What a test gives of a role depends on no other model than
            the base (but for `uds` and the causal sweeps), so that base and never need not be attacked again for every
            unlearned model of theirs.
    """

    pair: ModelPair
    never: Model | None
    forget: Facts
    retain: Facts | None = None
    batch_size: int = 64
    seed: int = 0
    progress: bool = False
    only: str | None = None

    @property
    def models(self) -> Mapping[str, Model]:
        """The models by their role: `base`, `unlearned` and, where there is one, `never`; or the `only` one."""
        found = {"base": self.pair.base, "unlearned": self.pair.unlearned}
        if self.never is not None:
            found["never"] = self.never
        return found if self.only is None else {self.only: found[self.only]}

    def at_most(self, n: int) -> "Case":
        """The same with so many forget facts at most, and as many retain facts, spread evenly over each set."""
        retain = None if self.retain is None else spread(self.retain, n)
        return replace(self, forget=spread(self.forget, n), retain=retain)


def spread(facts: Facts, n: int) -> Facts:
    """So many of the facts at most, evenly spaced."""
    if len(facts.prompts) <= n:
        return facts
    return facts.select(np.linspace(0, len(facts.prompts) - 1, n).round().astype(int).tolist())


def make_case(
    pair: ModelPair,
    forget: Prompts,
    *,
    retain: Prompts | None = None,
    never: str | Model | None = "auto",
    n_wrong: int = N_WRONG,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> Case:
    """Check models and prompts, and find wrong answers to every question.

    Wrong answers that a file gives are used where there is a never model: without one the comparison is with chance,
    which holds only of other questions' answers.

    Args:
        pair: base and unlearned, in memory.
        forget: questions about what was to be forgotten, with their answers.
        retain: questions about what was to stay.
        never: a model that never knew: a name or a loaded model, None for none, or `auto`, which knows the built-in
            pairs' own.
        n_wrong: wrong answers to each question, at most.
        batch_size: see `Case`.
        seed: see `Case`.
        progress: see `Case`.

    Raises:
        InputError: a streamed model, a never model that cannot be compared, prompts with `notebook` scoring, prompts
            that do not fit a model, or forget prompts that all have the same answer.
    """
    control = resolve_control(pair, never)
    find = partial(with_wrong_answers, written=control is not None, n=n_wrong, seed=seed)
    case = Case(
        pair=pair,
        never=control,
        forget=find(forget, name="forget"),
        retain=None if retain is None else find(retain, name="retain"),
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )
    for model in case.models.values():
        if model.streamed is not None:
            raise InputError(f"{model.name} is streamed from disk, and stress tests change models; load it whole")
        for name, prompts in (("forget", forget), ("retain", retain)):
            if prompts is not None:
                check_fits(model, prompts, name)
    return case
