"""Settings of text quality."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from unlearning.common.errors import InputError, check_at_least, naming
from unlearning.data.chat import DEFAULT_CHAT_DATE
from unlearning.evaluation.benchmarks.quality import benchmark
from unlearning.evaluation.benchmarks.quality.prompts import read_prompts, read_texts
from unlearning.evaluation.harness import Benchmark, Prepare
from unlearning.evaluation.metrics.fluency import load_classifier
from unlearning.evaluation.settings import given, wrapping_of
from unlearning.evaluation.subject import Runtime, Subject


@dataclass(frozen=True, kw_only=True)
class QualitySettings:
    """Repetition, entropy, gibberish and perplexity of what the model writes.

    Attributes:
        prompts: Prompts to continue: a file of prompts, questions or texts, or a named set such as tofu:forget01; of a
            document, the first 20 words.
        texts: File of texts that the model has written already, instead of prompts.
        base: Intact model, under which the perplexity of the texts is computed.
        classifier: Text classifier of transformers, a directory or hub id.
        clean_label: Class of clean texts of the classifier; None for class 0.
        classifier_tokens: Number of tokens of a text that the classifier reads.
        template: Text around each question, with {question} in it; None for the default (a line with Question:, a line
            with Answer:).
        chat: Wrap questions by the tokenizer's chat template; False for `template`; None for the wrapping that the
            model was trained with, if its directory has a record of `unlearn train`.
        chat_date: Date that the chat template writes as today's.
        max_new_tokens: Maximum number of tokens of a continuation.
        data_dir: Directory that holds the named sets; None for $DISSECT_DATA, then the hub.
        limit: Use only the first N rows.
        seed: Random seed of the bootstrap.
    """

    source: ClassVar[str] = "measures of this package; fluency of arXiv 2506.12618"

    prompts: str | Path | None = None
    texts: str | Path | None = None
    base: str | None = None
    classifier: str | None = None
    clean_label: str | None = None
    classifier_tokens: int = 32
    template: str | None = None
    chat: bool | None = None
    chat_date: str = DEFAULT_CHAT_DATE
    max_new_tokens: int = 100
    data_dir: str | Path | None = None
    limit: int | None = None
    seed: int = 0

    def open(self, runtime: Runtime) -> Prepare:
        """Read the prompts or texts, and load base and classifier; see `Settings.open`."""
        if (self.prompts is None) == (self.texts is None):
            raise InputError("give either `prompts`, which the model continues, or `texts`, which it has written.")
        if self.limit is not None:
            check_at_least("limit", self.limit, 1)
        classifier, base = given(self.classifier), given(self.base)
        if classifier is None and self.clean_label is not None:
            raise InputError("`clean_label` needs `classifier`, whose class it is.")
        with naming("texts"):
            texts = None if self.texts is None else read_texts(self.texts)
        if self.prompts is not None:  # errors in them are reported before a model is loaded
            with naming("prompts"):
                read_prompts(self.prompts, template=self.template, data_dir=self.data_dir)
        judge = None
        if classifier is not None:
            label, length = self.clean_label, self.classifier_tokens
            judge = load_classifier(classifier, label=label, max_length=length, batch_size=runtime.batch_size)
        intact = None if base is None else runtime.open(base)

        def prepare(subject: Subject) -> Benchmark:
            chat = wrapping_of(subject, self.template, self.chat, self.chat_date).chat
            asked = texts
            if asked is None:
                asked = read_prompts(self.prompts or "", template=self.template, chat=chat, data_dir=self.data_dir)
            return benchmark.prepare(
                subject,
                asked=asked[: self.limit],
                chat=chat,
                base=intact,
                classifier=judge,
                max_new_tokens=self.max_new_tokens,
                seed=self.seed,
            )

        return prepare
