"""Sets of images to compare: images at their own size, a config's data, samples of a model.

Nothing is cropped, mirrored or resized here, and an image that cannot be read ends it: another in
its place would falsify the distance.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor

from hdit.arrays import UNREADABLE
from hdit.config import load
from hdit.data import DataSpec, HubSpec, TarSpec
from hdit.data.images import MAX_PIXELS, open_image
from hdit.data.kinds import DATA, MODELS, OTHERS, what_is
from hdit.data.loader import load_batches
from hdit.data.source import DataError, Source, Stream, references, warnings_of
from hdit.data.sources.archive import Archive
from hdit.data.sources.arrays import Arrays
from hdit.data.sources.folder import start_of
from hdit.data.sources.listing import list_images
from hdit.data.sources.tree import walk
from hdit.data.transforms import to_mode, to_tensor
from hdit.errors import UserError
from hdit.evaluation import recipes
from hdit.models.cost import cost
from hdit.names import escape, path_of
from hdit.reading import parse_json
from hdit.runs.trained import Trained
from hdit.sampling.record import MAX_RECORD, SAMPLES, read_samples, sample_names
from hdit.sampling.sample import Samples, check_null_class, sample, settle_sampling

Prepare = Callable[[Tensor], Tensor] | None
"""Of one image, (3 h w) uint8, what a batch is stacked of; None is the image itself."""
Prepares = Sequence[Prepare]
"""One for each network that the images go to; none where their digests are all that is wanted."""

NO_CLASS = -1


class Part(NamedTuple):
    """The next images of a set; `stacked` has a batch for each way of preparing them, which is
    None where images are of different shapes."""

    stacked: list[Tensor | None]
    sizes: list[tuple[int, int]]  # (height, width) as read
    digests: list[bytes]  # of the pixels
    labels: list[int]  # indices of classes, or NO_CLASS


class ImageSet(Protocol):
    """Images in a fixed order. `record` says for the protocol where they come from.

    `classes` has the names of their classes; it is empty where they are not known.
    """

    record: dict[str, Any]

    @property
    def classes(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def parts(self, prepares: Prepares, batch_size: int, workers: int) -> Iterator[Part]:
        """All of it, once. Raises DataError for an image that cannot be read."""

    def pictures(self, indices: Sequence[int]) -> list[Tensor]:
        """Some images again, (3 h w) uint8 each, to be looked at."""


class Item(NamedTuple):
    """One image as read and prepared; the digest is of its size and pixels."""

    prepared: list[Tensor]
    size: tuple[int, int]
    digest: bytes
    label: int


def item(image: Tensor, prepares: Prepares, label: int = NO_CLASS) -> Item:
    """image (c h w) uint8, grey or RGB; grey is RGB with three channels alike."""
    image = as_rgb(image)
    size = (int(image.shape[1]), int(image.shape[2]))
    digest = hashlib.sha256(repr(size).encode() + image.numpy().tobytes()).digest()
    prepared = [image if prepare is None else prepare(image) for prepare in prepares]
    return Item(prepared, size, digest, label)


def as_rgb(image: Tensor) -> Tensor:
    """(c h w), grey or RGB -> (3 h w)."""
    return image.expand(3, -1, -1).contiguous()


def part(items: list[Item]) -> Part:
    """Collates images into a part, stacked to (b ...) where all are of one shape."""
    columns = zip(*(item.prepared for item in items), strict=True)
    return Part(
        [_stacked(column) for column in columns],
        [item.size for item in items],
        [item.digest for item in items],
        [item.label for item in items],
    )


def _stacked(images: Sequence[Tensor]) -> Tensor | None:
    one = len({image.shape for image in images}) == 1
    return torch.stack(list(images)) if one else None


# ---- images --------------------------------------------------------------------------------------


class Files(Protocol):
    """Images by index, as hdit.data lists those of archives and arrays."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def load(self, index: int) -> tuple[Image.Image, int]: ...


