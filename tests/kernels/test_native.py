"""How the C++ library is compiled, kept and found; and that each of its builds computes right."""

import multiprocessing
import os
import re
import shutil
import subprocess

import pytest
import torch
from test_fused import cases, outputs_and_gradients
from test_neighborhood import dense, draw, value_and_gradients
from test_philox import KEYS, LONG, close_to_exact

from hdit_kernels import cpu, fused, native, philox, select_backend
from hdit_kernels.contract import Problem

LIBRARY = native.library
ORDER = ["DEFAULT", "AVX2", "AVX512"]  # each processor has those before its own too
needs_compiler = pytest.mark.skipif(
    native.unavailable() is not None, reason=f"no compiled library: {native.unavailable()}"
)


@pytest.fixture
def fresh(monkeypatch):
    """As a process in which nothing was asked of the library yet."""
    LIBRARY.cache_clear()
    yield
    LIBRARY.cache_clear()


@pytest.fixture
def empty_cache(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "hdit"


@pytest.fixture(params=ORDER)
def build(request, monkeypatch):
    """The library built for a capability that this processor has."""
    if native.unavailable() is not None:
        pytest.skip(f"no compiled library: {native.unavailable()}")
    if ORDER.index(request.param) > ORDER.index(native.cpu_capability()):
        pytest.skip(f"this processor has no {request.param}")
    library = native.Library(native.build(request.param))
    monkeypatch.setattr(native, "library", lambda: library)
    return request.param


SHAPES = {  # (b h w n e), k: strips whole and cut, windows at borders, heads of odd width
    "one strip": ((1, 9, 16, 2, 8), 3),
    "cut strips": ((2, 10, 37, 2, 20), 7),
    "narrow": ((1, 20, 5, 1, 64), 5),
    "bands": ((1, 70, 33, 1, 4), 3),
    "whole grid": ((1, 11, 11, 1, 3), 11),
    "wide head": ((1, 8, 18, 1, 130), 5),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_attention_of_each_build_is_right(name, dtype, build):
    shape, k = SHAPES[name]
    *qkv, out_grad = *draw(shape, 0, dtype, "qkv"), draw(shape, 1, dtype)[0]
    scale = shape[-1] ** -0.5
    actual = value_and_gradients(lambda *t: cpu.attention(*t, k, scale), qkv, out_grad)
    expected = value_and_gradients(
        lambda *t: dense(*t, k, scale), [t.double() for t in qkv], out_grad.double()
    )
    for few_bits, exact in zip(actual, expected, strict=True):
        worst = (few_bits.double() - exact).abs().max() / exact.abs().max()
        assert worst < 16 * torch.finfo(dtype).eps  # sums of up to 121 terms


@pytest.mark.parametrize("name", cases())
def test_fused_parts_of_each_build_are_right(name, build, monkeypatch):
    f, inputs = cases()[name]
    fast = outputs_and_gradients(f, inputs)
    monkeypatch.setattr(fused, "in_native", lambda *tensors: False)
    expected = outputs_and_gradients(f, [t.double() for t in inputs])
    for a, e in zip(fast, expected, strict=True):
        torch.testing.assert_close(a.double(), e, atol=5e-6, rtol=5e-6)


def test_noise_of_each_build_has_the_same_words_and_right_normals(build):
    keys = torch.tensor(KEYS)
    for count in (1, 31, LONG + 1):
        words = philox.in_cpp(keys, count, 4, False)
        assert torch.equal(words, philox.in_torch(keys, count, 4, False))
    close_to_exact(philox.in_cpp(keys, count, 4, True), words)


@needs_compiler
def test_bfloat16_is_rounded_as_torch_rounds_it(build):
    """Halves to even, overflow to infinity, not-a-number kept: through a norm that changes none."""
    bits = torch.arange(-(2**31), 2**31, 65_537 * 8 + 3, dtype=torch.int64).to(torch.int32)
    values = bits.view(torch.float32)[:, None]
    values = torch.cat([values, torch.tensor([[torch.nan], [torch.inf], [3.4e38], [1.00390625]])])
    x = torch.zeros(len(values), 1, dtype=torch.bfloat16)
    out = fused.norm(x, None, None)
    assert torch.equal(out, x)
    shifted = torch.stack([fused.norm(x[:1], None, v) for v in values])[:, 0]
    torch.testing.assert_close(shifted, values.bfloat16(), rtol=0, atol=0, equal_nan=True)


@needs_compiler
def test_attention_gives_the_same_bits_with_any_number_of_threads():
    shape = (1, 90, 40, 1, 16)
    *qkv, out_grad = *draw(shape, 0, torch.float32), draw(shape, 1, torch.float32)[0]
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            runs.append(value_and_gradients(lambda *t: cpu.attention(*t, 7, 0.2), qkv, out_grad))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3, 8])
def test_attention_is_right_on_any_number_of_threads(threads):
    shape, before = (1, 90, 40, 1, 8), torch.get_num_threads()
    *qkv, out_grad = *draw(shape, 0), draw(shape, 1)[0]
    expected = value_and_gradients(lambda *t: dense(*t, 5, 0.2), qkv, out_grad)
    torch.set_num_threads(threads)
    try:
        actual = value_and_gradients(lambda *t: cpu.attention(*t, 5, 0.2), qkv, out_grad)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.skipif(shutil.which("clang++") is None, reason="there is no clang++")
