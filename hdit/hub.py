"""Hugging Face's hub, asked once whether it answers, and told of in one line where it does not."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import huggingface_hub
import huggingface_hub.constants

from hdit.errors import UserError

TIMEOUT = 10.0
"""Seconds that the hub has to answer."""

CLIENTS = ("huggingface_hub", "datasets", "diffusers", "httpx", "urllib3")
"""Packages whose loggers tell of each attempt."""


class HubError(UserError):
    """Something that is neither in the cache of this machine nor can be had from the hub."""


@contextmanager
def asking(where: str, name: str, kind: str, fix: str) -> Iterator[None]:
    """A block that loads `name`, a "model" or "dataset", from the hub or from the hub's cache.

    Where the hub does not answer, or may not be asked, the block goes by the cache alone, without
    the attempts and pauses of the hub's packages. Raises HubError if it fails then: `where` is the
    setting, and `fix` what else to do. What it raises otherwise passes.
    """
    reason = _unreachable(name, kind)
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        if reason is None:
            yield
            return
        stack.enter_context(_offline())
        try:
            yield
        except Exception as error:  # each package has its own
            raise HubError(
                f"{where} is not in the cache of this machine, or not whole, and {reason}; {fix}"
            ) from error


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.300}"


def _unreachable(name: str, kind: str) -> str | None:
    """Why the hub cannot be asked, or None where it answers, be it that there is no such name."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, so that nothing is downloaded"
    errors = importlib.import_module("huggingface_hub.errors")  # takes 0.4 s
    try:
        huggingface_hub.HfApi().repo_info(name, repo_type=kind, timeout=TIMEOUT)
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        return None
    except Exception as error:  # of the network, by whichever package goes there
        return f"Hugging Face's hub cannot be reached ({first_line(error)})"
    return None


@contextmanager
def _offline() -> Iterator[None]:
    """The hub's package as with HF_HUB_OFFLINE, which it reads once, at its import."""
    constants: Any = huggingface_hub.constants
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of the hub's packages."""
    loggers = [logging.getLogger(name) for name in CLIENTS]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
