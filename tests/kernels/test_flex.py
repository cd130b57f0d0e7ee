import sys
import warnings

import pytest
import torch
from definition import dense, draw, may_see, value_and_gradients
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hdit_kernels import flex, neighborhood_attention
from hdit_kernels.contract import Problem
from hdit_kernels.neighborhood import BACKENDS

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(BACKENDS, "flex", flex)


def problem(**changes):
    on_gpu = Problem("cuda", torch.bfloat16, 64, 64, 7, 64, True, (9, 0))
    return on_gpu._replace(**changes)


def places(h, w, kernel_size=1, tile=(8, 16)):
    """The grid's (row, column) of each token, in the order of tiles, counted from the definition;
    outside the grid beyond it."""
    halo, (height, width) = kernel_size // 2, tile
    rows, cols = -(-(h + halo) // height), -(-(w + halo) // width)
    return [
        (height * tile_y + y - halo, width * tile_x + x - halo)
        for tile_y in range(rows)
        for tile_x in range(cols)
        for y in range(height)
        for x in range(width)
    ]


def blocks(count, index):
    """The blocks of BlockMask's lists, dense: (rows, columns) bool."""
    out = torch.zeros(index.shape[-2:], dtype=torch.bool)
    for row, (n, columns) in enumerate(zip(count.flatten(), index[0, 0], strict=True)):
        out[row, columns[:n].long()] = True
    return out


GRIDS = [
    (8, 16, 3),  # one tile
    (9, 21, 5),  # a second tile along both axes, nearly empty
    (20, 37, 7),  # inner tiles
    (16, 16, 15),
    (19, 33, 17),  # windows wider than a tile
    (32, 40, 31),  # some blocks seen in full
    (3, 3, 3),  # the whole grid
    (17, 18, 1),  # each query itself
]
each_tile = pytest.mark.parametrize("tile", sorted({v.tile for v in flex.VARIANTS.values()}))


@each_tile
@pytest.mark.parametrize(("h", "w", "kernel_size"), GRIDS)
def test_flex_mask_is_the_window_of_each_query(h, w, kernel_size, tile):
    queries, keys = places(h, w, tile=tile), places(h, w, kernel_size, tile)
    mask = flex.block_mask(h, w, kernel_size, CPU, tile)
    assert mask.shape[-2:] == (len(queries), len(keys))
    q_index, k_index = torch.arange(len(queries))[:, None], torch.arange(len(keys))
    visible = mask.mask_mod(torch.tensor(0), torch.tensor(0), q_index, k_index)

    rows, cols = may_see(h, kernel_size), may_see(w, kernel_size)
    real = torch.tensor([0 <= y < h and 0 <= x < w for y, x in keys])
    clipped = [(max(min(y, h - 1), 0), max(min(x, w - 1), 0)) for y, x in keys]
    key_y, key_x = torch.tensor(clipped).unbind(1)
    for (y, x), seen in zip(queries, visible, strict=True):
        if y < h and x < w:
            assert torch.equal(seen, rows[y][key_y] & cols[x][key_x] & real)
        else:  # a padded query sees keys too, or its softmax would be 0/0
            assert seen.sum() == kernel_size**2
            assert not (seen & ~real).any()


@each_tile
@pytest.mark.parametrize("full_too", [False, True])
@pytest.mark.parametrize(("h", "w", "kernel_size"), GRIDS)
def test_flex_blocks_are_those_that_hold_a_visible_key(h, w, kernel_size, full_too, tile):
    mask = flex.block_mask(h, w, kernel_size, CPU, tile, full_too)
    size = tile[0] * tile[1]
    assert (size, size) == mask.BLOCK_SIZE
    q_index, k_index = torch.arange(mask.shape[-2])[:, None], torch.arange(mask.shape[-1])
    visible = mask.mask_mod(torch.tensor(0), torch.tensor(0), q_index, k_index)
    visible = visible.unflatten(1, (-1, size)).unflatten(0, (-1, size))
    some, full = visible.any(3).any(1), visible.all(3).all(1)

    assert torch.equal(blocks(mask.kv_num_blocks, mask.kv_indices), some & ~full)
    assert torch.equal(blocks(mask.q_num_blocks, mask.q_indices), (some & ~full).mT)
    if full.any() or full_too:
        assert torch.equal(blocks(mask.full_kv_num_blocks, mask.full_kv_indices), full)
        assert torch.equal(blocks(mask.full_q_num_blocks, mask.full_q_indices), full.mT)
    else:
        assert mask.full_kv_num_blocks is None
        assert mask.full_q_num_blocks is None


def test_flex_tells_blocks_seen_in_full():
    assert flex.block_mask(32, 40, 31, CPU).full_kv_num_blocks.sum() > 0
    assert flex.block_mask(32, 40, 7, CPU).full_kv_num_blocks is None


@pytest.mark.parametrize(("kernel_size", "most"), [(3, 4), (7, 4), (9, 4), (13, 6), (17, 6)])
def test_flex_visits_few_blocks(kernel_size, most):
    counts, _, transposed, _ = flex.block_lists(64, 64, kernel_size, CPU)
    # (8 + k - 1) x (16 + k - 1) keys from the edge of a tile on
    assert counts.max() <= most
    assert counts.sum() == transposed.sum()


def test_flex_builds_the_mask_of_a_big_grid_in_little_memory():
    flex._block_lists.cache_clear()
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
            nonlocal largest
            out = function(*arguments, **(kwargs or {}))
            for t in tree_leaves(out):
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.untyped_storage().nbytes())
            return out

    with Sizes():
        mask = flex.block_mask(256, 256, 7, CPU)
    assert mask.shape[-2:] == (65536, 33 * 17 * 128)
    # the full mask would be 4.7e9 entries, the blocks are 512 x 561
    assert largest <= 512 * 561 * 8  # as int64


