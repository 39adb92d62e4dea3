"""Settings of familiarity."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from unlearning.common.errors import naming
from unlearning.evaluation.benchmarks.familiarity import benchmark
from unlearning.evaluation.harness import Prepare
from unlearning.evaluation.judges import load_judge
from unlearning.evaluation.settings import given
from unlearning.evaluation.subject import Runtime


@dataclass(frozen=True, kw_only=True)
class FamiliaritySettings:
    """How familiar a text still is to the model, by next tokens and by completions.

    Attributes:
        prompts: File of prompts with candidates (specific, generic), or with names and themes (references, subtle).
        judge: Function that judges completions instead of the rule, as module:function.
        max_new_tokens: Maximum number of tokens of a completion.
        limit: Use only the first N prompts of each form.
        seed: Random seed of the bootstrap.
    """

    source: ClassVar[str] = "Who's Harry Potter, arXiv 2310.02238"

    prompts: str | Path
    judge: str | None = None
    max_new_tokens: int = 100
    limit: int | None = None
    seed: int = 0

    def open(self, _runtime: Runtime) -> Prepare:
        """Read the prompts and load the judge; see `Settings.open`."""
        judge = given(self.judge)
        with naming("prompts"):
            prompts = benchmark.read_prompts(self.prompts)
        return partial(
            benchmark.prepare,
            prompts=prompts,
            judge=None if judge is None else load_judge(judge),
            max_new_tokens=self.max_new_tokens,
            limit=self.limit,
            seed=self.seed,
        )
