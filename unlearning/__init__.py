"""The workshop: trains and evaluates unlearning methods, and knows nothing of interventions."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unlearning.common.errors import InputError
from unlearning.data.question_answer import Example, read_examples

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from unlearning.training.train import TrainResult

__all__ = ["Example", "InputError", "read_examples", "train"]


def train(
    method: str,
    *,
    model: "str | Path | PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    forget: str | Path | Sequence[Example] | None = None,
    retain: str | Path | Sequence[Example] | None = None,
    alternates: str | Path | Sequence[Sequence[str]] | None = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    **options: Any,
) -> "TrainResult":
    """Train a model by one of the methods that `unlearn methods` lists.

    Args:
        method: for example "finetune", "grad_diff", "npo".
        model: a directory, a hub id, or a loaded model, which is then trained in place.
        tokenizer: by default the one in the model's directory.
        forget: what to forget: a file of question-answer or prompt-answer records, or examples.
        retain: what to keep, likewise.
        alternates: other answers to the forget prompts for the methods that prefer them (dpo, idk, kto): a text file
            of refusals, one a line, a file of question-answer records, or a list of answers for each forget example.
            By default refusals of our own.
        output_dir: where to save weights, tokenizer, `unlearning.json` and a model card; nothing is saved without it.
        resume: go on with an unfinished run of the same configuration in `output_dir` (option `save_every`).
        progress: a progress bar on stderr.
        **options: the method's and the trainer's options, flat; see `unlearn methods`.

    Returns:
        The trained model, its tokenizer, the history of the losses and the resolved options.

    Raises:
        InputError: bad options or data, data that the method needs and lacks, a loss that is not finite, an output
            directory that holds something else.
    """
    # Imported here so that `unlearn --help` need not wait for torch.
    from unlearning.training.train import train as train_with

    return train_with(
        method,
        model=model,
        tokenizer=tokenizer,
        forget=forget,
        retain=retain,
        alternates=alternates,
        output_dir=output_dir,
        resume=resume,
        progress=progress,
        options=options,
    )
