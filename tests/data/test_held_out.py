"""Which images are held out: by what they hold alone, for each kind of source."""

import hashlib
import json
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hdit.data import (
    DigitsSpec,
    FolderSpec,
    HubSpec,
    NpzSpec,
    PythonSpec,
    ShapesSpec,
    TarSpec,
    ZipSpec,
    check,
)
from hdit.data.held_out import (
    UNREADABLE,
    HeldOut,
    class_indices,
    content_hashes,
    divide,
    divisible,
    open_path,
    shared,
)
from hdit.data.source import DataError

COUNT = 40


class Held:
    """A source of nothing but contents."""

    def __init__(self, contents: list[bytes]):
        self.contents, self.classes = contents, list[str]()

    def __len__(self):
        return len(self.contents)

    def __getitem__(self, index):
        return self.contents[index]

    def content(self, index):
        return self.contents[index]

    def part(self, indices):
        return Held([self.contents[i] for i in indices])


def sides(contents: list[bytes], share: float) -> tuple[list[bytes], list[bytes]]:
    """(training, held out), where either may be empty: two that never are stand beside them."""
    ends = [b"low 79", b"high 8"]  # at 0.0056 and 0.977
    source = Held([*contents, *ends])
    training, held_out = divide(source, share, content_hashes(source, range(len(source))))
    return training.contents, held_out.source.contents


