"""Warnings are errors, but in the tests of a GPU."""

import warnings

import pytest


def test_a_warning_is_an_error():
    with pytest.raises(UserWarning, match="of a setting"):
        warnings.warn("of a setting", stacklevel=1)


@pytest.mark.gpu
def test_a_warning_in_a_gpu_test_is_no_error():
    with warnings.catch_warnings(record=True) as said:  # by the filters that the test has
        warnings.warn("of a setting", stacklevel=1)
    assert [str(warning.message) for warning in said] == ["of a setting"]
