"""Labels from sheets, archives, arrays, hooks and the hub, and how what is wrong is named."""

import io
import json
import multiprocessing
import os
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from hdit.data import FolderSpec, HubSpec, NpzSpec, PythonSpec, TarSpec, ZipSpec
from hdit.data.images import Images
from hdit.data.source import DataError
from hdit.data.sources.sheets import SHEETS


def png(value: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("L", (4, 4), value).save(file, "png")
    return file.getvalue()


def folder(path, files: dict[str, bytes | str]):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return FolderSpec(path=str(path), size=4, channels=1)


def archive(path, files: dict[str, bytes | str], **settings):
    with zipfile.ZipFile(path / "it.zip", "w") as file:
        for name, content in files.items():
            file.writestr(name, content)
    return ZipSpec(path=str(path / "it.zip"), size=4, channels=1, **settings)


def contents(source) -> list[tuple[int, str | None]]:
    """(grey value, class) of each image."""
    samples = [source[i] for i in range(len(source))]
    names = source.classes
    return [(int(s.image[0, 0, 0]), names[s.label] if names else None) for s in samples]


ABC = {f"{name}.png": png(i) for i, name in enumerate("abc")}


# ---- sheets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [folder, archive])
@pytest.mark.parametrize(
    ("sheet", "classes", "labels"),
    [
        (
            {"metadata.csv": "file_name,label\nb.png,cat\na.png,dog\n./c.png,cat\n"},
            "cat dog",
            "1 0 0",
        ),
        # as spreadsheets write it: blanks, capitals, commas at the ends
        (
            {"metadata.csv": 'File Name, Label,\na.png, x,\n"b.png", "y,z",,\nc.png,x\n,,\n \n'},
            "x y,z",
            "0 1 0",
        ),
        (
            {"Metadata.CSV": "class,file-name\ncat,a.png\ndog,b.png\ncat,c.png\n"},
            "cat dog",
            "0 1 0",
        ),
        (
            {
                "metadata.jsonl": "".join(
                    f'{{"File_Name": "{name}.png", " Class": "{label}"}}\n'
                    for name, label in zip("abc", "yxy", strict=True)
                )
            },
            "x y",
            "1 0 1",
        ),
        (
            {"dataset.json": '{"Labels": [["a.png", 1], ["b.png", 0], ["c.png", 1]]}'},
            "0 1",
            "1 0 1",
        ),
        # a class is a name as written, and numbers are sorted by their value
        ({"metadata.csv": "label,file_name\n03,b.png\n01,a.png\n2,c.png\n"}, "01 2 03", "0 2 1"),
        ({"metadata.csv": "label,file_name\n01,b.png\n1,a.png\n0,c.png\n"}, "0 01 1", "2 1 0"),
        ({"metadata.csv": "label,file_name\n10,b.png\n9,a.png\n10,c.png\n"}, "9 10", "0 1 1"),
        ({"metadata.csv": "label,file_name\n10,b.png\nx9,a.png\n1,c.png\n"}, "1 10 x9", "2 1 0"),
        ({"metadata.csv": 'file_name,text\na.png,"a,\n b"\nb.png,\nc.png,x\n'}, "", "0 0 0"),
        (
            {
                "metadata.jsonl": '{"file_name": "a.png", "label": 7}\n\n'
                '{"file_name": "b.png", "label": -3}\r\n{"label": 7, "file_name": "c.png"}'
            },
            "-3 7",
            "1 0 1",
        ),
        # of a network of four classes, of which one has no image here
        (
            {"dataset.json": '{"labels": [["a.png", 3], ["b.png", 0], ["c.png", 1]]}'},
            "0 1 2 3",
            "3 0 1",
        ),
        ({"dataset.json": '{"labels": null}'}, "", "0 0 0"),
        ({"dataset.json": '{"title": "of another program"}'}, "", "0 0 0"),
    ],
)
def test_sheet_gives_classes_and_labels(tmp_path, make, sheet, classes, labels):
    source = make(tmp_path, ABC | sheet).open()
    assert source.classes == classes.split()
    assert [source[i].label for i in range(3)] == [int(label) for label in labels.split()]
    assert [value for value, _ in contents(source)] == [0, 1, 2]


def test_sheet_labels_images_in_sub_folders_of_which_no_class_is_made(tmp_path):
    files = {"00000/a.png": png(1), "00001/b.png": png(2), "c.png": png(3)}
    rows = [["00000\\a.png", 0], ["00001/b.png", 1], ["c.png", 0]]
    source = folder(tmp_path, files | {"dataset.json": json.dumps({"labels": rows})}).open()
    assert sorted(contents(source)) == [(1, "0"), (2, "1"), (3, "0")]


@pytest.mark.parametrize("make", [folder, archive])
@pytest.mark.parametrize(
    ("sheet", "message"),
    [
        ({"metadata.csv": "file_name,label\na.png,x\nd.png,x\n"}, "names 'd.png', which is not th"),
        ({"metadata.csv": "file_name\na.png\n../b.png\n"}, "names '../b.png', which is not there"),
        ({"metadata.csv": "file_name\na.png\n/etc/passwd\n"}, "names '/etc/passwd', which is not"),
        ({"metadata.csv": "file_name\na.png\n./a.png\n"}, "names './a.png' twice"),
        (
            {"metadata.csv": "file_name\na.png\n"},
            "does not name 2 of the 3 images, as 'b.png'; add",
        ),
        (
            {"metadata.csv": "file,label\na.png,x\n"},
            "no column file_name; its columns: file, label",
        ),
        ({"metadata.csv": "file_name,label\n"}, "metadata.csv that has no rows"),
        ({"metadata.csv": "file_name,label\na.png,x\nb.png\n"}, "'b.png' the label None in line 3"),
        ({"metadata.csv": "file_name,label\na.png,x\n,x\n"}, "gives no file_name in line 3"),
        (
            {"metadata.csv": "file_name,label\nx/a.png,x\nb.png,x\nx/c.png,x\n"},
            "names 'x/a.png', which is not there .the first of 2.; files are named as seen fr",
        ),
        (
            {"metadata.csv": 'file_name,label\na.png,"x\nb.png,x\nc.png,x\n'},
            "is no CSV in line 4: unexpected end of data",
        ),
        (
            {"metadata.csv": "file_name\tlabel\na.png\tx\n"},
            r"; separate columns by commas, not by '.t'",
        ),
        ({"metadata.csv": "a.png,x\n"}, "a.png, x; its first line must name the columns, as in fi"),
        ({"metadata.csv": b"\xff\xfe"}, "csv that cannot be read: .*; save it as UTF-8"),
        ({"metadata.jsonl": '{"file_name": "a.png"}\n{'}, "cannot be read: line 2: not valid JSON"),
        ({"metadata.jsonl": "[]"}, r"has no object \{...\} in line 1"),
        ({"metadata.jsonl": '{"file_name": "a.png", "label": 1.5}'}, "the label 1.5 in line 1"),
        ({"metadata.jsonl": '{"file_name": "a.png", "label": true}'}, "the label True in line 1"),
        (
            {
                "metadata.jsonl": '{"file_name": "a.png", "label": 1}\n'
                '{"file_name": "b.png", "label": "1"}\n{"file_name": "c.png", "label": 2}'
            },
            "labels that are names and labels that are numbers",
        ),
        ({"metadata.jsonl": "[" * 99_999}, "cannot be read: line 1: not valid JSON"),
        (
            {"metadata.jsonl": '{"a": ' + "[" * 99 + "]" * 99 + "}"},
            "line 1: has values nested more",
        ),
        (
            {"metadata.jsonl": f'{{"label": {"9" * 5000}}}'},
            "cannot be read: line 1: not valid JSON",
        ),
        (
            {"metadata.jsonl": f'{{"file_name": "a.png", "label": {"9" * 4000}}}'},
            "does not name 2 of",
        ),
        ({"metadata.jsonl": '{"a": 1}'}, "gives no file_name in line 1; its columns: a"),
        (
            {"metadata.jsonl": '{"file_name": "a.png", "label": "x", "Label ": "y"}'},
            "has the column 'Label' twice in line 1",
        ),
        (
            {"metadata.csv": "file_name,labels\na.png,x\n"},
            "no column label; its columns: file_name, labels; rename 'labels' to label, or remove",
        ),
        ({"metadata.csv": "file_name;label\na.png;x\n"}, "file_name; its columns: file_name;label"),
        (
            {"metadata.csv": "file_name,Label,label\na.png,x,y\n"},
            "the column 'label' twice in line 1",
        ),
        (
            {"metadata.csv": "file_name,label\na.png,cat, black\n"},
            "has 3 values in line 2, and 2 col",
        ),
        ({"metadata.csv": ""}, "has no column file_name; its columns: none"),
        (
            {"metadata.csv": "file_name,label\na.png,x\nb.png,x \nc.png,x\n"},
            "has the labels 'x' and 'x ', which differ in blanks alone",
        ),
        (
            {"dataset.json": "[" * 99_999},
            "dataset.json that cannot be read: dataset.json: not valid",
        ),
        ({"dataset.json": "{"}, "dataset.json that cannot be read: dataset.json: not valid JSON"),
        ({"dataset.json": '{"labels": {}}'}, "neither a list of .file, label. as labels nor null"),
        ({"dataset.json": '{"labels": ["a.png"]}'}, "must list .file, label. .* but has 'a.png'"),
        ({"dataset.json": '{"labels": [["a.png", [0, 1]]]}'}, "it must be a class index"),
        (
            {"dataset.json": '{"labels": [["a.png", -1], ["b.png", 0], ["c.png", 0]]}'},
            "a dataset.json: labels must be class indices from 0, got -1",
        ),
        (
            {"dataset.json": '{"labels": [["a.png", 1000000], ["b.png", 0], ["c.png", 0]]}'},
            "got 1000000, and at most 1,000,000 classes are taken",
        ),
        (
            {"dataset.json": '{"labels": null}', "metadata.csv": "file_name\na.png\n"},
            "metadata.csv and dataset.json; keep the one",
        ),
    ],
)
def test_sheet_that_is_wrong_is_named_with_what_is_wrong(tmp_path, make, sheet, message):
    with pytest.raises(DataError, match=rf"^data\.path: '.*' has .*{message}"):
        make(tmp_path, ABC | sheet).open()


@pytest.mark.parametrize("make", [folder, archive])
def test_sheet_that_gives_no_labels_is_told_with_its_columns(tmp_path, make):
    files = {"metadata.csv": "file_name, text,species\na.png,x,y\nb.png,x,y\nc.png,x,y\n"}
    source = make(tmp_path, ABC | files | {"dataset.json": '{"title": "x"}'}).open()
    assert source.classes == []
    columns, other = source.warnings
    assert (
        "without a column label, so there are no classes; its columns: file_name, text" in columns
    )
    assert "dataset.json that says nothing of labels; it is not used" in other
    nested = {f"train/{name}": content for name, content in (ABC | files).items()}
    source = make(tmp_path / "other", nested | {"test/d.png": png()}) if make is folder else None
    assert source is None or "train/metadata.csv is not read" in source.open().warnings[0]


UNREAD = ["labels.csv", "train.tsv", "meta.jsonl", "metadata.json", "image_class_labels.txt"]


@pytest.mark.parametrize("make", [folder, archive])
@pytest.mark.parametrize("name", UNREAD)
def test_file_that_may_have_labels_is_told_where_there_are_no_classes(tmp_path, make, name):
    source = make(tmp_path, ABC | {name: "a.png,x"}).open()
    (told,) = source.warnings
    assert f"there are no classes, for {name} is not read; labels are taken from metadata" in told
    (tmp_path / "with").mkdir()
    held = {f"{n[0]}/{n}": content for n, content in ABC.items()} | {name: ""}
    assert make(tmp_path / "with", held).open().warnings == []


@pytest.mark.parametrize("name", ["README.txt", "notes.txt", "samples.json", "cat/labels.csv"])
def test_file_that_has_no_labels_is_not_told(tmp_path, name):
    assert folder(tmp_path, ABC | {name: "x"}).open().warnings == []


@pytest.mark.parametrize("make", [folder, archive])
def test_folders_in_class_folders_are_told_as_no_classes(tmp_path, make):
    files = {"x/train/cat/a.png": png(), "x/train/dog/b.png": png(), "x/README.md": "", "y.md": ""}
    source = make(tmp_path, files).open()
    assert source.classes == ["x"]
    (told,) = source.warnings
    assert "classes are the folders at the top (x); folders in them, as x/train/cat/, are" in told


def test_sheet_in_an_archive_that_unpacks_to_too_much_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("hdit.data.sources.archive.MAX_SHEET", 5000)
    with zipfile.ZipFile(tmp_path / "it.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.png", png())
        file.writestr("metadata.jsonl", bytes(5001))
    with pytest.raises(
        DataError, match=r"metadata\.jsonl that cannot be read: it unpacks to 5,001"
    ):
        ZipSpec(path=str(tmp_path / "it.zip"), size=4).open()


def test_sheet_in_an_archive_that_is_damaged_is_named(tmp_path):
    spec = archive(tmp_path, ABC | {"metadata.csv": "file_name\n"})
    content = (tmp_path / "it.zip").read_bytes()
    at = content.index(b"file_name\n")
    (tmp_path / "it.zip").write_bytes(content[:at] + b"F" + content[at + 1 :])
    with pytest.raises(
        DataError, match=r"a metadata\.csv that cannot be read: BadZipFile: Bad CRC"
    ):
        spec.open()


@pytest.mark.parametrize("name", SHEETS)
def test_sheet_that_is_no_regular_file_or_too_large_is_not_read(tmp_path, monkeypatch, name):
    spec = folder(tmp_path, ABC)
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=rf"a {name} that cannot be read: .* a device or pipe"):
        spec.open()
    monkeypatch.setattr("hdit.data.sources.folder.MAX_SHEET", 5000)
    os.unlink(tmp_path / name)
    (tmp_path / name).write_bytes(bytes(5001))
    with pytest.raises(DataError, match=rf"a {name} that cannot be read: .* more than 5,000 bytes"):
        spec.open()


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["a", "a"], "must name each class once, but has 'a' twice"),
        (["a", ""], "must have a name of 1 to 1,000 characters, got ''"),
        (["a" * 1001], "must have a name of 1 to 1,000 characters, got 'aaa"),
        (["\ud800"], r"must name classes by text, got '\\ud800'"),
    ],
)
def test_names_that_no_class_can_have_are_refused_by_every_source(tmp_path, classes, message):
    class Entries:
        setting, place = "data.path", "somewhere"

        def __len__(self) -> int:
            return 1

    entries = Entries()
    entries.classes = classes
    with pytest.raises(DataError, match=rf"^data\.path: 'somewhere': .*{message}"):
        Images(FolderSpec(path="somewhere", size=4), entries)
    with pytest.raises(ValidationError, match=message):
        TarSpec(path="a.tar", size=4, classes=classes)


