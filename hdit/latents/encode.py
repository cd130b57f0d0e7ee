"""`hdit encode`: the images of a config through its VAE, once, into a folder of posteriors."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hdit.config.schema import RunConfig
from hdit.data import DataSpec, held_out
from hdit.data.batches import in_order
from hdit.data.held_out import Divisible
from hdit.data.images import ImagesSpec, too_many
from hdit.data.kinds import what_is
from hdit.data.source import (
    DataError,
    Skipped,
    Source,
    Stream,
    check_classes,
    references,
    warnings_of,
)
from hdit.device import float32_products
from hdit.errors import UserError
from hdit.latents.store import (
    Latents,
    Manifest,
    begin,
    missing,
    remove_parts,
    shard_path,
    write_shard,
)
from hdit.processes import read_world
from hdit.spaces import LatentSpace
from hdit.spaces.vae import VAE

DTYPES = {"float32": torch.float32, "float16": torch.float16}


class Encoded(NamedTuple):
    """The shards that one process wrote, and what is there then."""

    images: int  # of all processes, in the end
    shards: int  # by this one
    absent: int  # shards that other processes are still at
    bytes: int
    sigma_data: float | None  # measured over a part, once all is there


def manifest_of(
    config: RunConfig, space: VAE, images: int, classes: list[str], dtype: str, shard_size: int
) -> Manifest:
    """Describes latents by these settings; `dtype` and `shard_size` as `hdit encode` takes them."""
    data, spec = config.data, config.space
    assert isinstance(spec, LatentSpace), "or it would have no VAE"
    shape = data.shape
    return Manifest(
        vae=space.identity,
        scale=space.scale.flatten().tolist(),
        shift=space.shift.flatten().tolist(),
        tile=spec.tile if spec.tile and max(shape[1:]) > spec.tile else 0,
        image=list(shape),
        latent=list(spec.shape(*shape)),
        crop=data.crop if isinstance(data, ImagesSpec) else "",
        background=data.background if isinstance(data, ImagesSpec) else "",
        flips=2 if data.flip else 1,
        dtype=dtype,
        images=images,
        shard_size=shard_size,
        classes=classes,
        origin=origin_of(data),
    )


SETTINGS = ["vae", "scale", "shift", "tile", "image", "latent", "crop", "background"]
"""Settings in which training must agree with the latents that it reads."""

ORIGIN = (
    "kind",
    "path",
    "name",
    "config",
    "split",
    "image_column",
    "label_column",
    "label_key",
    "hook",
)


def origin_of(data: DataSpec) -> str:
    """Names the data in words, as in "kind=folder path=photos"."""
    pairs = ((key, getattr(data, key, None)) for key in ORIGIN)
    return " ".join(f"{key}={value}" for key, value in pairs if value is not None)


def open_training_source(config: RunConfig, space: object) -> Source | Stream:
    """Opens what training draws from: the images, or what is stored of them. Raises DataError."""
    if isinstance(space, VAE):
        space.check_channels(config.data.shape[0])
    stored = config.space.stored if isinstance(config.space, LatentSpace) else None
    if stored is None:
        return config.data.open()
    assert isinstance(space, VAE)
    latents = Latents(stored)
    flips = ["flips"] if config.data.flip else []
    check_classes(getattr(config.data, "classes", None), latents.classes, stored)
    latents.check(manifest_of(config, space, 0, [], "", 1), SETTINGS + flips)
    return latents


def open_held_out(
    config: RunConfig, space: object, path: str, classes: list[str]
) -> tuple[Divisible, list[int]]:
    """Opens held-out images, or stored latents of some, at a path.

    -> (the source, the index of each of its classes among those of the data). Raises DataError,
    which names data.held_out, also for a class that the data has not.
    """
    if what_is(path) != "latents":
        source = held_out.open_path(config.data, path, classes)
    else:
        if not isinstance(space, VAE):
            raise DataError(
                f"data.held_out: {path!r} is a folder of stored latents, which needs "
                "space.kind = 'latent'; name the images"
            )
        with held_out.naming_held_out():
            latents = Latents(path)
            latents.check(manifest_of(config, space, 0, [], "", 1), SETTINGS)
        source = latents
    return source, held_out.class_indices(source.classes, classes, path)


def encode(
    config: RunConfig,
    folder: Path,
    *,
    batch_size: int = 16,
    workers: int = 0,
    dtype: str = "float32",
    shard_size: int = 1024,
    rank: int = 0,
    processes: int = 1,
    on_start: Callable[[int], None] = lambda images: None,
    on_images: Callable[[int], None] = lambda n: None,
    on_skipped: Callable[[Skipped], None] = lambda file: None,
    warn: Callable[[str], None] = lambda text: None,
) -> Encoded:
    """Writes the shards that are not there yet, of which this process takes its part.

    `on_start` is called with the number of its images, `on_images` after each batch of them.

    Raises UserError where the config has no VAE, its images cannot be stored, or the folder
    holds others.
    """
    space = _open_vae(config)
    source = config.data.open()
    for text in warnings_of(source) if rank == 0 else []:
        warn(text)
    refs = references(source)
    manifest = manifest_of(config, space, len(refs), source.classes, dtype, shard_size)
    begin(folder, manifest)
    ours = [i for i in missing(folder, manifest) if i % processes == rank]
    ranges = [manifest.range_of(shard) for shard in ours]
    on_start(sum(map(len, ranges)))
    parts = [r[at : at + batch_size] for r in ranges for at in range(0, len(r), batch_size)]
    batches = in_order(source, [[refs[i] for i in part] for part in parts], workers)
    bad: set[str] = set()
    seen = 0
    for shard, r in zip(ours, ranges, strict=True):
        posterior: list[Tensor] = []
        labels: list[Tensor] = []
        for batch in islice(batches, -(-len(r) // batch_size)):
            for file in batch.skipped:
                bad.add(file.path)
                on_skipped(file)
            posterior.append(_posterior(space, batch.images, manifest))
            labels.append(batch.labels)
            on_images(len(batch.labels))
        seen += len(r)
        _judge(config, len(bad), seen, manifest.images)
        write_shard(folder, shard, torch.cat(posterior), torch.cat(labels), space.identity)
    return _summary(folder, manifest, len(ours), space)


def _open_vae(config: RunConfig) -> VAE:
    """Opens the VAE of a config whose images can be stored. Raises UserError for another."""
    data = config.data
    if not isinstance(config.space, LatentSpace):
        raise UserError(f"space.kind: must be 'latent' to encode, got {config.space.kind!r}")
    if data.augment.probability:
        raise UserError("data.augment: must be 0 to encode: its changes are new at each draw")
    if isinstance(data, ImagesSpec) and data.crop == "random":
        raise UserError("data.crop: must not be 'random' to encode: its windows are new each time")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", read_world().local_rank % torch.cuda.device_count())
    return config.space.open(device)


def _posterior(space: VAE, images: Tensor, manifest: Manifest) -> Tensor:
    """Encodes images (b c h w) to be stored: (b f 2c h w) on the CPU. Raises UserError."""
    dtype = manifest.dtype
    stored = encode_batch(space, images.to(space.device), manifest.flips).to("cpu", DTYPES[dtype])
    if not stored.isfinite().all():
        raise UserError(f"space.vae: {space.name!r} gives latents that are not finite in {dtype}")
    return stored


def _summary(folder: Path, manifest: Manifest, shards: int, space: VAE) -> Encoded:
    """Counts what is there after this process wrote `shards`; measures sigma_data once all is."""
    left = missing(folder, manifest)
    there = (shard_path(folder, i) for i in set(range(manifest.shards)) - set(left))
    size = sum(path.stat().st_size for path in there)
    sigma = None
    if not left:
        remove_parts(folder)
        sigma = measure_sigma_data(Latents(folder), space)
    return Encoded(manifest.images, shards, len(left), size, sigma)


def encode_batch(space: VAE, images: Tensor, flips: int) -> Tensor:
    """Encodes images (b c h w) -> (b f 2c h w); with 2 `flips`, their mirror images too."""
    views = [images, images.flip(-1)][:flips]
    with float32_products("fp32"):  # or CUDA would round what it convolves
        return torch.stack([space.encode(view) for view in views], 1)


def _judge(config: RunConfig, bad: int, seen: int, images: int) -> None:
    """Raises DataError where too many images are bad, for each worker has seen but its own."""
    data = config.data
    if not isinstance(data, ImagesSpec):
        return
    if too_many(bad, seen, images, data.bad_share):
        raise DataError(
            f"data: {bad} of {seen} images so far are bad, beyond data.max_bad_share = "
            f"{data.bad_share:g}"
        )


def measure_sigma_data(latents: Latents, space: VAE, limit: int = 4096) -> float:
    """Standard deviation of x0 over all elements, from evenly chosen images, in float64.

    By the law of total variance, of a posterior with mean m and deviation s: E[m^2 + s^2] - E[m]^2.
    """
    chosen = torch.linspace(0, len(latents) - 1, min(limit, len(latents))).long().unique().tolist()
    first = second = 0.0
    count = 0
    for index in chosen:
        mean, std = latents[index].image.double().chunk(2, 1)  # (f c h w)
        scale, shift = space.scale.double().cpu(), space.shift.double().cpu()
        mean, std = (mean - shift) * scale, std * scale
        first += mean.sum().item()
        second += (mean**2 + std**2).sum().item()
        count += mean.numel()
    return (second / count - (first / count) ** 2) ** 0.5
