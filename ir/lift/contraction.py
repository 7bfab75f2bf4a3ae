"""Products of two tensors by index become linear layers and matrix products.

An `einsum` op of the draft has attributes `left`, `right` and `out`: one label per dim.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..rule import Size
from .dims import reshaped
from .draft import Draft, Op, Wire

Labels = Sequence[int]


def lower_einsums(draft: Draft) -> None:
    """Permutes and reshapes around a `linear`, `linear_io` or `matmul` for every `einsum`."""
    for op in draft.each("einsum"):
        _Lowering(draft, op).run()
    draft.sweep()


class _Lowering:
    def __init__(self, draft: Draft, op: Op) -> None:
        self.draft, self.op = draft, op

    def run(self) -> None:
        op = self.op
        x, w = op.operands
        a, b, out = op.attributes["left"], op.attributes["right"], op.attributes["out"]
        if x.carried and _is_parameter(x) and not _is_parameter(w):
            x, w, a, b = w, x, b, a
        size = dict(zip(a, x.dims, strict=True)) | dict(zip(b, w.dims, strict=True))
        both = [i for i in a if i in b and i in out]
        summed = [i for i in a if i in b and i not in out]
        rows, columns = [i for i in a if i not in b], [i for i in b if i not in a]
        if not summed:
            self.outer(x, w, a, b, out)
            return

        def merged(names: Labels) -> tuple[Size, ...]:
            return tuple(n for i in names for n in size[i])

        lead = [size[i] for i in both]
        if not both and _is_parameter(w):
            summed = [i for i in b if i in summed]  # the parameter's order: a view of it is free
            z = self.shaped(x, a, rows + summed, [*(size[i] for i in rows), merged(summed)])
            dims = (*z.dims[:-1], merged(columns))
            if list(b) == columns + summed:
                y = self.shaped(w, b, columns + summed, [merged(columns), merged(summed)])
                product = self.add("linear", [z, y], dims)
            else:
                y = self.shaped(w, b, summed + columns, [merged(summed), merged(columns)])
                product = self.add("linear_io", [z, y], dims)
        else:
            z = self.shaped(x, a, both + rows + summed, [*lead, merged(rows), merged(summed)])
            y = self.shaped(w, b, both + summed + columns, [*lead, merged(summed), merged(columns)])
            product = self.add("matmul", [z, y], (*lead, merged(rows), merged(columns)))
        order = both + rows + columns
        apart = self.reshape(product, tuple(size[i] for i in order))
        self.draft.stand_in(op, self.permute(apart, [order.index(i) for i in out]))

    def outer(self, x: Wire, w: Wire, a: Labels, b: Labels, out: Labels) -> None:
        """Nothing is summed: a pointwise product."""
        sides = []
        for wire, term in ((x, a), (w, b)):
            order = [term.index(i) for i in out if i in term]
            turned = self.permute(wire, order)
            dims = [turned.dims[[i for i in out if i in term].index(i)] if i in term else ()
                    for i in out]  # fmt: skip
            sides.append(self.reshape(turned, tuple(dims)))
        self.draft.stand_in(self.op, self.add("mul", sides, self.op.result.dims))

    def shaped(
        self, wire: Wire, term: Labels, order: Labels, dims: Sequence[tuple[Size, ...]]
    ) -> Wire:
        return self.reshape(self.permute(wire, [term.index(i) for i in order]), tuple(dims))

    def add(self, kind: str, operands: list[Wire], dims: Sequence[tuple[Size, ...]]) -> Wire:
        return self.draft.add(
            kind, operands, tuple(dims), dtype=self.op.result.dtype, module=self.op.module,
            before=self.op,
        ).result  # fmt: skip

    def reshape(self, wire: Wire, dims: Sequence[tuple[Size, ...]]) -> Wire:
        target = reshaped(wire.dims, tuple(dims))
        if target == wire.dims:
            return wire
        return self.draft.add(
            "reshape", [wire], target, module=self.op.module, before=self.op
        ).result

    def permute(self, wire: Wire, order: list[int]) -> Wire:
        return permuted(self.draft, wire, order, self.op)


def permuted(draft: Draft, wire: Wire, order: list[int], before: Op) -> Wire:
    """Dim `order[i]` becomes dim i; a permute of a permute is one."""
    if (inner := wire.made_by("permute")) is not None:
        order = [inner.attributes["order"][d] for d in order]
        wire = inner.operands[0]
    if order == sorted(order):
        return wire
    return draft.add(
        "permute", [wire], tuple(wire.dims[d] for d in order), attributes={"order": order},
        module=before.module, before=before,
    ).result  # fmt: skip


def _is_parameter(wire: Wire) -> bool:
    while op := wire.made_by("permute", "reshape", "cast", "shift"):
        wire = op.operands[0]
    return wire.role == "parameter"
