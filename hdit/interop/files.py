"""Foreign files, read without executing them, and their settings."""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hdit.interop.contents import InteropError


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """-> (tensors, metadata). Raises InteropError where the file is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise InteropError(f"{path}: no safetensors file, or damaged: {error}") from None


def read_pickle(path: Path) -> Any:
    """Tensors and plain data of a file of torch.save; argparse.Namespace is the one class allowed.

    Raises InteropError where it is damaged, or a pickle that would call anything else.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a pickle protocol that is not its own
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise InteropError(
            f"{path}: refused: damaged, or a pickle of more than tensors and plain data, which "
            f"could execute code: {_reason(error)}"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise InteropError(f"{path}: no file of torch.save, or damaged: {error}") from None


def _reason(error: UnpicklingError) -> str:
    """What torch says of the file, without what it advises."""
    advice = ("Weights only load failed", "Please file an issue", "Check the documentation")
    lines = [line for line in str(error).splitlines() if line and not line.startswith(advice)]
    return " ".join(lines) or str(error)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file. Raises InteropError where it is none."""
    return parse_json(path.read_bytes(), str(path))


def parse_json(text: str | bytes, origin: str) -> dict[str, Any]:
    """A JSON object. Raises InteropError where it is none."""
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise InteropError(f"{origin}: not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise InteropError(f"{origin}: must be a JSON object, got {type(raw).__name__}")
    return raw


class Settings:
    """A table of someone else's settings, which remembers what was read of it; null is absent."""

    def __init__(self, raw: dict[str, Any], origin: str, path: str = ""):
        self.raw, self.origin, self.path = raw, origin, path
        self.read: set[str] = set()
        self.tables: dict[str, Settings] = {}

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a setting, or `default` where it is absent."""
        self.read.add(key)
        value = self.raw.get(key)
        return default if value is None else value

    def need(self, key: str) -> Any:
        """The value of a setting. Raises InteropError where it is absent."""
        value = self.get(key)
        if value is None:
            raise self.error(key, "missing")
        return value

    def number(self, key: str, default: float | None = None) -> Any:
        """A number, as it came; `need`ed where it has no default."""
        value = self.need(key) if default is None else self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, f"must be a number, got {value!r}")
        return value

    def list(self, key: str, length: int | None = None, default: Any = None) -> list[Any]:
        """A list, of one length where that is known."""
        value = self.get(key, default)
        if not isinstance(value, list) or (length is not None and len(value) != length):
            wanted = "a list" if length is None else f"a list of {length}"
            raise self.error(key, f"must be {wanted}, got {value!r}")
        return value

    def table(self, key: str) -> Settings:
        """The table under a key, empty if absent."""
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise self.error(key, f"must be a table, got {value!r}")
        return self.of(value, key)

    def of(self, value: dict[str, Any], key: str) -> Settings:
        """A table that lies under a key, whatever is between."""
        if key not in self.tables:
            self.tables[key] = Settings(value, self.origin, f"{self.path}{key}.")
        return self.tables[key]

    def fixed(self, key: str, *allowed: Any) -> None:
        """Raises InteropError unless the setting is one of those, or absent."""
        if (value := self.get(key, allowed[0])) not in allowed:
            wanted = " or ".join(map(repr, allowed))
            raise self.error(key, f"{value!r} has no counterpart here, {wanted} has")

    def error(self, key: str, text: str) -> InteropError:
        """An error, to raise, that names the file and the key."""
        return InteropError(f"{self.origin}: {self.path}{key}: {text}")

    def unread(self) -> dict[str, Any]:
        """What was not read, by its path."""
        own = {f"{self.path}{k}": v for k, v in self.raw.items() if k not in self.read}
        for table in self.tables.values():
            own |= table.unread()
        return own
