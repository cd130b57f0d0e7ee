"""What all sources of images share: the same images, their settings, and bad files."""

import io
import itertools
import json
import os
import pickle
import struct
import zipfile
import zlib
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from hdit.config import ConfigError, parse
from hdit.data import (
    DataSpec,
    FolderSpec,
    HubSpec,
    NpzSpec,
    PythonSpec,
    ShapesSpec,
    ZipSpec,
)
from hdit.data.batches import Batches, Layout
from hdit.data.images import MAX_PIXELS, MIN_DRAWN, Images, ImagesSpec, too_many
from hdit.data.source import DataError, Skipped
from hdit.data.transforms import to_image, to_mode, to_tensor

CLASSES = ["cross", "disc", "ring", "square", "triangle"]  # sorted


def drawn() -> list[tuple[np.ndarray, int]]:
    """60 images (h w c) that are larger than they are wanted, by class."""
    source = ShapesSpec(size=(24, 30), num_images=60).open()
    images = [
        (sample.image.permute(1, 2, 0).numpy(), CLASSES.index(source.classes[sample.label]))
        for sample in (source[i] for i in range(60))
    ]
    return sorted(images, key=lambda image: image[1])


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


class Hooked:
    """What a user's function may return: PIL images or tensors."""

    classes = tuple(CLASSES)

    def __init__(self, tensors: bool):
        self.images, self.tensors = drawn(), tensors

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        pixels, label = self.images[index]
        if self.tensors:
            return torch.from_numpy(pixels.copy()).permute(2, 0, 1), torch.tensor(label)
        return Image.fromarray(pixels), label


def open_images() -> Hooked:
    return Hooked(tensors=False)


def open_tensors() -> Hooked:
    return Hooked(tensors=True)


def write_tree(write, sheet: str | None) -> None:
    """The images through `write(name, content)`: in folders, or flat beside a sheet of labels."""
    names = []
    for i, (pixels, label) in enumerate(drawn()):
        names.append((f"{i:02}.png" if sheet else f"{CLASSES[label]}/{i:02}.png", label))
        write(names[-1][0], png(pixels))
    if sheet == "metadata.jsonl":
        rows = [json.dumps({"file_name": name, "label": CLASSES[y]}) for name, y in names]
        write(sheet, "\n".join(reversed(rows)).encode())
    elif sheet == "metadata.csv":
        rows = [f"{name},a note,{CLASSES[y]}" for name, y in names]
        write(sheet, "\r\n".join(["file_name,text,label", *rows]).encode("utf-8-sig"))
    elif sheet == "dataset.json":
        write(sheet, json.dumps({"labels": names}).encode())


def write_zip(path, compression, sheet=None, prefix="") -> ZipSpec:
    with zipfile.ZipFile(path, "w", compression) as file:
        write_tree(lambda name, content: file.writestr(prefix + name, content), sheet)
    return ZipSpec(path=str(path), size=16)


def write_folder(path, sheet=None) -> FolderSpec:
    def write(name, content):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)

    write_tree(write, sheet)
    return FolderSpec(path=str(path), size=16)


def write_npz(path, save, key) -> NpzSpec:
    images, labels = zip(*drawn(), strict=True)
    save(path, np.stack(images), **{key: np.array(labels)})
    return NpzSpec(path=str(path), size=16)


def write_hub(path, strings: bool) -> HubSpec:
    datasets = pytest.importorskip("datasets", reason="needs hdit[data]: datasets is not installed")
    images, labels = zip(*drawn(), strict=True)
    label = datasets.Value("string") if strings else datasets.ClassLabel(names=CLASSES)
    table = datasets.Dataset.from_dict(
        {
            "image": [{"bytes": png(pixels), "path": None} for pixels in images],
            "label": [CLASSES[y] for y in labels] if strings else list(labels),
        },
        features=datasets.Features({"image": datasets.Image(), "label": label}),
    )
    table.save_to_disk(str(path))
    return HubSpec(path=str(path), size=16)