def test_sheet_without_images_is_an_error(tmp_path):
    with pytest.raises(DataError, match="stands alone"):
        folder(tmp_path, {"dataset.json": '{"labels": null}'}).open()


# ---- zip -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (ABC, [(0, None), (1, None), (2, None)]),
        ({"pets/" + k: v for k, v in ABC.items()}, [(0, None), (1, None), (2, None)]),
        (
            {"x/a.png": png(1), "y/a.png": png(2), "y/b/c.PNG": png(3)},
            [(1, "x"), (2, "y"), (3, "y")],
        ),
        ({"pets/x/a.png": png(1), "pets/y/a.png": png(2)}, [(1, "x"), (2, "y")]),
        # as programs on Windows write them
        ({"data\\x\\a.png": png(1), "data\\y\\a.png": png(2)}, [(1, "x"), (2, "y")]),
        ({"x\\a.png": png(1), "y/b\\c.png": png(2), "x\\": b""}, [(1, "x"), (2, "y")]),
        ({"./x/a.png": png(1), "y//a.png": png(2)}, [(1, "x"), (2, "y")]),
        ({"pets/x/a.png": png(1), "__MACOSX/pets/x/._a.png": b"", ".b.png": b""}, [(1, "x")]),
    ],
)
def test_zip_has_classes_as_a_folder_has(tmp_path, files, expected):
    assert contents(archive(tmp_path, files).open()) == expected


