"""Any value of a pickle as JSON, and back: what a job carries through formats that say only JSON.

Plain values stay as they are; everything else is an object with one key that begins with `$`.
Dicts whose keys are not all text (or begin with `$`) are lists of pairs. Tensors carry their bytes,
so only small ones can be encoded.
"""

from __future__ import annotations

import base64
import math
from typing import Any

from ...ir import CorruptCheckpoint, InvalidInput
from .foreign import MISSING, Named, Ordered, Size, StandIn, Storage, Tensor, hole, named

_DEPTH = 200


def encode(value: Any, depth: int = 0) -> Any:
    """A value as JSON; raises InvalidInput for what holds itself, and for tensors whose bytes are
    not at hand."""
    if depth > _DEPTH:
        raise InvalidInput("a value that holds itself, or nested deeper than any job's state")
    below = depth + 1

    def many(items: Any) -> list[Any]:
        return [encode(item, below) for item in items]

    def pairs(items: Any) -> list[Any]:
        return [[encode(k, below), encode(v, below)] for k, v in items]

    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if type(value) is list:
        return many(value)
    if type(value) is dict:
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: encode(item, below) for key, item in value.items()}
        return {"$dict": pairs(value.items())}
    if type(value) is Ordered:
        return {"$ordered": pairs(value.items()), "attributes": encode(value.attributes, below)}
    for kind, tag in _SEQUENCES.items():
        if type(value) is kind:
            return {tag: many(value)}
    if type(value) in (bytes, bytearray):
        return {f"${type(value).__name__}": base64.b64encode(value).decode()}
    if type(value) is complex:
        return {"$complex": [encode(value.real), encode(value.imag)]}
    if isinstance(value, Named):
        return {"$name": [value.module, value.name]}
    if isinstance(value, Tensor):
        return _encoded_tensor(value)
    if isinstance(value, Storage):
        raise InvalidInput("a storage without a tensor cannot be written as JSON")
    if isinstance(value, StandIn):
        kind = type(value)
        assert isinstance(kind, Named)
        made: dict[str, Any] = {"$object": [kind.module, kind.name], "args": many(value.args)}
        if value.kwargs:
            made["kwargs"] = encode(value.kwargs, below)
        if value.called:
            made["called"] = True
        if value.state is not MISSING:
            made["state"] = encode(value.state, below)
        if value.items:
            made["items"] = many(value.items)
        if value.pairs:
            made["pairs"] = pairs(value.pairs)
        return made
    raise InvalidInput(f"a value of {type(value)} cannot be written as JSON")


_SEQUENCES: dict[type, str] = {
    tuple: "$tuple", Size: "$size", set: "$set", frozenset: "$frozenset",
}  # fmt: skip


def _encoded_tensor(value: Tensor) -> Any:
    """Contiguous, whatever it viewed."""
    if value.storage.data is None:
        raise InvalidInput(f"a tensor of shape {value.shape} is too large to be written as JSON")
    made: dict[str, Any] = {
        "$tensor": value.dtype,
        "shape": list(value.shape),
        "data": base64.b64encode(value.array().tobytes()).decode(),
    }
    for flag in ("requires_grad", "parameter"):
        if getattr(value, flag):
            made[flag] = True
    if value.attributes is not None:
        made["attributes"] = encode(value.attributes)
    if value.storage.location != "cpu":
        made["location"] = value.storage.location
    return made


def decode(value: Any) -> Any:
    """What `encode` encoded; raises CorruptCheckpoint for what it never writes."""
    try:
        return _decoded(value)
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptCheckpoint(f"a value that was not encoded here ({error!r})") from None


def _decoded(value: Any) -> Any:
    if type(value) is list:
        return [_decoded(item) for item in value]
    if type(value) is not dict:
        return value
    tag = next(iter(value), "")
    if not tag.startswith("$"):
        return {key: _decoded(item) for key, item in value.items()}
    held = value[tag]
    for kind, name in _SEQUENCES.items():
        if tag == name:
            return kind(_decoded(item) for item in held)
    if tag == "$float":
        return float(held)
    if tag == "$dict":
        return {_decoded(k): _decoded(v) for k, v in held}
    if tag == "$ordered":
        made = Ordered((_decoded(k), _decoded(v)) for k, v in held)
        made.attributes = _decoded(value["attributes"])
        return made
    if tag in ("$bytes", "$bytearray"):
        data = base64.b64decode(held, validate=True)
        return data if tag == "$bytes" else bytearray(data)
    if tag == "$complex":
        return complex(*(_decoded(part) for part in held))
    if tag == "$name":
        return named(*held)
    if tag == "$tensor":
        return _decoded_tensor(value)
    if tag == "$object":
        return _decoded_object(value)
    raise ValueError(f"unknown kind {tag!r}")


def _decoded_tensor(value: dict[str, Any]) -> Tensor:
    like = hole(value["$tensor"], value["shape"])
    data = base64.b64decode(value["data"], validate=True)
    if len(data) != like.storage.nbytes:
        raise ValueError(f"{len(data)} bytes for a tensor of {like.storage.nbytes}")
    storage = Storage(
        like.storage.kind, len(data), data=data, location=value.get("location", "cpu")
    )
    flags = (value.get("requires_grad", False), value.get("parameter", False))
    attributes = _decoded(value.get("attributes"))
    return Tensor(storage, like.dtype, like.shape, like.stride, 0, *flags, attributes)


def _decoded_object(value: dict[str, Any]) -> StandIn:
    kind = named(*value["$object"])
    made: StandIn = kind.__new__(kind, *_decoded(value["args"]))
    made.kwargs = _decoded(value.get("kwargs", {}))
    made.called = value.get("called", False)
    made.state = _decoded(value["state"]) if "state" in value else MISSING
    made.items = _decoded(value.get("items", []))
    made.pairs = [(_decoded(k), _decoded(v)) for k, v in value.get("pairs", [])]
    return made
