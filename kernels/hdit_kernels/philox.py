"""Noise of counter-based streams: the same bits on every device.

A stream is that of a 64-bit key: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011) turns a counter of 128 bits into a block of four 32-bit words. The lower half of
the counter is the number of the block in a tensor, the upper half the number of the tensor: the
draw. So an element is a function of its key, its draw and its place in the tensor alone.

Two words make two normal numbers, by Box and Muller's transform in float32:

    u = (w0 + 1/2) / 2^32 in (0, 1],  angle = 2 pi w1 / 2^32 of the signed w1 in [-pi, pi],
    sqrt(-2 ln u) cos(angle),  sqrt(-2 ln u) sin(angle)

The largest is sqrt(66 ln 2) = 6.76. `u` and w1 are rounded to the same float32 everywhere; from
there on logarithm, sine and cosine are each device's own, to float tolerance.

The streams are computed in C++ on a CPU, in Triton on CUDA, and by torch's integer operators on
other devices and where compiler or Triton is missing.
"""

from __future__ import annotations

import logging
import math
from functools import cache
from typing import Any, no_type_check

import torch
from torch import Tensor

from hdit_kernels import native

try:
    import triton
    import triton.language as tl
except ImportError as error:
    ABSENT = f"triton cannot be imported ({error})"

    def jit(function: Any) -> Any:
        return function
else:
    ABSENT = ""
    jit = triton.jit(do_not_specialize=["draw", "first_block"])

log = logging.getLogger(__name__)

WORD = 2**32 - 1
FACTORS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
TURN = 2 * math.pi / 2**32
BLOCKS = 256  # that a program of the Triton kernel makes
OLDEST = (8, 0)  # compute capability that the Triton kernel is compiled for in the tests


def words(keys: Tensor, count: int, draw: int = 0) -> Tensor:
    """Random words: keys (n,) int64 -> (n, count) int64 in [0, 2^32), of the draw-th tensor.

    Raises ValueError if the keys are not a vector of int64, or count or draw is negative.
    """
    _check_streams(keys, count, draw)
    return _words(keys, count, draw)


def normal(keys: Tensor, count: int, draw: int = 0) -> Tensor:
    """Standard normal noise: keys (n,) int64 -> (n, count) float32, of the draw-th tensor.

    Raises ValueError if the keys are not a vector of int64, or count or draw is negative.
    """
    _check_streams(keys, count, draw)
    return _normal(keys, count, draw)


def _check_streams(keys: Tensor, count: int, draw: int) -> None:
    if keys.ndim != 1 or keys.dtype != torch.int64:
        raise ValueError(
            f"the keys of streams are (n,) int64, got {tuple(keys.shape)} {keys.dtype}; "
            "hdit.randomness.keys makes them"
        )
    if count < 0 or not 0 <= draw < 2**63:
        raise ValueError(f"count must be at least 0 and draw in 0..2^63 - 1, got {count}, {draw}")


@torch.library.custom_op("hdit_kernels::philox_words", mutates_args=())
def _words(keys: Tensor, count: int, draw: int) -> Tensor:
    return _implementation(keys)(keys, count, draw, False)


@torch.library.custom_op("hdit_kernels::philox_normal", mutates_args=())
def _normal(keys: Tensor, count: int, draw: int) -> Tensor:
    return _implementation(keys)(keys, count, draw, True)


@_words.register_fake
def _(keys: Tensor, count: int, draw: int) -> Tensor:
    return keys.new_empty(keys.shape[0], count)


@_normal.register_fake
def _(keys: Tensor, count: int, draw: int) -> Tensor:
    return keys.new_empty(keys.shape[0], count, dtype=torch.float32)


def _implementation(keys: Tensor) -> Any:
    """The fastest of in_cpp, in_triton and in_torch that computes where the keys are."""
    if keys.device.type == "cpu" and native.unavailable() is None:
        return in_cpp
    if keys.device.type == "cuda" and triton_unavailable(keys.device.index) is None:
        return in_triton
    return in_torch


# ---- three implementations -----------------------------------------------------------------------
# Each computes `words` (transform False) or `normal` (True), from block `first` on. Halves of the
# counter, `draw` and `first`, are 64 bits as an int64.


def in_cpp(keys: Tensor, count: int, draw: int, transform: bool, first: int = 0) -> Tensor:
    """Computes in the compiled library, on a CPU."""
    out = keys.new_empty(len(keys), count, dtype=torch.float32 if transform else torch.int32)
    if out.numel():
        name = "philox_normal" if transform else "philox_words"
        native.run(name, len(keys), count, draw, first, keys.contiguous(), out)
    return out if transform else out.long() & WORD


@jit
@no_type_check
def box_muller(first, second, TURN: tl.constexpr):
    u = first.to(tl.float32) * 2.0**-32 + 2.0**-33
    radius = tl.sqrt_rn(-2.0 * tl.log(u))
    angle = second.to(tl.int32, bitcast=True).to(tl.float32) * TURN
    return radius * tl.cos(angle), radius * tl.sin(angle)


