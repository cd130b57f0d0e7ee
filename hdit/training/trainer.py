"""The training loop: one session, from the newest checkpoint or the start to the end or a stop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from hdit.config import RunConfig
from hdit.data.batches import Batch, Batches
from hdit.data.source import Skipped, size_of
from hdit.device import float32_products, precision_on
from hdit.errors import UserError
from hdit.messages import say
from hdit.names import printable
from hdit.report.grids import save_grid
from hdit.runs import checkpoint
from hdit.runs.checkpoint import State
from hdit.runs.folder import RunFolder
from hdit.sampling.sample import sample
from hdit.tensors import NotFiniteError
from hdit.training.interrupts import Interrupts
from hdit.training.metrics import Metrics, TrainingError
from hdit.training.noise_scale import GradientNoiseScale, squared
from hdit.training.optim import ema_decay, optimizer_tensors, set_learning_rate, update_ema
from hdit.training.progress import Progress
from hdit.training.setup import open_processes, prepare
from hdit.training.soundness import check_sound, what_to_do


class _Stopped(Exception):
    """Ends the sampling of a grid."""


class Trainer:
    """A run in a folder: config.toml, metrics.jsonl, samples/ and checkpoints/.

    Raises CheckpointError if the folder holds a run of another model, and UserError as `prepare`.
    """

    def __init__(self, config: RunConfig, folder: Path, console: Console | None = None):
        self.run, self.console = RunFolder(folder), console or Console(stderr=True)
        limit = config.training.start_timeout
        self.accelerator, hosts = open_processes(folder.name, limit, self._print)
        self.device, self.main = self.accelerator.device, self.accelerator.is_main_process
        with self._alone():
            setup = prepare(config, self.run, self.accelerator, hosts, self._say, self._warn)
        self.config, self.layout, self.shape = setup.config, setup.layout, setup.shape
        self.source, self.space, self.objective = setup.source, setup.space, setup.objective
        self.backbone, self.network, self.ema = setup.backbone, setup.network, setup.ema
        self.optimizer = setup.optimizer
        self.images, self.step = 0, 0
        self.noise_scale = GradientNoiseScale()
        self.stream: dict[str, Any] | None = None
        if setup.found:
            state = setup.found.state
            self.images, self.step, self.stream = state.images, state.step, state.stream
            self.noise_scale = GradientNoiseScale(*state.noise_scale)
        self.interrupts = Interrupts(hosts)
        self.metrics = Metrics(self.accelerator, self.config.training, self._name_skipped)

    def _alone(self) -> AbstractContextManager[None]:
        """Refuses another trainer of this run. The main process speaks for all of its own."""
        return self.run.locked() if self.main else nullcontext()

    @property
    def signalled(self) -> int:
        """The number of the signal that ended the session, or 0."""
        return self.interrupts.signalled

    def fit(self, seconds: float | None = None) -> bool:
        """Trains to the end of the config, or for so long, checkpoints and grids not counted.

        Returns False if it was not the end, with all saved.
        """
        self.interrupts.clear()
        precision = precision_on(self.device, self.config.training.precision)
        finished = self.images >= self.config.training.images
        if finished:
            self._say(
                f"{self.run.path}: already at its end, {self.images:,} images; "
                "raise training.images to go on"
            )
        with self._alone(), self.interrupts.watching(), float32_products(precision):
            if self.main and not finished:
                self.run.prepare(self.config, self.images, self.source.classes, self._warn)
            # The stream before the bar, or its workers would inherit that.
            stream = None if finished else self._open_stream()
            self.bar = Progress(self.console, self.config.training.images, self.images, self.main)
            with self.bar:
                stopped = self.images > 0 and self._sample_grid()  # that it may lack since its end
                if stream is not None and not stopped:
                    finished = self._train(stream, seconds)
                del stream  # ends its workers, while signals still wait
        if self.signalled and self._lacks_grid():
            finished = False
        if not finished:
            why = "interrupted" if self.signalled else "time is up"
            self._say(f"{why} at {self.images:,} images; the same command resumes")
        return finished

    def _open_stream(self) -> Batches:
        """The batches that this process draws, from where training stands."""
        t = self.config.training
        return Batches(
            self.source,
            seed=t.seed,
            start=self.images,
            layout=self.layout,
            workers=t.workers,
            state=self.stream,
            keep_state=self.main,
        )

    def _train(self, stream: Batches, limit: float | None) -> bool:
        """Steps to the end, an interrupt or the limit, and saves there. Returns if to the end."""
        t = self.config.training
        assert t.log_every is not None, "the config must be resolved"
        self.metrics.start()
        while True:
            loss, norm = self._step(stream)
            self.metrics.add(loss)
            before, self.images = self.images, self.images + t.batch_size
            self.step += 1
            if limit is not None and self.metrics.elapsed >= limit:
                self.interrupts.is_time_up = True
            last = self.interrupts.agreed(self.step) or self.images >= t.images
            save = last or self.images // t.checkpoint_every > before // t.checkpoint_every
            if save or self.images // t.log_every > before // t.log_every:
                self.bar.describe(self._log(norm))
            self.bar.advance(self.images, self.metrics.elapsed)
            if save:
                with self.metrics.paused():
                    self._save(stream.state())
                    last |= self._sample_grid()
            if last:
                return self.images >= t.images

    def _step(self, stream: Iterator[Batch]) -> tuple[Tensor, Tensor]:
        """One optimizer step -> (mean loss over the batch of this process, gradient norm)."""
        t = self.config.training
        total = torch.zeros((), device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        for micro in range(t.accumulate):
            last = micro == t.accumulate - 1
            with nullcontext() if last else self.accelerator.no_sync(self.network):
                with self.metrics.waiting():
                    batch = next(stream)
                self.metrics.note_skipped(batch.skipped)
                loss = self.objective(batch).mean() / t.accumulate
                self.accelerator.backward(loss)
            total += loss.detach()
            if t.gradient_noise_scale and micro == 0:
                small = self._square_of_gradient() * t.accumulate**2
        norm = self.accelerator.clip_grad_norm_(self.backbone.parameters(), t.largest_grad_norm)
        if t.gradient_noise_scale:
            part = t.batch_size // (t.accumulate * self.layout.processes)
            self.noise_scale.update(small, squared(norm), part, t.batch_size)
        set_learning_rate(self.optimizer, t.optimizer, self.step)
        self.optimizer.step()
        update_ema(self.ema, self.backbone, ema_decay(self.step, t.ema))
        return total, norm

    def _square_of_gradient(self) -> Tensor:
        """Squared norm () of the gradient that each process has by itself, averaged over them."""
        gradients = [p.grad for p in self.backbone.parameters() if p.grad is not None]
        square = squared(torch.nn.utils.get_total_norm(gradients))
        return self.accelerator.reduce(square, reduction="mean")

    # ---- what a session writes -------------------------------------------------------------------

    def _log(self, norm: Tensor) -> float:
        """Writes a line of metrics, and returns its loss: the mean since the line before.

        Raises TrainingError if loss or gradient is not finite.
        """
        with self._advised():
            line = self.metrics.line(self.images, self.step, norm)
        if self.config.training.gradient_noise_scale:
            line["gradient_noise_scale"] = self.noise_scale.scale
        if self.main:
            self.run.log(line)
        return line["loss"]

    @contextmanager
    def _advised(self) -> Iterator[None]:
        """Adds what to do to the reason why a run diverged."""
        try:
            yield
        except (TrainingError, NotFiniteError) as error:
            raise TrainingError(f"{error}. {what_to_do(self.run, self.config)}") from None

    def _save(self, stream: dict[str, Any] | None) -> None:
        """Saves a checkpoint. Raises TrainingError, and saves none, where it would be ruined."""
        tensors = {
            "model": self.backbone.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": optimizer_tensors(self.backbone, self.optimizer),
        }
        with self._advised():  # in each process, so that all of them end
            check_sound(tensors, self.ema, self.config, self.shape, self.device)
        if not self.main:
            return
        state = State(
            self.images,
            self.step,
            size_of(self.source),
            self.shape,
            tuple(self.source.classes),
            self.noise_scale.state(),
            self.space.identity,
            stream,
        )
        with self.bar.doing("saving"):
            saved = checkpoint.save(self.run.checkpoints, self.config, state, tensors)
            self.run.note_saved(self.images)
        self._say(f"{self.images:,} images: {saved}")

    def _sample_grid(self) -> bool:
        """Makes the grid of the present checkpoint, and returns whether to end the session here.

        That is so after a signal: the next session makes the grid, if no step was done in between.
        """
        if self._lacks_grid() and not self.signalled:
            self._make_grid()
        self.accelerator.wait_for_everyone()
        asked = self.config.sampling.grid > 0
        return asked and self.interrupts.agreed(0)  # at once, not only every few steps

    def _lacks_grid(self) -> bool:
        """Whether the config asks this process for a grid that is not there yet."""
        grid = self.run.grid(self.images)
        return self.main and self.config.sampling.grid > 0 and not grid.exists()

    def _make_grid(self) -> None:
        """The grid of the present EMA, unless a signal ends its sampling.

        One that cannot be made is named, and training goes on.
        """
        n, path = self.config.sampling.grid, self.run.grid(self.images)

        def stop_if_signalled() -> None:
            if self.signalled:
                raise _Stopped

        classes = self.shape.num_classes
        labels = [i % classes for i in range(n)] if classes else None
        try:
            with self.bar.doing("sampling"):
                parts = sample(
                    self.ema,
                    self.config,
                    self.shape,
                    list(range(n)),
                    labels,
                    self.device,
                    stop_if_signalled,
                    space=self.space,
                )
                images = torch.cat([part.images for part in parts])
            path.parent.mkdir(parents=True, exist_ok=True)
            save_grid(images, path, columns=classes if 1 < classes <= 16 else None)
        except _Stopped:
            return
        except (UserError, OSError, torch.OutOfMemoryError) as error:
            self._warn(f"{path}: the grid cannot be made: {error}")

    def _warn(self, text: str) -> None:
        self._say(f"warning: {text}")

    def _say(self, text: str) -> None:
        if self.main:
            self._print(text)

    def _name_skipped(self, file: Skipped) -> None:
        """Each process names the files that it met."""
        self._print(f"warning: skipped {printable(file.path)}: {file.reason}")

    def _print(self, text: str) -> None:
        say(self.console, text)
