"""From what the user names to tokenised forget, alternate and retain sets, checked against what the method needs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unlearning.common.errors import InputError
from unlearning.common.hashing import hash_json
from unlearning.data.batches import Span
from unlearning.data.chat import ChatFormat, chat_format
from unlearning.data.encoding import Encoded, encode
from unlearning.data.overlap import refuse_overlap
from unlearning.data.question_answer import Example, Wrapping
from unlearning.data.records import read_text
from unlearning.data.refusals import draw_refusals, read_refusals
from unlearning.data.sources import read_alternates, read_training_data
from unlearning.evaluation.during_training import Reading, TrainingBenchmark, open_benchmark
from unlearning.methods.method import AnyMethod, Needs
from unlearning.methods.stages import Prepared
from unlearning.options import TrainOptions
from unlearning.training.evaluation_callback import Watched
from unlearning.training.output_directory import hash_examples

Data = str | Path | Sequence[Example]


@dataclass(frozen=True)
class Inputs:
    """What was read.

    Attributes:
        forget, retain: examples, where they were given. A method that does not train on retain examples is watched
            on them.
        alternates: other answers to each forget prompt, given or drawn from refusals; None where the method reads
            none or makes them itself.
        chat: the chat template that wraps the prompts.
        notes: what there is to say of them.
    """

    forget: Sequence[Example] | None
    retain: Sequence[Example] | None
    alternates: Sequence[Sequence[str]] | None
    chat: ChatFormat | None
    notes: dict[str, Any]

    def hashes(self) -> dict[str, str | None]:
        """Content hashes, by the names that the run's record has."""
        return {
            "forget_data": hash_examples(self.forget),
            "retain_data": hash_examples(self.retain),
            "alternates_data": None if self.alternates is None else hash_json([list(a) for a in self.alternates]),
        }


@dataclass(frozen=True)
class EncodedInputs:
    """What is trained on and what is watched.

    Attributes:
        spans: forget, alternate and retain, tokenised.
        pairs: (place in forget, place in alternate) of every item of an epoch; -1 without alternates; empty for a
            method that reads retain examples alone.
        watched: the first examples of both sets, as they are measured during training.
        notes: what there is to say of them.
    """

    spans: dict[str, Sequence[Span]]
    pairs: list[tuple[int, int]]
    watched: Watched
    notes: dict[str, Any]


def check_needs(method: AnyMethod, needs: Needs, *, forget: Data | None, retain: Data | None, alternates: Any) -> None:
    """Refuse a method that does not get what it needs, and data that it has no use for.

    Raises:
        InputError: says what to give.
    """
    if needs.forget and forget is None:
        raise InputError(f"{method.name} needs forget data; give --forget FILE (forget=... in Python)")
    if not needs.forget and forget is not None:
        raise InputError(f"{method.name} has no use for forget data; leave --forget out")
    if needs.retain and retain is None:
        weight = " or set alpha=0" if any(f == "alpha" for f in method.options.__dataclass_fields__) else ""
        raise InputError(f"{method.name} needs retain data; give --retain FILE (retain=... in Python){weight}")
    if alternates is not None and not needs.alternates:
        raise InputError(f"{method.name} has no use for alternate answers; leave --alternates out")


def read_inputs(
    needs: Needs,
    options: TrainOptions,
    tokenizer: PreTrainedTokenizerBase,
    *,
    makes_alternates: bool,
    forget: Data | None,
    retain: Data | None,
    alternates: str | Path | Sequence[Sequence[str]] | None,
) -> Inputs:
    """Read the data that the method needs.

    Args:
        needs: of the method.
        options: how the data are read.
        tokenizer: whose chat template may wrap them.
        makes_alternates: whether the method makes alternates itself where none are given; else refusals are drawn.
        forget, retain, alternates: what the user named.

    Raises:
        InputError: a file is missing or broken, a set is empty, or a retain example is a forget example.
    """
    chat = chat_format(tokenizer, options.chat_date) if options.chat else None
    notes: dict[str, Any] = {}
    read = {
        name: _examples(name, data, options, chat, notes) for name, data in (("forget", forget), ("retain", retain))
    }
    if read["forget"] is not None and read["retain"] is not None:
        shared = refuse_overlap(read["forget"], read["retain"])
        if shared:
            notes["overlap"] = list(shared)
    others = None
    if needs.alternates and read["forget"] is not None and not (makes_alternates and alternates is None):
        others = _alternates(alternates, read["forget"], options, chat)
    return Inputs(read["forget"], read["retain"], others, chat, notes)


