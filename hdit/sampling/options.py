"""What a user asks of sampling, checked against the model: settings, classes, a guide model."""

from __future__ import annotations

import csv
import re
import unicodedata
from collections.abc import Callable
from copy import deepcopy
from itertools import islice
from pathlib import Path
from typing import Any

from hdit.config import ConfigError, apply, parse
from hdit.errors import UserError
from hdit.names import escape, printable, unescape
from hdit.protocols import NULL_LABEL
from hdit.runs.trained import Trained
from hdit.sampling.record import Labels

SHOWN_CLASSES = 20  # in an error


def with_options(
    trained: Trained,
    source: Path,
    options: dict[str, tuple[str, Any]],
    overrides: list[str],
    guided_by_model: bool = False,
) -> Trained:
    """The model with options, each a key of [sampling] and what was given, and --set.

    `source` names the model in messages. Raises UserError for what has no effect, and for a setting
    that was given twice.
    """
    settings = trained.config.model_dump(mode="json", exclude_none=True)
    for override in overrides:
        _only_sampling(override)
    for option, (key, value) in options.items():
        if value is None:
            continue
        table, _, last = key.rpartition(".")
        if last == "kind":
            settings["sampling"][table] = {last: value}
        else:
            (settings["sampling"][table] if table else settings["sampling"])[last] = value
        for override in overrides:
            changed = deepcopy(settings)
            apply(changed, [override])
            if _key(override) == f"sampling.{key}" or _at(changed, key) != value:
                raise UserError(f"{option}: is set by --set {override!r} too; leave out one")
    apply(settings, overrides)
    config = parse(settings, str(source))
    spec = config.sampling
    for override in overrides:
        key = f"{_key(override)}."
        if spec.guidance.scale == 1 and not guided_by_model and key.startswith(GUIDANCE):
            raise UserError(f"--set {override!r}: has no effect without --guidance or --guide")
        if key == "sampling.steps." and spec.sampler.kind == "dpm_adaptive":
            raise UserError(f"--set {override!r}: {OWN_STEPS}")
    if options["--steps"][1] is not None and spec.sampler.kind == "dpm_adaptive":
        raise UserError(f"--steps: {OWN_STEPS}")
    return trained.configured(config)


GUIDANCE = "sampling.guidance."
OWN_STEPS = "dpm_adaptive chooses its steps; set sampling.sampler.rtol"


def _key(override: str) -> str:
    """The key of "a.b = value", without the blanks that `apply` allows in it."""
    return ".".join(part.strip() for part in override.partition("=")[0].split("."))


def _at(settings: dict[str, Any], key: str) -> Any:
    """The value of a key of [sampling], None where there is none."""
    value: Any = settings["sampling"]
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _only_sampling(override: str) -> None:
    key = f"{_key(override)}."
    if key == "sampling.grid.":
        raise ConfigError(
            f"--set {override!r}: has no effect: it is of the grids of training; give -n"
        )
    if not key.startswith(("sampling.", "space.vae.", "space.tile.")) or key == "sampling.":
        raise ConfigError(
            f"--set {override!r}: sampling can change [sampling] settings, space.vae and "
            "space.tile only, by their own keys; the rest belongs to the trained model"
        )


def choose_labels(text: str | None, trained: Trained) -> Labels | None:
    """The labels of a set; None for a model without classes.

    `text` lists classes as a line of CSV does. Each is a name as it is written, or else `#` and an
    index, or `none`. `random` alone draws them. Raises UserError for what is none of these.
    """
    classes = trained.classes
    if not classes:
        if text is not None:
            raise UserError("--labels: the model was trained without classes")
        return None
    everyone = tuple(range(len(classes)))
    if text is None:
        return Labels("balanced", everyone)
    indices: dict[str, list[int]] = {}
    for index, name in enumerate(classes):
        indices.setdefault(name, []).append(index)
    if text.strip() == "random" and "random" not in indices:
        return Labels("random", everyone)
    return Labels("given", tuple(_label(part, indices, len(classes)) for part in _listed(text)))


def _listed(text: str) -> list[str]:
    """The parts of a line of CSV, as in a,"b, c". Raises UserError for quotes that do not close."""
    why: object = "it is empty"
    try:
        rows = list(csv.reader([text], strict=True, skipinitialspace=True))
        if len(rows) == 1 and rows[0]:
            return rows[0]
    except csv.Error as error:
        why = error
    raise UserError(
        f"--labels: {printable(text)!r} is no list of classes ({why}); write names with commas "
        """between them, and one that has a comma in double quotes, as in 'cat,"dog, large"'"""
    )


def _label(part: str, indices: dict[str, list[int]], number: int) -> int:
    """The index of the class that a part of --labels names, or NULL_LABEL.

    `indices` are those of each name: of ImageNet's 1,000 classes two are called "crane".
    """
    alike = [name for name in indices if not name.isascii() and _composed(name) == _composed(part)]
    for name in (part, escape(part), part.strip(), *(alike if len(alike) == 1 else [])):
        if name in indices:
            if len(found := indices[name]) == 1:
                return found[0]
            several = " and ".join(f"#{index}" for index in found)
            raise UserError(f"--labels: {printable(part)!r} are {several}; write one of these")
    part = part.strip()
    if part == "none":
        return NULL_LABEL
    is_number = re.fullmatch("[0-9]{1,18}", part.removeprefix("#")) is not None
    if is_number and part.startswith("#") and int(part[1:]) < number:
        return int(part[1:])
    names = [printable(unescape(name)) for name in islice(indices, SHOWN_CLASSES)]
    known = ", ".join(names) + (", ..." if len(indices) > SHOWN_CLASSES else "")
    hint = f"; for the class at that index, write #{part}" if is_number else ""
    if part.startswith("#"):
        hint = f"; an index is a number from #0 to #{number - 1}"
    raise UserError(f"--labels: {printable(part)!r} is no class of this model: {known}{hint}")


def _composed(text: str) -> str:
    """A name with each accent as a part of its letter, as it is typed; macOS stores it apart."""
    return unicodedata.normalize("NFC", text.strip())


def open_guide(source: Path, trained: Trained, warn: Callable[[str], None]) -> Trained:
    """The model to guide `trained` away from.

    Raises UserError if its images, classes or latents differ, or it was not trained at the noise
    levels that are sampled.
    """
    guide = Trained.open(source, warn)
    for what, theirs, ours in (
        ("images", guide.shape.chw, trained.shape.chw),
        ("classes", guide.classes, trained.classes),
        ("sigma_data", guide.shape.sigma_data, trained.shape.sigma_data),
        ("latents, by the hash of their VAE", guide.vae, trained.vae),
    ):
        if theirs != ours:
            raise UserError(f"--guide: {source} has other {what}: {theirs}, and the model {ours}")
    (start, end), (low, high, by) = trained.config.sigma_range(), guide.config.valid_range()
    if start < low * (1 - 1e-6) or end > high * (1 + 1e-6):
        raise UserError(
            f"--guide: {source} knows noise levels from {low:.5g} to {high:.5g} ({by}), and "
            f"sampling goes from {end:.5g} to {start:.5g}; set sampling.sigma_min and sigma_max"
        )
    return guide
