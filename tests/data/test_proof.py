"""500 real images through every source, through damage, and through several processes."""

import csv
import io
import json
import os
import struct
import warnings
import zipfile
import zlib
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hdit.config import merge, parse
from hdit.data import DigitsSpec, FolderSpec, HubSpec, NpzSpec, PythonSpec, ZipSpec
from hdit.data.batches import Batch, Batches, Layout, dataset_indices
from hdit.data.source import DataError
from hdit.training.trainer import Trainer

COUNT, BATCH = 500, 50
TEN = list("0123456789")
GREY = {"size": 8, "channels": 1}


def digits() -> tuple[np.ndarray, np.ndarray]:
    """The first 500 handwritten digits, by class: (500 8 8) uint8 and (500,) labels."""
    source = DigitsSpec(split="all").open()
    samples = [source[i] for i in range(COUNT)]
    images = np.stack([sample.image[0].numpy() for sample in samples])
    labels = np.array([sample.label for sample in samples])
    order = np.argsort(labels, kind="stable")
    return images[order], labels[order]


IMAGES, LABELS = digits()


def encoded(image: np.ndarray, fmt: str = "png") -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, fmt)
    return file.getvalue()


# ---- every source --------------------------------------------------------------------------------


class Hooked:
    classes = TEN

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(IMAGES[index]), int(LABELS[index])


def open_digits() -> Hooked:
    return Hooked()


def write(path: Path, name: str, content: bytes) -> None:
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / name).write_bytes(content)


def flat(i: int) -> str:
    return f"img{i:03}.png"


def write_classes(path: Path) -> FolderSpec:
    for i, image in enumerate(IMAGES):
        write(path, f"{LABELS[i]}/{flat(i)}", encoded(image))
    return FolderSpec(path=str(path), **GREY)


def write_jsonl(path: Path) -> FolderSpec:
    rows = []
    for i, image in enumerate(IMAGES):
        write(path, flat(i), encoded(image))
        rows.append(json.dumps({"file_name": flat(i), "label": int(LABELS[i])}))
    write(path, "metadata.jsonl", "\n".join(rows).encode())
    return FolderSpec(path=str(path), **GREY)


def write_csv(path: Path) -> FolderSpec:
    for i, image in enumerate(IMAGES):
        write(path, flat(i), encoded(image))
    with open(path / "metadata.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["label", "file_name"])
        rows.writerows((f"digit {LABELS[i]}", flat(i)) for i in reversed(range(COUNT)))
    return FolderSpec(path=str(path), **GREY)


def write_zip(path: Path) -> ZipSpec:
    with zipfile.ZipFile(path.with_suffix(".zip"), "w", zipfile.ZIP_DEFLATED) as file:
        for i, image in enumerate(IMAGES):
            file.writestr(f"00000/{flat(i)}", encoded(image))
        labels = [[f"00000/{flat(i)}", int(LABELS[i])] for i in range(COUNT)]
        file.writestr("dataset.json", json.dumps({"labels": labels}))
    return ZipSpec(path=str(path.with_suffix(".zip")), **GREY)


def write_npz(path: Path) -> NpzSpec:
    np.savez(path.with_suffix(".npz"), IMAGES[..., None], LABELS)
    return NpzSpec(path=str(path.with_suffix(".npz")), **GREY)


def name_hook(path: Path) -> PythonSpec:
    return PythonSpec(hook=f"{__name__}:open_digits", **GREY)


def write_hub(path: Path) -> HubSpec:
    datasets = pytest.importorskip("datasets", reason="needs hdit[data]: datasets is not installed")
    table = datasets.Dataset.from_dict(
        {
            "image": [{"bytes": encoded(image), "path": None} for image in IMAGES],
            "label": LABELS.tolist(),
        },
        features=datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=TEN)}
        ),
    )
    table.save_to_disk(str(path))
    return HubSpec(path=str(path), **GREY)


SOURCES = {
    "folders of classes": write_classes,
    "metadata.jsonl": write_jsonl,
    "metadata.csv": write_csv,
    "zip with dataset.json": write_zip,
    "npz": write_npz,
    "hook": name_hook,
    "hub": write_hub,
}


@pytest.fixture(scope="module", params=SOURCES)
def source(request, tmp_path_factory):
    return SOURCES[request.param](tmp_path_factory.mktemp("source") / "it").open()


