"""A data set of Hugging Face: from the hub, or a folder that save_to_disk wrote."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from pydantic import Field, ValidationInfo, field_validator

from hdit.bounds import Name
from hdit.data.images import Images, ImagesSpec, open_image, refuse_path
from hdit.data.kinds import kind_of
from hdit.data.source import DataError
from hdit.data.sources.listing import by_name
from hdit.hub import HubError, asking, first_line
from hdit.names import path_of


class HubSpec(ImagesSpec):
    """Needs the package datasets: pip install 'hdit[data]'."""

    kind: Literal["hub"] = "hub"
    path: Name | None = Field(None, description="a folder of save_to_disk, in place of name")
    name: Name | None = Field(
        None, description="of the data set on the hub, as in user/pets", validate_default=True
    )
    config: Name | None = Field(None, description="its configuration, if it has several")
    split: Name | None = Field(None, description="train if absent, or the only one of a folder")
    image_column: Name | None = Field(None, description="the only one of images if absent")
    label_column: str | None = Field(
        None, description='"label", "labels" or the only one of classes if absent; "" for no labels'
    )

    @field_validator("name")
    @classmethod
    def _in_place_of_path(cls, name: str | None, info: ValidationInfo) -> str | None:
        if name is None and info.data.get("path", "") is None:
            raise ValueError("must be set, or path")
        if name is not None and info.data.get("path") is not None:
            raise ValueError("must be left out where path is set")
        return name

    @field_validator("config")
    @classmethod
    def _of_the_hub(cls, config: Name | None, info: ValidationInfo) -> str | None:
        if config is not None and info.data.get("path") is not None:
            raise ValueError("has no effect on a folder; it chooses among those on the hub")
        return config

    def open(self) -> Images:
        """Opens or downloads it. Raises DataError for a column or split that is not there."""
        return Images(self, Hub(self))


class Hub:
    """The images of a data set of Hugging Face. See hdit.data.images.Entries."""

    def __init__(self, spec: HubSpec):
        self.setting = "data.path" if spec.name is None else "data.name"
        self.place = spec.name or spec.path or ""
        self.where = f"{self.setting}: {self.place!r}"
        try:
            datasets = importlib.import_module("datasets")
        except ImportError as error:
            raise DataError(
                f"data.kind: 'hub' needs the package datasets ({error}); "
                "pip install 'hdit[data]' has it"
            ) from None
        table = self._open(datasets, spec).with_format(None)
        if not len(table):
            raise DataError(f"{self.where} is empty")
        column = self._image_column(datasets, table, spec.image_column)
        labels = self._label_column(datasets, table, spec.label_column)
        self.labels, self.classes = self._classes(datasets, table, labels)
        # not decoded there: sizes are looked at first, and reasons are the same as of other sources
        stored = datasets.Image(decode=False)
        self.images = table.select_columns([column]).cast_column(column, stored)
        self.column = column

    def _open(self, datasets: Any, spec: HubSpec) -> Any:
        if spec.name is not None:
            return self._download(datasets, spec.name, spec)
        assert spec.path is not None, "one of the two is there"
        if kind_of(spec.path) != "hub":
            raise refuse_path(spec.path, "hub", "is no folder of save_to_disk")
        try:
            found = datasets.load_from_disk(str(path_of(spec.path)))
        except Exception as error:
            raise DataError(f"{self.where} cannot be loaded: {first_line(error)}") from error
        return self._split(found, spec.split)

    def _download(self, datasets: Any, name: str, spec: HubSpec) -> Any:
        fix = "set data.path to a folder of save_to_disk in place of data.name"
        try:
            with asking(self.where, name, "dataset", fix):
                return datasets.load_dataset(name, spec.config, split=spec.split or "train")
        except HubError as error:
            raise DataError(str(error)) from error
        except Exception as error:  # of the hub, its formats
            raise DataError(f"{self.where} cannot be loaded: {first_line(error)}") from error

    def _split(self, found: Any, split: str | None) -> Any:
        if not isinstance(found, dict):
            if split is not None:
                raise DataError(f"data.split: {self.place!r} has no splits; leave it out")
            return found
        name = split or (next(iter(found)) if len(found) == 1 else "train")
        if name not in found:
            raise DataError(f"data.split: {self.place!r} has {', '.join(found)}, not {name!r}")
        return found[name]

    def _image_column(self, datasets: Any, table: Any, column: str | None) -> str:
        images = [n for n, kind in table.features.items() if isinstance(kind, datasets.Image)]
        if column is None and len(images) == 1:
            return images[0]
        if column in images:
            assert column is not None
            return column
        held = ", ".join(images) or f"none (its columns: {', '.join(table.features)})"
        told = "must be set" if column is None else f"{column!r} is none"
        raise DataError(f"data.image_column: {told}; columns of images in {self.place!r}: {held}")

    def _label_column(self, datasets: Any, table: Any, column: str | None) -> str | None:
        if column == "":
            return None
        if column is not None:
            if column in table.features:
                return column
            held = ", ".join(table.features)
            raise DataError(f"data.label_column: {self.place!r} has {held}, not {column!r}")
        for name in ("label", "labels"):
            if name in table.features:
                return name
        kinds = table.features.items()
        named = [name for name, kind in kinds if isinstance(kind, datasets.ClassLabel)]
        if len(named) > 1:
            raise DataError(f"data.label_column: must be set; {self.place!r} has {named}")
        return named[0] if named else None

    def _classes(
        self, datasets: Any, table: Any, column: str | None
    ) -> tuple[list[int], list[str]]:
        if column is None:
            return [0] * len(table), []
        where = f"data.label_column: {column!r} of {self.place!r}"
        labels = list(table[column])
        kind = table.features[column]
        names = list(kind.names) if isinstance(kind, datasets.ClassLabel) else None
        for row, label in enumerate(labels):
            fits = type(label) in (int, str) if names is None else label in range(len(names))
            if not fits:
                raise DataError(
                    f"{where} is {label!r:.60} in row {row}, which is no class; set another "
                    'data.split, or data.label_column = "" for no labels'
                )
        return by_name(labels, where) if names is None else (labels, names)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """The data set and the row."""
        return f"{self.place}[{index}]"

    def load(self, index: int) -> tuple[Image.Image, int]:
        """Opens the image of a row -> (image, class index)."""
        stored = self._stored(index)
        content = stored["bytes"]
        return open_image(stored["path"] if content is None else content), self.labels[index]

    def content(self, index: int) -> bytes:
        """The bytes of the image's file, within the table or beside it."""
        stored = self._stored(index)
        content: bytes | None = stored["bytes"]
        return Path(stored["path"]).read_bytes() if content is None else content

    def _stored(self, index: int) -> dict[str, Any]:
        """The path and the bytes of an image, one of them None. Raises ValueError for none."""
        stored: dict[str, Any] | None = self.images[index][self.column]
        if stored is None:
            raise ValueError("there is no image")
        return stored

    def stamp(self, index: int) -> str:
        """The row, its label, and the fingerprint of the data set."""
        return f"{index} {self.labels[index]} {self.images._fingerprint}"
