"""Tars as WebDataset lays them out: what they hold, in which order, and what is wrong with them."""

import errno
import gc
import io
import itertools
import json
import multiprocessing
import os
import pickle
import re
import shutil
import tarfile
from collections import Counter
from functools import cache
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file

from hdit import config, randomness
from hdit.config import ConfigError, parse
from hdit.data import DataSpec, DigitsSpec, FolderSpec, TarSpec
from hdit.data.batches import Batches, Layout, in_order
from hdit.data.source import DataError, Drawn, Stream, first
from hdit.data.sources import tar_members, tar_samples
from hdit.data.sources.shard_paths import expand
from hdit.training.trainer import Trainer

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@cache
def digits() -> list[tuple[bytes, int]]:
    """The first 500 digits, as PNG files of 8 x 8 pixels, and their classes."""
    source = DigitsSpec(split="all").open()
    images = []
    for i in range(500):
        file = io.BytesIO()
        Image.fromarray(source[i].image[0].numpy()).save(file, "png")
        images.append((file.getvalue(), source[i].label))
    return images


def png(value: int) -> bytes:
    """An image of which each pixel is `value`."""
    file = io.BytesIO()
    Image.new("L", (2, 2), value).save(file, "png")
    return file.getvalue()


def write_tar(path, files, fmt=tarfile.PAX_FORMAT):
    """Files by name, or TarInfo objects as they are."""
    with tarfile.open(path, "w", format=fmt) as tar:
        for name, content in files:
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def name_of(i: int, label: int) -> str:
    """Of a digit: some lie a folder deeper, which other sources list after the others."""
    return f"{NAMES[label]}/{'0/' if i % 3 == 0 else ''}{i:03}"


def write_digits(folder, number=500, shards=3, prefix=""):
    """Shards of unlike length that hold digits in the order of the published set."""
    ends = np.linspace(0, 1, shards + 1) ** 1.5 * number
    for shard, (low, high) in enumerate(itertools.pairwise(ends.round().astype(int).tolist())):
        files = []
        for i, (image, label) in list(enumerate(digits()))[low:high]:
            name = prefix + name_of(i, label)
            files += [(f"{name}.png", image), (f"{name}.cls", str(label).encode())]
        write_tar(folder / f"digits-{shard}.tar", files)
    return f"{folder}/digits-{{0..{shards - 1}}}.tar"


def open_tars(path, size=8, channels=1, **settings):
    return TarSpec(path=str(path), size=size, channels=channels, **settings).open()


def grey(tmp_path, shards, **settings):
    """Of shards of images that are their number, without labels."""
    numbers = iter(range(256))
    for i, length in enumerate(shards):
        write_tar(tmp_path / f"{i}.tar", [(f"{n:03}.png", png(n)) for n in islice(numbers, length)])
    return open_tars(f"{tmp_path}/{{0..{len(shards) - 1}}}.tar", size=1, **settings)


def values(source, references) -> list[int]:
    return [int(source[r].image.flatten()[0]) for r in references]


def take(source, n, *, start=0, layout=None, workers=0, state=None):
    layout = layout or Layout(16)
    stream = Batches(source, seed=3, start=start, layout=layout, workers=workers, state=state)
    return list(islice(stream, n))


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert a.skipped == b.skipped


# ---- the same images in another place ----------------------------------------------------------


@pytest.mark.parametrize(("workers", "shuffle_buffer"), [(0, 500), (2, 10_000)])
def test_tars_that_fit_in_the_buffer_give_the_batches_of_a_folder(
    tmp_path, workers, shuffle_buffer
):
    pattern = write_digits(tmp_path, prefix="./")
    classes = sorted(NAMES)
    tree = tmp_path / "tree"
    for i, (image, label) in enumerate(digits()):
        path = tree / f"{name_of(i, label)}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    theirs = FolderSpec(path=str(tree), size=8, channels=1).open()
    assert theirs.classes == classes
    ours = open_tars(pattern, classes=NAMES, shuffle_buffer=shuffle_buffer)
    batches = take(ours, 34, layout=Layout(32), workers=workers)  # two passes and a bit
    for a, b in zip(batches, take(theirs, 34, layout=Layout(32)), strict=True):
        assert torch.equal(a.images, b.images)
        assert [NAMES[i] for i in a.labels] == [classes[i] for i in b.labels]


