"""Element types, under the names of safetensors."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from ..ir import InvalidInput

_NUMPY: dict[str, Any] = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "I16": np.int16, "U16": np.uint16,
    "I32": np.int32, "U32": np.uint32, "I64": np.int64, "U64": np.uint64,
    "F16": np.float16, "F32": np.float32, "F64": np.float64, "C64": np.complex64,
    "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}  # fmt: skip

_ALIASES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16", "int32": "I32",
    "uint32": "U32", "int64": "I64", "uint64": "U64", "float16": "F16", "half": "F16",
    "float32": "F32", "float": "F32", "float64": "F64", "double": "F64", "bfloat16": "BF16",
    "complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "fp32": "F32", "fp16": "F16", "bf16": "BF16", "fp64": "F64",
}  # fmt: skip


def as_numpy(dtype: str) -> np.dtype[Any]:
    """The numpy dtype of `F32`, `BF16`, …; raises InvalidInput for a name that is none."""
    if dtype not in _NUMPY:
        raise InvalidInput(f"dtype {dtype!r}: expected one of {', '.join(_NUMPY)}")
    found: np.dtype[Any] = np.dtype(_NUMPY[dtype])
    return found


def itemsize(dtype: str) -> int:
    """Bytes of one element."""
    return int(as_numpy(dtype).itemsize)


def named(text: str) -> str:
    """The name of a dtype as torch, numpy or a flag writes it: `torch.bfloat16`, `float32`, `bf16`.

    Raises InvalidInput for a name that is none.
    """
    short = text.removeprefix("torch.")
    found = short if short in _NUMPY else _ALIASES.get(short)
    if found is None:
        raise InvalidInput(f"dtype {text!r}: expected one of {', '.join(_NUMPY)}")
    return found
