import pytest
import torch
from known_answers import load

from hdit.diffusion.noise import CosineInterpolated, Lognormal
from hdit.diffusion.vp import LinearSchedule
from hdit.protocols import Signal

SCHEDULE = LinearSchedule()


def signal(size: int, sigma_data: float = 0.5) -> Signal:
    return Signal(3, size, size, 0, sigma_data)


@pytest.mark.parametrize(
    ("name", "size", "rtol"),
    [
        ("cosine-interpolated(image 256,low 32,high 256,sd .5,min 1e-3,max 1e3)", 256, 2e-5),
        ("cosine-interpolated(image 1024,low 32,high 1024,sd .5)", 1024, 2e-5),
        ("cosine-interpolated(image 32,low 32,high 32,sd .5)", 32, 1e-4),  # fp32 there, near u=0
        ("cosine-interpolated f64(image 256,low 32,high 256,sd .5)", 256, 1e-9),
    ],
)
def test_cosine_interpolated_matches_the_reference_at_1_minus_u(name, size, rtol):
    data = load("sigma_density.json")
    u = torch.tensor(data["u"], dtype=torch.float64)
    sigma = CosineInterpolated()(1 - u, signal(size), SCHEDULE)
    torch.testing.assert_close(
        sigma, torch.tensor(data[name], dtype=torch.float64), rtol=rtol, atol=0
    )


def test_lognormal_matches_the_reference():
    data = load("sigma_density.json")
    u = torch.tensor(data["u"], dtype=torch.float64)
    expected = torch.tensor(data["lognormal(loc=-1.2,scale=1.2)"], dtype=torch.float64)
    actual = Lognormal()(u, signal(64), SCHEDULE)
    # The reference works in float32: 1e-7 + u keeps one digit at u = 0, and five near 1.
    torch.testing.assert_close(actual[0], expected[0], rtol=3e-2, atol=0)
    torch.testing.assert_close(actual[1:], expected[1:], rtol=2e-5, atol=0)
