"""Alternate preference optimisation: DPO with winners that the start model makes up itself."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from unlearning.common.errors import InputError
from unlearning.common.progress import Progress
from unlearning.data.question_answer import Example
from unlearning.data.records import read_records
from unlearning.evaluation.generation import sampled_answers
from unlearning.evaluation.metrics.text_match import exact_match
from unlearning.methods.method import Batch, Method, Needs
from unlearning.methods.stages import Prepared, Start
from unlearning.methods.terms import PREFERENCE_REFERENCES, RetainLoss, preference, retain_references, retain_term
from unlearning.options import option

SOURCE = "AltPO 2409.13474"
STOP_TEXTS = ("Question:", "Q:")
ROUNDS = 4
"""Times that answers are drawn for a prompt that has none yet."""


@dataclass(frozen=True)
class AltPOOptions:
    """Inverse temperature, how alternates are drawn, the retain loss and the weights of the two losses.

    The paper's beta is 0.05 to 0.5 and its alpha 1 to 5, for 2 epochs.
    """

    beta: float = option(0.1, "inverse temperature", source=SOURCE, above=0)
    samples: int = option(5, "alternates drawn for each prompt", source=SOURCE, minimum=1)
    temperature: float = option(1.0, "that they are drawn at", source=SOURCE, above=0)
    max_new_tokens: int = option(200, "of an alternate", source=SOURCE, minimum=1)
    alternate_template: str = option(
        "{prompt}",
        "what alternates continue; an instruction that quotes {answer} and asks for other facts, where the model "
        "follows instructions",
    )
    gamma: float = option(1.0, "weight of the forget loss", source=SOURCE, minimum=0)
    alpha: float = option(1.0, "weight of the retain loss (0: none)", source=SOURCE, minimum=0)
    retain_loss: RetainLoss = option("nll", "nll or kl", source=SOURCE)


def forget_loss(model: PreTrainedModel, batch: Batch, options: AltPOOptions) -> Float[Tensor, ""]:
    """F = -(2 / beta) mean_b log sigmoid(beta (r_b(alternate) - r_b(forget))), r = L^ref - L; F >= 0."""
    return preference(model, batch, beta=options.beta)


def draw_alternates(start: Start, options: AltPOOptions) -> Prepared:
    """Alternates drawn from the start model, but for those that are empty or the forget answer itself.

    Alternates that the user gives are used as they are. A prompt that is left without any is drawn for again, with
    other random numbers. They are kept in the run's directory where there is one, and read from there by a run that
    goes on.

    Raises:
        InputError: some prompts are left without an alternate, or the template has no place for the prompt.
    """
    if start.alternates is not None:
        return Prepared()
    if "{prompt}" not in options.alternate_template:
        raise InputError(f"alternate_template={options.alternate_template!r} has no {{prompt}}; put it in")
    kept = None if start.output_dir is None else start.output_dir / "alternates.jsonl"
    if kept is not None and kept.is_file():
        return Prepared(alternates=_read(kept), notes={"alternates": {"read_from": kept.name}})
    drawn = _Drawn([[] for _ in start.forget])
    with Progress(len(start.forget), "alternates", show=start.progress) as bar:
        for number in range(ROUNDS):
            if drawn.lacking():
                _draw(start, options, drawn, seed=start.seed + number, advance=bar.update)
    lacking = drawn.lacking()
    if lacking:
        raise InputError(
            f"{len(lacking)} of {len(start.forget)} forget prompts got no alternate in {ROUNDS} rounds of "
            f"{options.samples}: all were empty or the forget answer (the first: "
            f"{start.forget[lacking[0]].prompt[-60:]!r}); raise temperature, or give --alternates"
        )
    if kept is not None and kept.parent.is_dir():
        _write(kept, start.forget, drawn.kept)
    counts = {"drawn": drawn.n_drawn, "dropped_empty": drawn.n_empty, "dropped_equal_to_the_answer": drawn.n_same}
    return Prepared(alternates=drawn.kept, notes={"alternates": counts})


@dataclass
class _Drawn:
    """Alternates of each forget example, and what became of those that were drawn."""

    kept: list[list[str]]
    n_drawn: int = 0
    n_empty: int = 0
    n_same: int = 0

    def lacking(self) -> list[int]:
        """Places of the forget examples that have none."""
        return [place for place, answers in enumerate(self.kept) if not answers]


def _draw(
    start: Start, options: AltPOOptions, drawn: _Drawn, *, seed: int, advance: Callable[[int, int], None]
) -> None:
    """One round, for the forget examples that have no alternate yet."""
    lacking = [(place, start.forget[place]) for place in drawn.lacking()]
    template = options.alternate_template
    prompts = [template.replace("{prompt}", e.prompt).replace("{answer}", e.answer) for _, e in lacking]
    answers = sampled_answers(
        start.model,
        start.tokenizer,
        prompts,
        samples=options.samples,
        temperature=options.temperature,
        seed=seed,
        max_new_tokens=options.max_new_tokens,
        stop_texts=STOP_TEXTS,
        batch_size=start.batch_size,
        add_special_tokens=not start.training.chat,  # whose template has written them
        advance=advance,
    )
    for (place, example), row in zip(lacking, answers, strict=True):
        same = [answer for answer in row if exact_match(answer, example.answer)]
        drawn.kept[place] = [answer for answer in row if answer and answer not in same]
        drawn.n_drawn += len(row)
        drawn.n_same += len(same)
        drawn.n_empty += row.count("")


def _write(path: Path, forget: Sequence[Example], alternates: Sequence[Sequence[str]]) -> None:
    """One record a forget example; whole or not at all."""
    rows = [asdict(example) | {"alternates": drawn} for example, drawn in zip(forget, alternates, strict=True)]
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(partial, path)


def _read(path: Path) -> list[list[str]]:
    return [record["alternates"] for record in read_records(path)]


ALTPO = Method(
    name="altpo",
    summary="dpo, its alternates drawn from the start model",
    source=SOURCE,
    options=AltPOOptions,
    needs=lambda options: Needs(
        retain=options.alpha > 0,
        alternates=True,
        references=(*PREFERENCE_REFERENCES, *retain_references(options)),
    ),
    needs_note="forget, reference, retain unless alpha=0; alternates where they are given",
    forget_loss=forget_loss,
    retain_loss=retain_term,
    prepare=draw_alternates,
)
