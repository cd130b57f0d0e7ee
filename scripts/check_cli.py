"""Checks the command line from end to end on this machine's device, with tiny models.

    python scripts/check_cli.py --json cli.json

It trains, kills the run without warning, resumes it, samples and evaluates; beside that it encodes
images by a VAE with random weights and trains on the latents. Needs diffusers, and no network.
Exits with status 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench_record import Record, markdown

PIXELS = """
[data]
kind = "shapes"
size = 32
num_images = 64

[model]
kind = "hdit"
patch_size = 2
mapping = { depth = 1, width = 64 }

[[model.levels]]
depth = 1
width = 64
attention = { kind = "neighborhood", kernel_size = 7, d_head = 32 }

[[model.levels]]
depth = 1
width = 64
attention = { kind = "global", d_head = 32 }

[training]
images = 1_000_000
checkpoint_every = 64
log_every = 16
batch_size = 16
precision = "PRECISION"
compile = false

[sampling]
steps = 4
grid = 4
precision = "PRECISION"
compile = false
"""

LATENTS = """
[data]
kind = "folder"
path = "images"
size = 32

[space]
kind = "latent"
vae = "vae"
factor = 4

[model]
kind = "dit"
patch_size = 1
width = 64
depth = 1
num_heads = 2

[training]
images = 64
checkpoint_every = 64
batch_size = 16
precision = "PRECISION"
compile = false

[sampling]
steps = 4
grid = 4
precision = "PRECISION"
compile = false
"""

VAE = """
import numpy as np
import torch
from diffusers import AutoencoderKL
from pathlib import Path
from PIL import Image

torch.manual_seed(0)
AutoencoderKL(
    down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    block_out_channels=(8, 8, 8), norm_num_groups=4, latent_channels=4,
).save_pretrained("vae")
rng = np.random.default_rng(0)
Path("images").mkdir()
for i in range(32):
    coarse = rng.integers(0, 256, (4, 4, 3), np.uint8)
    Image.fromarray(coarse).resize((40, 32)).save(f"images/{i}.png")
"""

FEATURES = """
def pooled(x):
    return x.double().unfold(2, 16, 16).unfold(3, 16, 16).mean((-1, -2)).flatten(1)
