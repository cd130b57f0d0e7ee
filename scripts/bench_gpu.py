"""Measures a GPU for docs/benchmarks.md, in one command and in minutes.

    python scripts/bench_gpu.py --out results
    python scripts/bench_gpu.py --out results --images photographs --deadline 460
    python scripts/bench_gpu.py --out results --device cpu --tiny      # tries this script, anywhere

Section 1 checks that everything is right, 2 times neighborhood attention, 3 training steps and 4
megapixel sampling; 6 trains a model on the images for the rest of the time. Each is a process of
its own with a cap in seconds: 90, 60, 130, 45 and 120. Where less than their sum is left until the
deadline, all that are still to come are scaled; one that would get too little to be of use is
passed over, and so is the rest of one that fails or reaches its cap. What the later sections
compile is compiled beside section 1, which times nothing, into the caches that the environment
names for torch and Triton; that ends before section 2 begins.

The folder gets a JSON file for each section, written anew with each figure, benchmarks.md with the
tables, grid.png with images of section 6, and log.txt with what the processes said.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from bench_record import Row, about, markdown, one_line, write

STARTED = time.monotonic()
ROOT = Path(__file__).resolve().parent.parent
TAIL = 25  # lines of what fails
GRACE = 3.0  # seconds between asking a process to end and killing it
TINY_PATIENCE = 4.0  # by which caps grow: a busy CPU is no GPU
WARM_ATTENTION = [  # side of the grid, beginning of contenders' names
    (256, "flex"),
    (64, "flex"),
    (128, "flex"),
    (64, "triton: stepped"),  # whose kernels serve any shape
    (64, "triton: product"),
    (64, "triton: one pass"),
]
BATCHES = [4, 1, 16]  # of megapixels, the most telling first

SHOW = """
[data]
{data}

[model]
kind = "hdit"
patch_size = {patch}
mapping = {{ depth = 2, width = {widths[0]} }}

[[model.levels]]
depth = 2
width = {widths[0]}
attention = {{ kind = "neighborhood", kernel_size = 7, d_head = {d_head} }}

[[model.levels]]
depth = 2
width = {widths[1]}
attention = {{ kind = "neighborhood", kernel_size = 7, d_head = {d_head} }}

[[model.levels]]
depth = {depth}
width = {widths[2]}
attention = {{ kind = "global", d_head = {d_head} }}

[training]
images = 1_000_000_000
checkpoint_every = 1_000_000_000
log_every = {log_every}
batch_size = {batch}
workers = {workers}
precision = "{precision}"
compile = {compile}
ema = {{ max_decay = 0.999 }}

[sampling]
grid = 0
batch_size = {grid}
steps = {steps}
precision = "{precision}"
compile = false
"""


class Outcome(NamedTuple):
    """How a section went: its status is "done", or says in words what became of it."""

    status: str
    failed: bool = False
    seconds: float = 0.0


DONE = "done"


class Section(NamedTuple):
    number: int
    title: str
    name: str  # of its file
    cap: float  # seconds
    least: float  # seconds with which it is of use
    run: Callable[[Bench, float], Outcome]

    @property
    def file(self) -> str:
        return f"{self.number}-{self.name}.json"


class Job:
    """A process in a group of its own, so that what it starts ends with it."""

    def __init__(self, name: str, command: list[str], log: Path, env: dict[str, str]):
        self.name, self.log = name, log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, process_group=0
            )

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def end(self) -> None:
        """Ends the group, if it is still there: asks first, and then kills."""
        for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, None)):
            try:
                os.killpg(self.process.pid, number)
            except ProcessLookupError:
                break
            try:
                self.process.wait(patience)
            except subprocess.TimeoutExpired:
                continue
        self.process.wait()


class Bench:
    """Where things lie, and the processes of the section that runs."""

    def __init__(self, out: Path, work: Path, device: str, tiny: bool, images: Path | None):
        self.out, self.work, self.device, self.tiny, self.images = out, work, device, tiny, images
        self.env = environment(device, tiny)
        self.log = out / "log.txt"
        self.log.write_text("")

    @property
    def precision(self) -> str:
        return "bf16" if self.device == "cuda" else "fp32"

    def script(self, name: str, *arguments: Any) -> list[str]:
        return [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)]

    def hdit(self, *arguments: Any) -> list[str]:
        return [sys.executable, "-m", "hdit.cli", *map(str, arguments)]

    @contextmanager
    def jobs(
        self, commands: dict[str, list[str]], compile_threads: int = 8
    ) -> Iterator[dict[str, Job]]:
        """Starts processes that have ended when the block has, however it ends."""
        env = {"TORCHINDUCTOR_COMPILE_THREADS": str(compile_threads)} | self.env
        started: dict[str, Job] = {}
        try:
            for name, command in commands.items():
                started[name] = Job(name, command, self.work / f"{name}.log", env)
            yield started
        finally:
            for job in started.values():
                job.end()
                with self.log.open("a") as file:
                    file.write(f"==== {job.name}, status {job.process.returncode}\n{job.said()}\n")

    def wait(self, jobs: dict[str, Job], until: float) -> None:
        """Waits for processes to end by themselves, until a moment of the monotonic clock."""
        for job in jobs.values():
            try:
                job.process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                return

    def outcome(self, commands: dict[str, list[str]], seconds: float) -> Outcome:
        """Runs processes beside each other for so long at most."""
        with self.jobs(commands) as jobs:
            self.wait(jobs, time.monotonic() + seconds)
            return outcome_of(jobs, seconds)


def environment(device: str, tiny: bool) -> dict[str, str]:
    """The caller's, with this checkout first, and without a GPU where a CPU is asked for."""
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    if device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    if tiny:
        env["OMP_NUM_THREADS"] = "1"  # threads cost more than they bring to what is tiny
    return env


