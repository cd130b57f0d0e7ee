import io
import math
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from hdit.data import DigitsSpec, FolderSpec, NpzSpec, ShapesSpec
from hdit.data.source import DataError

RED, BLUE = (255, 0, 0), (0, 0, 255)


# ---- digits --------------------------------------------------------------------------------------


def contents(split: str) -> Counter:
    digits = DigitsSpec(split=split).open()
    samples = [digits[i] for i in range(len(digits))]
    return Counter((sample.image.numpy().tobytes(), sample.label) for sample in samples)


def test_digits_train_and_test_are_disjoint_and_together_all():
    train, test, both = contents("train"), contents("test"), contents("all")
    assert both.total() == 1797
    assert train + test == both
    assert not train & test


def test_digits_of_the_test_split_are_each_sixth_of_all():
    test, both = DigitsSpec(split="test").open(), DigitsSpec(split="all").open()
    assert len(test) == 1797 // 6
    assert all(torch.equal(test[i].image, both[6 * i + 5].image) for i in range(len(test)))


def test_digits_labels_have_the_counts_of_the_published_set():
    # scikit-learn's description of load_digits: about 180 of each class
    digits = DigitsSpec(split="all").open()
    counts = torch.tensor([digits[i].label for i in range(len(digits))]).bincount()
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


@pytest.mark.parametrize("split", ["train", "test"])
def test_digits_splits_hold_every_class(split):
    digits = DigitsSpec(split=split).open()
    assert digits.classes == list("0123456789")
    assert {digits[i].label for i in range(len(digits))} == set(range(10))


def test_digits_images_are_grey_uint8_of_full_range():
    spec = DigitsSpec(split="all")
    digits = spec.open()
    images = torch.stack([digits[i].image for i in range(len(digits))])
    assert images.shape == (1797, *spec.shape) == (1797, 1, 8, 8)
    assert images.dtype == torch.uint8
    assert (images.min(), images.max()) == (0, 255)


def test_digits_index_out_of_range_is_an_error():
    digits = DigitsSpec(split="test").open()
    with pytest.raises(IndexError):
        digits[len(digits)]


# ---- shapes --------------------------------------------------------------------------------------


def test_shapes_depend_on_index_and_seed_alone():
    first, again = ShapesSpec(size=16).open(), ShapesSpec(size=16, num_images=50).open()
    backwards = {i: again[i] for i in reversed(range(20))}
    for i in range(20):
        assert torch.equal(first[i].image, backwards[i].image)
        assert first[i].label == backwards[i].label
    images = [first[i].image for i in range(20)] + [
        ShapesSpec(size=16, seed=1).open()[i].image for i in range(20)
    ]
    assert len({image.numpy().tobytes() for image in images}) == 40


@pytest.mark.parametrize("size", [1, 8, (24, 40), (40, 24), 1024])
def test_shapes_come_at_any_resolution(size):
    spec = ShapesSpec(size=size)
    image = spec.open()[0].image
    assert image.shape == spec.shape
    assert spec.shape == ((3, *size) if isinstance(size, tuple) else (3, size, size))
    assert image.dtype == torch.uint8


def test_shapes_show_the_same_image_at_every_resolution():
    small, large = (ShapesSpec(size=size).open()[3] for size in (32, 256))
    pooled = torch.nn.functional.avg_pool2d(large.image.float(), 8)
    assert small.label == large.label
    # only pixels on the outline may differ: antialiasing with a linear ramp is not exact area
    assert (small.image - pooled).abs().mean() < 1


def test_shapes_cover_their_five_classes_evenly():
    shapes = ShapesSpec(size=8, num_images=500).open()
    counts = Counter(shapes[i].label for i in range(500))
    assert shapes.classes == ["disc", "ring", "square", "triangle", "cross"]
    assert set(counts) == set(range(5))
    assert min(counts.values()) > 100 - 5 * math.sqrt(500 * 0.2 * 0.8)  # 5 standard deviations


