"""The fastest that this machine multiplies the model's own matrices: the ceiling that a share of peak is of."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.functional import linear

CHUNKS = (256, 512, 1024, 2048, 4096)
"""Tokens multiplied at once."""

Rates = dict[tuple[int, int, int], float]
"""FLOP/s of each (inputs, outputs, tokens)."""

_SECONDS = 0.05
"""Least length of one timing, so that a clock tick, a kernel launch or a short burst is small beside it."""


class GemmProbe:
    """Times products of tokens with the weights of a model's linear layers, round by round.

    Args:
        config: Hugging Face configuration of a Llama, for its shapes.
        device: Where to measure.
        dtype: Type of the numbers.
        chunks: Numbers of tokens.
    """

    def __init__(
        self, config: Any, *, device: torch.device, dtype: torch.dtype, chunks: tuple[int, ...] = CHUNKS
    ) -> None:
        d_model, d_mlp = config.hidden_size, config.intermediate_size
        d_head = getattr(config, "head_dim", None) or d_model // config.num_attention_heads
        d_key = d_head * config.num_key_value_heads
        self.shapes = sorted(
            {
                (d_model, d_head * config.num_attention_heads),
                (d_model, d_key),
                (d_model, d_mlp),
                (d_mlp, d_model),
                (d_model, config.vocab_size),
            }
        )
        self.device, self.dtype, self.chunks = device, dtype, chunks
        self._rates: dict[tuple[int, int, int], list[float]] = defaultdict(list)

    @torch.inference_mode()
    def measure(self) -> Rates:
        """Time every matrix shape at every number of tokens once, and return the rates of this round alone."""
        found = {}
        for n_in, n_out in self.shapes:
            weight = torch.randn(n_out, n_in, device=self.device, dtype=self.dtype)
            for tokens in self.chunks:
                inputs = torch.randn(tokens, n_in, device=self.device, dtype=self.dtype)
                seconds = self._time(partial(linear, inputs, weight))
                found[n_in, n_out, tokens] = rate = 2 * tokens * n_in * n_out / seconds
                self._rates[n_in, n_out, tokens].append(rate)
        return found

    def _time(self, multiply: Callable[[], Any]) -> float:
        """Seconds of one product: the median of three timings of several each."""
        multiply()
        calls = max(1, round(_SECONDS / self._seconds(multiply, 1)))
        return statistics.median(self._seconds(multiply, calls) for _ in range(3)) / calls

    def _seconds(self, multiply: Callable[[], Any], calls: int) -> float:
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(calls):
            multiply()
        synchronize(self.device)
        return time.perf_counter() - start

    @property
    def rates(self) -> Rates:
        """The median over the rounds so far."""
        return {product: statistics.median(rates) for product, rates in self._rates.items()}

    @property
    def peak(self) -> float:
        """The best rate, in FLOP/s."""
        return max(self.rates.values())

    @property
    def best(self) -> str:
        """Which product it was."""
        rates = self.rates
        n_in, n_out, tokens = max(rates, key=rates.__getitem__)
        return f"[{tokens} x {n_in}] by [{n_in} x {n_out}]"


def best_around(before: Rates, after: Rates) -> float:
    """Return the best product's rate over two rounds. Each product is averaged first: the best of many is lucky."""
    return max((before[product] + after[product]) / 2 for product in before)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
