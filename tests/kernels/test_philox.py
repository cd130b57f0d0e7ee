import logging
import math
import warnings
from concurrent.futures import ProcessPoolExecutor
from itertools import combinations_with_replacement
from multiprocessing import get_context
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from hdit_kernels import native, philox

needs_compiler = pytest.mark.skipif(
    native.unavailable() is not None, reason=f"no compiled library: {native.unavailable()}"
)
needs_triton = pytest.mark.skipif(bool(philox.ABSENT), reason=philox.ABSENT)
needs_compilation = pytest.mark.skipif(
    type(philox.noise_kernel).__name__ == "InterpretedFunction",
    reason="TRITON_INTERPRET is set: kernels are not compiled",
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

KEYS = [0, -1, 5, -(2**63), 2**63 - 1, 0x299F31D0A4093822, 0x123456789]


def prepare():
    torch.set_num_threads(1)
    warnings.simplefilter("error")


@pytest.fixture(scope="module")
def interpreter():
    """A process whose Triton interprets kernels on CPU tensors: no process can do both."""
    pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=prepare)
    with pool, pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRITON_INTERPRET", "1")
        pool.submit(prepare).result()  # starts it
        environment.undo()
        yield pool


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("in_cpp", marks=needs_compiler),
        pytest.param("in_triton", marks=needs_triton),
        "in_torch",
    ],
)
def implementation(request):
    """A function of (keys, count, draw, transform, first), as those of philox."""
    function = getattr(philox, request.param)
    if request.param != "in_triton":
        return function
    pool = request.getfixturevalue("interpreter")
    return lambda *arguments: pool.submit(function, *arguments).result()


# ---- an independent Philox, in Python's integers -------------------------------------------------

MULTIPLIERS, INCREMENTS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)


def signed(high: int, low: int) -> int:
    """The int64 of two words."""
    value = high << 32 | low
    return value - (value >> 63 << 64)


def halves(number: int) -> tuple[int, int]:
    """The lower and the upper word of an int64."""
    return number % 2**32, number % 2**64 >> 32


def round_keys(key: int) -> list[tuple[int, ...]]:
    return [
        tuple((k + i * w) % 2**32 for k, w in zip(halves(key), INCREMENTS, strict=True))
        for i in range(10)
    ]


def block_of(key: int, block: int, draw: int) -> tuple[int, ...]:
    """The words of one block, by the paper's definition."""
    a, b, c, d = *halves(block), *halves(draw)
    for k0, k1 in round_keys(key):
        (lo0, hi0), (lo1, hi1) = halves(a * MULTIPLIERS[0]), halves(c * MULTIPLIERS[1])
        a, b, c, d = hi1 ^ b ^ k0, lo1, hi0 ^ d ^ k1, lo0
    return a, b, c, d


def counter_of(key: int, words: tuple[int, ...]) -> tuple[int, int]:
    """The block and the draw that give these words: each round is a bijection of the counter."""
    a, b, c, d = words
    inverses = [pow(m, -1, 2**32) for m in MULTIPLIERS]
    for k0, k1 in reversed(round_keys(key)):
        before_a, before_c = d * inverses[0] % 2**32, b * inverses[1] % 2**32
        hi0, hi1 = before_a * MULTIPLIERS[0] >> 32, before_c * MULTIPLIERS[1] >> 32
        a, b, c, d = before_a, a ^ hi1 ^ k0, before_c, c ^ hi0 ^ k1
    return signed(b, a), signed(d, c)