def test_tars_give_the_pixels_of_a_folder_also_by_random_crops(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
    (tmp_path / "tree").mkdir()
    image.save(tmp_path / "tree" / "a.png")
    write_tar(tmp_path / "a.tar", [("a.png", (tmp_path / "tree" / "a.png").read_bytes())])
    same = {"size": 16, "crop": "random"}
    ours = TarSpec(path=str(tmp_path / "a.tar"), **same).open()
    theirs = FolderSpec(path=str(tmp_path / "tree"), **same).open()
    [reference] = ours.references()
    seen = set()
    for chance in [(0.0, 0.0, 0.0), (0.9, 0.2, 0.7), (0.5, 0.5, 0.5)]:
        image = ours.draw(reference, chance).image
        assert torch.equal(image, theirs.draw(0, chance).image)
        seen.add(image.numpy().tobytes())
    assert len(seen) == 3
    assert torch.equal(ours[reference].image, theirs[0].image)


def test_tars_are_a_stream_that_draws(tmp_path):
    source = grey(tmp_path, [2])
    assert isinstance(source, Stream)
    assert isinstance(source, Drawn)


def test_references_are_one_pass_in_the_order_of_the_files(tmp_path):
    source = grey(tmp_path, [5, 0, 3], shuffle_buffer=2)
    assert values(source, source.references()) == list(range(8))
    [batch] = in_order(source, [source.references()], workers=2)
    assert batch.images[:, 0, 0, 0].tolist() == list(range(8))


# ---- the order -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle_buffer", [0, 1, 5, 19, 20, 21, 1000])
def test_each_pass_gives_each_image_once_in_another_order(tmp_path, shuffle_buffer):
    source = grey(tmp_path, [7, 1, 12], shuffle_buffer=shuffle_buffer)
    order = source.order(seed=5)
    passes = [values(source, islice(order, 20)) for _ in range(6)]
    assert all(sorted(drawn) == list(range(20)) for drawn in passes)
    assert len({tuple(drawn) for drawn in passes}) >= 3  # three shards have six orders
    assert values(source, islice(source.order(seed=5), 40)) == passes[0] + passes[1]
    others = {tuple(values(source, islice(source.order(seed=s), 20))) for s in range(6)}
    assert len(others) >= 3


@pytest.mark.parametrize("shuffle_buffer", [0, 1])
def test_without_a_buffer_images_keep_the_order_of_their_shard(tmp_path, shuffle_buffer):
    source = grey(tmp_path, [3, 4, 5], shuffle_buffer=shuffle_buffer)
    drawn = values(source, islice(source.order(seed=0), 12))
    shards = [list(range(3)), list(range(3, 7)), list(range(7, 12))]
    assert drawn in [list(itertools.chain(*order)) for order in itertools.permutations(shards)]


def test_buffer_draws_evenly_from_the_images_that_it_holds(tmp_path):
    source = grey(tmp_path, [40], shuffle_buffer=10)
    n = 600
    orders = [islice(source.order(seed=seed), 40) for seed in range(n)]
    starts = [r.start for r in source.references()]
    drawn = np.array([[starts.index(r.start) for r in order] for order in orders])  # (n, 40)
    assert (drawn <= np.arange(40) + 9).all(), "none is drawn before it is in the buffer"
    counts = np.bincount(drawn[:, 0], minlength=10)
    # binomial with p = 1/10: 5 standard deviations
    assert np.abs(counts - n / 10).max() < 5 * np.sqrt(n * 0.1 * 0.9)
    # one that is in the buffer from the start is drawn k-th with p = 0.9^k / 10, while it is full
    places = np.bincount((drawn == 3).argmax(1), minlength=40)[:20] / n
    assert np.abs(places - 0.1 * 0.9 ** np.arange(20)).max() < 5 * np.sqrt(0.09 / n)


def test_order_is_the_one_that_is_defined_by_seed_and_count(tmp_path):
    source = grey(tmp_path, [30], shuffle_buffer=8)
    expected = []
    for _ in range(10):  # passes
        buffer, coming = list(range(8)), list(range(8, 30))  # of one shard, in its order
        while buffer:
            [bits] = randomness.bits(11, "shuffle buffer", np.array([len(expected)])).tolist()
            slot = bits % len(buffer)
            expected.append(buffer[slot])
            if coming:
                buffer[slot] = coming.pop(0)
            else:
                buffer[slot] = buffer[-1]
                buffer.pop()
    assert values(source, islice(source.order(seed=11), 300)) == expected


@pytest.mark.parametrize("shuffle_buffer", [7, 1000])
def test_batches_of_tars_depend_neither_on_workers_nor_on_processes(tmp_path, shuffle_buffer):
    pattern = write_digits(tmp_path, number=60)
    source = open_tars(pattern, classes=10, shuffle_buffer=shuffle_buffer)
    whole = take(source, 9)
    assert_same(take(source, 9, workers=2), whole)
    ranks = [
        take(open_tars(pattern, classes=10, shuffle_buffer=shuffle_buffer), 18, layout=layout)
        for layout in (Layout(16, 2, 2, 0), Layout(16, 2, 2, 1))
    ]
    for i, batch in enumerate(whole):
        parts = [part for rank in ranks for part in rank[2 * i : 2 * i + 2]]
        position = np.concatenate([part.position for part in parts])
        images = torch.cat([part.images for part in parts])[position.argsort()]
        assert {len(part.images) for part in parts} == {4}
        assert torch.equal(images, batch.images)


# ---- going on ------------------------------------------------------------------------------------


FULL = {i for i in range(16) if (7 * i + 3) % 10}


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Sixteen shards of 0 to 9 images, of which FULL have some."""
    folder = tmp_path_factory.mktemp("many")
    for i in range(16):
        files = [(f"{i}/{n}.png", png(10 * i + n)) for n in range((7 * i + 3) % 10)]
        write_tar(folder / f"{i}.tar", files)
    return folder


@given(
    shards=st.lists(st.integers(0, 15), max_size=5, unique=True).filter(FULL.intersection),
    shuffle_buffer=st.integers(0, 40),
    seed=st.integers(0, 2**63 - 1),
    at=st.integers(0, 90),
    again=st.integers(0, 30),
)
@settings(max_examples=80, deadline=None)
def test_order_goes_on_from_any_state_as_if_it_had_not_stopped(
    many, shards, shuffle_buffer, seed, at, again
):
    names = ",".join(f"{shard}.tar" for shard in shards)
    path = f"{many}/{{{names}}}" if len(shards) > 1 else f"{many}/{names}"
    spec = TarSpec(path=path, size=1, channels=1, shuffle_buffer=shuffle_buffer)
    whole = list(islice(spec.open().order(seed), at + again + 50))
    order = spec.open().order(seed)
    assert list(islice(order, at)) == whole[:at]
    for more in (again, 50):
        state = json.loads(json.dumps(order.state()))
        order = spec.open().order(seed, state)
        assert order.state() == state
        assert list(islice(order, more)) == whole[at : at + more]
        at += more


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shuffle_buffer", [5, 1000])
def test_batches_go_on_from_the_state_behind_those_that_were_handed_out(
    tmp_path, workers, shuffle_buffer
):
    source = grey(tmp_path, [30, 1, 20], shuffle_buffer=shuffle_buffer)
    layout = Layout(12, accumulate=2, processes=2, rank=1)
    whole = take(source, 24, layout=layout)
    stream = Batches(source, seed=3, start=0, layout=layout, workers=workers)
    for number in (2, 6, 4):  # 2, 6 and 4 steps: 1, 3 and 2 batches
        list(islice(stream, number))
        state = stream.state()
    assert state["count"] == 72, "workers read ahead, the state does not"
    rest = take(source, 12, start=72, layout=layout, workers=workers, state=state)
    assert_same(rest, whole[12:])


def test_order_goes_on_without_reading_what_was_before(tmp_path, monkeypatch):
    source = grey(tmp_path, [10] * 6, shuffle_buffer=4)
    order = source.order(seed=1)
    list(islice(order, 33))
    state, expected = order.state(), list(islice(order, 12))
    opened, headers = [], []
    shard, header = tar_samples.Shards._open_shard, tar_members._header
    monkeypatch.setattr(tar_members, "_header", lambda block: headers.append(1) or header(block))
    monkeypatch.setattr(
        tar_samples.Shards, "_open_shard", lambda self, i: opened.append(i) or shard(self, i)
    )
    again = open_tars(source.place, size=1, shuffle_buffer=4)
    del opened[:], headers[:]
    again.shards._open.cache_clear()
    resumed = again.order(1, state)
    assert next(resumed) == expected[0]
    assert len(headers) <= 2
    assert list(islice(resumed, 11)) == expected[1:]
    assert len(opened) <= 3


def test_state_is_small_and_of_numbers_and_text(tmp_path):
    source = open_tars(write_digits(tmp_path), classes=10, shuffle_buffer=400)
    order = source.order(seed=0)
    next(order)
    assert len(json.dumps(order.state(), indent=1)) < 500 + 400 * 10


@pytest.mark.parametrize("change", ["longer", "renamed", "fewer"])
def test_state_of_other_shards_is_refused_with_the_difference(tmp_path, change):
    source = grey(tmp_path, [3, 4])
    order = source.order(seed=0)
    next(order)
    state, pattern = order.state(), source.place
    if change == "longer":
        write_tar(tmp_path / "1.tar", [(f"{n}.png", png(n)) for n in range(40)])
    elif change == "renamed":
        (tmp_path / "1.tar").rename(tmp_path / "b.tar")
        pattern = f"{tmp_path}/{{0,b}}.tar"
    else:
        pattern = f"{tmp_path}/0.tar"
    with pytest.raises(DataError, match=r"holds other shards than .*: 2 files of [\d,]+ bytes"):
        open_tars(pattern, size=1).order(0, state)
    with pytest.raises(DataError, match="other shards"):
        source.order(0, {"place": 3})


def test_shards_that_were_moved_together_are_the_same(tmp_path):
    source = grey(tmp_path, [9, 9], shuffle_buffer=3)
    order = source.order(seed=0)
    list(islice(order, 5))
    (tmp_path / "there").mkdir()
    for i in range(2):
        shutil.copy(tmp_path / f"{i}.tar", tmp_path / "there")
    moved = open_tars(f"{tmp_path}/there/*.tar", size=1, shuffle_buffer=3)
    resumed = moved.order(0, order.state())
    assert list(islice(resumed, 30)) == list(islice(order, 30))


def test_buffer_of_another_size_fills_or_empties_as_an_order_goes_on(tmp_path):
    source = grey(tmp_path, [20, 20], shuffle_buffer=8)
    order = source.order(seed=0)
    first = values(source, islice(order, 10))
    for size in (1, 30):
        other = open_tars(source.place, size=1, shuffle_buffer=size)
        rest = values(other, islice(other.order(0, order.state()), 30))
        assert sorted(first + rest) == list(range(40))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shuffle_buffer", [9, 1000])
def test_run_that_was_killed_ends_with_the_weights_of_the_uninterrupted_one(
    tiny, tmp_path, workers, shuffle_buffer
):
    pattern = write_digits(tmp_path, number=40)
    text = tiny.read_text().replace(
        'kind = "digits"',
        f'path = "{pattern}"\nsize = 8\nchannels = 1\nclasses = 10\n'
        f"shuffle_buffer = {shuffle_buffer}",
    )
    tiny.write_text(text)
    settings = config.load(tiny, ["sampling.grid=0", f"training.workers={workers}"])
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert Trainer(settings, whole).fit()  # 96 images: two passes of 40, and a part
    shutil.copytree(whole, run)
    for images in (64, 96):  # as if killed after the first checkpoint, at 32
        shutil.rmtree(run / "checkpoints" / f"{images:012}")
    assert Trainer(settings, run).fit()
    for name in ("model", "ema", "optimizer"):
        ours, theirs = (
            load_file(r / "checkpoints" / "000000000096" / f"{name}.safetensors")
            for r in (run, whole)
        )
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    states = [
        json.loads((r / "checkpoints" / "000000000096" / "state.json").read_text())
        for r in (run, whole)
    ]
    assert states[0]["stream"] == states[1]["stream"]
    assert states[0]["stream"]["count"] == 96
    assert states[0]["data_size"] is None


# ---- the format ----------------------------------------------------------------------------------

NAME = st.text(st.sampled_from("ab./é漢 _-0"), min_size=1, max_size=20)


@given(
    names=st.lists(st.tuples(NAME, st.sampled_from([1, 1, 6, 9]), st.integers(0, 1500))),
    fmt=st.sampled_from(FORMATS),
)
@example(names=[("/é" + "a" * 17, 9, 600)] * 3, fmt=tarfile.USTAR_FORMAT)
@example(names=[("/é" + "a" * 17, 9, 600)] * 3, fmt=tarfile.GNU_FORMAT)
@example(names=[("/é" + "a" * 17, 9, 600)] * 3, fmt=tarfile.PAX_FORMAT)
@settings(max_examples=80, deadline=None)
def test_members_are_those_that_tarfile_reads(tmp_path_factory, names, fmt):
    path = tmp_path_factory.getbasetemp() / "members.tar"
    with tarfile.open(path, "w", format=fmt) as tar:
        for i, (name, repeated, size) in enumerate(names):
            member = tarfile.TarInfo(f"{i}" + name * repeated)
            member.size = size
            if i % 7 == 3:
                member.type, member.size = tarfile.DIRTYPE, 0
            try:
                tar.addfile(member, io.BytesIO(bytes(member.size)))
            except ValueError:
                assert fmt == tarfile.USTAR_FORMAT, "ustar alone has no room for a long name"
    with tarfile.open(path) as tar:
        expected = [(m.name, m.size, m.offset, m.offset_data, m.isdir()) for m in tar.getmembers()]
    file = tar_members.TarFile(os.open(path, os.O_RDONLY))
    found = list(tar_members.members(file, 0))
    assert [
        (m.name.rstrip("/"), m.size, m.start, m.data, m.kind == tar_members.FOLDER) for m in found
    ] == [(name.rstrip("/"), *rest) for name, *rest in expected]
    for i, member in enumerate(found):
        assert list(tar_members.members(file, member.start)) == found[i:]


@pytest.mark.parametrize("fmt", FORMATS[1:])
def test_member_of_more_than_eight_gigabytes_is_passed_over(tmp_path, fmt):
    path = tmp_path / "a.tar"
    small, huge = tarfile.TarInfo("b.png"), tarfile.TarInfo("a.bin")
    small.size, huge.size = len(png(7)), 9 << 30
    with open(path, "wb") as file:  # with a hole
        file.write(huge.tobuf(fmt))
        file.seek(huge.size, os.SEEK_CUR)
        file.write(small.tobuf(fmt) + png(7))
    found = list(tar_members.members(tar_members.TarFile(os.open(path, os.O_RDONLY)), 0))
    assert [(m.name, m.size) for m in found] == [("a.bin", 9 << 30), ("b.png", small.size)]
    source = open_tars(path, size=1, max_bad_share=1.0)
    assert values(source, source.references()) == [7, 7]  # which stands in for a.bin, no image


def test_samples_are_members_of_one_name_up_to_the_first_dot(tmp_path):
    folder = tarfile.TarInfo("a")
    folder.type = tarfile.DIRTYPE
    files = [
        (folder, b""),
        ("a/1.json", b"{}"),
        ("a/1.seg.png", png(99)),
        ("a/1.PNG", png(1)),
        ("a/._1.png", b"of macOS"),
        ("a/1.jpg", b"the first image counts"),
        ("a/README", b"has no extension"),
        ("__MACOSX/._1.png", b""),
        (".hidden/1.png", b""),
        ("b/1.png", png(2)),
        ("b/1.txt", b"words"),
        ("b/1.5.png", b"part of the same, with extension 5.png"),
    ]
    source = open_tars(write_tar(tmp_path / "a.tar", files), size=1)
    assert values(source, source.references()) == [1, 2]


# ---- labels --------------------------------------------------------------------------------------


def labelled(tmp_path, *labels: bytes, extension="cls", **settings):
    files = []
    for i, label in enumerate(labels):
        files += [(f"{i}.png", png(i)), (f"{i}.{extension}", label)]
    return open_tars(write_tar(tmp_path / "a.tar", files), size=1, **settings)


def labels_of(source) -> list[int]:
    return [source[r].label for r in source.references()]


def test_labels_are_whole_numbers_or_names(tmp_path):
    source = labelled(
        tmp_path, b"2", b" 0\n", b"cat", b"\xef\xbb\xbf1", classes=["dog", "cat", "x"]
    )
    assert labels_of(source) == [2, 0, 1, 1]
    assert source.classes == ["dog", "cat", "x"]
    assert labelled(tmp_path, b"0", classes=12).classes == [str(i) for i in range(12)]


def test_label_of_a_tar_is_a_name_before_it_is_an_index(tmp_path):
    names = ["3", "1", "01", "x"]
    source = labelled(tmp_path, b"1", b"01", b"3", b"x", classes=names)
    assert labels_of(source) == [1, 2, 0, 3]
    source = labelled(tmp_path, b"1", b"0", classes=names)
    with pytest.raises(DataError, match=r"has the label '0', but a label must be a name in data"):
        labels_of(source)


@pytest.mark.parametrize("label", ["[" * 9999, '{"y": ' + "9" * 5000 + "}", '{"y": "²"}'])
def test_label_in_json_that_is_hostile_is_no_traceback(tmp_path, label):
    source = labelled(
        tmp_path, b'{"y": 1}', label.encode(), extension="json", classes=2, label_key="json.y"
    )
    with pytest.raises(DataError, match=r"1\.png"):
        labels_of(source)


def test_labels_are_found_by_the_key_that_is_set(tmp_path):
    rows = [b'{"y": 2}', b'{"y": "dog", "label": 7}']
    source = labelled(
        tmp_path, *rows, extension="json", classes=["dog", "b", "c"], label_key="json.y"
    )
    assert labels_of(source) == [2, 0]
    source = labelled(tmp_path, b"1", extension="TXT", classes=2, label_key="txt")
    assert labels_of(source) == [1]


def test_labels_that_nobody_counted_are_an_error_that_says_what_to_set(tmp_path):
    with pytest.raises(DataError, match=r"data\.classes: must be set, for .*/a\.tar/0\.png has a "):
        labelled(tmp_path, b"2")
    source = labelled(tmp_path, b"2", b"no number", classes=0)
    assert source.classes == []
    assert labels_of(source) == [0, 0]


def test_labels_that_are_wanted_and_not_there_are_an_error(tmp_path):
    with pytest.raises(DataError, match=r"label_key: .*0\.png has no \.cls \(it has \.png, \.txt"):
        labelled(tmp_path, b"2", extension="txt", classes=3)
    files = [("0.png", png(0)), ("1.png", png(1)), ("0.cls", b"0"), ("1.cls", b"1")]
    with pytest.raises(
        DataError, match=r"has no \.cls .*; if its label comes later, .*--sort=name"
    ):
        open_tars(write_tar(tmp_path / "b.tar", files), classes=2)


def test_sample_whose_name_has_a_dot_is_told_where_names_end(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("img.v1.png", png(0)), ("img.v2.png", png(1))])
    with pytest.raises(DataError, match=r"img.v1.png: has no image .*ends at its first dot"):
        open_tars(path)


@pytest.mark.parametrize("label", [b"3", b"-1", b"bird", b"1.0", b"9" * 30])
def test_label_that_is_none_of_the_classes_is_an_error_that_names_it(tmp_path, label):
    source = labelled(tmp_path, b"0", label, classes=3)
    with pytest.raises(DataError, match=r"data\.classes: .*1\.png has the label '.*below 3"):
        labels_of(source)


@pytest.mark.parametrize(
    ("content", "key", "reason"),
    [
        (b"", None, "is empty"),
        (b"\xff", None, "UnicodeDecodeError"),
        (b"{", "json.label", "its .json: not valid JSON"),
        (b"[1]", "json.label", "has no label in its .json"),
        (b'{"label": true}', "json.label", "has no label in its .json"),
        (b'{"label": null}', "json.label", "has no label in its .json"),
        (b" " * (1 << 21), None, "2097152 bytes"),
    ],
)
def test_label_that_cannot_be_read_makes_a_bad_sample(tmp_path, content, key, reason):
    extension, good = ("cls", b"1") if key is None else ("json", b'{"label": 1}')
    settings = {"classes": 2, "label_key": key, "max_bad_share": 1.0}
    source = labelled(tmp_path, good, content, good, extension=extension, **settings)
    image, label, [skipped] = source[source.references()[1]]
    assert (int(image), label) == (2, 1)
    assert skipped.path == f"{tmp_path}/a.tar/1.png"
    assert reason in skipped.reason


# ---- bad files -----------------------------------------------------------------------------------


def test_next_good_image_of_the_shard_stands_in_for_a_bad_one(tmp_path):
    write_tar(tmp_path / "0.tar", [("x.png", png(50))])
    files = [(f"{i}.png", png(i)) for i in range(6)]
    files[3] = ("3.txt", b"no image")
    files[4], files[5] = ("4.png", b"torn"), ("5.png", b"")
    write_tar(tmp_path / "1.tar", files)
    source = open_tars(f"{tmp_path}/{{0,1}}.tar", size=1, max_bad_share=1.0)
    _, _, _, _, third, fourth, fifth = source.references()
    for reference, names in [(third, "345"), (fourth, "45"), (fifth, "5")]:
        image, _, skipped = source[reference]
        assert int(image) == 0
        assert [s.path[-5:] for s in skipped] == [
            f"{n}.{'txt' if n == '3' else 'png'}" for n in names
        ]
    reasons = [s.reason for s in source[third].skipped]
    assert "has no image (it has .txt)" in reasons[0]
    assert "in no format that Pillow reads" in reasons[1]
    assert "the file is empty" in reasons[2]


def test_image_of_another_shard_stands_in_where_none_of_its_own_can(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.png", b"torn")])
    write_tar(tmp_path / "b.tar", [("b.png", png(9))])
    source = open_tars(f"{tmp_path}/*.tar", size=1, max_bad_share=1.0)
    assert values(source, source.references()) == [9, 9]


def test_bad_images_end_it_by_the_rules_of_other_sources(tmp_path):
    files = [(f"{i}.png", b"torn" if i % 4 == 0 else png(i % 200)) for i in range(400)]
    path = write_tar(tmp_path / "a.tar", files)
    with pytest.raises(DataError, match=r"files drawn from .* beyond data\.max_bad_share = 0\.05"):
        take(open_tars(path, size=1), 25)
    with pytest.raises(DataError, match=r"/\d+\.png: Unidentified.*; mend or remove it, or set"):
        take(open_tars(path, size=1, bad_files="fail"), 25)
    batches = take(open_tars(path, size=1, max_bad_share=0.25), 100)
    names = Counter(s.path for batch in batches for s in batch.skipped)
    assert len(names) == 100
    write_tar(tmp_path / "b.tar", [(f"{i}.png", b"torn") for i in range(3)])
    with pytest.raises(DataError, match=r"none of the 3 files in .* could be read"):
        take(open_tars(tmp_path / "b.tar", size=1), 1)


def test_few_bad_images_count_once_a_pass_and_not_once_a_draw(tmp_path):
    files = [(f"{i}.png", b"torn" if i < 5 else png(i)) for i in range(50)]
    path = write_tar(tmp_path / "a.tar", files)
    source = open_tars(path, size=1, shuffle_buffer=10, max_bad_share=0.1)
    assert len(take(source, 100, layout=Layout(25))) == 100  # fifty passes
    with pytest.raises(DataError, match=r"5 of the 50 files in .* beyond data\.max_bad_share = 0"):
        take(open_tars(path, size=1, shuffle_buffer=10), 2, layout=Layout(25))


def bit_flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


BLOCKS = 512 * 2  # a header and an image of less than 512 bytes
DAMAGE = {
    "header": (lambda data: bit_flipped(data, 3 * BLOCKS + 100), 3, "no header of a tar at byte"),
    "header number": (lambda d: d[: 3 * BLOCKS + 124] + b"xx" + d[3 * BLOCKS + 126 :], 3, "checks"),
    "cut in a header": (lambda data: data[: 3 * BLOCKS + 200], 3, "byte 3072: the file ends"),
    "cut in a member": (lambda data: data[: 3 * BLOCKS + 530], 3, "the file ends within '3.png'"),
    "cut in the first": (lambda data: data[:530], 0, "the file ends within '0.png', at byte 530"),
    "empty": (lambda data: b"", 0, "the file is empty"),
    "a page": (lambda data: b"<html>404 Not Found</html>" * 99, 0, "no header of a tar at byte 0"),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_tar_is_used_up_to_the_damage_which_is_named(tmp_path, kind, workers):
    spoil, usable, reason = DAMAGE[kind]
    for i in range(3):
        write_tar(tmp_path / f"{i}.tar", [(f"{n}.png", png(10 * i + n)) for n in range(8)])
    path = tmp_path / "1.tar"
    path.write_bytes(spoil(path.read_bytes()))
    source = open_tars(f"{tmp_path}/*.tar", size=1, shuffle_buffer=3, max_bad_share=1.0)
    good = {*range(8), *range(10, 10 + usable), *range(20, 28)}
    n = len(good) + 1
    batches = take(source, 3, layout=Layout(n), workers=workers)
    for batch in batches:
        drawn = batch.images.flatten().tolist()
        assert set(drawn) == good
        [skipped] = batch.skipped
        assert skipped.path == str(path)
        assert reason in skipped.reason
        [again] = (Counter(drawn) - Counter(good)).elements()
        assert again == (10 if usable else 20)  # of its shard, or else of the next
    order = source.order(seed=0)
    whole = list(islice(source.order(seed=0), 3 * n))
    for i in range(2 * n):  # any place to stop at, that of the damage as well
        assert list(islice(source.order(0, order.state()), n)) == whole[i : i + n]
        next(order)


@pytest.mark.parametrize("end", [512, 1024, 10_000])
def test_tar_without_its_end_is_whole(tmp_path, end):
    path = write_tar(tmp_path / "a.tar", [(f"{n}.png", png(n)) for n in range(3)])
    data = path.read_bytes().rstrip(b"\0")
    cut = -(-len(data) // 512) * 512 - 512 + end % 1024
    path.write_bytes(path.read_bytes()[: max(cut, len(data) + 5)])
    source = open_tars(path, size=1)
    assert values(source, source.references()) == [0, 1, 2]
    assert not source[source.references()[2]].skipped


def test_tars_of_which_none_can_be_read_are_an_error(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.tar").write_bytes(b"not a tar" * 1000)
    message = r"no image that can be read; the first: .*/a\.tar: no header of a tar at byte 0"
    with pytest.raises(DataError, match=message):
        open_tars(f"{tmp_path}/*.tar")
    write_tar(tmp_path / "a.tar", [])
    write_tar(tmp_path / "b.tar", [("a.txt", b"")])
    with pytest.raises(DataError, match=r"b\.tar/a\.txt: has no image \(it has \.txt\)"):
        open_tars(f"{tmp_path}/*.tar")
    with pytest.raises(DataError, match="has no image that can be read"):
        open_tars(tmp_path / "a.tar")


def test_file_that_goes_away_ends_training_and_is_named(tmp_path):
    """It is no damage of the image's: the rest of the shard would be lost without an error."""
    source = grey(tmp_path, [4, 4], shuffle_buffer=1)
    (tmp_path / "1.tar").unlink()
    source.shards._open.cache_clear()
    with pytest.raises(DataError, match=r"1\.tar: cannot be read: .*the same command goes on"):
        list(islice(source.order(seed=0), 10))


def test_error_of_the_disk_is_not_taken_for_damage(tmp_path, monkeypatch):
    source = grey(tmp_path, [4], shuffle_buffer=1)

    def fail(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(DataError, match=r"0\.tar: cannot be read: .*Input/output error"):
        next(source.order(seed=0))


@pytest.mark.parametrize("size", [b"-0000001000", b"00000001x00"])
def test_header_with_a_size_that_is_none_is_damage(tmp_path, size):
    """With a negative one a member would end where it begins, and be found for ever."""
    path = write_tar(tmp_path / "a.tar", [(f"{n}.png", png(n)) for n in range(3)])
    data = bytearray(path.read_bytes())
    data[1024 + 124 : 1024 + 135] = size
    data[1024 + 148 : 1024 + 156] = b" " * 8
    data[1024 + 148 : 1024 + 155] = b"%06o\0" % sum(data[1024 : 1024 + 512])
    path.write_bytes(data)
    source = open_tars(path, size=1, max_bad_share=1.0)
    assert len(source.references()) == 2, "the first image, and the damage"
    assert "no header of a tar at byte 1024" in source[source.references()[1]].skipped[0].reason


@pytest.mark.parametrize("size", ["-512", "99x", "9" * 5000])
def test_pax_header_with_a_size_that_is_none_is_damage(tmp_path, size):
    member = tarfile.TarInfo("0.png")
    member.pax_headers = {"size": size}
    path = write_tar(tmp_path / "a.tar", [("a.png", png(1)), (member, png(2))])
    source = open_tars(path, size=1, max_bad_share=1.0)
    damage = source[source.references()[1]].skipped[0].reason
    assert "no header of a tar at byte 1024" in damage
    assert "is no size" in damage


def test_few_tars_are_judged_by_their_share_of_bad_images(tmp_path):
    """Also where a pass is shorter than what the share is judged by."""
    files = [(f"{n:03}.png", png(n) if n % 2 else b"rubbish") for n in range(60)]
    source = open_tars(write_tar(tmp_path / "a.tar", files), size=1)
    with pytest.raises(DataError, match=r"beyond data\.max_bad_share"):
        values(source, islice(source.order(seed=0), 200))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"count": -1}, "count"),
        ({"place": "1"}, "place"),
        ({"offset": None}, "offset"),
        ({"is_permuted": 1}, "is_permuted"),
        ({"buffer": "0:0 1"}, "buffer"),
        ({"buffer": "-1:0"}, "buffer"),
        ({"buffer": []}, "buffer"),
        ({"more": 1}, "more"),
        ({"shards": "x"}, "other shards than when the run was saved: . then, 2 files"),
        ({"shards": {"number": 2, "bytes": "x", "digest": ""}}, "other shards"),
    ],
)
def test_state_with_other_facts_or_types_is_refused(tmp_path, changes, named):
    source = grey(tmp_path, [7, 5], shuffle_buffer=4)
    order = source.order(seed=0)
    next(order)
    with pytest.raises(DataError, match=named):
        source.order(0, order.state() | changes)


