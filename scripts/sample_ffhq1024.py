"""Samples megapixel pictures with HDiT: 50 evaluations of DPM++(3M) SDE, one PNG for each seed.

    python scripts/sample_ffhq1024.py runs/hdit-ffhq1024 --out pictures -n 4
    python scripts/sample_ffhq1024.py theirs.safetensors --out pictures     # k-diffusion's
    python scripts/sample_ffhq1024.py --random-weights --out noise -n 1

MODEL is a run, a checkpoint, a converted model, or k-diffusion's .safetensors. With
--random-weights it is the model of configs/hdit-ffhq1024.toml, every layer of it random, those that
start as zero too: its pictures are noise, and cost what a trained model's cost.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from hdit import interop, models
from hdit.config.schema import RunConfig, load, parse
from hdit.errors import UserError
from hdit.interop import Model
from hdit.protocols import DataShape
from hdit.report.grids import save_png
from hdit.sampling.sample import check_guidance, sample
from hdit_kernels.host import (
    forget_peak_memory,
    keep_freed_memory,
    memory_in_use,
    peak_memory,
)

CONFIG = Path(__file__).parent.parent / "configs" / "hdit-ffhq1024.toml"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="where the weights are")
    parser.add_argument("--random-weights", action="store_true", help="in place of MODEL")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("-n", type=int, default=1, help="how many pictures [1]")
    parser.add_argument("--size", help="HEIGHTxWIDTH, or one side [what it was trained at]")
    parser.add_argument("--steps", type=int, default=50, help="evaluations of the network [50]")
    parser.add_argument("--seed", type=int, default=0, help="of the first; then one more each [0]")
    parser.add_argument("--batch", type=int, default=1, help="pictures at once [1]")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    return parser.parse_args()


def random_model() -> Model:
    """As it is before training, but with no weight that is zero."""
    config = load(CONFIG)
    shape = config.data_shape(0)
    torch.manual_seed(0)
    backbone = models.build(config.model, shape, config.output_channels(shape))
    for parameter in backbone.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return Model(config, shape, (), backbone.state_dict(), "random weights", "given")


def size_of(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match:
        raise UserError(f"--size: must read HEIGHTxWIDTH, as in 1024x1536, got {text!r}")
    height, width = match[1], match[2] or match[1]
    return int(height), int(width)


def at_size(
    config: RunConfig, shape: DataShape, size: tuple[int, int]
) -> tuple[RunConfig, DataShape]:
    """The settings for pictures of this size. Raises UserError where the levels do not divide it.

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


def main() -> None:
    a = arguments()
    if bool(a.model) == a.random_weights:
        raise UserError("name a MODEL, or give --random-weights: one of the two")
    if min(a.n, a.steps, a.batch) < 1:
        raise UserError("-n, --steps and --batch: must be at least 1")
    if a.out.exists() and (not a.out.is_dir() or any(a.out.iterdir())):
        raise UserError(f"--out: {a.out} is there already; name a new folder")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = random_model() if a.random_weights else interop.load(a.model)
    config, shape = model.config, model.shape
    if a.size:
        config, shape = at_size(config, shape, size_of(a.size))
        warn(model.shape, shape)
    update = {"sampler": {"kind": "dpmpp_3m_sde"}, "steps": a.steps, "precision": a.precision}
    raw = config.model_dump(mode="json", exclude_none=True)
    raw["sampling"] |= update | {"batch_size": a.batch}
    config = parse(raw, "sampling")
    backbone = replace(model, config=config, shape=shape).network().to(device)
    check_guidance(config, shape)
    del model
    keep_freed_memory()
    parameters = sum(p.numel() for p in backbone.parameters())
    before = memory_in_use(device) if forget_peak_memory(device) else None
    print(
        f"{parameters:,} parameters ({4 * parameters / 2**30:.2f} GiB); {shape.height}x"
        f"{shape.width}, {a.precision}, {device.type}, {torch.get_num_threads()} threads"
    )
    a.out.mkdir(parents=True, exist_ok=True)
    seeds = list(range(a.seed, a.seed + a.n))
    labels = [s % shape.num_classes for s in seeds] if shape.num_classes else None
    written = evaluations = 0
    started = time.perf_counter()
    for part in sample(backbone, config, shape, seeds, labels, device):
        for image in part.images:
            save_png(image, a.out / f"{seeds[written]:06d}.png")
            written += 1
        evaluations += part.evaluations * len(part.images)
        seconds = time.perf_counter() - started
        peak = peak_memory(device)
        text = f"peak memory {peak / 2**30:.2f} GiB"
        if before is not None:
            text += f", {(peak - before) / 2**30:.2f} above what was there with the weights"
        print(
            f"{written} of {a.n}: {evaluations / written:g} evaluations and {seconds / written:.1f}"
            f" s an image; {text}",
            flush=True,
        )


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
