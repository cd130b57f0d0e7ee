import itertools
import sys
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
from hdit_kernels import triton_plans
from hdit_kernels.neighborhood import Problem
from scripts import table_triton

needs_triton = pytest.mark.skipif(bool(backend.ABSENT), reason=backend.ABSENT)
needs_compiler = pytest.mark.skipif(
    backend.INTERPRETED, reason="TRITON_INTERPRET is set: kernels are not compiled"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def prepare():
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    # Triton 3.6's interpreter does it in each loop; it fails with numpy 2.4, where it is an error.
    warnings.filterwarnings("ignore", "Conversion of an array with ndim > 0", DeprecationWarning)


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


def shapes_of_programs():
    """Plans that between them have each launch of each plan, apart from warps and stages, which
    the interpreter has not."""
    launches = {name: {} for name in triton_plans.Plan._fields}
    for d_head, kernel_size, dtype in itertools.product(
        (32, 64, 128), (3, 7, 13), (torch.float16, torch.float32)
    ):
        for name, plan in triton_plans.candidates(d_head, kernel_size, dtype, None).items():
            if d_head == 32 or not ("tma" in name or "persistent" in name):
                for kernel, launch in plan._asdict().items():
                    launches[kernel][launch._replace(warps=4, stages=1)] = None
    last = triton_plans.STEPPED[32, True, 2]
    for plan in itertools.zip_longest(*launches.values()):
        yield triton_plans.Plan(*(new or old for new, old in zip(plan, last, strict=True)))


@needs_triton
@pytest.mark.parametrize("plan", list(shapes_of_programs()))
def test_triton_computes_the_same_under_each_plan(interpreter, plan):
    interpreter(check, (1, 12, 18, 1, 32), 7, "qkv", 0, plan)


def run(plan, qkv, out_grad, kernel_size, scale):
    out, logsumexp = backend.forward(*qkv, kernel_size, scale, plan)
    grads = backend.backward(out_grad, *qkv, out, logsumexp, kernel_size, scale, plan)
    return out, logsumexp, *grads


def check_product(dtype):
    *qkv, out_grad = inputs((1, 9, 11, 1, 16), "qkv", 0, dtype)
    product = triton_plans.candidates(16, 5, torch.float16, None)["product"]
    whole = triton_plans.candidates(16, 5, torch.float16, None)["one pass, product"]
    for plan in (product, product._replace(forward=whole.forward)):
        compared = triton_plans.Plan(*(launch._replace(product=False) for launch in plan))
        for scale in (-3.0, 1e-30, 1e4):
            results = [run(p, qkv, out_grad, 5, scale) for p in (plan, compared)]
            for actual, expected in zip(*results, strict=True):
                assert torch.isfinite(expected).all()
                assert torch.equal(actual, expected), scale


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_triton_masks_by_product_as_by_comparison_to_the_last_bit(interpreter, dtype):
    """Forbidden keys weigh nothing and visible ones are not rounded, whatever the scale."""
    interpreter(check_product, dtype)


def check_scales():
    shape = (1, 9, 11, 1, 8)
    *qkv, out_grad = inputs(shape, "own", 0)
    for name, plan in triton_plans.candidates(8, 5, torch.float16, None).items():
        if "tma" in name or "persistent" in name:
            continue
        negative = run(plan, qkv, out_grad, 5, -0.5)
        turned = run(plan, (-qkv[0], *qkv[1:]), out_grad, 5, 0.5)
        for i, (actual, expected) in enumerate(zip(negative, turned, strict=True)):
            assert torch.equal(actual, -expected if i == 2 else expected), name
        for scale in (0.0, 1e-37, 200.0):
            # 200 makes logits of 1000s, whose rounding is that of weights: 1000 eps.
            atol = 1e-3 if scale else 1e-5
            expected = dense(*(t.double() for t in qkv), 5, scale)
            actual = run(plan, qkv, out_grad, 5, scale)[0].double()
            torch.testing.assert_close(actual, expected, atol=atol, rtol=0, msg=name)


@needs_triton
def test_triton_takes_any_scale_under_each_plan(interpreter):
    interpreter(check_scales)


@needs_triton
@pytest.mark.parametrize("name", ["stepped, tma", "one pass, product, tma, persistent"])
def test_triton_descriptors_end_at_borders_and_heads(interpreter, name):
    """Boxes lie over each other's images, heads, rows and columns, and over 24 of 32 elements."""
    plan = triton_plans.candidates(24, 5, torch.float16, None)[name]
    interpreter(check, (2, 9, 18, 2, 24), 5, "qkv", 0, plan)


def check_misfits():
    *qkv, out_grad = inputs((1, 12, 12, 1, 8), "own", 0)
    plans = triton_plans.candidates(8, 7, torch.float16, None)
    with pytest.raises(ValueError, match=r"one pass over a kernel of 11 needs steps"):
        run(plans["one pass"], qkv, out_grad, 11, 1.0)
    narrow = inputs((1, 12, 12, 1, 6), "own", 0)  # rows of 24 bytes
    with pytest.raises(ValueError, match="tma needs tensors that begin at 16 bytes"):
        run(plans["stepped, tma"], narrow[:3], narrow[3], 7, 1.0)


@needs_triton
def test_triton_refuses_plans_that_cannot_hold_a_problem(interpreter):
    interpreter(check_misfits)


def test_descriptors_need_aligned_rows_without_gaps_in_the_last_axis():
    x = torch.empty(2, 4, 5, 2, 8, dtype=torch.float16)
    assert backend.describable(x, x.transpose(1, 3))
    assert not backend.describable(x, x.transpose(3, 4))
    assert not backend.describable(x[..., 1:])  # begins at 2 bytes
    assert not backend.describable(x[:, :1].expand(2, 4, 5, 2, 8))  # a stride of 0
    assert not backend.describable(torch.empty(2, 4, 5, 2, 4, dtype=torch.float16))
    assert backend.describable(torch.empty(2, 4, 5, 2, 4))  # 16 bytes of float32


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


def problems_to_compile():
    """(d_head, kernel_size, dtype) of each plan, at the widest head that it serves."""
    for d_head, small, itemsize in triton_plans.STEPPED:
        dtype = torch.float32 if itemsize == 4 else torch.bfloat16
        yield d_head, 7 if small else 13, dtype
    yield 64, 7, torch.float16


@needs_triton
@needs_compiler
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("d_head", "kernel_size", "dtype"), list(problems_to_compile()))
def test_triton_kernels_compile_without_a_gpu(d_head, kernel_size, dtype, capability):
    plan = triton_plans.choose_plan(d_head, kernel_size, dtype, divmod(capability, 10))
    for name in backend.KERNELS:
        launch = getattr(plan, name)
        kernel = table_triton.compiled(name, launch, d_head, kernel_size, dtype, capability)
        found = table_triton.figures(kernel)
        assert found.shared <= 99 * 1024  # what the smallest device since sm_80 has
        assert found.spilled <= 32  # eight registers
        assert "tf32" not in kernel.asm["ptx"]  # it has 10 bits
        assert ("mma" in kernel.asm["ptx"]) == (dtype != torch.float32)  # on the tensor cores