def test_resumed_pass_keeps_its_seed(tmp_path):
    """Or it would take its shards in another order, some twice and some not at all."""
    source = grey(tmp_path, [7, 5, 8, 6], shuffle_buffer=4)
    order = source.order(seed=0)
    before = list(islice(order, 9))
    after = source.order(seed=1, state=json.loads(json.dumps(order.state())))
    assert sorted(values(source, before + list(islice(after, 17)))) == list(range(26))
    assert list(islice(after, 26)) != list(islice(order, 43))[17:], "the next pass has the new one"


def test_first_image_is_found_without_filling_the_buffer(tmp_path, monkeypatch):
    source = grey(tmp_path, [3, 3])
    monkeypatch.setattr("hdit.data.sources.tar_order.TarOrder.__init__", None)
    assert first(source).image.unique().tolist() == [0]


def test_file_that_was_cut_while_it_was_read_is_an_error(tmp_path):
    source = grey(tmp_path, [4, 4])
    last = source.references()[-1]
    os.truncate(tmp_path / "1.tar", 1024)
    with pytest.raises(DataError, match=r"1\.tar: has changed while it was read"):
        source[last]


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"cat/0.png": b"", "cat/1.png": b""}, "folders in a tar, as that of .*/cat/0.png, are no"),
        ({"0.png": b"", "0.json": b'{"id": 1, "Label": 2}'}, r"has 'Label'.*='json\.Label' and"),
        ({"0.png": b"", "0.json": b'{"id": 1, "url": "x"}'}, None),
        ({"./0.png": b"", "./0.json": b"{"}, None),
        ({"0.png": b"", "0.json": b"\xff"}, None),
    ],
)
def test_tar_tells_of_what_may_be_meant_as_labels(tmp_path, files, told):
    files = [(name, content or png(1)) for name, content in files.items()]
    path = write_tar(tmp_path / "a.tar", files)
    warnings = open_tars(path).warnings
    assert len(warnings) == (told is not None)
    assert told is None or re.search(told, warnings[0])
    assert open_tars(path, classes=0).warnings == []
    assert open_tars(path).listed().warnings == warnings


