"""What is an image, what is left out, and which classes folders and archives have."""

import json
import os
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from hdit import config
from hdit.data import FolderSpec, ZipSpec, check
from hdit.data.check import open_source
from hdit.data.source import DataError
from hdit.training.trainer import Trainer


def save(path: Path, fmt: str = "png") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (255, 0, 0)).save(path, fmt)


def open_folder(path, **settings):
    return FolderSpec(path=str(path), size=8, **settings).open()


OTHERS = ["notes.txt", "cat/labels.csv", "cat/a.png.bak", "papers/notes.md", "cat/README"]


def test_folder_leaves_out_other_extensions_and_counts_them(tmp_path):
    save(tmp_path / "cat" / "a.png")
    for name in [*OTHERS, ".hidden", "cat/0.HEIC", "cat/1.heic", "cat/noise"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("not an image")
    (tmp_path / "empty").mkdir()
    folder = open_folder(tmp_path)
    assert folder.classes == ["cat"]
    assert folder.entries.names == ["cat/a.png"]
    kinds = {".txt": 1, ".csv": 1, ".bak": 1, ".md": 1, "hidden": 1, ".heic": 2, "no extension": 2}
    assert folder.left_out == kinds
    files, folders = folder.warnings
    assert "4 files are left out, in no format that Pillow reads: " in files
    assert files.endswith(": .heic 2, .bak 1, no extension 1; convert or remove them")
    assert "no class is made of folders without images: empty/ (it has nothing), " in folders
    assert folders.endswith(", papers/ (it has .md 1)")


def test_folders_that_are_no_class_are_told_in_one_warning(tmp_path):
    save(tmp_path / "cat" / "a.png")
    for i in range(12):
        (tmp_path / f"{i:02}").mkdir()
    (warning,) = open_folder(tmp_path).warnings
    assert "images: 00/ (it has nothing), 01/ " in warning
    assert warning.endswith("09/ (it has nothing), and 2 more")


@pytest.mark.parametrize("held", [["0.heic"], ["0.heic", "notes.txt"], ["scan.pdf"], ["0"]])
def test_folder_whose_class_has_no_image_is_an_error_that_names_it(tmp_path, held):
    for name in ("ant/0.png", "dog/0.png"):
        save(tmp_path / "data" / name)
    (tmp_path / "data" / "cat").mkdir()
    for name in held:
        (tmp_path / "data" / "cat" / name).write_bytes(b"not an image")
    told = r"class folder without an image that Pillow can read: cat/ \(it has .*\); convert its"
    with pytest.raises(DataError, match=rf"^data\.path: '.*/data' has a {told}") as error:
        open_folder(tmp_path / "data")
    assert all(Path(name).suffix in str(error.value) for name in held)
    with zipfile.ZipFile(tmp_path / "it.zip", "w") as file:
        for path in sorted((tmp_path / "data").rglob("*")):
            file.write(path, path.relative_to(tmp_path))
    with pytest.raises(DataError, match=rf"^data\.path: '.*it\.zip' has a {told}"):
        ZipSpec(path=str(tmp_path / "it.zip"), size=8).open()


def test_folder_takes_files_without_extension_by_their_content(tmp_path):
    formats = ["png", "jpeg", "webp", "gif", "tiff", "bmp"]
    for fmt in formats:
        save(tmp_path / "data" / fmt, fmt)
    save(tmp_path / "data" / "photo.mpo", "mpo")
    for name, content in [("LICENSE", b"BMW"), ("empty", b""), ("P1", b"P1 is a story")]:
        (tmp_path / "data" / name).write_bytes(content)
    os.mkfifo(tmp_path / "data" / "pipe")
    (tmp_path / "data" / "dangling").symlink_to("nowhere")
    folder = open_folder(tmp_path / "data")
    assert folder.entries.names == sorted([*formats, "photo.mpo"])
    assert all(not folder[i].skipped for i in range(7))
    assert folder.left_out == {"no extension": 5}
    os.unlink(tmp_path / "data" / "pipe")
    os.unlink(tmp_path / "data" / "dangling")
    with zipfile.ZipFile(tmp_path / "it.zip", "w") as file:
        for path in sorted((tmp_path / "data").iterdir()):
            file.write(path, path.name)
    source = ZipSpec(path=str(tmp_path / "it.zip"), size=8).open()
    assert [m.filename for m in source.entries.members] == folder.entries.names
    assert source.left_out == {"no extension": 3}


def test_folder_and_class_whose_names_are_not_utf_8_are_text_that_can_be_stored(tmp_path):
    root = os.fsencode(tmp_path) + b"/caf\xe9"
    for name in (b"caf\xe9", b"ant"):
        save(Path(os.fsdecode(root + b"/" + name + b"/\xff.png")))
    text = str(tmp_path) + r"/caf\xe9"
    folder = open_folder(text, cache=str(tmp_path / "cache"))
    assert folder.classes == ["ant", r"caf\xe9"]
    assert [folder[i].label for i in (0, 1)] == [0, 1]
    json.dumps(folder.classes, ensure_ascii=False).encode()
    check.check(open_source(os.fsdecode(root)))[0].to_json()


def test_training_tells_first_of_files_that_are_left_out(tmp_path, tiny, capfd):
    save(tmp_path / "data" / "cat" / "a.png")
    (tmp_path / "data" / "cat" / "b.heic").touch()
    data = f"data={{kind='folder', path='{tmp_path}/data', size=8, channels=1}}"
    Trainer(config.load(tiny, [data]), tmp_path / "run")
    first = capfd.readouterr().err.splitlines()[0]
    assert first.startswith("warning: data.path: ")
    assert "1 file is left out, in no format that Pillow reads: .heic 1; convert" in first


def test_members_of_a_tar_that_belong_to_no_sample_are_counted(tmp_path):
    save(tmp_path / "a.png")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("./0.png", "1.png", "./2", "cat/README", ".notes"):
            tar.add(tmp_path / "a.png", name)
    source = open_source(str(tmp_path / "a.tar"))
    assert len(source) == 2
    assert source.left_out == {"no extension": 2, "hidden": 1}


@pytest.mark.parametrize("folder", [".ipynb_checkpoints", "__MACOSX", "@eaDir"])
def test_folders_that_other_programs_write_are_neither_classes_nor_images(tmp_path, folder):
    for name in (f"{folder}/a.png", f"cat/{folder}/b.png", "cat/b.png", "dog/c.png"):
        save(tmp_path / "data" / name)
    names = ["data/cat/b.png", "data/dog/c.png"]
    with zipfile.ZipFile(tmp_path / "it.zip", "w") as file:
        for path in sorted((tmp_path / "data").rglob("*")):
            file.write(path, path.relative_to(tmp_path))
    source = open_folder(tmp_path / "data")
    packed = ZipSpec(path=str(tmp_path / "it.zip"), size=8).open()
    assert [f"data/{name}" for name in source.entries.names] == names
    assert [member.filename for member in packed.entries.members] == names
    assert source.classes == packed.classes == ["cat", "dog"]
    assert source.warnings == packed.warnings == []
