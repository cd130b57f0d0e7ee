"""Tells where the time of a training step goes, and the trainer's own share of it.

    python scripts/profile_trainer.py hdit-oxford-flowers --batch-size 4 --steps 30
    python scripts/profile_trainer.py hdit-oxford-flowers --batch-size 4 --steps 30 --images FOLDER

The trainer's own share is all but the network's forward pass, the backward pass and the optimizer.
Data is loaded by the workers of the config from images at hand, or from drawn ones. The first steps
are not counted. On CUDA the host waits after each part, which takes the overlap away.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from hdit.config import load
from hdit.config.presets import find_config
from hdit.device import keep_freed_memory
from hdit.training import trainer as module
from hdit.training.trainer import Trainer

WARM = 5  # steps that are not counted
MODEL = ("forward", "backward", "optimizer")


class Clock:
    """Seconds of parts of a step; those within another part count for themselves alone."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.open = device, defaultdict[str, float](float), [0.0]

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts the time of the block for `name`."""
        began = self._now()
        self.open.append(0.0)
        yield
        took = self._now() - began
        self.seconds[name] += took - self.open.pop()
        self.open[-1] += took

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, counted for `name`."""

        def wrapper(*arguments: Any, **options: Any) -> Any:
            with self.part(name):
                return call(*arguments, **options)

        return wrapper


def watch(trainer: Trainer, clock: Clock) -> None:
    """Lets the clock count the parts of the trainer's steps."""
    trainer.backbone.forward = clock.timed("forward", trainer.backbone.forward)  # type: ignore[method-assign]
    trainer.accelerator.backward = clock.timed("backward", trainer.accelerator.backward)  # type: ignore[method-assign]
    trainer.optimizer.step = clock.timed("optimizer", trainer.optimizer.step)  # type: ignore[method-assign]
    trainer.objective = clock.timed("noise, sigma, loss", trainer.objective)  # type: ignore[assignment]
    trainer._log = clock.timed("metrics", trainer._log)  # type: ignore[method-assign]
    trainer.is_lost = clock.timed("guards", trainer.is_lost)  # type: ignore[method-assign]
    trainer.guard.judge = clock.timed("guards", trainer.guard.judge)  # type: ignore[method-assign]
    trainer.averages.update = clock.timed("EMA", trainer.averages.update)  # type: ignore[method-assign]
    module.clip_gradient = clock.timed("gradient norm, clipping", module.clip_gradient)


def draw_images(folder: Path, size: int, number: int = 64) -> None:
    """Writes smooth random images, of the size that is cropped to."""
    rng = np.random.default_rng(0)
    for i in range(number):
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        small.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{i}.png")


def profile(config: Path, overrides: list[str], steps: int) -> None:
    """Trains so many steps, and prints the table."""
    settings = load(config, overrides)
    batch = settings.training.batch_size
    with TemporaryDirectory() as folder:
        settings = load(
            config,
            [
                *overrides,
                f"training.images={batch * (WARM + steps)}",
                f"training.checkpoint_every={10 * batch * (WARM + steps)}",
                f"training.log_every={10 * batch}",
                "sampling.grid=0",
            ],
        )
        trainer = Trainer(settings, Path(folder) / "run", Console(stderr=True, quiet=True))
        clock = Clock(trainer.device)
        watch(trainer, clock)
        trainer._save = lambda stream: True  # type: ignore[method-assign, assignment]
        step, count, began = trainer._step, [0], [0.0]

        def counted(stream: Any) -> Any:
            if count[0] == WARM:
                clock.seconds.clear()
                clock.open[-1] = 0.0
                trainer.metrics.waited, began[0] = 0.0, clock._now()
            count[0] += 1
            found = step(stream)
            waited[0] += trainer.metrics.waited - last[0] if count[0] > WARM + 1 else 0.0
            last[0] = trainer.metrics.waited
            return found

        waited, last = [0.0], [0.0]
        trainer._step = counted  # type: ignore[method-assign]
        trainer.fit()
        total = clock._now() - began[0]
    seconds = dict(clock.seconds)
    seconds["waiting for data"] = max(waited[0], 0.0)
    seconds["all else"] = total - sum(seconds.values())
    print(f"{config.stem}, batch {batch}, {trainer.device.type}, {torch.get_num_threads()} threads")
    print("\n| part | ms a step | share |\n|---|--:|--:|")
    for name, took in sorted(seconds.items(), key=lambda item: -item[1]):
        print(f"| {name} | {1000 * took / steps:.2f} | {took / total:.2%} |")
    own = total - sum(seconds[name] for name in MODEL)
    print(f"\nThe trainer's own share: {own / total:.2%} of {1000 * total / steps:.1f} ms a step.")


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("config", help="a TOML file, or the name of a preset")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--images", help="folder; drawn ones if absent")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    keep_freed_memory()
    config = find_config(Path(arguments.config))
    with TemporaryDirectory() as folder:
        overrides = [f"training.batch_size={arguments.batch_size}", *arguments.set]
        data = load(config, overrides).data
        if data.kind != "digits":
            if not arguments.images:
                draw_images(Path(folder), max(data.shape[1:]))
            overrides.append(f"data.path={arguments.images or folder}")
        profile(config, overrides, arguments.steps)


if __name__ == "__main__":
    main()
