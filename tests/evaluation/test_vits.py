"""DINOv2 and CLIP: the real architectures with random weights where timm or transformers is
installed, and what is said where a file or a package is missing."""

import math
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from hdit.errors import UserError
from hdit.evaluation import vits
from hdit.evaluation.features import open_clip, open_dinov2
from hdit.evaluation.vits import CLIP_PIXELS, IMAGENET, Vit, clip, dinov2, resampled_positions

CPU = torch.device("cpu")


def imported(name):
    """A package, or a skip: timm needs a torchvision that was built for this torch."""
    try:
        return __import__(name)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{name} cannot be imported: {error}")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """hdit's cache and torch's, both empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "cache" / "hdit"


IMAGES = torch.randint(
    0, 256, (2, 3, 50, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("opener", "name", "address"),
    [(open_dinov2, vits.DINOV2, vits.DINOV2_URL), (open_clip, vits.CLIP, vits.CLIP_URL)],
)
def test_a_missing_file_is_told_with_the_command_that_gets_it(cache, opener, name, address):
    with pytest.raises(UserError) as raised:
        opener(None, CPU)
    assert f"curl -fL --create-dirs -o {cache / name} {address}" in str(raised.value)


def test_a_missing_package_is_told_with_the_command_that_gets_it(cache, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    torch.save({"pos_embed": torch.zeros(1, 1370, 384)}, tmp_path / "small.pth")
    with pytest.raises(UserError, match=r"pip install 'hdit\[metrics\]'"):
        dinov2(tmp_path / "small.pth", CPU)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"head.weight": torch.zeros(2)}, "holds no weights of DINOv2"),
        ({"pos_embed": torch.zeros(1, 1370, 100)}, "holds no weights of DINOv2"),
        ({"model": {"a": torch.zeros(1)}}, "holds no tensors by name"),
        (b"text", "no file of weights alone"),
    ],
)
def test_files_of_something_else_are_refused(tmp_path, content, words):
    path = tmp_path / "it.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(UserError, match=words):
        open_dinov2(str(path), CPU)


def test_a_pickle_of_code_is_not_run(tmp_path):
    torch.save(Path("x"), tmp_path / "it.pth")  # an object, and no tensors
    with pytest.raises(UserError, match="weights alone"):
        open_dinov2(str(tmp_path / "it.pth"), CPU)


def test_a_file_without_clips_image_tower_is_refused(tmp_path):
    torch.save({"visual.conv1.weight": torch.zeros(8, 3, 4, 4)}, tmp_path / "it.pt")
    with pytest.raises(UserError, match="holds no image tower of OpenAI's CLIP"):
        open_clip(str(tmp_path / "it.pt"), CPU)


class Mean(torch.nn.Module):
    def forward(self, images: torch.Tensor):
        return images.float().mean((2, 3))


@pytest.mark.parametrize("opener", [open_dinov2, open_clip])
def test_a_stand_in_of_torchscript_gets_images_as_they_are(tmp_path, opener):
    with warnings.catch_warnings(category=DeprecationWarning, action="ignore"):  # torch's, of jit
        torch.jit.save(torch.jit.script(Mean()), tmp_path / "mean.pt")
    found = opener(str(tmp_path / "mean.pt"), CPU)
    assert found.prepare is None
    torch.testing.assert_close(found(IMAGES), IMAGES.float().mean((2, 3)))


# ---- parts ---------------------------------------------------------------------------------------


def test_vit_normalizes_pixels_and_lengths():
    seen = []

    def network(x):
        seen.append(x)
        return x.mean((2, 3))

    white = torch.full((1, 3, 4, 4), 255, dtype=torch.uint8)
    found = Vit(network, IMAGENET, unit=True)(white)
    wanted = [(1 - m) / s for m, s in zip(*IMAGENET, strict=True)]
    torch.testing.assert_close(seen[0][0, :, 0, 0], torch.tensor(wanted))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(1))
    torch.testing.assert_close(
        Vit(network, CLIP_PIXELS, unit=False)(white)[0, 0], seen[1][0, 0, 0, 0]
    )


def keys(t):
    """Keys' cubic kernel with a = -3/4, which torch's bicubic interpolation has."""
    t, a = abs(t), -0.75
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


def test_positions_are_kept_where_they_fit_and_else_interpolated_at_dinov2s_places():
    """Token i of the grid lies at (i + 1/2) g / (grid + 0.1) - 1/2 of the table."""
    g, grid = 9, 4
    positions = torch.randn(1, 1 + g * g, 2, generator=torch.Generator().manual_seed(0))
    assert resampled_positions(positions, g) is positions
    weights = torch.zeros(grid, g, dtype=torch.float64)
    for i in range(grid):
        place = (i + 0.5) * g / (grid + 0.1) - 0.5
        for j in range(math.floor(place) - 1, math.floor(place) + 3):
            weights[i, min(max(j, 0), g - 1)] += keys(place - j)  # the edge goes on
    table = positions[0, 1:].double().unflatten(0, (g, g))
    wanted = torch.einsum("ij,kl,jld->ikd", weights, weights, table)
    found = resampled_positions(positions, grid)
    torch.testing.assert_close(found[:, :1], positions[:, :1])
    torch.testing.assert_close(found[0, 1:].double(), wanted.flatten(0, 1), atol=1e-5, rtol=0)


