"""The restricted unpickler: values, descriptions of tensors and stand-ins out of any pickle.

The standard unpickler asks for every global by name. It gets a `Named` and nothing else, so that
REDUCE, NEWOBJ and BUILD reach only classes of this package. A few names make plain values.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

from ...ir import CorruptCheckpoint
from ..dtypes import itemsize
from .foreign import (
    STORAGE_DTYPES,
    UNTYPED,
    Named,
    Ordered,
    Size,
    StandIn,
    Storage,
    Tensor,
    named,
    torch_dtype,
)

Find = Callable[[str, str, str, int], Storage]
"""(key, kind of storage, location, bytes) → the storage; raises CorruptCheckpoint if there is
none."""


def loads(data: bytes, what: str, find: Find | None = None) -> Any:
    """The value of a pickle; nothing of it is run.

    `what` names the file in errors, `find` gives the storages of tensors. Raises CorruptCheckpoint
    for whatever is no pickle, or refers to what is not there.
    """
    file = io.BytesIO(data)
    try:
        value = _Restricted(_Source(file), what, find).load()
    except CorruptCheckpoint:
        raise
    except Exception as error:  # a damaged pickle makes the unpickler raise anything
        raise CorruptCheckpoint(
            f"{what}: its pickle is damaged or none ({type(error).__name__}: {error}); "
            "restore the file from another copy"
        ) from None
    if file.tell() != len(data):
        raise CorruptCheckpoint(
            f"{what}: its pickle ends {len(data) - file.tell()} bytes early; restore the file from "
            "another copy"
        )
    return value


class _Source:
    """What the unpickler reads: without `readinto`, on which CPython leaves a view of a bytearray
    behind where the data end inside it, and says so on stderr."""

    def __init__(self, file: io.BytesIO) -> None:
        self.read, self.readline = file.read, file.readline


class _Restricted(pickle.Unpickler):
    def __init__(self, file: _Source, what: str, find: Find | None) -> None:
        super().__init__(file, encoding="latin1")
        self._what = what
        self._find = find
        self._known: dict[tuple[str, str], Any] = {}
        self._storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        key = (module, name)
        if key not in self._known:
            self._known[key] = named(module, name, _MAKERS.get(key))
        return self._known[key]

    def persistent_load(self, pid: Any) -> Any:
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage"):
            raise CorruptCheckpoint(f"{self._what}: refers to {pid!r}, which is no storage")
        _, kind, key, location, numel = pid
        name = f"{kind.module}.{kind.name}" if isinstance(kind, Named) else str(kind)
        if name not in STORAGE_DTYPES:
            raise CorruptCheckpoint(f"{self._what}: a storage of the unknown type {name}")
        typed = type(key) is str and type(location) is str and type(numel) is int
        if not typed or numel < 0:
            raise CorruptCheckpoint(f"{self._what}: refers to {pid!r}, which is no storage")
        if self._find is None:
            raise CorruptCheckpoint(f"{self._what}: holds tensors where none are expected")
        nbytes = numel * itemsize(STORAGE_DTYPES[name])
        if key not in self._storages:
            self._storages[key] = self._find(key, name, location, nbytes)
        found = self._storages[key]
        if (found.kind, found.nbytes) != (name, nbytes):
            raise CorruptCheckpoint(
                f"{self._what}: storage {key} as {numel} elements of {name} and as "
                f"{found.nbytes} bytes of {found.kind}"
            )
        return found


def _tensor(
    storage: Any, dtype: str, offset: Any, size: Any, stride: Any, requires_grad: Any
) -> Tensor:
    """Checks that a view lies inside its storage."""
    numbers = [offset, *size, *stride]
    if len(size) != len(stride) or not all(type(n) is int and n >= 0 for n in numbers):
        raise CorruptCheckpoint(f"a tensor of shape {size!r}, strides {stride!r}, at {offset!r}")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if prod(size) and (last + 1) * itemsize(dtype) > storage.nbytes:
        raise CorruptCheckpoint(
            f"a tensor of shape {tuple(size)}, strides {tuple(stride)} at {offset} reaches beyond "
            f"its storage of {storage.nbytes} bytes"
        )
    return Tensor(storage, dtype, tuple(size), tuple(stride), offset, bool(requires_grad))


def _rebuild_tensor_v2(*args: Any) -> Any:
    """(storage, offset, size, stride, requires_grad, hooks); other forms stay stand-ins."""
    if len(args) != 6 or not isinstance(args[0], Storage) or args[0].kind == UNTYPED or args[5]:
        return NotImplemented
    return _tensor(args[0], STORAGE_DTYPES[args[0].kind], *args[1:5])


def _rebuild_tensor_v3(*args: Any) -> Any:
    """(storage, offset, size, stride, requires_grad, hooks, dtype)."""
    if len(args) != 7 or not isinstance(args[0], Storage) or args[5]:
        return NotImplemented
    dtype = torch_dtype(args[6])
    return NotImplemented if dtype is None else _tensor(args[0], dtype, *args[1:5])


def _rebuild_parameter(*args: Any) -> Any:
    """(tensor, requires_grad, hooks)."""
    if len(args) != 3 or not isinstance(args[0], Tensor) or args[2]:
        return NotImplemented
    t = args[0]
    return Tensor(t.storage, t.dtype, t.shape, t.stride, t.offset, bool(args[1]), True)


def _rebuild_from_type(*args: Any) -> Any:
    """(function, type, its arguments, attributes): a plain tensor with attributes."""
    if len(args) != 4 or not isinstance(args[0], Named) or not isinstance(args[1], Named):
        return NotImplemented
    kind = f"{args[1].module}.{args[1].name}"
    if kind not in ("torch.Tensor", "torch.nn.parameter.Parameter") or args[0].maker is None:
        return NotImplemented
    made = args[0].maker(*args[2]) if isinstance(args[2], tuple) else None
    if not isinstance(made, Tensor) or made.parameter != (kind != "torch.Tensor"):
        return NotImplemented
    return replace(made, attributes=args[3])


def _size(*args: Any) -> Any:
    plain = len(args) == 1 and isinstance(args[0], (tuple, list))
    return Size(args[0]) if plain and all(type(n) is int for n in args[0]) else NotImplemented


def _ordered(*args: Any) -> Any:
    return Ordered(*args) if len(args) <= 1 and not any(map(_foreign, args)) else NotImplemented


def _encoded(*args: Any) -> Any:
    """How protocol 2 says bytes."""
    if len(args) == 2 and type(args[0]) is str and args[1] in ("latin1", "latin-1"):
        return args[0].encode("latin1")
    return NotImplemented


def _plain(kind: type, limit: int = 1) -> Callable[..., Any]:
    """A builtin of plain values, made of plain values only."""

    def make(*args: Any) -> Any:
        allowed = (list, tuple, set, bytes) if limit == 1 else (int, float)
        if len(args) > limit or not all(type(arg) in allowed for arg in args):
            return NotImplemented
        return kind(*args)

    return make


def _foreign(value: Any) -> bool:
    return isinstance(value, (Named, StandIn))


_MAKERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    ("torch", "Size"): _size,
    ("collections", "OrderedDict"): _ordered,
    ("_codecs", "encode"): _encoded,
    **{
        (module, kind.__name__): _plain(kind, limit)
        for module in ("builtins", "__builtin__")
        for kind, limit in ((set, 1), (frozenset, 1), (bytearray, 1), (bytes, 1), (complex, 2))
    },
}
"""Names that make plain values, all of them without effects."""
