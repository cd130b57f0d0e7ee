"""`hdit data check`: each figure against a count by hand or a formula of its own."""

import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import zipfile
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hdit.data import FolderSpec, HubSpec, check
from hdit.data.check import open_source, reading
from hdit.data.check.contact_sheet import SHEET_IMAGES, spread_over_classes
from hdit.data.check.reading import RECORD
from hdit.data.check.report import (
    ASPECTS,
    Duplicates,
    FileSize,
    _aspects,
    _sizes,
    duplicates,
    moments,
)
from hdit.data.check.tables import DEFAULT_SIGMA_DATA
from hdit.data.source import DataError
from hdit.spaces import PixelSpace

RED = (200, 30, 30)


def noise(seed: int, width: int, height: int, channels: int = 3) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


def write(path: Path, image: Image.Image, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


@pytest.fixture
def pets(tmp_path, monkeypatch):
    """8 good images in 3 classes, one of them in 4 files, and 2 bad ones; we stand beside them.

    The image is stored as PNG and as BMP, in another class as TIFF, and turned with a note that
    says so.
    """
    folder = tmp_path / "pets"
    image = noise(0, 40, 30)
    write(folder / "cat" / "a.png", image)
    write(folder / "cat" / "b.bmp", image)
    write(folder / "dog" / "a.tif", image)
    exif = Image.Exif()
    exif[274] = 6  # turn by 90 degrees, clockwise
    write(folder / "cat" / "turned.png", image.transpose(Image.Transpose.ROTATE_90), exif=exif)
    pixels = np.array(image)
    pixels[-1, -1, -1] ^= 128  # one colour of one pixel, and seen in grey too
    write(folder / "cat" / "almost.png", Image.fromarray(pixels))
    write(folder / "dog" / "grey.png", noise(1, 8, 50, channels=1))
    write(folder / "dog" / "wide.jpg", noise(2, 100, 20))
    write(folder / "owl" / "alpha.png", Image.new("RGBA", (16, 16), (*RED, 0)))
    (folder / "owl" / "empty.png").touch()
    (folder / "dog" / "cut.png").write_bytes((folder / "cat" / "a.png").read_bytes()[:900])
    monkeypatch.chdir(tmp_path)
    return Path("pets")


def report_of(place, **settings):
    return check.check(open_source(str(place), **settings))[0]


# ---- figures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"size": "16"}, {"size": "24x10", "channels": 1}])
def test_sigma_data_is_the_deviation_of_all_pixels_that_training_sees(pets, settings):
    report = report_of(pets, **settings)
    source = open_source(str(pets), max_bad_share=1.0, **settings)
    images = [source[i].image.numpy() for i in range(len(source)) if not source[i].skipped]
    assert len(images) == 8
    x0 = np.stack(images).astype(np.float64) / 127.5 - 1
    assert report.sigma_data == pytest.approx(x0.std(), rel=1e-12)  # both in float64
    assert report.mean == pytest.approx(x0.mean(), rel=1e-12)


def test_moments_do_not_lose_digits_over_a_large_data_set():
    """10^13 elements of 254 and 255: their squares differ in the third digit, and sum to 10^18."""
    n = 10**13
    mean, deviation = moments(2 * n, n * (254 + 255), n * (254**2 + 255**2))
    assert mean == pytest.approx(float(Fraction(509, 2) / Fraction(255, 2) - 1), rel=1e-14)
    assert deviation == pytest.approx(0.5 / 127.5, rel=1e-14)


def test_sizes_are_those_of_the_upright_images(pets):
    report = report_of(pets, size="30")
    assert (report.images, report.readable) == (10, 8)
    assert report.smallest == FileSize(16, 16, "pets/owl/alpha.png")
    assert (report.median.width, report.median.height) == (40, 30)
    assert report.largest == FileSize(100, 20, "pets/dog/wide.jpg")
    assert report.enlarged == 3  # 8 x 50, 100 x 20 and 16 x 16; not 40 x 30, nor that one turned
    assert report.aspects == dict.fromkeys(ASPECTS, 0) | {
        "narrower than 1:2": 1,
        "1:1": 1,
        "1:1 to 4:3": 5,
        "wider than 2:1": 1,
    }


@pytest.mark.parametrize(("number", "middle"), [(1, 1), (4, 2), (5, 3)])
def test_median_size_is_that_of_a_image_in_the_middle_by_area(number, middle):
    """Images of 1 x 100, 2 x 100, ... in another order; of an even number, the smaller."""
    sides = [4, 1, 3, 5, 2]
    sides = [side for side in sides if side <= number]
    records = np.array([((0, 0), i, 0, side, 100) for i, side in enumerate(sides)], RECORD)
    smallest, median, largest = _sizes(records, str)
    assert [size.width for size in (smallest, median, largest)] == [1, middle, number]
    assert median.file == str(sides.index(middle))


@pytest.mark.parametrize(
    ("size", "aspect"),
    [
        ((49, 99), "narrower than 1:2"),
        ((50, 100), "1:2 to 3:4"),
        ((75, 100), "3:4 to 1:1"),
        ((99, 100), "3:4 to 1:1"),
        ((100, 100), "1:1"),
        ((100, 99), "1:1 to 4:3"),
        ((100, 75), "1:1 to 4:3"),
        ((100, 50), "4:3 to 2:1"),
        ((101, 50), "wider than 2:1"),
    ],
)
def test_aspect_on_a_border_is_counted_nearer_to_square(size, aspect):
    record = np.array([((0, 0), 0, 0, *size)], RECORD)
    assert [name for name, number in _aspects(record).items() if number] == [aspect]


def test_formats_modes_and_bytes_are_those_of_the_files(pets):
    report = report_of(pets)
    assert report.formats == {"PNG": 5, "BMP": 1, "TIFF": 1, "JPEG": 1}
    assert report.modes == {"RGB": 6, "L": 1, "RGBA": 1}
    bad = ("empty.png", "cut.png")
    sizes = [p.stat().st_size for p in pets.rglob("*.*") if p.name not in bad]
    assert report.stored_bytes == sum(sizes)


def test_image_whose_file_was_closed_is_no_bad_one(tmp_path, monkeypatch):
    """A hook may give such; training takes it."""
    write(tmp_path / "a.gif", Image.new("L", (5, 4)), save_all=True)
    image = Image.open(tmp_path / "a.gif")
    image.load()
    with open(tmp_path / "a.gif") as image.fp:
        pass
    source = FolderSpec(path=str(tmp_path), size=4).open()
    monkeypatch.setattr(source.entries, "load", lambda index: (image, 0))
    (found,) = reading.read_all(source, 0)
    assert found.unreadable == []
    assert found.stored == 5 * 4


def test_classes_are_counted_by_the_images_that_can_be_read(pets):
    assert report_of(pets).classes == {"cat": 4, "dog": 3, "owl": 1}


def test_duplicates_are_found_by_pixels_and_label_conflicts_are_told(pets):
    (group,) = report_of(pets).duplicates
    names = ["cat/a.png", "cat/b.bmp", "cat/turned.png", "dog/a.tif"]
    assert group.files == [f"pets/{name}" for name in names]
    assert group.classes == ["cat", "cat", "cat", "dog"]
    assert group.conflict


def test_duplicates_need_the_same_shape_and_not_bytes_alone(tmp_path):
    for i, size in enumerate([(4, 9), (9, 4), (6, 6), (9, 4)]):
        write(tmp_path / f"{i}.png", Image.new("RGB", size, RED))
    (group,) = report_of(tmp_path).duplicates
    assert group.files == [str(tmp_path / f"{i}.png") for i in (1, 3)]
    assert not group.conflict


def test_duplicates_come_in_groups_in_the_order_of_the_listing():
    digests = [(7, 1), (3, 9), (3, 8), (7, 1), (3, 9), (3, 8), (5, 5), (7, 1)]
    records = np.array([(d, i, 0, 1, 1) for i, d in enumerate(digests)], RECORD)
    groups = [group["index"].tolist() for group in duplicates(records)]
    assert groups == [[0, 3, 7], [1, 4], [2, 5]]
    assert duplicates(records[:3]) == duplicates(records[:0]) == []


@pytest.mark.parametrize("workers", [1, 3])
def test_report_is_the_same_for_any_number_of_workers(pets, monkeypatch, workers):
    monkeypatch.setattr(reading, "READ_AT_ONCE", 2)
    counted = []
    found = check.check(open_source(str(pets)), workers, counted.append)
    assert found == check.check(open_source(str(pets)))
    assert sum(counted) == 10


def test_default_sigma_data_in_print_is_that_of_the_pixel_space():
    assert PixelSpace().sigma_data == DEFAULT_SIGMA_DATA


# ---- bad images ----------------------------------------------------------------------------------


def test_each_unreadable_image_is_named_with_the_reason_of_training(pets):
    report = report_of(pets)
    source = open_source(str(pets), max_bad_share=1.0)
    told = [skipped for i in range(len(source)) for skipped in source[i].skipped]
    assert {tuple(bad) for bad in report.unreadable} == {tuple(skipped) for skipped in told}
    assert [bad.file for bad in report.unreadable] == ["pets/dog/cut.png", "pets/owl/empty.png"]
    assert "the file is empty" in report.unreadable[1].reason


def many(folder: Path, good: int, bad: int) -> Path:
    folder.mkdir()
    for i in range(good):
        write(folder / f"{i:03}.png", Image.new("L", (2, 2), i))
    for i in range(bad):
        (folder / f"bad{i:03}.png").write_bytes(b"no image")
    return folder


@pytest.mark.parametrize(
    ("good", "bad", "usable"),
    [(95, 5, True), (94, 6, False), (19, 1, True), (3, 2, False), (0, 3, False)],
)
def test_data_is_unusable_where_training_ends_once_all_of_it_was_drawn(
    tmp_path, hdit, good, bad, usable
):
    folder = many(tmp_path / "it", good, bad)
    source = FolderSpec(path=str(folder), size=2).open()
    try:
        for i in range(len(source)):
            source[i]
        trains = True
    except DataError:
        trains = False
    assert trains == usable
    status, out, err = hdit("data", "check", folder, "--sheet", tmp_path / "sheet.png")
    assert status == (0 if usable else 1)
    assert out.count("unreadable: ") == bad
    if not usable:
        told = "none" if good == 0 else bad
        assert f"unusable: {told} of the {good + bad} images" in err
    assert (tmp_path / "sheet.png").exists() == (good > 0)


def test_check_of_labelled_images_that_are_all_bad_says_so(tmp_path, hdit):
    for name in ("cat/a.png", "dog/b.png"):
        (tmp_path / "it" / name).parent.mkdir(parents=True)
        (tmp_path / "it" / name).touch()
    sheet = tmp_path / "sheet.png"
    status, out, err = hdit("data", "check", tmp_path / "it", "--sheet", sheet)
    assert status == 1
    assert "warning: classes without an image that can be read: cat, dog" in out
    assert err.strip().startswith("unusable: none of the 2 images in ")
    assert not sheet.exists()
    assert hdit("data", "check", tmp_path / "it", "--sheet", sheet, "--json")[0] == 1


# ---- the contact sheet ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([3], [3]),
        ([1000], [100]),
        ([300, 300, 300], [34, 33, 33]),
        ([2, 500, 1, 500], [2, 49, 1, 48]),
        ([10] * 10, [10] * 10),
        ([5] * 300, [1] * 100),
        ([], []),
    ],
)
def test_contact_sheet_is_even_over_classes(counts, expected):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts or 0))
    chosen = (
        spread_over_classes(labels.astype(np.int32))
        if counts
        else spread_over_classes(np.empty(0, np.int32))
    )
    assert len(set(chosen.tolist())) == len(chosen) == sum(expected) <= SHEET_IMAGES
    _, numbers = np.unique(labels[chosen], return_counts=True)
    assert numbers.tolist() == expected


