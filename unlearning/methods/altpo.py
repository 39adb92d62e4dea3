"""AltPO (alternate preference optimisation): DPO whose preferred answers the reference model generates itself.

Loss: J = gamma F + alpha R, F = -(2 / beta) mean_b log sigmoid(beta (r_b(alternate) - r_b(forget))) >= 0.
Needs: forget data with questions, sequence losses of the reference model; retain data unless alpha = 0. Alternates are
generated if none are given.
Source: Alternate Preference Optimization for Unlearning (AltPO), arXiv 2409.13474.
"""

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
from unlearning.data.chat import chat_format
from unlearning.data.question_answer import Example
from unlearning.data.records import read_records
from unlearning.evaluation.generation import sampled_answers
from unlearning.evaluation.metrics.text_match import exact_match
from unlearning.methods.method import Batch, Method, Needs
from unlearning.methods.stages import PreparationInputs, PreparedData
from unlearning.methods.terms import PREFERENCE_REFERENCES, RetainLoss, preference, retain_references, retain_term
from unlearning.options import option

SOURCE = "AltPO 2409.13474"
STOP_TEXTS = ("Question:", "Q:")
ROUNDS = 4
"""Rounds in which answers are drawn for prompts that have no alternate yet."""


@dataclass(frozen=True)
class AltPOOptions:
    """Options of AltPO.

    The paper uses beta 0.05 to 0.5, alpha 1 to 5, and 2 epochs.
    """

    beta: float = option(0.1, "inverse temperature of the preference loss", source=SOURCE, above=0)
    samples: int = option(5, "alternates drawn for each prompt", source=SOURCE, minimum=1)
    temperature: float = option(1.0, "sampling temperature of the alternates", source=SOURCE, above=0)
    max_new_tokens: int = option(200, "longest alternate in tokens", source=SOURCE, minimum=1)
    alternate_template: str = option(
        "{prompt}",
        "text that alternates continue; for a model that follows instructions, one that quotes {answer} and asks for "
        "other facts",
    )
    gamma: float = option(1.0, "weight of the forget loss", source=SOURCE, minimum=0)
    alpha: float = option(1.0, "weight of the retain loss (0: none)", source=SOURCE, minimum=0)
    retain_loss: RetainLoss = option("nll", "loss on retain data: nll or kl", source=SOURCE)


def forget_loss(model: PreTrainedModel, batch: Batch, options: AltPOOptions) -> Float[Tensor, ""]:
    """Compute F = -(2 / beta) mean_b log sigmoid(beta (r_b(alternate) - r_b(forget))) >= 0."""
    return preference(model, batch, beta=options.beta)


def draw_alternates(inputs: PreparationInputs, options: AltPOOptions) -> PreparedData:
    """Generate alternate answers with the reference model, without those that are empty or equal the forget answer.

    Alternates that the user gave are used unchanged. For prompts without any alternate, answers are drawn again with
    another seed. The alternates are kept in the run's directory, and a resumed run reads them from there.

    Args:
        inputs: Reference model, tokenizer and forget examples.
        options: AltPO's options.

    Returns:
        The alternates and counts of drawn and dropped answers; empty if the user gave alternates.

    Raises:
        InputError: Some prompts have no alternate, or the template lacks the prompt.
    """
    if inputs.alternates is not None:
        return PreparedData()
    if "{prompt}" not in options.alternate_template:
        raise InputError(f"`alternate_template` must contain {{prompt}}, got {options.alternate_template!r}")
    kept = None if inputs.output_dir is None else inputs.output_dir / "alternates.jsonl"
    if kept is not None and kept.is_file():
        return PreparedData(alternates=_read(kept), notes={"alternates": {"read_from": kept.name}})
    drawn = _Drawn([[] for _ in inputs.forget])
    with Progress(len(inputs.forget), "alternates", show=inputs.progress) as bar:
        for number in range(ROUNDS):
            if drawn.lacking():
                _draw(inputs, options, drawn, seed=inputs.seed + number, advance=bar.update)
    lacking = drawn.lacking()
    if lacking:
        raise InputError(
            f"{len(lacking)} of {len(inputs.forget)} forget prompts have no alternate after {ROUNDS} rounds of "
            f"{options.samples} samples: all were empty or equal to the forget answer (the first prompt: "
            f"{inputs.forget[lacking[0]].prompt[-60:]!r}). Set a higher `temperature`, or give `alternates`."
        )
    if kept is not None and kept.parent.is_dir():
        _write(kept, inputs.forget, drawn.kept)
    counts = {"drawn": drawn.n_drawn, "dropped_empty": drawn.n_empty, "dropped_equal_to_the_answer": drawn.n_same}
    return PreparedData(alternates=drawn.kept, notes={"alternates": counts})


@dataclass
class _Drawn:
    """Alternates of each forget example, and counts of drawn and dropped answers."""

    kept: list[list[str]]
    n_drawn: int = 0
    n_empty: int = 0
    n_same: int = 0

    def lacking(self) -> list[int]:
        """Return the indices of the forget examples without alternates."""
        return [index for index, answers in enumerate(self.kept) if not answers]


def _draw(
    inputs: PreparationInputs, options: AltPOOptions, drawn: _Drawn, *, seed: int, advance: Callable[[int, int], None]
) -> None:
    """Draw answers once for the forget examples that have no alternate yet."""
    lacking = [(index, inputs.forget[index]) for index in drawn.lacking()]
    template = options.alternate_template
    prompts = [template.replace("{prompt}", e.prompt).replace("{answer}", e.answer) for _, e in lacking]
    answers = sampled_answers(
        inputs.model,
        inputs.tokenizer,
        prompts,
        samples=options.samples,
        temperature=options.temperature,
        seed=seed,
        max_new_tokens=options.max_new_tokens,
        stop_texts=STOP_TEXTS,
        batch_size=inputs.batch_size,
        chat=chat_format(inputs.tokenizer, inputs.training.chat_date) if inputs.training.chat else None,
        advance=advance,
    )
    for (index, example), row in zip(lacking, answers, strict=True):
        same = [answer for answer in row if exact_match(answer, example.answer)]
        drawn.kept[index] = [answer for answer in row if answer and answer not in same]
        drawn.n_drawn += len(row)
        drawn.n_same += len(same)
        drawn.n_empty += row.count("")


def _write(path: Path, forget: Sequence[Example], alternates: Sequence[Sequence[str]]) -> None:
    """Write one record per forget example, completely or not at all."""
    rows = [asdict(example) | {"alternates": drawn} for example, drawn in zip(forget, alternates, strict=True)]
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(partial, path)


def _read(path: Path) -> list[list[str]]:
    return [record["alternates"] for record in read_records(path)]


ALTPO = Method(
    name="altpo",
    summary="loss of dpo, with alternates generated by the reference model",
    source=SOURCE,
    options=AltPOOptions,
    needs=lambda options: Needs(
        retain=options.alpha > 0,
        alternates=True,
        references=(*PREFERENCE_REFERENCES, *retain_references(options)),
    ),
    needs_note="forget, reference, retain unless alpha=0, alternates (optional)",
    forget_loss=forget_loss,
    retain_loss=retain_term,
    prepare=draw_alternates,
)
