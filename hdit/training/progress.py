"""The progress bar of training."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich import progress
from rich.console import Console
from rich.table import Column

from hdit.messages import say

QUIET = 30.0  # seconds between two lines where there is no terminal
SPAN = 30.0  # seconds of training that the speed is measured over, or one step if that is longer


def speed_text(speed: float | None) -> str:
    """Images a second: two significant digits, and all of those before the point."""
    if not speed:
        return "- images/s"
    return f"{speed:,.0f} images/s" if speed >= 9.95 else f"{speed:.2g} images/s"


class _Speed(progress.ProgressColumn):
    def render(self, task: progress.Task) -> str:
        return speed_text(task.fields["speed"])


class _TimeLeft(progress.ProgressColumn):
    def render(self, task: progress.Task) -> str:
        speed = task.fields["speed"]
        if not speed:
            return "-:--:--"
        left = timedelta(seconds=int((task.remaining or 0) / speed))
        return f"{left.days} d {left.seconds // 3600} h" if left.days else str(left)


class Progress:
    """Images, share, loss, images/s and time left; silent where `shown` is false.

    Without a terminal, or in a dumb one, it is a line of text now and then.
    """

    def __init__(self, console: Console, total: int, done: int, shown: bool):
        self.console = console
        self.lines = shown and not console.is_interactive
        self.said = time.monotonic()
        self.seen: deque[tuple[float, int]] = deque([(0.0, done)])  # seconds and images
        self.bar = progress.Progress(
            progress.TextColumn("{task.description:8}"),
            # It takes what the others leave of the line.
            progress.BarColumn(bar_width=None, table_column=Column(ratio=1)),
            progress.MofNCompleteColumn(table_column=Column(no_wrap=True)),
            progress.TaskProgressColumn(),
            progress.TextColumn("loss {task.fields[loss]}"),
            _Speed(table_column=Column(no_wrap=True)),
            _TimeLeft(table_column=Column(no_wrap=True)),
            console=console,
            disable=not shown or not console.is_interactive,
            expand=True,
        )
        self.task = self.bar.add_task("training", total=total, completed=done, loss="-", speed=None)

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

    def advance(self, images: int, seconds: float) -> None:
        """Moves the bar to `images` images, counted from the beginning of training.

        `seconds` are those of training in this session: no pause counts against the speed.
        """
        self.seen.append((seconds, images))
        while len(self.seen) > 2 and seconds - self.seen[1][0] >= SPAN:
            self.seen.popleft()
        began, before = self.seen[0]
        speed = (images - before) / (seconds - began) if seconds > began else None
        self.bar.update(self.task, completed=images, speed=speed)

    def describe(self, loss: float | None) -> None:
        """Shows the loss; without a terminal, in a line of text every 30 seconds at most."""
        shown = "none" if loss is None else f"{loss:.4f}"
        self.bar.update(self.task, loss=shown)
        if self.lines and time.monotonic() - self.said >= QUIET:
            task = self.bar.tasks[self.task]
            say(
                self.console,
                f"{int(task.completed):,} of {int(task.total or 0):,} images, loss {shown}, "
                f"{speed_text(task.fields['speed'])}",
            )
            self.said = time.monotonic()

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Says in the bar what is done in place of training, in a word, while the block runs."""
        self.bar.update(self.task, description=what)
        try:
            yield
        finally:
            self.bar.update(self.task, description="training")
