"""A data set of your own: a Python function that returns it."""

from __future__ import annotations

import operator
import re
from typing import Annotated, Any, Literal

import torch
from PIL import Image
from pydantic import AfterValidator, Field, field_validator

from hdit.bounds import Name
from hdit.data.images import Images, ImagesSpec, pixel_content
from hdit.data.source import DataError
from hdit.data.transforms import to_image
from hdit.plugins import import_function, no_exit

ASKED_TWICE = 16  # images, before a hook's are taken to stay the same
MAX_IMAGES = 10**9  # of which an order is drawn anew in each epoch


def _is_hook(text: str) -> str:
    if not re.fullmatch(r"[\w.]+:[\w.]+", text):
        raise ValueError("must be module:function, as in 'my_data:open_pets'")
    return text


class PythonSpec(ImagesSpec):
    """A data set that a function of yours returns: an object with `__len__` and `__getitem__`.

    `__getitem__(index)` gives a PIL image, or a uint8 tensor (c h w), and its class index, or None.
    `classes`, the names, is needed where there are labels. What it raises counts as a bad file.
    """

    kind: Literal["python"] = "python"
    hook: Annotated[Name, AfterValidator(_is_hook)] = Field(
        description="module:function, from the current folder or the environment"
    )

    @field_validator("cache")
    @classmethod
    def _never(cls, folder: str | None) -> str | None:
        if folder is not None:
            raise ValueError("cannot be used with kind = 'python': its images may be new each time")
        return folder

    def open(self) -> Images:
        """Calls the hook. Raises DataError for what is wrong with it, or with what it returned."""
        return Images(self, Hooked(self.hook))


class Hooked:
    """The images of a data set that a user's function returned. See hdit.data.images.Entries."""

    setting = "data.hook"

    def __init__(self, hook: str):
        self.place = hook
        where = f"data.hook: {hook!r}"
        function, _ = import_function(hook, where, DataError)
        try:
            with no_exit(where, DataError):
                self.images = function()
                self.classes = self._checked(f"{where} returned {type(self.images).__name__}")
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"{where} raised {type(error).__name__}: {error}") from error

    def _checked(self, got: str) -> list[str]:
        """The classes of what the hook returned. Raises DataError where it is no data set."""
        for method in ("__len__", "__getitem__"):
            if not hasattr(self.images, method):
                raise DataError(f"{got}, which has no {method}")
        if not 1 <= (length := len(self.images)) <= MAX_IMAGES:
            trouble = f"has {length:,} images, more than {MAX_IMAGES:,}" if length else "is empty"
            raise DataError(f"{got}, which {trouble}")
        classes = getattr(self.images, "classes", None)
        classes = [] if classes is None else classes
        if not isinstance(classes, list | tuple) or not all(isinstance(c, str) for c in classes):
            raise DataError(f"{got}, whose classes must be a list of names, got {classes!r:.60}")
        return list(classes)

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """The hook and the index."""
        return f"{self.place}[{index}]"

    def load(self, index: int) -> tuple[Image.Image, int]:
        """Asks for the image -> (image, class index). Raises DataError for what is no such pair."""
        where = f"data.hook: {self.place!r} returned a data set whose item {index}"
        with no_exit(where, DataError):
            item = self.images[index]
        if not isinstance(item, list | tuple) or len(item) != 2:
            raise DataError(f"{where} must be (image, label or None), got {_describe(item)}")
        return self._image(item[0], where), self._label(item[1], where)

    def stamp(self, index: int) -> str:
        """Never asked for: data.cache is refused."""
        raise AssertionError("there is none: data.cache is refused")

    def content(self, index: int) -> bytes:
        """The pixels of the image. Raises DataError where the first ones are new each time."""
        image = pixel_content(self.load(index)[0])
        if index < ASKED_TWICE and pixel_content(self.load(index)[0]) != image:
            raise DataError(
                f"data.held_out: item {index} of what data.hook {self.place!r} returned is another "
                "image each time, so that no share can be held out by content; name a path"
            )
        return image

    def _image(self, image: Any, where: str) -> Image.Image:
        if isinstance(image, Image.Image):
            return image
        if isinstance(image, torch.Tensor) and image.dtype == torch.uint8 and image.ndim == 3:
            try:
                return to_image(image.permute(1, 2, 0).numpy(force=True))
            except ValueError as error:
                raise DataError(f"{where} has a tensor (c h w) that {error}") from None
        raise DataError(
            f"{where} must have a PIL image or a uint8 tensor (c h w), got {_describe(image)}"
        )

    def _label(self, label: Any, where: str) -> int:
        if label is None and not self.classes:
            return 0
        if label is not None and not self.classes:
            raise DataError(
                f"{where} has a label, {label!r:.60}, but the data set has no classes; give it "
                "their names as classes, a list, or return None in place of labels"
            )
        try:
            index = operator.index(label)
        except TypeError:
            index = -1
        if isinstance(label, bool) or not 0 <= index < len(self.classes):
            raise DataError(
                f"{where} must have a class index below {len(self.classes)} as its label, got "
                f"{label!r:.60}"
            )
        return index


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of {value.dtype}, {' x '.join(map(str, value.shape))}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__
