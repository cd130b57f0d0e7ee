import sys
import types

import pytest
import torch
from definition import dense, draw, value_and_gradients

from hdit_kernels import natten, neighborhood_attention
from hdit_kernels.contract import Problem
from hdit_kernels.neighborhood import BACKENDS

REASON = natten.unavailable()
HAS_LIBNATTEN = natten.has_libnatten()
needs_natten = pytest.mark.skipif(REASON is not None, reason=str(REASON))
needs_libnatten = pytest.mark.skipif(
    not (HAS_LIBNATTEN and torch.cuda.is_available()),
    reason="needs a CUDA device and NATTEN with libnatten",
)
# of torch's flex_attention, as NATTEN calls it
flex_warns = (
    pytest.mark.filterwarnings("ignore:return_lse is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
)


def marked(test):
    for mark in (needs_natten, *flex_warns):
        test = mark(test)
    return test


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(BACKENDS, "natten", natten)


@pytest.fixture
def installed(monkeypatch):
    """Puts a module in the place of NATTEN, or None for no NATTEN."""

    def put(module):
        monkeypatch.setitem(sys.modules, "natten", module)
        natten._load.cache_clear()

    yield put
    natten._load.cache_clear()


def fake(version="0.21.7", has_libnatten=False, **changes):
    """A module with what is used of NATTEN; its na2d keeps its arguments."""
    module = types.ModuleType("natten")
    module.__version__ = version
    module.HAS_LIBNATTEN = has_libnatten
    module.calls = []

    def na2d(query, key, value, kernel_size, scale):
        module.calls.append((query, key, value, kernel_size, scale))
        return query * scale

    module.na2d = na2d
    for name, value in changes.items():
        setattr(module, name, value)
    return module


def problem(**changes):
    on_gpu = Problem("cuda", torch.bfloat16, 64, 64, 7, 64, True, (9, 0))
    return on_gpu._replace(**changes)


def test_natten_that_is_not_installed_says_how_to_install_it(installed):
    installed(None)  # to import it raises ModuleNotFoundError
    assert "pip install --no-build-isolation natten" in natten.unavailable()
    assert natten.unsupported(problem()) == natten.unavailable()
    assert not natten.has_libnatten()
    q = torch.zeros(1, 5, 5, 1, 8)
    with pytest.raises(ValueError, match=r"'natten' cannot compute .*: NATTEN is not installed"):
        neighborhood_attention(q, q, q, 3, scale=1, backend="natten")


@pytest.mark.parametrize("version", ["0.17.5", "0.14.6+torch200cu118"])
def test_natten_that_is_too_old_is_refused_with_its_version(installed, version):
    installed(fake(version))
    assert f"NATTEN {version} is too old, 0.20 is the first" in natten.unavailable()
    assert not natten.has_libnatten()


def test_natten_without_na2d_or_a_version_is_refused(installed):
    installed(types.ModuleType("natten"))
    assert "of unknown version is too old" in natten.unavailable()


@pytest.mark.parametrize("version", ["0.20.0", "0.20.1.dev0", "0.21.7+torch2130cu130", "1.0"])
def test_natten_of_today_is_available(installed, version):
    installed(fake(version))
    assert natten.unavailable() is None


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise ImportError('undefined symbol')", r"\(ImportError: undefined symbol\)"),
        ("import torch; torch.no_such_thing", r"\(AttributeError: .*no_such_thing"),
        ("import natten.missing", r"\(ModuleNotFoundError: No module named 'natten.missing'"),
    ],
)
def test_natten_that_fails_to_import_keeps_the_reason(
    installed, monkeypatch, tmp_path, source, reason
):
    installed(None)
    monkeypatch.delitem(sys.modules, "natten")
    (tmp_path / "natten.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(AssertionError, match=f"NATTEN cannot be imported {reason}"):
        raise AssertionError(natten.unavailable())
    assert not natten.has_libnatten()


def test_natten_tells_libnatten(installed):
    installed(fake(has_libnatten=True))
    assert natten.has_libnatten()
    installed(fake(has_libnatten=False))
    assert not natten.has_libnatten()


@pytest.mark.parametrize("has_libnatten", [True, False])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "mps"}, "CUDA.*not on 'mps'"),
        ({"device": "cpu"}, "no gradient on a CPU"),
        ({"dtype": torch.float64}, "not in torch.float64"),
        ({"kernel_size": 1}, "at least 2, not 1"),
        ({"d_head": 20}, "d_head.* not 20"),
    ],
)
def test_natten_says_what_it_cannot(installed, has_libnatten, changes, reason):
    installed(fake(has_libnatten=has_libnatten))
    assert natten.unsupported(problem()) is None
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(natten.unsupported(problem(**changes)))


def test_natten_without_libnatten_wants_a_power_of_two_as_d_head(installed):
    installed(fake(has_libnatten=True))
    assert natten.unsupported(problem(d_head=48)) is None
    assert "from 8 to 512" in natten.unsupported(problem(device="cpu", grad=False, d_head=48))
    installed(fake())
    assert "power of two from 8 to 512 as d_head, not 48" in natten.unsupported(problem(d_head=48))
    assert natten.unsupported(problem(d_head=8)) is None
    installed(fake("0.20.1"))
    assert "from 32 to 512 as d_head, not 8" in natten.unsupported(problem(d_head=8))


