"""Samples megapixel images with HDiT: 50 evaluations of DPM++(3M) SDE, one PNG for each seed.

    python scripts/sample_ffhq1024.py runs/hdit-ffhq1024 --out pictures -n 4
    python scripts/sample_ffhq1024.py theirs.safetensors --out pictures     # k-diffusion's
    python scripts/sample_ffhq1024.py --random-weights --out noise -n 1
    python scripts/sample_ffhq1024.py --random-weights --out noise --compile --batch 1 --batch 4

The clock covers noise, all evaluations, and the transfer of images to the CPU as bytes. It leaves
out loading the weights, the first call (two evaluations of a batch, which compile and warm up), and
writing PNG files.

MODEL is a run, a checkpoint, or any other model that `hdit sample` takes. With --random-weights it
is the model of configs/hdit-ffhq1024.toml with every layer random, including those that start at
zero: its images are noise, and cost what a trained model's cost.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import nn

from bench_record import Record
from bench_tools import machine
from hdit.config import RunConfig, load, parse
from hdit.device import (
    default_device,
    forget_peak_memory,
    keep_freed_memory,
    memory_in_use,
    peak_memory,
)
from hdit.errors import UserError
from hdit.interop import Contents
from hdit.protocols import DataShape
from hdit.report.grids import save_png
from hdit.runs.building import make_network
from hdit.runs.trained import Trained
from hdit.sampling.sample import check_null_class, sample

CONFIG = Path(__file__).parent.parent / "configs" / "hdit-ffhq1024.toml"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="where the weights are")
    parser.add_argument("--random-weights", action="store_true", help="in place of MODEL")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("-n", type=int, help="how many images [as many as at once]")
    parser.add_argument("--size", help="HEIGHTxWIDTH, or one side [what it was trained at]")
    parser.add_argument("--steps", type=int, default=50, help="evaluations of the network [50]")
    parser.add_argument("--seed", type=int, default=0, help="of the first; then one more each [0]")
    parser.add_argument(
        "--batch",
        type=int,
        action="append",
        help="images at once [1]; given more than once, each is timed in turn",
    )
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--compile", action="store_true", help="each block, by torch.compile")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows as they come")
    return parser.parse_args()


def random_model() -> Trained:
    """As it is before training, but with no weight that is zero."""
    config = load(CONFIG)
    shape = config.data_shape(0)
    torch.manual_seed(0)
    backbone = make_network(config, shape)
    for parameter in backbone.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return Trained.of(
        Contents(config, shape, (), {"given": backbone.state_dict()}, "random weights"), CONFIG
    )


def size_of(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match:
        raise UserError(f"--size: must read HEIGHTxWIDTH, as in 1024x1536, got {text!r}")
    height, width = match[1], match[2] or match[1]
    return int(height), int(width)


def at_size(
    config: RunConfig, shape: DataShape, size: tuple[int, int]
) -> tuple[RunConfig, DataShape]:
    """The settings for images of this size. Raises UserError where the levels do not divide it.

    Noise densities, which go by the size of training, are left as they are.
    """
    raw = config.model_dump(mode="json", exclude_none=True)
    raw["data"]["size"] = list(size)
    config = parse(raw, "--size")
    return config, config.data_shape(shape.num_classes)


def warn(shape: DataShape, new: DataShape) -> None:
    """Says what is another thing at another size."""
    if new.chw == shape.chw:
        return
    tokens = new.height * new.width / (shape.height * shape.width)
    print(
        f"warning: trained at {shape.height}x{shape.width}. At {new.height}x{new.width} the "
        f"global levels see {tokens:.3g} times the tokens that they know, an evaluation costs "
        "about as many times as much, and positions still span -1 to 1 along the longer side, so "
        "that neighbours are at distances that are new to the model: parts may be repeated or "
        "stretched",
        file=sys.stderr,
    )


def check(a: argparse.Namespace) -> None:
    """Raises UserError for arguments that do not fit together."""
    if bool(a.model) == a.random_weights:
        raise UserError("name a MODEL, or give --random-weights: one of the two")
    if min([a.steps, *a.batch] + ([] if a.n is None else [a.n])) < 1:
        raise UserError("-n, --steps and --batch: must be at least 1")
    if a.compile and any((a.n or batch) % batch for batch in a.batch):
        raise UserError(
            "-n: must be a multiple of --batch with --compile, or the last images are compiled "
            f"anew, got {a.n} and {', '.join(map(str, a.batch))}"
        )
    if a.out.exists() and (not a.out.is_dir() or any(a.out.iterdir())):
        raise UserError(f"--out: {a.out} is there already; name a new folder")


def run(
    backbone: nn.Module, config: RunConfig, shape: DataShape, a: argparse.Namespace, record: Record
) -> None:
    """Samples in batches of config's size, writes what is not there yet, and tells of the time."""
    device, batch = next(backbone.parameters()).device, config.sampling.batch_size
    n = a.n or batch
    seeds = list(range(a.seed, a.seed + n))

    def labels(seeds: list[int]) -> list[int] | None:
        return [s % shape.num_classes for s in seeds] if shape.num_classes else None

    first = config.model_copy(
        update={"sampling": config.sampling.model_copy(update={"steps": min(2, a.steps)})}
    )
    for _ in sample(backbone, first, shape, seeds[:batch], labels(seeds[:batch]), device):
        pass
    before = memory_in_use(device) if forget_peak_memory(device) else None
    made = evaluations = 0
    seconds, started = 0.0, time.perf_counter()
    for part in sample(backbone, config, shape, seeds, labels(seeds), device):
        seconds += time.perf_counter() - started  # the images are on the CPU: the device is done
        names = [f"{seed:06d}.png" for seed in seeds[made : made + len(part.images)]]
        made += len(names)
        evaluations += part.evaluations * len(names)
        peak = peak_memory(device)
        text = f"peak memory {peak / 2**30:.2f} GiB"
        if before is not None:
            text += f", {(peak - before) / 2**30:.2f} above what was there with the weights"
        print(
            f"{made} of {n}: {evaluations / made:g} evaluations and {seconds / made:.4g}"
            f" s an image; {text}",
            flush=True,
        )
        if made == n:
            record.add({
                "pictures": f"{shape.height}x{shape.width}",
                "batch": batch,
                "compiled": a.compile,
                "precision": a.precision,
                "evaluations": evaluations // made,
                "seconds an image": seconds / made,
                "seconds a batch": seconds * batch / made,
                "peak memory, GiB": peak / 2**30,
            })  # fmt: skip
        for name, image in zip(names, part.images, strict=True):
            if not (a.out / name).exists():  # a batch of another size has made it
                save_png(image, a.out / name)
        started = time.perf_counter()


