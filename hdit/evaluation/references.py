"""Reference files in ADM's form: an npz with the mean and covariance of features, and images."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hdit.arrays import ArraysError, read_npz
from hdit.errors import UserError
from hdit.evaluation.distances import Gaussian
from hdit.evaluation.extractor import Extractor
from hdit.evaluation.image_sets import ImageSet
from hdit.evaluation.measuring import Measured
from hdit.files import whole
from hdit.reading import ReadingError, parse_json

WIDTH = 2048  # of the Inception's features
IMAGES = 10_000  # as ADM's files have them
MAX_BYTES = 2**32  # of their pixels
SEED = 4  # of Philox, beside those of other draws
RECORD = "hdit_record"
"""JSON in bytes: what the statistics are of. ADM's own files have none."""


class Statistics(NamedTuple):
    """Mean and covariance of a file. `record` says what they are of; empty where it does not."""

    path: Path
    gaussian: Gaussian
    sha256: str  # of mean and covariance
    record: dict[str, Any]
    has_images: bool


def read_statistics(path: Path) -> Statistics | None:
    """The statistics of an npz file; None where it has none. Raises UserError."""
    try:
        names, arrays = read_npz(path, ("mu", "sigma", RECORD))
    except ArraysError as error:
        raise UserError(f"{path}: cannot be read as npz: {error.reason}") from None
    if "mu" not in arrays or "sigma" not in arrays:
        return None
    mean, cov = (torch.from_numpy(np.array(arrays[key], np.float64)) for key in ("mu", "sigma"))
    if mean.ndim != 1 or cov.shape != (len(mean),) * 2 or not len(mean):
        shapes = " and ".join(" x ".join(map(str, arrays[key].shape)) for key in ("mu", "sigma"))
        raise UserError(f"{path}: mu and sigma must be (d,) and (d, d), got {shapes}")
    if not mean.isfinite().all() or not cov.isfinite().all():
        raise UserError(f"{path}: mu and sigma must be finite")
    record = _record_of(arrays.get(RECORD), path)
    digest = hashlib.sha256(mean.numpy().tobytes() + cov.numpy().tobytes()).hexdigest()
    n = record.get("images")
    gaussian = Gaussian(n if isinstance(n, int) else len(mean) + 1, mean, cov)
    return Statistics(path, gaussian, digest, record, "arr_0" in names)


def _record_of(content: np.ndarray | None, path: Path) -> dict[str, Any]:
    if content is None:
        return {}
    try:
        found = parse_json(content.astype(np.uint8).tobytes(), f"{path}: {RECORD}")
    except ReadingError as error:
        raise UserError(f"{error}; the file is damaged") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: {RECORD} must be an object; the file is damaged")
    return found


def why_not(statistics: Statistics, extractor: Extractor) -> str | None:
    """Why statistics cannot be compared with features of an extractor; None where they can.

    A file without a record is taken as ADM's: of the Inception and of ADM's pipeline, which EDM's
    is meant to equal.
    """
    d, record = len(statistics.gaussian.mean), statistics.record
    where = f"mu and sigma of {statistics.path}"
    if not record:
        if extractor.protocol not in ("adm", "edm"):
            return (
                f"{where} do not say what they are of, and so are taken as ADM's; they are used "
                "with --protocol adm (or edm) alone"
            )
        return None if d == WIDTH else f"{where} are of {d} features, and the Inception has {WIDTH}"
    theirs, ours = (
        (record.get("features_sha256"), record.get("input")),
        (extractor.sha256, extractor.input),
    )
    if theirs != ours:
        return (
            f"{where} are of {record.get('features')} ({record.get('input')}), and the features "
            f"here {extractor.name} ({extractor.input})"
        )
    return None


# ---- writing -------------------------------------------------------------------------------------


def write_reference(
    path: Path, images: ImageSet, measured: Measured, slot: str, extractor: Extractor
) -> int:
    """Writes `mu`, `sigma` and `arr_0` (n h w 3) uint8 of a set -> the number of its images there.

    They are all images, or else 10,000 drawn at random, or as many as 4 GiB hold; none where the
    images are of several sizes. Nothing is held in memory but one image at a time.
    """
    gaussian = measured.features[slot].gaussian
    record = {
        "images": gaussian.n,
        "features": extractor.name,
        "features_sha256": extractor.sha256,
        "input": extractor.input,
        "protocol": extractor.protocol,
        "pixels_sha256": measured.pixels.sha256,
        "place": images.record["place"],
    }
    chosen = _chosen(measured.pixels.sizes)
    with whole(path) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as file:
        _write_array(file, "mu", gaussian.mean.numpy())
        _write_array(file, "sigma", gaussian.cov.numpy())
        _write_array(file, RECORD, np.frombuffer(json.dumps(record).encode(), np.uint8))
        if len(chosen):
            _write_images(file, images, chosen, measured.pixels.sizes[0])
    return len(chosen)


def _chosen(sizes: Sequence[tuple[int, int]]) -> np.ndarray:
    """Indices of the images that go into the file."""
    if len(set(sizes)) > 1:
        return np.zeros(0, np.int64)
    height, width = sizes[0]
    most = min(IMAGES, MAX_BYTES // (3 * height * width))
    order = np.random.Generator(np.random.Philox(key=[SEED, 0])).permutation(len(sizes))
    return np.sort(order[:most])


def _write_array(file: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    with file.open(f"{name}.npy", "w", force_zip64=True) as stream:
        np.lib.format.write_array(stream, array, version=(1, 0), allow_pickle=False)


def _write_images(
    file: zipfile.ZipFile, images: ImageSet, chosen: np.ndarray, size: tuple[int, int]
) -> None:
    shape = (len(chosen), *size, 3)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with file.open("arr_0.npy", "w", force_zip64=True) as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        for first in range(0, len(chosen), 64):
            for image in images.pictures(chosen[first : first + 64].tolist()):
                stream.write(_rows_of(image))


def _rows_of(image: Tensor) -> bytes:
    """(3 h w) -> its bytes as (h w 3)."""
    return image.permute(1, 2, 0).contiguous().numpy().tobytes()
