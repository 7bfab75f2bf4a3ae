"""Paths of modules and names of parameters: which are a module's own, and what it calls them.

A module in a list is `layers.3`; the slices that `lax.scan` runs over are `layers[3]`, their
parameters `layers.wq[3]`. A stack has a range for a number: `layers.0-31`, `layers[0-31]`.
"""

from __future__ import annotations

import re

_INDEX = re.compile(r"\[([\d-]+)\]")
_NUMBER = re.compile(r"\d+(?=\]?$)")


def owns(module: str, parameter: str) -> bool:
    """Whether a parameter is a module's own, by its name: `layers.3.wq` of `layers.3`, and
    `layers.wq[3]` or `wq[3]` of `layers[3]`."""
    if found := _INDEX.search(module):
        index = _INDEX.search(parameter)
        return index is not None and index[1] == found[1]
    return parameter.startswith(module + ".")


def inner_name(parameter: str, module: str) -> str:
    """A parameter's name as its module sees it."""
    if not module or not owns(module, parameter):
        return parameter
    if found := _INDEX.search(module):
        return _INDEX.sub("", parameter, count=1).removeprefix(module[: found.start()] + ".")
    return parameter.removeprefix(module + ".")


def renamed(parameter: str, module: str, other: str) -> str:
    """What a module's parameter is called in another module that is like it."""
    if not owns(module, parameter):
        return parameter
    if found := _INDEX.search(other):
        return _INDEX.sub(found[0], parameter, count=1)
    return f"{other}.{parameter.removeprefix(module + '.')}"


def family(module: str) -> str:
    """A path without the number that it ends in: `layers.`, `layers[]`, `layers_`."""
    return _NUMBER.sub("", module)


def span(first: str, last: str) -> str:
    """The path of a stack: `layers.0-31`, `layers[0-31]`, of two modules of one family."""
    found = _NUMBER.search(last)
    if found is None or family(first) != family(last):
        return f"{first}-{last.rpartition('.')[2]}"
    return _NUMBER.sub(lambda own: f"{own[0]}-{found[0]}", first)


def unstacked(module: str) -> str:
    """`layers[3]` → `layers.3`: a path that torch has for the slice of a stack."""
    if not (found := _INDEX.search(module)):
        return module
    parent = module[: found.start()] or "layers"
    return f"{parent}.{found[1]}{module[found.end() :]}"
