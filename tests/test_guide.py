"""The commands of docs/guide.md in turn, on stand-ins and for a moment each.

The comparison of backbones is only listed: tests/test_matrix.py runs one.
"""

import gzip
import os
import re
import runpy
import shlex
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hdit import cli

REPOSITORY = Path(__file__).parents[1]
GUIDE = REPOSITORY / "docs" / "guide.md"
FEW = {  # what makes a command of the guide one for a test
    r"--minutes [\d.]+": "--minutes 0.001",
    r"(hdit train.*)": r"\1 --set sampling.grid=0",
    r"unpack_fashion\.py \S+": "unpack_fashion.py idx",
    r"(train_classifier\.py.*)": r"\1 --epochs 1",
    r"-n \d+": "-n 2 --steps 2",
    r"(sample_ffhq1024\.py --random.*)": r"\1 --steps 2 --size 128",
    r"(ablate_backbones\.py.*)": r"\1 --list",
    r"(scaling_cost\.py.*)": r"\1 --to 128 --dit-to 64",
}
SMALL = {  # and its configs
    "photos1024-hdit.toml": {"size = 1024": "size = 256"},
    "fashion-dit-latent.toml": {"depth = 8": "depth = 1"},
    "fashion-hdit.toml": {"depth = 6": "depth = 1"},
}


def commands(text: str) -> list[list[str]]:
    """Of all shell blocks; a backslash goes on in the next line."""
    blocks = "".join(re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    lines = blocks.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def write_idx(path: Path, array: np.ndarray) -> None:
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(head + array.tobytes()))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the configs, scripts and stand-ins, to be in."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(REPOSITORY / "configs", "configs")
    Path("scripts").symlink_to(REPOSITORY / "scripts")
    for name, changes in SMALL.items():
        text = Path("configs", name).read_text()
        for old, new in changes.items():
            assert old in text, f"{name}: {old}"
            text = text.replace(old, new)
        Path("configs", name).write_text(text)
    random = np.random.default_rng(0)
    Path("idx").mkdir()
    for stem, n in (("train", 100), ("t10k", 40)):
        write_idx(
            Path(f"idx/{stem}-images-idx3-ubyte.gz"), random.integers(0, 256, (n, 28, 28), np.uint8)
        )
        write_idx(Path(f"idx/{stem}-labels-idx1-ubyte.gz"), np.arange(n, dtype=np.uint8) % 10)
    Path("photographs").mkdir()
    for i in range(2):
        Image.fromarray(random.integers(0, 256, (300, 400, 3), np.uint8)).save(
            f"photographs/{i}.jpg"
        )
    monkeypatch.setenv("PYTHONPATH", f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'kernels'}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def run(program: str, arguments: list[str]) -> int | str | None:
    """The exit status, 0 or None where all is well."""
    with pytest.MonkeyPatch.context() as patch:
        try:
            if program == "hdit":
                patch.setattr(sys, "argv", [program, *arguments])
                cli.main()
            else:
                patch.setattr(sys, "argv", arguments)
                runpy.run_path(str(REPOSITORY / arguments[0]), run_name="__main__")
        except SystemExit as end:
            return end.code
    return None


def test_every_command_of_the_guide_does_what_it_says(place, capfd):
    verbs = set()
    for words in commands(GUIDE.read_text()):
        line = shlex.join(words)
        for pattern, new in FEW.items():
            line = re.sub(pattern, new, line)
        program, *arguments = shlex.split(line)
        if program in ("git", "."):  # the download, and the environment
            continue
        assert program in ("hdit", "python"), line
        assert not run(program, arguments), (line, capfd.readouterr())
        verbs.add(Path(arguments[0]).stem)
    assert verbs >= {
        "train", "encode", "sample", "evaluate",
        "train_vae", "train_classifier", "sample_ffhq1024", "ablate_backbones", "scaling_cost",
    }  # fmt: skip
    assert Path("runs/fashion-hdit/metrics.jsonl").exists()
    assert len(list(Path("pictures").glob("*.png"))) == 2
