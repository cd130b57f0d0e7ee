"""A converted model: a folder ready for a hub, with config.json, model.safetensors and a card.

config.json has checksums of itself and of the weights; the card is left to who publishes it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from hdit.bounds import Scale, Side
from hdit.config import RunConfig, differences, parse
from hdit.config.errors import explain
from hdit.files import fingerprint, write_json
from hdit.interop import Contents
from hdit.interop.layout import check_shapes, expected_shapes
from hdit.limits import MAX_CLASSES
from hdit.manifest import DamagedError, check_files, check_format, read_files
from hdit.models.cost import cost
from hdit.names import printable
from hdit.protocols import DataShape, Spec
from hdit.reading import ReadingError, read_object
from hdit.runs.checkpoint import CheckpointError
from hdit.tensors import load_tensors, save_tensors

KIND = "hdit"
FORMAT = 2
WITHOUT_CHECKSUMS = 1  # an earlier format, which is read with a warning
CONFIG, WEIGHTS = "config.json", "model.safetensors"
HELD = {"ema": "moving average (EMA)", "model": "as trained", "given": "as they came"}


class _Shape(Spec):
    """As hdit.protocols.DataShape."""

    channels: Side
    height: Side
    width: Side
    num_classes: int = Field(ge=0, le=MAX_CLASSES)
    sigma_data: Scale


class _Facts(Spec):
    """What config.json says of the model, apart from the checksums."""

    origin: str
    weights: Literal["ema", "model", "given"]
    images: int = Field(ge=0, lt=2**63)
    shape: _Shape
    classes: list[str]
    config: dict[str, Any]


def read(folder: Path, warn: Callable[[str], None]) -> Contents:
    """The model in a folder of `write`; `warn` hears of one that has no checksums.

    Raises UserError where it is damaged, or its facts contradict each other.
    """
    path = folder / CONFIG
    try:
        raw = read_object(path)
    except ReadingError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise CheckpointError(f"{path}: damaged: {reason}") from None
    if raw.get("hdit_format") == WITHOUT_CHECKSUMS:
        warn(
            f"{folder}: written by an earlier version, without checksums, so that damage is not "
            "noticed; `hdit convert` it into a new folder"
        )
    else:
        _check_sums(folder, raw)
    facts, config, shape = _facts(path, raw)
    weights = folder / WEIGHTS
    try:
        tensors = load_tensors(weights)
    except FileNotFoundError:
        raise CheckpointError(f"{weights}: missing from the converted model") from None
    except SafetensorError as error:
        raise CheckpointError(f"{weights}: damaged: {error}") from None
    shapes = {key: tuple(t.shape) for key, t in tensors.items()}
    check_shapes(weights, shapes, expected_shapes(config, shape))
    sets: dict[str, dict[str, Tensor]] = {facts.weights: tensors}
    return Contents(config, shape, tuple(facts.classes), sets, facts.origin, facts.images)


def _check_sums(folder: Path, raw: dict[str, Any]) -> None:
    """Raises UserError where config.json or the weights are not as they were written."""
    path = folder / CONFIG
    check_format(raw.get("hdit_format"), FORMAT, str(path))
    if raw.get("sha256") != _sha256(raw):
        raise CheckpointError(
            f"{path}: damaged, or changed by hand: its checksum is another; convert the model "
            "again, and give other settings of sampling by --set"
        )
    try:
        check_files(folder, read_files(raw.get("files"), [WEIGHTS], str(path)))
    except DamagedError as error:
        raise CheckpointError(f"{error}; copy or convert the model again") from None


def _sha256(raw: dict[str, Any]) -> str:
    """Hash of what config.json says; what a hub adds, or how it is laid out, does not matter."""
    told = {key: raw.get(key) for key in ("hdit_format", "files", *_Facts.model_fields)}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _facts(path: Path, raw: dict[str, Any]) -> tuple[_Facts, RunConfig, DataShape]:
    """What config.json says, checked. Raises UserError with the keys that are wrong."""
    try:
        facts = _Facts.model_validate({k: v for k, v in raw.items() if k in _Facts.model_fields})
    except ValidationError as error:
        lines = [f"  {explain(_Facts, e)}" for e in error.errors()]
        raise CheckpointError("\n".join([f"{path}: damaged:", *lines])) from None
    config, shape = parse(facts.config, str(path)), DataShape(**facts.shape.model_dump())
    problems = [
        f"shape.{key} is {theirs!r}, where its config has {ours!r}"
        for key, ours, theirs in differences(
            asdict(config.data_shape(shape.num_classes)), asdict(shape)
        )
        if key != "channels"  # the tensors tell
    ]
    if (names := len(set(facts.classes))) != shape.num_classes:
        problems.append(f"classes names {names}, and shape.num_classes is {shape.num_classes}")
    if problems:
        raise CheckpointError("\n  ".join([f"{path}: damaged:", *problems]))
    return facts, config, shape


def write(model: Contents, folder: Path, name: str) -> tuple[str, ...]:
    """Writes the folder; `name` is what the card calls the model -> notes."""
    folder.mkdir()
    save_tensors(model.state_dict, folder / WEIGHTS, {"format": "pt"})
    raw = {
        "hdit_format": FORMAT,
        "origin": model.origin,
        "weights": model.weights,
        "images": model.images,
        "shape": asdict(model.shape),
        "classes": model.classes,
        "config": model.config.model_dump(mode="json", exclude_none=True),
        "files": {WEIGHTS: fingerprint(folder / WEIGHTS)},
    }
    write_json(folder / CONFIG, raw | {"sha256": _sha256(raw)})
    (folder / "README.md").write_text(card(model, printable(name)), encoding="utf-8")
    return model.notes


def _options(model: Contents) -> str:
    """Of `hdit sample`, to see what the model can do."""
    options = ""
    if model.shape.num_classes:
        options += " --labels '#0'"
        if model.config.training.label_dropout > 0:
            options += " --guidance 1.5"
    if model.config.space.kind == "latent" and model.config.space.vae is None:
        options += " --set space.vae=FOLDER"
    return options


def card(model: Contents, name: str) -> str:
    """The model card; which licence the weights have is left to whoever publishes them."""
    shape, kind = model.shape, {"hdit": "HDiT", "dit": "DiT"}[model.config.model.kind]
    rows = cost(model.config.model, shape, model.config.output_channels(shape))
    params, macs = sum(row.params for row in rows), sum(row.macs for row in rows)
    dtypes = Counter(str(t.dtype).removeprefix("torch.") for t in model.state_dict.values())
    size = f"{shape.channels} x {shape.height} x {shape.width}"
    unknown = model.config.data_shape(0).chw != shape.chw
    latent = unknown or model.config.space.kind == "latent"
    if unknown:
        usage = f"The model makes latents of {size}, which `hdit sample` cannot decode yet.\n"
    else:
        usage = f"```sh\nhdit sample {name} -n 16{_options(model)}\n```\n"
    facts = {
        "Model": kind,
        "Sees and predicts": f"{size} (channels, height, width)"
        + (", latents" if latent else ", pixels"),
        "Classes": str(shape.num_classes or "none"),
        "Parameters": f"{params:,}",
        "MACs of a forward pass": f"{macs:,}",
        "Stored as": ", ".join(dtypes),
        "Weights": HELD[model.weights],
        "Trained on": f"{model.images:,} images" if model.images else "not known",
        "Origin": model.origin,
    }
    table = "".join(f"| {key} | {value} |\n" for key, value in facts.items())
    return f"""---
library_name: hdit
tags: [image-generation, diffusion, {model.config.model.kind}]
# license: to be set by whoever publishes these weights
---

# {name}

| | |
|---|---|
{table}
## Sample

{usage}
`config.json` has all settings, `model.safetensors` the weights.

## Licence

To be stated by whoever publishes these weights; those of the origin may bind them.
"""
