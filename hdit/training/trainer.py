"""One sitting of training: from the newest checkpoint, or the start, to the end or an interrupt."""

from __future__ import annotations

import json
import logging
import signal as signals
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console

from hdit import models, randomness
from hdit.config import RunConfig, differences
from hdit.data.batches import Batch, Layout, batches
from hdit.data.source import Skipped
from hdit.diffusion.noise import stratify
from hdit.protocols import Cond, UserError
from hdit.report.grid import save_grid
from hdit.sampling import make_denoiser, sample
from hdit.spaces.pixel import PixelSpace
from hdit.training import checkpoint
from hdit.training.checkpoint import CheckpointError, State
from hdit.training.optim import (
    adamw,
    ema_decay,
    load_optimizer_tensors,
    optimizer_tensors,
    update_ema,
)
from hdit.training.progress import Progress

log = logging.getLogger(__name__)


class TrainingError(UserError):
    """Training that cannot go on, and why."""


class Trainer:
    """A run in a folder: config.toml, metrics.jsonl, samples/ and checkpoints/.

    Raises CheckpointError where the folder holds a run of another model.
    """

    def __init__(self, config: RunConfig, folder: Path, console: Console | None = None):
        self.config, self.folder = config, folder
        self.console = console or Console(stderr=True)
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")
        self.device = self.accelerator.device
        self.main = self.accelerator.is_main_process
        t = config.training
        self.layout = Layout(
            t.batch_size,
            t.accumulate,
            self.accelerator.num_processes,
            self.accelerator.process_index,
        )
        if t.batch_size % (t.accumulate * self.layout.processes):
            raise TrainingError(
                f"training.batch_size: {t.batch_size} images cannot be shared by "
                f"{self.layout.processes} processes in {t.accumulate} accumulation steps"
            )
        self.space = PixelSpace()
        self.source = config.data.open()
        self.signal = config.signal(len(self.source.classes))
        found = checkpoint.newest(folder / "checkpoints", self._warn)
        if found:
            self._refuse_another_model(found)

        torch.manual_seed(t.seed)
        self.backbone = models.build(config.model, self.signal).to(self.device)
        self.ema = deepcopy(self.backbone).eval().requires_grad_(False)
        self.optimizer = adamw(self.backbone, t.optimizer)
        self.images, self.step = 0, 0
        if found:
            self._restore(found)
        self.network = self.accelerator.prepare_model(self.backbone)
        self.denoiser = make_denoiser(self.network, config, self.signal)
        self.skipped: dict[str, Skipped] = {}
        self.interrupted = False

    # ---- the run's folder ------------------------------------------------------------------------

    def _warn(self, text: str) -> None:
        self._say(f"warning: {text}")

    def _say(self, text: str) -> None:
        if self.main:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _refuse_another_model(self, found: checkpoint.Checkpoint) -> None:
        """A run goes on with other settings of its training, but never with another model."""
        fixed: list[str] = []
        changed: list[str] = []
        old, new = (
            c.model_dump(mode="json", exclude_none=True) for c in (found.config, self.config)
        )
        for key, before, after in differences(old, new):
            line = f"{key}: {before!r} in the run, {after!r} now"
            shape = (
                "model.",
                "diffusion.parametrization",
                "diffusion.noise_label",
                "diffusion.schedule",
            )
            (fixed if key.startswith(shape) else changed).append(line)
        if found.state.signal != self.signal or found.state.classes != tuple(self.source.classes):
            before, after = (
                f"{s.channels} x {s.height} x {s.width}, {s.num_classes} classes"
                for s in (found.state.signal, self.signal)
            )
            fixed.append(f"data: {before} in the run, {after} now")
        if fixed:
            listing = "\n  ".join(fixed)
            raise CheckpointError(
                f"{self.folder}: holds a run of another model:\n  {listing}\n"
                "undo the change to resume it, or start anew with another --run"
            )
        for line in changed:
            self._say(f"resuming with another setting: {line}")

    def _restore(self, found: checkpoint.Checkpoint) -> None:
        self.backbone.load_state_dict(found.tensors("model"))
        self.ema.load_state_dict(found.tensors("ema"))
        load_optimizer_tensors(self.backbone, self.optimizer, found.tensors("optimizer"))
        self.images, self.step = found.state.images, found.state.step
        self._say(f"resuming from {found.folder} at {self.images:,} images")

    def _prepare_folder(self) -> None:
        """Writes the config, and drops what an earlier sitting did after the last checkpoint."""
        self.folder.mkdir(parents=True, exist_ok=True)
        checkpoint.write_atomically(self.folder / "config.toml", self.config.dump())
        metrics = self.folder / "metrics.jsonl"
        if metrics.exists():
            lines = [line for line in metrics.read_text().splitlines() if self._is_past(line)]
            checkpoint.write_atomically(metrics, "".join(f"{line}\n" for line in lines))
        for folder in checkpoint.checkpoint_folders(self.folder / "checkpoints"):
            if int(folder.name) > self.images:  # damaged, or it would have been resumed from
                folder.rename(folder.with_name(f"{folder.name}.damaged"))

    def _is_past(self, line: str) -> bool:
        try:
            return json.loads(line)["images"] <= self.images
        except ValueError:  # the last line of a killed run may be cut
            return False

    def _save(self) -> None:
        """A checkpoint and, where the config asks for one, its grid of samples."""
        if (
            not self.main
            or (self.folder / "checkpoints" / checkpoint.folder_name(self.images)).exists()
        ):
            return
        state = State(self.images, self.step, self.signal, tuple(self.source.classes))
        tensors = {
            "model": self.backbone.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": optimizer_tensors(self.backbone, self.optimizer),
        }
        saved = checkpoint.save(self.folder / "checkpoints", self.config, state, tensors)
        self._say(f"{self.images:,} images: {saved}")

    def _sample_grid(self) -> None:
        n = self.config.sampling.grid
        if not self.main or not n:
            return
        classes = self.signal.num_classes
        labels = [i % classes for i in range(n)] if classes else None
        pictures = sample(self.ema, self.config, self.signal, list(range(n)), labels, self.device)
        path = self.folder / "samples" / f"{checkpoint.folder_name(self.images)}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = classes if 1 < classes <= 16 else None
        save_grid(pictures, path, columns)

    # ---- training --------------------------------------------------------------------------------

    def fit(self) -> bool:
        """Trains to the end of the config. Returns False if interrupted, with all saved."""
        t = self.config.training
        if self.main:
            self._prepare_folder()
        if self.images >= t.images:
            self._say(
                f"{self.folder}: already at its end, {self.images:,} images; "
                "raise training.images to go on"
            )
            return True
        log_every = t.log_every or 10 * t.batch_size
        stream = batches(
            self.source, seed=t.seed, start=self.images, layout=self.layout, workers=t.workers
        )
        loss_sum, norm, since, started = (
            torch.zeros((), device=self.device),
            None,
            0,
            time.monotonic(),
        )
        with self._interruptible(), Progress(self.console, t.images, self.images, self.main) as bar:
            while self.images < t.images and not self.interrupted:
                loss, norm = self._step(stream)
                loss_sum += loss
                since += t.batch_size
                before, self.images = self.images, self.images + t.batch_size
                self.step += 1
                bar.advance(self.images)
                self._agree_on_interrupt()
                end = self.images >= t.images or self.interrupted
                if end or self.images // log_every > before // log_every:
                    seconds = time.monotonic() - started
                    self._log(bar, loss_sum, norm, since, seconds)
                    loss_sum, since, started = torch.zeros_like(loss_sum), 0, time.monotonic()
                if end or self.images // t.checkpoint_every > before // t.checkpoint_every:
                    paused = time.monotonic()
                    self._save()
                    if not self.interrupted:
                        self._sample_grid()
                    started += time.monotonic() - paused
        if self.interrupted:
            self._say(f"interrupted at {self.images:,} images; the same command resumes")
        return not self.interrupted

    def _step(self, stream: Iterator[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step -> (mean loss over the batch of this process, gradient norm)."""
        t = self.config.training
        total = torch.zeros((), device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        for micro in range(t.accumulate):
            last = micro == t.accumulate - 1
            with nullcontext() if last else self.accelerator.no_sync(self.network):
                loss = self._loss(next(stream)) / t.accumulate
                self.accelerator.backward(loss)
            total += loss.detach()
        norm = self.accelerator.clip_grad_norm_(self.backbone.parameters(), t.clip_grad_norm)
        self.optimizer.step()
        update_ema(self.ema, self.backbone, ema_decay(self.step, t.ema))
        return total, norm

    def _loss(self, batch: Batch) -> torch.Tensor:
        """Mean loss of a batch; every random choice is a function of seed and image counter."""
        t, d, counters = self.config.training, self.config.diffusion, batch.counters
        self._name_skipped(batch.skipped)
        images = batch.images.to(self.device, non_blocking=True)
        if self.config.data.flip:
            mirrored = randomness.uniform(t.seed, "flip", counters) < 0.5
            images = torch.where(
                mirrored.to(self.device)[:, None, None, None], images.flip(-1), images
            )
        x0 = self.space.normalize(self.space.encode(images))
        noise = randomness.normal(
            randomness.generators(t.seed, "noise", counters, self.device), self.signal.shape
        )
        rand = randomness.uniform(t.seed, "sigma", counters)
        u = stratify(rand, torch.from_numpy(batch.position), t.batch_size)
        sigma = d.density(u, self.signal, self.config.schedule).to(self.device)
        cond = Cond()
        if self.signal.num_classes:
            dropped = randomness.uniform(t.seed, "label dropout", counters) < t.label_dropout
            cond = Cond(batch.labels.to(self.device)).drop(dropped.to(self.device))
        # Dropout within the network draws from the global generator.
        torch.manual_seed(int(randomness.bits(t.seed, "dropout", counters[:1])[0] >> np.uint64(1)))
        return self.denoiser.loss(x0, noise, sigma, cond, d.weighting).mean()

    def _name_skipped(self, skipped: list[Skipped]) -> None:
        for file in skipped:
            if file.path not in self.skipped:
                self.skipped[file.path] = file
                # Not _warn: each process names the files that it met.
                text = f"warning: skipped {file.path}: {file.reason}"
                self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _log(
        self,
        bar: Progress,
        loss_sum: torch.Tensor,
        norm: torch.Tensor,
        since: int,
        seconds: float,
    ) -> None:
        """A line of metrics.jsonl: loss is the mean over the images since the line before."""
        t = self.config.training
        steps = since // t.batch_size
        loss = float(self.accelerator.reduce(loss_sum / steps, reduction="mean"))
        if not np.isfinite(loss):
            raise TrainingError(
                f"the loss became {loss} before {self.images:,} images; the last checkpoint is "
                "kept. Lower training.optimizer.lr, or train in fp32"
            )
        line = {
            "images": self.images,
            "step": self.step,
            "loss": loss,
            "grad_norm": float(norm),
            "lr": t.optimizer.lr,
            "ema_decay": ema_decay(self.step - 1, t.ema),
            "images_per_second": since / seconds,
            "skipped_files": len(self.skipped),
        }
        bar.describe(loss)
        if self.main:
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as metrics:
                metrics.write(json.dumps(line) + "\n")

    # ---- interrupts ------------------------------------------------------------------------------

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Ctrl-C or SIGTERM ends the sitting after the current step; a second one at once."""

        def stop(number: int, frame: FrameType | None) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True

        old = {number: signals.signal(number, stop) for number in (signals.SIGINT, signals.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signals.signal(number, handler)

    def _agree_on_interrupt(self) -> None:
        """All processes stop at the same step, whichever of them was told to."""
        if self.layout.processes > 1:
            flag = torch.tensor(float(self.interrupted), device=self.device)
            self.interrupted = bool(self.accelerator.reduce(flag, reduction="sum"))
