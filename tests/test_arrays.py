"""Npz files are read whole or refused by name, and nothing is allocated on their word alone."""

import io
import resource
import struct
import zipfile

import numpy as np
import pytest

from hdit import arrays
from hdit.arrays import ArraysError, read_npz

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3)).astype(np.uint8)


def header(shape, descr="|u1", fortran=False, version=1):
    """A header of npy as text says it, true or not."""
    text = f"{{'descr': {descr!r}, 'fortran_order': {fortran}, 'shape': {shape}, }}"
    return magic(text.encode(), version)


def magic(text, version=1):
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes((version, 0)) + length + text


def archive(path, method=zipfile.ZIP_STORED, **members):
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return path


def npy(array, **options):
    content = io.BytesIO()
    np.lib.format.write_array(content, array, **options)
    return content.getvalue()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    "array",
    [
        PIXELS,
        np.asfortranarray(PIXELS),
        PIXELS[:0],
        np.arange(5),
        np.arange(5, dtype=">i8"),
        np.linspace(0, 1, 7, dtype=np.float32).reshape(7, 1),
        np.float64(3),
    ],
    ids=["pixels", "fortran", "empty", "labels", "big-endian", "floats", "scalar"],
)
def test_arrays_are_read_as_they_were_saved(tmp_path, save, array):
    save(tmp_path / "a.npz", a=array, other=np.array(["text"]))
    names, found = read_npz(tmp_path / "a.npz", ("a", "absent"))
    assert names == ["a", "other"]
    assert list(found) == ["a"]
    np.testing.assert_array_equal(found["a"], array)
    assert found["a"].shape == np.shape(array)
    is_stored = save is np.savez and np.size(array) > 0
    owner = found["a"]
    while isinstance(owner, np.ndarray) and not isinstance(owner, np.memmap):
        owner = owner.base
    assert isinstance(owner, np.memmap) == is_stored


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_array_of_any_compression_that_zip_knows_is_read(tmp_path, method):
    archive(tmp_path / "a.npz", method, a=npy(PIXELS))
    np.testing.assert_array_equal(read_npz(tmp_path / "a.npz", ("a",)).arrays["a"], PIXELS)


def test_array_that_python_2_saved_is_read(tmp_path):
    archive(
        tmp_path / "a.npz",
        a=magic(b"{'descr': '|u1', 'fortran_order': False, 'shape': (2L,)}") + b"ab",
    )
    assert bytes(read_npz(tmp_path / "a.npz", ("a",)).arrays["a"]) == b"ab"


HUGE = 10**23
BAD_HEADERS = {
    "negative": (header("(-1, 4)") + bytes(4), r"sides from 0 up, got the shape \(-1, 4\)"),
    "two negatives": (header("(-2, -2)") + bytes(4), "sides from 0 up"),
    "huge": (header(f"({HUGE},)") + bytes(4), f"header tells of {HUGE:,} bytes, but it has 4"),
    "huge and empty": (header(f"({HUGE}, 0)") + bytes(4), "of 0 bytes, but it has 4"),
    "boolean": (header("(True, 4)") + bytes(4), "sides from 0 up"),
    "not a number": (header("('a',)") + bytes(4), "no header of an array"),
    "many sides": (header(str((1,) * 40)) + bytes(1), "sides from 0 up"),
    "longer": (header("(5,)") + bytes(4), "tells of 5 bytes, but it has 4"),
    "shorter": (header("(3,)") + bytes(4), "tells of 3 bytes, but it has 4"),
    "objects": (
        header("(4,)", "|O") + bytes(32),
        "and no pickle is read",
    ),
    "text": (header("(2,)", "<U1") + bytes(8), "real numbers, got dtype <U1"),
    "records": (header("(4,)", [("a", "u1")]) + bytes(4), "real numbers, got dtype"),
    "complex": (header("(1,)", "<c8") + bytes(8), "real numbers, got dtype complex64"),
    "no bytes each": (header(f"({HUGE},)", "|V0"), "real numbers, got dtype"),
    "dtype of nothing": (header("(4,)", "|q9") + bytes(4), "no header of an array"),
    "no pickle": (b"\x80\x04\x95\x0b", "no array of numpy: it begins with"),
    "empty": (b"", "no array of numpy: it begins with b''"),
    "cut in the header": (header("(4,)")[:30], "no header of an array"),
    "version": (b"\x93NUMPY\x03\x00" + bytes(8), "has version 3.0 of npy"),
    "no version": (b"\x93NUMPY\x00\x00" + bytes(8), "has version 0.0 of npy"),
    "long header": (magic(b" " * 20_000), "header of 20,000 bytes, which no array has"),
    "header of 4 GB": (b"\x93NUMPY\x02\x00\xff\xff\xff\xff", "header of 4,294,967,295 bytes"),
    "nested": (magic(b"(" * 9_000), "no header of an array"),
    "signs": (magic(b"-" * 9_000 + b"1"), "no header of an array"),
    "digits": (magic(b"1" * 9_000), "no header of an array"),
    "code": (magic(b"__import__('os').abort()"), "no header of an array"),
    "not UTF-8": (magic(b"\xff\xfe", 2), "no header of an array"),
    "indents": (magic(b"  {'a': 1L\n 3"), "no header of an array"),
}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("name", BAD_HEADERS)
def test_header_that_is_no_plain_arrays_is_refused_by_file_and_member(tmp_path, name, method):
    content, words = BAD_HEADERS[name]
    path = archive(tmp_path / "a.npz", method, arr_0=content)
    with pytest.raises(ArraysError, match=f"a.npz: arr_0:? .*{words}"):
        read_npz(path, ("arr_0",))