# ---- what is refused -----------------------------------------------------------------------------


def special(kind: bytes, name="evil.png"):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc/passwd"
    if kind == tarfile.REGTYPE:
        member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    return member


REFUSED = {
    "../evil.png": "leads out of its folder",
    "a/../../evil.png": "leads out of its folder",
    "/etc/evil.png": "has an absolute path",
    "C:/evil.png": "has an absolute path",
    "..\\evil.png": "leads out of its folder",
    "symbolic link": "is a link; make the tar with --dereference",
    "hard link": "is a link; make the tar with --dereference --hard-dereference",
    "device": "is a device",
    "pipe": "is a pipe",
    "sparse": "is stored with holes",
    "sparse of pax": "is stored with holes",
}
KINDS = {
    "symbolic link": tarfile.SYMTYPE,
    "hard link": tarfile.LNKTYPE,
    "device": tarfile.CHRTYPE,
    "pipe": tarfile.FIFOTYPE,
    "sparse": tarfile.GNUTYPE_SPARSE,
    "sparse of pax": tarfile.REGTYPE,
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", REFUSED)
def test_member_that_would_escape_or_is_no_file_is_refused(tmp_path, name, workers):
    evil = special(KINDS[name]) if name in KINDS else name
    files = [(f"{i}.png", png(i)) for i in range(200)]
    path = write_tar(tmp_path / "a.tar", [*files, (evil, b"")])
    source = open_tars(path, size=1, shuffle_buffer=8)  # met when it comes up, and not before
    with pytest.raises(
        DataError, match=r"a\.tar' is refused: its member '.*evil.*' " + REFUSED[name]
    ):
        take(source, 100, workers=workers)
    assert not multiprocessing.active_children()


# ---- paths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{008..011}.tar", ["a-008.tar", "a-009.tar", "a-010.tar", "a-011.tar"]),
        ("{9..11}", ["9", "10", "11"]),
        ("{0..10}", [str(i) for i in range(11)]),
        ("{9..011}", ["009", "010", "011"]),
        ("{000000..000146}", [f"{i:06}" for i in range(147)]),
        ("{a,b}-{0..1}", ["a-0", "a-1", "b-0", "b-1"]),
        ("x{,y}", ["x", "xy"]),
        ("{a,b{1..2}c,{d,e}}f", ["af", "b1cf", "b2cf", "df", "ef"]),
        ("a}", ["a}"]),
    ],
)
def test_braces_expand_as_in_a_shell(text, expected):
    assert list(expand(text)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a{0..3", "has a { without its }"),
        ("a{0..b}", "neither"),
        ("a{}", "neither"),
        ("a{7}", "neither"),
        ("{3..1}", "must go up"),
        ("{0..99999999}", "must go up, by less"),
        ("{0..9999}{0..9999}", "more than 1,000,000"),
    ],
)
def test_braces_that_make_no_sense_are_an_error(tmp_path, text, message):
    with pytest.raises(DataError, match=rf"data\.path: .*{message}"):
        open_tars(text)


