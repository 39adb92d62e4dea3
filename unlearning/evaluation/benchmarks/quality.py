"""Text quality: is what a model writes still text? Collapse forgets everything, and is not forgetting.

Greedy continuations of any prompts, or texts that were generated elsewhere: repetition, variety, entropy, length, the
shares of gibberish and of empty texts by the rule of `unlearning.evaluation.metrics.text_quality`, the perplexity under
a base model, and the verdict of a classifier where one is given.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from unlearning.common.errors import InputError
from unlearning.common.hashing import hash_json
from unlearning.data.chat import ChatFormat
from unlearning.data.question_answer import QUESTION_KEYS, Wrapping
from unlearning.data.records import Record, read_records
from unlearning.data.sources import find_records
from unlearning.evaluation.generation import greedy_answers
from unlearning.evaluation.harness import Benchmark, Part, Row, Rows
from unlearning.evaluation.metrics.fluency import Classifier
from unlearning.evaluation.metrics.text_quality import (
    Fault,
    distinct_n,
    fault,
    longest_run,
    repetition,
    token_entropy,
    words,
)
from unlearning.evaluation.statistics import Metric, Resampled, Sample, combine
from unlearning.evaluation.subject import Subject
from unlearning.evaluation.token_scores import encode_target, score_tokens

DOCUMENT_WORDS = 20
"""Words of a document without a prompt that are the prompt."""

TEXT_KEYS = ("generated", "generation", "text", "completion", "answer", "output", "response")
"""Under which a record has the text that was generated; the first that is there."""


@dataclass(frozen=True)
class Asked:
    """A prompt, and the text that followed it where that is there already."""

    prompt: str
    text: str | None = None
    id: str = ""
    group: str = ""


def read_prompts(
    source: str | Path,
    *,
    template: str | None = None,
    chat: ChatFormat | None = None,
    data_dir: str | Path | None = None,
) -> list[Asked]:
    """The prompts of a file or a named data set; answers are not needed and not looked at.

    Args:
        source: a file of `question`, `prompt` or `text` records, or what `find_records` knows by name. Of a
            document, the first `DOCUMENT_WORDS` words are the prompt.
        template, chat: wrap questions.
        data_dir: where named data sets are looked for.

    Raises:
        InputError: what the readers raise, or a record without a prompt.
    """
    found = find_records(source, data_dir)
    wrapping = Wrapping(template or found.template, chat)
    asked = [
        _asked(record, wrapping, f"{found.source}, record {number}") for number, record in enumerate(found.records, 1)
    ]
    return [one for one in asked if one.prompt]


def read_texts(path: str | Path) -> list[Asked]:
    """Texts that were generated: records with one of `TEXT_KEYS` (and `prompt`, `id`, `group`), or bare texts.

    Raises:
        InputError: what `read_records` raises, or a record without a text.
    """
    found = []
    for number, record in enumerate(read_records(path), start=1):
        key = next((key for key in TEXT_KEYS if key in record), None)
        if key is None or not isinstance(record[key], str):
            keys = ", ".join(map(str, record)) or "none"
            raise InputError(f"{path}, record {number}: no text under {', '.join(TEXT_KEYS)}; its keys are {keys}")
        prompt = record.get("prompt")
        found.append(Asked(prompt if isinstance(prompt, str) else "", record[key], *_labels(record)))
    return found


def prepare(
    subject: Subject,
    *,
    asked: Sequence[Asked],
    chat: ChatFormat | None = None,
    base: Subject | None = None,
    classifier: Classifier | None = None,
    max_new_tokens: int = 100,
    limit: int | None = None,
    seed: int = 0,
) -> Benchmark:
    """Text quality, ready to run.

    Args:
        subject: the model that continues the prompts.
        asked: see `read_prompts` and `read_texts`; a row that has its text is not generated.
        chat: whose prompts these are, where they are some.
        base: a sound model, under which each text's perplexity is taken.
        classifier: tells clean texts from gibberish.
        max_new_tokens: most tokens of a continuation.
        limit: the first so many rows only.
        seed: of the bootstrap.

    Raises:
        InputError: there are no prompts, or a limit or length that is no number of anything.
    """
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit}: 1 or more")
    if max_new_tokens < 1:
        raise InputError(f"--max-new-tokens {max_new_tokens}: 1 or more")
    rows = list(asked[:limit])
    if not rows:
        raise InputError("there is no prompt and no text; give --prompts with at least one")

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

    def summarise(found: Rows, _retain: Rows | None) -> list[Metric]:
        return _metrics(found, seed, has_base=base is not None, has_classifier=classifier is not None)

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
        summarise=summarise,
        provenance={"base": None if base is None else base.name},
        notes=("words are what stands between white space; texts are greedy continuations",)
        if generates
        else ("words are what stands between white space; the texts were given, the model wrote none",),
    )


def measure(text: str) -> Row:
    """What can be said of a text by itself: length, repetition, entropy, and its fault, "none" where there is none."""
    split = words(text)
    return {
        "n_words": len(split),
        "repetition_3": repetition(split, 3),
        "longest_run": longest_run(split) if split else None,
        "entropy_1": token_entropy(split, 1),
        "entropy_3": token_entropy(split, 3),
        "fault": fault(text) or "none",
    }


def _asked(record: Record, wrapping: Wrapping, where: str) -> Asked:
    key = next((key for key in ("prompt", *QUESTION_KEYS, "text") if key in record), None)
    value = None if key is None else record[key]
    if not isinstance(value, str):
        keys = ", ".join(map(str, record)) or "none"
        raise InputError(f'{where}: needs "prompt", "question" or "text"; its keys are {keys}')
    if key in QUESTION_KEYS:
        prompt = wrapping.question(value)
    else:
        prompt = wrapping.prompt(_beginning(value) if key == "text" else value)
    return Asked(prompt, None, *_labels(record))


def _labels(record: Record) -> tuple[str, str]:
    return str(record.get("id", "")), str(record.get("group", ""))


def _beginning(document: str) -> str:
    return " ".join(words(document)[:DOCUMENT_WORDS])


def _texts(subject: Subject, asked: Sequence[Asked], chat: ChatFormat | None, max_new_tokens: int) -> list[str]:
    unanswered = [one.prompt for one in asked if one.text is None]
    written = iter(
        greedy_answers(
            subject.model,
            subject.tokenizer,
            unanswered,
            max_new_tokens=max_new_tokens,
            batch_size=max(1, len(unanswered)),
            add_special_tokens=chat is None,
            turn_end="" if chat is None else chat.turn_end,
        )
    )
    return [next(written) if one.text is None else one.text for one in asked]


def _where_text(texts: Sequence[str], measured: Callable[[Sequence[str]], Sequence[float]]) -> list[float | None]:
    """A measure of the texts that are not empty; None for those that are."""
    values = iter(measured(some) if (some := [text for text in texts if text.strip()]) else [])
    return [next(values) if text.strip() else None for text in texts]


def _nll_under(
    base: Subject, asked: Sequence[Asked], texts: Sequence[str], chat: ChatFormat | None
) -> list[float | None]:
    """Mean negative log-likelihood per token of the base's tokenizer, after the prompt; None for nothing to score."""
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