class FolderFiles:
    """All images in a folder and the folders in it, whatever these mean.

    Of a folder that `hdit sample` wrote, those that its samples.json lists: not the grid. Links
    are followed, and each folder is read once.
    """

    def __init__(self, root: Path):
        self.root = root
        try:
            files = walk(root).files
        except OSError as error:
            raise DataError(f"{root}: cannot be listed: {error}") from None
        listing = list_images(files, lambda name: start_of(root / name), repr(str(root)))
        names = self.names = listing.names
        self.warnings = listing.warnings
        self.classes, self.labels = by_folder(names)
        self.recipe: dict[str, Any] = {}
        record = root / SAMPLES
        if SAMPLES in files:
            self.names = read_samples(record)
            self.recipe, self.classes, self.labels = recipes.of_folder(root, len(self.names))
            if missing := set(self.names) - set(names):
                raise DataError(f"{root / min(missing)}: is not there, but {record} lists it")
            if not self.names:
                raise DataError(f"{record}: lists no images")

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """Path of an image, the folder's included."""
        return str(self.root / self.names[index])

    def load(self, index: int) -> tuple[Image.Image, int]:
        """Opens an image; its class is 0, whatever folder it is in."""
        return open_image(self.name(index)), 0


def by_folder(names: Sequence[str]) -> tuple[list[str], list[int]]:
    """(classes, index of each image) by the outermost folder that a name has.

    Both are empty where an image lies in none.
    """
    tops = [name.partition("/")[0] if "/" in name else "" for name in names]
    if not all(tops):
        return [], []
    indices = {name: i for i, name in enumerate(sorted(set(tops)))}
    return list(indices), [indices[name] for name in tops]


class Chosen:
    """Some images of others, by their index there."""

    def __init__(self, files: Files, indices: list[int], recipe: recipes.Recipe):
        self.files, self.indices = files, indices
        self.recipe, self.classes, self.labels = recipe

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        """The name by which the others know an image."""
        return self.files.name(self.indices[index])

    def load(self, index: int) -> tuple[Image.Image, int]:
        """Opens an image as the others do."""
        return self.files.load(self.indices[index])


def zip_files(place: str) -> Files:
    """The images of an archive; of one of samples, those that its samples.json lists."""
    archive = Archive(place, MAX_PIXELS, labelled=False)
    members = [name for name in archive.zip.namelist() if name.rpartition("/")[2] == SAMPLES]
    record = min(members, key=lambda name: name.count("/"), default="")
    if not record or record.count("/") > 1:
        return archive
    top, where = record.removesuffix(SAMPLES), f"{place}/{record}"
    try:
        with archive.zip.open(record) as file:
            text = file.read(MAX_RECORD)
    except UNREADABLE as error:
        raise DataError(f"{where}: cannot be read: {error}") from None
    indices = {member.filename: i for i, member in enumerate(archive.members)}
    content = parse_json(text, where)
    listed = [top + name for name in sample_names(content, where)]
    if not listed:
        raise DataError(f"{where}: lists no images")
    if missing := set(listed) - set(indices):
        raise DataError(f"{place}/{min(missing)}: is not there, but {where} lists it")
    return Chosen(archive, [indices[name] for name in listed], recipes.recipe_of(content))


class Listed:
    """Images that lie somewhere: any mode, made RGB; what is transparent lies on white.

    `warnings` tell of files that are left out. Classes are those of a samples.json, of the
    outermost folders, or of the labels of an npz.
    """

    def __init__(self, files: Files, place: str, kind: str):
        self.files = files
        self.record: dict[str, Any] = {"place": place, "kind": kind}
        self.record |= getattr(files, "recipe", {}) or recipes.beside(place, kind)
        self.classes, self.labels = _classes_of(files)
        told = getattr(files, "warnings", [])
        self.warnings = [text.removeprefix("data.path: ") for text in told]

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """The name by which the files know an image."""
        return self.files.name(index)

    def image(self, index: int) -> tuple[Tensor, int]:
        """Reads an image as RGB: ((3 h w) uint8, index of its class or NO_CLASS)."""
        with self.files.load(index)[0] as image:
            pixels = to_tensor(to_mode(image, 3))
        return pixels, self.labels[index] if self.classes else NO_CLASS

    def parts(self, prepares: Prepares, batch_size: int, workers: int) -> Iterator[Part]:
        """Reads all images, once, in parts of `batch_size`. Raises DataError."""
        return read(self, prepares, batch_size, workers)

    def pictures(self, indices: Sequence[int]) -> list[Tensor]:
        """Reads some images: (3 h w) uint8 each. Raises DataError."""
        return [_Read(self, [None])(index).prepared[0] for index in indices]


