"""The batch script of SLURM, with stand-ins for srun and scontrol."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hdit.runs import checkpoint

REPOSITORY = Path(__file__).parents[1]

SRUN = """#!/bin/bash
# Two tasks on one node; their highest status, as srun has it. USR1 goes to each task.
[ "$1" = --kill-on-bad-exit=0 ] && shift
echo $$ >{pid}
for task in 0 1; do
    SLURM_PROCID=$task SLURM_NTASKS=2 SLURM_LOCALID=$task "$@" &
    tasks="$tasks $!"
done
trap 'kill -USR1 $tasks; asked=1' USR1
status=0
for task in $tasks; do
    wait $task; one=$?
    [ -n "$asked" ] && [ $one -gt 128 ] && { wait $task; one=$?; }
    [ $one -gt $status ] && status=$one
done
exit $status
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >>{requeued}; fi
"""


def write(path, text):
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def cluster(tmp_path):
    """The environment of a job; `requeued` has what scontrol was asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    write(folder / "srun", SRUN.replace("{pid}", str(tmp_path / "pid")))
    write(folder / "scontrol", SCONTROL.format(requeued=tmp_path / "requeued"))
    write(folder / "hdit", f'#!/bin/bash\nexec {sys.executable} -m hdit.cli "$@"\n')
    return os.environ | {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'kernels'}",
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_NODELIST": "node",
        "SLURM_JOB_ID": str(7000 + os.getpid() % 10_000),
    }


@pytest.mark.parametrize("in_time", [True, False])
def test_job_whose_time_is_nearly_up_saves_and_queues_again(cluster, trained, tmp_path, in_time):
    images = 32 if in_time else 10**7
    options = [f"training.images={images}", "training.checkpoint_every=10_000_000"]
    command = ["bash", REPOSITORY / "scripts" / "slurm.sbatch", trained.parent / "tiny.toml"]
    command += ["--run", tmp_path / "run"]
    for option in [*options, "sampling.grid=0"]:
        command += ["--set", option]
    job = subprocess.Popen(command, env=cluster, stderr=subprocess.PIPE, text=True)
    if not in_time:
        end = time.monotonic() + 120
        while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < end:
            time.sleep(0.1)
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGUSR1)
    _, err = job.communicate(timeout=200)
    assert job.returncode == (0 if in_time else 138), err
    found = checkpoint.find(tmp_path / "run", print).state.images
    assert (found == images) == in_time
    assert found > 0
    requeued = tmp_path / "requeued"
    asked = requeued.read_text() if requeued.exists() else ""
    assert asked == ("" if in_time else f"requeue {cluster['SLURM_JOB_ID']}\n")
