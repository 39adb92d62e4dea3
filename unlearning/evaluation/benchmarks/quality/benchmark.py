"""Text quality: is what a model writes still text? A collapsed model has not forgotten, it has broken.

Greedy continuations of any prompts, or texts that were generated elsewhere: repetition, variety, entropy, length, the
shares of gibberish and of empty texts by the rule of `unlearning.evaluation.metrics.text_quality`, the perplexity under
a base model, and a classifier's probability of clean text if a classifier is given. `summary` lists the metrics.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict

from unlearning.common.errors import InputError, check_at_least
from unlearning.common.hashing import hash_json
from unlearning.data.chat import ChatFormat
from unlearning.evaluation.benchmarks.quality.prompts import Asked
from unlearning.evaluation.benchmarks.quality.summary import summarise
from unlearning.evaluation.generation import greedy_answers
from unlearning.evaluation.harness import Benchmark, Part, Row
from unlearning.evaluation.metrics.fluency import Classifier
from unlearning.evaluation.metrics.text_quality import fault, longest_run, repetition, token_entropy, words
from unlearning.evaluation.subject import Subject
from unlearning.evaluation.token_scores import encode_target, score_tokens


def prepare(
    subject: Subject,
    *,
    asked: Sequence[Asked],
    chat: ChatFormat | None = None,
    base: Subject | None = None,
    classifier: Classifier | None = None,
    max_new_tokens: int = 100,
    seed: int = 0,
) -> Benchmark:
    """Make text quality ready for a model.

    Args:
        subject: The model that continues the prompts.
        asked: Prompts and texts; see `read_prompts` and `read_texts`. A row that has its text is not generated.
        chat: Chat format of the prompts, if they have one.
        base: Intact model, under which the perplexity of each text is computed.
        classifier: Tells clean texts from gibberish.
        max_new_tokens: Maximum number of tokens of a continuation.
        seed: Random seed of the bootstrap.

    Returns:
        The benchmark, with one set, `texts`.

    Raises:
        InputError: There are no prompts, or `max_new_tokens` is below 1.
    """
    check_at_least("max_new_tokens", max_new_tokens, 1)
    rows = list(asked)
    if not rows:
        raise InputError("`prompts` or `texts` must hold at least one row, got none")

    def score(places: Sequence[int]) -> list[Row]:
        some = [rows[place] for place in places]
        texts = _texts(subject, some, chat, max_new_tokens)
        nll = [None] * len(some) if base is None else _nll_under(base, some, texts, chat)
        fluency = [None] * len(some) if classifier is None else _where_text(texts, classifier.probabilities)
        return [
            {"id": one.id, "group": one.group, "prompt": one.prompt, "text": text, **measure(text)}
            | {"base_nll": surprise, "fluency": clean}
            for one, text, surprise, clean in zip(some, texts, nll, fluency, strict=True)
        ]

    has_base, has_classifier = base is not None, classifier is not None
    generates = any(one.text is None for one in rows)
    tokens = [subject.tokenizer(f"{one.prompt} {one.text or ''}", verbose=False)["input_ids"] for one in rows]
    if generates:
        subject.check_tokens(tokens)
    costs = [len(ids) for ids in tokens]
    return Benchmark(
        name="quality",
        configuration={
            "prompts_sha256": hash_json([asdict(one) for one in rows]),
            "chat": None if chat is None else chat.date,
            "max_new_tokens": max_new_tokens if generates else None,
            "base_sha256": None if base is None else base.sha256,
            "classifier": None if classifier is None else classifier.identity,
            "seed": seed,
        },
        parts=[Part("texts", costs, score)],
        summarise=lambda found, _control: summarise(found, seed=seed, has_base=has_base, has_classifier=has_classifier),
        provenance={"base": None if base is None else base.name},
        notes=("words are separated by white space; the texts are greedy continuations",)
        if generates
        else ("words are separated by white space; the texts were given, the model wrote none of them",),
    )


def measure(text: str) -> Row:
    """Return the measures of one text: length, repetition, entropy, and its fault ("none" if it has none)."""
    split = words(text)
    return {
        "n_words": len(split),
        "repetition_3": repetition(split, 3),
        "longest_run": longest_run(split) if split else None,
        "entropy_1": token_entropy(split, 1),
        "entropy_3": token_entropy(split, 3),
        "fault": fault(text) or "none",
    }


def _texts(subject: Subject, asked: Sequence[Asked], chat: ChatFormat | None, max_new_tokens: int) -> list[str]:
    unanswered = [one.prompt for one in asked if one.text is None]
    written = iter(
        greedy_answers(
            subject.model,
            subject.tokenizer,
            unanswered,
            max_new_tokens=max_new_tokens,
            batch_size=max(1, len(unanswered)),
            chat=chat,
        )
    )
    return [next(written) if one.text is None else one.text for one in asked]


def _where_text(texts: Sequence[str], measured: Callable[[Sequence[str]], Sequence[float]]) -> list[float | None]:
    """Return a measure of each text; None for an empty text."""
    values = iter(measured(some) if (some := [text for text in texts if text.strip()]) else [])
    return [next(values) if text.strip() else None for text in texts]


def _nll_under(
    base: Subject, asked: Sequence[Asked], texts: Sequence[str], chat: ChatFormat | None
) -> list[float | None]:
    """Return each text's mean negative log-likelihood per token of the base, in nats; None if no token is scored."""
    targets = [
        encode_target(base, one.prompt, text, chat=chat, append_eos=False) if text.strip() else None
        for one, text in zip(asked, texts, strict=True)
    ]
    # Nothing predicts the first token of a text without a prompt.
    scorable = [target for target in targets if target is not None and len(target.span.input_ids) > 1]
    scores = iter(score_tokens(base, scorable, batch_size=max(1, len(scorable))))
    return [
        next(scores).mean_nll if target is not None and len(target.span.input_ids) > 1 else None for target in targets
    ]
