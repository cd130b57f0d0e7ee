"""Times the way from image files to batches beside plain PIL in a DataLoader.

    python scripts/bench_data.py my_images --size 256

The peer opens each file with PIL, converts it to RGB, crops it as ADM does, and stacks tensors, as
a typical training script does. In each round every contender loads the same images once, in turn,
from files that the system has in memory; ratios are medians of the ratios within a round. First the
pixels of every image are compared. `cached` is hdit with data.cache, filled before.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Iterable, Iterator
from itertools import count, islice
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from hdit.data import FolderSpec
from hdit.data.batches import Batches, Layout, dataset_indices
from hdit.data.images import Images

SEED = 0


class Plain:
    """Images by PIL alone, in ADM's centre crop."""

    def __init__(self, paths: list[str], size: int):
        self.paths, self.size = paths, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        image = Image.open(self.paths[index]).convert("RGB")
        while min(image.size) >= 2 * self.size:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = self.size / min(image.size)
        image = image.resize(
            (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
        )
        left, top = (image.width - self.size) // 2, (image.height - self.size) // 2
        pixels = np.array(image)[top : top + self.size, left : left + self.size]
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


class Endless:
    """The same images in the same order as hdit's, epoch after epoch."""

    def __init__(self, length: int, batch: int):
        self.length, self.batch = length, batch

    def __iter__(self) -> Iterator[list[int]]:
        for first in count(step=self.batch):
            drawn = dataset_indices(SEED, np.arange(first, first + self.batch), self.length)
            yield drawn.tolist()


def seconds(batches: Iterable[object]) -> float:
    start = time.perf_counter()
    for _ in batches:
        pass
    return time.perf_counter() - start


def open_folder(path: str, size: int, cache: str | None) -> Images:
    return FolderSpec(path=path, size=(size, size), flip=False, cache=cache).open()


def compare(ours: Images, plain: Plain) -> int:
    """How many of the images have the same pixels in both. Names each that has not."""
    same = 0
    for index in range(len(ours)):
        equal = torch.equal(ours[index].image, plain[index])
        same += equal
        if not equal:
            print(f"differs: {plain.paths[index]}")
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("path", help="a folder of opaque, upright images")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--images", type=int, default=2000, help="drawn in each round")
    parser.add_argument("--rounds", type=int, default=9)
    a = parser.parse_args()
    with TemporaryDirectory() as cache:
        ours, cached = (open_folder(a.path, a.size, place) for place in (None, cache))
        plain = Plain([ours.entries.name(i) for i in range(len(ours))], a.size)
        same = compare(ours, plain)
        for index in range(len(cached)):
            cached[index]
        print(
            f"{len(ours):,} images to {a.size}x{a.size}; {same:,} have identical pixels; "
            f"Pillow {PIL.__version__}, torch {torch.__version__}, {platform.machine()}"
        )
        number = -(-a.images // a.batch)
        print(
            f"{'workers':>7} {'plain/s':>9} {'hdit/s':>9} {'ratio':>6} {'cached/s':>9} {'ratio':>6}"
        )
        for workers in a.workers:
            times: dict[str, list[float]] = {"plain": [], "hdit": [], "cached": []}
            names = list(times)
            for i in range(a.rounds + 1):
                for name in names[i % 3 :] + names[: i % 3]:
                    if name == "plain":
                        order = Endless(len(plain), a.batch)
                        batches: Iterable[object] = islice(
                            DataLoader(plain, batch_sampler=order, num_workers=workers), number
                        )
                    else:
                        source = ours if name == "hdit" else cached
                        batches = islice(
                            Batches(
                                source,
                                seed=SEED,
                                start=0,
                                layout=Layout(a.batch),
                                workers=workers,
                            ),
                            number,
                        )
                    took = seconds(batches)
                    if i:  # the first round warms up
                        times[name].append(took)
            speed = {name: number * a.batch / median(values) for name, values in times.items()}
            ratio = {
                name: median(p / t for p, t in zip(times["plain"], values, strict=True))
                for name, values in times.items()
            }
            print(
                f"{workers:>7} {speed['plain']:>9.0f} {speed['hdit']:>9.0f} {ratio['hdit']:>6.2f} "
                f"{speed['cached']:>9.0f} {ratio['cached']:>6.2f}"
            )


if __name__ == "__main__":
    main()
