import resource
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from hdit import cli, config
from hdit.runs import checkpoint
from hdit.training.trainer import Trainer

TINY = """
[data]
kind = "digits"

[model]
kind = "hdit"
patch_size = 1
mapping = { depth = 1, width = 32 }

[[model.levels]]
depth = 1
width = 32
dropout = 0.1
attention = { kind = "neighborhood", kernel_size = 3, d_head = 16 }

[[model.levels]]
depth = 1
width = 32
attention = { kind = "global", d_head = 16 }

[training]
images = 96
checkpoint_every = 32
batch_size = 16
log_every = 16
precision = "fp32"

[sampling]
steps = 2
grid = 4
"""


LONG = ("test_docs", "test_compiling", "test_doctor", "test_trainer", "test_matrix", "test_native")
"""Modules whose tests take longest. A process runs a module alone, and one that began last would
keep all others waiting."""


def pytest_collection_modifyitems(items):
    """Long modules come first. And warnings are no errors where a GPU is: torch's compilers warn
    there of what nobody can mend, such as that a card could multiply in TF32."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """On tensors as small as these, threads cost far more than they bring."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def features_cache(tmp_path_factory):
    """Features that tests keep do not lie among the user's."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("features")
        patch.setattr("hdit.evaluation.cache.default_folder", lambda: folder)
        yield folder


@pytest.fixture
def tiny(tmp_path):
    """A config file that trains in a second: 6 steps, 3 checkpoints."""
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a run of TINY, to read alone: a test that changes it takes a copy."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.toml").write_text(TINY)
    assert Trainer(config.load(folder / "tiny.toml"), folder / "run").fit()
    return folder / "run"


@pytest.fixture
def ruined(trained, tmp_path):
    """The folder of a run whose weights are finite, and whose samples are not."""
    found = checkpoint.find(trained, print)
    tensors = {name: found.tensors(name) for name in ("model", "ema", "optimizer")}
    for name in ("model", "ema"):
        tensors[name] = {key: 1e20 * t for key, t in tensors[name].items()}
    checkpoint.save(tmp_path / "ruined" / "checkpoints", found.config, found.state, tensors)
    return tmp_path / "ruined"


@pytest.fixture(autouse=True)
def forgotten_modules(tmp_path_factory):
    """Forgets modules that a test made, and where they lay: another one's may have their names."""
    known, made, path = set(sys.modules), tmp_path_factory.getbasetemp(), sys.path.copy()
    yield
    sys.path[:] = path
    for name in set(sys.modules) - known:
        file = getattr(sys.modules[name], "__file__", None)
        if file and Path(file).is_relative_to(made):
            del sys.modules[name]


@pytest.fixture
def hdit(monkeypatch, capfd):
    """Runs the command line in this process -> (exit status, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["hdit", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        out, err = capfd.readouterr()
        return exit_.value.code or 0, out, err

    return run


@pytest.fixture
def full_disk():
    """While full_disk(size) runs, a file may have no more bytes: as on a disk that fills there."""

    @contextmanager
    def limited(size=1000):
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)

    return limited
