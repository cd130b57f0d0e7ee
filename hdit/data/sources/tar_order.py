"""The order of a stream's images: shuffled by the seed, and resumed from a state."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field, ValidationError

from hdit import randomness
from hdit.data.batches import permutation
from hdit.data.source import DataError
from hdit.data.sources.listing import order
from hdit.data.sources.tar_samples import Entry, Shards
from hdit.manifest import explain
from hdit.protocols import Spec


class Reference(NamedTuple):
    """A reference to an image: its pass, its shard, and where it lies there."""

    epoch: int
    shard: int
    start: int  # of its first header


Count = Annotated[int, Field(ge=0, lt=2**63)]


class _State(Spec):
    """Where an order stands, as `TarOrder.state` gives it."""

    shards: dict[str, Any]
    seed: Count
    passes: Count
    count: Count
    place: Count
    offset: Count
    is_permuted: bool
    buffer: Annotated[str, Field(pattern="^([0-9]{1,9}:[0-9]{1,18}( |$))*$")]


class TarOrder:
    """The images of some shards without end, each once in a pass.

    A pass takes the shards in a new order, and image c of all that were given out from a random
    place in a buffer, whose size is that of `shuffle_buffer`; its place is taken by the next image
    of the shards. At the end of a pass the buffer runs empty. Where it holds all images, they are
    given out by the permutation that other sources have, of the same images.

    An image in the buffer takes about 140 bytes, and 15 in a state.
    """

    def __init__(
        self, shards: Shards, shuffle_buffer: int, seed: int, state: dict[str, Any] | None = None
    ):
        """Begins a pass, or goes on from `state`. Raises DataError for one that does not fit."""
        self.shards, self.seed = shards, seed
        self.seed_of_pass = seed  # which a resumed pass keeps
        self.limit = max(1, shuffle_buffer)
        self.passes = self.count = self.place = self.offset = 0
        self.is_permuted = False
        self.buffer: list[Reference] = []  # one more than `limit`, while there are more
        self.queue: list[int] = []  # the shards of a pass, in its order
        self.ahead: Iterator[Entry] | None = None
        if state is not None:
            self._resume(state)

    def _resume(self, state: dict[str, Any]) -> None:
        if (then := state.get("shards")) != (now := self.shards.identity):
            before, after = (
                f"{s['number']} files of {s['bytes']:,} bytes (digest {s['digest']})"
                if isinstance(s, dict) and s.keys() == now.keys() and type(s["bytes"]) is int
                else "?"
                for s in (then, now)
            )
            raise DataError(
                f"data.path: {self.shards.place!r} holds other shards than when the run was saved: "
                f"{before} then, {after} now; bring them back, or start anew with another --run"
            )
        try:
            found = _State.model_validate(state)
        except ValidationError as error:
            raise DataError(
                "the place in the stream, which the checkpoint keeps, is of another version: "
                f"stream{explain(error)}"
            ) from None
        self.passes, self.count, self.seed_of_pass = found.passes, found.count, found.seed
        self.place, self.offset = found.place, found.offset
        self.is_permuted = found.is_permuted
        pairs = (text.split(":") for text in found.buffer.split())
        self.buffer = [Reference(self.passes - 1, int(s), int(start)) for s, start in pairs]
        if self.passes:
            self._order_shards()

    def state(self) -> dict[str, Any]:
        """Resume state after the images that were given out; for JSON."""
        return {
            "shards": self.shards.identity,
            "seed": self.seed_of_pass,
            "passes": self.passes,  # that were begun
            "count": self.count,  # images that were given out
            "place": self.place,  # of the shard that is read, in the order of this pass
            "offset": self.offset,  # where reading goes on in it
            "is_permuted": self.is_permuted,
            "buffer": " ".join(f"{r.shard}:{r.start}" for r in self.buffer),
        }

    def __iter__(self) -> TarOrder:
        return self

    def __next__(self) -> Reference:
        if not self.buffer:
            self._begin()
        if not self.is_permuted:
            at = _random(self.seed_of_pass, self.count) % min(len(self.buffer), self.limit)
            self.buffer[at], self.buffer[-1] = self.buffer[-1], self.buffer[at]
        reference = self.buffer.pop()
        if not self.is_permuted:
            self.buffer += (self._reference(entry) for entry in self._fill())
        self.count += 1
        return reference

    def _begin(self) -> None:
        """Begins the next pass."""
        self.passes += 1
        self.seed_of_pass = self.seed
        self._order_shards()
        self.place, self.offset = 0, 0
        entries = list(self._fill())
        if not entries:
            raise DataError(f"data.path: {self.shards.place!r} has no samples any more")
        self.is_permuted = len(entries) <= self.limit
        if self.is_permuted:
            entries.sort(key=lambda entry: (order(entry.name), entry.shard, entry.start))
            chosen = permutation(self.seed, self.passes - 1, len(entries))
            entries = [entries[i] for i in reversed(chosen)]  # taken from the end
        self.buffer = [self._reference(entry) for entry in entries]

    def _order_shards(self) -> None:
        number = len(self.shards.paths)
        self.queue = permutation(self.seed_of_pass, self.passes - 1, number).tolist()

    def _reference(self, entry: Entry) -> Reference:
        return Reference(self.passes - 1, entry.shard, entry.start)

    def _fill(self) -> Iterator[Entry]:
        """Reads the next entries of this pass, as many as the buffer has room for."""
        for _ in range(len(self.buffer), self.limit + 1):
            entry = self._read()
            if entry is None:
                return
            yield entry

    def _read(self) -> Entry | None:
        """The next entry of this pass; None at its end."""
        while self.place < len(self.queue):
            if self.ahead is None:
                self.ahead = self.shards.entries(self.queue[self.place], self.offset)
            entry = next(self.ahead, None)
            if entry is not None and entry.end is not None:
                self.offset = entry.end
                return entry
            self.place, self.offset, self.ahead = self.place + 1, 0, None
            if entry is not None:
                return entry
        return None


DRAWN_AT_ONCE = 1024


@lru_cache(maxsize=4)
def _random_block(seed: int, block: int) -> list[int]:
    counters = np.arange(block * DRAWN_AT_ONCE, (block + 1) * DRAWN_AT_ONCE)
    return randomness.bits(seed, "shuffle buffer", counters).tolist()


def _random(seed: int, counter: int) -> int:
    """64 bits for the counter-th image; many at once cost little more than one."""
    return _random_block(seed, counter // DRAWN_AT_ONCE)[counter % DRAWN_AT_ONCE]
