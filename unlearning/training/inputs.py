"""The tokenised forget, alternate and retain sets, read from the user's data and checked against the method's needs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unlearning.common.errors import InputError
from unlearning.common.hashing import hash_json
from unlearning.common.places import is_directory, is_there
from unlearning.data.batches import Span
from unlearning.data.chat import ChatFormat, chat_format
from unlearning.data.encoding import Encoded, encode
from unlearning.data.overlap import refuse_overlap
from unlearning.data.question_answer import Example, Wrapping
from unlearning.data.records import read_text
from unlearning.data.refusals import draw_refusals, read_refusals
from unlearning.data.sources import read_alternates, read_training_data
from unlearning.evaluation.during_training import Reading, TrainingBenchmark, evenly_spaced, open_benchmark
from unlearning.methods.method import AnyMethod, Needs
from unlearning.methods.stages import PreparedData
from unlearning.options import TrainOptions
from unlearning.training.evaluation_callback import EvaluationData
from unlearning.training.output_directory import hash_examples

Data = str | Path | Sequence[Example]
"""A file, a named data set such as "tofu:forget05", or examples."""


@dataclass(frozen=True)
class GivenData:
    """The data of a run, as the user gave them; None for what was not given.

    Attributes:
        forget: Examples to forget.
        retain: Examples to keep.
        alternates: A file of refusals, one per line, a file of records, or a list of answers for each forget example.
    """

    forget: Data | None
    retain: Data | None
    alternates: str | Path | Sequence[Sequence[str]] | None


@dataclass(frozen=True)
class Inputs:
    """The data of a run, after reading.

    Attributes:
        forget: Forget examples; None if not given.
        retain: Retain examples; None if not given. A method that does not train on them is evaluated on them.
        alternates: Alternate answers to each forget prompt, given or drawn from refusals; None if the method reads
            none or makes them itself.
        chat: Chat template that wraps the prompts; None for none.
        notes: Remarks about the data, stored in the run's record.
        sources: Name of each set's source, by "forget", "alternate" and "retain"; only of those that have a name.
    """

    forget: Sequence[Example] | None
    retain: Sequence[Example] | None
    alternates: Sequence[Sequence[str]] | None
    chat: ChatFormat | None
    notes: dict[str, Any]
    sources: dict[str, str]

    def hashes(self) -> dict[str, str | None]:
        """Return the content hash of each set, by its key in the run's record; None for a set that is missing."""
        return {
            "forget_data": hash_examples(self.forget),
            "retain_data": hash_examples(self.retain),
            "alternates_data": None if self.alternates is None else hash_json([list(a) for a in self.alternates]),
        }


@dataclass(frozen=True)
class EncodedInputs:
    """The tokenised data of a run.

    Attributes:
        spans: Tokenised sets by name: forget, alternate, retain.
        pairs: Items of an epoch, as (index into forget, index into alternate); the second index is -1 without
            alternates. Empty for a method that reads retain examples alone.
        evaluated: Evenly spaced examples of the forget and the retain set, for evaluations during training.
        notes: Remarks about the data, stored in the run's record.
    """

    spans: dict[str, Sequence[Span]]
    pairs: list[tuple[int, int]]
    evaluated: EvaluationData
    notes: dict[str, Any]

    @property
    def n_items(self) -> int:
        """Number of items of an epoch."""
        return len(self.pairs) or len(self.spans["retain"])


def check_needs(method: AnyMethod, needs: Needs, given: GivenData) -> None:
    """Check that a method gets the data that it needs, and no data that it does not read.

    Args:
        method: The unlearning method.
        needs: Inputs that the method reads.
        given: The user's data.

    Raises:
        InputError: Data are missing or not used.
    """
    if needs.forget and given.forget is None:
        raise InputError(f"{method.name} needs forget data. Give `forget`.")
    if not needs.forget and given.forget is not None:
        raise InputError(f"{method.name} does not read forget data. Remove `forget`.")
    if needs.retain and given.retain is None:
        alpha = method.options.__dataclass_fields__.get("alpha")
        weight = ", or set `alpha` to 0" if alpha and alpha.metadata["above"] is None else ""
        raise InputError(f"{method.name} needs retain data. Give `retain`{weight}.")
    if given.alternates is not None and not needs.alternates:
        raise InputError(f"{method.name} does not read alternate answers. Remove `alternates`.")


