"""The public names of the package."""

import doctest
from types import ModuleType

import pytest

import unlearning
from unlearning.methods import METHODS, catalogue
from unlearning.training import train as training


def test_every_public_name_is_there() -> None:
    assert sorted(unlearning.__all__) == unlearning.__all__ == dir(unlearning)
    for name in unlearning.__all__:
        assert getattr(unlearning, name).__module__.startswith("unlearning.")
    with pytest.raises(AttributeError, match="trian"):
        _ = unlearning.trian


def test_methods_are_listed_with_options_that_train_takes() -> None:
    listed = unlearning.list_methods()
    assert [method["name"] for method in listed["methods"]] == list(METHODS)
    assert [method["name"] for method in unlearning.list_methods("blur")["methods"]] == ["blur"]
    for method in (*listed["methods"], {"options": listed["train_options"]}):
        for option in method["options"]:
            assert set(option) == {"name", "default", "help", "source"} and option["help"]
    with pytest.raises(unlearning.InputError, match="`method`.*'blr'; did you mean 'blur'"):
        unlearning.list_methods("blr")


@pytest.mark.parametrize("module", [training, catalogue])
def test_examples_of_the_documentation_run(module: ModuleType) -> None:
    outcome = doctest.testmod(module)
    assert outcome.attempted and not outcome.failed
