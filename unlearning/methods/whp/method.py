"""Who's Harry Potter: fine-tuning on what a model that never read the text would have expected in its place.

Three stages. A model reinforced on the target text shows what the text taught. The base, reading the text with its
names replaced by generic ones, shows what it would expect otherwise. Both make the generic labels
(`unlearning.methods.whp.labels`), and the base is fine-tuned on the original text towards them.
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from unlearning.common.errors import InputError
from unlearning.data.batches import LabelledSpan
from unlearning.data.question_answer import Example
from unlearning.data.sources import read_training_data
from unlearning.data.spans import join_answer
from unlearning.methods.method import Batch, Method, Needs
from unlearning.methods.recipe import Recipe
from unlearning.methods.stages import PreparationInputs, PreparedData
from unlearning.methods.terms import forget_cross_entropy, retain_cross_entropy
from unlearning.methods.whp.anchors import Anchors, read_anchors
from unlearning.methods.whp.blocks import cut_blocks
from unlearning.methods.whp.labels import LabelledBlock, LabelOptions, Labels, make_labels
from unlearning.methods.whp.proposing import propose_by_contrast
from unlearning.methods.whp.storage import RECORD, read_labels, save_labels
from unlearning.options import Condition, option

SOURCE = "WHP 2310.02238"


_PROPOSES = Condition("anchors is none", lambda options: options.anchors is None)
_COMPARES = Condition("reinforced_weight is above 0", lambda options: options.reinforced_weight > 0)
_REINFORCES = Condition(
    "reinforced_weight is above 0 and reinforced is none",
    lambda options: options.reinforced_weight > 0 and options.reinforced is None,
)

REINFORCEMENT = Recipe(learning_rate=3e-4)
"""Recipe of the reinforced model."""


@dataclass(frozen=True)
class WHPOptions:
    """The anchor dictionary, the reinforced model and the making of labels.

    The paper's own run: learning_rate 1e-6, 2 epochs of blocks of 512 tokens, 128 blocks per step, about 150 steps.
    """

    anchors: str | None = option(
        None,
        "file of anchors and their generic counterparts (none: proposed from background)",
        source=SOURCE,
        names="file",
    )
    background: str | None = option(
        None,
        "data without the knowledge, to propose anchors by contrast (needed if anchors is none)",
        names="data",
        read_if=_PROPOSES,
    )
    reinforced: str | None = option(
        None,
        "model trained further on the text to forget (none: trained before the run)",
        source=SOURCE,
        names="model",
        read_if=_COMPARES,
    )
    reinforced_epochs: int = option(
        3, "passes over the text to train the reinforced model", source=SOURCE, minimum=1, read_if=_REINFORCES
    )
    reinforced_learning_rate: float | None = option(
        None,
        "peak learning rate of the reinforced model (none: by the number of parameters, 3.6e-6 for 7 billion)",
        source=f"measured; {SOURCE}: 3e-6",
        above=0,
        read_if=_REINFORCES,
    )
    reinforced_weight: float = option(
        5.0, "weight of the ReLU term in the labels, the paper's alpha", source=SOURCE, minimum=0
    )
    relu_baseline: Literal["translated", "original"] = option(
        "translated", "text on which the base's logits inside the ReLU are computed", source=SOURCE, read_if=_COMPARES
    )
    seen_penalty: float = option(
        5.0,
        "penalty on the logits of counterparts already used in a block",
        source="causal_unlearn 2407.16997",
        minimum=0,
    )
    block_size: int = option(512, "maximum tokens of a block, at most the model's context", source=SOURCE, minimum=2)
    alpha: float = option(0.0, "weight of CE(retain), which the paper does not have", minimum=0)


def forget_loss(model: PreTrainedModel, batch: Batch, _options: WHPOptions) -> Float[Tensor, ""]:
    """Compute F = CE of the generic labels on the original text, pooled over the step batch's labelled positions."""
    return forget_cross_entropy(model, batch)


