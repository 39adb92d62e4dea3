"""`unlearn eval muse`: MUSE (2407.06460) on News or Books.

    forget_verbmem   greedy continuation of the prompt by 128 tokens; ROUGE-L F1 with        0 to 1     lower
                     the first 128 tokens of the true continuation
    forget_knowmem   ten solved examples, then the question; 32 tokens; ROUGE-L F1           0 to 1     lower
    retain_knowmem   the same on retain questions                                            0 to 1     higher
    privleak         100 (A - A_control) / A_control,                                        %          closer to 0
                     A = P(hold-out text scores lower than forget text), by Min-40 %
    privleak_auc     A                                                                       0 to 1     the control's

As in MUSE's own code there is no stemming; open-unlearning stems, and scores slightly higher. MUSE's code runs VerbMem
and KnowMem in int8; this module uses the dtype in which the model is loaded.
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
"""A_control of MUSE's released retrained models, scored by Min-40 %; shown in a message, and used only if asked for."""

_PRIVLEAK_SETS = ("privleak_forget", "privleak_holdout")


def prepare(subject: Subject, data: MuseData, *, auc_retain: float | None = None, seed: int = 0) -> Benchmark:
    """Make MUSE ready for a model.

    Args:
        subject: The model.
        data: Data of one corpus.
        auc_retain: A_control in MUSE's direction; used only without a control.
        seed: Random seed of the bootstrap.

    Returns:
        The benchmark, with one set per measurement whose data was found (`privleak` has two).

    Raises:
        InputError: A prompt or a text is too long for the model, or `auc_retain` is no AUC.
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
    """Check that an AUC can be the denominator of PrivLeak.

    Raises:
        InputError: The value is not above 0 and at most 1.
    """
    if auc_retain is not None and not 0 < auc_retain <= 1:
        raise InputError(f"`auc_retain` must be above 0 and at most 1, got {auc_retain}")


def knowledge_prompt(question: str, worked: Sequence[tuple[str, str]]) -> str:
    """Return a question after solved examples, with exactly the white space of MUSE's code."""
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
    """Return prompts to be continued, and a note if the model's context is shorter than the protocol asks for."""
    encoded = [subject.tokenizer(prompt, verbose=False)["input_ids"] for prompt in prompts]
    subject.check_tokens(encoded)
    costs = [len(ids) for ids in encoded]
    context = subject.context
    notes = []
    if context is not None:
        if max(costs) >= context:
            place = max(range(len(costs)), key=costs.__getitem__)
            raise InputError(
                f"{name} row {place + 1}: the prompt must be shorter than the model's context of {context} tokens, got "
                f"{costs[place]}. Use a model with a longer context."
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
            verbatim=True,
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
    """Return whole texts, ready to be scored; MUSE does not close them by an end-of-sequence token."""
    targets = [
        encode_text(subject, prompt="", answer=text.answer, chat=None, closes=False, where=f"{name} row {number}")
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
        "mean ROUGE-L F1 of greedy continuations of the forget texts, 0 to 1; the goal is at most the control's value",
    ),
    "forget_knowmem": (
        "forget_knowmem",
        "lower is better",
        "mean ROUGE-L F1 of answers to questions on the forget set, 0 to 1; the goal is at most the control's value",
    ),
    "retain_knowmem": (
        "retain_knowmem",
        "higher is better",
        "mean ROUGE-L F1 of answers to questions on the retain set, 0 to 1; MUSE's utility",
    ),
}


def _summarise(
    rows: Rows,
    control_rows: Rows | None,
    *,
    corpus: str,
    missing: dict[str, str],
    auc_retain: float | None,
    seed: int,
) -> list[Metric]:
    metrics = []
    for part, (name, direction, meaning) in _ROUGE.items():
        asked = rows[rows["set"] == part]
        mean, reason = None, missing.get(part)
        if reason is None:
            mean = Sample(part, asked["group"].tolist(), seed=seed).mean(asked["rouge_l"].to_numpy(dtype=float))
            reason = "no reference has a word" if mean is None else None
        metrics.append(Metric(name, mean, direction, meaning, reason))
    return [*metrics, *_leakage(rows, control_rows, corpus, missing.get("privleak"), auc_retain, seed)]


def _leakage(
    rows: Rows, control_rows: Rows | None, corpus: str, missing: str | None, auc_retain: float | None, seed: int
) -> list[Metric]:
    area, leakage, reason = None, None, missing
    if missing is None:
        area = compared(rows, "min_k", _PRIVLEAK_SETS, membership.auc, seed=seed)
        leakage, reason = _relative(area, control_rows, corpus, auc_retain, seed)
    return [
        Metric(
            "privleak",
            leakage,
            "closer to 0 is better",
            "100 (A - A_control) / A_control in percent, A as in privleak_auc: -100 still memorised, 0 like the "
            "control, above 0 over-unlearned, at most 100 (1 - A_control) / A_control",
            reason,
        ),
        Metric(
            "privleak_auc",
            None if area is None else combine(_muses, area),
            "closer to the control is better",
            "A = P(hold-out text scores lower than forget text) by Min-40 %: 0 memorised, 0.5 indistinguishable, 1 "
            "over-unlearned (one minus the AUC of `unlearn eval mia`)",
            missing,
        ),
    ]


def _relative(
    area: Resampled, control_rows: Rows | None, corpus: str, auc_retain: float | None, seed: int
) -> tuple[Resampled | None, str | None]:
    """Return PrivLeak, or the reason why there is none."""
    if control_rows is not None:
        theirs = compared(control_rows, "min_k", _PRIVLEAK_SETS, membership.auc, seed=seed)
        if theirs.value == 1:
            return None, "the control's A is 0, and PrivLeak divides by it"
        return relative_leakage(area, theirs), None
    if auc_retain is not None:
        return combine(lambda ours: membership.privacy_leakage(_muses(ours), auc_retain), area), None
    return None, (
        "it is relative to the control; give `control`, `control_result`, or the control's AUC as `auc_retain` "
        f"(MUSE's released model of {corpus}: {RELEASED_RETAIN_AUC[corpus]})"
    )


def _muses(area: Values) -> Values:
    """Return an AUC of `membership.auc` in MUSE's direction."""
    return 1 - area