def test_path_with_wildcards_takes_files_by_name(tmp_path):
    for name, value in [("train-b", 2), ("train-a", 1), ("val-a", 3)]:
        write_tar(tmp_path / f"{name}.tar", [("x.png", png(value))])
    for path, expected in [
        ("train-*.tar", [1, 2]),
        ("{val,train}-*.tar", [3, 1, 2]),
        ("train-[b].tar", [2]),
        ("*.tar", [1, 2, 3]),
    ]:
        source = open_tars(tmp_path / path, size=1)
        assert values(source, source.references()) == expected
    (tmp_path / "odd{1}.tar").write_bytes((tmp_path / "val-a.tar").read_bytes())
    source = open_tars(tmp_path / "odd{1}.tar", size=1)
    assert values(source, source.references()) == [3]


def test_shards_that_are_missing_are_each_named(tmp_path):
    grey(tmp_path, [1, 1])
    with pytest.raises(DataError, match=r"2 of 4 are missing: \S*/2\.tar, \S*/3\.tar$"):
        open_tars(f"{tmp_path}/{{0..3}}.tar")
    with pytest.raises(DataError, match=r"missing: .*x21\.tar and 78 more$"):
        open_tars(f"{tmp_path}/{{0,x{{2..99}}}}.tar".replace("{2..99}", "{02..99}"))
    with pytest.raises(DataError, match=r"does not exist \(seen from"):
        open_tars(tmp_path / "no-*.tar")


