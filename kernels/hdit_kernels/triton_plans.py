"""How the Triton kernels are cut into programs: the plans, and which one a problem gets."""

from __future__ import annotations

from typing import NamedTuple

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL_KERNEL = 9  # up to here the halo of eight queries in a row is at most 16 keys wide
HALO = (16, 16)


class Launch(NamedTuple):
    """How one kernel is cut into programs. Each rectangle's area is a power of two, at least 16."""

    tile: tuple[int, int]  # rows and columns of the grid that a program owns
    step: tuple[int, int]  # rows and columns that it meets at a time
    warps: int
    stages: int  # of the pipeline of loads
    product: bool = False  # whether windows are a matrix product instead of comparisons
    one_pass: bool = False  # whether a step holds all that a tile meets, so that there is no loop
    tma: bool = False  # whether tensor descriptors address memory: from compute capability 9.0 on
    persistent: int = 0  # programs a multiprocessor, each for many tiles; 0: a program has one


class Plan(NamedTuple):
    """How each of the three kernels is cut: forward, gradient of q, gradients of k and v."""

    forward: Launch
    dq: Launch
    dkv: Launch

    def with_tma(self) -> Plan:
        """The plan with every kernel addressing memory by tensor descriptors."""
        return Plan(*(launch._replace(tma=True) for launch in self))

    def persisting(self, programs: int) -> Plan:
        """The plan with a forward of so many programs a multiprocessor."""
        return self._replace(forward=self.forward._replace(persistent=programs))


def _same(launch: Launch) -> Plan:
    return Plan(launch, launch, launch)


# By padded d_head, whether the kernel is small, and bytes of an element. Not yet timed on a GPU:
# chosen by what scripts/table_triton.py prints, so that no kernel spills more than a few registers
# on sm_80 or sm_90, and that a program fits into the 99 KiB of shared memory that every device
# since sm_80 has.
STEPPED = {
    (32, True, 2): _same(Launch((8, 8), (4, 16), warps=4, stages=3)),
    (64, True, 2): Plan(
        forward=Launch((8, 8), (4, 16), warps=4, stages=3),
        dq=Launch((8, 8), (4, 16), warps=4, stages=2),
        dkv=Launch((8, 8), (4, 16), warps=4, stages=2),
    ),
    (128, True, 2): Plan(
        forward=Launch((8, 8), (4, 16), warps=4, stages=2),
        dq=Launch((8, 8), (2, 16), warps=4, stages=2),
        dkv=Launch((8, 8), (2, 16), warps=4, stages=2),
    ),
    (32, False, 2): _same(Launch((8, 16), (4, 16), warps=8, stages=3)),
    (64, False, 2): Plan(
        forward=Launch((8, 16), (4, 16), warps=8, stages=3),
        dq=Launch((8, 16), (4, 16), warps=8, stages=2),
        dkv=Launch((8, 16), (4, 16), warps=8, stages=2),
    ),
    (128, False, 2): Plan(
        forward=Launch((8, 16), (4, 16), warps=8, stages=2),
        dq=Launch((8, 16), (2, 16), warps=8, stages=2),
        dkv=Launch((8, 8), (2, 16), warps=4, stages=2),
    ),
    (32, True, 4): _same(Launch((8, 8), (2, 16), warps=8, stages=2)),
    (64, True, 4): Plan(
        forward=Launch((8, 8), (2, 16), warps=8, stages=2),
        dq=Launch((8, 8), (2, 16), warps=8, stages=2),
        dkv=Launch((4, 8), (2, 16), warps=8, stages=2),
    ),
    (128, True, 4): _same(Launch((4, 8), (2, 16), warps=8, stages=2)),
    (32, False, 4): _same(Launch((8, 8), (2, 16), warps=8, stages=2)),
    (64, False, 4): Plan(
        forward=Launch((8, 8), (2, 16), warps=8, stages=2),
        dq=Launch((8, 8), (2, 16), warps=8, stages=2),
        dkv=Launch((4, 8), (2, 16), warps=8, stages=2),
    ),
    (128, False, 4): _same(Launch((4, 8), (2, 16), warps=8, stages=2)),
}

