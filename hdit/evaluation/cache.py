"""Features of reference sets, kept by the content that they are of: pixels, network, pipeline."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from safetensors import SafetensorError
from torch import Tensor

from hdit.evaluation.distances import Gaussian
from hdit.evaluation.extractor import Extractor
from hdit.evaluation.image_sets import ImageSet
from hdit.evaluation.measuring import KID_SEED, Features, Measured, digest, kept_rows, measure
from hdit.files import make_folder, whole
from hdit.tensors import load_tensors, save_tensors
from hdit_kernels.native import cache_folder

VERSION = 1  # of what is kept; one more where any of the code that makes it changes its numbers


def default_folder() -> Path:
    """Where they are kept: in hdit's cache, which XDG_CACHE_HOME moves."""
    return cache_folder() / "features"


class FeatureCache:
    """A folder of features by key, each file whole and with its checksum."""

    def __init__(self, folder: Path, say: Callable[[str], None] = lambda text: None):
        """`say` hears of files that are damaged, or cannot be written."""
        self.folder, self.say = folder, say

    def measure(
        self,
        images: ImageSet,
        extractors: Mapping[str, Extractor],
        *,
        batch_size: int,
        workers: int,
        which: int,
        on_images: Callable[[int], None],
    ) -> Measured:
        """What `measure` gives, from the cache where it holds all of it; else it keeps it.

        Images are always read, and hashed: a change of any pixel, or of their order, is another
        key. Only the networks are spared.
        """
        if all(one.is_whole for one in extractors.values()) and self._has_seen(images, extractors):
            pixels = digest(images, batch_size, workers)
            kept = kept_rows(len(images), which)
            found = {}
            for slot, extractor in extractors.items():
                path = self._path(pixels.in_order, extractor, which)
                if features := self._read(path, len(images)):
                    found[slot] = features, str(path)
            if len(found) == len(extractors):
                on_images(len(images))
                features_of = {slot: features for slot, (features, _) in found.items()}
                places = {slot: place for slot, (_, place) in found.items()}
                return Measured(pixels, features_of, kept, cached=places)
        measured = measure(
            images,
            extractors,
            batch_size=batch_size,
            workers=workers,
            which=which,
            on_images=on_images,
        )
        for slot, extractor in extractors.items():
            if extractor.is_whole:
                path = self._path(measured.pixels.in_order, extractor, which)
                self._keep(path, measured.features[slot], self._mark(images, extractor))
        return measured

    def _has_seen(self, images: ImageSet, extractors: Mapping[str, Extractor]) -> bool:
        """Whether a set of this name and number was kept before: else to hash it would be in vain,
        as its images are read again for the networks."""
        return all(self._mark(images, one).is_file() for one in extractors.values())

    def _mark(self, images: ImageSet, extractor: Extractor) -> Path:
        name = _hash([VERSION, images.record["place"], len(images), extractor.sha256])
        return self.folder / f"{name}.seen"

    def _path(self, pixels: str, extractor: Extractor, which: int) -> Path:
        """By all that the numbers depend on; versions, as a library's update may move a digit."""
        device = extractor.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        versions = torch.__version__, PIL.__version__, np.__version__
        facts = [
            VERSION,
            pixels,
            extractor.sha256,
            extractor.input,
            KID_SEED,
            which,
            name,
            versions,
        ]
        return self.folder / f"{_hash(facts)}.safetensors"

    def _read(self, path: Path, n: int) -> Features | None:
        try:
            tensors = load_tensors(path)
            stored = bytes(tensors.pop("checksum").tolist())
            if stored != _checksum(tensors):
                raise ValueError("its checksum is not that of its content")
            gaussian = Gaussian(n, tensors["mean"], tensors["cov"])
            return Features(gaussian, tensors["rows"])
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            self.say(f"{path}: is damaged and made anew: {error}")
            return None

    def _keep(self, path: Path, features: Features, mark: Path) -> None:
        """Writes features, and a mark that their set was seen. A full disk costs no figures."""
        gaussian = features.gaussian
        tensors = {"mean": gaussian.mean, "cov": gaussian.cov, "rows": features.rows}
        checksum = torch.tensor(list(_checksum(tensors)), dtype=torch.uint8)
        try:
            make_folder(self.folder)
            with whole(path, shared=True, durable=False) as part:
                save_tensors({**tensors, "checksum": checksum}, part)
            with whole(mark, shared=True, durable=False) as part:
                part.write_text(path.name + "\n", encoding="utf-8")
        except OSError as error:
            self.say(f"warning: features are not kept: {error}; --no-cache does without")


def _hash(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _checksum(tensors: Mapping[str, Tensor]) -> bytes:
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.numpy().data)
    return found.digest()