def test_contact_sheet_of_one_class_is_spread_over_all_of_it():
    chosen = spread_over_classes(np.zeros(1000, np.int32))
    assert np.diff(chosen).tolist() == [10] * 99


def test_contact_sheet_has_the_images_as_training_sees_them(pets, hdit):
    assert hdit("data", "check", pets, "--size", 64)[0] == 1  # two of ten are bad
    sheet = np.asarray(Image.open("pets-contact-sheet.png"))
    source = open_source(str(pets), size="64")
    first = source[0].image.permute(1, 2, 0).numpy()
    assert (sheet[1:65, 1:65] == first).all()  # within its line
    assert (first != 255).any()


def test_contact_sheet_of_large_images_is_made_smaller(pets):
    source = open_source(str(pets), size="600x300")
    tiles = check.contact_sheet(source, check.check(source)[1])
    assert tiles.shape == (8, 3, 200, 100)  # by 3, the least factor that makes 600 fit into 256


# ---- the command ---------------------------------------------------------------------------------


def test_check_prints_tables_and_names(pets, hdit):
    for name in ("a.heic", "notes.txt"):
        (pets / "dog" / name).touch()
    status, out, err = hdit("data", "check", pets, "--size", 30, "--workers", 1)
    assert status == 1
    assert "unusable: 2 of the 10 images cannot be read, beyond data.max_bad_share = 0.05" in err
    assert "label conflict: pets/cat/a.png (cat) = pets/cat/b.bmp (cat) = " in out
    assert "warning: data.path: 'pets': 1 file is left out, in no format that Pillow reads" in out
    for row in (
        r"images +│ 10 \(folder\)",
        r"left out +│ \.heic 1, \.txt 1",
        r"unreadable +│ 2 \(20.0%\); training takes up to 5%",
        r"smallest +│ 16 x 16  pets/owl/alpha.png",
        r"enlarged +│ 3 \(37.5%\), smaller than 30 x 30",
        r"classes +│ 3; smallest owl: 1; largest cat: 4",
        r"duplicates +│ 1 groups, 4 files; 1 with labels that differ",
        r"to set it +│ space.sigma_data = 0\.\d+",
        r"wider than 2:1 +│ +1 │ 12.5% │ #",
        r"dog +│ +3 │ 37.5% │ ##",
    ):
        assert re.search(row, out), row
    assert out.splitlines()[-1] == "8 images as training sees them: pets-contact-sheet.png"
    assert sorted(os.listdir()) == ["pets", "pets-contact-sheet.png"]


