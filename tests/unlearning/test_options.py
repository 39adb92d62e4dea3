"""Options: typed, checked, refused with the nearest name."""

from typing import Any

import pytest

from unlearning.common.errors import InputError
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
    ],
)
def test_bad_options_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        resolve(**given)
    assert "\n" not in str(error.value)
