"""Files of tensors, in the safetensors format."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Writes tensors as a safetensors file that others may read, as the umask has it.

    Some versions of safetensors write it for the owner alone. Raises OSError with the path where
    the disk is full.
    """
    try:
        save_file({key: t.contiguous() for key, t in tensors.items()}, path, metadata)
    except SafetensorError as error:
        raise OSError(errno.EIO, f"cannot be written: {error}", str(path)) from None
    path.chmod(0o666 & ~_umask())


def _umask() -> int:
    """The umask of this process, from where it can be read without setting it."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.findall(r"^Umask:\s*(\d+)", status, re.MULTILINE)[0], 8)
    except (OSError, IndexError):
        mask = os.umask(0o077)
        os.umask(mask)
        return mask
