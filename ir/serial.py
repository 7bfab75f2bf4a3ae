"""Models and plans as versioned JSON: what a plan file holds, and how it is read from strangers.

A file is one JSON object: `format` and `version`, then the fields of the dataclass, as the
dataclass names them. Fields at their default are left out. Rules and types are strings
(`"b s h, o h -> b s o"`, `"dp=S(0) tp=I"`), mappings are in a canonical order (equal plans are
equal bytes), and what a key says is not said again (a value's name, the module in the parameter
names of a segment). Distinct blocks are stored once, so a file grows by a few lines per layer.

Reading follows the dataclasses' own annotations, so a new field needs no line here; whatever is
wrong with a file is an `InvalidInput` of one line that names the field.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from .check import check_plan
from .errors import InvalidInput
from .graph import Graph, Model, Op, Segment
from .optable import TABLE
from .plan import Plan
from .rule import Rule, parse
from .types import AxisType, NdType

VERSION = 1
"""Of both formats; raised when a file of this version would no longer be read as it was meant."""

_FORMATS: dict[type, str] = {Model: "shardwright-model", Plan: "shardwright-plan"}
_LINE_WIDTH = 120

T = TypeVar("T")


def to_json(obj: Model | Plan) -> dict[str, Any]:
    """A model or plan as JSON data, in canonical order."""
    kind: type[Model | Plan] = Plan if isinstance(obj, Plan) else Model  # or a subclass of one
    return {"format": _FORMATS[kind], "version": VERSION, **_encode(obj, kind)}


def model_from_json(data: Any) -> Model:
    """The inverse of `to_json`; raises InvalidInput for anything that is no well-formed model."""
    model = _from_json(data, Model)
    _checked(lambda: _check_model(model))
    return model


def plan_from_json(data: Any) -> Plan:
    """The inverse of `to_json`; raises InvalidInput for anything that is no well-formed plan."""
    plan = _from_json(data, Plan)
    _checked(lambda: _check_model(plan.model))
    _checked(lambda: check_plan(plan))
    return plan


def save_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Writes a plan file, whole or not at all. Raises InvalidInput where it cannot be written."""
    write_whole(path, _render(to_json(plan)) + "\n", "plan file")


