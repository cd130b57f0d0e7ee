"""Runs `hdit train` in two processes that begin as forks, so that a pair takes a second or two.

Each line of the standard input is a JSON object: `folder`, and `scenarios`, a list of objects with
`arguments` (a list for each process), and what goes wrong: `fault`, one of FAULTS in the second
process, or `kill`, the seed of which process is killed when. A line of the output has a list for
each scenario: status and standard error of each process.
"""

import json
import math
import os
import random
import resource
import signal
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

# numpy.random and torch._dynamo a run imports: here they are not in each of the forks.
import numpy.random  # noqa: F401
import torch
import torch._dynamo

from hdit.cli.app import main
from hdit.data.batches import Batches
from hdit.data.source import DataError
from hdit.training import grid
from hdit.training import trainer as training

LIMIT = 200  # seconds for a pair


def at(images, does):
    """Has the trainer do something before the step that begins at so many images."""
    step = training.Trainer._step

    def changed(self, stream):
        if self.images == images:
            does(self)
        return step(self, stream)

    training.Trainer._step = changed


def fill_disk(trainer):
    trainer.saver.finish()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))


def end_data():
    def draw(self):
        if self.images == 64:
            raise DataError("the stream ended")
        return original(self)

    original = Batches.__next__
    Batches.__next__ = draw


def diverge():
    objective = training.Trainer._step

    def poisoned(self, stream):
        original = self.objective
        self.objective = lambda batch: original(batch) * math.nan
        norm = objective(self, stream)
        self.objective = original
        return norm

    training.Trainer._step = poisoned


def lack_memory():
    """Within the sharded network, where the other process waits for this one."""
    call = grid.InStep.forward

    def failing(self, x, c_noise, cond):
        def fail(module, inputs):
            raise torch.OutOfMemoryError("no memory")

        list(self.network.blocks)[1].register_forward_pre_hook(fail)
        return call(self, x, c_noise, cond)

    grid.InStep.forward, grid.SOON = failing, timedelta(seconds=2)


FAULTS = {
    "": lambda: None,
    "full disk": lambda: at(64, fill_disk),
    "no data": end_data,
    "killed": lambda: at(48, lambda trainer: os.kill(os.getpid(), signal.SIGKILL)),
    "nan": diverge,
    "memory": lack_memory,
}


def run(rank, port, arguments, fault, err):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(2, 1)  # the answers' line
    sys.argv = ["hdit", "train", *arguments]
    status = 0
    try:
        if rank == 1:
            FAULTS[fault]()
        main()
    except SystemExit as end:
        status = end.code or 0
    except BaseException as error:
        print(f"traceback: {error!r}", file=sys.stderr)
        status = 1
    sys.stderr.flush()
    os._exit(status)


def kill(chance, pids, folder):
    """One of the two processes, or both, within a save or up to a tenth of a second after one."""
    checkpoints = folder / "checkpoints"
    before = set(checkpoints.glob("0*"))
    end = time.monotonic() + LIMIT
    within = chance.random() < 0.5
    while time.monotonic() < end and all(os.waitid(os.P_PID, p, PEEK) is None for p in pids):
        if set(checkpoints.glob(".*.part")) if within else set(checkpoints.glob("0*")) - before:
            break
        time.sleep(0.001)
    time.sleep(chance.random() * (0.03 if within else 0.1))
    for pid in chance.choice([pids, pids[:1], pids[1:]]):
        os.kill(pid, signal.SIGKILL)


PEEK = os.WEXITED | os.WNOHANG | os.WNOWAIT


def pair(scenario, folder):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    pids, errs = [], [folder / f"err{rank}" for rank in range(2)]
    for rank, arguments in enumerate(scenario["arguments"]):
        pid = os.fork()
        if pid == 0:
            run(rank, port, arguments, scenario.get("fault", ""), errs[rank])
        pids.append(pid)
    if "kill" in scenario:
        kill(random.Random(scenario["kill"]), pids, Path(scenario["run"]))
    statuses, end = {}, time.monotonic() + LIMIT
    while len(statuses) < 2 and time.monotonic() < end:
        for pid in set(pids) - statuses.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                statuses[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    for pid in set(pids) - statuses.keys():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return [[statuses.get(pid), err.read_text()] for pid, err in zip(pids, errs, strict=True)]


if __name__ == "__main__":
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    torch.set_num_threads(1)
    for line in sys.stdin:
        asked = json.loads(line)
        found = [pair(one, Path(asked["folder"])) for one in asked["scenarios"]]
        print(json.dumps(found), flush=True)