@pytest.mark.parametrize("path", ["{0,1,0}.tar", "{0,*}.tar", "{1,link}.tar"])
def test_shard_that_is_named_twice_is_an_error(tmp_path, path):
    grey(tmp_path, [1, 1])
    (tmp_path / "link.tar").symlink_to("1.tar")
    with pytest.raises(DataError, match=r"names \S*tar twice, also as"):
        open_tars(tmp_path / path)


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.TAR.XZ", "a.tar"])
def test_compressed_tar_is_refused_with_what_to_do(tmp_path, name):
    with tarfile.open(tmp_path / name, "w:gz" if name == "a.tar" else "w") as tar:
        tar.add(__file__)
    with pytest.raises(DataError, match=rf"{name} is compressed.*unpack it to a \.tar"):
        TypeAdapter(DataSpec).validate_python({"path": str(tmp_path / name), "size": 8}).open()


def test_tar_whose_first_name_begins_as_a_compressed_file_is_a_tar(tmp_path):
    source = open_tars(write_tar(tmp_path / "a.tar", [("BZhang.png", png(7))]), size=1)
    assert values(source, source.references()) == [7]


def test_braces_that_are_nested_too_deep_are_an_error():
    with pytest.raises(DataError, match="has too many braces, one in another"):
        open_tars("{," * 1100 + "b" + "}" * 1100)


