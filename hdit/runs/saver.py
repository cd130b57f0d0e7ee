"""Writes the checkpoints of a run one after the other, while training goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from hdit.config import RunConfig
from hdit.config.schema import KeepSpec, TrainingSpec
from hdit.errors import UserError
from hdit.runs import checkpoint, sharded
from hdit.runs.checkpoint import CheckpointError, State
from hdit.runs.folder import RunFolder

Tensors = Mapping[str, dict[str, Tensor]]


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
        self.finish()
        background = self.config.training.background_saves
        if is_sharded:
            self.running = self._start_shards(state, tensors)
        elif self.main and background:
            copies = {
                name: {key: t.detach().to("cpu", copy=True) for key, t in part.items()}
                for name, part in tensors.items()
            }
            self.running = self.threads.submit(self._write, state, copies)
        elif self.main:
            self._write(state, tensors)
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
                f"{self.run.checkpoints}: a checkpoint could not be written, in process {rank}: "
                f"{reason}"
            ) from None
        finally:
            if self.main and self.run.checkpoints.is_dir():
                for part in self.run.checkpoints.glob(".*.shards.part"):
                    shutil.rmtree(part, ignore_errors=True)

    close = finish

    def _write(self, state: State, tensors: Tensors) -> None:
        self._done(checkpoint.save(self.run.checkpoints, self.config, state, tensors))

    def _start_shards(self, state: State, tensors: Tensors) -> Future[Any]:
        assert self.group is not None, "sharded tensors lie in several processes"
        root = self.run.checkpoints
        parts = root / f".{checkpoint.folder_name(state.images)}.shards.part"
        if self.main:
            shutil.rmtree(parts, ignore_errors=True)  # of a killed run
        dist.barrier(self.group)

        def publish(names: list[str]) -> None:
            def move(folder: Path) -> None:
                for name in names:
                    _move(parts / name, folder / name)

            self._done(checkpoint.publish(root, self.config, state, move))

        return sharded.write(tensors, parts, self.group, publish)

    def _done(self, saved: Path) -> None:
        images = int(saved.name)
        self.run.note_saved(images)
        self.say(f"{images:,} images: {saved}")
        for folder in dispensable(
            [int(p.name) for p in checkpoint.checkpoint_folders(saved.parent)],
            self.config.training.keep,
        ):
            remove(saved.parent / checkpoint.folder_name(folder))


def _move(shard: Path, to: Path) -> None:
    """Raises CheckpointError where a shard does not lie where the process that wrote it put it."""
    try:
        shard.rename(to)
    except FileNotFoundError:
        raise CheckpointError(
            f"{shard.name} of another process is not there; a run lies on a disk that all "
            "processes share"
        ) from None


COPIES = 4
"""Of the weights in a checkpoint: model, EMA, and the two moments of the optimizer."""


def need(parameters: int, training: TrainingSpec, images: int) -> tuple[int, int]:
    """Bytes of one checkpoint, and of all that a run will have kept, from so many images on."""
    each = 4 * COPIES * parameters
    left = max(training.images - images, 0)
    number = -(-left // training.checkpoint_every)
    if training.keep.last is not None:
        kept = training.keep.last + (left // training.keep.every if training.keep.every else 0)
        number = min(number, kept) + 1  # one is written before another goes
    return each, number * each


def disk_need(folder: Path, parameters: int, training: TrainingSpec, images: int) -> str:
    """What its checkpoints will take, in words, and how much is free where the run lies.

    Raises UserError where not even one fits.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    each, total = need(parameters, training, images)
    free = shutil.disk_usage(there).free
    if each > free:
        raise UserError(
            f"--run: a checkpoint takes {_size(each)}, and the disk of {folder} has {_size(free)} "
            "left; make room, or name a folder elsewhere"
        )
    text = f"checkpoints of {_size(each)}, {_size(total)} in all; {_size(free)} are free"
    return text if total <= free else f"warning: {text}; set training.keep = {{ last = 3 }}"


def _size(number: int) -> str:
    return f"{number / 2**30:.3g} GiB" if number >= 2**30 else f"{number / 2**20:.3g} MiB"


def dispensable(images: list[int], keep: KeepSpec) -> list[int]:
    """Which of the checkpoints after so many images need not stay.

    Of those between two multiples of `keep.every`, the first one stays.
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
    return [n for n in ascending if n not in kept]


def remove(folder: Path) -> None:
    """Deletes a checkpoint: under its name it is whole, or not there at all."""
    hidden = folder.with_name(f".{folder.name}.removed.part")
    with suppress(FileNotFoundError):
        folder.rename(hidden)
        shutil.rmtree(hidden)
