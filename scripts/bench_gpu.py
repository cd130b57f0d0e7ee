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
names for torch and Triton, a few processes at a time; that ends before section 2 begins.

The folder gets four files: sections.json with the figures, benchmarks.md with the tables, grid.png
with images of section 6, and log.txt with what the processes said. While a section runs, its
figures so far lie in a JSON file of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from bench_record import Row, about, commit, markdown, one_line, output_of, write

STARTED = time.monotonic()
ROOT = Path(__file__).resolve().parent.parent
TAIL = 25  # lines of what fails
GRACE = 3.0  # seconds between asking a process to end and killing it
SAVING = 10.0  # the same for training, which then writes its checkpoint
SAMPLING = 30.0  # of section 6, for starting, compiling what samples, and sampling
STARTING = 25.0  # of section 6, until training's own clock runs, and for its last checkpoint
TESTERS = 6  # processes among which pytest's tests are spread
WARM_AT_ONCE = 4  # processes that compile, beside section 1's own
WARM_AFTER = 6  # once those are through
FOLDED = "sections.json"
TINY_PATIENCE = 4.0  # by which caps grow: a busy CPU is no GPU
WARM_ATTENTION = [  # side of the grid, beginning of contenders' names
    (256, "flex"),
    (64, "flex"),
    (128, "flex"),
    (64, "triton: stepped"),  # whose kernels serve any shape
    (64, "triton: product"),
    (64, "triton: one pass"),
]
WARM_MODELS = {"hdit-ffhq1024": 0.25, "hdit-imagenet256": 0.15, "dit-xl-2-256": 0.1}
"""Models to compile, and the share of the device's memory that each may take."""
WARM_SHARES = {"attention": 0.05, "megapixel": 0.2, "show": 0.1}

CAPPED = """
import os, runpy, sys, torch
share, name, sys.argv = float(sys.argv[1]), sys.argv[2], sys.argv[2:]
if torch.cuda.is_available():
    torch.cuda.set_per_process_memory_fraction(share)
if name.endswith(".py"):
    sys.path[0] = os.path.dirname(name)
    runpy.run_path(name, run_name="__main__")
else:
    runpy.run_module(name, run_name="__main__", alter_sys=True)
"""
MACHINE = """
import json, sys, torch
sys.path.insert(0, sys.argv[2])
from bench_tools import machine
print(json.dumps(machine(torch.device(sys.argv[1]))))
"""
RESULTS = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
RESULT = re.compile(rf"(?:\[gw\d+\] .*?({RESULTS}) (.+))|(?:(\S+::.+?) ({RESULTS})\b)")
"""What pytest -vv says of a test, with and without processes to spread them among."""
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

    def end(self, grace: float = GRACE) -> None:
        """Ends the group, if it is still there: asks first, and then kills."""
        for number, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, None)):
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
    def group(self, compile_threads: int = 8, grace: float = GRACE) -> Iterator[Group]:
        """Processes that have ended when the block has, however it ends."""
        env = {"TORCHINDUCTOR_COMPILE_THREADS": str(compile_threads)} | self.env
        group = Group({}, self.work, env)
        try:
            yield group
        finally:
            for job in group.jobs.values():
                job.end(grace)
                with self.log.open("a") as file:
                    file.write(f"==== {job.name}, status {job.process.returncode}\n{job.said()}\n")

    def outcome(
        self, commands: dict[str, list[str]], seconds: float, grace: float = GRACE
    ) -> Outcome:
        """Runs processes beside each other for so long at most."""
        with self.group(grace=grace) as group:
            group.start(commands)
            group.wait(time.monotonic() + seconds)
            return outcome_of(group.jobs, seconds)


class Group(NamedTuple):
    """Processes by name."""

    jobs: dict[str, Job]
    logs: Path
    env: dict[str, str]

    def start(self, commands: dict[str, list[str]]) -> None:
        for name, command in commands.items():
            self.jobs[name] = Job(name, command, self.logs / f"{name}.log", self.env)

    def running(self) -> int:
        return sum(job.process.poll() is None for job in self.jobs.values())

    def wait(self, until: float) -> None:
        """Waits for all to end by themselves, until a moment of the monotonic clock."""
        for job in self.jobs.values():
            try:
                job.process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                return