def test_clang_builds_it_as_well(empty_cache, monkeypatch):
    monkeypatch.setenv("CXX", "clang++")
    library = native.Library(
        native.build("AVX2" if native.cpu_capability() != "DEFAULT" else "DEFAULT")
    )
    monkeypatch.setattr(native, "library", lambda: library)
    shape = (1, 10, 37, 1, 20)
    *qkv, out_grad = *draw(shape, 0), draw(shape, 1)[0]
    actual = value_and_gradients(lambda *t: cpu.attention(*t, 7, 0.3), qkv, out_grad)
    expected = value_and_gradients(lambda *t: dense(*t, 7, 0.3), qkv, out_grad)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)


# ---- compiled, kept and found --------------------------------------------------------------------


@needs_compiler
def test_library_is_compiled_once_and_then_found(empty_cache, monkeypatch):
    monkeypatch.setattr(native, "SOURCES", ("fused.cpp",))  # the quicker one
    first = native.build("DEFAULT")
    assert first.parent == empty_cache
    assert [path.name for path in empty_cache.iterdir() if path.is_dir()] == []
    made = first.stat().st_mtime_ns
    monkeypatch.setattr(native, "_compile", lambda *_: pytest.fail("compiled again"))
    assert native.build("DEFAULT") == first
    assert first.stat().st_mtime_ns == made


def test_another_source_is_another_library(empty_cache, monkeypatch):
    built = []
    monkeypatch.setattr(
        native, "_compile", lambda program, options, source, library: built.append(library)
    )
    monkeypatch.setattr(native, "compiler", lambda: "/bin/echo")
    native.build("DEFAULT")
    native.build("AVX2")
    monkeypatch.setattr(native, "SOURCES", ("neighborhood.cpp",))
    native.build("DEFAULT")
    monkeypatch.setattr(native, "compiler", lambda: "/bin/true")  # of another version
    native.build("DEFAULT")
    assert len({path.name for path in built}) == len(built) == 4


def _build(folder):
    os.environ["XDG_CACHE_HOME"] = str(folder)
    native.SOURCES = ("fused.cpp",)
    compiled = []
    real = native._compile
    native._compile = lambda *arguments: (compiled.append(1), real(*arguments))
    native.build("DEFAULT")
    return len(compiled)


@needs_compiler
def test_of_several_processes_one_compiles(tmp_path):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert sorted(pool.map(_build, [tmp_path] * 3)) == [0, 0, 1]


def expect_no_library(reason):
    """The cpu backend says why, `auto` takes the next, and models compute without the library."""
    problem = Problem("cpu", torch.float32, 16, 16, 7, 64, False)
    assert reason in cpu.unsupported(problem)
    assert reason in cpu.unavailable()
    assert select_backend(problem) == "tile"
    assert not fused.in_native(torch.zeros(1))
    with pytest.raises(native.NativeError, match=re.escape(reason)):
        native.run("geglu_float32")


def test_without_a_compiler_auto_takes_another_backend(empty_cache, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    expect_no_library("no C++ compiler found")


def test_a_compiler_that_is_not_there_is_named(empty_cache, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    expect_no_library("CXX is 'no-such-compiler'")


@needs_compiler
def test_what_the_compiler_says_is_the_reason(empty_cache, monkeypatch):
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-fno-such-option"))
    expect_no_library("no-such-option")
    assert not [path for path in empty_cache.iterdir() if path.name != "compiling"]


def test_a_cache_that_cannot_be_written_is_named(fresh, monkeypatch, tmp_path):
    (tmp_path / "hdit").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "compiler", lambda: "/bin/echo")
    expect_no_library(f"cannot keep the compiled kernels in {tmp_path / 'hdit'}")


@needs_compiler
def test_a_damaged_library_is_named(empty_cache, monkeypatch):
    monkeypatch.setattr(native, "_compile", lambda *arguments: arguments[-1].write_bytes(b"no"))
    expect_no_library("delete it")


@needs_compiler
def test_the_library_needs_nothing_of_torch_and_no_second_openmp():
    needed = subprocess.run(
        ["ldd", str(native.library().path)], capture_output=True, text=True
    ).stdout
    assert "torch" not in needed
    assert "omp" not in needed