def _classes_of(files: Files) -> tuple[list[str], list[int]]:
    """(classes, index of each image), both empty where they are not known."""
    if isinstance(files, FolderFiles | Chosen):
        return files.classes, files.labels
    if isinstance(files, Archive):
        names = [member.filename for member in files.members]
        if len({name.partition("/")[0] for name in names}) == 1:  # one that holds all is no class
            names = [name.partition("/")[2] for name in names]
        return by_folder(names)
    if isinstance(files, Arrays):
        with suppress(DataError):  # labels that do not fit the images are none
            labelled = Arrays(files.place)
            return labelled.classes, labelled.labels.tolist()
    return [], []


class Configured:
    """The data of a config, as training sees them: cropped, but neither mirrored nor augmented."""

    def __init__(self, spec: DataSpec, place: str):
        self.source: Source | Stream = spec.open()
        self.references = references(self.source)
        self.classes: Sequence[str] = self.source.classes
        self.warnings = warnings_of(self.source)
        self.record = {
            "place": place,
            "kind": "data of a config",
            "data": spec.model_dump(mode="json", exclude_none=True),
        }

    def __len__(self) -> int:
        return len(self.references)

    def name(self, index: int) -> str:
        """Name of an image: its place in the order of the data."""
        return f"image {index}"

    def image(self, index: int) -> tuple[Tensor, int]:
        """Reads an image: ((c h w) uint8, index of its class or NO_CLASS).

        Raises DataError where the source skipped a file.
        """
        found = self.source[self.references[index]]
        for file in found.skipped:
            raise DataError(f"{file.path}: {file.reason}; mend or remove it")
        return found.image, found.label if self.classes else NO_CLASS

    def parts(self, prepares: Prepares, batch_size: int, workers: int) -> Iterator[Part]:
        """Reads all images, once, in parts of `batch_size`. Raises DataError."""
        return read(self, prepares, batch_size, workers)

    def pictures(self, indices: Sequence[int]) -> list[Tensor]:
        """Reads some images: (3 h w) uint8 each. Raises DataError."""
        return [_Read(self, [None])(index).prepared[0] for index in indices]


class _Readable(Protocol):
    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def image(self, index: int) -> tuple[Tensor, int]: ...


class _Read:
    """Reads one image of a set. Raises DataError, which names it, where it cannot be read."""

    def __init__(self, images: _Readable, prepares: Prepares):
        self.images, self.prepares = images, prepares

    def __call__(self, index: int) -> Item:
        try:
            image, label = self.images.image(index)
        except (MemoryError, DataError):
            raise
        except Exception as error:  # Pillow's plug-ins raise many kinds on a damaged file
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"{self.images.name(index)}: {reason}; mend or remove it") from None
        return item(image, self.prepares, label)


def read(images: _Readable, prepares: Prepares, batch_size: int, workers: int) -> Iterator[Part]:
    """Reads all images of a set in parts of `batch_size`. Raises DataError."""
    batches = [
        range(len(images))[first : first + batch_size]
        for first in range(0, len(images), batch_size)
    ]
    return load_batches(_Read(images, prepares), batches, part, workers)


# ---- samples of a model --------------------------------------------------------------------------