"""

RUN_SECONDS = 0.5  # of training after the resumption


class Wrong(Exception):
    """Something that a command was to do, and did not."""


class Checks:
    """Commands in a folder, and a row for each."""

    def __init__(self, folder: Path, record: Record, patience: float):
        self.folder, self.record, self.patience = folder, record, patience

    def hdit(self, *arguments: Any) -> str:
        """What the command prints. Raises Wrong with the end of that, where it fails."""
        return self._python("-m", "hdit.cli", *arguments)

    def _python(self, *arguments: Any) -> str:
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(
            command,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=self.patience,
        )
        if done.returncode:
            raise Wrong(f"status {done.returncode}: {' '.join(done.stdout.split())[-400:]}")
        return done.stdout

    def check(self, what: str, run: Callable[[], str]) -> bool:
        """Records whether `run`, which tells what it saw, went through."""
        started = time.monotonic()
        try:
            said, right = run(), True
        except (Wrong, OSError, ValueError, KeyError, subprocess.TimeoutExpired) as error:
            said, right = str(error), False
        seconds = round(time.monotonic() - started, 1)
        row = {"check": f"hdit {what}", "how": said.replace("|", "/"), "seconds": seconds}
        self.record.add(row | {"right": right})
        return right

    # ---- in pixels -------------------------------------------------------------------------------

    def pixels(self) -> None:
        for what, run in (
            ("train, and kill it", self.kill),
            ("train, to resume", self.resume),
            ("sample", self.sample),
            ("evaluate", self.evaluate),
        ):
            if not self.check(what, run):
                return  # what comes next needs it

    def kill(self) -> str:
        checkpoints = self.folder / "run" / "checkpoints"
        command = [sys.executable, "-m", "hdit.cli", "train", "pixels.toml", "--run", "run"]
        log = self.folder / "train.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                command, cwd=self.folder, stdout=file, stderr=subprocess.STDOUT
            )
            deadline = time.monotonic() + self.patience
            try:
                while len(complete(checkpoints)) < 2:
                    if process.poll() is not None:
                        raise Wrong(f"it ended: {' '.join(log.read_text().split())[-400:]}")
                    if time.monotonic() > deadline:
                        raise Wrong(f"no two checkpoints in {self.patience:.0f} s")
                    time.sleep(0.05)
            finally:
                process.kill()
                process.wait()
        if process.returncode != -signal.SIGKILL:
            raise Wrong(f"status {process.returncode}, and not that of a kill")
        return f"killed with {len(complete(checkpoints))} checkpoints"

    def resume(self) -> str:
        before = int(complete(self.folder / "run" / "checkpoints")[-1])
        minutes = RUN_SECONDS / 60
        said = self.hdit("train", "pixels.toml", "--run", "run", "--minutes", minutes)
        if "resuming from" not in said:
            raise Wrong("it did not say that it resumes")
        lines = (self.folder / "run" / "metrics.jsonl").read_text().splitlines()
        last = json.loads(lines[-1])
        if last["images"] <= before or not math.isfinite(last["loss"]):
            raise Wrong(f"from {before} images on to {last['images']}, loss {last['loss']}")
        return f"from {before} to {last['images']} images, loss {last['loss']:.3g}"

    def sample(self) -> str:
        self.hdit("sample", "run", "-n", 16, "--out", "samples")
        pictures = sorted(path.name for path in (self.folder / "samples").glob("0*.png"))
        if len(pictures) != 16 or not (self.folder / "samples" / "grid.png").exists():
            raise Wrong(f"{len(pictures)} pictures of 16")
        return "16 pictures and a grid"

    def evaluate(self) -> str:
        (self.folder / "pooled.py").write_text(FEATURES)
        card = self.folder / "card.json"
        self.hdit("evaluate", "run", "pixels.toml", "-n", 16, "--features", "pooled:pooled",
                  "--out", card, "--workers", 0)  # fmt: skip
        distance = json.loads(card.read_text())["fid"]
        if not math.isfinite(distance) or distance < 0:
            raise Wrong(f"FID {distance}")
        return "an FID of 16 samples, on pooled pixels"

    # ---- in latents ------------------------------------------------------------------------------

    def latents(self) -> None:
        for what, run in (("encode", self.encode), ("train, on latents", self.on_latents)):
            if not self.check(what, run):
                return

    def encode(self) -> str:
        self._python("-c", VAE)
        self.hdit("encode", "latents.toml", "--out", "latents")
        return "32 images by a VAE with random weights"

    def on_latents(self) -> str:
        self.hdit("train", "latents.toml", "--run", "latent-run", "--set", "space.stored=latents")
        lines = (self.folder / "latent-run" / "metrics.jsonl").read_text().splitlines()
        loss = json.loads(lines[-1])["loss"]
        if not math.isfinite(loss):
            raise Wrong(f"loss {loss}")
        return f"64 images, loss {loss:.3g}"


def complete(checkpoints: Path) -> list[str]:
    """The names of the checkpoints that are there, the oldest first."""
    if not checkpoints.is_dir():
        return []
    return sorted(path.name for path in checkpoints.iterdir() if path.name.isdigit())


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows as they come")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--patience", type=float, default=60, help="seconds for each command")
    return parser.parse_args(arguments)


def main() -> None:
    arguments = parse()
    record = Record(arguments.json)
    with TemporaryDirectory() as name:
        checks = Checks(Path(name), record, arguments.patience)
        for file, text in (("pixels.toml", PIXELS), ("latents.toml", LATENTS)):
            Path(name, file).write_text(text.replace("PRECISION", arguments.precision))
        with ThreadPoolExecutor() as both:  # they have nothing to do with each other
            for done in [both.submit(checks.pixels), both.submit(checks.latents)]:
                done.result()
    print(markdown(record.rows))
    wrong = [row for row in record.rows if not row["right"]]
    if wrong:
        sys.exit(f"{len(wrong)} of {len(record.rows)} checks are wrong")


if __name__ == "__main__":
    main()
