"""Torch's zips: which bytes of a file are which storage.

A torch.save file is a zip whose entries are stored as they are: `STEM/data.pkl` and the raw bytes
of every storage as `STEM/data/KEY`. The central directory at its end has their places and CRCs,
which torch does not check and we do. The same zips lie one after the other in DCP's data files, so
a zip may be a span of a file.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from isal import isal_zlib

from ...ir import CorruptCheckpoint, InvalidInput
from ..contents import Digest, Record
from .foreign import Ordered, StandIn, Storage, Tensor
from .loading import loads
from .zip_directory import Entry, Span, directory_of, unread


class TorchFile:
    """A torch.save file (or a span that is one), open to look up what is where.

    `value` of its pickle, whose CRC has been checked; tensors are descriptions. `directory_crc`:
    CRC-32 of the zip's directory, which has the CRCs of all contents.
    """

    def __init__(self, span: Span) -> None:
        self.span = span
        directory = directory_of(span)
        self._entries, self.directory_crc = directory.entries, directory.crc
        stems = [name[: -len("data.pkl")] for name in self._entries if name.endswith("/data.pkl")]
        if len(stems) != 1 or f"{stems[0]}constants.pkl" in self._entries:
            raise CorruptCheckpoint(
                f"{span.name}: a zip, but not one that torch.save wrote (no single data.pkl, or a "
                "TorchScript archive)"
            )
        self._stem = stems[0]
        order = self._entries.get(f"{self._stem}byteorder")
        if order is not None and self._content(f"{self._stem}byteorder") != b"little":
            raise InvalidInput(
                f"{span.name}: written on a big-endian machine; re-save it on a little-endian one"
            )
        self.value = loads(self._content(f"{self._stem}data.pkl"), span.name, self._storage)

    def check_name(self, stem: str) -> None:
        """Raises CorruptCheckpoint where torch saved this under another file name than `stem`.

        torch.save names the zip's folder after the path that it is given (`archive` where that is
        an open file), so that files which took each other's place are found.
        """
        saved = self._stem.rstrip("/")
        if saved not in ("", "archive", stem):
            raise CorruptCheckpoint(
                f"{self.span.name}: was saved as {saved}: files have been swapped or renamed; give "
                "them their names back"
            )

    @property
    def unread(self) -> list[Record]:
        """The storages that opening has not checked (the larger ones), whoever uses them."""
        return [self._record(entry) for entry in unread(self._entries)]

    def _content(self, name: str) -> bytes:
        entry = self._entries[name]
        return self.span.read(entry.begin, entry.nbytes)

    def _record(self, entry: Entry) -> Record:
        begin = self.span.begin + entry.begin
        return Record(self.span.name, begin, entry.nbytes, Digest("crc32", f"{entry.crc:08x}"))

    def _storage(self, key: str, kind: str, location: str, nbytes: int) -> Storage:
        name = f"{self._stem}data/{key}"
        if name not in self._entries:
            raise CorruptCheckpoint(f"{self.span.name}: storage {key} is missing")
        record = self._record(self._entries[name])
        if record.nbytes != nbytes:
            raise CorruptCheckpoint(
                f"{self.span.name}: storage {key} has {record.nbytes} bytes, its tensors expect "
                f"{nbytes}"
            )
        return Storage(kind, nbytes, record, location=location)

    def data(self, storage: Storage) -> bytes:
        """The bytes of a storage, their CRC checked."""
        assert storage.record is not None
        record = storage.record
        data = self.span.read(record.offset - self.span.begin, record.nbytes)
        if record.digest and f"{isal_zlib.crc32(data):08x}" != record.digest.value:
            raise CorruptCheckpoint(
                f"{record.file}: bytes {record.offset} to {record.offset + record.nbytes} are "
                "damaged (CRC); restore the file from another copy"
            )
        return data

    def loaded(self, value: Any, limit_bytes: int = 1 << 20) -> Any:
        """A value with the bytes of its small tensors at hand; larger ones stay descriptions."""
        done: dict[int, Any] = {}

        def storage(found: Storage) -> Storage:
            if found.data is not None or found.nbytes > limit_bytes:
                return found
            if id(found) not in done:
                done[id(found)] = replace(found, data=self.data(found))
            return done[id(found)]  # type: ignore[no-any-return]

        return _mapped(value, storage)


def _mapped(value: Any, storage: Any) -> Any:
    if isinstance(value, Tensor):
        return replace(value, storage=storage(value.storage))
    if isinstance(value, Storage):
        return storage(value)
    if type(value) is dict:
        return {k: _mapped(v, storage) for k, v in value.items()}
    if type(value) is Ordered:
        made = Ordered((k, _mapped(v, storage)) for k, v in value.items())
        made.attributes = value.attributes
        return made
    if type(value) in (list, tuple):
        return type(value)(_mapped(v, storage) for v in value)
    if isinstance(value, StandIn):
        copy = type(value).__new__(type(value), *(_mapped(v, storage) for v in value.args))
        copy.called, copy.kwargs = value.called, value.kwargs
        copy.state = _mapped(value.state, storage)
        copy.items = [_mapped(v, storage) for v in value.items]
        copy.pairs = [(k, _mapped(v, storage)) for k, v in value.pairs]
        return copy
    return value


class open_torch:  # noqa: N801 - used like open()
    """`with open_torch(path, name) as file`: a TorchFile of a whole file."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        self._path, self._name = path, name or path.name

    def __enter__(self) -> TorchFile:
        try:
            self._handle = self._path.open("rb")
        except OSError as error:
            raise CorruptCheckpoint(
                f"{self._name}: cannot be read ({error.strerror}); it belongs to the checkpoint"
            ) from None
        try:
            return TorchFile(Span(self._handle, self._name))
        except BaseException:
            self._handle.close()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._handle.close()


def read_torch(path: Path, name: str | None = None, limit_bytes: int = 1 << 20) -> Any:
    """The value of a torch.save file; storages up to `limit_bytes` come with their bytes.

    `name` is what records and errors call the file. Raises CorruptCheckpoint where it is damaged.
    """
    with open_torch(path, name) as file:
        return file.loaded(file.value, limit_bytes)
