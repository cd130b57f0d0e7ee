"""Checks what a run on the digits has learnt: whether a classifier sees the class that was asked
for, and whether the samples are new images.

    python scripts/check_digits.py runs/digits-hdit

A small convolutional network is trained on the real training digits; its accuracy on held-out real
digits says how far to trust it. Distances are Euclidean, over pixels in 0..1, to the nearest
training image.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from hdit.data.sources.digits import Digits
from hdit.runs.trained import Trained
from hdit.sampling.sample import sample


def classifier(images: Tensor, labels: Tensor, epochs: int = 60) -> nn.Module:
    """A convolutional network for 8x8 digits, trained with shifts by up to one pixel."""
    net = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.4),
        nn.Linear(64 * 16, 10),
    )
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(128):
            dy, dx = torch.randint(0, 3, (2,)).tolist()
            shifted = F.pad(images[index], (1, 1, 1, 1))[:, :, dy : dy + 8, dx : dx + 8]
            optimizer.zero_grad()
            F.cross_entropy(net(shifted), labels[index]).backward()
            optimizer.step()
        schedule.step()
    return net.eval()


@torch.no_grad()
def agreement(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((net(images).argmax(-1) == labels).double().mean())


def nearest(images: Tensor, others: Tensor) -> Tensor:
    """Distance of each image to the nearest of the others."""
    exact = "donot_use_mm_for_euclid_dist"  # the product form does not give 0 for a copy
    return torch.cdist(images.flatten(1), others.flatten(1), compute_mode=exact).amin(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a run, or any other model of `hdit sample`")
    parser.add_argument("-n", type=int, default=500, help="number of samples")
    parser.add_argument("--seed", type=int, default=1_000_000, help="seed of the first sample")
    arguments = parser.parse_args()
    torch.manual_seed(0)

    train, test = (Digits(split) for split in ("train", "test"))
    real, held_out = train.images / 255, test.images / 255
    net = classifier(real, train.labels)

    trained = Trained.open(arguments.model, print)
    labels = [i % 10 for i in range(arguments.n)]
    seeds = list(range(arguments.seed, arguments.seed + arguments.n))
    device = torch.device("cpu")
    parts = sample(trained.network(), trained.config, trained.shape, seeds, labels, device)
    samples = torch.cat([part.images for part in parts]) / 255

    table = Table(title=f"{trained.path}: {arguments.n} samples", title_justify="left")
    table.add_column("")
    for name in (
        "classified as labelled",
        "distance to nearest training image: median",
        "5% ... 95%",
    ):
        table.add_column(name, justify="right")
    sets = {
        f"{len(held_out)} held-out real digits": (held_out, test.labels),
        f"{len(samples)} samples": (samples, torch.tensor(labels)),
    }
    for name, (images, wanted) in sets.items():
        distance = nearest(images, real).double()
        low, middle, high = distance.quantile(torch.tensor([0.05, 0.5, 0.95]).double()).tolist()
        share = agreement(net, images, wanted)
        table.add_row(name, f"{share:.1%}", f"{middle:.3f}", f"{low:.3f} ... {high:.3f}")
    copies = int((nearest(samples, real) == 0).sum())
    Console().print(table, f"exact copies of a training image among the samples: {copies}")


if __name__ == "__main__":
    main()
