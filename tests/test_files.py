"""Files and folders appear whole, or not at all."""

import errno
import hashlib
import json
import math
import os
from types import SimpleNamespace

import pytest
import torch

from hdit import files
from hdit.errors import UserError, WritingError
from hdit.files import check_writable, fingerprint, make_folder, whole, write_json, write_text
from hdit.report.grids import to_picture
from hdit.tensors import save_pickled, save_tensors


def test_file_takes_the_place_of_the_old_one_when_it_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with whole(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("options", [{}, {"shared": True}, {"durable": False}])
def test_writing_that_fails_keeps_the_old_file_and_leaves_nothing(tmp_path, options):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), whole(path, **options) as part:  # noqa: PT012
        part.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_folder_that_fails_leaves_no_folder_above_it(tmp_path):
    with pytest.raises(OSError, match="full"), whole(tmp_path / "new" / "deep" / "out") as part:  # noqa: PT012
        part.mkdir()
        (part / "a").write_text("half")
        raise OSError("full")
    assert not list(tmp_path.iterdir())


def test_folder_is_not_put_over_one_with_files_in_it(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(OSError, match="not empty"), whole(tmp_path / "out") as part:
        part.mkdir()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_process_left_is_written_over(tmp_path):
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part" / "old").write_text("old")
    with whole(tmp_path / "out") as part:
        part.mkdir()
    assert not list((tmp_path / "out").iterdir())


def test_processes_that_share_a_file_write_under_names_of_their_own(tmp_path, monkeypatch):
    names = set()
    for process in (1, 2):
        monkeypatch.setattr(files.os, "getpid", lambda process=process: process)
        with whole(tmp_path / "a", shared=True) as part:
            names.add(part.name)
            part.touch()
    assert len(names) == 2


def test_files_and_their_folder_are_on_the_disk_before_the_name(tmp_path, monkeypatch):
    """Else a power failure could leave a name without its contents."""
    done, sync, replace = [], files._sync, files.os.replace
    monkeypatch.setattr(files, "_sync", lambda path: (done.append(path.name), sync(path)))
    monkeypatch.setattr(files.os, "replace", lambda a, b: (done.append("rename"), replace(a, b)))
    with whole(tmp_path / "out") as part:
        part.mkdir()
        (part / "a").touch()
    assert done == ["a", ".out.part", "rename", tmp_path.name]


def test_fingerprint_is_size_and_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert fingerprint(tmp_path / "a") == {
        "bytes": 3,
        "sha256": hashlib.sha256(b"abc").hexdigest(),
    }


# ---- what cannot be written ----------------------------------------------------------------------


def link(path):
    (path.parent / "target").write_text("theirs")
    path.symlink_to("target")


def link_to_folder(path):
    (path.parent / "target").mkdir()
    path.symlink_to("target")


def in_a_file(path):
    path.parent.joinpath("file").touch()
    return path.parent / "file" / "below" / path.name


def in_a_link_to_nothing(path):
    path.parent.joinpath("link").symlink_to("nowhere")
    return path.parent / "link" / path.name


UNWRITABLE = {
    "link": (link, "out: cannot be written: it is a link, and only regular files"),
    "link to a folder": (link_to_folder, "it is a link"),
    "link to nothing": (lambda path: path.symlink_to("nowhere"), "it is a link"),
    "link to itself": (lambda path: path.symlink_to("out"), "it is a link"),
    "pipe": (os.mkfifo, "it is a device or pipe, and only regular files"),
    "below a file": (in_a_file, "out: cannot be written: .*file is no folder"),
    "below a link to nothing": (
        in_a_link_to_nothing,
        "out: cannot be written: .*link is no folder",
    ),
    "long name": (lambda path: path.with_name("n" * 300), "n: cannot be written: File name too"),
    "zero byte": (
        lambda path: path.with_name("a\0b"),
        "cannot be written: its name has a zero byte",
    ),
    "no name": (lambda path: path / "..", "it has no name of its own"),
}


def everything(folder):
    """Paths below a folder with what tells whether they are the same as before."""
    return {path: (path.lstat().st_mode, path.lstat().st_ino) for path in folder.rglob("*")}


@pytest.mark.parametrize("name", UNWRITABLE)
@pytest.mark.parametrize("write", [check_writable, make_folder, lambda path: write_text(path, "")])
def test_what_is_no_regular_file_is_not_written_over(tmp_path, name, write):
    make, words = UNWRITABLE[name]
    path = make(tmp_path / "out") or tmp_path / "out"
    if write is make_folder and name in ("link to a folder", "no name"):
        return  # is a folder already
    before = everything(tmp_path)
    with pytest.raises(WritingError, match=words) as caught:
        write(path)
    assert isinstance(caught.value, UserError)
    assert isinstance(caught.value, OSError)
    assert everything(tmp_path) == before


def test_device_is_not_written_over():
    with pytest.raises(WritingError, match="/dev/null: cannot be written: it is a device"):
        check_writable(files.Path("/dev/null"))


def test_folder_that_may_not_be_written_to_is_named_before(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(WritingError, match=f"out: cannot be written: {tmp_path} may not be"):
        check_writable(tmp_path / "new" / "out")


def test_what_can_be_written_is_let_through(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "linked").symlink_to("real")
    for name in ("a", "b/c/d", "linked/e", str(tmp_path / "f")):
        for text in ("old", "new"):
            write_text(files.Path(name), text)
        assert files.Path(name).read_text() == "new"
    make_folder(files.Path("linked"))
    make_folder(files.Path("linked/deep/folder"))
    assert (tmp_path / "real" / "deep" / "folder").is_dir()


def test_folder_that_cannot_be_made_leaves_nothing_of_what_it_lies_in(tmp_path):
    with pytest.raises(WritingError, match="nnn/c: cannot be written: File name too long"):
        make_folder(tmp_path / "a" / "b" / ("n" * 300) / "c")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("length", [249, 250, 255])
def test_name_may_be_as_long_as_the_file_system_takes(tmp_path, length):
    path = tmp_path / ("n" * length)
    with whole(path, shared=True) as part:
        part.write_text("it")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def a_file(path):
    path.write_text("a" * 4096)


def a_folder(path):
    path.mkdir()
    (path / "a").write_text("a" * 4096)


def an_image(path):
    to_picture(torch.randint(256, (3, 64, 64), dtype=torch.uint8)).save(path, format="PNG")


def tensors(path):
    save_tensors({"a": torch.zeros(4096)}, path)


def tensors_in_a_folder(path):
    path.mkdir()
    save_tensors({"a": torch.zeros(4096)}, path / "a")


def a_pickle(path):
    save_pickled({"a": torch.zeros(4096)}, path)


@pytest.mark.parametrize(
    "write", [a_file, a_folder, an_image, tensors, tensors_in_a_folder, a_pickle]
)
def test_full_disk_is_told_with_the_path_and_leaves_nothing(tmp_path, full_disk, write):
    out = tmp_path / "new" / "out"
    with pytest.raises(WritingError) as caught, full_disk(), whole(out) as part:
        write(part)
    file = out / "a" if write is tensors_in_a_folder else out
    assert str(caught.value).startswith(f"{file}: cannot be written: ")
    assert "File too large" in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["mkdir", "_sync", "replace"])
def test_any_step_of_writing_that_fails_names_the_path(tmp_path, monkeypatch, call):
    def fail(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    place = {"mkdir": files.Path, "_sync": files, "replace": files.os}[call]
    monkeypatch.setattr(place, call, fail)
    with pytest.raises(WritingError, match="out: cannot be written: No space left"):
        write_text(tmp_path / "new" / "out", "it")
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())


def test_file_that_cannot_be_read_while_another_is_written_keeps_its_own_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"), whole(tmp_path / "out"):
        (tmp_path / "absent").read_text()


def test_images_that_no_disk_holds_are_refused_before_they_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**30))
    files.check_free_space(tmp_path / "new" / "er", 2**18, 3 * 64 * 64)
    for images, pixels in ((2**18 + 1, 100), (2**14, 2**21)):  # by blocks of the disk, by pixels
        with pytest.raises(UserError, match=rf"--out: {images:,} images take at least .* GiB left"):
            files.check_free_space(tmp_path, images, pixels)


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ({"a": [1, {"b": math.nan}]}, "a.1.b is nan"),
        ((0.0, -math.inf), "1 is -inf"),
        (math.inf, "the value is inf"),
    ],
)
def test_number_that_json_has_not_is_refused_with_its_key(value, key, tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"good": 1.5})
    with pytest.raises(UserError, match=f"a.json: {key}, which JSON cannot hold"):
        write_json(path, value)
    assert json.loads(path.read_text()) == {"good": 1.5}
