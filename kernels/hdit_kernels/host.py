"""The memory of a process that trains or samples: how it is kept, and how much of it was used."""

from __future__ import annotations

import ctypes
import platform
import re
import sys
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")  # Linux

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # as in glibc's malloc.h


def keep_freed_memory() -> bool:
    """Lets the C library keep large blocks that are freed, for the tensors of the next step.

    By default glibc returns them to the system at once, and the system clears each page again at
    its next use. For the whole process, and meant for one that is ours: the command line calls it.
    Returns whether it took effect; elsewhere than with glibc nothing is done.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    done = [
        mallopt(M_MMAP_MAX, 0),  # no block is a mapping of its own
        mallopt(M_TRIM_THRESHOLD, -1),  # never
        mallopt(M_TOP_PAD, 64 << 20),
    ]
    return all(done)


def memory_in_use(device: torch.device) -> int:
    """Bytes now: of a GPU's tensors, or of the process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if size := _status("VmRSS"):
        return size
    import psutil  # which accelerate brings

    return psutil.Process().memory_info().rss


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak so far: of a GPU's tensors, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if size := _status("VmHWM"):  # what getrusage says begins with the peak of the parent
        return size
    import resource

    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def forget_peak_memory(device: torch.device) -> bool:
    """Lets the peak begin at what is held now. Returns whether it did: of a process Linux can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        STATUS.with_name("clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(key: str) -> int | None:
    """Bytes, of a line of /proc/self/status, where there is one."""
    text = STATUS.read_text() if STATUS.exists() else ""
    found = re.search(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None