def _metrics(rows: Rows, seed: int, *, has_base: bool, has_classifier: bool) -> list[Metric]:
    sample = Sample("texts", rows["group"].tolist(), seed=seed)
    texts = rows["text"].tolist()
    split = [words(text) for text in texts]

    def mean(column: str) -> Resampled | None:
        return sample.mean(rows[column].to_numpy(np.float64))

    def share(*faults: str) -> Resampled | None:
        return sample.mean(rows["fault"].isin(faults).to_numpy(np.float64))

    few = "no text has three words"
    metrics = [
        Metric("empty", share("empty"), "lower is better", "share of texts that are nothing but white space"),
        Metric(
            "gibberish",
            share(*(name for name in get_args(Fault) if name != "empty")),
            "lower is better",
            "share of texts that the stated rule calls gibberish: loop, broken words or unpronounceable",
        ),
        Metric("loop", share("loop"), "lower is better", "share of texts that say the same four times or more"),
        Metric(
            "broken_words",
            share("broken words"),
            "lower is better",
            "share of texts more than half of whose words are none",
        ),
        Metric(
            "unpronounceable",
            share("unpronounceable"),
            "lower is better",
            "share of texts of letters with too few vowels",
        ),
        Metric(
            "repetition_3",
            mean("repetition_3"),
            "lower is better",
            "mean share of a text's word 3-grams that it has had before, 0 to 1, over texts of three words or more",
            None if mean("repetition_3") else few,
        ),
        Metric(
            "longest_run",
            mean("longest_run"),
            "lower is better",
            "mean over texts of how often one word stands in a row at most; 1 where none does twice",
            None if mean("longest_run") else "all texts are empty",
        ),
        *(_distinct(split, n) for n in (1, 2)),
        Metric(
            "entropy_1",
            mean("entropy_1"),
            "describes; neither is better",
            "mean entropy of a text's words in bits: 0 for one word over and over, at most log2(words)",
            None if mean("entropy_1") else "all texts are empty",
        ),
        Metric(
            "entropy_3",
            mean("entropy_3"),
            "describes; neither is better",
            "mean entropy of a text's word 3-grams in bits, over texts of three words or more",
            None if mean("entropy_3") else few,
        ),
        Metric("length", mean("n_words"), "describes; neither is better", "mean number of words"),
    ]
    return metrics + _base_metrics(mean("base_nll"), has_base) + [_fluency(mean("fluency"), has_classifier)]


def _distinct(split: list[list[str]], n: int) -> Metric:
    value = distinct_n(split, n)
    return Metric(
        f"distinct_{n}",
        None if value is None else Resampled(value, np.full(1, np.nan), len(split)),
        "higher is better",
        f"distinct word {n}-grams of all texts by all of theirs; falls where texts resemble each other; compare at "
        "equal numbers of texts",
        f"no text has {n} words" if value is None else "texts drawn twice would repeat themselves",
        has_interval=False,
    )


def _base_metrics(nll: Resampled | None, has_base: bool) -> list[Metric]:
    missing = "all texts are empty" if has_base else "give --base, a sound model to read the texts"
    perplexity = None
    if nll is not None:
        with np.errstate(over="ignore"):
            perplexity = combine(np.exp, nll)
    too_large = perplexity is not None and not np.isfinite(perplexity.value)
    return [
        Metric(
            "nll_under_base",
            nll,
            "lower is better",
            "mean over texts of the base's negative log-likelihood per token, in nats; low for loops, too: read it "
            "beside repetition",
            None if nll else missing,
        ),
        Metric(
            "perplexity_under_base",
            None if too_large else perplexity,
            "lower is better",
            "exp of nll_under_base: the geometric mean of the texts' perplexities",
            "larger than a number can be; see nll_under_base" if too_large else None if nll else missing,
        ),
    ]


def _fluency(value: Resampled | None, has_classifier: bool) -> Metric:
    missing = "all texts are empty" if has_classifier else "give --classifier, a detector of gibberish"
    return Metric(
        "fluency",
        value,
        "higher is better",
        "mean probability of the classifier's clean class over texts that are not empty, 0 to 1",
        None if value else missing,
    )
