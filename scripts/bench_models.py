"""Times whole models: a forward pass and a training step's forward and backward, beside peers.

    python scripts/bench_models.py                     # what docs/benchmarks.md has
    python scripts/bench_models.py --only dit

In each round every contender runs once, in turn; figures are medians over the rounds, ratios are
medians of the ratios within a round. `of matmul` is the share of a square matrix product's speed,
measured in the same rounds, that a pass reaches by its counted MACs (backward: twice the forward).
The peer of DiT is diffusers' DiT with the same weights.
"""

from __future__ import annotations

import argparse
import platform
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from unittest import mock

import torch
from torch import Tensor, nn

from hdit import models
from hdit.config.schema import load
from hdit.interop import diffusers_dit
from hdit.interop.model import Model
from hdit.models.cost import cost
from hdit.protocols import Cond, DataShape
from hdit_kernels import native
from hdit_kernels.host import keep_freed_memory

CONFIGS = Path(__file__).parent.parent / "configs"
Call = Callable[[], object]


def seconds(call: Call, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def rounds(contenders: dict[str, Call], pairs: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each contender in each round; the order turns from round to round."""
    names = list(contenders)
    for name in names:
        contenders[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(pairs):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(seconds(contenders[name], device))
    return times


def matmul(device: torch.device, dtype: torch.dtype) -> tuple[Call, float]:
    """A square matrix product, and its floating-point operations."""
    side = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return (lambda: torch.mm(a, b, out=out)), 2.0 * side**3


def randomize(network: nn.Module) -> nn.Module:
    """Weights of which none is zero, as after training."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
    return network


class Case:
    """A model of a config on a batch of images, and what a forward pass costs."""

    def __init__(self, name: str, size: int, batch: int, device: torch.device, classes: int = 0):
        self.config = load(CONFIGS / f"{name}.toml")
        channels = 3 if self.config.model.kind == "hdit" else 4
        sigma_data = 0.5 if channels == 3 else 1.0
        self.shape = DataShape(channels, size, size, classes, sigma_data)
        self.name = f"{name}, {size}x{size}, batch {batch}"
        self.x = torch.randn(batch, *self.shape.chw, device=device)
        self.c_noise = torch.linspace(-1, 1, batch, device=device)
        self.cond = Cond(torch.arange(batch, device=device) % classes if classes else None)
        self.out_channels = self.config.output_channels(self.shape)
        macs = sum(row.macs for row in cost(self.config.model, self.shape, self.out_channels))
        self.work = 2.0 * macs * batch
        self.device = device

    def network(self) -> nn.Module:
        network = models.build(self.config.model, self.shape, self.out_channels)
        return randomize(network).to(self.device)

    def pass_through(self, network: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            return network(self.x, self.c_noise, self.cond)

    def forward(self, network: nn.Module, dtype: torch.dtype | None = None) -> Call:
        network.eval()

        def call() -> None:
            with torch.inference_mode():
                self.pass_through(network, dtype)

        return call

    def both(self, network: nn.Module, dtype: torch.dtype | None = None) -> Call:
        network.train()

        def call() -> None:
            self.pass_through(network, dtype).float().square().mean().backward()
            network.zero_grad()

        return call


def rows(
    case: Case, title: str, contenders: dict[str, Call], first: str, work: float, pairs: int
) -> list[list[str]]:
    """A row for each contender; ratios are to `first`."""
    product, product_work = matmul(case.device, torch.float32)
    times = rounds(contenders | {"": product}, pairs, case.device)
    peak = product_work / median(times[""])
    return [
        [
            case.name,
            title,
            name,
            f"{median(times[name]) * 1e3:.0f}",
            f"{median(a / b for a, b in zip(times[first], times[name], strict=True)):.2f}",
            f"{work / median(times[name]) / peak:.2f}",
        ]
        for name in contenders
    ]


def without_library(call: Call) -> Call:
    """The same without the compiled C++ library, as where there is no compiler."""

    def run() -> None:
        with mock.patch.object(native, "library", return_value=native.NativeError("left out")):
            call()

    return run


def hdit(case: Case, arguments: argparse.Namespace) -> list[list[str]]:
    """One HDiT in both directions: fp32, bf16, compiled, and without the C++ library."""
    bf16 = torch.bfloat16
    found = []
    for title, make, factor in (("forward", case.forward, 1.0), ("both", case.both, 3.0)):
        contenders = {"fp32": make(case.network()), "bf16": make(case.network(), bf16)}
        if case.device.type == "cpu":
            contenders["fp32, no C++ compiler"] = without_library(make(case.network()))
        if arguments.compiled:
            network = case.network()
            network.compile_blocks()  # type: ignore[operator]
            contenders["fp32, compiled"] = make(network)
        found += rows(case, title, contenders, "fp32", factor * case.work, arguments.pairs)
    return found


def forward_only(case: Case, arguments: argparse.Namespace) -> list[list[str]]:
    contenders = {"fp32": case.forward(case.network())}
    contenders["bf16"] = case.forward(case.network(), torch.bfloat16)
    return rows(case, "forward", contenders, "fp32", case.work, arguments.pairs)


def per_pixel(cases: list[Case], arguments: argparse.Namespace) -> list[list[str]]:
    """Time a pixel of one model at several sizes; ratios are to the first."""
    network = cases[0].network()
    calls = {case.name: case.forward(network) for case in cases}
    times = rounds(calls, arguments.pairs, cases[0].device)
    each = {case.name: [t / case.x[:, 0].numel() for t in times[case.name]] for case in cases}
    first = each[cases[0].name]
    return [
        [
            name,
            f"{median(mine) * 1e9:.0f}",
            f"{median(a / b for a, b in zip(mine, first, strict=True)):.2f}",
        ]
        for name, mine in each.items()
    ]


def dit(case: Case, arguments: argparse.Namespace) -> list[list[str]]:
    """DiT beside diffusers' with the same weights: eager with eager, compiled with compiled."""
    import diffusers

    ours = case.network()
    with TemporaryDirectory() as folder:
        classes = tuple(map(str, range(case.shape.num_classes)))
        state = {name: t.cpu() for name, t in ours.state_dict().items()}
        model = Model(case.config, case.shape, classes, state, "bench_models.py")
        diffusers_dit.write(model, Path(folder, "theirs"))
        theirs = [
            diffusers.DiTTransformer2DModel.from_pretrained(Path(folder, "theirs")).to(case.device)
            for _ in range(2)
        ]
    labels = case.cond.labels

    class Theirs(nn.Module):
        def __init__(self, network: nn.Module):
            super().__init__()
            self.network = network

        def forward(self, x: Tensor, c_noise: Tensor, cond: Cond) -> Tensor:
            return self.network(x, c_noise, labels).sample

    networks = {"hdit": ours, "diffusers": Theirs(theirs[0])}
    if arguments.compiled:
        compiled = case.network()
        compiled.compile_blocks()  # type: ignore[operator]
        for block in theirs[1].transformer_blocks:
            block.compile(fullgraph=True, dynamic=False)
        networks |= {"hdit, compiled": compiled, "diffusers, compiled": Theirs(theirs[1])}
    found = []
    for title, make, factor in (("forward", case.forward, 1.0), ("both", case.both, 3.0)):
        calls = {name: make(network) for name, network in networks.items()}
        found += rows(case, title, calls, "diffusers", factor * case.work, arguments.pairs)
    return found


def table(head: list[str], lines: list[list[str]]) -> str:
    everything = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in everything)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--pairs", type=int, default=15, help="rounds")
    parser.add_argument("--only", choices=["flowers", "ffhq", "pixels", "dit"], action="append")
    parser.add_argument("--no-compiled", dest="compiled", action="store_false")
    parser.add_argument(
        "--default-malloc", action="store_true", help="leave the C library as it is, to compare"
    )
    arguments = parser.parse_args()
    wanted = arguments.only or ["flowers", "ffhq", "pixels", "dit"]
    device = torch.device(arguments.device)
    if not arguments.default_malloc:
        keep_freed_memory()
    warnings.simplefilter("ignore")  # of torch.compile itself
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, {device}, "
        f"{arguments.pairs} rounds{', default malloc' if arguments.default_malloc else ''}\n",
        flush=True,
    )
    found: list[list[str]] = []
    if "flowers" in wanted:
        found += hdit(Case("hdit-oxford-flowers", 256, 4, device), arguments)
    if "ffhq" in wanted:
        found += forward_only(Case("hdit-ffhq1024", 1024, 1, device), arguments)
    if "dit" in wanted:
        found += dit(Case("dit-s-2-256", 32, 4, device, classes=1000), arguments)
    if found:
        head = ["model", "direction", "contender", "ms", "times the first's speed", "of matmul"]
        print(table(head, found), flush=True)
    if "pixels" in wanted:
        sizes = ((256, 16), (512, 4), (1024, 1), (256, 1))  # as many pixels, and then fewer
        cases = [Case("hdit-ffhq1024", size, batch, device) for size, batch in sizes]
        lines = per_pixel(cases, arguments)
        print("\n" + table(["model", "ns a pixel", "to the first"], lines))


if __name__ == "__main__":
    main()
