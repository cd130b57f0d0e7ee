"""The progress bar of training."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich import progress
from rich.console import Console


class _Speed(progress.ProgressColumn):
    def render(self, task: progress.Task) -> str:
        return f"{task.speed or 0:,.0f} images/s"


QUIET = 30.0  # seconds between two lines where there is no terminal


class Progress:
    """Images, share, loss, images/s and time left; silent where `shown` is false.

    Without a terminal it is a line of text now and then.
    """

    def __init__(self, console: Console, total: int, done: int, shown: bool):
        self.console = console
        self.lines = shown and not console.is_terminal
        self.said = time.monotonic()
        self.bar = progress.Progress(
            progress.TextColumn("training"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TaskProgressColumn(),
            progress.TextColumn("loss {task.fields[loss]}"),
            _Speed(),
            progress.TimeRemainingColumn(),
            console=console,
            disable=not shown or not console.is_terminal,
        )
        self.task = self.bar.add_task("training", total=total, completed=done, loss="-")

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def advance(self, images: int) -> None:
        """Moves the bar to `images` images, counted from the beginning of training."""
        self.bar.update(self.task, completed=images)

    def describe(self, loss: float) -> None:
        """Shows the loss; without a terminal, in a line of text every 30 seconds at most."""
        self.bar.update(self.task, loss=f"{loss:.4f}")
        if self.lines and time.monotonic() - self.said >= QUIET:
            task = self.bar.tasks[self.task]
            self.console.print(
                f"{int(task.completed):,} of {int(task.total or 0):,} images, loss {loss:.4f}, "
                f"{task.speed or 0:,.0f} images/s",
                highlight=False,
                soft_wrap=True,
            )
            self.said = time.monotonic()
