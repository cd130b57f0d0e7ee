"""Times features of images from their files beside the network alone.

    python scripts/bench_features.py my_images --workers 4

`alone` runs the network on prepared batches that lie in memory; `whole` is what `hdit evaluate`
does: it reads, decodes, hashes and prepares the same images in other processes, runs the network,
and sums the moments. In each round both take the same images in turn, from files that the system
has in memory; the ratio is the median of the ratios within a round, and 1 is the most that it can
be. Without --features a random convolutional network stands in for the Inception: it gets 299 x 299
floats by clean-fid's resize, costs 5.7 GMAC an image and has 2048 features, as that does.
"""

from __future__ import annotations

import argparse
import platform
import time
from statistics import median

import PIL
import torch
from torch import Tensor, nn

from hdit.data.loader import usable_cpus
from hdit.device import default_device, keep_freed_memory
from hdit.evaluation.extractor import Extractor
from hdit.evaluation.features import open_features
from hdit.evaluation.image_sets import open_set
from hdit.evaluation.measuring import measure
from hdit.evaluation.pipelines import PROTOCOLS, CleanResize

WIDTHS = (64, 160, 480, 960, 2020, 2048)


class StandIn(nn.Module):
    """A convolution for each halving, and one of 1 x 1 to 2048 channels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(zip((3, *WIDTHS), WIDTHS, strict=False)):
            kernel = 1 if after == WIDTHS[-1] else 3
            stride = 1 if i == len(WIDTHS) - 1 else 2
            layers += [nn.Conv2d(before, after, kernel, stride, kernel // 2), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers((x - 128) / 128).mean((2, 3))

    def macs(self) -> float:
        """Multiply-accumulates of an image of 299 x 299."""
        side, total = 299, 0
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                side = -(-side // layer.stride[0])
                total += side**2 * layer.weight.numel()
        return total


def stand_in(device: torch.device) -> Extractor:
    """The random network as an extractor."""
    network = StandIn().eval().to(device)
    return Extractor(
        f"a random network of {network.macs() / 1e9:.2f} GMAC",
        "",
        PROTOCOLS["clean"].input,
        CleanResize(),
        network,
        device,
    )


def seconds_alone(extractor: Extractor, batches: list[Tensor]) -> float:
    """The network on batches in memory; each call waits for its result."""
    start = time.perf_counter()
    for batch in batches:
        extractor(batch)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("path", help="images: a folder, .zip, .npz or .tar")
    parser.add_argument("--features", help="as of hdit evaluate")
    parser.add_argument("--protocol", choices=tuple(PROTOCOLS), help="of the Inception")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--in-memory", type=int, default=512, help="images that `alone` goes over")
    parser.add_argument("--workers", type=int, default=usable_cpus())
    parser.add_argument("--rounds", type=int, default=5)
    a = parser.parse_args()
    keep_freed_memory()
    device = default_device()
    named = a.features or a.protocol
    extractor = open_features(a.features, device, print, a.protocol) if named else stand_in(device)
    images = open_set(a.path)
    some = images.pictures(range(min(a.in_memory, len(images))))
    prepared = [extractor.prepare(image) if extractor.prepare else image for image in some]
    batches = [torch.stack(prepared[i : i + a.batch]) for i in range(0, len(prepared), a.batch)]
    print(
        f"{len(images):,} images; {extractor.name} on {device}; batches of {a.batch}, "
        f"{a.workers} workers; torch {torch.__version__}, Pillow {PIL.__version__}, "
        f"{platform.machine()}, {usable_cpus()} CPUs"
    )
    alone, whole = [], []
    for i in range(a.rounds + 1):
        own = len(prepared) / seconds_alone(extractor, batches)
        start = time.perf_counter()
        measure(images, {"features": extractor}, batch_size=a.batch, workers=a.workers)
        through = len(images) / (time.perf_counter() - start)
        if i:  # the first round warms up
            alone.append(own)
            whole.append(through)
    ratio = median(w / o for w, o in zip(whole, alone, strict=True))
    print(f"{'alone/s':>9} {'whole/s':>9} {'ratio':>6}")
    print(f"{median(alone):>9.1f} {median(whole):>9.1f} {ratio:>6.2f}")


if __name__ == "__main__":
    main()