HERE = __name__
SOURCES = {
    "folder, metadata.jsonl": lambda p: write_folder(p, "metadata.jsonl"),
    "folder, metadata.csv": lambda p: write_folder(p, "metadata.csv"),
    "folder, dataset.json": lambda p: write_folder(p, "dataset.json"),
    "zip": lambda p: write_zip(p.with_suffix(".zip"), zipfile.ZIP_STORED),
    "zip, deflated": lambda p: write_zip(p.with_suffix(".zip"), zipfile.ZIP_DEFLATED),
    "zip of a folder": lambda p: write_zip(p.with_suffix(".zip"), 0, None, "my_images/"),
    "zip, dataset.json": lambda p: write_zip(p.with_suffix(".zip"), 0, "dataset.json"),
    "zip, metadata.csv": lambda p: write_zip(p.with_suffix(".zip"), 0, "metadata.csv", "all/"),
    "npz": lambda p: write_npz(p.with_suffix(".npz"), np.savez, "arr_1"),
    "npz, compressed": lambda p: write_npz(p.with_suffix(".npz"), np.savez_compressed, "labels"),
    "python, images": lambda p: PythonSpec(hook=f"{HERE}:open_images", size=16),
    "python, tensors": lambda p: PythonSpec(hook=f"{HERE}:open_tensors", size=16),
    "hub": lambda p: write_hub(p, strings=False),
    "hub, strings": lambda p: write_hub(p, strings=True),
}
NUMBERED = ("folder, dataset.json", "zip, dataset.json", "npz", "npz, compressed")


def take(source, n=5, workers=0):
    return list(islice(Batches(source, seed=3, start=0, layout=Layout(16), workers=workers), n))


# ---- one interface -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("folder"))


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_of_the_same_images_gives_the_same_batches(tmp_path, folder, kind):
    ours, theirs = SOURCES[kind](tmp_path / "it").open(), folder.open()
    assert theirs.classes == CLASSES
    assert ours.classes == (list("01234") if kind in NUMBERED else CLASSES)
    for a, b in zip(take(ours), take(theirs), strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert a.skipped == b.skipped == []


@pytest.mark.parametrize("kind", ["folder, metadata.csv", "zip", "zip, deflated", "npz"])
def test_every_source_can_be_read_by_worker_processes(tmp_path, folder, kind):
    ours = SOURCES[kind](tmp_path / "it").open()
    ours[0]  # a handle that is open before the fork
    for a, b in zip(take(ours, workers=2), take(folder.open()), strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_survives_a_pickle_as_workers_that_are_no_forks_need(tmp_path, kind):
    source = SOURCES[kind](tmp_path / "it").open()
    again = pickle.loads(pickle.dumps(source))
    assert again.classes == source.classes
    for i in (0, 59):
        assert torch.equal(again[i].image, source[i].image)
        assert again[i].label == source[i].label


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_refuses_an_index_beyond_its_end(tmp_path, kind):
    source = SOURCES[kind](tmp_path / "it").open()
    assert len(source) == 60
    for index in (-1, 60):
        with pytest.raises(IndexError, match=f"image {index} of 60"):
            source[index]


# ---- the kind that a path tells ------------------------------------------------------------------


def validate(**table) -> ImagesSpec:
    return TypeAdapter(DataSpec).validate_python(table)


@pytest.mark.parametrize("kind", ["folder, metadata.csv", "zip", "npz", "hub"])
def test_kind_is_told_by_what_the_path_is(tmp_path, kind):
    spec = SOURCES[kind](tmp_path / "it")
    assert validate(path=spec.path, size=16) == spec
    assert len(validate(path=spec.path, size=16).open()) == 60


@pytest.mark.parametrize(
    ("path", "kind"), [("images", "folder"), ("a.zip", "zip"), ("A.NPZ", "npz"), ("a.b", "folder")]
)
def test_kind_of_a_path_that_is_not_there_yet_is_told_by_its_name(path, kind):
    assert validate(path=path, size=8).kind == kind


RUN = {
    "model": {
        "kind": "dit",
        "patch_size": 2,
        "width": 32,
        "depth": 1,
        "num_heads": 2,
    },
    "training": {"images": 64, "checkpoint_every": 64, "batch_size": 16},
}


def test_kind_that_is_left_out_is_written_out_and_reads_back(tmp_path):
    raw = RUN | {"data": {"path": "some.zip", "size": 16}}
    config = parse(raw, "it")
    assert raw["data"] == {"path": "some.zip", "size": 16}
    assert config.data.kind == "zip"
    assert '[data]\nkind = "zip"\n' in config.dump()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"size": 8}, r"data.kind: required, but not set; one of \['digits', .*'python'\]"),
        ({"path": 3, "size": 8}, "data.kind: required, but not set"),
        ({"path": __file__, "size": 8}, "data.kind: required, but not set"),
        ({"kind": "flder"}, "did you mean 'folder'"),
        ({"path": "x.zip"}, "data.size: required, but not set"),
        ({"path": "x.zip", "size": 8, "hook": "a:b"}, "it belongs to kind 'python'"),
        ({"path": "x", "size": 8, "crp": "center"}, "did you mean data.crop?"),
        ({"path": "x", "size": 8, "crop": "middle"}, "data.crop: must be 'center', 'shorter_side"),
        ({"path": "x", "size": 8, "min_crop": 0.5}, "data.min_crop: has no effect without crop"),
        ({"path": "x", "size": 8, "crop": "random", "cache": "c"}, "data.cache: cannot keep"),
        ({"kind": "python", "size": 8, "hook": "a:b", "cache": "c"}, "data.cache: cannot be used"),
        ({"path": "x", "size": 8, "background": "whyte"}, "data.background: must be an opaque col"),
        ({"path": "x", "size": 8, "background": "#fff8"}, "data.background: must be an opaque col"),
        ({"path": "x", "size": 8, "max_pixels": MAX_PIXELS + 1}, "data.max_pixels: must be less"),
        (
            {"path": "x", "size": 8, "bad_files": "fail", "max_bad_share": 0.1},
            "data.max_bad_share: has no effect with bad_files = 'fail'",
        ),
        ({"kind": "hub", "size": 8}, "data.name: must be set, or path"),
        ({"kind": "hub", "size": 8, "path": "x", "name": "y"}, "data.name: must be left out"),
        ({"kind": "hub", "size": 8, "path": "x", "config": "y"}, "data.config: has no effect"),
        ({"kind": "python", "size": 8, "hook": "module"}, "data.hook: must be module:function"),
    ],
)
def test_settings_that_are_wrong_are_named_by_their_key(data, message):
    with pytest.raises(ConfigError, match=message):
        parse(RUN | {"data": data}, "it")


