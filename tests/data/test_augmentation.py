import math

import numpy as np
import pytest
import torch
from known_answers import check_record, load, u01
from pydantic import ValidationError

from hdit import randomness
from hdit.data.augmentation import Augmentation, AugmentationSetting, draw, transform, warp
from hdit.protocols import Spec

NOTHING = [0.0] * 8
TURN, AXIS = math.pi / 5, 2 * math.pi / 5

DRAWS = {
    "identity": NOTHING,
    "xflip": [1, 0, 0, 0, 0, 0, 0, 0],
    "yflip": [0, 1, 0, 0, 0, 0, 0, 0],
    "scale": [0, 0, 1.5, 0, 0, 0, 0, 0],
    "rot": [0, 0, 0, TURN, 0, 0, 0, 0],
    "aniso": [0, 0, 0, 0, AXIS, 1.2, 0, 0],
    "trans": [0, 0, 0, 0, 0, 0, 0.5, -0.8],
    "all": [1, 1, -0.7, TURN, AXIS, 1.2, 0.5, -0.8],
    "trans_nonsquare_h24_w16(PIL size returns (w,h))": [0, 0, 0, 0, 0, 0, 0.5, -0.8],
}
"""What the reference drew in each of its cases, as its conditions tell."""


def parameters(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def done(rows, height, width):
    """Matrices that do the same to each image: one for each row of a0 to a7."""
    return transform(parameters(*rows), height, width)[0]


def random_image(height=6, width=6):
    """(1 1 h w): each pixel has another value."""
    return torch.linspace(0, 1, height * width).view(1, 1, height, width)


# ---- what happens to an image --------------------------------------------------------------------


@pytest.mark.parametrize("case", DRAWS)
def test_augmentation_is_that_of_the_reference(case):
    expected = load("augmentation.json")["cases"][case]
    _, h, w = expected["image"]["shape"]
    pixels = np.floor(255 * u01(h * w * 3, 9500)).astype(np.uint8).reshape(h, w, 3)
    images = torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None]
    matrices, conditions = transform(parameters(DRAWS[case]), h, w)
    # The reference draws angles as float32, off by up to 4e-7, and an image is 16 pixels wide.
    torch.testing.assert_close(
        matrices[0], torch.tensor(expected["matrix_forward_3x3"]).double(), rtol=0, atol=6e-6
    )
    torch.testing.assert_close(
        conditions[0], torch.tensor(expected["cond9"]).double(), rtol=0, atol=1e-6
    )
    # A coordinate is off by as much, where the noise changes by up to 3 from pixel to pixel.
    check_record(warp(images, matrices)[0] / 127.5 - 1, expected["image"], atol=2e-5)


def test_all_that_is_done_is_in_the_conditions():
    """Non-leaking: conditions of zero mean the untouched image, and only those do."""
    a = draw(3, np.arange(4000), 0.12)
    matrices, conditions = transform(a, 48, 32)
    untouched = (matrices == torch.eye(3)).all(-1).all(-1)
    assert 0 < untouched.sum() < len(a)
    assert torch.equal((conditions == 0).all(1), untouched)
    differing = len(torch.unique(matrices.round(decimals=9), dim=0))
    assert len(torch.unique(conditions.round(decimals=9), dim=0)) == differing


def test_draws_follow_from_seed_and_counter_alone():
    counters = np.array([7, 3, 100_000, 12])
    together = draw(5, counters, 0.9)
    alone = torch.cat([draw(5, counters[i : i + 1], 0.9) for i in range(4)])
    assert torch.equal(together, alone)
    assert not torch.equal(together, draw(6, counters, 0.9))
    assert len(torch.unique(together, dim=0)) == 4


def test_a_change_that_is_not_done_does_not_move_the_others():
    """So a higher probability does more to an image, but nothing else."""
    counters = np.arange(2000)
    little, much = draw(0, counters, 0.1), draw(0, counters, 0.4)
    kept = little != 0
    assert torch.equal(little[kept], much[kept])
    assert (much != 0).sum() > 2 * kept[:, 1:].sum()


