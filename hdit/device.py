"""Devices: which one is taken, what it multiplies in hardware, and the memory that is used."""

from __future__ import annotations

import ctypes
import platform
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from hdit.errors import UserError

Precision = Literal["fp32", "tf32", "bf16"]
"""fp32 is float32 throughout; tf32 rounds what float32 products multiply to 10 bits, on CUDA; bf16
is autocast."""
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

CPUINFO = Path("/proc/cpuinfo")  # Linux
X86_BF16 = ("amx_bf16", "avx512_bf16")  # as Linux and torch name them
BF16_FLAGS = (*X86_BF16, "bf16")  # the last is what Linux calls it on Arm


def default_device() -> torch.device:
    """Device on which models are trained and sampled: CUDA if it is there, else the CPU.

    Apple's MPS is never taken: it lacks the float64 that noise levels are computed in. Intel's XPU
    is not either, as nothing was tried on it.
    """
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cpuinfo() -> dict[str, str]:
    """What Linux tells of the last of the CPU's cores, by its names; nothing on other systems."""
    try:
        return dict(re.findall(r"^(.+?)\s*:\s*(.*)$", CPUINFO.read_text(), re.MULTILINE))
    except OSError:
        return {}


def cpu_bf16() -> list[str] | None:
    """The instructions of this CPU that multiply bfloat16, of BF16_FLAGS; None if nobody tells.

    On other systems torch is asked, where it is new enough to answer, and of x86-64 alone: whether
    it multiplies by Arm's instruction there is untested.
    """
    told = cpuinfo()
    if flags := told.get("flags") or told.get("Features"):
        return [name for name in BF16_FLAGS if name in flags.split()]
    ask = getattr(torch.cpu, "get_capabilities", None)
    capabilities = ask() if ask else {}
    if X86_BF16[0] not in capabilities:
        return None
    return [name for name in X86_BF16 if capabilities[name]]


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware, rather than emulates it.

    A CUDA device does from compute capability 8.0 on, and any that ROCm drives. A CPU does that has
    AMX, AVX512-BF16, or Arm's bf16. Of other devices, MPS among them, nothing was tried: False.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(cpu_bf16())


def auto_precision(device: torch.device) -> Literal["fp32", "bf16"]:
    """What the precision "auto" becomes on a device: bf16 if it multiplies that in hardware."""
    return "bf16" if multiplies_bf16(device) else "fp32"


def multiplies_tf32(device: torch.device) -> bool:
    """Whether the device multiplies TF32: CUDA devices do, from compute capability 8.0 on."""
    if device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def precision_on(
    device: torch.device,
    asked: str,
    key: str = "precision",
    warn: Callable[[str], None] = lambda text: None,
) -> Precision:
    """What `asked`, a Precision or "auto", comes to on a device; messages name `key`.

    Raises UserError for tf32 where the hardware lacks it. bf16 where it is emulated is a warning.
    """
    if asked == "auto":
        return auto_precision(device)
    if asked == "tf32":
        if not multiplies_tf32(device):
            raise UserError(
                f"{key}: 'tf32' needs a CUDA device of compute capability 8.0 or more, and this "
                f"runs on {device.type!r}; set it to 'fp32'"
            )
        return "tf32"
    if asked == "bf16":
        if not multiplies_bf16(device):
            warn(
                f"{key}: 'bf16' is emulated on this {device.type} device, which takes several "
                "times as long as fp32; set it to 'fp32'"
            )
        return "bf16"
    assert asked == "fp32", f"no precision: {asked!r}"
    return "fp32"


def autocast_dtype(precision: Precision) -> torch.dtype | None:
    """What the network's call is autocast to, or None."""
    return torch.bfloat16 if precision == "bf16" else None


@contextmanager
def float32_products(precision: Precision) -> Iterator[None]:
    """While it lasts, float32 matrix products and convolutions round to TF32 only with tf32.

    torch by itself lets convolutions round on CUDA. The settings are those of the whole process.
    """
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A CPU's tensor on the device; to CUDA by pinned memory, so that the host does not wait."""
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


# ---- memory --------------------------------------------------------------------------------------

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


CGROUP_LIMITS = (  # of a container: version 2 and 1
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def total_memory(device: torch.device) -> int:
    """Bytes that there are: of a GPU, or of the machine or the container that this runs in."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import psutil  # which accelerate brings

    limits = [psutil.virtual_memory().total + psutil.swap_memory().total]
    for path in CGROUP_LIMITS:
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        limits += [int(text)] if text.isdecimal() else []  # "max" where there is none
    return min(limits)


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
