"""Optimizer steps on bfloat16 weights that small updates are not lost in.

A bfloat16 weight has 8 significant bits: an update of less than 1/256 of it is lost when it is rounded to the nearest.
Steps are therefore computed in float32, with float32 moments, and what is written back is either rounded up or down at
random, so that it is right in the mean ("stochastic"), or the nearest value of a float32 weight that is kept beside the
model's ("master").

Any optimizer that works on float32 parameters is used as it is, on stand-ins of the parameters.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

AT_ONCE = 2**26
"""Number of weights whose float32 stand-ins are in memory together: 512 MB with their gradients."""

Update = Literal["stochastic", "master"]


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round to one of the two nearest bfloat16 values, to the nearer one with the higher probability.

    Args:
        values: Float32.
        generator: Source of the draws, on the device of the values.

    Returns:
        Bfloat16 of the same shape, whose mean over draws is the value. A bfloat16 value is returned as it is.
    """
    # The lower 16 bits of a float32 are what a bfloat16 lacks: a draw that is added to them carries over as often as it
    # should. Signs are apart from magnitudes, so that both are rounded alike.
    bits = values.contiguous().view(torch.int32)
    draws = torch.randint(0, 2**16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    rounded = ((bits + draws) & -(2**16)).view(torch.float32)
    return torch.where(torch.isfinite(rounded), rounded, values).bfloat16()


class Bfloat16Optimizer(torch.optim.Optimizer):
    """Let an optimizer for float32 parameters train bfloat16 ones.

    Args:
        params: Parameters or groups of parameters.
        inner: Make the optimizer of the stand-ins from their groups.
        update: How a step is written back.
        seed: Seed of the draws. They are a function of seed, step and parameter alone, so that all processes draw the
            same and a resumed run goes on to the same bits.
        lr: Learning rate, which a schedule may change.
        weight_decay: Weight decay.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        inner: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        update: Update,
        seed: int,
        lr: float,
        weight_decay: float = 0.0,
    ) -> None:
        """Make the stand-ins, which are empty unless they are kept."""
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.update = update
        self.seed = seed
        self.n_steps = 0
        groups = []
        for group in self.param_groups:
            stand_ins = [torch.nn.Parameter(self._stand_in(parameter)) for parameter in group["params"]]
            groups.append({**group, "params": stand_ins})
        self.inner = inner(groups)

    def _stand_in(self, parameter: Tensor) -> Tensor:
        if self.update == "master":
            return parameter.detach().float().clone()
        return torch.empty(0, dtype=torch.float32, device=parameter.device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Make one step of the inner optimizer and write it back.

        Args:
            closure: Not supported.
        """
        assert closure is None
        self._pass_settings_on()
        for part in self._parts():
            for _, parameter, stand_in in part:
                assert parameter.grad is not None
                if self.update == "stochastic" or self.n_steps == 0:  # weights may have been changed since
                    stand_in.data = parameter.detach().float()
                stand_in.grad = parameter.grad.float()
            self.inner.step()
            for index, parameter, stand_in in part:
                stand_in.grad = None
                if self.update == "master":
                    parameter.copy_(stand_in)
                else:
                    parameter.copy_(round_stochastically(stand_in.detach(), self._generator(index, parameter.device)))
                    stand_in.data = self._stand_in(parameter)
        self.n_steps += 1

    def _pass_settings_on(self) -> None:
        """Give the inner optimizer the learning rates, which a schedule changes here."""
        for ours, theirs in zip(self.param_groups, self.inner.param_groups, strict=True):
            theirs.update({key: value for key, value in ours.items() if key != "params"})

    def _parts(self) -> Iterator[list[tuple[int, Tensor, Tensor]]]:
        """Yield the parameters with gradients, their stand-ins and their numbers, a part that fits in memory at a time.

        The inner optimizer leaves out stand-ins without gradients, which are those of the other parts.
        """
        part: list[tuple[int, Tensor, Tensor]] = []
        size = 0
        pairs = [
            pair
            for ours, theirs in zip(self.param_groups, self.inner.param_groups, strict=True)
            for pair in zip(ours["params"], theirs["params"], strict=True)
        ]
        for index, (parameter, stand_in) in enumerate(pairs):
            if parameter.grad is None:
                continue
            if part and size + parameter.numel() > AT_ONCE:
                yield part
                part, size = [], 0
            part.append((index, parameter, stand_in))
            size += parameter.numel()
        if part:
            yield part

    def _generator(self, index: int, device: torch.device) -> torch.Generator:
        number = hash((self.seed, self.n_steps, index)) % 2**63  # of whole numbers, the same in every process
        return torch.Generator(device).manual_seed(number)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the inner optimizer, and what else the next step depends on."""
        self._pass_settings_on()
        state = {**self.inner.state_dict(), "n_steps": self.n_steps}
        if self.update == "master":
            state["master"] = [p.detach() for group in self.inner.param_groups for p in group["params"]]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        rest = dict(state_dict)
        self.n_steps = int(rest.pop("n_steps"))
        masters = rest.pop("master", [])
        self.inner.load_state_dict(rest)
        stand_ins = [p for group in self.inner.param_groups for p in group["params"]]
        for stand_in, master in zip(stand_ins, masters, strict=bool(masters)):
            stand_in.data = master.to(stand_in.device, torch.float32).clone()
        for ours, theirs in zip(self.param_groups, self.inner.param_groups, strict=True):
            ours.update({key: value for key, value in theirs.items() if key != "params"})
