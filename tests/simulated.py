"""Simulated devices: a value on a mesh is a list of local torch tensors, one per rank.

Everything that ranks do to each other is real data movement between the entries of such a list,
in the plainest form, and differentiable. Nothing here looks at `ir.conversion` to know what a
collective does: a step is carried out from its two types alone, so that the tests compare two
independent readings of the design.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from shardwright.ir import AxisType, Mesh, NdType, Step

Sizes = tuple[tuple[int, ...], ...]
"""Per dim of a value the sizes of its factors, outermost first."""

Ranks = list[Tensor]
"""A value on a mesh: the local tensor of every rank."""


def local_sizes(dims: Sizes, nd_type: NdType, mesh: Mesh) -> Sizes:
    """The factor sizes that one rank holds; asserts that the splits are even."""
    sizes = [list(dim) for dim in dims]
    for axis, kind in nd_type:
        if kind.is_split:
            size, ways = sizes[kind.dim][kind.part], mesh[axis].size
            assert size % ways == 0, f"{size} does not split {ways} ways"
            sizes[kind.dim][kind.part] = size // ways
    return tuple(map(tuple, sizes))


def shape_of(sizes: Sizes) -> tuple[int, ...]:
    return tuple(map(prod, sizes))


def shard(full: Tensor, nd_type: NdType, dims: Sizes, mesh: Mesh) -> Ranks:
    """The local tensors of a whole one. The summands of partial axes are random."""
    assert tuple(full.shape) == shape_of(dims)
    parts: dict[tuple[tuple[str, int], ...], Tensor] = {(): full}
    for axis, kind in nd_type:  # summands first: what is replicated is the same summand
        if kind.kind == "P":
            parts = {
                (*at, (axis, i)): piece
                for at, value in parts.items()
                for i, piece in enumerate(_summands(value, mesh[axis].size))
            }
    ranks: Ranks = []
    for rank in range(mesh.size):
        where = mesh.coordinates(rank)
        local = parts[tuple((a, where[a]) for a, kind in nd_type if kind.kind == "P")]
        sizes = dims
        for axis, kind in nd_type:  # outermost split first
            if kind.is_split:
                local, sizes = _chunk(local, sizes, kind, mesh[axis].size, where[axis])
        ranks.append(local)
    return ranks


def unshard(ranks: Ranks, nd_type: NdType, dims: Sizes, mesh: Mesh) -> Tensor:
    """The whole tensor. Asserts that replicas are equal (exactly) and local shapes are right."""
    state, sizes = list(ranks), local_sizes(dims, nd_type, mesh)
    for local in state:
        assert tuple(local.shape) == shape_of(sizes), "a shard of the wrong shape"
    for axis, kind in reversed(nd_type.axes):  # innermost split first
        ways = mesh[axis].size
        whole = list(state)
        for group in groups(mesh, axis):
            locals_ = [state[rank] for rank in group]
            if kind.kind == "P":
                value = torch.stack(locals_).sum(0)
            elif kind.is_split:
                value = _join(locals_, sizes, kind)
            else:
                value = locals_[0]
                for rank, other in zip(group, locals_, strict=True):
                    assert torch.equal(value, other), f"rank {rank} differs along {axis}: {kind}"
            for rank in group:
                whole[rank] = value
        state = whole
        if kind.is_split:
            sizes = _scaled(sizes, kind, ways, 1)
    return state[0]


def convert(ranks: Ranks, steps: Sequence[Step], state: NdType, dims: Sizes, mesh: Mesh) -> Ranks:
    """Carries out the steps of a conversion from type `state`, one after the other."""
    for step in steps:
        assert state[step.axis] == step.source, f"{step} does not start at {state}"
        ranks = _step(ranks, step, local_sizes(dims, state, mesh), mesh)
        state = state.replace(step.axis, step.target)
    return ranks


def _step(ranks: Ranks, step: Step, sizes: Sizes, mesh: Mesh) -> Ranks:
    """One step. A split is taken from, and put back to, the *local* factor: nesting is on trust."""
    source, target, ways = step.source, step.target, mesh[step.axis].size
    if source == target:
        return ranks
    out = list(ranks)
    for group in groups(mesh, step.axis):
        locals_ = [ranks[rank] for rank in group]
        full_sizes = sizes
        if source.is_split:
            whole = _join(locals_, sizes, source)
            full_sizes = _scaled(sizes, source, ways, 1)
        elif source.kind == "P":
            whole = torch.stack(locals_).sum(0)
        for i, rank in enumerate(group):
            mine = locals_[i] if source.kind in ("R", "I") else whole
            if target.is_split:
                mine, _ = _chunk(mine, full_sizes, target, ways, i)
            elif target.kind == "P" and source.is_split:
                mine = _padded(locals_[i], sizes, source, ways, i)
            elif target.kind == "P":
                mine = mine if i == 0 else torch.zeros_like(mine)
            out[rank] = mine
    return out


def all_reduce(ranks: Ranks, mesh: Mesh, axis: str) -> Ranks:
    """P→I inside an op: forward the sum, backward each rank's own gradient (I→R does nothing)."""
    out = list(ranks)
    for group in groups(mesh, axis):
        total = torch.stack([ranks[rank].detach() for rank in group]).sum(0)
        for rank in group:
            out[rank] = total + (ranks[rank] - ranks[rank].detach())  # the latter is exactly 0
    return out


