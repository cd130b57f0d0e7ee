"""What the doctor finds out, as plain data for JSON and tables."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CPU:
    """The processor, its vector instructions and its memory."""

    name: str
    capability: str  # the vector instructions that torch uses
    cores: int  # that this process may run on
    threads: int  # that torch takes
    bf16: list[str] | None  # instructions for bfloat16; None where nobody tells
    memory_bytes: int | None


@dataclass(frozen=True)
class CUDADevice:
    """One CUDA device; `capability` is "major.minor"."""

    device: str
    name: str
    capability: str
    memory_bytes: int


@dataclass(frozen=True)
class CUDA:
    """The CUDA devices, or why there is none."""

    devices: list[CUDADevice]
    problem: str | None  # why there is none


@dataclass(frozen=True)
class PrecisionTrial:
    """Whether products in a precision come out right on a device, forward and backward."""

    device: str
    dtype: str
    trains: bool
    auto: bool  # whether training.precision = "auto" takes it
    note: str | None  # why not, or how well


@dataclass(frozen=True)
class Compiler:
    """The C++ compiler, or why none is found."""

    path: str | None
    version: str | None
    problem: str | None


@dataclass(frozen=True)
class Kernels:
    """The compiled C++ kernels and the instructions they are for, or why there are none."""

    path: str | None
    capability: str
    problem: str | None


@dataclass(frozen=True)
class Compilation:
    """How long `torch.compile` takes for a small function, or why it fails."""

    device: str
    seconds: float | None
    problem: str | None


@dataclass(frozen=True)
class AttentionBackend:
    """One backend: its times in milliseconds, or why it does not work.

    A problem is None where it works; a time is None where it does not, or was not taken.
    `auto` lists the uses that "auto" takes it for: "training", "sampling".
    """

    backend: str
    needs: str
    auto: list[str]
    forward_ms: float | None
    forward_backward_ms: float | None
    problem: str | None
    training_problem: str | None


@dataclass(frozen=True)
class Attention:
    """Every backend of neighborhood attention on one device, on one problem."""

    device: str
    shape: list[int]  # (b h w n e)
    kernel_size: int
    dtype: str
    backends: list[AttentionBackend]


@dataclass(frozen=True)
class Package:
    """An optional package: its version if it is installed, what it is for, how to install it."""

    name: str
    version: str | None
    purpose: str
    install: str


@dataclass(frozen=True)
class Diagnosis:
    """All that `examine` found; `broken` lists what training cannot do without."""

    hdit: str
    python: str
    torch: str
    torch_build: str
    platform: str
    fast: bool
    cpu: CPU
    cuda: CUDA
    mps: bool
    precisions: list[PrecisionTrial]
    compiler: Compiler
    kernels: Kernels
    torch_compile: list[Compilation]
    attention: list[Attention]
    packages: list[Package]
    broken: list[str]
