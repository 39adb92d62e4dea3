"""The arms of a layer sweep: which model gives, which one takes, and what the claim is compared with."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from dissect.interventions import donors
from dissect.interventions.donors import Donor
from dissect.models.model import Model
from dissect.models.null_models import check_null, null_model
from dissect.models.pair import ModelPair, check_comparable, load_like
from dissect.prompts.prompts import Prompts
from unlearning.common.errors import InputError

Direction = Literal["base-to-unlearned", "unlearned-to-base"]
DIRECTIONS: tuple[Direction, ...] = ("base-to-unlearned", "unlearned-to-base")


@dataclass(frozen=True)
class Arm:
    """One target under one donor, as the results table names it.

    Attributes:
        name: `main`, `control`, `null-0`, `other-question`, `noise` or `donor` (another model as the donor).
        target: which model is intervened on: `unlearned`, `control`, `null` or `base`.
        donor: where what it gets comes from.
    """

    name: str
    target: str
    donor: str


@dataclass(frozen=True, eq=False)
class ArmModels:
    """The models of one or more arms.

    Attributes:
        base: what scores compare with.
        donor: where activations and weights come from.
        targets: what is intervened on, one of each arm.
    """

    base: Model
    donor: Donor
    targets: tuple[Model, ...]

    @property
    def models(self) -> list[Model]:
        """As an engine takes them."""
        apart = () if self.donor.model is self.base else (self.donor.model,)
        return [self.base, *apart, *self.targets]


@dataclass(frozen=True, eq=False)
class ArmGroup:
    """Arms that go through the layers together.

    Attributes:
        arms: their names.
        cast: gives their models; null models are made when they are asked for, one at a time.
        n_sources: how many forwards are read from: 2 where the donor's is another than the base's.
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
    """All arms of a sweep, those that can share a walk over the layers together.

    Raises:
        InputError: an unknown direction, a donor that cannot be compared or has nothing to give.
    """
    if direction not in DIRECTIONS:
        raise InputError(f"--direction {direction}: use {' or '.join(DIRECTIONS)}")
    if null < 0:
        raise InputError(f"--null {null}: 0 or more")
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
        yield ArmGroup(tuple(arms), lambda: ArmModels(base, donors.own_activations(base), tuple(targets)))
        return
    yield ArmGroup(
        (Arm("main", "base", "unlearned"),), lambda: ArmModels(unlearned, donors.own_activations(unlearned), (base,))
    )
    if control is not None:
        yield ArmGroup(
            (Arm("control", "base", "control"),), lambda: ArmModels(control, donors.own_activations(control), (base,))
        )


def _nulls(pair: ModelPair, direction: Direction, count: int) -> Iterator[ArmGroup]:
    if count:
        check_null(pair.base, pair.unlearned)

    def arm_models(seed: int) -> ArmModels:
        null = null_model(pair.base, pair.unlearned, seed=seed)
        if direction == "base-to-unlearned":
            return ArmModels(pair.base, donors.own_activations(pair.base), (null,))
        return ArmModels(null, donors.own_activations(null), (pair.base,))

    for seed in range(count):
        forward = direction == "base-to-unlearned"
        arm = Arm(f"null-{seed}", "null", "base") if forward else Arm(f"null-{seed}", "base", "null")
        yield ArmGroup((arm,), lambda seed=seed: arm_models(seed))  # type: ignore[misc]


def _donors(
    pair: ModelPair, prompts: Prompts, direction: Direction, named: Sequence[str | Model], seed: int
) -> Iterator[ArmGroup]:
    forward = direction == "base-to-unlearned"
    giver, target = (pair.base, pair.unlearned) if forward else (pair.unlearned, pair.base)
    for one in named:
        if isinstance(one, Model):
            check_comparable(giver, one)
            name, label, donor = "donor", one.name, donors.own_activations(one)
        elif one == "other-question":
            name, label, donor = one, one, donors.other_question(giver, prompts, seed=seed)
        else:
            name, label, donor = one, one, donors.norm_matched_noise(giver, prompts, seed=seed)
        arm = Arm(name, "unlearned" if forward else "base", label)
        yield ArmGroup((arm,), lambda donor=donor: ArmModels(giver, donor, (target,)), 1 if name == "noise" else 2)  # type: ignore[misc]


def resolve_donors(pair: ModelPair, donor: str | Model | Sequence[str | Model]) -> list[str | Model]:
    """The donors beside the pair's own, models loaded; `base`, which is always there, is none of them.

    Raises:
        InputError: a model that cannot be loaded, or two of them.
    """
    named = [donor] if isinstance(donor, str | Model) else list(donor)
    resolved: list[str | Model] = []
    for one in named:
        if isinstance(one, str) and one not in ("base", *donors.KINDS):
            one = load_like(one, pair.base)
        if one != "base" and one not in resolved:
            resolved.append(one)
    if sum(isinstance(one, Model) for one in resolved) > 1:
        raise InputError("--donor: one model at most beside the pair; run the others on their own")
    return resolved
