import math

import pytest
import torch

from hdit.diffusion.vp import LinearSchedule


def test_sigmas_are_those_of_the_ddpm_table():
    """Independent: cumulative products in plain Python floats."""
    schedule, bar, expected = LinearSchedule(), 1.0, []
    for i in range(1000):
        bar *= 1 - (1e-4 + (2e-2 - 1e-4) * i / 999)
        expected.append(math.sqrt((1 - bar) / bar))
    actual = schedule.sigmas()
    torch.testing.assert_close(
        actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-11, atol=0
    )
    assert schedule.sigma_range() == pytest.approx((0.0100, 157.41), rel=1e-4)


@pytest.mark.parametrize("steps", [10, 250, 1000])
def test_t_returns_every_index_of_the_table_exactly(steps):
    schedule = LinearSchedule(steps=steps, beta_end=2e-2 * min(1, steps / 1000))
    expected = torch.arange(steps, dtype=torch.float64)
    assert torch.equal(schedule.t(schedule.sigmas()), expected)


def test_t_is_linear_in_the_log_of_sigma_between_entries():
    table = LinearSchedule().sigmas()
    between = (table[41].log() * 0.25 + table[42].log() * 0.75).exp()
    assert LinearSchedule().t(between[None]).item() == pytest.approx(41.75, abs=1e-9)


def test_t_is_clamped_beyond_the_table():
    assert LinearSchedule().t(torch.tensor([1e-6, 1e6])).tolist() == [0, 999]
