"""Where the time of a sweep goes: products with weights, attention, everything else that torch does, and Python."""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

KINDS = ("products with weights", "attention", "other tensor operations", "outside torch")

_PRODUCTS = ("linear", "mm", "addmm", "matmul", "bmm")


@dataclass(frozen=True)
class Part:
    """The time of one kind of work.

    Attributes:
        kind: One of `KINDS`.
        seconds: Wall time.
        flops: Multiplications and additions in products with weights, as torch counts them; 0 for everything else.
    """

    kind: str
    seconds: float
    flops: int


def account(run: Callable[[], Any]) -> list[Part]:
    """Time every operation of a call on the CPU, and count its floating-point operations in a second call.

    Watching adds some microseconds to each operation; they are counted in `outside torch`.

    Args:
        run: The call; it is made twice.

    Returns:
        One part for each of `KINDS`, in that order.
    """
    with FlopCounterMode(display=False) as counter:
        run()
    counts = counter.get_flop_counts()["Global"]
    products = sum(int(count) for operation, count in counts.items() if _kind(f"{operation}.") == KINDS[0])
    with _Watch() as watch:
        start = time.perf_counter()
        run()
        total = time.perf_counter() - start
    outside = total - sum(watch.seconds.values())
    return [Part(kind, watch.seconds.get(kind, outside), products if kind == KINDS[0] else 0) for kind in KINDS]


class _Watch(TorchDispatchMode):
    """Adds up the seconds of operations by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Tensor:
        start = time.perf_counter()
        result: Tensor = operation(*args, **(kwargs or {}))
        self.seconds[_kind(str(operation))] += time.perf_counter() - start
        return result


def _kind(operation: str) -> str:
    name = operation.split(".")[1] if operation.startswith("aten.") else operation
    if "attention" in name:
        return KINDS[1]
    return KINDS[0] if name in _PRODUCTS else KINDS[2]
