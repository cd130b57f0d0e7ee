"""Runs a sweep: trains its configs for equal budgets, measures them alike, and compares them.

    python scripts/ablate_backbones.py configs/matrices/small.toml --out runs/ablation-small

docs/ablation.md says how a sweep's TOML file reads. DIR gets `cells/*.json`, a record of each
config that is done; `runs/`, their runs; `table.md` and `index.html`, written anew after each.
The same command continues after an interrupt, also in the middle of a run. A run that fails is
reported and tried again at the next call; the others continue. Each is a process of its own, which
saves and ends if this one is killed; two calls at once never run the same config.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from hdit.device import keep_freed_memory
from hdit.errors import UserError
from hdit.experiments.cell import alone_at, check_cells, finished, run_cell, write_record
from hdit.experiments.matrix import Cell, read_matrix
from hdit.files import write_text
from hdit.report.pages import markdown, page
from hdit.report.plots import require_matplotlib
from hdit.signals import SAYING, Signalled, raised, status_of


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("matrix", type=Path, metavar="MATRIX.toml")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--list", action="store_true", help="name the cells, and run none")
    parser.add_argument("--cell", help=argparse.SUPPRESS)  # the part of a process of its own
    return parser.parse_args()


def wait(process: subprocess.Popen[bytes]) -> int:
    """The status of a cell's process, which is told to save and end where this one is."""
    try:
        return process.wait()
    except Signalled:
        process.terminate()
        process.wait()
        raise
    finally:
        if process.stdin:
            process.stdin.close()


def end_with_parent() -> None:
    """From now on, the end of the process that started this one tells it to save and end."""

    def watch() -> None:
        os.read(sys.stdin.fileno(), 1)  # a pipe, to which nothing is written: until it is closed
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def run_one(out: Path, cell: Cell) -> None:
    """Trains and measures a cell in this process, unless another has just done so."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    keep_freed_memory()
    with alone_at(cell, out, print):
        if not finished(out, cell):
            write_record(out, cell, run_cell(cell, out / "runs" / cell.run))


def start(matrix: Path, out: Path, cell: Cell, log: Path) -> int:
    """Runs a cell in a process of its own, whose output goes to the end of `log` -> its status."""
    command = [sys.executable, __file__, str(matrix), "--out", str(out), "--cell", cell.slug]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT
        )
        return wait(process)


def report(out: Path, cells: list[Cell], failed: dict[str, str]) -> None:
    """Writes table.md and index.html of the cells that are done, and names the others."""
    records, missing = [], dict(failed)
    for cell in cells:
        if record := finished(out, cell):
            records.append(record)
        else:
            missing.setdefault(f"{cell.name}, seed {cell.seed}", "not done yet")
    write_text(out / "table.md", markdown(records, missing))
    write_text(out / "index.html", page(records, missing))


def main() -> int:
    a = arguments()
    _, cells = read_matrix(a.matrix)
    if a.cell:
        found = [cell for cell in cells if cell.slug == a.cell]
        if not found:
            raise UserError(f"{a.matrix}: has changed since this was started; call it again")
        end_with_parent()
        run_one(a.out, found[0])
        return 0
    for cell in cells:
        state = "done" if finished(a.out, cell) else "to do"
        print(f"{cell.name}, seed {cell.seed}: {state}  {cell.slug}")
    if a.list:
        return 0
    check_cells(cells)
    require_matplotlib()  # of the page, before anything is trained
    a.out.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    for cell in cells:
        if finished(a.out, cell):
            continue
        print(f"-- {cell.name}, seed {cell.seed}", flush=True)
        with alone_at(cell, a.out, lambda owner: print(f"waiting: {owner}", flush=True)):
            pass  # not here, or the process of the cell would wait for this one
        log = a.out / "runs" / f"{cell.run}.log"
        status = 0 if finished(a.out, cell) else start(a.matrix, a.out, cell, log)
        if record := finished(a.out, cell):
            print(json.dumps({key: record[key] for key in ("images", "images_per_second")}))
        else:
            last = log.read_text(errors="replace").strip().rpartition("\n")[2]
            failed[f"{cell.name}, seed {cell.seed}"] = f"status {status}: {last} ({log.name})"
            print(f"failed: {last}  (see {log})")
        report(a.out, cells, failed)
    report(a.out, cells, failed)
    print(f"{a.out / 'index.html'} and table.md beside it")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        with raised():
            sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
    except Signalled as error:
        print(f"{SAYING}; the same command goes on", file=sys.stderr)
        sys.exit(status_of(error.number))
