"""What the Triton kernels of neighborhood attention compile to, without a GPU.

    python scripts/table_triton.py --capability 90 --d-head 64 --kernel-size 7 --dtype bf16

prints a Markdown table with a row for each kernel and launch: registers of a thread, bytes that it
spills, shared memory of a program, machine instructions in all and in one round of the loop over
steps, and how many instructions its warps issue for each query (of dkv: key) of a tile away from
the borders. Each option takes several values; --default leaves out all but the plan that a problem
gets. The assembler and the disassembler are those in Triton's wheel.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
import tempfile
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hdit_kernels import triton as backend
from hdit_kernels.triton_plans import Launch, candidates, choose_plan

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(\S[^;]*?)\s*;")
# A call may be one way out of a loop: whether it comes back or not, both ways on are possible.
JUMP = re.compile(r"\b(?:BRA|CALL)(?:\.\S+)? (?:.*, )?`?\(?0x([0-9a-f]+)")
CONDITION = re.compile(r"\bBRA(?:\.\S+)? !?U?P")  # a branch that is taken where a predicate holds
LONG = 64


def compiled(
    name: str, launch: Launch, d_head: int, kernel_size: int, dtype: torch.dtype, capability: int
) -> Any:
    """A kernel as a launch on aligned tensors would compile it, for a device not at hand.

    name: forward, dq or dkv.  launch: its part of a plan.  capability: 80 for sm_80.
    """
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = backend.KERNELS[name]
    element = next(short for short, known in DTYPES.items() if known == dtype)
    strides = [f"{t}_{axis}" for t in "qkv" for axis in "bhwn"]
    known = backend.constants(name, launch, kernel_size, d_head)
    types = dict.fromkeys(known, "constexpr")
    types |= dict.fromkeys(["logsumexp", "scalars"], "*fp32")
    types |= dict.fromkeys(["scale", "sign", "logit_scale"], "fp32")
    types |= dict.fromkeys(["heads", "height", "width", "tiles", *strides], "i32")
    for arg, (rows, cols) in backend.boxes(name, launch).items():
        types[arg] = f"tensordesc<{element}[1,{rows},{cols},1,{known['PAD']}]>"
    signature = {arg: types.get(arg, f"*{element}") for arg in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (arg, kind) in enumerate(signature.items())
        if kind.startswith("*") or arg in strides
    }
    return compile(
        ASTSource(kernel, signature, known, aligned),
        target=GPUTarget("cuda", capability, 32),
        options=backend.options(launch),
    )


class Figures(NamedTuple):
    """What a compiled kernel takes of a device."""

    registers: int  # of a thread
    spilled: int  # bytes of a thread's stack
    shared: int  # bytes of a program
    instructions: int
    in_loop: int | None  # in one round of the longest loop, None where there is none


def _cuobjdump(flag: str, cubin: bytes) -> str:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, flag, str(path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _successors(listed: list[tuple[int, str]]) -> list[list[int]]:
    """Where each instruction may go on, as indices."""
    index = {at: i for i, (at, _) in enumerate(listed)}
    after = []
    for i, (_, text) in enumerate(listed):
        jump = JUMP.search(text)
        follow = [index[int(jump[1], 16)]] if jump and int(jump[1], 16) in index else []
        certain = not text.startswith(("@", "CALL")) and not CONDITION.search(text)
        ends = certain and (jump or text.startswith(("EXIT", "RET")))
        after.append(follow + ([i + 1] if not ends and i + 1 < len(listed) else []))
    return after


def _loops(after: list[list[int]]) -> list[set[int]]:
    """The natural loops of a flow graph that starts at 0: one for each target of an edge whose
    source cannot be reached but through that target."""
    before: list[list[int]] = [[] for _ in after]
    for source, targets in enumerate(after):
        for target in targets:
            before[target].append(source)

    def reached(avoiding: int) -> set[int]:
        seen, todo = {avoiding}, [0]
        while todo:
            at = todo.pop()
            if at not in seen:
                seen.add(at)
                todo += after[at]
        return seen - {avoiding}

    backward: dict[int, list[int]] = {}
    everything = reached(-1)
    for source in everything:
        for target in after[source]:
            if target <= source:
                backward.setdefault(target, []).append(source)
    loops = []
    for head, sources in backward.items():
        outside = reached(head)
        body, todo = {head}, [source for source in sources if source not in outside]
        if not todo:
            continue
        while todo:
            at = todo.pop()
            if at not in body:
                body.add(at)
                todo += before[at]
        loops.append(body)
    return loops


def instructions(disassembly: str) -> tuple[int, int | None]:
    """How many instructions cuobjdump lists, and how many of them the loop over steps holds.

    That is the largest loop which holds no other of LONG instructions or more: shorter ones wait.
    What does nothing is not counted, nor what no path reaches, which is padding.
    """
    listed = [(int(at, 16), text) for at, text in INSTRUCTION.findall(disassembly)]
    after = _successors(listed)
    counts = {i for i, (_, text) in enumerate(listed) if not text.startswith("NOP")}
    loops = [loop & counts for loop in _loops(after)]
    loops = [loop for loop in loops if len(loop) >= LONG]
    innermost = [len(loop) for loop in loops if not any(other < loop for other in loops)]
    padding = {i for i, targets in enumerate(after) if targets == [i]}
    return len(counts - padding), max(innermost, default=None)


def figures(kernel: Any) -> Figures:
    usage = _cuobjdump("-res-usage", kernel.asm["cubin"])
    count, in_loop = instructions(_cuobjdump("-sass", kernel.asm["cubin"]))
    return Figures(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spilled=int(re.search(r"STACK:(\d+)", usage)[1]),
        shared=kernel.metadata.shared,
        instructions=count,
        in_loop=in_loop,
    )


def issued(launch: Launch, kernel_size: int, found: Figures) -> float:
    """Instructions of a program's warps for each place of a tile that no border cuts."""
    rounds = math.prod(
        math.ceil((tile + kernel_size - 1) / step)
        for tile, step in zip(launch.tile, launch.step, strict=True)
    )
    if launch.one_pass:  # a loop is one over tiles
        count = found.in_loop or found.instructions
    else:
        count = found.instructions + (rounds - 1) * (found.in_loop or 0)
    return launch.warps * count / math.prod(launch.tile)