def position(content: bytes) -> float:
    """Where the hash of a content lies between 0 and 1."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") / 2**64


CONTENTS = st.lists(st.binary(max_size=4), max_size=30)
SHARES = st.floats(0.02, 0.9)


@settings(max_examples=60, deadline=None)
@given(CONTENTS, CONTENTS, SHARES)
def test_side_of_an_image_is_a_function_of_its_content_alone(some, others, share):
    """Others that come first move none, and duplicates are on one side."""
    training, held_out = sides([*others, *some], share)
    assert all(position(content) >= share for content in training)
    assert all(position(content) < share for content in held_out)
    assert len(training) + len(held_out) == len(some) + len(others) + 2


@settings(max_examples=40, deadline=None)
@given(CONTENTS, st.tuples(SHARES, SHARES))
def test_larger_share_holds_out_the_same_images_and_more(contents, shares):
    low, high = (sides(contents, share)[1] for share in sorted(shares))
    assert set(low) <= set(high)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.binary(max_size=6), min_size=1, max_size=30, unique=True), st.randoms())
def test_order_of_validation_is_that_of_the_hashes_whatever_that_of_the_files(contents, random):
    expected = sorted(contents, key=position)[:7]
    random.shuffle(contents)
    source = Held(contents)
    held_out = HeldOut(source, content_hashes(source, range(len(source))))
    assert held_out.fixed(7).contents == expected


def test_share_that_leaves_one_side_empty_is_refused():
    source = Held([b"a", b"b"])
    hashes = content_hashes(source, [0, 1])
    with pytest.raises(DataError, match=r"data.held_out: the share 0.001 holds out none of 2"):
        divide(source, 0.001, hashes)
    with pytest.raises(DataError, match=r"0.999 holds out all of 2 images; lower it"):
        divide(source, 0.999, hashes)


# ---- each kind of source -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """COUNT images in two classes, and a copy of the first under another name and class."""
    root, rng = tmp_path_factory.mktemp("held-out") / "photos", np.random.default_rng(0)
    for i in range(COUNT):
        path = root / ("cat" if i % 2 else "dog") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).save(path)
    shutil.copy(root / "dog" / "00.png", root / "cat" / "copy.png")
    return root


def stored(root: Path) -> dict[bytes, float]:
    """The bytes of all images, and where their hashes lie."""
    contents = [path.read_bytes() for path in root.rglob("*.png")]
    return {content: position(content) for content in contents}


def open_kind(kind: str, folder: Path, tmp_path: Path):
    files = sorted(folder.rglob("*.png"))
    size = {"size": (6, 6)}
    if kind == "folder":
        return FolderSpec(path=str(folder), **size).open()
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path in files:
                archive.write(path, path.relative_to(folder))
        return ZipSpec(path=str(tmp_path / "a.zip"), **size).open()
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i, path in enumerate(files):
            archive.add(path, f"{i:03d}.png")
    return check.by_index(TarSpec(path=str(tmp_path / "a.tar"), **size).open())


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_files_are_divided_by_the_bytes_that_they_are_stored_in(kind, folder, tmp_path):
    source = open_kind(kind, folder, tmp_path)
    positions = stored(folder)
    training, held_out = divide(source, 0.3, content_hashes(source, range(len(source))))
    assert len(training) + len(held_out.source) == COUNT + 1
    ours, theirs = (
        {part.content(i) for i in range(len(part))} for part in (training, held_out.source)
    )
    assert theirs == {content for content, place in positions.items() if place < 0.3}
    assert ours == positions.keys() - theirs
    names = [held_out.source.entries.name(i) for i in range(len(held_out.source))]
    for i, name in enumerate(names if kind == "folder" else []):
        assert held_out.source[i].label == ["cat", "dog"].index(Path(name).parent.name)


def test_no_held_out_image_stands_in_for_a_bad_one(folder, tmp_path):
    """Every second training image is damaged, and one file is not there at all."""
    root = tmp_path / "photos"
    shutil.copytree(folder, root)
    ours = [path for path in sorted(root.rglob("*.png")) if position(path.read_bytes()) >= 0.5]
    for path in ours[::2]:
        tries = (f"no image {path} {n}".encode() for n in range(100))
        path.write_bytes(next(content for content in tries if position(content) >= 0.5))
    (root / "cat" / "gone.png").symlink_to(tmp_path / "nowhere")
    source = FolderSpec(path=str(root), size=(6, 6), max_bad_share=1.0).open()
    hashes = content_hashes(source, range(len(source)))
    assert (hashes == UNREADABLE).sum() == 1
    training, held_out = divide(source, 0.5, hashes)
    drawn = [training[i] for i in range(len(training))]
    assert sum(len(sample.skipped) > 0 for sample in drawn) == len(ours[::2]) + 1
    theirs = {held_out.source[i].image.numpy().tobytes() for i in range(len(held_out.source))}
    assert not {sample.image.numpy().tobytes() for sample in drawn} & theirs


def test_arrays_digits_and_shapes_are_divided_by_their_pixels(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (COUNT, 6, 6, 3), np.uint8)
    images[1] = images[0]
    np.savez(tmp_path / "a.npz", arr_0=images, arr_1=np.arange(COUNT) % 2)
    for source in (
        NpzSpec(path=str(tmp_path / "a.npz"), size=(6, 6)).open(),
        DigitsSpec().open(),
        ShapesSpec(size=(8, 8), num_images=COUNT).open(),
    ):
        hashes = content_hashes(source, range(len(source)))
        training, held_out = divide(source, 0.4, hashes)
        everyone, ours, theirs = (
            [(s.image.numpy().tobytes(), s.label) for s in map(part.__getitem__, range(len(part)))]
            for part in (source, training, held_out.source)
        )
        assert sorted([*ours, *theirs]) == sorted(everyone)
        assert not {image for image, _ in ours} & {image for image, _ in theirs}
        again = content_hashes(held_out.source, range(len(held_out.source)))
        assert np.array_equal(again, held_out.hashes)


HOOK = """
import numpy as np
from PIL import Image
class Pets:
    classes = ["cat", "dog"]
    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.images = self.rng.integers(0, 256, (40, 6, 6, 3), np.uint8)
    def __len__(self):
        return 40
    def __getitem__(self, index):
        return Image.fromarray(self.images[index]), index % 2
class Moving(Pets):
    def __getitem__(self, index):
        return Image.fromarray(self.rng.integers(0, 256, (6, 6, 3), np.uint8)), index % 2
def same():
    return Pets(0)
def new():
    return Moving(0)
