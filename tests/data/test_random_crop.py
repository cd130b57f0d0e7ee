"""The random crop: ADM's, by chances that are a function of seed and count alone."""

import math
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from hdit.data import FolderSpec
from hdit.data.batches import Batches, Layout
from hdit.data.source import Chance, Sample
from hdit.data.transforms import center_crop, random_crop

BELOW_ONE = math.nextafter(1, 0)
chance = st.floats(0, 1, exclude_max=True) | st.just(BELOW_ONE)
chances = st.tuples(chance, chance, chance)
side = st.integers(1, 120)
min_crop = st.floats(0.3, 1)


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(1, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def pick(u: float, low: int, high: int) -> int:
    """low to high, both included, alike."""
    return low + math.floor(u * (high - low + 1))


def adm_random_crop(image: Image.Image, size: int, min_frac: float, u) -> np.ndarray:
    """guided-diffusion's random_crop_arr (Dhariwal & Nichol, 2021), with max_crop_frac of 1."""
    dim = pick(u[0], math.ceil(size / 1.0), math.ceil(size / min_frac))
    while min(*image.size) >= 2 * dim:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.Resampling.BOX)
    scale = dim / min(*image.size)
    image = image.resize(
        tuple(round(x * scale) for x in image.size), resample=Image.Resampling.BICUBIC
    )
    pixels = np.array(image)
    y = pick(u[1], 0, pixels.shape[0] - size)
    x = pick(u[2], 0, pixels.shape[1] - size)
    return pixels[y : y + size, x : x + size]


@settings(max_examples=60, deadline=None)
@given(height=side, width=side, size=st.integers(1, 32), min_crop=min_crop, u=chances)
@example(height=64, width=64, size=16, min_crop=0.5, u=(BELOW_ONE,) * 3)  # halved once, not twice
@example(height=64, width=64, size=16, min_crop=0.5, u=(0.0, 0.0, 0.0))  # halved twice
@example(height=63, width=127, size=32, min_crop=0.8, u=(0.5, 0.9, 0.1))
@example(height=1, width=9, size=32, min_crop=0.8, u=(0.99, 0.99, 0.99))
def test_random_crop_of_a_square_is_that_of_adm(height, width, size, min_crop, u):
    image = noise(height, width)
    ours = np.array(random_crop(image, size, size, min_crop, u))
    assert np.array_equal(ours, adm_random_crop(image, size, min_crop, u))


@settings(max_examples=60, deadline=None)
@given(
    height=side,
    width=side,
    target=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    min_crop=min_crop,
    u=chances,
)
@example(height=1, width=100, target=(40, 1), min_crop=0.3, u=(BELOW_ONE,) * 3)
@example(height=100, width=1, target=(1, 40), min_crop=0.3, u=(BELOW_ONE,) * 3)
@example(height=49, width=35, target=(7, 5), min_crop=0.8, u=(0.6, BELOW_ONE, BELOW_ONE))
def test_random_crop_has_the_target_shape_and_lies_within_the_image(
    height, width, target, min_crop, u
):
    white = Image.new("RGB", (width, height), "white")
    pixels = np.array(random_crop(white, *target, min_crop, u))
    assert pixels.shape == (*target, 3)
    assert (pixels == 255).all(), "Pillow makes black what is beyond the edge"


