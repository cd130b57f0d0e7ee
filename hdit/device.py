"""What a device multiplies in hardware, and so which precision "auto" takes on it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import torch

CPUINFO = Path("/proc/cpuinfo")  # Linux
X86_BF16 = ("amx_bf16", "avx512_bf16")  # as Linux and torch name them
BF16_FLAGS = (*X86_BF16, "bf16")  # the last is what Linux calls it on Arm


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
