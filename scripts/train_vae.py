"""Trains a small VAE on images of your own, for diffusion in its latents.

    python scripts/train_vae.py my_images --out my_vae --size 64

The VAE is diffusers' AutoencoderKL in its own format: `AutoencoderKL.from_pretrained("my_vae")`
loads it. Its loss is L1, L2 and a KL term (Rombach et al., 2022, without the perceptual and the
adversarial loss, so that nothing is downloaded). Every 20th image is held out for measuring. A run
takes as long as `--minutes` says, so another machine ends with other weights.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import time
from collections.abc import Iterator, Sized
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hdit.config.errors import explain
from hdit.data import DataSpec
from hdit.device import (
    PRECISIONS,
    default_device,
    float32_products,
    keep_freed_memory,
    precision_on,
)
from hdit.errors import UserError
from hdit.files import whole
from hdit.protocols import Spec
from hdit.report.grids import save_grid
from hdit.spaces.pixel import from_pixels, to_pixels

if TYPE_CHECKING:
    from diffusers.models import AutoencoderKL

HELD_OUT = 20  # each 20th image
MEASURED = 2000  # images that the figures are of, at most
PICTURE, COLUMNS, PAIRS = "reconstructions.png", 16, 3  # held-out images above what became of them
GROUPS = 8  # of GroupNorm
WARMUP = 0.05  # of the run
NOISE = 0.1  # on scaled latents, to see how much the decoder minds
LOGVAR = -6.0  # of the posterior, to begin with
NEAR_ZERO = 0.1  # a mean of the latents, in their deviations


class Images(Spec):
    """The part of a config that says where images come from."""

    data: DataSpec


# ---- images --------------------------------------------------------------------------------------


def read(arguments: argparse.Namespace) -> tuple[Tensor, Tensor, bool]:
    """-> (images to train on, held-out ones, both (n c h w) uint8, whether to mirror)."""
    names = {"path": arguments.path, "size": arguments.size, "channels": arguments.channels}
    try:
        spec = Images.model_validate({"data": names}).data
    except ValidationError as error:
        raise UserError("\n".join(explain(Images, one) for one in error.errors())) from None
    source = spec.open()
    if not isinstance(source, Sized):
        raise UserError(
            f"{arguments.path}: its images come in their own order, and some have to be held out"
        )
    n = min(len(source), arguments.images)
    samples = [source[i * len(source) // n] for i in range(n)]
    images = [sample.image for sample in samples if not sample.skipped]
    if len(images) < HELD_OUT:
        raise UserError(f"{arguments.path}: {HELD_OUT} images are needed, got {len(images)}")
    held_out = torch.arange(len(images)) % HELD_OUT == HELD_OUT - 1
    pixels = torch.stack(images)
    return pixels[~held_out], pixels[held_out], spec.flip


def spread(images: Tensor, most: int) -> Tensor:
    """At most so many of them, evenly over all, for they may come class by class."""
    n = min(len(images), most)
    return images[torch.arange(n) * len(images) // n]


def draws(length: int, batch_size: int) -> Iterator[Tensor]:
    """Indices of batches without end, in a fresh order each epoch."""
    order = torch.empty(0, dtype=torch.int64)
    while True:
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(length)])
        yield order[:batch_size]
        order = order[batch_size:]


# ---- the VAE and its loss ------------------------------------------------------------------------


def build(arguments: argparse.Namespace) -> AutoencoderKL:
    """Levels have width, 2 width and then 4 width channels: at full size each costs most.

    Its latents begin with little noise: with that of N(0, 1) it takes long to tell them from it.
    """
    from diffusers.models import AutoencoderKL

    levels = arguments.factor.bit_length()  # 4 -> 3, 8 -> 4
    vae = AutoencoderKL(
        in_channels=arguments.channels,
        out_channels=arguments.channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(min(4, 2**i) * arguments.width for i in range(levels)),
        layers_per_block=1,
        latent_channels=arguments.latent_channels,
        norm_num_groups=GROUPS,
        sample_size=arguments.size,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )
    torch.nn.init.constant_(vae.quant_conv.bias[arguments.latent_channels :], LOGVAR)
    return vae


def posterior(vae: AutoencoderKL, x: Tensor) -> tuple[Tensor, Tensor]:
    """-> (mean, logvar) of the latents of x (b c h w), float32 whatever autocast does."""
    return vae.encode(x).latent_dist.parameters.float().chunk(2, dim=1)


def draw(mean: Tensor, logvar: Tensor) -> Tensor:
    return mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """Of N(mean, exp(logvar)) from N(0, 1), in nats an image."""
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()


def reconstruction_loss(y: Tensor, x: Tensor) -> Tensor:
    """L1 and L2: the first keeps edges, the second learns faster at the beginning."""
    return F.l1_loss(y, x) + F.mse_loss(y, x)


def learning_rate(lr: float, done: float) -> float:
    """Linear up to lr and a cosine down to 0, over the share of the run that is done."""
    return lr * min(1.0, done / WARMUP) * 0.5 * (1 + math.cos(math.pi * done))


def train(
    vae: AutoencoderKL, images: Tensor, mirror: bool, arguments: argparse.Namespace
) -> tuple[int, float]:
    """-> (steps, seconds)."""
    device = torch.device(arguments.device)
    optimizer = torch.optim.AdamW(vae.parameters(), arguments.lr, betas=(0.9, 0.99))
    start, said, step, done = time.monotonic(), 0.0, 0, 0.0
    for index in draws(len(images), arguments.batch_size):
        x = from_pixels(images[index].to(device))
        if mirror:
            x = torch.where(torch.rand(len(x), 1, 1, 1, device=device) < 0.5, x.flip(-1), x)
        optimizer.param_groups[0]["lr"] = learning_rate(arguments.lr, done)
        with torch.autocast(device.type, torch.bfloat16, enabled=arguments.precision == "bf16"):
            mean, logvar = posterior(vae, x)
            y = vae.decode(draw(mean, logvar)).sample
        kl = kl_divergence(mean, logvar)
        loss = reconstruction_loss(y.float(), x) + arguments.kl * kl / x[0].numel()
        if not loss.isfinite():
            raise UserError(f"--lr: {arguments.lr:g} is too high: no finite loss at step {step}")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        seconds = time.monotonic() - start
        done = max(seconds / (60 * arguments.minutes), step / (arguments.steps or math.inf))
        if done >= said:
            print(
                f"{done:4.0%}  step {step}, loss {loss.item():.4f}, KL {kl.item():.0f}", flush=True
            )
            said += 0.1
        if done >= 1:
            break
    return step, seconds


# ---- what it has learnt --------------------------------------------------------------------------


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor, batch_size: int) -> Tensor:
    """(n c h w) -> uint8 images on the CPU."""
    parts = latents.split(batch_size)
    return torch.cat([to_pixels(vae.decode(part).sample).cpu() for part in parts])


def psnr(images: Tensor, others: Tensor) -> float:
    """Of the mean squared error over all images, in dB."""
    mse = (images.double() - others.double()).square().mean().item()
    return 10 * math.log10(255**2 / mse) if mse else math.inf


@torch.no_grad()
def moments(
    vae: AutoencoderKL, images: Tensor, arguments: argparse.Namespace
) -> tuple[Tensor, Tensor]:
    """Means and log variances of the latents, of at most MEASURED images, evenly spread."""
    images = spread(images, MEASURED)
    parts = [
        posterior(vae, from_pixels(part.to(arguments.device)))
        for part in images.split(arguments.batch_size)
    ]
    return torch.cat([mean for mean, _ in parts]), torch.cat([logvar for _, logvar in parts])


def measure(
    vae: AutoencoderKL, images: Tensor, held_out: Tensor, arguments: argparse.Namespace
) -> tuple[dict[str, float], Tensor]:
    """-> (figures, reconstructions of the held-out images)."""
    z = draw(*moments(vae, images, arguments))
    mean, logvar = moments(vae, held_out, arguments)
    std = z.std().item()
    noisy = draw(mean, logvar) + NOISE * std * torch.randn_like(mean)
    made, from_noisy = (decode(vae, latents, arguments.batch_size) for latents in (mean, noisy))
    figures = {
        "psnr": psnr(made, held_out),
        "psnr_noisy": psnr(from_noisy, held_out),
        "l1": (made.double() - held_out.double()).abs().mean().item() / 255,
        "latent_mean": z.mean().item(),
        "latent_std": std,
        "kl": kl_divergence(mean, logvar).item(),
        "parameters": sum(p.numel() for p in vae.parameters()),
        "numbers_image": held_out[0].numel(),
        "numbers_latent": mean[0].numel(),
    }
    return figures, made


def scaling(mean: float, std: float) -> dict[str, float]:
    """diffusers' settings that make x0 = (z - shift) scale; no shift where the mean is near 0."""
    shift = {"shift_factor": mean} if abs(mean) > NEAR_ZERO * std else {}
    return {"scaling_factor": 1 / std, **shift}


