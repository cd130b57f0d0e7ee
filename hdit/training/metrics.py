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
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hdit.config.schema import TrainingSpec
from hdit.data.source import Skipped
from hdit.device import Precision, peak_memory, precision_on, to_device
from hdit.errors import UserError
from hdit.models.peaks import peak_flops
from hdit.runs.history import BINS
from hdit.training.ema import ema_decay
from hdit.training.hosts import Hosts

USUAL = 5  # lines before a speed is usual
WAITING = 0.2  # share of the time spent waiting for data that is told of


def _peak(device: torch.device, precision: Precision) -> float | None:
    """FLOP/s of a GPU at best, where they are known."""
    if device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(device), precision)


class TrainingError(UserError):
    """Training that cannot go on, and why."""


class Metrics:
    """Sums up the steps since the last line of metrics, over all processes.

    `name_file` is told of each file that this process skipped, once. `macs` are those of a forward
    pass of one image, and `edges` the BINS + 1 noise levels between which losses are told.
    """

    def __init__(
        self,
        device: torch.device,
        spec: TrainingSpec,
        hosts: Hosts,
        name_file: Callable[[Skipped], None],
        macs: int,
        edges: list[float],
    ):
        self.device, self.spec, self.hosts, self.name_file = device, spec, hosts, name_file
        self.macs, self.edges = 3 * macs, edges  # of a step: the backward pass takes twice as many
        self.peak = 1e12 * spec.peak_tflops if spec.peak_tflops else None  # of one device
        if self.peak is None:
            self.peak = _peak(device, precision_on(device, spec.precision))
        self.before = 0.0  # seconds of training in earlier sessions
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
        # Sums of losses, and how many they are, by noise level: since the last line, of a step.
        zeros = torch.zeros(2, 2, BINS, dtype=torch.float64, device=self.device)
        self.by_sigma, self.of_step = zeros.unbind()
        self.steps, self.waited, self.started = 0, 0.0, time.monotonic()

    def drop(self) -> None:
        """Begins the line anew: what its steps did is undone."""
        self.seconds = self.elapsed
        self._begin_line()

    @property
    def elapsed(self) -> float:
        """Seconds of training in this session; pauses are not counted."""
        return self.seconds + time.monotonic() - self.started

    def note_losses(self, losses: Tensor, bins: Tensor) -> None:
        """The losses (b,) of a part of a step, and which of BINS each is of: (b,) on the CPU."""
        of_bin = to_device(F.one_hot(bins, BINS).T.bool().contiguous(), losses.device)  # (n b)
        self.of_step[0] += torch.where(of_bin, losses.detach().double(), 0.0).sum(1)
        self.of_step[1] += of_bin.sum(1)

    def add(self, loss: Tensor, bad: Tensor) -> None:
        """The mean loss () of a step over all processes; `bad` () is 1 if it was not taken."""
        self.by_sigma += torch.where(bad > 0, 0.0, self.of_step)
        self.of_step.zero_()
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

        Loss and norm are left out where they are not finite, as of steps that were not taken. Of
        noise levels that no image had, the loss is None.
        """
        device, t = self.device, self.spec
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # or launches would be timed instead of steps
        seconds = time.monotonic() - self.started
        self.seconds += seconds
        speed = self.steps * t.batch_size / seconds
        line = {
            "images": images,
            "step": step,
            "loss": float(self.loss / self.taken),
            "grad_norm": float(norm),
            "lr": t.optimizer.schedule(t.moment(step - 1, images - t.batch_size), t.optimizer.lr),
            "ema_decay": ema_decay(step - 1, t.ema),
            "images_per_second": speed,
            "data_wait_share": self.waited / seconds,
            "peak_memory": peak_memory(device),  # bytes, of this process and session
            "skipped_files": len(self.skipped),
            "seconds": self.before + self.seconds,
            "macs": images * self.macs,
        }
        if self.peak is not None:
            flops = 2 * self.macs * speed
            line["mfu"] = flops / (self.peak * self.hosts.size)
        if self.hosts.size > 1:
            dist.all_reduce(self.by_sigma)
        sums, numbers = self.by_sigma.tolist()
        by_sigma = [a / n if n else None for a, n in zip(sums, numbers, strict=True)]
        self._begin_line()
        finite = {key: n for key, n in line.items() if math.isfinite(n)}
        return finite | {"sigma_edges": self.edges, "loss_by_sigma": by_sigma}

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
