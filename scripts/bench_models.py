"""Times whole models, beside peers: a forward pass, forward and backward, or a training step.

    python scripts/bench_models.py                     # what docs/benchmarks.md has
    python scripts/bench_models.py --only dit
    python scripts/bench_models.py --only steps --model hdit-ffhq1024 --json steps.json

In each round every contender runs once, in turn; figures are medians over the rounds, ratios are
medians of the ratios within a round. `of matmul` is the share of a square matrix product's speed,
measured in the same rounds, that a pass reaches by its counted MACs (backward: twice the forward).
The peer of DiT is diffusers' DiT with the same weights.

`steps`, which is what runs on CUDA by default, times whole training steps, there in bf16: forward,
backward, clipping of the gradient, AdamW and the update of the EMA. MFU is 6 x MACs (forward and
backward) over what a matrix product of the same rounds and type does in that time. Peak memory is
that of one step with its weights, optimizer and EMA. The share of attention is that of the kernels
that compute it, by torch's profiler over one step. Compiled models come first, then eager ones,
then compiled ones with the batch doubled for as long as it fits into the memory.
"""

from __future__ import annotations

import argparse
import gc
import platform
import re
import warnings
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench_record import Record, markdown, table
from bench_tools import (
    Call,
    Calls,
    DeviceLost,
    attempt,
    faster,
    machine,
    matmul,
    rounds,
    run_graphs_as_they_are,
)
from hdit import models
from hdit.config import load
from hdit.device import (
    default_device,
    forget_peak_memory,
    keep_freed_memory,
    memory_in_use,
    peak_memory,
)
from hdit.interop import Contents, diffusers_dit
from hdit.models.cost import cost
from hdit.protocols import Cond, DataShape
from hdit.runs.building import make_denoiser
from hdit.training.ema import update_ema
from hdit.training.optim import adamw
from hdit_kernels import native

CONFIGS = Path(__file__).parent.parent / "configs"

STEPS = [  # config, side of what the model sees, batch, classes
    ("hdit-ffhq1024", 1024, 8, 0),
    ("hdit-imagenet256", 256, 32, 1000),
    ("dit-xl-2-256", 32, 64, 1000),
]
TINY_STEPS = [("digits-hdit", 8, 2, 10), ("digits-dit", 8, 2, 10)]
DOUBLINGS = 4
ATTENTION = re.compile(
    "attention|flash|fmha|sdpa|neighborhood|forward_kernel|dq_kernel|dkv_kernel", re.IGNORECASE
)
"""Kernels that compute attention, by their names."""