def member(name: str, mode: int = 0) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("name")
    info.filename = info.orig_filename = name
    info.external_attr = mode << 16
    return info


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (member("/etc/a.png"), "'/etc/a.png' has an absolute path"),
        (member("\\a.png"), "has an absolute path"),
        (member("C:/a.png"), "'C:/a.png' has an absolute path"),
        (member("../a.png"), r"'\.\./a.png' leads out of its folder"),
        (member("cat/../../a.png"), "leads out of its folder"),
        (member("cat\\..\\a.png"), "leads out of its folder"),
        (member("../"), "leads out of its folder"),
        (member("cat/a.png", 0o120777), "'cat/a.png' is a link"),
        (member("cat/a.png", 0o020666), "'cat/a.png' is a device"),
        (member("good.png"), "holds 'good.png' twice"),
        (member("./good.png"), r"holds '\./good.png' twice"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zip_with_a_member_that_would_escape_is_refused_by_its_name(tmp_path, bad, message):
    with zipfile.ZipFile(tmp_path / "it.zip", "w") as file:
        file.writestr("good.png", png())
        file.writestr(bad, png())
    with pytest.raises(DataError, match=rf"^data\.path: '.*it\.zip' .*{message}"):
        ZipSpec(path=str(tmp_path / "it.zip"), size=4).open()


@pytest.mark.parametrize(
    ("method", "flag", "reason"),
    [
        (9, 0, "packed by Deflate64"),
        (93, 0, "packed by Zstandard"),
        (99, 1, "encrypted"),
        (0, 1, "encry"),
    ],
)
@pytest.mark.parametrize("name", ["a.png", "metadata.csv"])
def test_zip_packed_as_python_cannot_unpack_is_told_with_the_fix(
    tmp_path, method, flag, reason, name
):
    spec = archive(tmp_path, {"b.png": png(), "a.png": png()} | {name: png()})
    data = bytearray((tmp_path / "it.zip").read_bytes())
    for start, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = data.rindex(start)
        data[at + flags : at + flags + 4] = bytes([flag, 0, method, 0])
    (tmp_path / "it.zip").write_bytes(data)
    with pytest.raises(DataError, match=rf"{name}.* is {reason}.* name the folder"):
        spec.open()[0]


def test_zip_that_is_none_is_named(tmp_path):
    for content in (b"", b"not a zip", b"PK\3\4" + png()):
        (tmp_path / "other.zip").write_bytes(content)
        with pytest.raises(DataError, match=r"other\.zip' is no zip archive: .*cut off"):
            ZipSpec(path=str(tmp_path / "other.zip"), size=4).open()
    with pytest.raises(DataError, match="has no image files that Pillow can read"):
        archive(tmp_path, {"notes.txt": ""}).open()


def test_zip_members_that_are_damaged_are_bad_files(tmp_path):
    files = {f"{name}.png": png(i) for i, name in enumerate("abcdefg")}
    spec = archive(tmp_path, files | {"inner.zip": "", "e.png": "text", "huge.bmp": bytes(5000)})
    path = tmp_path / "it.zip"
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        infos = {info.filename: info for info in file.infolist()}
    start = {name: info.header_offset + 30 + len(name) for name, info in infos.items()}
    central = {name: data.rindex(name.encode()) - 46 for name in infos}
    data[start["a.png"] + 20] ^= 1  # its content
    for at in (infos["b.png"].header_offset + 6, central["b.png"] + 8):
        data[at] |= 1  # encrypted
    for at in (infos["c.png"].header_offset + 8, central["c.png"] + 10):
        data[at] = 99  # a way of compressing that nobody has
    data[infos["d.png"].header_offset] ^= 1  # its own header
    path.write_bytes(data)
    source = spec.model_copy(update={"max_pixels": 500, "max_bad_share": 1.0}).open()
    assert contents(source)[:4] == [(5, None)] * 4
    reasons = {file.path.rpartition("/")[2]: file.reason for file in source.unreadable.values()}
    assert sorted(reasons) == ["a.png", "b.png", "c.png", "d.png", "e.png", "huge.bmp"]
    assert "CRC" in reasons["a.png"]
    assert "encrypted" in reasons["b.png"]
    assert "is packed by AES" in reasons["c.png"]
    assert reasons["d.png"].startswith("BadZipFile")
    assert "no format" in reasons["e.png"]
    assert "unpacks to 5000 bytes, more than data.max_pixels = 500" in reasons["huge.bmp"]


def _read_all(source, connection) -> None:
    for _ in range(3):
        connection.send(contents(source))


def test_zip_is_read_by_forks_at_once_each_with_a_handle_of_its_own(tmp_path):
    source = archive(tmp_path, {f"{i:03}.png": png(i) for i in range(200)}).open()
    expected = contents(source)
    fork = multiprocessing.get_context("fork")
    ends = [fork.Pipe() for _ in range(3)]
    processes = [fork.Process(target=_read_all, args=(source, theirs)) for _, theirs in ends]
    for process in processes:
        process.start()
    assert contents(source) == expected
    for process, (ours, _) in zip(processes, ends, strict=True):
        assert [ours.recv() for _ in range(3)] == [expected] * 3
        process.join()


# ---- npz -----------------------------------------------------------------------------------------


def npz(path, save=np.savez, **arrays):
    save(path / "it.npz", **arrays)
    return NpzSpec(path=str(path / "it.npz"), size=4, channels=1)


IMAGES = np.arange(3, dtype=np.uint8).repeat(16).reshape(3, 4, 4, 1)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_without_labels_has_no_classes(tmp_path, save):
    assert contents(npz(tmp_path, save, arr_0=IMAGES).open()) == [(0, None), (1, None), (2, None)]


@pytest.mark.parametrize("order", ["C", "F"])
def test_npz_that_is_not_compressed_is_mapped_in_either_order(tmp_path, order):
    source = npz(tmp_path, arr_0=np.asarray(IMAGES, order=order), labels=np.int32([2, 0, 2])).open()
    assert isinstance(source.entries.images, np.memmap)
    assert contents(source) == [(0, "2"), (1, "0"), (2, "2")]
    assert source.classes == ["0", "1", "2"]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_npz_may_have_alpha(tmp_path, channels):
    pixels = np.full((1, 4, 4, channels), 51, np.uint8)
    # with alpha: 51 of 255 in front of white is 255 - 204 / 5
    expected = 51 if channels % 2 else 214
    assert contents(npz(tmp_path, arr_0=pixels).open()) == [(expected, None)]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": np.array([{}])}, "arr_0 holds Python objects, and no pickle is read"),
        ({"arr_0": IMAGES, "arr_1": np.array([{}, 1, 2])}, "arr_1 holds Python objects"),
        ({"images": IMAGES}, r"has no arr_0, \(n h w c\) uint8 images; it holds images"),
        ({"arr_0": IMAGES[..., 0]}, "must be .* with 1 to 4 channels, got uint8 of 3 x 4 x 4"),
        ({"arr_0": IMAGES / 255}, "got float64 of 3 x 4 x 4 x 1"),
        ({"arr_0": IMAGES.transpose(0, 3, 1, 2).repeat(8, 3)}, "got uint8 of 3 x 1 x 4 x 32"),
        ({"arr_0": IMAGES[:0]}, "arr_0 is empty"),
        (
            {"arr_0": IMAGES, "arr_1": np.zeros(2, int)},
            "arr_1 must be 3 class indices, .* int64 of 2",
        ),
        (
            {"arr_0": IMAGES, "labels": np.zeros(3)},
            "labels must be 3 class indices, .* float64 of 3",
        ),
        ({"arr_0": IMAGES, "labels": np.int64([0, -1, 0])}, "class indices from 0, got -1"),
        ({"arr_0": IMAGES, "labels": np.int64([0, 1, 10**9])}, "from 0, got 1000000000"),
        (
            {"arr_0": IMAGES, "arr_1": np.zeros(3, int), "labels": np.zeros(3, int)},
            "labels twice, as arr_1 and labels",
        ),
    ],
)
def test_npz_with_wrong_arrays_is_named_with_what_is_wrong(tmp_path, save, arrays, message):
    with pytest.raises(DataError, match=rf"^data\.path: '.*it\.npz'.* {message}"):
        npz(tmp_path, save, **arrays).open()