def outcome_of(jobs: dict[str, Job], seconds: float) -> Outcome:
    """Of processes that had so long: one that failed says with what."""
    running = [name for name, job in jobs.items() if job.process.poll() is None]
    failed = [name for name, job in jobs.items() if job.process.returncode not in (None, 0)]
    for name in failed:
        tail = "\n".join(jobs[name].said().splitlines()[-TAIL:])
        print(f"---- {name} failed; the end of its output:\n{tail}\n----", flush=True)
    words = [f"{name} failed with status {jobs[name].process.returncode}" for name in failed]
    words += [f"{name} was cut off after {seconds:.0f} s" for name in running]
    return Outcome("; ".join(words) or DONE, failed=bool(failed))


# ---- the sections --------------------------------------------------------------------------------


def right(bench: Bench, seconds: float, warm: dict[str, list[str]]) -> Outcome:
    """The gpu tests, every backend and the command line, beside each other; and what warms."""
    tests = ["tests/kernels"] if bench.tiny else []
    tiny = ["--tiny"] if bench.tiny else []
    json_of = {name: bench.work / f"{name}.json" for name in ("backends", "cli")}
    commands = {
        "tests": [sys.executable, "-m", "pytest", "-m", "gpu", "-W", "default", "-rf",
                  "--tb=short", "-p", "no:cacheprovider", "--continue-on-collection-errors",
                  *tests],
        "backends": bench.script(
            "check_backends.py", "--device", bench.device, "--json", json_of["backends"], *tiny
        ),
        "cli": bench.script("check_cli.py", "--precision", bench.precision, "--json",
                            json_of["cli"], "--patience", seconds),
    }  # fmt: skip
    until = time.monotonic() + seconds
    with bench.jobs(warm, compile_threads=3) as warming:  # many beside each other
        with bench.jobs(commands) as jobs:
            bench.wait(jobs, until)
            found = outcome_of(jobs, seconds)
            tests_row = row_of_tests(jobs["tests"])
        data = {name: read(path) or {} for name, path in json_of.items()}
        rows = [tests_row, *(row for d in data.values() for row in d.get("rows", []))]
        errors = [error for d in data.values() for error in d.get("errors", [])]
        machine = data["backends"].get("machine", {})
        merged = {"machine": machine, "rows": rows, "errors": errors}
        write(bench.out / RIGHT, json.dumps(merged, indent=1) + "\n")
        bench.wait(warming, until)
        for name, job in warming.items():
            status = job.process.poll()
            if status != 0:
                became = "was not through" if status is None else f"ended with status {status}"
                print(f"{name} {became}: what comes may compile longer", flush=True)
    return found


