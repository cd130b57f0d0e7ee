"""What the page draws, as one JSON value: curves, losses by sigma, events, grids and configs."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hdit.names import printable
from hdit.report.watch.series import hours, short, some, thin, whole
from hdit.runs.history import BINS, History, Numbers, Values

CURVES = (
    "loss", "grad_norm", "lr", "images_per_second", "data_wait_share", "mfu", "peak_memory",
    "skipped_steps", "skipped_files", "rollbacks", "gradient_noise_scale",
)  # fmt: skip
"""Keys of metrics that the page has a chart of, where a run has them."""

VALIDATIONS = 400
FIRST_EVENTS, LAST_EVENTS = 100, 200  # of each kind
RECENT = 20  # lines, of which the speed is the median
SILENT = 300.0  # seconds without a line, after which a run may have stalled, if lines came often
MAX_NAMES = 32  # of weights that a line of validation has


def describe(histories: Sequence[History], now: float) -> Values:
    """All that the page needs but the grids' images. `now` is in seconds since 1970."""
    names = distinct([history.path for history in histories])
    configs = [history.settings for history in histories]
    runs = [_run(history, name, now) for history, name in zip(histories, names, strict=True)]
    return {"made": now, "runs": runs, "differences": differences(configs)}


def distinct(paths: Sequence[Path]) -> list[str]:
    """A name for each folder: its own, with as many of those above it as tell it from others."""
    parts = [path.absolute().parts for path in paths]
    names = []
    for mine in parts:
        depth = 1
        while depth < len(mine) and sum(p[-depth:] == mine[-depth:] for p in parts) > 1:
            depth += 1
        names.append(printable("/".join(mine[-depth:])))
    return names


def _run(history: History, name: str, now: float) -> Values:
    columns = history.metrics.table()
    images = columns["images"]
    axes, notes = _axes(images, columns)
    validation, left_out = _validation(history.validation)
    events, counts = _events(history.events)
    if left_out:
        notes.append(f"{left_out:,} of {len(history.validation):,} validations are left out.")
    return {
        "name": name,
        "folder": printable(str(history.path)),
        "state": _state(history, columns, now),
        "axes": axes,
        "curves": {key: thin(images, columns[key]) for key in CURVES if key in columns},
        "sigma": _by_sigma(columns, history.last),
        "validation": validation,
        "events": events,
        "event_counts": counts,
        "grids": [],
        "config": history.config,
        "notes": notes + [printable(text) for text in history.problems.values()],
    }


# ---- where a run stands --------------------------------------------------------------------------


def _state(history: History, columns: dict[str, Numbers], now: float) -> Values:
    """How far a run is, whether it goes on, and how fast it is."""
    last, total = history.last, _whole_number(history.settings, "training", "images")
    saved = history.checkpoints()
    images = max([last.get("images", 0), *saved[-1:]])
    speeds = columns.get("images_per_second", np.zeros(0))[-RECENT:]
    speeds = speeds[speeds > 0]
    speed = float(np.median(speeds)) if len(speeds) else None
    macs = _finite(last.get("macs"))
    left = (total - images) / speed if total and speed and images < total else None
    return {
        "images": images,
        "total": total,
        "step": last.get("step"),
        "is": _going(history, images, total, columns["images"], speed, now),
        "written": history.written(),
        "speed": speed,
        "seconds_left": left,
        "weights": history.weights(),
        "macs": macs / 3 / last["images"] if macs and last["images"] else None,
        "last": {key: last[key] for key in CURVES if _finite(last.get(key)) is not None},
    }


def _going(
    history: History,
    reached: int,
    total: int | None,
    images: Numbers,
    speed: float | None,
    now: float,
) -> str:
    """finished, training, starting, stalled, stopped or not begun."""
    owner, written = history.owner(), history.written()
    if total is not None and reached >= total:
        return "finished"
    if not history.metrics.count:
        return "not begun" if owner is None else "starting"
    counts = images[-RECENT:]
    usual = float(np.median(np.diff(counts))) / speed if speed and len(counts) > 1 else 60.0
    silent = now - (written or now)
    if owner is None:
        return "stopped"
    return "stalled" if silent > max(SILENT, 10 * usual) else "training"


# ---- curves --------------------------------------------------------------------------------------


def _axes(images: Numbers, columns: dict[str, Numbers]) -> tuple[Values, list[str]]:
    """Hours and MACs at some counts of images, between which they are straight, and notes."""
    none = np.zeros(0)
    seconds, speeds = columns.get("seconds", none), columns.get("images_per_second", none)
    notes = []
    taken, guessed = hours(images, seconds, speeds)
    if guessed and len(images):
        notes.append(
            "Hours are counted from images/s, as the metrics have no seconds: validation, saving "
            "and sampling are not in them."
        )
    taken = np.maximum.accumulate(taken) if len(taken) else taken
    picked = some(len(images), 500)
    table = {"images": [0, *whole(images[picked])], "hours": [0.0, *short(taken[picked])]}
    macs = columns.get("macs", none)
    if len(macs) and images[-1] > 0 and math.isfinite(macs[-1]):
        table["macs"] = short(np.array(table["images"]) * (macs[-1] / images[-1]))
    elif len(images):
        notes.append("The metrics have no MACs: the run is not drawn over them.")
    return table, notes