def test_npz_that_is_damaged_is_named(tmp_path):
    spec = npz(tmp_path, np.savez_compressed, arr_0=IMAGES)
    data = (tmp_path / "it.npz").read_bytes()
    for damaged in (b"", data[: len(data) // 2], data[:70] + b"\xff" * 20 + data[90:]):
        (tmp_path / "it.npz").write_bytes(damaged)
        with pytest.raises(DataError, match=r"it\.npz' cannot be read as npz: "):
            spec.open()


def test_npz_tells_of_arrays_that_are_not_read(tmp_path):
    (told,) = npz(tmp_path, arr_0=IMAGES, y=np.zeros(3, int)).open().warnings
    assert "y in it is not read; images are taken from arr_0, and labels from arr_1 or lab" in told
    known = {"arr_1": np.zeros(3, int), "mu": np.zeros(2), "sigma_s": np.zeros(2)}
    assert npz(tmp_path, arr_0=IMAGES, **known).open().warnings == []


# ---- hook ----------------------------------------------------------------------------------------

MODULE = """
import sys
import torch
from PIL import Image
from pydantic import ValidationError

class Pets:
    def __init__(self, item, classes=None, length=2):
        self.item, self.length = item, length
        if classes is not None:
            self.classes = classes
    def __len__(self):
        return self.length
    def __getitem__(self, index):
        return self.item() if callable(self.item) else self.item

image = Image.new("L", (4, 4), 7)
pixels = torch.full((1, 4, 4), 7, dtype=torch.uint8)
class Factory:
    make = staticmethod(lambda: Pets((image, None)))
number = 3

def plain(): return Pets((image, None))
def labelled(): return Pets([pixels, 1], ("cat", "dog"))
def nothing(): return None
def endless(): return iter([1])
def empty(): return Pets(image, length=0)
def huge(): return Pets(image, length=2**40)
def raising(): raise KeyError("no pets")
def bad_classes(): return Pets((image, 0), [1, 2])
def alone(): return Pets(image)
def triple(): return Pets((image, None, None))
def floats(): return Pets((pixels / 255, None))
def batch(): return Pets((pixels[None], None))
def rows(): return Pets((pixels.permute(1, 2, 0).repeat(2, 1, 1), None))
def nameless(): return Pets((image, 0))
def missing(): return Pets((image, None), ["cat"])
def beyond(): return Pets((image, 1), ["cat"])
def name(): return Pets((image, "cat"), ["cat"])
def true(): return Pets((image, True), ["cat", "dog"])
def torn(): return Pets(lambda: 1 / 0)
def ending(): raise SystemExit(0)
def ending_later(): return Pets(lambda: sys.exit(0))
"""


@pytest.fixture
def hook(tmp_path, monkeypatch, request):
    """A module in the current folder -> its name; gone after the test."""
    name = f"pets_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    (tmp_path / f"{name}_torn.py").write_text("import nowhere_at_all")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield name
    for module in (name, f"{name}_torn"):
        sys.modules.pop(module, None)


def pets(hook, function):
    return PythonSpec(hook=f"{hook}:{function}", size=4, channels=1)


def test_hook_is_found_in_the_current_folder_and_called(hook):
    assert contents(pets(hook, "plain").open()) == [(7, None)] * 2
    assert contents(pets(hook, "Factory.make").open()) == [(7, None)] * 2
    assert contents(pets(hook, "labelled").open()) == [(7, "dog")] * 2


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("plane", r"' has no 'plane' \(.*\.py\)"),
        ("number", "is a int, not a function"),
        ("nothing", "returned NoneType, which has no __len__"),
        ("endless", "returned list_iterator, which has no __len__"),
        ("empty", "returned Pets, which is empty"),
        ("huge", "Pets, which has 1,099,511,627,776 images, more than 1,000,000,000"),
        ("raising", "raised KeyError: 'no pets'"),
        ("ending", "ended the program \\(SystemExit: 0\\)"),
        ("bad_classes", r"whose classes must be a list of names, got \[1, 2\]"),
    ],
)
def test_hook_that_returns_no_data_set_is_named(hook, function, message):
    with pytest.raises(DataError, match=rf"^data\.hook: '{hook}:{function}'.* ?{message}"):
        pets(hook, function).open()


