"""Makes the embedded digits, hdit/data/sources/digits.npz, from scikit-learn's copy of UCI's.

pip install scikit-learn && python scripts/make_digits.py
"""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits  # type: ignore[import-not-found]

TARGET = Path(__file__).parents[1] / "hdit" / "data" / "sources" / "digits.npz"

digits = load_digits()
images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # 0..16 -> 0..255, (n 8 8)
np.savez_compressed(TARGET, images=images, labels=digits.target.astype(np.uint8))
print(f"{len(images)} images, {TARGET.stat().st_size} bytes: {TARGET}")