# of Random123's kat_vectors: counter, key, words
KNOWN = {
    "zeros": ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    "ones": ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    "digits of pi": (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
}


def known(name):
    (c0, c1, c2, c3), (k0, k1), words = KNOWN[name]
    return signed(k1, k0), signed(c1, c0), signed(c3, c2), words


@pytest.mark.parametrize("name", KNOWN)
def test_words_are_the_known_answers_of_random123(name, implementation):
    key, block, draw, words = known(name)
    assert implementation(torch.tensor([key]), 4, draw, False, block).tolist() == [words]


@pytest.mark.parametrize("name", KNOWN)
def test_the_definition_in_python_gives_the_known_answers_and_can_be_inverted(name):
    key, block, draw, words = known(name)
    assert list(block_of(key, block, draw)) == words
    assert counter_of(key, words) == (block, draw)


# ---- words ---------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None, database=None)
@example(keys=KEYS, count=67, draw=2**63 - 1, first=0)
@example(keys=[1], count=131, draw=0, first=2**32 - 5)  # the block's number outgrows a word
@example(keys=[0], count=1, draw=2**31, first=0)  # a sign in a word of 32 bits
@given(
    keys=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=3),
    count=st.integers(1, 140),
    draw=st.integers(0, 2**63 - 1),
    first=st.integers(0, 2**62),
)
def test_words_are_those_of_the_definition_by_key_draw_and_place(
    implementation, keys, count, draw, first
):
    words = implementation(torch.tensor(keys), count, draw, False, first)
    expected = [
        [word for i in range(-(-count // 4)) for word in block_of(key, first + i, draw)][:count]
        for key in keys
    ]
    assert words.dtype == torch.int64
    assert words.tolist() == expected


LONG = 2 * 16_384 + 5  # beyond what one thread, and one program of Triton, makes at a time


@pytest.mark.parametrize("transform", [False, True])
def test_long_tensors_begin_with_the_short_ones_and_end_with_later_blocks(
    implementation, transform
):
    keys = torch.tensor(KEYS[:3])
    long = implementation(keys, LONG, 3, transform, 0)
    assert long.shape == (3, LONG)
    assert torch.equal(long[:, :9], implementation(keys, 9, 3, transform, 0))
    assert torch.equal(long[:, 32_000:], implementation(keys, LONG - 32_000, 3, transform, 8_000))
    assert torch.equal(long[1:2], implementation(keys[1:2], LONG, 3, transform, 0))


def test_implementations_agree_on_long_tensors(implementation):
    keys = torch.tensor(KEYS[:3])
    words, noise = (implementation(keys, LONG, 3, transform, 0) for transform in (False, True))
    assert torch.equal(words, philox.in_torch(keys, LONG, 3, False))
    torch.testing.assert_close(noise, philox.in_torch(keys, LONG, 3, True), rtol=0, atol=DIFFERENCE)


@needs_compiler
def test_noise_in_cpp_is_the_same_with_any_number_of_threads():
    keys, before = torch.tensor(KEYS), torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            runs.append([philox.in_cpp(keys, count, 1, True) for count in (1, 64, LONG)])
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_keys_may_be_strided_and_tensors_empty(implementation):
    keys = torch.tensor([KEYS, KEYS]).T.contiguous()[:, 0]
    assert not keys.is_contiguous()
    assert torch.equal(
        implementation(keys, 5, 0, True, 0), implementation(keys.contiguous(), 5, 0, True, 0)
    )
    for transform, dtype in [(False, torch.int64), (True, torch.float32)]:
        for keys, count in [(torch.tensor([1, 2]), 0), (torch.zeros(0, dtype=torch.int64), 3)]:
            empty = implementation(keys, count, 0, transform, 0)
            assert empty.shape == (len(keys), count)
            assert empty.dtype == dtype


# ---- the normal transform ------------------------------------------------------------------------

LARGEST = math.sqrt(66 * math.log(2))  # of u = 2^-33
# In radians the angle is rounded once more, and so is 2 pi: by pi * (2^-24 + 2.8e-8) at most.
# Logarithm, root, sine or cosine and product have some 2^-24 each.
DIFFERENCE = LARGEST * (2.8e-7 + 4 * 2.0**-24)


def exact(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, count) words -> normal numbers in float64, and the radius of each; count is even."""
    pairs = words.reshape(len(words), -1, 2)
    radius = np.sqrt(-2 * np.log((pairs[..., 0] + 0.5) / 2.0**32))
    angle = 2 * np.pi * pairs[..., 1].astype(np.uint32).astype(np.int32) / 2.0**32
    z = radius[..., None] * np.stack([np.cos(angle), np.sin(angle)], -1)
    return z.reshape(words.shape), np.repeat(radius, 2, -1)


def close_to_exact(noise: torch.Tensor, words: torch.Tensor) -> None:
    """Raises where noise is further from the formula in float64 than float32 explains.

    u has two roundings, of 2^-24 each, and so 2^-23 in r^2 / 2, which is 2^-23 / r in r, and in all
    at most 2^-11; the angle has two and that of 2 pi, together 4.6e-7; the rest are a few of 2^-24.
    """
    z, radius = exact(words.numpy())
    allowed = 1e-6 * radius + np.minimum(1.3e-7 / radius, 2.0**-11)
    assert (np.abs(noise.double().numpy() - z) <= allowed).all()


def test_normal_is_box_and_muller_of_the_words(implementation):
    keys = torch.tensor(KEYS)
    words, noise = (implementation(keys, 20_000, 9, transform, 0) for transform in (False, True))
    assert noise.dtype == torch.float32
    close_to_exact(noise, words)


EDGES = [0, 1, 2**23, 2**24 + 1, 2**29, 2**30, 2**31 - 1, 2**31, 3 * 2**30 + 1, 2**32 - 129]
EDGES += [2**32 - 128, 2**32 - 1]


def test_normal_is_right_at_the_edges_of_words(implementation):
    """All pairs of edges, two in a block."""
    keys = torch.tensor([-7])
    for w0, w1 in combinations_with_replacement(EDGES, 2):
        words = (w0, w1, w1, w0)
        block, draw = counter_of(-7, words)
        noise = implementation(keys, 4, draw, True, block)
        close_to_exact(noise, torch.tensor([words]))
        assert noise.abs().max() < LARGEST * (1 + 1e-6)


@pytest.mark.parametrize("w1", [0, 2**31])
def test_normal_reaches_as_far_as_words_of_32_bits_let_it(implementation, w1):
    block, draw = counter_of(1, (0, w1, 5, 5))
    farthest = implementation(torch.tensor([1]), 1, draw, True, block).item()
    assert farthest == pytest.approx(-LARGEST if w1 else LARGEST, rel=1e-6)


# ---- the operators -------------------------------------------------------------------------------


def test_normal_and_words_are_the_operators_of_the_implementations():
    keys = torch.tensor(KEYS)
    expected = philox.in_torch(keys, 11, 2, True)
    torch.testing.assert_close(philox.normal(keys, 11, 2), expected, rtol=0, atol=DIFFERENCE)
    assert torch.equal(philox.words(keys, 11, 2), philox.in_torch(keys, 11, 2, False))
    assert torch.equal(philox.words(keys, 11), philox.words(keys, 11, 0))


def test_a_cpu_without_a_compiler_makes_the_same_words(monkeypatch):
    keys = torch.tensor(KEYS)
    words = philox.words(keys, 21, 2)
    monkeypatch.setattr(native, "unavailable", lambda: "no compiler")
    monkeypatch.setattr(philox, "in_cpp", None)
    assert torch.equal(philox.words(keys, 21, 2), words)
    assert torch.equal(philox.normal(keys, 21, 2), philox.in_torch(keys, 21, 2, True))


@pytest.mark.parametrize(
    "operator", [torch.ops.hdit_kernels.philox_normal, torch.ops.hdit_kernels.philox_words]
)
def test_operators_are_well_formed(operator):
    torch.library.opcheck(operator.default, (torch.tensor(KEYS), 7, 1))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_operators_have_shapes_without_data(device):
    with FakeTensorMode():
        keys = torch.empty(3, dtype=torch.int64, device=device)
        noise, words = philox.normal(keys, 10, 5), philox.words(keys, 10)
    for out, dtype in [(noise, torch.float32), (words, torch.int64)]:
        assert out.shape == (3, 10)
        assert (out.dtype, out.device.type) == (dtype, device)


def test_normal_compiles_as_a_whole_and_once_for_all_draws():
    keys, graphs = torch.tensor(KEYS), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(
        lambda keys, draw: 2 * philox.normal(keys, 10, draw), backend=count, fullgraph=True
    )
    for draw in (2, 3, 4, 2**40):
        assert torch.equal(compiled(keys, draw), 2 * philox.normal(keys, 10, draw))
    assert len(graphs) <= 2  # the second is for a draw that varies


@pytest.mark.parametrize(
    ("keys", "count", "draw", "message"),
    [
        (torch.zeros(2, 2, dtype=torch.int64), 1, 0, r"\(n,\) int64, got \(2, 2\) torch.int64"),
        (torch.zeros(2, dtype=torch.int32), 1, 0, r"got \(2,\) torch.int32"),
        (torch.zeros(2, dtype=torch.int64), -1, 0, r"count must be at least 0 .* got -1, 0"),
        (torch.zeros(2, dtype=torch.int64), 1, -1, r"draw in 0..2\^63 - 1, got 1, -1"),
        (torch.zeros(2, dtype=torch.int64), 1, 2**63, r"draw in 0..2\^63 - 1"),
    ],
)
def test_noise_says_what_is_wrong_with_its_arguments(keys, count, draw, message):
    for function in (philox.words, philox.normal):
        with pytest.raises(ValueError, match=message):
            function(keys, count, draw)


# ---- Triton --------------------------------------------------------------------------------------


@needs_triton
@needs_compilation
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("transform", [False, True])
def test_triton_kernel_compiles_without_a_gpu(capability, transform):
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {"NORMAL": transform, "TURN": philox.TURN, "BLOCKS": philox.BLOCKS}
    signature = {"keys": "*i64", "out": "*fp32" if transform else "*i32", "count": "i32"}
    signature |= {"draw": "i64", "first_block": "i64"} | dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(3)}
    made = compile(
        ASTSource(philox.noise_kernel, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
    )
    assert made.asm["cubin"]
    assert "st.global.v4" in made.asm["ptx"]  # four elements at once
    # The hardware's own approximations have absolute errors, that of the logarithm around 1 too.
    for approximation in ("lg2.approx", "sin.approx", "cos.approx", "sqrt.approx"):
        assert approximation not in made.asm["ptx"]


@needs_triton
@needs_compilation
def test_triton_kernel_is_compiled_once_for_all_draws():
    parameters = {p.name: p for p in philox.noise_kernel.params}
    for name in ("draw", "first_block"):
        assert parameters[name].do_not_specialize
        assert parameters[name].annotation_type == "i64"


@pytest.fixture
def on_a_gpu(monkeypatch):
    """As if Triton and a GPU were here."""
    philox.triton_unavailable.cache_clear()
    monkeypatch.setattr(philox, "ABSENT", "")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, **_: torch.empty(0))
    monkeypatch.setattr(philox, "in_triton", lambda *arguments: None)
    yield monkeypatch
    philox.triton_unavailable.cache_clear()


def test_triton_makes_the_noise_on_cuda(on_a_gpu):
    keys = SimpleNamespace(device=torch.device("cuda:0"))
    assert philox._implementation(keys) is philox.in_triton
    on_a_gpu.setattr(philox, "ABSENT", "triton cannot be imported (why)")
    philox.triton_unavailable.cache_clear()
    assert philox._implementation(keys) is philox.in_torch


def test_triton_says_why_it_makes_no_noise(on_a_gpu, caplog):
    def broken(*arguments):
        raise RuntimeError("no C compiler")

    def reason():
        philox.triton_unavailable.cache_clear()
        return philox.triton_unavailable(0)

    assert reason() is None
    on_a_gpu.setattr(philox, "in_triton", broken)
    with caplog.at_level(logging.WARNING):
        assert "no C compiler" in reason()
    assert "torch makes the noise, more slowly: no C compiler" in caplog.text
    on_a_gpu.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert "older than compute capability 8.0" in reason()
    on_a_gpu.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in reason()
    on_a_gpu.setattr(philox, "ABSENT", "triton cannot be imported (why)")
    assert reason() == "triton cannot be imported (why)"


@pytest.mark.gpu
@needs_gpu
def test_noise_on_a_gpu_has_the_words_of_a_cpu_and_its_normals():
    keys = torch.tensor(KEYS)
    functions = [philox.in_torch]
    if philox.triton_unavailable(torch.cuda.current_device()) is None:
        functions.append(philox.in_triton)
        assert philox._implementation(keys.cuda()) is philox.in_triton
    for function in functions:
        for count, draw in [(1, 0), (64, 1), (LONG, 2**40 + 16)]:
            words = function(keys.cuda(), count, draw, False)
            assert torch.equal(words.cpu(), philox.words(keys, count, draw))
            noise = function(keys.cuda(), count, draw, True).cpu()
            torch.testing.assert_close(
                noise, philox.normal(keys, count, draw), rtol=0, atol=DIFFERENCE
            )
        noise, words = (function(keys.cuda(), 20_000, 9, kind).cpu() for kind in (True, False))
        close_to_exact(noise, words)
