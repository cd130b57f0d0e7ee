"""Probes of the machine: processor, CUDA, compilers, torch.compile, optional packages."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from hdit.device import cpu_bf16, cpuinfo
from hdit.doctor.facts import CPU, CUDA, Compilation, Compiler, CUDADevice, Kernels, Package
from hdit.doctor.trying import error_line, first_line, without_warnings
from hdit_kernels import native

MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
COMPILING = 300  # seconds that torch.compile may take
TRITONS = ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-windows")

PACKAGES = {
    "natten": ("NATTEN's CUDA kernels", "pip install --no-build-isolation natten"),
    "triton": ("CUDA: fused kernels, torch.compile", "pip install triton"),
    "timm": ("FDD, KDD and CMMD", 'pip install "hdit[metrics]"'),
    "diffusers": ("latents of VAEs", 'pip install "hdit[latent]"'),
    "datasets": ("images of Hugging Face", 'pip install "hdit[data]"'),
    "matplotlib": ("plots", 'pip install "hdit[plots]"'),
    "tensorboard": ("a tracker of runs", "pip install tensorboard"),
    "wandb": ("a tracker of runs", "pip install wandb"),
    "trackio": ("a tracker of runs", "pip install trackio"),
}
"""What each optional package is for, and how to install it."""

COMPILE = """
import sys, time, torch

def double(x):
    return x.sin() * (2 if torch.compiler.is_compiling() else 1)

x = torch.ones(8, 8, device=sys.argv[1])
started = time.perf_counter()
try:
    right = torch.allclose(torch.compile(double)(x), 2 * x.sin())
except Exception as error:
    print(f"{type(error).__name__}: {error}")
    sys.exit(1)
print(time.perf_counter() - started if right else "switched off: the function ran uncompiled")
sys.exit(not right)
"""
"""Compiles for a device. In a process of its own, with an empty cache: what an earlier run compiled
would hide that the compiler is gone, and a crash is no crash of the doctor."""


def torch_build() -> str:
    """What torch was built for: "CPU", "CUDA 13.0", "ROCm 6.2"."""
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"


def find_cpu() -> CPU:
    """The processor that this process runs on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return CPU(
        name=cpuinfo().get("model name") or platform.processor() or platform.machine(),
        capability=torch.backends.cpu.get_cpu_capability(),
        cores=len(affinity(0)) if affinity else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        bf16=cpu_bf16(),
        memory_bytes=memory_bytes(),
    )


def memory_bytes() -> int | None:
    """Memory of the machine, or of the container where that is less; None if nobody tells."""
    try:
        sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None
    for name in MEMORY_LIMITS:
        try:
            sizes.append(int(Path(name).read_text()))
        except (OSError, ValueError):  # no such limit, or "max"
            continue
    return min(sizes)


def find_cuda() -> CUDA:
    """The CUDA devices that torch sees, or why it sees none."""
    with without_warnings() as said:
        available = torch.cuda.is_available()
    if not available:
        return CUDA([], why_no_cuda([str(warning.message) for warning in said]))
    found = []
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        capability = f"{facts.major}.{facts.minor}"
        found.append(CUDADevice(f"cuda:{i}", facts.name, capability, facts.total_memory))
    return CUDA(found, None)


def why_no_cuda(warned: list[str]) -> str:
    """The reason why torch has no CUDA device; `warned` is what it said when it was asked."""
    if not torch.version.cuda and not torch.version.hip:
        reason = "torch is built for the CPU alone"
        if shutil.which("nvidia-smi"):
            reason += "; for the GPU here install torch for CUDA (pytorch.org/get-started/locally)"
        return reason
    if warned:  # such as a driver that is too old
        return first_line(warned[0])
    try:
        torch.cuda.init()
    except Exception as error:
        return error_line(error)
    return "torch finds no device"


def find_compiler() -> Compiler:
    """The C++ compiler that the kernels are built with."""
    try:
        path = native.compiler()
        done = subprocess.run([path, "--version"], capture_output=True, text=True)
    except (native.NativeError, OSError) as error:
        return Compiler(None, None, str(error))
    lines = (done.stdout or done.stderr).splitlines()
    return Compiler(path, lines[0].strip() if lines else None, None)


def find_kernels() -> Kernels:
    """The C++ kernels, compiled now if they were not before."""
    found = native.library()
    capability = native.cpu_capability()
    if isinstance(found, native.NativeError):
        return Kernels(None, capability, str(found))
    return Kernels(str(found.path), capability, None)


def try_compile(device: torch.device) -> Compilation:
    """Compiles COMPILE for a device, in a process of its own."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache}
        command = [sys.executable, "-c", COMPILE, str(device)]
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=COMPILING
            )
        except subprocess.TimeoutExpired:
            return Compilation(str(device), None, f"it did not end within {COMPILING} s")
    if done.returncode == 0:
        return Compilation(str(device), float(done.stdout.split()[-1]), None)
    told = done.stdout.strip() or (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    return Compilation(str(device), None, f"fails ({done.returncode}): {first_line(told)}")


def package_version(package: str) -> str | None:
    """The version of an installed package, by any name that it goes by; None without it."""
    for name in TRITONS if package == "triton" else (package,):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def packages() -> list[Package]:
    """The optional packages, installed or not."""
    return [Package(name, package_version(name), *PACKAGES[name]) for name in PACKAGES]
