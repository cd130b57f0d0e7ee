import logging
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from definition import dense, draw, value_and_gradients
from hypothesis import example, given, settings
from hypothesis import strategies as st
from known_answers import check_record, hfill, load
from torch.utils.flop_counter import FlopCounterMode

from hdit_kernels import BACKENDS, neighborhood, neighborhood_attention, select_backend
from hdit_kernels.contract import Problem
from hdit_kernels.neighborhood import AUTO, Choice
from hdit_kernels.reference import window_starts

each_backend = pytest.mark.parametrize("backend", ["reference", "tile", "cpu"])


def vectors():
    return load("hdit_forward.json")["na2d"]


@st.composite
def problems(draw):
    """(shape, kernel_size, layout, seed); sides around the 8x8 tile and its multiples."""
    h, w = draw(st.integers(1, 18)), draw(st.integers(1, 18))
    kernel_size = 2 * draw(st.integers(0, (min(h, w) - 1) // 2)) + 1
    shape = (draw(st.integers(1, 2)), h, w, draw(st.integers(1, 2)), draw(st.integers(1, 6)))
    layout = draw(st.sampled_from(["own", "qkv", "heads_first"]))
    return shape, kernel_size, layout, draw(st.integers(0, 99))


@each_backend
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_neighborhood_matches_natten(kernel_size, backend):
    q, k, v = (hfill((1, 6, 7, 2, 8), stream) for stream in (3000, 3001, 3002))
    out = neighborhood_attention(q, k, v, kernel_size, scale=1, backend=backend)
    # outputs below 1 in float32: an ulp of 6e-8, and sums of 25 terms
    check_record(out, vectors()["runs"][f"k{kernel_size}"], atol=5e-7)


@pytest.mark.parametrize(("length", "kernel_size"), [(7, 5), (8, 7)])
def test_windows_start_where_natten_starts_them(length, kernel_size):
    expected = vectors()[f"starts_L{length}_K{kernel_size}"]
    assert window_starts(length, kernel_size).tolist() == expected


@each_backend
@settings(max_examples=20, deadline=None, database=None)
@example(((1, 5, 7, 2, 4), 3, "qkv", 0))  # one tile, cut on both axes
@example(((1, 8, 8, 1, 4), 7, "own", 0))  # one whole tile
@example(((2, 17, 16, 1, 4), 5, "qkv", 0))  # inner tiles, and a last one of a single row
@example(((1, 20, 3, 3, 4), 3, "heads_first", 0))  # the kernel fills one axis
@example(((1, 20, 19, 1, 2), 1, "own", 0))  # each query sees itself
@example(((1, 19, 20, 1, 2), 17, "own", 0))  # halos meet both borders
@given(problems())
def test_neighborhood_is_attention_masked_to_windows(backend, problem):
    shape, kernel_size, layout, seed = problem
    *qkv, out_grad = *draw(shape, seed, layout=layout), draw(shape, seed + 100)[0]
    scale = shape[-1] ** -0.5
    actual = value_and_gradients(
        lambda q, k, v: neighborhood_attention(q, k, v, kernel_size, scale=scale, backend=backend),
        qkv,
        out_grad,
    )
    expected = value_and_gradients(
        lambda q, k, v: dense(q, k, v, kernel_size, scale), qkv, out_grad
    )
    # float64 on both sides: what is left is the order of sums of at most 400 terms
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)


@each_backend
def test_neighborhood_of_the_whole_grid_is_global_attention(backend):
    q, k, v = draw((2, 11, 11, 2, 8), 0)
    out = neighborhood_attention(q, k, v, 11, scale=0.3, backend=backend)
    heads_first = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
    expected = F.scaled_dot_product_attention(*heads_first, scale=0.3)
    # float64 on both sides
    torch.testing.assert_close(out.flatten(1, 2).transpose(1, 2), expected, atol=1e-13, rtol=0)


@each_backend
def test_neighborhood_accepts_a_scale_of_zero_and_below(backend):
    q, k, v = draw((1, 9, 9, 1, 4), 0)
    mean = neighborhood_attention(q, k, v, 3, scale=0, backend=backend)
    window_means = F.avg_pool2d(v.squeeze(3).movedim(-1, 1), 3, stride=1)
    torch.testing.assert_close(
        mean[:, 1:-1, 1:-1, 0], window_means.movedim(1, -1), atol=1e-14, rtol=0
    )
    turned = neighborhood_attention(q, k, v, 3, scale=-0.5, backend=backend)
    expected = neighborhood_attention(-q, k, v, 3, scale=0.5, backend=backend)
    torch.testing.assert_close(turned, expected, atol=1e-14, rtol=0)


@pytest.mark.parametrize("backend", ["tile", "cpu"])
def test_neighborhood_gradients_are_the_finite_differences(backend):
    qkv = [t.requires_grad_() for t in draw((1, 3, 9, 1, 2), 0)]  # two tiles
    assert torch.autograd.gradcheck(
        lambda q, k, v: neighborhood_attention(q, k, v, 3, scale=0.7, backend=backend), qkv
    )


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_neighborhood_in_few_bits_stays_close_to_float64(dtype, backend):
    shape, kernel_size, scale = (1, 13, 10, 2, 16), 7, 0.25
    *qkv, out_grad = *draw(shape, 0, dtype, "qkv"), draw(shape, 1, dtype)[0]
    actual = value_and_gradients(
        lambda q, k, v: neighborhood_attention(q, k, v, kernel_size, scale=scale, backend=backend),
        qkv,
        out_grad,
    )
    expected = value_and_gradients(
        lambda q, k, v: dense(q, k, v, kernel_size, scale),
        [t.double() for t in qkv],
        out_grad.double(),
    )
    for few_bits, exact in zip(actual, expected, strict=True):
        assert few_bits.dtype == dtype
        worst = (few_bits.double() - exact).abs().max() / exact.abs().max()
        # Logits of up to 6 lose two or three bits before exp, sums some more. Over six draws the
        # worst was 4.3 eps in float32 and 2.8 in bfloat16.
        assert worst < 8 * torch.finfo(dtype).eps


@each_backend
@pytest.mark.parametrize("scale", [60.0, -60.0])
def test_neighborhood_of_large_logits_stays_finite_and_right(scale, backend):
    """Logits of some hundreds, whose exponential float32 cannot hold."""
    shape = (1, 12, 18, 1, 8)
    *qkv, out_grad = *draw(shape, 0, torch.float32), draw(shape, 1, torch.float32)[0]
    actual = value_and_gradients(
        lambda q, k, v: neighborhood_attention(q, k, v, 5, scale=scale, backend=backend),
        qkv,
        out_grad,
    )
    expected = value_and_gradients(
        lambda q, k, v: dense(q, k, v, 5, scale), [t.double() for t in qkv], out_grad.double()
    )
    for few_bits, exact in zip(actual, expected, strict=True):
        worst = (few_bits.double() - exact).abs().max() / exact.abs().max()
        assert worst < 1e-3  # logits of 500 have an ulp of 3e-5, and gradients are times 60


@each_backend
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_neighborhood_shows_what_is_not_a_number_to_those_who_see_it(bad, backend):
    q, k, v = draw((1, 12, 20, 1, 4), 0, torch.float32)
    k[0, 6, 9, 0, 1] = bad
    out = neighborhood_attention(q, k, v, 3, scale=1, backend=backend)[0, ..., 0, 0]
    seen = torch.zeros(12, 20, dtype=torch.bool)
    seen[5:8, 8:11] = True
    if backend != "tile":  # whose queries take it times a weight of 0
        assert not out[~seen].isnan().any()
    if bad != torch.inf:  # an infinite logit of -inf is a weight of 0
        assert out[seen].isnan().all()
    q[0, 0, 0] = torch.nan
    assert neighborhood_attention(q, k, v, 3, scale=1, backend=backend)[0, 0, 0].isnan().all()


@each_backend
def test_neighborhood_does_not_depend_on_the_memory_layout(backend):
    q, k, v = draw((2, 9, 10, 2, 8), 0, torch.float32, "qkv")
    assert not q.is_contiguous()
    views = neighborhood_attention(q, k, v, 5, scale=1, backend=backend)
    copies = [t.contiguous() for t in (q, k, v)]
    assert torch.equal(views, neighborhood_attention(*copies, 5, scale=1, backend=backend))


@each_backend
def test_neighborhood_leaves_its_inputs_alone(backend):
    qkv = draw((1, 9, 10, 2, 8), 0, torch.float32, "qkv")
    before = [t.clone() for t in qkv]
    value_and_gradients(
        lambda q, k, v: neighborhood_attention(q, k, v, 5, scale=1, backend=backend),
        qkv,
        torch.ones(qkv[0].shape),
    )
    assert all(torch.equal(t, old) for t, old in zip(qkv, before, strict=True))


@pytest.mark.parametrize("layout", ["own", "qkv"])
@pytest.mark.parametrize("op", ["neighborhood_tile", "neighborhood_cpu"])
def test_backend_is_a_well_formed_custom_op(op, layout):
    qkv = [t.detach().requires_grad_() for t in draw((1, 9, 10, 2, 4), 0, torch.float32, layout)]
    torch.library.opcheck(getattr(torch.ops.hdit_kernels, op).default, (*qkv, 3, 0.5))


@each_backend
def test_flop_counter_counts_the_two_products_of_each_window(backend):
    b, h, w, n, e = shape = (2, 9, 13, 3, 8)
    q, k, v = draw(shape, 0, torch.float32)
    with FlopCounterMode(display=False) as counter:
        neighborhood_attention(q, k, v, 5, scale=1, backend=backend)
    assert counter.get_total_flops() == 4 * b * h * w * n * e * 5**2


@pytest.mark.parametrize("backend", ["tile", "cpu"])
def test_flop_counter_counts_five_products_of_each_window_backward(backend):
    b, h, w, n, e = shape = (2, 9, 13, 3, 8)
    q, k, v = (t.requires_grad_() for t in draw(shape, 0, torch.float32))
    out = neighborhood_attention(q, k, v, 5, scale=1, backend=backend)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    # the logits again, the weights' gradient, and the gradients of q, k and v
    assert counter.get_total_flops() == 5 * 2 * b * h * w * n * e * 5**2


def good(**changes):
    """Valid arguments of neighborhood_attention on a grid of 5x7, with changes."""
    shape = (1, 5, 7, 2, 8)
    q, k, v = draw(shape, 0, torch.float32)
    return {"q": q, "k": k, "v": v, "kernel_size": 3, "scale": 1.0, "backend": "auto"} | changes


BAD_INPUTS = {
    "k of another grid": (
        {"k": torch.zeros(1, 7, 5, 2, 8)},
        r"one shape \(b h w n e\).*\(1, 5, 7, 2, 8\).*\(1, 7, 5, 2, 8\)",
    ),
    "v of another width": ({"v": torch.zeros(1, 5, 7, 2, 4)}, r"one shape.*\(1, 5, 7, 2, 4\)"),
    "no heads": (dict.fromkeys("qkv", torch.zeros(1, 5, 7, 8)), r"one shape.*\(1, 5, 7, 8\)"),
    "k of another dtype": (
        {"k": torch.zeros(1, 5, 7, 2, 8, dtype=torch.float64)},
        "one floating dtype, got torch.float32, torch.float64",
    ),
    "v of another dtype": (
        {"v": torch.zeros(1, 5, 7, 2, 8, dtype=torch.bfloat16)},
        "one floating dtype.*torch.bfloat16",
    ),
    "integers": (
        dict.fromkeys("qkv", torch.zeros(1, 5, 7, 2, 8, dtype=torch.int64)),
        "one floating dtype, got torch.int64",
    ),
    "even kernel": ({"kernel_size": 4}, "odd and positive, got 4"),
    "kernel of zero": ({"kernel_size": 0}, "odd and positive, got 0"),
    "negative kernel": ({"kernel_size": -3}, "odd and positive, got -3"),
    "kernel higher than the grid": ({"kernel_size": 7}, "at most .*smaller side, got 7 .*5x7"),
    "kernel wider than the grid": (
        {name: t.transpose(1, 2) for name, t in good().items() if name in "qkv"}
        | {"kernel_size": 7},
        "at most .*smaller side, got 7 .*7x5",
    ),
    "unknown backend": ({"backend": "natton"}, r"'auto' or one of \[.*'tile'.*\], got 'natton'"),
}


@pytest.mark.parametrize("bad", BAD_INPUTS)
def test_neighborhood_refuses_with_what_arrived(bad):
    changes, message = BAD_INPUTS[bad]
    neighborhood_attention(**good())
    with pytest.raises(ValueError, match=message):
        neighborhood_attention(**good(**changes))


def test_neighborhood_backend_asked_for_by_name_is_not_replaced(monkeypatch):
    monkeypatch.setattr(BACKENDS["tile"], "unsupported", lambda problem: "no reason")
    with pytest.raises(ValueError, match=r"backend 'tile' cannot compute .*: no reason"):
        neighborhood_attention(**good(backend="tile"))


def test_select_backend_gives_one_answer_for_one_problem():
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        problem = Problem("cpu", dtype, 16, 12, 7, 64, False)
        chosen = select_backend(problem)
        assert chosen in BACKENDS
        assert select_backend(problem) == chosen


def test_select_backend_takes_the_first_that_can(monkeypatch):
    class Never:
        def unavailable(self):
            return "never"

        def unsupported(self, problem):
            return "never"

    monkeypatch.setitem(BACKENDS, "never", Never())
    monkeypatch.setattr(neighborhood, "AUTO", (Choice("cpu", ("never", "tile", "reference")),))
    assert select_backend(Problem("cpu", torch.float32, 16, 12, 7, 64, False)) == "tile"


ON_GPU = Problem("cuda", torch.bfloat16, 64, 64, 7, 64, True, (9, 0))


@pytest.mark.parametrize(
    ("row", "fits"),
    [
        (Choice("cuda", ()), True),
        (Choice(None, ()), True),
        (Choice("cpu", ()), False),
        (Choice("cuda", (), capabilities=((9, 0), (9, 0))), True),
        (Choice("cuda", (), capabilities=((8, 0), (9, 9))), True),
        (Choice("cuda", (), capabilities=((9, 1), (12, 0))), False),
        (Choice("cuda", (), capabilities=((8, 0), (8, 9))), False),
        (Choice("cuda", (), dtypes=(torch.bfloat16, torch.float16)), True),
        (Choice("cuda", (), dtypes=(torch.float32,)), False),
        (Choice("cuda", (), kernel_sizes=(3, 7)), True),
        (Choice("cuda", (), kernel_sizes=(9, 13)), False),
        (Choice("cuda", (), d_heads=(64, 64)), True),
        (Choice("cuda", (), d_heads=(16, 32)), False),
    ],
)
def test_auto_row_fits_what_it_names(row, fits):
    assert row.fits(ON_GPU) == fits


def test_auto_row_of_a_capability_is_for_no_unknown_one():
    row = Choice("cuda", (), capabilities=((0, 0), (99, 0)))
    assert row.fits(ON_GPU)
    assert not row.fits(ON_GPU._replace(capability=None))


def test_auto_takes_the_first_row_that_fits(monkeypatch):
    half = Choice("cpu", ("reference",), dtypes=(torch.float16,), kernel_sizes=(3, 7))
    monkeypatch.setattr(neighborhood, "AUTO", (half, Choice("cpu", ("tile",))))
    problem = Problem("cpu", torch.float16, 16, 12, 7, 64, False)
    assert select_backend(problem) == "reference"
    assert select_backend(problem._replace(kernel_size=9)) == "tile"
    assert select_backend(problem._replace(dtype=torch.float32)) == "tile"


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps", "xpu"])
def test_auto_ends_with_what_computes_anywhere(device):
    rows = [row for row in AUTO if row.fits(Problem(device, torch.float64, 9, 9, 3, 5, True))]
    assert rows[0].backends[-2:] == ("tile", "reference")


def unmeasured(table, benchmarks):
    """What is wrong with a table's rows of triton, by the text of docs/benchmarks.md."""
    sections = re.split(r"^#+ ", benchmarks, flags=re.MULTILINE)
    wrong = []
    for row in table:
        if "triton" not in row.backends:
            continue
        least, most = row.capabilities or (None, None)
        if row.device != "cuda" or least is None or least != most:
            wrong.append(f"{row} must name one capability of CUDA")
            continue
        told = re.compile(r"capability {}\.{}\b".format(*least), re.IGNORECASE)
        figures = re.compile(r"^\|(.*\|)? *triton\b.*\|.*\d", re.MULTILINE)
        if not any(told.search(section) and figures.search(section) for section in sections):
            wrong.append(f"docs/benchmarks.md has no triton on capability {least}")
    return wrong


def test_auto_names_triton_only_where_it_is_measured():
    docs = Path(__file__).parents[2] / "docs"
    assert unmeasured(AUTO, (docs / "benchmarks.md").read_text()) == []


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (Choice("cuda", ("triton",), capabilities=((9, 0), (9, 0))), None),
        (Choice("cuda", ("triton",), capabilities=((8, 0), (8, 0))), "no triton on capability"),
        (Choice("cuda", ("triton",), capabilities=((1, 0), (1, 0))), "no triton on capability"),
        (Choice("cuda", ("triton",), capabilities=((8, 0), (9, 0))), "one capability"),
        (Choice("cuda", ("triton",)), "one capability"),
        (Choice(None, ("flex", "triton")), "one capability"),
        (Choice("cuda", ("flex",)), None),
    ],
)
def test_a_table_that_names_triton_unmeasured_is_found(row, says):
    text = (
        "# GPU\n\n## One card\nH100, capability 9.0, torch\n\n| problem | backend | ms |\n"
        "| --- | --- | --- |\n| 64x64 | triton | 0.12 |\n"
        "## Another\ncapability 8.0, torch\n\n| problem | backend | ms |\n| 64x64 | flex | 2 |\n"
        "triton was left out\n"
    )
    found = unmeasured([row], text)
    assert [says in line for line in found] == ([] if says is None else [True])