def read_inputs(
    needs: Needs,
    options: TrainOptions,
    tokenizer: PreTrainedTokenizerBase,
    given: GivenData,
    *,
    makes_alternates: bool,
) -> Inputs:
    """Read the data that a method needs.

    Args:
        needs: Inputs that the method reads.
        options: The trainer's options, which say how data are read.
        tokenizer: Tokenizer whose chat template may wrap the prompts.
        given: The user's data.
        makes_alternates: The method makes alternates itself if none are given; otherwise refusals are drawn.

    Returns:
        The examples.

    Raises:
        InputError: A file is missing or malformed, a set is empty, or a retain example is also a forget example.
    """
    chat = chat_format(tokenizer, options.chat_date) if options.chat else None
    notes: dict[str, Any] = {}
    forget = _examples("forget", given.forget, options, chat, notes)
    retain = _examples("retain", given.retain, options, chat, notes)
    if forget is not None and retain is not None:
        shared = refuse_overlap(forget, retain)
        if shared:
            notes["overlap"] = list(shared)
    alternates = None
    if needs.alternates and forget is not None and not (makes_alternates and given.alternates is None):
        alternates = _alternates(given.alternates, forget, options, chat)
    named = {"forget": given.forget, "alternate": given.alternates, "retain": given.retain}
    sources = {name: str(source) for name, source in named.items() if isinstance(source, (str, Path))}
    return Inputs(forget, retain, alternates, chat, notes, sources)


def _alternates(
    given: str | Path | Sequence[Sequence[str]] | None,
    forget: list[Example],
    options: TrainOptions,
    chat: ChatFormat | None,
) -> list[list[str]]:
    documents = sum(not example.prompt for example in forget)
    if documents:
        raise InputError(
            f"`forget` must have questions for a method with alternate answers, and {documents} of the {len(forget)} "
            "examples are plain text. Give questions and answers."
        )
    if given is not None and not isinstance(given, (str, Path)):
        answers = [list(each) for each in given]
        if len(answers) != len(forget) or not all(answers):
            raise InputError(
                "`alternates` must have one list of at least one answer for each forget example, got "
                f"{len(answers)} lists for {len(forget)} examples"
            )
        return answers
    if given is None or _is_plain_text(Path(given)):
        return [[refusal] for refusal in draw_refusals(len(forget), read_refusals(given), options.seed)]
    return read_alternates(given, forget, template=options.template, chat=chat, data_dir=options.data_dir)


def _is_plain_text(path: Path) -> bool:
    """Return True if a file holds refusals, one per line, rather than records (TOFU's are named .jsonl)."""
    if not is_there(path) or is_directory(path) or path.suffix.lower() in (".csv", ".tsv", ".parquet"):
        return False
    return read_text(path).lstrip()[:1] not in ("{", "[")


