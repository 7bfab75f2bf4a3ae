"""Layers of a JAX function, found by the names of their parameters, and the pieces they bound.

A function has no modules: `layers.0`, `layers.1` (entries of a list) or `layers_0`, `layers_1`
(flax) that hold parameters are its layers. An op belongs to the last layer whose parameters it
depends on; what is read after the last layer, by name outside of any, is the head.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ..lift.draft import Draft, Op, Wire
from ..lift.naming import identifier
from ..lift.pieces import Piece, Run, crossing, joined, owned, sound

_NUMBERED = re.compile(r"(.*?)(\d+)$")
_STACKED = re.compile(r"\[\d+\]")


def place_modules(draft: Draft, runs: Sequence[Run]) -> dict[str, str]:
    """Renames the modules of slices of stacks to `layers[3].attn`, and returns the layer of every
    parameter that has one."""
    names = {w.name for op in draft.ops for w in op.operands if w.role == "parameter"}
    units: dict[str, str] = {}
    for name in names:
        if found := _STACKED.search(name):
            path = _run_path(name, runs)
            units[name] = path + found[0]
    units |= _numbered({n for n in names if n not in units})
    for op in draft.ops:
        if found := _STACKED.search(op.module):
            base = _STACKED.sub("", op.module, count=1)
            path = _run_path(base, runs)
            rest = base.removeprefix(path).strip(".") if base != path else ""
            op.module = path + found[0] + (f".{rest}" if rest else "")
    return units


def _run_path(name: str, runs: Sequence[Run]) -> str:
    """The path of the run that a name is in: the longest."""
    paths = [r.path for r in runs if not r.path or name.startswith((r.path + ".", r.path + "["))
             or name == r.path]  # fmt: skip
    return max(paths, key=len, default="")


def _numbered(names: set[str]) -> dict[str, str]:
    """Parameter → the outermost numbered part of its name that has a sibling."""
    prefixes: dict[tuple[str, str], set[str]] = {}
    split: dict[str, list[tuple[str, str, str]]] = {}
    for name in names:
        parts = name.split(".")
        for i, part in enumerate(parts[:-1]):
            if found := _NUMBERED.match(part):
                key = ".".join(parts[:i]), found[1]
                prefixes.setdefault(key, set()).add(found[2])
                split.setdefault(name, []).append((*key, ".".join(parts[: i + 1])))
    units: dict[str, str] = {}
    for name, levels in split.items():
        for path, base, unit in levels:
            if len(prefixes[path, base]) > 1:
                units[name] = unit
                break
    return units


def cut(draft: Draft, units: Mapping[str, str]) -> list[Piece]:
    """The pieces of the carried ops, one per layer; layers that are not called one after the other
    are joined."""
    carried = [op for op in draft.ops if any(wire.carried for wire in op.results)]
    statics = [op for op in draft.ops if not any(wire.carried for wire in op.results)]
    order = _called(carried, units)
    levels = _levels(carried, units, order)
    carried.sort(key=lambda op: levels[id(op)])  # stable, and no op comes before what it reads
    draft.ops = [*statics, *carried]
    pieces: list[Piece] = []
    level = -1
    for op in carried:
        if levels[id(op)] != level:
            level = levels[id(op)]
            pieces.append(Piece(order[level - 1] if 0 < level <= len(order) else None, []))
        pieces[-1].ops.append(op)
    for piece in pieces:
        for op in piece.ops:
            op.module = op.module or piece.unit or ""
    return owned(sound(_settled(joined(pieces, lambda piece: not piece.parameters))))


def _settled(pieces: list[Piece]) -> list[Piece]:
    """Where several activations cross a cut and all are computed from one of them (a norm without
    parameters, before the first product of the next layer), what computes them moves behind it."""
    for i in range(len(pieces) - 1):
        leaving = crossing(pieces, i)
        if len(leaving) < 2:
            continue
        for wire in leaving:
            moved = _between(pieces[i].ops, wire, [w for w in leaving if w is not wire])
            if moved is not None:
                later = [op for op in pieces[i].ops if op in moved]
                for op in later:
                    op.module = pieces[i + 1].unit or ""
                pieces[i].ops = [op for op in pieces[i].ops if op not in moved]
                pieces[i + 1].ops = [*later, *pieces[i + 1].ops]
                break
    return pieces


def _between(ops: Sequence[Op], start: Wire, ends: Sequence[Wire]) -> set[Op] | None:
    """The ops that compute `ends` from `start` and static wires alone, or None."""
    mine, found, todo = set(ops), set[Op](), list(ends)
    while todo:
        wire = todo.pop()
        if wire is start or not wire.carried:
            continue
        if wire.producer is None or wire.producer not in mine:
            return None
        if wire.producer not in found:
            found.add(wire.producer)
            todo += wire.producer.operands
    return found


def _called(ops: Sequence[Op], units: Mapping[str, str]) -> list[str]:
    """Layers in the order in which they are first read."""
    read = (w.name for op in ops for w in op.operands if w.role == "parameter")
    return list(dict.fromkeys(units[name] for name in read if name in units))


def _levels(ops: Sequence[Op], units: Mapping[str, str], order: Sequence[str]) -> dict[int, int]:
    """Op → 0 before the layers, i in layer i, one more than there are layers after them."""
    number = {unit: i + 1 for i, unit in enumerate(order)}
    last = len(order)
    of_wire: dict[Wire, int] = {}
    levels: dict[int, int] = {}
    for op in ops:
        level = max((of_wire.get(wire, 0) for wire in op.operands), default=0)
        own = [name for wire in op.operands if (name := _parameter(wire))]
        inside = [number[units[name]] for name in own if name in units]
        scoped = _STACKED.search(op.module)
        if inside:
            level = max(level, *inside)
        elif scoped and (path := op.module[: scoped.end()]) in number:
            level = max(level, number[path])
        elif level == last and last and not scoped and (own or _after_stack(order)):
            level = last + 1
        levels[id(op)] = level
        if not all(_parameter(wire) for wire in op.operands):
            of_wire.update(dict.fromkeys(op.results, level))
    _views_with_readers(ops, levels)
    return levels


def _after_stack(order: Sequence[str]) -> bool:
    """Whether the last layer is an iteration of a scan: then ops outside of it are known."""
    return bool(_STACKED.search(order[-1]))


_VIEWS = ("reshape", "permute", "expand", "cast", "slice", "chunk", "shift", "scale", "neg")


def _parameter(wire: Wire) -> str:
    """The parameter that a wire is a view of, or an empty name."""
    while op := wire.made_by(*_VIEWS):
        wire = op.operands[0]
    return wire.name if wire.role == "parameter" else ""


def _views_with_readers(ops: Sequence[Op], levels: dict[int, int]) -> None:
    """Views of parameters alone go to the first piece that reads them."""
    first: dict[Wire, int] = {}
    for op in reversed(ops):
        if all(_parameter(wire) for wire in op.operands):
            reading = [first[wire] for wire in op.results if wire in first]
            levels[id(op)] = min(reading, default=levels[id(op)])
        for wire in op.operands:
            first[wire] = min(first.get(wire, levels[id(op)]), levels[id(op)])


def block_name(piece: Piece, index: int, count: int) -> str:
    """What the block of a piece is called: `layers_3` and `layers.3` → `Layer`."""
    if piece.unit:
        parts = _STACKED.sub("", piece.unit).split(".")
        name = parts[-1].rstrip("0123456789_") or (parts[-2] if len(parts) > 1 else "layer")
        name = name[:-1] if name.endswith("s") and len(name) > 2 else name
        return identifier(name[:1].upper() + name[1:] if "_" not in name else name.title())
    if count == 1:
        return "Program"
    return "Embedding" if index == 0 else "Head" if index == count - 1 else "Middle"
