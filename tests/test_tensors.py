"""Files of tensors."""

import os

import pytest
import torch

from hdit.tensors import open_tensors, save_tensors


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


@pytest.mark.parametrize("name", [b"plain", b"caf\xe9", "caf\u00e9".encode()])
def test_tensors_are_read_under_any_name(tmp_path, name):
    path = tmp_path / os.fsdecode(name)
    save_tensors({"a": torch.arange(5)}, path)
    file = open_tensors(path)
    assert file.get_tensor("a").tolist() == [0, 1, 2, 3, 4]
    assert file.get_slice("a")[1:3].tolist() == [1, 2]
