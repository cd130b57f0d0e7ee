"""Times neighborhood attention: every backend that this machine can use, beside named peers.

    python scripts/bench_attention.py                      # what docs/benchmarks.md has
    python scripts/bench_attention.py --dtype bfloat16 --pairs 31

In each round every contender runs once, in turn, so that a busy moment hits them all; figures are
medians over the rounds, ratios are medians of the ratios within a round. Peers: `tile` (torch
alone), the reference compiled by torch (forward), and global attention by torch where it is not
absurd. Two ceilings are measured in the same rounds: multiply-adds that wait for nothing (CPU), and
a square matrix product.
"""

from __future__ import annotations

import argparse
import platform
import time
import warnings
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F

from hdit_kernels import BACKENDS, native, reference
from hdit_kernels.host import keep_freed_memory
from hdit_kernels.neighborhood import Problem, neighborhood_attention

SHAPES = [(1, 32, 32, 4), (4, 64, 64, 2), (1, 128, 128, 2), (1, 256, 256, 2)]  # b h w n
EQUAL_TOKENS = [(64, 32, 32, 2), (16, 64, 64, 2), (4, 128, 128, 2), (1, 256, 256, 2)]
KERNEL_SIZE, D_HEAD = 7, 64
GLOBAL_TOKENS = 64 * 64  # more take global attention seconds on a CPU
COMPILED_SIDE = 128  # the compiled reference is left out above it: it takes long to compile

Contenders = dict[str, Callable[[], object]]


def seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def rounds(contenders: Contenders, pairs: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each contender in each round; the order turns from round to round."""
    names = list(contenders)
    for name in names:
        contenders[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(pairs):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(seconds(contenders[name], device))
    return times


def ceilings(dtype: torch.dtype, device: torch.device) -> tuple[Contenders, dict[str, float]]:
    """What the machine can do at most, and the floating-point operations of one call."""
    side = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    calls: Contenders = {"matrix product": lambda: torch.mm(a, b, out=out)}
    work = {"matrix product": 2.0 * side**3}
    if device.type == "cpu" and native.unavailable() is None:
        turns, threads = 200_000, torch.get_num_threads()
        lanes = native.vector_bytes() // 4
        sink = torch.empty(threads)
        calls["multiply-add loop"] = lambda: native.run("fma_loop", turns, sink)
        work["multiply-add loop"] = 2.0 * 16 * lanes * turns * threads
    return calls, work


def global_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    w = q.shape[2]
    q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).unflatten(1, (-1, w))


def attentions(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[..., torch.Tensor]]:
    """(q, k, v) -> out of every contender, by name, that can do both directions."""
    _, h, w, _ = shape
    found: dict[str, Callable[..., torch.Tensor]] = {}
    for name, backend in BACKENDS.items():
        problem = Problem(device.type, dtype, h, w, KERNEL_SIZE, D_HEAD, True)
        if name != "reference" and backend.unsupported(problem) is None:
            found[name] = partial(
                neighborhood_attention,
                kernel_size=KERNEL_SIZE,
                scale=D_HEAD**-0.5,
                backend=name,
            )
    if h * w <= GLOBAL_TOKENS or device.type == "cuda":
        found["global SDPA"] = global_attention
    return found


def bench(shape: tuple[int, ...], arguments: argparse.Namespace) -> list[list[str]]:
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    b, h, w, n = shape
    q, k, v, grad = (torch.randn(b, h, w, n, D_HEAD, device=device).to(dtype) for _ in range(4))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    work = 4.0 * b * h * w * n * D_HEAD * KERNEL_SIZE**2
    calls, ceiling_work = ceilings(dtype, device)
    functions = attentions(shape, dtype, device)

    def forward(f: Callable[..., torch.Tensor]) -> Callable[[], object]:
        def call() -> object:
            with torch.no_grad():
                return f(q, k, v)

        return call

    contenders = {name: forward(f) for name, f in functions.items()} | calls
    if arguments.compiled and h <= COMPILED_SIDE:
        compiled = torch.compile(reference.attention, dynamic=False)
        contenders["compiled reference"] = forward(
            lambda q, k, v: compiled(q, k, v, KERNEL_SIZE, D_HEAD**-0.5)
        )

    def backward(f: Callable[..., torch.Tensor]) -> Callable[[], object]:
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
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    contenders: Contenders = {}
    for b, h, w, n in EQUAL_TOKENS:
        q, k, v = (torch.randn(b, h, w, n, D_HEAD, device=device).to(dtype) for _ in range(3))
        contenders[f"{h}x{w}"] = partial(
            neighborhood_attention, q, k, v, KERNEL_SIZE, scale=D_HEAD**-0.5
        )
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


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--pairs", type=int, default=15, help="rounds")
    parser.add_argument("--side", type=int, action="append", help="only grids of this side")
    parser.add_argument("--no-compiled", dest="compiled", action="store_false")
    arguments = parser.parse_args()
    keep_freed_memory()
    warnings.simplefilter("ignore")  # of torch.compile itself
    calls, _ = ceilings(torch.float32, torch.device(arguments.device))
    rows: list[list[str]] = []
    for shape in SHAPES:
        if not arguments.side or shape[1] in arguments.side:
            rows += bench(shape, arguments)
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, "
        f"{arguments.device}, {arguments.dtype}, k={KERNEL_SIZE}, d_head={D_HEAD}, "
        f"{arguments.pairs} rounds\n"
    )
    head = ["problem", "direction", "backend", "ms", "times as fast as tile", "GFLOP/s"]
    print(table(head + [f"of {name}" for name in calls], rows))
    if not arguments.side:
        print("\nCost a token of 'auto', forward, at 65,536 tokens in all, 2 heads:\n")
        print(table(["grid", "ns a token", "to the first"], flat(arguments)))


if __name__ == "__main__":
    main()
