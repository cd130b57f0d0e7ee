import gzip
import struct
import sys

import numpy as np
import pytest
from PIL import Image

from hdit.errors import UserError
from scripts import unpack_fashion

SIZES = {"train": 30, "t10k": 10}


@pytest.fixture
def files(tmp_path):
    """The four files, small: (folder, images, labels by stem)."""
    random = np.random.default_rng(0)
    folder, made = tmp_path / "idx", {}
    folder.mkdir()
    for stem, n in SIZES.items():
        images = random.integers(0, 256, (n, 28, 28), np.uint8)
        labels = random.permutation(n).astype(np.uint8) % 10
        made[stem] = images, labels
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            path = folder / f"{stem}-{name}-ubyte.gz"
            path.write_bytes(gzip.compress(head + array.tobytes()))
    return folder, made


@pytest.fixture
def call(monkeypatch, tmp_path):
    def call(source, out=tmp_path / "fashion"):
        monkeypatch.setattr(sys, "argv", ["unpack_fashion.py", str(source), "--out", str(out)])
        unpack_fashion.main()
        return out

    return call


def test_each_picture_lies_in_the_folder_of_its_class(files, call):
    folder, made = files
    out = call(folder)
    assert sorted(p.name for p in (out / "test").iterdir()) == sorted(unpack_fashion.CLASSES)
    for split, stem in (("train", "train"), ("test", "t10k")):
        images, labels = made[stem]
        assert len(list((out / split).rglob("*.png"))) == len(images)
        for i, label in enumerate(labels):
            path = out / split / unpack_fashion.CLASSES[label] / f"{i:05d}.png"
            assert (np.asarray(Image.open(path)) == images[i]).all()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), r"t10k-labels.*is not there"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "cannot be read"),
        (lambda path: path.write_bytes(b"<html>"), "cannot be read"),
        (lambda path: path.write_bytes(gzip.compress(b"\0\0\x0d\1")), "is no IDX file"),
        (
            lambda path: path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1])),
            r"says that it holds \(10,\), and has 9 bytes",
        ),
        (
            lambda path: path.write_bytes(gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 1, 3]))),
            "not one label of 0 to 9 for each image",
        ),
    ],
)
def test_damaged_file_is_named_and_nothing_is_left(files, call, tmp_path, damage, message):
    folder, _ = files
    damage(folder / "t10k-labels-idx1-ubyte.gz")
    with pytest.raises(UserError, match=message):
        call(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["idx"]


def test_folder_that_is_there_is_left_alone(files, call, tmp_path):
    (tmp_path / "fashion").mkdir()
    with pytest.raises(UserError, match="is there already"):
        call(files[0])