@each_tile
@pytest.mark.parametrize(("h", "w", "kernel_size"), GRIDS)
def test_flex_orders_tokens_by_tiles(h, w, kernel_size, tile):
    x = torch.arange(1, h * w + 1).view(1, h, w, 1, 1).expand(2, h, w, 3, 1)
    ordered = flex.tokens(x, kernel_size, tile)
    expected = [
        y * w + x + 1 if 0 <= y < h and 0 <= x < w else 0
        for y, x in places(h, w, kernel_size, tile)
    ]
    assert ordered.shape == (2, 3, len(expected), 1)
    assert ordered[1, 2, :, 0].tolist() == expected
    assert torch.equal(flex.grid(flex.tokens(x, 1, tile), h, w, tile), x)


@pytest.mark.parametrize("layout", ["own", "qkv"])
@pytest.mark.parametrize(("h", "w", "kernel_size"), [g for g in GRIDS if g != (8, 16, 3)])
def test_flex_is_attention_masked_to_windows(h, w, kernel_size, layout):
    q, k, v = draw((2, h, w, 2, 16), 0, layout=layout)
    out = neighborhood_attention(q, k, v, kernel_size, scale=0.3, backend="flex")
    # float64 on both sides
    torch.testing.assert_close(out, dense(q, k, v, kernel_size, 0.3), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("scale", [0, -0.5])
def test_flex_accepts_a_scale_of_zero_and_below(scale):
    q, k, v = draw((1, 9, 9, 1, 16), 0)
    out = neighborhood_attention(q, k, v, 3, scale=scale, backend="flex")
    torch.testing.assert_close(out, dense(q, k, v, 3, scale), atol=1e-13, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flex_in_few_bits_stays_close_to_float64(dtype):
    q, k, v = draw((1, 13, 10, 2, 16), 0, dtype, "qkv")
    out = neighborhood_attention(q, k, v, 7, scale=0.25, backend="flex")
    exact = dense(q.double(), k.double(), v.double(), 7, 0.25)
    assert out.dtype == dtype
    worst = (out.double() - exact).abs().max() / exact.abs().max()
    assert worst < 8 * torch.finfo(dtype).eps  # as the other backends


def test_flex_ignores_what_no_query_sees():
    q, k, v = draw((1, 9, 20, 1, 16), 0)
    before = neighborhood_attention(q, k, v, 3, scale=1, backend="flex")
    k[:, 8, 19] = v[:, 8, 19] = 1e3
    after = neighborhood_attention(q, k, v, 3, scale=1, backend="flex")
    changed = (after != before).any(-1)[0, :, :, 0]
    assert changed.nonzero().tolist() == [[7, 18], [7, 19], [8, 18], [8, 19]]


@pytest.mark.parametrize(("tile", "full_too"), [((8, 16), False), ((8, 8), False), ((8, 16), True)])
def test_flex_kernel_that_visits_only_the_listed_blocks_agrees(full_too, tile):
    """Uncompiled, flex_attention reads the mask alone; compiled, it skips blocks by the lists."""
    h, w, kernel_size = 20, 37, 7
    q, k, v = draw((1, h, w, 2, 16), 0, torch.float32)
    ordered = flex.tokens(q, 1, tile), *(flex.tokens(x, kernel_size, tile) for x in (k, v))
    mask = flex.block_mask(h, w, kernel_size, CPU, tile, full_too)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.compile itself
        try:
            compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
            out = compiled(*ordered, block_mask=mask, scale=0.25)
        except torch._inductor.exc.InductorError as error:
            pytest.skip(f"torch cannot compile flex_attention on this CPU: {error}"[:300])
    expected = dense(q.double(), k.double(), v.double(), kernel_size, 0.25)
    torch.testing.assert_close(flex.grid(out, h, w, tile).double(), expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize("dynamic", [None, True])
def test_flex_compiles_into_one_graph_of_any_grid(dynamic):
    def f(q, k, v):
        return neighborhood_attention(q * 1, k, v, 3, scale=1, backend="flex") * 2

    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.compile itself
        compiled = torch.compile(f, backend="eager", fullgraph=True, dynamic=dynamic)
        for shape in [(1, 9, 10, 2, 16), (2, 9, 10, 2, 16), (2, 12, 33, 2, 16)]:
            q, k, v = draw(shape, 0)
            expected = 2 * dense(q, k, v, 3, 1)
            torch.testing.assert_close(compiled(q, k, v), expected, atol=1e-12, rtol=1e-12)


def test_flex_compiles_more_shapes_than_torch_compiles_of_one_function():
    for w in range(3, 3 + torch._dynamo.config.recompile_limit + 2):
        q, k, v = draw((1, 3, w, 1, 16), 0)
        out = neighborhood_attention(q, k, v, 3, scale=1, backend="flex")
        torch.testing.assert_close(out, dense(q, k, v, 3, 1), atol=1e-12, rtol=1e-12)


def test_flex_builds_tensors_in_inference_mode_that_autograd_accepts():
    flex._block_lists.cache_clear()
    with torch.inference_mode():
        lists = flex.block_lists(9, 10, 3, CPU)
    assert not any(t.is_inference() for t in lists)


def test_flex_on_a_cpu_runs_without_gradients_alone():
    q, k, v = (t.requires_grad_() for t in draw((1, 8, 16, 1, 16), 0, torch.float32))
    with pytest.raises(ValueError, match=r"backend 'flex' cannot compute .* no gradient on a CPU"):
        neighborhood_attention(q, k, v, 3, scale=1, backend="flex")
    with torch.no_grad():
        out = neighborhood_attention(q, k, v, 3, scale=1, backend="flex")
        torch.testing.assert_close(out, dense(q, k, v, 3, 1), atol=5e-6, rtol=0)


def test_flex_of_an_empty_batch_is_empty():
    q = torch.zeros(0, 4, 5, 2, 16)
    assert neighborhood_attention(q, q, q, 3, scale=1, backend="flex").shape == q.shape


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "mps"}, "CUDA.*not on 'mps'"),
        ({"dtype": torch.float64}, "not in torch.float64"),
        ({"d_head": 8}, "d_head of at least 16, not 8"),
        ({"capability": (6, 1)}, r"7.0 or more, not \(6, 1\)"),
        ({"capability": (7, 5)}, r"8.0 or more for bfloat16, not \(7, 5\)"),
        ({"device": "cpu", "capability": None}, "no gradient on a CPU"),
    ],
)
def test_flex_says_what_it_cannot(monkeypatch, changes, reason):
    monkeypatch.setattr(flex, "_no_triton", lambda: False)
    assert flex.unsupported(problem()) is None
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(flex.unsupported(problem(**changes)))