def test_check_prints_only_the_ends_of_many_classes(tmp_path, hdit):
    for label in range(31):
        for i in range(2 if label == 15 else 1):
            write(tmp_path / "it" / f"c{label:02}" / f"{i}.png", Image.new("L", (1, 1), label))
    _, out, _ = hdit("data", "check", tmp_path / "it", "--size", 8, "--sheet", tmp_path / "a.png")
    assert "the 10 smallest and the 10 largest of 31 classes" in out
    assert "c14" not in out
    assert re.search(r"c15 +│ +2", out)


def test_check_as_json_is_one_object_with_all_of_it(pets, hdit):
    (pets / "dog" / "a.heic").touch()
    status, out, _ = hdit("data", "check", pets, "--json", "--size", "20x24", "--channels", 1)
    assert status == 1
    found = json.loads(out)
    assert found["contact_sheet"] == "pets-contact-sheet.png"
    assert Path(found["contact_sheet"]).exists()
    assert found["size"] == [20, 24]
    assert found["channels"] == 1
    assert found["classes"] == {"cat": 4, "dog": 3, "owl": 1}
    assert found["largest"] == {"width": 100, "height": 20, "file": "pets/dog/wide.jpg"}
    assert [bad["file"] for bad in found["unreadable"]] == [
        "pets/dog/cut.png",
        "pets/owl/empty.png",
    ]
    assert found["duplicates"][0]["conflict"] is True
    assert len(found["duplicates"][0]["files"]) == 4
    assert found["left_out"] == {".heic": 1}
    assert found["warnings"][0].endswith(": .heic 1; convert or remove it")
    assert found["unusable"].startswith("2 of the 10 images cannot be read")