def test_hook_whose_images_end_the_process_is_named(hook):
    source = pets(hook, "ending_later").open()
    with pytest.raises(
        DataError,
        match=rf"^data\.hook: '{hook}:ending_later' returned a data set whose item 0 ended",
    ):
        source[0]


def test_hook_whose_module_cannot_be_imported_is_named(hook):
    with pytest.raises(
        DataError, match=rf"importing '{hook}_torn' \(from .*No module named 'nowhe"
    ):
        pets(f"{hook}_torn", "plain").open()
    with pytest.raises(DataError, match="No module named 'not_there'"):
        pets("not_there", "plain").open()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("alone", r"must be \(image, label or None\), got Image"),
        ("triple", r"must be \(image, label or None\), got a tuple of 3"),
        ("floats", r"uint8 tensor \(c h w\), got a tensor of torch.float32, 1 x 4 x 4"),
        ("batch", r"uint8 tensor \(c h w\), got a tensor of torch.uint8, 1 x 1 x 4 x 4"),
        ("rows", r"a tensor \(c h w\) that must be uint8 with 1 to 4 channels, got .*4 x 1 x 8"),
        ("nameless", "has a label, 0, but the data set has no classes; give it their names as"),
        ("missing", "a class index below 1 as its label, got None"),
        ("beyond", "a class index below 1 as its label, got 1"),
        ("name", "a class index below 1 as its label, got 'cat'"),
        ("true", "a class index below 2 as its label, got True"),
    ],
)
def test_hook_whose_items_are_wrong_is_an_error_and_no_bad_file(hook, function, message):
    source = pets(hook, function).open()
    with pytest.raises(DataError, match=rf"returned a data set whose item 1 .*{message}"):
        source[1]