def table(title: str, figures: dict[str, float]) -> Table:
    rows = {
        "images, held-out ones": "{images:,} + {held_out:,}",
        "steps, seconds": "{steps:,}, {seconds:.0f}",
        "PSNR held-out": "{psnr:.2f} dB",
        f"... with noise of {NOISE:g} on x0": "{psnr_noisy:.2f} dB",
        "L1 held-out, pixels in 0..1": "{l1:.4f}",
        "latents: mean, deviation": "{latent_mean:.3f}, {latent_std:.3f}",
        "KL held-out, nats an image": "{kl:,.0f}",
        "parameters": "{parameters:,}",
        "numbers of an image, a latent": "{numbers_image:,}, {numbers_latent:,}",
    }
    made = Table(title=title, title_justify="left", show_header=False)
    made.add_column()
    made.add_column(justify="right")
    for name, form in rows.items():
        made.add_row(name, form.format(**figures))
    return made


# ---- the command ---------------------------------------------------------------------------------


def check(arguments: argparse.Namespace) -> None:
    """Raises UserError for settings that cannot be, before anything is read."""
    for name in ("size", "latent_channels", "batch_size", "images", "minutes", "lr"):
        if getattr(arguments, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')}: must be above 0")
    if arguments.kl < 0:
        raise UserError("--kl: must not be below 0")
    if arguments.steps is not None and arguments.steps <= 0:
        raise UserError("--steps: must be above 0")
    if arguments.width <= 0 or arguments.width % GROUPS:
        raise UserError(f"--width: must be a multiple of {GROUPS}, got {arguments.width}")
    if arguments.size % arguments.factor:
        raise UserError(f"--size: {arguments.size} is no multiple of --factor {arguments.factor}")
    out = arguments.out
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out: {out} exists, and is no empty folder; name another")
    if importlib.util.find_spec("diffusers") is None:
        raise UserError("diffusers is missing; pip install 'hdit[latent]'")


def run(arguments: argparse.Namespace) -> Table:
    """Writes the folder, whole or not at all -> what there is to tell."""
    check(arguments)
    arguments.precision = precision_on(
        torch.device(arguments.device),
        arguments.precision,
        "--precision",
        lambda text: print(f"warning: {text}", file=sys.stderr),
    )
    keep_freed_memory()
    torch.manual_seed(arguments.seed)
    with whole(arguments.out) as folder:
        folder.mkdir()  # before the training, to fail where nothing can be written
        images, held_out, mirror = read(arguments)
        vae = build(arguments).to(arguments.device)
        with float32_products(arguments.precision):
            steps, seconds = train(vae, images, mirror, arguments)
        vae.eval()
        held_out = spread(held_out, MEASURED)
        figures, made = measure(vae, images, held_out, arguments)
        figures |= {
            "images": len(images),
            "held_out": len(held_out),
            "steps": steps,
            "seconds": round(seconds, 1),
        }
        vae.register_to_config(**scaling(figures["latent_mean"], figures["latent_std"]))
        vae.save_pretrained(folder)
        pictures = (spread(x, COLUMNS * PAIRS).split(COLUMNS) for x in (held_out, made))
        shown = zip(*pictures, strict=True)
        save_grid(torch.cat([row for pair in shown for row in pair]), folder / PICTURE, COLUMNS)
        settings = {
            name: str(v) if isinstance(v, Path) else v for name, v in vars(arguments).items()
        }
        report = json.dumps({"settings": settings, "figures": figures}, indent=2)
        (folder / "training.json").write_text(report + "\n", encoding="utf-8")
    return table(str(arguments.out), figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("path", help="folder, .zip or .npz of images, as data.path")
    add("--out", type=Path, required=True, help="folder to write; it must not exist")
    add("--size", type=int, default=64, help="side of the images in pixels")
    add("--channels", type=int, default=3, choices=[1, 3], help="3 for RGB, 1 for grey")
    add("--factor", type=int, default=4, choices=[4, 8], help="pixels along the side of a latent")
    add("--latent-channels", type=int, default=4)
    add("--width", type=int, default=16, help="channels at full size; 4 times as many below")
    add("--minutes", type=float, default=9.0, help="length of the training")
    add("--steps", type=int, help="end after so many, if that is sooner")
    add("--batch-size", type=int, default=8)
    add("--lr", type=float, default=2e-3, help="highest learning rate")
    add(
        "--kl",
        type=float,
        default=3e-3,
        help="weight of the KL against the summed error of an image",
    )
    add("--images", type=int, default=20_000, help="read at most so many, evenly spread")
    add(
        "--precision",
        default="auto",
        choices=["auto", *PRECISIONS],
        help="bf16 if the hardware multiplies it, else fp32 [auto]",
    )
    add("--device", default=default_device().type)
    add("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        Console().print(run(arguments))
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped: nothing is written", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
