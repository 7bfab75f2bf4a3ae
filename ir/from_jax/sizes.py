"""Dims from traced shapes: sizes are numbers, `b` and `s`; products of these."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import prod
from typing import Any

from ..graph import Dims, Dtype
from ..lift.dims import ordered
from ..rule import Size

_PRODUCT = re.compile(r"(\d+|[bs](\^\d+)?)(\*(\d+|[bs](\^\d+)?))*")


def atoms(size: Any) -> tuple[Size, ...]:
    """Factors of a traced size: `30*b*s` gives ("b", "s", 30), batch first.

    A size that is no such product (`s - 1`) comes back as one string; only what is lifted away may
    have it.
    """
    text = str(size)
    if text.isdigit():
        return () if int(text) == 1 else (int(text),)
    if not _PRODUCT.fullmatch(text):
        return (text,)
    numbers: list[str] = []
    names: list[Size] = []
    for part in text.split("*"):
        base, _, power = part.partition("^")
        if base.isdigit():
            numbers.append(base)
        else:
            names += [base] * int(power or 1)
    number = prod(int(each) for each in numbers)
    names.sort(key=str)
    return tuple(names if number == 1 else [*names, number])


def dims_of(shape: Sequence[Any], operands: Sequence[Dims]) -> Dims:
    """Dims of a traced shape. Products of symbols are ordered as in the operands' dims."""
    return ordered([atoms(size) for size in shape], operands)


def dtype_of(dtype: Any, model: str) -> Dtype:
    """Our name for a dtype; `model` is that of the parameters in this trace."""
    name = str(dtype)
    if name in (model, "bfloat16", "float16"):
        return "model"
    if name == "float32":
        return "wide"
    if name == "float64":
        return "float64"
    if name == "bool":
        return "bool"
    return "int32" if name in ("int32", "int16", "int8", "uint8", "uint16") else "int64"
