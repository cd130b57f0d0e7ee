"""DINOv2 of FDD and KDD, and CLIP of CMMD: their files, and networks of timm or transformers."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hdit.errors import UserError
from hdit.evaluation.extractor import Extractor, sha256
from hdit.evaluation.pipelines import SquareResize
from hdit.tensors import check_finite, load_tensors
from hdit_kernels.native import cache_folder

DINOV2 = "dinov2_vitl14_pretrain.pth"
DINOV2_URL = f"https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/{DINOV2}"
CLIP = "ViT-L-14-336px.pt"
CLIP_SHA256 = "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"
CLIP_URL = f"https://openaipublic.azureedge.net/clip/models/{CLIP_SHA256}/{CLIP}"

DINOV2_SIDE = 224
DINOV2_SIZES = {
    384: "vit_small_patch14_dinov2",
    768: "vit_base_patch14_dinov2",
    1024: "vit_large_patch14_dinov2",
}
"""timm's names by width. FDD is defined by the large one (Stein et al., 2023)."""
CLIP_SIZES = {
    (768, 32, 50): "vit_base_patch32_clip_quickgelu_224",
    (768, 16, 197): "vit_base_patch16_clip_quickgelu_224",
    (1024, 14, 257): "vit_large_patch14_clip_quickgelu_224",
    (1024, 14, 577): "vit_large_patch14_clip_quickgelu_336",
}
"""timm's names by width, patch size and number of tokens. CMMD is defined by the last one."""

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation of RGB from 0 to 1
CLIP_PIXELS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]


class Vit:
    """uint8 (b 3 s s) -> features (b d); of length 1 if `unit`."""

    def __init__(self, network: Callable[[Tensor], Tensor], pixels: Statistics, unit: bool):
        self.network, self.unit = network, unit
        self.mean, self.deviation = (torch.tensor(values).view(3, 1, 1) for values in pixels)

    def __call__(self, batch: Tensor) -> Tensor:
        """The network's output of normalized pixels."""
        x = batch.float() / 255
        x = (x - self.mean.to(x.device)) / self.deviation.to(x.device)
        found = self.network(x)
        return F.normalize(found, dim=1) if self.unit else found


# ---- DINOv2 --------------------------------------------------------------------------------------


def dinov2(path: Path | None, device: torch.device, option: str = "--dinov2") -> Extractor:
    """DINOv2 by its published file of weights, in timm's network: the class token (b 1024).

    Pixels are resized to 224 x 224 by Pillow's bicubic filter to uint8, as the reference
    implementation of FDD does. Raises UserError, which says how to get the file or the package.
    """
    places = [cache_folder() / DINOV2, Path(torch.hub.get_dir(), "checkpoints", DINOV2)]
    path = path or _first(places, DINOV2_URL, "DINOv2 ViT-L/14", option)
    tensors = _weights(path, option)
    if "pos_embed" not in tensors or tensors["pos_embed"].shape[-1] not in DINOV2_SIZES:
        raise UserError(
            f"{option}: {path} holds no weights of DINOv2 ViT-S, -B or -L/14 without registers; "
            f"take {DINOV2_URL}"
        )
    name = DINOV2_SIZES[tensors["pos_embed"].shape[-1]]
    network = _timm(name, option, num_classes=0, img_size=DINOV2_SIDE)
    grid = DINOV2_SIDE // 14
    tensors = {key: tensor for key, tensor in tensors.items() if key != "mask_token"}
    tensors["pos_embed"] = resampled_positions(tensors["pos_embed"], grid)
    _load(network, tensors, path, option)
    return Extractor(
        f"DINOv2 {_size(name)}",
        sha256(path),
        f"uint8 RGB, {DINOV2_SIDE} x {DINOV2_SIDE} by Pillow's bicubic filter, normalized",
        SquareResize(DINOV2_SIDE, crop=False),
        Vit(network.to(device), IMAGENET, unit=False),
        device,
        option=option,
        is_whole=True,
        resize="pillow-bicubic-uint8",
        protocol="dinov2",
    )


def resampled_positions(positions: Tensor, grid: int) -> Tensor:
    """Position embeddings (1 1+g*g d) for grid x grid tokens, as DINOv2's own code makes them.

    It interpolates bicubically, without antialiasing, and with a scale of (grid + 0.1) / g.
    """
    g = round((positions.shape[1] - 1) ** 0.5)
    if g == grid:
        return positions
    table = positions[:, 1:].float().unflatten(1, (g, g)).permute(0, 3, 1, 2)  # (1 d g g)
    scale = (grid + 0.1) / g
    table = F.interpolate(table, scale_factor=(scale, scale), mode="bicubic", antialias=False)
    assert table.shape[2:] == (grid, grid), "the scale gives this grid"
    return torch.cat([positions[:, :1].float(), table.flatten(2).transpose(1, 2)], 1)


# ---- CLIP ----------------------------------------------------------------------------------------


