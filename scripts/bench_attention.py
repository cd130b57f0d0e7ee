"""Times neighborhood attention: every backend that this machine can use, beside named peers.

    python scripts/bench_attention.py                      # what docs/benchmarks.md has
    python scripts/bench_attention.py --dtype bfloat16 --pairs 31
    python scripts/bench_attention.py --json attention.json

In each round every contender runs once, in turn, so that a busy moment hits them all; figures are
medians over the rounds, ratios are medians of the ratios within a round. Ceilings are measured in
the same rounds.

On a CPU the peers are `tile` (torch alone), the reference compiled by torch (forward), and global
attention by torch where it is not absurd. The ceilings are multiply-adds that wait for nothing and
a square matrix product.

On CUDA the contenders are each plan of the Triton kernel, flex_attention in each of its variants,
NATTEN where it is installed, and global attention by cuDNN and by torch's flash attention. The
ceilings are a copy within the device's memory and a square matrix product. The memory floor is the
time that the copy's speed gives for reading each input once and writing each output once. Before a
contender is timed its results are compared with the definition in float64, on the last head of the
last image; one that is wrong is reported and passed over, as is one that fails, and one that does
not support the direction. What has no gradient is timed forward only.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench_record import Record, Row, about, markdown, table
from bench_tools import (
    Call,
    CallFailed,
    Calls,
    DeviceLost,
    attempt,
    check_context,
    copy,
    enough_sets,
    faster,
    machine,
    matmul,
    repeated,
    rounds,
)
from hdit.device import default_device, keep_freed_memory
from hdit_kernels import BACKENDS, flex, native, reference, triton
from hdit_kernels.flops import backward_flops, forward_flops
from hdit_kernels.neighborhood import Problem, neighborhood_attention
from hdit_kernels.triton_plans import candidates

SHAPES = [(1, 32, 32, 4), (4, 64, 64, 2), (1, 128, 128, 2), (1, 256, 256, 2)]  # b h w n
EQUAL_TOKENS = [(64, 32, 32, 2), (16, 64, 64, 2), (4, 128, 128, 2), (1, 256, 256, 2)]
# Those of the goals first, in case that time runs out.
CUDA_SHAPES = [
    (1, 256, 256, 2),
    (16, 64, 64, 2),
    (1, 256, 256, 6),
    (16, 64, 64, 6),
    (4, 128, 128, 2),
]
TINY_SHAPES = [(2, 16, 16, 2)]
KERNEL_SIZE, D_HEAD = 7, 64
SCALE = D_HEAD**-0.5
GLOBAL_TOKENS = 64 * 64  # more take global attention seconds on a CPU
COMPILED_SIDE = 128  # the compiled reference is left out above it: it takes long to compile
COPIED = 1 << 30  # bytes; no cache holds any of it
BOUNDS = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Largest relative error: five roundings to the type, and in float32 less than TF32 would make."""
PEER = "flex: default"
COPY, PRODUCT = "ceiling: device copy", "ceiling: matrix product"
GROUP = 5  # contenders that are timed beside each other

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Contenders = dict[str, dict[str, "Contender"]]  # by direction, by name
Ceilings = tuple[tuple[Call, float], tuple[Call, float]]  # matrix product, and copy


# ---- on a CPU ------------------------------------------------------------------------------------


def ceilings(dtype: torch.dtype) -> tuple[Calls, dict[str, float]]:
    """What the machine can do at most, and the floating-point operations of one call."""
    product, product_work = matmul(torch.device("cpu"), dtype)
    calls, work = {"matrix product": product}, {"matrix product": product_work}
    if native.unavailable() is None:
        turns, threads = 200_000, torch.get_num_threads()
        lanes = native.vector_bytes() // 4
        sink = torch.empty(threads)
        calls["multiply-add loop"] = lambda: native.run("fma_loop", turns, sink)
        work["multiply-add loop"] = 2.0 * 16 * lanes * turns * threads
    return calls, work


def global_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = q.shape[2]
    q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).unflatten(1, (-1, w))


