"""Chunks of zarr arrays that tensorstore has to read: compressed, or inside OCDBT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...ir import CorruptCheckpoint, InvalidInput
from ..boxes import flat_range
from ..dtypes import as_numpy

CACHE_BYTES = 128 << 20
"""Of decompressed chunks that tensorstore keeps: reads come in blocks smaller than chunks."""


class Store:
    """The arrays of one tree; opens each when it is first asked for."""

    def __init__(self, folder: Path, ocdbt: bool, driver: str) -> None:
        self._folder, self._ocdbt, self._driver = folder, ocdbt, driver
        self._opened: dict[str, Any] = {}
        self._ts = _tensorstore(folder)
        self._context = self._ts.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})

    def array(self, name: str) -> Any:
        """An open tensorstore; raises CorruptCheckpoint where it cannot be opened."""
        if name not in self._opened:
            base = f"file://{self._folder.resolve()}/"
            kvstore: Mapping[str, Any] = (
                {"driver": "ocdbt", "base": base, "path": f"{name}/"}
                if self._ocdbt
                else {"driver": "file", "path": f"{self._folder.resolve()}/{name}/"}
            )
            spec = {"driver": self._driver, "kvstore": kvstore}
            try:
                self._opened[name] = self._ts.open(
                    spec, read=True, open=True, context=self._context
                ).result()
            except Exception as error:  # tensorstore raises ValueError for whatever is wrong
                raise CorruptCheckpoint(
                    f"{self._folder}: the array {name} cannot be opened ({_short(error)}); the "
                    "checkpoint is incomplete or damaged"
                ) from None
        return self._opened[name]

    def reader(
        self, name: str, begin: tuple[int, ...], size: tuple[int, ...], dtype: str
    ) -> Callable[[int, NDArray[np.uint8]], None]:
        """Reads bytes of a box of an array, as if it lay row-major in a file."""
        width = as_numpy(dtype).itemsize

        def read(offset: int, into: NDArray[np.uint8]) -> None:
            if offset % width or into.nbytes % width:
                raise ValueError("reads are of whole elements")
            values = into.view(as_numpy(dtype))
            done = 0
            first = offset // width
            for low, many in flat_range(size, first, first + len(values)):
                place = tuple(
                    slice(b + at, b + at + n) for b, at, n in zip(begin, low, many, strict=True)
                )
                try:
                    block = np.asarray(self.array(name)[place].read().result())
                except CorruptCheckpoint:
                    raise
                except Exception as error:
                    raise CorruptCheckpoint(
                        f"{self._folder}: {name}{list(low)} cannot be read ({_short(error)})"
                    ) from None
                flat = block.reshape(-1)
                values[done : done + flat.size] = flat
                done += flat.size

        return read


def _tensorstore(folder: Path) -> Any:
    try:
        import tensorstore  # heavy, and needed for this format only
    except ImportError:
        raise InvalidInput(
            f"{folder}: these arrays are compressed or in OCDBT files, which tensorstore reads; "
            "install it (pip install tensorstore), or save with use_ocdbt=False and no compression"
        ) from None
    return tensorstore


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
