"""Files and folders appear whole, or not at all."""

import hashlib
from types import SimpleNamespace

import pytest

from hdit import files
from hdit.errors import UserError
from hdit.files import fingerprint, whole, write_text


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


def test_images_that_no_disk_holds_are_refused_before_they_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**30))
    files.check_free_space(tmp_path / "new" / "er", 2**18, 3 * 64 * 64)
    for images, pixels in ((2**18 + 1, 100), (2**14, 2**21)):  # by blocks of the disk, by pixels
        with pytest.raises(UserError, match=rf"--out: {images:,} images take at least .* GiB left"):
            files.check_free_space(tmp_path, images, pixels)