def attentions(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> dict[str, Attention]:
    """(q, k, v) -> out of every contender, by name, that can do both directions."""
    _, h, w, _ = shape
    found: dict[str, Attention] = {}
    for name, backend in BACKENDS.items():
        problem = Problem(device.type, dtype, h, w, KERNEL_SIZE, D_HEAD, True)
        if name != "reference" and backend.unsupported(problem) is None:
            found[name] = partial(
                neighborhood_attention,
                kernel_size=KERNEL_SIZE,
                scale=SCALE,
                backend=name,
            )
    if h * w <= GLOBAL_TOKENS:
        found["global SDPA"] = global_attention
    return found


def bench(shape: tuple[int, ...], arguments: argparse.Namespace) -> list[list[str]]:
    device, dtype = torch.device("cpu"), getattr(torch, arguments.dtype)
    b, h, w, n = shape
    q, k, v, grad = (torch.randn(b, h, w, n, D_HEAD, device=device).to(dtype) for _ in range(4))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    work = 4.0 * b * h * w * n * D_HEAD * KERNEL_SIZE**2
    calls, ceiling_work = ceilings(dtype)
    functions = attentions(shape, dtype, device)

    def forward(f: Attention) -> Callable[[], object]:
        def call() -> object:
            with torch.no_grad():
                return f(q, k, v)

        return call

    contenders = {name: forward(f) for name, f in functions.items()} | calls
    if arguments.compiled and h <= COMPILED_SIDE:
        compiled = torch.compile(reference.attention, dynamic=False)
        contenders["compiled reference"] = forward(
            lambda q, k, v: compiled(q, k, v, KERNEL_SIZE, SCALE)
        )

    def backward(f: Attention) -> Callable[[], object]:
        return lambda: torch.autograd.grad(f(q, k, v), leaves, grad)

    both = {name: backward(f) for name, f in functions.items()}
    rows = []
    for direction, entries, factor in (("forward", contenders, 1.0), ("both", both | calls, 3.5)):
        times = rounds(entries, arguments.pairs, device)
        best = {name: work_ / median(times[name]) for name, work_ in ceiling_work.items()}
        for name in entries:
            if name in calls:
                continue
            speed = factor * work / median(times[name])
            ratio = median(t / s for t, s in zip(times["tile"], times[name], strict=True))
            rows.append([
                f"{h}x{w}, b {b}, {n} heads", direction, name,
                f"{median(times[name]) * 1e3:.2f}", f"{ratio:.2f}", f"{speed / 1e9:.0f}",
                *(f"{speed / peak:.2f}" for peak in best.values()),
            ])  # fmt: skip
    return rows


def flat(arguments: argparse.Namespace) -> list[list[str]]:
    """Nanoseconds a token of one backend at one number of tokens on grids of several sides."""
    device, dtype = torch.device("cpu"), getattr(torch, arguments.dtype)
    contenders: Calls = {}
    for b, h, w, n in EQUAL_TOKENS:
        q, k, v = (torch.randn(b, h, w, n, D_HEAD, device=device).to(dtype) for _ in range(3))
        contenders[f"{h}x{w}"] = partial(neighborhood_attention, q, k, v, KERNEL_SIZE, scale=SCALE)
    times = rounds(contenders, arguments.pairs, device)
    tokens = 256 * 256
    first = next(iter(times.values()))
    return [
        [
            name,
            f"{median(t) / tokens * 1e9:.0f}",
            f"{median(a / b for a, b in zip(t, first, strict=True)):.2f}",
        ]
        for name, t in times.items()
    ]


def cpu_tables(arguments: argparse.Namespace, record: Record) -> None:
    calls, _ = ceilings(torch.float32)
    head = ["problem", "direction", "backend", "ms", "times as fast as tile", "GFLOP/s"]
    head += [f"of {name}" for name in calls]
    rows: list[list[str]] = []
    for shape in SHAPES:
        if not arguments.side or shape[1] in arguments.side:
            found = bench(shape, arguments)
            record.add(*(dict(zip(head, row, strict=True)) for row in found))
            rows += found
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, "
        f"{arguments.device}, {arguments.dtype}, k={KERNEL_SIZE}, d_head={D_HEAD}, "
        f"{arguments.pairs} rounds\n"
    )
    print(table(head, rows))
    if not arguments.side:
        print("\nCost a token of 'auto', forward, at 65,536 tokens in all, 2 heads:\n")
        print(table(["grid", "ns a token", "to the first"], flat(arguments)))


# ---- on CUDA -------------------------------------------------------------------------------------


class Contender(NamedTuple):
    """One way to compute attention. `both` gives the output and the gradients of q, k and v.

    It is None where there is no gradient.
    """

    forward: Attention
    both: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]] | None
    is_local: bool = True  # neighborhood attention, and not global


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor


def by_autograd(attention: Attention, is_local: bool = True) -> Contender:
    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # With autograd, as in training: what compiles then compiles once for both directions.
        return attention(q, k, v).detach()

    def both(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        out = attention(q, k, v)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), grad)

    return Contender(forward, both, is_local)


def without_gradient(attention: Attention) -> Contender:
    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            return attention(q, k, v)

    return Contender(forward, None)


