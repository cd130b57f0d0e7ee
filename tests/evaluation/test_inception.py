"""The file of FID's Inception, and what it gets; and how other networks get their pixels."""

import importlib.util
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from hdit.errors import UserError
from hdit.evaluation import inception
from hdit.evaluation.extractor import sha256
from hdit.evaluation.features import open_features
from hdit.evaluation.inception import INCEPTION, INCEPTION_URL, inception_file
from hdit.evaluation.pipelines import CleanResize, SquareResize, tensorflow_resize

CPU = torch.device("cpu")


class Layers(torch.nn.Module):
    def forward(self, x: torch.Tensor):
        return x.mean((2, 3)).repeat(1, 683)[:, :2048]


class Base(torch.nn.Module):
    """What is taken of the file: `layers`, from -1..1 to 2048 numbers an image, `output`, and a
    call that resizes by itself, here to the shape 1 x 1."""

    def __init__(self):
        super().__init__()
        self.layers = Layers()
        self.output = torch.nn.Linear(2048, 1008)

    def forward(self, x: torch.Tensor, return_features: bool = False):
        x = (x.float()[:, :, :1, :1] - 128) / 128
        return self.layers(x) if return_features else self.output(self.layers(x)).softmax(1)


def save(module, path):
    with warnings.catch_warnings(category=DeprecationWarning, action="ignore"):  # torch's, of jit
        torch.jit.save(torch.jit.script(module), path)
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """hdit's cache, empty; the Inception is a file of two bytes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(inception, "CLEAN_FID", tmp_path / "theirs")
    (tmp_path / "right").write_bytes(b"OK")
    monkeypatch.setattr(inception, "INCEPTION_SHA256", sha256(tmp_path / "right"))
    return tmp_path / "hdit"


# ---- the file ------------------------------------------------------------------------------------


def never(address, path):
    raise AssertionError("nothing was to be downloaded")


def writer(content):
    def download(address, path):
        assert address == INCEPTION_URL
        path.write_bytes(content)

    return download


def test_inception_is_downloaded_once(cache):
    path = inception_file(writer(b"OK"), print)
    assert path == cache / INCEPTION
    assert path.read_bytes() == b"OK"
    assert inception_file(never, print) == path
    assert list(cache.iterdir()) == [path]


def test_inception_is_taken_where_clean_fid_keeps_it(cache, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / INCEPTION).write_bytes(b"OK")
    assert inception_file(never, print) == tmp_path / "theirs" / INCEPTION


def test_a_damaged_inception_is_named_and_replaced(cache):
    cache.mkdir()
    (cache / INCEPTION).write_bytes(b"O")  # a download that was cut off
    said = []
    assert inception_file(writer(b"OK"), said.append).read_bytes() == b"OK"
    assert "is damaged or another file" in said[0]


def test_another_file_in_place_of_inception_is_refused_and_not_kept(cache):
    with pytest.raises(UserError, match="is not that file"):
        inception_file(writer(b"KO"), print)
    assert list(cache.iterdir()) == []


def test_without_a_network_the_error_has_the_command(cache):
    def download(address, path):
        raise OSError("Name or service not known")

    command = f"curl -fL -o {cache / INCEPTION} {INCEPTION_URL}"
    with pytest.raises(UserError) as raised:
        inception_file(download, print)
    assert command in str(raised.value)
    assert not (cache / INCEPTION).exists()


# ---- pixels --------------------------------------------------------------------------------------


def pixels(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("size", [(8, 12), (500, 330)])
def test_clean_resize_is_pillows_in_floating_point(size):
    image = pixels(3, *size)
    found = CleanResize()(image)
    for channel, plane in zip(found, image, strict=True):
        wanted = Image.fromarray(plane.numpy().astype(np.float32)).resize(
            (299, 299), Image.Resampling.BICUBIC
        )
        np.testing.assert_array_equal(channel, np.asarray(wanted).clip(0, 255))
    assert (found != found.round()).any()


@pytest.mark.skipif(
    importlib.util.find_spec("cleanfid") is None,
    reason="clean-fid is not installed (pip install --no-deps clean-fid requests)",
)
@pytest.mark.parametrize("size", [(28, 28), (256, 256), (300, 450)])
def test_clean_resize_is_clean_fids(size):
    from cleanfid.resize import build_resizer

    image = pixels(3, *size)
    with warnings.catch_warnings(category=DeprecationWarning, action="ignore"):  # Pillow's, of mode
        wanted = build_resizer("clean")(image.permute(1, 2, 0).numpy())  # (h w c)
    np.testing.assert_array_equal(CleanResize()(image).permute(1, 2, 0), wanted)


def written_out(plane, side):
    """TensorFlow 1's ResizeBilinear of one channel, pixel by pixel, in float32 as there."""
    h, w = plane.shape
    made = np.zeros((side, side), np.float32)
    scale_y, scale_x = np.float32(h / side), np.float32(w / side)
    for i in range(side):
        y = np.float32(i) * scale_y
        top = math.floor(y)
        bottom, dy = min(top + 1, h - 1), y - np.float32(top)
        for j in range(side):
            x = np.float32(j) * scale_x
            left = math.floor(x)
            right, dx = min(left + 1, w - 1), x - np.float32(left)
            above = plane[top, left] + (plane[top, right] - plane[top, left]) * dx
            below = plane[bottom, left] + (plane[bottom, right] - plane[bottom, left]) * dx
            made[i, j] = above + (below - above) * dy
    return made