def test_capability_is_unknown_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert neighborhood._capability(torch.device("cuda")) is None
    assert neighborhood._capability(torch.device("cpu")) is None


def test_neighborhood_auto_is_the_backend_that_it_names():
    q, k, v = draw((1, 9, 12, 2, 8), 0, torch.float32)
    chosen = select_backend(Problem("cpu", torch.float32, 9, 12, 5, 8, False))
    auto = neighborhood_attention(q, k, v, 5, scale=1)
    assert torch.equal(auto, neighborhood_attention(q, k, v, 5, scale=1, backend=chosen))


def test_tile_can_train_after_it_ran_in_inference_mode():
    qkv = draw((1, 11, 14, 1, 4), 0, torch.float32)
    with torch.inference_mode():  # fills the caches of index tensors for this grid
        before = neighborhood_attention(*qkv, 3, scale=1, backend="tile")
    out, *gradients = value_and_gradients(
        lambda q, k, v: neighborhood_attention(q, k, v, 3, scale=1, backend="tile"),
        qkv,
        torch.ones(1, 11, 14, 1, 4),
    )
    assert torch.equal(out, before)
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("backend", ["auto", "tile"])
def test_neighborhood_compiles_into_one_graph(backend):
    def f(q, k, v):
        return neighborhood_attention(q, k, v, 3, scale=1, backend=backend) * 2

    q, k, v = draw((1, 9, 10, 2, 4), 0, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.compile itself
        compiled = torch.compile(f, backend="eager", fullgraph=True)
        assert torch.equal(compiled(q, k, v), f(q, k, v))


def test_neighborhood_refuses_tensors_on_several_devices():
    q = torch.zeros(1, 4, 4, 1, 8)
    with pytest.raises(ValueError, match="one device, got cpu, meta and cpu"):
        neighborhood_attention(q, q.to("meta"), q, 3, scale=1)


@each_backend
def test_neighborhood_of_an_empty_batch_is_empty(backend):
    q = torch.zeros(0, 4, 5, 2, 8)
    out = neighborhood_attention(q, q, q, 3, scale=1, backend=backend)
    assert out.shape == q.shape


@each_backend
def test_neighborhood_keeps_its_dtype_under_autocast(backend):
    q, k, v = (t.requires_grad_() for t in draw((1, 5, 6, 2, 8), 0, torch.float32))
    plain = neighborhood_attention(q, k, v, 3, scale=1, backend=backend)
    expected = torch.autograd.grad(plain.sin().sum(), (q, k, v))
    with torch.autocast("cpu", torch.bfloat16):
        out = neighborhood_attention(q, k, v, 3, scale=1, backend=backend)
    assert torch.equal(out, plain)
    grads = torch.autograd.grad(out.sin().sum(), (q, k, v))
    for actual, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_choice_is_told_once_for_problems_that_differ_in_what_is_not_told(caplog):
    with caplog.at_level(logging.INFO, "hdit_kernels"):
        for kernel_size, grad in ((3, False), (3, True), (5, True)):
            q = torch.randn(1, 11, 13, 1, 8, requires_grad=grad)
            neighborhood_attention(q, q, q, kernel_size, scale=1)
    [record] = [r for r in caplog.records if "attention on 11 x 13: backend" in r.message]
    assert record.message.endswith("(cpu)")