"""


def test_data_of_a_hook_is_divided_unless_it_is_new_each_time(tmp_path, monkeypatch):
    (tmp_path / "held_out_pets.py").write_text(HOOK)
    monkeypatch.chdir(tmp_path)
    source = PythonSpec(hook="held_out_pets:same", size=(6, 6)).open()
    training, held_out = divide(source, 0.4, content_hashes(source, range(len(source))))
    assert len(training) + len(held_out.source) == 40
    moving = PythonSpec(hook="held_out_pets:new", size=(6, 6)).open()
    with pytest.raises(DataError, match=r"data.held_out: item 0 .* another image each time"):
        content_hashes(moving, range(40))


def test_data_set_of_hugging_face_is_divided_by_its_files(folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    files = sorted(folder.rglob("*.png"))
    table = datasets.Dataset.from_dict({"image": [str(p) for p in files]})
    table = table.cast_column("image", datasets.Image())
    table.save_to_disk(tmp_path / "saved")
    source = HubSpec(path=str(tmp_path / "saved"), size=(6, 6)).open()
    assert {source.content(i) for i in range(len(source))} == stored(folder).keys()


def test_share_of_a_stream_is_refused(folder, tmp_path):
    open_kind("tar", folder, tmp_path)
    stream = TarSpec(path=str(tmp_path / "a.tar"), size=(6, 6)).open()
    with pytest.raises(DataError, match=r"data.held_out: no share can be split off tar files"):
        divisible(stream)


# ---- a path --------------------------------------------------------------------------------------


def test_path_of_another_kind_has_the_crop_and_the_classes_of_the_data(folder, tmp_path):
    data = FolderSpec(path=str(folder), size=(4, 4), channels=1)
    with tarfile.open(tmp_path / "test.tar", "w") as archive:
        for i, path in enumerate(sorted((folder / "dog").iterdir())[:5]):
            archive.add(path, f"{i:03d}.png")
            (tmp_path / "label.cls").write_text("dog")
            archive.add(tmp_path / "label.cls", f"{i:03d}.cls")
    held = open_path(data, str(tmp_path / "test.tar"), ["cat", "dog"])
    assert [held[i].label for i in range(5)] == [1] * 5
    first = FolderSpec(path=str(folder), size=(4, 4), channels=1).open()[COUNT // 2 + 1]
    assert torch.equal(held[0].image, first.image)
    hashes = content_hashes(first_source := data.open(), range(len(first_source)))
    assert shared(hashes, HeldOut(held, content_hashes(held, range(5)))) == 5


def test_classes_are_matched_by_name_and_unknown_ones_refused():
    assert class_indices(["c", "a"], ["a", "b", "c"], "test") == [2, 0]
    assert class_indices([], [], "test") == []
    with pytest.raises(DataError, match=r"data.held_out: 'test' has classes that .*: 'd'; the"):
        class_indices(["a", "d"], ["a", "b", "c"], "test")
    with pytest.raises(DataError, match=r"the data has 1 classes, but 'test' has none"):
        class_indices([], ["a"], "test")


def test_path_that_is_not_there_names_its_setting(folder, tmp_path):
    data = FolderSpec(path=str(folder), size=(4, 4))
    with pytest.raises(DataError, match=r"^data.held_out: .*none' does not exist.*data.held_out=P"):
        open_path(data, str(tmp_path / "none"), [])
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(DataError, match=r"^data.held_out: .* is a file of weights, and no data"):
        open_path(data, str(tmp_path / "model.safetensors"), [])


def test_data_check_reads_what_is_trained_on_and_tells_what_is_held_out(folder, tmp_path, hdit):
    toml = tmp_path / "photos.toml"
    toml.write_text(
        f'[data]\npath = "{folder}"\nsize = 8\nheld_out = 0.3\n'
        '[model]\nkind = "dit"\npatch_size = 2\nwidth = 32\ndepth = 1\nnum_heads = 2\n'
        "[training]\nimages = 16\ncheckpoint_every = 16\nbatch_size = 8\n"
    )
    below = sum(place < 0.3 for place in stored(folder).values())
    sheet = ("--sheet", str(tmp_path / "sheet.png"), "--workers", "0")
    status, out, err = hdit("data", "check", str(toml), "--json", *sheet)
    assert status == 0, err
    report = json.loads(out)
    copies = COUNT + 1 - len(stored(folder))
    assert report["images"] + report["held_out"] == COUNT + 1
    assert below <= report["held_out"] <= below + copies
    status, out, _ = hdit("data", "check", str(toml), *sheet)
    assert f"{report['held_out']} images, which are not among these" in out
    status, out, _ = hdit("info", str(toml), "--set", "training.validate_every=8")
    assert "Validated every 8 images on up to 1,000, a share of 0.3 of the images" in out
