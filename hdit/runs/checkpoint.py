"""Checkpoints: folders of safetensors that are either complete or not there.

A checkpoint is written under a hidden name, its manifest with the checksums of all files last, and
then renamed. `latest` beside them names the newest. What does not match its manifest is not loaded.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from hdit.config import RunConfig, parse
from hdit.data.kinds import LATEST, names_checkpoint
from hdit.errors import UserError
from hdit.files import to_json, whole, write_text
from hdit.manifest import (
    DamagedError,
    FormatError,
    check_files,
    check_format,
    describe,
    explain,
    read_files,
)
from hdit.protocols import DataShape
from hdit.reading import ReadingError, parse_toml, read_object, read_text
from hdit.runs import sharded
from hdit.tensors import check_finite, load_tensors, open_tensors, save_tensors

FORMAT = 1
MANIFEST = "manifest.json"


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or does not fit, and what to do."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint that is not what was written: the one before it can take its place."""


Count = Annotated[int, Field(ge=0, lt=2**63)]


@dataclass(frozen=True)
class State:
    """Where a run stands, and the facts that the model was built from."""

    images: Count
    step: Count
    data_size: Count | None  # images in the data set; None of a stream
    shape: DataShape
    classes: tuple[str, ...]
    noise_scale: tuple[float, float, int] = (0.0, 0.0, 0)  # of the gradient, as it is averaged
    space: str = ""  # identity of the VAE, where there is one
    stream: dict[str, Any] | None = None  # where a stream of images stands
    passed_over: Count = 0  # images that were drawn and not trained on, after going back
    taken: Count | None = None  # steps that changed the weights, if an average goes by that
    begun: dict[str, Count] = field(default_factory=dict)  # those before each such average

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)


_STATE = TypeAdapter(State)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    config: RunConfig
    state: State

    def sets(self) -> list[str]:
        """The names of its sets of weights: "ema", "model", and those of further averages."""
        if sharded.is_sharded(self.folder):
            found = sharded.sets(self.folder)
        else:
            found = {path.stem for path in self.folder.glob("*.safetensors")}
        usual = [name for name in ("ema", "model") if name in found]
        return [*usual, *sorted(found - {"ema", "model", "optimizer"})]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Those of a set of weights or the optimizer, whole, on the CPU. Raises NotFiniteError."""
        path = self.folder / f"{name}.safetensors"
        try:
            is_sharded = sharded.is_sharded(self.folder)
            tensors = sharded.read(self.folder, name) if is_sharded else load_tensors(path)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: missing from the checkpoint") from None
        except SafetensorError as error:
            raise CheckpointError(f"{path}: damaged: {error}") from None
        self._check_finite(name, tensors)
        return tensors

    def each(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """(key, tensor) as of `tensors`, of which a whole set is never held if it is not sharded.

        Raises NotFiniteError.
        """
        if sharded.is_sharded(self.folder):
            yield from self.tensors(name).items()
            return
        with open_tensors(self.folder / f"{name}.safetensors") as file:
            for key in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(key)
                self._check_finite(name, {key: tensor})
                yield key, tensor

    def names(self, name: str) -> list[str]:
        """The names of the tensors of model, ema or optimizer."""
        if sharded.is_sharded(self.folder):
            return list(sharded.shapes(self.folder, name))
        with open_tensors(self.folder / f"{name}.safetensors") as file:
            return list(file.keys())

    def fill(self, name: str, targets: Mapping[str, Tensor]) -> None:
        """Copies those of model, ema or optimizer into tensors of the same names, in place.

        Of a sharded tensor each process reads its part. Raises CheckpointError where names or
        shapes are not the same, and NotFiniteError.
        """
        if not sharded.is_sharded(self.folder):
            found = self.tensors(name)
            self._check_names(name, {key: t.shape for key, t in found.items()}, targets)
            with torch.no_grad():
                for key, target in targets.items():
                    target.copy_(sharded.part_of(found[key], target))
            return
        self._check_names(name, sharded.shapes(self.folder, name), targets)
        sharded.read_into(self.folder, name, targets)
        self._check_finite(name, {key: sharded.local(t) for key, t in targets.items()})

    def _check_finite(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        check_finite(
            tensors,
            str(self.folder / f"{name}.safetensors"),
            f"use another checkpoint; without {self.folder}, a run goes on from the one before",
        )

    def _check_names(
        self, name: str, found: Mapping[str, torch.Size], targets: Mapping[str, Tensor]
    ) -> None:
        wanted = {key: t.shape for key, t in targets.items()}
        for key in sorted(found.keys() | wanted.keys()):
            if found.get(key) != wanted.get(key):
                have, want = (
                    "none" if s is None else list(s) for s in (found.get(key), wanted.get(key))
                )
                raise CheckpointError(
                    f"{self.folder}: {name}: {key} has shape {have}, and {want} is needed"
                )


def folder_name(images: int) -> str:
    """The name of the checkpoint's folder after so many images."""
    return f"{images:012d}"


def save(
    root: Path,
    config: RunConfig,
    state: State,
    tensors: Mapping[str, dict[str, Tensor]],
    *,
    latest: bool = True,
) -> Path:
    """Writes root/<images> whole, or nothing. Returns the folder."""

    def write(part: Path) -> None:
        for name, values in tensors.items():
            save_tensors(values, part / f"{name}.safetensors")

    return publish(root, config, state, write, latest=latest)


