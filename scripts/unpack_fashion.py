"""Unpacks Fashion-MNIST into class folders of PNGs: 60,000 images to train on and 10,000 to test.

    git clone --depth 1 https://github.com/zalandoresearch/fashion-mnist
    python scripts/unpack_fashion.py fashion-mnist/data/fashion --out fashion

The images (Xiao et al., 2017, MIT licence) are grey, 28x28. Any data set in MNIST's format with ten
classes works; the folders have Fashion-MNIST's names.
"""

from __future__ import annotations

import argparse
import gzip
import math
import os
import shutil
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from hdit.errors import UserError

CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
    "ankle-boot",
)  # fmt: skip
STEMS = {"train": "train", "test": "t10k"}


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Bytes in the IDX format: 0, 0, 8, the number of dimensions, their sizes, the data."""
    try:
        data = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: is not there; name the folder of the four .gz files") from None
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    head = 4 + 4 * dimensions
    if data[:4] != bytes([0, 0, 8, dimensions]) or len(data) < head:
        raise UserError(f"{path}: is no IDX file of bytes in {dimensions} dimensions")
    shape = struct.unpack(f">{dimensions}I", data[4:head])
    if len(data) != head + math.prod(shape):
        raise UserError(
            f"{path}: says that it holds {shape}, and has {len(data) - head:,} bytes; get it again"
        )
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape)


def unpack(source: Path, out: Path) -> int:
    """Writes <split>/<class>/<index>.png -> how many."""
    number = 0
    for split, stem in STEMS.items():
        images = read_idx(source / f"{stem}-images-idx3-ubyte.gz", 3)
        labels = read_idx(source / f"{stem}-labels-idx1-ubyte.gz", 1)
        if len(images) != len(labels) or labels.max(initial=0) >= len(CLASSES):
            raise UserError(f"{source}: {stem} has not one label of 0 to 9 for each image")
        for name in CLASSES:
            (out / split / name).mkdir(parents=True)
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            Image.fromarray(image).save(out / split / CLASSES[label] / f"{i:05d}.png")
        number += len(images)
    return number


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="the folder with the four .gz files")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    a = parser.parse_args()
    if a.out.exists():
        raise UserError(f"--out: {a.out} is there already; name a new folder")
    part = a.out.with_name(f".{a.out.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a killed process
    try:
        number = unpack(a.source, part)
        os.replace(part, a.out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"{number:,} images in {a.out}")


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
