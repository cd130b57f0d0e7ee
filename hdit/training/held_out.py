"""The images of a run: those that are trained on, and those that are held out."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from hdit.config import RunConfig
from hdit.data.held_out import Divisible, HeldOut, content_hashes, divide, divisible, shared
from hdit.data.source import Source, Stream
from hdit.latents.encode import open_held_out
from hdit.latents.store import Latents
from hdit.processes import ProcessError
from hdit.training.hosts import Hosts

Say = Callable[[str], None]

MANY = 100_000  # images, whose hashing is told of before it begins
MAX_COMPARED = 200_000  # training images that are compared with the held-out ones


class Divided(NamedTuple):
    """What a run trains on, and what it validates on."""

    training: Source | Stream
    held_out: HeldOut | None
    classes: list[int]  # the index in the model of each class of the held-out images


def hold_out(
    config: RunConfig,
    space: object,
    source: Source | Stream,
    hosts: Hosts | None,
    say: Say,
) -> Divided:
    """Divides the images of a run as data.held_out has it. Every process of `hosts` calls it.

    `hosts` is None for a single process. Raises DataError where that cannot be.
    """
    setting = config.data.held_out
    if setting is None:
        return Divided(source, None, [])
    if isinstance(setting, str):
        images, classes = open_held_out(config, space, setting, source.classes)
        return Divided(source, HeldOut(images, hash_together(images, hosts, say)), classes)
    whole = divisible(source)
    training, held_out = divide(whole, setting, hash_together(whole, hosts, say))
    return Divided(training, held_out, list(range(len(source.classes))))


def hash_together(source: Divisible, hosts: Hosts | None, say: Say) -> np.ndarray:
    """(n,) uint64: the hashes of all images, of which each process of `hosts` makes its part.

    Raises ProcessError where they see different numbers of images.
    """
    hosts, number, began = hosts or Hosts(), len(source), time.monotonic()
    if number > MANY:
        say(f"hashing {number:,} images, by which they are held out")
    sizes = hosts.gathered(number)
    if len(set(sizes)) > 1:
        raise ProcessError(
            f"data.held_out: the processes see different numbers of images, {sizes}; give all of "
            "them the same files"
        )
    mine = range(hosts.rank, number, hosts.size)
    hashes = np.zeros(number, np.uint64)
    hashes[mine.start :: mine.step] = content_hashes(source, mine)
    hosts.summed(torch.from_numpy(hashes.view(np.int64)))  # others have 0
    if number > MANY:
        say(f"hashed {number:,} images in {time.monotonic() - began:.0f} s")
    return hashes


def warn_of_shared(
    config: RunConfig,
    images: Divided,
    hosts: Hosts,
    say: Say,
    warn: Say,
) -> None:
    """Tells how many images at the path of data.held_out are trained on too, by their content.

    Nothing is compared with a stream, a huge data set, or latents where only one side has them.
    """
    source, held_out = images.training, images.held_out
    if held_out is None or not isinstance(config.data.held_out, str):
        return
    if not isinstance(source, Divisible) or len(source) > MAX_COMPARED:
        return
    if isinstance(source, Latents) != isinstance(held_out.source, Latents):
        return
    if number := shared(hash_together(source, hosts, say), held_out):
        warn(
            f"data.held_out: {number:,} of its {len(held_out.hashes):,} images are trained on too, "
            "by their content: the validation loss is too low; remove them from one of the two"
        )
