"""Checkpoints: folders of safetensors that are either complete or not there.

A checkpoint is written under a hidden name, its manifest with the checksums of all files last, and
then renamed. `latest` beside them names the newest. What does not match its manifest is not loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from hdit.config import RunConfig, parse, read_toml
from hdit.errors import UserError
from hdit.files import fingerprint, whole, write_text
from hdit.protocols import DataShape
from hdit.tensors import check_finite, save_tensors

FORMAT = 1
MANIFEST = "manifest.json"


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
        """Those of model, ema or optimizer, on the CPU. Raises NotFiniteError."""
        path = self.folder / f"{name}.safetensors"
        tensors = load_file(path)
        check_finite(
            tensors,
            str(path),
            f"use another checkpoint; without {self.folder}, a run goes on from the one before",
        )
        return tensors


def folder_name(images: int) -> str:
    """The name of the checkpoint's folder after so many images."""
    return f"{images:012d}"


def save(
    root: Path, config: RunConfig, state: State, tensors: Mapping[str, dict[str, Tensor]]
) -> Path:
    """Writes root/<images> whole, or nothing. Returns the folder."""
    final = root / folder_name(state.images)
    with whole(final) as part:
        part.mkdir()
        for name, values in tensors.items():
            save_tensors(values, part / f"{name}.safetensors")
        (part / "config.toml").write_text(config.dump(), encoding="utf-8")
        (part / "state.json").write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
        files = {path.name: fingerprint(path) for path in sorted(part.iterdir())}
        manifest = {"format": FORMAT, "files": files}
        (part / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    write_text(root / "latest", final.name + "\n")
    return final


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
        found = fingerprint(path)
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
    """The checkpoint at `path`: its own folder, or the newest of a run."""
    if (path / MANIFEST).is_file():
        return open_checkpoint(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such run or checkpoint; `hdit train` makes runs")
    checkpoint = newest(path / "checkpoints", warn)
    if checkpoint is None:
        raise CheckpointError(
            f"{path}: neither a run with checkpoints/, a checkpoint with {MANIFEST}, a converted "
            "model, nor a model of diffusers with config.json"
        )
    return checkpoint
