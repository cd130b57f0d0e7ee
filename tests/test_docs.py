"""The README and the pages of docs/: every command runs on stand-ins, for a moment each.

A command that is not run is listed in NOT_RUN with its reason; one that is neither fails a test.
"""

import gzip
import io
import os
import re
import runpy
import shlex
import shutil
import struct
import sys
import tomllib
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import tiny_vae
import torch
from PIL import Image
from safetensors.torch import load_file

import document_config
from hdit import cli
from hdit.config.schema import load

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
PAGES = {
    path.relative_to(REPOSITORY).as_posix(): path
    for path in (
        REPOSITORY / "README.md",
        REPOSITORY / "CONTRIBUTING.md",
        *sorted(DOCS.glob("*.md")),
    )
}

NOT_RUN = {
    "make demo": "takes minutes, and installs",
    "hdit sample runs/digits-hdit --weights ema-0.999": "a run that has it, as test_posthoc.py's",
    "hdit ema runs/digits-hdit --width 0.03 0.07 0.15": "a run with snapshots, likewise",
    "make test": "these tests, and installs",
    ". .venv/bin/activate": "the tests run in an environment already",
    "git clone --depth 1 https://github.com/zalandoresearch/fashion-mnist": "network; a stand-in",
    "torchrun --nproc_per_node 8 -- $(which hdit) train CONFIG --run DIR": "eight GPUs",
    "torchrun -- $(which hdit) train CONFIG --run DIR": "a container of Kubeflow",
    "torchrun --nnodes 4 --node_rank 0 --nproc_per_node 8 --master_addr HOST --master_port 29500 "
    "-- $(which hdit) train CONFIG --run DIR": "four machines",
    "python scripts/profile_trainer.py hdit-oxford-flowers --batch-size 4 --steps 10 "
    "--set training.workers=0": "a minute, on a quiet machine",
    "hdit plan digits-hdit --measure": "ten seconds; tests/planning measures a tiny model",
    "hdit plan digits-hdit --measure --set training.images=6400 --set "
    "training.checkpoint_every=3200": "likewise",
    "hdit plan hdit-ffhq1024 --gpu H100 --gpus 64 --mfu 0.4 --price 2.5": "likewise",
    'hdit plan dit-xl-2-256 --gpu "RTX 4090" --memory 24': "likewise",
    "python scripts/table_plans.py": "minutes; test_table_plans.py checks it",
    "sbatch scripts/slurm.sbatch CONFIG --run DIR": "SLURM; tests/test_slurm.py has a stand-in",
    "hdit watch runs/a runs/b --serve": "goes on until Ctrl-C; tests/cli/test_watch.py serves",
    "hdit train configs/hdit-ffhq1024.toml": "a GPU",
    "hdit train configs/hdit-imagenet256.toml": "a GPU",
    "tensorboard --logdir runs/tracked/tensorboard": "a server that does not end",
    "zip -q -0 -r imagenet.zip imagenet": "no command of hdit",
    "torchrun --nproc_per_node 8 -- $(which hdit) sample runs/digits-hdit -n 50000 "
    "--out set.npz": "eight GPUs; tests/sampling/test_sample_processes.py has two processes",
    "python scripts/bench_attention.py": "minutes, on a quiet machine",
    "python scripts/bench_models.py --only flowers --only ffhq --only dit": "minutes, likewise",
    "python scripts/bench_models.py --only pixels --pairs 5": "minutes, likewise",
    "python scripts/bench_noise.py": "a minute, likewise",
    "python scripts/bench_features.py images --workers 2": "minutes, likewise",
    "hdit evaluate samples VIRTUAL_imagenet256_labeled.npz --protocol adm": "ADM's file",
    "python scripts/table_triton.py": "minutes: it compiles every kernel",
    "python scripts/table_triton.py --default --dtype bf16 fp32 --d-head 32 64 128": "likewise",
    "python scripts/table_triton.py --capability 90 --default --dtype bf16 fp32 "
    "--d-head 32 64 128": "likewise, with another Triton",
}
"""Commands of the pages that no test runs, and why. tests/data/test_check.py runs the shell blocks
under a line `<!-- run: ... -->`."""

