"""What the engines prove on one row before they trust a number."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dissect.interventions.intervention import Intervention
from dissect.interventions.windows import Window
from dissect.models.model import Model
from dissect.models.pair import check_comparable
from tests.dissect.families import CONFIGURATIONS, randomised
from tests.dissect.helpers import build_batch, build_tokenizer, change_weights, run_engine
from unlearning.common.errors import InputError

PATCH = Intervention(("attn_out",), Window(1, (1,)))
RESTORE = Intervention(("value_vectors",), Window(1, (1,)))


def model(**fields: Any) -> Model:
    kind, given = CONFIGURATIONS["llama"]
    hf = randomised(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **given | fields)))
    return Model.wrap(hf, build_tokenizer(), name="theirs" if fields else "ours")


@pytest.mark.parametrize("engine", ["wavefront", "reference"])
@pytest.mark.parametrize("item", [PATCH, RESTORE])
@pytest.mark.parametrize(
    "fields",
    [{"rms_norm_eps": 0.5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 20.0}}, {"hidden_act": "gelu"}],
)
def test_a_pair_that_differs_in_what_its_configuration_computes_is_refused(
    fields: dict[str, Any], item: Intervention, engine: str, tmp_path: Path
) -> None:
    base, other = model(), model(**fields)
    change_weights(other.hf)
    with pytest.warns(UserWarning, match=f"theirs has {next(iter(fields))} = .* in the base's"):
        check_comparable(base, other)
    with pytest.raises(InputError, match="theirs with all weights of ours is not ours"):
        run_engine(engine, [base, other], [build_batch(tmp_path, "left")], [item])


@pytest.mark.parametrize("engine", ["wavefront", "reference"])
def test_a_field_that_changes_nothing_here_is_named_and_no_more(engine: str, tmp_path: Path) -> None:
    base, other = model(), model(attention_dropout=0.5)
    change_weights(other.hf)
    with pytest.warns(UserWarning, match="attention_dropout"):
        check_comparable(base, other)
    run_engine(engine, [base, other], [build_batch(tmp_path, "left")], [PATCH])


def test_a_buffer_that_differs_is_refused(tmp_path: Path) -> None:
    base, other = model(), model()
    change_weights(other.hf)
    for name, buffer in other.hf.named_buffers():
        if name.endswith("inv_freq"):
            buffer *= 1.5
    other = dataclasses.replace(other, name="theirs")
    with torch.no_grad(), pytest.raises(InputError, match="differ in buffers"):
        run_engine("wavefront", [base, other], [build_batch(tmp_path, "left")], [PATCH])