def test_flex_on_cuda_needs_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "pip install triton" in flex.unsupported(problem())
    assert flex.unsupported(problem(device="cpu", grad=False)) is None
    assert flex.unavailable() is None


def test_flex_before_torch_2_7_wants_a_power_of_two(monkeypatch):
    monkeypatch.setattr(flex, "_no_triton", lambda: False)
    assert flex.unsupported(problem(d_head=48)) is None
    monkeypatch.setattr(flex, "ANY_D_HEAD", False)
    assert "power of two as d_head before 2.7, not 48" in flex.unsupported(problem(d_head=48))
    assert flex.unsupported(problem()) is None


@pytest.mark.parametrize("name", flex.VARIANTS)
@pytest.mark.parametrize(("h", "w", "kernel_size"), [(20, 37, 7), (9, 21, 5), (32, 40, 31)])
def test_each_flex_variant_is_attention_masked_to_windows(h, w, kernel_size, name):
    """As torch computes it on a CPU, which takes the mask and leaves the kernel's options alone."""
    q, k, v = draw((2, h, w, 2, 16), 0)
    out = flex.VARIANTS[name](q, k, v, kernel_size, 0.3)
    torch.testing.assert_close(out, dense(q, k, v, kernel_size, 0.3), atol=1e-12, rtol=1e-12)