def groups(mesh: Mesh, axis: str) -> Iterator[list[int]]:
    """The ranks that differ in their coordinate along `axis` only, in its order."""
    stride = mesh.stride(axis)
    for rank in range(mesh.size):
        if mesh.coordinates(rank)[axis] == 0:
            yield [rank + i * stride for i in range(mesh[axis].size)]


def positions(dims: Sizes, nd_type: NdType, mesh: Mesh) -> Ranks:
    """For every local element its index in the flattened whole tensor."""
    whole = torch.arange(prod(shape_of(dims))).reshape(shape_of(dims))
    return shard(whole, nd_type, dims, mesh)


def settled(ranks: Ranks, nd_type: NdType, mesh: Mesh) -> Ranks:
    """Sums an autograd gradient over the replicas of the value it belongs to.

    Autograd sees n tensors where a replicated value is one; only the sum over them is defined
    (how it is dealt to the replicas depends on who read which copy). It compares two gradients.
    """
    for axis, kind in nd_type:
        if kind.kind in ("R", "I"):
            out = list(ranks)
            for group in groups(mesh, axis):
                total = torch.stack([ranks[rank] for rank in group]).sum(0)
                for rank in group:
                    out[rank] = total
            ranks = out
    return ranks


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor], seeds: Ranks) -> Ranks:
    """Autograd's gradients; zeros where nothing flows."""
    live = [(y, g) for y, g in zip(outputs, seeds, strict=True) if y.requires_grad]
    if not live or not inputs:
        return [torch.zeros_like(x) for x in inputs]
    ends, starts = [y for y, _ in live], [g for _, g in live]
    found = torch.autograd.grad(ends, inputs, starts, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def share(nd_type: NdType, mesh: Mesh) -> float:
    """What each replica of a value counts: along an axis of type I all of them are one."""
    return 1 / prod(mesh[axis].size for axis, kind in nd_type if kind.kind == "I")


def pairing(x: Ranks, y: Ranks, nd_type: NdType, mesh: Mesh) -> Tensor:
    """⟨x, y⟩ of a value of `nd_type` and a gradient of its dual: the sum over ranks, in which an
    axis of type I, where both are replicated, counts once."""
    total = torch.stack([(a * b).sum() for a, b in zip(x, y, strict=True)]).sum()
    return total * share(nd_type, mesh)


def _summands(value: Tensor, count: int) -> list[Tensor]:
    if not value.is_floating_point():
        return [value, *(torch.zeros_like(value) for _ in range(count - 1))]
    pieces = [torch.randn_like(value) for _ in range(count - 1)]
    return [*pieces, value - sum(pieces)]


def _chunk(
    value: Tensor, sizes: Sizes, kind: AxisType, ways: int, index: int
) -> tuple[Tensor, Sizes]:
    flat = [size for dim in sizes for size in dim]
    at = _flat_index(sizes, kind)
    assert flat[at] % ways == 0
    pieces = value.reshape(flat).chunk(ways, at)
    small = _scaled(sizes, kind, 1, ways)
    return pieces[index].reshape(shape_of(small)), small


def _join(pieces: Sequence[Tensor], sizes: Sizes, kind: AxisType) -> Tensor:
    flat = [size for dim in sizes for size in dim]
    whole = torch.cat([piece.reshape(flat) for piece in pieces], _flat_index(sizes, kind))
    return whole.reshape(shape_of(_scaled(sizes, kind, len(pieces), 1)))


def _padded(piece: Tensor, sizes: Sizes, kind: AxisType, ways: int, index: int) -> Tensor:
    zeros = torch.zeros_like(piece)
    return _join([piece if i == index else zeros for i in range(ways)], sizes, kind)


def _scaled(sizes: Sizes, kind: AxisType, times: int, over: int) -> Sizes:
    rows = [list(dim) for dim in sizes]
    rows[kind.dim][kind.part] = rows[kind.dim][kind.part] * times // over
    return tuple(map(tuple, rows))


def _flat_index(sizes: Sizes, kind: AxisType) -> int:
    return sum(len(dim) for dim in sizes[: kind.dim]) + kind.part


def int_sizes(dims: Sequence[Sequence[int | str]], binding: Mapping[str, int]) -> Sizes:
    """Factor sizes with symbols bound."""
    return tuple(tuple(s if isinstance(s, int) else binding[s] for s in dim) for dim in dims)