@jit
@no_type_check
def noise_kernel(
    keys, out, count, draw: tl.int64, first_block: tl.int64,
    NORMAL: tl.constexpr, TURN: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """A program makes BLOCKS blocks of one stream: out (n, count) float32, or words as int32."""
    pieces = tl.cdiv(count, 4 * BLOCKS)
    stream = (tl.program_id(0) // pieces).to(tl.int64)
    first = (tl.program_id(0) % pieces).to(tl.int64) * BLOCKS
    block = first_block + first + tl.arange(0, BLOCKS)
    # Not a scalar, whose lower word Triton's interpreter takes wrongly where it is 2^31 or more.
    draws = tl.zeros([BLOCKS], tl.int64) + draw
    a, b, c, d = tl.philox(
        tl.load(keys + stream),
        block.to(tl.uint32), (block >> 32).to(tl.uint32),
        draws.to(tl.uint32), (draws >> 32).to(tl.uint32),
    )  # fmt: skip
    if NORMAL:
        a, b = box_muller(a, b, TURN)
        c, d = box_muller(c, d, TURN)
    else:
        a, b = a.to(tl.int32, bitcast=True), b.to(tl.int32, bitcast=True)
        c, d = c.to(tl.int32, bitcast=True), d.to(tl.int32, bitcast=True)
    together = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    place = 4 * first + tl.arange(0, 4 * BLOCKS)
    tl.store(out + stream * count + place, together, mask=place < count)


def in_triton(keys: Tensor, count: int, draw: int, transform: bool, first: int = 0) -> Tensor:
    """Computes in the Triton kernel, on CUDA, or on a CPU in Triton's interpreter."""
    out = keys.new_empty(len(keys), count, dtype=torch.float32 if transform else torch.int32)
    if out.numel():
        programs = len(keys) * -(-count // (4 * BLOCKS))
        with torch.cuda.device_of(keys):
            noise_kernel[(programs,)](
                keys.contiguous(), out, count, draw, first,
                NORMAL=transform, TURN=TURN, BLOCKS=BLOCKS,
            )  # fmt: skip
    return out if transform else out.long() & WORD


@cache
def triton_unavailable(index: int) -> str | None:
    """Why the Triton kernel cannot run on a CUDA device, or None; found out by running it."""
    if ABSENT:
        return ABSENT
    if torch.version.hip:
        return "the kernel is tested for CUDA, and this torch is built for ROCm"
    if torch.cuda.get_device_capability(index) < OLDEST:
        return "the device is older than compute capability {}.{}".format(*OLDEST)
    try:
        in_triton(torch.zeros(1, dtype=torch.int64, device=f"cuda:{index}"), 16, 0, True)
    except Exception as error:  # without a C compiler or Python's headers, Triton starts nothing
        log.warning("Triton cannot run here, torch makes the noise, more slowly: %s", error)
        return f"Triton cannot run here: {error}"
    return None


def in_torch(keys: Tensor, count: int, draw: int, transform: bool, first: int = 0) -> Tensor:
    """Computes with torch's operators on int64, on any device."""
    blocks = torch.arange(-(-count // 4), device=keys.device) + first
    a, b, c, d = philox(keys[:, None], blocks, draw)
    if transform:
        (a, b), (c, d) = _box_muller(a, b), _box_muller(c, d)
    return torch.stack([a, b, c, d], -1).flatten(1)[:, :count].contiguous()


def philox(key: Tensor, block: Tensor, draw: int) -> list[Tensor]:
    """The four words of a block of each key: int64 tensors in [0, 2^32) of the common shape.

    `key` and `block` are int64 and broadcast.
    """
    k0, k1 = key & WORD, key >> 32 & WORD
    block = block.expand(torch.broadcast_shapes(key.shape, block.shape))
    c0, c1 = block, block >> 32
    c2, c3 = (torch.full_like(block, word) for word in (draw & WORD, draw >> 32))
    for _ in range(10):
        # The product of two words may wrap to a negative int64; its 64 bits are right. What stands
        # above the lower 32 bits of c0 to c3 is never read.
        p0, p1 = (c0 & WORD).mul_(FACTORS[0]), (c2 & WORD).mul_(FACTORS[1])
        c0, c1 = (p1 >> 32).bitwise_xor_(c1).bitwise_xor_(k0), p1
        c2, c3 = (p0 >> 32).bitwise_xor_(c3).bitwise_xor_(k1), p0
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return [c & WORD for c in (c0, c1, c2, c3)]


def _box_muller(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    u = first.float() * 2.0**-32 + 2.0**-33
    radius = (-2 * u.log()).sqrt()
    angle = (second - (second >> 31 << 32)).float() * TURN
    return radius * angle.cos(), radius * angle.sin()
