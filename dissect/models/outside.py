"""Find what a model could know outside its parameters: buffers, replaced code, hooks, tokens, configuration.

Attacks change parameters only, so a verdict on a model that keeps knowledge elsewhere would be wrong. A loaded model is
compared with a freshly made model of its class and configuration, and with the base. What can hold knowledge, or can
keep an attack from taking hold, is refused; what cannot, since no score depends on it, is only named.
"""

import inspect
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import GenerationConfig, PreTrainedModel

from dissect.models.configurations import differing_fields
from dissect.models.model import Model
from dissect.models.tokenizers import differences
from unlearning.checkpoints.load import without_bars
from unlearning.common.errors import InputError

Kind = Literal[
    "buffer", "parameter", "module", "forward", "hook", "code", "configuration", "generation config", "tokenizer"
]

REMOTE_CODE = "transformers_modules"
"""Package into which transformers puts model code that comes with a checkpoint."""

KNOWN_HOOKS = ("transformers", "accelerate", "transformer_lens")
"""Packages whose hooks on modules record or move activations, and put nothing into them."""

FORCES_TOKENS = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "constraints",
    "decoder_start_token_id",
    "force_words_ids",
    "forced_bos_token_id",
    "forced_decoder_ids",
    "forced_eos_token_id",
    "prefix_allowed_tokens_fn",
    "sequence_bias",
    "suppress_tokens",
    "watermarking_config",
)
"""Fields of a generation config that add, ban or force tokens."""

_TOLERANCE = 1e-5
"""Relative difference of a buffer computed on another device."""

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@dataclass(frozen=True)
class Finding:
    """Something outside a model's parameters.

    Attributes:
        kind: What it is.
        what: The same in words, such as `the buffer model.table, which LlamaForCausalLM does not have`.
        refused: Whether it can hold knowledge, or keep attacks from taking hold.
    """

    kind: Kind
    what: str
    refused: bool


def check_parameters_only(models: Mapping[str, Model]) -> tuple[str, ...]:
    """Check that models hold all that they know in their parameters.

    Args:
        models: Models in memory by role; `base` is one of them, and `control 2` counts as `control`.

    Returns:
        One sentence for each thing that is only named, such as a chat template that differs from the base's.

    Raises:
        InputError: A model has something outside its parameters that can hold knowledge; the message names the role.

    Examples:
        >>> from dissect import load_pair
        >>> pair = load_pair("demo:base", "demo:npo", device="cpu")
        >>> check_parameters_only({"base": pair.base, "unlearned": pair.unlearned})
        ()
    """
    notes = []
    for role, model in models.items():
        found = outside_parameters(model, models["base"])
        refused = [finding.what for finding in found if finding.refused]
        if refused:
            more = f", and {len(refused) - 1} more of this kind" if len(refused) > 1 else ""
            raise InputError(
                f"`{role.split()[0]}` must hold all that it knows in its parameters, got {model.name} with {refused[0]}"
                f"{more}. Attacks change parameters only: save it as a plain checkpoint of a transformers class"
            )
        notes += [f"{model.name} has {finding.what}" for finding in found]
    return tuple(notes)


def outside_parameters(model: Model, base: Model) -> list[Finding]:
    """Find what a model could know outside its parameters.

    Args:
        model: A model in memory.
        base: The base; the model itself is allowed.

    Returns:
        What was found, the refused first.
    """
    fresh = _freshly_made(model.hf)
    found = [
        *_code(model.hf),
        *_trees(model.hf, fresh),
        *_tensors(model.hf, fresh, base.hf),
        *_replaced(model.hf, fresh),
        *_hooks(model.hf),
        *(Finding("configuration", what, False) for what in differing_fields(model.hf, base.hf).values()),
        *_generation_config(model.hf),
        *_tokenizer(model, base),
    ]
    return sorted(found, key=lambda finding: not finding.refused)


