"""What lies at a path: data, a model or a config, told by what is in it rather than by its name.

Only where a file is too damaged to tell, or not there yet, its name decides. What a model's folder
looks like is known here, below the packages that read it, so that all verbs tell alike.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from hdit.arrays import UNREADABLE
from hdit.data.source import DataError
from hdit.errors import UserError
from hdit.names import path_of
from hdit.reading import read_object

DATA = ("folder", "zip", "npz", "tar", "hub")
MODELS = {
    "run": "a run",
    "checkpoint": "a checkpoint",
    "converted": "a converted model",
    "diffusers": "a model of diffusers",
    "weights": "a file of weights",
}
"""Models in words, by kind."""

OTHERS = {"config": "a config", "latents": "a folder of stored latents"}

COMPRESSED_TARS = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
WEIGHTS = (".safetensors", *PICKLES)
BY_SUFFIX = {".zip": "zip", ".npz": "npz", ".tar": "tar", ".toml": "config"}
LATEST, BEST = "latest", "best"  # files beside a run's checkpoints that name one of them
OWN = ("samples", "checkpoints", "assets")  # of a model, whose images there are no data set
MAX_MANIFEST = 2**24  # bytes of a file that says what a folder is


def kind_of(path: str) -> str | None:
    """The kind of data source that a path tells; None where it is a file of another kind.

    Raises DataError for a model, and for a folder that is both a model and images.
    """
    kind = what_is(path)
    if kind in DATA:
        return kind
    if kind in MODELS:
        raise DataError(f"{path!r} is {MODELS[kind]}, and no data set")
    if kind == "latents":
        raise DataError(f"{path!r} is {OTHERS[kind]}; set space.stored to it, and the images here")
    return None if os.path.exists(path_of(path)) else "folder"


def what_is(path: str | Path) -> str | None:
    """One of DATA, MODELS or OTHERS; None for what is none of them.

    A path that is not there is told by its name. Raises DataError for a folder that is both a model
    and images.
    """
    place = path_of(path) if isinstance(path, str) else path
    if os.path.isdir(place):  # False where several names in braces are too long for one
        return _kind_of_folder(place)
    return _by_content(place) if os.path.isfile(place) else _by_name(place)


def names_checkpoint(path: Path) -> bool:
    """Whether a path is the file beside a run's checkpoints that names the newest or best one."""
    return (
        path.name in (LATEST, BEST)
        and path.absolute().parent.name == "checkpoints"
        and os.path.isfile(path)
    )


def _by_name(path: Path) -> str | None:
    name, suffix = path.name.lower(), path.suffix.lower()
    if os.path.exists(path):  # a device or pipe, which is not read
        return None
    if name.endswith(COMPRESSED_TARS):
        return "tar"  # which refuses them with the reason
    return BY_SUFFIX.get(suffix)


# ---- files ---------------------------------------------------------------------------------------


def _by_content(path: Path) -> str | None:
    """The kind of a regular file, by its first bytes, or by its name where they tell nothing."""
    if names_checkpoint(path):
        return "checkpoint"
    name, suffix = path.name.lower(), path.suffix.lower()
    try:
        with path.open("rb", buffering=0) as file:
            start = file.read(512)
    except OSError:
        start = b""  # whoever opens it says why it cannot be read
    if start.startswith(b"PK\x03\x04"):
        return _kind_of_archive(path, start, suffix)
    if start[257:262] == b"ustar":
        return "tar"
    if start[8:9] == b"{" and 2 <= int.from_bytes(start[:8], "little") < path.stat().st_size:
        return "weights"  # of safetensors
    if name.endswith(COMPRESSED_TARS):
        return "tar"
    return "weights" if suffix in WEIGHTS else BY_SUFFIX.get(suffix)


