"""Models whose truth is known by construction, made from the built-in ones in a second."""

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from dissect import zoo
from dissect.coefficients.hooks import down_projections
from dissect.models.model import Model, load_model
from dissect.models.module_tree import with_values
from dissect.models.pair import ModelPair
from dissect.prompts.loading import load_prompts
from dissect.prompts.prompts import Batch, Prompts
from dissect.stress.core.case import Case, make_case

N_FACTS = 60
"""Of each set, evenly spaced: enough for every group to come up, few enough to be fast."""


@dataclass(frozen=True)
class Gate:
    """A neuron that shuts off the output: put there by hand, and nothing else was changed.

    Attributes:
        layer: of its MLP.
        neuron: of that layer.
        names: of the parameters that were changed.
        value_vectors: the one of them whose column the neuron writes.
    """

    layer: int
    neuron: int
    names: tuple[str, ...]
    value_vectors: str


@cache
def model(name: str) -> Model:
    """A built-in model, loaded once."""
    return load_model(name)


@cache
def questions(name: str) -> Prompts:
    """A question set of the built-in world, with the tokens of `demo`, which are those of `demo-neox` too."""
    return load_prompts(zoo.question_set(name), model("demo:base").tokenizer)


def case_of(unlearned: Model, *, base: str = "demo:base", control: Model | None = None, n: int = N_FACTS) -> Case:
    """A case with the built-in questions, `n` of each set; `control` is the family's own unless another is given."""
    start = _base_case(base).at_most(n)
    return replace(start, pair=ModelPair(model(base), unlearned), control=control or start.control)


@cache
def _base_case(base: str) -> Case:
    """The base against itself; finding wrong answers takes a second, so it is done once for both worlds."""
    pair = ModelPair(model(base), model(base))
    never = model(base.partition(":")[0] + ":never")
    if base != "demo:base":  # the worlds have one tokenizer
        return replace(_base_case("demo:base"), pair=pair, control=never)
    return make_case(pair, questions("forget"), retain=questions("retain"), control=never, seed=0)


@cache
def gated(name: str = "demo:base", strength: float = 200.0) -> tuple[Model, Gate]:
    """The model with one neuron of its last layer turned into a gate that is always open: whatever is asked, it writes
    the end-of-sequence direction over everything else, so that no question is answered, forgotten or not.

    All knowledge is where it was, and the residual stream before the gate is the base's to the last bit: with the
    neuron's value vector set back the base answers.
    """
    start = model(name)
    layer = start.n_layers - 1
    inputs = _mlp_inputs(start, questions("retain"))
    direction = torch.linalg.lstsq(inputs, torch.ones(len(inputs), 1)).solution[:, 0]  # 1 on every position, about
    neuron = int(down_projections(start)[layer].weight.norm(dim=0).argmin())
    prefix = f"{start.anatomy.blocks}.{layer}."
    values: dict[str, Tensor] = {}
    for key, rows in start.weights.in_block[0]["key_vectors"].items():
        assert rows is None
        weight = start.hf.get_parameter(prefix + key).data.clone()
        weight[neuron] = direction if weight.dim() == 2 else 0.0
        values[prefix + key] = weight
    down = next(key for key in start.weights.in_block[0]["value_vectors"] if key.endswith("weight"))
    weight = start.hf.get_parameter(prefix + down).data.clone()
    head = start.hf.get_output_embeddings().weight.data
    end = head[start.tokenizer.eos_token_id] - head.mean(0)
    weight[:, neuron] = strength * end / end.norm()
    values[prefix + down] = weight
    shut = Model.wrap(with_values(start.hf, values), start.tokenizer, name=f"{name} gated")
    return shut, Gate(layer, neuron, tuple(values), value_vectors=prefix + down)


def opened(shut: Model, gate: Gate, name: str) -> Model:
    """A gated model with the gate's value vector set back to that of the model `name`."""
    weight = shut.hf.get_parameter(gate.value_vectors).data.clone()
    weight[:, gate.neuron] = model(name).hf.get_parameter(gate.value_vectors).data[:, gate.neuron]
    return replace(shut, hf=with_values(shut.hf, {gate.value_vectors: weight}), sha256=f"{shut.sha256} opened")


@torch.inference_mode()
def _mlp_inputs(of: Model, prompts: Prompts) -> Tensor:
    """What the last layer's MLP reads at the positions that predict answers."""
    mlp = of.hf.get_submodule(of.anatomy.blocks)[of.n_layers - 1].get_submodule(of.anatomy.mlp)
    kept: list[Tensor] = []

    def keep(_module: object, args: tuple[Tensor, ...]) -> None:
        kept.append(args[0][batch.rows, batch.columns])

    handle = mlp.register_forward_pre_hook(keep)
    try:
        for batch in prompts.batches(128):
            of.hf(**_inputs(of, batch), use_cache=False)
    finally:
        handle.remove()
    return torch.cat(kept)


def _inputs(of: Model, batch: Batch) -> dict[str, Tensor]:
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    return inputs | ({"position_ids": batch.position_ids} if of.takes_position_ids else {})