def moment_and_fill(image: torch.Tensor) -> tuple[float, float]:
    """Of the shape: polar moment of inertia / area^2, and area / that of the circle around it."""
    pixels = image.numpy().astype(float)
    change = np.abs(pixels - pixels[:, :1, :1]).sum(0)  # no shape reaches a corner
    cover = change / change.max()
    y, x = np.indices(cover.shape)
    area = cover.sum()
    r2 = (y - (cover * y).sum() / area) ** 2 + (x - (cover * x).sum() / area) ** 2
    return (cover * r2).sum() / area**2, area / (math.pi * r2[cover > 0.5].max())


# In the unit circle: disc; ring of inner radius 1/2; square of side 1.4; equilateral triangle;
# union of two bars of 1.9 x 0.6.
RADIUS_CROSS = math.hypot(0.95, 0.3)
AREA_CROSS = 2 * 1.9 * 0.6 - 0.36
INERTIA_CROSS = 2 * 1.14 * (1.9**2 + 0.6**2) / 12 - 0.36 * (2 * 0.36) / 12
GEOMETRY = {
    "disc": (1 / (2 * math.pi), 1),
    "ring": ((1 - 1 / 16) / (2 * math.pi * 0.75**2), 0.75),
    "square": (1 / 6, 2 / math.pi),
    "triangle": (1 / (3 * math.sqrt(3)), 3 * math.sqrt(3) / (4 * math.pi)),
    "cross": (INERTIA_CROSS / AREA_CROSS**2, AREA_CROSS / (math.pi * RADIUS_CROSS**2)),
}


def test_shapes_of_each_class_have_the_area_and_inertia_of_their_name():
    shapes = ShapesSpec(size=(192, 256)).open()
    seen = set()
    for i in range(24):
        image, label, _ = shapes[i]
        if (image.flatten(1).amax(1).int() - image.flatten(1).amin(1)).max() < 40:
            continue  # faint ink: rounding to uint8 would dominate
        name = shapes.classes[label]
        moment, fill = moment_and_fill(image)
        # The nearest two, disc and square, are 5 % apart in the moment. Rounding to 40 or more
        # levels and an outline that is one pixel wide cost 0.1 %.
        assert moment == pytest.approx(GEOMETRY[name][0], rel=0.003), name
        # the farthest pixel tells the radius to about 1 of at least 38 pixels, which counts twice
        assert fill == pytest.approx(GEOMETRY[name][1], rel=0.06), name
        seen.add(name)
    assert seen == set(GEOMETRY)


@pytest.mark.parametrize("index", [-1, 7, 100])
def test_shapes_index_out_of_range_is_an_error(index):
    with pytest.raises(IndexError, match=f"image {index} of 7"):
        ShapesSpec(size=8, num_images=7).open()[index]


# ---- folder: what it holds -----------------------------------------------------------------------


def save(path, colour=RED, size=(8, 8), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)


def open_folder(path, size=8, **settings):
    return FolderSpec(path=str(path), size=size, **settings).open()


def colour(image: torch.Tensor) -> list[int]:
    """The colour of an image of one colour, give or take the losses of a JPEG."""
    image = image.int()
    assert (image.amax((1, 2)) - image.amin((1, 2))).max() <= 4
    return image[:, 0, 0].tolist()


def test_folder_that_is_flat_has_no_classes_and_sorted_files(tmp_path):
    for name, value in [("c.png", 30), ("a.png", 10), ("B.PNG", 20)]:
        save(tmp_path / name, (value,) * 3)
    folder = open_folder(tmp_path)
    assert folder.classes == []
    assert [colour(folder[i].image)[0] for i in range(len(folder))] == [20, 10, 30]  # B < a < c
    assert {folder[i].label for i in range(len(folder))} == {0}
    assert {folder[i].skipped for i in range(len(folder))} == {()}


def test_folder_labels_follow_the_sorted_names_of_sub_folders(tmp_path):
    for name, value in [("zebra", 2), ("ant", 0), ("cat", 1)]:
        save(tmp_path / name / "1.png", (value,) * 3)
        save(tmp_path / name / "2.jpg", (value,) * 3)
    folder = open_folder(tmp_path)
    assert folder.classes == ["ant", "cat", "zebra"]
    samples = [folder[i] for i in range(len(folder))]
    assert [sample.label for sample in samples] == [0, 0, 1, 1, 2, 2]
    assert [colour(sample.image)[0] for sample in samples] == [0, 0, 1, 1, 2, 2]


