"""From one format of checkpoints to another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hdit.files import whole, write_text
from hdit.interop import InteropError, k_diffusion
from hdit.interop.contents import Told
from hdit.interop.formats import FORMATS
from hdit.runs import export
from hdit.runs.trained import Trained

CONFIG = "config"
KINDS = (export.KIND, *FORMATS)


@dataclass(frozen=True)
class Converted:
    """What `convert` wrote."""

    path: Path
    kind: str
    origin: str
    notes: tuple[str, ...]


def convert(
    source: str | Path,
    out: str | Path,
    to: str | None = None,
    *,
    raw: bool = False,
    weights: str | None = None,
    num_heads: int | None = None,
    num_classes: int | None = None,
    prediction: str | None = None,
) -> Converted:
    """Writes a model as another kind, or a k-diffusion config as ours; whole, or not at all.

    `raw` takes the weights as trained where there is an EMA too, `weights` the set of that name.
    `num_heads`, `num_classes` and
    `prediction` are those of a DiT whose file does not tell. Raises UserError where the source
    cannot be read, the kind cannot hold the model, or `out` is not free.
    """
    source, out = Path(source), Path(out)
    told = Told(num_heads, num_classes, prediction)
    if source.suffix.lower() == ".json" and source.is_file():
        told.refuse(source)
        if raw or weights:
            option = "--raw" if raw else "--weights"
            raise InteropError(f"{source}: is a config without weights; leave {option} out")
        return _convert_config(source, out, to)
    kind = export.KIND if to is None else to
    if kind not in KINDS:
        raise InteropError(f"--to: must be one of {', '.join(KINDS)}, got {kind!r}")
    suffix = None if kind == export.KIND else FORMATS[kind].suffix
    _check_out(out, suffix, kind)
    assumed: list[str] = []
    opened = Trained.open(
        source,
        assumed.append,
        weights=weights,
        num_heads=num_heads,
        num_classes=num_classes,
        prediction=prediction,
    )
    model = opened.contents(raw)
    with whole(out) as part:
        if kind == export.KIND:
            notes = export.write(model, part, out.resolve().name)
        else:
            notes = FORMATS[kind].write(model, part)
    notes = tuple(dict.fromkeys((*assumed, *model.notes, *notes)))
    return Converted(out, kind, model.origin, notes)


def _convert_config(source: Path, out: Path, to: str | None) -> Converted:
    if to not in (None, CONFIG):
        raise InteropError(f"{source}: is a config without weights, which --to {to} would need")
    _check_out(out, ".toml", "a config")
    text, notes = k_diffusion.config_to_toml(source, k_diffusion.read_config(source))
    write_text(out, text)
    return Converted(out, CONFIG, f"{k_diffusion.KIND} config {source.name}", notes)


def _check_out(out: Path, suffix: str | None, kind: str) -> None:
    """Raises InteropError where something is in the way, or the name is of another kind."""
    if suffix is None:
        if _taken(out) and (not out.is_dir() or any(out.iterdir())):
            raise InteropError(f"{out}: is there already; {kind} needs a new or an empty folder")
        return
    if _taken(out):
        raise InteropError(f"{out}: is there already; name a new file")
    if out.suffix != suffix:
        raise InteropError(f"{out}: {kind} is one file whose name ends in {suffix}")


def _taken(out: Path) -> bool:
    """Whether something is there, be it a link to nowhere."""
    return out.exists() or out.is_symlink()
