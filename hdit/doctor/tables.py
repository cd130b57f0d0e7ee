"""A diagnosis as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from rich.table import Table
from rich.text import Text

from hdit.config.schema import TrainingSpec
from hdit.doctor.facts import Attention, AttentionBackend, Diagnosis, Package, PrecisionTrial


def tables(diagnosis: Diagnosis) -> Iterator[Table]:
    """The diagnosis for a terminal of 80 columns or more."""
    yield _machine_table(diagnosis)
    for part in diagnosis.attention:
        yield _attention_table(part, diagnosis.fast)
    yield _package_table(diagnosis.packages)


def _machine_table(diagnosis: Diagnosis) -> Table:
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

    cpu, compiler, kernels = diagnosis.cpu, diagnosis.compiler, diagnosis.kernels
    row("hdit", diagnosis.hdit)
    row("Python", diagnosis.python)
    row("torch", f"{diagnosis.torch}, built for {diagnosis.torch_build}")
    row("platform", diagnosis.platform)
    row("CPU", cpu.name, f"{cpu.capability}; {cpu.cores} cores, torch takes {cpu.threads} threads")
    row("memory", _gib(cpu.memory_bytes) if cpu.memory_bytes else "not known")
    for found in diagnosis.cuda.devices:
        row(found.device, f"{found.name}, {found.capability}, {_gib(found.memory_bytes)}")
    if diagnosis.cuda.problem:
        row("CUDA", f"none: {diagnosis.cuda.problem}")
    if diagnosis.mps:
        row("mps", "present; hdit trains on CUDA or the CPU")
    table.add_section()
    for device in dict.fromkeys(found.device for found in diagnosis.precisions):
        here = [found for found in diagnosis.precisions if found.device == device]
        row(f"{device} trains", *map(_precision, here))
    table.add_section()
    row("C++ compiler", compiler.path, compiler.version, compiler.problem)
    row("C++ kernels", kernels.path, f"for {kernels.capability}", kernels.problem)
    for compiled in diagnosis.torch_compile:
        seconds = None if compiled.seconds is None else f"works: {compiled.seconds:.1f} s"
        row("torch.compile", f"{compiled.device}: {compiled.problem or seconds}")
    if diagnosis.fast:
        row("torch.compile", "not tried")
    return table


def _precision(found: PrecisionTrial) -> str:
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
