"""Samples of a model: PNG files named by seed, a grid, and a record of how they were made."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from hdit.config.schema import SamplingSpec
from hdit.device import default_device, keep_freed_memory
from hdit.errors import SolverError, UserError
from hdit.files import check_free_space, check_writable, to_json, write_text
from hdit.locks import LOCK, locked
from hdit.messages import say
from hdit.names import escape
from hdit.protocols import NULL_LABEL
from hdit.reading import ReadingError, read_json
from hdit.report.grids import save_grid, save_png
from hdit.runs.trained import Trained
from hdit.sampling.sample import GuideModel, Samples, check_null_class, sample, settle_sampling
from hdit.tensors import NotFiniteError

SAMPLES, GRID = "samples.json", "grid.png"
MAX_RECORD = 2**28  # bytes, of some two million samples
GRID_LIMIT = 100  # images in the grid

Making = Callable[[Callable[[], None]], Iterator[Samples]]
"""on_step, called after each step -> batches of samples, made one after the other."""


def write_samples(
    trained: Trained,
    labels: list[int] | None,
    seeds: list[int],
    out: Path | None,
    console: Console,
    *,
    raw: bool = False,
    overwrite: bool = False,
    guide: Trained | None = None,
    guide_scale: float = 2.0,
) -> str:
    """Writes PNG files named by seed, grid.png and samples.json -> a line that tells of them.

    The record is there from the beginning, so that --overwrite finds what an interrupt left.
    Raises UserError where `out` is not free, or the space is not the one of training.
    """
    keep_freed_memory()
    check_null_class(trained.config, trained.shape, labels, guide.config if guide else None)
    device = default_device()
    config = settle_sampling(
        trained.config, device, len(seeds), lambda text: say(console, f"warning: {text}")
    )
    trained = trained.configured(config)
    record = _record(trained, seeds, labels, raw)
    if guide:
        record["guide"] = {"checkpoint": escape(str(guide.path)), "scale": guide_scale}
    if out is None:
        out = trained.samples / _folder_name(trained, seeds[0], raw, guide_scale if guide else None)
    _check_free(out, overwrite)
    _check_targets(out, record)
    check_free_space(out, len(seeds), math.prod(config.data.shape))
    with locked(out / LOCK, "is writing samples here", "wait for its end, or name another --out"):
        _check_free(out, overwrite)  # again: another process may have just ended
        samples = _prepare(trained, seeds, labels, device, raw, guide, guide_scale)
        _remove_old_samples(out)
        write_text(out / SAMPLES, to_json(record, str(out / SAMPLES)))
        started = monotonic()
        paths = [out / entry["file"] for entry in record["samples"]]
        try:
            evaluations, shown = _write_images(samples, paths, config.sampling, console)
        except (NotFiniteError, SolverError):  # the model is ruined: nothing of it is kept
            _remove_old_samples(out)
            raise
        seconds = monotonic() - started
        save_grid(torch.stack(shown), out / GRID)
        record["evaluations"] = evaluations
        write_text(out / SAMPLES, to_json(record, str(out / SAMPLES)))
    return (
        f"{len(seeds)} images of {evaluations} network evaluations each "
        f"in {seconds:.1f} s: {out} (grid: {out / GRID})"
    )


def _prepare(
    trained: Trained,
    seeds: list[int],
    labels: list[int] | None,
    device: torch.device,
    raw: bool,
    guide: Trained | None,
    guide_scale: float,
) -> Making:
    """Loads VAE and networks -> what makes the images."""
    config, space = trained.config, trained.space(device)
    backbone = trained.network(raw).to(device)
    if config.sampling.compile:
        backbone.compile_blocks()
    worse = None
    if guide:
        worse = GuideModel(guide.network(raw).to(device), guide.config, guide_scale)
    return lambda on_step: sample(
        backbone, config, trained.shape, seeds, labels, device, on_step, worse, space
    )


def _record(
    trained: Trained, seeds: list[int], labels: list[int] | None, raw: bool
) -> dict[str, Any]:
    """What samples.json says of them. Raises UserError for weights that there are not."""
    digits = max(6, len(str(seeds[-1])))
    known = [None if n == NULL_LABEL else n for n in labels or [NULL_LABEL] * len(seeds)]
    return {
        "checkpoint": escape(str(trained.path)),
        "images": trained.images,
        "weights": trained.weights(raw),
        "sampling": trained.config.sampling.model_dump(mode="json", exclude_none=True),
        "sigma_range": trained.config.sigma_range(),
        "evaluations": None,  # until all are made
        "guide": None,
        "samples": [
            {
                "file": f"{seed:0{digits}d}.png",
                "seed": seed,
                "label": label,
                "class": None if label is None else trained.classes[label],
            }
            for seed, label in zip(seeds, known, strict=True)
        ],
    }


def _folder_name(trained: Trained, seed: int, raw: bool, guide_scale: float | None) -> str:
    """A name that tells one set of samples of a model from another."""
    spec = trained.config.sampling
    name = f"{trained.images}-{spec.sampler.kind}-{spec.steps}-cfg{spec.guidance.scale:g}"
    name += "" if guide_scale is None else f"-guide{guide_scale:g}"
    weights = trained.weights(raw)
    # By its name only where it is none that a model is sampled with by itself.
    of = "-raw" if raw else f"-{weights}" if weights.startswith("ema-") else ""
    return f"{name}-seed{seed}{of}"


def _check_free(out: Path, overwrite: bool) -> None:
    """Raises UserError for a file, and for a folder with something in it unless `overwrite`."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is a file; name a folder")
    if overwrite or not out.exists():
        return
    if any(path.name != LOCK for path in out.iterdir()):
        raise UserError(f"--out: {out} is not empty; name another folder, or add --overwrite")


