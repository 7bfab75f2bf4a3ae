"""First values of the parameters, independent of the layout.

Every element is a function of the seed, the parameter's name and the element's index in the full
tensor: a counter-based generator (the finaliser of SplitMix64, Steele et al. 2014) and Box–Muller.
Each rank evaluates it on its own shard only.
"""

from __future__ import annotations

import hashlib
from math import pi, prod

import torch
from parallel import Rectangle, rectangles, shard
from parameters import PARAMETERS
from torch import Tensor, nn

ELEMENTS_AT_ONCE = 1 << 22  # bounds the temporary memory, about 40 bytes an element


@torch.no_grad()
def initialise(stage: nn.Module, seed: int) -> None:
    """Fills the parameters of a stage."""
    for name, parameter in stage.named_parameters():
        here = shard(parameter)
        for box in rectangles(name):
            _fill(here[box.in_local()], name, box, seed)


def _fill(out: Tensor, name: str, box: Rectangle, seed: int) -> None:
    """Fills one box of a parameter, a few rows at a time."""
    kind, scale = PARAMETERS[name].init
    if kind == "constant":
        out.fill_(scale)
        return
    if not box.sizes:
        out.copy_(_draw(torch.zeros((), dtype=torch.int64, device=out.device), kind, name, seed))
        out.mul_(scale)
        return
    rows = max(1, ELEMENTS_AT_ONCE // prod(box.sizes[1:]))
    for first in range(0, box.sizes[0], rows):
        part = out[first : first + rows]
        part.copy_(_draw(_index(part, name, box, first), kind, name, seed) * scale)


def _index(part: Tensor, name: str, box: Rectangle, first: int) -> Tensor:
    """Index in the full tensor of every element of `part`, the box's rows from `first` on."""
    begin = (box.full[0] + first, *box.full[1:])
    index = torch.zeros((), dtype=torch.int64, device=part.device)
    stride = 1
    for dim in reversed(range(part.dim())):
        along = torch.arange(part.shape[dim], dtype=torch.int64, device=part.device) + begin[dim]
        index = index + (along * stride).view(-1, *[1] * (part.dim() - 1 - dim))
        stride *= PARAMETERS[name].shape[dim]
    return index


def _draw(index: Tensor, kind: str, name: str, seed: int) -> Tensor:
    """Standard normal numbers, or uniform ones on [-1, 1], for the indices; float64."""
    key = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    bits = _mix(index * _signed(0x9E3779B97F4A7C15) + int.from_bytes(key, "big", signed=True))
    high = (_shift(bits, 32).double() + 0.5) / 2**32
    low = (bits & 0xFFFFFFFF).double() / 2**32
    if kind == "normal":
        return torch.sqrt(-2 * torch.log(high)) * torch.cos(2 * pi * low)
    if kind == "uniform":
        return 2 * high - 1
    raise ValueError(f"{name}: unknown initialisation {kind!r}")


def _mix(x: Tensor) -> Tensor:
    """64 well-mixed bits from 64 bits, as int64 (whose product wraps around)."""
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, places: int) -> Tensor:
    """Logical right shift; torch's own carries the sign."""
    return (x >> places) & ((1 << (64 - places)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x