def row_of_tests(job: Job) -> Row:
    """What pytest says in the end, and the names of what failed."""
    lines = [line.strip() for line in job.said().splitlines() if line.strip()]
    failed = [line.split(" - ")[0] for line in lines if line.startswith(("FAILED", "ERROR "))]
    status = job.process.poll()
    last = lines[-1].strip("= ") if lines and status is not None else "cut off"
    how = "; ".join([last, *failed[:10]])
    return {"check": "pytest -m gpu", "how": how, "right": status == 0}


def attention(bench: Bench, seconds: float) -> Outcome:
    return bench.outcome({"attention": bench.script("bench_attention.py", *common(bench, 2))},
                         seconds)  # fmt: skip


def models(bench: Bench, seconds: float) -> Outcome:
    command = bench.script("bench_models.py", "--only", "steps", *common(bench, 3))
    return bench.outcome({"models": command}, seconds)


def common(bench: Bench, number: int) -> list[str]:
    """The options that the timing scripts share."""
    pairs = ["--tiny", "--pairs", "2"] if bench.tiny else ["--pairs", "9"]
    return ["--device", bench.device, "--json", str(bench.out / file_of(number)), *pairs]


def megapixel_command(bench: Bench, out: str, *more: Any) -> list[str]:
    options = ["--random-weights", "--precision", bench.precision, "--out", bench.work / out]
    if bench.tiny:
        options += ["--size", 128, "--steps", 2, "--batch", 1, "--batch", 2]
    else:
        options += ["--compile", *(x for batch in BATCHES for x in ("--batch", batch))]
    return bench.script("sample_ffhq1024.py", *options, *more)


def megapixel(bench: Bench, seconds: float) -> Outcome:
    command = megapixel_command(bench, "megapixel", "--json", bench.out / file_of(4))
    return bench.outcome({"megapixel": command}, seconds)


def show_config(bench: Bench) -> Path:
    """The config of section 6."""
    size = 32 if bench.tiny else 128
    kind = f'kind = "shapes"\nsize = {size}\nnum_images = 1000'
    if bench.images is not None:
        kind = f'kind = "folder"\npath = {json.dumps(str(bench.images))}\nsize = {size}'
    options: dict[str, Any] = {
        "data": kind if bench.tiny else f"{kind}\naugment = 0.12",
        "patch": 1 if bench.tiny else 4,
        "widths": (32, 32, 32) if bench.tiny else (256, 512, 768),
        "d_head": 16 if bench.tiny else 64,
        "depth": 1 if bench.tiny else 6,
        "batch": 4 if bench.tiny else 128,
        "log_every": 4 if bench.tiny else 1280,
        "workers": 0 if bench.tiny else 8,
        "grid": 4 if bench.tiny else 64,
        "steps": 2 if bench.tiny else 50,
        "precision": bench.precision,
        "compile": "true" if bench.device == "cuda" else "false",
    }
    path = bench.work / "show.toml"
    path.write_text(SHOW.format(**options))
    return path