@pytest.mark.parametrize("scale", [0.5, 0, -0.5])
def test_natten_gets_a_positive_scale(installed, scale):
    module = fake()
    installed(module)
    q, k, v = draw((1, 6, 7, 2, 8), 0, torch.float32)
    out = neighborhood_attention(q, k, v, 3, scale=scale, backend="natten")
    (query, key, value, kernel_size, given) = module.calls[0]
    assert given > 0
    assert kernel_size == (3, 3)
    torch.testing.assert_close(query * given, q * scale)
    torch.testing.assert_close(out, q * scale)
    assert torch.equal(key, k)
    assert torch.equal(value, v)


def test_natten_needs_no_graph_break_of_ours(installed):
    installed(fake(has_libnatten=True, na2d=lambda q, k, v, kernel_size, scale: q * k + v * scale))
    q, k, v = draw((1, 6, 7, 2, 8), 0, torch.float32)

    def f(q, k, v):
        return neighborhood_attention(q, k, v, 3, scale=-0.5, backend="natten") * 2

    compiled = torch.compile(f, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), f(q, k, v))


@marked
@pytest.mark.parametrize("layout", ["own", "qkv"])
@pytest.mark.parametrize(
    ("h", "w", "kernel_size"), [(6, 7, 5), (9, 13, 3), (12, 9, 9), (9, 9, 9), (17, 8, 7)]
)
def test_natten_is_attention_masked_to_windows(h, w, kernel_size, layout):
    q, k, v = draw((2, h, w, 2, 16), 0, torch.float32, layout)
    out = neighborhood_attention(q, k, v, kernel_size, scale=0.25, backend="natten")
    expected = dense(q.double(), k.double(), v.double(), kernel_size, 0.25)
    # outputs below 4 in float32, and sums of at most 81 terms
    torch.testing.assert_close(out.double(), expected, atol=5e-6, rtol=0)


@marked
@pytest.mark.parametrize("scale", [0, -0.5])
def test_natten_accepts_a_scale_of_zero_and_below(scale):
    q, k, v = draw((1, 9, 9, 1, 16), 0, torch.float32)
    out = neighborhood_attention(q, k, v, 3, scale=scale, backend="natten")
    torch.testing.assert_close(out, dense(q, k, v, 3, scale), atol=5e-6, rtol=0)


@marked
def test_natten_on_a_cpu_runs_without_gradients_alone():
    q, k, v = (t.requires_grad_() for t in draw((1, 9, 10, 1, 16), 0, torch.float32))
    with pytest.raises(ValueError, match="NATTEN has no gradient on a CPU"):
        neighborhood_attention(q, k, v, 3, scale=1, backend="natten")
    with torch.no_grad():
        out = neighborhood_attention(q, k, v, 3, scale=1, backend="natten")
    torch.testing.assert_close(out, dense(q, k, v, 3, 1).detach(), atol=5e-6, rtol=0)


@marked
def test_natten_of_an_empty_batch_is_empty():
    q = torch.zeros(0, 4, 5, 2, 16)
    assert neighborhood_attention(q, q, q, 3, scale=1, backend="natten").shape == q.shape


@marked
@pytest.mark.skipif(HAS_LIBNATTEN, reason="of NATTEN without libnatten")
def test_natten_refuses_the_d_head_that_natten_refuses():
    import natten as theirs

    for d_head in (4, 8, 16, 24, 32, 64):
        q, k, v = draw((1, 4, 5, 1, d_head), 0, torch.float32)
        ours = natten.unsupported(Problem("cpu", q.dtype, 4, 5, 3, d_head, False))
        if ours is None:
            theirs.na2d(q, k, v, kernel_size=(3, 3))
        else:
            with pytest.raises(NotImplementedError):
                theirs.na2d(q, k, v, kernel_size=(3, 3))


@pytest.mark.gpu
@needs_libnatten
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "kernel_size", "layout"),
    [((2, 32, 32, 2, 64), 7, "qkv"), ((1, 9, 21, 3, 32), 5, "own"), ((1, 9, 9, 2, 32), 9, "own")],
)
def test_natten_on_cuda_stays_close_to_float64(shape, kernel_size, layout, dtype):
    *qkv, out_grad = *draw(shape, 0, dtype, layout), draw(shape, 1, dtype)[0]
    scale = shape[-1] ** -0.5
    actual = value_and_gradients(
        lambda q, k, v: neighborhood_attention(q, k, v, kernel_size, scale=scale, backend="natten"),
        [t.cuda() for t in qkv],
        out_grad.cuda(),
    )
    expected = value_and_gradients(
        lambda q, k, v: dense(q, k, v, kernel_size, scale),
        [t.double() for t in qkv],
        out_grad.double(),
    )
    for few_bits, exact in zip(actual, expected, strict=True):
        assert few_bits.dtype == dtype
        worst = (few_bits.cpu().double() - exact).abs().max() / exact.abs().max()
        # the weights are rounded to bfloat16 before each product; float32 may pass through TF32
        assert worst < (2e-3 if dtype == torch.float32 else 16 * torch.finfo(dtype).eps)


@pytest.mark.gpu
@needs_libnatten
def test_natten_on_cuda_compiles_into_one_graph():
    def f(q, k, v):
        return neighborhood_attention(q, k, v, 5, scale=0.2, backend="natten") * 2

    q, k, v = (t.cuda() for t in draw((1, 12, 10, 2, 32), 0, torch.bfloat16))
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v), f(q, k, v))
