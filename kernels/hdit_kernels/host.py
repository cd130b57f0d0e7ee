"""What a process that trains or samples on a CPU asks of its C library."""

from __future__ import annotations

import ctypes
import platform

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
