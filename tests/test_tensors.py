"""Files of tensors."""

import os
from pathlib import Path

import pytest
import torch

from hdit.tensors import NotFiniteError, check_finite, is_finite, save_tensors

PACKAGE = Path(__file__).parents[1] / "hdit"
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_weights_can_be_read_by_whom_the_umask_lets(tmp_path, mask):
    old = os.umask(mask)
    try:
        save_tensors({"a": torch.zeros(2, 3).T}, tmp_path / "a.safetensors")
        (tmp_path / "b").touch()
    finally:
        os.umask(old)
    modes = [(tmp_path / name).stat().st_mode for name in ("a.safetensors", "b")]
    assert modes[0] == modes[1]


def test_weights_are_written_in_one_place():
    callers = [path for path in PACKAGE.rglob("*.py") if "save_file(" in path.read_text()]
    assert [path.name for path in callers] == ["tensors.py"]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_one_value_that_is_not_finite_is_seen_wherever_it_is(dtype):
    x = torch.linspace(-1, 1, 5000).to(dtype)
    assert is_finite(x.view(50, 100))
    for place, value in ((0, "nan"), (2500, "inf"), (4999, "-inf")):
        bad = x.clone()
        bad[place] = float(value)
        assert not is_finite(bad.view(50, 100))


@pytest.mark.parametrize(
    "x", [torch.zeros(0), torch.tensor(2**62), torch.tensor([True]), torch.tensor(1.0)], ids=repr
)
def test_what_has_no_such_value_is_finite(x):
    assert is_finite(x)


def test_largest_numbers_are_finite():
    for dtype in FLOATS:
        assert is_finite(torch.full((9,), torch.finfo(dtype).max, dtype=dtype))


def test_tensor_that_is_not_finite_is_named_with_how_much_of_it():
    tensors = {"a": torch.ones(3), "b.w": torch.tensor([[1.0, torch.nan], [torch.inf, 0.0]])}
    words = r"^it: the tensor 'b\.w' has 2 of 4 values that are not finite; mend it$"
    with pytest.raises(NotFiniteError, match=words):
        check_finite(tensors, "it", "mend it")
    check_finite({"n": torch.tensor(2**62), "a": torch.ones(3, dtype=torch.bfloat16)}, "it")
    with pytest.raises(NotFiniteError, match="'large' has 1 of 1 values"):
        check_finite({"large": torch.tensor([1e300], dtype=torch.float64)}, "it")
