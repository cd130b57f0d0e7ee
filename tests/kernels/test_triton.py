import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_neighborhood import dense, draw, value_and_gradients
from torch.utils.flop_counter import FlopCounterMode

from hdit_kernels import triton as backend
from hdit_kernels.neighborhood import Problem

needs_triton = pytest.mark.skipif(bool(backend.ABSENT), reason=backend.ABSENT)
needs_compiler = pytest.mark.skipif(
    backend.INTERPRETED, reason="TRITON_INTERPRET is set: kernels are not compiled"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def prepare():
    torch.set_num_threads(1)
    warnings.simplefilter("error")


@pytest.fixture(scope="module")
def interpreter():
    """A process whose Triton interprets kernels on CPU tensors: no process can do both."""
    pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=prepare)
    with pool, pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRITON_INTERPRET", "1")
        pool.submit(backend.unavailable).result()  # starts it
        environment.undo()
        yield lambda check, *arguments: pool.submit(check, *arguments).result()


def inputs(shape, layout, seed, dtype=torch.float32):
    """Normal q, k, v and gradient of the output, each (b h w n e)."""
    if layout == "mixed":
        layouts = ("own", "qkv", "heads_first", "qkv")
        return tuple(inputs(shape, layouts[i], seed, dtype)[i] for i in range(4))
    own = layout if layout in ("qkv", "heads_first") else "own"
    tensors = *draw(shape, seed, dtype, own), draw(shape, seed + 100, dtype, own)[0]
    if layout == "every_other":  # a head's elements are not together
        tensors = tuple(torch.stack((t, t), -1)[..., 0] for t in tensors)
    return tensors


def check(shape, kernel_size, layout, seed, plan=None):
    """Raises where values or gradients are not those of dense attention in float64."""
    scale = shape[-1] ** -0.5
    *qkv, out_grad = inputs(shape, layout, seed)
    if plan is None:
        actual = value_and_gradients(
            lambda q, k, v: backend.attention(q, k, v, kernel_size, scale), qkv, out_grad
        )
    else:
        out, logsumexp = backend.forward(*qkv, kernel_size, scale, plan)
        actual = (
            out,
            *backend.backward(out_grad, *qkv, out, logsumexp, kernel_size, scale, plan),
        )
    expected = value_and_gradients(
        lambda q, k, v: dense(q, k, v, kernel_size, scale),
        [t.double() for t in qkv],
        out_grad.double(),
    )
    for few_bits, exact in zip(actual, expected, strict=True):
        # Sums of at most 400 weights and 128 products. Over six draws the worst was 5 eps of the
        # largest; with a kernel of 1 the gradients of q and k are zero, of terms of order 1.
        atol = 16 * torch.finfo(torch.float32).eps * max(1, exact.abs().max().item())
        torch.testing.assert_close(few_bits.double(), exact, atol=atol, rtol=0)