def test_array_that_unpacks_to_far_more_than_it_has_is_refused_before(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "FREE", 2**16)
    path = archive(tmp_path / "a.npz", zipfile.ZIP_DEFLATED, a=npy(np.zeros(2**20, np.uint8)))
    monkeypatch.setattr(arrays.np, "empty", None)  # nothing may be allocated
    with pytest.raises(ArraysError, match=r"unpack to 1,048,576, .*; save it with numpy\.savez"):
        read_npz(path, ("a",))


@pytest.mark.parametrize("memory", [2**20, 2**21 - 1, 2**21])
def test_compressed_arrays_must_fit_in_memory_together(tmp_path, monkeypatch, memory):
    monkeypatch.setattr(arrays, "available_memory", lambda: memory)
    array = np.zeros(2**20, np.uint8)
    np.savez_compressed(tmp_path / "a.npz", a=array, b=array)
    if memory >= 2**21:
        assert len(read_npz(tmp_path / "a.npz", ("a", "b")).arrays) == 2
    else:
        with pytest.raises(ArraysError, match=r"b: unpacks to 1,048,576 bytes, more than the"):
            read_npz(tmp_path / "a.npz", ("a", "b"))
    np.savez(tmp_path / "b.npz", a=array, b=array, c=array)
    assert len(read_npz(tmp_path / "b.npz", ("a", "b", "c")).arrays) == 3  # mapped


def test_memory_that_is_free_is_some_of_this_machines():
    assert 2**20 < arrays.available_memory() < 2**50


def central(path):
    """(content of an archive, place of its first entry in the directory)."""
    content = bytearray(path.read_bytes())
    return content, content.index(b"PK\x01\x02")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("sizes", ["both", "unpacked"])
def test_archive_that_lies_about_sizes_is_refused(tmp_path, method, sizes):
    """The header and the directory agree on two gigabytes, but the file has none of them."""
    size = 2**31
    start = header(f"({size},)")
    path = archive(tmp_path / "a.npz", method, a=start + bytes(64))
    content, entry = central(path)
    struct.pack_into("<I", content, entry + 24, len(start) + size)
    if sizes == "both":
        struct.pack_into("<I", content, entry + 20, len(start) + size)
    path.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ArraysError, match=r"a\.npz: a: "):
        read_npz(path, ("a",))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB


def pixels_or_error(path):
    try:
        return read_npz(path, ("arr_0",)).arrays.get("arr_0")
    except ArraysError as error:
        return str(error)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_file_cut_off_or_changed_anywhere_is_read_rightly_or_refused(tmp_path, save):
    save(tmp_path / "a.npz", arr_0=PIXELS)
    whole = (tmp_path / "a.npz").read_bytes()
    rng = np.random.default_rng(1)
    for trial in range(150):
        content = bytearray(whole)
        if trial % 3 == 0:
            content = content[: rng.integers(len(whole))]
        else:
            for at in rng.integers(len(whole), size=rng.integers(1, 4)):
                content[at] = rng.integers(256)
        (tmp_path / "b.npz").write_bytes(content)
        found = pixels_or_error(tmp_path / "b.npz")
        if isinstance(found, str):
            assert "b.npz" in found
        elif save is np.savez_compressed and found is not None:
            np.testing.assert_array_equal(found.ravel("K"), PIXELS.ravel())


def test_zip64_that_lies_is_refused(tmp_path):
    path = archive(tmp_path / "a.npz", a=npy(PIXELS))
    content, entry = central(path)
    name = struct.unpack_from("<H", content, entry + 28)[0]
    for offset in (20, 24, 42):  # sizes, and where the member begins
        changed = bytearray(content)
        struct.pack_into("<I", changed, entry + offset, 2**32 - 1)
        for value in (2**40, 2**63, 2**64 - 1):
            extra = struct.pack("<HHQ", 1, 8, value)
            longer = bytearray(changed)
            longer[entry + 46 + name : entry + 46 + name] = extra
            struct.pack_into("<H", longer, entry + 30, len(extra))
            end = longer.index(b"PK\x05\x06")
            length = struct.unpack_from("<I", longer, end + 12)[0]
            struct.pack_into("<I", longer, end + 12, length + len(extra))
            path.write_bytes(longer)
            with pytest.raises(ArraysError, match=r"a\.npz: "):
                read_npz(path, ("a",))


def test_array_that_is_there_twice_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("a.npy", npy(PIXELS))
        file.writestr("a", npy(PIXELS))
    with pytest.raises(ArraysError, match=r"a\.npz: holds 'a' twice"):
        read_npz(tmp_path / "a.npz", ("a",))


def test_array_under_a_password_is_refused(tmp_path):
    path = archive(tmp_path / "a.npz", a=npy(PIXELS))
    content, entry = central(path)
    content[6] |= 1
    content[entry + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(ArraysError, match=r"a\.npz: a: damaged: .*password"):
        read_npz(path, ("a",))


@pytest.mark.parametrize("content", [b"", b"no zip", npy(PIXELS)])
def test_file_that_is_no_archive_is_refused_by_name(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(
        ArraysError, match=r"a\.npz: no npz file, or damaged: File is not a zip file"
    ):
        read_npz(tmp_path / "a.npz", ("a",))


def test_device_is_no_file_of_arrays(tmp_path):
    (tmp_path / "a.npz").symlink_to("/dev/zero")
    with pytest.raises(ArraysError, match=r"a\.npz: is not a regular file"):
        read_npz(tmp_path / "a.npz", ("a",))