def ramp(height: int, width: int) -> Image.Image:
    """Red tells the place from left to right, 5 to 245, and green from top to bottom."""
    y, x = (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width
    pixels = np.stack(np.broadcast_arrays(5 + x[None] * 240, 5 + y[:, None] * 240, 0), -1)
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


def window(crop: Image.Image) -> np.ndarray:
    """[[top, bottom], [left, right]] in the image, of the centres of the pixels at the edges."""
    pixels = (np.asarray(crop).astype(float) - 5) / 240
    green, red = pixels[..., 1].mean(1), pixels[..., 0].mean(0)
    return np.array([[green[0], green[-1]], [red[0], red[-1]]])


@pytest.mark.parametrize("source", [(300, 400), (400, 300), (350, 350)])
@pytest.mark.parametrize("target", [(20, 40), (40, 20), (32, 32)])
def test_random_crop_of_any_shape_takes_from_all_to_the_least_of_the_centre_crop(source, target):
    image = ramp(*source)
    at_centre = np.diff(window(center_crop(image, *target)))
    # a level of the ramp is 1/240; both ends are rounded to half of it, once or by each resize
    close = {"abs": 3 / 240}
    largest = random_crop(image, *target, 0.5, (0.0, 0.5, 0.5))
    assert np.diff(window(largest)) == pytest.approx(at_centre, **close)
    spans = []
    for u in np.linspace(0, BELOW_ONE, 7):
        inside = window(random_crop(image, *target, 0.5, (u, 0.3, 0.7)))
        spans.append(np.diff(inside))
    assert spans[-1] == pytest.approx(at_centre / 2, **close), "min_crop of 0.5"
    assert (np.diff(spans, axis=0) < 0).all()


@pytest.mark.parametrize("target", [(20, 40), (32, 32)])
def test_random_crop_reaches_all_four_corners(target):
    image = ramp(300, 400)
    ends = [
        window(random_crop(image, *target, 0.8, (BELOW_ONE, top, left)))
        for top in (0.0, BELOW_ONE)
        for left in (0.0, BELOW_ONE)
    ]
    # the outermost pixel's centre is half a pixel from the edge, and a pixel is at most 1/25 wide
    assert np.min([end[:, 0] for end in ends], 0) == pytest.approx(0, abs=0.025)
    assert np.max([end[:, 1] for end in ends], 0) == pytest.approx(1, abs=0.025)


def test_random_crop_of_the_whole_is_the_centre_crop():
    """With min_crop of 1 there is one size, and of a square image one window."""
    image = noise(40, 40)
    for u in (0.0, 0.5, BELOW_ONE):
        ours = random_crop(image, 16, 16, 1.0, (u, u, u))
        assert np.array_equal(np.array(ours), np.array(center_crop(image, 16, 16)))


# ---- in a source ---------------------------------------------------------------------------------


def spec(path, **changes) -> FolderSpec:
    return FolderSpec(**{"path": str(path), "size": 8, "crop": "random", **changes})


@pytest.fixture
def folder(tmp_path):
    for i, shape in enumerate([(10, 14), (40, 33), (8, 8), (17, 9), (50, 50)]):
        noise(*shape, seed=i).save(tmp_path / f"{i}.png")
    return tmp_path


def drawn(source, n, *, seed=0, start=0, layout=None, workers=0) -> list[torch.Tensor]:
    layout = layout or Layout(10)
    parts = Batches(source, seed=seed, start=start, layout=layout, workers=workers)
    return [batch.images for batch in islice(parts, n)]


def test_windows_of_every_size_and_place_are_drawn_alike(tmp_path):
    """Of 8 pixels in 8, 9 or 10: one, four or nine windows."""
    image = noise(20, 20)
    image.save(tmp_path / "a.png")
    share = {}
    for dim in (8, 9, 10):
        places = [(y, x) for y in range(dim - 7) for x in range(dim - 7)]
        for y, x in places:
            u = ((dim - 8) / 3 + 0.1, (y + 0.5) / (dim - 7), (x + 0.5) / (dim - 7))
            share[adm_random_crop(image, 8, 0.8, u).tobytes()] = 1 / 3 / len(places)
    assert len(share) == 14
    n = 4000
    counts = Counter()
    for batch in drawn(spec(tmp_path).open(), n // 500, layout=Layout(500)):
        counts.update(crop.permute(1, 2, 0).numpy().tobytes() for crop in batch)
    assert counts.keys() == share.keys()
    for crop, p in share.items():
        # binomial: 5 standard deviations
        assert abs(counts[crop] - n * p) < 5 * math.sqrt(n * p * (1 - p))


class Recorder:
    """A source of one grey pixel that keeps the chances it is asked with."""

    classes: tuple[str, ...] = ()

    def __init__(self, length: int):
        self.length, self.chances = length, []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        raise AssertionError("a source that can draw is asked to")

    def draw(self, reference: int, chance: Chance) -> Sample:
        self.chances.append(chance)
        return Sample(torch.zeros(1, 1, 1, dtype=torch.uint8), 0)


def test_places_and_sizes_are_drawn_apart_from_each_other():
    """By the chances themselves, which no two purposes may share."""
    source = Recorder(4000)
    drawn(source, 1, layout=Layout(4000))
    u = np.array(source.chances)
    assert u.shape == (4000, 3)
    assert u.min() >= 0
    assert u.max() < 1
    # correlations of independent numbers have a deviation of 1 / sqrt(n)
    assert np.abs(np.corrcoef(u.T) - np.eye(3)).max() < 5 / math.sqrt(4000)
    assert np.abs(u.mean(0) - 0.5).max() < 5 / math.sqrt(12 * 4000)


@pytest.mark.parametrize("min_crop", [None, 0.5])
def test_crops_depend_on_seed_and_count_alone(folder, min_crop):
    source = spec(folder, **({} if min_crop is None else {"min_crop": min_crop})).open()
    whole = torch.cat(drawn(source, 6))
    assert torch.equal(torch.cat(drawn(source, 6)), whole), "not on what was drawn before"
    assert torch.equal(torch.cat(drawn(source, 6, workers=2)), whole)
    assert torch.equal(torch.cat(drawn(source, 3, start=30)), whole[30:]), "as on a resume"
    assert torch.equal(torch.cat(drawn(source, 3, layout=Layout(20))), whole)
    for rank in (0, 1):
        half = drawn(source, 6, layout=Layout(10, accumulate=1, processes=2, rank=rank))
        expected = whole.reshape(6, 2, 5, 3, 8, 8)[:, rank]
        assert torch.equal(torch.stack(half), expected)
    assert not torch.equal(torch.cat(drawn(source, 6, seed=1)), whole)


def test_crops_of_a_image_differ_from_epoch_to_epoch(tmp_path):
    noise(50, 50).save(tmp_path / "a.png")
    crops = torch.cat(drawn(spec(tmp_path, min_crop=0.3).open(), 4))
    # of 20 sizes and up to 400 places: that two of 40 are the same is rare
    assert len({crop.numpy().tobytes() for crop in crops}) >= 38


def test_min_crop_is_four_fifths_if_absent(folder):
    absent, set_, other = (
        torch.cat(drawn(spec(folder, **changes).open(), 3))
        for changes in ({}, {"min_crop": 0.8}, {"min_crop": 0.6})
    )
    assert torch.equal(absent, set_)
    assert not torch.equal(absent, other)


@pytest.mark.parametrize("shape", [(10, 15), (40, 32), (8, 8), (33, 65), (8, 11), (13, 8)])
def test_image_by_index_is_the_centre_crop(tmp_path, shape):
    noise(*shape).save(tmp_path / "a.png")
    ours, theirs = (spec(tmp_path, crop=crop).open()[0].image for crop in ("random", "center"))
    assert torch.equal(ours, theirs)


def test_bad_image_is_stood_in_for_by_a_crop_of_the_next(folder):
    (folder / "0.png").write_bytes(b"not an image")
    source = spec(folder).model_copy(update={"max_bad_share": 1.0}).open()
    u = (0.7, 0.2, 0.9)
    assert torch.equal(source.draw(0, u).image, source.draw(1, u).image)
    assert len(source.draw(0, u).skipped) == 1
