"""The kept tables of angles follow what they are made of."""

import threading
from copy import deepcopy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hdit.models import HDiTSpec, build
from hdit.nn.rope import AxialRoPE, axial_positions
from hdit.protocols import Cond, DataShape

SHAPE = DataShape(3, 16, 16, 0, 0.5)
SPEC = HDiTSpec.model_validate({
    "patch_size": 2,
    "levels": [{"depth": 1, "width": 16, "attention": {
        "kind": "neighborhood", "d_head": 8, "kernel_size": 3}}, {"depth": 1, "width": 64}],
})  # fmt: skip


def network():
    torch.manual_seed(0)
    model = build(SPEC, SHAPE).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else None
    return model


def fresh(model, x):
    """What a copy says that has kept nothing."""
    other = build(SPEC, SHAPE).to(x.dtype).eval()
    other.load_state_dict(model.state_dict())
    return other(x, torch.zeros(len(x), dtype=x.dtype), Cond())


@torch.no_grad()
@pytest.mark.parametrize(
    "change", ["load_state_dict", "assign", "double", "written", "another size", "deepcopy"]
)
def test_a_kept_table_is_made_anew_when_what_it_is_made_of_changes(change):
    model, x = network(), torch.randn(1, 3, 16, 16)
    model(x, torch.zeros(1), Cond())  # keeps tables
    other = {name: t * 1.3 for name, t in model.state_dict().items()}
    if change == "load_state_dict":
        model.load_state_dict(other)
    elif change == "assign":
        model.load_state_dict(other, assign=True)
    elif change == "double":
        model, x = model.double(), x.double()
    elif change == "written":
        for name, buffer in model.named_buffers():
            if name.endswith("freqs"):
                buffer.mul_(1.5)
    elif change == "another size":
        for size in ((16, 32), (32, 16), (16, 16), (32, 32)):
            y = torch.randn(1, 3, *size)
            torch.testing.assert_close(model(y, torch.zeros(1), Cond()), fresh(model, y))
    elif change == "deepcopy":
        model = deepcopy(model)
        model.load_state_dict(other)
    out = model(x, torch.zeros(1, dtype=x.dtype), Cond())
    torch.testing.assert_close(out, fresh(model, x))


def test_tables_are_made_once_for_the_positions_of_a_grid(monkeypatch):
    made, table = [], AxialRoPE.table
    monkeypatch.setattr(AxialRoPE, "table", lambda self, pos: made.append(1) or table(self, pos))
    model, x = network(), torch.randn(1, 3, 16, 16)
    for _ in range(3):
        model(x, torch.zeros(1), Cond())
    layers = sum(isinstance(module, AxialRoPE) for module in model.modules())
    assert len(made) == layers


def test_a_model_made_in_inference_mode_runs_in_it_and_a_fake_run_leaves_no_trace():
    with torch.inference_mode():
        model = network()
        inside = model(torch.ones(1, 3, 16, 16), torch.zeros(1), Cond())
        assert torch.equal(model(torch.ones(1, 3, 16, 16), torch.zeros(1), Cond()), inside)
    model = network()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model(torch.ones(1, 3, 16, 16), torch.zeros(1), Cond())
    out = model(torch.ones(1, 3, 16, 16), torch.zeros(1), Cond())
    assert type(out.detach()) is torch.Tensor
    torch.testing.assert_close(out, inside)


def test_threads_that_share_a_model_do_not_take_each_others_tables():
    model, wrong = network(), []
    sizes = ((16, 16), (32, 16))
    images = {size: torch.randn(1, 3, *size) for size in sizes}
    with torch.no_grad():
        expected = {size: fresh(model, x) for size, x in images.items()}

    def run(size):
        with torch.no_grad():
            for _ in range(40):
                out = model(images[size], torch.zeros(1), Cond())
                if not torch.allclose(out, expected[size], atol=1e-5):
                    wrong.append(size)

    threads = [threading.Thread(target=run, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_table_is_that_of_the_angles():
    rope, pos = AxialRoPE(2, 8), axial_positions(3, 5)
    table, angles = rope(pos), rope.angles(pos)  # (8 2 2 2), (3 5 2 4)
    torch.testing.assert_close(table[:3, 0], angles[:, 0, :, :2].cos())
    torch.testing.assert_close(table[3:, 1], angles[0, :, :, 2:].sin())
