"""Connect the processes of one launch: a store for messages, gloo for tables, and monitoring of each other."""

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
"""Longest time, in seconds, that processes wait for each other at the start, and for an exchange of tables."""
HEARTBEAT_S = 1.0
"""Interval, in seconds, at which each process writes its heartbeat and reads the others'."""
MAX_MISSED = 60
"""Number of own heartbeats without one of a process on another machine after which that process counts as dead.

Own heartbeats are counted, not seconds, because all machines may have been suspended.
"""
GRACE_S = 2.0
"""Time, in seconds, that a process goes on after another one stopped.

The same bad input stops every process, and each should then report it itself.
"""
LEAVE_S = 15.0
"""Longest time, in seconds, that the process with the store waits for the others to leave."""
ANSWER_S = 60.0
"""Longest time, in seconds, that the store may take to answer; its machine may be down."""
POLL_S = 0.01
"""Interval, in seconds, between two looks into the store."""

KILLED = "it was killed, by a user or because memory ran out"
UNRESPONSIVE = f"it has not responded for {MAX_MISSED * HEARTBEAT_S:.0f} seconds"
RESUME_HINT = "rerun the same command to resume"


class Stopped(BaseException):
    """Raised to stop this process. Not an `Exception`, so that no handler of exceptions continues after it."""


@contextmanager
def joined_link(rank: int, count: int) -> Iterator["Link"]:
    """Connect to the other processes; SIGTERM closes the connection properly.

    Args:
        rank: Index of this process.
        count: Number of processes.

    Yields:
        The connection.

    Raises:
        InputError: The other processes cannot be reached, or one of them stopped (the message says which, and why).
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
        link.start_monitoring()
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
        rank: Index of the process.
        process: The process, if it is on this machine; None if it is on another one.
        heartbeat: Its last heartbeat.
        missed: Number of our heartbeats since its last one.
    """

    rank: int
    process: psutil.Process | None
    heartbeat: bytes = b""
    missed: int = 0

    def update(self, heartbeat: bytes) -> None:
        """Take its latest heartbeat."""
        self.missed = self.missed + 1 if heartbeat == self.heartbeat else 0
        self.heartbeat = heartbeat

    @property
    def failure(self) -> str | None:
        """Reason why the process stopped; None while it runs."""
        if self.process is None:
            return UNRESPONSIVE if self.missed >= MAX_MISSED else None
        with suppress(psutil.NoSuchProcess):
            if self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE:
                return None
        return KILLED


