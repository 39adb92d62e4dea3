"""Read and replace a Hugging Face model's activations at sites, by plain torch hooks."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from dissect.models.anatomy import Anatomy, Block, block_of
from dissect.models.sites import Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Act = Callable[[Tensor], Tensor | None]
"""A function of an activation [batch, position, width]; what it returns, if it is not None, replaces the activation."""


@contextmanager
def hooked(
    hf: "PreTrainedModel", anatomy: Anatomy, places: Iterable[tuple[Site, int, Act]], *, shape: tuple[int, ...]
) -> Iterator[None]:
    """Call functions with activations of a model while the context is open.

    Args:
        hf: Hugging Face model.
        anatomy: Module paths of its blocks.
        places: Sites and layers, each with the function that is called with its activation.
        shape: Number of rows and positions of the batch.

    Yields:
        Nothing; the hooks are removed at the end, also after an error.
    """
    with ExitStack() as stack:
        for site, layer, act in places:
            module = module_of(block_of(hf, anatomy, layer), site)
            assert module is not None, f"no {site.name} in layer {layer}"
            if site.is_input:
                handle = module.register_forward_pre_hook(partial(_on_input, act=act, shape=shape), with_kwargs=True)
            else:
                handle = module.register_forward_hook(partial(_on_output, act=act, shape=shape))
            stack.callback(handle.remove)
        yield


def module_of(block: Block, site: Site) -> nn.Module | None:
    """Return the module of a block that a site is the output of, or the input; None if the block has none."""
    module: nn.Module | None = getattr(block, site.part)
    return module


def _on_input(
    _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, act: Act, shape: tuple[int, ...]
) -> Any:
    first = next(iter(kwargs), "")  # where all arguments are named
    new = _act(args[0] if args else kwargs[first], act, shape)
    if new is None:
        return None
    return ((new, *args[1:]), kwargs) if args else (args, kwargs | {first: new})


def _on_output(_module: nn.Module, _args: Any, output: Any, *, act: Act, shape: tuple[int, ...]) -> Any:
    new = _act(states_of(output), act, shape)
    return None if new is None else with_states(output, new)


def _act(states: Tensor, act: Act, shape: tuple[int, ...]) -> Tensor | None:
    """Call a function with [batch, position, width], also if the module sees the first two as one dimension."""
    flat = states.dim() == 2 and len(states) == shape[0] * shape[1]
    new = act(states.view(*shape, -1) if flat else states)
    return new if new is None or not flat else new.flatten(0, 1)


def states_of(output: Any) -> Tensor:
    """Return the states among what a block or one of its modules returns: a tensor, or the first of several things."""
    states: Tensor = output[0] if isinstance(output, tuple | list) else output
    return states


def with_states(output: Any, states: Tensor) -> Any:
    """Return what a module returned, with other states in it."""
    return type(output)([states, *output[1:]]) if isinstance(output, tuple | list) else states
