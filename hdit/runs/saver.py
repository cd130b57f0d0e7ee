"""Writes the checkpoints of a run one after the other, while training goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from hdit.config import RunConfig
from hdit.config.schema import KeepSpec, TrainingSpec
from hdit.errors import UserError
from hdit.runs import checkpoint, sharded
from hdit.runs.checkpoint import CheckpointError, State, remove
from hdit.runs.folder import RunFolder

Tensors = Mapping[str, dict[str, Tensor]]


class _Target(NamedTuple):
    """Where a folder of tensors goes, whether a file names the newest, and what follows it."""

    root: Path
    latest: bool
    done: Callable[[Path], None]


class Saver:
    """The main process writes whole tensors; of sharded ones each process writes its parts."""

    def __init__(
        self,
        run: RunFolder,
        config: RunConfig,
        main: bool,
        group: dist.ProcessGroup | None,
        say: Callable[[str], None],
    ):
        """`group` is one of the CPUs of all processes, for nothing else, if tensors are sharded."""
        self.run, self.config, self.main, self.group, self.say = run, config, main, group, say
        self.threads = ThreadPoolExecutor(1, "saver")
        self.running: Future[Any] | None = None

    def save(self, state: State, tensors: Tensors, is_sharded: bool) -> None:
        """Copies the tensors, and writes them while the caller goes on, if the settings have it so.

        Every process calls it. Raises what went wrong with the checkpoint before it.
        """
        self._begin(_Target(self.run.checkpoints, True, self._done), state, tensors, is_sharded)

    def snapshot(self, state: State, tensors: Tensors, is_sharded: bool) -> None:
        """The same of power-function averages, which stay as long as the run does."""
        target = _Target(self.run.snapshots, False, lambda saved: None)
        self._begin(target, state, tensors, is_sharded)

    def _begin(self, target: _Target, state: State, tensors: Tensors, is_sharded: bool) -> None:
        self.finish()
        background = self.config.training.background_saves
        if is_sharded:
            self.running = self._start_shards(target, state, tensors)
        elif self.main and background:
            copies = {
                name: {key: t.detach().to("cpu", copy=True) for key, t in part.items()}
                for name, part in tensors.items()
            }
            self.running = self.threads.submit(self._write, target, state, copies)
        elif self.main:
            self._write(target, state, tensors)
        if not background:
            self.finish()

    def check(self) -> None:
        """Raises what went wrong with a checkpoint, if it is known already."""
        if self.running is not None and self.running.done():
            self.finish()

    def finish(self) -> None:
        """Waits for the checkpoint that is being written. Raises what went wrong with it."""
        running, self.running = self.running, None
        if running is None:
            return
        try:
            running.result()
        except CheckpointException as error:
            rank, (reason, _) = next(iter(error.failures.items()))
            raise CheckpointError(
                f"{self.run.path}: a checkpoint or snapshot could not be written, in process "
                f"{rank}: {reason}"
            ) from None
        finally:
            for root in (self.run.checkpoints, self.run.snapshots) if self.main else ():
                for part in root.glob(".*.shards.part"):
                    shutil.rmtree(part, ignore_errors=True)

    close = finish

    def _write(self, target: _Target, state: State, tensors: Tensors) -> None:
        root, latest, done = target
        done(checkpoint.save(root, self.config, state, tensors, latest=latest))

    def _start_shards(self, target: _Target, state: State, tensors: Tensors) -> Future[Any]:
        assert self.group is not None, "sharded tensors lie in several processes"
        root, latest, done = target
        parts = root / f".{checkpoint.folder_name(state.images)}.shards.part"
        if self.main:
            shutil.rmtree(parts, ignore_errors=True)  # of a killed run
        dist.barrier(self.group)

        def publish(names: list[str]) -> None:
            def move(folder: Path) -> None:
                for name in names:
                    _move(parts / name, folder / name)

            done(checkpoint.publish(root, self.config, state, move, latest=latest))

        return sharded.write(tensors, parts, self.group, publish)

    def _done(self, saved: Path) -> None:
        images = int(saved.name)
        self.run.note_saved(images)
        self.say(f"{images:,} images: {saved}")
        for folder in dispensable(
            [int(p.name) for p in checkpoint.checkpoint_folders(saved.parent)],
            self.config.training.keep,
            self.run.validation_losses(),
        ):
            remove(saved.parent / checkpoint.folder_name(folder))
        self.run.name_best()


def _move(shard: Path, to: Path) -> None:
    """Raises CheckpointError where a shard does not lie where the process that wrote it put it."""
    try:
        shard.rename(to)
    except FileNotFoundError:
        raise CheckpointError(
            f"{shard.name} of another process is not there; a run lies on a disk that all "
            "processes share"
        ) from None


COPIES = 3
"""Of the weights in a checkpoint, beside its averages: model, and two moments of the optimizer."""


def need(parameters: int, training: TrainingSpec, images: int) -> tuple[int, int]:
    """Bytes of one checkpoint, and of all that a run will have kept, from so many images on.

    The snapshots of averages, which all stay, are part of the latter.
    """
    each = 4 * (COPIES + training.ema.number) * parameters
    left = max(training.images - images, 0)
    number = -(-left // training.checkpoint_every)
    if training.keep.last is not None:
        kept = training.keep.last + (left // training.keep.every if training.keep.every else 0)
        kept += training.keep.best or 0
        number = min(number, kept) + 1  # one is written before another goes
    return each, number * each + 4 * len(training.ema.widths) * parameters * _snapshots(
        training, left
    )


def _snapshots(training: TrainingSpec, left: int) -> int:
    """How many times a run of so many images more writes snapshots."""
    every = training.ema.snapshot_every
    return 0 if every is None else -(-left // every)


def disk_need(folder: Path, parameters: int, training: TrainingSpec, images: int) -> str:
    """What its checkpoints will take, in words, and how much is free where the run lies.

    Raises UserError where not even one fits.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    each, total = need(parameters, training, images)
    free = shutil.disk_usage(there).free
    if each > free:
        raise UserError(
            f"--run: a checkpoint takes {size_text(each)}, and the disk of {folder} has "
            f"{size_text(free)} left; make room, or name a folder elsewhere"
        )
    snapshots = " and snapshots of averages" if training.ema.widths else ""
    text = f"checkpoints of {size_text(each)}{snapshots}, {size_text(total)} in all"
    text += f"; {size_text(free)} are free"
    if total <= free:
        return text
    advice = " or a larger training.ema.snapshot_every" if snapshots else ""
    return f"warning: {text}; set training.keep = {{ last = 3 }}{advice}"


def size_text(number: int) -> str:
    """Bytes in words."""
    return f"{gib_text(number)} GiB" if number >= 2**30 else f"{number / 2**20:.3g} MiB"


def gib_text(number: int) -> str:
    """GiB to three digits, and never with an exponent where there are many."""
    gib = number / 2**30
    return f"{gib:,.0f}" if gib >= 999.5 else f"{gib:.3g}"


def dispensable(images: list[int], keep: KeepSpec, losses: Mapping[int, float]) -> list[int]:
    """Which of the checkpoints after so many images need not stay.

    Of those between two multiples of `keep.every`, the first one stays. Of those with validation
    `losses`, by their images, the `keep.best` lowest stay; of equal ones the first.
    """
    if keep.last is None:
        return []
    ascending = sorted(images)
    kept = set(ascending[-keep.last :])
    if keep.every is not None:
        firsts: dict[int, int] = {}
        for n in ascending:
            firsts.setdefault(n // keep.every, n)
        kept |= {n for period, n in firsts.items() if period > 0}
    validated = sorted((n for n in ascending if n in losses), key=lambda n: losses[n])
    kept |= set(validated[: keep.best or 0])
    return [n for n in ascending if n not in kept]
