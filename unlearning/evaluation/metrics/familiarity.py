"""Familiarity of a text to a model: the two scores of Who's Harry Potter (2310.02238).

Probability form: among the candidates for the next token are those that only the text accounts for (`specific`) and
those that any text could continue with (`generic`); the score of a prompt is the total probability of the specific
ones. Completion form: a judge puts each completion into a class, 1 (names or ideas of the text) to 4 (nothing of it);
the score is

    (5 * number in class 1 + number in class 2) / (5 * number of completions)

The paper's own normalisation constant could not be verified; this one makes the score lie between 0 and 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.special import expit, logsumexp

from unlearning.common.errors import InputError
from unlearning.evaluation.subject import Subject
from unlearning.evaluation.token_scores import Target, TokenScores, encode_target

CLASSES = {
    1: "names or ideas that only the text has",
    2: "themes typical of the text that the prompt did not ask for",
    3: "what might be a coincidence",
    4: "nothing of the text",
}

CLASS_SCORES = {1: 1.0, 2: 0.2, 3: 0.0, 4: 0.0}


@dataclass(frozen=True)
class Candidates:
    """The candidates after one prompt, as tokens; see `encode_candidates`.

    Attributes:
        specific: One target per specific candidate.
        generic: One target per generic candidate.
        specific_first: Indices of the specific candidates that count: their first token begins no earlier specific
            candidate and no generic one.
        generic_first: Indices of the generic candidates that count, likewise.
        n_shared: Number of first tokens that begin candidates of both kinds and count for neither.
    """

    specific: tuple[Target, ...]
    generic: tuple[Target, ...]
    specific_first: tuple[int, ...]
    generic_first: tuple[int, ...]
    n_shared: int


@dataclass(frozen=True)
class Familiarity:
    """Probabilities of one prompt's candidates, each 0 to 1.

    Attributes:
        specific: Total probability of the first tokens of the specific candidates; None if all of them begin generic
            candidates, too.
        generic: Total probability of the first tokens of the generic candidates; None likewise.
        share: specific / (specific + generic), computed in log space; None if one of the two is None.
        whole: Total probability of the specific candidates over all of their tokens.
    """

    specific: float | None
    generic: float | None
    share: float | None
    whole: float


def encode_candidates(subject: Subject, prompt: str, specific: Sequence[str], generic: Sequence[str]) -> Candidates:
    """Tokenise the candidates as continuations of the prompt, with a space between if they need one.

    White space at the end of the prompt is removed, since most tokenizers put it into the next word's token.

    Args:
        subject: The model, with its tokenizer.
        prompt: The prompt.
        specific: Candidates that only the text accounts for.
        generic: Candidates that any text could continue with.

    Returns:
        The candidates as tokens.

    Raises:
        InputError: A candidate is empty, or its beginning and the prompt's end are one token.
    """
    prompt = prompt.rstrip()
    before = _prompt_length(subject, prompt)

    def encode(candidate: str) -> Target:
        target = encode_target(subject, prompt, candidate, append_eos=False)
        if target.span.answer_start != before:
            raise InputError(
                f"the candidate {candidate!r} and the end of {prompt[-40:]!r} share a token. End the prompt elsewhere."
            )
        return target

    ours, theirs = tuple(map(encode, specific)), tuple(map(encode, generic))
    first = [[target.span.input_ids[before] for target in targets] for targets in (ours, theirs)]
    shared = set(first[0]) & set(first[1])
    kept = [
        tuple(place for place, token in enumerate(tokens) if token not in shared and token not in tokens[:place])
        for tokens in first
    ]
    return Candidates(ours, theirs, kept[0], kept[1], len(shared))


def familiarity(candidates: Candidates, scores: Sequence[TokenScores]) -> Familiarity:
    """Compute the probability form for one prompt.

    Args:
        candidates: Candidates of the prompt.
        scores: Scores of the specific candidates' targets, then of the generic candidates' targets.

    Returns:
        Probabilities of the candidates.
    """
    first = np.array([score.log_probs[0] for score in scores])
    n_specific = len(candidates.specific)
    specific = log_total(first[list(candidates.specific_first)])
    generic = log_total(first[n_specific:][list(candidates.generic_first)])
    whole = log_total(np.array(_distinct_totals(candidates.specific, scores[:n_specific])))
    assert whole is not None
    return Familiarity(
        specific=None if specific is None else float(np.exp(specific)),
        generic=None if generic is None else float(np.exp(generic)),
        share=None if specific is None or generic is None else float(expit(specific - generic)),
        whole=float(np.exp(whole)),
    )


def log_total(log_probs: Float[np.ndarray, " candidate"]) -> float | None:
    """Return the log of the sum of probabilities; None for no probabilities."""
    return float(logsumexp(log_probs)) if len(log_probs) else None


def completion_score(classes: Sequence[int]) -> float:
    """Return (5 * #(1) + #(2)) / (5 n), 0 to 1; lower is better."""
    return sum(CLASS_SCORES[one] for one in classes) / len(classes)


def _prompt_length(subject: Subject, prompt: str) -> int:
    ids = subject.tokenizer(prompt, verbose=False)["input_ids"]
    # Some tokenizers close every text with the end-of-sequence token.
    return len(ids) - (ids[-1:] == [subject.tokenizer.eos_token_id])


def _distinct_totals(targets: Sequence[Target], scores: Sequence[TokenScores]) -> list[float]:
    """Return each candidate's log-probability; candidates that begin with another one are counted with it."""
    spans = [target.span.input_ids for target in targets]
    totals = []
    for place, (ids, score) in enumerate(zip(spans, scores, strict=True)):
        covered = any(
            ids[: len(other)] == other and (len(other) < len(ids) or earlier < place)
            for earlier, other in enumerate(spans)
            if earlier != place
        )
        if not covered:
            totals.append(float(score.log_probs.sum()))
    return totals
