"""How parameters lie on the mesh: pure functions of a parameter's types, used by everything that
creates, initialises, loads or saves shards.

Vocabulary: an *axis* belongs to the mesh (`MESH` in settings.py, outermost first), a *dim* to a
tensor. A dim is a product of *factors*, outermost first: GPT-2's fused projection has the columns
(3 n d). A type says how a tensor lies along one axis:

    S(d)    split along dim d (its outermost factor)
    S(d.k)  split along factor k of dim d: the shard is no contiguous range of the dim
    I, R    replicated; the gradient is replicated (I) or a partial sum (R)
    P       the ranks hold summands

Where several axes split one factor, the first one in `MESH` is the outermost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from torch import nn


@dataclass(frozen=True)
class Parameter:
    """A logical parameter: `shape` of the whole, `factors` the factor sizes of each dim, `types`
    per tensor axis, `init` = (kind, value), `stages` that hold it (several for a tied one)."""

    shape: tuple[int, ...]
    types: Mapping[str, str]
    init: tuple[str, float] = ("constant", 0.0)
    stages: tuple[int, ...] = (0,)
    trainable: bool = True
    factors: tuple[tuple[int, ...], ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.factors:
            object.__setattr__(self, "factors", tuple((size,) for size in self.shape))


@dataclass(frozen=True)
class Carried:
    """An activation that a stage sends to the next: its local shape for `b` sequences of `s`
    tokens, its dtype (`model`: the one the model computes in; `wide`: that, at least float32), and
    its types per axis."""

    name: str
    shape: Callable[[int, int], tuple[int, ...]]
    dtype: str
    types: Mapping[str, str]


def split_of(kind: str) -> tuple[int, int] | None:
    """(dim, factor) of a split type, None for R, I and P."""
    if not kind.startswith("S("):
        return None
    dim, _, part = kind[2:-1].partition(".")
    return int(dim), int(part or 0)


def splitting(parameter: Parameter, dim: int, part: int, mesh: Mapping[str, int]) -> list[str]:
    """The axes that split a factor of a dim, outermost first."""
    return [a for a in mesh if split_of(parameter.types.get(a, "I")) == (dim, part)]


def local_factors(parameter: Parameter, mesh: Mapping[str, int]) -> list[tuple[int, ...]]:
    """Factor sizes of each dim of one rank's shard."""
    return [
        tuple(
            size // prod(mesh[a] for a in splitting(parameter, dim, part, mesh))
            for part, size in enumerate(sizes)
        )
        for dim, sizes in enumerate(parameter.factors)
    ]


def local_shape(parameter: Parameter, mesh: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of one rank's shard."""
    return tuple(prod(sizes) for sizes in local_factors(parameter, mesh))


def intervals(
    parameter: Parameter, mesh: Mapping[str, int], coordinates: Mapping[str, int]
) -> list[list[tuple[int, int]]]:
    """Which part of the whole the shard at `coordinates` (axis → index) holds.

    Returns for each dim the list of (global offset, length), in the order of the shard's own
    elements. One interval per dim, unless an inner factor is split.
    """
    found: list[list[tuple[int, int]]] = []
    for dim, sizes in enumerate(parameter.factors):
        runs, stride = [(0, 1)], 1
        for part in reversed(range(len(sizes))):
            index, pieces = 0, 1
            for axis in splitting(parameter, dim, part, mesh):
                index = index * mesh[axis] + coordinates[axis]
                pieces *= mesh[axis]
            count = sizes[part] // pieces
            steps = range(index * count, (index + 1) * count)
            if runs == [(0, stride)]:  # everything inside is whole: one run
                runs = [(steps.start * stride, count * stride)]
            else:
                runs = [(i * stride + offset, length) for i in steps for offset, length in runs]
            stride *= sizes[part]
        found.append(runs)
    return found


def add_parameters(
    module: nn.Module, shapes: Mapping[str, tuple[int, ...]], frozen: tuple[str, ...] = ()
) -> None:
    """Registers empty parameters of these (local) shapes under dotted names, in plain containers.

    Dtype and device are those of the surrounding context.
    """
    for name, shape in shapes.items():
        path, _, leaf = name.rpartition(".")
        parameter = nn.Parameter(torch.empty(shape), requires_grad=name not in frozen)
        container(module, path).register_parameter(leaf, parameter)


def add_modules(module: nn.Module, children: Mapping[str, nn.Module]) -> None:
    """Registers modules under dotted names, in plain containers."""
    for name, child in children.items():
        path, _, leaf = name.rpartition(".")
        container(module, path).add_module(leaf, child)


def container(module: nn.Module, path: str) -> nn.Module:
    """The submodule at a dotted path, made of empty modules where there is none yet."""
    for name in filter(None, path.split(".")):
        if name not in module._modules:
            module.add_module(name, nn.Module())
        module = module.get_submodule(name)
    return module
