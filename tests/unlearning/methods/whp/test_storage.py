"""Labels on disk: the same back, readable, and refused where something is missing."""

import errno
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.unlearning.methods.whp.story import ANCHORS, STORY
from tests.unlearning.methods.whp.test_labels import little_llama
from unlearning.common.errors import InputError
from unlearning.methods.whp.anchors import Anchors
from unlearning.methods.whp.labels import IGNORED, LabelOptions, Labels, make_labels
from unlearning.methods.whp.storage import RECORD, TABLE, read_labels, save_labels


@pytest.fixture
def labels(tokenizers: dict[str, PreTrainedTokenizerFast]) -> Labels:
    tokenizer = tokenizers["sentencepiece"]
    models = [little_llama(len(tokenizer), seed) for seed in (0, 1)]
    return make_labels(*models, tokenizer, [STORY], Anchors(ANCHORS), LabelOptions(block_size=64))


def test_labels_come_back_the_same(
    labels: Labels, tokenizers: dict[str, PreTrainedTokenizerFast], tmp_path: Path
) -> None:
    save_labels(tmp_path, labels, tokenizers["sentencepiece"])
    read, frame = read_labels(tmp_path)
    assert read == labels
    assert len(frame) == labels.counts.tokens
    assert sorted(path.name for path in tmp_path.iterdir()) == [RECORD, TABLE]


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece", "metaspace"])
def test_a_person_can_read_them(
    labels: Labels, tokenizers: dict[str, PreTrainedTokenizerFast], tmp_path: Path, kind: str
) -> None:
    tokenizer = tokenizers[kind]
    models = [little_llama(len(tokenizer), seed) for seed in (0, 1)]
    labels = make_labels(*models, tokenizer, [STORY], Anchors(ANCHORS), LabelOptions(block_size=64))
    save_labels(tmp_path, labels, tokenizer)
    _, frame = read_labels(tmp_path)
    shown = "".join(token for token in frame["token"] if token != "<s>")
    assert shown.strip() == STORY.strip()  # no white space is lost, nor a character of this story
    for number, rows in frame.groupby("block"):
        block = labels.blocks[int(number)]
        assert rows["next"].tolist() == [*rows["token"].tolist()[1:], ""]
        assert rows["label_id"].isna().tolist() == [target == IGNORED for target in block.targets]
        assert rows["anchor"].tolist() == list(block.anchors)
    assert set(frame["masked"]) >= {"", "end", "repeat"}
    shown = "".join(frame[frame["anchor"] == "quillball"]["next"])
    assert shown.replace(" ", "") == "quillball" * 2


def test_a_full_disk_leaves_no_record_and_no_part(
    labels: Labels, tokenizers: dict[str, PreTrainedTokenizerFast], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_labels(tmp_path, labels, tokenizers["sentencepiece"])

    def full(path: Path, text: str, encoding: str) -> None:
        path.write_bytes(text.encode(encoding)[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match="labels.json: cannot be written: No space left on device"):
        save_labels(tmp_path, labels, tokenizers["sentencepiece"])
    assert [path.name for path in tmp_path.iterdir()] == [TABLE]


def test_what_is_missing_or_broken_is_named(
    labels: Labels, tokenizers: dict[str, PreTrainedTokenizerFast], tmp_path: Path
) -> None:
    run = tmp_path / "run"

    def refused(message: str) -> None:
        with pytest.raises(InputError) as error:
            read_labels(run)
        assert message in str(error.value) and "\n" not in str(error.value)

    refused("no such directory")
    run.mkdir()
    refused(f"has no {TABLE}; only runs of the method whp have labels")
    save_labels(run, labels, tokenizers["sentencepiece"])
    table, record = (run / TABLE).read_bytes(), (run / RECORD).read_text()
    (run / TABLE).write_bytes(table[: len(table) // 2])
    refused(f"{TABLE}: cannot be read")
    (run / TABLE).write_bytes(table)
    (run / RECORD).write_text(record[: len(record) // 2])
    refused(f"{RECORD}: cannot be read")
    (run / RECORD).write_text("{}")
    refused(f"{RECORD}: is not a record of labels")
    (run / RECORD).write_text(record.replace(f'"tokens": {labels.counts.tokens}', '"tokens": 9'))
    refused(f"holds {labels.counts.tokens} tokens")
    (run / RECORD).unlink()
    refused(f"has no {RECORD}")
