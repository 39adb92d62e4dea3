"""Sampling: does an answer come out if the question is asked often enough?

    leak@k = P(at least one of k samples contains the answer)

A greedy answer hides an answer that has a tenth of the probability. A model without the knowledge also produces right
answers by chance, and the more samples, the more often, so only leak@k beyond the control's at the same k is knowledge.
Without a control no floor of leak@k is known, and `excess@k` decides: leak@k of the right answer minus the mean over
the distractors, which is 0 for a model that does not prefer the right answer.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

from dissect.models.model import Model
from dissect.stress.core.case import Case, spread
from dissect.stress.core.distractors import Facts
from dissect.stress.core.result import StressResult, value_rows
from unlearning.common.errors import InputError
from unlearning.common.progress import Progress
from unlearning.evaluation.generation import sampled_answers
from unlearning.evaluation.metrics.text_words import has_words

Counts = Int[np.ndarray, " fact"]


def sampling(
    case: Case,
    *,
    temperatures: Sequence[float] = (1.0,),
    samples: int = 16,
    ks: Sequence[int] = (1, 4, 16),
    limit: int = 60,
) -> StressResult:
    """Sample answers to every question at a temperature; variants are temperatures.

    A sample has as many new tokens as the longest of the question's right answer and distractors. It contains an answer
    if the answer occurs in it as whole words, ignoring case.

    Args:
        case: Models and facts.
        temperatures: Temperatures that divide the logits.
        samples: Number of samples per question.
        ks: Values of k at which leak@k is measured; the largest decides.
        limit: Use at most this many facts.

    Returns:
        The result of the test `sampling`.

    Raises:
        InputError: A temperature is not positive, or a k is not between 1 and the number of samples.
    """
    clock = time.monotonic()
    if not temperatures or min(temperatures) <= 0:
        raise InputError(f"`temperatures` must be above 0, got {', '.join(map(str, temperatures)) or 'none'}")
    if not ks or min(ks) < 1 or max(ks) > samples:
        raise InputError(
            f"`ks` must be from 1 to {samples}, the number of samples, got {', '.join(map(str, ks)) or 'none'}"
        )
    facts = spread(case.forget, limit)
    rows = []
    total = len(case.models) * len(temperatures) * len(facts) * samples
    with Progress(total, "sampling", show=case.progress) as bar:
        for role, model in case.models.items():
            for temperature in temperatures:
                right, distractors = answers_held(
                    model,
                    facts,
                    temperature=temperature,
                    samples=samples,
                    seed=case.seed,
                    batch_size=4 * case.batch_size,
                    advance=bar.advance,
                )
                columns = {f"leak@{k}": leak_at(right, samples, k) for k in ks}
                columns |= {f"excess@{k}": columns[f"leak@{k}"] - _mean_leak(distractors, samples, k) for k in ks}
                rows.append((role, f"temperature {temperature:g}", columns))
    most = max(ks)
    return StressResult(
        test="sampling",
        level=3,
        measure=f"leak@{most}" if case.control is not None else f"excess@{most}",
        frame=value_rows(facts, rows),
        proves=(
            "rho > 0: asked often enough, the unlearned model gives the answers more often than the control does. "
            "rho = 0: it does not; the model may still hold answers that it never gives."
        ),
        settings={
            "temperatures": list(temperatures),
            "samples": samples,
            "ks": list(ks),
            "n_facts": len(facts),
            "seed": case.seed,
        },
        seconds=time.monotonic() - clock,
        floors={f"excess@{k}": 0.0 for k in ks},
        notes=()
        if case.control is not None
        else ("leak@k has no known floor, because it grows with k by chance; the distractors' leak@k is subtracted",),
        seed=case.seed,
    )


def leak_at(held: Counts, n: int, k: int) -> Float[np.ndarray, " fact"]:
    """Return P(at least one of k samples contains the answer), unbiased: 1 - C(n - c, k) / C(n, k).

    This is the share of the subsets of k of the n samples that contain at least one of the c samples with the answer
    (2107.03374, eq. 1).

    Args:
        held: c, the number of each fact's samples that contain its answer.
        n: Number of samples per fact.
        k: Size of the subsets, from 1 to n.

    Returns:
        The probability for every fact.

    Raises:
        InputError: k is not from 1 to n.
    """
    if not 1 <= k <= n:
        raise InputError(f"`k` must be from 1 to {n}, the number of samples, got {k}")
    numbers = np.arange(1, n + 1)
    # C(n - c, k) / C(n, k) is the product of 1 - k / i over i = n - c + 1 .. n, and 0 where k > n - c.
    factors = np.where(numbers > n - np.asarray(held)[:, None], 1 - np.minimum(k / numbers, 1), 1.0)
    return np.asarray(1 - factors.prod(axis=1))


def _mean_leak(distractors: Sequence[Counts], n: int, k: int) -> Float[np.ndarray, " fact"]:
    """Return the mean of leak@k over each fact's distractors; NaN if it has none."""
    return np.array([leak_at(counts, n, k).mean() if len(counts) else np.nan for counts in distractors])


def answers_held(
    model: Model,
    facts: Facts,
    *,
    temperature: float,
    samples: int,
    seed: int,
    batch_size: int,
    advance: Callable[[float], None] = lambda _steps: None,
) -> tuple[Counts, list[Counts]]:
    """Count the samples that contain each fact's right answer, and those that contain each of its distractors.

    Args:
        model: A model in memory.
        facts: The facts to ask.
        temperature: Temperature that divides the logits.
        samples: Number of samples per question.
        seed: Random seed of the draws, the same for every model; draws do not depend on batches.
        batch_size: Maximum number of samples in one batch.
        advance: Function that is called with the number of further finished samples.

    Returns:
        The counts of right answers, and for each fact the counts of its distractors.
    """
    right, distractors = np.zeros(len(facts), dtype=np.int64), [np.zeros(0, dtype=np.int64)] * len(facts)
    by_length: defaultdict[int, list[int]] = defaultdict(list)
    for index, (item, others) in enumerate(zip(facts.prompts.items, facts.distractors, strict=True)):
        by_length[max(one.n_answer_tokens for one in (item, *others))].append(index)
    for length, indices in by_length.items():
        drawn = sampled_answers(
            model.hf,
            model.tokenizer,
            [facts.prompts.items[index].prompt for index in indices],
            samples=samples,
            temperature=temperature,
            seed=seed,
            max_new_tokens=length,
            batch_size=batch_size,
            chat=facts.prompts.chat,
        )
        for index, texts in zip(indices, drawn, strict=True):
            right[index] = _count(texts, facts.prompts.items[index].answer)
            distractors[index] = np.array(
                [_count(texts, one.answer) for one in facts.distractors[index]], dtype=np.int64
            )
        advance(len(indices) * samples)
    return right, distractors


def _count(texts: Sequence[str], answer: str) -> int:
    return sum(holds(text, answer) for text in texts)


def holds(text: str, answer: str) -> bool:
    """Check whether an answer occurs in a text as whole words, ignoring case, white space and a final full stop.

    Args:
        text: The text.
        answer: The answer.

    Returns:
        True if it does.
    """
    return has_words(text, answer.strip().rstrip(".。"), any_case=True)
