"""Data sets of the hub, and directories that are laid out as them."""

from collections.abc import Sequence
from pathlib import Path
from unittest.mock import MagicMock

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from tests.unlearning.data.helpers import TEXT, write_json, write_lines, write_muse_news, write_parquet
from unlearning import Example, InputError
from unlearning.data import hub
from unlearning.data.sources import read_training_data

QA = [{"question": "Who?", "answer": "Ines"}, {"question": "Where?", "answer": "Marrow Point"}]
EXAMPLES = [Example("Question: Who?\nAnswer:", "Ines"), Example("Question: Where?\nAnswer:", "Marrow Point")]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, list[str]]]:
    """What is asked of a hub that has one data set: the directory `tmp_path / "remote"`."""
    calls: list[tuple[str, list[str]]] = []

    def download(repository: str, patterns: Sequence[str]) -> Path:
        calls.append((repository, list(patterns)))
        return tmp_path / "remote"

    monkeypatch.setattr(hub, "download", download)
    (tmp_path / "remote").mkdir()
    return calls


def test_a_card_says_which_files_a_configuration_and_a_split_are(
    asked: list[tuple[str, list[str]]], tmp_path: Path
) -> None:
    write_muse_news(tmp_path / "remote")
    data = read_training_data("hub:someone/news:knowmem:retain_qa")
    assert data.examples[3] == Example("Question: Who kept lamp 3?\nAnswer:", "Keeper 3")
    assert data.source == "hub:someone/news:knowmem:retain_qa: someone/news (retain_qa-00000-of-00001.parquet)"
    assert data.notes == ("4 prompts with answers",)
    assert asked == [("someone/news", ["README.md"]), ("someone/news", ["knowmem/retain_qa-*"])]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hub:someone/news", "which configuration? There are knowmem, raw, scal, sust, verbmem; add one after a colon"),
        ("hub:someone/news:knowmen", "no configuration 'knowmen'; did you mean 'knowmem'? there are knowmem, raw"),
        ("hub:someone/news:raw", "which split? There are forget, retain1, retain2; add one after a colon"),
        ("hub:someone/news:raw:retain", "no split 'retain'; did you mean 'retain2'? there are forget, retain1"),
        ("hub:news", "write hub:owner/name, hub:owner/name:config or hub:owner/name:config:split"),
        ("hub:someone/news:a:b:c", "too many colons"),
    ],
)
def test_a_part_that_is_not_there_is_refused_with_those_that_are(
    asked: list[tuple[str, list[str]]], tmp_path: Path, name: str, message: str
) -> None:
    write_muse_news(tmp_path / "remote")
    with pytest.raises(InputError) as error:
        read_training_data(name)
    assert str(error.value).startswith(name) and message in str(error.value) and "\n" not in str(error.value)
    assert len(asked) <= 1  # no data before the name is clear


def test_the_only_split_and_the_default_configuration_need_no_name(
    asked: list[tuple[str, list[str]]], tmp_path: Path
) -> None:
    remote = tmp_path / "remote"
    write_lines(remote / "forget05.json", QA)
    write_lines(remote / "full.json", QA * 3)
    (remote / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: full.json\n- config_name: forget05\n"
        "  data_files:\n  - forget05.json\n---\n"
    )
    assert read_training_data("hub:someone/qa:forget05").examples == EXAMPLES
    assert len(read_training_data("hub:someone/qa").examples) == 6
    (remote / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: a\n    path: [forget05.json, full.json]\n---\n"
    )
    assert len(read_training_data("hub:someone/qa").examples) == 8
    assert len(read_training_data("hub:someone/qa:a").examples) == 8  # a split of the only configuration
    assert {repository for repository, _ in asked} == {"someone/qa"}


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("hub:someone/qa", "data/train-00000-of-00002.parquet"),
        ("hub:someone/qa", "train.parquet"),
        ("hub:someone/qa:sub", "sub/train-00000-of-00001.parquet"),
        ("hub:someone/qa:sub", "sub/train/0000.parquet"),  # the hub's own conversion
        ("hub:someone/qa:sub", "sub.parquet"),
        ("hub:someone/qa:sub:test", "sub/test.parquet"),
    ],
)
@pytest.mark.parametrize("card", ["", "---\nlicense: mit\n---\n# no configurations\n", "---\n: [broken\n---\n"])
def test_without_a_card_the_conventions_hold(
    asked: list[tuple[str, list[str]]], tmp_path: Path, name: str, file: str, card: str
) -> None:
    remote = tmp_path / "remote"
    if card:
        (remote / "README.md").write_text(card)
    write_parquet(remote / file, QA)
    write_parquet(remote / "other" / "validation-0.parquet", QA * 5)
    assert read_training_data(name).examples == EXAMPLES
    with pytest.raises(
        InputError, match=r"hub:someone/qa:lamps: someone/qa has no file for it \(looked for lamps/train"
    ):
        read_training_data("hub:someone/qa:lamps")
    assert asked


