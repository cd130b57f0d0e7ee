"""Counts and measures what HDiT and DiT cost on pixels, by the size of the image.

    python scripts/scaling_cost.py --out cost
    python scripts/scaling_cost.py --out cost --to 256 --dit-to 128

HDiT is row E of the paper's ablation (Crowson et al., 2024, tables 1 and 5), to which each doubling
of the size adds a level of width 384 and neighborhood attention; DiT is DiT-B/4 on pixels, row R4.
Both see 1,000 classes. MACs are multiply-accumulates of one forward pass of one image. Seconds are
the smallest of several forward passes of one image, each point in a process of its own. Memory is
the peak of the process above what it held with the weights.

Writes cost.json, cost.md and cost.svg.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from hdit import models
from hdit.config import RunConfig, load
from hdit.device import (
    default_device,
    forget_peak_memory,
    keep_freed_memory,
    memory_in_use,
    peak_memory,
)
from hdit.files import write_text
from hdit.models.cost import cost
from hdit.protocols import Cond
from hdit.report.plots import plot_lines, require_matplotlib

ABLATION = Path(__file__).parent.parent / "configs" / "ablation"
CLASSES = 1000
OUTER, INNER = "{ depth = 2, width = 384 }", "{ depth = 11, width = 768 }"
SMALLEST, COUNTED = 128, {"HDiT": 2048, "DiT-B/4": 1024}
PASSES, ENOUGH = 12, 20.0  # at most so many, and no more after so many seconds, but two
GIBIBYTE = 2**30

Rows = dict[str, list[dict[str, Any]]]
"""What is known of each size, by the name of the model."""


def config(name: str, size: int) -> RunConfig:
    """Of "HDiT" or "DiT-B/4" for images of this size."""
    if name == "DiT-B/4":
        return load(ABLATION / "r4.toml", [f"data.size={size}"])
    levels = [OUTER] * (1 + int(math.log2(size // SMALLEST))) + [INNER]
    return load(ABLATION / "e.toml", [f"data.size={size}", f"model.levels=[{', '.join(levels)}]"])


def gmacs(name: str, size: int) -> float:
    c = config(name, size)
    shape = c.data_shape(CLASSES)
    return sum(row.macs for row in cost(c.model, shape, c.output_channels(shape))) / 1e9


def measure(name: str, size: int, precision: str) -> dict[str, Any]:
    """Seconds and bytes of a forward pass of one image, in this process."""
    keep_freed_memory()
    device = default_device()
    c = config(name, size)
    shape = c.data_shape(CLASSES)
    torch.manual_seed(0)
    network = models.build(c.model, shape, c.output_channels(shape)).to(device).eval()
    x = torch.randn(1, *shape.chw, device=device)
    arguments = x, torch.zeros(1, device=device), Cond(torch.zeros(1, dtype=torch.long).to(device))
    before = memory_in_use(device) if forget_peak_memory(device) else None
    times = []
    dtype = torch.bfloat16 if precision == "bf16" else None
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype is not None):
        while len(times) < 2 or (sum(times) < ENOUGH and len(times) < PASSES):
            start = time.perf_counter()
            network(*arguments)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    row: dict[str, Any] = {"seconds": min(times), "passes": len(times)}
    if before is not None:
        row["memory"] = max(peak_memory(device) - before, 0)  # the rest may be given back meanwhile
    return row


def in_own_process(name: str, size: int, precision: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--point", name, str(size), "--precision", precision]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def slope(points: list[tuple[float, float]]) -> float:
    """Of the least-squares line through the logarithms."""
    xs, ys = ([math.log(value) for value in values] for values in zip(*points, strict=True))
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    top = sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True))
    return top / sum((x - mx) ** 2 for x in xs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="DIR")
    parser.add_argument("--to", type=int, default=1024, help="largest size to measure HDiT at")
    parser.add_argument("--dit-to", type=int, default=512, help="largest size to measure DiT at")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.point:
        print(json.dumps(measure(a.point[0], int(a.point[1]), a.precision)))
        return
    if a.out is None:
        parser.error("--out: name the folder to write")
    require_matplotlib()  # before what may take an hour
    write(a.out, measured(a.to, a.dit_to, a.precision), a.precision)
    print((a.out / "scaling.md").read_text())


def measured(hdit_to: int, dit_to: int, precision: str) -> Rows:
    """Counts of every size, and measurements up to the sizes that are named."""
    rows: Rows = {}
    for name, last in COUNTED.items():
        size = SMALLEST
        while size <= last:
            row: dict[str, Any] = {"size": size, "gmacs": gmacs(name, size)}
            if size <= (hdit_to if name == "HDiT" else dit_to):
                try:
                    row |= in_own_process(name, size, precision)
                except subprocess.CalledProcessError as error:  # as for want of memory
                    row["failed"] = f"status {error.returncode}"
            rows.setdefault(name, []).append(row)
            print(name, row, flush=True)
            size *= 2
    return rows


def write(out: Path, rows: Rows, precision: str) -> None:
    """The report in `out`: JSON, Markdown and a plot."""
    out.mkdir(parents=True, exist_ok=True)
    facts = {
        "command": shlex.join(["scripts/scaling_cost.py", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "precision": precision,
    }
    pixels = {
        name: [(row["size"] ** 2, row["seconds"]) for row in group if "seconds" in row]
        for name, group in rows.items()
    }
    plot = plot_lines(pixels, "pixels", "seconds of a forward pass", log_x=True, log_y=True)
    write_text(out / "scaling.json", json.dumps({"facts": facts, "rows": rows}, indent=1))
    write_text(out / "scaling.md", text(rows, facts))
    write_text(out / "scaling.svg", plot)


def text(rows: Rows, facts: dict[str, Any]) -> str:
    """The tables and the slopes, in Markdown."""
    dit = {row["size"]: row for row in rows["DiT-B/4"]}
    lines = [
        "# What a forward pass costs by the size of the image",
        "",
        f"`python {facts['command']}`; {facts['device']}, {facts['threads']} "
        f"threads, torch {facts['torch']}, {facts['precision']}.",
        "",
        "| size | HDiT GMAC | DiT-B/4 GMAC | saved | HDiT s | DiT-B/4 s | saved | HDiT GiB | "
        "DiT-B/4 GiB |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows["HDiT"]:
        other = dit.get(row["size"], {})
        lines.append(
            f"| {row['size']} | {row['gmacs']:,.1f} | {_cell(other, 'gmacs', ',.1f')} | "
            f"{_saved(row, other, 'gmacs')} | {_cell(row, 'seconds', '.3g')} | "
            f"{_cell(other, 'seconds', '.3g')} | {_saved(row, other, 'seconds')} | "
            f"{_cell(row, 'memory', '.2f', GIBIBYTE)} | {_cell(other, 'memory', '.2f', GIBIBYTE)} |"
        )
    lines.append("")
    for name, group in rows.items():
        points = [(row["size"] ** 2, row["seconds"]) for row in group if "seconds" in row]
        if len(points) > 1:
            lines.append(
                f"{name}'s seconds grow as pixels to the power {slope(points):.2f} (least squares "
                f"in the logarithms, {len(points)} sizes), between the two largest sizes "
                f"{slope(points[-2:]):.2f}."
            )
    for name, group in rows.items():
        failed = [f"{name} at {row['size']}: {row['failed']}" for row in group if "failed" in row]
        lines += [f"Not measured: {line}." for line in failed]
    return "\n".join(lines) + "\n\n![Seconds by pixels](cost.svg)\n"


def _cell(row: dict[str, Any], key: str, form: str, unit: float = 1.0) -> str:
    return format(row[key] / unit, form) if key in row else ""


def _saved(row: dict[str, Any], other: dict[str, Any], key: str) -> str:
    return f"{100 * (1 - row[key] / other[key]):.1f} %" if key in row and key in other else ""


if __name__ == "__main__":
    main()
