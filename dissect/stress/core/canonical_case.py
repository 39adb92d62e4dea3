"""Put all models of a case into canonical form, so that no attack depends on how their weights are written."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from dissect.models.canonical import CanonicalForm, canonical_form
from dissect.models.pair import ModelPair
from dissect.stress.core.case import Case


@dataclass(frozen=True, eq=False)
class CanonicalCase:
    """A case in canonical form, and what was done to its models.

    Attributes:
        case: The case with all models in canonical form; `case.as_written` has those that were given.
        moved: For each role but the base, numbers of units (neurons, heads, ...) by kind that stood at another place
            than their counterpart in the base; kinds without such a unit are left out.
        unproven: Freedoms that could not be fixed, because they are none of this architecture's: kind, layer, reason.
    """

    case: Case
    moved: Mapping[str, Mapping[str, int]]
    unproven: tuple[str, ...]


def in_canonical_form(case: Case) -> CanonicalCase:
    """Return a case with all models in canonical form, in the base's order of neurons and heads.

    Args:
        case: The case with the models as they were given; they are not changed.

    Returns:
        The case, with a record of the moved units. Two unlearned models that compute the same function give the same
        case, but for rounding.

    Raises:
        InputError: A model is not in memory.
    """
    base = canonical_form(case.pair.base)
    forms: dict[str, CanonicalForm] = {
        role: canonical_form(model, like=base.model) for role, model in case.models.items() if role != "base"
    }
    controls = [form.model for role, form in forms.items() if role != "unlearned"]
    moved = {role: {kind: n for kind, n in form.moved(base).items() if n} for role, form in forms.items()}
    return CanonicalCase(
        case=replace(
            case,
            pair=ModelPair(base.model, forms["unlearned"].model),
            control=controls[0] if controls else None,
            further_controls=tuple(controls[1:]),
            given=case,
        ),
        moved={role: counts for role, counts in moved.items() if counts},
        unproven=tuple(
            f"{one.kind}{'' if one.layer is None else f' of layer {one.layer}'}: {one.reason}" for one in base.unproven
        ),
    )
