"""The Inception of FID: TensorFlow's of 2015, in TorchScript as NVIDIA and clean-fid take it."""

from __future__ import annotations

import os
import platform
import shutil
import urllib.request
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hdit.errors import UserError
from hdit.evaluation.extractor import Extractor, sha256
from hdit.evaluation.pipelines import PROTOCOLS, CleanResize, tensorflow_resize
from hdit.files import make_folder, whole
from hdit_kernels.native import cache_folder

INCEPTION = "inception-2015-12-05.pt"
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
INCEPTION_URL = (
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/" + INCEPTION
)
CLEAN_FID = Path("." if platform.system() == "Windows" else "/tmp")  # where it keeps the file

Download = Callable[[str, Path], Any]
"""Of an address into a file."""


class Inception:
    """(b 2048) features before the last layer, of what the protocol's pipeline makes of images."""

    def __init__(self, network: Any, protocol: str):
        self.network, self.protocol = network, protocol

    def __call__(self, batch: Tensor) -> Tensor:
        """Batch of what the protocol prepares -> (b 2048)."""
        if self.protocol == "edm":
            return self.network(batch, return_features=True).flatten(1)
        x = tensorflow_resize(batch) if self.protocol == "adm" else batch.float()
        return self.network.layers((x - 128) / 128).flatten(1)

    def probabilities(self, batch: Tensor, features: Tensor) -> Tensor:
        """Class probabilities (b 1008), without the last layer's bias, as the score's authors."""
        return F.linear(features, self.network.output.weight.to(features.dtype)).softmax(1)


def inception(device: torch.device, say: Callable[[str], None], protocol: str) -> Extractor:
    """The network of FID with the pixels of a protocol, one of PROTOCOLS. Raises UserError."""
    path = inception_file(_download, say)
    with warnings.catch_warnings(category=DeprecationWarning, action="ignore"):  # torch's, of jit
        module = torch.jit.load(path, map_location=device).eval()
    network = Inception(module, protocol)
    return Extractor(
        f"clean-fid {INCEPTION}",
        INCEPTION_SHA256,
        PROTOCOLS[protocol].input,
        CleanResize() if protocol == "clean" else None,
        network,
        device,
        network.probabilities if hasattr(module, "output") else None,
        is_whole=True,
        resize=PROTOCOLS[protocol].resize,
        protocol=protocol,
    )


def inception_file(download: Download, say: Callable[[str], None]) -> Path:
    """Finds the file: in hdit's cache, where clean-fid keeps it, or downloaded into the former."""
    cache = cache_folder()
    for path in (cache / INCEPTION, CLEAN_FID / INCEPTION):
        if path.is_file():
            if sha256(path) == INCEPTION_SHA256:
                return path
            say(f"{path} is damaged or another file: its SHA-256 is not {INCEPTION_SHA256:.12}...")
    say(f"downloading {INCEPTION} into {cache}")
    make_folder(cache)
    kept = cache / INCEPTION
    with whole(kept, shared=True) as part:
        try:
            download(INCEPTION_URL, part)
        except OSError as error:
            raise UserError(
                f"--features: {INCEPTION} cannot be downloaded ({error}); put it into {cache} by "
                f"hand:\n  curl -fL -o {kept} {INCEPTION_URL}\n"
                "or name a file or a function of yours"
            ) from None
        if (found := sha256(part)) != INCEPTION_SHA256:
            raise UserError(
                f"--features: what was downloaded as {INCEPTION} is not that file: its SHA-256 is "
                f"{found:.12}..., and not {INCEPTION_SHA256:.12}..."
            )
    return kept


def _download(address: str, path: Path) -> None:
    with urllib.request.urlopen(address, timeout=60) as answer, path.open("wb") as file:
        shutil.copyfileobj(answer, file)
        file.flush()
        os.fsync(file.fileno())
