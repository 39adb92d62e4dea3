"""`decompose` and `probe` on every configuration: right by plain hooks on the model itself, or refused in one line."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dissect.coefficients.run import probe
from dissect.decomposition.direct_logits import find_path, freeze
from dissect.decomposition.run import decompose
from dissect.decomposition.terms import SITES, scored
from dissect.models.model import Model
from dissect.models.pair import ModelPair
from tests.dissect.families import CONFIGURATIONS, blocks_of, build, inputs_of, run, site_module
from tests.dissect.helpers import assert_close, build_batch, build_prompts, change_weights
from tests.unlearning.helpers import build_tokenizer
from unlearning.common.errors import InputError

FAST = ("llama", "gemma 2", "the first gpt", "opt, projected", "opt, post-norm, projected", "falcon, alibi", "mixtral")
POST_NORM = {"do_layer_norm_before": False}


def check(hf: Any, tmp_path: Path) -> str:
    """Run both commands; return why the direct path is undefined, or why the model is refused."""
    other = copy.deepcopy(hf)
    change_weights(other, scale=0.05)
    prompts = build_prompts(tmp_path)
    try:
        models = [Model.wrap(of, build_tokenizer(), name=name) for name, of in (("base", hf), ("unlearned", other))]
    except InputError as error:
        assert "\n" not in str(error)
        return str(error)
    pair = ModelPair(*models)
    try:
        assert len(probe(pair, prompts, control=None, draws=1, last_layers=1, top=2, progress=False).curve())
    except InputError as error:
        assert "\n" not in str(error)
    try:
        frame = decompose(pair, prompts, control=None, progress=False).frame
    except InputError as error:
        assert "\n" not in str(error)
        return str(error)
    (problem,) = set(frame["direct_undefined"])
    if not problem:
        check_sum(models[0], tmp_path)
    return str(problem)


def check_sum(model: Model, tmp_path: Path) -> None:
    """Compare the sum of all parts with the logit that the head returns, by plain hooks."""
    batch = build_batch(tmp_path, "right")
    path = find_path(model, batch, SITES)
    blocks, head = blocks_of(model.hf), model.hf.get_output_embeddings()
    seen: dict[Any, Tensor] = {}

    def first(output: Any) -> Tensor:
        found: Tensor = output[0] if isinstance(output, (tuple, list)) else output
        return found

    def keep(key: Any) -> Any:  # cloned, because Falcon adds to an output in place
        return lambda _module, _args, output: seen.__setitem__(key, first(output).detach().clone())

    handles = [
        blocks[0].register_forward_pre_hook(
            lambda _module, args, kwargs: seen.__setitem__("entered", args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        ),
        blocks[-1].register_forward_hook(keep("left")),
        head.register_forward_hook(keep("head")),
    ]
    for layer in range(model.n_layers):
        handles += [site_module(blocks[layer], site).register_forward_hook(keep((site, layer))) for site in SITES]
    run(model.hf, inputs_of(model, batch))
    for handle in handles:
        handle.remove()
    states = {key: scored(value.view(*batch.input_ids.shape, -1), batch) for key, value in seen.items()}
    rows = head.weight[batch.next_tokens].double().detach()
    embedded = states["entered"].double()
    norm = path.final_norm
    if norm is not None:
        embedded = freeze(norm, states["left"])(embedded) + norm(torch.zeros_like(states["left"])).double().detach()
    total = (embedded * rows).sum(-1)
    if getattr(head, "bias", None) is not None:
        total = total + head.bias[batch.next_tokens].double().detach()
    for site in SITES:
        for layer in range(model.n_layers):
            output = states[site, layer]
            total = (
                total
                + path.contributions(
                    output[None],
                    site=site,
                    layer=layer,
                    output=output,
                    final_state=states["left"],
                    tokens=batch.next_tokens,
                )[0, 0].detach()
            )
    logits = states["head"].gather(-1, batch.next_tokens[:, None])[:, 0].double()
    assert_close(total, logits, atol=1e-3 * float(logits.abs().max()))


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGURATIONS]
)
def test_decompose_and_probe_are_right_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    check(build(name), tmp_path)


@pytest.mark.parametrize(
    ("name", "fields", "defined"),
    [
        ("llama", {}, True),
        ("gemma 2", {}, True),
        ("opt", {}, True),
        ("the first gpt", {}, False),
        ("opt", POST_NORM, False),
    ],
)
def test_the_direct_path_is_undefined_where_the_norm_takes_the_whole_stream(
    name: str, fields: dict[str, Any], defined: bool, tmp_path: Path
) -> None:
    problem = check(build(name, **fields), tmp_path)
    assert (problem == "") == defined
    assert defined or "more than add" in problem
