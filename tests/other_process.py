"""Let another process do something while this one looks on."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def other_process(act: Callable[[], object]) -> Iterator[int]:
    """Fork a process that acts and then waits; it is killed at the end, and must not have failed before."""
    ready, done = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            act()
            os.write(done, b"+")
            signal.pause()
        finally:
            os._exit(1)
    os.close(done)
    try:
        assert os.read(ready, 1) == b"+", "the other process failed"
        yield child
    finally:
        os.close(ready)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
