"""DCP's data files: the bytes of a chunk inside its item, the values of objects."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from ....ir import CorruptCheckpoint
from ...boxes import Boxes, row_major
from ...contents import Record
from ...dtypes import itemsize
from ...paths import within
from ...pickles import Span, Storage, Tensor, TorchFile
from .metadata import FILE, Item, StoredTensor

ALIGNMENT_BYTES = 64
"""On what items begin, where a writer aligns them (we do, torch does not)."""

SMALL_BYTES = 1 << 20
"""Up to which size tensors beside the model (RNG states, counters) are read as values."""


@dataclass
class Files:
    """The data files of a checkpoint, opened as they are asked for; a context manager."""

    root: Path
    records: list[Record] = field(default_factory=list)
    unread: list[Record] = field(default_factory=list)
    """Storages of all items that were opened, whose CRCs nobody has checked yet."""
    _open: dict[str, BinaryIO] = field(default_factory=dict)
    _stack: ExitStack = field(default_factory=ExitStack)
    _headers: dict[tuple[str, int], tuple[int, Any]] = field(default_factory=dict)

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def check(self, items: Iterable[Item]) -> None:
        """Items fill their files: neither overlap, nor end early, nor leave bytes over.

        Raises CorruptCheckpoint for files that are missing, truncated, or of another save than
        `.metadata` (DCP removes the old index only when it writes the new one).
        """
        ends: dict[str, int] = {}
        # All tensors of a safetensors part have its beginning as their place.
        items = [self._whole(item) for item in items]
        for item in sorted(set(items), key=lambda item: (item.file, item.offset, item.nbytes)):
            if item.nbytes and item.offset < ends.get(item.file, 0):
                raise CorruptCheckpoint(
                    f"{self.root / FILE}: items overlap in {item.file} at byte {item.offset}"
                )
            self._check_gap(item, ends.get(item.file, 0))
            ends[item.file] = max(ends.get(item.file, 0), item.offset + item.nbytes)
        for name, end in ends.items():
            path = within(self.root, name)
            if not path.is_file():
                raise CorruptCheckpoint(
                    f"{path}: missing; {FILE} names it. Restore it from another copy, or load an "
                    "earlier checkpoint"
                )
            found = path.stat().st_size
            if found != end:
                raise CorruptCheckpoint(
                    f"{path}: {found} bytes, {FILE} accounts for {end}: it is truncated, or the "
                    "index is of another save than the data; load an earlier checkpoint"
                )

    def _check_gap(self, item: Item, begin: int) -> None:
        """Between items are zeros that align the next, if anything: all else is of no item."""
        nbytes = item.offset - begin
        if nbytes <= 0 or not within(self.root, item.file).is_file():
            return
        if nbytes >= ALIGNMENT_BYTES or any(
            Span(self.opened(item.file), item.file).read(begin, nbytes)
        ):
            raise CorruptCheckpoint(
                f"{self.root / item.file}: bytes {begin} to {item.offset} are of no item and no "
                f"padding: it is damaged, or {FILE} is of another save"
            )

    def _whole(self, item: Item) -> Item:
        """The safetensors part that an item is in, or the item."""
        if not within(self.root, item.file).is_file() or not self._is_safetensors(item):
            return item
        return replace(item, nbytes=within(self.root, item.file).stat().st_size - item.offset)

    def _is_safetensors(self, item: Item) -> bool:
        file = self.opened(item.file)
        file.seek(item.offset)
        head = file.read(9)
        return head[:2] != b"PK" and head[8:] == b"{"

    def _in_safetensors(self, fqn: str, item: Item) -> Tensor:
        """A tensor of DCP's safetensors serialisation: a header and all tensors of the file."""
        key = (item.file, item.offset)
        if key not in self._headers:
            span = Span(self.opened(item.file), item.file, item.offset)
            try:
                (length,) = struct.unpack("<Q", span.read(0, 8))
                self._headers[key] = (8 + length, json.loads(span.read(8, length)))
            except ValueError as error:
                raise CorruptCheckpoint(
                    f"{self.root / item.file}: its safetensors header is damaged ({error})"
                ) from None
        begin, header = self._headers[key]
        try:
            said = header[fqn]
            low, high = said["data_offsets"]
            shape = tuple(said["shape"])
            width = itemsize(said["dtype"])
        except (KeyError, TypeError, ValueError):
            raise CorruptCheckpoint(f"{self.root / item.file}: {fqn} is not in it") from None
        at = item.offset + begin + low
        if high - low != prod(shape) * width or at + high - low > self.opened(item.file).seek(0, 2):
            raise CorruptCheckpoint(f"{self.root / item.file}: {fqn} reaches beyond its end")
        storage = Storage(
            "torch.storage.UntypedStorage", high - low, Record(item.file, at, high - low)
        )
        return Tensor(storage, said["dtype"], shape, row_major(shape))

    def opened(self, name: str) -> BinaryIO:
        if name not in self._open:
            if len(self._open) >= 256:
                self._stack.close()
                self._open.clear()
            self._open[name] = self._stack.enter_context(within(self.root, name).open("rb"))
        return self._open[name]

    def zip(self, item: Item) -> TorchFile:
        """The torch zip that an item is."""
        found = TorchFile(Span(self.opened(item.file), item.file, item.offset, item.nbytes))
        if item.crc not in (None, found.directory_crc):
            raise CorruptCheckpoint(
                f"{self.root / item.file}: the item at byte {item.offset} is not the one that "
                f"{FILE} was written for; the file is damaged or of another save"
            )
        self.unread.extend(found.unread)
        return found

    def boxes(self, fqn: str, tensor: StoredTensor) -> Boxes:
        """Where the elements of a tensor are, with their records noted."""
        rows = []
        for chunk in tensor.chunks:
            view = self.view(fqn, tensor, chunk.size, chunk.item)
            rows.append((chunk.begin, chunk.size, view.stride, len(self.records), view.offset))
            assert view.storage.record is not None
            self.records.append(view.storage.record)
        return Boxes.of(rows, len(tensor.shape))

    def view(self, fqn: str, tensor: StoredTensor, size: tuple[int, ...], item: Item) -> Tensor:
        """The tensor in an item, checked against what `.metadata` says of it."""
        apart = self._is_safetensors(item)
        found = self._in_safetensors(fqn, item) if apart else self.zip(item).value
        if not isinstance(found, Tensor) or (found.shape, found.dtype) != (size, tensor.dtype):
            said = (
                f"{found.dtype} {found.shape}"
                if isinstance(found, Tensor)
                else type(found).__name__
            )
            raise CorruptCheckpoint(
                f"{self.root / item.file}: {fqn} at byte {item.offset} is {said}, {FILE} expects "
                f"{tensor.dtype} {size}; the index is of another save than the data"
            )
        return found

    def small(self, fqn: str, tensor: StoredTensor) -> Tensor | None:
        """A small tensor with its bytes; None for one that is in pieces or large."""
        if len(tensor.chunks) != 1 or tensor.chunks[0].size != tensor.shape:
            return None
        chunk = tensor.chunks[0]
        if chunk.item.nbytes > SMALL_BYTES:
            return None
        view = self.view(fqn, tensor, chunk.size, chunk.item)
        if self._is_safetensors(chunk.item):
            assert view.storage.record is not None
            place = view.storage.record
            data = Span(self.opened(place.file), place.file).read(place.offset, place.nbytes)
            return replace(view, storage=replace(view.storage, data=data))
        file = self.zip(chunk.item)
        found: Tensor = file.loaded(file.value)
        return found

    def object(self, item: Item) -> Any:
        """The value of an object, small tensors in it with their bytes."""
        file = self.zip(item)
        return file.loaded(file.value)
