"""The methods by name. A new method is a file beside these and a line here."""

from unlearning.common.errors import InputError, nearest
from unlearning.methods.altpo import ALTPO
from unlearning.methods.blur import BLUR
from unlearning.methods.ce_u import CE_U
from unlearning.methods.dpo import DPO
from unlearning.methods.finetune import FINETUNE
from unlearning.methods.ga import GA
from unlearning.methods.grad_diff import GRAD_DIFF
from unlearning.methods.idk import IDK
from unlearning.methods.kto import KTO
from unlearning.methods.method import AnyMethod
from unlearning.methods.npo import NPO
from unlearning.methods.pdu import PDU
from unlearning.methods.rmu import RMU
from unlearning.methods.satimp import SATIMP
from unlearning.methods.simnpo import SIMNPO
from unlearning.methods.task_vector import TASK_VECTOR
from unlearning.methods.undial import UNDIAL
from unlearning.methods.wga import WGA
from unlearning.methods.whp.method import WHP

_ALL: tuple[AnyMethod, ...] = (
    FINETUNE,
    GA,
    GRAD_DIFF,
    IDK,
    DPO,
    ALTPO,
    NPO,
    KTO,
    SIMNPO,
    UNDIAL,
    CE_U,
    WGA,
    SATIMP,
    PDU,
    RMU,
    TASK_VECTOR,
    BLUR,
    WHP,
)

METHODS: dict[str, AnyMethod] = {method.name: method for method in _ALL}


def get_method(name: str) -> AnyMethod:
    """Look a method up.

    Raises:
        InputError: there is no such method; names the nearest one.
    """
    if name not in METHODS:
        raise InputError(f"no method {name!r}{nearest(name, METHODS) or ';'} `unlearn methods` lists them")
    return METHODS[name]
