"""Task vectors: arithmetic on checkpoints.

    theta_u = theta_0 - alpha (theta_ft - theta_base)

theta_0 is the model that forgets. theta_ft is theta_base fine-tuned on the forget set, so that their difference is the
direction of the knowledge. In Ilharco et al.'s form theta_base is the pretrained model; in MUSE's it is theta_0 itself.
With theta_base = theta_0, alpha = -1 gives theta_ft, and alpha = 0 leaves theta_0 in both forms.

Source: Editing Models with Task Arithmetic, arXiv 2212.04089; MUSE, arXiv 2407.06460.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from unlearning.common.errors import InputError

StateDict = Mapping[str, Tensor]


def subtract_task_vector(start: StateDict, finetuned: StateDict, base: StateDict, alpha: float) -> dict[str, Tensor]:
    """The state dictionary of theta_u, in the dtypes and on the devices of theta_0.

    Computed tensor by tensor in float32 at least. Tensors of integers are theta_0's; tensors that theta_0 ties stay
    tied, and are computed once.

    Args:
        start: theta_0.
        finetuned: theta_ft.
        base: theta_base.
        alpha: how far to go against the task vector.

    Raises:
        InputError: the three have different names or shapes, or theta_ft is theta_base.
    """
    for name, other in (("fine-tuned", finetuned), ("base", base)):
        _check_alike(start, other, name)
    result: dict[str, Tensor] = {}
    tied: dict[tuple[int, ...], Tensor] = {}
    moved = False
    for name, ours in start.items():
        place = (ours.data_ptr(), *ours.shape, *ours.stride())
        if ours.numel() and place in tied:
            result[name] = tied[place]
            continue
        if not ours.is_floating_point():
            result[name] = ours.clone()
        else:
            wide = torch.promote_types(ours.dtype, torch.float32)
            vector = finetuned[name].to(ours.device, wide) - base[name].to(ours.device, wide)
            moved = moved or bool(vector.any())
            result[name] = (ours.to(wide) - alpha * vector).to(ours.dtype)
        tied[place] = result[name]
    if not moved:
        raise InputError("the task vector is zero: the fine-tuned weights are the base's; train longer")
    return result


def _check_alike(start: StateDict, other: StateDict, name: str) -> None:
    differing = sorted(start.keys() ^ other.keys())
    if differing:
        missing = "lack" if differing[0] in start else "have"
        raise InputError(
            f"the {name} weights {missing} {differing[0]}, unlike those that they are subtracted from "
            f"({len(differing)} names differ); take checkpoints of one architecture"
        )
    for key, tensor in start.items():
        if tensor.shape != other[key].shape:
            raise InputError(
                f"{key} is {list(tensor.shape)} in the start model and {list(other[key].shape)} in the {name} one; "
                "take checkpoints of one architecture"
            )
