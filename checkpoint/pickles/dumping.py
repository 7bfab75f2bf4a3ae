"""The pickler: writes what `loads` makes, byte for byte as torch.save would say it.

Protocol 2 with the opcodes that torch.load(weights_only=True) knows. Stand-ins are written under
the names they stand for, so that who has the classes gets the objects.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any

from ...ir import InvalidInput
from ..dtypes import itemsize
from .foreign import (
    MISSING,
    STORAGE_DTYPES,
    Named,
    Ordered,
    Size,
    StandIn,
    Storage,
    Tensor,
    has_typed_storage,
    named,
    torch_name,
)

_TENSOR = named("torch._utils", "_rebuild_tensor_v2")
_TENSOR_OF = named("torch._utils", "_rebuild_tensor_v3")
_PARAMETER = named("torch._utils", "_rebuild_parameter")
_FROM_TYPE = named("torch._tensor", "_rebuild_from_type_v2")
_TENSOR_TYPE = named("torch", "Tensor")
_PARAMETER_TYPE = named("torch.nn.parameter", "Parameter")
_ORDERED = named("collections", "OrderedDict")
_SIZE = named("torch", "Size")
_ENCODE = named("_codecs", "encode")
_BUILTIN = "__builtin__"  # as protocol 2 calls it


_LIBRARIES = (
    "torch", "numpy", "collections", "argparse", "pathlib", "datetime", "signal", "deepspeed",
    "megatron", "transformers", "accelerate",
)  # fmt: skip
"""Whose classes a pickle of ours may call."""

_FUNCTIONS = {
    "torch.device", "torch.dtype", "torch.serialization._get_layout",
    "numpy.dtype", "numpy.core.multiarray._reconstruct", "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct", "numpy._core.multiarray.scalar",
    "collections.defaultdict", "collections.deque", "datetime.datetime", "datetime.timedelta",
}  # fmt: skip
"""What is no class by its name, and makes nothing but values; so do torch's `_rebuild_…`."""


def check_called(kind: Any) -> None:
    """Raises InvalidInput for what a pickle must not call when it is loaded.

    A checkpoint may name any function, and who reads it here runs none; written on into another
    pickle, `os.system` would run in the job that loads that.
    """
    full = f"{kind.module}.{kind.name}"
    is_class = kind.name.rpartition(".")[2].lstrip("_")[:1].isupper()
    if full in _FUNCTIONS or full.startswith(("torch._utils._rebuild", "torch._tensor._rebuild")):
        return
    if not is_class or kind.module.partition(".")[0] not in _LIBRARIES:
        raise InvalidInput(
            f"the source holds a call of {full}, which would run when the target is loaded; if "
            "that is meant, remove it from the source: only values, and classes of "
            f"{', '.join(_LIBRARIES)}, are written into pickles"
        )


def dumps(value: Any) -> tuple[bytes, list[Storage]]:
    """The pickle of a value, and the storages of its tensors in the order of their keys.

    Raises InvalidInput for values that `loads` does not make.
    """
    pickler = _Pickler()
    pickler.save(value)
    pickler.out.append(b".")
    return b"".join(pickler.out), list(pickler.storages)


