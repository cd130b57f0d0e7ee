"""Whether this machine can run the framework well: facts that are tried, not guessed, then tables.

`examine` collects, `tables` lays out; neither prints. A part that fails gives its reason and ends
nothing: only what training cannot do without is `broken`.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import get_args

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

import hdit
from hdit.config.schema import TrainingSpec
from hdit.device import auto_precision, cpu_bf16, cpuinfo, multiplies_bf16
from hdit_kernels import BACKENDS, native, neighborhood_attention, select_backend
from hdit_kernels.neighborhood import Problem

MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
RUNS = 5  # whose median is a time
LONGEST = 1.0  # second, after which no further run begins
LONGEST_LINE = 300  # characters of a reason; a compiler may say anything
COMPILING = 300  # seconds that torch.compile may take
NEEDS = {"cpu": "compiler", "natten": "natten", "triton": "triton"}  # the others need torch alone
TRITONS = ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-windows")

PACKAGES = {
    "natten": ("NATTEN's CUDA kernels", "pip install --no-build-isolation natten"),
    "triton": ("CUDA: fused kernels, torch.compile", "pip install triton"),
    "clean-fid": ("FID", 'pip install "hdit[fid]"'),
    "diffusers": ("latents of VAEs", 'pip install "hdit[latent]"'),
    "datasets": ("images of Hugging Face", 'pip install "hdit[data]"'),
    "webdataset": ("images in tar shards", 'pip install "hdit[data]"'),
    "tensorboard": ("curves of a training run", 'pip install "hdit[track]"'),
    "gradio": ("a page to sample in", 'pip install "hdit[ui]"'),
    "matplotlib": ("plots", 'pip install "hdit[plots]"'),
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


@dataclass(frozen=True)
class CPU:
    name: str
    capability: str  # the vector instructions that torch uses
    cores: int  # that this process may run on
    threads: int  # that torch takes
    bf16: list[str] | None  # instructions for bfloat16; None where nobody tells
    memory_bytes: int | None


@dataclass(frozen=True)
class CUDADevice:
    device: str
    name: str
    capability: str
    memory_bytes: int


@dataclass(frozen=True)
class CUDA:
    devices: list[CUDADevice]
    problem: str | None  # why there is none


@dataclass(frozen=True)
class Precision:
    device: str
    dtype: str
    trains: bool
    auto: bool  # whether training.precision = "auto" takes it
    note: str | None  # why not, or how well


@dataclass(frozen=True)
class Compiler:
    path: str | None
    version: str | None
    problem: str | None


@dataclass(frozen=True)
class Kernels:
    path: str | None
    capability: str
    problem: str | None


@dataclass(frozen=True)
class Compilation:
    device: str
    seconds: float | None
    problem: str | None


@dataclass(frozen=True)
class AttentionBackend:
    """What is None is not known: a problem where it works, a time where it does not or was skipped.

    `auto` names what "auto" takes it for.
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
    device: str
    shape: list[int]  # (b h w n e)
    kernel_size: int
    dtype: str
    backends: list[AttentionBackend]


@dataclass(frozen=True)
class Package:
    name: str
    version: str | None
    purpose: str
    install: str


@dataclass(frozen=True)
class Report:
    hdit: str
    python: str
    torch: str
    torch_build: str
    platform: str
    fast: bool
    cpu: CPU
    cuda: CUDA
    mps: bool
    precisions: list[Precision]
    compiler: Compiler
    kernels: Kernels
    torch_compile: list[Compilation]
    attention: list[Attention]
    packages: list[Package]
    broken: list[str]  # what training cannot do without


def examine(fast: bool = False, say: Callable[[str], None] = lambda step: None) -> Report:
    """Tries everything; with `fast` neither torch.compile nor any timing. `say` gets each step."""
    say("looking at the machine")
    cuda = _cuda()
    mps = torch.backends.mps.is_available()
    used = [torch.device("cpu"), *(torch.device(found.device) for found in cuda.devices)]
    cpu = _cpu()
    devices = [*used, *([torch.device("mps")] if mps else [])]
    precisions = [found for device in devices for found in _precisions(device, cpu)]
    say("compiling the C++ kernels, where that was not done before")
    kernels, compiler = _kernels(), _compiler()
    first = used[:2]  # one of each type
    compilations = []
    for device in [] if fast else first:
        say(f"torch.compile on {device}")
        compilations.append(_compile(device))
    attention = [_attention(device, compiler, fast, say) for device in first]
    return Report(
        hdit=hdit.__version__,
        python=platform.python_version(),
        torch=str(torch.__version__),
        torch_build=_torch_build(),
        platform=platform.platform(),
        fast=fast,
        cpu=cpu,
        cuda=cuda,
        mps=mps,
        precisions=precisions,
        compiler=compiler,
        kernels=kernels,
        torch_compile=compilations,
        attention=attention,
        packages=[Package(name, _version(name), *PACKAGES[name]) for name in PACKAGES],
        broken=_broken(precisions, attention),
    )


