"""Cuts a lifted draft into preamble and pieces: consecutive ops that become one segment each.

Pieces are bounded by the modules that lists hold, or, without lists, by the model's own children;
a cut is kept only where exactly one activation crosses it, so that a pipeline can be cut there.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..lift.draft import Draft
from ..lift.naming import identifier
from ..lift.pieces import Piece, Run, joined, owned, sound


def cut(draft: Draft, module: nn.Module, runs: Sequence[Run]) -> list[Piece]:
    """The pieces of the carried ops, in order.

    Lists whose modules do not follow each other with one activation between them (experts, the
    layers of an MLP beside a residual connection) do not bound pieces.
    """
    chosen = list(runs)
    while chosen:
        pieces = _cut(draft, [run.child(i) for run in chosen for i in range(run.kept)])
        whole = {piece.unit for piece in pieces}
        intact = [run for run in chosen if _with_parameters(module, run) <= whole]
        if len(intact) == len(chosen):
            return owned(pieces)
        chosen = intact
    pieces = _cut(draft, _children(module))
    pieces = sound(joined(pieces, lambda piece: piece.unit is None))
    return owned(_framed(pieces, module))


def _with_parameters(module: nn.Module, run: Run) -> set[str | None]:
    units = [run.child(i) for i in range(run.kept)]
    return {u for u in units if next(module.get_submodule(u).parameters(), None) is not None}


def _cut(draft: Draft, units: Sequence[str]) -> list[Piece]:
    pieces: list[Piece] = []
    for op in draft.ops:
        if not any(wire.carried for wire in op.results):
            continue
        unit = _unit(op.module, units)
        if not pieces or pieces[-1].unit != unit:
            pieces.append(Piece(unit, []))
        pieces[-1].ops.append(op)
    return sound(joined(pieces, lambda piece: not piece.parameters))


def _framed(pieces: list[Piece], module: nn.Module) -> list[Piece]:
    """Where children repeat (`block1`, `block2`), one piece each for what is before and after."""
    classes = [type(module.get_submodule(p.unit)) if p.unit else None for p in pieces]
    repeated = [i for i, c in enumerate(classes) if c is not None and classes.count(c) > 1]
    if not repeated:
        return pieces
    first, last = repeated[0], repeated[-1]
    before = [op for piece in pieces[:first] for op in piece.ops]
    after = [op for piece in pieces[last + 1 :] for op in piece.ops]
    return [
        *([Piece(None, before)] if before else []),
        *pieces[first : last + 1],
        *([Piece(None, after)] if after else []),
    ]


def _children(module: nn.Module) -> list[str]:
    """The model's children; those of its only child where there is but one."""
    path = ""
    while len(names := [name for name, _ in module.named_children()]) == 1:
        path = f"{path}.{names[0]}" if path else names[0]
        module = module.get_submodule(names[0])
    return [f"{path}.{name}" if path else name for name in names]


def _unit(path: str, units: Sequence[str]) -> str | None:
    return next((u for u in units if path == u or path.startswith(u + ".")), None)


def block_name(piece: Piece, index: int, count: int, twin: nn.Module) -> str:
    """What the block of a piece is called: the class of its module."""
    if piece.unit:
        found = type(twin.get_submodule(piece.unit))
        from_torch = found.__module__.startswith("torch.")
        return f"{found.__name__}Block" if from_torch else found.__name__
    if count == 1:
        return identifier(type(twin).__name__)
    return "Embedding" if index == 0 else "Head" if index == count - 1 else "Middle"
