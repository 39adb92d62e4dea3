"""The unlearning methods by name. A new method is a file beside these and an entry in `_ALL`.

Each file states the method's loss, the inputs that it needs and its source. Notation:

    J = gamma F + alpha R    the objective, which is minimised: F over forget examples, R over retain examples
    L_b                      negative log-likelihood of answer b, summed over its n_b tokens, in nats
    L_b^ref                  the same under the reference model, which is the model before training
    r_b = L_b^ref - L_b      log-likelihood ratio of model and reference model
    p_t, z_t                 probabilities and logits of the model at answer token t; y_t is the token
    CE                       cross-entropy, mean over answer tokens
    mean_b, mean_t           mean over the sequences or the answer tokens of a step batch
    sg                       stop-gradient
    R                        CE(retain) or KL(reference || model) at the retain answers (option `retain_loss`)
"""

from unlearning.common.errors import InputError, nearest
from unlearning.methods.altpo import ALTPO
from unlearning.methods.blur import BLUR
from unlearning.methods.ce_u import CE_U
from unlearning.methods.circuit_breakers import CIRCUIT_BREAKERS
from unlearning.methods.dpo import DPO
from unlearning.methods.elm import ELM
from unlearning.methods.finetune import FINETUNE
from unlearning.methods.ga import GA
from unlearning.methods.ga_forget_kl import GA_FORGET_KL
from unlearning.methods.grad_diff import GRAD_DIFF
from unlearning.methods.idk import IDK
from unlearning.methods.ilu import ILU
from unlearning.methods.jensun import JENSUN
from unlearning.methods.kto import KTO
from unlearning.methods.lat import LAT
from unlearning.methods.layered import LAYERED
from unlearning.methods.method import AnyMethod
from unlearning.methods.mudman import MUDMAN
from unlearning.methods.npo import NPO
from unlearning.methods.oracle import ORACLE
from unlearning.methods.pdu import PDU
from unlearning.methods.rmu import RMU
from unlearning.methods.sam_npo import SAM_NPO
from unlearning.methods.satimp import SATIMP
from unlearning.methods.simnpo import SIMNPO
from unlearning.methods.sure import SURE
from unlearning.methods.tar import TAR
from unlearning.methods.task_vector import TASK_VECTOR
from unlearning.methods.undial import UNDIAL
from unlearning.methods.undo import UNDO
from unlearning.methods.wga import WGA
from unlearning.methods.whp.method import WHP

_ALL: tuple[AnyMethod, ...] = (
    FINETUNE,
    GA,
    GA_FORGET_KL,
    GRAD_DIFF,
    IDK,
    JENSUN,
    DPO,
    ALTPO,
    NPO,
    SAM_NPO,
    SURE,
    TAR,
    ILU,
    LAT,
    KTO,
    SIMNPO,
    UNDIAL,
    ELM,
    CE_U,
    WGA,
    SATIMP,
    PDU,
    RMU,
    CIRCUIT_BREAKERS,
    TASK_VECTOR,
    BLUR,
    MUDMAN,
    WHP,
    LAYERED,
    ORACLE,
    UNDO,
)

METHODS: dict[str, AnyMethod] = {method.name: method for method in _ALL}


def get_method(name: str) -> AnyMethod:
    """Return the method of a name.

    Args:
        name: Name of the method, such as "npo".

    Returns:
        The method.

    Raises:
        InputError: No method has this name; the message names the nearest one.
    """
    if name not in METHODS:
        raise InputError(
            f"`method` must name a method, got {name!r}{nearest(name, METHODS)} (`unlearn methods` lists all)"
        )
    return METHODS[name]
