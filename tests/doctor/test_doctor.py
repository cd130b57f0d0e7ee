import json
import platform
import subprocess
import sys
import tomllib
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import hdit as hdit_package
from hdit import doctor
from hdit.device import auto_precision
from hdit.doctor import attention, examination, facts, machine, precisions, trying
from hdit_kernels import BACKENDS, native, neighborhood, select_backend
from hdit_kernels.neighborhood import AUTO, Choice, Problem

ABSENT = "no C++ compiler found (c++, g++ or clang++); install one (Debian: apt install g++)"
SMALL = (1, 8, 8, 1, 16), torch.float32, 3


@pytest.fixture(scope="module")
def report():
    """All of it on this machine, with its compilation, but of a small problem."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "attention_problem", lambda device: SMALL)
        return doctor.examine()


@pytest.fixture
def quick(monkeypatch):
    """Attention of a small problem, and no compilation."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(attention, "attention_problem", lambda device: SMALL)
    monkeypatch.setattr(machine, "COMPILE", "print(1.5)")


@pytest.fixture
def no_compiler(monkeypatch):
    def missing():
        raise native.NativeError(ABSENT)

    monkeypatch.setattr(native, "compiler", missing)
    monkeypatch.setattr(native, "library", lambda: native.NativeError(ABSENT))


def failing(say="out of luck\nand more of it"):
    """A backend that says it can, and cannot."""

    def attention(*arguments):
        raise RuntimeError(say)

    return SimpleNamespace(
        unavailable=lambda: None, unsupported=lambda problem: None, attention=attention
    )


def rows(out, title):
    """The cells of a table, by its first column; lines that a cell is folded into are joined."""
    lines = out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.strip() == title)
    found = []
    for line in lines[start + 1 :]:
        if line.startswith("└"):
            break
        if line.startswith("│"):
            cells = [cell.strip() for cell in line.strip("│").split("│")]
            if cells[0] and not cells[0].startswith("("):
                found.append(cells)
            else:
                found[-1] = [f"{a} {b}".strip() for a, b in zip(found[-1], cells, strict=True)]
    return {row[0].split()[0]: row for row in found}


def test_doctor_tells_the_versions_of_this_machine(report):
    assert report.hdit == hdit_package.__version__
    assert report.python == sys.version.split()[0]
    assert report.torch == version("torch") == torch.__version__
    assert report.torch_build.startswith(("CPU", "CUDA ", "ROCm "))
    assert platform.machine() in report.platform
    assert report.cpu.capability == torch.backends.cpu.get_cpu_capability()
    assert report.cpu.threads == 1  # as the tests set it
    assert report.cpu.cores >= 1
    assert report.broken == []


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="only Linux tells")
def test_doctor_tells_no_more_memory_than_there_is(report):
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 2**28 < report.cpu.memory_bytes <= total


def test_doctor_lists_every_backend_with_a_time_or_a_reason(report):
    (cpu,) = [part for part in report.attention if part.device == "cpu"]
    assert [found.backend for found in cpu.backends] == list(BACKENDS)
    for found in cpu.backends:
        assert (found.forward_ms is None) == (found.problem is not None)
        trained = found.forward_backward_ms is not None
        assert trained != bool(found.problem or found.training_problem)
        if trained:
            assert 0 < found.forward_ms < 1000 * attention.LONGEST


def test_doctor_marks_what_auto_takes(report):
    (cpu,) = [part for part in report.attention if part.device == "cpu"]
    for use, grad in (("training", True), ("sampling", False)):
        (marked,) = [found.backend for found in cpu.backends if use in found.auto]
        assert marked == select_backend(Problem("cpu", torch.float32, 8, 8, 3, 16, grad))


def test_doctor_names_the_compiled_kernels(report):
    found = native.library()
    if isinstance(found, native.NativeError):
        assert report.kernels.problem == str(found)
    else:
        assert Path(report.kernels.path) == found.path
        assert report.compiler.path == native.compiler()
        told = subprocess.run([report.compiler.path, "--version"], capture_output=True, text=True)
        assert report.compiler.version == told.stdout.splitlines()[0].strip()


def test_doctor_compiles_or_says_why_not(report):
    compiled = report.torch_compile[0]
    assert compiled.device == "cpu"
    assert (compiled.seconds is None) == (compiled.problem is not None)
    if compiled.seconds is not None:
        assert 0 < compiled.seconds < machine.COMPILING


