"""Checks on a device that all attention backends agree, and both models with each of them.

    python scripts/check_backends.py --json right.json

Attention, forward and gradients, is compared with the definition in float64, by relative error.
Models are compared with themselves: the loss and the gradients of one batch, with each backend of
neighborhood attention (HDiT) and each kernel of torch's attention (DiT), eager and compiled. The
reference is eager and float32, by the definition (HDiT) or by matrix products (DiT).
Exits with status 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench_record import Record, markdown
from bench_tools import DeviceLost, attempt, machine, run_graphs_as_they_are
from hdit.device import default_device
from hdit.models import DiTSpec, HDiTSpec, build
from hdit.protocols import Cond, DataShape
from hdit_kernels import BACKENDS, neighborhood, reference
from hdit_kernels.neighborhood import Problem, neighborhood_attention

SHAPE, KERNEL_SIZE, D_HEAD = (2, 24, 40, 2, 64), 7, 64  # b h w n e; no multiple of a tile
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest relative error of attention: in float32 less than TF32 would make, in bfloat16 five
roundings to it."""
LOSS_BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
GRADIENT_BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 1e-1}
"""Largest relative errors of models: each of a dozen layers adds what attention may be off."""

DATA_SHAPE = DataShape(3, 64, 64, 5, 0.5)
SPECS = {
    "HDiT": HDiTSpec.model_validate({
        "patch_size": 4,
        "mapping": {"depth": 1, "width": 128},
        "levels": [
            {"depth": 2, "width": 128, "attention": {"kind": "neighborhood", "kernel_size": 7}},
            {"depth": 2, "width": 256, "attention": {"kind": "global"}},
        ],
    }),
    "DiT": DiTSpec(patch_size=4, depth=3, width=192, num_heads=3),
}  # fmt: skip
SDPA = {
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def relative(found: Tensor, exact: Tensor) -> float:
    """|found - exact| / |exact|; NaN where any element is not finite."""
    if not found.isfinite().all():
        return math.nan
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def problem(device: torch.device, dtype: torch.dtype, h: int, w: int, grad: bool) -> Problem:
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return Problem(device.type, dtype, h, w, KERNEL_SIZE, D_HEAD, grad, capability)


def check_attention(device: torch.device, record: Record) -> None:
    """A row for each backend, type and direction that the backend can do."""
    scale = D_HEAD**-0.5
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v, grad = (torch.randn(SHAPE, device=device).to(dtype) for _ in range(4))
        leaves = [x.double().requires_grad_() for x in (q, k, v)]
        out = reference.attention(*leaves, KERNEL_SIZE, scale)
        exact = [out.detach(), *torch.autograd.grad(out, leaves, grad.double())]

        def run(backend: str, gradients: bool) -> list[Tensor]:
            leaves = [x.clone().requires_grad_(gradients) for x in (q, k, v)]  # noqa: B023
            out = neighborhood_attention(*leaves, KERNEL_SIZE, scale=scale, backend=backend)
            if not gradients:
                return [out]
            return [out.detach(), *torch.autograd.grad(out, leaves, grad)]  # noqa: B023

        for name, backend in BACKENDS.items():
            for gradients in (False, True):
                if backend.unsupported(problem(device, dtype, *SHAPE[1:3], gradients)) is not None:
                    continue
                title = "forward and gradients" if gradients else "forward"
                found = attempt(
                    record,
                    f"attention, {name}, {NAMES[dtype]}, {title}",
                    lambda n=name, g=gradients: run(n, g),
                    device,
                )
                errors = [relative(x, y) for x, y in zip(found or [], exact, strict=False)]
                error = max(errors) if found and not any(map(math.isnan, errors)) else None
                add(record, "attention", name, f"{NAMES[dtype]}, {title}", error, BOUNDS[dtype])


def add(record: Record, what: str, name: str, how: str, error: float | None, bound: float) -> None:
    right = error is not None and error <= bound
    record.add({
        "check": f"{what}, {name}", "how": how, "relative error": error, "at most": bound,
        "right": right,
    })  # fmt: skip


class Model:
    """A small model with weights of which none is zero, and one batch."""

    def __init__(self, name: str, device: torch.device):
        torch.manual_seed(0)
        self.spec, self.device = SPECS[name], device
        network = build(self.spec, DATA_SHAPE)
        for parameter in network.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.03)
        self.state = network.state_dict()
        self.x, self.target = torch.randn(2, 4, *DATA_SHAPE.chw).to(device)
        self.c_noise = torch.linspace(-1, 1, 4, device=device)
        self.cond = Cond(torch.arange(4, device=device))

    def loss_and_gradients(self, dtype: torch.dtype, compiled: bool) -> tuple[Tensor, Tensor]:
        network = build(self.spec, DATA_SHAPE)
        network.load_state_dict(self.state)
        network.to(self.device)
        if compiled:
            network.compile_blocks()
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            out = network(self.x, self.c_noise, self.cond)
        loss = (out.float() - self.target).square().mean()
        loss.backward()
        gradients = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
        return loss.detach(), torch.cat(gradients)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Lets "auto" take a backend of neighborhood attention."""

    def select(problem: Problem) -> str:  # a function, which torch.compile can trace
        return name

    with mock.patch.object(neighborhood, "select_backend", select):
        yield


def ways(model: str, device: torch.device, dtype: torch.dtype) -> dict[str, AbstractContextManager]:
    """The ways to compute a model's attention, the one to compare with first."""
    if model == "DiT":
        on_cuda = {n: sdpa_kernel(k) for n, k in SDPA.items() if n in ("math", "efficient")}
        if dtype == torch.bfloat16:
            on_cuda |= {n: sdpa_kernel(SDPA[n]) for n in ("flash", "cuDNN")}
        on_cpu = {n: sdpa_kernel(SDPA[n]) for n in ("math", "flash")}
        return (on_cuda if device.type == "cuda" else on_cpu) | {"torch's choice": nullcontext()}
    able = [
        name
        for name, module in BACKENDS.items()
        if module.unsupported(problem(device, dtype, 16, 16, True)) is None
    ]
    able.sort(key=lambda name: name != "reference")
    return {name: backend(name) for name in able}


