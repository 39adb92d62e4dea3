"""The methods by name. A new method is a file beside these and a line here."""

from unlearning.errors import InputError
from unlearning.methods.finetune import FINETUNE
from unlearning.methods.grad_diff import GRAD_DIFF
from unlearning.methods.method import AnyMethod
from unlearning.methods.npo import NPO
from unlearning.options import nearest

METHODS: dict[str, AnyMethod] = {method.name: method for method in (FINETUNE, GRAD_DIFF, NPO)}


def get_method(name: str) -> AnyMethod:
    """Look a method up.

    Raises:
        InputError: there is no such method; names the nearest one.
    """
    if name not in METHODS:
        raise InputError(f"no method {name!r}{nearest(name, METHODS) or ';'} `unlearn methods` lists them")
    return METHODS[name]