FEW = {  # what makes a command of a page one for a test
    r"--minutes [\d.]+": "--minutes 0.001",
    r"(hdit train(?!.*--minutes).*)": r"\1 --minutes 0.001",
    r"(hdit train.*)": r"\1 --set sampling.grid=0 --set training.batch_size=2",
    r"--steps \d+": "",
    r"-n \d+": "-n 2 --steps 2",
    r"(hdit sample(?!.* -n ).*)": r"\1 -n 2 --steps 2",
    r"(hdit evaluate(?!.*--features).*)": r"\1 --features pooled:pooled",
    r"(hdit doctor)$": r"\1 --fast",
    r"(hdit convert \S+\.pt .*)": r"\1 --num-heads 5",
    r"checkpoints/000000032000": "checkpoints/000000000032",
    r"unpack_fashion\.py \S+": "unpack_fashion.py idx",
    r"(train_classifier\.py.*)": r"\1 --epochs 1",
    r"(train_vae\.py (?!.*--minutes).*)": r"\1 --minutes 0.001",
    r"(sample_ffhq1024\.py --random.*)": r"\1 --steps 2 --size 128",
    r"(ablate_backbones\.py.*)": r"\1 --list",
    r"(scaling_cost\.py.*)": r"\1 --to 128 --dit-to 64",
    r"(bench_data\.py (?!.*--images).*)": r"\1 --images 4",
    r"(bench_data\.py.*)--images \d+": r"\1--images 4 --rounds 1 --batch 2 --workers 0",
}
SMALL = {  # and its configs
    "photos1024-hdit.toml": {"size = 1024": "size = 256"},
    "fashion-dit-latent.toml": {"depth = 8": "depth = 1"},
    "fashion-hdit.toml": {"depth = 6": "depth = 1"},
}
FEATURES = "def pooled(images):\n    return images.float().mean((2, 3))\n"


class Pooled(torch.nn.Module):
    """What stands in for a classifier in TorchScript."""

    def forward(self, images: torch.Tensor):
        return images.float().mean((2, 3))


