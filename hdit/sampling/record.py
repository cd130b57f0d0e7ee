"""What a set of samples is: which images, how they are made, and the record that proves it.

The record is a small samples.json. A folder also has samples.jsonl, a line for each image. Records
of versions before this list the images in samples.json itself, and are still read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import hdit
from hdit import randomness
from hdit.config import differences
from hdit.errors import UserError
from hdit.limits import MAX_SAMPLES
from hdit.names import escape
from hdit.protocols import NULL_LABEL
from hdit.reading import ReadingError, read_json
from hdit.runs.trained import Trained

SAMPLES, LINES, GRID = "samples.json", "samples.jsonl", "grid.png"
MAX_RECORD = 2**28  # bytes: older ones list some two million samples
FEW_DIGITS = 6  # of a seed in a file's name
AT_A_TIME = 2**14  # images whose entries are made at once


@dataclass(frozen=True)
class Labels:
    """The classes of a set: `chosen` in turn, or drawn from them by each image's seed."""

    kind: str  # balanced, random or given
    chosen: tuple[int, ...]  # indices, or NULL_LABEL

    def of(self, first: int, indices: np.ndarray) -> np.ndarray:
        """The label of each image, whose seeds are first + indices: (n,) -> (n,) int64."""
        place = indices % len(self.chosen)
        if self.kind == "random":
            drawn = randomness.uniform(0, "sampling label", first + indices).numpy()
            place = (drawn * len(self.chosen)).astype(np.int64)
        return self._array[place]

    @cached_property
    def _array(self) -> np.ndarray:
        return np.array(self.chosen, np.int64)


@dataclass(frozen=True)
class Plan:
    """Which images a set has: image i is of seed first + i, and (c h w) uint8."""

    first: int
    number: int
    shape: tuple[int, int, int]
    labels: Labels | None
    classes: tuple[str, ...]

    @property
    def digits(self) -> int:
        """Digits of a seed in names of files."""
        return max(FEW_DIGITS, len(str(self.first + self.number - 1)))

    def name(self, index: int) -> str:
        """The name of an image's files, without their ending: its seed."""
        return f"{self.first + index:0{self.digits}d}"

    def index(self, name: str) -> int | None:
        """The image whose file is NAME.png; None for a name that is none of them."""
        stem = name.removesuffix(".png")
        if stem == name or len(stem) != self.digits or not (stem.isascii() and stem.isdigit()):
            return None
        index = int(stem) - self.first
        return index if 0 <= index < self.number else None

    def labels_of(self, indices: np.ndarray) -> np.ndarray | None:
        """The labels of these images, (n,) int64; None without classes."""
        return None if self.labels is None else self.labels.of(self.first, indices)

    def entry(self, index: int) -> dict[str, Any]:
        """What a record says of one image."""
        return next(self.entries(np.array([index])))

    def entries(self, indices: np.ndarray) -> Iterator[dict[str, Any]]:
        """What a record says of each of these images."""
        found = self.labels_of(indices)
        labels = [NULL_LABEL] * len(indices) if found is None else found.tolist()
        for index, n in zip(indices.tolist(), labels, strict=True):
            label = None if n == NULL_LABEL else n
            yield {
                "file": f"{self.name(index)}.png",
                "seed": self.first + index,
                "label": label,
                "class": None if label is None else self.classes[label],
            }

    def ranges(self) -> Iterator[np.ndarray]:
        """All indices in order, so many at a time that memory stays small."""
        for first in range(0, self.number, AT_A_TIME):
            yield np.arange(first, min(first + AT_A_TIME, self.number))

    def lines(self) -> Iterator[str]:
        """The lines of samples.jsonl."""
        for some in self.ranges():
            for entry in self.entries(some):
                yield json.dumps(entry, ensure_ascii=False) + "\n"


# ---- how they are made ---------------------------------------------------------------------------


def hash_of(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of weights by name, dtype, shape and bytes, wherever they are stored."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def make_record(
    trained: Trained, plan: Plan, raw: bool, guide: Trained | None, guide_scale: float
) -> dict[str, Any]:
    """What samples.json says before any image is made. Raises UserError as `Trained.weights`."""
    config, labels = trained.config, plan.labels
    record: dict[str, Any] = {
        "hdit": hdit.__version__,
        "checkpoint": escape(str(trained.path)),
        "sha256": hash_of(trained.tensors(raw)),
        "images": trained.images,
        "weights": trained.weights(raw),
        "sampling": config.sampling.model_dump(mode="json", exclude_none=True),
        "sigma_range": list(config.sigma_range()),
        "evaluations": None,  # until all are made
        "guide": None,
        "shape": list(plan.shape),
        "labels": None,
        "seeds": {"first": plan.first, "number": plan.number},
        "digits": plan.digits,
    }
    if guide:
        record["guide"] = {
            "checkpoint": escape(str(guide.path)),
            "sha256": hash_of(guide.tensors(raw)),
            "scale": guide_scale,
        }
    if labels:
        record["labels"] = {"kind": labels.kind, "number": len(labels.chosen)}
    if labels and labels.kind == "given":
        record["labels"]["classes"] = [
            None if n == NULL_LABEL else plan.classes[n] for n in labels.chosen
        ]
        record["labels"]["indices"] = [None if n == NULL_LABEL else n for n in labels.chosen]
    return record