def encode_inputs(
    inputs: Inputs,
    prepared: PreparedData | None,
    needs: Needs,
    options: TrainOptions,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    max_length: int | None,
) -> EncodedInputs:
    """Tokenise all data, before training.

    Args:
        inputs: The data as they were read.
        prepared: Data that the method made; None for a method without a `prepare` stage.
        needs: Inputs that the method reads.
        options: The trainer's options.
        tokenizer: The model's tokenizer.
        model: The model, whose vocabulary the tokens must fit.
        max_length: Longest sequence in tokens; None for no limit.

    Returns:
        Tokenised sets, items of an epoch, and the data of evaluations.

    Raises:
        InputError: An example is too long, or the tokenizer does not belong to the model.
    """
    notes = {**inputs.notes, **((prepared.notes or {}) if prepared else {})}

    def tokenised(examples: Sequence[Example]) -> Encoded:
        return encode(
            tokenizer,
            examples,
            append_eos=options.append_eos,
            max_length=max_length,
            too_long=options.too_long,
            chat=inputs.chat,
        )

    spans: dict[str, Sequence[Span]] = {"forget": [], "alternate": [], "retain": []}
    origins: dict[str, list[int]] = {}
    for name, examples in (("forget", inputs.forget), ("retain", inputs.retain)):
        if examples is None:
            continue
        encoded = tokenised(examples)
        spans[name], origins[name] = encoded.spans, encoded.origin
        if encoded.notes:
            notes[name] = [*notes.get(name, []), *encoded.notes]
    evaluated = replace(
        _evaluated(inputs, spans, origins, options.eval_examples), benchmark=_benchmark(options, inputs.chat)
    )
    if not needs.retain:
        spans["retain"] = []
    if prepared is not None and prepared.forget is not None:
        spans["forget"], origins["forget"] = prepared.forget, list(range(len(prepared.forget)))
    pairs = [(index, -1) for index in range(len(spans["forget"]))]
    if needs.alternates:
        answers = prepared.alternates if prepared and prepared.alternates is not None else inputs.alternates
        assert inputs.forget is not None and answers is not None
        every = [
            (index, Example(inputs.forget[origin].prompt, answer))
            for index, origin in enumerate(origins["forget"])
            for answer in answers[origin]
        ]
        encoded = tokenised([example for _, example in every])
        spans["alternate"] = encoded.spans
        if encoded.notes:
            notes["alternates"] = list(encoded.notes)
        pairs = [(every[origin][0], index) for index, origin in enumerate(encoded.origin)]
    _check_vocabulary(model, spans)
    return EncodedInputs(spans, pairs, evaluated, notes)


def _evaluated(
    inputs: Inputs, spans: Mapping[str, Sequence[Span]], origins: Mapping[str, Sequence[int]], limit: int
) -> EvaluationData:
    """Return at most `limit` examples of each set, from all of it: data are often sorted by subject."""
    examples: dict[str, Sequence[Example]] = {}
    chosen: dict[str, Sequence[Span]] = {}
    for name, read in (("forget", inputs.forget), ("retain", inputs.retain)):
        if read is not None:
            chosen[name] = evenly_spaced(spans[name], limit)
            examples[name] = [read[origin] for origin in evenly_spaced(origins[name], limit)]
    return EvaluationData(examples, chosen, inputs.chat)


def benchmark_reading(options: TrainOptions, chat: ChatFormat | None) -> Reading:
    """Return how a benchmark's data are read during training."""
    template = {} if options.template is None else {"template": options.template}
    return Reading(
        options.data_dir,
        Wrapping(**template, chat=chat),
        options.benchmark_rows,
        options.benchmark_generate,
        options.append_eos,
    )


def _benchmark(options: TrainOptions, chat: ChatFormat | None) -> TrainingBenchmark | None:
    if options.benchmark is None:
        return None
    return open_benchmark(
        options.benchmark,
        benchmark_reading(options, chat),
        control=options.benchmark_control,
        device=None if options.device == "auto" else options.device,
        batch_size=options.batch_size,
    )


def _examples(
    name: str, data: Data | None, options: TrainOptions, chat: ChatFormat | None, notes: dict[str, Any]
) -> list[Example] | None:
    if data is None:
        return None
    if isinstance(data, (str, Path)):
        read = read_training_data(
            data, template=options.template, chat=chat, data_dir=options.data_dir, pack=options.pack
        )
        notes[name] = [f"{read.source}: {', '.join(read.notes)}"]
        return read.examples
    examples = list(data)
    if not examples:
        raise InputError(f"`{name}` must have at least one example, got none")
    for index, example in enumerate(examples):
        if not isinstance(example, Example):
            raise InputError(
                f"`{name}` must hold examples, got {type(example).__name__} at index {index}. "
                "Use unlearning.Example(prompt, answer)."
            )
    return examples


def _check_vocabulary(model: PreTrainedModel, spans: Mapping[str, Sequence[Span]]) -> None:
    size = int(model.config.get_text_config().vocab_size)
    largest = max(max(span.input_ids) for some in spans.values() for span in some)
    if largest >= size:
        raise InputError(
            f"`tokenizer` must belong to the model, got token {largest} from it, and the model has {size} tokens"
        )