def environment(device: str, tiny: bool) -> dict[str, str]:
    """The caller's, with this checkout first, and without a GPU where a CPU is asked for."""
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    if device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    if found := commit():
        env["HDIT_COMMIT"] = found
    if tiny:
        env["OMP_NUM_THREADS"] = "1"  # threads cost more than they bring to what is tiny
    return env


def outcome_of(jobs: dict[str, Job], seconds: float) -> Outcome:
    """Of processes that had so long: one that failed says with what."""
    running = [name for name, job in jobs.items() if job.process.poll() is None]
    failed = [name for name, job in jobs.items() if job.process.returncode not in (None, 0)]
    for name in failed:
        print_tail(jobs[name])
    words = [f"{name} failed with status {jobs[name].process.returncode}" for name in failed]
    words += [f"{name} was cut off after {seconds:.0f} s" for name in running]
    return Outcome("; ".join(words) or DONE, failed=bool(failed))


def print_tail(job: Job) -> None:
    tail = "\n".join(job.said().splitlines()[-TAIL:])
    print(f"---- {job.name} failed; the end of its output:\n{tail}\n----", flush=True)


# ---- the sections --------------------------------------------------------------------------------


def right(bench: Bench, seconds: float, warm: dict[str, list[str]]) -> Outcome:
    """The gpu tests, every backend and the command line, beside each other; and what warms.

    What is cut off has failed: nobody has seen that it is right.
    """
    until = time.monotonic() + seconds
    waiting = list(warm)
    # Many run beside each other: more threads would only take turns.
    with bench.group(compile_threads=3) as warming:
        with bench.group(compile_threads=2) as own:
            own.start(checks(bench, seconds))
            while own.running() and time.monotonic() < until:
                start_some(warming, warm, waiting, WARM_AT_ONCE)
                time.sleep(0.1)
            found = outcome_of(own.jobs, seconds)
            tests_row = row_of_tests(own.jobs["tests"])
        data = {name: read(bench.work / f"{name}.json") or {} for name in ("backends", "cli")}
        rows = [tests_row, *(row for d in data.values() for row in d.get("rows", []))]
        errors = [error for d in data.values() for error in d.get("errors", [])]
        merged = {"machine": data["backends"].get("machine", {}), "rows": rows, "errors": errors}
        write(bench.out / RIGHT, json.dumps(merged, indent=1) + "\n")
        while (waiting or warming.running()) and time.monotonic() < until:
            start_some(warming, warm, waiting, WARM_AFTER)
            time.sleep(0.1)
        tell_of_warming(warming, waiting)
    return found._replace(failed=found.status != DONE)


def checks(bench: Bench, seconds: float) -> dict[str, list[str]]:
    """The commands of section 1, without those that warm."""
    tiny = ["--tiny"] if bench.tiny else []
    spread = []
    if find_spec("xdist"):
        spread = ["-n", 1 if bench.tiny else TESTERS, "--dist", "worksteal"]
    pytest = [sys.executable, "-m", "pytest", "-m", "gpu", "-W", "default", "-vv", "-rfE",
              "--tb=short", "-p", "no:cacheprovider", "--continue-on-collection-errors",
              *map(str, spread), *gpu_tests()]  # fmt: skip
    json_of = {name: bench.work / f"{name}.json" for name in ("backends", "cli")}
    return {
        "tests": pytest,
        "backends": bench.script(
            "check_backends.py", "--device", bench.device, "--json", json_of["backends"], *tiny
        ),
        "cli": bench.script("check_cli.py", "--precision", bench.precision, "--json",
                            json_of["cli"], "--patience", seconds),
    }  # fmt: skip


def gpu_tests() -> list[str]:
    """The files of tests that hold one for a GPU, kernels' first: to collect all takes long."""
    found = [p for p in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in p.read_text()]
    found.sort(key=lambda p: (p.parent.name != "kernels", p))
    return [str(path.relative_to(ROOT)) for path in found]


def start_some(group: Group, commands: dict[str, list[str]], waiting: list[str], most: int) -> None:
    """Starts those that wait, until so many run."""
    while waiting and group.running() < most:
        name = waiting.pop(0)
        group.start({name: commands[name]})


