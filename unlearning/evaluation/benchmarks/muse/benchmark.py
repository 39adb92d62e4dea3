"""`unlearn eval muse`: MUSE (2407.06460) on News or Books.

VerbMem     the prompt is continued greedily by 128 tokens; ROUGE-L F1 with the true continuation's first 128 tokens
KnowMem     ten worked examples, then the question; 32 tokens; ROUGE-L F1, on forget and on retain questions
PrivLeak    100 (A_U - A_R) / A_R, A = P(hold-out text scores lower than forget text), scored by Min-40 %

As in MUSE's own code there is no stemming; open-unlearning stems, and scores a little higher. MUSE's code runs VerbMem
and KnowMem in int8, this in the dtype that the model is loaded in.
"""

from collections.abc import Sequence
from functools import partial

from unlearning.common.errors import InputError
from unlearning.common.hashing import hash_json
from unlearning.evaluation.benchmarks.membership.benchmark import compared, encode_text, relative_leakage
from unlearning.evaluation.benchmarks.membership.texts import Text
from unlearning.evaluation.benchmarks.muse.data import PARTS, MuseData
from unlearning.evaluation.generation import greedy_answers
from unlearning.evaluation.harness import Benchmark, Part, Row, Rows
from unlearning.evaluation.metrics import membership
from unlearning.evaluation.metrics.text_match import rouge_l_f1
from unlearning.evaluation.metrics.text_quality import first_tokens
from unlearning.evaluation.statistics import Direction, Metric, Resampled, Sample, Values, combine
from unlearning.evaluation.subject import Subject
from unlearning.evaluation.token_scores import score_tokens

CONTINUATION_TOKENS = 128
ANSWER_TOKENS = 32
STOP_TEXTS = ("\n\n", "\nQuestion", "Question:")

RELEASED_RETAIN_AUC = {"news": 0.4772, "books": 0.5393}
"""A_R of MUSE's released retrained models, scored by Min-40 %. Told where it is of use, and never used unasked."""

_PRIVLEAK_SETS = ("privleak_forget", "privleak_holdout")


def prepare(subject: Subject, data: MuseData, *, auc_retain: float | None = None, seed: int = 0) -> Benchmark:
    """Make MUSE ready for a model.

    Args:
        subject: the model.
        data: of one corpus.
        auc_retain: A_R, in MUSE's direction, where there is no retain model to measure it on.
        seed: of the bootstrap draws.

    Raises:
        InputError: a prompt or a text that is too long for the model, or an `auc_retain` that is no AUC.
    """
    check_auc(auc_retain)
    parts, notes = [], []
    for name, sets in data.found.items():
        if name == "privleak":
            parts += [_texts(subject, part, texts) for part, texts in zip(_PRIVLEAK_SETS, sets, strict=True)]
        else:
            part, note = _verbatim(subject, sets[0]) if name == "verbmem" else _knowledge(subject, name, *sets)
            parts.append(part)
            notes += note
    missing = {name: data.missing.get(name, "its data was not given") for name in PARTS if name not in data.found}
    return Benchmark(
        name="muse",
        configuration={
            "corpus": data.corpus,
            "data_sha256": hash_json({name: list(map(_plain, sets)) for name, sets in data.found.items()}),
        },
        parts=parts,
        summarise=partial(_summarise, corpus=data.corpus, missing=missing, auc_retain=auc_retain, seed=seed),
        notes=tuple(notes),
    )


def _plain(texts: Sequence[Text]) -> list[list[str]]:
    return [[text.prompt, text.answer] for text in texts]


def check_auc(auc_retain: float | None) -> None:
    """Check that it is an AUC that a relative difference can be taken to.

    Raises:
        InputError: it is not.
    """
    if auc_retain is not None and not 0 < auc_retain <= 1:
        raise InputError(f"--auc-retain {auc_retain}: an AUC above 0 and at most 1")


def knowledge_prompt(question: str, worked: Sequence[tuple[str, str]]) -> str:
    """A question after worked examples, to the very white space of MUSE's code."""
    examples = "".join(f"Question: {asked}\nAnswer: {answer}\n\n" for asked, answer in worked)
    return f"{examples}Question: {question}\nAnswer: "


def _verbatim(subject: Subject, texts: Sequence[Text]) -> tuple[Part, list[str]]:
    prompts = [text.prompt for text in texts]
    references = [first_tokens(subject.tokenizer, text.answer, CONTINUATION_TOKENS) for text in texts]
    return _generated(subject, "verbmem", texts, prompts, references, CONTINUATION_TOKENS, ())


def _knowledge(
    subject: Subject, name: str, questions: Sequence[Text], worked: Sequence[Text]
) -> tuple[Part, list[str]]:
    examples = [(text.prompt, text.answer) for text in worked]
    prompts = [knowledge_prompt(text.prompt, examples) for text in questions]
    references = [text.answer for text in questions]
    return _generated(subject, name, questions, prompts, references, ANSWER_TOKENS, STOP_TEXTS)