def test_hook_that_raises_for_an_item_has_a_bad_file(hook):
    source = pets(hook, "torn").open()
    with pytest.raises(DataError, match=rf"{hook}:torn\[0\]: ZeroDivisionError"):
        source[0]


# ---- hub -----------------------------------------------------------------------------------------


def test_hub_without_its_package_is_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        DataError, match=r"^data\.kind: 'hub' needs the package datasets .*hdit\[da"
    ):
        HubSpec(name="user/pets", size=4).open()


def table(**columns):
    datasets = pytest.importorskip("datasets", reason="needs hdit[data]: datasets is not installed")
    kinds = {
        name: columns.pop(name + "_kind") for name in list(columns) if name + "_kind" in columns
    }
    features = datasets.Features(
        {
            name: datasets.Image()
            if name.startswith("image")
            else datasets.ClassLabel(names=kinds[name])
            if name in kinds
            else datasets.Value("string" if isinstance(columns[name][0], str) else "int64")
            for name in columns
        }
    )
    return datasets.Dataset.from_dict(columns, features=features)


PAGES = [{"bytes": png(value), "path": None} for value in (3, 4)]


def saved(path, data, **settings):
    data.save_to_disk(str(path / "it"))
    return HubSpec(path=str(path / "it"), size=4, channels=1, **settings)


