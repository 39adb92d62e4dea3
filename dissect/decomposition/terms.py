"""The exact split of a linear module's change between two models (2410.06606's open question, in three terms).

With W_b, W_u the weights of one module in the base and in the target (bias d = b_b - b_u), m_b, m_u what enters it in
each model's own forward, dW = W_b - W_u and dm = m_b - m_u:

    (W_b m_b + b_b) - (W_u m_u + b_u)  =  dW m_u + d  +  W_u dm  +  dW dm
                                          (weight)      (coefficient)  (interaction)

Everything points from the target to the base: a term is what has to be added to the target's output. The split that
favours neither side has two terms, each with half of the interaction.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dissect.engine.blocks import replaced_forward
from dissect.models.anatomy import block_of
from dissect.models.model import Model
from dissect.prompts.prompts import Batch
from dissect.scoring.forward import scored_logits
from unlearning.common.errors import InputError

Site = Literal["mlp", "attn"]
"""`mlp` is the down projection with the MLP coefficients; `attn` the attention's output projection with its input."""

SITES: tuple[Site, ...] = get_args(Site)

TERMS: dict[str, tuple[float, float, float]] = {
    "weight": (1, 0, 0),
    "coefficient": (0, 1, 0),
    "interaction": (0, 0, 1),
    "total": (1, 1, 1),
    "weight_symmetric": (1, 0, 0.5),
    "coefficient_symmetric": (0, 1, 0.5),
}
"""How much of the weight, the coefficient and the interaction term is in each term of the tables."""

EXACT = ("weight", "coefficient", "interaction")
SYMMETRIC = ("weight_symmetric", "coefficient_symmetric")
TOTAL = "total"


Hook = tuple[nn.Module, Literal["pre", "post"], Callable[..., Any]]
"""A module, whether before or after it, and what is done there."""


@dataclass(frozen=True, eq=False)
class Change:
    """One linear module in the base and in the target.

    Attributes:
        base: its weight in the base.
        target: its weight in the target.
        base_bias: its bias in the base, where it has one.
        target_bias: its bias in the target.
    """

    base: Float[Tensor, "d_model d_in"]
    target: Float[Tensor, "d_model d_in"]
    base_bias: Float[Tensor, " d_model"] | None
    target_bias: Float[Tensor, " d_model"] | None

    @classmethod
    def of(cls, base: nn.Module, target: nn.Module) -> "Change":
        """The change between two modules of one shape.

        Raises:
            InputError: a module that is no plain linear map.
        """
        (w_b, b_b), (w_u, b_u) = affine(base), affine(target)
        return cls(w_b, w_u, b_b, b_u)

    def term(
        self,
        parts: tuple[float, float, float],
        m_base: Float[Tensor, "*any d_in"],
        m_target: Float[Tensor, "*any d_in"],
    ) -> Float[Tensor, "*any d_model"]:
        """So much of the weight, the coefficient and the interaction term, for these inputs.

        Computed from the differences themselves, so that a term a million times smaller than the outputs keeps its
        digits.
        """
        weight, coefficient, interaction = parts
        dm = m_base - m_target
        added = torch.zeros((), dtype=dm.dtype, device=dm.device)
        if weight or interaction:
            bias = None
            if weight and self.base_bias is not None and self.target_bias is not None:
                bias = weight * (self.base_bias - self.target_bias)
            added = added + F.linear(weight * m_target + interaction * dm, self.base - self.target, bias)
        if coefficient:
            added = added + coefficient * F.linear(dm, self.target)
        return added


def affine(module: nn.Module) -> tuple[Float[Tensor, "d_model d_in"], Float[Tensor, " d_model"] | None]:
    """Weight and bias of a linear module, the weight as `nn.Linear` keeps it.

    Raises:
        InputError: it is no linear module, or its weight is packed.
    """
    weight: Any = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear | Conv1D) or not weight.is_floating_point() or weight.dim() != 2:
        raise InputError(
            f"{type(module).__name__} is no plain linear map with a weight and a bias, so its change cannot be split; "
            "load the models unquantised and without adapters"
        )
    bias: Any = module.bias
    return (weight.T if isinstance(module, Conv1D) else weight), bias


def site_modules(model: Model, site: Site) -> list[nn.Module]:
    """The site's linear module in every layer.

    Raises:
        InputError: the blocks have none.
    """
    blocks = [block_of(model.hf, model.anatomy, layer) for layer in range(model.n_layers)]
    modules = [block.down_proj if site == "mlp" else block.o_proj for block in blocks]
    if None in modules:
        what = "down projection (a mixture of experts has many)" if site == "mlp" else "attention output projection"
        raise InputError(f"{model.name}: its blocks have no {what}, so site {site} cannot be split; leave it out")
    return [module for module in modules if module is not None]


def scored(states: Float[Tensor, "*batch_and_position d"], batch: Batch) -> Float[Tensor, "scored d"]:
    """The states at the scored positions; some families run their MLP on all positions in one dimension."""
    return states.reshape(*batch.input_ids.shape, -1)[batch.rows, batch.columns]