def write_whole(path: str | os.PathLike[str], text: str, what: str) -> None:
    """Writes ASCII text beside its place first, then renames it, so that no reader sees half a
    file. Raises InvalidInput where it cannot be written."""
    target = Path(path)
    beside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with open(beside, "w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    except OSError as error:
        raise InvalidInput(f"{what} {target}: cannot write it: {error.strerror}") from None
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Reads a plan file; raises InvalidInput (one line) where there is none or it is corrupt."""
    where = f"plan file {os.fspath(path)}"
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise InvalidInput(f"{where}: cannot read it: {error.strerror}") from None
    try:
        return plan_from_json(_parse_json(raw))
    except InvalidInput as error:
        raise InvalidInput(f"{where}: {error}") from None


# --- text ------------------------------------------------------------------------------------


def _parse_json(raw: bytes) -> Any:
    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON number")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        data = dict(pairs)
        if len(data) < len(pairs):
            raise ValueError("a key appears twice in one object")
        return data

    try:
        text = raw.decode("utf-8")
        if not text.strip():
            raise InvalidInput("the file is empty")
        return json.loads(text, parse_constant=constant, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated"):
            raise InvalidInput(f"truncated: the JSON ends in the middle, at line {error.lineno}") \
                from None  # fmt: skip
        raise InvalidInput(f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}") \
            from None  # fmt: skip
    except (ValueError, RecursionError) as error:  # bad UTF-8, a number of 5,000 digits, depth
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise InvalidInput(f"not JSON: {_one_line(reason)}") from None


def _render(data: Any, indent: int = 0) -> str:
    """JSON with one line per item, where an item that fits into a line is not broken."""
    flat = json.dumps(data)
    if len(flat) + indent <= _LINE_WIDTH or not isinstance(data, (dict, list)):
        return flat
    inner = " " * (indent + 1)
    if isinstance(data, dict):
        lines = [f"{json.dumps(k)}: {_render(v, indent + 1)}" for k, v in data.items()]
    elif all(isinstance(item, (int, float)) for item in data):  # a constant: no line per number
        return flat
    else:
        lines = [_render(item, indent + 1) for item in data]
    left, right = "{}" if isinstance(data, dict) else "[]"
    body = f",\n{inner}".join(lines)
    return f"{left}\n{inner}{body}\n{' ' * indent}{right}"


def _one_line(text: object) -> str:
    """Printable and on one line, whatever a corrupt file put into names."""
    shown = "".join(c if c.isprintable() else " " for c in str(text))
    return shown if len(shown) <= 400 else shown[:400] + "…"


# --- the envelope ----------------------------------------------------------------------------


def _from_json(data: Any, kind: type[T]) -> T:
    what = _FORMATS[kind].removeprefix("shardwright-")
    if not isinstance(data, dict) or "format" not in data:
        raise InvalidInput(f"not a {what}: expected a JSON object with a 'format'")
    if data["format"] != _FORMATS[kind]:
        raise InvalidInput(f"format {_show(data['format'])}, expected {_FORMATS[kind]!r}")
    version = data.get("version")
    if type(version) is not int or version < 1:
        raise InvalidInput(f"version: got {_show(version)}, expected a number from 1 to {VERSION}")
    if version > VERSION:
        raise InvalidInput(
            f"written by a newer Shardwright ({what} format {version}, this one reads {VERSION}): "
            "upgrade"
        )
    body = {key: value for key, value in data.items() if key not in ("format", "version")}
    try:
        return _decode(body, kind, "")  # type: ignore[no-any-return]
    except RecursionError:
        raise InvalidInput(f"not a {what}: nested too deeply") from None


def _checked(check: Callable[[], None]) -> None:
    try:
        check()
    except InvalidInput as error:
        raise InvalidInput(f"inconsistent: {_one_line(error)}") from None


def _check_model(model: Model) -> None:
    for graph in (model.preamble, *model.blocks.values()):
        for op in graph.ops:
            if op.kind not in TABLE:
                raise InvalidInput(
                    f"op {op.name!r} is of kind {op.kind!r}, which this Shardwright does not know"
                )
    model.check()


# --- writing ---------------------------------------------------------------------------------


def _encode(value: Any, hint: Any) -> Any:
    """JSON data for a value in a place annotated with `hint`."""
    if hint is Any:
        return _encode_free(value)
    if hint is Rule:
        return str(value)
    if hint is NdType:
        return " ".join(f"{axis}={kind}" for axis, kind in value)
    if is_dataclass(hint):
        return _encode_fields(value, hint)
    arguments = get_args(hint)
    match get_origin(hint):
        case origin if origin is tuple:
            hints = _item_hints(arguments, len(value))
            return [_encode(item, h) for item, h in zip(value, hints, strict=True)]
        case origin if origin is Mapping:
            return _encode_mapping(value, arguments[1], sorted(value, key=_natural))
        case origin if origin in (Union, UnionType):
            kinds = [a for a in arguments if a is not NoneType]
            if value is None or len(kinds) > 1:
                return value
            return _encode(value, kinds[0])
        case _:
            return _encode_number(value) if hint in (int, float) else value


def _encode_fields(value: Any, cls: Any) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for field in fields(cls):
        item = getattr(value, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if item == default and type(item) is type(default):
            continue
        hint = _hints(cls)[field.name]
        if order := _ORDERS.get((cls, field.name)):
            data[field.name] = _encode_mapping(item, get_args(hint)[1], order(value))
        else:
            data[field.name] = _encode(item, hint)
    if cls is Segment and value.module:
        prefix = f"{value.module}."
        data["parameters"] = [
            p.removeprefix(value.module) if p.startswith(prefix) else p for p in value.parameters
        ]
    return data


def _encode_mapping(value: Mapping[str, Any], hint: Any, keys: Iterable[str]) -> dict[str, Any]:
    data = {key: _encode(value[key], hint) for key in keys}
    if _named_by_key(hint):
        for key, item in data.items():
            if item.pop("name") != key:
                raise InvalidInput(f"{key!r} holds {value[key].name!r}: the names differ")
    return data


_TUPLE, _FLOAT = "()", "float"
"""Keys that mark what JSON lacks, in places annotated `Any`: `{"()": [1, 2]}`."""


def _encode_free(value: Any) -> Any:
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, Mapping):
        if any(not isinstance(key, str) or key in (_TUPLE, _FLOAT) for key in value):
            raise InvalidInput(f"keys {list(value)} cannot be written as JSON")
        return {key: _encode_free(value[key]) for key in sorted(value, key=_natural)}
    if isinstance(value, tuple):
        return {_TUPLE: [_encode_free(item) for item in value]}
    if isinstance(value, list):
        return [_encode_free(item) for item in value]
    number = _encode_number(value)
    return {_FLOAT: number} if isinstance(number, str) else number


def _encode_number(value: Any) -> int | float | str:
    """A number, numpy's included; what is not finite is a string, as JSON has none."""
    if hasattr(value, "__index__"):
        return int(value)
    if not hasattr(value, "__float__"):
        raise InvalidInput(f"{type(value).__name__} {value!r} cannot be written as JSON")
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _natural(key: str) -> list[tuple[int, str]]:
    """Sorts `layers.2` before `layers.10`."""
    return [(int(p), "") if p.isdecimal() else (-1, p) for p in re.split(r"([0-9]+)", key)]


def _by_definition(graph: Graph) -> list[str]:
    made = (r for op in graph.ops for r in op.results)
    return _first(graph.values, (*graph.inputs, *graph.parameters, *made))


def _by_use(model: Model) -> list[str]:
    return _first(model.parameters, (p for s in model.segments for p in s.parameters))


def _first(keys: Iterable[str], wanted: Iterable[str]) -> list[str]:
    """`keys` in the order in which `wanted` names them, then the rest sorted."""
    known = set(keys)
    order = dict.fromkeys(key for key in wanted if key in known)
    return [*order, *sorted(known - order.keys(), key=_natural)]


_ORDERS: dict[tuple[type, str], Callable[[Any], list[str]]] = {
    (Graph, "values"): _by_definition,
    (Op, "sizes"): lambda op: _first(op.sizes, op.rule.factors),
    (Model, "blocks"): lambda model: _first(model.blocks, (s.block for s in model.segments)),
    (Model, "parameters"): _by_use,
}
"""Mappings whose canonical order is not the alphabet's; readers of the plan may rely on them."""


# --- reading ---------------------------------------------------------------------------------


def _decode(data: Any, hint: Any, path: str) -> Any:
    """The value for a place annotated with `hint`; `path` names the place in errors."""
    if hint is Any:
        return _decode_free(data, path)
    if hint is Rule or hint is NdType:
        text = _expect(data, str, "a string", path)
        try:
            return parse(text) if hint is Rule else _parse_type(text)
        except InvalidInput as error:
            raise InvalidInput(f"{path}: {_one_line(error)}") from None
    if is_dataclass(hint):
        return _decode_fields(data, hint, path)
    arguments = get_args(hint)
    match get_origin(hint):
        case origin if origin is tuple:
            items = _expect(data, list, "a list", path)
            hints = _item_hints(arguments, len(items))
            if len(hints) != len(items):
                raise InvalidInput(f"{path}: {len(items)} items, expected {len(hints)}")
            pairs = enumerate(zip(items, hints, strict=True))
            return tuple(_decode(item, h, f"{path}[{i}]") for i, (item, h) in pairs)
        case origin if origin is Mapping:
            named = _named_by_key(arguments[1])
            found = {}
            for key, item in _expect(data, dict, "an object", path).items():
                where = _at(path, key)
                if named:
                    item = {**_expect(item, dict, "an object", where), "name": key}
                found[key] = _decode(item, arguments[1], where)
            return found
        case origin if origin in (Union, UnionType):
            return _decode_union(data, arguments, path)
        case origin if origin is Literal:
            if data not in arguments or isinstance(data, bool):
                expected = ", ".join(map(repr, arguments))
                raise InvalidInput(f"{path}: got {_show(data)}, expected one of {expected}")
            return data
        case _:
            return _decode_scalar(data, hint, path)


def _decode_fields(data: Any, cls: Any, path: str) -> Any:
    items = _expect(data, dict, "an object", path or "the file")
    hints = _hints(cls)
    if unknown := items.keys() - hints.keys():
        raise InvalidInput(f"{_at(path, min(unknown))}: no such field in {cls.__name__}")
    values: dict[str, Any] = {}
    for field in fields(cls):
        where = _at(path, field.name)
        if field.name in items:
            values[field.name] = _decode(items[field.name], hints[field.name], where)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise InvalidInput(f"{where}: missing")
    if cls is Segment:
        module = values.get("module", "")
        values["parameters"] = tuple(
            module + p if p.startswith(".") else p for p in values["parameters"]
        )
    try:
        return cls(**values)
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {_one_line(error)}") from None


def _decode_union(data: Any, arguments: tuple[Any, ...], path: str) -> Any:
    if data is None and NoneType in arguments:
        return None
    kinds = [a for a in arguments if a is not NoneType]
    if len(kinds) == 1:
        return _decode(data, kinds[0], path)
    if type(data) not in kinds:
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise InvalidInput(f"{path}: got {_show(data)}, expected {expected}")
    return data


def _decode_scalar(data: Any, hint: Any, path: str) -> Any:
    if hint is float:
        if data in ("inf", "-inf", "nan"):
            return float(data)
        if type(data) not in (int, float) or not math.isfinite(_float(data, path)):
            raise InvalidInput(f"{path}: got {_show(data)}, expected a number")
        return float(data)
    name = {int: "an integer", str: "a string", bool: "true or false"}[hint]
    return _expect(data, hint, name, path)


def _float(data: int | float, path: str) -> float:
    try:
        return float(data)
    except OverflowError:
        raise InvalidInput(f"{path}: a number of {len(str(data))} digits") from None


def _decode_free(data: Any, path: str) -> Any:
    if isinstance(data, dict):
        if data.keys() == {_TUPLE}:
            return tuple(_decode_free(_expect(data[_TUPLE], list, "a list", path), path))
        if data.keys() == {_FLOAT}:
            return _decode_scalar(data[_FLOAT], float, path)
        return {key: _decode_free(item, _at(path, key)) for key, item in data.items()}
    if isinstance(data, list):
        return [_decode_free(item, f"{path}[{i}]") for i, item in enumerate(data)]
    return _decode_scalar(data, float, path) if isinstance(data, float) else data


def _parse_type(text: str) -> NdType:
    axes: dict[str, AxisType] = {}
    for item in text.split():
        axis, equals, kind = item.partition("=")
        if not equals or not axis or axis in axes:
            raise InvalidInput(f"type {text!r}: expected 'axis=type', each axis once, got {item!r}")
        axes[axis] = AxisType.parse(kind)
    return NdType.of(axes)


def _expect(data: Any, kind: type[T], name: str, path: str) -> T:
    if type(data) is not kind:
        raise InvalidInput(f"{path}: got {_show(data)}, expected {name}")
    return data


def _show(data: Any) -> str:
    if isinstance(data, dict):
        return "an object"
    if isinstance(data, list):
        return f"a list of {len(data)}"
    text = ascii(data) if isinstance(data, str) else json.dumps(data)
    return text if len(text) <= 60 else text[:60] + "…"


def _at(path: str, key: str) -> str:
    if not key.isidentifier():
        return f"{path}[{key!a}]"
    return f"{path}.{key}" if path else key


def _item_hints(arguments: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return (arguments[0],) * count
    return arguments


def _named_by_key(hint: Any) -> bool:
    """Whether a mapping's items carry their key as `name`."""
    return isinstance(hint, type) and is_dataclass(hint) and "name" in _hints(hint)


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)
