"""Checkpoints: folders of safetensors that are either complete or not there.

A checkpoint is written under a hidden name, its manifest with the checksums of all files last, and
then renamed. `latest` beside them names the newest. What does not match its manifest is not loaded.

The folder of a converted model, which `hdit convert` writes, is read here too: one set of weights
and all that sampling needs.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hdit import models
from hdit.config import RunConfig, parse, read_toml
from hdit.errors import UserError
from hdit.protocols import DataShape

FORMAT = 1
MANIFEST = "manifest.json"
EXPORT_FORMAT = 1
EXPORT_CONFIG, EXPORT_WEIGHTS = "config.json", "model.safetensors"


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or does not fit, and what to do."""


@dataclass(frozen=True)
class State:
    """Where a run stands, and the facts that the model was built from."""

    images: int
    step: int
    data_size: int | None  # images in the data set; None of a stream
    shape: DataShape
    classes: tuple[str, ...]
    noise_scale: tuple[float, float, int] = (0.0, 0.0, 0)  # of the gradient, as it is averaged
    space: str = ""  # identity of the VAE, where there is one
    stream: dict[str, Any] | None = None  # where a stream of images stands


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    config: RunConfig
    state: State

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Those of model, ema or optimizer, on the CPU."""
        return load_file(self.folder / f"{name}.safetensors")

    def weights(self, raw: bool) -> str:
        """The name of those to sample with: as trained, or their EMA."""
        return "model" if raw else "ema"


@dataclass(frozen=True)
class Export(Checkpoint):
    """The folder of a converted model. It has one set of weights, `held`.

    That is "ema", or "model" as trained, or "given" where its origin does not say.
    """

    held: str
    origin: str  # in words

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The model's, whatever they are called, once they are those that its settings ask for."""
        path = self.folder / EXPORT_WEIGHTS
        try:
            tensors = load_file(path)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: missing from the converted model") from None
        except SafetensorError as error:
            raise CheckpointError(f"{path}: damaged: {error}") from None
        shapes = {key: tuple(t.shape) for key, t in tensors.items()}
        check_shapes(path, shapes, expected_shapes(self.config, self.state.shape))
        return tensors

    def weights(self, raw: bool) -> str:
        if raw and self.held != "model":
            raise CheckpointError(
                f"{self.folder}: was converted with one set of weights, {self.held!r}; "
                "leave --raw out"
            )
        return self.held


Shapes = dict[str, tuple[int, ...]]


def expected_shapes(config: RunConfig, shape: DataShape) -> Shapes:
    """Names and shapes of the model's parameters and buffers, in its own order."""
    with torch.device("meta"):
        model = models.build(config.model, shape, config.output_channels(shape))
    return {name: tuple(t.shape) for name, t in model.state_dict().items()}


def check_shapes(path: Path, found: Shapes, expected: Shapes, limit: int = 12) -> None:
    """Raises CheckpointError with each tensor that is missing, unknown or of another shape."""
    lines = [f"{k}: missing, {list(s)} expected" for k, s in expected.items() if k not in found]
    lines += [f"{k}: unknown, {list(s)}" for k, s in found.items() if k not in expected]
    lines += [
        f"{key}: is {list(found[key])}, {list(shape)} expected"
        for key, shape in expected.items()
        if key in found and found[key] != shape
    ]
    if lines:
        more = [f"and {len(lines) - limit} more"] if len(lines) > limit else []
        listing = "\n  ".join(lines[:limit] + more)
        raise CheckpointError(f"{path}: its tensors are not those of the model:\n  {listing}")


def folder_name(images: int) -> str:
    return f"{images:012d}"


