"""Files of tensors."""

import os

import pytest
import torch

from hdit.tensors import save_tensors


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
