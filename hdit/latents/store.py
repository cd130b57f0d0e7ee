"""Stored latents: a VAE's posteriors, which `hdit encode` writes and training reads.

A folder of `shard-00000.safetensors`, ... and `manifest.json`. A shard has, of its n images,
`posterior` (n f 2c h w), which is mean and standard deviation of the image and, with f = 2, of its
mirror image; and `labels` (n,) int64. It is either whole or not there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from hdit.bounds import ImageCount, Name, Side
from hdit.data.source import DataError, Sample
from hdit.errors import UserError, WritingError
from hdit.files import make_folder, whole
from hdit.limits import MAX_IMAGES, MAX_SIDE
from hdit.locks import LOCK, locked
from hdit.manifest import FormatError, check_format, explain
from hdit.names import escape, path_of
from hdit.protocols import Spec
from hdit.reading import read_object
from hdit.tensors import is_finite, open_tensors, save_tensors

FORMAT = 1
MANIFEST = "manifest.json"
MAX_SHARDS = 10**6
DTYPES = {"float32": "F32", "float16": "F16"}  # as safetensors name them
OPEN_SHARDS = 256  # files that a process holds open
ABANDONED = 3600  # seconds after which nobody writes a part any more


Factor = Annotated[float, Field(ge=-1e6, le=1e6)]


class Manifest(Spec):
    """Description of the latents of a folder: what made them, and how they lie there."""

    vae: Name  # its identity
    scale: list[Factor]  # of the VAE, for all channels or each; not applied to what is stored
    shift: list[Factor]
    tile: Annotated[int, Field(ge=0, le=MAX_SIDE)]  # side in pixels; 0 where images are taken whole
    image: Annotated[list[Side], Field(min_length=3, max_length=3)]  # channels, height, width
    latent: Annotated[list[Side], Field(min_length=3, max_length=3)]
    crop: str
    background: str
    flips: Literal[1, 2]  # 2 with the mirror images
    dtype: str
    images: Annotated[int, Field(ge=0, le=MAX_IMAGES)]
    shard_size: ImageCount  # images; the last shard may have fewer
    classes: list[str]
    origin: str  # the data in words

    @property
    def shards(self) -> int:
        """The number of shards."""
        return -(-self.images // self.shard_size)

    def range_of(self, shard: int) -> range:
        """Indices of the images in a shard."""
        return range(self.images)[shard * self.shard_size : (shard + 1) * self.shard_size]

    def differences(self, other: Manifest, keys: list[str] | None = None) -> list[str]:
        """Lists what differs in `other`, of `keys` alone if given, a line each."""
        ours, theirs = self.model_dump(), other.model_dump()
        return [
            f"{KEYS.get(key, key)}: {_short(ours[key])} there, {_short(theirs[key])} here"
            for key in ours
            if ours[key] != theirs[key] and (keys is None or key in keys)
        ]


KEYS = {
    "vae": "space.vae (hash)",
    "scale": "the VAE's scaling_factor",
    "shift": "the VAE's shift_factor",
    "tile": "space.tile",
    "image": "data.size and channels",
    "crop": "data.crop",
    "background": "data.background",
    "flips": "data.flip (2 is with mirror images)",
    "dtype": "--dtype",
    "images": "number of images",
    "shard_size": "--shard-size",
    "origin": "data",
}


def _short(value: Any) -> str:
    return f"{value!r:.40}"


# ---- writing -------------------------------------------------------------------------------------


def shard_path(folder: Path, shard: int) -> Path:
    """The file of a shard."""
    return folder / f"shard-{shard:05d}.safetensors"


def begin(folder: Path, manifest: Manifest) -> None:
    """Makes the folder, or goes on with one of the same manifest. Raises DataError for another.

    Of processes that come at the same time, one makes it.
    """
    _check_shards(manifest, str(folder))
    if (folder / MANIFEST).exists() or folder.is_file():
        return _begin(folder, manifest)
    with locked(folder / LOCK, "begins to write latents here", wait=lambda owner: None):
        _begin(folder, manifest)


def _begin(folder: Path, manifest: Manifest) -> None:
    path = folder / MANIFEST
    if path.exists():
        if lines := read_manifest(folder, str(folder)).differences(manifest):
            listing = "\n  ".join(lines)
            raise DataError(
                f"{folder}: holds latents of other settings:\n  {listing}\n"
                "name another folder, or remove this one"
            )
        return
    if folder.exists() and (not folder.is_dir() or any(map(_is_foreign, folder.iterdir()))):
        raise DataError(f"{folder}: is there already and has no {MANIFEST}; name another folder")
    make_folder(folder)
    content = json.dumps({"format": FORMAT} | manifest.model_dump(), indent=1, ensure_ascii=False)
    _replace(path, lambda part: part.write_text(content + "\n", encoding="utf-8"))


def _check_shards(manifest: Manifest, where: str) -> None:
    """Raises DataError for more shards than can be looked for."""
    if manifest.shards > MAX_SHARDS:
        raise DataError(
            f"{where}: {manifest.images:,} images in shards of {manifest.shard_size:,} are more "
            f"than {MAX_SHARDS:,} files; take a larger --shard-size"
        )


def _is_foreign(path: Path) -> bool:
    """Whether a file in a folder without manifest is none of a process that begins it."""
    return path.name != LOCK and not (path.name.startswith(".") and path.suffix == ".part")


def remove_parts(folder: Path) -> None:
    """Removes what processes that were killed have left in a folder that is complete."""
    for part in folder.glob(".*.part"):
        with suppress(FileNotFoundError):
            if time.time() - part.stat().st_mtime > ABANDONED:
                part.unlink()


def missing(folder: Path, manifest: Manifest) -> list[int]:
    """Lists the shards that are not there yet. Raises DataError for more than can be looked for."""
    _check_shards(manifest, str(folder))
    return [i for i in range(manifest.shards) if not shard_path(folder, i).exists()]


def write_shard(folder: Path, shard: int, posterior: Tensor, labels: Tensor, vae: str) -> None:
    """Writes a shard whole, or nothing. Raises DataError where it cannot be written."""
    tensors = {"posterior": posterior, "labels": labels}
    try:
        _replace(shard_path(folder, shard), lambda part: save_tensors(tensors, part, {"vae": vae}))
    except WritingError as error:
        raise DataError(f"{error}; the same command goes on") from None


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file whole, or not at all, of which other processes may write the same."""
    with whole(path, shared=True) as part:
        write(part)


