"""Split a linear module's change between two models exactly into three terms (2410.06606 leaves the question open).

With W_b, W_u the weights of one module in the base and in the target (bias d = b_b - b_u), m_b, m_u its inputs in each
model's own forward pass, dW = W_b - W_u and dm = m_b - m_u:

    (W_b m_b + b_b) - (W_u m_u + b_u)  =  dW m_u + d  +  W_u dm  +  dW dm
                                          (weight)      (coefficient)  (interaction)

Every term points from the target to the base: it is what has to be added to the target's output. The symmetric split
has two terms, each with half of the interaction.
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

from dissect.models.anatomy import block_of
from dissect.models.model import Model
from dissect.models.taken_apart import replaced_forward
from dissect.prompts.prompts import Batch
from dissect.scoring.forward import scored_logits
from unlearning.common.errors import InputError

Site = Literal["mlp_out", "attn_out"]
"""The output that is split: of the down projection (input: the MLP coefficients), or of the attention's output
projection."""

SITES: tuple[Site, ...] = get_args(Site)

OLD_SITES: dict[str, Site] = {"mlp": "mlp_out", "attn": "attn_out"}
"""Names of the sites in runs written by earlier versions."""

TERMS: dict[str, tuple[float, float, float]] = {
    "weight": (1, 0, 0),
    "coefficient": (0, 1, 0),
    "interaction": (0, 0, 1),
    "total": (1, 1, 1),
    "weight_symmetric": (1, 0, 0.5),
    "coefficient_symmetric": (0, 1, 0.5),
}
"""The factors of the weight, coefficient and interaction term in each term of the tables."""

EXACT = ("weight", "coefficient", "interaction")
SYMMETRIC = ("weight_symmetric", "coefficient_symmetric")
TOTAL = "total"

Hook = tuple[nn.Module, Literal["pre", "post"], Callable[..., Any]]
"""A module, whether the hook runs before or after it, and the hook."""


@dataclass(frozen=True, eq=False)
class Change:
    """One linear module in the base and in the target.

    Attributes:
        base: Weight in the base.
        target: Weight in the target.
        base_bias: Bias in the base, None without one.
        target_bias: Bias in the target, None without one.
    """

    base: Float[Tensor, "d_model d_in"]
    target: Float[Tensor, "d_model d_in"]
    base_bias: Float[Tensor, " d_model"] | None
    target_bias: Float[Tensor, " d_model"] | None

    @classmethod
    def of(cls, base: nn.Module, target: nn.Module) -> "Change":
        """Return the change between two modules of the same shape.

        Args:
            base: The module in the base.
            target: The module in the target.

        Returns:
            Their weights and biases.

        Raises:
            InputError: A module is not a plain linear map.
        """
        (w_b, b_b), (w_u, b_u) = affine(base), affine(target)
        return cls(w_b, w_u, b_b, b_u)

    def term(
        self,
        parts: tuple[float, float, float],
        m_base: Float[Tensor, "*any d_in"],
        m_target: Float[Tensor, "*any d_in"],
    ) -> Float[Tensor, "*any d_model"]:
        """Compute a weighted sum of the weight, coefficient and interaction terms.

        Computed from the differences of weights and inputs, so that a term a million times smaller than the outputs
        keeps its digits.

        Args:
            parts: Factors of the three terms.
            m_base: Inputs of the module in the base.
            m_target: Inputs of the module in the target.

        Returns:
            The sum, to be added to the target's output.
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
    """Return weight and bias of a linear module, the weight in the orientation of `nn.Linear`.

    Returns:
        The weight, and the bias or None.

    Raises:
        InputError: The module is not linear, or its weight is packed.
    """
    weight: Any = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear | Conv1D) or not weight.is_floating_point() or weight.dim() != 2:
        raise InputError(
            f"{type(module).__name__} is not a plain linear map with weight and bias, so its change cannot be split; "
            "load the models unquantised and without adapters"
        )
    bias: Any = module.bias
    return (weight.T if isinstance(module, Conv1D) else weight), bias


def site_modules(model: Model, site: Site) -> list[nn.Module]:
    """Return the site's linear module of every layer.

    Args:
        model: The model.
        site: The output that is split.

    Returns:
        One module per layer.

    Raises:
        InputError: The blocks have no such module.
    """
    blocks = [block_of(model.hf, model.anatomy, layer) for layer in range(model.n_layers)]
    modules = [block.down_proj if site == "mlp_out" else block.o_proj for block in blocks]
    if None in modules:
        what = "down projection (a mixture of experts has many)" if site == "mlp_out" else "attention output projection"
        raise InputError(f"{model.name}: its blocks have no {what}, so site {site} cannot be split; leave it out")
    return [module for module in modules if module is not None]