@pytest.mark.parametrize("path", ["https://x.org/a-{0..3}.tar", "s3://a/b.tar", "pipe:cat a.tar"])
def test_path_that_is_elsewhere_is_refused(path):
    with pytest.raises(DataError, match="must be files; mount them here"):
        open_tars(path)


def test_folder_in_place_of_tars_is_refused_with_what_to_set(tmp_path):
    with pytest.raises(DataError, match=r'is not a file; set data\.kind = "folder"'):
        open_tars(tmp_path)
    grey(tmp_path, [1])
    with pytest.raises(DataError, match=r"is a folder; name the files in it, as in '.*/\*\.tar'"):
        open_tars(tmp_path)


# ---- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["a.tar", "train-{000000..000146}.tar", "*.TAR", "{a,b}/{0..9}.tar", "{%s}.tar" % ("a," * 999)],
)
def test_kind_is_told_by_a_path_that_names_tars(path):
    spec = TypeAdapter(DataSpec).validate_python({"path": path, "size": 8})
    assert spec == TarSpec(path=path, size=8)


RUN = {
    "model": {"kind": "dit", "patch_size": 2, "width": 32, "depth": 1, "num_heads": 2},
    "training": {"images": 64, "checkpoint_every": 64, "batch_size": 16},
}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"cache": "c"}, "data.cache: cannot be used with kind = 'tar'"),
        ({"classes": -1}, "data.classes: must be the number of classes, or a list"),
        ({"classes": True}, "data.classes: must be the number of classes, or a list"),
        ({"classes": []}, "data.classes: must be the number of classes, or a list"),
        ({"classes": ["a", "a"]}, "data.classes: must name each class once"),
        ({"label_key": "txt"}, "data.label_key: has no effect without data.classes"),
        ({"label_key": "txt", "classes": 0}, "data.label_key: has no effect without data.classes"),
        ({"label_key": ".cls", "classes": 2}, "data.label_key: "),
        ({"shuffle_buffer": -1}, "data.shuffle_buffer: must be greater than or equal to 0"),
    ],
)
def test_settings_of_tars_that_are_wrong_are_named(table, message):
    with pytest.raises(ConfigError, match=message):
        parse(RUN | {"data": {"path": "a.tar", "size": 8, **table}}, "it")


