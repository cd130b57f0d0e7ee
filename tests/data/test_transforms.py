import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from hdit.data.images import open_image
from hdit.data.transforms import center_crop, to_mode, to_tensor


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def adm_center_crop(image: Image.Image, size: int) -> np.ndarray:
    """guided-diffusion's center_crop_arr (Dhariwal & Nichol, 2021)."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.Resampling.BOX)
    scale = size / min(*image.size)
    image = image.resize(
        tuple(round(x * scale) for x in image.size), resample=Image.Resampling.BICUBIC
    )
    pixels = np.array(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


side = st.integers(1, 150)


@settings(max_examples=40, deadline=None)
@given(height=side, width=side, size=st.integers(1, 40), seed=st.integers(0, 99))
@example(height=64, width=64, size=32, seed=0)  # halved exactly
@example(height=63, width=127, size=32, seed=0)  # one pixel short of a halving
@example(height=131, width=65, size=16, seed=0)  # odd at each halving
@example(height=33, width=32, size=32, seed=0)  # an odd row to crop
@example(height=1, width=1, size=40, seed=0)
def test_center_crop_of_a_square_is_that_of_adm(height, width, size, seed):
    image = noise(height, width, seed)
    assert np.array_equal(np.array(center_crop(image, size, size)), adm_center_crop(image, size))


@settings(max_examples=40, deadline=None)
@given(height=side, width=side, target=st.tuples(st.integers(1, 60), st.integers(1, 60)))
@example(height=1, width=100, target=(60, 1))
@example(height=49, width=35, target=(7, 5))
def test_center_crop_has_exactly_the_target_shape(height, width, target):
    assert to_tensor(center_crop(noise(height, width), *target)).shape == (3, *target)


def ramp(height: int, width: int) -> Image.Image:
    """Red grows from 0 at the left edge to 250 at the right one, green from top to bottom."""
    y, x = (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width
    pixels = np.stack(np.broadcast_arrays(x[None] * 250, y[:, None] * 250, 0), -1)
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


@pytest.mark.parametrize("source", [(90, 120), (120, 90), (100, 400), (33, 47), (16, 16)])
@pytest.mark.parametrize("target", [(16, 32), (32, 16), (24, 40), (40, 8)])
def test_center_crop_of_any_shape_keeps_the_centre_and_the_proportions(source, target):
    crop = to_tensor(center_crop(ramp(*source), *target)).double()
    red, green = crop[0].mean(0), crop[1].mean(1)
    for values, i in ((green, 0), (red, 1)):
        # the part of this side that is kept, where the target just fits
        kept = target[i] / source[i] / max(target[0] / source[0], target[1] / source[1])
        pixel = 250 * kept / target[i]
        # off by half a pixel where the margin is odd, and by the row that odd halvings drop
        assert values.mean() == pytest.approx(125, abs=0.5 * pixel + 250 / source[i] + 1)
        # The slope of the middle half, as bicubic flattens the ends of the ramp a little; each of
        # the two values is off by up to 1/2 in the source and 1/2 in the result.
        n = target[i]
        a, b = n // 4, n - 1 - n // 4
        slope = (values[b] - values[a]) / (b - a)
        assert slope == pytest.approx(pixel, rel=0.05, abs=2 / (b - a))


def test_center_crop_only_crops_where_a_side_already_fits():
    image = noise(10, 7)
    expected = np.array(image)[:, 1:5]  # 3 columns too many: 1 left, 2 right
    assert np.array_equal(np.array(center_crop(image, 10, 4)), expected)


def test_center_crop_halves_only_while_both_sides_of_the_target_fit_twice():
    blocks = noise(32, 32)
    image = blocks.resize((64, 64), Image.Resampling.NEAREST)  # box halving gives `blocks` back
    expected = np.array(blocks)[12:20]
    assert np.array_equal(np.array(center_crop(image, 8, 32)), expected)


def test_center_crop_enlarges_a_tiny_image():
    image = Image.new("RGB", (2, 1), (10, 20, 30))
    crop = to_tensor(center_crop(image, 32, 48))
    assert torch.equal(
        crop, torch.tensor([10, 20, 30], dtype=torch.uint8)[:, None, None].expand(3, 32, 48)
    )


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_to_tensor_puts_channels_before_rows_and_columns(mode):
    image = noise(5, 7).convert(mode)
    tensor = to_tensor(image)
    assert tensor.shape == (len(mode), 5, 7)
    assert tensor.dtype == torch.uint8
    for y in range(5):
        for x in range(7):
            pixel = image.getpixel((x, y))
            assert tensor[:, y, x].tolist() == list(pixel if mode == "RGB" else [pixel])


# ---- metadata that cannot be read ----------------------------------------------------------------

TAG = b"\x01\x12"  # orientation
DAMAGED_EXIF = {
    "no header": b"x",
    "empty": b"Exif\0\0",
    "other program's": b"Exif\0\0" + bytes(range(100)),
    "folder beyond the end": b"MM\0*\xff\xff\xff\xff",
    "cut": b"MM\0*\0\0\0\x08\0\x09" + TAG + b"\0\x03\0\0",
    "orientation of text": b"MM\0*\0\0\0\x08\0\x01" + TAG + b"\0\x02\0\0\0\x03six\0\0\0\0\0",
    "orientation that is none": b"MM\0*\0\0\0\x08\0\x01"
    + TAG
    + b"\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0",
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "TIFF", "MPO"])
def test_image_is_turned_upright_as_pillow_does(tmp_path, fmt, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    noise(4, 6).save(tmp_path / "it", fmt, exif=exif)
    with open_image(str(tmp_path / "it")) as image, Image.open(tmp_path / "it") as theirs:
        assert np.array_equal(to_mode(image, 3), ImageOps.exif_transpose(theirs).convert("RGB"))


@pytest.mark.parametrize("exif", DAMAGED_EXIF.values(), ids=DAMAGED_EXIF)
@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "MPO"])
@pytest.mark.filterwarnings("ignore")  # Pillow's, of metadata
def test_image_whose_exif_is_damaged_is_used_as_it_lies(tmp_path, fmt, exif):
    noise(4, 6).save(tmp_path / "it", fmt, exif=exif)
    stored = np.asarray(Image.open(tmp_path / "it").convert("RGB"))
    with open_image(str(tmp_path / "it")) as image:
        assert np.array_equal(to_mode(image, 3), stored)


def test_image_whose_orientation_tag_in_a_tiff_is_damaged_is_used_as_it_lies(tmp_path):
    noise(4, 6).save(tmp_path / "it.tif", tiffinfo={274: 6})
    content = (tmp_path / "it.tif").read_bytes()
    tag = b"\x12\x01\x03\0\x01\0\0\0"
    for damaged in (b"\x12\x01\x02\0\x01\0\0\0", b"\x12\x01\x03\0\0\0\0\0"):
        assert content.count(tag) == 1
        with open_image(content.replace(tag, damaged)) as image:
            assert np.array_equal(to_mode(image, 3), noise(4, 6))


def test_damaged_pixels_are_not_taken_for_damaged_exif(tmp_path):
    noise(40, 60).save(tmp_path / "it.png", exif=b"x")
    content = (tmp_path / "it.png").read_bytes()
    with open_image(content[: len(content) // 2]) as image, pytest.raises(OSError, match="truncat"):
        to_mode(image, 3)
