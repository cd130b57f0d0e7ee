"""Functions of the user's own, named in a setting as `module:function`."""

from __future__ import annotations

import functools
import importlib
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hdit.errors import UserError


@contextmanager
def no_exit(where: str, error_type: type[UserError] = UserError) -> Iterator[None]:
    """Within, code of the user's that ends the program, as sys.exit does, raises `error_type`.

    Other exceptions pass, and Ctrl-C does. `where` is what the message begins with.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        raise error_type(
            f"{where} ended the program ({type(error).__name__}: {_short(error)}); let it return "
            "or raise"
        ) from error


def _short(error: BaseException, limit: int = 200) -> str:
    """What an exception says, on one line: it may hold whole tensors."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else f"{text[:limit]}..."


def import_function(
    name: str, where: str, error_type: type[UserError] = UserError
) -> tuple[Callable[..., Any], Path | None]:
    """Imports `module:function`, from the current folder or the environment.

    Returns the function, and the file of its module if there is one. Raises `error_type` for a
    module that cannot be imported, or that has no such function; `where` is what its message begins
    with, as in "data.hook: 'my_data:open_pets'". So does a call of the function that would end the
    program.
    """
    module_name, _, function_name = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # and there it stays, for what the module imports later
    try:
        with no_exit(f"{where}: importing {module_name!r}", error_type):
            module = importlib.import_module(module_name)
    except error_type:
        raise
    except Exception as error:
        raise error_type(
            f"{where}: importing {module_name!r} (from {here}, or installed) raised "
            f"{type(error).__name__}: {error}"
        ) from error
    file = getattr(module, "__file__", None)
    try:
        found = operator.attrgetter(function_name)(module)
    except AttributeError:
        raise error_type(
            f"{where}: {module_name!r} has no {function_name!r} ({file or 'built in'})"
        ) from None
    if not callable(found):
        raise error_type(f"{where} is a {type(found).__name__}, not a function")

    @functools.wraps(found)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        with no_exit(where, error_type):
            return found(*args, **kwargs)

    return guarded, Path(file) if file else None