def launches_to_compile():
    """(kernel, launch, capability) of all candidates of one problem."""
    for capability in (80, 90):
        plans = triton_plans.candidates(64, 7, torch.bfloat16, divmod(capability, 10))
        for name in backend.KERNELS:
            launches = dict.fromkeys(getattr(plan, name) for plan in plans.values())
            yield from ((name, launch, capability) for launch in launches)


@needs_triton
@needs_compiler
@pytest.mark.parametrize(("name", "launch", "capability"), list(launches_to_compile()))
def test_triton_kernels_compile_under_each_plan(name, launch, capability):
    kernel = table_triton.compiled(name, launch, 64, 7, torch.bfloat16, capability)
    assert (
        kernel.metadata.shared <= (227 if capability == 90 else 163) * 1024
    )  # CUDA guide's limits
    assert ("cp.async.bulk.tensor.5d" in kernel.asm["ptx"]) == launch.tma
    assert ("wgmma" in kernel.asm["ptx"]) == (capability == 90)


@needs_triton
@needs_compiler
def test_table_of_triton_has_a_row_for_each_kernel(monkeypatch, capsys):
    problem = "--capability 90 --dtype fp32 --d-head 32 --kernel-size 7 --default"
    monkeypatch.setattr(sys, "argv", ["table_triton.py", *problem.split()])
    table_triton.main()
    _, _, header, _, *rows = capsys.readouterr().out.splitlines()
    cells = [dict(zip(header.split(" | "), row.split(" | "), strict=True)) for row in rows]
    assert [row["kernel"] for row in cells] == ["forward", "dq", "dkv"]
    for row in cells:
        assert row["plan"] == "**stepped**"
        # A step multiplies 64 x 32 logits by 32 terms with 256 threads, twice at least.
        assert int(row["instructions"]) > int(row["in a step"]) > 2 * 64 * 32 * 32 / 256


LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;            /* 0x00000a0000017a02 */
        /*0010*/                   NOP ;                             /* 0x0000000000007918 */
        /*0020*/                   SYNCS R2 ;                        /* 0x00000a0000017a02 */
        /*0030*/              @!P0 BRA 0x90 ;                        /* 0x0000000000008947 */
        /*0040*/                   HMMA R4, R4, R5, RZ ;             /* 0x00000a0000017a02 */
        /*0050*/              @!P1 CALL.REL.NOINC 0x80 ;             /* 0x000000000000994d */
        /*0060*/                   FADD R4, R4, R5 ;                 /* 0x00000a0000017a02 */
        /*0070*/               @P2 BRA 0x20 ;                        /* 0x0000000000002947 */
        /*0080*/                   EXIT ;                            /* 0x000000000000794d */
        /*0090*/              @!P0 BRA 0x90 ;                        /* 0x0000000000008947 */
        /*00a0*/                   BRA 0x40 ;                        /* 0x0000000000007947 */
        /*00b0*/                   BRA 0xb0;                         /* 0x0000000000007947 */
        /*00c0*/                   NOP;                              /* 0x0000000000007918 */