def _kind_of_archive(path: Path, start: bytes, suffix: str) -> str:
    """npz, zip, or a file of torch.save, by the first member of a zip; by all where it is odd."""
    size = int.from_bytes(start[26:28], "little")
    first = start[30 : 30 + size].decode("utf-8", "replace")
    if first.endswith(".npy") and suffix == ".npz":
        return "npz"
    if not first.endswith((".npy", "data.pkl")) and suffix not in (".npz", *PICKLES):
        return "zip"
    try:
        with zipfile.ZipFile(path) as file:
            names = [name for name in file.namelist() if not name.endswith("/")]
    except UNREADABLE:
        return suffix[1:] if suffix in (".npz", ".zip") else "weights"
    if all(any(name.endswith(f"/{part}") for name in names) for part in ("data.pkl", "version")):
        return "weights"
    arrays = [name for name in names if name.endswith(".npy")]
    return "npz" if arrays and (suffix == ".npz" or len(arrays) == len(names)) else "zip"


# ---- folders -------------------------------------------------------------------------------------


def _kind_of_folder(path: Path) -> str:
    """A model where all that makes one is there; else images, if there are any."""
    kind, whole = kind_of_model(path)
    if kind is None:
        return "hub" if _is_hub(path) else "latents" if _is_latents(path) else "folder"
    images = list(islice(_images(path), 2))
    if whole and len(images) > 1:  # one may be the picture of the model's card
        raise DataError(
            f"{str(path)!r} is both {MODELS[kind]} and a folder of images, as {images[0]!r}; move "
            "one of them elsewhere, and name the one that is meant"
        )
    return kind if whole or not images else "folder"


def kind_of_model(path: Path) -> tuple[str | None, bool]:
    """(kind of model that a folder holds, or None; whether it is surely one, damaged or not)."""
    if _is_run(path):
        return "run", True
    if _is_checkpoint(path):
        return "checkpoint", True
    has_weights = os.path.isfile(path / "model.safetensors")
    config = _object(path / "config.json")
    if config is not None and "hdit_format" in config:
        return "converted", has_weights
    if has_weights and config is None and os.path.exists(path / "config.json"):
        return "converted", True  # whose config.json is damaged
    for folder in (path, path / "transformer"):
        own, is_there = _object(folder / "config.json"), os.path.exists(folder / "config.json")
        weights = is_there and any(name.endswith(WEIGHTS) for name in _names(folder))
        if "_class_name" in own if own is not None else weights:
            return "diffusers", weights
    return None, False


def _is_run(path: Path) -> bool:
    """A checkpoint, or what `hdit train` writes before the first one."""
    if os.path.isfile(path / "config.toml") and (
        os.path.isdir(path / "checkpoints") or os.path.isfile(path / "metrics.jsonl")
    ):
        return True
    numbered = [name for name in _names(path / "checkpoints") if re.fullmatch("[0-9]+", name)]
    return any(
        os.path.isfile(path / "checkpoints" / name / file)
        for name in numbered
        for file in ("manifest.json", "state.json", "model.safetensors")
    )


def _is_checkpoint(path: Path) -> bool:
    if not os.path.isfile(path / "manifest.json"):
        return False
    manifest = _object(path / "manifest.json")
    if manifest is None:  # damaged
        return os.path.isfile(path / "state.json") and os.path.isfile(path / "model.safetensors")
    files = manifest.get("files")
    return isinstance(files, dict) and "state.json" in files


def _is_latents(path: Path) -> bool:
    manifest = _object(path / "manifest.json")
    return manifest is not None and {"vae", "latent", "shard_size"} <= manifest.keys()


def _is_hub(path: Path) -> bool:
    """A folder of datasets' save_to_disk: of one split, or of several."""
    state, splits = _object(path / "state.json"), _object(path / "dataset_dict.json")
    one = state is not None and "_data_files" in state
    return one or (splits is not None and "splits" in splits)


def _object(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is none, or it is damaged."""
    try:
        return read_object(path, MAX_MANIFEST)
    except (FileNotFoundError, UserError):
        return None


def _names(folder: Path) -> list[str]:
    """What lies in a folder; nothing if it is none, or cannot be listed."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _images(path: Path) -> Iterator[str]:
    """Images in a folder and its sub-folders, but for those that are samples of a model."""
    known = Image.registered_extensions()
    folders = sorted(name for name in _names(path) if not name.startswith(".") and name not in OWN)
    for folder in ("", *folders):
        if folder and os.path.isfile(path / folder / "samples.json"):
            continue
        for name in sorted(_names(path / folder)):
            if os.path.splitext(name)[1].lower() in known and not name.startswith("."):
                yield os.path.join(folder, name)