def test_check_reads_an_archive_and_a_hook(pets, tmp_path, hdit, monkeypatch):
    with zipfile.ZipFile("pets.zip", "w") as file:
        for path in sorted(pets.rglob("*.*")):
            file.write(path)
    status, out, _ = hdit("data", "check", "pets.zip", "--json")
    assert status == 1
    in_zip, in_folder = json.loads(out), report_of(pets).to_json()
    for key in ("classes", "sigma_data", "formats", "stored_bytes", "aspects"):
        assert in_zip[key] == in_folder[key], key
    assert in_zip["contact_sheet"] == "pets-contact-sheet.png"
    (tmp_path / "my_hooked_pets.py").write_text(
        "from PIL import Image\ndef few():\n    return [(Image.new('L', (9, 9)), None)] * 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    status, out, err = hdit(
        "data", "check", "my_hooked_pets:few", "--kind", "python", "--workers", 0
    )
    assert status == 0, err
    assert re.search(r"formats +│ pixels 3 ", out)
    assert "training without labels" in out
    assert Path("my_hooked_pets-few-contact-sheet.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "data.path: 'nowhere' does not exist"),
        (["pets", "--size", "9" * 5000], "--size: must be a side in pixels or HEIGHTxWIDTH, got"),
        (["pets", "--size", "²"], "--size: must be a side in pixels or HEIGHTxWIDTH, got '²'"),
        (["pets", "--kind", "zip"], "data.path: 'pets' is not a file"),
        (["pets", "--kind", "flder"], "--kind: must be folder, zip"),
        (["pets", "--kind", "digits"], "--kind: must be folder, zip"),
        (["note.txt"], "PATH: 'note.txt' is a file that tells no kind of source"),
        (["pets", "--size", "big"], "--size: must be a side in pixels or HEIGHTxWIDTH, got 'big'"),
        (["pets", "--size", "0"], "--size: must be a side in pixels"),
        (["pets", "--channels", "2"], "--channels: must be 1 or 3, got 2"),
        (["pets", "--crop", "centre"], "--crop: must be 'center', "),
        (["pets", "--sheet", "a.jpg"], "--sheet: must end in .png, got 'a.jpg'"),
        (["pets", "--sheet", "no/a.png"], "--sheet: 'no/a.png' lies in a folder that does not"),
        (["pets", "--sheet", "pets/a.png"], "--sheet: 'pets/a.png' would lie in the data folder"),
        (["--kind", "python", "few"], "PATH: must be module:function"),
    ],
)
def test_check_of_bad_input_is_one_message_and_leaves_nothing(pets, hdit, arguments, message):
    Path("note.txt").touch()
    before = sorted(Path().rglob("*"))
    status, out, err = hdit("data", "check", *arguments)
    assert status == 1
    assert err.startswith(f"error: {message}")
    assert not out
    assert sorted(Path().rglob("*")) == before