def recipe(record: Mapping[str, Any]) -> dict[str, Any]:
    """What makes an image what it is, of a record: two sets are one where it is the same."""
    same = ("sha256", "weights", "sigma_range", "shape", "labels", "seeds", "form")
    told: dict[str, Any] = {key: record.get(key) for key in same}
    sampling = dict(_table(record.get("sampling")))
    for key in ("batch_size", "compile", "grid"):
        sampling.pop(key, None)
    sampling["guidance"] = {
        key: value
        for key, value in _table(sampling.get("guidance")).items()
        if key not in ("batched",)
    }
    guide = record.get("guide")
    told["guide"] = guide and {key: guide.get(key) for key in ("sha256", "scale")}
    return {**told, "sampling": sampling}


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def check_same(found: Mapping[str, Any], asked: Mapping[str, Any], where: Path) -> None:
    """Raises UserError where a set that was found is another than the one that is asked for."""
    if different := differences(recipe(found), json.loads(json.dumps(recipe(asked)))):
        key, then, now = different[0]
        key = {"sha256": "the hash of the weights", "guide.sha256": "the guide's hash"}.get(
            key, key
        )
        raise UserError(
            f"--out: {where} has samples of other settings: {key} is {then!r:.80} there, and "
            f"{now!r:.80} is asked for; name another place, or add --overwrite"
        )


def text_of(record: Mapping[str, Any], plan: Plan, index: int) -> str:
    """The recipe of one image as a short JSON object, for its own file."""
    sampling, guide, entry = record["sampling"], record["guide"], plan.entry(index)
    told: dict[str, Any] = {
        "hdit": record["hdit"],
        "checkpoint": record["sha256"],
        "weights": record["weights"],
        "seed": entry["seed"],
        "label": entry["label"],
        "class": entry["class"],
        "sampler": sampling["sampler"],
        "steps": sampling["steps"],
        "sigmas": sampling["sigmas"],
        "sigma_range": record["sigma_range"],
        "guidance": sampling["guidance"],
        "guide": guide and {"checkpoint": guide["sha256"], "scale": guide["scale"]},
        "precision": sampling["precision"],
    }
    return json.dumps({key: value for key, value in told.items() if value is not None})


# ---- reading it again ----------------------------------------------------------------------------


def read_record(path: Path) -> Any:
    """The content of a samples.json; None where there is none. Raises UserError."""
    try:
        return read_json(path, MAX_RECORD)
    except FileNotFoundError:
        return None
    except ReadingError as error:
        raise UserError(f"{error}; mend or remove it") from None


def read_samples(record: Path) -> list[str]:
    """The names of the images that a samples.json lists. Raises UserError as `sample_names`."""
    try:
        return sample_names(read_json(record, MAX_RECORD), str(record))
    except ReadingError as error:
        raise UserError(f"{error}; mend or remove it") from None


def sample_names(content: Any, record: str) -> list[str]:
    """The names of the images that the content of a samples.json tells of.

    Raises UserError, which names the `record`, where it is damaged, or names what does not lie
    beside it.
    """
    if isinstance(content, dict) and "seeds" in content and "samples" not in content:
        return list(_named_by_seed(content, record))
    samples = content.get("samples") if isinstance(content, dict) else None
    if not isinstance(samples, list):
        raise UserError(f"{record}: samples must be a list, got {samples!r:.60}; mend or remove it")
    files: list[str] = []
    for index, entry in enumerate(samples):
        file = entry.get("file") if isinstance(entry, dict) else None
        if not isinstance(file, str) or not _is_plain(file):
            raise UserError(
                f"{record}: samples[{index}].file must be the name of an image beside it, got "
                f"{file!r:.60}; mend or remove it"
            )
        files.append(file)
    return files


def _named_by_seed(content: dict[str, Any], record: str) -> Iterator[str]:
    """The names of images that are told by their seeds. Raises UserError for damaged ones."""
    seeds = _table(content["seeds"])
    told: dict[str, Any] = {"seeds.first": seeds.get("first"), "seeds.number": seeds.get("number")}
    told["digits"] = content.get("digits")
    most = {"seeds.first": 2**63, "seeds.number": MAX_SAMPLES, "digits": 20}
    for key, value in told.items():
        if type(value) is not int or not 0 <= value <= most[key]:
            raise UserError(
                f"{record}: {key} must be a number from 0 to {most[key]}, got {value!r:.60}; mend "
                "or remove it"
            )
    first, number, digits = map(int, told.values())
    return (f"{seed:0{digits}d}.png" for seed in range(first, first + number))


def _is_plain(name: str) -> bool:
    """Whether a name is that of a file beside another, and leads nowhere else."""
    return name == Path(name).name and name not in ("", "..") and "\0" not in name


def mean_evaluations(counts: list[tuple[int, int]]) -> int | None:
    """The mean of (images, evaluations of each of them), rounded; None of nothing."""
    images = sum(number for number, _ in counts)
    return round(sum(number * each for number, each in counts) / images) if images else None
