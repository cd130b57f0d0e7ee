"""The hub, where it does not answer: see also tests/spaces/test_vae.py."""

import logging
import sys
from types import SimpleNamespace

import huggingface_hub.errors
import pytest

from hdit.data import HubSpec
from hdit.data.source import DataError
from hdit.hub import asking

NAME = "nobody/no-such-data"


def fail(*args, **options):
    raise ConnectionError("Name or service not known\nand more")


@pytest.fixture
def unreachable(monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", fail)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@pytest.mark.parametrize("offline", [False, True])
def test_data_set_that_cannot_be_downloaded_is_told_with_what_to_do(
    offline, unreachable, monkeypatch
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=fail))
    with pytest.raises(DataError) as caught:
        HubSpec(name=NAME, size=4).open()
    said = str(caught.value)
    assert said.startswith(f"data.name: {NAME!r} is not in the cache of this machine")
    assert ("HF_HUB_OFFLINE is set" if offline else "cannot be reached (ConnectionError: N") in said
    assert said.endswith("set data.path to a folder of save_to_disk in place of data.name")
    assert "\n" not in said


@pytest.mark.parametrize("answer", [None, huggingface_hub.errors.HFValidationError])
def test_error_of_a_hub_that_answers_is_told_as_it_is(answer, monkeypatch):
    def repo_info(self, repo_id, **options):
        if answer:
            raise answer

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=fail))
    with pytest.raises(DataError, match=r"cannot be loaded: ConnectionError: Name or service no"):
        HubSpec(name=NAME, size=4).open()


def test_block_without_a_hub_goes_by_the_cache_and_leaves_all_as_it_was(unreachable, caplog):
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    with asking("data.name", NAME, "dataset", "a fix"):
        assert huggingface_hub.constants.HF_HUB_OFFLINE
        logger.warning("Retrying in 1s [Retry 1/5].")
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    assert logger.level == before
    assert not caplog.records
