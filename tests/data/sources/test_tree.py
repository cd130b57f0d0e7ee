"""One listing of folders: through links, each folder once."""

import pytest
from PIL import Image

from hdit.data import FolderSpec
from hdit.data.source import DataError
from hdit.data.sources.tree import walk
from hdit.evaluation.image_sets import open_set


def save(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4)).save(path)


def link(path, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def listed(folder):
    """Names as training lists them, which evaluation lists too."""
    training = FolderSpec(path=str(folder), size=4).open().entries
    names = [training.name(i).removeprefix(f"{folder}/") for i in range(len(training))]
    images = open_set(str(folder))
    assert names == [images.name(i).removeprefix(f"{folder}/") for i in range(len(images))]
    return names


def test_links_to_files_and_folders_are_followed_at_any_depth(tmp_path):
    save(tmp_path / "set" / "cat" / "0.png")
    save(tmp_path / "elsewhere" / "1.png")
    save(tmp_path / "elsewhere" / "deep" / "2.png")
    link(tmp_path / "set" / "cat" / "more", tmp_path / "elsewhere")
    link(tmp_path / "set" / "dog" / "3.png", tmp_path / "set" / "cat" / "0.png")
    link(tmp_path / "link", "set")
    names = ["cat/0.png", "cat/more/1.png", "cat/more/deep/2.png", "dog/3.png"]
    assert listed(tmp_path / "set") == names
    assert listed(tmp_path / "link") == names


def test_links_in_a_circle_end(tmp_path):
    save(tmp_path / "set" / "cat" / "0.png")
    save(tmp_path / "set" / "dog" / "deep" / "1.png")
    link(tmp_path / "set" / "cat" / "here", ".")
    link(tmp_path / "set" / "dog" / "deep" / "up", "../..")
    link(tmp_path / "set" / "dog" / "itself", "itself")
    link(tmp_path / "set" / "dog" / "2.png", "2.png")
    tree = walk(tmp_path / "set")
    assert sorted(tree.files) == ["cat/0.png", "dog/2.png", "dog/deep/1.png", "dog/itself"]
    assert sorted(tree.folders) == ["cat", "dog", "dog/deep"]
    assert not tree.repeats


def test_folder_by_two_names_is_listed_once_and_training_refuses_it(tmp_path):
    save(tmp_path / "set" / "a" / "0.png")
    link(tmp_path / "set" / "b", "a")
    link(tmp_path / "set" / "c", "a")
    tree = walk(tmp_path / "set")
    assert tree.files == ["a/0.png"]
    assert tree.repeats == [("b", "a"), ("c", "a")]
    assert len(open_set(str(tmp_path / "set"))) == 1
    with pytest.raises(DataError, match="leads to one folder twice, by 'a' and by 'b'; remove one"):
        FolderSpec(path=str(tmp_path / "set"), size=4).open()


def test_links_that_double_at_each_level_are_listed_in_their_number(tmp_path):
    """Else 40 folders would be listed 2^40 times."""
    for level in range(40):
        (tmp_path / f"{level}").mkdir()
        for name in "ab":
            link(tmp_path / f"{level}" / name, f"../{level + 1}")
    save(tmp_path / "40" / "it.png")
    assert len(walk(tmp_path / "0").files) == 1


def test_hidden_folders_are_left_out(tmp_path):
    save(tmp_path / ".cache" / "0.png")
    save(tmp_path / "a" / "1.png")
    link(tmp_path / "a" / ".hidden", "../.cache")
    assert listed(tmp_path) == ["a/1.png"]


def test_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    save(tmp_path / "a" / "0.png")

    def fail(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("hdit.data.sources.tree.os.scandir", fail)
    with pytest.raises(DataError, match=f"{tmp_path}: cannot be listed: .*Permission denied"):
        open_set(str(tmp_path))
    with pytest.raises(DataError, match=r"cannot be listed: .*Permission denied"):
        FolderSpec(path=str(tmp_path), size=4).open()