def clip(path: Path | None, device: torch.device, option: str = "--clip") -> Extractor:
    """CLIP's image embedding of length 1 (b 768), from OpenAI's file or a folder of transformers.

    Pixels are the centre square, resized by Pillow's bicubic filter to uint8, as in the reference
    implementation of CMMD. Raises UserError, which says how to get the file or the package.
    """
    places = [cache_folder() / CLIP, Path.home() / ".cache" / "clip" / CLIP]
    path = path or _first(places, CLIP_URL, "CLIP ViT-L/14-336", option)
    network, name, side, digest = (
        _of_folder(path, option) if path.is_dir() else _of_file(path, option)
    )
    return Extractor(
        f"CLIP {name}",
        digest,
        f"uint8 RGB, the centre square to {side} x {side} by Pillow's bicubic filter, normalized",
        SquareResize(side, crop=True),
        Vit(network.to(device), CLIP_PIXELS, unit=True),
        device,
        option=option,
        is_whole=True,
        resize="pillow-bicubic-uint8",
        protocol="clip",
    )


def _of_file(path: Path, option: str) -> tuple[nn.Module, str, int, str]:
    """(network, name, side of its images, SHA-256) of OpenAI's file, in timm's network."""
    tensors = {key: t.float() for key, t in _weights(path, option).items() if "visual." in key}
    try:
        patches, positions = tensors["visual.conv1.weight"], tensors["visual.positional_embedding"]
        name = CLIP_SIZES[patches.shape[0], patches.shape[-1], positions.shape[0]]
        width = tensors["visual.proj"].shape[1]
    except KeyError:
        raise UserError(
            f"{option}: {path} holds no image tower of OpenAI's CLIP; take {CLIP_URL}"
        ) from None
    network = _timm(name, option, num_classes=width)
    from timm.models.vision_transformer import checkpoint_filter_fn

    _load(network, checkpoint_filter_fn(tensors, network), path, option)
    return network, _size(name), int(name.rpartition("_")[2]), sha256(path)


def _of_folder(path: Path, option: str) -> tuple[nn.Module, str, int, str]:
    """The same of a folder as transformers writes it."""
    try:
        from transformers import CLIPVisionModelWithProjection
    except ImportError as error:
        raise UserError(
            f"{option}: a folder needs transformers: pip install transformers ({error}); or name "
            f"OpenAI's file, {CLIP_URL}"
        ) from None
    weights = path / "model.safetensors"
    if not weights.is_file():
        raise UserError(f"{option}: {path} has no model.safetensors, as transformers writes it")
    try:
        model = CLIPVisionModelWithProjection.from_pretrained(
            path, local_files_only=True, use_safetensors=True
        ).eval()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{option}: {path} is no CLIP of transformers: {error}") from None
    config = model.config
    name = f"of width {config.hidden_size}, patches of {config.patch_size}, {config.image_size}"
    return _Embedding(model), name, config.image_size, sha256(weights)


class _Embedding(nn.Module):
    """The image embedding of transformers' model, as a tensor."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(pixel_values=x).image_embeds


# ---- files and networks --------------------------------------------------------------------------


def _first(places: list[Path], address: str, what: str, option: str) -> Path:
    """The first of the places that is there. Raises UserError, which says how to get it."""
    for path in places:
        if path.is_file():
            return path
    raise UserError(
        f"{option}: the file of {what} is not there ({' nor '.join(map(str, places))}); get it:\n"
        f"  curl -fL --create-dirs -o {places[0]} {address}\n"
        f"or name where it is by {option}"
    )


def is_torchscript(path: Path) -> bool:
    """Whether a file is a network of TorchScript, and not weights alone."""
    try:
        with zipfile.ZipFile(path) as file:
            return any("/code/" in name for name in file.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def _weights(path: Path, option: str) -> dict[str, Tensor]:
    """The tensors of a file: safetensors, a .pth without other objects, or TorchScript's."""
    try:
        if path.suffix == ".safetensors":
            return load_tensors(path)
        if is_torchscript(path):
            with warnings.catch_warnings(category=DeprecationWarning, action="ignore"):
                return dict(torch.jit.load(path, map_location="cpu").state_dict())
        found = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # torch's reader of pickles raises many kinds on other files
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{option}: {path} is no file of weights alone: {reason:.200}") from None
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise UserError(f"{option}: {path} holds no tensors by name")
    return found


def _timm(name: str, option: str, **settings: Any) -> nn.Module:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # of a torchvision for another torch
        raise UserError(
            f"{option}: its network comes with timm: pip install 'hdit[metrics]' ({error}); or "
            f"give {option} a TorchScript file or a function of yours"
        ) from None
    return timm.create_model(name, pretrained=False, **settings).eval()


def _load(network: nn.Module, tensors: dict[str, Tensor], path: Path, option: str) -> None:
    check_finite(tensors, str(path), "the file is of no use")
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        lines = str(error).strip().splitlines()
        raise UserError(f"{option}: {path} does not fit: {' '.join(lines[1:3]):.300}") from None
    network.requires_grad_(False)


def _size(name: str) -> str:
    """The usual name of a network, of timm's."""
    kind, _, rest = name.removeprefix("vit_").partition("_patch")
    patch, _, what = rest.partition("_")
    side = f"-{what.rpartition('_')[2]}" if "clip" in what else ""
    return f"ViT-{kind[0].upper()}/{patch}{side}"