def show(bench: Bench, seconds: float) -> Outcome:
    """Trains for what is left of the time after starting, saving and sampling, and samples."""
    until = time.monotonic() + seconds
    run, pictures = bench.work / "show", bench.work / "pictures"
    training = 2.0 if bench.tiny else max(5.0, seconds - 35)
    train = bench.hdit("train", show_config(bench), "--run", run, "--minutes", training / 60)
    found = bench.outcome({"show-train": train}, seconds)
    log = run / "metrics.jsonl"
    if log.exists() and (lines := log.read_text().splitlines()):
        last = json.loads(lines[-1])
        speeds = sorted(json.loads(line)["images_per_second"] for line in lines)
        source = "shapes" if bench.images is None else bench.images.name
        row = {
            "data": source,
            "images drawn": last["images"],
            "steps": last["step"],
            "images/s, median": speeds[len(speeds) // 2],
            "loss": last["loss"],
            "peak memory, GiB": last["peak_memory"] / 2**30,
        }
        data = {"machine": {}, "rows": [row], "errors": []}
        write(bench.out / file_of(6), json.dumps(data, indent=1) + "\n")
    if found.status != DONE:
        return found
    number = 4 if bench.tiny else 64
    sample = bench.hdit("sample", run, "-n", number, "--out", pictures)
    found = bench.outcome({"show-sample": sample}, max(1.0, until - time.monotonic()))
    if (pictures / "grid.png").exists():
        shutil.copyfile(pictures / "grid.png", bench.out / "grid.png")
    return found


def warming(bench: Bench, wanted: list[int]) -> dict[str, list[str]]:
    """Commands that compile for the sections to come, and time nothing."""
    found = {}
    if bench.tiny:
        if 3 in wanted:
            found["warm-models"] = bench.script("bench_models.py", "--tiny", "--warm")
        return found
    if bench.device != "cuda":
        return {}
    if 3 in wanted:
        for name in ("hdit-ffhq1024", "hdit-imagenet256", "dit-xl-2-256"):
            found[f"warm-{name}"] = bench.script("bench_models.py", "--warm", "--model", name)
    if 2 in wanted:
        for side, contender in WARM_ATTENTION:
            name = f"warm-{contender.replace(': ', '-')}-{side}"
            found[name] = bench.script(
                "bench_attention.py", "--warm", "--side", side, "--contender", contender
            )
    if 4 in wanted:
        found["warm-megapixel"] = megapixel_command(bench, "warm-megapixel", "--steps", 2)
    if 6 in wanted:
        found["warm-show"] = bench.hdit(
            "train", show_config(bench), "--run", bench.work / "warm-show",
            "--set", "training.images=256", "--set", "training.checkpoint_every=256",
        )  # fmt: skip
    return found


def sections(wanted: list[int]) -> list[Section]:
    """Those that are wanted, in their order."""

    def first(bench: Bench, seconds: float) -> Outcome:
        return right(bench, seconds, warming(bench, wanted))

    every = [
        Section(1, "Right", "right", 90, 20, first),
        Section(2, "Neighborhood attention", "attention", 60, 15, attention),
        Section(3, "Training steps", "models", 130, 30, models),
        Section(4, "Megapixel sampling", "megapixel", 45, 20, megapixel),
        Section(6, "A model to show", "show", 120, 45, show),
    ]
    return [section for section in every if section.number in wanted]


NUMBERS = [section.number for section in sections([1, 2, 3, 4, 6])]
FILES = {section.number: section.file for section in sections(NUMBERS)}
RIGHT = FILES[1]


def file_of(number: int) -> str:
    return FILES[number]


# ---- time ----------------------------------------------------------------------------------------


def allowance(cap: float, later: list[float], left: float) -> float:
    """The seconds of a section with this cap, when so many are left for it and those after it."""
    return cap * min(1.0, left / (cap + sum(later)))


def run_all(
    chosen: list[Section],
    bench: Bench,
    deadline: float | None,
    report: Callable[[dict[int, Outcome]], None],
    clock: Callable[[], float] = lambda: time.monotonic() - STARTED,
) -> dict[int, Outcome]:
    """Runs sections in turn -> how each went. `report` hears of it after each.

    The last has all that is left until the deadline, where there is one.
    """
    outcomes: dict[int, Outcome] = {}
    for i, section in enumerate(chosen):
        left = math.inf if deadline is None else deadline - clock()
        caps = [s.cap * (TINY_PATIENCE if bench.tiny else 1) for s in chosen[i:]]
        seconds = allowance(caps[0], caps[1:], left)
        if section.number == 6 and deadline is not None:
            seconds = left - GRACE
        if seconds < section.least:
            status = f"passed over: {section.least:.0f} s are of use, {max(0.0, seconds):.0f} left"
            outcomes[section.number] = Outcome(status)
        else:
            print(f"section {section.number}, {section.title}: {seconds:.0f} s", flush=True)
            begun = clock()
            try:
                found = section.run(bench, seconds)
            except (OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
                found = Outcome(f"failed: {one_line(error)}", failed=True)
            outcomes[section.number] = found._replace(seconds=clock() - begun)
        print(f"section {section.number}: {outcomes[section.number].status}", flush=True)
        report(outcomes)
    return outcomes


# ---- the report ----------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Any] | None:
    """What a script has recorded; None if nothing."""
    return json.loads(path.read_text()) if path.exists() else None


def summary(rows: list[Row]) -> list[Row]:
    """Checks, the ways of one in one row; and each that is wrong in one of its own."""
    found = []
    for check in dict.fromkeys(row["check"] for row in rows):
        mine = [row for row in rows if row["check"] == check]
        shares = [
            row["relative error"] / row["at most"]
            for row in mine
            if row.get("relative error") is not None
        ]
        found.append({
            "check": check,
            "how": mine[0]["how"] if len(mine) == 1 else f"{len(mine)} ways",
            "largest error, of the bound": max(shares) if shares else None,
            "right": all(row["right"] for row in mine),
        })  # fmt: skip
        if len(mine) > 1:
            found += [
                {"check": check, "how": row["how"], "right": False}
                | {"largest error, of the bound": None}
                for row in mine
                if not row["right"]
            ]
    return found


def report(
    command: str, date: str, chosen: list[Section], outcomes: dict[int, Outcome], out: Path
) -> str:
    """Markdown of all sections that are through, from their JSON files in `out`."""
    data = {section.number: read(out / section.file) for section in chosen}
    machines = [d["machine"] for d in data.values() if d and d.get("machine")]
    machine = machines[0] if machines else {}
    blocks = [
        f"## On {machine.get('device', 'a device that no section has named')}",
        f"```\n{command}\n```\n{date}",
    ]
    for section in chosen:
        outcome, found = outcomes.get(section.number), data[section.number]
        if outcome is None:
            continue
        blocks.append(f"### {section.title}\n\n{about(machine)}")
        if outcome.status != DONE:
            blocks.append(f"Section {section.number}: {outcome.status}.")
        if found and found["rows"]:
            rows = summary(found["rows"]) if section.number == 1 else found["rows"]
            blocks.append(markdown(rows))
        if found and found["errors"]:
            errors = dict.fromkeys(found["errors"])
            blocks.append("Passed over:\n\n" + "\n".join(f"- {error}" for error in errors))
    return "\n\n".join(blocks) + "\n"


def as_typed(arguments: argparse.Namespace) -> str:
    """The command, with stand-ins for folders."""
    words = ["python", "scripts/bench_gpu.py", "--out", "DIR"]
    if arguments.images is not None:
        words += ["--images", "FOLDER"]
    if arguments.deadline is not None:
        words += ["--deadline", f"{arguments.deadline:g}"]
    if arguments.only != NUMBERS:
        words += ["--only", ",".join(map(str, arguments.only))]
    if arguments.device != "cuda":
        words += ["--device", arguments.device]
    if arguments.tiny:
        words += ["--tiny"]
    return shlex.join(words)


def section_numbers(text: str) -> list[int]:
    """ "1,3" -> [1, 3], in the sections' order."""
    try:
        asked = {int(word) for word in text.split(",")}
    except ValueError:
        raise argparse.ArgumentTypeError(f"must read N,N,..., got {text!r}") from None
    if unknown := asked - set(NUMBERS):
        raise argparse.ArgumentTypeError(
            f"there is no section {min(unknown)}; there are {', '.join(map(str, NUMBERS))}"
        )
    return [number for number in NUMBERS if number in asked]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the results")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="to train on in section 6")
    parser.add_argument("--deadline", type=float, metavar="S", help="seconds for everything")
    parser.add_argument("--only", type=section_numbers, default=NUMBERS, metavar="N,...")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="shapes and models that take no time")
    found = parser.parse_args(arguments)
    if found.images is not None and not found.images.is_dir():
        parser.error(f"--images: {found.images} is no folder")
    if found.device == "cpu" and not found.tiny:
        parser.error("--device cpu: measures what is meant for a GPU; add --tiny to try the script")
    return found


def stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    arguments = parse()
    signal.signal(signal.SIGTERM, stop)
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    images = None if arguments.images is None else arguments.images.resolve()
    if 6 in arguments.only and images is None:
        print("without --images, section 6 draws shapes to train on", flush=True)
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    chosen = sections(arguments.only)

    def save(outcomes: dict[int, Outcome]) -> None:
        write(out / "benchmarks.md", report(as_typed(arguments), date, chosen, outcomes, out))

    with TemporaryDirectory() as work:
        bench = Bench(out, Path(work), arguments.device, arguments.tiny, images)
        for name in [section.file for section in chosen] + ["grid.png"] * (6 in arguments.only):
            (out / name).unlink(missing_ok=True)  # of a run before
        outcomes = run_all(chosen, bench, arguments.deadline, save)
    print("\n" + (out / "benchmarks.md").read_text())
    if any(outcome.failed for outcome in outcomes.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
