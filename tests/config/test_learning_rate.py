"""Schedules that count images, against their formulas in float64 and by their properties.

tests/training/test_optim.py holds those that count steps to the reference.
"""

import numpy as np
import pytest
from test_config import changed, complaints

from hdit.config.learning_rate import (
    ConstantLR,
    CosineLR,
    InverseSqrtLR,
    Moment,
    TrapezoidLR,
)

END = 1_000_000
T = np.linspace(0, END, 4001)
SCHEDULES = {
    "constant": ConstantLR(warmup_images=50_000),
    "inverse_sqrt": InverseSqrtLR(reference_images=100_000, warmup_images=20_000),
    "cooled": InverseSqrtLR(reference_images=90_000, cooldown_images=300_000, final=0.05),
    "cosine": CosineLR(warmup_images=100_000, final=0.1),
    "trapezoid": TrapezoidLR(warmup_images=100_000, cooldown_images=200_000),
}


def rates(schedule, times=T, end=END, lr=1.0):
    return np.array([schedule(Moment(0, t, end), lr) for t in times])


def test_constant_warms_up_in_a_line():
    np.testing.assert_allclose(rates(SCHEDULES["constant"]), np.minimum(T / 50_000, 1), rtol=1e-15)


def test_inverse_sqrt_is_that_of_edm2():
    """alpha_ref / sqrt(max(t / t_ref, 1)), arXiv 2312.02696, times the warm-up."""
    expected = np.minimum(T / 20_000, 1) / np.sqrt(np.maximum(T / 100_000, 1))
    np.testing.assert_allclose(rates(SCHEDULES["inverse_sqrt"]), expected, rtol=1e-15)


def test_cooldown_is_the_line_from_the_last_rate_to_the_final_one():
    start, top = 700_000, (700_000 / 90_000) ** -0.5
    line = np.interp(T, [start, END], [top, 0.05])
    expected = np.where(start > T, 1 / np.sqrt(np.maximum(T / 90_000, 1)), line)
    np.testing.assert_allclose(rates(SCHEDULES["cooled"]), expected, rtol=1e-12)


def test_cosine_is_half_a_period_to_its_final_rate():
    x = (T - 100_000) / 900_000
    expected = np.where(x < 0, T / 100_000, 0.1 + 0.45 * (1 + np.cos(np.pi * x)))
    np.testing.assert_allclose(rates(SCHEDULES["cosine"]), expected, rtol=1e-12)


def test_trapezoid_is_one():
    expected = np.interp(T, [0, 100_000, 800_000, END], [0, 1, 1, 0])
    np.testing.assert_allclose(rates(SCHEDULES["trapezoid"]), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_rate_has_no_jump(schedule):
    """The steepest is the warm-up in 20,000 images: 1/80 in the 250 between two values."""
    assert np.abs(np.diff(rates(schedule))).max() <= 250 / 20_000 + 1e-12


@pytest.mark.parametrize(
    ("name", "last"), [("cooled", 0.05), ("cosine", 0.1), ("trapezoid", 0.0), ("constant", 1.0)]
)
def test_rate_ends_at_its_final_value_and_stays_there(name, last):
    times = [END, END + 1000.0]
    np.testing.assert_allclose(rates(SCHEDULES[name], times), [last] * 2, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_rate_depends_on_images_alone_and_is_a_multiple_of_lr(schedule):
    at = [schedule(Moment(step, 123_456.0, END), 0.002) for step in (0, 7, 10**6)]
    assert len(set(at)) == 1
    assert at[0] == pytest.approx(0.002 * rates(schedule, [123_456.0])[0], rel=1e-15)


def test_sum_over_a_warm_up_does_not_depend_on_the_batch():
    """Of rate x images: a step has the rate at its middle, which is exact for a line."""
    for batch in (1, 10, 25, 100):
        training = changed(
            f"training={{images=1000, checkpoint_every=500, batch_size={batch}}}",
            "training.optimizer={lr=1.0, schedule={kind='trapezoid', warmup_images=200, "
            "cooldown_images=300}}",
        ).training
        moments = (training.moment(k, k * batch) for k in range(1000 // batch))
        total = sum(batch * training.optimizer.schedule(at, 1.0) for at in moments)
        assert total == pytest.approx(100 + 500 + 150, rel=1e-12)


def test_cooldown_goes_on_from_a_constant_rate():
    """As one decides after the fact: until the cooldown begins both are the same."""
    before = T[T <= 800_000]
    constant = ConstantLR(warmup_images=100_000)
    np.testing.assert_array_equal(rates(constant, before), rates(SCHEDULES["trapezoid"], before))
    plain = InverseSqrtLR(reference_images=90_000)
    np.testing.assert_array_equal(
        rates(plain, T[T <= 700_000]), rates(SCHEDULES["cooled"], T[T <= 700_000])
    )


SCHEDULE = "training.optimizer.schedule"


@pytest.mark.parametrize(
    ("schedule", "key", "message"),
    [
        ("{kind='constant', warmup=0.9, warmup_images=1000}", "", "two warm-ups; leave out one"),
        ("{kind='constant', warmup_images=1}", ".warmup_images", "at least training.batch_size"),
        ("{kind='trapezoid'}", ".cooldown_images", "required"),
        ("{kind='trapezoid', cooldown_images=2000}", ".cooldown_images", "room in"),
        ("{kind='trapezoid', warmup_images=600, cooldown_images=600}", ".cooldown_images", "600"),
        ("{kind='cosine', warmup_images=1000}", ".warmup_images", "below training.images"),
        ("{kind='cosine', final=1.0}", ".final", "less than 1"),
        ("{kind='inverse_sqrt'}", ".reference_images", "required"),
        ("{kind='inverse_sqrt', reference_images=9, final=0.1}", "", "no effect without cooldown"),
        ("{kind='inverse', warmup_images=100}", ".warmup_images", "unknown key"),
    ],
)  # fmt: skip
def test_schedule_that_cannot_be_is_named(schedule, key, message):
    [line] = complaints(f"{SCHEDULE}={schedule}")
    assert line.startswith(f"{SCHEDULE}{key}: ")
    assert message in line


def test_config_of_before_keeps_its_schedule_and_its_text():
    """A dump has no key that an earlier version does not know, unless it is set."""
    assert "warmup_images" not in changed().dump()
    given = changed(f"{SCHEDULE}={{kind='constant', warmup=0.99}}").training.optimizer.schedule
    assert given == ConstantLR(warmup=0.99)
