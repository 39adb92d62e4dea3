"""Compute the direct contribution of a vector to a logit, with the statistics of every norm frozen.

A vector v that a block adds to the residual stream contributes to the logit of token t, past all later blocks,

    w_t . N_final(N_after(v)),   N(v) = gain * (v - [mean v]) / scale

where N_after is the norm that some families put between a block's output projection and the residual stream, and every
scale is that of the model's current states. With frozen scales the path is linear: contributions of terms add up.
"""

import copy
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dissect.decomposition.terms import Site, scored
from dissect.models.anatomy import block_of
from dissect.models.model import Model
from dissect.prompts.prompts import Batch
from dissect.scoring.forward import scored_logits
from unlearning.common.errors import InputError

TOLERANCE = 1e-3
"""Largest relative gap at which a state counts as explained by the path that was found."""


@dataclass(frozen=True, eq=False)
class FrozenNorm:
    """A layer norm or RMS norm with frozen statistics, which is a linear map.

    Attributes:
        gain: The norm's weight.
        scale: Divisor of each state: its root mean square or standard deviation, with the norm's epsilon.
        centres: True for a layer norm, which subtracts the mean.
    """

    gain: Float[Tensor, " d_model"]
    scale: Float[Tensor, "scored 1"]
    centres: bool

    def __call__(self, vectors: Float[Tensor, "*term scored d_model"]) -> Float[Tensor, "*term scored d_model"]:
        """Return the vectors after the norm, in float64."""
        vectors = vectors.double()
        if self.centres:
            vectors = vectors - vectors.mean(-1, keepdim=True)
        return self.gain * vectors / self.scale


@torch.inference_mode()
def freeze(norm: nn.Module, states: Float[Tensor, "scored d_model"]) -> FrozenNorm:
    """Freeze a norm at the statistics of given states.

    Gain, bias and centring are measured, so that no table of norm classes is needed: vectors of alternating sign show
    them, large enough for the norm's epsilon to vanish.

    Args:
        norm: The norm.
        states: The states that enter the norm.

    Returns:
        The norm as a linear map.

    Raises:
        InputError: The module is neither a layer norm nor an RMS norm.
    """
    wide = torch.promote_types(states.dtype, torch.float32)
    norm, states = copy.deepcopy(norm).to(wide), states.to(wide)
    probe = 1e3 * torch.where(torch.arange(states.shape[-1], device=states.device) % 2 == 0, 1.0, -1.0)
    plus, minus, moved = norm(torch.stack([probe, -probe, probe + 1e3]).to(wide)).double()
    centres = bool(torch.allclose(plus, moved, rtol=TOLERANCE, atol=TOLERANCE))

    def bare(vectors: Tensor) -> Tensor:
        vectors = vectors.double()
        return vectors - vectors.mean(-1, keepdim=True) if centres else vectors

    shape = bare(probe)
    gain, bias = (plus - minus) / 2 * shape.square().mean().sqrt() / shape, (plus + minus) / 2
    numerator, result = gain * bare(states), norm(states).double() - bias
    scale = numerator.square().sum(-1, keepdim=True) / (numerator * result).sum(-1, keepdim=True)
    if not _explained(numerator / scale, result):
        raise InputError(f"{type(norm).__name__} is neither a layer norm nor an RMS norm")
    return FrozenNorm(gain, scale, centres)


@dataclass(frozen=True, eq=False)
class DirectPath:
    """The direct path from a block's output projections to the logits of one model.

    Attributes:
        model: The model.
        after: Module path, within a block, of the norm that each site's output goes through; None without one.
        final_norm: The norm before the head.
        problem: The reason why this architecture has no direct path, or "".
    """

    model: Model
    after: dict[Site, str | None]
    final_norm: nn.Module | None
    problem: str = ""

    def norm_after(self, site: Site, layer: int) -> nn.Module | None:
        """Return the norm that a site's output goes through before it is added to the residual stream.

        Args:
            site: The output.
            layer: The layer.

        Returns:
            The norm, or None without one.
        """
        path = self.after.get(site)
        return None if path is None else block_of(self.model.hf, self.model.anatomy, layer).whole.get_submodule(path)

    @torch.inference_mode()
    def contributions(
        self,
        vectors: Float[Tensor, "term scored d_model"],
        *,
        site: Site,
        layer: int,
        output: Float[Tensor, "scored d_model"],
        final_state: Float[Tensor, "scored d_model"],
        tokens: Int[Tensor, " scored"],
    ) -> Float[Tensor, "two term scored"]:
        """Compute the contributions of vectors that are added to a site's output.

        Args:
            vectors: The vectors.
            site: The output that they are added to.
            layer: The layer.
            output: The model's own output there, which freezes the norm after it.
            final_state: The input of the final norm, which freezes that norm.
            tokens: The token of each position whose logit is asked, -1 for none.

        Returns:
            The contribution to the token's logit, and to that logit minus the mean over the vocabulary; in logits
            before any soft cap or scaling, float64, NaN where there is no token.
        """
        head: Any = self.model.hf.get_output_embeddings()
        after = self.norm_after(site, layer)
        if after is not None:
            vectors = freeze(after, output)(vectors)
        if self.final_norm is not None:
            vectors = freeze(self.final_norm, final_state)(vectors)
        rows = head.weight[tokens.clamp(min=0)].double()
        per_token = (vectors.double() * rows).sum(-1)
        mean = vectors.double() @ head.weight.mean(0, dtype=torch.float64)
        both = torch.stack([per_token, per_token - mean])
        return torch.where(tokens >= 0, both, torch.nan)