@contextmanager
def hooked(hooks: Sequence[Hook]) -> Iterator[None]:
    """Torch hooks before and after modules, taken away whatever happens."""
    with ExitStack() as stack:
        for module, when, act in hooks:
            register = module.register_forward_pre_hook if when == "pre" else module.register_forward_hook
            stack.callback(register(act).remove)
        yield


@dataclass(frozen=True, eq=False)
class Recorded:
    """What one model's own forward of one batch leaves behind.

    Attributes:
        logits: at the scored positions.
        inputs: what enters each site's module, at every token position, by site and layer.
        outputs: what leaves it, at the scored positions.
        states: what leaves each block, at every token position; empty where the donor is recorded.
        final_state: what leaves the last block, at the scored positions.
    """

    logits: Float[Tensor, "scored vocab"]
    inputs: dict[tuple[Site, int], Float[Tensor, "batch position d_in"]]
    outputs: dict[tuple[Site, int], Float[Tensor, "scored d_model"]]
    states: list[Any]
    final_state: Float[Tensor, "scored d_model"]


def record(model: Model, batch: Batch, sites: Sequence[Site], *, everywhere: bool) -> Recorded:
    """Run a model and keep what goes through the sites' modules.

    Args:
        model: the model, in memory.
        batch: the prompts.
        sites: which modules.
        everywhere: keep inputs at every token position, else at the scored ones only, as [scored, d_in].

    Raises:
        InputError: a module did not run exactly once, or logits are not finite.
    """
    inputs: dict[tuple[Site, int], Tensor] = {}
    outputs: dict[tuple[Site, int], Tensor] = {}
    runs: list[tuple[Site, int]] = []

    def keeper(place: tuple[Site, int]) -> Callable[..., None]:
        def keep(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            runs.append(place)
            inputs[place] = args[0].clone() if everywhere else scored(args[0], batch)
            outputs[place] = scored(output, batch)

        return keep

    states: list[Any] = []

    def keep_state(_module: nn.Module, _args: Any, output: Any) -> None:
        states.append(output)

    places = [(site, layer) for site in sites for layer in range(model.n_layers)]
    modules = {site: site_modules(model, site) for site in sites}
    keepers: list[Hook] = [(modules[site][layer], "post", keeper((site, layer))) for site, layer in places]
    blocks = _blocks(model)[-1:] if everywhere else _blocks(model)
    with hooked([*keepers, *((block, "post", keep_state) for block in blocks)]):
        logits = scored_logits(model, batch, only_scored=True)
    if sorted(runs) != sorted(places):
        raise InputError(f"{model.name}: its projections did not each run once in a forward, so they cannot be split")
    if not torch.isfinite(logits).all():
        raise InputError(f"{model.name} gives logits that are not finite; is the checkpoint sound?")
    final_state = scored(states[-1][0] if isinstance(states[-1], tuple) else states[-1], batch)
    return Recorded(logits, inputs, outputs, [] if everywhere else states, final_state)


def _blocks(model: Model) -> list[nn.Module]:
    return [block_of(model.hf, model.anatomy, layer).whole for layer in range(model.n_layers)]


def can_resume(model: Model, batch: Batch, own: Recorded) -> bool:
    """Whether the model may be run from the middle on: with the states that left a block handed on it gives its own
    logits (not so where a block passes something to later ones beside them)."""
    with _resumed(model, own, model.n_layers - 1):
        logits = scored_logits(model, batch, only_scored=True)
    return torch.allclose(logits, own.logits, rtol=1e-4, atol=1e-4)


@contextmanager
def _resumed(model: Model, own: Recorded, layer: int) -> Iterator[None]:
    """Skip the blocks before this one: each hands on what left the last of them in the model's own forward."""
    with ExitStack() as stack:
        for block in _blocks(model)[:layer]:
            stack.enter_context(replaced_forward(block, lambda *_args, **_kwargs: own.states[layer - 1]))
        yield


def logits_with_term(
    target: Model,
    batch: Batch,
    changes: dict[int, Change],
    site: Site,
    term: str,
    base: Recorded,
    own: Recorded | None = None,
) -> Float[Tensor, "scored vocab"]:
    """The target's logits with a term added to the site's output, at every token position of these layers.

    A term is taken at the state that the target is in when the layer runs: with several layers, the earlier
    additions have changed it. So `coefficient` is the patch of the module's input, `weight` the restored weight, and
    `total` the patch of its output, in one layer and in all.

    Args:
        target: what it is added to.
        batch: the prompts.
        changes: the change of the site's module in each of the layers.
        site: to which module's output it is added.
        term: which.
        base: the base's forward of the batch.
        own: the target's, where the layers before the first addition may be left out; see `can_resume`.
    """

    def adder(layer: int) -> Callable[..., Tensor]:
        def add(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output + changes[layer].term(TERMS[term], base.inputs[site, layer], args[0])

        return add

    modules = site_modules(target, site)
    with ExitStack() as stack:
        if own is not None:
            stack.enter_context(_resumed(target, own, min(changes)))
        stack.enter_context(hooked([(modules[layer], "post", adder(layer)) for layer in changes]))
        return scored_logits(target, batch, only_scored=True)