def _alternates(
    given: str | Path | Sequence[Sequence[str]] | None,
    forget: list[Example],
    options: TrainOptions,
    chat: ChatFormat | None,
) -> list[list[str]]:
    documents = sum(not example.prompt for example in forget)
    if documents:
        raise InputError(
            f"{documents} of the {len(forget)} forget examples are plain text, which has no question that an alternate "
            "could answer; give questions and answers"
        )
    if given is not None and not isinstance(given, (str, Path)):
        answers = [list(each) for each in given]
        if len(answers) != len(forget) or not all(answers):
            raise InputError(
                f"{len(answers)} lists of alternates for {len(forget)} forget examples; give each example a list of "
                "one answer or more"
            )
        return answers
    if given is None or _is_plain_text(Path(given)):
        return [[refusal] for refusal in draw_refusals(len(forget), read_refusals(given), options.seed)]
    return read_alternates(given, forget, template=options.template, chat=chat, data_dir=options.data_dir)


def _is_plain_text(path: Path) -> bool:
    """Whether a file holds refusals, one a line, and not records; TOFU's is named .jsonl and holds none."""
    if not path.is_file() or path.suffix in (".csv", ".tsv", ".parquet"):
        return False
    return read_text(path).lstrip()[:1] not in ("{", "[")


def encode_inputs(
    inputs: Inputs,
    prepared: Prepared | None,
    needs: Needs,
    options: TrainOptions,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    max_length: int | None,
) -> EncodedInputs:
    """Tokenise everything once, before training.

    Raises:
        InputError: an example is too long, or the tokenizer is not the model's.
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
    watched = replace(
        _watched(inputs, spans, origins, options.eval_examples), benchmark=_benchmark(options, inputs.chat)
    )
    if not needs.retain:
        spans["retain"] = []
    if prepared is not None and prepared.forget is not None:
        spans["forget"], origins["forget"] = prepared.forget, list(range(len(prepared.forget)))
    pairs = [(place, -1) for place in range(len(spans["forget"]))]
    if needs.alternates:
        answers = prepared.alternates if prepared and prepared.alternates is not None else inputs.alternates
        assert inputs.forget is not None and answers is not None
        every = [
            (place, Example(inputs.forget[origin].prompt, answer))
            for place, origin in enumerate(origins["forget"])
            for answer in answers[origin]
        ]
        encoded = tokenised([example for _, example in every])
        spans["alternate"] = encoded.spans
        if encoded.notes:
            notes["alternates"] = list(encoded.notes)
        pairs = [(every[origin][0], place) for place, origin in enumerate(encoded.origin)]
    _check_vocabulary(model, spans)
    return EncodedInputs(spans, pairs, watched, notes)


def _watched(
    inputs: Inputs, spans: Mapping[str, Sequence[Span]], origins: Mapping[str, Sequence[int]], limit: int
) -> Watched:
    examples: dict[str, Sequence[Example]] = {}
    first: dict[str, Sequence[Span]] = {}
    for name, read in (("forget", inputs.forget), ("retain", inputs.retain)):
        if read is not None:
            first[name] = spans[name][:limit]
            examples[name] = [read[origin] for origin in origins[name][:limit]]
    return Watched(examples, first, inputs.chat)


def _benchmark(options: TrainOptions, chat: ChatFormat | None) -> TrainingBenchmark | None:
    if options.benchmark is None:
        return None
    template = {} if options.template is None else {"template": options.template}
    reading = Reading(
        options.data_dir, Wrapping(**template, chat=chat), options.benchmark_rows, options.benchmark_generate
    )
    return open_benchmark(
        options.benchmark,
        reading,
        retain=options.benchmark_retain,
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
        raise InputError(f"the {name} data is empty; give at least one example")
    for place, example in enumerate(examples):
        if not isinstance(example, Example):
            raise InputError(f"{name}[{place}] is {type(example).__name__}; give unlearning.Example(prompt, answer)")
    return examples


def _check_vocabulary(model: PreTrainedModel, spans: Mapping[str, Sequence[Span]]) -> None:
    size = int(model.config.get_text_config().vocab_size)
    largest = max(max(span.input_ids) for some in spans.values() for span in some)
    if largest >= size:
        raise InputError(
            f"the tokenizer gives token {largest}, the model has {size}; use the tokenizer that belongs to the model"
        )
