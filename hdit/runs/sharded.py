"""Tensors that are sharded over processes, in files: each process writes its own parts.

torch.distributed.checkpoint writes safetensors files, in which a tensor is named SET/NAME, as in
ema/out.weight. Any number of processes reads them, one that has no process group included.
"""

from __future__ import annotations

import logging
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
from torch.distributed.tensor import DTensor, distribute_tensor

from hdit.errors import UserError

# It tells of each file that it reads and writes.
logging.getLogger("torch.distributed.checkpoint").setLevel(logging.WARNING)

PATTERN = "shard-*.safetensors"


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this process has; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: Tensor, target: Tensor) -> Tensor:
    """A whole tensor on the target's device, and sharded as that is."""
    tensor = tensor.to(target.device)
    if not isinstance(target, DTensor):
        return tensor
    # Every process has the whole one, so that none need be sent.
    return distribute_tensor(tensor, target.device_mesh, target.placements, src_data_rank=None)


# ---- writing -------------------------------------------------------------------------------------


class _Writer(HuggingFaceStorageWriter):
    """Calls `publish` in the first process when all processes have written their parts."""

    def __init__(self, folder: Path, publish: Callable[[list[str]], None]):
        super().__init__(str(folder), save_distributed=True)
        self.publish = publish

    def finish(self, metadata: Any, results: Any) -> None:
        self.publish(sorted({r.storage_data.relative_path for rank in results for r in rank}))


def write(
    tensors: Mapping[str, dict[str, Tensor]],
    folder: Path,
    group: dist.ProcessGroup,
    publish: Callable[[list[str]], None],
) -> Future[Any]:
    """Copies the tensors, and writes them into `folder` while the caller goes on.

    Every process of `group` calls it. `publish` is called in the first one once all is on the disk,
    in another thread, with the names of the files that all processes wrote. The future ends after
    that, with what went wrong in any process.
    """
    flat = {f"{name}/{key}": t for name, part in tensors.items() for key, t in part.items()}
    writer = _Writer(folder, publish)
    future: Any = dcp.async_save(flat, storage_writer=writer, process_group=group)
    return future


# ---- reading -------------------------------------------------------------------------------------


def is_sharded(folder: Path) -> bool:
    """Whether a checkpoint's tensors lie in shards."""
    return any(folder.glob(PATTERN))


def sets(folder: Path) -> set[str]:
    """The names of the sets in a folder."""
    return {key.partition("/")[0] for key in _reader(folder).read_metadata().state_dict_metadata}


def shapes(folder: Path, name: str) -> dict[str, torch.Size]:
    """The shapes of the whole tensors of a set ("model", "ema", "optimizer" and the like)."""
    return {key: found.size for key, found in _stored(_reader(folder), name).items()}


def read(folder: Path, name: str) -> dict[str, Tensor]:
    """The whole tensors of a set, on the CPU, in one process."""
    reader = _reader(folder)
    targets = {
        key: torch.empty(found.size, dtype=found.properties.dtype)
        for key, found in _stored(reader, name).items()
    }
    _fill(reader, name, targets)
    return targets


def read_into(folder: Path, name: str, targets: Mapping[str, Tensor]) -> None:
    """Fills tensors, sharded or not, of which each process reads no more than its parts."""
    _fill(_reader(folder), name, targets)


def _reader(folder: Path) -> HuggingFaceStorageReader:
    return HuggingFaceStorageReader(str(folder))


def _stored(reader: HuggingFaceStorageReader, name: str) -> dict[str, Any]:
    """What is known of each tensor of a set. Raises FileNotFoundError where there are none."""
    found: dict[str, Any] = {
        key.removeprefix(f"{name}/"): tensor
        for key, tensor in reader.read_metadata().state_dict_metadata.items()
        if key.startswith(f"{name}/")
    }
    if not found:
        raise FileNotFoundError(name)
    for key, tensor in found.items():
        # What no shard holds would be left as it is where it is read into.
        if sum(chunk.sizes.numel() for chunk in tensor.chunks) != tensor.size.numel():
            raise UserError(f"{reader.path}: a shard is missing, with a part of {name}/{key}")
    return found


def _fill(reader: HuggingFaceStorageReader, name: str, targets: Mapping[str, Tensor]) -> None:
    flat: dict[str, Any] = {f"{name}/{key}": tensor.detach() for key, tensor in targets.items()}
    with warnings.catch_warnings():
        # It is meant to be read without the others: what to read follows from the files alone.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        dcp.load(flat, storage_reader=reader, no_dist=True)
