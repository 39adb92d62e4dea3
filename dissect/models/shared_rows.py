"""Compare models whose embeddings have different numbers of rows: resized for new tokens, or padded."""

import warnings
from collections.abc import Sequence

from dissect.models.model import Model
from unlearning.common.errors import InputError


def on_shared_rows(models: Sequence[Model]) -> list[Model]:
    """Cut the embeddings of models in memory to the rows that all of them have.

    A row that one model alone has takes probability in that model only, so no row beyond the shared ones is counted.

    Args:
        models: The base, then models that are compared with it. A model that is cut is changed in place.

    Returns:
        The models; those that were cut are checked again.

    Raises:
        InputError: A shared row stands for different tokens, or the base's tokenizer needs a row that is not shared.

    Warns:
        UserWarning: A model was cut.
    """
    rows = [_rows(model) for model in models]
    shared = min(rows)
    if max(rows) == shared or any(model.streamed is not None for model in models):
        return list(models)
    base = models[0]
    for model in models[1:]:
        ours, theirs = (_tokens(one, shared) for one in (base, model))
        different = sorted(number for number in ours.keys() & theirs.keys() if ours[number] != theirs[number])
        if different:
            raise InputError(
                f"{base.name} and {model.name} differ in vocabulary: {_rows(base)} and {_rows(model)} embeddings, and "
                f"token {different[0]} is {ours[different[0]]!r} and {theirs[different[0]]!r}; both must come from the "
                "same pretrained model"
            )
    special = [number for number in base.tokenizer.all_special_ids if number >= shared]
    if special:
        raise InputError(
            f"{base.name} uses the token {base.tokenizer.convert_ids_to_tokens(special[0])!r}, and only {shared} "
            "embeddings are shared by both models; name a base without the new tokens"
        )
    smaller = models[rows.index(shared)].name
    return [_cut(model, shared, smaller) if _rows(model) > shared else model for model in models]


def cut_to(model: Model, base: Model) -> Model:
    """Cut the embeddings of a model to the base's rows; a model with as many or fewer is returned as it is.

    Args:
        model: The model, which is changed in place.
        base: The base.

    Returns:
        The model; checked again if it was cut.

    Raises:
        InputError: A shared row stands for different tokens.
    """
    return on_shared_rows([base, model])[1] if _rows(model) > _rows(base) else model


def _rows(model: Model) -> int:
    return int(model.hf.config.get_text_config().vocab_size)


def _tokens(model: Model, shared: int) -> dict[int, str]:
    return {number: token for token, number in model.tokenizer.get_vocab().items() if number < shared}


def _cut(model: Model, shared: int, smaller: str) -> Model:
    warnings.warn(
        f"{model.name} has {_rows(model)} embeddings and {smaller} {shared}; only the {shared} that both have are "
        "compared",
        stacklevel=4,
    )
    model.hf.resize_token_embeddings(shared, mean_resizing=False)
    return Model.wrap(model.hf, model.tokenizer, name=model.name)