def test_mirror_images_are_those_without_augmentation():
    counters = np.arange(500)
    assert torch.equal(
        draw(9, counters, 0.12)[:, 0], (randomness.uniform(9, "flip", counters) < 0.5)
    )


def test_draws_have_their_distributions():
    n, p = 40_000, 0.3
    a = draw(1, np.arange(n), p)
    drawn = (a != 0).double()
    share = torch.tensor([0.5, p / 2, p, p, p, p, p, p], dtype=torch.float64)
    # five standard deviations of a share of n draws
    assert ((drawn.mean(0) - share).abs() < 5 * (share * (1 - share) / n).sqrt()).all()
    assert torch.equal(drawn[:, 4], drawn[:, 5])
    assert torch.equal(drawn[:, 6], drawn[:, 7])
    for i in (2, 5, 6, 7):  # standard normal
        x = a[drawn[:, i] == 1, i]
        assert abs(x.mean()) < 5 * len(x) ** -0.5
        assert abs(x.var() - 1) < 5 * (2 / len(x)) ** 0.5
    for i in (3, 4):  # uniform on -pi to pi
        x = a[drawn[:, i] == 1, i] / math.pi
        assert -1 <= x.min() < -0.99
        assert 0.99 < x.max() <= 1
        assert abs(x.mean()) < 5 * (1 / 3 / len(x)) ** 0.5
        assert abs(x.square().mean() - 1 / 3) < 5 * (4 / 45 / len(x)) ** 0.5
    # Every pair of changes but those that are done together is independent.
    correlation = torch.corrcoef(a.T) - torch.eye(8)
    assert correlation.abs().max() < 5 * n**-0.5
    joint = torch.corrcoef(drawn[:, [0, 1, 2, 3, 4, 6]].T) - torch.eye(6)
    assert joint.abs().max() < 5 * n**-0.5


# ---- the warp ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", load("augmentation_warp.json")["cases"])
def test_warp_is_that_of_scikit_image(case):
    known = load("augmentation_warp.json")["cases"][case]
    h, w = known["shape"]
    image = torch.from_numpy(u01(h * w, known["stream"])).view(1, 1, h, w)
    warped = warp(image, torch.tensor([known["matrix"]], dtype=torch.float64))
    expected = torch.tensor(known["warped"], dtype=torch.float64)
    assert h * w == 1 or expected.std() > 0.05
    # The coordinates are float32, and up to 90 pixels: off by 8e-6, where noise changes by 1.5.
    torch.testing.assert_close(warped[0, 0].double(), expected, rtol=0, atol=1.5e-5)


def test_warp_by_the_identity_returns_the_image_bit_for_bit():
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (3, 3, 37, 50), np.uint8))
    matrices = done([NOTHING] * 3, 37, 50)
    assert torch.equal(warp(images, matrices), images.float())
    floats = torch.from_numpy(rng.random((3, 1, 64, 64), np.float32))
    assert torch.equal(warp(floats, done([NOTHING] * 3, 64, 64)), floats)


def test_warp_of_uint8_can_be_stored_again_without_loss():
    """What the identity gives is the integer: x0 is the same with and without it."""
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(warp(images, done([NOTHING], 16, 16)), images.float())


def test_flips_land_on_the_pixels_bit_for_bit():
    x = random_image(5, 8)
    left_right, upside_down, both = (
        warp(x, done([[i, j, *NOTHING[2:]]], 5, 8)) for i, j in ((1, 0), (0, 1), (1, 1))
    )
    assert torch.equal(left_right, x.flip(-1))
    assert torch.equal(upside_down, x.flip(-2))
    assert torch.equal(both, x.flip(-1, -2))


@pytest.mark.parametrize("quarters", [-2, -1, 1, 2])
def test_a_positive_turn_is_counter_clockwise(quarters):
    x = random_image()
    turned = warp(x, done([[0, 0, 0, quarters * math.pi / 2, 0, 0, 0, 0]], 6, 6))
    torch.testing.assert_close(turned, torch.rot90(x, quarters, (-2, -1)), rtol=0, atol=1e-6)


