"""Render chat templates with limits on time, memory and length, in a process of their own."""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from unlearning.common.errors import InputError

SECONDS = 5.0
"""Processor time that a template has for one text."""

MEMORY = 1 << 30
"""Address space of the process, in bytes."""

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
    """

    template: str
    turns: Sequence[tuple[str, str]]
    variables: Mapping[str, Any]
    date: datetime
    opened: bool


def render(request: Request) -> str:
    """Render a chat template as transformers does.

    Args:
        request: Template and messages.

    Returns:
        The text.

    Raises:
        InputError: The template fails, takes too long, needs too much memory, or writes too much. The message is a
            clause without a subject, such as "fails (TypeError: ...)".
    """
    characters = CHARACTERS + 10 * sum(len(content) for _, content in request.turns)
    if len(request.template) > CHARACTERS:
        raise InputError(f"has {len(request.template)} characters")
    answer = _WORKER.ask(
        {
            "template": request.template,
            "messages": [{"role": role, "content": content} for role, content in request.turns],
            "variables": dict(request.variables),
            "date": request.date.isoformat(),
            "add_generation_prompt": request.opened,
            "seconds": SECONDS,
            "characters": characters,
        }
    )
    if "text" not in answer:
        reason = "".join(c if c.isprintable() else " " for c in answer["error"])
        raise InputError(" ".join(reason.split())[:300])
    return str(answer["text"])


def environment() -> dict[str, str]:
    """Return the environment of the process that renders, which knows no token and no password."""
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    return kept | {"OPENBLAS_NUM_THREADS": "1"}


class _Worker:
    """The process, which is started when it is first asked, and again after a template has ended it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0
        self._lock = threading.Lock()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the process's answer; an error if the request ended the process."""
        with self._lock:
            process = self._running()
            assert process.stdin is not None and process.stdout is not None
            line = ""
            with contextlib.suppress(BrokenPipeError, json.JSONDecodeError, UnicodeDecodeError):
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
                found: dict[str, Any] = json.loads(line)
                return found
            self._process = None
            process.kill()
            process.wait()
            return {"error": f"takes more than {request['seconds']:g} s, or ends the process that renders it"}

    def _running(self) -> "subprocess.Popen[str]":
        # A forked process must not read from its parent's pipe.
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            program = str(Path(__file__).with_name("template_worker.py"))
            self._process = subprocess.Popen(
                [sys.executable, "-I", program, json.dumps(sys.path), str(MEMORY)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment(),
                text=True,
                encoding="utf-8",
            )
            self._owner = os.getpid()
        return self._process


_WORKER = _Worker()