def test_doctor_finds_precisions_by_trying(report):
    found = {p.dtype: p for p in report.precisions if p.device == "cpu"}
    assert list(found) == ["fp32", "bf16", "fp16"], "tf32 is CUDA's"
    assert found["fp32"].trains
    assert found["bf16"].trains
    (auto,) = [name for name, precision in found.items() if precision.auto]
    assert auto == auto_precision(torch.device("cpu"))
    assert torch.get_float32_matmul_precision() == "highest", "tried, and put back"


def test_doctor_tells_tf32_of_cuda_alone(monkeypatch):
    """With what is tried on a device in the place of the device."""
    monkeypatch.setattr(precisions, "check_float32", lambda device, tf32: None)
    monkeypatch.setattr(precisions, "check_autocast", lambda device, dtype: None)
    monkeypatch.setattr(precisions, "multiplies_bf16", lambda device: True)
    monkeypatch.setattr(precisions, "auto_precision", lambda device: "bf16")
    cpu = machine.find_cpu()
    for device, names in (("cuda:0", ["fp32", "tf32", "bf16", "fp16"]), ("mps", ["fp32", "bf16"])):
        found = precisions.try_precisions(torch.device(device), cpu)
        assert [p.dtype for p in found][: len(names)] == names
        assert [p.dtype for p in found if p.auto] == ["bf16"]


def test_doctor_knows_a_precision_that_autocast_leaves_out():
    """Autocast on a CPU refuses float64 with a warning, and goes on in float32."""
    cpu = torch.device("cpu")
    with pytest.warns(UserWarning, match="autocast"):
        assert "torch.float32" in precisions.check_autocast(cpu, torch.float64)


def test_doctor_prints_every_backend_and_reason_in_80_columns(quick, hdit, monkeypatch):
    long = "it is not installed; install it with `pip install --no-build-isolation other` (or not)"
    absent = SimpleNamespace(unavailable=lambda: long, unsupported=lambda problem: long)
    monkeypatch.setitem(BACKENDS, "other", absent)
    half = "no gradient on a CPU"
    forward = SimpleNamespace(
        unavailable=lambda: None,
        unsupported=lambda problem: half if problem.grad else None,
        attention=lambda q, k, v, kernel_size, scale: v,
    )
    monkeypatch.setitem(BACKENDS, "forwardonly", forward)
    monkeypatch.setattr(neighborhood, "AUTO", (Choice("cpu", ("forwardonly", "tile")), *AUTO))
    status, out, err = hdit("doctor")
    assert status == 0, err
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out
    assert "\x1b" not in out, "plain, as it is piped"
    found = rows(out, "neighborhood attention on cpu")
    assert list(found) == list(BACKENDS)
    assert found["other"][2] == f"no: {long}"
    assert found["forwardonly"][2].endswith(f"ms not to train with: {half}")
    assert found["forwardonly"][0] == "forwardonly (auto: sampling)"
    assert found["tile"][0] == "tile (auto: training)"
    assert "with backward" in found["reference"][2]
    told = rows(out, "machine")
    assert told["torch.compile"][1] == "cpu: works: 1.5 s"
    assert f"{auto_precision(torch.device('cpu'))} yes (auto)" in told["cpu"][1]
    packages = rows(out, "optional packages")
    for name, (purpose, install) in machine.PACKAGES.items():
        assert packages[name][1] == purpose
        assert packages[name][2] in (machine.package_version(name), f"missing: {install}")


def test_doctor_without_a_compiler_says_so_and_ends_well(quick, no_compiler, hdit):
    status, out, err = hdit("doctor")
    assert status == 0, err
    found = rows(out, "neighborhood attention on cpu")
    assert found["cpu"][2] == f"no: {ABSENT}"
    assert found["tile"][0] == "tile (auto)"
    told = rows(out, "machine")
    assert told["C++"][1].endswith(ABSENT)
    assert out.count("hdit can train here.") == 1


def test_doctor_shows_the_first_line_of_a_backend_that_raises(quick, hdit, monkeypatch):
    monkeypatch.setitem(BACKENDS, "unlucky", failing())
    status, out, _ = hdit("doctor")
    assert status == 0
    row = rows(out, "neighborhood attention on cpu")["unlucky"]
    assert row[2] == "no: RuntimeError: out of luck"


