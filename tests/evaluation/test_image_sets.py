import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from hdit.data.source import DataError
from hdit.errors import UserError
from hdit.evaluation.image_sets import open_set


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def names(images):
    return [os.path.basename(images.name(i)) for i in range(len(images))]


def read(images, batch_size=2, workers=0):
    parts = list(images.parts([None], batch_size, workers))
    return torch.cat([part.stacked[0] for part in parts]), [d for p in parts for d in p.digests]


def test_pictures_keep_their_size_and_lie_in_any_layout(tmp_path):
    arrays = {name: pixels(5, 9, 3, seed=i) for i, name in enumerate(("a", "x/b", "x/y/c"))}
    for name, array in arrays.items():
        save(tmp_path / f"{name}.png", array)
    save(tmp_path / ".hidden" / "d.png", pixels(4, 4, 3))
    (tmp_path / "notes.txt").write_text("no picture")
    images = open_set(str(tmp_path))
    assert names(images) == ["a.png", "b.png", "c.png"]
    found, _ = read(images)
    wanted = np.stack(list(arrays.values())).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(found, wanted)


def test_archive_may_have_any_layout_and_arrays_any_labels_as_a_folder(tmp_path):
    array = pixels(4, 4, 3)
    for name in ("a", "x/b", "x/y/c"):
        save(tmp_path / "set" / f"{name}.png", array)
    (tmp_path / "set" / "z").mkdir()
    (tmp_path / "set" / "z" / "d.heic").touch()
    (tmp_path / "set" / "metadata.csv").write_text("of another program")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in sorted((tmp_path / "set").rglob("*")):
            archive.write(path, path.relative_to(tmp_path / "set"))
    for place in ("set", "set.zip"):
        images = open_set(str(tmp_path / place))
        assert names(images) == ["a.png", "b.png", "c.png"]
        (told,) = images.warnings
        assert told.startswith(f"'{tmp_path}/{place}'")
        assert ": 1 file is left out, in no format that Pillow reads: .heic 1; convert" in told
        assert len(read(pickle.loads(pickle.dumps(images)))[0]) == 3, "as a worker that is no fork"
    np.savez(tmp_path / "set.npz", arr_0=array[None], arr_1=np.zeros(7), y=array)
    images = open_set(str(tmp_path / "set.npz"))
    assert images.warnings == []
    assert len(read(pickle.loads(pickle.dumps(images)))[0]) == 1


def test_a_folder_is_read_once_however_many_links_lead_to_it(tmp_path):
    save(tmp_path / "set" / "a.png", pixels(4, 4))
    save(tmp_path / "elsewhere" / "b.png", pixels(4, 4))
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "loop").symlink_to(tmp_path / "set")
    assert names(open_set(str(tmp_path / "set"))) == ["a.png", "b.png"]


def test_of_sampled_pictures_the_grid_is_none(tmp_path):
    for name in ("000000.png", "000001.png", "grid.png"):
        save(tmp_path / name, pixels(4, 4))
    entries = [{"file": f"{seed:06d}.png", "seed": seed} for seed in (0, 1)]
    (tmp_path / "samples.json").write_text(json.dumps({"samples": entries}))
    assert names(open_set(str(tmp_path))) == ["000000.png", "000001.png"]
    (tmp_path / "000001.png").unlink()
    with pytest.raises(DataError, match=r"000001.png: is not there, but .*samples.json lists it"):
        open_set(str(tmp_path))


def test_grey_is_rgb_and_what_is_transparent_lies_on_white(tmp_path):
    grey = pixels(4, 4)
    save(tmp_path / "a.png", grey)
    save(tmp_path / "b.png", np.stack([grey] * 3, -1))
    rgba = pixels(4, 4, 4)
    rgba[..., 3] = 0
    save(tmp_path / "c.png", rgba)
    found, digests = read(open_set(str(tmp_path)))
    assert (found[0] == torch.from_numpy(grey)).all()
    assert digests[0] == digests[1] != digests[2]
    assert (found[2] == 255).all()


def test_16_bits_are_scaled_and_a_rotated_image_is_upright(tmp_path):
    """Where clean-fid cuts off at 255, and takes the pixels as they are stored."""
    save(tmp_path / "a.png", (pixels(4, 4).astype(np.uint16)) * 257)
    stored, exif = pixels(4, 4, 3, seed=1), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    Image.fromarray(stored).save(tmp_path / "b.png", exif=exif)
    found, _ = read(open_set(str(tmp_path)))
    np.testing.assert_array_equal(found[0], np.stack([pixels(4, 4)] * 3))
    np.testing.assert_array_equal(found[1].permute(1, 2, 0), np.rot90(stored, -1))