class _ParametersOnMeta(TorchFunctionMode):
    """Allocates what `torch.empty` makes, such as the weights of linear layers, on the meta device: it takes no memory.

    Buffers are computed from other functions (`arange`, `ones`), so they hold values.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*args, **{**(kwargs or {}), **({"device": "meta"} if func is torch.empty else {})})


def _freshly_made(hf: PreTrainedModel) -> PreTrainedModel | None:
    """Return a model of the same class and configuration, large weights on the meta device; None if it cannot be made.

    The random generator is left as it was.
    """
    state = torch.get_rng_state()
    try:
        with without_bars(), _ParametersOnMeta():
            return type(hf)(hf.config)
    except Exception:  # any code may run here, and a model that cannot be made is reported
        return None
    finally:
        torch.set_rng_state(state)


def _code(hf: PreTrainedModel) -> Iterator[Finding]:
    """Find code that is not of transformers."""
    of_class = type(hf).__module__
    if of_class.split(".")[0] == REMOTE_CODE:
        yield Finding("code", f"the class {type(hf).__name__}, whose code comes with the checkpoint", True)
        return
    if of_class.split(".")[0] != "transformers":
        yield Finding("code", f"the class {type(hf).__name__} of {of_class}, whose code was not checked", False)
    if getattr(hf.config, "auto_map", None):
        yield Finding("code", "model code in its configuration (auto_map), which was not run", False)
    directory = Path(hf.name_or_path or "/nowhere")
    files = sorted(file.name for file in directory.glob("*.py")) if directory.is_dir() else []
    if files:
        yield Finding("code", f"code beside its weights ({', '.join(files)}), which was not run", False)


def _trees(hf: PreTrainedModel, fresh: PreTrainedModel | None) -> Iterator[Finding]:
    """Find modules and parameters that a freshly made model does not have."""
    if fresh is None:
        yield Finding("module", f"a class ({type(hf).__name__}) that cannot be made anew to compare with", True)
        return
    ours, expected = dict(hf.named_modules()), dict(fresh.named_modules())
    for name, module in ours.items():
        if name not in expected:
            what = f"the module {name} ({type(module).__name__}), which {type(hf).__name__} does not have"
            yield Finding("module", what, True)
        elif type(module) is not type(expected[name]):
            what = f"a {type(module).__name__} as the module {name}, a {type(expected[name]).__name__} in its class"
            yield Finding("module", what, True)
    known = dict(fresh.named_parameters(remove_duplicate=False))
    for name, parameter in hf.named_parameters(remove_duplicate=False):
        if name not in known:
            yield Finding("parameter", f"the parameter {name}, which {type(hf).__name__} does not have", True)
        elif type(parameter) is not nn.Parameter:
            yield Finding("parameter", f"the parameter {name} of the tensor class {type(parameter).__name__}", True)


def _tensors(hf: PreTrainedModel, fresh: PreTrainedModel | None, base: PreTrainedModel) -> Iterator[Finding]:
    """Find tensors that are no parameters and do not follow from the configuration."""
    expected = {} if fresh is None else _other_tensors(fresh)
    of_base = _other_tensors(base)
    for name, tensor in _other_tensors(hf).items():
        if name not in expected:
            yield Finding("buffer", f"the buffer {name}, which {type(hf).__name__} does not have", True)
        elif not _same(tensor, expected[name]):
            follows = name in of_base and _same(tensor, of_base[name])
            moves = name.endswith("inv_freq") and _rope_moves(hf.get_submodule(name.rpartition(".")[0]))
            what = f"values in the buffer {name} that do not follow from its configuration"
            yield Finding("buffer", what, not (follows or moves))


def _other_tensors(hf: PreTrainedModel) -> dict[str, Tensor]:
    """Return buffers, persistent or not, and tensors that are plain attributes of a module, by dotted name."""
    found: dict[str, Tensor] = dict(hf.named_buffers(remove_duplicate=False))
    known = {id(tensor) for tensor in (*hf.parameters(), *found.values())}
    for name, module in hf.named_modules():
        for key, value in vars(module).items():
            for index, tensor in enumerate(_in_containers(value)):
                if id(tensor) not in known:
                    found[f"{name}.{key}" + (f"[{index}]" if index else "")] = tensor
    return found


def _in_containers(value: Any) -> Iterator[Tensor]:
    """Return the tensors in an attribute: itself, or in a list, tuple or dict."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        yield from (one for one in value if isinstance(one, Tensor))
    elif isinstance(value, dict):
        yield from (one for one in value.values() if isinstance(one, Tensor))


