"""Render chat templates with limits on time, memory and length, in processes of their own.

Every text is rendered in two processes, whose strings hash otherwise and whose objects lie elsewhere: a template that
writes two texts for the same messages is refused.
"""

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from unlearning.common.errors import InputError

SECONDS = 5.0
"""Processor time that a template has for one text."""

MEAN_SECONDS = 0.25
"""Processor time, of both processes, that a template has for one text on average once it has used `TOTAL_SECONDS`."""

TOTAL_SECONDS = 20.0
"""Processor time of one template for all its texts, from which on the average counts."""

SLOW_SECONDS = 2.0
"""Processor time of one template after which a warning says that it is slow, if it is."""

MEMORY = 1 << 30
"""Address space of each process, in bytes."""

CHARACTERS = 1_000_000
"""Maximum length of a template, and of what it may write around its messages."""

_KEPT = ("PATH", "HOME", "LD_LIBRARY_PATH")


@dataclass(frozen=True)
class Request:
    """One text to render.

    Attributes:
        template: A Jinja template.
        turns: Role and content of each message.
        variables: Texts that the template may use, such as the special tokens.
        date: What the template's clock shows.
        opened: Add the beginning of an answer.
        continued: Leave the last message without its end.
    """

    template: str
    turns: Sequence[tuple[str, str]]
    variables: Mapping[str, Any]
    date: datetime
    opened: bool
    continued: bool = False


@dataclass
class _Spent:
    """What one template has used.

    Attributes:
        texts: Number of its texts.
        seconds: Processor time of them all, in both processes.
        warned: It was called slow.
    """

    texts: int = 0
    seconds: float = 0.0
    warned: bool = False

    def add(self, seconds: float) -> None:
        """Count one text; see `render` for what is raised and warned of."""
        self.texts += 1
        self.seconds += seconds
        mean = self.seconds / self.texts
        if self.seconds > TOTAL_SECONDS and mean > MEAN_SECONDS:
            raise InputError(
                f"takes {mean:.2g} s for each text, {self.seconds:.2g} s for {self.texts} so far; at most "
                f"{MEAN_SECONDS:g} s each are allowed"
            )
        if self.seconds > SLOW_SECONDS and mean > MEAN_SECONDS / 10 and not self.warned:
            self.warned = True
            warnings.warn(f"the chat template is slow: it takes {mean:.2g} s for each text", stacklevel=2)


class TemplateRefusal(InputError):
    """The template itself refuses the messages, by `raise_exception`, such as a system turn."""


def render(request: Request) -> str:
    """Render a chat template as transformers does.

    Args:
        request: Template and messages.

    Returns:
        The text.

    Raises:
        InputError: The template fails, takes too long for one text or for all, needs too much memory, writes too much,
            or writes two texts for the same messages. The message is a clause without a subject, such as
            "fails (TypeError: ...)".
        TemplateRefusal: The template refuses the messages.

    Warns:
        UserWarning: The template is slow; once for each template.
    """
    characters = CHARACTERS + 10 * sum(len(content) for _, content in request.turns)
    if len(request.template) > CHARACTERS:
        raise InputError(f"has {len(request.template)} characters")
    question = {
        "template": request.template,
        "messages": [{"role": role, "content": content} for role, content in request.turns],
        "variables": dict(request.variables),
        "date": request.date.isoformat(),
        "add_generation_prompt": request.opened,
        "continue_final_message": request.continued,
        "seconds": SECONDS,
        "characters": characters,
    }
    texts, seconds = [], 0.0
    for worker in _WORKERS:
        answer = worker.ask(question)
        if "text" not in answer:
            reason = "".join(c if c.isprintable() else " " for c in answer["error"])
            raise (TemplateRefusal if answer.get("refused") else InputError)(" ".join(reason.split())[:300])
        texts.append(str(answer["text"]))
        seconds += float(answer["took"])
    if texts[0] != texts[1]:
        raise InputError("writes two different texts for the same messages")
    _SPENT.setdefault(request.template, _Spent()).add(seconds)
    return texts[0]


def environment(hash_seed: int = 0) -> dict[str, str]:
    """Return the environment of a process that renders, which knows no token, no password and no place.

    Args:
        hash_seed: Seed of the hashes of strings, and so of the order of sets.

    Returns:
        The variables.
    """
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    return kept | {"OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": str(hash_seed), "TZ": "UTC", "LC_ALL": "C.UTF-8"}


class _Worker:
    """A process that renders: started when it is first asked, and again after a template has ended it."""

    def __init__(self, hash_seed: int) -> None:
        self._hash_seed = hash_seed
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0
        self._lock = threading.Lock()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the process's answer; an error if the request ended the process."""
        with self._lock:
            process = self._running()
            assert process.stdin is not None and process.stdout is not None
            found: dict[str, Any] | None = None
            try:
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
                found = json.loads(process.stdout.readline())
            except (BrokenPipeError, json.JSONDecodeError, UnicodeDecodeError):
                pass
            finally:
                if found is None:  # also where the user interrupts: a late answer must not be the next request's
                    self.end()
            return found or {"error": f"takes more than {request['seconds']:g} s, or ends the process that renders it"}

    def end(self) -> None:
        """End the process, and close its pipes."""
        process, self._process = self._process, None
        if process is None:
            return
        if self._owner == os.getpid():
            process.kill()
            process.wait()
        else:
            process.returncode = 0  # another's child, which this process must not wait for
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # what a dead process did not read
                if pipe is not None:
                    pipe.close()

    def _running(self) -> "subprocess.Popen[str]":
        # A forked process must not read from its parent's pipe.
        if self._process is not None and (self._owner != os.getpid() or self._process.poll() is not None):
            self.end()
        if self._process is None:
            program = str(Path(__file__).with_name("template_worker.py"))
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-s", program, json.dumps(sys.path), str(MEMORY)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment(self._hash_seed),
                text=True,
                encoding="utf-8",
            )
            self._owner = os.getpid()
        return self._process


_WORKERS = (_Worker(0), _Worker(1))
_SPENT: dict[str, _Spent] = {}
"""What each template has used, by its text."""

for _worker in _WORKERS:
    atexit.register(_worker.end)
