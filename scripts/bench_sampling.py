"""Times what `hdit sample` does besides network evaluations: noise, the sampler, and files.

    python scripts/bench_sampling.py runs/digits-hdit -n 512 --steps 50

The clock runs from the first evaluation of the network until all files are there: it covers noise,
the sampler's arithmetic, decoding, the transfer of images, PNG files, packing, the grid and the
record. It leaves out loading the weights. The network's share is the sum of its calls, on CUDA by
events, so that nothing waits for them; the overhead is all that is left.
"""

from __future__ import annotations

import argparse
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from torch import nn

from hdit.device import default_device
from hdit.runs.trained import Trained
from hdit.sampling.options import choose_labels, with_options
from hdit.sampling.writer import Request, write_samples

FORMS = {"folder": "out", "npz": "out.npz", "tar": "out-{0..1}.tar"}


@dataclass
class Clock:
    """Seconds that a network took, call by call."""

    began: float = 0.0  # of the first call
    calls: list[Any] = field(default_factory=list)  # (start, end), as seconds or as events

    def mark(self) -> Any:
        """The time, as seconds or, where the host is ahead of the device, as an event."""
        if not torch.cuda.is_available():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self, *_: Any) -> None:
        self.began = self.began or time.perf_counter()
        self.calls.append([self.mark()])

    def end(self, *_: Any) -> None:
        self.calls[-1].append(self.mark())

    def seconds(self) -> float:
        if not torch.cuda.is_available():
            return sum(end - start for start, end in self.calls)
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in self.calls) / 1000


class Timed(Trained):
    """A model whose network is timed."""

    def network(self, *arguments: Any, **options: Any) -> nn.Module:  # type: ignore[override]
        network = super().network(*arguments, **options)
        network.register_forward_pre_hook(CLOCK[0].start)
        network.register_forward_hook(CLOCK[0].end)
        return network


CLOCK = [Clock()]  # of the run at hand


def measure(trained: Trained, number: int, out: Path) -> tuple[float, float]:
    """(seconds from the first evaluation to the end, seconds of the network)."""
    CLOCK[0] = Clock()
    request = Request(trained, 0, number, choose_labels(None, trained), out)
    write_samples(request, Console(stderr=True))
    return time.perf_counter() - CLOCK[0].began, CLOCK[0].seconds()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a run, or another model of `hdit sample`")
    parser.add_argument("-n", type=int, default=512, help="images [512]")
    parser.add_argument("--steps", type=int, help="of the sampler [the model's]")
    parser.add_argument("--batch-size", type=int, help="images at once [the model's]")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts [3]")
    given = parser.parse_args()
    opened = Timed.open(given.model)
    options = {
        "--steps": ("steps", given.steps),
        "--batch-size": ("batch_size", given.batch_size),
    }
    trained = with_options(opened, given.model, options, [])
    spec = trained.config.sampling
    print(
        f"{given.model}: {given.n} images of {trained.shape.chw}, {spec.sampler.kind}, "
        f"{spec.steps} steps, {spec.batch_size} at once, on {default_device().type} "
        f"({platform.machine()}, {torch.get_num_threads()} threads)"
    )
    print("| form | seconds | network | overhead | images/s |\n|---|---|---|---|---|")
    for form, name in FORMS.items():
        found = []
        for _ in range(given.rounds):
            with TemporaryDirectory() as folder:
                found.append(measure(trained, given.n, Path(folder) / name))
        found.sort(key=lambda times: 1 - times[1] / times[0])
        wall, network = found[len(found) // 2]
        share = 1 - network / wall
        print(f"| {form} | {wall:.2f} | {network:.2f} | {share:.1%} | {given.n / wall:.1f} |")


if __name__ == "__main__":
    main()
