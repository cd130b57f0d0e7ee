import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from hdit.device import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(20):
    torch.ones(16 << 20)  # 64 MiB; the heap finds its size
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode):
    return int(
        subprocess.run(
            [sys.executable, "-c", PROGRAM, mode], check=True, capture_output=True, text=True
        ).stdout
    )


@pytest.mark.skipif(sys.platform != "linux", reason="the C library is glibc on Linux alone")
def test_freed_memory_is_used_again_without_a_fault_for_each_page():
    assert page_faults("keep") < page_faults("default") / 10


PEAK = """
import torch
from hdit.device import forget_peak_memory, memory_in_use, peak_memory
cpu, large = torch.device("cpu"), 64 << 20
known = forget_peak_memory(cpu)
before = memory_in_use(cpu)
torch.ones(large // 4)
seen = peak_memory(cpu) - before
forget_peak_memory(cpu)
print(int(known), seen / large, (peak_memory(cpu) - memory_in_use(cpu)) / large)
"""


def test_peak_memory_is_seen_and_forgotten():
    done = subprocess.run([sys.executable, "-c", PEAK], check=True, capture_output=True, text=True)
    known, seen, kept = map(float, done.stdout.split())
    assert seen > 0.9
    if not known:
        pytest.skip("this system cannot forget the peak of a process")
    assert seen < 1.5
    assert abs(kept) < 0.5