def take(source, n: int, seed: int = 0, workers: int = 0, layout=None) -> list[Batch]:
    layout = layout or Layout(BATCH)
    return list(islice(Batches(source, seed=seed, start=0, layout=layout, workers=workers), n))


@pytest.mark.parametrize(("seed", "workers"), [(0, 0), (1, 0), (2**40, 2)])
def test_every_source_gives_the_same_batches_of_the_real_images(source, seed, workers):
    """Three epochs: the images of the arrays themselves, each once an epoch, in an order that
    depends on the seed and not on the source."""
    names = [f"digit {i}" for i in range(10)]
    assert source.classes in (TEN, names)
    assert len(source) == COUNT
    epochs = 3
    batches = take(source, epochs * COUNT // BATCH, seed, workers)
    images = torch.cat([batch.images for batch in batches])
    labels = torch.cat([batch.labels for batch in batches])
    counters = np.concatenate([batch.counters for batch in batches])
    assert counters.tolist() == list(range(epochs * COUNT))
    order = dataset_indices(seed, counters, COUNT)
    assert (np.sort(order.reshape(epochs, COUNT), 1) == np.arange(COUNT)).all()
    assert np.array_equal(images[:, 0].numpy(), IMAGES[order])
    assert np.array_equal(labels.numpy(), LABELS[order])
    assert [batch.skipped for batch in batches] == [[]] * len(batches)
    assert not np.array_equal(order[:COUNT], order[COUNT : 2 * COUNT])


def test_two_processes_see_disjoint_halves_of_what_one_sees(source):
    whole = take(source, 12)
    first, second = (take(source, 12, layout=Layout(BATCH, 1, 2, rank)) for rank in (0, 1))
    for batch, a, b in zip(whole, first, second, strict=True):
        assert len(a.images) == len(b.images) == BATCH // 2
        assert not set(a.counters) & set(b.counters)
        for part in (a, b):
            mine = np.searchsorted(batch.counters, part.counters)
            assert batch.counters[mine].tolist() == part.counters.tolist()
            assert torch.equal(part.images, batch.images[mine])
            assert torch.equal(part.labels, batch.labels[mine])
            assert part.position.tolist() == mine.tolist()
        assert set(a.counters) | set(b.counters) == set(batch.counters)


# ---- damage --------------------------------------------------------------------------------------

NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)