@pytest.mark.parametrize(
    ("columns", "settings", "expected"),
    [
        ({}, {}, [None, None]),
        ({"label": [1, 0], "label_kind": ["a", "b"]}, {}, ["b", "a"]),
        ({"breed": [1, 0], "breed_kind": ["a", "b"]}, {}, ["b", "a"]),
        ({"labels": [30, 4]}, {}, ["30", "4"]),
        ({"breed": ["x", "y"]}, {}, [None, None]),
        ({"breed": ["x", "y"]}, {"label_column": "breed"}, ["x", "y"]),
        ({"label": [1, 0], "label_kind": ["a", "b"]}, {"label_column": ""}, [None, None]),
        ({"image2": PAGES[::-1]}, {"image_column": "image"}, [None, None]),
    ],
)
def test_hub_finds_the_columns_of_images_and_labels(tmp_path, columns, settings, expected):
    source = saved(tmp_path, table(image=PAGES, **columns), **settings).open()
    assert contents(source) == list(zip((3, 4), expected, strict=True))


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({"image2": PAGES}, {}, "data.image_column: must be set; .*: image, image2"),
        (
            {"text": ["", ""]},
            {"image_column": "text"},
            "data.image_column: 'text' is none; .*: image",
        ),
        ({}, {"label_column": "breed"}, "data.label_column: .* has image, not 'breed'"),
        (
            {"label": [0, -1], "label_kind": ["a"]},
            {},
            "is -1 in row 1, which is no class; set anoth",
        ),
        ({"label": [0, None]}, {}, "is None in row 1, which is no class"),
        ({}, {"split": "test"}, "data.split: .* has no splits; leave it out"),
    ],
)
def test_hub_names_a_column_or_split_that_is_not_there(tmp_path, columns, settings, message):
    spec = saved(tmp_path, table(image=PAGES, **columns), **settings)
    with pytest.raises(DataError, match=message):
        spec.open()


