"""What HDiT and DiT cost by size: the paper's savings, the measurement, the report."""

import json
import subprocess
import sys

import pytest

from hdit.config import load
from scripts import scaling_cost


@pytest.mark.parametrize(
    ("size", "hdit", "dit"),
    [(128, 31, 106), (256, 65, 657), (512, 198, 6341), (1024, 732, 84731)],
)
def test_counts_are_those_of_the_paper(size, hdit, dit):
    """Crowson et al. (2024), tables 1 and 5, in whole GMAC.

    Of DiT at 1024, 84,731 is what comes out without the projections of patches.
    """
    assert round(scaling_cost.gmacs("HDiT", size)) == hdit
    projections = 2 * (size // 4) ** 2 * (4 * 4 * 3) * 768 / 1e9
    assert round(scaling_cost.gmacs("DiT-B/4", size) - (projections if size == 1024 else 0)) == dit


def test_savings_are_those_of_the_paper():
    """Its figures have 70, 90, 96 to 97 and 99 percent."""
    saved = [
        100 * (1 - scaling_cost.gmacs("HDiT", size) / scaling_cost.gmacs("DiT-B/4", size))
        for size in (128, 256, 512, 1024)
    ]
    assert [int(share) for share in saved] == [70, 90, 96, 99]


def test_slope_is_the_power():
    assert scaling_cost.slope([(n, 3e-7 * n**1.7) for n in (10, 200, 3000)]) == pytest.approx(1.7)


def test_point_is_measured(monkeypatch, tiny):
    monkeypatch.setattr(scaling_cost, "config", lambda name, size: load(tiny))
    monkeypatch.setattr(scaling_cost, "PASSES", 3)
    found = scaling_cost.measure("HDiT", 8, "bf16")
    assert found["passes"] == 3
    assert found["seconds"] > 0
    assert found["memory"] >= 0


def test_report_has_savings_slopes_and_what_failed(monkeypatch, tmp_path):
    def point(name, size, precision):
        if name == "DiT-B/4" and size == 256:
            raise subprocess.CalledProcessError(-9, "python")
        seconds = {"HDiT": 1e-5 * size**2, "DiT-B/4": 1e-9 * size**4}[name]
        return {"seconds": seconds, "memory": 2**29, "passes": 2}

    monkeypatch.setattr(scaling_cost, "in_own_process", point)
    monkeypatch.setattr(scaling_cost, "gmacs", lambda name, size: size * len(name))
    monkeypatch.setattr(sys, "argv", f"x --out {tmp_path} --to 512 --dit-to 256".split())
    scaling_cost.main()
    written = json.loads((tmp_path / "scaling.json").read_text())
    assert [row["size"] for row in written["rows"]["HDiT"]] == [128, 256, 512, 1024, 2048]
    assert written["rows"]["DiT-B/4"][1]["failed"] == "status -9"
    text = (tmp_path / "scaling.md").read_text()
    assert "| 128 | 512.0 | 896.0 | 42.9 % | 0.164 | 0.268 | 39.0 % | 0.50 | 0.50 |" in text
    assert "| 256 | 1,024.0 | 1,792.0 | 42.9 % | 0.655 |  |  | 0.50 |  |" in text
    assert "HDiT's seconds grow as pixels to the power 1.00" in text
    assert "(least squares in the logarithms, 3 sizes), between the two largest sizes 1.00." in text
    assert "Not measured: DiT-B/4 at 256: status -9." in text
    assert "<svg" in (tmp_path / "scaling.svg").read_text()