@pytest.mark.parametrize(
    ("kind", "there", "hint"),
    [
        ("folder", "zip", 'is not a folder; set data.kind = "zip"'),
        ("zip", "folder, metadata.csv", 'is not a file; set data.kind = "folder"'),
        ("npz", "zip", "cannot be read as npz|has no arr_0"),
        ("zip", "npz", "has no image files"),
    ],
)
def test_path_of_another_kind_is_an_error_that_names_that_kind(tmp_path, kind, there, hint):
    path = SOURCES[there](tmp_path / "it").path
    with pytest.raises(DataError, match=hint):
        validate(kind=kind, path=path, size=8).open()


@pytest.mark.parametrize("kind", ["folder", "zip", "npz"])
def test_path_that_does_not_exist_is_an_error_that_names_it(tmp_path, kind):
    with pytest.raises(DataError, match=r"data\.path: .*nowhere' does not exist \(seen from"):
        validate(kind=kind, path=str(tmp_path / "nowhere"), size=8).open()


# ---- crop and background -------------------------------------------------------------------------


def torchvision_crop(image: Image.Image, size: int) -> np.ndarray:
    """Resize(size, BICUBIC) and CenterCrop(size) of torchvision, as in k-diffusion."""
    w, h = image.size
    short, long = (w, h) if w <= h else (h, w)
    new_short, new_long = size, int(size * long / short)
    new = (new_short, new_long) if w <= h else (new_long, new_short)
    pixels = np.asarray(image.resize(new, Image.Resampling.BICUBIC))
    top, left = (round((side - size) / 2.0) for side in pixels.shape[:2])
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize("shape", [(20, 20), (33, 47), (47, 33), (9, 100), (61, 64), (7, 7)])
@pytest.mark.parametrize("size", [7, 16, 33])
def test_shorter_side_crop_is_that_of_k_diffusion(tmp_path, shape, size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8))
    image.save(tmp_path / "a.png")
    ours = FolderSpec(path=str(tmp_path), size=size, crop="shorter_side").open()[0].image
    assert np.array_equal(ours.permute(1, 2, 0).numpy(), torchvision_crop(image, size))


@pytest.mark.parametrize("target", [(8, 24), (24, 8), (5, 7)])
@pytest.mark.parametrize("shape", [(40, 40), (1, 90), (90, 1), (13, 37)])
@pytest.mark.parametrize("crop", ["center", "shorter_side"])
def test_crops_have_exactly_the_shape_that_is_wanted(tmp_path, crop, shape, target):
    Image.new("RGB", shape[::-1], "red").save(tmp_path / "a.png")
    image = FolderSpec(path=str(tmp_path), size=target, crop=crop).open()[0].image
    assert image.shape == (3, *target)
    assert (image == torch.tensor([255, 0, 0])[:, None, None]).all()


