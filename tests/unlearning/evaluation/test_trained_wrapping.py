"""How a model is asked by default: as the record beside its weights says that it was trained."""

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unlearning import InputError
from unlearning.common.terminal import printable
from unlearning.data.question_answer import DEFAULT_TEMPLATE, MAX_TEMPLATE
from unlearning.evaluation.trained_wrapping import TrainedWrapping, choose_wrapping, read_trained_wrapping

OTHER = "Q: {question}\nA:"
Make = Callable[..., str]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Return a function that writes a directory with a record of these options, and returns its name."""

    def write(name: str, **options: Any) -> str:
        directory = tmp_path / name
        directory.mkdir(parents=True)
        record = {"finished": True, "configuration": {"method": "npo", "options": options}}
        (directory / "unlearning.json").write_text(json.dumps(record))
        return str(directory)

    return write


@pytest.fixture(autouse=True)
def _no_warning_is_missed() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


WRAPPINGS = [
    TrainedWrapping(),
    TrainedWrapping(OTHER),
    TrainedWrapping(chat=True),
    TrainedWrapping(chat=True, chat_date="01 Jan 2020", append_eos=False),
    TrainedWrapping(append_eos=False),
]


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_record_is_read_and_taken_where_nothing_is_asked(make: Make, wrapping: TrainedWrapping) -> None:
    name = make("model", **vars(wrapping), learning_rate=1e-5)
    assert read_trained_wrapping(name) == wrapping
    chosen = choose_wrapping(None, None, [name])
    assert chosen.wrapping == wrapping
    if wrapping == TrainedWrapping():
        assert chosen.note is None  # nothing but the default was taken
    else:
        assert chosen.note is not None and name in chosen.note and str(wrapping) in chosen.note


def test_a_record_of_an_older_version_lacks_options(make: Make) -> None:
    assert read_trained_wrapping(make("old", template=OTHER, benchmark_retain=None)) == TrainedWrapping(OTHER)
    assert read_trained_wrapping(make("older")) == TrainedWrapping()


def test_without_a_record_the_default_is_asked(tmp_path: Path) -> None:
    for name in (tmp_path, tmp_path / "nowhere", "demo:base", "demo:nothing"):
        assert read_trained_wrapping(name) is None
    chosen = choose_wrapping(None, None, ["demo:base", tmp_path])
    assert (chosen.wrapping, chosen.note) == (TrainedWrapping(), None)
    assert choose_wrapping(OTHER, None, ["demo:base"]).wrapping == TrainedWrapping(OTHER)
    assert choose_wrapping(None, True, ["demo:base"]).wrapping == TrainedWrapping(chat=True)


def test_a_hub_s_checkpoint_that_was_downloaded_is_read_without_the_hub(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def download(_hub_id: str, *, local_files_only: bool = False, **_: Any) -> str:
        asked.append(local_files_only)
        if local_files_only and len(asked) > 1:
            raise FileNotFoundError
        return made

    made = make("snapshot", chat=True)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert read_trained_wrapping("owner/name") == TrainedWrapping(chat=True)
    assert asked == [True]
    assert read_trained_wrapping("owner/name@v1") == TrainedWrapping(chat=True)
    assert asked == [True, True, False]  # not downloaded yet


def test_checkpoints_of_a_run_have_its_record(make: Make) -> None:
    checkpoint = Path(make("run", chat=True)) / "checkpoints" / "checkpoint-8"
    checkpoint.mkdir(parents=True)
    assert read_trained_wrapping(checkpoint) == TrainedWrapping(chat=True)


@pytest.mark.parametrize(
    ("trained", "template", "chat", "closes", "warned"),
    [
        (TrainedWrapping(OTHER), OTHER, None, None, False),
        (TrainedWrapping(OTHER), DEFAULT_TEMPLATE, None, None, True),
        (TrainedWrapping(OTHER), None, True, None, True),
        (TrainedWrapping(OTHER), None, False, None, True),
        (TrainedWrapping(OTHER), None, None, False, True),
        (TrainedWrapping(chat=True), None, True, None, False),
        (TrainedWrapping(chat=True), None, False, None, True),
        (TrainedWrapping(chat=True), OTHER, None, None, True),
        (TrainedWrapping(), DEFAULT_TEMPLATE, None, True, False),
        (TrainedWrapping(), None, False, None, False),
        (TrainedWrapping(), OTHER, None, None, True),
        (TrainedWrapping(append_eos=False), None, None, True, True),
        (TrainedWrapping(chat=True, append_eos=False), None, True, None, False),
    ],
)
def test_the_user_decides_and_is_warned_in_one_line(
    make: Make, trained: TrainedWrapping, template: str | None, chat: bool | None, closes: bool | None, warned: bool
) -> None:
    name = make("model", **vars(trained))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chosen = choose_wrapping(template, chat, [name], append_eos=closes)
    assert [name in str(each.message) for each in caught] == [True] * warned
    by_user = template is not None or chat is not None
    assert chosen.wrapping.template == (template if by_user else trained.template)
    assert chosen.wrapping.chat == (bool(chat) if by_user else trained.chat)
    assert chosen.wrapping.append_eos == (trained.append_eos if closes is None else closes)
    assert not warned or chosen.note is None


def test_the_first_of_two_different_records_is_taken_and_both_are_named(make: Make) -> None:
    unlearned, base, same = make("unlearned", chat=True), make("base", template=OTHER), make("same", chat=True)
    with pytest.warns(UserWarning, match="was trained with") as caught:
        chosen = choose_wrapping(None, None, [unlearned, base])
    (said,) = (str(each.message) for each in caught)
    assert unlearned in said and base in said and f"as {unlearned} was" in said and "\n" not in said
    assert chosen.wrapping == TrainedWrapping(chat=True)
    assert choose_wrapping(None, None, [unlearned, same]).wrapping == TrainedWrapping(chat=True)
    # A built-in model has no record; the other one's is taken.
    assert choose_wrapping(None, None, ["demo:base", base]).wrapping == TrainedWrapping(OTHER)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"template": "no question"}, "template must hold"),
        ({"template": ""}, "template must hold"),
        ({"template": "\x1b[2J\u202e no question"}, "template must hold"),
        ({"template": "{question}" * MAX_TEMPLATE}, "at most"),
        ({"template": "{question}\ud83d"}, "UTF-8"),
        ({"template": ["{question}"]}, "text or null, got list"),
        ({"chat": "yes"}, "true or false, got str"),
        ({"chat": 1}, "true or false, got int"),
        ({"append_eos": None}, "true or false, got NoneType"),
        ({"chat": True, "chat_date": "\x1b[2J"}, "date"),
        ({"chat": True, "template": OTHER}, "both set"),
    ],
)
def test_a_hostile_record_is_refused_where_it_decides(make: Make, options: dict[str, Any], said: str) -> None:
    name = make("model", **options)
    with pytest.raises(InputError, match=said) as error:
        choose_wrapping(None, None, [name])
    text = str(error.value)
    assert f"{name}/unlearning.json" in text and "`template`" in text
    assert len(text) < 600 and printable(text) == text and "\n" not in text
    with pytest.warns(UserWarning, match="not compared"):
        assert choose_wrapping(OTHER, None, [name]).wrapping == TrainedWrapping(OTHER)


def test_a_template_is_shown_with_escapes_and_cut(make: Make) -> None:
    name = make("model", template="\x1b[2J{question}\u202e" + "long " * 1000)
    note = choose_wrapping(None, None, [name]).note
    assert note is not None and printable(note) == note and "\n" not in note and len(note) < len(name) + 250


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", "7", '{"configuration": []}', '{"configuration": {"options": 3}}', "[" * 100_000]
)
def test_a_file_that_is_no_record_is_said_and_left_alone(tmp_path: Path, content: str) -> None:
    (tmp_path / "unlearning.json").write_text(content)
    with pytest.warns(UserWarning, match="no record of"):
        assert choose_wrapping(None, None, [tmp_path]).wrapping == TrainedWrapping()


def test_a_pipe_or_a_broken_link_in_its_place_is_not_read(tmp_path: Path) -> None:
    for name, place in (("pipe", os.mkfifo), ("link", lambda path: os.symlink("nowhere", path))):
        (tmp_path / name).mkdir()
        place(tmp_path / name / "unlearning.json")
        with pytest.warns(UserWarning, match="no record of"):
            assert read_trained_wrapping(tmp_path / name) is None


def test_both_ways_to_wrap_are_refused(make: Make) -> None:
    with pytest.raises(InputError, match="`template` and `chat`"):
        choose_wrapping(OTHER, True, [make("model")])
