"""Times a batch's noise beside numpy's generators, one for each image.

    python scripts/bench_noise.py

The peer makes a Philox generator for the key of each image, draws its standard normal float32
numbers by ziggurat, and stacks them. In each round every contender makes the same shapes, in turn;
milliseconds are medians over the rounds, ratios are medians of the ratios within a round.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from torch import Tensor

from hdit import randomness
from hdit_kernels import native, philox

SHAPES = ((64, 3, 64, 64), (16, 1, 8, 8), (1, 3, 1024, 1024))
MINIMUM = 0.02  # seconds that a timing lasts at least
PEER = "numpy, a generator an image"


def of_numpy(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    seeds = keys.numpy().view(np.uint64).tolist()
    generators = [np.random.Generator(np.random.Philox(key=seed)) for seed in seeds]
    return torch.stack(
        [torch.from_numpy(g.standard_normal(shape, dtype=np.float32)) for g in generators]
    )


def milliseconds(make: Callable[[], object]) -> float:
    """Of one call, from as many as last MINIMUM."""
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < MINIMUM:
        make()
        calls += 1
    return 1000 * (time.perf_counter() - start) / calls


def contenders(n: int, shape: tuple[int, ...]) -> dict[str, Callable[[], object]]:
    keys = randomness.keys(0, "benchmark", np.arange(n), torch.device("cpu"))
    count = int(np.prod(shape))
    made: dict[str, Callable[[], object]] = {PEER: lambda: of_numpy(keys, shape)}
    if native.unavailable() is None:
        made["hdit"] = lambda: randomness.normal(keys, shape)
    made["hdit, no C++ compiler"] = lambda: philox.in_torch(keys, count, 0, True)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    a = parser.parse_args()
    if reason := native.unavailable():
        print(f"no row of the compiled library: {reason}")
    print(
        f"{platform.machine()}, {native.cpu_capability()}, torch {torch.__version__}, "
        f"numpy {np.__version__}, cpu, {a.rounds} rounds\n"
    )
    print("| noise | threads | contender | ms | ns an element | times as fast as numpy |")
    print("| --- | --- | --- | --- | --- | --- |")
    for n, *shape in SHAPES:
        for threads in a.threads:
            torch.set_num_threads(threads)
            made = contenders(n, tuple(shape))
            names = list(made)
            times: dict[str, list[float]] = {name: [] for name in names}
            for i in range(a.rounds + 1):
                for name in names[i % len(names) :] + names[: i % len(names)]:
                    took = milliseconds(made[name])
                    if i:  # the first round warms up
                        times[name].append(took)
            for name, values in times.items():
                ratio = median(p / t for p, t in zip(times[PEER], values, strict=True))
                ms, size = median(values), "x".join(map(str, shape))
                nanoseconds = 1e6 * ms / (n * np.prod(shape))
                print(
                    f"| {n} of {size} | {threads} | {name} | {ms:.3f} | {nanoseconds:.2f} "
                    f"| {ratio:.2f} |"
                )


if __name__ == "__main__":
    main()