def publish(
    root: Path,
    config: RunConfig,
    state: State,
    write: Callable[[Path], None],
    *,
    latest: bool = True,
) -> Path:
    """Makes root/<images> of what `write` puts into its folder, whole or not at all.

    `latest` names it as the newest in a file beside it.
    """
    final = root / folder_name(state.images)
    with whole(final) as part:
        part.mkdir()
        write(part)
        (part / "config.toml").write_text(config.dump(), encoding="utf-8")
        told = to_json(asdict(state), str(final / "state.json"))
        (part / "state.json").write_text(told, encoding="utf-8")
        manifest = {"format": FORMAT, "files": describe(part)}
        (part / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    if latest:
        write_text(root / LATEST, final.name + "\n")
    return final


def remove(folder: Path) -> None:
    """Deletes a checkpoint: under its name it is whole, or not there at all."""
    hidden = folder.with_name(f".{folder.name}.removed.part")
    with suppress(FileNotFoundError):
        folder.rename(hidden)
        shutil.rmtree(hidden)


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in a folder, once all its files match the manifest.

    Raises DamagedCheckpoint where they do not, and CheckpointError for a checkpoint that is whole
    but of another version, or may not be read.
    """
    path = folder / MANIFEST
    if path.exists() and not os.access(path, os.R_OK):
        raise CheckpointError(f"{path}: may not be read by this user")
    try:
        manifest = read_object(path)
        check_format(manifest.get("format"), FORMAT, str(path))
        check_files(folder, read_files(manifest.get("files"), NEEDED, str(path)))
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{folder}: is no checkpoint: it has no {MANIFEST}") from None
    except ReadingError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise DamagedCheckpoint(f"{path}: damaged: {reason}") from None
    except DamagedError as error:
        raise DamagedCheckpoint(str(error)) from None
    except FormatError as error:
        raise CheckpointError(str(error)) from None
    config = folder / "config.toml"
    settings = parse(parse_toml(read_text(config), str(config)), str(config))
    return Checkpoint(folder, settings, _read_state(folder / "state.json"))


NEEDED = ("config.toml", "state.json")
"""Files that every checkpoint has, besides those of its tensors."""


MAX_STATE = 2**30
"""Bytes: of a stream it holds all images that are shuffled at the time."""


def _read_state(path: Path) -> State:
    """Raises CheckpointError: the file is what was written, so that another version wrote it."""
    try:
        state = _STATE.validate_json(read_text(path, MAX_STATE))
    except ValidationError as error:
        raise CheckpointError(f"{path}: of another version: state{explain(error)}") from None
    shape, names = state.shape, len(state.classes)
    if min(shape.chw) < 1 or not 0 < shape.sigma_data < float("inf") or shape.num_classes != names:
        raise CheckpointError(f"{path}: of another version: {shape} with names of {names} classes")
    return state


def checkpoint_folders(root: Path) -> list[Path]:
    """All that bear a checkpoint's name, newest first; a file would be in the way of one."""
    found = root.iterdir() if root.is_dir() else iter(())
    folders = (p for p in found if re.fullmatch("[0-9]+", p.name))
    return sorted(folders, key=lambda p: int(p.name), reverse=True)


def newest(root: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest complete checkpoint, or None where there are none at all.

    Each damaged one on the way is named to `warn`. Raises CheckpointError where all are damaged,
    and for one that is whole but cannot be used: an older one would not be what was asked for.
    """
    folders = checkpoint_folders(root)
    reasons = []
    for folder in folders:
        try:
            checkpoint = open_checkpoint(folder)
        except DamagedCheckpoint as error:
            reasons.append(str(error))
            continue
        if folder.name != (name := folder_name(checkpoint.state.images)):
            raise CheckpointError(f"{folder}: is the checkpoint {name}; give it its name again")
        for reason in reasons:
            warn(f"{reason}; going back to {checkpoint.folder}")
        return checkpoint
    if folders:
        listing = "\n  ".join(reasons)
        raise CheckpointError(
            f"{root}: no checkpoint is complete; bring one back, or name another run:\n  {listing}"
        )
    return None


def named_by(path: Path) -> Path:
    """The folder that a file beside it names, `latest` or `best`. Raises CheckpointError."""
    try:
        name = read_text(path, 100).strip()
    except ReadingError as error:
        raise CheckpointError(str(error)) from None
    if not re.fullmatch("[0-9]+", name):
        raise CheckpointError(f"{path}: names no checkpoint, but {name!r:.60}")
    return path.with_name(name)


def find(path: Path, warn: Callable[[str], None]) -> Checkpoint:
    """The checkpoint at `path`: its own folder, a file that names it, or the newest of a run."""
    if names_checkpoint(path):
        return open_checkpoint(named_by(path))
    if (path / MANIFEST).is_file():
        return open_checkpoint(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such run or checkpoint; `hdit train` makes runs")
    checkpoint = newest(path / "checkpoints", warn)
    if checkpoint is None and (path / "config.toml").is_file():
        raise CheckpointError(f"{path}: this run has no checkpoint: none yet, or none any more")
    if checkpoint is None:
        raise CheckpointError(
            f"{path}: neither a run with checkpoints/, a checkpoint with {MANIFEST}, a converted "
            "model, nor a model of diffusers with config.json"
        )
    return checkpoint