def test_folder_takes_nested_images_into_the_class_above(tmp_path):
    save(tmp_path / "cat" / "2019" / "may" / "a.png", RED)
    save(tmp_path / "cat" / "b.png", RED)
    save(tmp_path / "dog" / "2020" / "a.png", BLUE)
    folder = open_folder(tmp_path)
    assert folder.classes == ["cat", "dog"]
    found = [(folder[i].label, tuple(colour(folder[i].image))) for i in range(len(folder))]
    assert found == [(0, RED), (0, RED), (1, BLUE)]


def test_folder_ignores_hidden_files_and_folders(tmp_path):
    save(tmp_path / "cat" / "a.png")
    save(tmp_path / "cat" / "._a.png", BLUE)
    save(tmp_path / "cat" / ".thumbs" / "a.png", BLUE)
    save(tmp_path / ".cache" / "a.png", BLUE)
    save(tmp_path / ".b.png", BLUE)
    folder = open_folder(tmp_path)
    assert folder.classes == ["cat"]
    assert folder.entries.names == ["cat/a.png"]


@pytest.mark.parametrize("extension", ["png", "jpg", "jpeg", "bmp", "gif", "tif", "webp", "ppm"])
def test_folder_reads_common_formats(tmp_path, extension):
    save(tmp_path / f"a.{extension}", (255, 255, 255))
    assert colour(open_folder(tmp_path)[0].image) == [255, 255, 255]


def test_folder_images_are_cropped_to_the_size_that_is_set(tmp_path):
    save(tmp_path / "wide.png", size=(50, 20))
    save(tmp_path / "tall.png", size=(9, 31))
    folder = open_folder(tmp_path, size=(16, 24))
    assert folder.spec.shape == (3, 16, 24)
    assert [folder[i].image.shape for i in range(2)] == [(3, 16, 24)] * 2


# ---- folder: what is wrong with it ---------------------------------------------------------------


def test_folder_that_is_missing_is_named(tmp_path):
    with pytest.raises(DataError, match=r"data\.path: .*/nowhere' does not exist"):
        open_folder(tmp_path / "nowhere")


def test_folder_that_is_a_file_is_named(tmp_path):
    save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"data\.path: .*/a\.png' is not a folder"):
        open_folder(tmp_path / "a.png")


@pytest.mark.parametrize("names", [[], ["notes.txt"], [".hidden.png"], ["sub/notes.txt"]])
def test_folder_without_images_is_named(tmp_path, names):
    root = tmp_path / "images"
    root.mkdir()
    for name in names:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("")
    with pytest.raises(DataError, match=r"data\.path: .*/images' has no image files"):
        open_folder(root)


def test_folder_with_images_beside_classes_is_named(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "cat" / "a.png")
    with pytest.raises(DataError, match=r"data\.path: .* images beside sub-folders .*\(cat/") as e:
        open_folder(tmp_path)
    assert str(tmp_path) in str(e.value)


def encoded(fmt: str) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, fmt)
    return file.getvalue()


BROKEN = {
    "zero.png": b"",
    "truncated.png": encoded("png")[:500],
    "truncated.jpg": encoded("jpeg")[:500],
    "header.jpg": encoded("jpeg")[:10],
    "text.png": b"not an image",
    "page.jpg": b"<html>404 Not Found</html>",
}


@pytest.mark.parametrize("name", BROKEN)
def test_folder_skips_a_broken_image_for_the_next_and_says_why(tmp_path, name):
    (tmp_path / name).write_bytes(BROKEN[name])
    save(tmp_path / "zzz.png", BLUE)
    folder = open_folder(tmp_path, max_bad_share=1.0)
    assert len(folder) == 2
    for _ in range(2):  # the second time from memory
        sample = folder[0]
        assert colour(sample.image) == list(BLUE)
        [(path, reason)] = sample.skipped
        assert path == str(tmp_path / name)
        assert reason.partition(": ")[0].endswith(("Error", "Exception"))
        assert reason.partition(": ")[2]
    assert folder[1].skipped == ()


