"""The shapes of model and prompts that benchmarks run on. Light: loads no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from unlearning.common.errors import InputError


@dataclass(frozen=True)
class Shape:
    """A Llama of random weights and its prompts, of equal length, which end in their answers.

    Attributes:
        name: Name on the command line.
        n_layers: Number of blocks.
        d_model: Width of the residual stream.
        d_mlp: Width of the MLP coefficients.
        n_heads: Query heads.
        n_kv_heads: Key-value heads; fewer than `n_heads` is grouped-query attention.
        vocab: Tokens of the vocabulary; embedding and head are not tied.
        prompts: Rows of the one batch.
        tokens: Tokens of each row, its answer included.
        answer: Tokens of the answer, the last ones.
    """

    name: str
    n_layers: int
    d_model: int
    d_mlp: int
    n_heads: int
    n_kv_heads: int
    vocab: int
    prompts: int
    tokens: int
    answer: int

    @property
    def description(self) -> str:
        """One line for tables."""
        grouped = "" if self.n_heads == self.n_kv_heads else f" in {self.n_kv_heads} groups"
        return (
            f"{self.name}: Llama of random weights, {self.n_layers} layers, d {self.d_model}, d_mlp {self.d_mlp}, "
            f"{self.n_heads} heads{grouped}, vocabulary {self.vocab}; {self.prompts} prompts of {self.tokens} tokens, "
            f"{self.answer} of them answer"
        )


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("compute", 12, 1024, 2752, 16, 16, 8000, prompts=10, tokens=64, answer=30),
        Shape("small", 16, 256, 688, 8, 8, 1000, prompts=2, tokens=24, answer=4),
        Shape("tiny", 6, 64, 96, 4, 2, 300, prompts=3, tokens=12, answer=3),
        Shape("1b", 16, 2048, 8192, 32, 8, 32000, prompts=10, tokens=64, answer=30),
        Shape("7b", 32, 4096, 11008, 32, 32, 32000, prompts=2, tokens=24, answer=4),
    )
}
"""1b is Llama-3.2-1B with Llama-2's vocabulary, 7b is Llama-2-7B."""


def find_shape(name: str, among: Sequence[str]) -> Shape:
    """Return the shape of this name.

    Args:
        name: Name of a shape.
        among: Names that the benchmark accepts.

    Returns:
        The shape.

    Raises:
        InputError: The name is not among the accepted ones.
    """
    if name not in among or name not in SHAPES:
        raise InputError(f"--shape {name}: unknown; there are {', '.join(among)}")
    return SHAPES[name]
