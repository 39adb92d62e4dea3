"""A progress bar on stderr."""

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """A progress bar on stderr.

    Shown if `show` is true and stderr is a terminal. Use it as a context manager.
    """

    def __init__(self, total: float, label: str, *, show: bool = True) -> None:
        """Create the bar.

        Args:
            total: Amount of work, in any unit.
            label: Text in front of the bar.
            show: Show the bar if stderr is a terminal.
        """
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
        """Show the bar."""
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the bar."""
        self._bar.stop()

    def advance(self, steps: float) -> None:
        """Add finished work, in the unit of `total`."""
        self._bar.advance(self._task, steps)

    def update(self, done: float, total: float) -> None:
        """Set the finished and the total work, for a total that was unknown when the bar was created."""
        self._bar.update(self._task, completed=done, total=total)