def randomize(network: nn.Module) -> nn.Module:
    """Weights of which none is zero, as after training."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
    return network


class Case:
    """A model of a config on a batch of images, and what a forward pass costs."""

    def __init__(
        self,
        name: str,
        size: int,
        batch: int,
        device: torch.device,
        classes: int = 0,
        overrides: Sequence[str] = (),
    ):
        self.config = load(CONFIGS / f"{name}.toml", overrides)
        channels = 3 if self.config.model.kind == "hdit" else 4
        sigma_data = 0.5 if channels == 3 else 1.0
        self.shape = DataShape(channels, size, size, classes, sigma_data)
        self.name = f"{name}, {size}x{size}, batch {batch}"
        self.precision = "bf16" if device.type == "cuda" else "fp32"  # of training steps
        self.x = torch.randn(batch, *self.shape.chw, device=device)
        self.c_noise = torch.linspace(-1, 1, batch, device=device)
        self.cond = Cond(torch.arange(batch, device=device) % classes if classes else None)
        self.out_channels = self.config.output_channels(self.shape)
        macs = sum(row.macs for row in cost(self.config.model, self.shape, self.out_channels))
        self.work = 2.0 * macs * batch
        self.device = device

    def network(self) -> nn.Module:
        with self.device:  # where hundreds of millions of weights are drawn at once
            network = models.build(self.config.model, self.shape, self.out_channels)
            return randomize(network)

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
    case: Case, title: str, contenders: Calls, first: str, work: float, pairs: int
) -> list[list[str]]:
    """A row for each contender; ratios are to `first`.

    On a CPU the ceiling is the product in float32, on CUDA in bfloat16 for what computes in it.
    """
    products: Calls = {}
    for dtype in (torch.float32, torch.bfloat16)[: 1 if case.device.type == "cpu" else 2]:
        products[str(dtype)], product_work = matmul(case.device, dtype)
    times = rounds(contenders | products, pairs, case.device)

    def peak(name: str) -> float:
        mine = str(torch.bfloat16 if name.startswith("bf16") else torch.float32)
        return product_work / median(times.get(mine, times[str(torch.float32)]))

    return [
        [
            case.name,
            title,
            name,
            f"{median(times[name]) * 1e3:.0f}",
            f"{faster(times, name, first):.2f}",
            f"{work / median(times[name]) / peak(name):.2f}",
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
            dtypes = {"fp32": None} if case.device.type == "cpu" else {"fp32": None, "bf16": bf16}
            for name, dtype in dtypes.items():
                network = case.network()
                network.compile_blocks()  # type: ignore[operator]
                contenders[f"{name}, compiled"] = make(network, dtype)
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


class Theirs(nn.Module):
    """diffusers' DiT, called as ours is."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, c_noise: Tensor, cond: Cond) -> Tensor:
        return self.network(x, c_noise, cond.labels).sample


def diffusers_networks(case: Case, ours: nn.Module, number: int) -> list[nn.Module]:
    """diffusers' DiT with our weights, so many times."""
    import diffusers

    with TemporaryDirectory() as folder:
        classes = tuple(map(str, range(case.shape.num_classes)))
        state = {name: t.cpu() for name, t in ours.state_dict().items()}
        model = Contents(case.config, case.shape, classes, {"given": state}, "bench_models.py")
        diffusers_dit.write(model, Path(folder, "theirs"))
        return [
            diffusers.DiTTransformer2DModel.from_pretrained(Path(folder, "theirs")).to(case.device)
            for _ in range(number)
        ]


def compile_theirs(network: nn.Module) -> None:
    for block in network.transformer_blocks:
        block.compile(fullgraph=True, dynamic=False)


def dit(case: Case, arguments: argparse.Namespace) -> list[list[str]]:
    """DiT beside diffusers' with the same weights: eager with eager, compiled with compiled."""
    ours = case.network()
    theirs = diffusers_networks(case, ours, 2)
    networks = {"hdit": ours, "diffusers": Theirs(theirs[0])}
    if arguments.compiled:
        compiled = case.network()
        compiled.compile_blocks()  # type: ignore[operator]
        compile_theirs(theirs[1])
        networks |= {"hdit, compiled": compiled, "diffusers, compiled": Theirs(theirs[1])}
    found = []
    for title, make, factor in (("forward", case.forward, 1.0), ("both", case.both, 3.0)):
        calls = {name: make(network) for name, network in networks.items()}
        found += rows(case, title, calls, "diffusers", factor * case.work, arguments.pairs)
    return found


# ---- training steps ------------------------------------------------------------------------------


class Step(NamedTuple):
    """A training step that ran once, and the bytes that it needs at its peak."""

    call: Call
    peak: int


