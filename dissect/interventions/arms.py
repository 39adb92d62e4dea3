"""Set up the arms of a layer sweep: the main comparison, and the controls that it is compared with."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from dissect.interventions import donors
from dissect.interventions.donors import Donor
from dissect.models.model import Model
from dissect.models.null_models import check_null, null_model
from dissect.models.pair import ModelPair, check_comparable, load_like
from dissect.prompts.prompts import Prompts
from unlearning.common.errors import InputError, check_at_least

Direction = Literal["base-to-unlearned", "unlearned-to-base"]
DIRECTIONS: tuple[Direction, ...] = ("base-to-unlearned", "unlearned-to-base")


@dataclass(frozen=True)
class Arm:
    """One target under one donor, as named in the results table.

    Attributes:
        name: `main`, `control`, `null-0`, `other-question`, `noise` or `donor` (another model as the donor).
        target: Model that is intervened on: `unlearned`, `control`, `null` or `base`.
        donor: Source of the activations and weights: a model's role, or the kind of donor.
    """

    name: str
    target: str
    donor: str


@dataclass(frozen=True, eq=False)
class ArmModels:
    """Models of the arms of one group.

    Attributes:
        base: Model that scores compare with.
        donor: Source of activations and weights.
        targets: Models that are intervened on, one for each arm.
    """

    base: Model
    donor: Donor
    targets: tuple[Model, ...]

    @property
    def models(self) -> list[Model]:
        """All models in the order of an engine: base, the donor's model if it is another one, targets."""
        other_donor = () if self.donor.model is self.base else (self.donor.model,)
        return [self.base, *other_donor, *self.targets]


@dataclass(frozen=True, eq=False)
class ArmGroup:
    """Arms evaluated in the same forward passes.

    Attributes:
        arms: Arms of the group.
        load_models: Returns the arms' models. Null models are made at each call, so that only one is in memory.
        n_sources: Number of models or inputs that activations are read from: 2 if the donor needs its own forward
            pass, else 1.
    """

    arms: tuple[Arm, ...]
    load_models: Callable[[], ArmModels]
    n_sources: int = 1


def make_arm_groups(
    pair: ModelPair,
    prompts: Prompts,
    *,
    control: Model | None,
    direction: Direction,
    donor: Sequence[str | Model],
    null: int,
    seed: int,
) -> list[ArmGroup]:
    """Set up all arms of a sweep; arms with the same donor form one group.

    Args:
        pair: Base and unlearned model.
        prompts: Prompts of the sweep.
        control: Control model, or None.
        direction: `base-to-unlearned` replaces activations of the unlearned model by the base's, `unlearned-to-base`
            the reverse.
        donor: Additional donors: models, `other-question` or `noise`.
        null: Number of null models.
        seed: Seed of other questions and noise.

    Returns:
        The groups: main and control, null models, additional donors.

    Raises:
        InputError: The direction is unknown, `null` is negative, or a donor cannot be compared with the base or has
            no activations to give.
    """
    if direction not in DIRECTIONS:
        raise InputError(f"`direction` must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
    check_at_least("null", null, 0)
    return [
        *_main(pair, control, direction),
        *_nulls(pair, direction, null),
        *_donors(pair, prompts, direction, donor, seed),
    ]


def _main(pair: ModelPair, control: Model | None, direction: Direction) -> Iterator[ArmGroup]:
    base, unlearned = pair.base, pair.unlearned
    if direction == "base-to-unlearned":
        arms, targets = [Arm("main", "unlearned", "base")], [unlearned]
        if control is not None:
            arms.append(Arm("control", "control", "base"))
            targets.append(control)
        yield ArmGroup(tuple(arms), partial(_from_model, base, *targets))
        return
    yield ArmGroup((Arm("main", "base", "unlearned"),), partial(_from_model, unlearned, base))
    if control is not None:
        yield ArmGroup((Arm("control", "base", "control"),), partial(_from_model, control, base))


def _from_model(model: Model, *targets: Model) -> ArmModels:
    """Return the models of arms whose donor is the model that scores compare with."""
    return ArmModels(model, donors.own_activations(model), targets)


def _nulls(pair: ModelPair, direction: Direction, count: int) -> Iterator[ArmGroup]:
    if count:
        check_null(pair.base, pair.unlearned)
    is_forward = direction == "base-to-unlearned"

    def load(seed: int) -> ArmModels:
        null = null_model(pair.base, pair.unlearned, seed=seed)
        return _from_model(pair.base, null) if is_forward else _from_model(null, pair.base)

    for seed in range(count):
        target, donor = ("null", "base") if is_forward else ("base", "null")
        yield ArmGroup((Arm(f"null-{seed}", target, donor),), partial(load, seed))


def _donors(
    pair: ModelPair, prompts: Prompts, direction: Direction, named: Sequence[str | Model], seed: int
) -> Iterator[ArmGroup]:
    is_forward = direction == "base-to-unlearned"
    source, target = (pair.base, pair.unlearned) if is_forward else (pair.unlearned, pair.base)
    for one in named:
        n_sources = 2
        if isinstance(one, Model):
            check_comparable(source, one)
            name, label, donor = "donor", one.name, donors.own_activations(one)
        elif one == "other-question":
            name, label, donor = one, one, donors.other_question(source, prompts, seed=seed)
        else:
            name, label, donor = one, one, donors.norm_matched_noise(source, prompts, seed=seed)
            n_sources = 1
        arm = Arm(name, "unlearned" if is_forward else "base", label)
        yield ArmGroup((arm,), partial(ArmModels, source, donor, (target,)), n_sources)


def resolve_donors(pair: ModelPair, donor: str | Model | Sequence[str | Model] | None) -> list[str | Model]:
    """Resolve the additional donors, and load those given by name.

    Args:
        pair: Base and unlearned model.
        donor: One or more of `other-question`, `noise`, a loaded model, and the name or path of a model. `base` is
            always used and is not returned; `none` and None stand for no additional donor.

    Returns:
        `other-question`, `noise` and loaded models, each once.

    Raises:
        InputError: A model cannot be loaded, or there is more than one.
    """
    named = [donor] if donor is None or isinstance(donor, str | Model) else list(donor)
    resolved: list[str | Model] = []
    for one in named:
        if one is None or (isinstance(one, str) and one in ("base", "none")):
            continue
        if isinstance(one, str) and one not in donors.KINDS:
            one = load_like(one, pair.base)
        if one not in resolved:
            resolved.append(one)
    n_models = sum(isinstance(one, Model) for one in resolved)
    if n_models > 1:
        raise InputError(f"`donor` must name at most 1 model, got {n_models}; run the others separately")
    return resolved
