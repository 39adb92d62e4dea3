"""Compare the configurations of two models by the fields that can change what is computed."""

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SAYS_NOTHING = frozenset(
    (
        *("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "tokenizer_class", "_experts_implementation"),
        *("_attn_implementation", "attn_implementation", "output_attentions", "output_hidden_states", "return_dict"),
    )
)
"""Fields of a configuration that do not change what a model computes here."""


_OF_TRAINING = re.compile(
    r"dropout|pdrop|_drop$|^initializer|^router_(aux|z)_loss|^output_router_logits$|^pretraining_tp$"
)
"""Fields that matter to training alone."""


def is_of_training(field: str) -> bool:
    """Return True if a field of a configuration changes nothing in a model that is only run."""
    return _OF_TRAINING.search(field) is not None


def differing_fields(hf: "PreTrainedModel", base: "PreTrainedModel") -> dict[str, str]:
    """Find fields of a model's configuration that differ from the base's.

    Args:
        hf: Hugging Face model.
        base: The base's.

    Returns:
        For each field what is in the two, in words, such as `rms_norm_eps = 1e-05 in its configuration, 1e-06 in the
        base's`.

    Examples:
        >>> import copy
        >>> from dissect import load_model
        >>> base = load_model("demo:base", device="cpu").hf
        >>> other = copy.copy(base)
        >>> other.config = copy.deepcopy(base.config)
        >>> other.config.rms_norm_eps = 0.5
        >>> list(differing_fields(other, base))
        ['rms_norm_eps']
    """
    ours, theirs = (_fields(model.config) for model in (hf, base))
    found = {}
    for name, value in ours.items():
        if name not in theirs:
            found[name] = f"a field {name} in its configuration that the base does not have"
        elif theirs[name] != value:
            found[name] = f"{name} = {value!r} in its configuration, {theirs[name]!r} in the base's"
    for name in theirs.keys() - ours.keys():
        found[name] = f"no field {name} in its configuration, which the base has"
    return found


def _fields(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name not in _SAYS_NOTHING}