# A mask of 8 rows and 8 columns is one product of 16 terms. Two bytes an element alone: float32
# is not multiplied on the tensor cores, and two layouts of one sum would cost more than they save.
PRODUCT = {
    (32, True): _same(Launch((8, 8), (8, 8), warps=4, stages=3, product=True)),
    (64, True): Plan(
        forward=Launch((8, 8), (8, 8), warps=4, stages=3, product=True),
        dq=Launch((8, 8), (8, 8), warps=4, stages=2, product=True),
        dkv=Launch((8, 8), (8, 8), warps=4, stages=2, product=True),
    ),
    (128, True): Plan(
        forward=Launch((8, 8), (8, 8), warps=4, stages=2, product=True),
        dq=Launch((8, 8), (4, 8), warps=4, stages=2, product=True),
        dkv=Launch((8, 8), (4, 8), warps=4, stages=2, product=True),
    ),
    (32, False): _same(Launch((8, 16), (8, 8), warps=8, stages=3, product=True)),
    (64, False): Plan(
        forward=Launch((8, 16), (8, 8), warps=8, stages=3, product=True),
        dq=Launch((8, 16), (8, 8), warps=8, stages=2, product=True),
        dkv=Launch((8, 16), (8, 8), warps=8, stages=2, product=True),
    ),
    (128, False): Plan(
        forward=Launch((8, 16), (8, 8), warps=8, stages=2, product=True),
        dq=Launch((8, 16), (4, 8), warps=8, stages=2, product=True),
        dkv=Launch((8, 8), (4, 8), warps=4, stages=2, product=True),
    ),
}

# The whole halo of 8 x 8 queries at once; the gradients keep a loop, as two sums over 256 keys
# take more registers than there are, and up to 17 rows of queries see a tile of keys at a border.
ONE_PASS = {
    32: Launch((8, 8), HALO, warps=4, stages=1, one_pass=True),
    64: Launch((8, 8), HALO, warps=4, stages=1, one_pass=True),
    128: Launch((8, 8), HALO, warps=8, stages=1, one_pass=True),
}

BIG_SHARED = (9, 10)  # major compute capabilities whose programs may have 227 KiB

# The names of the plans that (9, 0) gets where they are not "stepped": those with the fewest
# instructions a tile of which no kernel spills. Descriptors and persistent programs are left out
# until they have run on a GPU.
HOPPER = {
    (32, True, 2): "one pass, product",
    (64, True, 2): "one pass, product",
}


def padded(d_head: int) -> int:
    """The power of two, at least 32, to which the kernels pad d_head."""
    return max(32, 1 << (d_head - 1).bit_length())


def candidates(
    d_head: int, kernel_size: int, dtype: torch.dtype, capability: tuple[int, int] | None
) -> dict[str, Plan]:
    """All plans of a problem by name, to time or to test; None is Triton's interpreter.

    Names have "tma" where tensors must be describable() (see hdit_kernels.triton).
    """
    pad, small = padded(d_head), kernel_size <= SMALL_KERNEL
    hopper = capability is None or capability >= (9, 0)
    stepped = STEPPED[pad, small, dtype.itemsize]
    plans = {"stepped": stepped}
    if dtype.itemsize == 2:
        product = PRODUCT[pad, small]
        # Before 9.0 the second operand of a product is in registers, too many for the gradients.
        plans["product"] = product if hopper else stepped._replace(forward=product.forward)
        if small and (capability is None or capability[0] in BIG_SHARED):
            # Up to a kernel of 5, steps of 4 rows cover a halo sooner than steps of 8.
            backward = stepped if kernel_size <= 5 else product
            whole = ONE_PASS[pad]
            plans["one pass"] = backward._replace(forward=whole)
            plans["one pass, product"] = backward._replace(forward=whole._replace(product=True))
    if hopper:
        plans |= {f"{name}, tma": plan.with_tma() for name, plan in plans.items()}
    plans |= {f"{name}, persistent": plan.persisting(2) for name, plan in plans.items()}
    return plans


def choose_plan(
    d_head: int, kernel_size: int, dtype: torch.dtype, capability: tuple[int, int] | None = None
) -> Plan:
    """The plan of a problem: never a timing, so a rerun chooses alike."""
    plans = candidates(d_head, kernel_size, dtype, capability)
    name = "stepped"
    if capability == (9, 0):
        name = HOPPER.get((padded(d_head), kernel_size <= SMALL_KERNEL, dtype.itemsize), name)
    return plans[name]