def save(
    root: Path, config: RunConfig, state: State, tensors: Mapping[str, dict[str, Tensor]]
) -> Path:
    """Writes root/<images> whole, or nothing. Returns the folder."""
    final = root / folder_name(state.images)
    part = root / f".{final.name}.part"
    if part.exists():
        shutil.rmtree(part)
    part.mkdir(parents=True)
    for name, values in tensors.items():
        path = part / f"{name}.safetensors"
        try:
            save_file({key: t.contiguous() for key, t in values.items()}, path)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: cannot be written: {error}") from None
    (part / "config.toml").write_text(config.dump(), encoding="utf-8")
    (part / "state.json").write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
    files = {path.name: _fingerprint(path) for path in sorted(part.iterdir())}
    manifest = {"format": FORMAT, "files": files}
    (part / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in [*part.iterdir(), part]:
        _sync(path)
    os.replace(part, final)
    _sync(root)
    write_atomically(root / "latest", final.name + "\n")
    return final


def write_atomically(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    _sync(part)
    os.replace(part, path)


def _sync(path: Path) -> None:
    """Waits until a file's contents, or a folder's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in a folder, once all its files match the manifest; else CheckpointError."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        expected = dict(manifest["files"])
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: is no checkpoint: it has no {MANIFEST}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: damaged: {error}") from None
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder}: has format {manifest.get('format')!r}, this version reads {FORMAT}"
        )
    for name, wanted in expected.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing from the checkpoint")
        found = _fingerprint(path)
        if found["bytes"] != wanted["bytes"]:
            sizes = f"has {found['bytes']} bytes of {wanted['bytes']}"
            raise CheckpointError(f"{path}: damaged: {sizes}")
        if found["sha256"] != wanted["sha256"]:
            raise CheckpointError(f"{path}: damaged: its checksum is not the manifest's")
    raw = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    try:
        shape, classes = DataShape(**raw.pop("shape")), tuple(raw.pop("classes"))
        noise_scale = tuple(raw.pop("noise_scale", State.noise_scale))
        state = State(**raw, shape=shape, classes=classes, noise_scale=noise_scale)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / 'state.json'}: of another version: {error}") from None
    return Checkpoint(folder, parse(read_toml(folder / "config.toml"), str(folder)), state)


def is_export(folder: Path) -> bool:
    """Whether a folder says of itself that it is a converted model, or looks like a damaged one."""
    try:
        raw = json.loads((folder / EXPORT_CONFIG).read_text(encoding="utf-8"))
    except OSError:
        return False
    except ValueError:
        return (folder / EXPORT_WEIGHTS).is_file()
    return isinstance(raw, dict) and "hdit_format" in raw


def open_export(folder: Path) -> Export:
    """The converted model in a folder, its weights not yet read. Raises CheckpointError."""
    path = folder / EXPORT_CONFIG
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None
    if raw["hdit_format"] != EXPORT_FORMAT:
        raise CheckpointError(
            f"{path}: has format {raw['hdit_format']!r}, this version reads {EXPORT_FORMAT}"
        )
    try:
        shape, classes = DataShape(**raw["shape"]), tuple(raw["classes"])
        state = State(raw["images"], 0, 0, shape, classes)
        settings, held, origin = raw["config"], raw["weights"], raw["origin"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged, or of another version: {error}") from None
    return Export(folder, parse(settings, str(path)), state, held, origin)


def export_settings(
    config: RunConfig,
    shape: DataShape,
    classes: tuple[str, ...],
    held: str,
    images: int,
    origin: str,
) -> str:
    """The text of config.json that `open_export` reads."""
    raw = {
        "hdit_format": EXPORT_FORMAT,
        "origin": origin,
        "weights": held,
        "images": images,
        "shape": asdict(shape),
        "classes": classes,
        "config": config.model_dump(mode="json", exclude_none=True),
    }
    return json.dumps(raw, indent=1, ensure_ascii=False) + "\n"


def checkpoint_folders(root: Path) -> list[Path]:
    """All that bear a checkpoint's name, newest first."""
    found = root.iterdir() if root.is_dir() else iter(())
    return sorted((p for p in found if p.is_dir() and p.name.isdigit()), reverse=True)


def newest(root: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest complete checkpoint, or None where there are none at all.

    Each damaged one on the way is named to `warn`. Where all are damaged, CheckpointError.
    """
    folders = checkpoint_folders(root)
    reasons = []
    for folder in folders:
        try:
            checkpoint = open_checkpoint(folder)
        except CheckpointError as error:
            reasons.append(str(error))
            continue
        for reason in reasons:
            warn(f"{reason}; going back to {checkpoint.folder}")
        return checkpoint
    if folders:
        listing = "\n  ".join(reasons)
        raise CheckpointError(f"{root}: no checkpoint is complete:\n  {listing}")
    return None


def find(path: Path, warn: Callable[[str], None]) -> Checkpoint:
    """The checkpoint at `path`: its own folder, a converted model's, or the newest of a run."""
    if (path / MANIFEST).is_file():
        return open_checkpoint(path)
    if is_export(path):
        return open_export(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such run or checkpoint; `hdit train` makes runs")
    checkpoint = newest(path / "checkpoints", warn)
    if checkpoint is None:
        raise CheckpointError(
            f"{path}: neither a run with checkpoints/ nor a checkpoint with {MANIFEST}; "
            "`hdit convert` reads those of other projects"
        )
    return checkpoint