def test_flex_backend_is_the_default_variant():
    q, k, v = draw((1, 9, 21, 2, 16), 0)
    out = neighborhood_attention(q, k, v, 5, scale=1, backend="flex")
    assert torch.equal(out, flex.VARIANTS["default"](q, k, v, 5, 1.0))
    assert flex.VARIANTS["default"].options == ()


@pytest.fixture
def with_flash(monkeypatch):
    monkeypatch.setattr(flex, "_no_triton", lambda: False)
    monkeypatch.setattr(flex, "_no_flash", lambda: False)


def test_flex_variants_are_those_that_can(with_flash):
    assert list(flex.variants(problem(grad=False))) == list(flex.VARIANTS)
    assert list(flex.variants(problem())) == ["default", "64x64 steps"]
    assert list(flex.variants(problem(device="cpu"))) == []
    on_cpu = problem(device="cpu", capability=None, grad=False)
    assert list(flex.variants(on_cpu)) == ["default", "64x64 blocks", "64x64 steps"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"grad": True}, "wrong gradients"),
        ({"dtype": torch.float32}, "not in torch.float32"),
        ({"d_head": 256}, "at most 128, not 256"),
        ({"d_head": 36}, "8 divides"),
        ({"capability": (8, 0)}, r"not on \(8, 0\)"),
        ({"capability": None}, "not on None"),
        ({"device": "cpu"}, "runs on CUDA, not on 'cpu'"),
        ({"device": "mps"}, "on CUDA, and without gradients on a CPU"),
    ],
)
def test_flex_flash_says_what_it_cannot(with_flash, changes, reason):
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(
            flex.VARIANTS["flash"].unsupported(problem(**({"grad": False} | changes)))
        )


