"""One sitting of training: from the newest checkpoint, or the start, to the end or an interrupt."""

from __future__ import annotations

import signal as signals
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from rich.console import Console

from hdit import models
from hdit.config.schema import RunConfig, differences
from hdit.data.batches import Batch, Batches, Layout
from hdit.data.source import Skipped, first, size_of
from hdit.device import float32_products, peak_memory, precision_on
from hdit.errors import UserError
from hdit.latents.encode import open_training_source, origin_of
from hdit.latents.store import Latents
from hdit.nn.compiling import compiles
from hdit.protocols import Space
from hdit.report.grids import save_grid
from hdit.runs import checkpoint
from hdit.runs.checkpoint import CheckpointError, State
from hdit.runs.folder import RunFolder
from hdit.sampling.sample import check_guidance, sample
from hdit.training.noise_scale import GradientNoiseScale
from hdit.training.objective import Objective, settled
from hdit.training.optim import (
    adamw,
    ema_decay,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
    update_ema,
)
from hdit.training.progress import Progress

FIXED = (
    "space.kind",
    "space.channels",
    "space.factor",
    "space.sigma_data",
    "model.",
    "diffusion.parametrization",
    "diffusion.c_noise",
    "diffusion.beta_schedule",
    "diffusion.learned_variance",
)
"""Settings that make the model what it is: a run never goes on with others."""

AGREE_EVERY = 8  # steps between two questions of several processes whether to stop
PATIENCE = timedelta(hours=2)  # how long processes wait for the one that saves and samples


class TrainingError(UserError):
    """Training that cannot go on, and why."""


class _Stopped(Exception):
    """Ends the sampling of a grid."""