def check_models(device: torch.device, record: Record, compiled: bool, tiny: bool) -> None:
    """A row for each model, way and type: eager, or compiled.

    Compiled is in bfloat16 on CUDA, as it is used there, and in float32 on a CPU.
    """
    dtypes = [torch.float32, torch.bfloat16]
    if compiled:
        dtypes = [torch.bfloat16 if device.type == "cuda" else torch.float32]
    for name in SPECS:
        model = Model(name, device)
        first = next(iter(ways(name, device, torch.float32).values()))
        with first:
            loss, gradients = model.loss_and_gradients(torch.float32, False)
        for dtype in dtypes:
            found = ways(name, device, dtype)
            if compiled and name == "DiT":
                found = {"torch's choice": found["torch's choice"]}
            elif compiled:  # the definition is the last, for it is nobody's choice
                found = dict(reversed(found.items()))
            if tiny:
                found = dict(list(found.items())[:2])
            for way, context in found.items():
                how = f"{NAMES[dtype]}, {'compiled' if compiled else 'eager'}"
                torch._dynamo.reset()

                def run(c=context, d=dtype) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
                    with c:
                        return model.loss_and_gradients(d, compiled)  # noqa: B023

                result = attempt(record, f"{name}, {way}, {how}", run, device)
                for what, i, exact, bounds in (
                    ("loss", 0, loss, LOSS_BOUNDS),
                    ("gradients", 1, gradients, GRADIENT_BOUNDS),
                ):
                    error = None if result is None else relative(result[i], exact)
                    add(record, name, way, f"{how}, {what}", error, bounds[dtype])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=default_device().type)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows as they come")
    parser.add_argument("--tiny", action="store_true", help="fewer ways, to try this script")
    return parser.parse_args(arguments)


def main() -> None:
    arguments = parse()
    device = torch.device(arguments.device)
    warnings.simplefilter("ignore")  # of torch.compile itself
    if arguments.tiny and device.type == "cpu":
        run_graphs_as_they_are()
    record = Record(arguments.json, machine(device))
    torch.manual_seed(0)
    try:
        check_attention(device, record)
        for compiled in (False, True):
            check_models(device, record, compiled, arguments.tiny)
    except DeviceLost as error:
        record.fail(str(error), "it broke the CUDA context; the rest was not checked")
    print(markdown(record.rows))
    wrong = [row for row in record.rows if not row["right"]]
    if wrong or record.errors:
        sys.exit(f"{len(wrong)} of {len(record.rows)} checks are wrong")


if __name__ == "__main__":
    main()
