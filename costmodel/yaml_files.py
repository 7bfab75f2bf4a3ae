"""YAML at the edge: read into frozen models, written back; errors name field, value and line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from ..ir.errors import InvalidInput

M = TypeVar("M", bound=BaseModel)


@cache
def packaged(name: str) -> Mapping[str, Mapping[str, Any]]:
    """The presets in `costmodel/data/<name>.yaml`, by name (not to be altered)."""
    text = resources.files(__package__).joinpath("data", f"{name}.yaml").read_text("utf-8")
    data: Mapping[str, Mapping[str, Any]] = yaml.safe_load(text)
    return data


def pick(table: Mapping[str, Mapping[str, Any]], name: str, what: str) -> Mapping[str, Any]:
    """The entry of that name; raises InvalidInput with the nearest names if there is none."""
    if name in table:
        return table[name]
    raise InvalidInput(f"unknown {what} {name!r}: {nearest(name, table)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """'did you mean …', or the list of what there is."""
    names = sorted(known)
    close = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.4)
    return f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(names)}"


def validated(model: type[M], data: Any, where: str, source: str = "") -> M:
    """`data` as a model.

    `where` names the origin in messages; `source` is the YAML text, to find the line of an error.
    Raises InvalidInput naming the field, its value and what was expected.
    """
    if not isinstance(data, Mapping):
        raise InvalidInput(f"{where}: expected a mapping of fields, got {_shown(data)}")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise InvalidInput(_first_problem(error, where, source)) from None


def load(model: type[M], path: str | Path) -> M:
    """Reads a YAML file into a model.

    Raises InvalidInput if the file cannot be read, is not YAML, or does not fit the model.
    """
    try:
        text = Path(path).read_text("utf-8")
        data = yaml.safe_load(text)
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InvalidInput(f"{path}: is not a text file (UTF-8)") from None
    except yaml.YAMLError as error:
        raise InvalidInput(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
    return validated(model, data, str(path), text)


def save(data: Mapping[str, Any], path: str | Path) -> None:
    """Writes plain data as YAML, in the order given; raises InvalidInput if it cannot."""
    try:
        Path(path).write_text(yaml.safe_dump(dict(data), sort_keys=False), "utf-8")
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be written: {error.strerror}") from None


def _first_problem(error: ValidationError, where: str, source: str) -> str:
    problem = error.errors(include_url=False)[0]
    place = [part for part in problem["loc"] if isinstance(part, int) or _is_field(part)]
    line = _line(source, place)
    prefix = f"{where}, line {line}" if line else where
    field = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in place).lstrip(".")
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"{prefix}: {field} is missing"
    if problem["type"] == "extra_forbidden":
        return f"{prefix}: unknown field {field} = {_shown(problem['input'])}"
    if problem["type"] == "value_error":
        return f"{prefix}: {field}: {message}" if field else f"{prefix}: {message}"
    expected = message.replace("Input should be", "expected").removeprefix("expected ")
    return f"{prefix}: {field} is {_shown(problem['input'])}, expected {expected}"


def _is_field(part: object) -> bool:
    return isinstance(part, str) and part.replace("_", "").replace("-", "").isalnum()


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _line(source: str, place: Sequence[int | str]) -> int:
    """Line (from 1) of the deepest part of `place` that the YAML text has; 0 without a text."""
    if not source:
        return 0
    node = yaml.compose(source, Loader=yaml.SafeLoader)
    if node is None:
        return 0
    line = node.start_mark.line + 1
    for part in place:
        if isinstance(node, yaml.MappingNode):
            found = [(k, v) for k, v in node.value if k.value == str(part)]
            if not found:
                break
            key, node = found[0]
            line = key.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
    return line
