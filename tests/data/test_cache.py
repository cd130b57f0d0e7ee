"""Decoded images on disk: the same images as without, whatever became of images and rows."""

import errno
import io
import os
import pickle
import shutil
import zipfile
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from hdit.data import FolderSpec, HubSpec, NpzSpec, ZipSpec
from hdit.data.batches import Batches, Layout
from hdit.data.cache import Cache
from hdit.data.images import ImagesSpec
from hdit.data.source import DataError

CLASSES = ["cat", "dog", "eel"]
COUNT = 12
SETTINGS = {"size": (8, 10)}


def pixels() -> np.ndarray:
    """(n h w c), larger than they are wanted."""
    return np.random.default_rng(0).integers(0, 256, (COUNT, 20, 21, 3), np.uint8)


def encoded(image: np.ndarray, fmt: str = "png") -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, fmt)
    return file.getvalue()


def write_folder(path) -> FolderSpec:
    for i, image in enumerate(pixels()):
        (path / CLASSES[i // 4]).mkdir(parents=True, exist_ok=True)
        (path / CLASSES[i // 4] / f"{i:02}.png").write_bytes(encoded(image))
    return FolderSpec(path=str(path), **SETTINGS)


def write_zip(path) -> ZipSpec:
    with zipfile.ZipFile(path.with_suffix(".zip"), "w") as file:
        for i, image in enumerate(pixels()):
            file.writestr(f"{CLASSES[i // 4]}/{i:02}.png", encoded(image))
    return ZipSpec(path=str(path.with_suffix(".zip")), **SETTINGS)


def write_npz(path) -> NpzSpec:
    np.savez(path.with_suffix(".npz"), pixels(), np.arange(COUNT) // 4)
    return NpzSpec(path=str(path.with_suffix(".npz")), **SETTINGS)


def write_hub(path) -> HubSpec:
    datasets = pytest.importorskip("datasets", reason="needs hdit[data]: datasets is not installed")
    table = datasets.Dataset.from_dict(
        {
            "image": [{"bytes": encoded(image), "path": None} for image in pixels()],
            "label": [i // 4 for i in range(COUNT)],
        },
        features=datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)}
        ),
    )
    table.save_to_disk(str(path))
    return HubSpec(path=str(path), **SETTINGS)


SOURCES = {"folder": write_folder, "zip": write_zip, "npz": write_npz, "hub": write_hub}


@pytest.fixture
def folder(tmp_path) -> FolderSpec:
    return write_folder(tmp_path / "data")


@pytest.fixture
def cached(folder, tmp_path) -> FolderSpec:
    return kept(folder, tmp_path)


def kept(spec: ImagesSpec, tmp_path, **changes) -> ImagesSpec:
    return type(spec)(**(dict(spec) | {"cache": str(tmp_path / "cache")} | changes))


def contents(source) -> list[tuple[bytes, int, tuple]]:
    samples = [source[i] for i in range(len(source))]
    assert {sample.image.shape for sample in samples} == {source.spec.shape}
    assert {sample.image.dtype for sample in samples} == {torch.uint8}
    return [(s.image.numpy().tobytes(), s.label, s.skipped) for s in samples]


def decoded(source) -> list[int]:
    """The images that a pass over the source decodes."""
    load, seen = source.entries.load, []
    source.entries.load = lambda index: seen.append(index) or load(index)
    contents(source)
    source.entries.load = load
    return seen


# ---- the same images -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SOURCES)
def test_cache_gives_the_images_of_the_images_and_decodes_each_once(tmp_path, kind):
    spec = SOURCES[kind](tmp_path / "data")
    expected = contents(spec.open())
    source = kept(spec, tmp_path).open()
    assert decoded(source) == list(range(COUNT))
    assert decoded(source) == []
    assert contents(source) == expected
    again = kept(spec, tmp_path).open()  # as in the next run
    assert decoded(again) == []
    assert contents(again) == expected


def test_cache_of_a_full_pass_opens_no_image(cached, monkeypatch):
    expected = contents(cached.open())

    def fail(*arguments):
        raise AssertionError("Pillow was asked for an image")

    monkeypatch.setattr(Image, "open", fail)
    assert contents(cached.open()) == expected


def test_cache_is_filled_and_read_by_worker_processes(folder, tmp_path):
    def drawn(source, workers):
        layout = Layout(6)
        parts = islice(Batches(source, seed=1, start=0, layout=layout, workers=workers), 4)
        return [(batch.images, batch.labels) for batch in parts]

    plain = drawn(folder.open(), 0)
    cached = kept(folder, tmp_path)
    for source in (cached.open(), cached.open()):
        for (a, b), (c, d) in zip(drawn(source, 2), plain, strict=True):
            assert torch.equal(a, c)
            assert torch.equal(b, d)
    assert decoded(cached.open()) == [], "the workers of the first left what they decoded"


def test_cache_survives_a_pickle_as_workers_that_are_no_forks_need(cached):
    source = cached.open()
    expected = contents(source)
    again = pickle.loads(pickle.dumps(source))
    assert decoded(again) == []
    assert contents(again) == expected


def test_cache_gives_images_of_their_own(cached):
    source = cached.open()
    first = contents(source)
    source[0].image.zero_()
    source[0].image.zero_()
    assert contents(source) == first


# ---- images that change ------------------------------------------------------------------------


def test_image_that_was_changed_is_decoded_again(cached, tmp_path):
    source = cached.open()
    contents(source)
    (tmp_path / "data" / "dog" / "05.png").write_bytes(encoded(255 - pixels()[5]))
    for fresh in (False, True):  # in the same run, and in the next
        source = cached.open() if fresh else source
        assert decoded(source) == ([] if fresh else [5])
        assert contents(source) == contents(kept(cached, tmp_path, cache=None).open())


@pytest.mark.parametrize("what", ["time", "size"])
def test_image_of_the_same_size_or_the_same_time_is_decoded_again(cached, tmp_path, what):
    path = tmp_path / "data" / "dog" / "05.png"
    path.write_bytes(encoded(pixels()[5], "bmp"))  # the same bytes for any content
    before = path.stat()
    contents(cached.open())
    if what == "time":
        path.write_bytes(encoded(255 - pixels()[5], "bmp"))
        assert path.stat().st_size == before.st_size
        os.utime(path, ns=(0, before.st_mtime_ns + 1))
    else:
        path.write_bytes(encoded(255 - pixels()[5]))
        os.utime(path, ns=(0, before.st_mtime_ns))
    assert decoded(cached.open()) == [5]
    assert contents(cached.open()) == contents(kept(cached, tmp_path, cache=None).open())


def test_member_of_a_zip_that_was_changed_is_decoded_again(tmp_path):
    spec = kept(write_zip(tmp_path / "data"), tmp_path)
    contents(spec.open())
    with zipfile.ZipFile(spec.path, "w") as file:
        for i, image in enumerate(pixels()):
            image = 255 - image if i == 5 else image
            file.writestr(f"{CLASSES[i // 4]}/{i:02}.png", encoded(image))
    assert decoded(spec.open()) == [5]
    assert contents(spec.open()) == contents(kept(spec, tmp_path, cache=None).open())


def test_class_that_was_added_moves_labels_and_indices(cached, tmp_path):
    contents(cached.open())
    shutil.copytree(tmp_path / "data" / "eel", tmp_path / "data" / "bee")
    source = cached.open()
    assert source.classes == ["bee", *CLASSES]
    assert contents(source) == contents(kept(cached, tmp_path, cache=None).open())
    assert [source[i].label for i in range(16)] == [i // 4 for i in range(16)]


def test_class_that_took_the_place_of_another_has_its_own_images(cached, tmp_path):
    """As many images as before, and the same names of files, at other indices."""
    contents(cached.open())
    (tmp_path / "data" / "cat").rename(tmp_path / "data" / "fox")
    source = cached.open()
    assert source.classes == ["dog", "eel", "fox"]
    assert contents(source) == contents(kept(cached, tmp_path, cache=None).open())


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_label_that_a_sheet_changed_is_the_new_one(tmp_path, kind):
    """Of images that stay as they are, under the same indices."""

    def write(labels):
        files = {f"{i:02}.png": encoded(image) for i, image in enumerate(pixels())}
        rows = [f"{name},{label}" for name, label in zip(files, labels, strict=True)]
        files["metadata.csv"] = "\n".join(["file_name,label", *rows]).encode()
        if kind == "folder":
            (tmp_path / "sheet").mkdir(exist_ok=True)
            for name, content in files.items():
                if not (tmp_path / "sheet" / name).exists() or name == "metadata.csv":
                    (tmp_path / "sheet" / name).write_bytes(content)
            return kept(FolderSpec(path=str(tmp_path / "sheet"), **SETTINGS), tmp_path)
        with zipfile.ZipFile(tmp_path / "sheet.zip", "w") as file:
            for name, content in files.items():
                file.writestr(name, content)
        return kept(ZipSpec(path=str(tmp_path / "sheet.zip"), **SETTINGS), tmp_path)

    for labels in ([0] * 6 + [1] * 6, [0] * 5 + [1] * 7):
        source = write(labels).open()
        assert [label for _, label, _ in contents(source)] == labels
        assert [label for _, label, _ in contents(source)] == labels


# ---- rows that are damaged -----------------------------------------------------------------------

HEADER = 20  # bytes of a row before its pixels
ROW = HEADER + 3 * 8 * 10


def cache_file(tmp_path):
    [path] = (tmp_path / "cache").iterdir()
    return path


@pytest.mark.parametrize("at", [0, 4, 12, 19, HEADER, ROW - 1])
def test_row_that_is_torn_is_decoded_again_and_mended(cached, tmp_path, at):
    expected = contents(cached.open())
    path = cache_file(tmp_path)
    whole = path.read_bytes()
    assert len(whole) == COUNT * ROW
    torn = bytearray(whole)
    torn[7 * ROW + at] ^= 0x10
    path.write_bytes(torn)
    source = cached.open()
    assert contents(source) == expected
    assert path.read_bytes() == whole
    path.write_bytes(torn)
    assert decoded(cached.open()) == [7]
    assert decoded(cached.open()) == []


def test_cache_that_is_cut_or_full_of_zeros_is_filled_anew(cached, tmp_path):
    expected = contents(cached.open())
    path = cache_file(tmp_path)
    whole = path.read_bytes()
    for left in (5 * ROW + 30, 0):
        os.truncate(path, left)
        assert decoded(cached.open()) == list(range(left // ROW, COUNT))
        assert path.read_bytes() == whole
    path.write_bytes(bytes(len(whole)))
    assert contents(cached.open()) == expected
    assert path.read_bytes() == whole


def test_rows_that_were_swapped_are_decoded_again(cached, tmp_path):
    """Each is whole, but of another image."""
    expected = contents(cached.open())
    path = cache_file(tmp_path)
    rows = [path.read_bytes()[i * ROW : (i + 1) * ROW] for i in range(COUNT)]
    path.write_bytes(b"".join(rows[::-1]))
    assert contents(cached.open()) == expected


# ---- sources beside each other -------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"size": (10, 8)},
        {"size": (4, 20)},
        {"crop": "shorter_side"},
        {"channels": 1},
        {"background": "black"},
    ],
)
def test_sources_of_other_settings_share_a_folder_and_no_row(folder, tmp_path, changes):
    for i in range(COUNT):  # half transparent, that the background shows
        path = tmp_path / "data" / CLASSES[i // 4] / f"{i:02}.png"
        image = Image.fromarray(pixels()[i])
        image.putalpha(128)
        image.save(path)
    one, other = kept(folder, tmp_path), kept(folder, tmp_path, **changes)
    assert decoded(one.open()) == decoded(other.open()) == list(range(COUNT))
    assert decoded(one.open()) == decoded(other.open()) == []
    for spec in (one, other):
        assert contents(spec.open()) == contents(kept(spec, tmp_path, cache=None).open())
    assert contents(one.open()) != contents(other.open())


# ---- bad images --------------------------------------------------------------------------------


def test_bad_image_is_named_and_stood_in_for_in_every_run(cached, tmp_path):
    (tmp_path / "data" / "dog" / "05.png").write_bytes(b"not an image")
    for _ in range(2):
        source = cached.model_copy(update={"max_bad_share": 1.0}).open()
        uncached = source.spec.model_copy(update={"cache": None}).open()
        assert contents(source) == contents(uncached)
        [skipped] = source[5].skipped
        assert skipped.path.endswith("05.png")
        assert "no format" in skipped.reason


def test_image_that_went_bad_or_away_after_it_was_kept_is_bad(cached, tmp_path):
    contents(cached.open())
    (tmp_path / "data" / "dog" / "05.png").write_bytes(b"not an image")
    source = cached.model_copy(update={"max_bad_share": 1.0}).open()
    (tmp_path / "data" / "eel" / "09.png").unlink()
    assert "no format" in source[5].skipped[0].reason
    assert "FileNotFoundError" in source[9].skipped[0].reason


def test_bad_images_are_judged_as_without_a_cache(tmp_path):
    for i in range(200):
        content = b"not an image" if i % 4 == 0 else b"P5 1 1 255\n" + bytes([i])
        (tmp_path / f"{i:03}.pgm").write_bytes(content)
    said = []
    for cache in (None, str(tmp_path / "cache"), str(tmp_path / "cache")):
        source = FolderSpec(path=str(tmp_path), size=1, cache=cache).open()
        with pytest.raises(DataError, match=r"beyond data\.max_bad_share") as error:
            contents(source)
        said.append(str(error.value))
    assert said[0] == said[1] == said[2]


# ---- a disk that cannot --------------------------------------------------------------------------


def test_cache_in_a_place_that_cannot_be_written_is_refused_with_it(folder, tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        spec = kept(folder, tmp_path, cache=str(place))
        with pytest.raises(DataError, match=r"data\.cache: '.*file.*' cannot be used: "):
            spec.open()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_cache_in_a_folder_without_permission_is_refused_with_it(folder, tmp_path):
    (tmp_path / "cache").mkdir(mode=0o500)
    with pytest.raises(DataError, match=r"data\.cache: '.*cache' cannot be used: .*denied"):
        kept(folder, tmp_path).open()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["raises", "writes less"])
def test_full_disk_ends_it_with_its_name(cached, tmp_path, monkeypatch, how, workers):
    write = os.pwrite

    def full(handle, row, offset):
        if how == "raises":
            raise OSError(28, "No space left on device")
        return write(handle, row[:100], offset)

    monkeypatch.setattr(os, "pwrite", full)
    source = cached.open()
    stream = Batches(source, seed=0, start=0, layout=Layout(4), workers=workers)
    with pytest.raises(DataError, match=r"data\.cache: .*cache/.*\.pixels: .*; leave it out") as e:
        next(stream)
    assert "Traceback" not in str(e.value)
    assert source.unreadable == {}, "no image is blamed"
    monkeypatch.undo()
    assert contents(cached.open()) == contents(kept(cached, tmp_path, cache=None).open())


# ---- the file itself -----------------------------------------------------------------------------


def test_cache_gives_a_row_back_for_its_own_stamp_alone(tmp_path):
    cache = Cache(str(tmp_path), "key", (3, 2, 5))
    image = torch.arange(30, dtype=torch.uint8).reshape(3, 2, 5)
    assert cache.get(4, "a") is None
    cache.put(4, "a", image, 2**40)
    found, label = cache.get(4, "a")
    assert torch.equal(found, image)
    assert label == 2**40
    for index, stamp in ((4, "b"), (3, "a"), (5, "a"), (4, "")):
        assert cache.get(index, stamp) is None
    assert Cache(str(tmp_path), "another key", (3, 2, 5)).get(4, "a") is None
    cache.put(4, "a file's name\udcff", image, -1)  # that is no UTF-8
    assert cache.get(4, "a file's name\udcff")[1] == -1


def test_cache_is_found_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Cache("~/pixels", "key", (1, 1, 1)).path.parent == tmp_path / "pixels"


def test_cache_tells_two_folders_of_equal_names_sizes_and_times_apart(tmp_path):
    for name, colour in (("a", 10), ("b", 200)):
        path = tmp_path / name / "0.ppm"
        path.parent.mkdir()
        Image.new("RGB", (8, 8), (colour,) * 3).save(path)
        os.utime(path, (0, 0))
    cache = str(tmp_path / "cache")
    for name, colour in (("a", 10), ("b", 200)):
        source = FolderSpec(path=str(tmp_path / name), size=8, cache=cache).open()
        assert source[0].image.unique().tolist() == [colour]


def test_cache_that_cannot_be_read_is_not_blamed_on_images(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    source = FolderSpec(path=str(tmp_path), size=8, cache=str(tmp_path / ".cache")).open()

    def fail(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(DataError, match=r"data\.cache: .* cannot be read: .*Input/output error"):
        source[0]