def test_flex_flash_wants_its_package_and_a_torch_that_knows_it(monkeypatch):
    monkeypatch.setattr(flex, "_no_triton", lambda: False)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    flash, forward = flex.VARIANTS["flash"], problem(grad=False)
    assert "pip install --pre flash-attn-4" in flash.unsupported(forward)
    monkeypatch.setattr(flex.torch_flex, "FlexKernelOptions", None)
    assert "has no FLASH backend" in flash.unsupported(forward)


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_flex_steps_on_cuda_divide_the_blocks_of_each_variant(monkeypatch, with_flash, capability):
    """Else inductor refuses: forward by the steps that it ends with, backward by its own steps."""
    heuristics = pytest.importorskip("torch._inductor.template_heuristics.triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)
    torchs = heuristics.CUDAConfigHeuristic()
    for dtype in (torch.float32, torch.bfloat16):
        for d_head in (16, 32, 64, 96, 128):
            (fwd,) = torchs.get_flex_attn_fwd_configs(d_head, dtype)
            (bwd,) = torchs.get_flex_attn_bwd_configs(d_head, dtype)
            own = {"fwd_BLOCK_M": fwd.block_m, "fwd_BLOCK_N": fwd.block_n}
            backward = {
                f"bwd_BLOCK_{a}{i}": getattr(bwd, f"block_{a.lower()}{i}")
                for a in "MN"
                for i in "12"
            }
            for grad in (False, True):
                asked = problem(dtype=dtype, d_head=d_head, capability=capability, grad=grad)
                for name, variant in flex.variants(asked).items():
                    if name == "flash":  # no kernel of inductor's
                        continue
                    size = variant.tile[0] * variant.tile[1]
                    steps = [(own | dict(variant.options))[key] for key in own]
                    if grad:
                        steps += [*backward.values()]
                        steps += [(backward | dict(variant.options))[key] for key in backward]
                    assert [step for step in steps if size % step] == [], (name, dtype, d_head)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "kernel_size", "layout"),
    [
        ((2, 32, 32, 2, 64), 7, "qkv"),
        ((1, 9, 21, 3, 32), 5, "own"),
        ((1, 32, 40, 1, 16), 31, "own"),
        ((1, 19, 33, 2, 128), 17, "qkv"),
    ],
)
def test_flex_on_cuda_stays_close_to_float64(shape, kernel_size, layout, dtype):
    *qkv, out_grad = *draw(shape, 0, dtype, layout), draw(shape, 1, dtype)[0]
    scale = shape[-1] ** -0.5
    actual = value_and_gradients(
        lambda q, k, v: neighborhood_attention(q, k, v, kernel_size, scale=scale, backend="flex"),
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
        # the weights are rounded to the dtype before each product, once more than on a CPU
        assert worst < 16 * torch.finfo(dtype).eps


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", [name for name in flex.VARIANTS if name != "default"])
def test_each_flex_variant_on_cuda_stays_close_to_float64(name, grad, dtype):
    shape, kernel_size = (2, 20, 37, 2, 64), 7
    here = torch.cuda.get_device_capability()
    variant = flex.VARIANTS[name]
    if reason := variant.unsupported(Problem("cuda", dtype, 20, 37, 7, 64, grad, here)):
        pytest.skip(reason)
    *qkv, out_grad = *draw(shape, 0, dtype), draw(shape, 1, dtype)[0]

    def run(f, qkv, out_grad):
        return value_and_gradients(f, qkv, out_grad) if grad else (f(*qkv),)

    actual = run(
        lambda q, k, v: variant(q, k, v, kernel_size, 0.125),
        [t.cuda() for t in qkv],
        out_grad.cuda(),
    )
    expected = run(
        lambda q, k, v: dense(q, k, v, kernel_size, 0.125),
        [t.double() for t in qkv],
        out_grad.double(),
    )
    for few_bits, exact in zip(actual, expected, strict=True):
        worst = (few_bits.cpu().double() - exact).abs().max() / exact.abs().max()
        assert worst < 16 * torch.finfo(dtype).eps  # as the default's


class Block(torch.nn.Module):
    """A projection on each side of the attention, as a model has it."""

    def __init__(self, width, d_head):
        super().__init__()
        self.d_head = d_head
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.out = torch.nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.d_head)).unbind(3)
        x = neighborhood_attention(q, k, v, 7, scale=self.d_head**-0.5, backend="flex")
        return self.out(x.flatten(-2))


@pytest.mark.gpu
@needs_gpu
def test_flex_compiles_within_a_model_on_cuda():
    torch.manual_seed(0)
    model = Block(64, 32).cuda()
    x = torch.randn(2, 24, 20, 64, device="cuda")
    eager = model(x)
    expected = torch.autograd.grad(eager.sin().sum(), list(model.parameters()))
    model.compile(fullgraph=True)
    compiled = model(x)
    gradients = torch.autograd.grad(compiled.sin().sum(), list(model.parameters()))
    # both in float32, summed in other orders
    torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients, expected, atol=1e-3, rtol=1e-4)