class _Pickler:
    def __init__(self) -> None:
        self.out: list[bytes] = [b"\x80\x02"]
        self.storages: dict[Storage, str] = {}
        self._memo: dict[Any, int] = {}
        self._kept: list[Any] = []  # what is in the memo by id must not be freed

    def save(self, value: Any) -> None:
        if value is None or value is True or value is False:
            self.out.append({None: b"N", True: b"\x88", False: b"\x89"}[value])
        elif isinstance(value, Named):
            self._named(value)
        elif type(value) is int:
            self.out.append(_integer(value))
        elif type(value) is float:
            self.out.append(b"G" + struct.pack(">d", value))
        elif type(value) is str:
            self._text(value)
        elif type(value) is tuple:
            self._tuple(value)
        elif not self._seen(id(value)):
            self._object(value)

    def _object(self, value: Any) -> None:
        """What may be shared by reference."""
        if type(value) is list:
            self._begin(value, b"]")
            self._items(value)
        elif type(value) is dict:
            self._begin(value, b"}")
            self._pairs(value.items())
        elif type(value) is Ordered:
            self._call(value, _ORDERED, ())
            self._pairs(value.items())
            if value.attributes is not None:
                self.save(value.attributes)
                self.out.append(b"b")
        elif type(value) is Size:
            self._call(value, _SIZE, (tuple(value),))
        elif type(value) is bytes:
            self._call(value, _ENCODE, (value.decode("latin1"), "latin1"))
        elif isinstance(value, Tensor):
            self._tensor(value)
        elif isinstance(value, Storage):
            self._storage(value)
        elif isinstance(value, StandIn):
            self._stand_in(value)
        elif type(value) in (set, frozenset):
            self._call(value, named(_BUILTIN, type(value).__name__), (sorted(value, key=repr),))
        elif type(value) is bytearray:
            self._call(value, named(_BUILTIN, "bytearray"), (bytes(value),))
        elif type(value) is complex:
            self._call(value, named(_BUILTIN, "complex"), (value.real, value.imag))
        else:
            raise InvalidInput(f"a value of {type(value)} cannot be written into a pickle")

    def _stand_in(self, value: StandIn) -> None:
        kind: Any = type(value)
        if value.kwargs:
            raise InvalidInput(f"{kind!r}: made with keywords, which torch's pickles cannot say")
        if value.called:
            check_called(kind)
            self._call(value, kind, value.args)
        else:
            self.save(kind)
            self.save(value.args)
            self.out.append(b"\x81")
            self._remember(value)
        self._items(value.items)
        self._pairs(value.pairs)
        if value.state is not MISSING:
            self.save(value.state)
            self.out.append(b"b")

    def _tensor(self, value: Tensor) -> None:
        function, args = _made_of(value)
        if value.attributes is None:
            self._call(value, function, args)
        else:
            kind = _PARAMETER_TYPE if value.parameter else _TENSOR_TYPE
            self._call(value, _FROM_TYPE, (function, kind, args, value.attributes))

    def _storage(self, value: Storage) -> None:
        key = self.storages.setdefault(value, str(len(self.storages)))
        module, name = value.kind.rsplit(".", 1)
        numel = value.nbytes // itemsize(STORAGE_DTYPES[value.kind])
        self.save(("storage", named(module, name), key, value.location, numel))
        self.out.append(b"Q")

    def _call(self, value: Any, kind: Any, args: tuple[Any, ...]) -> None:
        self.save(kind)
        self.save(args)
        self.out.append(b"R")
        self._remember(value)

    def _named(self, value: Named) -> None:
        if self._seen(value):
            return
        if "\n" in value.module + value.name:
            raise InvalidInput(f"{value!r}: a name with a line break")
        self.out.append(f"c{value.module}\n{value.name}\n".encode())
        self._put(value)

    def _text(self, value: str) -> None:
        if self._seen(value):
            return
        data = value.encode("utf-8", "surrogatepass")
        self.out.append(b"X" + struct.pack("<I", len(data)) + data)
        self._put(value)

    def _tuple(self, value: tuple[Any, ...]) -> None:
        if not value:
            self.out.append(b")")
            return
        if self._seen(id(value)):
            return
        if len(value) > 3:
            self.out.append(b"(")
        for item in value:
            self.save(item)
        self.out.append((b"\x85", b"\x86", b"\x87")[len(value) - 1] if len(value) <= 3 else b"t")
        self._remember(value)

    def _items(self, items: list[Any]) -> None:
        if items:
            self.out.append(b"(")
            for item in items:
                self.save(item)
            self.out.append(b"e")

    def _pairs(self, pairs: Iterable[tuple[Any, Any]]) -> None:
        listed = list(pairs)
        if listed:
            self.out.append(b"(")
            for key, value in listed:
                self.save(key)
                self.save(value)
            self.out.append(b"u")

    def _begin(self, value: Any, opcode: bytes) -> None:
        self.out.append(opcode)
        self._remember(value)

    def _seen(self, key: Any) -> bool:
        at = self._memo.get(key)
        if at is None:
            return False
        self.out.append(bytes((0x68, at)) if at < 256 else b"j" + struct.pack("<I", at))
        return True

    def _remember(self, value: Any) -> None:
        self._kept.append(value)
        self._put(id(value))

    def _put(self, key: Any) -> None:
        at = len(self._memo)
        self._memo[key] = at
        self.out.append(bytes((0x71, at)) if at < 256 else b"r" + struct.pack("<I", at))


def _made_of(value: Tensor) -> tuple[Any, tuple[Any, ...]]:
    """The function and arguments that make a tensor."""
    view = (value.storage, value.offset, value.shape, value.stride)
    if value.parameter:
        plain = Tensor(value.storage, value.dtype, value.shape, value.stride, value.offset)
        return _PARAMETER, (plain, value.requires_grad, Ordered())
    if has_typed_storage(value.dtype) and STORAGE_DTYPES[value.storage.kind] == value.dtype:
        return _TENSOR, (*view, value.requires_grad, Ordered())
    return _TENSOR_OF, (*view, value.requires_grad, Ordered(), torch_name(value.dtype))


def _integer(value: int) -> bytes:
    if 0 <= value < 256:
        return bytes((0x4B, value))
    if 0 <= value < 65536:
        return b"M" + struct.pack("<H", value)
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes((value.bit_length() >> 3) + 1, "little", signed=True)
    if len(data) > 255:
        raise InvalidInput(f"an integer of {len(data)} bytes cannot be written into a pickle")
    return b"\x8a" + bytes((len(data),)) + data
