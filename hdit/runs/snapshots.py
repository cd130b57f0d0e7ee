"""Snapshots of a run's power-function averages: RUN/snapshots/<images>/, each as a checkpoint is.

They have the sets of those averages alone, and all of them stay: other averages are put together of
them when training is over.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from hdit.interop.layout import expected_buffers
from hdit.runs.checkpoint import (
    Checkpoint,
    CheckpointError,
    DamagedCheckpoint,
    checkpoint_folders,
    folder_name,
    open_checkpoint,
    remove,
)

Say = Callable[[str], None]


def trim(root: Path, images: int, warn: Say) -> None:
    """Deletes the snapshots after so many images, which the run comes to again, and tells of them.

    What a killed run has left half-written goes as well.
    """
    for part in root.glob(".*.part"):
        shutil.rmtree(part) if part.is_dir() else part.unlink()
    later = [folder for folder in checkpoint_folders(root) if int(folder.name) > images]
    for folder in later:
        remove(folder)
    if later:
        warn(f"{root}: deleted {len(later)} later than {images:,} images, which are made anew")


def open_snapshots(run: Path, at: int | None, warn: Say) -> list[Checkpoint]:
    """The snapshots of a run up to `at` images, or all: oldest first, each proved whole.

    A damaged one is told to `warn` and left out. Raises CheckpointError where there are none, none
    is whole, or there is none at that time.
    """
    if not run.is_dir():
        raise CheckpointError(f"{run}: no such run; `hdit train` makes runs")
    root = run / "snapshots"
    folders = checkpoint_folders(root)[::-1]
    if not folders:
        raise CheckpointError(
            f"{run}: has no snapshots of averages; a run writes them with "
            "training.ema.widths = [0.05, 0.1]"
        )
    if at is not None and folder_name(at) not in [folder.name for folder in folders]:
        times = [int(folder.name) for folder in folders]
        nearest = min(times, key=lambda n: abs(n - at))
        raise CheckpointError(
            f"--at: {root} has none at {at:,} images; the nearest of its {len(times)} is at "
            f"{nearest}, the last at {times[-1]}"
        )
    found = []
    for folder in folders:
        if at is not None and int(folder.name) > at:
            break
        try:
            found.append(open_checkpoint(folder))
        except DamagedCheckpoint as error:
            if int(folder.name) == at:
                raise
            warn(f"{error}; the snapshot is left out")
    if not found:
        raise CheckpointError(f"{root}: no snapshot is whole; nothing can be made of them")
    return found


def combine(
    parts: Iterable[tuple[Checkpoint, str, float]], on_set: Callable[[], None] = lambda: None
) -> dict[str, Tensor]:
    """The sum of weight times set over (snapshot, set, weight), added up in float64.

    One set is read at a time, and `on_set` called after it, so that there is memory for no more
    than the sum. Buffers, which no training moves, are those of the last one.
    Raises NotFiniteError and CheckpointError as `Checkpoint.tensors`.
    """
    total: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    buffers: set[str] | None = None
    for snapshot, name, weight in parts:
        if buffers is None:
            buffers = expected_buffers(snapshot.config, snapshot.state.shape)
        for key, tensor in snapshot.each(name):
            dtypes[key] = tensor.dtype
            if key in buffers:
                total[key] = tensor
            elif key in total:
                total[key].add_(tensor.double(), alpha=weight)
            else:
                total[key] = weight * tensor.double()
        on_set()
    for key, tensor in total.items():  # one after the other, or both would be in memory
        total[key] = tensor.to(dtypes[key])
    return total