def make_generic_labels(inputs: PreparationInputs, options: WHPOptions) -> PreparedData:
    """Label the text's blocks, and keep the labels in the run's directory, where a later start finds them.

    Args:
        inputs: Model, tokenizer, text to forget, and the training function.
        options: The method's options.

    Returns:
        The blocks to train on, and the counts of the labels as notes.

    Raises:
        InputError: There is no dictionary and nothing to propose one from, the dictionary changes nothing, or the
            reinforced model has another vocabulary.
    """
    if inputs.output_dir is not None and (inputs.output_dir / RECORD).is_file():
        labels, _ = read_labels(inputs.output_dir)
        return _prepared(labels)
    texts = [join_answer(example.prompt, example.answer) for example in inputs.forget]
    anchors = _anchors(options, texts, inputs)
    block_size = min(options.block_size, inputs.max_length or options.block_size)
    cut_blocks(inputs.tokenizer, texts, anchors, block_size=block_size)  # refuses bad input before the long stage
    reinforced = _reinforced(inputs, options, texts, block_size)
    labels = make_labels(
        inputs.model,
        reinforced,
        inputs.tokenizer,
        texts,
        anchors,
        LabelOptions(
            alpha=options.reinforced_weight,
            relu_baseline=options.relu_baseline,
            seen_penalty=options.seen_penalty,
            block_size=block_size,
        ),
        batch_size=inputs.batch_size,
        progress=inputs.progress,
    )
    if inputs.output_dir is not None and inputs.output_dir.is_dir():
        save_labels(inputs.output_dir, labels, inputs.tokenizer)
    return _prepared(labels)


def _anchors(options: WHPOptions, texts: Sequence[str], inputs: PreparationInputs) -> Anchors:
    if options.anchors is not None:
        return read_anchors(options.anchors)
    if options.background is None:
        raise InputError(
            "whp needs `anchors`, a file of the text's own names and generic ones, or `background`, data without the "
            "knowledge, to propose them"
        )
    read = read_training_data(options.background, data_dir=inputs.training.data_dir)
    background = [join_answer(example.prompt, example.answer) for example in read.examples]
    proposals = propose_by_contrast(texts, background, seed=inputs.seed)
    return Anchors({proposal.anchor: proposal.generic for proposal in proposals})


def _reinforced(
    inputs: PreparationInputs, options: WHPOptions, texts: Sequence[str], block_size: int
) -> PreTrainedModel:
    """Load the given reinforced model, or train a copy of the reference model further on the text, if it is read."""
    from unlearning.checkpoints.load import load_weights
    from unlearning.checkpoints.locate import locate_checkpoint

    if not options.reinforced_weight:
        return inputs.model  # the labels do not depend on it
    if options.reinforced is not None:
        return load_weights(locate_checkpoint(options.reinforced), dtype=inputs.model.dtype, device=inputs.model.device)
    training = inputs.training
    return inputs.train(
        "finetune",
        model=copy.deepcopy(inputs.model),
        tokenizer=inputs.tokenizer,
        retain=[Example("", text) for text in texts],
        progress=inputs.progress,
        learning_rate=options.reinforced_learning_rate or REINFORCEMENT.rate(inputs.model.num_parameters()),
        epochs=options.reinforced_epochs,
        batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        precision=training.precision,
        optimizer=training.optimizer,
        gradient_checkpointing=training.gradient_checkpointing,
        device=training.device,
        seed=inputs.seed,
        max_length=block_size,
        append_eos=False,
    )


def _prepared(labels: Labels) -> PreparedData:
    return PreparedData(forget=[_span(block) for block in labels.blocks], notes={"labels": asdict(labels.counts)})


def _span(block: LabelledBlock) -> LabelledSpan:
    targets = [target if labelled else 0 for target, labelled in zip(block.targets, block.mask, strict=True)]
    return LabelledSpan(input_ids=list(block.input_ids), targets=targets, mask=list(block.mask))


WHP = Method(
    name="whp",
    summary="CE(generic labels of the text) + alpha CE(retain), label = argmax of v - w ReLU(v_reinforced(T) - v), "
    "v = v_reference(T')",
    source=SOURCE,
    options=WHPOptions,
    needs=lambda options: Needs(retain=options.alpha > 0),
    needs_note="forget, anchors or background, retain if alpha>0",
    forget_loss=forget_loss,
    retain_loss=retain_cross_entropy,
    prepare=make_generic_labels,
)