def tell_of_warming(warming: Group, waiting: list[str]) -> None:
    """Prints what has not compiled, and why."""
    became = dict.fromkeys(waiting, "was not started")
    for name, job in warming.jobs.items():
        if (status := job.process.poll()) is None:
            became[name] = "was not through"
        elif status:
            print_tail(job)
            became[name] = f"ended with status {status}"
    for name, words in became.items():
        print(f"{name} {words}: what comes may compile longer", flush=True)


def row_of_tests(job: Job) -> Row:
    """How many tests had which result, and the names of what failed; also where it was cut off."""
    lines = [line.strip() for line in job.said().splitlines() if line.strip()]
    results: dict[str, str] = {}  # by test; an error in its teardown replaces what it had
    for line in lines:
        if match := RESULT.match(line):
            results[match[2] or match[3]] = match[1] or match[4]
    bad = [name for name, result in results.items() if result in ("FAILED", "ERROR")]
    bad += [line.split(" - ")[0].split(" ", 1)[1] for line in lines if line.startswith("ERROR ")]
    status = job.process.poll()
    if status is None:
        counts = {r: list(results.values()).count(r) for r in RESULTS.split("|")}
        told = [f"{count} {r.lower()}" for r, count in counts.items() if count]
        last = f"cut off after {', '.join(told) or 'no test'}"
    else:
        last = lines[-1].strip("= ") if lines else "nothing said"
    names = list(dict.fromkeys(bad))
    how = "; ".join([last, *(f"failed: {name}" for name in names[:10])])
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
    training = 2.0 if bench.tiny else max(5.0, seconds - STARTING - SAMPLING)
    train = bench.hdit("train", show_config(bench), "--run", run, "--minutes", training / 60)
    trained = bench.outcome({"show-train": train}, max(1.0, seconds - SAMPLING), SAVING)
    if row := row_of_training(run / "metrics.jsonl"):
        source = "shapes" if bench.images is None else bench.images.name
        data = {"machine": {}, "rows": [{"data": source} | row], "errors": []}
        write(bench.out / file_of(6), json.dumps(data, indent=1) + "\n")
    if not any((run / "checkpoints").glob("[0-9]*")):
        return trained
    number = 4 if bench.tiny else 64
    sample = bench.hdit("sample", run, "-n", number, "--out", pictures)
    sampled = bench.outcome({"show-sample": sample}, max(1.0, until - time.monotonic()))
    if (pictures / "grid.png").exists():
        shutil.copyfile(pictures / "grid.png", bench.out / "grid.png")
    words = [found.status for found in (trained, sampled) if found.status != DONE]
    return Outcome("; ".join(words) or DONE, trained.failed or sampled.failed)