def _broken(precisions: list[Precision], attention: list[Attention]) -> list[str]:
    wrong = [
        f"{found.device} does not train in fp32: {found.note}"
        for found in precisions
        if found.dtype == "fp32" and not found.trains and found.device != "mps"
    ]
    wrong += [
        f"neighborhood attention on {part.device}: auto takes {found.backend!r}, which fails: {why}"
        for part in attention
        for found in part.backends
        if "training" in found.auto and (why := found.problem or found.training_problem)
    ]
    return wrong


# ---- the machine ---------------------------------------------------------------------------------


def first_line(said: str) -> str:
    """The first line of what a program said, or two where the first only leads in."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    line = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    return line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]} ..."


def error_line(error: BaseException) -> str:
    return first_line(f"{type(error).__name__}: {error}")


@contextmanager
def _without_warnings() -> Iterator[list[warnings.WarningMessage]]:
    """What is tried may warn of itself; the report says how it went. Yields what was said."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield said


def _torch_build() -> str:
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"


def _cpu() -> CPU:
    affinity = getattr(os, "sched_getaffinity", None)
    return CPU(
        name=cpuinfo().get("model name") or platform.processor() or platform.machine(),
        capability=torch.backends.cpu.get_cpu_capability(),
        cores=len(affinity(0)) if affinity else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        bf16=cpu_bf16(),
        memory_bytes=_memory_bytes(),
    )


def _memory_bytes() -> int | None:
    """Of the machine, or of the container where that is less."""
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


def _cuda() -> CUDA:
    with _without_warnings() as said:
        available = torch.cuda.is_available()
    if not available:
        return CUDA([], _why_no_cuda([str(warning.message) for warning in said]))
    found = []
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        capability = f"{facts.major}.{facts.minor}"
        found.append(CUDADevice(f"cuda:{i}", facts.name, capability, facts.total_memory))
    return CUDA(found, None)


def _why_no_cuda(warned: list[str]) -> str:
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


def _precisions(device: torch.device, cpu: CPU) -> list[Precision]:
    checks = {
        "fp32": lambda: _check_float32(device, tf32=False),
        "tf32": lambda: _check_float32(device, tf32=True),
        "bf16": lambda: _check_autocast(device, torch.bfloat16),
        "fp16": lambda: _check_autocast(device, torch.float16),
    }
    if device.type != "cuda":
        del checks["tf32"]  # NVIDIA's own: elsewhere it is no setting
    auto, found = auto_precision(device), []
    for name, check in checks.items():
        try:
            with _without_warnings():
                problem = check()
        except Exception as error:
            problem = error_line(error)
        note = _bf16_speed(device, cpu) if name == "bf16" and problem is None else problem
        found.append(Precision(str(device), name, problem is None, name == auto, note))
    return found


def _check_float32(device: torch.device, tf32: bool) -> str | None:
    """Why a product of float32 is not forward and backward what its precision makes it, or None.

    TF32 has 10 bits of mantissa, so that it rounds 1 + 2^-12 to 1, and float32 does not.
    """
    fine, n = 1 + 2**-12, 256
    x = torch.eye(n, device=device, requires_grad=True)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        out = x @ torch.full((n, n), fine, device=device)
        out.backward(torch.eye(n, device=device))
    finally:
        torch.set_float32_matmul_precision(before)
    for part in (out.detach(), x.grad):
        if part is None or not torch.equal(part, part[:1, :1].expand_as(part)):
            return "a matrix product comes out wrong"
        if part[0, 0].item() != (1.0 if tf32 else fine):
            return "products stay in float32" if tf32 else f"1 + 2^-12 comes out as {part[0, 0]}"
    return None


