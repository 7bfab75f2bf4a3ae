"""What the type checker is told about lines it cannot see through.

`spmd_types` checks a stage while it runs (`spmd_types.checker.typecheck`): every value has a type
per mesh axis, and a missing collective is an error. It knows torch's ops and the collectives, but
not a lifted op such as attention on split heads. `lifted` declares one in index notation:

    @lifted("b (k g) s d, b k t d, b k t d -> b (k g) s d")
    def attention(q, k, v, ...): ...

    attention(q, k, v, split={"dp": "b", "tp": "k"})

says that axis dp splits the loop b and tp the loop k: operands and results that have the loop are
split along it, operands that lack it are R, results that lack it are P. Loops of `...` are called
by the number of their dim. Along other axes the work is not split: what goes in as I or R comes out
so.

Nothing here does anything while no checker runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import spmd_types as spmd
import torch.distributed as dist
from torch import Tensor

Split = Mapping[str, str | int]
"""Axis → the loop that it splits."""


def lifted(rule: str, special: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declares a function of tensors by index notation.

    The function communicates inside itself along axes that split the loop `special`: its results
    are the same on all ranks (I).
    """
    left, right = rule.split("->")
    operands = [_parse(text) for text in left.split(",")]
    results = [_parse(text) for text in right.split(",")]

    def declare(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*tensors: Tensor, split: Split | None = None, **options: Any) -> Any:
            body = functools.partial(function, **options)
            if not spmd.is_type_checking():
                return body(*tensors)
            split = split or {}
            pairs = list(zip(tensors, operands, strict=True))
            lead = next((t.dim() - len(o) + 1 for t, o in pairs if ("...",) in o), 0)
            flow = _unsplit(tensors)
            reads = tuple(
                _types(_expand(shape, lead), split, flow if t.requires_grad else {}, tensor=t)
                for t, shape in pairs
            )
            makes = tuple(
                _types(_expand(shape, lead), split, flow, special=special) for shape in results
            )
            # inside, the checker does not know that a lookup is linear, so that P may pass through
            boundary = spmd.no_typecheck if spmd.P in flow.values() else spmd.local_map
            typed = boundary(in_types=reads, out_types=makes[0] if len(makes) == 1 else makes)
            return typed(functools.update_wrapper(body, function))(*tensors)

        return call

    return declare


def on_shards(
    function: Callable[..., Any],
    *tensors: Tensor,
    reads: Mapping[str, Any],
    makes: Mapping[str, Any],
) -> Any:
    """Applies a function of the local shards, and declares the types before and after.

    `reads` is the type of the first tensor, `makes` that of every result.
    """
    if not spmd.is_type_checking():
        return function(*tensors)
    spmd.assert_type(tensors[0], *_declared(reads, tensors[0].dim()))
    with spmd.no_typecheck():
        result = function(*tensors)
    for tensor in result if isinstance(result, tuple | list) else [result]:
        spmd.assert_type(tensor, *_declared(makes, tensor.dim()))
    return result


def at_factors(
    collective: Callable[..., Tensor],
    x: Tensor,
    axis: dist.ProcessGroup,
    *,
    src: Any,
    dst: Any,
    factors: Mapping[int, Sequence[int]],
    makes: Mapping[str, Any],
    **options: Any,
) -> Tensor:
    """A conversion that splits or gathers an inner factor of a dim.

    `factors` gives the local factor sizes of such dims. `src` and `dst` name dims of the unfolded
    tensor, in which every factor is a dim of its own. `makes` is the type of the result.
    """
    with spmd.no_typecheck():
        y = x
        for dim in sorted(factors, reverse=True):
            y = y.unflatten(dim, tuple(factors[dim]))
        y = collective(y, axis, src=src, dst=dst, **options)
        for dim in sorted(factors):
            y = y.flatten(dim, dim + len(factors[dim]) - 1)
    if spmd.is_type_checking():
        spmd.assert_type(y, *_declared(makes, y.dim()))
    return y


def _parse(text: str) -> list[tuple[str, ...]]:
    """`b (k g) s` → [("b",), ("k", "g"), ("s",)]"""
    dims: list[tuple[str, ...]] = []
    group: list[str] | None = None
    for token in text.replace("(", " ( ").replace(")", " ) ").split():
        if token == "(":
            group = []
        elif token == ")":
            dims.append(tuple(group or ()))
            group = None
        elif group is not None:
            group.append(token)
        else:
            dims.append(() if token == "1" else (token,))
    return dims


def _expand(shape: list[tuple[str, ...]], lead: int) -> list[tuple[str | int, ...]]:
    found: list[tuple[str | int, ...]] = []
    for dim in shape:
        found += [(i,) for i in range(lead)] if dim == ("...",) else [dim]
    return found


def _unsplit(tensors: Sequence[Tensor]) -> dict[str, Any]:
    """Type along every axis of the operand that decides: the first one with a gradient."""
    decides = next((t for t in tensors if t.requires_grad), tensors[0])
    types = spmd.get_local_type(decides)
    names = spmd.current_mesh_all_names() or {}
    return {name: types[axis] for name, axis in names.items() if axis in types}


def _types(
    shape: list[tuple[str | int, ...]],
    split: Split,
    flow: Mapping[str, Any],
    tensor: Tensor | None = None,
    special: str = "",
) -> tuple[dict[str, Any], Any]:
    """(types, partition spec) of an operand (`tensor`) or, without one, of a result."""
    own = _unsplit([tensor]) if tensor is not None else {}
    types: dict[str, Any] = {}
    entries: list[list[tuple[int, str]]] = [[] for _ in shape]
    for name in spmd.current_mesh_all_names() or {}:
        if name not in split:
            types[name] = flow.get(name, own.get(name, spmd.R))
            continue
        home = next(
            ((d, f.index(split[name])) for d, f in enumerate(shape) if split[name] in f), None
        )
        if home is None and tensor is not None:
            types[name] = spmd.R
        elif home is None:
            types[name] = spmd.I if split[name] == special else spmd.P
        else:
            types[name] = spmd.V
            entries[home[0]].append((home[1], name))
    names = [tuple(name for _, name in sorted(e, key=lambda e: e[0])) or None for e in entries]
    return types, spmd.PartitionSpec(*names)


def _declared(types: Mapping[str, Any], ndim: int) -> tuple[dict[str, Any], Any]:
    """`{"dp": S(0), "tp": S(0)}` → local types and partition spec, outermost first."""
    entries: list[tuple[str, ...]] = [()] * ndim
    for name, kind in types.items():
        if isinstance(kind, spmd.S):
            entries[kind.dim] += (name,)
    spec = spmd.PartitionSpec(*(entry or None for entry in entries))
    return {name: spmd.V if isinstance(k, spmd.S) else k for name, k in types.items()}, spec
