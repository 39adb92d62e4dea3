"""Who's Harry Potter as a method: its stages in order, its labels in the run, what it refuses before the long one."""

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from tests.unlearning.helpers import build_examples, build_tiny_llama
from unlearning import InputError, train
from unlearning.cli import app
from unlearning.data.batches import collate
from unlearning.data.spans import join_answer
from unlearning.methods.whp import method as whp
from unlearning.methods.whp.anchors import Anchors
from unlearning.methods.whp.labels import LabelOptions, make_labels
from unlearning.methods.whp.storage import read_labels
from unlearning.objectives.forward import answer_logits

GENERICS = {"Ada Brook": "Jon Smith", "Ben Hill": "Tim Rose", "Cleo Stone": "Ann Moss"}


@pytest.fixture
def dictionary(tmp_path: Path) -> Path:
    path = tmp_path / "anchors.json"
    path.write_text(json.dumps(GENERICS))
    return path


def test_it_trains_towards_the_labels_of_a_reinforced_model(
    tokenizer: PreTrainedTokenizerFast, dictionary: Path, tmp_path: Path
) -> None:
    """The first loss is the cross-entropy of labels made by hand from a model reinforced by hand."""
    forget = build_examples(3)
    texts = [join_answer(example.prompt, example.answer) for example in forget]
    settings = {"batch_size": 4, "gradient_accumulation_steps": 1}
    result = train(
        "whp",
        model=build_tiny_llama(),
        tokenizer=tokenizer,
        forget=forget,
        anchors=str(dictionary),
        reinforced_epochs=2,
        reinforced_learning_rate=1e-3,
        max_steps=2,
        logging_steps=1,
        output_dir=tmp_path / "out",
        progress=False,
        **settings,
    )
    reinforced = train(
        "finetune",
        model=build_tiny_llama(),
        tokenizer=tokenizer,
        retain=[type(forget[0])("", text) for text in texts],
        epochs=2,
        learning_rate=1e-3,
        append_eos=False,
        progress=False,
        **settings,
    ).model
    labels = make_labels(
        build_tiny_llama(), reinforced, tokenizer, texts, Anchors(GENERICS), LabelOptions(block_size=128)
    )
    stored, _ = read_labels(tmp_path / "out")
    assert stored.blocks == labels.blocks
    assert labels.counts.anchors_found == 3
    total, count = 0.0, 0
    with torch.no_grad():
        for block in labels.blocks:
            logits = build_tiny_llama()(torch.tensor([block.input_ids])).logits[0]
            for row, target, labelled in zip(logits, block.targets, block.mask, strict=True):
                if labelled:
                    total -= row.log_softmax(-1)[target].item()
                    count += 1
    assert result.history[0]["loss"] == pytest.approx(total / count, rel=1e-4)
    batch = collate([whp._span(block) for block in labels.blocks])
    assert len(answer_logits(build_tiny_llama(), batch).targets) == count

    shown = CliRunner().invoke(app, ["labels", "show", str(tmp_path / "out"), "--json"])
    assert shown.exit_code == 0
    told = json.loads(shown.stdout)
    assert told["n_rows"] == len(told["rows"]) == sum(len(block.input_ids) - 1 for block in labels.blocks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anchors": "other.json"}, "the anchor dictionary changes nothing: none of its 1 anchors"),
        ({"anchors": "missing.json"}, "missing.json: no such file"),
        ({}, "whp needs `anchors`"),
    ],
)
def test_what_it_lacks_is_said_before_the_reinforcement(
    options: dict[str, str],
    message: str,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def too_late(*_: object) -> None:
        raise AssertionError("reinforced first")

    monkeypatch.chdir(tmp_path)
    Path("other.json").write_text('{"Zed Quill": "Tom Reed"}')
    monkeypatch.setattr(whp, "_reinforced", too_late)
    with pytest.raises(InputError) as error:
        train("whp", model=build_tiny_llama(), tokenizer=tokenizer, forget=build_examples(), progress=False, **options)
    assert message in str(error.value)