@st.composite
def problems(draw):
    """(shape, kernel_size, layout, seed); sides around tiles and steps, which are 2 to 16 wide."""
    h, w = draw(st.integers(1, 18)), draw(st.integers(1, 18))
    kernel_size = 2 * draw(st.integers(0, (min(h, w) - 1) // 2)) + 1
    shape = (draw(st.integers(1, 2)), h, w, draw(st.integers(1, 2)), draw(st.integers(1, 40)))
    layout = draw(st.sampled_from(["own", "qkv", "heads_first", "mixed", "every_other"]))
    return shape, kernel_size, layout, draw(st.integers(0, 99))


@needs_triton
@settings(max_examples=3, deadline=None, database=None)
@example(((2, 17, 9, 2, 48), 7, "qkv", 0))  # cut tiles, a cut d_head
@example(((1, 11, 11, 1, 16), 11, "heads_first", 0))  # the kernel is the whole grid
@example(((1, 20, 3, 1, 32), 3, "own", 0))  # the kernel fills one axis
@example(((1, 9, 19, 1, 8), 1, "qkv", 0))  # each query sees itself
@example(((1, 20, 19, 1, 96), 13, "qkv", 0))  # several steps on both axes, both borders in each
@example(((1, 18, 19, 2, 64), 5, "mixed", 0))  # tiles that touch no border
@example(((1, 6, 7, 1, 128), 3, "every_other", 0))
@given(problems())
def test_triton_is_attention_masked_to_windows(interpreter, problem):
    interpreter(check, *problem)


@needs_triton
@pytest.mark.parametrize("plan", sorted(set(backend.PLANS.values())))
def test_triton_computes_the_same_under_each_plan(interpreter, plan):
    interpreter(check, (1, 12, 18, 1, 32), 7, "qkv", 0, plan)


def check_op():
    qkv = [t.requires_grad_() for t in inputs((1, 5, 6, 2, 8), "own", 0)[:3]]
    torch.library.opcheck(torch.ops.hdit_kernels.neighborhood_triton.default, (*qkv, 3, 0.5))


@needs_triton
def test_triton_is_a_well_formed_custom_op(interpreter):
    interpreter(check_op)


def check_edges():
    q, k, v, _ = inputs((1, 7, 9, 1, 8), "qkv", 0)
    q.requires_grad_()
    out = backend.attention(q, k, v, 5, -0.5)
    turned = backend.attention(-q, k, v, 5, 0.5)
    assert torch.equal(out, turned), "a negative scale is a negative q"
    (expanded,) = torch.autograd.grad(out.sum(), q, retain_graph=True)  # a gradient without strides
    (whole,) = torch.autograd.grad(out, q, torch.ones(out.shape))
    assert torch.equal(expanded, whole)

    empty = torch.zeros(0, 4, 5, 2, 8, requires_grad=True)
    backend.attention(empty, empty, empty, 3, 1.0).sum().backward()
    assert empty.grad.shape == empty.shape


@needs_triton
def test_triton_takes_negative_scales_expanded_gradients_and_empty_batches(interpreter):
    interpreter(check_edges)


def check_long_strides():
    """Rows 2^30 elements apart: of the storage of 4 GB only what is used is ever touched."""
    shape = (1, 3, 3, 1, 16)
    far = torch.empty(2**31 + 3 * 16, dtype=torch.float16)
    far = far.as_strided(shape, (0, 2**30, 16, 16, 1))
    near = inputs(shape, "own", 0, torch.float16)[0]
    far.copy_(near)
    actual = value_and_gradients(lambda q: backend.attention(q, q, q, 3, 0.5), [far], near)
    expected = value_and_gradients(lambda q: backend.attention(q, q, q, 3, 0.5), [near], near)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@needs_triton
def test_triton_reaches_elements_beyond_31_bits(interpreter):
    interpreter(check_long_strides)


def count_flops():
    qkv = [t.requires_grad_() for t in inputs((1, 5, 6, 2, 8), "own", 0)[:3]]
    with FlopCounterMode(display=False) as counter:
        out = backend.attention(*qkv, 3, 1.0)
        forward = counter.get_total_flops()
        out.sum().backward()
    return forward, counter.get_total_flops() - forward


@needs_triton
def test_flop_counter_counts_the_products_of_each_window(interpreter):
    products = 2 * 5 * 6 * 2 * 8 * 3**2  # multiply-adds of one product
    assert interpreter(count_flops) == (2 * products, 5 * products)


KERNELS = {"forward": backend.forward_kernel, "dq": backend.dq_kernel, "dkv": backend.dkv_kernel}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def compiled(name, launch, d_head, kernel_size, dtype, capability):
    """The kernel as a launch on aligned tensors would compile it, for a device not at hand."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = KERNELS[name]
    (rows, cols), (step_rows, step_cols) = launch.tile, launch.step
    constants = {"K": kernel_size, "E": d_head, "PAD": backend.padded(d_head)}
    constants |= {"ROWS": rows, "COLS": cols, "STEP_ROWS": step_rows, "STEP_COLS": step_cols}
    types = dict.fromkeys(constants, "constexpr")
    types |= dict.fromkeys(["logsumexp", "delta"], "*fp32")
    types |= dict.fromkeys(["scale", "logit_scale"], "fp32")
    types |= dict.fromkeys(["heads", "height", "width"], "i32")
    strides = [f"{t}_{axis}" for t in "qkv" for axis in "bhwn"]
    types |= dict.fromkeys(strides, "i32")
    signature = {arg: types.get(arg, f"*{NAMES[dtype]}") for arg in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (arg, kind) in enumerate(signature.items())
        if kind.startswith("*") or arg in strides
    }
    return compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options=backend.options(launch),
    )


def problems_to_compile():
    """(d_head, kernel_size, dtype) of each plan, at the widest head that it serves."""
    widest = {plan: key for key, plan in sorted(backend.PLANS.items())}
    for d_head, small, itemsize in widest.values():
        dtype = torch.float32 if itemsize == 4 else torch.bfloat16
        yield d_head, 7 if small else 13, dtype
    yield 64, 7, torch.float16


@needs_triton
@needs_compiler
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("d_head", "kernel_size", "dtype"), list(problems_to_compile()))
def test_triton_kernels_compile_without_a_gpu(d_head, kernel_size, dtype, capability):
    plan = backend.choose_plan(d_head, kernel_size, dtype)
    for name in KERNELS:
        kernel = compiled(name, getattr(plan, name), d_head, kernel_size, dtype, capability)
        assert kernel.asm["cubin"]
        assert kernel.metadata.shared <= 99 * 1024  # what the smallest device since sm_80 has
        assert "tf32" not in kernel.asm["ptx"]  # it has 10 bits
        assert ("mma" in kernel.asm["ptx"]) == (dtype != torch.float32)  # on the tensor cores


@pytest.mark.parametrize("d_head", [1, 32, 33, 64, 80, 128])
@pytest.mark.parametrize("kernel_size", [1, 7, 9, 11, 63])
def test_triton_has_a_plan_for_each_problem_it_supports(kernel_size, d_head):
    for dtype in backend.DTYPES:
        backend.choose_plan(d_head, kernel_size, dtype)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """As if Triton and a GPU were here."""
    monkeypatch.setattr(backend, "ABSENT", "")
    monkeypatch.setattr(backend, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return monkeypatch


GOOD = Problem("cuda", torch.bfloat16, 32, 24, 7, 64, True, (8, 0))


def test_triton_supports_cuda(on_a_gpu):
    assert backend.unsupported(GOOD) is None
    for dtype in backend.DTYPES:
        assert backend.unsupported(GOOD._replace(dtype=dtype, d_head=48)) is None


REASONS = {
    "a CPU": (GOOD._replace(device="cpu", capability=None), "CUDA device, not on 'cpu'"),
    "float64": (GOOD._replace(dtype=torch.float64), "not in torch.float64"),
    "a wide head": (GOOD._replace(d_head=160), "d_head must be at most 128, got 160"),
    "an old device": (GOOD._replace(capability=(7, 5)), "capability 8.0, got 7.5"),
}


@pytest.mark.parametrize("name", REASONS)
def test_triton_says_why_it_cannot_solve_a_problem(name, on_a_gpu):
    problem, reason = REASONS[name]
    assert reason in backend.unsupported(problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_interpreted_runs_on_a_cpu_but_not_in_bfloat16(dtype, on_a_gpu):
    on_a_gpu.setattr(backend, "INTERPRETED", True)
    on_a_gpu.setattr(torch.cuda, "is_available", lambda: False)
    reason = backend.unsupported(GOOD._replace(device="cpu", capability=None, dtype=dtype))
    assert reason is None if dtype == torch.float32 else "bfloat16" in reason


def test_triton_says_why_it_is_unavailable(on_a_gpu):
    on_a_gpu.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in backend.unavailable()
    on_a_gpu.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in backend.unavailable()
    on_a_gpu.setattr(backend, "ABSENT", "triton cannot be imported (why)")
    assert backend.unavailable() == backend.unsupported(GOOD) == "triton cannot be imported (why)"


@pytest.mark.gpu
@needs_gpu
@needs_triton
@pytest.mark.parametrize(
    ("d_head", "kernel_size"), [(32, 3), (48, 13), (64, 7), (64, 31), (128, 9), (128, 1)]
)
@pytest.mark.parametrize("dtype", backend.DTYPES)
def test_triton_on_a_gpu_is_dense_attention_and_repeats_itself(dtype, d_head, kernel_size):
    *qkv, out_grad = inputs((2, 33, 45, 2, d_head), "qkv", 0, dtype)
    scale = d_head**-0.5

    def run(f, *tensors):
        return value_and_gradients(
            lambda q, k, v: f(q, k, v, kernel_size, scale), tensors[:3], tensors[3]
        )

    on_gpu = [t.cuda() for t in (*qkv, out_grad)]
    actual, again = run(backend.attention, *on_gpu), run(backend.attention, *on_gpu)
    expected = run(dense, *(t.double() for t in (*qkv, out_grad)))
    for few_bits, same, exact in zip(actual, again, expected, strict=True):
        assert few_bits.dtype == dtype
        assert torch.equal(few_bits, same)
        # float32 as in the interpreter. Rounding the weights, their gradients and the results to
        # fewer bits as the kernels do costs up to 0.7 eps in dense attention on a CPU.
        ulps = 16 if dtype == torch.float32 else 2
        atol = ulps * torch.finfo(dtype).eps * max(1, exact.abs().max().item())
        torch.testing.assert_close(few_bits.cpu().double(), exact, atol=atol, rtol=0)