def test_check_of_a_name_on_the_hub_is_told_from_a_folder(pets, monkeypatch):
    opened = []

    def open_(spec):
        opened.append((spec.path, spec.name))
        raise DataError("enough")

    monkeypatch.setattr(HubSpec, "open", open_)
    for place in ("user/pets", "pets"):
        with pytest.raises(DataError, match="enough"):
            open_source(place, "hub")
    assert opened == [(None, "user/pets"), ("pets", None)]


def test_check_names_label_conflicts_first_and_not_all_of_many_duplicates(pets):
    plain = [Duplicates([f"{i}a", f"{i}b"], ["cat", "cat"]) for i in range(24)]
    large = Duplicates([str(i) for i in range(8)], ["cat"] * 7 + ["dog"])
    report = replace(report_of(pets), unreadable=[], duplicates=[*plain, large])
    lines = list(check.lines(report))
    first = " = ".join(f"{i} (cat)" for i in range(6))
    assert lines[0] == f"label conflict: {first} = and 2 more"
    assert lines[1:20] == [f"duplicates: {i}a = {i}b" for i in range(19)]
    assert lines[20:] == ["duplicates: 5 groups more; --json names them all"]


def test_check_from_within_the_data_folder_says_where_the_sheet_may_go(pets, hdit, monkeypatch):
    monkeypatch.chdir(pets)
    status, _, err = hdit("data", "check", ".")
    assert status == 1
    assert "'pets-contact-sheet.png' would lie in the data folder" in err
    assert hdit("data", "check", ".", "--sheet", "../sheet.png")[0] == 1  # two of ten are bad
    assert Path("../sheet.png").exists()


