"""A converted model: a folder ready for a hub, with config.json, model.safetensors and a card."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from hdit.config import parse
from hdit.interop import Contents
from hdit.interop.layout import check_shapes, expected_shapes
from hdit.models.cost import cost
from hdit.protocols import DataShape
from hdit.runs.checkpoint import CheckpointError
from hdit.tensors import save_tensors

KIND = "hdit"
FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
HELD = {"ema": "moving average (EMA)", "model": "as trained", "given": "as they came"}


def is_export(folder: Path) -> bool:
    """Whether a folder says of itself that it is a converted model, or looks like a damaged one."""
    try:
        raw = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except OSError:
        return False
    except ValueError:
        return (folder / WEIGHTS).is_file()
    return isinstance(raw, dict) and "hdit_format" in raw


def read(folder: Path) -> Contents:
    """The model in a folder of `write`. Raises UserError where it is damaged."""
    path = folder / CONFIG
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None
    if raw["hdit_format"] != FORMAT:
        raise CheckpointError(
            f"{path}: has format {raw['hdit_format']!r}, this version reads {FORMAT}"
        )
    try:
        shape, classes = DataShape(**raw["shape"]), tuple(raw["classes"])
        settings, held, origin, images = (
            raw[key] for key in ("config", "weights", "origin", "images")
        )
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged, or of another version: {error}") from None
    config, weights = parse(settings, str(path)), folder / WEIGHTS
    try:
        tensors = load_file(weights)
    except FileNotFoundError:
        raise CheckpointError(f"{weights}: missing from the converted model") from None
    except SafetensorError as error:
        raise CheckpointError(f"{weights}: damaged: {error}") from None
    shapes = {key: tuple(t.shape) for key, t in tensors.items()}
    check_shapes(weights, shapes, expected_shapes(config, shape))
    return Contents(config, shape, classes, {held: tensors}, origin, images)


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
    }
    text = json.dumps(raw, indent=1, ensure_ascii=False) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    (folder / "README.md").write_text(card(model, name), encoding="utf-8")
    return model.notes


def card(model: Contents, name: str) -> str:
    """The model card; which licence the weights have is left to whoever publishes them."""
    shape, kind = model.shape, {"hdit": "HDiT", "dit": "DiT"}[model.config.model.kind]
    rows = cost(model.config.model, shape, model.config.output_channels(shape))
    params, macs = sum(row.params for row in rows), sum(row.macs for row in rows)
    dtypes = Counter(str(t.dtype).removeprefix("torch.") for t in model.state_dict.values())
    size = f"{shape.channels} x {shape.height} x {shape.width}"
    latent = model.config.data_shape(0).chw != shape.chw
    if latent:
        usage = f"The model makes latents of {size}, which `hdit sample` cannot decode yet.\n"
    else:
        guided = "" if not shape.num_classes else " --labels 0 --guidance 1.5"
        usage = f"```sh\nhdit sample {name} -n 16{guided}\n```\n"
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
