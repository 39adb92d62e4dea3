"""A progress bar on stderr."""

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """A bar over `total` of anything, shown where `show` asks for it and stderr is a terminal."""

    def __init__(self, total: float, label: str, *, show: bool = True) -> None:
        console = Console(file=sys.stderr)
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not (show and console.is_terminal),  # elsewhere rich leaves an empty line
            transient=True,
        )
        self._task = self._bar.add_task(label, total=total)

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, steps: float) -> None:
        """Move the bar on."""
        self._bar.advance(self._task, steps)

    def update(self, done: float, total: float) -> None:
        """Show that `done` of `total` is done, where the total was not known at first."""
        self._bar.update(self._task, completed=done, total=total)