def _same(tensor: Tensor, other: Tensor) -> bool:
    """Return whether two buffers are equal, up to a conversion of one of them to half precision and back."""
    if tensor.shape != other.shape or tensor.is_meta or other.is_meta:
        return False
    tensor, other = tensor.detach().cpu(), other.detach().cpu()
    if not tensor.is_floating_point():
        return torch.equal(tensor, other)
    close = partial(torch.allclose, rtol=_TOLERANCE, atol=0.0, equal_nan=True)
    halves = (tensor.dtype, torch.bfloat16, torch.float16)
    return any(close(tensor.double(), other.to(half).double()) for half in halves)


def _rope_moves(module: nn.Module) -> bool:
    """Return whether a rotary embedding computes its frequencies anew for long texts."""
    return getattr(module, "rope_type", None) in ("dynamic", "longrope")


def _replaced(hf: PreTrainedModel, fresh: PreTrainedModel | None) -> Iterator[Finding]:
    """Find methods that were replaced, on a module or on its class."""
    expected = {} if fresh is None else dict(fresh.named_modules())
    for name, module in hf.named_modules():
        shown = name or "the model"
        by_accelerate = type(getattr(module, "_hf_hook", None)).__module__.split(".")[0] == "accelerate"
        for key, value in vars(module).items():
            if not callable(value) or not callable(getattr(type(module), key, None)):
                continue
            if key in vars(expected.get(name, module)) and name in expected:
                continue
            what = f"another {key} on {shown} than that of its class"
            yield Finding("forward", what, not (by_accelerate and key == "forward"))
        forward = inspect.unwrap(type(module).forward)
        if getattr(forward, "__module__", None) not in {parent.__module__ for parent in type(module).__mro__}:
            what = f"the forward of {getattr(forward, '__module__', None)} in {type(module).__name__} ({shown})"
            yield Finding("forward", what, True)


def _hooks(hf: PreTrainedModel) -> Iterator[Finding]:
    """Find hooks on modules and parameters."""
    everywhere = [hook for kind in _HOOKS for hook in getattr(nn.modules.module, f"_global{kind}").values()]
    if everywhere:
        yield Finding("hook", f"{len(everywhere)} hooks of torch on every module", True)
    for name, module in hf.named_modules():
        hooks = itertools.chain.from_iterable(getattr(module, kind).values() for kind in _HOOKS)
        foreign = [hook for hook in hooks if _package(hook) not in KNOWN_HOOKS]
        if foreign:
            yield Finding("hook", f"a hook of {_package(foreign[0])} on {name or 'the model'}", True)
    for name, parameter in hf.named_parameters():
        if parameter._backward_hooks or parameter.__dict__.get("_post_accumulate_grad_hooks"):
            yield Finding("hook", f"a hook on the gradient of the parameter {name}", True)


def _package(hook: Any) -> str:
    while isinstance(hook, partial):
        hook = hook.func
    return str(getattr(hook, "__module__", None) or type(hook).__module__).split(".")[0]


def _generation_config(hf: PreTrainedModel) -> Iterator[Finding]:
    """Find what a generation config adds to texts or forbids; texts here are generated without it."""
    config, plain = hf.generation_config, GenerationConfig()
    for name in FORCES_TOKENS:
        value = getattr(config, name, None)
        if value not in (None, [], {}) and value != getattr(plain, name, None):
            what = f"{name} in its generation config; no score depends on it, but texts generated elsewhere do"
            yield Finding("generation config", what, False)


def _tokenizer(model: Model, base: Model) -> Iterator[Finding]:
    """Find where the tokenizer differs from the base's, which is used for all models."""
    for part in differences(model.tokenizer, base.tokenizer):
        what = f"another {part} than the base's tokenizer, which is used for all models"
        yield Finding("tokenizer", what, False)
