"""Sources of labelled images, by the `kind` of their spec."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from hdit.data.digits import DigitsSpec
from hdit.data.folder import FolderSpec
from hdit.data.shapes import ShapesSpec

DataSpec = Annotated[DigitsSpec | ShapesSpec | FolderSpec, Field(discriminator="kind")]

__all__ = ["DataSpec", "DigitsSpec", "FolderSpec", "ShapesSpec"]
