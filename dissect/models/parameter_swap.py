"""Make models and blocks that compute with some of another model's weights, without copies of tensors."""

from torch import Tensor, nn
from transformers import PreTrainedModel

from dissect.models.anatomy import Block, parts_of
from dissect.models.model import Model
from dissect.models.module_tree import tensor_at, with_values
from dissect.models.weights import Location, ParameterRows, row_dim


def restored_values(target: nn.Module, base: nn.Module, chosen: ParameterRows) -> dict[str, Tensor]:
    """Return the restored values of a target's parameters and buffers.

    Args:
        target: A model, or a part of one.
        base: The same module of the base.
        chosen: Names from these modules, each with its output rows, or None for all rows.

    Returns:
        For each parameter the base's values, or the target's with the chosen rows replaced by the base's.
    """
    values = {}
    for name, rows in chosen.items():
        ours, theirs = tensor_at(target, name), tensor_at(base, name)
        if rows is None:
            values[name] = theirs if theirs.device == ours.device else theirs.to(ours.device)
            continue
        dim = 0 if ours.dim() == 1 else row_dim(target.get_submodule(name.rpartition(".")[0]))
        rows = rows.to(ours.device)
        values[name] = ours.index_copy(dim, rows, theirs.to(ours.device).index_select(dim, rows))
    return values


def restored_block(ours: Block, theirs: Block, sites: frozenset[str], layer: int, model: Model) -> Block:
    """Return a block that computes with another block's weights at weight sites.

    Args:
        ours: The target's block.
        theirs: The donor's block.
        sites: Weight sites that are restored.
        layer: Index of the layer of both blocks.
        model: The target.

    Returns:
        The modules of the new block.
    """
    prefix = f"{model.anatomy.blocks}.{layer}."
    chosen = {name.removeprefix(prefix): rows for name, rows in model.weights.at(sites, layer).items()}
    return parts_of(with_values(ours.whole, restored_values(ours.whole, theirs.whole, chosen)), model.anatomy)


def restored_model(target: Model, donor: Model, sites: frozenset[str], location: Location) -> PreTrainedModel:
    """Return a target's Hugging Face model with the donor's weights at weight sites.

    Args:
        target: Model that is intervened on.
        donor: Source of the weights.
        sites: Weight sites that are restored.
        location: A layer, `before` the first block or `after` the last one.

    Returns:
        The new model; all other tensors are shared with the target.
    """
    return with_values(target.hf, restored_values(target.hf, donor.hf, target.weights.at(sites, location)))
