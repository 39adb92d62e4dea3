"""What joins the processes of one launch: a store for words, gloo for tables, and a watch over each other."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import TypeVar

import psutil
import torch.distributed as dist

from unlearning.common.errors import InputError

T = TypeVar("T")

JOIN_S = 600.0
"""How long processes wait for each other at the start, and for each other's tables once all are there."""
BEAT_S = 1.0
"""How often each gives a sign of life and looks for the others'."""
SILENT_BEATS = 60
"""After so many without a sign a process on another machine is dead. Own beats, since all may have slept."""
GRACE_S = 2.0
"""How long one goes on when another has stopped: the same bad input stops each, and is its own reason then."""
LEAVE_S = 15.0
"""How long the process that holds the store stays for those that have not left yet."""
ANSWER_S = 60.0
"""How long the store may take to answer; its machine may be gone."""
POLL_S = 0.01

KILLED = "it was killed, by hand or for want of memory"
SILENT = f"it has given no sign of life for {SILENT_BEATS * BEAT_S:.0f} seconds"
GO_ON = "run the same command again to go on"


class Stopped(BaseException):
    """This process is to stop. Not an `Exception`, so that nothing that handles those goes on after it."""


@contextmanager
def joined_link(rank: int, count: int) -> Iterator["Link"]:
    """The connection to the other processes, while they are needed; SIGTERM ends it in order.

    Raises:
        InputError: the others cannot be reached, or one of them stopped (which, and why).
    """
    try:
        link = Link(rank, count)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"process {rank} cannot join the {count - 1} others: {_first_line(error)}; start all of them with "
            "torchrun, or unset WORLD_SIZE"
        ) from None
    before = signal.signal(signal.SIGTERM, link.on_signal)
    try:
        link.watch()
        yield link
    except Stopped as stopped:
        cause = link.cause(stopped)
        link.report(cause)
        raise cause from None
    except BaseException as error:
        link.report(error)
        raise
    finally:
        link.leave()
        signal.signal(signal.SIGTERM, before)


@dataclass(eq=False)
class Peer:
    """Another process of the launch.

    Attributes:
        rank: its number.
        process: where it is on this machine; None where it is on another.
        beat: its last sign of life.
        silent: for how many of our beats there was no new one.
    """

    rank: int
    process: psutil.Process | None
    beat: bytes = b""
    silent: int = 0

    def hear(self, beat: bytes) -> None:
        """Take in its latest sign of life."""
        self.silent = self.silent + 1 if beat == self.beat else 0
        self.beat = beat

    @property
    def fate(self) -> str | None:
        """What became of it; None while it lives."""
        if self.process is None:
            return SILENT if self.silent >= SILENT_BEATS else None
        with suppress(psutil.NoSuchProcess):
            if self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE:
                return None
        return KILLED