def _write_images(
    samples: Making,
    paths: list[Path],
    spec: SamplingSpec,
    console: Console,
) -> tuple[int, list[Tensor]]:
    """Writes the images of samples(on_step) -> (evaluations of an image, the first images)."""
    evaluations, written = 0, 0
    shown: list[Tensor] = []

    def steps(images: int) -> int:
        return -(-images // spec.batch_size) * spec.steps

    with Progress(console=console, transient=True, disable=not console.is_interactive) as bar:
        task = bar.add_task("sampling", total=steps(len(paths)))
        for part in samples(lambda: bar.advance(task)):
            evaluations += part.evaluations * len(part.images)
            for image in part.images:
                save_png(image, paths[written])
                written += 1
                shown += [image] if len(shown) < GRID_LIMIT else []
            # A sampler with steps of its own choosing may have made fewer or more than these.
            bar.update(task, completed=steps(written))
    return round(evaluations / len(paths)), shown


def read_samples(record: Path) -> list[str]:
    """The names of the images that a samples.json lists. Raises UserError as `sample_names`."""
    try:
        return sample_names(read_json(record, MAX_RECORD), str(record))
    except ReadingError as error:
        raise UserError(f"{error}; mend or remove it") from None


def sample_names(content: Any, record: str) -> list[str]:
    """The names of the images that the content of a samples.json lists.

    Raises UserError, which names the `record`, where it is damaged, or names what does not lie
    beside it.
    """
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


def _is_plain(name: str) -> bool:
    """Whether a name is that of a file beside another, and leads nowhere else."""
    return name == Path(name).name and name not in ("", "..") and "\0" not in name


def _old_samples(folder: Path) -> list[Path]:
    """The images that an earlier samples.json lists, and it. Raises UserError for a damaged one."""
    record = folder / SAMPLES
    if not record.is_file():
        return []
    return [*(folder / file for file in read_samples(record)), record]


def _remove_old_samples(folder: Path) -> None:
    """Deletes the images that an earlier samples.json lists, and it, so that no two sets mix."""
    for path in _old_samples(folder):
        path.unlink(missing_ok=True)


def _check_targets(out: Path, record: dict[str, Any]) -> None:
    """Raises UserError, before the work, where a file cannot be written or an old one removed."""
    check_writable(out / SAMPLES)
    names = {SAMPLES, GRID, *(entry["file"] for entry in record["samples"])}
    names |= {path.name for path in _old_samples(out)}
    for path in sorted(out.iterdir()) if out.is_dir() else ():
        if path.name in names:
            check_writable(path)
        if path.name in names and path.is_dir():
            raise UserError(f"{path}: is a folder, in the place of an image; name another --out")
