"""The fused parts against their formulas in float64, with gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hdit_kernels import fused, native

pytestmark = pytest.mark.skipif(
    native.unavailable() is not None, reason=f"no compiled library: {native.unavailable()}"
)


class Seen(TorchDispatchMode):
    """The names of the operators that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name.partition("::")[2])
        return function(*args, **(kwargs or {}))


def normal(*shape, seed, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)


def outputs_and_gradients(f, inputs):
    """What f returns, and the gradients of its product with fixed noise."""
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    out = f(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    noise = [normal(*o.shape, seed=99 + i, dtype=torch.bfloat16).to(o) for i, o in enumerate(out)]
    return [*(o.detach() for o in out), *torch.autograd.grad(out, inputs, noise)]


def check(f, formula, inputs, dtype, operator, eps=None):
    """f in `dtype` is the formula in float64, with gradients, and runs the named operator."""
    inputs = [t.to(dtype) if i == 0 or big else t for i, (t, big) in enumerate(inputs)]
    with Seen() as seen:
        actual = outputs_and_gradients(f, inputs)
    assert operator in seen.names
    assert f"{operator}_backward" in seen.names
    expected = outputs_and_gradients(formula, [t.double() for t in inputs])
    for a, e in zip(actual, expected, strict=True):
        # Rounding to bfloat16 once; in float32 a few roundings of terms, and of sums over tokens.
        tolerance = (eps or 16) * torch.finfo(torch.float32).eps
        if a.dtype == torch.bfloat16:
            tolerance += torch.finfo(dtype).eps / 2
        scale = max(1.0, float(e.abs().max()))
        torch.testing.assert_close(a.double(), e, atol=tolerance * scale, rtol=tolerance)


dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
widths = st.sampled_from([1, 5, 16, 24, 37, 64, 130])


def of_image(row, x):
    return row.view(len(row), *[1] * (x.ndim - 2), -1) if row.ndim == 2 else row


@dtypes
@settings(max_examples=15, deadline=None, database=None)
@example(b=2, h=9, w=15, d=128, centre=False, per_image=True, shifted=False)  # chunks, cut
@given(
    b=st.integers(1, 3),
    h=st.integers(1, 9),
    w=st.integers(1, 9),
    d=widths,
    centre=st.booleans(),
    per_image=st.booleans(),
    shifted=st.booleans(),
)
def test_norm_is_its_formula(dtype, b, h, w, d, centre, per_image, shifted):
    shape = (b, d) if per_image else (d,)
    x = normal(b, h, w, d, seed=0) * 2 + 0.5
    scale, shift = 1 + 0.3 * normal(*shape, seed=1), normal(*shape, seed=2)
    eps = 1e-3  # rows of one element, less their mean, are nothing but this

    def fast(x, scale, shift):
        return fused.norm(x, scale, shift if shifted else None, eps=eps, centre=centre) + (
            0 * shift.sum().to(x.dtype)
        )

    def formula(x, scale, shift):
        y = x - x.mean(-1, keepdim=True) if centre else x
        y = y / (y.square().mean(-1, keepdim=True) + eps).sqrt() * of_image(scale, x)
        return y + of_image(shift, x) if shifted else y + 0 * shift.sum()

    # 1 / rms is up to 30 where eps is all there is
    check(fast, formula, [(x, 1), (scale, 0), (shift, 0)], dtype, "fused_norm", eps=64)


@dtypes
def test_norm_without_scale_is_that_of_torch(dtype):
    x = normal(2, 5, 7, 48, seed=0)
    check(
        lambda x: fused.norm(x, None, centre=True),
        lambda x: F.layer_norm(x, (48,), eps=1e-6),
        [(x, 1)],
        dtype,
        "fused_norm",
    )


@dtypes
@settings(max_examples=10, deadline=None, database=None)
@given(b=st.integers(1, 3), h=st.integers(1, 12), w=st.integers(1, 12), d=widths)
def test_gated_residual_is_its_formula(dtype, b, h, w, d):
    x, branch = normal(b, h, w, d, seed=0), normal(b, h, w, d, seed=1)
    check(
        fused.gated_residual,
        lambda x, branch, gate: x + gate[:, None, None] * branch,
        [(x, 1), (branch, 1), (normal(b, d, seed=2), 0)],
        dtype,
        "fused_gated",
    )


@dtypes
@settings(max_examples=10, deadline=None, database=None)
@given(tokens=st.integers(1, 200), d=widths)
def test_geglu_is_its_formula(dtype, tokens, d):
    def formula(up):
        value, gate = up.chunk(2, dim=-1)
        return value * gate * (1 + torch.erf(gate / 2**0.5)) / 2

    check(fused.geglu, formula, [(2 * normal(tokens, 2 * d, seed=0), 1)], dtype, "fused_geglu")


def test_gelu_of_geglu_holds_from_end_to_end():
    gate = torch.linspace(-30, 30, 20001).requires_grad_()
    up = torch.stack([torch.ones_like(gate), gate], dim=-1)
    out = fused.geglu(up)[:, 0]
    (slope,) = torch.autograd.grad(out.sum(), gate)
    x = gate.detach().double()
    integral = torch.special.erfc(-x / 2**0.5) / 2
    density = torch.exp(-x.square() / 2) / (2 * torch.pi) ** 0.5
    # of the integral, which is at most 1: a few roundings
    torch.testing.assert_close(out.double(), x * integral, atol=1e-7, rtol=3e-7)
    torch.testing.assert_close(slope.double(), integral + x * density, atol=6e-7, rtol=0)


@dtypes
@settings(max_examples=15, deadline=None, database=None)
@example(b=2, h=5, w=6, n=2, e=64, quarter=8, rotated=True)  # as HDiT has it
@given(
    b=st.integers(1, 2),
    h=st.integers(1, 5),
    w=st.integers(1, 5),
    n=st.integers(1, 3),
    e=st.sampled_from([8, 12, 40, 64, 72]),
    quarter=st.integers(1, 2),
    rotated=st.booleans(),
)
def test_prologue_is_its_formula(dtype, b, h, w, n, e, quarter, rotated):
    qkv, angle = normal(b, h, w, 3, n, e, seed=0), normal(h + w, n, quarter, seed=2)
    table = torch.stack([angle.cos(), angle.sin()], dim=1) if rotated else None
    scale = 10 * torch.rand(n, generator=torch.Generator().manual_seed(1)) + 1

    def formula(qkv, scale):
        def turn(x):
            x = x * (scale.sqrt()[:, None] / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt())
            if table is None:
                return x
            rows = angle[:h, None].expand(-1, w, -1, -1)
            columns = angle[None, h:].expand(h, -1, -1, -1)
            theta = torch.cat([rows, columns], dim=-1).double()  # (h w n 2*quarter)
            f = theta.shape[-1]
            pairs = torch.complex(x[..., :f], x[..., f : 2 * f]) * torch.polar(
                torch.ones_like(theta), theta
            )
            return torch.cat([pairs.real, pairs.imag, x[..., 2 * f :]], dim=-1)

        q, k, v = qkv.unbind(3)
        return turn(q), turn(k), v

    check(
        lambda qkv, scale: fused.qk_prologue(qkv, scale, table),
        formula,
        [(qkv, 1), (scale, 0)],
        dtype,
        "fused_prologue",
    )


@dtypes
@pytest.mark.parametrize("p", [0.0, 0.1, 0.75])
def test_dropout_drops_its_share_and_keeps_the_mean(dtype, p):
    x = torch.ones(3, 100_003, dtype=dtype, requires_grad=True)
    torch.manual_seed(0)
    with Seen() as seen:
        out = fused.dropout(x, p)
    assert "fused_dropout" in seen.names
    kept = out.detach() != 0
    assert torch.equal(out[kept], (1 / (1 - torch.full((1,), p))).to(dtype).expand(kept.sum()))
    deviation = (p * (1 - p) / x.numel()) ** 0.5
    assert float(kept.float().mean()) == pytest.approx(1 - p, abs=5 * deviation + 1e-9)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(gradient, out.detach())  # of ones: the same elements, the same factor
    torch.manual_seed(0)
    assert torch.equal(fused.dropout(x, p), out)
    assert p == 0 or not torch.equal(fused.dropout(x, p), out)


def test_dropout_of_neighbours_pieces_and_seeds_is_independent():
    torch.manual_seed(1)
    x = torch.ones(1 << 20)
    a, b = ((fused.dropout(x, 0.5) > 0).double() - 0.5 for _ in range(2))
    pairs = {"seeds": (a, b)} | {
        f"{lag} apart": (a[:-lag], a[lag:]) for lag in (1, 2, 16, 384, 1 << 14, 1 << 15)
    }
    for name, (left, right) in pairs.items():
        correlation = float((left * right).mean()) * 4
        assert abs(correlation) < 5 / len(left) ** 0.5, name


def cases(dtype=torch.float32):
    """Each function with inputs (arguments, those that need a gradient)."""
    angle = normal(5, 2, 2, seed=3)
    table = torch.stack([angle.cos(), angle.sin()], dim=1)
    x, branch = normal(2, 2, 3, 16, seed=0), normal(2, 2, 3, 16, seed=1)
    return {
        "norm": (fused.norm, (x, normal(2, 16, seed=2))),
        "gated_residual": (fused.gated_residual, (x, branch, normal(2, 16, seed=2))),
        "geglu": (fused.geglu, (x,)),
        "qk_prologue": (
            lambda qkv, scale: fused.qk_prologue(qkv, scale, table),
            (normal(2, 2, 3, 3, 2, 8, seed=4), torch.tensor([2.0, 3.0])),
        ),
    }


@pytest.mark.parametrize("name", cases())
def test_fused_equals_the_formula_that_runs_elsewhere(name, monkeypatch):
    f, inputs = cases()[name]
    fast = outputs_and_gradients(f, inputs)
    monkeypatch.setattr(fused, "in_native", lambda *tensors: False)
    with Seen() as seen:
        formula = outputs_and_gradients(f, inputs)
    assert not any(name.startswith("fused") for name in seen.names)
    torch.testing.assert_close(fast, formula, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("name", cases())
def test_formula_has_the_gradients_of_finite_differences(name):
    f, inputs = cases()[name]
    assert torch.autograd.gradcheck(f, [t.double().requires_grad_() for t in inputs])


@pytest.mark.parametrize("name", cases())
def test_fused_does_not_depend_on_the_memory_layout(name):
    f, (x, *rest) = cases()[name]
    apart = x.new_empty(*x.shape, 2)[..., 0].copy_(x)
    assert not apart.is_contiguous()
    torch.testing.assert_close(f(apart, *rest), f(x, *rest), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("name", cases())
def test_fused_gives_the_same_bits_with_any_number_of_threads(name):
    f, inputs = cases()[name]
    inputs = [t.repeat(40, *[1] * (t.ndim - 1)) if t.ndim > 3 else t for t in inputs]
    inputs = [t.repeat(40, 1) if t.ndim == 2 else t for t in inputs]
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(outputs_and_gradients(f, inputs))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", cases())
def test_fused_of_an_empty_batch_is_empty(name):
    f, inputs = cases()[name]
    out = f(*(t[:0] if t.ndim > 1 else t for t in inputs))
    assert all(o.numel() == 0 for o in (out if isinstance(out, tuple) else (out,)))


@pytest.mark.parametrize("name", cases())
def test_fused_compiles_into_one_graph(name):
    f, inputs = cases()[name]
    compiled = torch.compile(f, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), f(*inputs), atol=2e-6, rtol=2e-6)


# ---- what is asked of it beyond its formula ------------------------------------------------------


@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize("form", ["expanded", "sliced", "permuted"])
def test_gradients_that_come_in_other_layouts_are_read_right(name, form):
    f, inputs = cases()[name]
    inputs = [t.detach().requires_grad_() for t in inputs]
    out = f(*inputs)
    out = out if isinstance(out, tuple) else (out,)

    def laid_out(i, o):
        noise = normal(*o.shape, seed=i)
        if form == "expanded":
            return noise[..., :1].expand(o.shape)
        if form == "sliced":
            return noise.repeat_interleave(2, dim=-1)[..., ::2]
        order = [0, *torch.arange(o.ndim).roll(i + 1).tolist()]  # of the axes, another for each
        order = list(dict.fromkeys(order))
        back = [order.index(axis) for axis in range(o.ndim)]
        return noise.permute(order).contiguous().permute(back)

    gradients = [laid_out(i, o) for i, o in enumerate(out)]
    actual = torch.autograd.grad(out, inputs, gradients, retain_graph=True)
    expected = torch.autograd.grad(out, inputs, [g.contiguous() for g in gradients])
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("name", cases())
def test_a_second_derivative_is_refused(name):
    f, inputs = cases()[name]
    inputs = [t.detach().requires_grad_() for t in inputs]
    out = f(*inputs)
    out = out[0] if isinstance(out, tuple) else out
    (first,) = torch.autograd.grad(out.square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()


SHAPES = {  # (x, scale, shift): where the library's rows do not fit, the formula decides
    "rows of one image": ((3, 2, 2, 8), (1, 8), None),
    "rows of two kinds": ((3, 2, 2, 8), (8,), (3, 8)),
    "one axis": ((8,), (8,), None),
}


@pytest.mark.parametrize("name", SHAPES)
def test_norm_broadcasts_its_rows_as_the_formula_does(name):
    shape, *rows = SHAPES[name]
    x = normal(*shape, seed=0)
    scale, shift = (None if row is None else normal(*row, seed=i) for i, row in enumerate(rows))
    wide = [None if t is None else t.double() for t in (x, scale, shift)]
    torch.testing.assert_close(
        fused.norm(x, scale, shift).double(), fused.norm(*wide), atol=1e-5, rtol=1e-5
    )


def test_shapes_that_do_not_fit_raise():
    x = normal(3, 2, 2, 8, seed=0)
    for call in (
        lambda: fused.norm(x, torch.ones(4)),
        lambda: fused.norm(x, torch.ones(5, 8)),
        lambda: fused.gated_residual(x, x, torch.ones(3, 4)),
        lambda: fused.geglu(normal(4, 7, seed=0)),
        lambda: fused.qk_prologue(normal(1, 2, 3, 3, 2, 8, seed=0), torch.ones(2),
                                  torch.ones(6, 2, 2, 2)),
    ):  # fmt: skip
        with pytest.raises((RuntimeError, ValueError)):
            call()


def test_gated_residual_keeps_the_dtype_of_x_in_any_layout():
    x = normal(2, 3, 4, 8, seed=0, dtype=torch.bfloat16)
    gate = normal(2, 8, seed=1)
    assert fused.gated_residual(x, x, gate).dtype == torch.bfloat16
    assert fused.gated_residual(x.transpose(1, 2), x.transpose(1, 2), gate).dtype == torch.bfloat16


@pytest.mark.parametrize("name", [name for name in cases() if name != "qk_prologue"])
def test_what_is_not_a_number_stays_so(name):
    f, (x, *rest) = cases()[name]
    x = x.clone()
    x[0, 0, 0, -1] = torch.nan
    out = f(x, *rest)
    assert out[0, 0, 0].isnan().any()
    assert not out[1].isnan().any()
