"""Our own folder, ready for a hub: config.json, model.safetensors and a model card."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from safetensors.torch import save_file

from hdit.interop.model import Model
from hdit.models.cost import cost
from hdit.runs.checkpoint import (
    EXPORT_CONFIG,
    EXPORT_WEIGHTS,
    Checkpoint,
    Export,
    export_settings,
    open_export,
)

KIND = "hdit"
HELD = {"ema": "moving average (EMA)", "model": "as trained", "given": "as they came"}


def of_checkpoint(found: Checkpoint, raw: bool) -> Model:
    """The model of one of our runs, checkpoints or converted folders."""
    held, state = found.weights(raw), found.state
    origin = found.origin if isinstance(found, Export) else f"{KIND} run {_run(found.folder)}"
    tensors = found.tensors(held)
    return Model(found.config, state.shape, state.classes, tensors, origin, held, state.images)


def _run(folder: Path) -> str:
    folder = folder.resolve()
    in_run = folder.parent.name == "checkpoints"
    return f"{folder.parent.parent.name}, checkpoint {folder.name}" if in_run else folder.name


def read(path: Path, raw: bool) -> Model:
    return of_checkpoint(open_export(path), raw)


def write(model: Model, folder: Path, name: str) -> tuple[str, ...]:
    """Writes the folder; `name` is what the card calls the model -> notes."""
    folder.mkdir()
    tensors = {key: t.contiguous() for key, t in model.state_dict.items()}
    save_file(tensors, folder / EXPORT_WEIGHTS, metadata={"format": "pt"})
    text = export_settings(
        model.config, model.shape, model.classes, model.weights, model.images, model.origin
    )
    (folder / EXPORT_CONFIG).write_text(text, encoding="utf-8")
    (folder / "README.md").write_text(card(model, name), encoding="utf-8")
    return model.notes


def card(model: Model, name: str) -> str:
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
