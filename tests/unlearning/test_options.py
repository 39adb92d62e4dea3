"""Options: typed, checked, refused with the nearest name."""

import dataclasses
import itertools
from typing import Any, get_args, get_type_hints

import pytest

from unlearning.common.errors import InputError
from unlearning.methods.catalogue import METHODS
from unlearning.methods.npo import NPOOptions
from unlearning.options import TrainOptions, resolve_options


def resolve(**given: Any) -> tuple[NPOOptions, TrainOptions]:
    return resolve_options("npo", NPOOptions, given)


def test_flat_options_reach_the_method_and_the_trainer() -> None:
    own, shared = resolve(beta=1, learning_rate="5e-5", epochs="3", append_eos="false", max_steps="none")
    assert own == NPOOptions(beta=1.0)
    assert isinstance(own.beta, float)
    assert shared == TrainOptions(learning_rate=5e-5, epochs=3, append_eos=False, max_steps=None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"btea": 1}, "npo has no option 'btea'; did you mean 'beta'?"),
        ({"learning_rat": 1}, "did you mean 'learning_rate'?"),
        ({"zzz": 1}, "npo has no option 'zzz'; `unlearn methods` lists them"),
        ({"beta": 0}, r"`beta`.*0\.0"),
        ({"alpha": -1}, r"`alpha`.*-1\.0"),
        ({"warmup_ratio": 1}, r"`warmup_ratio`.*1\.0"),
        ({"epochs": 1.5}, r"`epochs`.*whole number.*1\.5"),
        ({"epochs": "many"}, "`epochs`.*whole number.*'many'"),
        ({"epochs": True}, "`epochs`.*whole number.*True"),
        ({"learning_rate": "nan"}, "`learning_rate`.*a number.*'nan'"),
        ({"append_eos": "perhaps"}, "`append_eos`.*true or false.*'perhaps'"),
        ({"append_eos": 1}, "`append_eos`.*true or false.*1"),
        ({"lr_schedule": "step"}, "`lr_schedule`.*linear, cosine, constant.*'step'"),
        ({"max_steps": 0}, "`max_steps`.*1.*0"),
        ({"template": 3}, "`template`.*text.*3"),
        ({"learning_rate": 1e300}, r"`learning_rate` must be at most 1e\+30, got 1e\+300"),
        ({"beta": "1e31"}, r"`beta` must be at most 1e\+30"),
        ({"epochs": "1e300"}, "`epochs` must be at most 1000000000, got 1"),
        ({"epochs": "1e400"}, "`epochs`.*whole number.*'1e400'"),
        ({"batch_size": 10**25}, "`batch_size` must be at most 1000000000"),
        ({"max_length": 10**30}, "`max_length` must be at most 1000000000"),
        ({"max_length": 10**400}, "`max_length`.*whole number.*10000"),
        ({"max_length": 10**5000}, "`max_length`.*whole number.*thousands of digits"),
        ({"learning_rate": 10**5000}, "`learning_rate`.*a number.*thousands of digits"),
        ({"seed": 10**30}, "`seed` must be below 4294967296"),
        ({"lora_rank": 999_999_999_999}, "`lora_rank` must be at most 16384"),
        ({"lora_rank": 16_385}, "`lora_rank` must be at most 16384, got 16385"),
    ],
    ids=itertools.count(),
)
def test_bad_options_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        resolve(**given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", METHODS)
def test_no_number_of_any_method_is_without_end(name: str) -> None:
    """Every option that is a number refuses one that overflows, in both directions."""
    own = METHODS[name].options
    for cls in (own, TrainOptions):
        hints = get_type_hints(cls)
        for field in dataclasses.fields(cls):
            kinds = {hints[field.name], *get_args(hints[field.name])}
            if not kinds & {int, float}:
                continue
            for value in (1e300, -1e300, 10**25, -(10**400)):
                if float not in kinds or abs(value) > 1e30:
                    with pytest.raises(InputError, match=f"`{field.name}` must be"):
                        resolve_options(name, own, {field.name: value})