def test_doctor_fails_where_what_auto_takes_fails(quick, hdit, monkeypatch):
    monkeypatch.setitem(BACKENDS, "unlucky", failing())
    monkeypatch.setattr(neighborhood, "AUTO", (Choice("cpu", ("unlucky",)), *AUTO))
    status, out, err = hdit("doctor")
    assert status == 1
    assert "hdit can train here" not in out
    assert (
        "broken: neighborhood attention on cpu: auto takes 'unlucky', which fails: "
        "RuntimeError: out of luck" in err
    )


def test_doctor_fails_where_a_product_is_wrong(quick, hdit, monkeypatch):
    monkeypatch.setattr(precisions, "check_float32", lambda device, tf32: "wrong")
    status, out, err = hdit("doctor", "--fast", "--json")
    assert status == 1
    assert "broken: cpu does not train in fp32: wrong" in err
    assert json.loads(out)["broken"] == ["cpu does not train in fp32: wrong"]


def test_doctor_without_torch_says_what_is_broken(hdit, monkeypatch):
    monkeypatch.setitem(sys.modules, "hdit.doctor", None)
    status, _, err = hdit("doctor")
    assert status == 1
    assert err.startswith("broken: hdit cannot be imported: ")


def test_doctor_prints_json_of_the_whole_report(quick, hdit):
    status, out, _ = hdit("doctor", "--json")
    assert status == 0
    told = json.loads(out)
    assert list(told) == [field.name for field in fields(facts.Diagnosis)]
    assert told["torch"] == torch.__version__
    assert told["torch_compile"] == [{"device": "cpu", "seconds": 1.5, "problem": None}]
    backends = told["attention"][0]["backends"]
    assert [found["backend"] for found in backends] == list(BACKENDS)
    assert [found["name"] for found in told["packages"]] == list(machine.PACKAGES)


def test_doctor_fast_neither_compiles_nor_times(quick, hdit, monkeypatch):
    def never(*arguments, **options):
        raise AssertionError("--fast skips this")

    monkeypatch.setattr(examination, "try_compile", never)
    monkeypatch.setattr(attention, "time_backend", never)
    status, out, _ = hdit("doctor", "--fast")
    assert status == 0
    assert rows(out, "machine")["torch.compile"][1] == "not tried"
    assert rows(out, "neighborhood attention on cpu")["tile"][2] == "yes"
    assert "not timed" in out


@pytest.mark.parametrize(
    ("program", "wanted"),
    [
        (
            "print('Lost: no compiler\\nSet X=1 to see more'); sys.exit(1)",
            "fails (1): Lost: no com",
        ),
        ("print('Lost: inductor raised:\\nno g++'); sys.exit(1)", "Lost: inductor raised: no g++"),
        ("sys.exit('not so')", "fails (1): not so"),
        ("os.kill(os.getpid(), 9)", "fails (-9): it said nothing"),
        ("print('x' * 10_000); sys.exit(1)", "x" * trying.LONGEST_LINE + " ..."),
    ],
)
def test_doctor_says_in_a_line_why_nothing_compiles(monkeypatch, program, wanted):
    monkeypatch.setattr(machine, "COMPILE", f"import os, sys\n{program}")
    found = machine.try_compile(torch.device("cpu"))
    assert found.seconds is None
    assert wanted in found.problem
    assert "Set X" not in found.problem


def test_doctor_says_why_there_is_no_cuda(monkeypatch):
    def init():
        raise RuntimeError("Found no NVIDIA driver on your system.\nPlease check")

    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert machine.why_no_cuda([]) == "torch is built for the CPU alone"
    monkeypatch.setattr(machine.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert "install torch for CUDA" in machine.why_no_cuda([])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = machine.why_no_cuda([])
    assert found == "RuntimeError: Found no NVIDIA driver on your system."
    assert machine.why_no_cuda(["the driver is too old\nsee"]) == "the driver is too old"


def test_doctor_names_extras_that_hold_the_packages():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    for name, (_, install) in machine.PACKAGES.items():
        if "hdit[" in install:
            extra = install.partition("[")[2].partition("]")[0]
            assert any(wanted.startswith(name) for wanted in extras[extra]), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_doctor_tells_of_a_cuda_device(report):
    device = report.cuda.devices[0]
    assert device.name == torch.cuda.get_device_name(0)
    assert [part.device for part in report.attention] == ["cpu", "cuda:0"]
    found = {p.dtype: p.trains for p in report.precisions if p.device == "cuda:0"}
    assert found["fp32"]
    assert found["tf32"] == (torch.cuda.get_device_capability(0) >= (8, 0))
