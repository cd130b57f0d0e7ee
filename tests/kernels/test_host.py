import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from hdit_kernels.host import keep_freed_memory
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
