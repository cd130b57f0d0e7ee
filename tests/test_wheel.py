"""The wheel alone, in an empty folder: nothing of the clone is needed to train a preset."""

import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

REPOSITORY = Path(__file__).parents[1]
ELSEWHERE = """
import sys
from pathlib import Path
# the clone may be on the path by an editable installation
installed = sys.argv.pop(1)
parts = ("hdit/__init__.py", "hdit_kernels/__init__.py")
sys.path[:] = [installed] + [
    p for p in sys.path if not any(Path(p, part).is_file() for part in parts)
]
import hdit, hdit_kernels
from hdit.cli import main
for module in (hdit, hdit_kernels):
    assert Path(module.__file__).is_relative_to(installed), module.__file__
main()
"""


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True, cwd=REPOSITORY)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, ".")
    [path] = folder.glob("hdit-*.whl")
    return path


def test_wheel_carries_every_config(wheel):
    held = {name for name in ZipFile(wheel).namelist() if name.startswith("hdit/presets/")}
    configs = REPOSITORY / "configs"
    assert held == {
        f"hdit/presets/{path.relative_to(configs).as_posix()}" for path in configs.rglob("*.toml")
    }


def test_wheel_carries_the_page_of_watch(wheel):
    page = "hdit/report/watch"
    held = {name for name in ZipFile(wheel).namelist() if name.startswith(f"{page}/")}
    files = [path for path in (REPOSITORY / page).iterdir() if path.is_file()]
    assert held == {f"{page}/{path.name}" for path in files}
    assert f"{page}/page.html" in held


def test_wheel_alone_trains_a_preset_from_an_empty_folder(wheel, tmp_path):
    target, empty = tmp_path / "target", tmp_path / "empty"
    pip("install", "--no-deps", "--no-index", "--no-compile", "--target", target, wheel)
    empty.mkdir()
    few = ["training.images=8", "training.batch_size=4", "sampling.grid=0"]
    options = [text for pair in few for text in ("--set", pair)]
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, target, "train", "digits-dit-variance", *options],
        cwd=empty,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in empty.iterdir()] == ["runs"]
    run = empty / "runs" / "digits-dit-variance"
    assert (run / "checkpoints" / "000000000008" / "ema.safetensors").is_file()
