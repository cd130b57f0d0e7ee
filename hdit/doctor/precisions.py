"""Probes of precisions: a product of each on a device, forward and backward."""

from __future__ import annotations

import torch

from hdit.device import auto_precision, multiplies_bf16
from hdit.doctor.facts import CPU, PrecisionTrial
from hdit.doctor.trying import error_line, without_warnings


def try_precisions(device: torch.device, cpu: CPU) -> list[PrecisionTrial]:
    """Every precision that the device may train in, tried."""
    checks = {
        "fp32": lambda: check_float32(device, tf32=False),
        "tf32": lambda: check_float32(device, tf32=True),
        "bf16": lambda: check_autocast(device, torch.bfloat16),
        "fp16": lambda: check_autocast(device, torch.float16),
    }
    if device.type != "cuda":
        del checks["tf32"]  # NVIDIA's own: elsewhere it is no setting
    auto, found = auto_precision(device), []
    for name, check in checks.items():
        try:
            with without_warnings():
                problem = check()
        except Exception as error:
            problem = error_line(error)
        note = _bf16_speed(device, cpu) if name == "bf16" and problem is None else problem
        found.append(PrecisionTrial(str(device), name, problem is None, name == auto, note))
    return found


def check_float32(device: torch.device, tf32: bool) -> str | None:
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


def check_autocast(device: torch.device, dtype: torch.dtype) -> str | None:
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
