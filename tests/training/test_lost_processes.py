"""Two processes share a model, and one is killed, has a full disk, other settings or no data."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hdit.runs import checkpoint

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'kernels'}",
    "OMP_NUM_THREADS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
SETTINGS = (
    "training.parallel=fsdp",
    "training.images=192",
    "training.checkpoint_every=32",
    "training.start_timeout=60",
)


def arguments(toml, run, *overrides):
    sets = [part for text in (*SETTINGS, *overrides) for part in ("--set", text)]
    return [str(toml), "--run", str(run), *sets]


@pytest.fixture(scope="module")
def pairs():
    """Runs pairs of processes in a folder -> (status, standard error) of both for each scenario."""
    command = [sys.executable, str(Path(__file__).with_name("pairs.py"))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=ENVIRONMENT, text=True, **pipes) as forks:

        def run(folder, *scenarios):
            asked = json.dumps({"folder": folder, "scenarios": scenarios}, default=str)
            print(asked, file=forks.stdin, flush=True)
            return json.loads(forks.stdout.readline())

        yield run


@pytest.fixture(scope="module")
def undisturbed(trained, pairs, tmp_path_factory):
    """The folder of a sharded run; its settings lie beside it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    shutil.copy(trained.parent / "tiny.toml", folder)
    same = [arguments(folder / "tiny.toml", folder / "run", "sampling.grid=0")] * 2
    [[(first, err), (second, _)]] = pairs(folder, {"arguments": same})
    assert (first, second) == (0, 0), err
    return folder / "run"


def weights(run):
    found = checkpoint.find(run, print)
    assert found.state.images == 192
    return {name: found.tensors(name) for name in ("model", "ema", "optimizer")}


def assert_same(run, undisturbed):
    expected, found = weights(undisturbed), weights(run)
    for name, tensors in expected.items():
        assert all(torch.equal(found[name][key], t) for key, t in tensors.items()), name
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["images"] for line in lines] == list(range(16, 193, 16))


def errors(result):
    """The lines of both processes that tell of an error."""
    return [
        line
        for _, err in result
        for line in err.splitlines()
        if "error: " in line or "Traceback" in line or "traceback: " in line
    ]


@pytest.mark.parametrize("times", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_sharded_run_that_is_killed_at_any_moment_ends_with_the_same_weights(
    undisturbed, pairs, tmp_path, times
):
    run = tmp_path / "run"
    same = [arguments(undisturbed.parent / "tiny.toml", run, "sampling.grid=0")] * 2
    killed = [{"arguments": same, "kill": times + seed, "run": run} for seed in range(times)]
    results = pairs(tmp_path, *killed, {"arguments": same})
    kills = 0
    for result in results[:-1]:
        statuses = [status for status, _ in result]
        assert None not in statuses, "one did not end"
        assert len(errors(result)) <= 1, errors(result)
        kills += -9 in statuses
    assert kills >= max(1, times // 4)  # as the last ones may find the run at its end
    assert [status for status, _ in results[-1]] == [0, 0], results[-1]
    assert_same(run, undisturbed)


def test_full_disk_of_one_process_and_a_damaged_shard_lose_no_more_than_a_checkpoint(
    undisturbed, pairs, tmp_path
):
    run = tmp_path / "run"
    same = [arguments(undisturbed.parent / "tiny.toml", run, "sampling.grid=0")] * 2
    [full] = pairs(tmp_path, {"arguments": same, "fault": "full disk"})
    assert [status for status, _ in full] == [1, 1]
    [line] = errors(full)
    assert "could not be written, in process 1: " in line
    root = run / "checkpoints"
    assert checkpoint.find(run, print).state.images == 64
    assert not list(root.glob(".*"))
    shard = next((root / "000000000064").glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    [again] = pairs(tmp_path, {"arguments": same})
    assert [status for status, _ in again] == [0, 0], again
    assert f"going back to {root / '000000000032'}" in again[0][1]
    assert (root / "000000000064.damaged").is_dir()
    assert_same(run, undisturbed)


def test_what_ends_one_process_ends_both_with_one_message_of_its_rank(undisturbed, pairs, tmp_path):
    toml = undisturbed.parent / "tiny.toml"
    same = [arguments(toml, tmp_path / "run", "sampling.grid=0")] * 2
    other = arguments(toml, tmp_path / "run", "sampling.grid=0", "training.optimizer.lr=0.01")
    diverging = [arguments(toml, tmp_path / "nan", "training.guard.patience=1")] * 2
    sampling = [arguments(toml, tmp_path / "grid", "training.images=32")] * 2
    none = [arguments(toml, tmp_path / "run", "data={kind='folder', path='/none', size=8}")] * 2
    results = pairs(
        tmp_path,
        {"arguments": same, "fault": "killed"},
        {"arguments": same, "fault": "no data"},
        {"arguments": [same[0], other]},
        {"arguments": diverging, "fault": "nan"},
        {"arguments": sampling, "fault": "memory"},
        {"arguments": none},
    )
    told = [
        "error: rank 1 of 2 of this run: gone without a word",
        "rank 1: error: the stream ended",
        "error: rank 1: has another training.optimizer.lr: 0.01, where rank 0 has 0.0005",
        "error: training diverged before 16 images",
        "rank 1: error: out of memory: no memory",
        "error: data.path: '/none' does not exist",
    ]
    for result, text in zip(results, told, strict=True):
        assert None not in [status for status, _ in result], "one did not end"
        assert all(status != 0 for status, _ in result)
        [line] = errors(result)
        assert line.startswith(text)
