"""What a run writes of its steps: losses, speeds, and the files that it could not read."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from hdit.config.schema import TrainingSpec
from hdit.data.source import Skipped
from hdit.device import peak_memory
from hdit.errors import UserError
from hdit.training.optim import ema_decay


class TrainingError(UserError):
    """Training that cannot go on, and why."""


class Metrics:
    """Sums up the steps since the last line of metrics, over all processes.

    `name_file` is told of each file that was skipped, once.
    """

    def __init__(
        self, accelerator: Accelerator, spec: TrainingSpec, name_file: Callable[[Skipped], None]
    ):
        self.accelerator, self.spec, self.name_file = accelerator, spec, name_file
        self.skipped: dict[str, Skipped] = {}
        self.start()

    def start(self) -> None:
        """Begins a session: its seconds are counted from here."""
        self.seconds = 0.0  # of training, to the last line
        self._begin_line()

    def _begin_line(self) -> None:
        self.loss = torch.zeros((), device=self.accelerator.device)
        self.steps, self.waited, self.started = 0, 0.0, time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds of training in this session; pauses are not counted."""
        return self.seconds + time.monotonic() - self.started

    def add(self, loss: Tensor) -> None:
        """The mean loss () of a step."""
        self.loss += loss
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
            if file.path not in self.skipped:
                self.skipped[file.path] = file
                self.name_file(file)

    def line(self, images: int, step: int, norm: Tensor) -> dict[str, Any]:
        """The metrics after `step` steps and `images` images; `norm` is the last gradient's.

        Raises TrainingError if loss or gradient is not finite, before anything of it is saved.
        """
        device, t = self.accelerator.device, self.spec
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # or launches would be timed instead of steps
        seconds = time.monotonic() - self.started
        self.seconds += seconds
        skipped = torch.tensor(float(len(self.skipped)), device=device)
        line = {
            "images": images,
            "step": step,
            "loss": float(self.accelerator.reduce(self.loss / self.steps, reduction="mean")),
            "grad_norm": float(norm),
            "lr": t.optimizer.schedule(step - 1, t.optimizer.lr),
            "ema_decay": ema_decay(step - 1, t.ema),
            "images_per_second": self.steps * t.batch_size / seconds,
            "data_wait_share": self.waited / seconds,
            "peak_memory": peak_memory(device),  # bytes, of this process and session
            "skipped_files": int(self.accelerator.reduce(skipped, reduction="sum")),
        }
        for name in ("loss", "grad_norm"):
            if not math.isfinite(line[name]):
                raise TrainingError(f"the {name} became {line[name]} before {images:,} images")
        self._begin_line()
        return line
