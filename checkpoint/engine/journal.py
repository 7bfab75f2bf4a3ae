"""What of a conversion is done and on the disk, so that one that was killed goes on from there.

A file that only grows. Every line is the CRC-32 of its text, a space and the text (JSON), and is
written after what it speaks of is durable; the first line says which conversion it is. A line that
was cut off, and all after it, are ignored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .digests import crc32


class Journal:
    """One rank's journal, open for more lines."""

    def __init__(self, path: Path, first: Mapping[str, Any] | None = None) -> None:
        """Opens a journal to go on with it, or, where `first` is given, a new one."""
        if first is not None:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            self.add(first)
            return
        self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        raw = path.read_bytes()
        whole = sum(len(line) + 1 for line in _lines(raw))
        os.ftruncate(self._file, whole)
        os.lseek(self._file, whole, os.SEEK_SET)

    def add(self, entry: Mapping[str, Any]) -> None:
        """Appends a line and waits until it is on the disk."""
        text = json.dumps(entry, separators=(",", ":")).encode()
        line = f"{crc32(text):08x} ".encode() + text + b"\n"
        while line:
            line = line[os.write(self._file, line) :]
        os.fdatasync(self._file)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)


def _lines(raw: bytes) -> list[bytes]:
    found = []
    for line in raw.split(b"\n")[:-1]:
        if len(line) < 10 or line[8:9] != b" " or line[:8] != f"{crc32(line[9:]):08x}".encode():
            break
        found.append(line)
    return found


def read(path: Path) -> list[dict[str, Any]]:
    """The entries of a journal; none where there is no file or its first line was cut off."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return []
    return [json.loads(line[9:]) for line in _lines(raw)]