def test_folder_npz_and_zip_hold_the_same_pictures(tmp_path):
    arrays = pixels(5, 6, 7, 3)
    np.savez(tmp_path / "set.npz", arr_0=arrays)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for i, array in enumerate(arrays):
            archive.write(save(tmp_path / "set" / f"{i}.png", array), f"{i}.png")
    sets = [open_set(str(tmp_path / name)) for name in ("set", "set.npz", "set.zip")]
    assert [images.record["kind"] for images in sets] == ["folder", "npz", "zip"]
    found = [read(images) for images in sets]
    assert found[0][1] == found[1][1] == found[2][1]
    np.testing.assert_array_equal(found[0][0].permute(0, 2, 3, 1), arrays)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_picture_ends_it_by_name(tmp_path, workers):
    for i in range(6):
        save(tmp_path / f"{i}.png", pixels(4, 4))
    (tmp_path / "3.png").write_bytes((tmp_path / "2.png").read_bytes()[:50])
    with pytest.raises(DataError, match=r"3\.png: \w+: .*; mend or remove it"):
        read(open_set(str(tmp_path)), workers=workers)


def test_processes_read_in_order(tmp_path):
    for i in range(7):
        save(tmp_path / f"{i}.png", pixels(4, 4, seed=i))
    images = open_set(str(tmp_path))
    assert read(images, workers=2)[1] == read(images, batch_size=7)[1]