def test_a_shift_is_to_the_right_and_down():
    x = random_image(8, 8)
    moved = warp(x, done([[0, 0, 0, 0, 0, 0, 2, 1]], 8, 8))  # 2 and 1 eighths of 8
    torch.testing.assert_close(moved[..., 1:, 2:], x[..., :-1, :-2], rtol=0, atol=1e-6)
    # what comes in is the mirror image
    torch.testing.assert_close(moved[..., 1:, :2], x[..., :-1, [2, 1]], rtol=0, atol=1e-6)
    torch.testing.assert_close(moved[..., 0, 2:], x[..., 1, :-2], rtol=0, atol=1e-6)


def test_a_positive_scale_grows_the_image_about_its_centre():
    x = random_image(9, 9)
    grown = warp(x, done([[0, 0, 5, 0, 0, 0, 0, 0]], 9, 9))  # 2^0.2 to the 5th is 2
    torch.testing.assert_close(grown[..., ::2, ::2], x[..., 2:7, 2:7], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("axis", "sides"), [(0, (2, 0.5)), (math.pi / 2, (0.5, 2))])
def test_a_stretch_keeps_the_area(axis, sides):
    matrix = done([[0, 0, 0, 0, axis, 5, 0, 0]], 9, 9)[0]
    expected = torch.diag(torch.tensor(sides, dtype=torch.float64))
    torch.testing.assert_close(matrix[:2, :2], expected)
    torch.testing.assert_close(matrix @ parameters([4, 4, 1]).T, parameters([4, 4, 1]).T)


def test_warp_keeps_a_flat_image_flat_and_may_overshoot_an_edge():
    a = draw(2, np.arange(32), 1.0)
    matrices, _ = transform(a, 16, 24)
    flat = warp(torch.full((32, 3, 16, 24), 0.3), matrices)
    torch.testing.assert_close(flat, torch.full_like(flat, 0.3), rtol=0, atol=1e-6)
    edge = torch.zeros(32, 1, 16, 24)
    edge[..., 12:] = 1
    assert warp(edge, matrices).max() > 1.01


# ---- both together -------------------------------------------------------------------------------


def images_of(n):
    rng = np.random.default_rng(n)
    return torch.from_numpy(rng.integers(0, 256, (n, 3, 16, 16), np.uint8))


def test_augmentation_of_an_image_does_not_depend_on_its_batch():
    images, counters = images_of(6), np.arange(40, 46)
    augment = Augmentation(probability=1.0)
    augmented, conditions = augment(images, 0, counters)
    assert augmented.shape == images.shape
    assert augmented.dtype == conditions.dtype == torch.float32
    for i in range(6):
        one = slice(i, i + 1)
        image, condition = augment(images[one], 0, counters[one])
        # The vector units of a CPU may round the end of a row another way.
        torch.testing.assert_close(image, augmented[one], rtol=0, atol=255e-6)
        assert torch.equal(condition, conditions[one])


def test_augmentation_of_probability_0_does_nothing_and_mirrors_nothing():
    images = images_of(16)
    augmented, conditions = Augmentation()(images, 0, np.arange(16))
    assert torch.equal(augmented, images.float())
    assert torch.equal(conditions, torch.zeros(16, 9))


def test_augmentation_leaves_images_with_conditions_of_zero_as_they_were():
    images = images_of(64)
    augmented, conditions = Augmentation(probability=0.12)(images, 0, np.arange(64))
    untouched = (conditions == 0).all(1)
    assert 5 < untouched.sum() < 40
    assert torch.equal(augmented[untouched], images[untouched].float())
    touched = (augmented != images).flatten(1).any(1)
    assert torch.equal(touched, ~untouched)


class Holder(Spec):
    augment: AugmentationSetting = Augmentation()


def test_setting_reads_and_writes_a_number():
    holder = Holder.model_validate({"augment": 0.12})
    assert holder.augment == Augmentation(probability=0.12)
    assert holder.model_dump() == {"augment": 0.12}
    assert Holder.model_validate({"augment": {"probability": 0.12}}) == holder
    assert Holder().augment.probability == 0


@pytest.mark.parametrize("setting", [-0.1, 1.2, "0.12", True, {"p": 0.12}])
def test_setting_that_is_no_probability_is_refused(setting):
    with pytest.raises(ValidationError):
        Holder.model_validate({"augment": setting})