class Sampled:
    """n samples of a model by its own sampling settings, of all its classes in turn."""

    def __init__(
        self,
        trained: Trained,
        n: int,
        seed: int,
        raw: bool,
        device: torch.device,
        warn: Callable[[str], None],
    ):
        """`trained` has the settings of sampling that are wanted. Raises UserError."""
        check_null_class(trained.config, trained.shape)
        self.trained = trained.configured(settle_sampling(trained.config, device, n, warn))
        config, classes, self.device = self.trained.config, trained.classes, device
        self.classes: Sequence[str] = classes
        self.seeds = list(range(seed, seed + n))
        self.labels = [i % len(classes) for i in range(n)] if classes else None
        self.record: dict[str, Any] = {
            "place": escape(str(trained.path)),
            "kind": "samples",
            "trained_images": trained.images,
            "weights": trained.weights(raw),
            "sampling": config.sampling.model_dump(mode="json", exclude_none=True),
            "sigma_range": config.sigma_range(),
            "seeds": [self.seeds[0], self.seeds[-1]],
            "labels": f"all {len(classes)} in turn" if classes else "none",
        }
        outputs = config.output_channels(self.trained.shape)
        parts = cost(config.model, self.trained.shape, outputs)
        self.forward_macs = sum(one.macs for one in parts)
        self.space = self.trained.space(device)
        self.backbone = self.trained.network(raw).to(device)
        if config.sampling.compile:
            self.backbone.compile_blocks()

    def __len__(self) -> int:
        return len(self.seeds)

    def name(self, index: int) -> str:
        """Name of a sample: its seed."""
        return f"seed {self.seeds[index]}"

    def parts(self, prepares: Prepares, batch_size: int, workers: int) -> Iterator[Part]:
        """In the batches of sampling; the network evaluations of an image go into the record."""
        evaluations, done = 0, 0
        for batch in self._sample(range(len(self))):
            evaluations += batch.evaluations * len(batch.images)
            labels = (self.labels or [NO_CLASS] * len(self))[done : done + len(batch.images)]
            done += len(batch.images)
            yield part(
                [item(image, prepares, y) for image, y in zip(batch.images, labels, strict=True)]
            )
        self.record["evaluations"] = round(evaluations / len(self))
        self.record["macs"] = self.record["evaluations"] * self.forward_macs

    def pictures(self, indices: Sequence[int]) -> list[Tensor]:
        """Samples some seeds again: (3 h w) uint8 each, the same images to float tolerance."""
        return [as_rgb(image) for batch in self._sample(indices) for image in batch.images]

    def _sample(self, indices: Sequence[int]) -> Iterator[Samples]:
        return sample(
            self.backbone,
            self.trained.config,
            self.trained.shape,
            [self.seeds[i] for i in indices],
            [self.labels[i] for i in indices] if self.labels else None,
            self.device,
            space=self.space,
        )


# ---- which of them -------------------------------------------------------------------------------


def open_set(place: str) -> Listed | Configured:
    """Images by path, of any kind that training reads, or of a config. Raises UserError."""
    path, kind = path_of(place), what_is(place)
    if kind == "config":
        return Configured(load(path).data, place)
    if kind == "folder":
        return Listed(FolderFiles(path), place, kind)
    if not os.path.exists(path) and kind != "tar":  # which may be named with braces or wildcards
        raise UserError(f"{place}: does not exist (seen from {Path.cwd()})")
    if kind not in DATA:
        what = f"is {(MODELS | OTHERS)[kind]}, and " if kind else ""
        raise UserError(
            f"{place}: {what}must be a folder of images, a .zip of one, an .npz, tar files, a "
            "config's .toml (its data), or as the first of both a trained model"
        )
    try:
        return Listed(_entries(place, kind), place, kind)
    except DataError as error:
        raise UserError(str(error).removeprefix("data.path: ")) from None


def _entries(place: str, kind: str) -> Files:
    """The images of a source by index, whatever labels they have. Raises DataError."""
    if kind == "tar":
        return TarSpec(path=place, size=(1, 1), classes=0).open().listed()
    if kind == "hub":
        return HubSpec(path=place, size=(1, 1), label_column="").open().entries
    return Arrays(place, labelled=False) if kind == "npz" else zip_files(place)
