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
        ({"beta": 0}, "beta=0.0: should be more than 0"),
        ({"alpha": -1}, "alpha=-1.0: should be at least 0"),
        ({"warmup_ratio": 1}, "warmup_ratio=1.0: should be less than 1"),
        ({"epochs": 1.5}, "epochs=1.5: should be a whole number"),
        ({"epochs": "many"}, "epochs='many': should be a whole number"),
        ({"epochs": True}, "epochs=True: should be a whole number"),
        ({"learning_rate": "nan"}, "learning_rate='nan': should be a number"),
        ({"append_eos": "perhaps"}, "append_eos='perhaps': should be true or false"),
        ({"append_eos": 1}, "append_eos=1: should be true or false"),
        ({"lr_schedule": "step"}, "lr_schedule='step': should be linear, cosine, constant"),
        ({"max_steps": 0}, "max_steps=0: should be at least 1"),
        ({"template": 3}, "template=3: should be text"),
    ],
)
def test_bad_options_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        resolve(**given)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