def _check_autocast(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a product under autocast is not right forward and backward, or None."""
    n = 16
    x = torch.ones(n, n, device=device, requires_grad=True)
    with torch.autocast(device.type, dtype):
        out = x @ torch.ones(n, n, device=device)
    out.backward(torch.ones_like(out))
    if out.dtype != dtype:
        return f"autocast leaves a product in {out.dtype}"
    if x.grad is None or not bool((out == n).all() and (x.grad == n).all()):
        return "a matrix product comes out wrong"
    return None


def _bf16_speed(device: torch.device, cpu: CPU) -> str | None:
    if device.type == "cuda":
        return "in hardware" if multiplies_bf16(device) else "emulated: the device has no bf16"
    if device.type != "cpu" or cpu.bf16 is None:
        return None
    return f"in hardware: {', '.join(cpu.bf16)}" if cpu.bf16 else "slow: not in hardware"


def _compiler() -> Compiler:
    try:
        path = native.compiler()
        done = subprocess.run([path, "--version"], capture_output=True, text=True)
    except (native.NativeError, OSError) as error:
        return Compiler(None, None, str(error))
    lines = (done.stdout or done.stderr).splitlines()
    return Compiler(path, lines[0].strip() if lines else None, None)


def _kernels() -> Kernels:
    found = native.library()
    capability = native.cpu_capability()
    if isinstance(found, native.NativeError):
        return Kernels(None, capability, str(found))
    return Kernels(str(found.path), capability, None)


def _compile(device: torch.device) -> Compilation:
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


def _version(package: str) -> str | None:
    for name in TRITONS if package == "triton" else (package,):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


# ---- neighborhood attention ----------------------------------------------------------------------


def attention_problem(device: torch.device) -> tuple[tuple[int, ...], torch.dtype, int]:
    """The (b h w n e), dtype and kernel size that are timed: a fine level of an HDiT."""
    if device.type == "cpu":
        return (1, 64, 64, 2, 64), torch.float32, 7
    dtype = torch.bfloat16 if multiplies_bf16(device) else torch.float32
    return (4, 128, 128, 2, 64), dtype, 7


def _attention(
    device: torch.device, compiler: Compiler, fast: bool, say: Callable[[str], None]
) -> Attention:
    shape, dtype, kernel_size = attention_problem(device)
    _, h, w, _, e = shape
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    training, sampling = (
        Problem(device.type, dtype, h, w, kernel_size, e, grad, capability)
        for grad in (True, False)
    )
    autos = {"training": select_backend(training), "sampling": select_backend(sampling)}
    rows = []
    for name, backend in BACKENDS.items():
        say(f"neighborhood attention on {device}: {name}")
        forward = both = None
        problem, untrained = backend.unsupported(sampling), backend.unsupported(training)
        if not fast and problem is None:
            forward, problem = _time(name, device, grad=False)
        if not fast and problem is None and untrained is None:
            both, untrained = _time(name, device, grad=True)
        rows.append(
            AttentionBackend(
                backend=name,
                needs=_needs(name, compiler),
                auto=[use for use, chosen in autos.items() if chosen == name],
                forward_ms=forward,
                forward_backward_ms=both,
                problem=problem,
                training_problem=untrained,
            )
        )
    return Attention(str(device), list(shape), kernel_size, str(dtype).removeprefix("torch."), rows)


def _needs(backend: str, compiler: Compiler) -> str:
    """The thing that a backend stands on, with its version."""
    what = NEEDS.get(backend, "torch")
    if what == "torch":
        return f"torch {torch.__version__.partition('+')[0]}"
    if what == "compiler":
        number = re.search(r"\d+(\.\d+)+", compiler.version or "")
        name = Path(compiler.path).name if compiler.path else "a C++ compiler"
        return f"{name} {number[0]}" if number else name
    return f"{what} {_version(what) or ''}".strip()


def _time(name: str, device: torch.device, grad: bool) -> tuple[float | None, str | None]:
    """Median milliseconds of a backend's forward pass, with `grad` and backward; or why none."""
    shape, dtype, kernel_size = attention_problem(device)
    generator = torch.Generator(device).manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device, generator=generator)

    def run() -> None:
        with torch.set_grad_enabled(grad):
            out = neighborhood_attention(q, k, v, kernel_size, scale=e**-0.5, backend=name)
            if grad:
                torch.autograd.grad(out, (q, k, v), weight)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    e = shape[-1]
    times: list[float] = []
    try:
        q, k, v = (draw().requires_grad_(grad) for _ in range(3))
        weight = draw()
        with _without_warnings():
            run()  # may compile
            while len(times) < RUNS and sum(times) < LONGEST:
                started = perf_counter()
                run()
                times.append(perf_counter() - started)
    except Exception as error:
        return None, error_line(error)
    return 1e3 * median(times), None


