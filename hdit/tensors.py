"""Files of tensors, in the safetensors format, and tensors whose values must be finite."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hdit.errors import UserError, WritingError


class NotFiniteError(UserError):
    """Numbers that are nan or infinite: says of what, and what to do."""


def open_tensors(path: Path) -> Any:
    """Opens a safetensors file, whatever its name is. Raises OSError or SafetensorError."""
    try:
        str(path).encode()
        return safe_open(path, "pt")
    except UnicodeEncodeError:  # safetensors takes no name that is not UTF-8
        with path.open("rb") as file:
            return safe_open(f"/proc/self/fd/{file.fileno()}", "pt")


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU. Raises OSError or SafetensorError."""
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Writes tensors as a safetensors file that others may read, as the umask has it.

    Some versions of safetensors write it for the owner alone. Raises WritingError where the disk is
    full.
    """
    try:
        save_file({key: t.contiguous() for key, t in tensors.items()}, path, metadata)
    except SafetensorError as error:
        raise WritingError(errno.EIO, str(error), str(path)) from None
    path.chmod(0o666 & ~_umask())


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite. Reads a tensor of floats once, and makes no copy of it."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.itemsize == 1:  # floats of 8 bits have no order in torch
        tensor = tensor.float()
    low, high = tensor.aminmax()  # nan, where there is one
    return bool(low.isfinite() & high.isfinite())


def check_finite(tensors: Mapping[str, Tensor], where: str, advice: str = "") -> None:
    """Raises NotFiniteError for the first tensor of `where` with a value that is not finite.

    That is in float32, in which networks have their weights.
    """
    for name, tensor in tensors.items():
        if not is_finite(tensor.float() if tensor.dtype == torch.float64 else tensor):
            bad = int((~tensor.float().isfinite()).sum())
            raise NotFiniteError(
                f"{where}: the tensor {name!r} has {bad:,} of {tensor.numel():,} values that are "
                "not finite" + (f"; {advice}" if advice else "")
            )


def save_pickled(value: Any, path: Path) -> None:
    """Writes a value as torch.save does. Raises WritingError where the disk is full."""
    try:
        with path.open("wb") as file:
            torch.save(value, file)
    except RuntimeError as error:  # torch's, which hides the reason in what came before it
        reason = error.__context__
        if not isinstance(reason, OSError):
            raise
        raise WritingError(reason.errno, reason.strerror, str(path)) from None


def _umask() -> int:
    """The umask of this process, from where it can be read without setting it."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.findall(r"^Umask:\s*(\d+)", status, re.MULTILINE)[0], 8)
    except (OSError, IndexError):
        mask = os.umask(0o077)
        os.umask(mask)
        return mask
