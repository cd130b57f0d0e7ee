"""Checkpoints of models that are sharded over processes: each writes its own parts.

torch.distributed.checkpoint writes safetensors files, in which a tensor is named SET/NAME, as in
ema/out.weight. Any number of processes reads them, one that has no process group included.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)

FOLDER = "shards"


class _Writer(HuggingFaceStorageWriter):
    """Calls `publish` in the first process when all processes have written their parts."""

    def __init__(self, folder: Path, publish: Callable[[], None]):
        super().__init__(str(folder), save_distributed=True)
        self.publish = publish

    def finish(self, metadata: Any, results: Any) -> None:
        self.publish()


def write(
    tensors: Mapping[str, dict[str, Tensor]],
    folder: Path,
    group: dist.ProcessGroup,
    publish: Callable[[], None],
) -> Future[Any]:
    """Copies the tensors, and writes them to folder/shards while the caller goes on.

    Every process of `group` calls it. `publish` is called in the first one once all is on the disk,
    in another thread. The future ends after that, with what went wrong in any process.
    """
    flat = {f"{name}/{key}": t for name, part in tensors.items() for key, t in part.items()}
    writer = _Writer(folder / FOLDER, publish)
    future: Any = dcp.async_save(flat, storage_writer=writer, process_group=group)
    return future


def read(folder: Path, name: str) -> dict[str, Tensor]:
    """The whole tensors of a set ("model", "ema" or "optimizer"), on the CPU, in one process."""
    reader = HuggingFaceStorageReader(str(folder / FOLDER))
    targets = {
        key: torch.empty(found.size, dtype=found.properties.dtype)
        for key, found in reader.read_metadata().state_dict_metadata.items()
        if key.startswith(f"{name}/")
    }
    _fill(targets, reader)
    return {key.partition("/")[2]: tensor for key, tensor in targets.items()}


def read_into(folder: Path, name: str, targets: Mapping[str, Tensor]) -> None:
    """Fills tensors, sharded or not, of which each process reads no more than its parts."""
    reader = HuggingFaceStorageReader(str(folder / FOLDER))
    _fill({f"{name}/{key}": tensor for key, tensor in targets.items()}, reader)


def _fill(targets: dict[str, Any], reader: HuggingFaceStorageReader) -> None:
    with warnings.catch_warnings():
        # It is meant to be read without the others: what is read follows from the files alone.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        dcp.load(targets, storage_reader=reader, no_dist=True)
