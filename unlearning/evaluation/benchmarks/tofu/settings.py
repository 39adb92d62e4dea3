"""Settings of TOFU."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from unlearning.data.chat import DEFAULT_CHAT_DATE
from unlearning.evaluation.benchmarks.tofu import benchmark
from unlearning.evaluation.benchmarks.tofu.sets import RETAIN, SETS, read_sets
from unlearning.evaluation.harness import Benchmark, Prepare
from unlearning.evaluation.settings import Names, names_of, wrapping_of
from unlearning.evaluation.subject import Runtime, Subject


@dataclass(frozen=True, kw_only=True)
class TofuSettings:
    """Forget quality, model utility with its parts, truth ratios, ROUGE, memorisation, paraphrases.

    Attributes:
        forget: Forget set: a split, forget01 to forget99, or a file with records of the same shape.
        retain: Retain set: a file with records of the same shape, or a split.
        sets: Sets that are asked, of forget, retain, real_authors and world_facts; model utility needs all of them.
        template: Text around each question, with {question} in it; None for the default (a line with Question:, a line
            with Answer:).
        chat: Wrap questions by the tokenizer's chat template; False for `template`; None for the wrapping that the
            model was trained with, if its directory has a record of `unlearn train`.
        chat_date: Date that the chat template writes as today's.
        append_eos: Score answers with the end-of-sequence token; None for what the model was trained with, else True.
        max_new_tokens: Maximum number of tokens of a generated answer.
        generate: Generate answers, which ROUGE and model utility need.
        data_dir: Directory that holds tofu/; None for $DISSECT_DATA, then the hub.
        limit: Use only the first N rows of each set.
        seed: Random seed of the bootstrap.
    """

    source: ClassVar[str] = "TOFU, arXiv 2401.06121"

    forget: str | Path = "forget10"
    retain: str | Path = RETAIN
    sets: Names = SETS
    template: str | None = None
    chat: bool | None = None
    chat_date: str = DEFAULT_CHAT_DATE
    append_eos: bool | None = None
    max_new_tokens: int = benchmark.MAX_NEW_TOKENS
    generate: bool = True
    data_dir: str | Path | None = None
    limit: int | None = None
    seed: int = 0

    def open(self, _runtime: Runtime) -> Prepare:
        """Read the question sets; see `Settings.open`."""
        names = names_of(self.sets)
        sets = read_sets(self.forget, retain=self.retain, names=names, data_dir=self.data_dir, limit=self.limit)

        def prepare(subject: Subject) -> Benchmark:
            return benchmark.prepare(
                subject,
                sets=sets,
                wrapping=wrapping_of(subject, self.template, self.chat, self.chat_date),
                max_new_tokens=self.max_new_tokens,
                append_eos=self.append_eos is not False,
                generate=self.generate,
                seed=self.seed,
            )

        return prepare
