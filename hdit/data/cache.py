"""Decoded images on disk, so that each is decoded once and not once an epoch."""

from __future__ import annotations

import hashlib
import math
import os
import struct
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hdit.data.source import DataError
from hdit.names import path_of

HEADER = struct.Struct("<I8sq")  # checksum of what follows, stamp, label
VERSION = 1


class Cache:
    """A file of rows, one for each image: its checksum, stamp, label and pixels.

    Any number of processes may read and fill it at once: a row is taken only if its checksum is
    right and its stamp that of the image as it is now.
    """

    def __init__(self, folder: str, key: str, shape: tuple[int, int, int]):
        """`key` names all that makes pixels of images. Raises DataError."""
        self.arguments = folder, key, shape
        self.shape, self.size = shape, HEADER.size + math.prod(shape)
        home = path_of(folder)
        name = hashlib.sha256(f"{VERSION} {key}".encode()).hexdigest()[:16]
        self.path = home / f"{name}.pixels"
        try:
            home.mkdir(parents=True, exist_ok=True)
            self.handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
            raise DataError(f"data.cache: {folder!r} cannot be used: {error}") from None

    def __reduce__(self) -> tuple[Any, ...]:
        """A process that is not a fork opens the file again."""
        return Cache, self.arguments

    def get(self, index: int, stamp: str) -> tuple[Tensor, int] | None:
        """(pixels (c h w) uint8, label) of a row, if it is there, whole, and of this stamp."""
        row = bytearray(self.size)
        try:
            if os.preadv(self.handle, [row], index * self.size) != self.size:
                return None
        except OSError as error:
            raise DataError(f"data.cache: {self.path} cannot be read: {error}") from None
        checksum, written, label = HEADER.unpack_from(row)
        if written != _digest(stamp) or checksum != zlib.crc32(memoryview(row)[4:]):
            return None
        pixels = np.frombuffer(row, np.uint8, offset=HEADER.size)
        return torch.from_numpy(pixels).reshape(self.shape), label

    def put(self, index: int, stamp: str, pixels: Tensor, label: int) -> None:
        """Writes a row. Raises DataError if it cannot be written, as on a full disk."""
        row = bytearray(HEADER.pack(0, _digest(stamp), label) + pixels.numpy().tobytes())
        row[:4] = zlib.crc32(memoryview(row)[4:]).to_bytes(4, "little")
        try:
            written = os.pwrite(self.handle, row, index * self.size)
        except OSError as error:
            raise DataError(
                f"data.cache: {self.path}: {error}; leave it out, or make room"
            ) from None
        if written != self.size:
            raise DataError(
                f"data.cache: {self.path}: the disk is full; leave it out, or make room"
            )


def _digest(stamp: str) -> bytes:
    return hashlib.blake2b(stamp.encode("utf-8", "surrogateescape"), digest_size=8).digest()
