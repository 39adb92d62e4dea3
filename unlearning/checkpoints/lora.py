"""Low-rank adapters (LoRA, arXiv 2106.09685): add one to a model, save and restore it, and merge it into its base.

An adapter on disk is a directory as peft writes it: `adapter_config.json`, which names the base, and
`adapter_model.safetensors`. A training run of this package also writes the base's content hash there, as `base_weights`
in `unlearning.json`, so that an adapter is never merged into another base of the same shapes; and the bits that the
base was quantized to, as `base_bits`, so that an adapter is merged into the same values.
"""

import copy
import dataclasses
import json
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from unlearning.checkpoints.adapter_patterns import limit_patterns
from unlearning.checkpoints.hashing import content_hash
from unlearning.checkpoints.headers import read_headers
from unlearning.checkpoints.locate import ADAPTER_CONFIG, PICKLED, RECORD, WEIGHTS, split_revision
from unlearning.checkpoints.quantized import check_factors, quiet_bitsandbytes
from unlearning.checkpoints.quantized_base import round_to_bits
from unlearning.common.errors import InputError
from unlearning.common.patterns import searcher

BASE_WEIGHTS = "base_weights"
BASE_BITS = "base_bits"
ALL_LINEAR = "all-linear"

_TWICE = (".modules_to_save.weight", ".original_module.weight")
"""Ends of the names under which peft stores resized embeddings a second time if they are saved modules."""


