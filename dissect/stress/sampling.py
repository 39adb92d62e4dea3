"""Sampling: does an answer come out if one asks often enough?

    leak@k = P(at least one of k samples holds the answer)

A greedy answer hides what has a tenth of the probability. Guessing finds answers too, more often with more samples, so
only leak@k beyond a never model's at the same k is knowledge. There is no score that a model must have that never knew:
where there is no never model, `excess@k` decides: leak@k of the answer minus the mean of the wrong answers', 0 for a
model that does not prefer the right one.
"""

import re
import time
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

from dissect.models.model import Model
from dissect.stress.core.case import Case, spread
from dissect.stress.core.distractors import Facts
from dissect.stress.core.result import StressResult, value_rows
from dissect.stress.rewording import takes_special_tokens
from unlearning.common.errors import InputError
from unlearning.common.progress import Progress
from unlearning.evaluation.generation import sampled_answers

Counts = Int[np.ndarray, " fact"]


def sampling(
    case: Case,
    *,
    temperatures: Sequence[float] = (1.0,),
    samples: int = 16,
    ks: Sequence[int] = (1, 4, 16),
    limit: int = 60,
) -> StressResult:
    """Ask every question many times at temperature; variants are temperatures.

    A sample has as many new tokens as the longest of the question's right and wrong answers, and holds an answer where
    that stands in it as whole words, whatever their case.

    Args:
        case: models and facts.
        temperatures: the logits are divided by them.
        samples: how many of each question.
        ks: leak@k is measured at each; the largest decides.
        limit: most facts that are asked.

    Raises:
        InputError: a temperature that is not positive, or k that is not between 1 and the number of samples.
    """
    clock = time.monotonic()
    if not temperatures or min(temperatures) <= 0:
        raise InputError("sampling: give temperatures above 0, as 1.0")
    if not ks or min(ks) < 1 or max(ks) > samples:
        raise InputError(f"sampling: leak@k of {samples} samples needs k from 1 to {samples}; give more samples")
    facts = spread(case.forget, limit)
    rows = []
    total = len(case.models) * len(temperatures) * len(facts) * samples
    with Progress(total, "sampling", show=case.progress) as bar:
        for role, model in case.models.items():
            for temperature in temperatures:
                right, wrong = answers_held(
                    model,
                    facts,
                    temperature=temperature,
                    samples=samples,
                    seed=case.seed,
                    batch_size=4 * case.batch_size,
                    advance=bar.advance,
                )
                columns = {f"leak@{k}": leak_at(right, samples, k) for k in ks}
                columns |= {f"excess@{k}": columns[f"leak@{k}"] - _mean_leak(wrong, samples, k) for k in ks}
                rows.append((role, f"temperature {temperature:g}", columns))
    most = max(ks)
    return StressResult(
        test="sampling",
        level=3,
        measure=f"leak@{most}" if case.control is not None else f"excess@{most}",
        frame=value_rows(facts, rows),
        proves=(
            "Above zero: the unlearned model says answers, asked often enough, more often than a model that never "
            "knew. At zero: it says them no more often; what it never says it may still hold."
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
        else ("leak@k has no known floor: guessing grows with k; the wrong answers' leak@k was taken off instead",),
        seed=case.seed,
    )


def leak_at(held: Counts, n: int, k: int) -> Float[np.ndarray, " fact"]:
    """P(at least one of k samples holds the answer), unbiased: 1 - C(n - c, k) / C(n, k).

    The share of the subsets of k of the n samples that have one of the c samples that hold it (2107.03374, eq. 1).

    Args:
        held: c, how many of each fact's samples hold its answer.
        n: samples of each fact.
        k: from 1 to n.

    Raises:
        InputError: k is not from 1 to n.
    """
    if not 1 <= k <= n:
        raise InputError(f"leak@{k} of {n} samples: k is from 1 to {n}")
    numbers = np.arange(1, n + 1)
    # C(n - c, k) / C(n, k) is the product of 1 - k / i over i = n - c + 1 .. n, and 0 where k > n - c.
    factors = np.where(numbers > n - np.asarray(held)[:, None], 1 - np.minimum(k / numbers, 1), 1.0)
    return np.asarray(1 - factors.prod(axis=1))


def _mean_leak(wrong: Sequence[Counts], n: int, k: int) -> Float[np.ndarray, " fact"]:
    """The mean over each fact's wrong answers; NaN where it has none."""
    return np.array([leak_at(counts, n, k).mean() if len(counts) else np.nan for counts in wrong])


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
    """In how many samples each fact's right answer stands, and each of its wrong ones.

    Args:
        model: in memory.
        facts: what is asked.
        temperature: the logits are divided by it.
        samples: of each question.
        seed: of the draws, the same for every model; they do not depend on batches.
        batch_size: most samples in one batch.
        advance: called with how many more samples are done.
    """
    right, wrong = np.zeros(len(facts), dtype=np.int64), [np.zeros(0, dtype=np.int64)] * len(facts)
    by_length: defaultdict[int, list[int]] = defaultdict(list)
    for place, (item, others) in enumerate(zip(facts.prompts.items, facts.distractors, strict=True)):
        by_length[max(one.n_answer_tokens for one in (item, *others))].append(place)
    special = takes_special_tokens(facts.prompts, model.tokenizer)
    for length, places in by_length.items():
        drawn = sampled_answers(
            model.hf,
            model.tokenizer,
            [facts.prompts.items[place].prompt for place in places],
            samples=samples,
            temperature=temperature,
            seed=seed,
            max_new_tokens=length,
            batch_size=batch_size,
            add_special_tokens=special,
        )
        for place, texts in zip(places, drawn, strict=True):
            right[place] = _count(texts, facts.prompts.items[place].answer)
            wrong[place] = np.array([_count(texts, one.answer) for one in facts.distractors[place]], dtype=np.int64)
        advance(len(places) * samples)
    return right, wrong


def _count(texts: Sequence[str], answer: str) -> int:
    return sum(holds(text, answer) for text in texts)


def holds(text: str, answer: str) -> bool:
    """Whether an answer stands in a text as whole words, up to case, white space and a full stop at its end."""
    wanted = r"\s+".join(map(re.escape, answer.strip().rstrip(".").split()))
    return bool(wanted) and re.search(rf"(?<!\w){wanted}(?!\w)", text, re.IGNORECASE) is not None