def by_plan(plan: triton.Plan) -> Contender:
    """The Triton kernel under a plan, without autograd's detour."""

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return triton.forward(q, k, v, KERNEL_SIZE, SCALE, plan)[0]

    def both(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v = q.detach(), k.detach(), v.detach()
        out, logsumexp = triton.forward(q, k, v, KERNEL_SIZE, SCALE, plan)
        return out, *triton.backward(grad, q, k, v, out, logsumexp, KERNEL_SIZE, SCALE, plan)

    return Contender(forward, both)


def plans(problem: Problem) -> dict[str, triton.Plan]:
    """Every plan of the Triton kernel for a problem, by name."""
    return candidates(problem.d_head, problem.kernel_size, problem.dtype, problem.capability)


def global_by(kernel: SDPBackend) -> Contender:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(kernel):
            return global_attention(q, k, v)

    return by_autograd(attention, is_local=False)


def contenders_of(problem: Problem) -> tuple[dict[str, Contender], dict[str, str]]:
    """What can solve a problem, by name, and why the rest cannot.

    Where the problem has no gradient, contenders are forward only.
    """
    make = by_autograd if problem.grad else without_gradient
    found: dict[str, Contender] = {}
    refused: dict[str, str] = {}
    for name, backend in BACKENDS.items():
        if name == "reference":
            continue
        if reason := backend.unsupported(problem):
            refused[name] = reason
        elif name == "triton":
            for plan_name, plan in plans(problem).items():
                found[f"triton: {plan_name}"] = by_plan(plan)
        elif name == "flex":
            for variant_name, variant in flex.VARIANTS.items():
                if reason := variant.unsupported(problem):
                    refused[f"flex: {variant_name}"] = reason
                else:
                    attention = partial(variant, kernel_size=KERNEL_SIZE, scale=SCALE)
                    found[f"flex: {variant_name}"] = make(attention)
        else:
            attention = partial(
                neighborhood_attention, kernel_size=KERNEL_SIZE, scale=SCALE, backend=name
            )
            found[name] = make(attention)
    found["global, cuDNN"] = global_by(SDPBackend.CUDNN_ATTENTION)
    found["global, flash"] = global_by(SDPBackend.FLASH_ATTENTION)
    return found, refused


def by_direction(problem: Problem, arguments: argparse.Namespace, record: Record) -> Contenders:
    """The contenders of each direction, of those that are asked for; who is refused is recorded.

    What can do both computes forward with autograd too, so that it compiles once.
    """

    def asked_for(name: str) -> bool:
        asked = not arguments.contender or name.startswith(tuple(arguments.contender))
        return asked and name not in arguments.without

    found: Contenders = {}
    with_gradient, _ = contenders_of(problem._replace(grad=True))
    for direction in ("forward", "both"):
        able, refused = contenders_of(problem._replace(grad=direction == "both"))
        found[direction] = {n: with_gradient.get(n, c) for n, c in able.items() if asked_for(n)}
        for name in filter(asked_for, refused):
            what = f"{name}, {direction}"
            if f"{what}: {refused[name]}" not in record.errors:  # by the shape before
                record.fail(what, refused[name])
    return found


def last(x: Tensor) -> Tensor:
    """The last head of the last image, in float64: attention computes each by itself."""
    return x[-1:, :, :, -1:].detach().double()


def reference_of(inputs: Inputs) -> tuple[Tensor, ...]:
    """Output and gradients by the definition in float64, of what last() takes."""
    q, k, v, grad = (last(x) for x in inputs)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = reference.attention(*leaves, KERNEL_SIZE, SCALE)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def error_of(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    """The largest relative error of the tensors; not finite if any element is not."""
    if not all(bool(x.isfinite().all()) for x in found):
        return math.nan
    pairs = zip(found, exact, strict=True)
    return max(float((last(x) - y).norm() / y.norm()) for x, y in pairs)


class Ready(NamedTuple):
    """A contender whose results are right, and how to time it."""

    run: Callable[[], object]
    number: int  # of calls that run() makes
    error: float | None
    timed: str


def call_of(contender: Contender, direction: str, inputs: Inputs) -> tuple[Tensor, ...]:
    """Output, and of "both" directions the gradients of q, k and v."""
    if direction == "forward":
        return (contender.forward(*inputs[:3]),)
    assert contender.both is not None, "a contender without gradient was asked for them"
    return contender.both(*inputs)


def prepare(
    name: str,
    contender: Contender,
    direction: str,
    sets: list[Inputs],
    exact: tuple[Tensor, ...],
    record: Record,
) -> Ready | None:
    """Checks a contender and makes it ready. None if it failed, which is then in the record."""
    device, dtype = sets[0].q.device, sets[0].q.dtype

    def call(i: int) -> tuple[Tensor, ...]:
        return call_of(contender, direction, sets[i])

    found = attempt(record, name, lambda: call(0), device)
    if found is None:
        return None
    error = None
    if contender.is_local:
        error = error_of(found, exact[: len(found)])
        if not error <= BOUNDS[dtype]:
            record.fail(name, f"its relative error is {error:.2g}, above {BOUNDS[dtype]:g}")
            return None
    del found
    what = f"{name} as a CUDA graph, so timed with its launches"
    captured = attempt(record, what, lambda: repeated(call, len(sets), device), device)
    if captured is None:
        return Ready(lambda: [call(i) for i in range(len(sets))], len(sets), error, "launches")
    run, number = captured
    return Ready(run, number, error, "graph" if device.type == "cuda" else "calls")


def cuda_bench(shape: tuple[int, ...], arguments: argparse.Namespace, record: Record) -> None:
    """Times the contenders on one shape and records a row of each, first all forward.

    They are taken a few at a time, each time beside the peer and the ceilings, so that what is
    measured is in the record soon.
    """
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    b, h, w, n = shape
    is_cuda = device.type == "cuda"
    capability = torch.cuda.get_device_capability(device) if is_cuda else None
    problem = Problem(device.type, dtype, h, w, KERNEL_SIZE, D_HEAD, True, capability)
    contenders = by_direction(problem, arguments, record)
    size = b * h * w * n * D_HEAD * dtype.itemsize  # of a tensor, bytes
    number = 1 if arguments.warm else enough_sets(4 * size, device) if is_cuda else 2

    def draw() -> Inputs:
        q, k, v, grad = (torch.randn(*shape, D_HEAD, device=device).to(dtype) for _ in range(4))
        return Inputs(*(x.requires_grad_() for x in (q, k, v)), grad)

    sets = [draw() for _ in range(number)]
    if arguments.warm:
        warm(contenders, sets[0], record)
        return
    exact = reference_of(sets[0])
    side = 64 if arguments.tiny else None
    ceilings_of_device = matmul(device, dtype, side), copy(device, 1 << 20 if side else COPIED)
    for direction, mine in contenders.items():
        title: Row = {"problem": f"{h}x{w}, b {b}, {n} heads", "direction": direction}
        measured = {r["contender"] for r in record.rows if title.items() <= r.items()}
        names = [name for name in mine if name == PEER or name not in measured]
        names.sort(key=lambda name: name != PEER)
        peer: dict[str, Ready] = {}
        for i in range(0, len(names), GROUP):
            ready = dict(peer)
            for name in names[i : i + GROUP]:
                what = f"{', '.join(title.values())}, {name}"
                try:
                    made = prepare(what, mine[name], direction, sets, exact, record)
                except DeviceLost:
                    raise DeviceLost(name) from None
                if made is not None:
                    ready[name] = made
            rows = timed(ready, mine, ceilings_of_device, shape, direction, arguments, record)
            peer = {name: r for name, r in ready.items() if name == PEER}
            record.add(*(title | row for row in rows if row["contender"] not in measured))
            measured |= {row["contender"] for row in rows}


def warm(contenders: Contenders, inputs: Inputs, record: Record) -> None:
    """Calls each contender once, in both directions where it can."""
    device = inputs.q.device
    for direction, others in (("both", {}), ("forward", contenders["both"])):
        for name, contender in contenders[direction].items():
            if name not in others:
                attempt(
                    record, name, lambda c=contender, d=direction: call_of(c, d, inputs), device
                )


def timed(
    ready: dict[str, Ready],
    contenders: dict[str, Contender],
    ceilings_of_device: Ceilings,
    shape: tuple[int, ...],
    direction: str,
    arguments: argparse.Namespace,
    record: Record,
) -> list[Row]:
    """The rows of rows_of; a contender whose call fails is recorded, and taken out of `ready`.

    Raises DeviceLost, with the contender's name, where it has broken CUDA's context.
    """
    while True:
        try:
            return rows_of(ready, contenders, ceilings_of_device, shape, direction, arguments)
        except CallFailed as failed:
            name = failed.name
            what = f"{'x'.join(map(str, shape))}, {direction}, {name}, while it was timed"
            record.fail(what, failed.error)
            check_context(name, torch.device(arguments.device))
            if ready.pop(name, None) is None:  # a ceiling, without which there is no row
                return []


def rows_of(
    ready: dict[str, Ready],
    contenders: dict[str, Contender],
    ceilings_of_device: Ceilings,
    shape: tuple[int, ...],
    direction: str,
    arguments: argparse.Namespace,
) -> list[Row]:
    """Times contenders beside the ceilings -> a row of each of them all."""
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    (product, product_work), (copied, copied_bytes) = ceilings_of_device
    calls = {name: r.run for name, r in ready.items()}
    times = rounds(calls | {PRODUCT: product, COPY: copied}, arguments.pairs, device)
    for name, r in ready.items():
        times[name] = [t / r.number for t in times[name]]
    bandwidth, peak = copied_bytes / median(times[COPY]), product_work / median(times[PRODUCT])
    rows: list[Row] = [
        {"contender": COPY, "ms": median(times[COPY]) * 1e3, "GB/s": bandwidth / 1e9},
        {"contender": PRODUCT, "ms": median(times[PRODUCT]) * 1e3, "TFLOP/s": peak / 1e12},
    ]
    b, h, w, n = shape
    tensors = 4 if direction == "forward" else 8  # q, k, v, out, and grad, dq, dk, dv
    moved = float(tensors * b * h * w * n * D_HEAD * dtype.itemsize)
    flops = float(forward_flops((*shape, D_HEAD), KERNEL_SIZE))
    if direction == "both":
        flops += backward_flops((*shape, D_HEAD), KERNEL_SIZE)
    for name, r in ready.items():
        took = median(times[name])
        work = flops if contenders[name].is_local else flops * h * w / KERNEL_SIZE**2
        rows.append({
            "contender": name,
            "ms": took * 1e3,
            "GB/s": moved / took / 1e9,
            "TFLOP/s": work / took / 1e12,
            "times the memory floor": took * bandwidth / moved,
            "of matrix product": work / took / peak,
            "times as fast as flex": faster(times, name, PEER),
            "relative error": r.error,
            "timed": r.timed,
        })  # fmt: skip
    return rows


def cuda_tables(arguments: argparse.Namespace, record: Record) -> None:
    device = torch.device(arguments.device)
    if device.type == "cuda":
        # A graph is captured on the stream that its inputs, and their autograd nodes, live on.
        torch.cuda.set_stream(torch.cuda.Stream(device))
    for shape in TINY_SHAPES if arguments.tiny else CUDA_SHAPES:
        if not arguments.side or shape[1] in arguments.side:
            try:
                cuda_bench(shape, arguments, record)
            except DeviceLost as error:
                name = str(error)
                record.fail(name, "it broke the CUDA context, and is left out from here on")
                if name in arguments.without:
                    sys.exit(f"{name} broke the CUDA context again, though it was left out")
                command = [sys.executable, *sys.argv, "--go-on", "--without", name]
                os.execv(sys.executable, command)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    settings = f"{arguments.dtype}, k={KERNEL_SIZE}, d_head={D_HEAD}, {arguments.pairs} rounds"
    print(f"{about(record.machine)}; {settings}")
    if record.rows:
        print("\n" + markdown(record.rows))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=default_device().type)
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="[bfloat16 on CUDA, float32 on a CPU]",
    )
    parser.add_argument("--pairs", type=int, default=15, help="rounds")
    parser.add_argument("--side", type=int, action="append", help="only grids of this side")
    parser.add_argument("--no-compiled", dest="compiled", action="store_false")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the rows there as they come"
    )
    parser.add_argument(
        "--without", action="append", default=[], help="leave out a contender (CUDA)"
    )
    parser.add_argument("--warm", action="store_true", help="compile for CUDA, time nothing")
    parser.add_argument(
        "--tiny", action="store_true", help="CUDA's table on any device, tiny shapes"
    )
    parser.add_argument("--go-on", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "--contender", action="append", help="only those whose names begin so (CUDA)"
    )
    found = parser.parse_args(arguments)
    device = torch.device(found.device)
    for_cuda = device.type == "cuda" or found.tiny
    if not for_cuda and (found.without or found.contender or found.warm):
        parser.error("--without, --contender and --warm have an effect on CUDA alone")
    found.dtype = found.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    return found


def main() -> None:
    arguments = parse()
    device = torch.device(arguments.device)
    keep_freed_memory()
    warnings.simplefilter("ignore")  # of torch.compile itself
    record = Record(arguments.json, machine(device), go_on=arguments.go_on)
    if device.type == "cuda" or arguments.tiny:
        cuda_tables(arguments, record)
    else:
        cpu_tables(arguments, record)


if __name__ == "__main__":
    main()
