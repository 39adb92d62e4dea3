"""Task arithmetic on state dictionaries.

    theta_u = theta_0 - alpha (theta_ft - theta_base)

theta_0 is the model that forgets, the reference model. theta_ft is theta_base fine-tuned on the forget set, so that
their difference is the direction of the knowledge. In Ilharco et al.'s form theta_base is the pretrained model; in
MUSE's form it is theta_0 itself. With theta_base = theta_0, alpha = -1 gives theta_ft; alpha = 0 gives theta_0.

Source: Editing Models with Task Arithmetic, arXiv 2212.04089; MUSE, arXiv 2407.06460.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from unlearning.common.errors import InputError

StateDict = Mapping[str, Tensor]


def subtract_task_vector(
    reference: StateDict, finetuned: StateDict, base: StateDict, alpha: float
) -> dict[str, Tensor]:
    """Compute theta_u = theta_0 - alpha (theta_ft - theta_base).

    Tensors are computed one by one in at least float32. Integer tensors are those of theta_0. Tensors that are tied in
    theta_0 stay tied, and are computed once.

    Args:
        reference: State dictionary of theta_0.
        finetuned: State dictionary of theta_ft.
        base: State dictionary of theta_base.
        alpha: Factor of the task vector that is subtracted.

    Returns:
        State dictionary of theta_u, in the dtypes and on the devices of theta_0.

    Raises:
        InputError: The three have different names or shapes, or theta_ft equals theta_base.
    """
    for name, other in (("fine-tuned", finetuned), ("base", base)):
        _check_alike(reference, other, name)
    result: dict[str, Tensor] = {}
    tied: dict[tuple[int, ...], Tensor] = {}
    moved = False
    for name, ours in reference.items():
        memory = (ours.data_ptr(), *ours.shape, *ours.stride())
        if ours.numel() and memory in tied:
            result[name] = tied[memory]
            continue
        if not ours.is_floating_point():
            result[name] = ours.clone()
        else:
            wide = torch.promote_types(ours.dtype, torch.float32)
            vector = finetuned[name].to(ours.device, wide) - base[name].to(ours.device, wide)
            moved = moved or bool(vector.any())
            result[name] = (ours.to(wide) - alpha * vector).to(ours.dtype)
        tied[memory] = result[name]
    if not moved:
        raise InputError(
            "the task vector is zero: the fine-tuned weights equal the base weights. Set a higher `learning_rate` or "
            "more `epochs`."
        )
    return result


def _check_alike(reference: StateDict, other: StateDict, name: str) -> None:
    differing = sorted(reference.keys() ^ other.keys())
    if differing:
        missing = "lack" if differing[0] in reference else "have"
        raise InputError(
            f"the {name} weights {missing} {differing[0]}, unlike the reference weights ({len(differing)} names "
            "differ). Use checkpoints of one architecture."
        )
    for key, tensor in reference.items():
        if tensor.shape != other[key].shape:
            raise InputError(
                f"{key} has shape {list(tensor.shape)} in the reference model and {list(other[key].shape)} in the "
                f"{name} model. Use checkpoints of one architecture."
            )
