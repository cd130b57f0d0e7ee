"""Several processes that write one set of samples, of which one is killed."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

REPOSITORY = Path(__file__).parents[2]


def images(folder):
    return np.stack([np.asarray(Image.open(p)) for p in sorted(folder.glob("0*.png"))]).astype(int)


def started(rank, port, arguments, place):
    environment = os.environ | {
        "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'kernels'}",
        "OMP_NUM_THREADS": "1",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    command = [sys.executable, "-m", "hdit.cli", "sample", *map(str, arguments)]
    return subprocess.Popen(
        command,
        env=environment,
        cwd=place,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_killed_process_ends_all_and_fewer_go_on_to_the_same_images(trained, hdit, tmp_path):
    """The other says so and ends by itself; then one process makes what is missing."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    asked = [trained, "-n", 32, "--steps", 24]
    arguments = [*asked, "--batch-size", 1, "--out", "out"]
    first, second = (started(rank, port, arguments, tmp_path) for rank in (0, 1))
    try:
        out, limit = tmp_path / "out", time.monotonic() + 100
        while len(list(out.glob("0*.png"))) < 3:
            assert time.monotonic() < limit
            assert first.poll() is None, first.communicate()
            time.sleep(0.02)
        second.send_signal(signal.SIGKILL)
        _, said = first.communicate(timeout=60)
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()
    assert first.returncode == 1
    assert said.startswith("error: rank 1 of 2 of this run: gone without a word"), said
    assert len(said.splitlines()) == 1
    there = {path.name for path in out.glob("0*.png")}
    assert 3 <= len(there) < 32
    status, told, err = hdit("sample", *asked, "--batch-size", 16, "--out", out)
    assert status == 0, err
    assert f"({32 - len(there)} of them now) of 24 network evaluations" in told
    assert hdit("sample", *asked, "--out", tmp_path / "one")[0] == 0
    assert np.abs(images(out) - images(tmp_path / "one")).max() <= 1, "a grey level is rounding"
