"""Samples in each form of output: what is written, gone on with, refused and checked."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from hdit.data import TarSpec
from hdit.evaluation.image_sets import open_set
from hdit.sampling import outputs, stores, writer

FORMS = {"folder": "out", "npz": "out.npz", "tar": "out-{0..2}.tar"}
NUMBER = 10
COMMAND = ["-n", NUMBER, "--steps", 2, "--batch-size", 4]


@pytest.fixture
def here(trained, tmp_path, monkeypatch):
    """A folder with a run, in which the command runs."""
    shutil.copytree(trained, tmp_path / "here" / "run")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def sample(hdit, out, *options):
    """Runs the command, which must end well -> what it says."""
    status, said, err = hdit("sample", "run", "--out", out, *COMMAND, *options)
    assert status == 0, err
    return said


def from_tars(paths):
    """(name, content) of all members."""
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar:
                yield member.name, tar.extractfile(member).read()


def images(here, form):
    """All images of a form, (n h w) uint8."""
    if form == "npz":
        return np.load(here / "out.npz")["arr_0"][..., 0]
    if form == "tar":
        found = (c for n, c in from_tars(sorted(here.glob("out-*.tar"))) if n.endswith(".png"))
        return np.stack([np.asarray(Image.open(io.BytesIO(content))) for content in found])
    return np.stack([np.asarray(Image.open(p)) for p in sorted((here / "out").glob("0*.png"))])


def left(here):
    """What lies beside the run."""
    return sorted(path.name for path in here.iterdir() if path.name != "run")


@pytest.fixture
def stopped(monkeypatch):
    """While it lasts, Ctrl-C comes as the file number `after` is stored."""

    def stop(after):
        stored, whole = [], stores.whole

        def once_too_often(path, **options):
            stored.append(path)
            if len(stored) > after:
                raise KeyboardInterrupt
            return whole(path, **options)

        patch = pytest.MonkeyPatch()
        patch.setattr(stores, "whole", once_too_often)
        patch.setattr(writer, "MOST_THREADS", 1)
        return patch

    return stop


# ---- what is written -----------------------------------------------------------------------------


def test_all_forms_hold_the_same_images_and_nothing_else_is_left(here, hdit):
    for out in FORMS.values():
        assert f"{out} (grid: " in sample(hdit, out)
    folder = images(here, "folder")
    assert folder.shape == (NUMBER, 8, 8)
    assert np.array_equal(images(here, "npz"), folder)
    assert np.array_equal(images(here, "tar"), folder)
    beside = [f"out.{k}{part}" for k in ("npz", "tar") for part in (".grid.png", ".samples.json")]
    shards = ["out-0.tar", "out-1.tar", "out-2.tar"]
    assert left(here) == sorted(["out", "out.npz", *shards, *beside])
    assert [p.name for p in (here / "out").iterdir() if p.name.startswith(".")] == []
    grids = [Image.open(here / name) for name in ("out/grid.png", "out.npz.grid.png")]
    assert np.array_equal(*map(np.asarray, grids))
    assert json.loads((here / "out.npz.samples.json").read_text())["evaluations"] == 2


def test_npz_is_that_of_adm(here, hdit):
    sample(hdit, "out.npz", "--labels", "3,1")
    with np.load(here / "out.npz") as file:
        assert sorted(file) == ["arr_0", "arr_1"]
        assert (file["arr_0"].dtype, file["arr_0"].shape) == (np.uint8, (NUMBER, 8, 8, 1))
        assert (file["arr_1"].dtype, file["arr_1"].tolist()) == (np.int64, [3, 1] * 5)
    assert len(open_set("out.npz")) == NUMBER
    sample(hdit, "none.npz", "--labels", "3,none")
    assert list(np.load(here / "none.npz")) == ["arr_0"], "no class has no index"


def test_tar_shards_are_webdatasets_and_the_same_each_time(here, hdit):
    """Members of a sample follow one another, named by the seed up to the first dot."""
    sample(hdit, FORMS["tar"])
    before = {path.name: path.read_bytes() for path in here.glob("*.tar")}
    names = [name for name, _ in from_tars(sorted(here.glob("*.tar")))]
    assert names == [f"{i:06d}.{part}" for i in range(NUMBER) for part in ("png", "cls", "json")]
    members = dict(from_tars(sorted(here.glob("*.tar"))))
    assert members["000007.cls"] == b"7"
    assert json.loads(members["000007.json"])["seed"] == 7
    source = TarSpec(path=FORMS["tar"], size=(8, 8), channels=1, classes=10, flip=False).open()
    assert [source[reference].label for reference in source.references()] == list(range(NUMBER))
    assert len(open_set(FORMS["tar"])) == NUMBER
    sample(hdit, FORMS["tar"], "--overwrite")
    assert {path.name: path.read_bytes() for path in here.glob("*.tar")} == before


def test_png_tells_how_it_was_made_and_nothing_of_where(here, hdit):
    sample(hdit, "out", "--guidance", 2, "--seed", 5, "--labels", "none,4")
    record = json.loads((here / "out" / "samples.json").read_text())
    with Image.open(here / "out" / "000006.png") as image:
        told = json.loads(image.text["hdit"])
        assert image.size == (8, 8)
    assert (told["seed"], told["class"], told["label"]) == (6, "4", 4)
    assert told["checkpoint"] == record["sha256"]
    assert told["weights"] == "ema"
    assert told["sampler"]["kind"] == "dpmpp_3m_sde"
    assert told["steps"] == 2
    assert told["sigmas"]["kind"] == "karras"
    assert told["guidance"]["scale"] == 2
    assert told["hdit"] == record["hdit"]
    assert str(here) not in (here / "out" / "000006.png").read_bytes().decode("latin-1")
    with Image.open(here / "out" / "000005.png") as image:
        assert "class" not in json.loads(image.text["hdit"])


@pytest.mark.parametrize("channels", [1, 3])
def test_png_has_the_pixels_that_it_is_made_of(channels):
    image = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8)
    assert torch.equal(stores.from_png(stores.to_png(image, "told")), image)


def test_random_labels_are_told_with_each_image(here, hdit):
    sample(hdit, "out", "--labels", "random")
    lines = [json.loads(line) for line in (here / "out/samples.jsonl").read_text().splitlines()]
    assert len({line["label"] for line in lines}) > 3
    assert [line["label"] for line in lines] != list(range(NUMBER))
    record = json.loads((here / "out" / "samples.json").read_text())
    assert record["labels"] == {"kind": "random", "number": 10}


# ---- going on ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "after"), [("folder", 0), ("folder", 3), ("npz", 1), ("tar", 1)])
def test_interrupted_set_is_gone_on_with_and_is_the_same(here, hdit, stopped, form, after):
    """Each time with another size of batch; a grey level is float rounding."""
    sample(hdit, "whole.npz")
    patch = stopped(after)
    try:
        assert hdit("sample", "run", "--out", FORMS[form], *COMMAND, "--batch-size", 2)[0] != 0
    finally:
        patch.undo()
    assert after or form != "folder" or not list((here / "out").glob("0*.png"))
    said = sample(hdit, FORMS[form], "--batch-size", 3)
    per_file = 2 if form == "npz" else 1
    assert said.startswith("10 images ")
    if after:
        assert f"({NUMBER - after * per_file} of them now) of 2 network evaluations" in said
    expected = np.load(here / "whole.npz")["arr_0"][..., 0].astype(int)
    assert np.abs(images(here, form) - expected).max() <= 1
    assert not list(here.glob(".out*"))
    assert hdit("sample", "run", "--out", FORMS[form], *COMMAND)[1].startswith(
        "all 10 images are there already"
    )


@pytest.mark.parametrize("form", ["npz", "tar"])
def test_set_that_was_interrupted_as_it_was_packed_is_gone_on_with(here, hdit, form, monkeypatch):
    packed, whole = [], outputs.whole

    def once_too_often(path, **options):
        packed.append(path)
        if len(packed) == (2 if form == "tar" else 1):
            raise KeyboardInterrupt
        return whole(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(outputs, "whole", once_too_often)
        assert hdit("sample", "run", "--out", FORMS[form], *COMMAND)[0] != 0
    assert (here / "out-0.tar").exists() == (form == "tar")
    with monkeypatch.context() as patch:  # none is made again
        patch.setattr(stores, "whole", None)
        status, said, err = hdit("sample", "run", "--out", FORMS[form], *COMMAND)
    assert (status, err) == (0, "")
    assert "(0 of them now)" in said
    assert len(images(here, form)) == NUMBER


@pytest.mark.parametrize("form", FORMS)
def test_another_set_is_refused_by_what_differs(here, hdit, stopped, form):
    patch = stopped(1)
    try:
        assert hdit("sample", "run", "--out", FORMS[form], *COMMAND)[0] != 0
    finally:
        patch.undo()
    others = {
        "sampling.steps is 2 there, and 3 is asked for": ["--steps", 3],
        "seeds.first is 0 there, and 1": ["--seed", 1],
        "seeds.number is 10 there, and 9": ["-n", 9],
        "labels.kind is 'balanced' there, and 'given'": ["--labels", "3"],
        "the hash of the weights is ": ["--raw"],
    }
    for message, option in others.items():
        status, _, err = hdit("sample", "run", "--out", FORMS[form], *COMMAND, *option)
        assert status == 1
        assert f"--out: {FORMS[form]} has samples of other settings: {message}" in err
        assert "name another place, or add --overwrite" in err
    sample(hdit, FORMS[form], "-n", 9, "--overwrite")
    assert len(images(here, form)) == 9


def test_image_that_a_power_failure_cut_off_is_made_again(here, hdit):
    sample(hdit, "out")
    whole = (here / "out" / "000004.png").read_bytes()
    (here / "out" / "000004.png").write_bytes(whole[:-20])
    (here / "out" / "000006.png").unlink()
    assert "(2 of them now)" in sample(hdit, "out")
    assert (here / "out" / "000004.png").read_bytes() == whole


def test_what_a_killed_process_had_begun_to_write_is_removed(here, hdit, stopped):
    patch = stopped(2)
    try:
        assert hdit("sample", "run", "--out", "out", *COMMAND)[0] != 0
    finally:
        patch.undo()
    for name in (".000003.png.host.12.part", ".000099.png.host.12.part", ".mine.part"):
        (here / "out" / name).write_bytes(b"half")
    sample(hdit, "out")
    hidden = sorted(p.name for p in (here / "out").iterdir() if p.name.startswith("."))
    assert hidden == [".000099.png.host.12.part", ".mine.part"], "which are none of this set"


def test_blocks_of_pixels_are_whole_or_not_there(tmp_path):
    plan = writer.Plan(0, 9, (3, 4, 5), None, ())
    store = stores.Pixels(tmp_path, plan)
    made = torch.randint(0, 256, (9, 3, 4, 5), dtype=torch.uint8)
    for indices in ([3, 4, 7], [0, 1, 2], [8], [5, 6]):
        store.put(np.array(indices), made[indices])
    assert store.there().all()
    assert torch.equal(store.get(7), made[7])
    pixels = np.concatenate(list(store.all()))
    assert np.array_equal(pixels, made.permute(0, 2, 3, 1).numpy())
    block = tmp_path / "3-2.npy"
    block.write_bytes(block.read_bytes()[:-1])
    assert np.flatnonzero(~store.there()).tolist() == [3, 4]


def test_shards_of_another_number_are_another_set(here, hdit):
    """Their images lie elsewhere in them."""
    sample(hdit, "out-{0..2}.tar")
    before = {path.name: path.read_bytes() for path in here.glob("*.tar")}
    status, _, err = hdit("sample", "run", "--out", "out-{0..4}.tar", *COMMAND)
    assert status == 1
    assert "form is 'out-{0..2}.tar' there, and 'out-{0..4}.tar' is asked for" in err
    assert {path.name: path.read_bytes() for path in here.glob("*.tar")} == before
    (here / "out-1.tar").unlink()
    assert "(3 of them now)" in sample(hdit, "out-{0..2}.tar")
    assert {path.name: path.read_bytes() for path in here.glob("*.tar")} == before


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("taken", ["out.npz", "out.npz.samples.json", "out.npz.grid.png"])
def test_file_in_the_place_of_another_is_kept(here, hdit, taken):
    (here / taken).write_text("{}" if taken.endswith("json") else "mine")
    status, _, err = hdit("sample", "run", "--out", "out.npz", *COMMAND)
    assert status == 1
    assert taken in err
    assert "Traceback" not in err
    assert left(here) == [taken]


def test_samples_of_an_older_version_are_refused(here, hdit):
    (here / "out").mkdir()
    (here / "out" / "000000.png").write_bytes(b"")
    (here / "out" / "samples.json").write_text('{"samples": [{"file": "000000.png"}]}')
    status, _, err = hdit("sample", "run", "--out", "out", *COMMAND)
    assert status == 1
    assert "--out: out is not empty: an older hdit wrote its samples" in err
    sample(hdit, "out", "--overwrite")


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("x-{00..99}.tar", "--out: x-{00..99}.tar names 100 files for 10 images; name fewer"),
        ("x-{a.tar", "has a { without its }"),
        ("x-{a,a}.tar", "names a file twice"),
        ("x-{0..99999}.tar", "names more than 10,000 files"),
        ("x-{a,b/c}.tar", "must be files of one folder"),
    ],
)
def test_shards_that_cannot_be_are_named(here, hdit, out, message):
    status, _, err = hdit("sample", "run", "--out", out, *COMMAND)
    assert status == 1
    assert message in err
    assert left(here) == []


@pytest.mark.parametrize("form", ["npz", "tar"])
def test_full_disk_ends_with_its_message_and_the_command_goes_on(here, hdit, full_disk, form):
    with full_disk(1800):
        status, _, err = hdit("sample", "run", "--out", FORMS[form], *COMMAND, "-n", 30)
    assert status == 1
    assert "cannot be written: File too large" in err
    assert "Traceback" not in err
    assert not list(here.glob("*.tar")) + list(here.glob("*.npz"))
    sample(hdit, FORMS[form], "-n", 30)
    assert len(images(here, form)) == 30


# ---- checking ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_check_samples_some_again_and_finds_them_alike(here, hdit, form):
    said = sample(hdit, FORMS[form], "--check", 3)
    assert "sampled 3 images again, one by one: they differ by" in said
    assert "2 are allowed in fp32" in said
    assert "sampled 10 images again" in sample(hdit, FORMS[form], "--check", 10)


def test_check_names_the_image_that_is_another(here, hdit):
    sample(hdit, "out")
    image = stores.from_png((here / "out" / "000009.png").read_bytes())
    image[0, 2, 3] = (image[0, 2, 3].int() + 100) % 256
    (here / "out" / "000009.png").write_bytes(stores.to_png(image, ""))
    status, _, err = hdit("sample", "run", "--out", "out", *COMMAND, "--check", 2)
    assert status == 1
    assert "error: --check: sampled 2 images again, one by one: they differ by 1" in err
    assert "(seed 9)" in err
    status, _, err = hdit("sample", "run", "--out", "out", *COMMAND, "--check", 11)
    assert "--check: must be at most -n, 10, got 11" in err


def test_check_of_images_made_one_by_one_is_of_all_at_once(here, hdit):
    said = sample(hdit, "out", "--batch-size", 1, "--check", 4)
    assert "sampled 4 images again, 4 at once" in said