def test_settings_of_tars_are_written_out_and_read_back(tmp_path):
    data = {"path": "a.tar", "size": 8, "classes": ["x", "y"], "label_key": "json.y"}
    (tmp_path / "a.toml").write_text(parse(RUN | {"data": data}, "it").dump())
    assert config.load(tmp_path / "a.toml").data == TarSpec(**data)
    with pytest.raises(ValidationError):
        TarSpec(path="a.tar", size=8, shuffle_buffer=1.5)


# ---- processes -----------------------------------------------------------------------------------


def test_tars_survive_a_pickle_as_workers_that_are_no_forks_need(tmp_path):
    pattern = write_digits(tmp_path, number=30)
    source = open_tars(pattern, classes=10)
    again = pickle.loads(pickle.dumps(source))
    assert again.classes == source.classes
    for reference in source.references():
        assert torch.equal(again[reference].image, source[reference].image)
        assert again[reference].label == source[reference].label


def test_no_more_files_are_open_than_a_process_may_have(tmp_path):
    gc.collect()  # of other tests
    before = len(os.listdir("/proc/self/fd"))
    source = grey(tmp_path, [1] * 100, shuffle_buffer=1)
    assert sorted(values(source, islice(source.order(seed=0), 100))) == list(range(100))
    assert len(os.listdir("/proc/self/fd")) - before <= tar_samples.OPEN_SHARDS
