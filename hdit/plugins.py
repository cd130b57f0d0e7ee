"""Functions of the user's own, named in a setting as `module:function`."""

from __future__ import annotations

import importlib
import operator
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hdit.errors import UserError


def import_function(
    name: str, where: str, error_type: type[UserError] = UserError
) -> tuple[Callable[..., Any], Path | None]:
    """Imports `module:function`, from the current folder or the environment.

    Returns the function, and the file of its module if there is one. Raises `error_type` for a
    module that cannot be imported, or that has no such function; `where` is what its message begins
    with, as in "data.hook: 'my_data:open_pets'".
    """
    module_name, _, function_name = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # and there it stays, for what the module imports later
    try:
        module = importlib.import_module(module_name)
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
    return found, Path(file) if file else None
