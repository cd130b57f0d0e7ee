"""Small text files: what is refused, and that the message names the file."""

import os

import pytest

from hdit.reading import MAX_DEPTH, ReadingError, parse_json, parse_toml, read_json, read_text


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "socketless link"])
def test_only_regular_files_are_read(tmp_path, kind):
    path = tmp_path / "a.toml"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "/dev/null")
    with pytest.raises(ReadingError, match=r"a\.toml: is a (folder|device or pipe), where a reg"):
        read_text(path)


def test_file_beyond_the_limit_is_refused_before_it_is_read_whole(tmp_path):
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(ReadingError, match=r"a\.json: has more than 1,000 bytes"):
        read_text(path, limit=1000)


def test_missing_file_and_a_name_with_a_zero_byte(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "a")
    with pytest.raises(ReadingError, match="null byte"):
        read_text(tmp_path / "a\0b")


@pytest.mark.parametrize(
    "text", ["[" * 10_000 + "]" * 10_000, "9" * 5000, '{"a":' * 65 + "1" + "}" * 65, "{", "\xff"]
)
def test_bad_json_is_named(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ReadingError, match=r"a\.json: (not valid JSON|has values nested|is not U)"):
        read_json(path)


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 10_000 + "]" * 10_000,
        "a = " + "9" * 5000,
        ".".join("a" * 70) + " = 1",
        "a." * 400_000 + "b = 1",
        "[" + "'a' . " * 100_000 + "b]",
        'x = {"' + '"."'.join("a" * 100_000) + '" = 1}',
    ],
)
def test_bad_toml_is_named(text):
    with pytest.raises(ReadingError, match=r"here: (not valid TOML|has (values|a key) nested)"):
        parse_toml(text, "here")


@pytest.mark.parametrize("value", ["'''" + "a. b " * 9999 + "'''", "[" + "0.1, " * 9999 + "]"])
def test_toml_with_many_dots_that_are_in_no_key_is_read(value):
    assert parse_toml(f"x = {value}", "here")["x"]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_text_is_read_with_a_byte_order_mark_or_without(tmp_path, mark):
    (tmp_path / "a.json").write_bytes(mark + '{"a": "\u00e9"}'.encode())
    assert read_json(tmp_path / "a.json") == {"a": "\u00e9"}


def test_values_nested_as_deep_as_allowed_are_read():
    text = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_json(text, "here") is not None
    with pytest.raises(ReadingError, match="nested"):
        parse_json(f"[{text}]", "here")
