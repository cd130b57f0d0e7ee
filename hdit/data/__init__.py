"""Sources of labelled images, by the `kind` of their spec."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from hdit.data.kinds import kind_of
from hdit.data.sources.archive import ZipSpec
from hdit.data.sources.arrays import NpzSpec
from hdit.data.sources.digits import DigitsSpec
from hdit.data.sources.folder import FolderSpec
from hdit.data.sources.hook import PythonSpec
from hdit.data.sources.hub import HubSpec
from hdit.data.sources.shapes import ShapesSpec
from hdit.data.sources.tars import TarSpec


def _with_kind(table: Any) -> Any:
    """A table of settings with its kind, where that is left out and its path tells it."""
    if isinstance(table, dict) and "kind" not in table and isinstance(table.get("path"), str):
        kind = kind_of(table["path"])
        return table if kind is None else {"kind": kind, **table}
    return table


DataSpec = Annotated[
    DigitsSpec | ShapesSpec | FolderSpec | ZipSpec | TarSpec | NpzSpec | HubSpec | PythonSpec,
    Field(discriminator="kind"),
    BeforeValidator(_with_kind),
]

__all__ = [
    "DataSpec",
    "DigitsSpec",
    "FolderSpec",
    "HubSpec",
    "NpzSpec",
    "PythonSpec",
    "ShapesSpec",
    "TarSpec",
    "ZipSpec",
]