def training_step(case: Case, theirs: bool, compiled: bool) -> Step:
    """Builds a model, its EMA and its optimizer, and takes a first step, which may compile."""
    device, config = case.device, case.config
    d = config.diffusion
    held = memory_in_use(device)
    torch.manual_seed(1)
    x0, noise = torch.randn(2, *case.x.shape, device=device) * case.shape.sigma_data
    u = torch.linspace(0.05, 0.95, len(case.x))
    sigma = d.density(u, case.shape, config.beta_schedule).to(device)
    network = case.network()
    if theirs:
        (network,) = diffusers_networks(case, network, 1)
        network.train()
        backbone: nn.Module = Theirs(network)
        ema = deepcopy(network)
        o = config.training.optimizer
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            network.parameters(), o.lr, o.betas, o.eps, o.weight_decay, fused=True
        )
        if compiled:
            compile_theirs(network)
    else:
        backbone, ema = network, deepcopy(network)
        optimizer = adamw(network, config.training.optimizer)
        if compiled:
            network.compile_blocks()  # type: ignore[operator]
    denoiser = make_denoiser(backbone, config, case.shape, case.precision)

    def step() -> None:
        loss = denoiser.loss(x0, noise, sigma, case.cond, d.weighting, d.loss_scales).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), config.training.largest_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_ema(ema, network, 0.9999)

    step()
    forget_peak_memory(device)
    step()
    return Step(step, peak_memory(device) - held)


def attention_seconds(call: Call, device: torch.device) -> tuple[float, list[list[Any]]]:
    """Of one call, by the profiler -> what attention takes, and the ten longest kernels."""
    is_cuda = device.type == "cuda"
    kind = DeviceType.CUDA if is_cuda else DeviceType.CPU
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * is_cuda]
    with profile(activities=activities) as profiled:
        call()
        if is_cuda:
            torch.cuda.synchronize(device)
    took = {
        e.key: (e.self_device_time_total if is_cuda else e.self_cpu_time_total) / 1e6
        for e in profiled.key_averages()
        if e.device_type == kind and not e.key.startswith("#")  # inductor's marks of its graphs
    }
    longest = sorted(took.items(), key=lambda item: -item[1])[:10]
    attention = sum(t for name, t in took.items() if ATTENTION.search(name))
    return attention, [[name[:120], round(t, 6)] for name, t in longest]


def time_steps(
    case: Case, names: Sequence[str], arguments: argparse.Namespace, record: Record
) -> bool:
    """Records a row for each contender, named as in "diffusers, compiled". Returns if all ran."""
    device = case.device
    steps: dict[str, Step] = {}
    for name in names:
        what = f"{case.name}, {name}"
        theirs, compiled = name.startswith("diffusers"), name.endswith("compiled")
        step = attempt(record, what, lambda t=theirs, c=compiled: training_step(case, t, c), device)
        if step is not None:
            steps[name] = step
        release(device)
    if arguments.warm or not steps:
        return len(steps) == len(names)
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    product, product_work = matmul(device, dtype, 64 if arguments.tiny else None)
    calls = {name: step.call for name, step in steps.items()} | {"": product}
    what = f"{case.name}, {', '.join(steps)}, in rounds"
    times = attempt(record, what, lambda: rounds(calls, arguments.pairs, device), device)
    if times is None:
        return False
    peak = product_work / median(times[""])
    batch = len(case.x)
    for name, step in steps.items():
        took = median(times[name])
        found = attempt(
            record, f"{case.name}, {name}: attention's share",
            lambda s=step: attention_seconds(s.call, device), device,
        )  # fmt: skip
        attention, kernels = found or (None, None)
        record.add({
            "model": case.name,
            "contender": name,
            "ms": took * 1e3,
            "images/s": batch / took,
            "MFU": 3 * case.work / took / peak,
            "matrix product, TFLOP/s": peak / 1e12,
            "peak memory, GiB": step.peak / 2**30,
            "share of attention": None if attention is None else attention / took,
            "times diffusers' speed": faster(times, name, name.replace("hdit", "diffusers")),
            "longest kernels, s": kernels,
        })  # fmt: skip
        print(markdown(record.rows[-1:]).splitlines()[-1], flush=True)
    return len(steps) == len(names)