def _generated(
    subject: Subject,
    name: str,
    texts: Sequence[Text],
    prompts: Sequence[str],
    references: Sequence[str],
    max_new_tokens: int,
    stop_texts: Sequence[str],
) -> tuple[Part, list[str]]:
    """Prompts to be continued; and a note where the model's context leaves less room than the protocol asks for."""
    encoded = [subject.tokenizer(prompt, verbose=False)["input_ids"] for prompt in prompts]
    subject.check_tokens(encoded)
    costs = [len(ids) for ids in encoded]
    context = subject.context
    notes = []
    if context is not None:
        if max(costs) >= context:
            place = max(range(len(costs)), key=costs.__getitem__)
            raise InputError(
                f"{name} row {place + 1}: its prompt has {costs[place]} tokens, the model's context {context}; this "
                "model is too small for MUSE's prompts"
            )
        short = sum(cost + max_new_tokens > context for cost in costs)
        if short:
            notes.append(
                f"{name}: {short} of {len(costs)} prompts leave fewer than {max_new_tokens} tokens in the model's "
                f"context of {context}; their answers are cut there"
            )

    def score(places: Sequence[int]) -> list[Row]:
        answers = greedy_answers(
            subject.model,
            subject.tokenizer,
            [prompts[place] for place in places],
            max_new_tokens=max_new_tokens,
            batch_size=len(places),
            stop_texts=stop_texts,
        )
        return [
            {
                "id": texts[place].id,
                "group": texts[place].group,
                "prompt": texts[place].prompt,
                "generated": answer,
                "reference": references[place],
                "rouge_l": rouge_l_f1(answer, references[place]),
            }
            for place, answer in zip(places, answers, strict=True)
        ]

    return Part(name, costs, score), notes


def _texts(subject: Subject, name: str, texts: Sequence[Text]) -> Part:
    """Whole texts, which MUSE does not close by an end of sequence."""
    targets = [
        encode_text(subject, prompt="", answer=text.answer, chat=None, is_whole=False, where=f"{name} row {number}")
        for number, text in enumerate(texts, start=1)
    ]

    def score(places: Sequence[int]) -> list[Row]:
        found = score_tokens(subject, [targets[place] for place in places], batch_size=len(places))
        return [
            {
                "id": texts[place].id,
                "group": texts[place].group,
                "n_tokens": len(scores.log_probs),
                "loss": scores.mean_nll,
                "min_k": membership.min_k(scores.log_probs),
            }
            for place, scores in zip(places, found, strict=True)
        ]

    return Part(name, [len(target.span.input_ids) for target in targets], score)


_ROUGE: dict[str, tuple[str, Direction, str]] = {
    "verbmem": (
        "forget_verbmem",
        "lower is better",
        "mean ROUGE-L F1 of greedy continuations of the forget texts, 0 to 1: good is no more than the retain model's",
    ),
    "forget_knowmem": (
        "forget_knowmem",
        "lower is better",
        "mean ROUGE-L F1 of answers to questions on the forget set, 0 to 1: good is no more than the retain model's",
    ),
    "retain_knowmem": (
        "retain_knowmem",
        "higher is better",
        "mean ROUGE-L F1 of answers to questions on the retain set, 0 to 1: MUSE's utility",
    ),
}


def _summarise(
    rows: Rows,
    retain_rows: Rows | None,
    *,
    corpus: str,
    missing: dict[str, str],
    auc_retain: float | None,
    seed: int,
) -> list[Metric]:
    metrics = []
    for part, (name, direction, meaning) in _ROUGE.items():
        asked = rows[rows["set"] == part]
        mean = None
        if part not in missing:
            mean = Sample(part, asked["group"].tolist(), seed=seed).mean(asked["rouge_l"].to_numpy(dtype=float))
        metrics.append(Metric(name, mean, direction, meaning, missing.get(part)))
    return [*metrics, *_leakage(rows, retain_rows, corpus, missing.get("privleak"), auc_retain, seed)]


def _leakage(
    rows: Rows, retain_rows: Rows | None, corpus: str, missing: str | None, auc_retain: float | None, seed: int
) -> list[Metric]:
    area, leakage, reason = None, None, missing
    if missing is None:
        area = compared(rows, "min_k", _PRIVLEAK_SETS, membership.auc, seed=seed)
        leakage, reason = _relative(area, retain_rows, corpus, auc_retain, seed)
    return [
        Metric(
            "privleak",
            leakage,
            "nearer to 0 is better",
            "100 (A - A_retain) / A_retain in percent, A as in privleak_auc: -100 the forget set is still memorised, 0 "
            "as the retain model, above 0 over-unlearned, at most 100 (1 - A_retain) / A_retain",
            reason,
        ),
        Metric(
            "privleak_auc",
            None if area is None else combine(_muses, area),
            "nearer to the retain model is better",
            "A = P(hold-out text scores lower than forget text) by Min-40 %: 0 memorised, 0.5 not to be told apart, 1 "
            "over-unlearned (one minus the AUC of `unlearn eval mia`)",
            missing,
        ),
    ]


def _relative(
    area: Resampled, retain_rows: Rows | None, corpus: str, auc_retain: float | None, seed: int
) -> tuple[Resampled | None, str | None]:
    """PrivLeak, or why there is none."""
    if retain_rows is not None:
        theirs = compared(retain_rows, "min_k", _PRIVLEAK_SETS, membership.auc, seed=seed)
        if theirs.value == 1:
            return None, "the retain model's A is 0, which leaves nothing to divide by"
        return relative_leakage(area, theirs), None
    if auc_retain is not None:
        return combine(lambda ours: membership.privacy_leakage(_muses(ours), auc_retain), area), None
    return None, (
        "it is relative to the retain model; give --retain-model N, --retain-result DIR, or its AUC as --auc-retain "
        f"(MUSE's released model of {corpus}: {RELEASED_RETAIN_AUC[corpus]})"
    )


def _muses(area: Values) -> Values:
    """An AUC of `membership.auc` in MUSE's direction."""
    return 1 - area
