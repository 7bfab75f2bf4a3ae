"""A checkpoint of any format, read where it is: every process reads the bytes that it wants.

`reads.jsonl` is written by `convert CHECKPOINT FOLDER --plan plan.json`. Its first line
names the checkpoint's root and files and says how far the run was; every other line is one state
(`weight`, `exp_avg`, `exp_avg_sq`) of one parameter: its boxes in the full tensor, and for each the
file, the byte of its first element, the strides in elements, and the checksum of the box if the
checkpoint has one. A box that is read whole is checked against it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

FILE = "reads.jsonl"

ITEM_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1}


@dataclass(frozen=True)
class Box:
    """A box of a full tensor, and where its elements lie."""

    path: Path
    offset: int
    begin: tuple[int, ...]
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    digest: tuple[str, str] | None

    def read(self, item: int) -> np.ndarray:
        """The elements, as unsigned integers of their size; nothing is read before it is used."""
        last = sum((n - 1) * stride for n, stride in zip(self.sizes, self.strides, strict=True))
        try:
            raw = np.memmap(self.path, np.uint8, "r", self.offset, (last + 1) * item)
        except (OSError, ValueError) as error:
            raise SystemExit(
                f"{self.path}: cannot read {self.offset}+{last + 1}: {error}"
            ) from None
        steps = tuple(stride * item for stride in self.strides)
        return np.lib.stride_tricks.as_strided(raw.view(f"u{item}"), self.sizes, steps)

    def check(self, found: np.ndarray) -> None:
        """Raises SystemExit unless these elements, all of the box, are what was written."""
        if self.digest is None:
            return
        kind, expected = self.digest
        data = memoryview(np.ascontiguousarray(found).reshape(-1).view(np.uint8))
        if kind == "crc32":
            got = f"{zlib.crc32(data):08x}"
        else:
            try:
                from xxhash import xxh3_128_hexdigest
            except ImportError:
                return  # an optional package: without it these checksums are not looked at
            got = xxh3_128_hexdigest(data)
        if got != expected:
            raise SystemExit(
                f"{self.path}: damaged at byte {self.offset}: {kind} {got}, {expected}"
            )


class Reads:
    """What `reads.jsonl` says of some parameters (all, if not given)."""

    def __init__(self, folder: Path, names: Iterable[str] | None = None) -> None:
        wanted = None if names is None else set(names)
        self.boxes: dict[tuple[str, str], list[Box]] = {}
        self.dtypes: dict[tuple[str, str], str] = {}
        self.shapes: dict[tuple[str, str], tuple[int, ...]] = {}
        self._states: dict[str, set[str]] = {}
        with (folder / FILE).open(encoding="utf-8") as file:
            self.head: dict[str, Any] = json.loads(file.readline())
            root = Path(self.head["root"])
            if not root.is_dir():
                raise SystemExit(f"{folder / FILE}: the checkpoint {root} is not there any more")
            paths = [root / name for name in self.head["files"]]
            for line in file:
                # lines begin with the name: those of other parameters need no parsing
                name = json.JSONDecoder().raw_decode(line, len('{"name": '))[0]
                if wanted is None or name in wanted:
                    self._add(json.loads(line), paths)

    def _add(self, line: dict[str, Any], paths: Sequence[Path]) -> None:
        key = line["name"], line["state"]
        self.dtypes[key], self.shapes[key] = line["dtype"], tuple(line["shape"])
        self._states.setdefault(line["name"], set()).add(line["state"])
        self.boxes[key] = [
            Box(paths[file], offset, tuple(begin), tuple(sizes), tuple(strides), digest)
            for file, offset, begin, sizes, strides, digest in line["boxes"]
        ]

    def states(self, name: str) -> set[str]:
        """Those of a parameter that the checkpoint has."""
        return self._states.get(name, set())

    def read(
        self, name: str, state: str, begin: Sequence[int], sizes: Sequence[int]
    ) -> tuple[np.ndarray, str]:
        """A box of the full tensor: its elements, as unsigned integers, and what dtype they are."""
        key = name, state
        if key not in self.boxes:
            raise SystemExit(f"the checkpoint has no {state} of {name}")
        item = ITEM_BYTES[self.dtypes[key]]
        found = np.empty(tuple(sizes), f"u{item}")
        missing = prod(sizes)
        for box in self.boxes[key]:
            low = [max(a, b) for a, b in zip(begin, box.begin, strict=True)]
            high = [
                min(a + n, b + m)
                for a, n, b, m in zip(begin, sizes, box.begin, box.sizes, strict=True)
            ]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            there = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, box.begin, strict=True))
            here = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, begin, strict=True))
            found[here] = box.read(item)[there]
            part = prod(b - a for a, b in zip(low, high, strict=True))
            if part == prod(box.sizes):
                box.check(found[here])
            missing -= part
        if missing:
            raise SystemExit(f"the checkpoint lacks {missing} elements of {state} of {name}")
        return found, self.dtypes[key]
