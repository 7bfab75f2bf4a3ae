"""What a verification says: loss and gradients of a program beside those of a single device.

Tensors are numpy arrays, or torch tensors on the CPU, which numpy reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..ir.errors import InvalidInput

TOLERANCE = {"float64": 1e-10, "float32": 1e-5}

# A gradient that is zero but for rounding is compared with this part of the largest one.
NORM_FLOOR = 1e-6


def check_dtype(name: str) -> str:
    """The dtype of a verification. Raises InvalidInput for one without a tolerance."""
    if name not in TOLERANCE:
        raise InvalidInput(f"dtype {name!r}: expected {' or '.join(TOLERANCE)}")
    return name


def unjudged(ranks: int, strategy: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The shape of a result, as that of a program that did not run."""
    return {
        "equal": False,
        "loss": {"single": None, "sharded": None},
        "worst_gradient": {"name": None, "relative_error": None},
        "ranks": ranks,
        "strategy": dict(strategy),
        "dtype": dtype,
        "tolerance": TOLERANCE[dtype],
    }


def judged(
    single: float,
    sharded: float,
    differences: Mapping[str, Any],
    expected: Mapping[str, Any],
    dtype: str,
) -> dict[str, Any]:
    """What a result says of the losses, and of the absolute differences of gradients (nan where
    nothing was found)."""
    errors = _relative(_one_name_each(differences, expected), expected)
    worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
    tolerance = TOLERANCE[dtype]
    lost = [name for name, error in errors.items() if error != error]
    result: dict[str, Any] = {
        "equal": errors[worst] <= tolerance and abs(sharded - single) <= tolerance * abs(single),
        "loss": {"single": single, "sharded": sharded},
        "worst_gradient": {"name": worst, "relative_error": None if lost else errors[worst]},
    }
    if lost:
        result["error"] = f"gradients that are nan, or partly on no rank: {', '.join(lost[:5])}"
    return result


def _one_name_each(differences: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, Any]:
    """Of a tied parameter's names, the one that the program uses."""
    chosen: dict[int, str] = {}
    for name, gradient in expected.items():
        untouched = bool(np.isnan(np.asarray(differences[name])).all())
        if id(gradient) not in chosen or not untouched:
            chosen[id(gradient)] = name
    return {name: differences[name] for name in chosen.values()}


def _relative(differences: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, float]:
    """‖Δ‖ / max(‖g‖, 1e-6 · largest ‖g‖) per parameter; nan where an element is on no rank."""
    norms = {name: _norm(expected[name]) for name in differences}
    floor = NORM_FLOOR * max(norms.values()) or 1.0
    return {
        name: _norm(difference) / max(norms[name], floor)
        for name, difference in differences.items()
    }


def _norm(tensor: Any) -> float:
    return float(np.linalg.norm(np.asarray(tensor).reshape(-1)))
