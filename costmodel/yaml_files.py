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

# libyaml's parser is about ten times faster; PyYAML may have been built without it.
_FastLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_FastDumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class Misfit(ValueError):
    """What a validator raises about a field below its own model.

    `problem` starts where the field's name ends ("is 12, expected …"); `place` is the path to the
    field, which also finds its line.
    """

    def __init__(self, problem: str, *place: int | str) -> None:
        super().__init__(f"{_field(place)} {problem}")
        self.problem = problem
        self.place = place


class _Loader(_FastLoader):  # type: ignore[misc]  # typed Any above
    """Refuses a field that is given twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"field {key.value} is given twice, first in line "
                        f"{seen[key.value]}",
                        problem_mark=key.start_mark,
                    )
                seen[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep=deep)


class _Dumper(_FastDumper):  # type: ignore[misc]  # typed Any above
    """Writes small items of a list on one line each, so that long lists stay readable."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> Any:
        node = super().represent_sequence(tag, sequence, flow_style=flow_style)
        node.flow_style = bool(node.value) and all(map(_is_short, node.value))
        for item in node.value:
            if _depth(item) <= 2:
                item.flow_style = True
        return node

    def ignore_aliases(self, data: Any) -> bool:
        return True


@cache
def packaged(name: str) -> Mapping[str, Mapping[str, Any]]:
    """The presets in `costmodel/data/<name>.yaml`, by name (not to be altered)."""
    text = resources.files(__package__).joinpath("data", f"{name}.yaml").read_text("utf-8")
    data: Mapping[str, Mapping[str, Any]] = yaml.load(text, Loader=_Loader)
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

    Raises InvalidInput if the file cannot be read, is not YAML, gives a field twice, or does not
    fit the model.
    """
    try:
        text = Path(path).read_text("utf-8")
        data = yaml.load(text, Loader=_Loader)
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InvalidInput(f"{path}: is not a text file (UTF-8)") from None
    except RecursionError:
        raise InvalidInput(f"{path}: is not YAML of ours: nested too deeply") from None
    except yaml.YAMLError as error:
        raise InvalidInput(f"{path}{_yaml_problem(error)}") from None
    except ValueError as error:  # a date or number of YAML that does not exist, such as 2026-02-30
        raise InvalidInput(f"{path}: is not YAML: {error}") from None
    return validated(model, data, str(path), text)


def save(data: Mapping[str, Any], path: str | Path) -> None:
    """Writes plain data as YAML, in the order given; raises InvalidInput if it cannot."""
    text = yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, width=100, allow_unicode=True)
    try:
        Path(path).write_text(text, "utf-8")
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be written: {error.strerror}") from None


def _first_problem(error: ValidationError, where: str, source: str) -> str:
    problem = error.errors(include_url=False)[0]
    place = [part for part in problem["loc"] if isinstance(part, int) or _is_field(part)]
    message = problem["msg"].removeprefix("Value error, ")
    raised = problem.get("ctx", {}).get("error")
    if isinstance(raised, Misfit):
        place += raised.place
    line = _line(source, place)
    prefix = f"{where}, line {line}" if line else where
    field = _field(place)
    if isinstance(raised, Misfit):
        return f"{prefix}: {field} {raised.problem}"
    if problem["type"] == "missing":
        return f"{prefix}: {field} is missing"
    if problem["type"] == "extra_forbidden":
        return f"{prefix}: unknown field {field} = {_shown(problem['input'])}"
    if problem["type"] == "value_error":
        return f"{prefix}: {field}: {message}" if field else f"{prefix}: {message}"
    if problem["type"] == "literal_error":
        known = [name.strip("' ") for name in problem["ctx"]["expected"].split(",")]
        known[-1:] = [name.strip("' ") for name in known[-1].split("' or '")]
        hint = nearest(str(problem["input"]), known)
        return f"{prefix}: {field} is {_shown(problem['input'])}: {hint}"
    expected = message.replace("Input should be", "expected").removeprefix("expected ")
    expected = expected.partition(" should have ")[2] or expected
    return f"{prefix}: {field} is {_shown(problem['input'])}, expected {expected}"


def _yaml_problem(error: yaml.YAMLError) -> str:
    """`, line 3: …` of a parser's error, whose own text takes several lines."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return f": is not YAML: {' '.join(str(error).split())}"
    line = error.problem_mark.line + 1
    if isinstance(error, yaml.constructor.ConstructorError) and error.context is None:
        return f", line {line}: {error.problem}"
    return f", line {line}: is not YAML: {error.problem}"


def _field(place: Sequence[int | str]) -> str:
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in place).lstrip(".")


def _is_field(part: object) -> bool:
    return isinstance(part, str) and part.replace("_", "").replace("-", "").isalnum()


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _depth(node: yaml.Node) -> int:
    if isinstance(node, yaml.MappingNode):
        return 1 + max((_depth(value) for _, value in node.value), default=0)
    if isinstance(node, yaml.SequenceNode):
        return 1 + max(map(_depth, node.value), default=0)
    return 0


def _is_short(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and len(node.value) <= 30 and " " not in node.value


def _line(source: str, place: Sequence[int | str]) -> int:
    """Line (from 1) of the deepest part of `place` that the YAML text has; 0 without a text."""
    if not source:
        return 0
    node = yaml.compose(source, Loader=_Loader)
    if node is None:
        return 0
    line = node.start_mark.line + 1
    for part in place:
        if isinstance(node, yaml.MappingNode):
            found = [(k, v) for k, v in node.value if k.value == str(part)]
            if not found:
                break
            key, node = found[-1]
            line = key.start_mark.line + 1
        elif (
            isinstance(node, yaml.SequenceNode)
            and isinstance(part, int)
            and part < len(node.value)  # not so where an item is missing
        ):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
    return int(line)