def add_adapter(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: str | list[str] = ALL_LINEAR,
    base: str | None = None,
    seed: int = 0,
) -> None:
    """Add a LoRA adapter to a model, in place, and freeze everything else: W becomes W + (alpha / rank) B A.

    B starts at zero, so the model computes what it computed before. The model keeps its class and thus the signature of
    its forward.

    Args:
        model: Any model that transformers loads.
        rank: Rank of B A.
        alpha: Numerator of the adapter's scale.
        dropout: Probability of dropping an input of A in training.
        targets: Regular expression that the whole name of an adapted module matches, or the names themselves. The
            default adapts every linear layer but the output embedding, whatever the architecture calls the layers.
        base: Name of the base that the saved adapter gives; None takes the name that the model was loaded from.
        seed: Random seed of A's initial values.

    Raises:
        InputError: peft is not installed, or the expression is broken, matches no module, or matches a module that
            cannot be adapted.
    """
    require_peft()
    from peft import LoraConfig

    adapted = targets if targets == ALL_LINEAR or not isinstance(targets, str) else _matching(model, targets)
    scale: Any = alpha  # peft annotates an integer, and takes any number
    config = LoraConfig(
        r=rank, lora_alpha=scale, lora_dropout=dropout, target_modules=adapted, bias="none", task_type="CAUSAL_LM"
    )
    tied = _tied_ends(model)
    with torch.random.fork_rng(devices=[]), quiet_bitsandbytes(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # peft corrects the setting for GPT-2 by itself
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")  # in our words below
        torch.manual_seed(seed)
        try:
            model.add_adapter(config)
        except Exception as error:  # re.error, and ValueError or others from peft for a module that it cannot adapt
            raise InputError(
                f"`lora_targets` must be a regular expression of whole module names, got {targets!r} "
                f"({_first_line(error)}). Write one such as {_some_linear(model)}"
            ) from None
    name, revision = split_revision(base or str(model.name_or_path))
    for end in tied.intersection(adapted if isinstance(adapted, list) else ()):
        warnings.warn(
            f"`lora_targets` adapts {end}, which this model ties to its other embedding. The adapter changes that one "
            "only, so the trained model is no longer tied; leave it out to keep them equal",
            stacklevel=2,
        )
    added: Any = model.peft_config["default"]
    added.base_model_name_or_path, added.revision = _durable(name), revision


def _matching(model: PreTrainedModel, targets: str) -> list[str]:
    """Return the names of the modules that an expression matches.

    peft would search without a limit on time, by an engine that takes for ever where ours may not.
    """
    try:
        matches = searcher("lora_targets", targets, whole=True)
    except InputError as error:
        raise InputError(f"{error}. Write one such as {_some_linear(model)}") from None
    adapted = [name for name, _ in model.named_modules() if matches(name)]
    if not adapted:
        raise InputError(
            f"`lora_targets` must match the whole name of a module, got {targets!r}. Write one such as "
            f"{_some_linear(model)}"
        )
    return adapted


def save_adapter(model: PreTrainedModel, directory: Path, *, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Write a model's adapter so that peft's `PeftModel.from_pretrained` and `load_weights` can read it.

    `model.save_pretrained` writes the same, but asks the hub for the base's vocabulary size.

    Args:
        model: Model that `add_adapter` was called on.
        directory: Directory of the adapter; made if it is missing.
        state_dict: The model's whole state dictionary if its parameters are sharded over ranks.
    """
    from peft import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(model, state_dict=state_dict, save_embedding_layers=False)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(
        {f"base_model.model.{name}": tensor.cpu().contiguous() for name, tensor in tensors.items()},
        directory / WEIGHTS,
        metadata={"format": "pt"},
    )
    config: Any = copy.copy(model.peft_config["default"])
    config.inference_mode = True
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)  # the file is the same from run to run
    config.save_pretrained(str(directory))


def restore_adapter(model: PreTrainedModel, directory: Path) -> None:
    """Load saved weights into the adapter that `add_adapter` made.

    Args:
        model: Model that `add_adapter` was called on.
        directory: Directory of the saved adapter.

    Raises:
        InputError: The saved adapter has other tensors than the model's, or stores them as integers.
    """
    from peft import set_peft_model_state_dict

    prefix = "base_model.model."
    check_stored_adapter(model, directory, prefix=prefix)
    tensors = {name.removeprefix(prefix): tensor for name, tensor in load_file(directory / WEIGHTS).items()}
    loaded: Any = set_peft_model_state_dict(model, tensors)
    missing = [name for name in loaded.missing_keys if ".lora_" in name]
    if missing or loaded.unexpected_keys:
        raise InputError(
            f"{directory}: the saved adapter has other tensors than the model's, such as "
            f"{[*missing, *loaded.unexpected_keys][0]}"
        )


def merge_adapter(path: Path, base_path: Path, base: PreTrainedModel) -> PreTrainedModel:
    """Merge a saved adapter into its base, in place.

    Args:
        path: Directory of the adapter.
        base_path: Directory that the base was loaded from.
        base: The loaded base, in float32 or wider.

    Returns:
        The base with the adapter's update in its weights.

    Raises:
        InputError: The base is not the one that the adapter was trained on, the adapter does not fit it or cannot be
            merged, or peft is not installed.
    """
    require_peft()
    record = _read_record(path)
    _check_base(record.get(BASE_WEIGHTS), path, base_path, base)
    if (bits := record.get(BASE_BITS)) is not None:
        if bits not in (4, 8):
            raise InputError(f"{path / RECORD}: {BASE_BITS} must be 4 or 8, got {bits!r}; copy it again")
        round_to_bits(base, bits)
    _fit_embeddings(path, base_path, base)
    merged = _merge(path, base_path, base)
    merged.requires_grad_(True)
    merged.name_or_path = str(path)
    return merged


def _read_record(path: Path) -> dict[str, Any]:
    """Read what a training run recorded beside its adapter; return nothing if another program wrote the adapter."""
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _check_base(expected: str | None, path: Path, base_path: Path, base: PreTrainedModel) -> None:
    """Check that the base's weights are those that the adapter was trained on, if the adapter records their hash."""
    if expected and expected != content_hash(base, name=str(base_path)):
        raise InputError(
            f"{path}: this adapter was trained on another base: the weights of {base_path} have another hash; put the "
            f"right base there, or name it in {ADAPTER_CONFIG}"
        )


def _fit_embeddings(path: Path, base_path: Path, base: PreTrainedModel) -> None:
    """Give a base, in place, as many embeddings as the adapter was trained with, if the adapter holds all of them.

    Raises:
        InputError: The adapter was trained with another number of embeddings, and holds only one of the two matrices.
    """
    first, last = _ends(base)
    rows = first.weight.shape[0]
    shapes = _embeddings_in(path, base)
    if all(shape == rows for shape in shapes.values()):
        return
    found = next(iter(shapes.values()))
    tied = last is None or last.weight is first.weight
    if set(shapes.values()) != {found} or not (tied or len(shapes) == 2):
        raise InputError(
            f"{path}: was trained with {found} embeddings, its base {base_path} has {rows}, and the adapter does not "
            "hold all of them; save it again with save_embedding_layers=True, or name the base with its new tokens"
        )
    base.resize_token_embeddings(found, mean_resizing=False)
    warnings.warn(
        f"{path}: was trained with {found} embeddings, its base {base_path} has {rows}; those of the adapter are used",
        stacklevel=4,
    )


def _embeddings_in(path: Path, base: PreTrainedModel) -> dict[str, int]:
    """Return the number of rows of the embedding matrices that an adapter holds, by the module's name in the base."""
    file = path / WEIGHTS
    if not file.is_file():
        return {}  # pickled; peft compares the shapes
    ends = [module for module in _ends(base) if module is not None]
    names = [name for name, module in base.named_modules() if any(module is end for end in ends)]
    rows: dict[str, int] = {}
    with safe_open(file, framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118
            for name in names:
                inner = key.removeprefix(f"base_model.model.{name}.")
                if inner != key and inner.endswith("weight") and ".lora_" not in f".{inner}":
                    rows[name] = max(rows.get(name, 0), tensors.get_slice(key).get_shape()[0])
    return rows


def _ends(model: PreTrainedModel) -> tuple[Any, Any]:
    """Return the input and the output embedding; the latter may be None."""
    return model.get_input_embeddings(), model.get_output_embeddings()


def _tied_ends(model: PreTrainedModel) -> set[str]:
    """Return the names of the input and the output embedding if they are one parameter."""
    first, last = _ends(model)
    if last is None or getattr(first, "weight", None) is not last.weight:
        return set()
    return {name for name, module in model.named_modules() if module is first or module is last}


def _untie(model: torch.nn.Module) -> None:
    """Give every module its own copy of a parameter that several share: a merge would change it in all of them."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) in seen:
                module._parameters[name] = torch.nn.Parameter(parameter.detach().clone(), requires_grad=False)
            seen.add(id(parameter))


def _tie_again(model: PreTrainedModel) -> None:
    """Tie the embeddings of a merged model again if they are still equal, and let the configuration say which."""
    first, last = _ends(model)
    equal = torch.equal(first.weight.detach(), last.weight.detach())
    if equal:
        last.weight = first.weight
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = equal


def _merge(path: Path, base_path: Path, base: PreTrainedModel) -> PreTrainedModel:
    from peft import PeftModel

    misfit = f"{path}: does not fit its base {base_path}"
    config = _read_config(path)
    limit_patterns(config, base, path / ADAPTER_CONFIG)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # everything that peft warns of here is refused below, and ties are undone
        with torch.random.fork_rng(devices=[]):  # peft draws values and overwrites them
            with _in_one_line(misfit, _OTHER_BASE):
                model = PeftModel(base, config)
            check_stored_adapter(model, path)
            with _in_one_line(misfit, _OTHER_BASE):
                loaded = model.load_adapter(str(path), "default", torch_device="cpu")
        tied = _ends(base)[1] is not None and base.config.get_text_config().tie_word_embeddings
        _untie(model)
        unexpected = [key for key in loaded.unexpected_keys if not key.endswith(_TWICE)]
        misplaced = [*loaded.missing_keys, *unexpected]
        if misplaced:
            raise InputError(
                f"{misfit}: {len(loaded.missing_keys)} tensors are missing and {len(unexpected)} are not part of it, "
                f"such as {misplaced[0]}; {_OTHER_BASE}"
            )
        _check_finite(model, path)
        with _in_one_line(f"{path}: cannot be merged into its base {base_path}", "train it without that"):
            merged: Any = model.merge_and_unload(safe_merge=True)
            if tied:
                _tie_again(merged)
    assert isinstance(merged, PreTrainedModel)
    return merged


_OTHER_BASE = f"name the base that it was trained on, or copy {ADAPTER_CONFIG} and the weights again"


@contextmanager
def _in_one_line(problem: str, mend: str) -> Iterator[None]:
    """Raise every error of peft, which may be of any class, as an InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # peft raises RuntimeError, ValueError, TypeError, KeyError, AttributeError
        raise InputError(f"{problem}: {_mismatch(error)}; {mend}") from None


def _read_config(path: Path) -> Any:
    """Read an adapter's configuration, and check what peft does not."""
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    file = path / ADAPTER_CONFIG
    stated = json.loads(file.read_text(encoding="utf-8"))
    kind = stated.get("peft_type")
    if not isinstance(kind, str) or kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise InputError(
            f"{file}: peft_type must be a kind of adapter that the installed peft knows, such as LORA, got {kind!r}; "
            "copy it again, or install a newer peft"
        )
    with _in_one_line(f"{file}: peft cannot read it", "copy it again"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fields that it does not know, whatever they say
        config = PeftConfig.from_pretrained(str(path))
    fields = {field.name for field in dataclasses.fields(config)}
    unknown = sorted(name for name, value in stated.items() if name not in fields and value)  # null and false are off
    if unknown:
        warnings.warn(
            f"{file}: the installed peft {version('peft')} does not know {', '.join(unknown)}, so the adapter is read "
            "without; install the peft that wrote it",
            stacklevel=2,
        )
    if config.is_prompt_learning:
        raise InputError(f"{path}: a {config.peft_type} adapter changes no weights, so it cannot be merged into them")
    for field in dataclasses.fields(config):
        value, is_number = getattr(config, field.name), type(field.default) in (int, float)
        optional = value is None and ("None" in str(field.type) or "Optional" in str(field.type))
        if is_number and not optional and not (type(value) in (int, float) and math.isfinite(value)):
            raise InputError(f"{file}: {field.name} must be a number, got {value!r}; copy it again")
    config.inference_mode = True
    return config


def check_stored_adapter(model: Any, path: Path, *, prefix: str = "") -> None:
    """Check that the weights of a saved adapter are stored as floats of 16 bits or more, before they are read.

    Args:
        model: Model with the same adapter, whatever its values: it says which tensors are floats.
        path: Directory of the saved adapter.
        prefix: What the names on disk begin with, and those in the model do not.

    Raises:
        InputError: A weight is stored as an integer or an 8-bit float.
    """
    from peft import get_peft_model_state_dict

    inside = get_peft_model_state_dict(model, save_embedding_layers=False)
    wanted = {f"{prefix}{name}": tensor for name, tensor in inside.items()}
    file = path / WEIGHTS
    check_factors(read_headers(file if file.is_file() else path / PICKLED), wanted, path)


def _check_finite(model: Any, path: Path) -> None:
    from peft import get_peft_model_state_dict

    for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items():
        if not tensor.isfinite().all():
            raise InputError(
                f"{path}: the adapter's tensor {name} holds a value that is not finite; copy it again, or train it anew"
            )


def _mismatch(error: Exception) -> str:
    """Return the error's first line that names a tensor of another size, or else its first line."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line.rstrip(".") for line in lines if "size mismatch" in line), _first_line(error))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _some_linear(model: PreTrainedModel) -> str:
    """Return an expression that matches: modules called like the last one within a block that has a matrix."""
    names = [
        name
        for name, module in model.named_modules()
        if "." in name and getattr(module, "weight", None) is not None and module.weight.dim() == 2
    ]
    return rf".*\.{names[-1].rpartition('.')[2]}" if names else ALL_LINEAR


def _durable(name: str) -> str:
    """Return a directory's absolute path, which the adapter finds from anywhere; return any other name unchanged."""
    path = Path(name).expanduser()
    return str(path.resolve()) if name and path.is_dir() else name


def require_peft() -> None:
    """Import peft, or raise InputError with the command that installs it."""
    if find_spec("peft") is None:
        raise InputError("adapters need peft, which is not installed: pip install 'dissect-unlearning[lora]'")
    with quiet_bitsandbytes():  # peft imports it
        import peft  # noqa: F401