def main() -> None:
    a = arguments()
    a.batch = a.batch or [1]
    check(a)
    device = default_device()
    model = random_model() if a.random_weights else Trained.open(a.model)
    config, shape = model.config, model.shape
    if a.size:
        config, shape = at_size(config, shape, size_of(a.size))
        warn(model.shape, shape)
    update = {"sampler": {"kind": "dpmpp_3m_sde"}, "steps": a.steps, "precision": a.precision}
    raw = config.model_dump(mode="json", exclude_none=True)
    raw["sampling"] |= update | {"compile": a.compile}
    config = parse(raw, "sampling")
    backbone = model.configured(config, shape).network().to(device)
    check_null_class(config, shape)
    del model
    if a.compile:
        warnings.simplefilter("ignore")  # of torch.compile itself
        backbone.compile_blocks()
    keep_freed_memory()
    parameters = sum(p.numel() for p in backbone.parameters())
    print(
        f"{parameters:,} parameters ({4 * parameters / 2**30:.2f} GiB); {shape.height}x"
        f"{shape.width}, {a.precision}{', compiled' if a.compile else ''}, {device.type}, "
        f"{torch.get_num_threads()} threads\n"
        "The time is that of noise, evaluations and the images' way to the CPU; loading, the first "
        "call and PNG files are left out."
    )
    a.out.mkdir(parents=True, exist_ok=True)
    record = Record(a.json, machine(device))
    for batch in a.batch:
        spec = config.sampling.model_copy(update={"batch_size": batch})
        try:
            run(backbone, config.model_copy(update={"sampling": spec}), shape, a, record)
        except torch.OutOfMemoryError as error:
            record.fail(f"batch {batch}", error)


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