class Link:
    """The connection of one process to the others.

    None of them ever waits inside of gloo, which cannot be interrupted and does not know who is missing, or why:
    processes meet by counting themselves in the store, and then exchange at once.
    """

    def __init__(self, rank: int, count: int) -> None:
        self._rank, self._count = rank, count
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=JOIN_S)))
        # A launcher that starts all of them anew may keep the store, with what the last ones wrote.
        self._store = dist.PrefixStore(f"dissect/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        self._holds_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self._meetings = 0
        self._main = threading.get_ident()
        self._leaving = threading.Event()
        self._watch = threading.Thread(target=self._look_after_others, daemon=True)
        me = psutil.Process()
        self._store.set(f"process/{rank}", f"{me.pid} {me.create_time()}")
        self._store.set(f"beat/{rank}", "0")
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore("gloo", self._store),
            rank=rank,
            world_size=count,
            timeout=timedelta(seconds=JOIN_S),
        )
        self._store.set_timeout(timedelta(seconds=ANSWER_S))
        others = [other for other in range(count) if other != rank]
        self._peers = [Peer(other, _find(self._store.get(f"process/{other}"))) for other in others]

    def wait(self) -> None:
        """Go on when all processes have come here."""
        self._meetings += 1
        meeting = f"meeting/{self._meetings}"
        with _broken_means_stopped():
            here = self._store.add(meeting, 1)
            while here < self._count:
                time.sleep(POLL_S)
                here = self._store.add(meeting, 0)

    def gather(self, mine: list[T]) -> list[T]:
        """What all processes have, in the order of their ranks."""
        self.wait()
        parts: list[list[T]] = [[] for _ in range(self._count)]
        with _broken_means_stopped():
            dist.all_gather_object(parts, mine)
        return [item for part in parts for item in part]

    def watch(self) -> None:
        """Begin to look after the others."""
        self._watch.start()

    def on_signal(self, _number: int, _frame: FrameType | None) -> None:
        """End what the main thread does, once; the launcher sends SIGTERM, and the watch."""
        if not self._leaving.is_set():
            self._leaving.set()
            raise Stopped

    def report(self, error: BaseException) -> None:
        """Tell the others why this process ends; only the first that ends is heard."""
        self._leaving.set()
        with suppress(RuntimeError):
            self._report(self._rank, _reason(error))

    def cause(self, stopped: Stopped) -> InputError:
        """Why this process was stopped, in one line."""
        self._leaving.set()
        deadline = time.monotonic() + GRACE_S  # a process that was killed may take a moment to be gone
        try:
            while (dead := self._who_stopped()) is None and time.monotonic() < deadline:
                time.sleep(POLL_S)
        except RuntimeError:
            self._speak_for(0)
            return InputError(f"the launcher, or process 0, is gone; {GO_ON}")
        if dead is None:
            broken = stopped.__cause__
            why = "stopped from outside (SIGTERM)" if broken is None else f"lost the others ({_first_line(broken)})"
            return InputError(f"{why}; {GO_ON}")
        rank, reason = dead
        if reason in (KILLED, SILENT):
            self._speak_for(rank)
        return InputError(f"process {rank} stopped: {reason}" + ("" if GO_ON in reason else f"; {GO_ON}"))

    def leave(self) -> None:
        """Go, without being missed."""
        self._leaving.set()
        if self._watch.is_alive():
            self._watch.join()
        with suppress(RuntimeError):
            self._store.set(f"left/{self._rank}", "")
            deadline = time.monotonic() + LEAVE_S
            while self._holds_store and any(map(self._needs_store, self._peers)) and time.monotonic() < deadline:
                time.sleep(POLL_S)
        dist.destroy_process_group()

    def _look_after_others(self) -> None:
        beats = 0
        while not self._leaving.wait(BEAT_S):
            beats += 1
            try:
                self._store.set(f"beat/{self._rank}", str(beats))
                for peer, beat in zip(
                    self._peers, self._store.multi_get([f"beat/{peer.rank}" for peer in self._peers]), strict=True
                ):
                    peer.hear(beat)
                if self._who_stopped() is None:
                    continue
            except RuntimeError:  # who holds the store is gone
                pass
            if not self._leaving.wait(GRACE_S):
                # To the main thread, which it wakes wherever it sleeps.
                signal.pthread_kill(self._main, signal.SIGTERM)
            return

    def _who_stopped(self) -> tuple[int, str] | None:
        """Which other process stopped before its time, and why."""
        for peer in self._peers:
            fate = peer.fate
            if fate is not None and self._is_there(peer):
                self._report(peer.rank, fate)
        if not self._store.check(["stopped"]):
            return None
        rank, _, reason = self._store.get("stopped").decode().partition(" ")
        return None if int(rank) == self._rank else (int(rank), reason)

    def _report(self, rank: int, reason: str) -> None:
        self._store.compare_set("stopped", "", f"{rank} {reason}")

    def _is_there(self, peer: Peer) -> bool:
        return not self._store.check([f"left/{peer.rank}"])

    def _needs_store(self, peer: Peer) -> bool:
        return peer.fate is None and self._is_there(peer)

    def _speak_for(self, dead: int) -> None:
        """Where the process that tells of errors is dead, the next one tells of that."""
        if dead == 0 and self._rank == 1:
            speak()


@contextmanager
def _broken_means_stopped() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise Stopped from error


def _find(pid_and_start: bytes) -> psutil.Process | None:
    """A process of this machine by its id and start, both in case the id is another machine's."""
    pid, start = pid_and_start.split()
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(int(pid))
        if abs(process.create_time() - float(start)) < 2:
            return process
    return None


def _reason(error: BaseException) -> str:
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def speak() -> None:
    """Let a silent process say why it ends, where the first cannot."""
    sys.stderr = sys.__stderr__
