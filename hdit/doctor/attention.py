"""Probes of neighborhood attention: every backend on a device, with its time or its reason."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from hdit.device import multiplies_bf16
from hdit.doctor.facts import Attention, AttentionBackend, Compiler
from hdit.doctor.machine import package_version
from hdit.doctor.trying import error_line, without_warnings
from hdit_kernels import BACKENDS, neighborhood_attention, select_backend
from hdit_kernels.neighborhood import Problem

RUNS = 5  # whose median is a time
LONGEST = 1.0  # second, after which no further run begins
NEEDS = {"cpu": "compiler", "natten": "natten", "triton": "triton"}  # the others need torch alone


def attention_problem(device: torch.device) -> tuple[tuple[int, ...], torch.dtype, int]:
    """The (b h w n e), dtype and kernel size that are timed: a fine level of an HDiT."""
    if device.type == "cpu":
        return (1, 64, 64, 2, 64), torch.float32, 7
    dtype = torch.bfloat16 if multiplies_bf16(device) else torch.float32
    return (4, 128, 128, 2, 64), dtype, 7


def try_attention(
    device: torch.device, compiler: Compiler, fast: bool, say: Callable[[str], None]
) -> Attention:
    """Every backend on a device, timed unless `fast`; `say` gets each step."""
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
            forward, problem = time_backend(name, device, grad=False)
        if not fast and problem is None and untrained is None:
            both, untrained = time_backend(name, device, grad=True)
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
    return f"{what} {package_version(what) or ''}".strip()


def time_backend(name: str, device: torch.device, grad: bool) -> tuple[float | None, str | None]:
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
        with without_warnings():
            run()  # may compile
            while len(times) < RUNS and sum(times) < LONGEST:
                started = perf_counter()
                run()
                times.append(perf_counter() - started)
    except Exception as error:
        return None, error_line(error)
    return 1e3 * median(times), None