def test_folder_stand_in_brings_its_own_label_and_wraps_around(tmp_path):
    save(tmp_path / "cat" / "a.png", RED)
    for name in BROKEN:
        (tmp_path / "dog").mkdir(exist_ok=True)
        (tmp_path / "dog" / name).write_bytes(BROKEN[name])
    folder = open_folder(tmp_path, max_bad_share=1.0)
    sample = folder[1]
    assert (sample.label, colour(sample.image)) == (0, list(RED))
    assert [skipped.path for skipped in sample.skipped] == [
        str(tmp_path / "dog" / name) for name in sorted(BROKEN)
    ]


def test_folder_of_unreadable_images_alone_is_an_error_with_a_reason(tmp_path):
    for name, data in BROKEN.items():
        (tmp_path / name).write_bytes(data)
    folder = open_folder(tmp_path)
    with pytest.raises(DataError, match=r"data\.path: none of the 6 files in .* could be") as e:
        folder[5]
    assert str(tmp_path) in str(e.value)
    assert f"header.jpg: {folder.unreadable[0].reason}" in str(e.value)


# ---- folder: colours and orientation -------------------------------------------------------------


def first(tmp_path, image: Image.Image, name: str, channels: int = 3, size=8, **options):
    image.save(tmp_path / name, **options)
    sample = open_folder(tmp_path, size, channels=channels)[0]
    assert sample.skipped == ()
    assert sample.image.dtype == torch.uint8
    return sample.image


def palette(colours: list[tuple[int, int, int]], index: int) -> Image.Image:
    image = Image.new("P", (8, 8), index)
    image.putpalette([value for entry in colours for value in entry])
    return image