class Trainer:
    """A run in a folder: config.toml, metrics.jsonl, samples/ and checkpoints/.

    Raises CheckpointError where the folder holds a run of another model.
    """

    def __init__(self, config: RunConfig, folder: Path, console: Console | None = None):
        self.config, self.run = config, RunFolder(folder)
        self.console = console or Console(stderr=True)
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision="no",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
        self.device = self.accelerator.device
        self.main = self.accelerator.is_main_process
        # What processes agree on lies on the CPU: to ask a GPU, the host would wait for its steps.
        self.hosts = dist.new_group(backend="gloo") if self.accelerator.num_processes > 1 else None
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
        self.space: Space = config.space.open(self.device)
        self.source = open_training_source(config, self.space)
        first(self.source)  # raises DataError here, not in a worker, where nothing can be read
        self.shape = config.data_shape(len(self.source.classes))
        if config.sampling.grid:
            check_guidance(config, self.shape)
        found = checkpoint.newest(self.run.checkpoints, self._warn)
        if found and t.precision == "auto":  # a run keeps what it became at first
            t = t.model_copy(update={"precision": found.config.training.precision})
            config = config.model_copy(update={"training": t})
        self.config = config = settled(config, self.device, self._warn)
        t = config.training
        if found:
            self._refuse_another_model(found)

        torch.manual_seed(t.seed)
        out_channels = config.output_channels(self.shape)
        self.backbone = models.build(config.model, self.shape, out_channels).to(self.device)
        self.ema = deepcopy(self.backbone).eval().requires_grad_(False)
        if t.gradient_checkpointing:
            self.backbone.checkpoint_blocks()
        self.compiled = compiles(t.compile, self.device, calls=t.images // t.batch_size)
        if self.compiled:
            self.backbone.compile_blocks()
        self.optimizer = adamw(self.backbone, t.optimizer)
        self.images, self.step = 0, 0
        self.noise_scale = GradientNoiseScale()
        self.stream: dict[str, Any] | None = None
        self._introduce()
        if found:
            self._restore(found)
        self.network = self.accelerator.prepare_model(self.backbone)
        self.objective = Objective(
            self.network,
            config,
            self.shape,
            self.space,
            self.device,
            stored=isinstance(self.source, Latents),
            compiled=self.compiled,
        )
        self.skipped: dict[str, Skipped] = {}
        self.signalled = False
        self.waited = 0.0  # seconds for data, since the last line of metrics
        self.seconds = 0.0  # of training in this sitting, to the last line of metrics
        self.is_time_up = False

    # ---- words -----------------------------------------------------------------------------------

    def _warn(self, text: str) -> None:
        self._say(f"warning: {text}")

    def _say(self, text: str) -> None:
        if self.main:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _introduce(self) -> None:
        parameters = sum(p.numel() for p in self.backbone.parameters())
        classes = f" of {len(self.source.classes)} classes" if self.source.classes else ""
        processes = f" x {self.layout.processes}" if self.layout.processes > 1 else ""
        shape = " x ".join(map(str, self.shape.chw))
        number = size_of(self.source)
        images = "a stream of images" if number is None else f"{number:,} images"
        if isinstance(self.source, Latents):
            images = f"stored latents of {images}"
            told, used = origin_of(self.config.data), self.source.manifest.origin
            if told != used:
                self._warn(f"space.stored was encoded from {used}; [data] now is {told}")
        self._say(
            f"{images}{classes}, {shape}; "
            f"{self.config.model.kind} of {parameters:,} parameters; "
            f"{self.device.type}{processes}, {self.config.training.precision}"
            f"{', compiled' if self.compiled else ''}"
        )

    # ---- checkpoints -----------------------------------------------------------------------------

    def _refuse_another_model(self, found: checkpoint.Checkpoint) -> None:
        """A run goes on with other settings of its training, but never with another model."""
        fixed: list[str] = []
        changed: list[str] = []
        old, new = (
            c.model_dump(mode="json", exclude_none=True) for c in (found.config, self.config)
        )
        for key, before, after in differences(old, new):
            line = f"{key}: {before!r} in the run, {after!r} now"
            (fixed if key.startswith(FIXED) else changed).append(line)
        if found.state.shape != self.shape:
            before, after = (
                f"{s.channels} x {s.height} x {s.width}, {s.num_classes} classes"
                for s in (found.state.shape, self.shape)
            )
            fixed.append(f"data: {before} in the run, {after} now")
        elif found.state.classes != tuple(self.source.classes):
            pairs = zip(found.state.classes, self.source.classes, strict=True)
            names = [f"{a!r} is {b!r} now" for a, b in pairs if a != b]
            fixed.append(f"data: other names of classes: {', '.join(names[:5])}")
        if found.state.space != self.space.identity:
            before, after = (
                name[:12] or "none" for name in (found.state.space, self.space.identity)
            )
            fixed.append(f"space.vae: another VAE: hash {before} in the run, {after} now")
        if fixed:
            listing = "\n  ".join(fixed)
            raise CheckpointError(
                f"{self.run.path}: holds a run of another model:\n  {listing}\n"
                "undo the change to resume it, or start anew with another --run"
            )
        size = size_of(self.source)
        if found.state.data_size != size:
            before, after = (
                "a stream" if n is None else f"{n:,} images" for n in (found.state.data_size, size)
            )
            changed.append(f"data: {before} in the run, {after} now; drawn in another order")
        for line in changed:
            self._say(f"resuming with another setting: {line}")

    def _restore(self, found: checkpoint.Checkpoint) -> None:
        self.backbone.load_state_dict(found.tensors("model"))
        self.ema.load_state_dict(found.tensors("ema"))
        load_optimizer_tensors(self.backbone, self.optimizer, found.tensors("optimizer"))
        self.images, self.step = found.state.images, found.state.step
        self.noise_scale = GradientNoiseScale(*found.state.noise_scale)
        self.stream = found.state.stream
        self._say(f"resuming from {found.folder} at {self.images:,} images")

    def _save(self, stream: dict[str, Any] | None) -> None:
        if not self.main:
            return
        scale = self.noise_scale
        state = State(
            self.images,
            self.step,
            size_of(self.source),
            self.shape,
            tuple(self.source.classes),
            scale.state(),
            self.space.identity,
            stream,
        )
        tensors = {
            "model": self.backbone.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": optimizer_tensors(self.backbone, self.optimizer),
        }
        saved = checkpoint.save(self.run.checkpoints, self.config, state, tensors)
        self._say(f"{self.images:,} images: {saved}")

    def _sample_grid(self) -> None:
        """The grid of the present EMA, if the config asks for one and it is not there yet."""
        n, path = self.config.sampling.grid, self.run.grid(self.images)
        if not self.main or not n or path.exists():
            return

        def stop_if_signalled() -> None:
            if self.signalled:
                raise _Stopped

        classes = self.shape.num_classes
        labels = [i % classes for i in range(n)] if classes else None
        seeds = list(range(n))
        try:
            parts = sample(
                self.ema,
                self.config,
                self.shape,
                seeds,
                labels,
                self.device,
                stop_if_signalled,
                space=self.space,
            )
            pictures = torch.cat([part.images for part in parts])
        except _Stopped:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        save_grid(pictures, path, columns=classes if 1 < classes <= 16 else None)

    # ---- training --------------------------------------------------------------------------------

    def fit(self, seconds: float | None = None) -> bool:
        """Trains to the end of the config, or for so long, checkpoints and grids not counted.

        Returns False if it was not the end, with all saved.
        """
        self.seconds, self.signalled, self.is_time_up = 0.0, False, False
        if self.images >= self.config.training.images:
            self._say(
                f"{self.run.path}: already at its end, {self.images:,} images; "
                "raise training.images to go on"
            )
            return True
        precision = precision_on(self.device, self.config.training.precision)
        with (
            self.run.locked() if self.main else nullcontext(),
            self._watching_signals(),
            float32_products(precision),
        ):
            if self.main:
                self.run.prepare(self.config, self.images, self.source.classes)
            if self.images:
                self._sample_grid()  # the run may have been killed before it was made
            finished = self._train(seconds)
        if not finished:
            why = "interrupted" if self.signalled else "time is up"
            self._say(f"{why} at {self.images:,} images; the same command resumes")
        return finished

    def _train(self, limit: float | None) -> bool:
        """Steps to the end, an interrupt or the limit, and saves there. Returns if to the end."""
        t = self.config.training
        assert t.log_every is not None, "the config must be resolved"
        stream = Batches(
            self.source,
            seed=t.seed,
            start=self.images,
            layout=self.layout,
            workers=t.workers,
            state=self.stream,
            keep_state=self.main,
        )
        loss_sum, since, started = torch.zeros((), device=self.device), 0, time.monotonic()
        with Progress(self.console, t.images, self.images, self.main) as bar:
            while True:
                loss, norm = self._step(stream)
                loss_sum += loss
                since += 1
                before, self.images = self.images, self.images + t.batch_size
                self.step += 1
                if limit is not None and self.seconds + time.monotonic() - started >= limit:
                    self.is_time_up = True
                stop = self._agreed_to_stop()
                last = stop or self.images >= t.images
                save = last or self.images // t.checkpoint_every > before // t.checkpoint_every
                if save or self.images // t.log_every > before // t.log_every:
                    if self.device.type == "cuda":
                        torch.cuda.synchronize(self.device)  # what was launched is done
                    seconds = time.monotonic() - started
                    self.seconds += seconds
                    mean = self._log(
                        loss_sum / since,
                        norm,
                        since * t.batch_size / seconds,
                        self.waited / seconds,
                    )
                    bar.describe(mean)
                    loss_sum, since, started = torch.zeros_like(loss_sum), 0, time.monotonic()
                    self.waited = 0.0
                bar.advance(self.images)
                if save:
                    paused = time.monotonic()
                    self._save(stream.state())
                    if not self.signalled:
                        self._sample_grid()
                    self.accelerator.wait_for_everyone()
                    started += time.monotonic() - paused
                if last:
                    return self.images >= t.images

    def _step(self, stream: Iterator[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step -> (mean loss over the batch of this process, gradient norm)."""
        t = self.config.training
        total = torch.zeros((), device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        for micro in range(t.accumulate):
            last = micro == t.accumulate - 1
            with nullcontext() if last else self.accelerator.no_sync(self.network):
                asked = time.monotonic()
                batch = next(stream)
                self.waited += time.monotonic() - asked
                self._name_skipped(batch.skipped)
                loss = self.objective(batch).mean() / t.accumulate
                self.accelerator.backward(loss)
            total += loss.detach()
            if t.gradient_noise_scale and micro == 0:
                small = self._square_of_gradient() * t.accumulate**2
        norm = self.accelerator.clip_grad_norm_(self.backbone.parameters(), t.clip_grad_norm)
        if t.gradient_noise_scale:
            part = t.batch_size // (t.accumulate * self.layout.processes)
            self.noise_scale.update(small, norm.square(), part, t.batch_size)
        set_learning_rate(self.optimizer, t.optimizer, self.step)
        self.optimizer.step()
        update_ema(self.ema, self.backbone, ema_decay(self.step, t.ema))
        return total, norm

    def _square_of_gradient(self) -> torch.Tensor:
        """Squared norm () of the gradient that each process has by itself, averaged over them."""
        gradients = [p.grad for p in self.backbone.parameters() if p.grad is not None]
        square = torch.nn.utils.get_total_norm(gradients).square()
        return self.accelerator.reduce(square, reduction="mean")

    def _name_skipped(self, skipped: list[Skipped]) -> None:
        for file in skipped:
            if file.path not in self.skipped:
                self.skipped[file.path] = file
                # Not _warn: each process names the files that it met.
                text = f"warning: skipped {file.path}: {file.reason}"
                self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _log(
        self, loss: torch.Tensor, norm: torch.Tensor, speed: float, data_wait_share: float
    ) -> float:
        """A line of metrics; returns the loss, which is the mean since the line before.

        Raises TrainingError where loss or gradient is not finite, before anything of it is saved.
        """
        skipped = torch.tensor(float(len(self.skipped)), device=self.device)
        mean = float(self.accelerator.reduce(loss, reduction="mean"))
        optimizer = self.config.training.optimizer
        line = {
            "images": self.images,
            "step": self.step,
            "loss": mean,
            "grad_norm": float(norm),
            "lr": optimizer.schedule(self.step - 1, optimizer.lr),
            "ema_decay": ema_decay(self.step - 1, self.config.training.ema),
            "images_per_second": speed,
            "data_wait_share": data_wait_share,
            "peak_memory": peak_memory(self.device),  # bytes, of this process and sitting
            "skipped_files": int(self.accelerator.reduce(skipped, reduction="sum")),
        }
        if self.config.training.gradient_noise_scale:
            line["gradient_noise_scale"] = self.noise_scale.scale
        for name in ("loss", "grad_norm"):
            if not np.isfinite(line[name]):
                raise TrainingError(
                    f"the {name} became {line[name]} before {self.images:,} images; earlier "
                    "checkpoints are kept. Lower training.optimizer.lr, or train in fp32"
                )
        if self.main:
            self.run.log(line)
        return mean

    # ---- interrupts ------------------------------------------------------------------------------
    @contextmanager
    def _watching_signals(self) -> Iterator[None]:
        """Ctrl-C or SIGTERM ends the sitting after the current step; a second Ctrl-C at once."""

        def note(number: int, frame: FrameType | None) -> None:
            if self.signalled and number == signals.SIGINT:
                raise KeyboardInterrupt
            self.signalled = True

        old = {number: signals.signal(number, note) for number in (signals.SIGINT, signals.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signals.signal(number, handler)

    def _agreed_to_stop(self) -> bool:
        """Whether some process was told to stop: the same answer, at the same step, for all."""
        if self.layout.processes == 1:
            return self.signalled or self.is_time_up
        if self.step % AGREE_EVERY:
            return False
        said = torch.tensor([self.signalled, self.is_time_up], dtype=torch.float)
        dist.all_reduce(said, group=self.hosts)
        signalled, is_time_up = (n > 0 for n in said.tolist())
        # What has come in since is told at the next question: here it would be told to this one.
        if signalled:
            self.signalled = True
        if is_time_up:
            self.is_time_up = True
        return signalled or is_time_up