def test_hub_takes_the_split_that_is_named(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs hdit[data]: datasets is not installed")
    data = table(image=PAGES)
    both = datasets.DatasetDict(train=data.select([0]), test=data.select([1]))
    spec = saved(tmp_path, both)
    assert contents(spec.open()) == [(3, None)]
    assert contents(spec.model_copy(update={"split": "test"}).open()) == [(4, None)]
    with pytest.raises(DataError, match=r"data\.split: .* has train, test, not 'val'"):
        spec.model_copy(update={"split": "val"}).open()


def test_hub_rows_that_are_damaged_are_bad_files(tmp_path):
    pages = [*PAGES, None, {"bytes": b"torn", "path": None}]
    source = saved(tmp_path, table(image=pages)).open()
    assert contents(source)[:2] == [(3, None), (4, None)]
    reasons = [skipped.reason for skipped in source[2].skipped]
    assert reasons[0] == "ValueError: there is no image"
    assert "no format" in reasons[1]


def test_hub_folder_that_is_none_is_named(tmp_path):
    pytest.importorskip("datasets", reason="needs hdit[data]: datasets is not installed")
    with pytest.raises(DataError, match=r'no folder of save_to_disk; set data\.kind = "folder"'):
        HubSpec(path=str(tmp_path), size=4).open()
