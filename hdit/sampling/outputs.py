"""The forms that samples are written in: a folder of PNG files, an .npz as ADM's, or tar shards.

Images gather in a store first, where each is whole or not there. That of a folder is the folder
itself; that of a file is a hidden folder beside it, which is packed once all images are there.
"""

from __future__ import annotations

import io
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, from_numpy

from hdit.arrays import read_npz
from hdit.data.sources.shard_paths import expand
from hdit.errors import UserError, WritingError
from hdit.files import check_writable, to_json, whole, write_text
from hdit.locks import LOCK
from hdit.protocols import NULL_LABEL
from hdit.sampling.record import (
    GRID,
    LINES,
    SAMPLES,
    Plan,
    check_same,
    mean_evaluations,
    read_record,
    sample_names,
    text_of,
)
from hdit.sampling.stores import Pictures, Pixels, Store, from_png

MAX_SHARDS = 10_000
COUNTS = "evaluations-{}.txt"
"""What a process has made so far: a line "images evaluations" for each batch. Hidden."""


class Output:
    """A set of samples in some form: what all forms have in common."""

    store: Store
    work: Path  # the folder of the store, and of the record until the set is complete
    record: Path  # of the complete set
    grid: Path

    def __init__(self, out: Path, plan: Plan, record: dict[str, Any]):
        """`record` is what is told of the set that is asked for."""
        self.out, self.plan = out, plan
        self.asked = record | {"form": self.form()}

    def form(self) -> str:
        """What is told of the form: sets of other forms are others."""
        raise NotImplementedError

    # ---- what is there

    def found(self) -> tuple[dict[str, Any] | None, bool]:
        """The record of the set that lies here, if any, and whether the set is complete.

        Raises UserError where it is damaged.
        """
        for path in (self.record, self.work / SAMPLES):
            content = read_record(path)
            if content is not None:
                sample_names(content, str(path))
                return content, content.get("evaluations") is not None and self.is_whole()
        return None, False

    def is_whole(self) -> bool:
        """Whether nothing of a set that was complete once is missing."""
        return all(path.is_file() for path in self.files())

    def files(self) -> list[Path]:
        """What a complete set consists of, besides its record and its grid."""
        raise NotImplementedError

    def is_complete(self, overwrite: bool) -> bool:
        """Whether the set that is asked for is here already, so that nothing is to do.

        Raises UserError where another set, or anything else, lies here, unless it may be written
        over.
        """
        found, complete = self.found()
        if overwrite:
            return False
        if found is None:
            self.check_free()
            return False
        if "sha256" not in found:
            raise UserError(
                f"--out: {self.out} is not empty: an older hdit wrote its samples; name another "
                "folder, or add --overwrite"
            )
        check_same(found, self.asked, self.out)
        if complete:
            self.asked["evaluations"] = found["evaluations"]
        return complete

    def check_free(self) -> None:
        """Raises UserError where something lies in the place of a new set."""
        for path in (*self.files(), self.record, self.grid):
            if path.exists() or path.is_symlink():
                raise UserError(
                    f"--out: {path} is there already; name another file, or add --overwrite"
                )

    def check_targets(self) -> None:
        """Raises UserError where a file cannot be written, or an old one removed."""
        for path in (*self.files(), self.record, self.grid, self.work):
            check_writable(path)
            if path != self.work and path.is_dir():
                raise UserError(f"{path}: is a folder, in the place of a file; name another --out")

    def there(self) -> np.ndarray:
        """Which images are there: (n,) bool."""
        return self.store.there()

    def get(self, index: int) -> Tensor:
        """Reads one image, (c h w) uint8. Raises OSError or ValueError where it is damaged."""
        return self.store.get(index)

    # ---- making it

    def begin(self) -> None:
        """Writes the record of a set that is begun or gone on with."""
        self._write(self.work / SAMPLES)

    def count(self, rank: int, images: int, evaluations: int) -> None:
        """Notes the network evaluations of images, before they are stored."""
        path = self.work / f".{COUNTS.format(rank)}"
        try:
            with path.open("a", encoding="ascii") as file:
                file.write(f"{images} {evaluations}\n")
        except OSError as error:
            raise WritingError(error.errno, error.strerror, str(path)) from None

    def evaluations(self) -> int | None:
        """The mean number of network evaluations of an image, over all sessions."""
        counts: list[tuple[int, int]] = []
        for path in self._counts():
            text = path.read_text(encoding="ascii")
            counts += [(int(a), int(b)) for a, b in re.findall(r"^(\d+) (\d+)$", text, re.M)]
        return mean_evaluations(counts)

    def _counts(self) -> list[Path]:
        return list(self.work.glob(f".{COUNTS.format('*')}"))

    def pack(self, on_images: Callable[[int], None]) -> None:
        """Writes what a complete set consists of, of images that are all there."""

    def finish(self, evaluations: int | None) -> None:
        """Writes the record of the complete set, and removes what was there while it was made."""
        self.asked["evaluations"] = evaluations
        self._write(self.record)
        self.clean()

    def tidy(self) -> None:
        """Removes the folder that a set was made in, if nothing is left in it to go on with."""

    def clean(self) -> None:
        """Removes what only a set in the making needs."""
        for path in self._counts():
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Removes a set and its record, so that no two sets mix."""
        self.clean()
        for path in (*self.files(), self.grid, self.record):
            path.unlink(missing_ok=True)

    def _write(self, path: Path) -> None:
        write_text(path, to_json(self.asked, str(path)))


class Folder(Output):
    """PNG files named by seed, grid.png, samples.json and samples.jsonl."""

    def __init__(self, out: Path, plan: Plan, record: dict[str, Any]):
        super().__init__(out, plan, record)
        if out.exists() and not out.is_dir():
            raise UserError(f"--out: {out} is a file; name a folder")
        self.work, self.record, self.grid = out, out / SAMPLES, out / GRID
        self.pictures = Pictures(out, plan, lambda index: text_of(record, plan, index))
        self.store = self.pictures

    def form(self) -> str:
        """See Output."""
        return "folder"

    def files(self) -> list[Path]:
        """See Output. Images are left out, as they are many."""
        return [self.out / LINES]

    def is_whole(self) -> bool:
        """See Output."""
        return super().is_whole() and bool(self.there().all())

    def check_free(self) -> None:
        """See Output."""
        if self.out.is_dir() and any(path.name != LOCK for path in self.out.iterdir()):
            raise UserError(
                f"--out: {self.out} is not empty; name another folder, or add --overwrite"
            )

    def check_targets(self) -> None:
        """See Output. An image is looked at where it lies."""
        check_writable(self.out / SAMPLES)
        old = set(self._old())
        for path in self.out.iterdir() if self.out.is_dir() else ():
            ours = path.name in (SAMPLES, LINES, GRID) or self.plan.index(path.name) is not None
            if ours or path.name in old:
                check_writable(path)
                if path.is_dir():
                    raise UserError(
                        f"{path}: is a folder, in the place of an image; name another --out"
                    )

    def _old(self) -> list[str]:
        """The names of the images that the record here tells of. Raises UserError."""
        content = read_record(self.record)
        return [] if content is None else sample_names(content, str(self.record))

    def pack(self, on_images: Callable[[int], None]) -> None:
        """Writes samples.jsonl."""
        with whole(self.out / LINES) as part, part.open("w", encoding="utf-8") as file:
            file.writelines(self.plan.lines())

    def clean(self) -> None:
        """See Output."""
        super().clean()
        if self.out.is_dir():
            self.pictures.sweep()

    def remove(self) -> None:
        """See Output."""
        for name in self._old():
            (self.out / name).unlink(missing_ok=True)
        super().remove()


class _File(Output):
    """What becomes a file or several: it gathers in a hidden folder beside them."""

    def __init__(self, out: Path, plan: Plan, record: dict[str, Any], base: str):
        """`base` is the beginning of the names of what lies beside the files."""
        super().__init__(out, plan, record)
        self.work = out.with_name(f".{base}.parts")
        self.record, self.grid = out.with_name(f"{base}.{SAMPLES}"), out.with_name(f"{base}.{GRID}")

    def tidy(self) -> None:
        """See Output."""
        with suppress(OSError):
            self.work.rmdir()

    def clean(self) -> None:
        """See Output."""
        for path in list(self.work.iterdir()) if self.work.is_dir() else ():
            if path.name != LOCK:  # held, and removed by its owner
                path.unlink(missing_ok=True)


class Npz(_File):
    """arr_0, (n h w c) uint8, and with classes arr_1, (n,) int64, as ADM writes its samples."""

    def __init__(self, out: Path, plan: Plan, record: dict[str, Any]):
        super().__init__(out, plan, record, out.name)
        self.pixels = Pixels(self.work, plan)
        self.store = self.pixels

    def form(self) -> str:
        """See Output."""
        return "npz"

    def files(self) -> list[Path]:
        """See Output."""
        return [self.out]

    def get(self, index: int) -> Tensor:
        """See Output."""
        if not self.out.exists():
            return super().get(index)
        image = read_npz(self.out, ("arr_0",)).arrays["arr_0"][index]
        return from_numpy(np.array(image).transpose(2, 0, 1).copy())

    def pack(self, on_images: Callable[[int], None]) -> None:
        """Streams the images into the archive."""
        c, h, w = self.plan.shape
        with whole(self.out) as part, zipfile.ZipFile(part, "w") as archive:
            with _member(archive, "arr_0", (self.plan.number, h, w, c), "|u1") as file:
                for block in self.pixels.all():
                    file.write(block.tobytes())
                    on_images(len(block))
            labels = self.plan.labels
            if labels and NULL_LABEL not in labels.chosen:
                with _member(archive, "arr_1", (self.plan.number,), "<i8") as file:
                    for some in self.plan.ranges():
                        found = self.plan.labels_of(some)
                        assert found is not None, "there are labels"
                        file.write(found.astype("<i8").tobytes())


def _member(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: str) -> Any:
    """A file to write the values of an array to, whose header is written."""
    member = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))  # the same at any time
    member.external_attr = 0o644 << 16
    file = archive.open(member, "w", force_zip64=True)
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file


class Tars(_File):
    """WebDataset's shards: for each image SEED.png, SEED.cls and SEED.json, in order of seeds."""

    def __init__(self, out: Path, plan: Plan, record: dict[str, Any]):
        self.shards = _shards(out)
        base = re.sub(r"[-_.]*\{.*\}[-_.]*", "", out.name.removesuffix(".tar"))
        super().__init__(out, plan, record, f"{base or 'samples'}.tar")
        self.text = lambda index: text_of(record, plan, index)
        self.pictures = Pictures(self.work, plan, self.text)
        self.store = self.pictures
        if len(self.shards) > plan.number:
            raise UserError(
                f"--out: {out} names {len(self.shards)} files for {plan.number} images; name fewer"
            )

    def form(self) -> str:
        """See Output. What a shard holds goes by their number."""
        return self.out.name

    def files(self) -> list[Path]:
        """See Output."""
        return self.shards

    @cached_property
    def _starts(self) -> np.ndarray:
        """The first image of each shard, and after them the number of images."""
        return np.arange(len(self.shards) + 1) * self.plan.number // len(self.shards)

    def there(self) -> np.ndarray:
        """See Output. Those of a shard that was packed are."""
        found = self.store.there()
        for shard, path in enumerate(self.shards):
            if path.exists():
                found[self._starts[shard] : self._starts[shard + 1]] = True
        return found

    def get(self, index: int) -> Tensor:
        """See Output."""
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        if not self.shards[shard].exists():
            return super().get(index)
        with tarfile.open(self.shards[shard], "r:") as tar:
            file = tar.extractfile(f"{self.plan.name(index)}.png")
            assert file is not None, "it is a regular file"
            return from_png(file.read())

    def pack(self, on_images: Callable[[int], None]) -> None:
        """Writes the shards that are not there yet, and removes their images from the store."""
        for shard, path in enumerate(self.shards):
            indices = range(self._starts[shard], self._starts[shard + 1])
            if path.exists():
                on_images(len(indices))
                continue
            with whole(path) as part, tarfile.open(part, "w:", format=tarfile.USTAR_FORMAT) as tar:
                for index in indices:
                    for extension, content in self._members(index):
                        _add(tar, f"{self.plan.name(index)}.{extension}", content)
                    on_images(1)
            for index in indices:
                self.pictures.path(index).unlink(missing_ok=True)

    def _members(self, index: int) -> Iterator[tuple[str, bytes]]:
        """(extension, content) of what a sample consists of."""
        yield "png", self.pictures.path(index).read_bytes()
        label = self.plan.entry(index)["label"]
        if label is not None:
            yield "cls", str(label).encode()
        yield "json", self.text(index).encode()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # of no time, and of nobody
    member.size, member.mode = len(content), 0o644
    tar.addfile(member, io.BytesIO(content))


def _shards(out: Path) -> list[Path]:
    """The files that 'x-{00..07}.tar' names. Raises UserError."""
    if re.search("[{}]", str(out.parent)) and not out.parent.is_dir():
        raise UserError(f"--out: {out} must be files of one folder, whose name has no braces")
    try:
        names = list(islice(expand(out.name), MAX_SHARDS + 1))
    except ValueError as error:
        raise UserError(f"--out: {out} {error}") from None
    if len(names) > MAX_SHARDS:
        raise UserError(f"--out: {out} names more than {MAX_SHARDS:,} files")
    if len(set(names)) < len(names):
        raise UserError(f"--out: {out} names a file twice")
    return [out.with_name(name) for name in names]


def open_output(out: Path, plan: Plan, record: dict[str, Any]) -> Output:
    """The form that a path tells: .npz and .tar are files, and all else is a folder."""
    if not out.is_dir():
        if out.suffix == ".npz":
            return Npz(out, plan, record)
        if out.suffix == ".tar":
            return Tars(out, plan, record)
    return Folder(out, plan, record)
