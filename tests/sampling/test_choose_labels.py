"""Which classes --labels asks for."""

from types import SimpleNamespace

import numpy as np
import pytest

from hdit.errors import UserError
from hdit.protocols import NULL_LABEL
from hdit.sampling.options import choose_labels


def chosen(text: str | None, *classes: str, number: int = 4) -> list[int] | None:
    labels = choose_labels(text, SimpleNamespace(classes=classes))
    return None if labels is None else labels.of(0, np.arange(number)).tolist()


@pytest.mark.parametrize(
    ("text", "classes", "labels"),
    [
        (None, ["cat", "dog"], [0, 1, 0, 1]),
        ("dog", ["cat", "dog"], [1, 1, 1, 1]),
        (" dog , cat,none", ["cat", "dog"], [1, 0, NULL_LABEL, 1]),
        ("#1,#0", ["cat", "dog"], [1, 0, 1, 0]),
        # a name wins over an index, and is taken as it is written
        ("1,2,3,10", ["1", "10", "2", "3"], [0, 2, 3, 1]),
        ("01,1,#1,02", ["01", "02", "1"], [0, 2, 1, 1]),
        ("none,#0", ["#0", "#1", "none"], [2, 0, 2, 0]),
        # as in a line of CSV
        ('"cat, black",cat', ["cat", "cat, black"], [1, 0, 1, 0]),
        ('"cat ", " cat",cat ,cat', [" cat", "cat", "cat "], [2, 0, 2, 1]),
        ('"the ""big"" cat",5" disk', ['5" disk', 'the "big" cat'], [1, 0, 1, 0]),
        ('"two\nlines"', ["two\nlines"], [0, 0, 0, 0]),
        # what is no UTF-8, as bytes and as it is shown
        ("caf\udce9,caf\\xe9", ["caf", "caf\\xe9"], [1, 1, 1, 1]),
        ("²", ["2", "²"], [1, 1, 1, 1]),
        # as it is typed, of folders that macOS named; each as written where both are there
        ("caf\u00e9,cafe", ["cafe", "cafe\u0301"], [1, 0, 1, 0]),
        ("caf\u00e9,cafe\u0301", ["cafe\u0301", "caf\u00e9"], [1, 0, 1, 0]),
    ],
)
def test_labels_are_names_as_written_or_indices_after_a_hash(text, classes, labels):
    assert chosen(text, *classes) == labels


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--labels: '' is no list of classes (it is empty); write names with commas"),
        (",", "--labels: '' is no class of this model: 1, 2, 3"),
        ("0", "'0' is no class of this model: 1, 2, 3; for the class at that index, write #0"),
        ("01", "'01' is no class of this model: 1, 2, 3; for"),
        ("²", "'²' is no class of this model: 1, 2, 3"),
        ("#3", "'#3' is no class of this model: 1, 2, 3; an index is a number from #0 to #2"),
        ("#²", "'#²' is no class of this model: 1, 2, 3; an index is"),
        ("#-1", "'#-1' is no class"),
        ("9" * 5000, "is no class of this model: 1, 2, 3"),
        ('"1', "is no list of classes (unexpected end of data)"),
        ('"1"2', "is no list of classes (',' expected after '\"')"),
        ("1\n2", "--labels: '1\\\\n2' is no list of classes ("),
        ("\x1b[2J", "'\\\\x1b[2J' is no class"),
    ],
)
def test_label_that_is_no_class_is_an_error_that_says_what_there_is(text, message):
    with pytest.raises(UserError) as error:
        chosen(text, "1", "2", "3")
    assert message in str(error.value)


def test_classes_in_an_error_are_few_and_can_be_shown():
    with pytest.raises(UserError) as error:
        chosen("x", "\x1b[2J", "caf\\xe9", *map(str, range(30)))
    assert r": \x1b[2J, caf\xe9, 0, 1, " in str(error.value)
    assert str(error.value).endswith("17, ...")


def test_name_of_two_classes_is_an_error_that_tells_their_indices():
    assert chosen("dog,#2", "crane", "dog", "crane") == [1, 2, 1, 2]
    with pytest.raises(UserError, match="'crane' are #0 and #2; write one of these"):
        chosen("crane", "crane", "dog", "crane")


def test_random_labels_are_drawn_by_the_seed_of_an_image():
    """Each class about as often: of 6,000, the standard deviation of a count is 37."""
    labels = choose_labels("random", SimpleNamespace(classes=("a", "b", "c")))
    assert labels.kind == "random"
    drawn = labels.of(0, np.arange(6000))
    assert all(abs((drawn == k).sum() - 2000) < 5 * 37 for k in range(3))
    assert not np.array_equal(drawn[:3000], drawn[3000:])
    assert np.array_equal(labels.of(1000, np.arange(7)), drawn[1000:1007])
    assert labels.of(0, np.array([5, 17])).tolist() == drawn[[5, 17]].tolist()


def test_class_of_the_name_random_is_no_draw():
    assert chosen("random", "cat", "random") == [1, 1, 1, 1]
    with pytest.raises(UserError, match="'random' is no class"):
        chosen("random,cat", "cat", "dog")


def test_labels_of_a_model_without_classes_are_an_error():
    assert chosen(None) is None
    with pytest.raises(UserError, match="the model was trained without classes"):
        chosen("0")
