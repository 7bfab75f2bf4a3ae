"""`package.module:callable`: finding it, calling it, and telling what it returned apart."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .errors import InvalidInput


class FunctionModel(InvalidInput):
    """A callable returned `(function, params, example_inputs)`, which is JAX's form of a model."""

    def __init__(self, path: str, parts: tuple[Callable[..., Any], Any, Any]) -> None:
        super().__init__(f"model {path!r} is a JAX function; expected a torch module here")
        self.parts = parts


def is_installed(framework: str) -> bool:
    """Whether a framework can be imported; it is not."""
    try:
        return find_spec(framework) is not None
    except ValueError:  # it is hidden
        return False


def is_path(text: str) -> bool:
    """Whether a MODEL specification has the form of a Python path."""
    module, colon, attribute = text.partition(":")
    return bool(colon and module and attribute) and not Path(text).exists()


def called(path: str, model_class: type | tuple[type, ...] = ()) -> Any:
    """What the callable of a path returns, or the object of the path if it is a model itself.

    Raises InvalidInput for a path that leads to nothing that can be called, with what went wrong.
    """
    name, _, attribute = path.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` would
    try:
        found: Any = importlib.import_module(name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever the user's file does
        raise InvalidInput(f"model {path!r}: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise InvalidInput(f"model {path!r}: {type(found).__name__} cannot be called")
    try:
        return found if isinstance(found, model_class) else found()
    except Exception as error:
        raise InvalidInput(f"model {path!r}: {type(error).__name__}: {error}") from error


def function_parts(returned: Any) -> tuple[Callable[..., Any], Any, Any] | None:
    """(function, params, example_inputs), if that is what was returned."""
    if isinstance(returned, tuple) and len(returned) == 3 and callable(returned[0]):
        return returned
    return None