def row_of_training(log: Path) -> Row | None:
    """What metrics.jsonl of a run says of its speed and end; None if there is nothing."""
    lines = log.read_text().splitlines() if log.exists() else []
    if not lines:
        return None
    last = json.loads(lines[-1])
    speeds = sorted(json.loads(line)["images_per_second"] for line in lines)
    return {
        "images drawn": last["images"],
        "steps": last["step"],
        "images/s, median": speeds[len(speeds) // 2],
        "loss": last["loss"],
        "peak memory, GiB": last["peak_memory"] / 2**30,
    }


def warming(bench: Bench, wanted: list[int]) -> dict[str, list[str]]:
    """Commands that compile for the sections to come, and time nothing; the longest first."""
    if bench.tiny:
        models_too = capped(bench.script("bench_models.py", "--tiny", "--warm"), 0.1)
        return {"warm-models": models_too} if 3 in wanted else {}
    if bench.device != "cuda":
        return {}
    on_cuda = ["--device", "cuda", "--warm"]
    found = {}
    if 3 in wanted:
        for name, share in WARM_MODELS.items():
            command = bench.script("bench_models.py", *on_cuda, "--model", name)
            found[f"warm-{name}"] = capped(command, share)
    if 4 in wanted:
        command = megapixel_command(bench, "warm-megapixel", "--steps", 2)
        found["warm-megapixel"] = capped(command, WARM_SHARES["megapixel"])
    if 6 in wanted:
        run = bench.work / "warm-show"
        train = bench.hdit(
            "train", show_config(bench), "--run", run,
            "--set", "training.images=256", "--set", "training.checkpoint_every=256",
        )  # fmt: skip
        sample = bench.hdit(
            "sample", run, "-n", 64, "--steps", 2, "--out", bench.work / "warm-pictures"
        )
        both = (shlex.join(capped(c, WARM_SHARES["show"])) for c in (train, sample))
        found["warm-show"] = ["sh", "-c", " && ".join(both)]
    if 2 in wanted:
        for side, contender in WARM_ATTENTION:
            name = f"warm-{contender.replace(': ', '-')}-{side}"
            command = bench.script(
                "bench_attention.py", *on_cuda, "--side", side, "--contender", contender
            )
            found[name] = capped(command, WARM_SHARES["attention"])
    return found


def capped(command: list[str], share: float) -> list[str]:
    """The same command in a process that may take so much of the device's memory."""
    python, *rest = command
    return [python, "-c", CAPPED, str(share), *(rest[1:] if rest[0] == "-m" else rest)]


def sections(wanted: list[int]) -> list[Section]:
    """Those that are wanted, in their order."""

    def first(bench: Bench, seconds: float) -> Outcome:
        return right(bench, seconds, warming(bench, wanted))

    every = [
        Section(1, "Right", "right", 90, 20, first),
        Section(2, "Neighborhood attention", "attention", 60, 15, attention),
        Section(3, "Training steps", "models", 130, 30, models),
        Section(4, "Megapixel sampling", "megapixel", 45, 20, megapixel),
        Section(6, "A model to show", "show", 120, 60, show),
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


def fold(out: Path, chosen: list[Section], outcomes: dict[int, Outcome], device: str) -> Row:
    """Moves what sections have recorded into one file, beside how each went -> all of it.

    Few files come back from some machines.
    """
    found = read(out / FOLDED) or {"machine": {}, "sections": {}}
    for section in chosen:
        if section.number not in outcomes:
            continue
        entry = found["sections"].setdefault(section.name, {"rows": [], "errors": []})
        recorded = read(out / section.file) or {}
        entry |= recorded | outcomes[section.number]._asdict()
        found["machine"] = found["machine"] or recorded.get("machine") or {}
    if not found["machine"] and any(entry["rows"] for entry in found["sections"].values()):
        said = output_of([sys.executable, "-c", MACHINE, device, str(ROOT / "scripts")])
        found["machine"] = json.loads(said) if said else {}
    write(out / FOLDED, json.dumps(found, indent=1) + "\n")
    for section in chosen:
        if section.number in outcomes:
            (out / section.file).unlink(missing_ok=True)
    for partial in out.glob(".*.partial"):  # of what was killed while it wrote
        partial.unlink()
    return found


def report(
    command: str,
    date: str,
    chosen: list[Section],
    outcomes: dict[int, Outcome],
    data: dict[int, dict[str, Any]],
    machine: Row,
) -> str:
    """Markdown of all sections that are through, from what they have recorded."""
    blocks = [
        f"## On {machine.get('device', 'a device that no section has named')}",
        f"```\n{command}\n```\n{date}",
    ]
    for section in chosen:
        outcome, found = outcomes.get(section.number), data.get(section.number)
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
    parser.add_argument("--commit", metavar="HASH", help="of the figures, where git knows none")
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
    if arguments.commit:
        os.environ["HDIT_COMMIT"] = arguments.commit
    elif not commit():
        print("warning: the commit is not known; name it with --commit", flush=True)

    def save(outcomes: dict[int, Outcome]) -> None:
        found = fold(out, chosen, outcomes, arguments.device)
        data = {s.number: found["sections"].get(s.name) for s in chosen}
        text = report(as_typed(arguments), date, chosen, outcomes, data, found["machine"])
        write(out / "benchmarks.md", text)

    with TemporaryDirectory(ignore_cleanup_errors=True) as work:
        for name in [*FILES.values(), FOLDED, "benchmarks.md", "grid.png"]:
            (out / name).unlink(missing_ok=True)  # of a run before
        bench = Bench(out, Path(work), arguments.device, arguments.tiny, images)
        outcomes = run_all(chosen, bench, arguments.deadline, save)
    print("\n" + (out / "benchmarks.md").read_text())
    if any(outcome.failed for outcome in outcomes.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
