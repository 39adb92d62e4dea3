"""Settings of membership inference."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from unlearning.common.errors import naming
from unlearning.data.chat import DEFAULT_CHAT_DATE
from unlearning.evaluation.benchmarks.membership import benchmark
from unlearning.evaluation.benchmarks.membership.benchmark import Attacking
from unlearning.evaluation.benchmarks.membership.texts import check_sets, note_of_sizes, read_source
from unlearning.evaluation.harness import Benchmark, Prepare
from unlearning.evaluation.metrics.membership import FRACTION
from unlearning.evaluation.settings import Names, given, names_of, wrapping_of
from unlearning.evaluation.subject import Runtime, Subject


@dataclass(frozen=True, kw_only=True)
class MembershipSettings:
    """Can the forget set be told apart from texts that no model was trained on?

    Attributes:
        forget: Forget set: a file, or a named set such as tofu:forget05 or muse-news:raw:forget.
        holdout: Texts of the same kind that no model was trained on: a file or a named set.
        attacks: Attacks, of loss, zlib, lower, min_k, min_k_plus_plus, reference and grad_norm; None for all but
            grad_norm, which takes one backward pass per text.
        reference_model: Model that was not trained on the forget set, for the attack `reference`.
        min_k: Share of the tokens that Min-K and Min-K++ read.
        max_tokens: Score only the first N tokens of each text.
        template: Text around each question, with {question} in it; None for the data set's own.
        chat: Wrap questions by the tokenizer's chat template; False for `template`; None for the wrapping that the
            model was trained with, if its directory has a record of `unlearn train`.
        chat_date: Date that the chat template writes as today's.
        append_eos: Score answers with the end-of-sequence token; None for what the model was trained with, else True.
        data_dir: Directory that holds the named sets; None for $DISSECT_DATA, then the hub.
        limit: Use only the first N texts of each set.
        seed: Random seed of the bootstrap.
    """

    source: ClassVar[str] = "attacks of arXiv 2310.16789 (Min-K) and 2404.02936 (Min-K++); PrivLeak of MUSE, 2407.06460"

    forget: str | Path
    holdout: str | Path
    attacks: Names | None = None
    reference_model: str | None = None
    min_k: float = FRACTION
    max_tokens: int | None = None
    template: str | None = None
    chat: bool | None = None
    chat_date: str = DEFAULT_CHAT_DATE
    append_eos: bool | None = None
    data_dir: str | Path | None = None
    limit: int | None = None
    seed: int = 0

    def open(self, runtime: Runtime) -> Prepare:
        """Read both sets and load the reference model; see `Settings.open`."""
        reference_model = given(self.reference_model)
        attacks = None if self.attacks is None else names_of(self.attacks)
        chosen = benchmark.chosen_attacks(attacks, has_reference=reference_model is not None)
        benchmark.check_numbers(fraction=self.min_k, max_tokens=self.max_tokens, limit=self.limit)
        sources = []
        for name, source in (("forget", self.forget), ("holdout", self.holdout)):
            with naming(name):
                sources.append(read_source(source, self.data_dir))
        check_sets(*(source.texts()[: self.limit] for source in sources))  # before models are loaded
        reference = None if reference_model is None else runtime.open(reference_model)

        def prepare(subject: Subject) -> Benchmark:
            wrappings = [
                wrapping_of(subject, self.template, self.chat, self.chat_date, default=each.template)
                for each in sources
            ]
            closes = self.append_eos is not False
            forget, holdout = (each.texts(wrapping) for each, wrapping in zip(sources, wrappings, strict=True))
            return benchmark.prepare(
                subject,
                forget=forget[: self.limit],
                holdout=holdout[: self.limit],
                attacking=Attacking(chosen, reference, self.min_k, self.max_tokens, wrappings[0].chat, closes),
                seed=self.seed,
                notes=note_of_sizes(str(self.forget), str(self.holdout)),
            )

        return prepare