def _by_sigma(columns: dict[str, Numbers], last: Values) -> Values | None:
    """The training loss in each bin of sigma, and the bins' edges in the last line; or None."""
    images, edges = columns["images"], [_finite(n) for n in _list(last.get("sigma_edges"))]
    absent = np.full(len(images), math.nan)  # of a bin that no image ever fell in
    losses = [columns.get(f"loss_by_sigma.{i}", absent) for i in range(BINS)]
    if all(loss is absent for loss in losses) or len(edges) != BINS + 1 or not _ascending(edges):
        return None
    return {"edges": edges, "bins": [thin(images, loss) for loss in losses]}


def _validation(lines: Sequence[Values]) -> tuple[list[Values], int]:
    """The validations, of many a part with the best of each weights, and how many are left out."""
    best: dict[str, tuple[float, int]] = {}
    for i, line in enumerate(lines):
        for name, held in line["weights"].items():
            loss = _finite(held.get("loss"))
            if loss is not None and loss < best.get(name, (math.inf, 0))[0]:
                best[name] = loss, i
    picked = some(len(lines), VALIDATIONS, [i for _, i in best.values()][:MAX_NAMES])
    return [_validated(lines[i]) for i in picked], len(lines) - len(picked)


def _validated(line: Values) -> Values:
    """One validation, with what is sound of it."""
    edges = [_finite(n) for n in _list(line.get("sigma_edges"))]
    weights = {}
    for name, held in list(line["weights"].items())[:MAX_NAMES]:
        told: Values = {key: _finite(held.get(key)) for key in ("loss", "x0")}
        for key in ("loss_by_sigma", "x0_by_sigma"):
            values = [_finite(n) for n in _list(held.get(key))]
            told[key] = values if len(values) + 1 == len(edges) and _ascending(edges) else []
        weights[printable(name)] = told
    return {
        "images": line["images"],
        "count": line["count"] if type(line.get("count")) is int else None,
        "edges": edges if _ascending(edges) else [],
        "weights": weights,
    }


# ---- events and configs --------------------------------------------------------------------------


def _events(lines: Sequence[Values]) -> tuple[list[Values], dict[str, int]]:
    """The events, of each kind the first and the last, and how many there are of each kind."""
    counts = Counter(line["kind"] for line in lines)
    seen: Counter[str] = Counter()
    told = []
    for line in lines:
        kind = line["kind"]
        seen[kind] += 1
        if FIRST_EVENTS < seen[kind] <= counts[kind] - LAST_EVENTS:
            continue
        facts = {k: v for k, v in line.items() if k not in ("kind", "images", "time")}
        text = ", ".join(f"{key} {_briefly(value)}" for key, value in facts.items())
        told.append(
            {
                "kind": printable(kind),
                "images": line["images"],
                "time": _finite(line.get("time")),
                "text": printable(text),
            }
        )
    return told, {printable(kind): n for kind, n in counts.items()}


def _briefly(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def differences(configs: Sequence[Values]) -> list[Values]:
    """The settings that are not the same in all configs: key, and the values as text or None.

    A config that is empty, as of a run that has just begun, differs in nothing.
    """
    flat = [dict(_flat(config, "")) if config else {} for config in configs]
    keys = sorted(set().union(*flat))
    return [
        {"key": printable(key), "values": [held.get(key) for held in flat]}
        for key in keys
        if len({held.get(key) for held in flat if held}) > 1
    ]


def _flat(value: Any, path: str) -> list[tuple[str, str]]:
    """(key, value as text) of each setting; tables in an array are counted from 0."""
    parts: Any = None
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list) and any(isinstance(v, dict) for v in value):
        parts = enumerate(value)
    if parts is None:
        return [(path, printable(json.dumps(value, default=str, ensure_ascii=False)))]
    return [pair for key, v in parts for pair in _flat(v, f"{path}.{key}".lstrip("."))]


# ---- what may be anything ------------------------------------------------------------------------


def _finite(value: Any) -> float | None:
    """A number of JSON; None if it is none."""
    try:
        return float(value) if type(value) in (int, float) and math.isfinite(value) else None
    except OverflowError:
        return None


def _list(value: Any) -> list[Any]:
    return value[:64] if isinstance(value, list) else []


def _ascending(edges: Sequence[float | None]) -> bool:
    """Whether they are edges of bins on a logarithmic axis."""
    known = [e for e in edges if e is not None and math.isfinite(e)]
    return len(known) == len(edges) > 1 and known[0] > 0 and known == sorted(set(known))


def _whole_number(table: Values, *keys: str) -> int | None:
    value: Any = table
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if type(value) is int and 0 < value < 2**63 else None
