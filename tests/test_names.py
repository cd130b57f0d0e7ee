r"""Names that are not UTF-8: text that can be stored, and back."""

import os

from hypothesis import given
from hypothesis import strategies as st

from hdit.names import escape, printable, unescape

NAMES = st.binary(min_size=1, max_size=20).map(os.fsdecode) | st.text(
    alphabet=r"\x5c8fé", max_size=9
)


@given(NAMES)
def test_escaped_names_are_text_and_come_back(name):
    text = escape(name)
    assert text.encode("utf-8").decode("utf-8") == text
    assert unescape(text) == name


def test_names_that_are_text_stay_as_they_are():
    for name in ("cat", "cafe\u0301", r"a\b", r"C:\x", "a b,c"):
        assert escape(name) == name


def test_bytes_are_shown_in_hex_and_control_characters_are_escaped():
    assert escape(os.fsdecode(b"caf\xe9")) == r"caf\xe9"
    assert printable(os.fsdecode(b"caf\xe9") + "\x1b[2J\n\u202e") == r"caf\xe9\x1b[2J\n\u202e"
    assert printable(printable("\udce9\n")) == r"\xe9\n"
