"""Find a model's norms, and what stands before and behind each, from one forward pass."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dissect.models.freedoms.kinds import WHOLE, Part

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm in a model.

    Attributes:
        path: Dotted path of the module.
        gain: Name of its weight; None if it has none.
        bias: Name of its bias; None if it has none.
        offset: What it adds to its weight.
        eps: Its epsilon, as `module.attribute`; None where the module does not hold it.
        source: Module with a matrix whose output it normalises; None where that is a sum of several.
        readers: Modules with a matrix that read its output.
    """

    path: str
    gain: str | None
    bias: str | None
    offset: float
    eps: str | None
    source: str | None
    readers: tuple[str, ...]

    def vectors(self, channels: Tensor | None = None, *, inverse: bool = False) -> Iterator[Part]:
        """Yield gain and bias; every element a channel of its own by default."""
        for name, offset in ((self.gain, self.offset), (self.bias, 0.0)):
            if name is not None:
                yield Part(name, WHOLE if channels is None else channels, inverse, offset)


@torch.no_grad()
def find_norms(hf: "PreTrainedModel", ids: Tensor) -> tuple[list[Norm], set[str]]:
    """Run the model, and note whose output each norm reads and which modules with a matrix read the norm's output.

    Args:
        hf: The model.
        ids: Tokens, [batch, position].

    Returns:
        The norms, and the paths of all modules that were run: those of an image tower are not.
    """
    ran: set[str] = set()
    # Tensors are recognised by their storage, so views and slices count; all are kept, so that none is used twice.
    inputs: dict[str, int] = {}
    outputs: dict[str, int] = {}
    kept: list[Tensor] = []

    def storage(values: Any) -> int | None:
        tensor = next((v for v in (values if isinstance(values, tuple) else (values,)) if isinstance(v, Tensor)), None)
        if tensor is None:
            return None
        kept.append(tensor)
        return tensor.untyped_storage().data_ptr()

    def note(path: str) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            ran.add(path)
            read, written = storage((*args, *kwargs.values())), storage(output)
            if read is not None and written is not None:
                inputs[path], outputs[path] = read, written

        return hook

    modules = {
        path: module
        for path, module in hf.named_modules()
        if not list(module.children()) or list(module.parameters(recurse=False))
    }
    handles = [module.register_forward_hook(note(path), with_kwargs=True) for path, module in modules.items()]
    try:
        hf(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    matrices = {path for path in inputs if any(p.dim() > 1 for p in modules[path].parameters(recurse=False))}
    found = []
    for path in inputs:
        module = modules[path]
        if path in matrices or "norm" not in type(module).__name__.lower():
            continue
        held = epsilons(module)
        names = {key for key, _ in module.named_parameters(recurse=False)}
        found.append(
            Norm(
                path=path,
                gain=f"{path}.weight" if "weight" in names else None,
                bias=f"{path}.bias" if "bias" in names else None,
                offset=_offset(module) if "weight" in names else 0.0,
                eps=f"{path}.{held[0][0]}" if len(held) == 1 else None,
                source=next((other for other in matrices if outputs[other] == inputs[path]), None),
                readers=tuple(other for other in matrices if inputs[other] == outputs[path]),
            )
        )
    return found, ran


def _offset(norm: nn.Module) -> float:
    """Return what a norm adds to its gain: its output for a gain of zero is not zero."""
    zeros = {  # in memory, also where the weights are on disk
        name: torch.zeros_like(values, device="cpu" if values.is_meta else None)
        for name, values in norm.named_parameters(recurse=False)
    }
    width = zeros["weight"].shape[-1]
    row = torch.arange(1.0, width + 1, device=zeros["weight"].device, dtype=zeros["weight"].dtype)
    return 0.0 if not functional_call(norm, zeros, (row.view(1, 1, -1),)).any() else 1.0


def share_epsilon(hf: "PreTrainedModel") -> None:
    """Write the norms' epsilon into the configuration where all have the same one, so that a checkpoint holds it."""
    norms = [module for module in hf.modules() if "norm" in type(module).__name__.lower()]
    found = {value for norm in norms for _, value in epsilons(norm)}
    config = hf.config.get_text_config()
    keys = [key for key, value in config.to_dict().items() if "eps" in key and isinstance(value, float)]
    if len(keys) == 1 and found and max(found) - min(found) <= 1e-12 * max(found):
        setattr(config, keys[0], max(found))


def epsilons(norm: nn.Module) -> list[tuple[str, float]]:
    """Return the attributes of a norm that hold an epsilon, with their values."""
    return [(key, value) for key, value in vars(norm).items() if "eps" in key and isinstance(value, float)]
