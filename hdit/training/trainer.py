"""The training loop: one session, from the newest checkpoint or the start to the end or a stop."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.func import functional_call

from hdit.config import RunConfig
from hdit.data.batches import Batch, Batches
from hdit.data.source import Skipped, Source, Stream, size_of
from hdit.device import float32_products, precision_on
from hdit.errors import UserError
from hdit.messages import say
from hdit.names import printable
from hdit.processes import host_group
from hdit.protocols import Network, Space
from hdit.report.grids import save_grid
from hdit.runs.checkpoint import Checkpoint, CheckpointError, State
from hdit.runs.folder import RunFolder
from hdit.runs.saver import Saver
from hdit.tensors import NotFiniteError
from hdit.training.distributed import clip_gradient
from hdit.training.grid import Sampler
from hdit.training.guards import Guard, Spikes, Step, first_bad_module, take_step
from hdit.training.interrupts import Interrupts
from hdit.training.metrics import Metrics, TrainingError
from hdit.training.noise_scale import GradientNoiseScale, squared
from hdit.training.objective import bins_of, sigma_edges, training_u
from hdit.training.optim import optimizer_tensors, set_learning_rate
from hdit.training.progress import Progress
from hdit.training.setup import PATIENCE, open_processes, prepare
from hdit.training.soundness import check_outputs, check_tensors, what_to_do
from hdit.training.tracking import Tracking
from hdit.training.validation import evaluating


def _short(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class Trainer:
    """A run in a folder: config.toml, metrics.jsonl, samples/ and checkpoints/.

    Raises CheckpointError if the folder holds a run of another model, and UserError as `prepare`.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        console: Console | None = None,
        opened: tuple[Space, Source | Stream] | None = None,
    ):
        """`opened` is space and data in place of the config's own."""
        self.run, self.console = RunFolder(folder), console or Console(stderr=True)
        limit = config.training.start_timeout
        self.accelerator, self.hosts = open_processes(folder.name, limit, self._print)
        self.device, self.main = self.accelerator.device, self.accelerator.is_main_process
        track = config.training.track if self.main else ()
        self.tracking = Tracking(track, self.run, self._warn)
        with self._alone():
            setup = prepare(
                config, self.run, self.accelerator, self.hosts, self._say, self._warn, opened
            )
            self.hosts.meet()  # as the main process may take a new folder away again
        self.setup, self.config, self.layout = setup, setup.config, setup.layout
        self.shape, self.source, self.space = setup.shape, setup.source, setup.space
        self.backbone, self.optimizer = setup.backbone, setup.optimizer
        self.averages, self.ema = setup.averages, setup.averages.main
        self.parallel = setup.parallel
        self.network = self.parallel.trained(self.backbone)
        self.objective = setup.objective(self.network, self.device)
        self.images, self.step, self.passed_over = 0, 0, 0
        self.saved = 0  # the step of the last checkpoint
        self.noise_scale = GradientNoiseScale()
        self.stream: dict[str, Any] | None = None
        if setup.found:
            self._stand_at(setup.found.state)
        self.interrupts = Interrupts(self.hosts)
        self.validation = setup.validation(self.device, self.hosts, self._name_skipped)
        self.sampler = Sampler(
            *(self.ema, self.config, self.shape, self.space),
            *(self.device, self.parallel, self.interrupts),
        )
        macs = sum(part.macs for part in self.backbone.parts(self.shape))
        edges = sigma_edges(self.config, self.shape)
        t = self.config.training
        self.metrics = Metrics(self.device, t, self.hosts, self._name_skipped, macs, edges)
        self.guard = Guard(self.layout.processes)
        self.spikes, self.rollbacks = Spikes(t.guard.spike), 0
        # Another thread talks in this group, whose words must not mix with those of `hosts`.
        shards = host_group(PATIENCE) if self.parallel.sharded else None
        self.saver = Saver(self.run, self.config, self.main, shards, self._say)

    def _stand_at(self, state: State) -> None:
        """Takes the counts of a checkpoint's state."""
        self.images, self.step, self.stream = state.images, state.step, state.stream
        self.passed_over, self.saved = state.passed_over, state.step
        self.noise_scale = GradientNoiseScale(*state.noise_scale)

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
        self.metrics.before = 0.0
        with self._alone(), self.interrupts.watching(), float32_products(precision):
            if self.main and not finished:
                self.run.prepare(self.config, self.images, self.source.classes, self._warn)
                self.metrics.before = self.run.last_line(self.run.metrics).get("seconds", 0.0)
            self.hosts.meet()  # or others would wait in a GPU's first step where that failed
            # The stream before the bar, or its workers would inherit that.
            stream = None if finished else self.open_stream()
            self.bar = Progress(self.console, self.config.training.images, self.images, self.main)
            with self.bar, closing(self.saver), closing(self.tracking):
                self.tracking.start(self.config, self.images, self._say)
                # What it may lack since its end.
                stopped = self.images > 0 and (self._make_up_validation() or self._sample_grid())
                if stream is not None and not stopped:
                    finished = self._train(stream, seconds)
                del stream  # ends its workers, while signals still wait
        if self.signalled and (self._lacks_grid() or self._lacks_validation()):
            finished = False
        if not finished:
            why = "interrupted" if self.signalled else "time is up"
            self._say(f"{why} at {self.images:,} images; the same command resumes")
        return finished

    def open_stream(self) -> Batches:
        """The batches that this process draws, from where training stands."""
        t = self.config.training
        return Batches(
            self.source,
            seed=t.seed,
            start=self.images + self.passed_over,
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
            norm = self._step(stream)
            before, self.images = self.images, self.images + t.batch_size
            self.step += 1
            if self.is_lost(at_a_line=self.images // t.log_every > before // t.log_every):
                with self.metrics.paused():
                    self._go_back(f"{self.guard.in_a_row} steps in a row are of no finite loss")
                self.metrics.drop()
                continue
            if limit is not None and self.metrics.elapsed >= limit:
                self.interrupts.is_time_up = True
            last = self.interrupts.agreed(self.step) or self.images >= t.images
            save = last or self.images // t.checkpoint_every > before // t.checkpoint_every
            validate = self._is_validation_due(before, save, last)
            if save or validate or self.images // t.log_every > before // t.log_every:
                self.bar.describe(self._log(norm))
            self.bar.advance(self.images, self.metrics.elapsed)
            if validate:
                with self.metrics.paused():
                    if self._validate():
                        last = save = True
            every = t.ema.snapshot_every
            if every and (self.images >= t.images or self.images // every > before // every):
                with self.metrics.paused():
                    whole = self._save_snapshot()  # before the checkpoint, which stands for it
                if not whole:
                    self.metrics.drop()
                    continue
            if save:
                with self.metrics.paused():
                    if not self._save(stream.state()):
                        continue
                    last |= self._sample_grid()
            if last:
                self.saver.finish()
                return self.images >= t.images

    def _step(self, stream: Iterator[Batch]) -> Tensor:
        """One optimizer step, unless the guard is against it -> gradient norm ()."""
        t = self.config.training
        total = torch.zeros((), device=self.device)
        batches = []
        self.optimizer.zero_grad(set_to_none=True)
        for micro in range(t.accumulate):
            last = micro == t.accumulate - 1
            with nullcontext() if last else self.parallel.keeping_gradients(self.network):
                with self.metrics.waiting():
                    batches.append(batch := next(stream))
                self.metrics.note_skipped(batch.skipped)
                losses = self.objective(batch)
                self.metrics.note_losses(losses, bins_of(training_u(self.config, batch)))
                loss = losses.mean() / t.accumulate
                self.accelerator.backward(loss)
            total += loss.detach()
            if t.gradient_noise_scale and micro == 0:
                small = self._square_of_gradient() * t.accumulate**2
        norm = clip_gradient(list(self.backbone.parameters()), t.largest_grad_norm)
        bad, loss = self.guard.judge(self.images, total, norm, batches)
        self.metrics.add(loss, bad)
        if t.gradient_noise_scale:
            part = t.batch_size // (t.accumulate * self.layout.processes)
            self.noise_scale.update(small, squared(norm), part, t.batch_size)
        set_learning_rate(self.optimizer, t.optimizer, t.moment(self.step, self.images))
        take_step(self.optimizer, bad)
        self.averages.update(self.backbone, self.step, bad)
        return norm

    def _square_of_gradient(self) -> Tensor:
        """Squared norm () of the gradient that each process has by itself, averaged over them."""
        gradients = [p.grad for p in self.backbone.parameters() if p.grad is not None]
        square = squared(torch.nn.utils.get_total_norm(gradients))
        return self.accelerator.reduce(square, reduction="mean")

    # ---- what a session writes -------------------------------------------------------------------

    def _log(self, norm: Tensor) -> float | None:
        """Writes a line of metrics, and returns its loss, if any: the mean since the last."""
        new_files = self.metrics.gather_skipped()
        line = self.metrics.line(self.images, self.step, norm)
        line["skipped_steps"], line["rollbacks"] = self.guard.skipped, self.rollbacks
        if self.config.training.gradient_noise_scale:
            line["gradient_noise_scale"] = self.noise_scale.scale
        self.saver.check()  # not only at the next checkpoint
        if self.main:
            self.run.log(line)
            self.tracking.line(line)
            for file in new_files:
                self._note("file skipped", self.images, path=file.path, reason=file.reason)
            for event in self.metrics.events(line):
                self._tell(**event)
        return line.get("loss")

    # ---- validation ------------------------------------------------------------------------------

    def _is_validation_due(self, before: int, save: bool, last: bool) -> bool:
        """Whether there is a validation after the step from `before` images on.

        It is the same in each process: a signal, which may have come to one, ends it when it began.
        """
        t = self.config.training
        if self.validation is None:
            return False
        assert t.validate_every is not None, "the config must be resolved"
        passed = self.images // t.validate_every > before // t.validate_every
        return passed or last or (save and t.keep.best is not None)

    def _make_up_validation(self) -> bool:
        """Does what a signal has cut off; returns as `_validate`."""
        if not self.hosts.any_of(self._lacks_validation()):
            return False
        stopped = self._validate()
        if self.main:
            self.run.name_best()  # the checkpoint is there already, and no later one may come
        return stopped

    def _lacks_validation(self) -> bool:
        """Whether there should be a line for the present images, and this process writes it."""
        if not self.main:
            return False
        validated = self.run.validated()
        before = max((n for n in validated if n < self.images), default=0)
        due = self._is_validation_due(before, True, self._is_at_end())
        return due and self.images not in validated

    def _is_signalled(self) -> bool:
        """Whether a signal came: to any process, where a sharded network has all do the same."""
        mine = bool(self.signalled)
        return self.hosts.any_of(mine) if self.parallel.sharded else mine

    def _is_at_end(self) -> bool:
        return self.images >= self.config.training.images

    def _validate(self) -> bool:
        """Writes a line of validation, and returns whether to end the session here.

        That is so after a signal, which ends it without a line; the next session makes it up.
        """
        assert self.validation is not None, "or it would not be due"
        networks = self._networks({"model": self.backbone.state_dict(), **self.averages.tensors()})
        with self.bar.doing("validating"), evaluating(self.backbone, self.ema):
            found = self.validation.measure(networks, self._is_signalled)
        if found is not None and self.main:
            line = {"images": self.images, "step": self.step} | found
            self.run.log_validation(line)
            self.tracking.validation(line)
            losses = {name: told["loss"] for name, told in found["weights"].items()}
            shown = (f"{k} {'none' if v is None else _short(v)}" for k, v in losses.items())
            self._say(f"{self.images:,} images: validation loss {', '.join(shown)}")
        return self.interrupts.agreed(0)  # at once, not only every few steps

    # ---- steps that are not finite ---------------------------------------------------------------

    def is_lost(self, at_a_line: bool) -> bool:
        """Tells of the steps since the last look, and returns whether to go back.

        On a CPU it looks after each step; a GPU would be waited for, so that it looks at each line.
        """
        if self.device.type != "cpu" and not at_a_line:
            return False
        for step in self.guard.read():
            if not step.taken:
                self._tell_skipped(step)
            elif (deviations := self.spikes.spike(step.loss)) is not None:
                self._tell("loss spike", images=step.images, loss=step.loss, deviations=deviations)
        return self.guard.in_a_row >= self.config.training.guard.patience

    def _tell_skipped(self, step: Step) -> None:
        """Finds the first module that gave what is not finite, and tells of the step."""
        # Each process calls it for each batch, as the network may be sharded. A compiled one, whose
        # graphs know no hooks, is not looked into.
        batches = () if self.setup.compiled else step.batches
        found = [first_bad_module(self.backbone, partial(self.objective, b)) for b in batches]
        mine = [int(n) for batch in step.batches for n in batch.counters]
        everyone = self.hosts.gathered((next(filter(None, found), None), mine))
        modules = [module for module, _ in everyone if module]
        module = [*modules, "none: loss or gradient" if found else "not known"][0]
        counters = sorted(n for _, counters in everyone for n in counters)
        self._tell(
            "step skipped",
            images=step.images,
            loss=step.loss if math.isfinite(step.loss) else str(step.loss),
            module=module,
            counters=counters,
        )

    def _go_back(self, reason: str) -> None:
        """Goes back to the last checkpoint, and on with the images that come next.

        Raises TrainingError where there is none, or it went back too often.
        """
        spec = self.config.training.guard
        self.saver.finish()
        self.hosts.meet()
        found = self._newest() if self.rollbacks < spec.rollbacks else None
        if found is None:
            times = f", after going back {self.rollbacks} times" if self.rollbacks else ""
            advice = what_to_do(self.run, self.config)
            raise TrainingError(
                f"training diverged before {self.images:,} images{times}: {reason}. {advice}"
            )
        drawn = self.images + self.passed_over
        self.setup.load(found, self._say)
        stream = self.stream
        self._stand_at(found.state)
        self.stream, self.passed_over = stream, drawn - self.images
        self.guard.forget()
        self.spikes = Spikes(spec.spike)
        self.rollbacks += 1
        self.hosts.meet()  # or one would cut the metrics that another reads
        if self.main:
            self.run.go_back(self.images, self._warn)
            self.tracking.go_back(self.images)
        self._tell("rollback", images=self.images, reason=reason, passed_over=self.passed_over)

    def _newest(self) -> Checkpoint | None:
        """The checkpoint to go back to. Raises CheckpointError where processes see others."""
        found = self.run.newest(self._warn)
        images = found.state.images if found else 0
        most, least = self.hosts.most([images, -images])
        if most != -least:
            raise CheckpointError(
                f"{self.run.checkpoints}: a process finds the checkpoint after {most:,} images, "
                f"and another that after {-least:,}; a run lies on a disk that all of them share. "
                "The same command resumes"
            )
        return found

    def _tell(self, kind: str, images: int, **facts: Any) -> None:
        """Says that something happened that whoever comes later should know, and keeps it."""
        shown = ", ".join(f"{key} {_short(value)}" for key, value in facts.items())
        self._warn(f"{kind} at {images:,} images: {shown}")
        self._note(kind, images, **facts)

    def _note(self, kind: str, images: int, **facts: Any) -> None:
        if self.main:
            self.run.note(kind, images, **facts)
            self.tracking.event({"kind": kind, "images": images} | facts)

    def _save(self, stream: dict[str, Any] | None) -> bool:
        """Saves a checkpoint; of a ruined model none: then it goes back, and returns False.

        Nor where most of the steps since the last one were not taken, up to now: it is no model of
        so many images.
        """
        tensors = {
            "model": self.backbone.state_dict(),
            **self.averages.tensors(),
            "optimizer": optimizer_tensors(self.backbone, self.optimizer),
        }
        self.is_lost(at_a_line=True)
        if 2 * self.guard.in_a_row > self.step - self.saved:
            self._go_back(f"{self.guard.in_a_row} steps in a row are of no finite loss")
            return False
        if reason := self.why_ruined(tensors):
            self._go_back(reason)
            return False
        with self.bar.doing("saving"):
            self.saver.save(self._state(stream), tensors, self.parallel.sharded)
            self.hosts.meet()  # here, not within a GPU's next step, which has less patience
        self.saved, self.stream = self.step, stream
        return True

    def _save_snapshot(self) -> bool:
        """Saves the power-function averages; if they are ruined it goes back, and returns False."""
        tensors = self.averages.snapshot()
        if reason := self.why_ruined(tensors):
            self._go_back(reason)
            return False
        with self.bar.doing("saving"):
            self.saver.snapshot(self._state(), tensors, self.parallel.sharded)
            self.hosts.meet()
        return True

    def _state(self, stream: dict[str, Any] | None = None) -> State:
        """Where the run stands; of a stream of images, where that does."""
        return State(
            self.images,
            self.step,
            size_of(self.source),
            self.shape,
            tuple(self.source.classes),
            self.noise_scale.state(),
            self.space.identity,
            stream,
            self.passed_over,
            self.averages.steps(),
            dict(self.averages.begun),
        )

    def why_ruined(self, tensors: dict[str, dict[str, Tensor]]) -> str:
        """Why they must not be saved, or nothing: in all processes, if in one."""
        s = self.config, self.shape, self.device
        for check in (
            lambda: check_tensors(tensors),
            lambda: check_outputs(self._networks(tensors), *s),
        ):
            reason = ""
            try:
                check()
            except NotFiniteError as error:
                reason = str(error)
            # Before the next check, in which a sharded network runs in all processes or in none.
            if self.hosts.any_of(bool(reason)):
                return reason or "its part in another process is not finite"
        return ""

    def _networks(self, tensors: dict[str, dict[str, Tensor]]) -> dict[str, Network]:
        """What gives the outputs of these weights, without a compiled graph of the model's own."""
        names = [name for name in tensors if name != "optimizer"]
        if self.parallel.sharded:
            modules = {"model": self.backbone, **self.averages.modules}
            return {name: modules[name] for name in names}

        def of(name: str) -> Network:
            return lambda x, c_noise, cond: functional_call(
                self.ema, tensors[name], (x, c_noise, cond)
            )

        return {name: of(name) for name in names}

    def _sample_grid(self) -> bool:
        """Makes the grid of the present checkpoint, and returns whether to end the session here.

        That is so after a signal: the next session makes the grid, if no step was done in between.
        """
        if self.hosts.any_of(self._lacks_grid() and not self.signalled):
            self._make_grid()
        asked = self.config.sampling.grid > 0
        return asked and self.interrupts.agreed(0)  # at once, not only every few steps

    def _lacks_grid(self) -> bool:
        """Whether the config asks for a grid that is not there yet, and this process writes it."""
        grid = self.run.grid(self.images)
        return self.main and self.config.sampling.grid > 0 and not grid.exists()

    def _make_grid(self) -> None:
        """The grid of the present EMA, unless a signal ends its sampling. All processes call it.

        One that cannot be made is named, and training goes on.
        """
        path, classes = self.run.grid(self.images), self.shape.num_classes
        try:
            with self.bar.doing("sampling"):
                images, problem = self.sampler()
            if self.main and images is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                save_grid(images, path, columns=classes if 1 < classes <= 16 else None)
                self.tracking.grid(self.images, path)
        except (UserError, OSError) as error:
            problem = str(error)
        if problem:
            self._warn(f"{path}: the grid cannot be made: {problem}")

    def _warn(self, text: str) -> None:
        self._say(f"warning: {text}")

    def _say(self, text: str) -> None:
        if self.main:
            self._print(text)

    def _name_skipped(self, file: Skipped) -> None:
        """Each process names the files that it met; they are events at the next line of metrics."""
        self._print(f"warning: skipped {printable(file.path)}: {file.reason}")

    def _print(self, text: str) -> None:
        say(self.console, text)
