"""Trains a small classifier on images in class folders, for `hdit evaluate --features`.

    python scripts/train_classifier.py PATH --out classifier.pt

PATH has `train` and `test`, each with a sub-folder for each class. The network is made for
Fashion-MNIST, grey images of 28x28, and classifies 93 % of the test set correctly. The file is
TorchScript:

    forward(images)        uint8 (b c h w), grey or RGB, any size -> features (b, 128) before the
                           last layer
    probabilities(images)  the same -> (b, classes), in the order of `classes`, a list of names

It converts images to grey or RGB and resizes them to the size that it was trained on.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hdit.data import FolderSpec
from hdit.data.batches import in_order
from hdit.device import default_device, keep_freed_memory
from hdit.errors import UserError

FEATURES = 128
GREY = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's


class Classifier(nn.Module):
    """Three levels of convolutions, each on half the grid of the one before."""

    def __init__(self, classes: list[str], channels: int, size: int, width: int):
        super().__init__()
        self.classes, self.channels, self.size = classes, channels, size

        def convolution(c_in: int, c_out: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()
            )

        self.trunk = nn.Sequential(
            convolution(channels, width),
            nn.MaxPool2d(2),
            convolution(width, 2 * width),
            convolution(2 * width, 2 * width),
            nn.MaxPool2d(2),
            convolution(2 * width, 4 * width),
            nn.AdaptiveAvgPool2d(3),
            nn.Flatten(),
            nn.Linear(9 * 4 * width, FEATURES, bias=False),
            nn.BatchNorm1d(FEATURES),
            nn.ReLU(),
        )
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(FEATURES, len(classes))
        self.register_buffer("grey", torch.tensor(GREY).view(3, 1, 1))

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 (b c h w) -> about -1 to 1, with the channels and the size of training."""
        x = images.float() / 127.5 - 1
        if x.shape[1] != self.channels:
            grey = self.channels == 1
            x = (x * self.grey).sum(1, keepdim=True) if grey else x.expand(-1, 3, -1, -1)
        if x.shape[2] != self.size or x.shape[3] != self.size:
            x = F.interpolate(
                x, [self.size, self.size], mode="bilinear", align_corners=False, antialias=True
            )
        return x

    def forward(self, images: Tensor) -> Tensor:
        return self.trunk(self.prepare(images))

    def logits(self, images: Tensor) -> Tensor:
        return self.head(self.dropout(self.forward(images)))

    @torch.jit.export
    def probabilities(self, images: Tensor) -> Tensor:
        return self.head(self.forward(images)).softmax(-1)


def read(path: Path, size: int, channels: int, workers: int) -> tuple[Tensor, Tensor, list[str]]:
    """-> (images (n c h w) uint8, labels (n,), classes)."""
    spec = FolderSpec.model_validate(
        {"path": str(path), "size": size, "channels": channels, "bad_files": "fail"}
    )
    source = spec.open()
    parts = [range(i, min(i + 500, len(source))) for i in range(0, len(source), 500)]
    batches = list(in_order(source, parts, workers))
    images = torch.cat([batch.images for batch in batches])
    return images, torch.cat([batch.labels for batch in batches]), source.classes


def augment(images: Tensor, mirror: bool) -> Tensor:
    """All shifted by up to one pixel, and half of them mirrored."""
    h, w = images.shape[-2:]
    dy, dx = (int(i) for i in torch.randint(0, 3, (2,)))
    images = F.pad(images, (1, 1, 1, 1))[:, :, dy : dy + h, dx : dx + w]
    mirrored = (torch.rand(len(images), device=images.device) < 0.5) & mirror
    return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)


def train(net: Classifier, images: Tensor, labels: Tensor, arguments: argparse.Namespace) -> None:
    device, batch_size = arguments.device, arguments.batch_size
    steps = arguments.epochs * math.ceil(len(images) / batch_size)
    optimizer = torch.optim.AdamW(net.parameters(), arguments.lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, arguments.lr, total_steps=steps, pct_start=0.2
    )
    start = time.monotonic()
    net.train()
    for epoch in range(arguments.epochs):
        total = 0.0
        for index in torch.randperm(len(images)).split(batch_size):
            x = augment(images[index].to(device), arguments.mirror)
            x = x.contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(net.logits(x), labels[index].to(device), label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(index)
        seconds = time.monotonic() - start
        print(f"epoch {epoch + 1}: loss {total / len(images):.4f}, {seconds:.0f} s", flush=True)
    net.eval()


@torch.inference_mode()
def accuracy(net: nn.Module, images: Tensor, labels: Tensor, device: str) -> float:
    """Share of the images whose most probable class is their own."""
    right = 0
    for x, y in zip(images.split(500), labels.split(500), strict=True):
        right += int((net.probabilities(x.to(device)).argmax(-1).cpu() == y).sum())
    return right / len(images)


def save(net: nn.Module, out: Path) -> torch.jit.ScriptModule:
    """Writes TorchScript, whole or not at all, and reads it back."""
    part = out.with_name(f".{out.name}.part")
    with warnings.catch_warnings(category=DeprecationWarning, action="ignore"):  # torch's, of jit
        torch.jit.save(torch.jit.script(net.cpu()), part)
        os.replace(part, out)
        return torch.jit.load(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="folder with train/<class>/ and test/<class>/")
    parser.add_argument("--out", type=Path, required=True, help="TorchScript file to write")
    parser.add_argument("--size", type=int, default=28, help="side in pixels, at least 12")
    parser.add_argument("--channels", type=int, choices=(1, 3), default=1, help="3 for RGB")
    parser.add_argument("--width", type=int, default=24, help="channels of the first level")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=4e-3, help="the highest of the run")
    parser.add_argument("--no-mirror", dest="mirror", action="store_false", help="keep left left")
    parser.add_argument("--workers", type=int, default=2, help="processes that read images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=default_device().type)
    arguments = parser.parse_args()
    try:
        for name, least in {"size": 12, "width": 1, "epochs": 1, "batch_size": 2}.items():
            if getattr(arguments, name) < least:
                raise UserError(f"--{name.replace('_', '-')}: must be at least {least}")
        run(arguments)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


def run(arguments: argparse.Namespace) -> None:
    keep_freed_memory()
    torch.manual_seed(arguments.seed)
    parts = [
        read(arguments.path / part, arguments.size, arguments.channels, arguments.workers)
        for part in ("train", "test")
    ]
    (images, labels, classes), (test_images, test_labels, test_classes) = parts
    if len(classes) < 2 or classes != test_classes:
        raise UserError(
            f"{arguments.path}: train and test must have the same sub-folders, two or more, one "
            f"for each class; got {classes} and {test_classes}"
        )
    print(f"{len(images)} images to train on, {len(test_images)} to test, {len(classes)} classes")
    net = Classifier(classes, arguments.channels, arguments.size, arguments.width)
    net = net.to(arguments.device, memory_format=torch.channels_last)
    start, spent = time.monotonic(), time.process_time()
    train(net, images, labels, arguments)
    seconds, spent = time.monotonic() - start, time.process_time() - spent
    saved = save(net, arguments.out)
    right = accuracy(saved, test_images, test_labels, "cpu")
    print(
        f"trained in {seconds:.0f} s ({spent:.0f} s of CPU), {arguments.epochs} epochs\n"
        f"test accuracy: {right:.2%} of {len(test_images)}\n"
        f"features (b, {FEATURES}): hdit evaluate A B --features {arguments.out}"
    )


if __name__ == "__main__":
    main()
