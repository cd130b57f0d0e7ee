"""Makes hdit/data/digits.npz, the embedded data set, from scikit-learn's copy of the UCI digits.

pip install scikit-learn && python scripts/make_digits.py
"""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits  # type: ignore[import-not-found]

TARGET = Path(__file__).parents[1] / "hdit" / "data" / "digits.npz"

digits = load_digits()
images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # 0..16 -> 0..255, (n 8 8)
np.savez_compressed(TARGET, images=images, labels=digits.target.astype(np.uint8))
print(f"{len(images)} images, {TARGET.stat().st_size} bytes: {TARGET}")
