"""Models beside the one that trains, whose quantities a method reads."""

from pathlib import Path

from transformers import PreTrainedModel

from unlearning.checkpoints.load import load_tokenizer, load_weights, tokenizer_directory
from unlearning.checkpoints.locate import locate_checkpoint
from unlearning.common.errors import InputError
from unlearning.training.job import LoadedModel
from unlearning.training.named_content import tokenizer_hash


def load_beside(name: str, loaded: LoadedModel) -> PreTrainedModel:
    """Load a model that reads the same tokens as the one that trains, on its device and in its data type.

    Args:
        name: Directory, hub id or built-in name.
        loaded: The model that trains.

    Returns:
        The model, in eval mode and without gradients.

    Raises:
        InputError: It is missing or broken, or reads other tokens.
    """
    path = locate_checkpoint(name)
    _check_tokenizer(name, path, loaded)
    model = load_weights(path, device=loaded.model.device, dtype=loaded.model.dtype)
    sizes = [int(each.config.get_text_config().vocab_size) for each in (model, loaded.model)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"{name}: has {sizes[0]} tokens, and the model {sizes[1]}; their distributions cannot be compared. Name a "
            "model of the same family."
        )
    return model.requires_grad_(False)


def _check_tokenizer(name: str, path: Path, loaded: LoadedModel) -> None:
    try:
        tokenizer = load_tokenizer(tokenizer_directory(path))
    except InputError:
        return  # weights alone: their number of tokens is compared
    if tokenizer_hash(tokenizer, chat=False) != tokenizer_hash(loaded.tokenizer, chat=False):
        raise InputError(f"{name}: its tokenizer is not the model's, so it reads other tokens. Name another model.")