@pytest.mark.parametrize(
    ("background", "expected"),
    [("white", [204, 204, 255]), ("black", [0, 0, 51]), ("#ff8000", [204, 102, 51])],
)
def test_background_is_what_alpha_lies_on(tmp_path, background, expected):
    Image.new("RGBA", (8, 8), (0, 0, 255, 51)).save(tmp_path / "a.png")  # alpha of 1/5
    source = FolderSpec(path=str(tmp_path), size=8, background=background).open()
    assert source[0].image[:, 0, 0].tolist() == expected


# ---- image modes -------------------------------------------------------------------------------


def one(tmp_path, name: str, channels: int = 3) -> list[int]:
    sample = FolderSpec(path=str(tmp_path), size=8, channels=channels).open()[0]
    assert sample.skipped == (), name
    assert (sample.image == sample.image[:, :1, :1]).all()
    return sample.image[:, 0, 0].tolist()


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif"])
def test_first_frame_is_taken_of_an_animation(tmp_path, name):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if name == "a.webp" else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    assert one(tmp_path, name) == [255, 0, 0]


@pytest.mark.parametrize(("channels", "expected"), [(3, [118, 118, 118]), (1, [118])])
def test_lab_is_converted(tmp_path, channels, expected):
    # L* of 50 and no colour is a grey of 0.1842, which sRGB codes as 118.4; 8 bits of L* round it
    Image.new("LAB", (8, 8), (128, 128, 128)).save(tmp_path / "a.tif")
    got = one(tmp_path, "a.tif", channels)
    assert got == pytest.approx(expected, abs=2)


def png_chunks(*chunks: tuple[bytes, bytes]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def png_header(width: int, height: int, depth: int = 8, colour: int = 2) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)


@pytest.mark.parametrize(
    ("colour", "pixel", "expected"),
    [
        (0, (0x4000,), [64, 64, 64]),
        (2, (0x4000, 0x8000, 0xFFFF), [64, 128, 255]),
        (4, (0x4000, 0xFFFF), [64, 64, 64]),
        (6, (0x4000, 0x8000, 0xFFFF, 0xFFFF), [64, 128, 255]),
    ],
)
def test_png_of_sixteen_bits_keeps_its_range(tmp_path, colour, pixel, expected):
    rows = (b"\0" + struct.pack(f">{len(pixel)}H", *pixel) * 8) * 8
    (tmp_path / "a.png").write_bytes(
        png_chunks(png_header(8, 8, 16, colour), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    )
    assert one(tmp_path, "a.png") == pytest.approx(expected, abs=1)  # rounded, or its high byte


@pytest.mark.parametrize("channels", [1, 3])
def test_pgm_of_sixteen_bits_keeps_its_range(tmp_path, channels):
    values = np.array([0, 1000, 32768, 65535], ">u2")
    (tmp_path / "a.pgm").write_bytes(b"P5 2 2 65535\n" + values.tobytes())
    pixels = to_tensor(to_mode(Image.open(tmp_path / "a.pgm"), channels))
    assert pixels.flatten(1).tolist() == [[0, 4, 128, 255]] * channels


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_white_is_white_in_every_mode(tmp_path, mode, channels):
    white = Image.new("RGB", (8, 8), "white")
    if mode == "I;16":
        image = Image.fromarray(np.full((8, 8), 65535, np.uint16))
    else:
        image = white.convert(mode)
    name = "a.tif" if mode in ("CMYK", "YCbCr") else "a.png"
    image.save(tmp_path / name)
    assert one(tmp_path, name, channels) == [255] * channels


# ---- bad files -----------------------------------------------------------------------------------

NOISE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)


