from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from hdit import device

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """A system without /proc/cpuinfo, as macOS and Windows."""
    monkeypatch.setattr(device, "CPUINFO", tmp_path / "absent")
    return monkeypatch


@pytest.mark.parametrize(
    ("text", "wanted", "precision"),
    [
        ("model name\t: A\nflags\t\t: fpu avx512_bf16 amx_bf16\n", ["amx", "avx512"], "bf16"),
        ("flags\t\t: fpu avx512f avx512_bf16\n", ["avx512"], "bf16"),
        ("model name\t: B\nflags\t\t: fpu avx2 avx512f amx_tile\n", [], "fp32"),
        ("Features\t: fp asimd bf16 i8mm\n", ["bf16"], "bf16"),
        ("Features\t: fp asimd\n", [], "fp32"),
    ],
)
def test_cpu_multiplies_bf16_by_the_flags_that_linux_tells(
    monkeypatch, tmp_path, text, wanted, precision
):
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(device, "CPUINFO", tmp_path / "cpuinfo")
    assert [name.split("_")[0] for name in device.cpu_bf16()] == wanted
    assert device.auto_precision(CPU) == precision


@pytest.mark.parametrize(
    ("told", "wanted"),
    [
        ({"avx2": True, "avx512_bf16": True, "amx_bf16": False}, ["avx512_bf16"]),
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, []),
        ({"neon": True, "bf16": True}, None),
    ],
)
def test_cpu_multiplies_bf16_by_what_torch_tells_elsewhere(elsewhere, told, wanted):
    elsewhere.setattr(torch.cpu, "get_capabilities", lambda: told, raising=False)
    assert device.cpu_bf16() == wanted
    assert device.multiplies_bf16(CPU) == bool(wanted)


def test_cpu_of_which_nobody_tells_takes_fp32(elsewhere):
    elsewhere.delattr(torch.cpu, "get_capabilities", raising=False)
    assert device.cpu_bf16() is None
    assert device.auto_precision(CPU) == "fp32"


@pytest.mark.parametrize(
    ("major", "hip", "wanted"),
    [(7, None, "fp32"), (8, None, "bf16"), (9, None, "bf16"), (9, "6.4", "bf16")],
)
def test_cuda_multiplies_bf16_from_capability_8_on(monkeypatch, major, hip, wanted):
    """Capability 7 emulates it, which torch counts as support if not told otherwise."""
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    facts = SimpleNamespace(major=major)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    assert device.auto_precision(CUDA) == wanted


def test_an_untested_device_takes_fp32():
    assert device.auto_precision(torch.device("mps")) == "fp32"
