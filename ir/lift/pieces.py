"""Pieces of a lifted draft, consecutive ops that become one segment each, drawn as raw graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..graph import Value
from ..paths import inner_name, owns
from ..refine import RawGraph, RawOp
from .draft import Draft, Op, Wire
from .naming import Names, op_names, relative, value_names


@dataclass(eq=False, slots=True)
class Piece:
    """Ops of one segment. `unit` is the path of the module they belong to, or None."""

    unit: str | None
    ops: list[Op]

    @property
    def parameters(self) -> list[Wire]:
        """Parameters read, each once."""
        wires = (w for op in self.ops for w in op.operands if w.role == "parameter")
        return list(dict.fromkeys(wires))


@dataclass(frozen=True, slots=True)
class Run:
    """A list of modules: its path, its children's names, which are alike, how many are traced.

    `stacked`: the children are the slices of stacked parameters, `path[3]`; else they are `path.3`.
    """

    path: str
    children: tuple[str, ...]
    alike: tuple[int, ...]
    kept: int
    stacked: bool = False

    def child(self, index: int) -> str:
        """Path of a child."""
        name = self.children[index]
        if self.stacked:
            return f"{self.path}[{name}]"
        return f"{self.path}.{name}" if self.path else name


def joined(pieces: list[Piece], condition: Callable[[Piece], bool]) -> list[Piece]:
    """Joins the pieces for which the condition holds to the one before, the first to the next."""
    result: list[Piece] = []
    for piece in pieces:
        if result and condition(piece):
            result[-1].ops += piece.ops
        elif len(result) == 1 and condition(result[0]):
            result = [Piece(piece.unit, result[0].ops + piece.ops)]
        else:
            result.append(piece)
    return result


def sound(pieces: list[Piece]) -> list[Piece]:
    """Joins neighbours until exactly one activation crosses every cut."""
    cuts = 0
    while cuts + 1 < len(pieces):
        if len(crossing(pieces, cuts)) == 1:
            cuts += 1
            continue
        joined = Piece(None, pieces[cuts].ops + pieces[cuts + 1].ops)
        pieces = [*pieces[:cuts], joined, *pieces[cuts + 2 :]]
        cuts = max(0, cuts - 1)
    return pieces


def owned(pieces: list[Piece]) -> list[Piece]:
    """Pieces that are no call of their module become the model's own ops.

    Those are: pieces with parameters from outside the module, and pieces of one module with
    parameters that differ (calls of a list's items).
    """
    held: dict[str, set[tuple[Wire, ...]]] = {}
    for piece in pieces:
        held.setdefault(piece.unit or "", set()).add(tuple(piece.parameters))
    return [
        Piece(piece.unit if piece.unit and _is_call(piece, held[piece.unit]) else None, piece.ops)
        for piece in pieces
    ]


def _is_call(piece: Piece, held: set[tuple[Wire, ...]]) -> bool:
    return len(held) == 1 and all(owns(piece.unit or "", w.name) for w in piece.parameters)


def crossing(pieces: Sequence[Piece], index: int) -> list[Wire]:
    """Carried activations made in pieces up to `index` and read later, in order."""
    made = [w for piece in pieces[: index + 1] for op in piece.ops for w in op.results]
    read = {w for piece in pieces[index + 1 :] for op in piece.ops for w in op.operands}
    return [wire for wire in made if wire in read]


@dataclass(frozen=True, slots=True)
class Drawn:
    """A piece as a raw graph, with the wires at its boundary."""

    graph: RawGraph
    module: str
    inputs: tuple[Wire, ...]
    parameters: tuple[str, ...]
    outputs: tuple[Wire, ...]
    names: Mapping[Wire, str]


def draw(
    piece: Piece, outputs: Sequence[Wire], statics: Mapping[Wire, str], order: Mapping[str, int]
) -> Drawn:
    """The raw graph of a piece. `statics` names inputs and preamble values, `order` parameters."""
    module = piece.unit or ""
    made = {wire for op in piece.ops for wire in op.results}
    read = list(dict.fromkeys(w for op in piece.ops for w in op.operands if w not in made))
    hidden = [w for w in read if w.carried and w.role != "parameter"]
    fixed = [w for w in read if not w.carried]
    parameters = sorted(piece.parameters, key=lambda w: order[w.name])
    names = Names()
    given = {wire: names.unique(inner_name(wire.name, module)) for wire in parameters}
    for wire in hidden:
        given[wire] = names.unique("hidden")
    for wire in fixed:
        given[wire] = names.unique(statics[wire])
    named = value_names(piece.ops, module, given, names)
    graph = _raw(piece.ops, [*hidden, *fixed], parameters, outputs, named, module)
    inputs, stored = (*hidden, *fixed), tuple(w.name for w in parameters)
    return Drawn(graph, module, inputs, stored, tuple(outputs), named)


def _raw(
    ops: Sequence[Op],
    inputs: Sequence[Wire],
    parameters: Sequence[Wire],
    outputs: Sequence[Wire],
    named: Mapping[Wire, str],
    module: str,
) -> RawGraph:
    """A raw graph of ops whose wires have names."""
    roles = dict.fromkeys(inputs, "input") | dict.fromkeys(parameters, "parameter")
    values = {
        name: Value(name, wire.dims, wire.dtype, roles.get(wire, "activation"), wire.grad)  # type: ignore[arg-type]
        for wire, name in named.items()
    }
    raw = tuple(
        RawOp(
            name,
            op.kind,
            tuple(named[w] for w in op.operands),
            tuple(named[w] for w in op.results),
            _attributes(op),
            relative(op.module, module),
            op.sizes,
        )
        for name, op in zip(op_names(ops, module), ops, strict=True)
    )
    return RawGraph(
        values,
        raw,
        tuple(named[w] for w in inputs),
        tuple(named[w] for w in parameters),
        tuple(named[w] for w in outputs),
    )


def _attributes(op: Op) -> dict[str, Any]:
    """Attributes without those that only the tracer needs."""
    attributes = {k: v for k, v in op.attributes.items() if k != "train"}
    if op.kind == "embedding":
        row = attributes.pop("padding_idx", None)
        attributes |= {"padding_idx": row} if row is not None and row >= 0 else {}
    return attributes


def draw_preamble(draft: Draft, needed: Iterable[Wire]) -> tuple[RawGraph, dict[Wire, str]]:
    """The raw graph of the gradient-free ops, and the names of inputs and preamble values."""
    ops = [op for op in draft.ops if not any(w.carried for w in op.results)]
    names = Names(["hidden", *(wire.name for wire in draft.inputs)])
    named = value_names(ops, "", {wire: wire.name for wire in draft.inputs}, names)
    read = {w for op in ops for w in op.operands}
    used = [w for w in draft.inputs if w in read]
    kept = {w: n for w, n in named.items() if w.role != "input" or w in read}
    outputs = [w for w in dict.fromkeys(needed) if w.role != "input"]
    return _raw(ops, used, [], outputs, kept, ""), named
