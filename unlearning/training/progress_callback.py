"""Progress of a training run on stderr."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ProgressBar(TrainerCallback):
    """Shows a bar with the losses, and logs a line of the history at the last step whatever `logging_steps` is."""

    def __init__(self, description: str, *, show: bool) -> None:
        """Make the bar, with its description; nothing is shown if not `show`."""
        self.description = description
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"),
            console=Console(stderr=True),
            disable=not show,
        )
        self.task: TaskID | None = None
        self.preparation: TaskID | None = None

    def say(self, line: str) -> None:
        """Write a line above the bar."""
        if not self.bar.disable:
            self.bar.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def show_references(self, done: int, total: int) -> None:
        """Show the number of examples whose reference quantities are computed."""
        self.bar.start()
        if self.preparation is None or done <= 0:
            self.preparation = self.bar.add_task("reference model", total=total, losses="")
        self.bar.update(self.preparation, completed=done, total=total)

    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Open the bar."""
        self.task = self.bar.add_task(self.description, total=state.max_steps, completed=state.global_step, losses="")
        self.bar.start()

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Advance the bar."""
        assert self.task is not None
        self.bar.update(self.task, completed=state.global_step)
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        logs: dict[str, float] | None = None,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Show the losses of the line."""
        if logs is not None and "loss" in logs and self.task is not None:
            shown = [f"{name} {value:.3g}" for name, value in logs.items() if name.endswith("loss")]
            self.bar.update(self.task, losses=", ".join(shown))

    def close(self) -> None:
        """Close the bar, also after an exception."""
        self.bar.stop()