def scored(states: Float[Tensor, "*batch_and_position d"], batch: Batch) -> Float[Tensor, "scored d"]:
    """Return the states at the scored positions; some families run their MLP on positions in one dimension."""
    return states.reshape(*batch.input_ids.shape, -1)[batch.rows, batch.columns]


@contextmanager
def hooked(hooks: Sequence[Hook]) -> Iterator[None]:
    """Register torch hooks on modules, and remove them whatever happens."""
    with ExitStack() as stack:
        for module, when, act in hooks:
            register = module.register_forward_pre_hook if when == "pre" else module.register_forward_hook
            stack.callback(register(act).remove)
        yield


@dataclass(frozen=True, eq=False)
class Recorded:
    """Activations of one model's own forward pass over one batch.

    Attributes:
        logits: Logits at the scored positions.
        inputs: Input of each site's module by site and layer, at every token position or at the scored ones.
        outputs: Output of each site's module, at the scored positions.
        states: Output of each block, at every token position; empty for the base.
        final_state: Output of the last block, at the scored positions.
    """

    logits: Float[Tensor, "scored vocab"]
    inputs: dict[tuple[Site, int], Float[Tensor, "batch position d_in"]]
    outputs: dict[tuple[Site, int], Float[Tensor, "scored d_model"]]
    states: list[Any]
    final_state: Float[Tensor, "scored d_model"]


def record(model: Model, batch: Batch, sites: Sequence[Site], *, everywhere: bool) -> Recorded:
    """Run a model and record the inputs and outputs of the sites' modules.

    Args:
        model: The model, in memory.
        batch: The batch.
        sites: The outputs that are split.
        everywhere: Record inputs at every token position instead of at the scored ones (shape [scored, d_in]), and no
            states of blocks.

    Returns:
        The recorded activations.

    Raises:
        InputError: A module did not run exactly once, or logits are not finite.
    """
    inputs: dict[tuple[Site, int], Tensor] = {}
    outputs: dict[tuple[Site, int], Tensor] = {}
    runs: list[tuple[Site, int]] = []

    def keeper(key: tuple[Site, int]) -> Callable[..., None]:
        def keep(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            runs.append(key)
            inputs[key] = args[0].clone() if everywhere else scored(args[0], batch)
            outputs[key] = scored(output, batch)

        return keep

    states: list[Any] = []

    def keep_state(_module: nn.Module, _args: Any, output: Any) -> None:
        states.append(output)

    keys = [(site, layer) for site in sites for layer in range(model.n_layers)]
    modules = {site: site_modules(model, site) for site in sites}
    keepers: list[Hook] = [(modules[site][layer], "post", keeper((site, layer))) for site, layer in keys]
    blocks = _blocks(model)[-1:] if everywhere else _blocks(model)
    with hooked([*keepers, *((block, "post", keep_state) for block in blocks)]):
        logits = scored_logits(model, batch, only_scored=True)
    if sorted(runs) != sorted(keys):
        raise InputError(f"{model.name}: a projection did not run exactly once in a forward pass and cannot be split")
    if not torch.isfinite(logits).all():
        raise InputError(f"{model.name} gives logits that are not finite; is the checkpoint sound?")
    final_state = scored(states[-1][0] if isinstance(states[-1], (tuple, list)) else states[-1], batch)
    return Recorded(logits, inputs, outputs, [] if everywhere else states, final_state)


def _blocks(model: Model) -> list[nn.Module]:
    return [block_of(model.hf, model.anatomy, layer).whole for layer in range(model.n_layers)]


def can_resume(model: Model, batch: Batch, own: Recorded) -> bool:
    """Check whether a forward pass can start at a later block, from the recorded output of the block before.

    Architectures whose blocks pass anything else to later blocks cannot.

    Args:
        model: The model.
        batch: The batch.
        own: The model's recorded forward pass over the batch.

    Returns:
        True if a pass that starts at the last block gives the model's own logits.
    """
    with _resumed(model, own, model.n_layers - 1):
        logits = scored_logits(model, batch, only_scored=True)
    return torch.allclose(logits, own.logits, rtol=1e-4, atol=1e-4)


@contextmanager
def _resumed(model: Model, own: Recorded, layer: int) -> Iterator[None]:
    """Skip the blocks before `layer`: each returns the recorded output of the last one of them."""
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
    """Compute the target's logits with a term added to the site's output, at every token position.

    A term is computed from the target's state when the layer runs: with several layers, earlier additions have changed
    that state. So `coefficient` is the patch of the module's input, `weight` the restored weight, and `total` the patch
    of its output, in one layer and in all.

    Args:
        target: The model that the term is added to.
        batch: The batch.
        changes: The change of the site's module in each of the layers.
        site: The output that the term is added to.
        term: Name of the term.
        base: The base's recorded forward pass over the batch.
        own: The target's, if layers before the first addition can be skipped; see `can_resume`.

    Returns:
        Logits at the scored positions, in float32 or wider.
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
