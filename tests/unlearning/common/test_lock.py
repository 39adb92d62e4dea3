"""A directory has one writer: refused while it lives, taken over when it has died, and never two at once."""

import json
import os
import platform
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.other_process import other_process
from tests.unlearning.common.no_files import KINDS, make
from unlearning.common import lock
from unlearning.common.errors import InputError
from unlearning.common.lock import CUT_SHORT_S, acquire, holding, release


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / ".lock"


def hold(file: Path) -> None:
    acquire(file, file.parent)


def record_of(file: Path) -> dict[str, object]:
    return dict(json.loads(file.read_text()))


def write(file: Path, **changes: object) -> None:
    """The lock of this process, but for some entries."""
    with holding(file, file.parent):
        record = record_of(file)
    file.write_text(json.dumps(record | changes))


def test_a_living_holder_is_named(file: Path) -> None:
    with other_process(lambda: hold(file)) as child:
        since = record_of(file)["since"]
        with pytest.raises(InputError) as refused:
            hold(file)
        said = str(refused.value)
        assert f"being written by process {child} on {platform.node()}, since {since}; wait" in said
        assert "\n" not in said and "remove" not in said
        assert record_of(file)["process"] == child


def test_a_dead_holder_is_taken_over(file: Path) -> None:
    with other_process(lambda: hold(file)) as child:
        os.kill(child, signal.SIGKILL)
        while psutil.Process(child).status() != psutil.STATUS_ZOMBIE:  # its parent has not asked for it yet
            time.sleep(0.001)
        hold(file)
        assert record_of(file)["process"] == os.getpid()
    release(file)
    assert list(file.parent.iterdir()) == []


def test_a_process_that_ends_leaves_nothing(file: Path) -> None:
    child = os.fork()
    if child == 0:
        hold(file)
        lock._release_all()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert not file.exists()


def test_a_process_id_that_is_used_again_is_another_process(file: Path) -> None:
    write(file, process=os.getppid(), started=psutil.Process(os.getppid()).create_time() - 60)
    hold(file)
    assert record_of(file)["process"] == os.getpid()
    release(file)


@pytest.mark.parametrize("process", [2**22 + 1, 1])
def test_nothing_is_known_about_processes_of_another_machine(process: int, file: Path) -> None:
    write(file, host="node7", machine="another start", process=process, started=0.0)
    before = file.read_bytes()
    with pytest.raises(InputError, match=rf"process {process} on node7, .*; if that process is no more, remove {file}"):
        hold(file)
    assert file.read_bytes() == before


def test_a_lock_that_was_cut_short_is_nobodys_once_it_is_old(file: Path) -> None:
    with holding(file, file.parent):
        content = file.read_bytes()
    old = time.time() - CUT_SHORT_S - 1
    for end in range(0, len(content) - 2, 7):
        file.write_bytes(content[:end])
        with pytest.raises(InputError, match="about to say its name"):
            hold(file)
        os.utime(file, (old, old))
        hold(file)
        assert record_of(file)["process"] == os.getpid()
        release(file)


@pytest.mark.parametrize(
    "content", [b"[]", b"null", b'{"host": 1}', b"\xff", b'{"host":"a","machine":"b","process":"x"}']
)
def test_what_is_no_lock_is_nobodys(content: bytes, file: Path) -> None:
    file.write_bytes(content)
    os.utime(file, (0, 0))
    with holding(file, file.parent):
        assert record_of(file)["process"] == os.getpid()


def test_of_many_that_find_a_dead_holder_one_takes_its_place(file: Path) -> None:
    for _ in range(2):
        write(file, process=2**22 + 1)
        start, begin = os.pipe()
        children = []
        for _ in range(6):
            child = os.fork()
            if child == 0:
                os.close(begin)
                os.read(start, 1)  # until the parent closes its end
                try:
                    hold(file)
                except InputError:
                    os._exit(2)
                time.sleep(0.2)  # the others look while it holds
                os._exit(0)
            children.append(child)
        os.close(begin)
        os.close(start)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert sorted(codes) == [0] + [2] * 5
        file.unlink()


def test_without_links_the_file_is_still_created_by_one(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    with other_process(lambda: hold(file)), pytest.raises(InputError, match="being written by process"):
        hold(file)
    with holding(file, file.parent):
        assert [path.name for path in file.parent.iterdir()] == [".lock"]


def test_holding_twice_is_holding_once_and_a_fork_holds_nothing(file: Path) -> None:
    hold(file)
    hold(file)
    child = os.fork()
    if child == 0:
        try:
            hold(file)
        except InputError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    release(file)
    assert not file.exists()
    release(file)


def test_a_lock_that_somebody_else_has_now_stays(file: Path) -> None:
    hold(file)
    file.write_bytes(b"of another process")
    release(file)
    assert file.read_bytes() == b"of another process"


def test_a_full_disk_is_told_of(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match="cannot be written: the disk is full"):
        hold(file)
    assert list(file.parent.iterdir()) == []


@pytest.mark.parametrize("content", [b"[" * 200_000, b'{"a":' * 200_000, b"9" * 5000, b"x" * 200_000])
def test_a_lock_of_nonsense_is_nobodys(content: bytes, file: Path) -> None:
    file.write_bytes(content)
    os.utime(file, (0, 0))
    with holding(file, file.parent):
        assert record_of(file)["process"] == os.getpid()


@pytest.mark.parametrize(
    "changes",
    [
        *({"process": process} for process in (-1, 0, 2**31, 2**70, float("nan"), "x", None, [])),
        *({"started": started} for started in (float("nan"), float("inf"), "x", None)),
    ],
)
def test_a_lock_that_names_no_process_is_nobodys(changes: dict[str, object], file: Path) -> None:
    write(file, **changes)
    os.utime(file, (0, 0))
    with holding(file, file.parent):
        assert record_of(file)["process"] == os.getpid()


def test_a_lock_from_the_future_is_no_younger_than_an_old_one(file: Path) -> None:
    """The clock was set back since a process was killed."""
    file.write_bytes(b"")
    os.utime(file, (2**32, 2**32))
    with holding(file, file.parent):
        assert record_of(file)["process"] == os.getpid()


@pytest.mark.parametrize("what", KINDS)
def test_what_can_be_no_lock_is_named_at_once_and_stays(what: str, file: Path) -> None:
    make(what, file)
    for _ in range(2):
        with pytest.raises(InputError, match=rf"{file} is a .* and no lock of a process; remove it"):
            hold(file)
    assert os.path.lexists(file)
    lock.forget_the_dead(file, file.parent)
    release(file)
    assert os.path.lexists(file)


def test_a_directory_named_like_an_unfinished_lock_is_no_obstacle(file: Path) -> None:
    (file.parent / ".lock.node.1.part").mkdir()
    with holding(file, file.parent):
        assert record_of(file)["process"] == os.getpid()
