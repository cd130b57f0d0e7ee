"""All probes in turn."""

from __future__ import annotations

import platform
from collections.abc import Callable

import torch

import hdit
from hdit.doctor.attention import try_attention
from hdit.doctor.facts import Attention, Diagnosis, PrecisionTrial
from hdit.doctor.machine import (
    find_compiler,
    find_cpu,
    find_cuda,
    find_kernels,
    packages,
    torch_build,
    try_compile,
)
from hdit.doctor.precisions import try_precisions


def examine(fast: bool = False, say: Callable[[str], None] = lambda step: None) -> Diagnosis:
    """A diagnosis of this machine; `say` gets the name of each step.

    With `fast` it neither tries torch.compile nor times anything.
    """
    say("looking at the machine")
    cuda = find_cuda()
    mps = torch.backends.mps.is_available()
    used = [torch.device("cpu"), *(torch.device(found.device) for found in cuda.devices)]
    cpu = find_cpu()
    devices = [*used, *([torch.device("mps")] if mps else [])]
    precisions = [found for device in devices for found in try_precisions(device, cpu)]
    say("compiling the C++ kernels, where that was not done before")
    kernels, compiler = find_kernels(), find_compiler()
    first = used[:2]  # one of each type
    compilations = []
    for device in [] if fast else first:
        say(f"torch.compile on {device}")
        compilations.append(try_compile(device))
    attention = [try_attention(device, compiler, fast, say) for device in first]
    return Diagnosis(
        hdit=hdit.__version__,
        python=platform.python_version(),
        torch=str(torch.__version__),
        torch_build=torch_build(),
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
        packages=packages(),
        broken=_broken(precisions, attention),
    )


def _broken(precisions: list[PrecisionTrial], attention: list[Attention]) -> list[str]:
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
