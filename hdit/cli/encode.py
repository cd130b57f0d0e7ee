"""hdit encode"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hdit.cli.options import BATCH_SIZE, ConfigFile, Overrides
from hdit.cli.output import error_console, progress
from hdit.limits import MAX_BATCH
from hdit.messages import message, say
from hdit.names import printable

if TYPE_CHECKING:
    from rich.console import Console

    from hdit.data.source import Skipped


def encode(
    config: ConfigFile,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The folder.  [default: space.stored of CONFIG]"),
    ] = None,
    batch_size: Annotated[int, BATCH_SIZE] = 16,
    dtype: Annotated[
        str, typer.Option(metavar="NAME", help="float32, or float16 for half the bytes.")
    ] = "float32",
    shard_size: Annotated[int, typer.Option(min=1, max=MAX_BATCH, help="Images in a file.")] = 1024,
    overrides: Overrides = None,
) -> None:
    """Encode a config's images with its VAE once, for training to read as latents.

    The folder gets shards of posteriors (mean and standard deviation, of the mirror images too),
    labels and a manifest. The same command goes on after an interrupt; torchrun shares it among
    processes. Train with --set space.stored=DIR.
    """
    from hdit.config import load
    from hdit.config.presets import find_config
    from hdit.device import keep_freed_memory
    from hdit.errors import UserError
    from hdit.latents.encode import DTYPES
    from hdit.latents.encode import encode as encode_images
    from hdit.names import path_of
    from hdit.processes import read_world
    from hdit.signals import noting

    world = read_world()
    settings = load(find_config(config), overrides or [])
    stored = getattr(settings.space, "stored", None)
    if dtype not in DTYPES:
        raise UserError(f"--dtype: must be {' or '.join(DTYPES)}, got {dtype!r}")
    folder = out or (path_of(stored) if stored else None)
    if folder is None:
        raise UserError("--out: name the folder to write, or set space.stored")
    keep_freed_memory()
    console = error_console()
    with noting("the same command goes on"), progress(console) as bar:
        task = bar.add_task("encoding", total=None)
        done = encode_images(
            settings,
            folder,
            batch_size=batch_size,
            workers=settings.training.workers,
            dtype=dtype,
            shard_size=shard_size,
            rank=world.rank,
            processes=world.size,
            on_start=lambda images: bar.update(task, total=images),
            on_images=lambda n: bar.advance(task, n),
            on_skipped=_naming(console),
            warn=lambda text: say(console, f"warning: {text}"),
        )
    if done.sigma_data is None:
        left = f"{done.shards} shards written; {done.absent} are still missing"
        typer.echo(message(f"{folder}: {left}"))
        return
    said = (
        f"{folder}: latents of {done.images:,} images, {done.bytes / 2**20:.1f} MiB; standard "
        f"deviation {done.sigma_data:.4f} (space.sigma_data is {settings.space.sigma_data:g})\n"
        f"train with --set space.stored={folder}"
    )
    typer.echo(message(said))


def _naming(console: Console) -> Callable[[Skipped], None]:
    """A function that names each file once, above the bars."""
    named: set[str] = set()

    def name(file: Skipped) -> None:
        if file.path not in named:
            named.add(file.path)
            say(console, f"warning: skipped {printable(file.path)}: {file.reason}")

    return name