# ---- the real architectures ----------------------------------------------------------------------


def test_dinov2_is_timms_network_on_the_file_that_facebook_gives(tmp_path):
    timm = imported("timm")
    torch.manual_seed(0)
    whole = timm.create_model("vit_small_patch14_dinov2", num_classes=0).eval()  # of 518 pixels
    with torch.no_grad():
        for tensor in whole.parameters():
            torch.nn.init.normal_(tensor, std=0.05)
    torch.save({**whole.state_dict(), "mask_token": torch.zeros(1, 384)}, tmp_path / "small.pth")
    extractor = dinov2(tmp_path / "small.pth", CPU)
    batch = torch.stack([extractor.prepare(image) for image in IMAGES])
    found = extractor(batch)
    assert extractor.name == "DINOv2 ViT-S/14"
    assert found.shape == (2, 384)
    network = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=224).eval()
    tensors = whole.state_dict()
    tensors["pos_embed"] = resampled_positions(tensors["pos_embed"], 16)
    network.load_state_dict(tensors)
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in IMAGENET)
    with torch.inference_mode():
        tokens = network.forward_features((batch.float() / 255 - mean) / deviation)
    torch.testing.assert_close(found, tokens[:, 0])


def test_clip_is_transformers_model_of_a_folder(tmp_path):
    transformers = imported("transformers")
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, projection_dim=24, num_hidden_layers=2,
        num_attention_heads=2, image_size=28, patch_size=7,
    )  # fmt: skip
    model = transformers.CLIPVisionModelWithProjection(config).eval()
    model.save_pretrained(tmp_path / "clip")
    extractor = clip(tmp_path / "clip", CPU)
    batch = torch.stack([extractor.prepare(image) for image in IMAGES])
    assert batch.shape[2:] == (28, 28)
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in CLIP_PIXELS)
    with torch.inference_mode():
        wanted = model((batch.float() / 255 - mean) / deviation).image_embeds
    torch.testing.assert_close(extractor(batch), F.normalize(wanted, dim=1))
    assert len(extractor.sha256) == 64


def openai_names(tensors, layers):
    """The image tower of transformers' CLIP by OpenAI's names."""
    model, made = "vision_model.", {}
    for ours, theirs in {
        "class_embedding": "embeddings.class_embedding",
        "conv1.weight": "embeddings.patch_embedding.weight",
        "positional_embedding": "embeddings.position_embedding.weight",
    }.items():
        made[ours] = tensors[f"{model}{theirs}"]
    for part in ("weight", "bias"):
        made[f"ln_pre.{part}"] = tensors[f"{model}pre_layrnorm.{part}"]
        made[f"ln_post.{part}"] = tensors[f"{model}post_layernorm.{part}"]
        for i in range(layers):
            block, layer = f"transformer.resblocks.{i}.", f"{model}encoder.layers.{i}."
            rows = [tensors[f"{layer}self_attn.{name}_proj.{part}"] for name in "qkv"]
            made[f"{block}attn.in_proj_{part}"] = torch.cat(rows)
            for ours, theirs in {
                "attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1",
                "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
            }.items():  # fmt: skip
                made[f"{block}{ours}.{part}"] = tensors[f"{layer}{theirs}.{part}"]
    made["proj"] = tensors["visual_projection.weight"].T
    return {f"visual.{name}": tensor.clone() for name, tensor in made.items()}


@pytest.mark.slow
def test_clip_is_the_same_from_openais_file_in_timm_and_from_transformers(tmp_path):
    transformers = imported("transformers")
    imported("timm")
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=768, intermediate_size=3072, projection_dim=512, num_hidden_layers=12,
        num_attention_heads=12, image_size=224, patch_size=32, hidden_act="quick_gelu",
    )  # fmt: skip
    model = transformers.CLIPVisionModelWithProjection(config).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.02 * torch.randn_like(tensor))
    model.save_pretrained(tmp_path / "clip")
    torch.save(openai_names(model.state_dict(), 12), tmp_path / "clip.pt")
    one, other = clip(tmp_path / "clip.pt", CPU), clip(tmp_path / "clip", CPU)
    assert one.name == "CLIP ViT-B/32-224"
    batch = torch.stack([one.prepare(image) for image in IMAGES])
    torch.testing.assert_close(one(batch), other(batch), atol=1e-5, rtol=1e-4)
    assert (one(batch)[0] - one(batch)[1]).norm() > 0.01