def test_a_config_gives_its_data_as_training_sees_them(tmp_path, tiny):
    array = pixels(6, 10, 3)
    save(tmp_path / "set" / "a.png", array)
    text = tiny.read_text().replace(
        'kind = "digits"', f'kind = "folder"\npath = "{tmp_path}/set"\nsize = 6'
    )
    tiny.write_text(text)
    images = open_set(str(tiny))
    found, _ = read(images)
    np.testing.assert_array_equal(found[0].permute(1, 2, 0), array[:, 2:8])  # its centre
    assert images.record["data"]["size"] == [6, 6]
    (tmp_path / "set" / "b.png").write_text("no picture")
    with pytest.raises(DataError, match=r"b\.png: .*; mend or remove it"):
        read(open_set(str(tiny)))


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("absent", "absent: does not exist"),
        ("empty", "empty' has no image files"),
        ("text.txt", "must be a folder of images, a .zip"),
        ("bad.npz", "^'.*bad.npz' has no arr_0"),
    ],
)
def test_what_is_no_set_of_images_is_refused(tmp_path, place, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("")
    np.savez(tmp_path / "bad.npz", images=pixels(2, 4, 4, 3))
    with pytest.raises(UserError, match=words):
        open_set(str(tmp_path / place))


# ---- what a samples.json lists -------------------------------------------------------------------


@pytest.mark.parametrize("top", ["", "samples/"])
def test_archive_of_samples_is_those_that_are_listed_too(tmp_path, top):
    entries = [{"file": f"{i}.png"} for i in (1, 0)]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("0.png", "1.png", "grid.png"):
            archive.write(save(tmp_path / "set" / name, pixels(4, 4)), top + name)
        archive.writestr(f"{top}samples.json", json.dumps({"samples": entries}))
    images = open_set(str(tmp_path / "a.zip"))
    assert names(images) == ["1.png", "0.png"]
    assert len(read(images)[0]) == 2


DAMAGED = {
    "no JSON": ("{", "samples.json: not valid JSON"),
    "nested": ("[" * 100_000, "samples.json: not valid JSON"),
    "list": ("[]", "samples.json: samples must be a list, got None; mend or remove it"),
    "no list": ('{"samples": 5}', "samples must be a list, got 5"),
    "number": ('{"samples": [{"file": 5}]}', r"samples\[0\].file must be the name .*, got 5; mend"),
    "no table": ('{"samples": [{"file": "0.png"}, 3]}', r"samples\[1\].file must be"),
    "no file": ('{"samples": [{}]}', r"samples\[0\].file must be .* got None"),
    "elsewhere": ('{"samples": [{"file": "../0.png"}]}', r"beside it, got '../0.png'"),
    "absolute": ('{"samples": [{"file": "/0.png"}]}', "beside it, got '/0.png'"),
    "above": ('{"samples": [{"file": ".."}]}', "beside it, got '..'"),
    "empty": ('{"samples": [{"file": ""}]}', "beside it, got ''"),
    "zero byte": ('{"samples": [{"file": "a\\u0000"}]}', "beside it, got 'a"),
    "absent": ('{"samples": [{"file": "9.png"}]}', "9.png: is not there, but .*samples.json lists"),
    "none": ('{"samples": []}', "samples.json: lists no images"),
}


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("name", DAMAGED)
def test_samples_json_that_is_damaged_is_named(tmp_path, name, kind):
    content, words = DAMAGED[name]
    save(tmp_path / "set" / "0.png", pixels(4, 4))
    (tmp_path / "set" / "samples.json").write_text(content)
    place = tmp_path / "set"
    if kind == "zip":
        place = tmp_path / "set.zip"
        with zipfile.ZipFile(place, "w") as archive:
            for file in (tmp_path / "set").iterdir():
                archive.write(file, file.name)
    with pytest.raises(UserError, match=words):
        open_set(str(place))


def test_samples_json_is_no_pipe(tmp_path):
    save(tmp_path / "0.png", pixels(4, 4))
    os.mkfifo(tmp_path / "samples.json")
    with pytest.raises(UserError, match=r"samples\.json: is a device or pipe"):
        open_set(str(tmp_path))


@pytest.mark.parametrize("keys", [("mu", "sigma"), ("mu", "sigma", "ref_feats")])
def test_statistics_are_no_images_and_are_named_by_their_keys(tmp_path, keys):
    np.savez(tmp_path / "stats.npz", **dict.fromkeys(keys, np.zeros(3)))
    words = f"holds {', '.join(keys)}: statistics of features, and no images"
    with pytest.raises(UserError, match=words):
        open_set(str(tmp_path / "stats.npz"))


# ---- classes -------------------------------------------------------------------------------------


def labels(images, workers=0):
    parts = list(images.parts([], 2, workers))
    return [images.classes[i] if i >= 0 else None for part in parts for i in part.labels]


@pytest.mark.parametrize("workers", [0, 2])
def test_classes_are_the_outermost_folders_of_a_folder_and_of_an_archive(tmp_path, workers):
    for name in ("cat/x/a", "dog/b", "ant/c"):
        save(tmp_path / "set" / f"{name}.png", pixels(4, 4))
    for top in ("", "set/"):
        with zipfile.ZipFile(tmp_path / f"{len(top)}.zip", "w") as archive:
            for path in sorted((tmp_path / "set").rglob("*.png")):
                archive.write(path, f"{top}{path.relative_to(tmp_path / 'set')}")
    for place in ("set", "0.zip", "4.zip"):
        images = open_set(str(tmp_path / place))
        assert list(images.classes) == ["ant", "cat", "dog"]
        assert labels(images, workers) == ["ant", "cat", "dog"]
    save(tmp_path / "set" / "loose.png", pixels(4, 4))
    assert labels(open_set(str(tmp_path / "set"))) == [None] * 4


def test_classes_are_the_labels_of_an_npz_where_they_fit_it(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=pixels(3, 4, 4, 3), arr_1=np.array([1, 0, 1]))
    np.savez(tmp_path / "b.npz", arr_0=pixels(3, 4, 4, 3), arr_1=np.array([1, 0]))
    images = open_set(str(tmp_path / "a.npz"))
    assert labels(images) == [images.classes[1], images.classes[0], images.classes[1]]
    assert labels(open_set(str(tmp_path / "b.npz"))) == [None] * 3


def test_samples_tell_their_classes_and_how_they_were_made(tmp_path):
    entries = [
        {"file": f"{i}.png", "seed": i, "label": i % 2, "class": "ab"[i % 2]} for i in (4, 5, 6)
    ]
    for i in (4, 5, 6):
        save(tmp_path / f"{i}.png", pixels(4, 4))
    record = {"samples": entries, "images": 640, "weights": "ema", "evaluations": 9, "guide": None}
    (tmp_path / "samples.json").write_text(json.dumps(record))
    images = open_set(str(tmp_path))
    assert labels(images) == ["a", "b", "a"]
    facts = {"trained_images": 640, "weights": "ema", "evaluations": 9, "seeds": [4, 6]}
    assert images.record == {"place": str(tmp_path), "kind": "folder", **facts}


def test_pictures_are_read_again_by_their_index(tmp_path):
    array = pixels(3, 4, 5, 3)
    np.savez(tmp_path / "a.npz", arr_0=array)
    found = open_set(str(tmp_path / "a.npz")).pictures([2, 0])
    np.testing.assert_array_equal(torch.stack(found).permute(0, 2, 3, 1), array[[2, 0]])


def test_samples_told_by_their_seeds_have_their_classes_in_lines(tmp_path):
    from hdit.evaluation.recipes import beside, of_folder

    record = {
        "images": 640, "weights": "ema", "labels": {"kind": "balanced", "number": 2},
        "seeds": {"first": 4, "number": 3}, "digits": 6,
    }  # fmt: skip
    facts = {"weights": "ema", "trained_images": 640, "labels": "balanced", "seeds": [4, 6]}
    (tmp_path / "samples.json").write_text(json.dumps(record))
    lines = [json.dumps({"file": f"{i}.png", "class": "ab"[i % 2]}) for i in (4, 5, 6)]
    assert of_folder(tmp_path, 3) == (facts, [], [])
    (tmp_path / "samples.jsonl").write_text("\n".join(lines) + "\n")
    assert of_folder(tmp_path, 3) == (facts, ["a", "b"], [0, 1, 0])
    assert of_folder(tmp_path, 2) == (facts, [], [])
    for name, place in (("x", "x.npz"), ("x", "x-{00..07}.tar"), ("y", "y.tar")):
        (tmp_path / f"{name}.samples.json").write_text(json.dumps(record))
        assert beside(str(tmp_path / place), place.rpartition(".")[2]) == facts
    assert beside(str(tmp_path / "z.npz"), "npz") == {}
