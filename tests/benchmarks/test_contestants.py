"""Every contestant gets the same KRS as plain hooks, on padded batches, and leaves the models as they were."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks.contestants import CONTESTANTS, OURS, parse_contestants
from tests.benchmarks.helpers import Side, build_micro_case, krs_by_hand, krs_in_own_process, krs_of
from tests.dissect.helpers import assert_close
from unlearning.common.errors import InputError

IN_PROCESS = [name for name, contestant in CONTESTANTS.items() if contestant.package is None]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", IN_PROCESS)
def test_contestant_gets_the_krs_of_plain_hooks(name: str, side: Side) -> None:
    case = build_micro_case(side)
    expected = krs_by_hand(case)
    assert expected.shape == (8, 4)
    assert expected.std(axis=1).min() > 1e-3, "the examples must differ"
    assert abs(expected[6:]).max() > 1e-2, "restoring must do something"
    assert_close(krs_of(name, case), expected, atol=1e-5)


@pytest.mark.skipif(find_spec("nnsight") is None, reason="nnsight is not installed: pip install nnsight")
@pytest.mark.parametrize("side", ["left", pytest.param("right", marks=pytest.mark.slow)])
def test_nnsight_gets_the_krs_of_plain_hooks(side: Side, tmp_path: Path) -> None:
    # In a process of its own: nnsight mounts a method on every object of the interpreter that imports it.
    found = krs_in_own_process("nnsight", side, tmp_path / "krs.npy")
    assert_close(found, krs_by_hand(build_micro_case(side)), atol=1e-5)


@pytest.mark.parametrize("name", IN_PROCESS)
def test_contestant_leaves_weights_and_hooks_as_they_were(name: str) -> None:
    case = build_micro_case()
    models = (case.pair.base.hf, case.pair.unlearned.hf)
    before = [{key: tensor.clone() for key, tensor in model.state_dict().items()} for model in models]
    krs_of(name, case)
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
        for module in model.modules():
            assert not module._forward_hooks and not module._forward_pre_hooks


def test_ours_is_always_among_the_contestants_and_first() -> None:
    assert [item.name for item in parse_contestants("notebook, reference,notebook")] == [OURS, "notebook", "reference"]
    assert [item.name for item in parse_contestants("")] == [OURS]


def test_unknown_contestant_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="unknown contestant; there are wavefront, reference, notebook"):
        parse_contestants("notebook,pyvene")