# ---- what a page says ----------------------------------------------------------------------------


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language, but those that another test runs by their name."""
    found = re.findall(r"(<!-- run: [\w-]+ -->\n)?^```(\w*)\n(.*?)^```", text, re.DOTALL | re.M)
    return [block for run, name, block in found if name == language and not run]


def commands(text: str) -> list[str]:
    """Of all shell blocks, without comments; a backslash goes on in the next line."""
    lines = "".join(blocks(text, "sh")).replace("\\\n", " ").splitlines()
    plain = (re.sub(r"(^|\s)#.*", "", line) for line in lines)
    return [" ".join(line.split()) for line in plain if line.strip()]


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.M)
    headings = re.findall(r"^#+ (.+)$", prose, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# ---- where its commands run ----------------------------------------------------------------------


def write_idx(path: Path, array: np.ndarray) -> None:
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(head + array.tobytes()))


def write_images(folder: str, number: int, height: int, width: int) -> None:
    random = np.random.default_rng(0)
    Path(folder).mkdir(parents=True)
    for i in range(number):
        pixels = random.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(f"{folder}/{i}.png")


def write_small_configs() -> None:
    shutil.copytree(REPOSITORY / "configs", "configs")
    for name, changes in SMALL.items():
        text = Path("configs", name).read_text()
        for old, new in changes.items():
            assert old in text, f"{name}: {old}"
            text = text.replace(old, new)
        Path("configs", name).write_text(text)


@pytest.fixture
def place(tmp_path, monkeypatch, trained):
    """A folder with the configs, scripts and stand-ins, to be in."""
    monkeypatch.chdir(tmp_path)
    write_small_configs()
    Path("scripts").symlink_to(REPOSITORY / "scripts")
    random = np.random.default_rng(0)
    Path("idx").mkdir()
    for stem, n in (("train", 100), ("t10k", 40)):
        write_idx(
            Path(f"idx/{stem}-images-idx3-ubyte.gz"), random.integers(0, 256, (n, 28, 28), np.uint8)
        )
        write_idx(Path(f"idx/{stem}-labels-idx1-ubyte.gz"), np.arange(n, dtype=np.uint8) % 10)
    write_images("photographs", 2, 300, 400)
    for folder in ("my_images", "emoji", "imagenet"):
        write_images(f"{folder}/a", 20, 64, 64)
        write_images(f"{folder}/b", 20, 64, 80)
    write_images("ffhq1024", 3, 32, 32)
    write_images("samples", 4, 32, 32)
    Path("images").symlink_to("my_images")
    np.savez("reference.npz", random.integers(0, 256, (4, 32, 32, 3), np.uint8))
    Path("pooled.py").write_text(FEATURES)
    with warnings.catch_warnings(category=DeprecationWarning, action="ignore"):  # torch's, of jit
        torch.jit.save(torch.jit.script(Pooled()), "classifier.pt")
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("my.toml").write_text(blocks((DOCS / "configuration.md").read_text(), "toml")[0])
    shutil.copy(
        REPOSITORY / "tests/vectors/hdit_tiny_config_input.json", "config_oxford_flowers.json"
    )
    tensors = load_file(REPOSITORY / "tests/vectors/dit_tiny.safetensors")
    torch.save(tensors, "DiT-XL-2-256x256.pt")
    tiny_vae.save(  # by a factor of 8, as the VAE of the published DiTs
        Path("FOLDER"),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
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


def run_for_a_moment(command: str, trained: Path) -> str:
    """Runs a command of a page by FEW -> what it ran. Copies in the runs that it reads."""
    line, _, target = command.partition(" > ")
    for pattern, new in FEW.items():
        line = re.sub(pattern, new, line)
    program, *arguments = shlex.split(line)
    assert program in ("hdit", "python"), f"{line}: neither run nor listed in NOT_RUN"
    if arguments[0] != "train":
        for name in set(re.findall(r"\bruns/[\w-]+", line)):
            if not Path(name).exists():
                shutil.copytree(trained, name)
    printed = io.StringIO()
    with redirect_stdout(printed):
        status = run(program, arguments)
    assert not status, (line, status, printed.getvalue())
    if target:
        Path(target).write_text(printed.getvalue())
    return line


# ---- the tests -----------------------------------------------------------------------------------


def run_page(page: str, trained: Path, capfd) -> set[str]:
    """Runs the commands of a page in turn, but those of NOT_RUN -> its verbs and scripts."""
    verbs = set()
    for command in commands(PAGES[page].read_text()):
        if command in NOT_RUN:
            continue
        try:
            line = run_for_a_moment(command, trained)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{capfd.readouterr()}") from None
        program, first, *_ = line.split()
        verbs.add(first if program == "hdit" else Path(first).stem)
    return verbs


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_runs_or_is_listed(page, place, trained, capfd):
    verbs = run_page(page, trained, capfd)
    if page == "docs/guide.md":
        assert verbs >= {
            "train", "encode", "sample", "evaluate",
            "train_vae", "train_classifier", "sample_ffhq1024", "ablate_backbones", "scaling_cost",
        }  # fmt: skip
        assert Path("runs/fashion-hdit/metrics.jsonl").exists()
        assert len(list(Path("pictures").glob("*.png"))) == 2


def test_commands_that_are_not_run_are_in_a_page_and_have_their_options():
    said = {command for path in PAGES.values() for command in commands(path.read_text())}
    assert {*NOT_RUN} <= said
    for command in NOT_RUN:
        program, *arguments = command.split()
        if program == "python":
            script = (REPOSITORY / arguments[0]).read_text()
            for option in arguments[1:]:
                assert not option.startswith("-") or f'"{option}"' in script, command


@pytest.mark.parametrize(
    ("page", "index"),
    [
        (page, index)
        for page, path in PAGES.items()
        for index in range(len(blocks(path.read_text(), "python")))
    ],
)
def test_python_of_a_page_runs(page, index, place, trained):
    shutil.copytree(trained, "runs/digits-hdit")
    text = blocks(PAGES[page].read_text(), "python")[index]
    code = compile(text, page, "exec")
    if "from ray" in text:
        pytest.skip("Ray is not among the tests' packages, and trains for long")
    exec(code, {})


def test_configs_of_the_configuration_page_are_valid(place):
    first, *others = blocks((DOCS / "configuration.md").read_text(), "toml")
    Path("base.toml").write_text(first)
    assert load("base.toml").model.levels[1].width == 256
    for text in others:
        Path("my.toml").write_text(text)
        assert load("my.toml").training.batch_size == tomllib.loads(text)["training"]["batch_size"]


def test_matrix_of_the_ablation_page_is_valid(place):
    (text,) = blocks((DOCS / "ablation.md").read_text(), "toml")
    Path("configs/matrices/example.toml").write_text(text)
    shown = run_for_a_moment(
        "python scripts/ablate_backbones.py configs/matrices/example.toml --out ablation", place
    )
    assert shown.endswith("--list")


def test_tables_of_the_configuration_page_are_current():
    text = document_config.PAGE.read_text()
    assert document_config.page(text) == text, "run python scripts/document_config.py"


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_somewhere(page):
    path = PAGES[page]
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.M)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        there = path.parent / file if file else path
        assert there.exists(), target
        assert not anchor or anchor in anchors(there.read_text()), target


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page):
    text = PAGES[page].read_text().replace("| hdit/s |", "")  # images a second
    roots = "configs|docs|hdit|kernels|scripts|tests"
    for name in re.findall(rf"(?<![\w/-])(?:{roots})/[\w./*-]+", text):
        assert list(REPOSITORY.glob(name.rstrip("./"))), name


def test_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text().split()) <= 950
