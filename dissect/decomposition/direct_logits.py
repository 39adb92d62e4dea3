"""What a vector added by a block does to a logit by itself: the direct path, with every norm's statistics frozen.

A vector v that a block adds to the residual stream reaches the logits of token t unchanged by later blocks as

    w_t . N_final(N_after(v)),   N(v) = gain * (v - [mean v]) / scale

where N_after is the norm that some families put between a block's output projection and the residual stream, and every
scale is that of the states the model is in. With scales frozen the path is linear: contributions of terms add up.
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
"""Relative gap up to which a state counts as explained by the path that was found."""


@dataclass(frozen=True, eq=False)
class FrozenNorm:
    """A layer norm or RMS norm as the linear map that it is around given states."""

    gain: Float[Tensor, " d_model"]
    scale: Float[Tensor, "scored 1"]
    centres: bool

    def __call__(self, vectors: Float[Tensor, "*term scored d_model"]) -> Float[Tensor, "*term scored d_model"]:
        """The vectors through the norm, in float64."""
        vectors = vectors.double()
        if self.centres:
            vectors = vectors - vectors.mean(-1, keepdim=True)
        return self.gain * vectors / self.scale


@torch.inference_mode()
def freeze(norm: nn.Module, states: Float[Tensor, "scored d_model"]) -> FrozenNorm:
    """A norm with the statistics of these states.

    Whether it centres, its gain and its bias are read off what it does, so that no table of norm classes is needed:
    vectors of alternating sign show them, large enough for the norm's epsilon to vanish.

    Raises:
        InputError: it is neither a layer norm nor an RMS norm.
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
    """From a block's output projections to the logits of one model.

    Attributes:
        model: whose norms and head.
        after: in a block, the module path of the norm that each site's output goes through, None where it has none.
        final_norm: the norm before the head.
        problem: why there is no such path in this architecture, or "".
    """

    model: Model
    after: dict[Site, str | None]
    final_norm: nn.Module | None
    problem: str = ""

    def norm_after(self, site: Site, layer: int) -> nn.Module | None:
        """The norm that the site's output goes through before it is added."""
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
        """What vectors added to a site's output do to a token's logit, and to it minus the mean over the vocabulary.

        Args:
            vectors: what is added.
            site: to the output of which module.
            layer: in which layer.
            output: what the model has there, which freezes the norm after it.
            final_state: what enters its final norm, which freezes that one.
            tokens: whose logit, -1 where there is none (NaN then).

        Returns:
            Both in logits, before any soft cap or scaling of them, in float64.
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
    """Find the direct path of an architecture by watching one forward, and prove it on that forward.

    Proven is that each block adds the two projections' outputs, after the norms that were found, to what enters it
    and nothing else; and that the head reads the final norm of what leaves the last block.
    """
    blocks = [block_of(model.hf, model.anatomy, layer).whole for layer in range(model.n_layers)]
    mapping = model.adapter.component_mapping
    final_norm: nn.Module | None = model.hf.get_submodule(mapping["ln_final"].name) if "ln_final" in mapping else None
    seen = _watch(model, batch, blocks, final_norm)
    paths = {"attn": model.anatomy.o_proj, "mlp": model.anatomy.down_proj or model.anatomy.mlp}
    after = {site: _norm_of(seen, paths[site]) for site in paths}
    for layer in range(model.n_layers):
        entered, left = seen[f"{layer}/"]
        parts = [part for site in paths if (part := seen.get(f"{layer}/{after[site] or paths[site]}")) is not None]
        added = torch.stack([part[1] for part in parts]).sum(0) if parts else torch.zeros_like(left)
        if not _explained(added, left - entered):
            return DirectPath(model, {}, None, "its blocks do not simply add attention and MLP to the residual stream")
    last = seen[f"{model.n_layers - 1}/"][1]
    into_head = last if final_norm is None else seen["final"][1]
    if (final_norm is not None and not _explained(seen["final"][0], last)) or not _explained(
        into_head, seen["head"][0]
    ):
        return DirectPath(model, {}, None, "between its last block and its head is more than one norm")
    return DirectPath(model, {site: after[site] for site in sites}, final_norm)


def _watch(
    model: Model, batch: Batch, blocks: list[nn.Module], final_norm: nn.Module | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """What enters and leaves blocks (`0/`), modules in them (`0/mlp.down_proj`), the final norm and the head."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Any:
        def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            entered = args[0] if args else kwargs.get("hidden_states")
            left = output[0] if isinstance(output, tuple) else output
            if not isinstance(entered, Tensor) or not isinstance(left, Tensor):
                return
            if name == "head":  # it is given the scored positions only
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
    """The module of the first block that reads what leaves this one and changes it."""
    if f"0/{path}" not in seen:
        return None
    output = seen[f"0/{path}"][1]
    for name, (entered, left) in seen.items():
        place, _, reader = name.partition("/")
        reads = place == "0" and reader and entered.shape == output.shape == left.shape and torch.equal(entered, output)
        if reads and not torch.equal(left, output):
            return reader
    return None


def _explained(found: Tensor, whole: Tensor) -> bool:
    tolerance = max(TOLERANCE, 10 * torch.finfo(whole.dtype).eps)
    return bool(torch.linalg.norm(found.double() - whole.double()) <= tolerance * torch.linalg.norm(whole.double()))