def test_without_configurations_and_splits_a_data_set_is_its_files(
    asked: list[tuple[str, list[str]]], tmp_path: Path
) -> None:
    write_json(tmp_path / "remote" / "questions.json", QA)
    write_json(tmp_path / "remote" / "dataset_infos.json", {"default": {}})
    assert read_training_data("hub:someone/qa").examples == EXAMPLES
    with pytest.raises(InputError, match="has no file for it"):
        read_training_data("hub:someone/qa:sub")
    write_lines(tmp_path / "remote" / "train.jsonl", QA[:1])
    assert read_training_data("hub:someone/qa").examples == EXAMPLES[:1]
    assert asked


def test_a_card_does_not_lead_out_of_the_data_set(asked: list[tuple[str, list[str]]], tmp_path: Path) -> None:
    write_json(tmp_path / "secret.json", QA)
    write_json(tmp_path / "remote" / "a.json", QA)
    paths = "['../secret.json', ./a.json]"
    card = f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {paths}\n---\n"
    (tmp_path / "remote" / "README.md").write_text(card)
    assert read_training_data("hub:someone/qa").examples == EXAMPLES
    (tmp_path / "remote" / "README.md").write_text(card.replace("./a.json", "b.json"))
    with pytest.raises(InputError, match="hub:someone/qa: someone/qa lacks the files b.json"):
        read_training_data("hub:someone/qa")
    assert asked


def test_shards_are_read_in_order(asked: list[tuple[str, list[str]]], tmp_path: Path) -> None:
    for place, record in enumerate(QA):
        write_parquet(tmp_path / "remote" / f"data/train-0000{place}-of-00002.parquet", [record])
    assert read_training_data("hub:someone/qa").examples == EXAMPLES
    assert asked


@pytest.mark.parametrize(
    ("record", "example"),
    [
        ({"question": "Who?", "answer": "Ines"}, EXAMPLES[0]),
        ({"instruction": "Who?", "output": "Ines", "input": ""}, EXAMPLES[0]),
        (
            {"instruction": "Who", "output": "Ines", "input": "kept it?"},
            Example("Question: Who\n\nkept it?\nAnswer:", "Ines"),
        ),
        ({"prompt": "It was", "completion": " Ines", "id": 3}, Example("It was", " Ines")),
        ({"prompt": "It was", "answer": "Ines"}, Example("It was", "Ines")),
        ({"prompt": "It was", "gt": "Ines"}, Example("It was", "Ines")),
        ({"title": "Lamps", "text": TEXT}, Example("", TEXT)),
    ],
)
def test_the_columns_say_what_the_records_are(tmp_path: Path, record: dict[str, object], example: Example) -> None:
    assert read_training_data(write_parquet(tmp_path / "a.parquet", [record])).examples == [example]


def test_a_directory_may_stand_for_a_data_set(tmp_path: Path) -> None:
    root = write_muse_news(tmp_path / "copies" / "news")
    assert len(read_training_data(f"hub:{root}:scal:forget_3").examples) == 3
    with pytest.raises(InputError, match="no split 'forget_5'; did you mean"):
        read_training_data(f"hub:{root}:scal:forget_5")


def error_of(kind: type[Exception]) -> Exception:
    if issubclass(kind, huggingface_hub.errors.HfHubHTTPError):
        return kind("first\nsecond", response=MagicMock())
    return kind("first\nsecond")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (GatedRepoError, "is gated: ask for access at https://huggingface.co/datasets/cais/wmdp-bio-forget-corpus"),
        (RepositoryNotFoundError, "the hub has no such data set, or you may not see it"),
        (LocalEntryNotFoundError, "the hub cannot be reached; download the data set and name its file"),
        (ConnectionError, "the hub cannot be reached"),
    ],
)
def test_what_the_hub_says_is_one_line(monkeypatch: pytest.MonkeyPatch, kind: type[Exception], message: str) -> None:
    def refuse(*_args: object, **_options: object) -> str:
        raise error_of(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.delenv("DISSECT_DATA", raising=False)
    with pytest.raises(InputError) as error:
        read_training_data("wmdp:bio-forget")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith("wmdp:bio-forget: neither `data_dir` nor $DISSECT_DATA is set; ")


def test_offline_the_cache_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="someone/qa: the hub cannot be reached"):
        read_training_data("hub:someone/qa")
    repository = tmp_path / "datasets--someone--qa"
    write_json(repository / "snapshots" / "abc" / "train.json", QA)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    assert read_training_data("hub:someone/qa").examples == EXAMPLES