@pytest.mark.parametrize("size", [(8, 12), (61, 45), (37, 37)])
def test_adms_resize_is_tensorflows_written_out(size):
    image = pixels(1, 1, *size)
    found = tensorflow_resize(image, 37)
    wanted = written_out(image[0, 0].numpy().astype(np.float32), 37)
    # Roundings of numbers up to 255, which TensorFlow takes in another order.
    np.testing.assert_allclose(found[0, 0], wanted, atol=1e-4)


@pytest.mark.parametrize("size", [(32, 32), (256, 256), (300, 450), (299, 299)])
def test_adms_resize_is_that_of_a_grid_shifted_by_half_a_pixel(size):
    """As NVIDIA's file does it, by torch's grid_sample."""
    image = pixels(1, 3, *size)
    theta = torch.eye(2, 3)[None].clone()
    theta[0, 0, 2], theta[0, 1, 2] = 1 / size[1] - 1 / 299, 1 / size[0] - 1 / 299
    grid = F.affine_grid(theta, [1, 3, 299, 299], align_corners=False)
    wanted = F.grid_sample(
        image.float(), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    # A place in the grid is good to 1e-7 of its side, and neighbours differ by up to 255.
    torch.testing.assert_close(tensorflow_resize(image), wanted, atol=0.02, rtol=0)


@pytest.mark.parametrize("size", [(32, 32), (256, 256), (300, 450)])
def test_adms_resize_is_torch_fidelitys(size):
    try:
        from torch_fidelity import interpolate_compat_tensorflow as theirs
    except (ImportError, RuntimeError) as error:  # of a torchvision for another torch
        pytest.skip(f"torch-fidelity cannot be imported: {error}")
    image = pixels(1, 3, *size)
    wanted = theirs.interpolate_bilinear_2d_like_tensorflow1x(
        image.float(), size=(299, 299), align_corners=False
    )
    torch.testing.assert_close(tensorflow_resize(image), wanted, atol=1e-4, rtol=0)


def test_protocols_resize_the_same_image_to_different_pixels():
    image = pixels(3, 256, 256)
    clean, tensorflow = CleanResize()(image), tensorflow_resize(image[None])[0]
    assert (clean - tensorflow).abs().mean() > 1
    assert (tensorflow != tensorflow.round()).any(), "nothing is rounded in the graph"


@pytest.mark.parametrize("crop", [True, False])
def test_square_resize_is_pillows_to_whole_numbers(crop):
    image = pixels(3, 40, 61)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    if crop:
        picture = picture.crop((10, 0, 50, 40))
    wanted = np.asarray(picture.resize((24, 24), Image.Resampling.BICUBIC))
    found = SquareResize(24, crop)(image)
    assert found.dtype == torch.uint8
    np.testing.assert_array_equal(found.permute(1, 2, 0), wanted)


# ---- the network ---------------------------------------------------------------------------------


@pytest.fixture
def network(cache, monkeypatch):
    """A file with another network in it, as the real one is not at hand."""
    cache.mkdir()
    torch.manual_seed(0)
    base = Base()
    save(base, cache / INCEPTION)
    monkeypatch.setattr(inception, "INCEPTION_SHA256", sha256(cache / INCEPTION))
    return base


IMAGES = torch.tensor([0, 128, 255]).view(3, 1, 1).expand(3, 20, 30).byte()[None].repeat(2, 1, 1, 1)


@pytest.mark.parametrize("protocol", ["clean", "adm", "edm"])
def test_inception_gets_images_from_minus_one_to_one(network, protocol):
    extractor = open_features(None, CPU, protocol=protocol)
    batch = IMAGES
    if extractor.prepare:
        batch = torch.stack([extractor.prepare(image) for image in IMAGES])
    found = extractor(batch)
    assert found.shape == (2, 2048)
    torch.testing.assert_close(found[1, :3], torch.tensor([-1.0, 0, 127 / 128]))
    assert (extractor.prepare is not None) == (protocol == "clean")


def test_protocols_are_told_apart_by_what_the_network_gets(network):
    inputs = {open_features(None, CPU, protocol=name).input for name in ("clean", "adm", "edm")}
    assert len(inputs) == 3
    # The words are in the protocol hash of every figure that was published with them.
    assert open_features(None, CPU).input == (
        "float32 RGB, 299 x 299 by clean-fid's resize from its own size"
    )


def test_inceptions_probabilities_are_of_its_last_layer_without_bias(network):
    extractor = open_features("inception", CPU, protocol="adm")
    features, found = extractor.with_probabilities(IMAGES)
    logits = features.double() @ network.output.weight.double().T
    torch.testing.assert_close(found.double(), logits.softmax(1), atol=1e-6, rtol=1e-4)
    assert found.shape == (2, 1008)


def test_a_protocol_of_other_features_has_no_effect_and_is_refused(tmp_path):
    with pytest.raises(UserError, match="--protocol: adm has no effect on --features math:sin"):
        open_features("math:sin", CPU, protocol="adm")