def encoded(fmt: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(NOISE).save(file, fmt)
    return file.getvalue()


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


def bomb(width: int, height: int) -> bytes:
    """Claims more pixels than it has; whoever decodes it gets an error, or all of the memory."""
    return png_chunks(png_header(width, height), (b"IDAT", zlib.compress(b"\0" * 64)))


DAMAGE = {
    "bomb.png": (
        bomb(20_000, 8_000),
        "20000 x 8000 pixels are more than data.max_pixels = 1000000",
    ),
    "bomb_above_pillows.png": (bomb(50_000, 50_000), "2500000000 pixels"),
    "empty.png": (b"", "the file is empty"),
    "header.jpg": (encoded("jpeg")[:10], ""),
    "ihdr_crc.png": (flipped(encoded("png"), 29), "no format"),
    "narrow.png": (bomb(1_000_000, 1), "1000000 x 1 pixels are too narrow to be made 256 x 256"),
    "page.jpg": (b"<html>404 Not Found</html>", "no format"),
    "pixels_crc.png": (flipped(encoded("png"), 600), ""),
    "program.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "no format"),
    "program_too.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "no format"),
    "text.png": (b"not an image", "no format"),
    "truncated.gif": (encoded("gif")[:400], ""),
    "truncated.jpg": (encoded("jpeg")[:-300], "truncated"),
    "truncated_tables.jpg": (encoded("jpeg")[:500], "Truncated"),
    "truncated.png": (encoded("png")[:500], "truncated"),
    "truncated.webp": (encoded("webp")[:300], ""),
    "zero_width.png": (png_chunks(png_header(0, 8), (b"IEND", b"")), "no format"),
}
DAMAGE_OF_NAMES = {"loop.png": "OSError", "nowhere.png": "FileNotFoundError", "pipe.png": "regular"}
BAD_SIZE = {"size": 256, "max_pixels": 1_000_000, "max_bad_share": 1.0}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A folder of as many kinds of damage as there are, with 24 images that are well."""
    path = tmp_path_factory.mktemp("damaged")
    for i in range(24):
        (path / f"good{i}.png").write_bytes(png(NOISE))
    for name, (data, _) in DAMAGE.items():
        (path / name).write_bytes(data)
    (path / "nowhere.png").symlink_to(path / "removed.png")
    (path / "loop.png").symlink_to(path / "loop.png")
    os.mkfifo(path / "pipe.png")
    return path


def skipped_in_an_epoch(source, workers) -> set[Skipped]:
    seen = itertools.chain.from_iterable(b.skipped for b in take(source, 3, workers))
    return set(seen)


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_files_are_each_named_with_a_reason_and_stood_in_for(damaged, workers):
    source = FolderSpec(path=str(damaged), **BAD_SIZE).open()
    bad = {name: reason for name, (_, reason) in DAMAGE.items() if name != "program.eps"}
    bad |= DAMAGE_OF_NAMES
    assert len(source) == 24 + len(bad)  # .eps is no image to begin with
    reasons = {os.path.basename(s.path): s.reason for s in skipped_in_an_epoch(source, workers)}
    assert sorted(reasons) == sorted(bad)
    for name, reason in reasons.items():
        assert bad[name] in reason, name
        assert reason.partition(": ")[2], name
        assert "0x" not in reason, "an address says nothing"
    for batch in take(source, 3, workers):
        assert batch.images.shape == (16, 3, 256, 256)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_file_without_permission_is_bad(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(png(NOISE))
    (tmp_path / "a.png").chmod(0)
    [skipped] = FolderSpec(path=str(tmp_path), size=8).open()[0].skipped
    assert "PermissionError" in skipped.reason


def test_large_image_within_the_limit_gives_no_warning(tmp_path):
    # above the size that Pillow warns of; 1 bit a pixel keeps it small
    Image.new("1", (9500, 9500), 1).save(tmp_path / "a.png")
    assert one(tmp_path, "a.png", channels=1) == [255]


def test_bad_files_that_fail_end_at_the_first_with_its_name(damaged):
    source = FolderSpec(path=str(damaged), size=256, bad_files="fail").open()
    good = source.entries.names.index("good0.png")
    assert source[good].skipped == ()
    at = source.entries.names.index("text.png")
    for _ in range(2):
        with pytest.raises(DataError, match=r"/text\.png: .*no format.*; mend or remove it"):
            source[at]


TORN = ValueError("torn")


class Written:
    """Entries of which some are bad, and how often each was tried."""

    setting, place = "data.path", "written"

    def __init__(self, length: int, bad, error=TORN):
        self.length, self.bad, self.error, self.classes = length, set(bad), error, []
        self.tried = [0] * length

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        return f"page {index}"

    def load(self, index: int):
        self.tried[index] += 1
        if index in self.bad:
            raise self.error
        return Image.new("L", (1, 1), index % 256), 0


def written(length, bad, error=TORN, **settings):
    spec = FolderSpec(path="written", size=1, channels=1, **settings)
    return Images(spec, Written(length, bad, error))


def draw_all(source) -> None:
    for i in np.random.default_rng(0).permutation(len(source)).tolist():
        source[i]


def test_bad_image_is_tried_once():
    source = written(8, [2, 3], max_bad_share=0.25)
    for _ in range(3):
        draw_all(source)
    assert [source.entries.tried[i] for i in (2, 3)] == [1, 1]
    assert [skipped.path for skipped in source[2].skipped] == ["page 2", "page 3"]
    assert {skipped.reason for skipped in source[2].skipped} == {"ValueError: torn"}
    assert source[2].image.item() == 4


def test_share_of_bad_images_above_the_limit_ends_it_early():
    source = written(10_000, range(0, 10_000, 2))
    message = (
        r"data\.path: (\d+) of (\d+) files drawn from 'written' so far are bad, beyond .*0\.05"
    )
    with pytest.raises(DataError, match=message + r"; the last: page \d*[02468]: ValueError: torn"):
        draw_all(source)
    assert sum(source.entries.tried) < 3 * MIN_DRAWN


@pytest.mark.parametrize(
    ("bad", "share", "fails"),
    [
        (50, None, False),
        (51, None, True),
        (0, 0.0, False),
        (1, 0.0, True),
        (300, 0.3, False),
        (900, 1.0, False),
    ],
)
def test_share_of_bad_images_is_exact_once_all_were_drawn(bad, share, fails):
    source = written(1000, range(bad), max_bad_share=share)
    if not fails:
        draw_all(source)
        return
    with pytest.raises(DataError, match=r"beyond data\.max_bad_share"):
        draw_all(source)


def test_share_of_bad_images_is_not_judged_by_those_that_only_stood_in():
    # 40 bad ones side by side are 4 % of all, but nearly all of what the first draw tries
    source = written(1000, range(40))
    for i in range(40, 40 + MIN_DRAWN):
        source[i]
    assert len(source[0].skipped) == 40
    draw_all(source)


def test_share_of_bad_images_is_judged_by_more_than_chance():
    rng = np.random.default_rng(0)
    # at a true share of 4 % no order of 2000 images in 200 is taken for more than 5 %
    for _ in range(200):
        bad = rng.permutation(2000) < 80
        counts = np.cumsum(bad)
        assert not any(too_many(int(c), n, 2000, 0.05) for n, c in enumerate(counts, 1))


@pytest.mark.parametrize(
    ("length", "bad", "share", "fails"),
    [
        (50, 25, None, True),
        (99, 4, None, False),
        (99, 5, None, True),
        (99, 1, 0.0, True),
        (99, 90, 0.9, True),
        (99, 90, 0.91, False),
        (1, 0, 0.0, False),
    ],
)
def test_share_of_few_bad_images_is_exact(length, bad, share, fails):
    source = written(length, range(bad), max_bad_share=share)
    source[length - 1]  # a good one says nothing
    if not fails:
        draw_all(source)
        assert [source.entries.tried[i] for i in range(bad)] == [1] * bad
        return
    message = rf"{bad} of the {length} files in 'written' are bad, beyond data\.max_bad_share = .*"
    with pytest.raises(DataError, match=message + "; the first: page 0: ValueError: torn"):
        source[0]


def test_few_bad_images_are_judged_alike_by_any_number_of_workers(tmp_path):
    for i in range(12):
        Image.new("L", (1, 1), i).save(tmp_path / f"{i:02}.png")
    (tmp_path / "03.png").write_bytes(b"torn")
    spec = FolderSpec(path=str(tmp_path), size=1, max_bad_share=0.08)
    for workers in (0, 2):
        stream = Batches(spec.open(), seed=0, start=0, layout=Layout(4), workers=workers)
        with pytest.raises(DataError, match=r"1 of the 12 files in .* are bad"):
            list(islice(stream, 3))  # one pass


def test_few_images_that_are_all_bad_are_told_so():
    with pytest.raises(
        DataError, match=r"none of the 3 files in 'written' could be read.*page 0: V"
    ):
        written(3, range(3))[1]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        KeyboardInterrupt(),
        SystemExit(),
        OSError(24, "Too many open files"),
        DataError("x"),
    ],
)
def test_what_no_file_can_be_blamed_for_is_not_swallowed(error):
    with pytest.raises(type(error)):
        written(8, [2], error)[2]


def test_to_image_refuses_what_is_no_image():
    for shape in [(3, 3), (3, 3, 5), (0, 3, 3)]:
        with pytest.raises(ValueError, match=r"must be uint8|0 x 3 pixels"):
            to_image(np.zeros(shape, np.uint8))


def test_specs_are_strict():
    with pytest.raises(ValidationError):
        NpzSpec(path="x", size=8, max_pixels=1.5)
