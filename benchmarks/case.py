"""What every contestant is given: a pair, its batches, and the four sweeps of the Dissecting paper."""

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.flops import naive_sweep_flops
from benchmarks.models import build_pair, random_prompts
from benchmarks.shapes import find_shape
from dissect import zoo
from dissect.interventions.intervention import Intervention
from dissect.interventions.windows import centred_windows
from dissect.models.pair import ModelPair, load_pair
from dissect.models.sites import PATCH_SITES
from dissect.prompts.loading import load_prompts
from dissect.prompts.prompts import Batch, Prompts

WINDOW = 5
DEMO = "demo"
BATCH_SIZE = 16
"""Prompts per batch of the built-in pair's questions, as `dissect patch` has it."""


@dataclass(frozen=True, eq=False)
class Case:
    """One sweep to be timed.

    Attributes:
        description: One line for tables.
        pair: Base and unlearned model.
        batches: The prompts, in batches.
        interventions: Three patches and one restoration over every window.
    """

    description: str
    pair: ModelPair
    batches: tuple[Batch, ...]
    interventions: tuple[Intervention, ...]

    @property
    def config(self) -> Any:
        """The Hugging Face configuration of both models."""
        return self.pair.base.hf.config

    @property
    def naive_flops(self) -> int:
        """Operations where every intervention is one full forward."""
        return sum(
            naive_sweep_flops(
                self.config,
                rows=batch.input_ids.shape[0],
                positions=batch.input_ids.shape[1],
                interventions=len(self.interventions),
            )
            for batch in self.batches
        )


def paper_sweeps(n_layers: int, width: int = WINDOW) -> tuple[Intervention, ...]:
    """Return the paper's four sweeps: MLP coefficients, attention outputs and both patched, value vectors restored."""
    windows = centred_windows(n_layers, width)
    patches = [Intervention(sites, window) for sites in PATCH_SITES for window in windows]
    return (*patches, *(Intervention(("value_vectors",), window) for window in windows))


def build_case(shape: str, *, device: torch.device, dtype: torch.dtype, among: tuple[str, ...]) -> Case:
    """Load the built-in pair and its questions, or make a random pair and random prompts of a shape.

    Args:
        shape: `demo` for the built-in pair, or the name of a shape in `benchmarks.shapes`.
        device: Where the models are.
        dtype: Type of their weights.
        among: Names that the benchmark accepts.

    Returns:
        The pair, its batches and the paper's four sweeps.

    Raises:
        InputError: The shape is not among the accepted names.
    """
    if shape == DEMO and shape in among:
        pair = load_pair("demo:base", "demo:npo", device=str(device), dtype=str(dtype).removeprefix("torch."))
        prompts = load_prompts(zoo.question_set("forget"), pair.tokenizer)
        description = f"demo: the built-in pair, {pair.n_layers} layers, {len(prompts)} questions in batches of 16"
        return _case(description, pair, prompts, BATCH_SIZE)
    found = find_shape(shape, among)
    pair = build_pair(found, device=device, dtype=dtype)
    prompts = random_prompts(found.vocab, [found.tokens] * found.prompts, answer=found.answer)
    return _case(found.description, pair, prompts, found.prompts)


def _case(description: str, pair: ModelPair, prompts: Prompts, batch_size: int) -> Case:
    return Case(description, pair, tuple(prompts.batches(batch_size)), paper_sweeps(pair.n_layers))