# ---- as tables -----------------------------------------------------------------------------------


def tables(report: Report) -> Iterator[Table]:
    """The report for a terminal of 80 columns or more."""
    yield _machine_table(report)
    for part in report.attention:
        yield _attention_table(part, report.fast)
    yield _package_table(report.packages)


def _machine_table(report: Report) -> Table:
    taken = get_args(TrainingSpec.model_fields["precision"].annotation)
    table = Table(
        title="machine",
        show_header=False,
        caption=f"training.precision takes {' or '.join(taken)}",
    )
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")

    def row(name: str, *parts: str | None) -> None:
        table.add_row(Text(name), Text("\n".join(part for part in parts if part)))

    cpu, compiler, kernels = report.cpu, report.compiler, report.kernels
    row("hdit", report.hdit)
    row("Python", report.python)
    row("torch", f"{report.torch}, built for {report.torch_build}")
    row("platform", report.platform)
    row("CPU", cpu.name, f"{cpu.capability}; {cpu.cores} cores, torch takes {cpu.threads} threads")
    row("memory", _gib(cpu.memory_bytes) if cpu.memory_bytes else "not known")
    for found in report.cuda.devices:
        row(found.device, f"{found.name}, {found.capability}, {_gib(found.memory_bytes)}")
    if report.cuda.problem:
        row("CUDA", f"none: {report.cuda.problem}")
    if report.mps:
        row("mps", "present; hdit trains on CUDA or the CPU")
    table.add_section()
    for device in dict.fromkeys(found.device for found in report.precisions):
        here = [found for found in report.precisions if found.device == device]
        row(f"{device} trains", *map(_precision, here))
    table.add_section()
    row("C++ compiler", compiler.path, compiler.version, compiler.problem)
    row("C++ kernels", kernels.path, f"for {kernels.capability}", kernels.problem)
    for compiled in report.torch_compile:
        seconds = None if compiled.seconds is None else f"works: {compiled.seconds:.1f} s"
        row("torch.compile", f"{compiled.device}: {compiled.problem or seconds}")
    if report.fast:
        row("torch.compile", "not tried")
    return table


def _precision(found: Precision) -> str:
    text = f"{found.dtype} {'yes' if found.trains else 'no'}{' (auto)' if found.auto else ''}"
    return f"{text}, {found.note}" if found.note else text


def _attention_table(part: Attention, fast: bool) -> Table:
    b, h, w, n, e = part.shape
    table = Table(
        title=f"neighborhood attention on {part.device}",
        caption=f"{h} x {w}, {n} heads of {e}, k = {part.kernel_size}, batch {b}, {part.dtype}; "
        f"{'not timed' if fast else 'medians'}",
    )
    table.add_column("backend", no_wrap=True)
    table.add_column("needs", max_width=14)
    table.add_column("usable" if fast else "forward pass", overflow="fold")
    for found in part.backends:
        mark = " (auto)" if len(found.auto) == 2 else "".join(f"\n(auto: {a})" for a in found.auto)
        table.add_row(Text(found.backend + mark), Text(found.needs), Text(_usable(found)))
    return table


def _usable(found: AttentionBackend) -> str:
    if found.problem:
        return f"no: {found.problem}"
    forward = "yes" if found.forward_ms is None else f"{found.forward_ms:7.2f} ms"
    if found.training_problem:
        return f"{forward}\nnot to train with: {found.training_problem}"
    if found.forward_backward_ms is None:
        return forward
    return f"{forward}, with backward {found.forward_backward_ms:7.2f} ms"


def _package_table(packages: list[Package]) -> Table:
    table = Table(title="optional packages")
    table.add_column("package", no_wrap=True)
    table.add_column("for", max_width=21)
    table.add_column("version", overflow="fold")
    for found in packages:
        text = found.version or f"missing: {found.install}"
        table.add_row(Text(found.name), Text(found.purpose), Text(text))
    return table


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
