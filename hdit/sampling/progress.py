"""How far sampling is: a bar, or lines where there is no terminal."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich import progress
from rich.console import Console
from rich.table import Column

from hdit.messages import say

QUIET = 30.0  # seconds between two lines where there is no terminal
SPAN = 60.0  # seconds that the speed is measured over, or a batch if that is longer


@contextmanager
def packing(console: Console, total: int) -> Iterator[Callable[[int], None]]:
    """A bar of images that are packed; the block tells how many more there are."""
    columns = (*progress.Progress.get_default_columns(), progress.MofNCompleteColumn())
    hidden = not console.is_interactive
    with progress.Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("packing", total=total)
        yield lambda images: bar.advance(task, images)


class Progress:
    """Images, images a second, and the time that is left; silent where `shown` is false."""

    def __init__(self, console: Console, total: int, done: int, shown: bool = True):
        """`done` of `total` images are there already."""
        self.console, self.total, self.began_with = console, total, done
        self.lines = shown and not console.is_interactive
        self.said = time.monotonic()
        self.seen: deque[tuple[float, int]] = deque([(self.said, done)])  # when, and images
        self.bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=None, table_column=Column(ratio=1)),
            progress.TextColumn("{task.fields[said]}", table_column=Column(no_wrap=True)),
            console=console,
            disable=not shown or not console.is_interactive,
            expand=True,
            transient=True,
        )
        self.task = self.bar.add_task("sampling", total=total, completed=done, said="")
        self.at = done

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

    def within(self, share: float, images: int) -> None:
        """Moves the bar on within batches of `images` in all, of which a share is done."""
        self.bar.update(self.task, completed=self.at + min(share, 1) * images)

    def made(self, images: int) -> None:
        """Tells that `images` more than at the beginning are there."""
        now, self.at = time.monotonic(), self.began_with + images
        self.seen.append((now, self.at))
        while len(self.seen) > 2 and now - self.seen[1][0] >= SPAN:
            self.seen.popleft()
        (began, before), speed = self.seen[0], 0.0
        if now > began:
            speed = (self.at - before) / (now - began)
        text = self._text(speed)
        self.bar.update(self.task, completed=self.at, said=text)
        if self.lines and now - self.said >= QUIET:
            say(self.console, text)
            self.said = now

    def _text(self, speed: float) -> str:
        text = f"{self.at:,} of {self.total:,} images"
        if not speed:
            return text
        shown = f"{speed:,.0f}" if speed >= 9.95 else f"{speed:.2g}"
        left = timedelta(seconds=round((self.total - self.at) / speed))
        return f"{text}, {shown} images/s, {left} left"

    def doing(self, what: str) -> None:
        """Says what is done in place of sampling."""
        self.bar.update(self.task, description=what)
