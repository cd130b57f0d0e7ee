"""What a run writes of its steps: losses, speeds, and the files that it could not read."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor

from hdit.config.schema import TrainingSpec
from hdit.data.source import Skipped
from hdit.device import peak_memory
from hdit.errors import UserError
from hdit.training.hosts import Hosts
from hdit.training.optim import ema_decay

USUAL = 5  # lines before a speed is usual
WAITING = 0.2  # share of the time spent waiting for data that is told of


class TrainingError(UserError):
    """Training that cannot go on, and why."""


class Metrics:
    """Sums up the steps since the last line of metrics, over all processes.

    `name_file` is told of each file that this process skipped, once.
    """

    def __init__(
        self,
        device: torch.device,
        spec: TrainingSpec,
        hosts: Hosts,
        name_file: Callable[[Skipped], None],
    ):
        self.device, self.spec, self.hosts, self.name_file = device, spec, hosts, name_file
        self.skipped: dict[str, Skipped] = {}  # in any process, as of the last line
        self.met: dict[str, Skipped] = {}  # in this one
        self.told = 0  # how many of those it met the others know of
        self.start()

    def start(self) -> None:
        """Begins a session: its seconds are counted from here."""
        self.seconds = 0.0  # of training, to the last line
        self.speeds: deque[float] = deque(maxlen=50)
        self.going_on: set[str] = set()
        self._begin_line()

    def _begin_line(self) -> None:
        self.loss, self.taken = torch.zeros(2, device=self.device).unbind()
        self.steps, self.waited, self.started = 0, 0.0, time.monotonic()

    def drop(self) -> None:
        """Begins the line anew: what its steps did is undone."""
        self.seconds = self.elapsed
        self._begin_line()

    @property
    def elapsed(self) -> float:
        """Seconds of training in this session; pauses are not counted."""
        return self.seconds + time.monotonic() - self.started

    def add(self, loss: Tensor, bad: Tensor) -> None:
        """The mean loss () of a step over all processes; `bad` () is 1 if it was not taken."""
        self.loss += torch.where(bad > 0, 0.0, loss)
        self.taken += 1 - bad
        self.steps += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time that it lasts as spent waiting for data."""
        asked = time.monotonic()
        yield
        self.waited += time.monotonic() - asked

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Counts the time that it lasts as no training."""
        began = time.monotonic()
        yield
        self.started += time.monotonic() - began

    def note_skipped(self, files: list[Skipped]) -> None:
        """Names each file that is skipped for the first time, and keeps it for the count."""
        for file in files:
            if file.path not in self.met:
                self.met[file.path] = file
                self.name_file(file)

    def gather_skipped(self) -> list[Skipped]:
        """The files that any process skipped since the last line, and none did before.

        All processes call it.
        """
        news = list(self.met.values())[self.told :]
        if not self.hosts.any_of(bool(news)):
            return []
        self.told = len(self.met)
        found = {file.path: file for part in self.hosts.gathered(news) for file in part}
        new = [file for path, file in found.items() if path not in self.skipped]
        self.skipped |= found
        return new

    def line(self, images: int, step: int, norm: Tensor) -> dict[str, Any]:
        """The metrics after `step` steps and `images` images; `norm` is the last gradient's.

        Loss and norm are left out where they are not finite, as of steps that were not taken.
        """
        device, t = self.device, self.spec
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # or launches would be timed instead of steps
        seconds = time.monotonic() - self.started
        self.seconds += seconds
        line = {
            "images": images,
            "step": step,
            "loss": float(self.loss / self.taken),
            "grad_norm": float(norm),
            "lr": t.optimizer.schedule(step - 1, t.optimizer.lr),
            "ema_decay": ema_decay(step - 1, t.ema),
            "images_per_second": self.steps * t.batch_size / seconds,
            "data_wait_share": self.waited / seconds,
            "peak_memory": peak_memory(device),  # bytes, of this process and session
            "skipped_files": len(self.skipped),
        }
        self._begin_line()
        return {key: n for key, n in line.items() if math.isfinite(n)}

    def events(self, line: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What in a line whoever comes later should know: each once, until it is over."""
        speed, share = line["images_per_second"], line["data_wait_share"]
        usual = median(self.speeds) if len(self.speeds) >= USUAL else 0.0
        self.speeds.append(speed)
        found = {"slow": speed < usual / 2, "waiting for data": share > WAITING}
        facts = {
            "slow": {"images_per_second": speed, "usual": usual},
            "waiting for data": {"data_wait_share": share},
        }
        for kind, holds in found.items():
            if holds and kind not in self.going_on:
                yield {"kind": kind, "images": line["images"]} | facts[kind]
        self.going_on = {kind for kind, holds in found.items() if holds}