def noise(fmt: str) -> bytes:
    return encoded(NOISE, fmt)


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def bomb() -> bytes:
    """A header of 60,000 x 60,000 pixels, and next to nothing behind it."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(b"\0" * 64))


def wrong_checksum() -> bytes:
    whole = bytearray(noise("png"))
    at = whole.index(b"IDAT") + 300
    whole[at] ^= 0x10
    return bytes(whole)


def animation() -> bytes:
    """A GIF whose first frame breaks off, with a trailer as if it were whole."""
    return noise("gif")[:900] + b"\x00\x3b"


FILES = {
    "truncated.jpg": noise("jpeg")[:-900],
    "header_alone.jpg": noise("jpeg")[:40],
    "truncated.png": noise("png")[:3000],
    "wrong_checksum.png": wrong_checksum(),
    "no_bytes.png": b"",
    "text.png": b"these are words\n" * 20,
    "page.jpg": b"<!DOCTYPE html><html><title>403 Forbidden</title></html>",
    "bomb.png": bomb(),
    "broken_frame.gif": animation(),
    "truncated.tif": noise("tiff")[:2000],
    "truncated.webp": noise("webp")[:700],
    "truncated.bmp": noise("bmp")[:2000],
    "zeros.png": bytes(4096),
    "numbers.tif": encoded(NOISE[..., 0].astype(np.float32), "tiff"),
}
GOOD = 323


def write_damaged(path: Path) -> list[str]:
    """Digits in folders by class, and in some of them what is no image -> the names of these."""
    step = COUNT / GOOD
    for i in (int(k * step) for k in range(GOOD)):
        write(path, f"{LABELS[i]}/{flat(i)}", encoded(IMAGES[i]))
    bad = []
    for k, (name, content) in enumerate(FILES.items()):
        bad.append(f"{k % 10}/{name}")
        write(path, bad[-1], content)
    (path / "1" / "nowhere.png").symlink_to(path / "removed.png")
    (path / "1" / "loop.png").symlink_to(path / "1" / "loop.png")
    os.mkfifo(path / "3" / "pipe.png")
    (path / "2" / "folder.png").mkdir()  # a folder by any name is none of the images
    (path / "folder.png").mkdir()
    return [*bad, "1/nowhere.png", "1/loop.png", "3/pipe.png"]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> tuple[Path, list[str]]:
    path = tmp_path_factory.mktemp("damaged")
    return path, sorted(write_damaged(path))


@pytest.mark.parametrize("name", FILES)
def test_damage_is_damage_to_pillow_itself(tmp_path, name):
    """Or, of one, pixels that no one has given a range."""
    (tmp_path / name).write_bytes(FILES[name])
    with warnings.catch_warnings(action="ignore"):
        if name == "numbers.tif":
            with Image.open(tmp_path / name) as image:
                assert image.mode == "F"
            return
        with pytest.raises((OSError, SyntaxError, ValueError, Image.DecompressionBombError)):
            Image.open(tmp_path / name).load()


RUN = {
    "data": {"kind": "folder", "max_bad_share": 0.05, **GREY},
    "model": {"kind": "dit", "patch_size": 4, "width": 32, "depth": 1, "num_heads": 2},
    "training": {"checkpoint_every": 10_000, "batch_size": 32, "log_every": 32},
    "sampling": {"steps": 2, "grid": 0},
}


def expected_to_be_named(path: Path, bad: set[str], images: int) -> int:
    """How many bad files were met by then: those drawn, and the bad ones right behind these."""
    files = sorted(
        str(file.relative_to(path)) for file in path.glob("*/*") if file.name != "folder.png"
    )
    met = set()
    for i in dataset_indices(0, np.arange(images), len(files)).tolist():
        while files[i] in bad:
            met.add(files[i])
            i = (i + 1) % len(files)
    return len(met)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_gets_through_a_damaged_folder_and_names_each_bad_file_once(
    damaged, tmp_path, capfd, workers
):
    path, bad = damaged
    total = GOOD + len(bad)
    assert 0.049 < len(bad) / total <= 0.05
    images = -(-2 * total // 32) * 32  # two epochs
    changes = {
        "data": {"path": str(path)},
        "training": {"images": images, "workers": workers},
    }
    run = tmp_path / "run"
    assert Trainer(parse(merge(RUN, changes), "it"), run).fit()
    said = capfd.readouterr().err
    warned = [line for line in said.splitlines() if line.startswith("warning: skipped ")]
    files = [line.removeprefix("warning: skipped ").partition(": ")[0] for line in warned]
    assert sorted(files) == [f"{path}/{name}" for name in bad]
    assert all(line.partition(": ")[2].partition(": ")[2] for line in warned), "with a reason"
    assert "folders without images: folder.png/ (it has nothing)" in said
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines] == list(range(32, images + 1, 32))
    assert [line["skipped_files"] for line in lines] == [
        expected_to_be_named(path, set(bad), line["images"]) for line in lines
    ]
    assert lines[0]["skipped_files"] < lines[-1]["skipped_files"] == len(bad)
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert json.loads((run / "classes.json").read_text()) == {name: int(name) for name in TEN}


def test_training_ends_where_one_file_more_is_bad(damaged, tmp_path):
    path, bad = damaged
    limit = (len(bad) - 1) / (GOOD + len(bad))
    changes = {"data": {"path": str(path), "max_bad_share": limit}, "training": {"images": 704}}
    with pytest.raises(DataError, match=rf"{len(bad)} of {GOOD + len(bad)} files drawn"):
        Trainer(parse(merge(RUN, changes), "it"), tmp_path).fit()


def test_images_that_stand_in_for_damage_are_the_next_ones_with_their_labels(damaged):
    path, bad = damaged
    source = FolderSpec(path=str(path), **GREY).open()
    names = source.entries.names
    assert len(source) == GOOD + len(bad)
    assert set(bad) < set(names)
    for i, name in enumerate(names):
        next_good = next(n for n in names[i:] + names[:i] if n not in bad)
        label, _, file = next_good.partition("/")
        sample = source[i]
        assert sample.label == int(label)
        assert np.array_equal(sample.image[0].numpy(), IMAGES[int(file[3:6])])
        assert bool(sample.skipped) == (name in bad)