class Link:
    """The connection of one process to the others.

    No process waits inside gloo, which cannot be interrupted and does not report which process is missing, or why.
    Instead, processes count themselves in the store, and exchange tables when all have arrived.
    """

    def __init__(self, rank: int, count: int) -> None:
        """Connect the process with index `rank` to the other `count - 1`."""
        self._rank, self._count = rank, count
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=JOIN_S)))
        # A launcher that restarts all processes may keep the store with the entries of the previous start.
        self._store = dist.PrefixStore(f"dissect/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        self._holds_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self._n_waits = 0
        self._main = threading.get_ident()
        self._leaving = threading.Event()
        self._stopped_at: float | None = None
        self._monitor = threading.Thread(target=self._monitor_others, daemon=True)
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
        """Wait until all processes have called this method."""
        self._n_waits += 1
        key = f"wait/{self._n_waits}"
        with _stopped_if_disconnected():
            arrived = self._store.add(key, 1)
            while arrived < self._count:
                time.sleep(POLL_S)
                arrived = self._store.add(key, 0)

    def gather(self, mine: list[T]) -> list[T]:
        """Return the items of all processes, in the order of their ranks."""
        self.wait()
        parts: list[list[T]] = [[] for _ in range(self._count)]
        with _stopped_if_disconnected():
            dist.all_gather_object(parts, mine)
        return [item for part in parts for item in part]

    def start_monitoring(self) -> None:
        """Start to monitor the other processes."""
        self._monitor.start()

    def on_signal(self, _number: int, _frame: FrameType | None) -> None:
        """Stop the main thread; SIGTERM comes from the launcher or from the monitoring thread.

        What is raised in a signal's handler is lost if the main thread is in a destructor or a callback at that moment.
        The monitoring thread therefore sends the signal again until the main thread leaves.
        """
        now = time.monotonic()
        recently = self._stopped_at is not None and now - self._stopped_at < GRACE_S / 2
        if not self._leaving.is_set() and not recently:
            self._stopped_at = now
            raise Stopped

    def report(self, error: BaseException) -> None:
        """Tell the other processes why this one stops; only the first report counts."""
        self._leaving.set()
        with suppress(RuntimeError):
            self._report(self._rank, _reason(error))

    def cause(self, stopped: Stopped) -> InputError:
        """Return the error that says, in one line, why this process was stopped."""
        self._leaving.set()
        deadline = time.monotonic() + GRACE_S  # a killed process may take a moment to end
        try:
            while (dead := self._stopped_process()) is None and time.monotonic() < deadline:
                time.sleep(POLL_S)
        except RuntimeError:
            self._take_over_messages(0)
            return InputError(f"the launcher or process 0 has ended; {RESUME_HINT}")
        if dead is None:
            broken = stopped.__cause__
            why = "stopped by SIGTERM" if broken is None else f"lost the other processes ({_first_line(broken)})"
            return InputError(f"{why}; {RESUME_HINT}")
        rank, reason = dead
        if reason in (KILLED, UNRESPONSIVE):
            self._take_over_messages(rank)
        return InputError(
            f"process {rank} stopped: {reason}" + ("" if "the same command" in reason else f"; {RESUME_HINT}")
        )

    def leave(self) -> None:
        """Leave the group so that the other processes do not report this one as dead."""
        self._leaving.set()
        if self._monitor.is_alive():
            self._monitor.join()
        with suppress(RuntimeError):
            self._store.set(f"left/{self._rank}", "")
            deadline = time.monotonic() + LEAVE_S
            while self._holds_store and any(map(self._needs_store, self._peers)) and time.monotonic() < deadline:
                time.sleep(POLL_S)
        dist.destroy_process_group()

    def _monitor_others(self) -> None:
        count = 0
        while not self._leaving.wait(HEARTBEAT_S):
            count += 1
            try:
                self._store.set(f"beat/{self._rank}", str(count))
                for peer, beat in zip(
                    self._peers, self._store.multi_get([f"beat/{peer.rank}" for peer in self._peers]), strict=True
                ):
                    peer.update(beat)
                if self._stopped_process() is None and self._stopped_at is None:
                    continue
            except RuntimeError:  # the process with the store has ended
                pass
            while not self._leaving.wait(GRACE_S):
                # A signal interrupts the main thread wherever it waits.
                signal.pthread_kill(self._main, signal.SIGTERM)
            return

    def _stopped_process(self) -> tuple[int, str] | None:
        """Return the rank of another process that stopped too early, and the reason; None if there is none."""
        for peer in self._peers:
            failure = peer.failure
            if failure is not None and self._has_not_left(peer):
                self._report(peer.rank, failure)
        if not self._store.check(["stopped"]):
            return None
        rank, _, reason = self._store.get("stopped").decode().partition(" ")
        return None if int(rank) == self._rank else (int(rank), reason)

    def _report(self, rank: int, reason: str) -> None:
        self._store.compare_set("stopped", "", f"{rank} {reason}")

    def _has_not_left(self, peer: Peer) -> bool:
        return not self._store.check([f"left/{peer.rank}"])

    def _needs_store(self, peer: Peer) -> bool:
        return peer.failure is None and self._has_not_left(peer)

    def _take_over_messages(self, dead: int) -> None:
        """Let process 1 show messages if process 0, which shows them, is dead."""
        if dead == 0 and self._rank == 1:
            show_messages()


@contextmanager
def _stopped_if_disconnected() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise Stopped from error


def _find(pid_and_start: bytes) -> psutil.Process | None:
    """Return the process of this machine with an id and a start time; None if the id is of another machine."""
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


def show_messages() -> None:
    """Show this process's messages again after `silence_other_processes`."""
    sys.stderr = sys.__stderr__