def test_check_that_is_interrupted_leaves_no_sheet(pets, hdit, monkeypatch):
    def half(image, path, **options):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", half)
    status, _, _ = hdit("data", "check", pets)
    assert status == 130
    assert os.listdir() == ["pets"]


def test_check_shows_names_that_a_terminal_would_obey_escaped(tmp_path, hdit):
    write(tmp_path / "it" / "good.png", Image.new("L", (1, 1)))
    (tmp_path / "it" / "[red]\x1b[2J.png").touch()
    _, out, _ = hdit("data", "check", tmp_path / "it", "--sheet", tmp_path / "a.png")
    assert "[red]\\x1b[2J.png: UnidentifiedImageError: the file is empty" in out
    assert "\x1b" not in out


def test_check_tells_of_a_worker_that_is_killed(pets, hdit, tmp_path, monkeypatch):
    (tmp_path / "killing.py").write_text(
        "import os\n"
        "class Few:\n"
        "    def __len__(self): return 3\n"
        "    def __getitem__(self, index): os.kill(os.getpid(), 9)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    status, _, err = hdit("data", "check", "killing:Few", "--kind", "python", "--workers", 1)
    assert status == 1
    assert "error: --workers: one of 1 ended (DataLoader worker" in err


# ---- docs/data.md --------------------------------------------------------------------------------

GUIDE = Path(__file__).parents[2] / "docs" / "data.md"


def run_block(name: str) -> None:
    """Runs the commands under `<!-- run: name -->` here."""
    (block,) = re.findall(rf"<!-- run: {name} -->\n```sh\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    done = subprocess.run(["sh", "-eu", "-c", block], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "jpeg")
    return file.getvalue()


def tar(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def test_guide_to_imagenet_makes_the_folder_of_the_configs(tmp_path, hdit, monkeypatch):
    """With the oddities that are known: a PNG by a JPEG's name, and one in CMYK."""
    monkeypatch.chdir(tmp_path)
    first = {f"n01440764_{i}.JPEG": jpeg(noise(i, 50, 40)) for i in (18, 10026)}
    odd = io.BytesIO()
    noise(7, 21, 18).save(odd, "png")
    second = {"n02105855_2933.JPEG": odd.getvalue()}
    second["n02105855_7.JPEG"] = jpeg(Image.new("RGB", (32, 32), RED).convert("CMYK"))
    classes = {"n01440764.tar": tar(first), "n02105855.tar": tar(second)}
    Path("ILSVRC2012_img_train.tar").write_bytes(tar(classes))
    run_block("imagenet")
    names = sorted(p.relative_to("imagenet").as_posix() for p in Path("imagenet").rglob("*.*"))
    assert names == [f"n01440764/{n}" for n in sorted(first)] + [
        f"n02105855/{n}" for n in sorted(second)
    ]
    status, out, err = hdit("data", "check", "imagenet", "--size", 32, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["classes"] == {"n01440764": 2, "n02105855": 2}
    assert found["unreadable"] == []
    assert found["formats"] == {"JPEG": 3, "PNG": 1}
    assert found["modes"] == {"RGB": 3, "CMYK": 1}
    cmyk = open_source("imagenet", size="32")[3].image
    Path("ILSVRC2012_img_val.tar").write_bytes(
        tar({"ILSVRC2012_val_00000001.JPEG": odd.getvalue()})
    )
    run_block("imagenet-val")
    assert report_of("imagenet-val").classes == {}
    assert np.abs(cmyk.permute(1, 2, 0).numpy().astype(int) - RED).max() <= 3  # JPEG's loss


@pytest.mark.parametrize("way", ["zip", "folder"])
def test_guide_to_ffhq_makes_the_folder_of_the_config(tmp_path, hdit, monkeypatch, way):
    """70 sub-folders of 1,000 faces each are no classes."""
    if way == "zip" and shutil.which("unzip") is None:
        pytest.skip("unzip is not installed")
    monkeypatch.chdir(tmp_path)
    for i in (0, 1, 1000):
        write(Path(f"images1024x1024/{i // 1000 * 1000:05}/{i:05}.png"), noise(i, 32, 32))
    if way == "zip":
        shutil.make_archive("images1024x1024", "zip", ".", "images1024x1024")
        shutil.rmtree("images1024x1024")
    run_block(f"ffhq-{way}")
    run_block("ffhq")
    status, out, err = hdit("data", "check", "ffhq1024", "--size", 32, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert (found["images"], found["classes"]) == (3, {})
    assert found["smallest"]["width"] == found["largest"]["height"] == 32


@pytest.mark.parametrize("name", ["hdit-ffhq1024", "hdit-imagenet128", "dit-xl-2-256"])
def test_guide_names_the_folder_of_each_config(name):
    config = (GUIDE.parents[1] / "configs" / f"{name}.toml").read_text()
    (path,) = re.findall(r'^path = "(\w+)"', config, re.MULTILINE)
    assert f"`{path}`" in GUIDE.read_text()


def test_check_of_tars_tells_what_that_of_a_folder_tells(pets, hdit):
    images = sorted(path for path in Path("pets").rglob("*") if path.is_file())
    for shard in range(2):
        members = {p.relative_to("pets").as_posix(): p.read_bytes() for p in images[shard::2]}
        flat = {name.replace("/", "-"): content for name, content in members.items()}
        Path(f"{shard}.tar").write_bytes(tar(flat))
    reports = []
    for path in ("pets", "{0,1}.tar"):
        _, out, _ = hdit("data", "check", path, "--workers", 2, "--json", "--sheet", "sheet.png")
        reports.append(json.loads(out))
    folder, tars = reports
    for key in ("images", "readable", "formats", "modes", "sigma_data", "mean", "aspects"):
        assert tars[key] == folder[key], key
    assert folder["sigma_data"] > 0


def test_check_of_a_config_takes_its_data(pets, hdit):
    config = """
data = { path = "pets", size = 16, background = "black" }
model = { kind = "dit", patch_size = 4, width = 16, depth = 1, num_heads = 1 }
training = { images = 1, checkpoint_every = 1, batch_size = 1 }
"""
    Path("it.toml").write_text(config)
    reports = []
    for arguments in (["it.toml", "--set", "data.size=12"], ["pets", "--size", "12"]):
        _, out, _ = hdit("data", "check", *arguments, "--json", "--workers", 0, "--sheet", "a.png")
        reports.append(json.loads(out))
    assert [report["size"] for report in reports] == [[12, 12]] * 2
    assert reports[0]["images"] == reports[1]["images"]
    for arguments in (["it.toml", "--size", "12"], ["pets", "--set", "data.size=12"]):
        status, _, err = hdit("data", "check", *arguments)
        assert status == 1
        assert "has no effect" in err
