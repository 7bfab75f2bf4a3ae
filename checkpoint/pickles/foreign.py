"""What a pickle may become here: plain values, descriptions of tensors, and inert stand-ins.

Every class and function that a pickle names is a `Named`: a class of ours that remembers the name
and does nothing. What the pickle makes of it is a `StandIn`, which remembers arguments, state and
items, and can be written back under the same name. Nothing that a pickle can reach is callable
save these, so it cannot run anything, whatever it says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

from ...ir import CorruptCheckpoint
from ..boxes import row_major
from ..contents import Record
from ..dtypes import as_numpy, itemsize

MISSING: Any = type("Missing", (), {"__slots__": (), "__repr__": lambda _: "MISSING"})()
"""No state: a pickle may set None as a state."""


class Named(type):
    """A class or function that a pickle names; two of the same name are equal.

    As a class it can be called and instantiated, which makes stand-ins (or one of the values of
    `makers`); as a value it is the name itself (`torch.float32`).
    """

    module: str
    name: str
    maker: Callable[..., Any] | None

    def __call__(cls, *args: Any) -> Any:
        if cls.maker is not None:
            made = cls.maker(*args)
            if made is not NotImplemented:
                return made
        made = StandIn.__new__(cls, *args)  # type: ignore[arg-type]
        made.called = True
        return made

    def __setattr__(cls, key: str, value: Any) -> None:
        raise TypeError(f"{cls.module}.{cls.name} is a stand-in: it has no attributes to set")

    def __eq__(cls, other: object) -> bool:
        return isinstance(other, Named) and (cls.module, cls.name) == (other.module, other.name)

    def __hash__(cls) -> int:
        return hash((cls.module, cls.name))

    def __repr__(cls) -> str:
        return f"<{cls.module}.{cls.name}>"


class StandIn:
    """An object of a foreign class, inert.

    `args` and `kwargs` it was made with (`called`: by a call, else by `__new__`), the `state` that
    was set (MISSING if none), `items` appended and `pairs` set by key.
    """

    __slots__ = ("args", "called", "items", "kwargs", "pairs", "state")
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    called: bool
    state: Any
    items: list[Any]
    pairs: list[tuple[Any, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> StandIn:
        made = object.__new__(cls)
        made.args, made.kwargs, made.called, made.state = args, kwargs, False, MISSING
        made.items, made.pairs = [], []
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        object.__setattr__(self, "state", state)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("stand-ins are written by `dumps` only")

    def append(self, item: Any) -> None:
        """What APPEND does to a foreign list."""
        self.items.append(item)

    def extend(self, items: Any) -> None:
        """What APPENDS does to a foreign list."""
        self.items.extend(items)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.pairs.append((key, value))

    def __repr__(self) -> str:
        return f"{type(self)!r}{self.args!r}"


def named(module: str, name: str, maker: Callable[..., Any] | None = None) -> Any:
    """The stand-in of a class or function of that name."""
    return Named(
        name, (StandIn,), {"__slots__": (), "module": module, "name": name, "maker": maker}
    )


def stand_in(
    module: str, name: str, *args: Any, state: Any = MISSING, called: bool = False
) -> StandIn:
    """A foreign object to be written: made of `args` by `__new__` (or by a call), then `state`."""
    made = StandIn.__new__(named(module, name), *args)
    made.state, made.called = state, called
    return made


class Size(tuple[int, ...]):
    """A torch.Size."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise TypeError("torch.Size has no state")


class Ordered(dict[Any, Any]):
    """An OrderedDict, with the attributes that torch's state_dicts carry (`_metadata`)."""

    __slots__ = ("attributes",)
    attributes: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.attributes = None

    def __setstate__(self, state: Any) -> None:
        self.attributes = state


@dataclass(frozen=True, eq=False)
class Storage:
    """Bytes that tensors view: in a file (`record`), at hand (`data`), or not there yet (neither).

    `kind` is the name of the type under which torch writes it (`torch.FloatStorage`).
    """

    kind: str
    nbytes: int
    record: Record | None = None
    data: bytes | None = field(default=None, repr=False)
    location: str = "cpu"

    def __setstate__(self, state: Any) -> None:
        raise TypeError("a storage has no state")


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor described: a view of a storage; `offset` and `stride` count elements of `dtype`.

    `attributes` are Python attributes that someone hung on it, and that torch pickles with it.
    """

    storage: Storage
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0
    requires_grad: bool = False
    parameter: bool = False
    attributes: Any = None

    def __setstate__(self, state: Any) -> None:
        raise TypeError("a tensor description has no state")

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def array(self) -> np.ndarray[Any, Any]:
        """The values (the storage's bytes must be at hand)."""
        assert self.storage.data is not None
        dtype = as_numpy(self.dtype)
        flat = np.frombuffer(self.storage.data, dtype)[self.offset :]
        strides = tuple(s * dtype.itemsize for s in self.stride)
        return np.lib.stride_tricks.as_strided(flat, self.shape, strides, writeable=False)


_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL", "ComplexFloatStorage": "C64",
}  # fmt: skip
UNTYPED = "torch.storage.UntypedStorage"
STORAGE_DTYPES = {f"torch.{kind}": dtype for kind, dtype in _STORAGES.items()} | {UNTYPED: "U8"}
"""Dtypes by the storage type's name."""
_KINDS = {dtype: f"torch.{kind}" for kind, dtype in _STORAGES.items()}

_TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
    "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
    "C64": "complex64", "U16": "uint16", "U32": "uint32", "U64": "uint64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
_FROM_TORCH = {name: dtype for dtype, name in _TORCH_NAMES.items()}


def torch_dtype(value: Any) -> str | None:
    """`F32` of a named `torch.float32`; None for what is no dtype we know."""
    if isinstance(value, Named) and value.module == "torch":
        return _FROM_TORCH.get(value.name)
    return None


def torch_name(dtype: str) -> Any:
    """`torch.float32` of `F32`, as a pickle names it."""
    return named("torch", _TORCH_NAMES[dtype])


def has_typed_storage(dtype: str) -> bool:
    """Whether torch writes tensors of this dtype with a storage of the same type."""
    return dtype in _KINDS


def hole(dtype: str, shape: Sequence[int], parameter: bool = False) -> Tensor:
    """A contiguous tensor whose bytes come later."""
    storage = Storage(_KINDS.get(dtype, UNTYPED), prod(shape) * itemsize(dtype))
    return Tensor(
        storage, dtype, tuple(shape), row_major(shape), requires_grad=parameter, parameter=parameter
    )


def small(dtype: str, values: Any) -> Tensor:
    """A tensor whose values are known."""
    array = np.ascontiguousarray(np.asarray(values, as_numpy(dtype)))
    shape = np.shape(values)
    storage = Storage(_KINDS.get(dtype, UNTYPED), array.nbytes, data=array.tobytes())
    return Tensor(storage, dtype, shape, row_major(shape))


def scalar(value: Any) -> int | float | bool | None:
    """A number that was written as one or as a tensor of one element at hand; None otherwise."""
    if isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Tensor) and value.numel == 1 and value.storage.data is not None:
        found: int | float | bool = value.array().item()
        return found
    return None


def fields_of(value: Any) -> Mapping[str, Any]:
    """The attributes of a foreign object: its state (with the part in slots, if there is one)."""
    state = value.state if isinstance(value, StandIn) else None
    if isinstance(state, tuple) and len(state) == 2:
        parts = [part for part in state if isinstance(part, dict)]
        return {k: v for part in parts for k, v in part.items()}
    return state if isinstance(state, dict) else {}


def mapping_of(value: Any, what: str) -> Mapping[Any, Any]:
    """A dict, OrderedDict or foreign mapping; raises CorruptCheckpoint saying `what` is none."""
    if isinstance(value, dict):
        return value
    if isinstance(value, StandIn) and (value.pairs or value.called):
        return dict(value.pairs)
    raise CorruptCheckpoint(f"{what}: expected a mapping, found {type(value).__name__}")


def sequence_of(value: Any, what: str) -> Sequence[Any]:
    """A list or tuple; raises CorruptCheckpoint saying `what` is none."""
    if isinstance(value, (list, tuple)):
        return value
    raise CorruptCheckpoint(f"{what}: expected a list, found {type(value).__name__}")


def same(one: Any, other: Any) -> bool:
    """Whether two values say the same: by structure, tensors by view and bytes at hand."""
    if isinstance(one, Named) or isinstance(other, Named):
        return bool(isinstance(one, Named) and one == other)
    if isinstance(one, StandIn) and isinstance(other, StandIn):
        return hash(type(one)) == hash(type(other)) and all(
            same(*pair) for pair in _sides(one, other)
        )
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        views = ("dtype", "shape", "stride", "offset", "requires_grad", "parameter", "attributes")
        return all(getattr(one, v) == getattr(other, v) for v in views) and same(
            one.storage, other.storage
        )
    if isinstance(one, Storage) and isinstance(other, Storage):
        return (one.kind, one.nbytes, one.data) == (other.kind, other.nbytes, other.data)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        equal = len(one) == len(other) and all(
            same(k, m) and same(v, w)
            for (k, v), (m, w) in zip(one.items(), other.items(), strict=True)
        )
        return equal and (not isinstance(one, Ordered) or same(one.attributes, other.attributes))
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        return bool(one == other) or (one != one and other != other)
    return bool(one == other)


def _sides(one: StandIn, other: StandIn) -> Iterator[tuple[Any, Any]]:
    for name in ("args", "kwargs", "called", "items", "pairs"):
        yield getattr(one, name), getattr(other, name)
    yield one.state, other.state