"""


def test_instructions_are_counted_without_padding_and_in_natural_loops(monkeypatch):
    """A wait stands behind the exit and jumps back into the loop, which makes none of its own; a
    call leaves it."""
    monkeypatch.setattr(table_triton, "LONG", 2)
    assert table_triton.instructions(LISTING) == (10, 8)
    straight = LISTING.replace("@P2 BRA 0x20", "    MOV R3, R4")
    assert table_triton.instructions(straight) == (10, None)


@pytest.mark.parametrize("d_head", [1, 32, 33, 64, 80, 128])
@pytest.mark.parametrize("kernel_size", [1, 7, 9, 11, 63])
def test_triton_has_a_plan_for_each_problem_it_supports(kernel_size, d_head):
    for dtype in triton_plans.DTYPES:
        for capability in (None, (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)):
            plans = triton_plans.candidates(d_head, kernel_size, dtype, capability)
            chosen = triton_plans.choose_plan(d_head, kernel_size, dtype, capability)
            assert chosen in plans.values()
            # what no GPU has run yet is taken by hand alone
            assert not any(launch.tma or launch.persistent for launch in chosen)
            for plan in plans.values():
                if capability and capability < (9, 0):
                    assert not any(launch.tma or launch.one_pass for launch in plan)


def test_triton_gets_the_halo_in_one_pass_on_hopper_alone():
    named = triton_plans.candidates(64, 7, torch.bfloat16, (9, 0))
    one_pass = named["one pass, product"]
    assert triton_plans.choose_plan(64, 7, torch.bfloat16, (9, 0)) == one_pass
    assert one_pass.forward.one_pass
    assert one_pass.forward.product
    stepped = triton_plans.STEPPED[64, True, 2]
    for capability in (None, (8, 0), (10, 0), (12, 0)):
        assert triton_plans.choose_plan(64, 7, torch.bfloat16, capability) == stepped


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
    for dtype in triton_plans.DTYPES:
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


def check_on_a_gpu(actual, exact):
    for few_bits, expected in zip(actual, exact, strict=True):
        # float32 as in the interpreter. Rounding the weights, their gradients and the results to
        # fewer bits as the kernels do costs up to 0.7 eps in dense attention on a CPU.
        ulps = 16 if few_bits.dtype == torch.float32 else 2
        atol = ulps * torch.finfo(few_bits.dtype).eps * max(1, expected.abs().max().item())
        torch.testing.assert_close(few_bits.cpu().double(), expected, atol=atol, rtol=0)


@pytest.mark.gpu
@needs_gpu
@needs_triton
@pytest.mark.parametrize(
    ("d_head", "kernel_size"), [(32, 3), (48, 13), (64, 7), (64, 31), (128, 9), (128, 1)]
)
@pytest.mark.parametrize("dtype", triton_plans.DTYPES)
def test_triton_on_a_gpu_is_dense_attention_and_repeats_itself(dtype, d_head, kernel_size):
    *qkv, out_grad = inputs((2, 33, 45, 2, d_head), "qkv", 0, dtype)
    scale = d_head**-0.5

    def call(f, *tensors):
        return value_and_gradients(
            lambda q, k, v: f(q, k, v, kernel_size, scale), tensors[:3], tensors[3]
        )

    on_gpu = [t.cuda() for t in (*qkv, out_grad)]
    actual, again = call(backend.attention, *on_gpu), call(backend.attention, *on_gpu)
    expected = call(dense, *(t.double() for t in (*qkv, out_grad)))
    for few_bits, same in zip(actual, again, strict=True):
        assert few_bits.dtype == dtype
        assert torch.equal(few_bits, same)
    check_on_a_gpu(actual, expected)


@pytest.mark.gpu
@needs_gpu
@needs_triton
def test_triton_on_a_gpu_computes_the_same_under_each_plan():
    *qkv, out_grad = inputs((2, 33, 45, 2, 64), "qkv", 0, torch.bfloat16)
    exact = value_and_gradients(
        lambda q, k, v: dense(q, k, v, 7, 0.125), [t.double() for t in qkv], out_grad.double()
    )
    on_gpu = [t.cuda() for t in (*qkv, out_grad)]
    capability = torch.cuda.get_device_capability()
    for plan in triton_plans.candidates(64, 7, torch.bfloat16, capability).values():
        out, _, *grads = run(plan, on_gpu[:3], on_gpu[3], 7, 0.125)
        check_on_a_gpu((out, *grads), exact)
