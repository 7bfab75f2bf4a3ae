"""From pieces to a `Model`: equal pieces become one block, cut runs grow back to full depth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..errors import InvalidInput
from ..graph import Model, Parameter, Pin, Segment, Value
from ..paths import renamed
from ..refine import Link, RawGraph, refine
from .draft import Draft, Wire
from .pieces import Drawn, Piece, Run, crossing, draw, draw_preamble

PREAMBLE = "preamble"


class Unlike(Exception):
    """Modules that looked alike are traced differently: the model must be traced in full."""


@dataclass(frozen=True, slots=True)
class _Call:
    """A segment before model-level names: block, module, parameters, names of static inputs."""

    block: str
    module: str
    parameters: tuple[str, ...]
    statics: tuple[str, ...]
    hidden_inputs: int


def assemble(
    draft: Draft,
    pieces: Sequence[Piece],
    runs: Sequence[Run],
    parameters: Mapping[str, Parameter],
    block_name: Callable[[Piece, int, int], str],
    name: str,
) -> Model:
    """The model of a lifted draft.

    `parameters` are all that the model has, in its order; `block_name` says what the block of a
    piece is called, from the piece, its index and the number of pieces. Raises Unlike where a cut
    run cannot grow back.
    """
    if not pieces:
        raise InvalidInput(f"{name}: the loss does not depend on any parameter")
    static = dict.fromkeys(
        w for piece in pieces for op in piece.ops for w in op.operands if not w.carried
    )
    raw_preamble, statics = draw_preamble(draft, static)
    order = {n: i for i, n in enumerate(parameters)}
    drawn = _drawn(draft, pieces, statics, order)
    blocks, called = _blocks(pieces, drawn, block_name)
    calls = [
        _Call(
            block, each.module, each.parameters,
            tuple(statics[w] for w in each.inputs if not w.carried),
            sum(w.carried for w in each.inputs),
        )
        for block, each in zip(called, drawn, strict=True)
    ]  # fmt: skip
    calls = _grown(calls, pieces, runs)
    segments = tuple(_named(calls, blocks))
    raw = {PREAMBLE: raw_preamble, **blocks}
    graphs = refine(raw, list(_links(raw, segments)))
    inputs = _inputs(draft, {n: g.values for n, g in graphs.items()}, raw, segments)
    used = {name for segment in segments for name in segment.parameters}
    model = Model(
        name=name,
        inputs=inputs,
        preamble=graphs.pop(PREAMBLE),
        blocks=graphs,
        segments=segments,
        parameters={n: p for n, p in parameters.items() if n in used},
        loss=(segments[-1].outputs[0], segments[-1].outputs[1]),
        pins=tuple(_pins(draft, called, drawn)),
    )
    model.check()
    return model


def _drawn(
    draft: Draft, pieces: Sequence[Piece], statics: Mapping[Wire, str], order: Mapping[str, int]
) -> list[Drawn]:
    last = len(pieces) - 1
    return [
        draw(piece, draft.outputs if i == last else crossing(pieces, i), statics, order)
        for i, piece in enumerate(pieces)
    ]


def _blocks(
    pieces: Sequence[Piece],
    drawn: Sequence[Drawn],
    block_name: Callable[[Piece, int, int], str],
) -> tuple[dict[str, RawGraph], list[str]]:
    """Distinct graphs by block name, and the block of each piece."""
    blocks: dict[str, RawGraph] = {}
    called: list[str] = []
    for i, (piece, each) in enumerate(zip(pieces, drawn, strict=True)):
        same = [b for b, graph in blocks.items() if graph == each.graph]
        block = base = block_name(piece, i, len(pieces))
        count = 1
        while not same and block in blocks:
            count += 1
            block = f"{base}{count}"
        block = same[0] if same else block
        blocks[block] = each.graph
        called.append(block)
    return blocks, called


def _pins(draft: Draft, called: Sequence[str], drawn: Sequence[Drawn]) -> Iterator[Pin]:
    """Pins on activations, as `block:value`; on layers of one block they must agree."""
    seen: dict[str, Mapping[str, str]] = {}
    for wire, types in draft.pins:
        for block, each in zip(called, drawn, strict=True):
            if wire in each.names and each.names[wire] not in each.graph.inputs:
                name = f"{block}:{each.names[wire]}"
                if seen.setdefault(name, types) != types:
                    raise InvalidInput(
                        f"sw.annotate: {name} is pinned to {types} and to {dict(seen[name])}; "
                        "layers of one kind are planned alike"
                    )
    for name, chosen in seen.items():
        yield Pin("activation", name, chosen)


def _grown(calls: list[_Call], pieces: Sequence[Piece], runs: Sequence[Run]) -> list[_Call]:
    """The calls of the full depth: modules that were not traced are like those that were."""
    for run in runs:
        if run.kept == len(run.children):
            continue
        units = [run.child(i) for i in range(run.kept)]
        found = [i for i, piece in enumerate(pieces) if piece.unit in units]
        if [pieces[i].unit for i in found] != units or found != list(
            range(found[0], found[0] + run.kept)
        ):
            raise Unlike(f"{run.path}: its modules are not called one after the other")
        position = next(i for i, call in enumerate(calls) if call.module == units[0])
        like: dict[int, _Call] = {}
        for i in range(run.kept):
            call = calls[position + i]
            first = like.setdefault(run.alike[i], call)
            if (first.block, first.statics) != (call.block, call.statics):
                raise Unlike(f"{first.module} and {call.module} are traced differently")
            if _renamed(first, call.module) != call.parameters:
                raise Unlike(f"{first.module} and {call.module} have other parameters")
        more = [
            _Call(first.block, run.child(i), _renamed(first, run.child(i)), first.statics, 1)
            for i in range(run.kept, len(run.children))
            for first in [like[run.alike[i]]]
        ]
        end = position + run.kept
        calls = [*calls[:end], *more, *calls[end:]]
    return calls


def _renamed(call: _Call, module: str) -> tuple[str, ...]:
    return tuple(renamed(name, call.module, module) for name in call.parameters)


def _named(calls: Sequence[_Call], blocks: Mapping[str, RawGraph]) -> Iterator[Segment]:
    """Segments with model-level names: `hidden_0` leaves the first."""
    before: tuple[str, ...] = ()
    for i, call in enumerate(calls):
        last = i == len(calls) - 1
        outputs = ("loss_sum", "loss_count") if last else (f"hidden_{i}",)
        assert call.hidden_inputs == len(before), "exactly one activation crosses a cut"
        yield Segment(call.block, call.module, call.parameters, (*before, *call.statics), outputs)
        before = outputs


def _links(raw: Mapping[str, RawGraph], segments: Sequence[Segment]) -> Iterator[Link]:
    """Values that are one tensor in several graphs: activations, preamble values, inputs and tied
    parameters."""
    seen: dict[str, tuple[str, str]] = {n: (PREAMBLE, n) for n in raw[PREAMBLE].outputs}
    seen |= {n: (PREAMBLE, n) for n in raw[PREAMBLE].inputs}
    done: set[Link] = set()
    pairs: list[Link] = []
    for segment in segments:
        graph = raw[segment.block]
        outer = (*segment.inputs, *(f"parameter {n}" for n in segment.parameters))
        for name, inner in zip(outer, (*graph.inputs, *graph.parameters), strict=True):
            place = (segment.block, inner)
            if name in seen and seen[name] != place:
                pairs.append((seen[name], place))
            seen.setdefault(name, place)
        for name, inner in zip(segment.outputs, graph.outputs, strict=True):
            seen[name] = (segment.block, inner)
    for pair in pairs:
        if pair not in done:
            done.add(pair)
            yield pair


def _inputs(
    draft: Draft,
    values: Mapping[str, Mapping[str, Value]],
    raw: Mapping[str, RawGraph],
    segments: Sequence[Segment],
) -> tuple[Value, ...]:
    """The model's inputs that something reads, with their refined dims."""
    found: dict[str, Value] = {n: values[PREAMBLE][n] for n in raw[PREAMBLE].inputs}
    for segment in segments:
        for outer, inner in zip(segment.inputs, raw[segment.block].inputs, strict=True):
            found.setdefault(outer, values[segment.block][inner])
    return tuple(
        Value(w.name, found[w.name].dims, w.dtype, "input", False)
        for w in draft.inputs
        if w.name in found
    )