def test_folder_grey_is_the_luma_of_rec_601(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    grey = first(tmp_path, Image.fromarray(colours), "a.png", channels=1)
    assert grey.shape == (1, 8, 8)
    expected = torch.from_numpy(colours @ np.array([0.299, 0.587, 0.114]))
    # rounding, and 16-bit weights in Pillow
    torch.testing.assert_close(grey[0].double(), expected, rtol=0, atol=0.51)


def test_folder_grey_image_has_three_equal_channels_in_rgb(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    image = first(tmp_path, Image.fromarray(grey), "a.png")
    assert torch.equal(image, torch.from_numpy(grey).expand(3, 8, 8))


@pytest.mark.parametrize(("mode", "ink"), [("1", 1), ("L", 255), ("LA", (255, 255))])
@pytest.mark.parametrize("channels", [1, 3])
def test_folder_reads_grey_modes(tmp_path, mode, ink, channels):
    image = first(tmp_path, Image.new(mode, (8, 8), ink), "a.png", channels)
    assert colour(image) == [255] * channels


@pytest.mark.parametrize(
    ("alpha", "expected"), [(0, [255, 255, 255]), (51, [204, 224, 254]), (255, [0, 100, 250])]
)
@pytest.mark.parametrize("name", ["a.png", "a.webp"])
def test_folder_lays_what_is_transparent_on_white(tmp_path, alpha, expected, name):
    options = {"lossless": True, "exact": True} if name == "a.webp" else {}
    image = first(tmp_path, Image.new("RGBA", (8, 8), (0, 100, 250, alpha)), name, **options)
    assert colour(image) == expected


def test_folder_lays_grey_with_alpha_on_white(tmp_path):
    image = first(tmp_path, Image.new("LA", (8, 8), (0, 51)), "a.png", channels=1)
    assert colour(image) == [204]


@pytest.mark.parametrize("name", ["a.png", "a.gif"])
def test_folder_palette_entry_that_is_transparent_is_white(tmp_path, name):
    image = palette([RED, BLUE], 0)
    image.paste(1, (4, 0, 8, 8))
    pixels = first(tmp_path, image, name, transparency=0)
    assert colour(pixels[:, :, :4]) == [255, 255, 255]
    assert colour(pixels[:, :, 4:]) == list(BLUE)


def test_folder_palette_with_an_alpha_for_each_entry_lies_on_white(tmp_path):
    image = first(tmp_path, palette([RED, BLUE], 1), "a.png", transparency=bytes([255, 51]))
    assert colour(image) == [204, 204, 255]


def test_folder_colour_key_of_an_rgb_png_is_white(tmp_path):
    image = Image.new("RGB", (8, 8), RED)
    image.paste(BLUE, (4, 0, 8, 8))
    pixels = first(tmp_path, image, "a.png", transparency=RED)
    assert colour(pixels[:, :, :4]) == [255, 255, 255]
    assert colour(pixels[:, :, 4:]) == list(BLUE)


@pytest.mark.parametrize(
    ("ink", "expected"),
    [((0, 0, 0, 0), [255] * 3), ((0, 0, 0, 255), [0] * 3), ((0, 255, 255, 0), [255, 0, 0])],
)
@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
def test_folder_reads_cmyk(tmp_path, ink, expected, name):
    image = first(tmp_path, Image.new("CMYK", (16, 16), ink), name)
    # JPEG loses up to 2 of 255 at this quality
    assert colour(image) == pytest.approx(expected, abs=2)


# where the stored left half comes to lie, by EXIF's orientation
LEFT = {
    1: np.s_[:, :, :8],
    2: np.s_[:, :, -8:],
    3: np.s_[:, :, -8:],
    4: np.s_[:, :, :8],
    5: np.s_[:, :8],
    6: np.s_[:, :8],
    7: np.s_[:, -8:],
    8: np.s_[:, -8:],
}


@pytest.mark.parametrize("orientation", LEFT)
def test_folder_turns_an_image_upright_by_its_exif(tmp_path, orientation):
    stored = Image.new("RGB", (16, 8), BLUE)
    stored.paste(RED, (0, 0, 8, 8))
    exif = stored.getexif()
    exif[0x0112] = orientation
    size = (8, 16) if orientation < 5 else (16, 8)  # 5 to 8 are turned by a quarter
    image = first(tmp_path, stored, "a.jpg", size=size, exif=exif, quality=100, subsampling=0)
    assert image.shape == (3, *size)
    # chroma at full resolution and quality 100: a rounding of YCbCr
    assert colour(image[LEFT[orientation]]) == pytest.approx(RED, abs=2)
    assert image.flip(1, 2)[LEFT[orientation]][2].min() > 250


@pytest.mark.parametrize("channels", [1, 3])
def test_folder_scales_sixteen_bit_greys(tmp_path, channels):
    pixels = np.full((8, 8), 0x8000, np.uint16)
    Image.fromarray(pixels).save(tmp_path / "grey.png")
    image = FolderSpec(path=str(tmp_path), size=8, channels=channels).open()[0].image
    assert image.unique().tolist() == [128]  # 0x8000 / 257 is 127.5, rounded to even


def test_folder_skips_numbers_without_a_range(tmp_path):
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "a.tiff")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    (skipped,) = FolderSpec(path=str(tmp_path), size=8, max_bad_share=1.0).open()[0].skipped
    assert skipped.path.endswith("a.tiff")
    assert "no fixed range" in skipped.reason


def test_folder_refuses_an_index_beyond_its_end(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert len(list(FolderSpec(path=str(tmp_path), size=8).open())) == 1


# ---- arrays --------------------------------------------------------------------------------------


def test_npz_of_statistics_is_no_images_and_says_so(tmp_path):
    np.savez(tmp_path / "stats.npz", mu=np.zeros(4), sigma=np.eye(4))
    with pytest.raises(DataError, match=r"it holds mu, sigma: statistics .* and no images"):
        NpzSpec(path=str(tmp_path / "stats.npz"), size=4).open()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_in_the_order_of_fortran_has_the_same_images(tmp_path, save):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3)).astype(np.uint8)
    save(tmp_path / "a.npz", arr_0=np.asfortranarray(pixels), arr_1=np.arange(3))
    images = NpzSpec(path=str(tmp_path / "a.npz"), size=4).open()
    for i in range(3):
        np.testing.assert_array_equal(images[i].image.permute(1, 2, 0), pixels[i])
        assert images[i].label == i


def test_npz_that_lies_is_an_error_of_the_setting_that_names_file_and_array(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=np.array([{}]))
    with pytest.raises(
        DataError, match=r"^data\.path: .*a\.npz.*: arr_0 holds .* no pickle is read"
    ):
        NpzSpec(path=str(tmp_path / "a.npz"), size=4).open()
