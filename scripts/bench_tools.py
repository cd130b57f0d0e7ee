"""What the benchmark scripts share: timing in rounds, ceilings, and what the machine is.

On a CPU, time is the clock's. On CUDA it is that between two events on the stream. A kernel may be
over sooner than it takes to launch, so short calls are captured: a CUDA graph of many of them, each
on another of several sets of inputs, is what a round times.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import TypeVar

import torch

from bench_record import Record, Row, commit, one_line, output_of

T = TypeVar("T")
Call = Callable[[], object]
Calls = dict[str, Call]
Times = dict[str, list[float]]

GRAPH_SECONDS = 2e-3  # of the calls in a graph together: launching it takes some 10 microseconds


class DeviceLost(Exception):
    """A kernel broke the CUDA context: nothing more can run in this process."""


class CallFailed(Exception):
    """A contender's call raised while it was timed: `name` is the contender's."""

    def __init__(self, name: str, error: Exception):
        super().__init__(f"{name}: {one_line(error)}")
        self.name, self.error = name, error


def seconds(call: Call, device: torch.device) -> float:
    """How long one call takes: by events on CUDA, else by the clock."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def rounds(contenders: Calls, pairs: int, device: torch.device, warm: bool = True) -> Times:
    """Seconds of each contender in each round; the order turns from round to round.

    Raises CallFailed where a contender's call raises, on CUDA also where its kernels fail later.
    """

    def timed(name: str) -> float:
        try:
            return seconds(contenders[name], device)
        except Exception as error:  # of any kind: compilers have their own
            raise CallFailed(name, error) from error

    names = list(contenders)
    for name in names if warm else ():
        timed(name)
    times: Times = {name: [] for name in names}
    for i in range(pairs):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(timed(name))
    return times


def faster(times: Times, name: str, peer: str) -> float | None:
    """How many times as fast as a peer: the median of the ratios within a round."""
    if peer not in times or name not in times:
        return None
    return median(a / b for a, b in zip(times[peer], times[name], strict=True))


def repeated(call: Callable[[int], object], sets: int, device: torch.device) -> tuple[Call, int]:
    """`call` on each set of inputs in turn, as often as fills a round -> one call, and how often.

    On CUDA it is a CUDA graph. Elsewhere the calls are made one after another, each set once.
    """
    if device.type != "cuda":
        return (lambda: [call(i) for i in range(sets)]), sets
    for i in range(sets):
        call(i)
    once = median(seconds(lambda: call(0), device) for _ in range(3))
    number = sets * min(max(1, round(GRAPH_SECONDS / once / sets)), 100)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(device)):
        kept: list[object] = [None] * sets  # or all calls would write to one place in the cache
        for i in range(number):
            kept[i % sets] = call(i % sets)
    return graph.replay, number


def enough_sets(size: int, device: torch.device, most: int = 16) -> int:
    """How many sets of inputs of so many bytes are four times what the cache holds, at least 2."""
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
    return min(most, max(2, -(-4 * cache // size)))


def matmul(device: torch.device, dtype: torch.dtype, side: int | None = None) -> tuple[Call, float]:
    """A square matrix product, and its floating-point operations."""
    side = side or (1024 if device.type == "cpu" else 8192)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return (lambda: torch.mm(a, b, out=out)), 2.0 * side**3


def copy(device: torch.device, size: int) -> tuple[Call, float]:
    """A copy of so many bytes within a device's memory, and the bytes that it reads and writes."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return (lambda: target.copy_(source)), 2.0 * size


def attempt(record: Record, what: str, run: Callable[[], T], device: torch.device) -> T | None:
    """What `run` returns, or None once its error is in the record.

    Raises DeviceLost where it has broken CUDA's context.
    """
    try:
        return run()
    except Exception as error:  # of any kind: compilers have their own
        record.fail(what, error)
        check_context(what, device)
    return None


def check_context(what: str, device: torch.device) -> None:
    """Raises DeviceLost, with `what` as its message, where CUDA's context is broken."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            raise DeviceLost(what) from error


def run_graphs_as_they_are() -> None:
    """Lets Module.compile trace, but not generate code: on a CPU that takes ten seconds a graph."""
    compile_module = torch.nn.Module.compile

    def compile_eagerly(module: torch.nn.Module, **options: object) -> None:
        compile_module(module, backend="aot_eager", **options)

    torch.nn.Module.compile = compile_eagerly  # type: ignore[method-assign]


def machine(device: torch.device) -> Row:
    """What a figure was measured on, and by which commit, if that is known."""
    found: Row = {"device": f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        found = {
            "device": torch.cuda.get_device_name(device),
            "capability": f"{major}.{minor}",
            "driver": _driver(),
        }
    found |= {
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": commit(),
    }
    if not found["commit"]:
        print("warning: the commit is not known; name it in HDIT_COMMIT", file=sys.stderr)
    return {name: value for name, value in found.items() if value}


def _driver() -> str | None:
    text = output_of(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return text.splitlines()[0] if text else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
