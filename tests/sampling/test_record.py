"""What a set of samples says of itself, and how that is read again."""

import json

import numpy as np
import pytest
import torch

from hdit.errors import UserError
from hdit.sampling import record
from hdit.sampling.record import Labels, Plan

PLAN = Plan(98, 5, (1, 8, 8), Labels("given", (3, -1)), tuple("abcd"))


def test_plan_names_images_by_their_seeds_and_finds_them_again():
    names = [f"{PLAN.name(index)}.png" for index in range(5)]
    assert names == ["000098.png", "000099.png", "000100.png", "000101.png", "000102.png"]
    assert [PLAN.index(name) for name in names] == list(range(5))
    for name in ("000097.png", "000103.png", "98.png", "000098.jpg", "0000²8.png", "000098", "x"):
        assert PLAN.index(name) is None
    assert Plan(9_999_999, 2, (1, 8, 8), None, ()).name(0) == "09999999"


def test_plan_tells_the_class_of_each_image():
    assert PLAN.labels_of(np.arange(5)).tolist() == [3, -1, 3, -1, 3]
    assert PLAN.entry(2) == {"file": "000100.png", "seed": 100, "label": 3, "class": "d"}
    assert PLAN.entry(1) == {"file": "000099.png", "seed": 99, "label": None, "class": None}
    without = Plan(0, 2, (1, 8, 8), None, ())
    assert without.labels_of(np.arange(2)) is None
    assert without.entry(0) == {"file": "000000.png", "seed": 0, "label": None, "class": None}


def test_hash_of_weights_is_of_names_shapes_dtypes_and_values_alone():
    a, b = torch.arange(6.0).reshape(2, 3), torch.zeros(2, dtype=torch.bfloat16)
    same = record.hash_of({"a": a, "b": b})
    assert record.hash_of({"b": b.clone(), "a": a.T.contiguous().T}) == same
    for other in (
        {"a": a, "c": b},
        {"a": a.reshape(3, 2), "b": b},
        {"a": a.double(), "b": b},
        {"a": a + 1, "b": b},
        {"a": a},
    ):
        assert record.hash_of(other) != same


def told(tmp_path, content, lines=None):
    (tmp_path / "samples.json").write_text(json.dumps(content))
    if lines is not None:
        (tmp_path / "samples.jsonl").write_text("".join(lines))
    return tmp_path / "samples.json"


def test_record_gives_the_names_of_its_images(tmp_path):
    path = told(tmp_path, {"seeds": {"first": 98, "number": 5}, "digits": 6}, PLAN.lines())
    assert record.read_samples(path) == [f"{PLAN.name(index)}.png" for index in range(5)]


def test_record_of_an_older_version_gives_them_too(tmp_path):
    entries = [{"file": "7.png", "seed": 7, "label": 2}, {"file": "9.png", "label": None}]
    path = told(tmp_path, {"samples": entries})
    assert record.read_samples(path) == ["7.png", "9.png"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"seeds": 3, "digits": 6}, "seeds.first must be a number from 0 to"),
        ({"seeds": {"first": -1, "number": 1}, "digits": 6}, "seeds.first must be .* got -1"),
        ({"seeds": {"first": 0, "number": 10**9}, "digits": 6}, "seeds.number must be .*1000000,"),
        ({"seeds": {"first": 0, "number": True}, "digits": 6}, "seeds.number must be"),
        ({"seeds": {"first": 0, "number": 1}}, "digits must be a number from 0 to 20, got None"),
        ({"seeds": {"first": 0, "number": 1}, "digits": 10**9}, "digits must be"),
    ],
)
def test_record_that_is_damaged_is_named(tmp_path, content, message):
    with pytest.raises(UserError, match=rf"samples.json: {message}"):
        record.read_samples(told(tmp_path, content))


def test_mean_of_evaluations_is_over_images():
    assert record.mean_evaluations([(64, 99), (64, 99), (2, 99)]) == 99
    assert record.mean_evaluations([(10, 100), (30, 200)]) == 175
    assert record.mean_evaluations([]) is None