def find_path(model: Model, batch: Batch, sites: tuple[Site, ...]) -> DirectPath:
    """Find the direct path of an architecture from one forward pass, and check it on that pass.

    The check is that each block adds the outputs of the two projections, after the norms that were found, to its input
    and nothing else; and that the head reads the final norm of the last block's output.

    Args:
        model: The model.
        batch: A batch to run.
        sites: The outputs that are split.

    Returns:
        The path, or one with the reason in `problem`.
    """
    blocks = [block_of(model.hf, model.anatomy, layer).whole for layer in range(model.n_layers)]
    final_norm = model.final_norm
    seen = _watch(model, batch, blocks, final_norm)
    paths: dict[Site, str | None] = {
        "attn_out": model.anatomy.o_proj,
        "mlp_out": model.anatomy.down_proj or model.anatomy.mlp,
    }
    after = {site: _norm_of(seen, paths[site]) for site in paths}
    for layer in range(model.n_layers):
        entered, left = seen[f"{layer}/"]
        parts = [part for site in paths if (part := seen.get(f"{layer}/{after[site] or paths[site]}")) is not None]
        added = torch.stack([part[1] for part in parts]).sum(0) if parts else torch.zeros_like(left)
        if not _explained(added, left - entered):
            return DirectPath(
                model, {}, None, "its blocks do more than add attention and MLP outputs to the residual stream"
            )
    last = seen[f"{model.n_layers - 1}/"][1]
    into_head = last if final_norm is None else seen["final"][1]
    if (final_norm is not None and not _explained(seen["final"][0], last)) or not _explained(
        into_head, seen["head"][0]
    ):
        return DirectPath(model, {}, None, "there is more than a norm between its last block and its head")
    return DirectPath(model, {site: after[site] for site in sites}, final_norm)


def _watch(
    model: Model, batch: Batch, blocks: list[nn.Module], final_norm: nn.Module | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return inputs and outputs of blocks (`0/`), modules in them (`0/mlp.down_proj`), the final norm and the head."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Any:
        def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            entered = args[0] if args else kwargs.get("hidden_states")
            left = output[0] if isinstance(output, (tuple, list)) else output
            if not isinstance(entered, Tensor) or not isinstance(left, Tensor):
                return
            if name == "head":  # the head sees the scored positions only
                seen[name] = (entered[0], left[0])
            elif entered[..., 0].numel() == left[..., 0].numel() == batch.input_ids.numel():
                seen[name] = (scored(entered, batch), scored(left, batch))

        return note

    head: Any = model.hf.get_output_embeddings()
    named = {"head": head} | ({} if final_norm is None else {"final": final_norm})
    for number, block in enumerate(blocks):
        named |= {
            f"{number}/{path}": module
            for path, module in block.named_modules()
            if path in ("", model.anatomy.mlp) or not list(module.children())
        }
    with ExitStack() as stack:
        for name, module in named.items():
            stack.callback(module.register_forward_hook(watch(name), with_kwargs=True).remove)
        scored_logits(model, batch, only_scored=True)
    return seen


def _norm_of(seen: dict[str, tuple[Tensor, Tensor]], path: str | None) -> str | None:
    """Return the module of the first block that takes this module's output and changes it."""
    if f"0/{path}" not in seen:
        return None
    output = seen[f"0/{path}"][1]
    for name, (entered, left) in seen.items():
        layer, _, reader = name.partition("/")
        reads = layer == "0" and reader and entered.shape == output.shape == left.shape and torch.equal(entered, output)
        if reads and not torch.equal(left, output):
            return reader
    return None


def _explained(found: Tensor, whole: Tensor) -> bool:
    if found.shape != whole.shape:
        return False
    tolerance = max(TOLERANCE, 10 * torch.finfo(whole.dtype).eps)
    return bool(torch.linalg.norm(found.double() - whole.double()) <= tolerance * torch.linalg.norm(whole.double()))