HEADER = (
    "kernel | plan | tile | step | warps | stages | registers | spilled B | shared KiB "
    "| instructions | in a step | issued a place"
)


def rows(d_head: int, kernel_size: int, dtype: torch.dtype, capability: int, default: bool) -> Any:
    """Rows of the table of one problem. A launch of several plans is in the first one's row."""
    pair = divmod(capability, 10)
    plans = candidates(d_head, kernel_size, dtype, pair)
    chosen = choose_plan(d_head, kernel_size, dtype, pair)
    for kernel in backend.KERNELS:
        seen = set()
        for name, plan in plans.items():
            launch = getattr(plan, kernel)
            taken = launch == getattr(chosen, kernel)
            if launch in seen or (default and not taken):
                continue
            seen.add(launch)
            found = figures(compiled(kernel, launch, d_head, kernel_size, dtype, capability))
            yield [
                kernel, f"**{name}**" if taken else name,
                "{}x{}".format(*launch.tile), "{}x{}".format(*launch.step),
                launch.warps, launch.stages, found.registers, found.spilled,
                f"{found.shared / 1024:.0f}", found.instructions, found.in_loop or "-",
                f"{issued(launch, kernel_size, found):.0f}",
            ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--d-head", type=int, nargs="+", default=[64])
    parser.add_argument("--kernel-size", type=int, nargs="+", default=[7])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--default", action="store_true")
    options = parser.parse_args()
    if backend.ABSENT or backend.INTERPRETED:
        parser.error(
            backend.ABSENT or "unset TRITON_INTERPRET: interpreted kernels are not compiled"
        )
    import triton

    print(f"triton {triton.__version__}; bold: the launch that a problem gets\n")
    print(f"| device | dtype | d_head | k | {HEADER} |")
    print("|" + " --- |" * (4 + len(HEADER.split("|"))))
    problems = product(options.capability, options.dtype, options.d_head, options.kernel_size)
    for capability, dtype, d_head, k in problems:
        for row in rows(d_head, k, DTYPES[dtype], capability, options.default):
            problem = [f"sm_{capability}", dtype, d_head, k]
            print("| " + " | ".join(map(str, problem + row)) + " |", flush=True)


if __name__ == "__main__":
    main()