# ---- reading -------------------------------------------------------------------------------------


def read_manifest(folder: Path, where: str | None = None) -> Manifest:
    """Reads a manifest. Raises DataError, which names `where`, if it is missing or damaged."""
    path = folder / MANIFEST
    where = where or f"space.stored: {str(folder)!r}"
    if not folder.is_dir():
        raise DataError(f"{where} does not exist; `hdit encode CONFIG --out DIR` makes it")
    try:
        raw = read_object(path)
        check_format(raw.pop("format", None), FORMAT, str(path))
        return Manifest.model_validate(raw)
    except FileNotFoundError:
        raise DataError(f"{where} has no {MANIFEST}, which `hdit encode` writes") from None
    except FormatError as error:
        raise DataError(str(error)) from None
    except ValidationError as error:
        reason = explain(error).removeprefix(".")
    except UserError as error:  # of reading, of the format
        reason = str(error).removeprefix(f"{path}: ").removeprefix("damaged: ")
    raise DataError(f"{where}: its {MANIFEST} is damaged: {reason}")


class Latents:
    """Stored posteriors and their labels, by the index of the image."""

    def __init__(self, folder: str | Path, indices: np.ndarray | None = None):
        """Opens a folder, or one that a setting names; of those with `indices` alone, if given.

        Raises DataError if shards are missing.
        """
        self.name = folder if isinstance(folder, str) else escape(str(folder))
        self.folder = path_of(self.name)
        self.manifest = read_manifest(self.folder)
        self.classes = self.manifest.classes
        absent = missing(self.folder, self.manifest)
        if absent:
            raise DataError(
                f"space.stored: {self.name!r} lacks {len(absent)} of {self.manifest.shards} "
                "shards; the same `hdit encode` goes on where it was stopped"
            )
        self._open = lru_cache(OPEN_SHARDS)(self._open_shard)
        self.indices = indices

    def __reduce__(self) -> tuple[Any, ...]:
        """A process that is not a fork opens the folder again."""
        return Latents, (self.name, self.indices)

    def __len__(self) -> int:
        return self.manifest.images if self.indices is None else len(self.indices)

    def content(self, index: int) -> bytes:
        """The bytes of a posterior, as it is stored. See hdit.data.held_out."""
        image, _ = self._read(index)
        return bytes(image.numpy().tobytes())

    def part(self, indices: np.ndarray) -> Latents:
        """The latents of these images alone."""
        return Latents(self.name, indices if self.indices is None else self.indices[indices])

    def __getitem__(self, index: int) -> Sample:
        """A sample whose image is a posterior (f 2c h w), as above. Raises DataError."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        image, label = self._read(index)
        if not is_finite(image):
            shard, place = self._place(index)
            raise DataError(
                f"{shard_path(self.folder, shard)}: damaged: the latents of its image {place} are "
                "not finite; remove it, and the same `hdit encode` makes it anew"
            )
        return Sample(image, label)

    def _place(self, index: int) -> tuple[int, int]:
        """The shard of an image, and its place in that."""
        among_all = index if self.indices is None else int(self.indices[index])
        return divmod(among_all, self.manifest.shard_size)

    def _read(self, index: int) -> tuple[Tensor, int]:
        shard, place = self._place(index)
        posterior, labels = self._open(shard)
        return posterior[place], int(labels[place])

    def _open_shard(self, shard: int) -> tuple[Any, np.ndarray]:
        path = shard_path(self.folder, shard)
        m = self.manifest
        shape = [len(m.range_of(shard)), m.flips, 2 * m.latent[0], *m.latent[1:]]
        try:
            if not path.is_file():
                raise OSError("is no regular file")
            file = open_tensors(path)
            labels = file.get_tensor("labels").numpy()
            posterior = file.get_slice("posterior")
            found = posterior.get_shape()
            vae = (file.metadata() or {}).get("vae")
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"{path}: damaged: {error}; remove it, and the same `hdit encode` makes it anew"
            ) from None
        if (
            (found, posterior.get_dtype(), vae) != (shape, DTYPES.get(m.dtype), m.vae)
            or (labels.shape, labels.dtype) != ((shape[0],), np.int64)
            or not all(0 <= label < max(1, len(m.classes)) for label in set(labels.tolist()))
        ):
            raise DataError(f"{path}: is not of this folder's {MANIFEST}; remove it and encode it")
        return posterior, labels

    def check(self, expected: Manifest, keys: list[str]) -> None:
        """Raises DataError where these are not the latents that the settings ask for."""
        if lines := self.manifest.differences(expected, keys):
            listing = "\n  ".join(lines)
            raise DataError(
                f"space.stored: {self.name!r} holds latents of other settings:\n  {listing}\n"
                "undo the change, or encode them anew into another folder"
            )


def choose(posterior: Tensor, mirrored: Tensor | None) -> Tensor:
    """Picks of posteriors (b f 2c h w) -> (b 2c h w) the mirror image's where `mirrored` (b,)."""
    if mirrored is None:
        return posterior[:, 0]
    return torch.where(mirrored[:, None, None, None], posterior[:, 1], posterior[:, 0])
