"""Figures with their units, short enough for a table."""

from __future__ import annotations


def sized(bytes: float) -> str:
    """`8 KiB`, `256 MiB`, three digits of what lies between."""
    for unit, name in ((2**20, "MiB"), (2**10, "KiB")):
        if bytes >= unit:
            return f"{bytes / unit:.3g} {name}"
    return f"{bytes:g} B"


def lasting(seconds: float) -> str:
    """`12.3 µs`, `4.56 ms`, `1.3 s`."""
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds * 1e6:.3g} µs"


def rate(bytes_per_s: float) -> str:
    """`12.3 GB/s`."""
    return f"{bytes_per_s / 1e9:.3g} GB/s"