def release(device: torch.device) -> None:
    """Gives back what nobody holds any more, compiled graphs' too."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def step_cases(arguments: argparse.Namespace) -> Iterator[tuple[str, int, int, int, list[str]]]:
    for name, size, batch, classes in TINY_STEPS if arguments.tiny else STEPS:
        if arguments.model and name not in arguments.model:
            continue
        overrides: list[str] = []
        if arguments.warm:  # blocks of one shape share a graph: one of each is enough to compile
            model = load(CONFIGS / f"{name}.toml").model
            keys = ["model.depth"]
            if model.kind == "hdit":
                keys = [f"model.levels.{i}.depth" for i in range(len(model.levels))]
            overrides += [f"{key}=1" for key in keys]
        yield name, size, batch, classes, overrides


def steps(arguments: argparse.Namespace, record: Record) -> None:
    """The most telling first, in case that time runs out."""
    device = torch.device(arguments.device)

    def run(case: Case, style: str) -> bool:
        peers = ["hdit", "diffusers"] if case.config.model.kind == "dit" else ["hdit"]
        done = time_steps(case, [f"{peer}, {style}" for peer in peers], arguments, record)
        torch._dynamo.reset()
        release(device)
        return done

    cases = list(step_cases(arguments))
    styles = ["compiled"] * arguments.compiled + ["eager"] * (not arguments.warm)
    for style in styles:
        for name, size, batch, classes, overrides in cases:
            run(Case(name, size, batch, device, classes, overrides), style)
    if arguments.warm or arguments.tiny:
        return
    for i in range(1, DOUBLINGS + 1):
        for entry in list(cases):
            name, size, batch, classes, overrides = entry
            case = Case(name, size, batch * 2**i, device, classes, overrides)
            if not time_steps(case, [f"hdit, {styles[0]}"], arguments, record):
                cases.remove(entry)
            del case
            torch._dynamo.reset()
            release(device)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=default_device().type)
    parser.add_argument("--pairs", type=int, default=15, help="rounds")
    parser.add_argument(
        "--only",
        choices=["flowers", "ffhq", "pixels", "dit", "steps"],
        action="append",
        help="[steps on CUDA, the others on a CPU]",
    )
    parser.add_argument("--model", action="append", help="of steps, only this config")
    parser.add_argument("--no-compiled", dest="compiled", action="store_false")
    parser.add_argument(
        "--default-malloc", action="store_true", help="leave the C library as it is, to compare"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows as they come")
    parser.add_argument("--warm", action="store_true", help="compile for steps, time nothing")
    parser.add_argument("--tiny", action="store_true", help="of steps, on models that take no time")
    return parser.parse_args(arguments)


def main() -> None:
    arguments = parse()
    device = torch.device(arguments.device)
    if arguments.tiny and device.type == "cpu":
        run_graphs_as_they_are()
    on_cpu = ["flowers", "ffhq", "pixels", "dit"]
    for_steps = device.type == "cuda" or arguments.tiny or arguments.warm
    wanted = arguments.only or (["steps"] if for_steps else on_cpu)
    if not arguments.default_malloc:
        keep_freed_memory()
    warnings.simplefilter("ignore")  # of torch.compile itself
    record = Record(arguments.json, machine(device))
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
        record.add(*(dict(zip(head, line, strict=True)) for line in found))
        print(table(head, found), flush=True)
    if "pixels" in wanted:
        sizes = ((256, 16), (512, 4), (1024, 1), (256, 1))  # as many pixels, and then fewer
        cases = [Case("hdit-ffhq1024", size, batch, device) for size, batch in sizes]
        head = ["model", "ns a pixel", "to the first"]
        lines = per_pixel(cases, arguments)
        record.add(*(dict(zip(head, line, strict=True)) for line in lines))
        print("\n" + table(head, lines))
    if "steps" in wanted:
        try:
            steps(arguments, record)
        except DeviceLost as error:
            raise SystemExit(f"{error}: it broke the CUDA context") from error
        if record.rows:
            print("\n" + markdown(record.rows))


if __name__ == "__main__":
    main()
