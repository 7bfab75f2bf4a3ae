"""(x - mean) / sqrt(var + eps) · weight + bias becomes `layer_norm`, in all its spellings."""

from __future__ import annotations

from .draft import Draft, Op, Wire, bare
from .patterns import Match, match

_CENTRED = "sub(x, mean(x, dims=dims))"
_VARIANCE = f"""(mean(power({_CENTRED}, exponent=2), dims=dims)
| sub(mean(power(x, exponent=2), dims=dims), power(mean(x, dims=dims), exponent=2))
| relu(sub(mean(power(x, exponent=2), dims=dims), power(mean(x, dims=dims), exponent=2)))
| relu(mean(power({_CENTRED}, exponent=2), dims=dims)))"""
_INVERSE = f"""(rsqrt(shift({_VARIANCE}, term=eps))
| power(shift({_VARIANCE}, term=eps), exponent=-0.5))"""
_ROOT = f"""(sqrt(shift({_VARIANCE}, term=eps))
| power(shift({_VARIANCE}, term=eps), exponent=0.5))"""
_PLAIN = " ".join(f"mul({_CENTRED}, {_INVERSE}) | div({_CENTRED}, {_ROOT})".split())
_SCALED = " ".join(f"mul(({_PLAIN}), weight) | mul({_CENTRED}, mul({_INVERSE}, weight))".split())


def lift_layer_norm(draft: Draft) -> None:
    """Replaces every layer norm over the last dim, with and without weight and bias."""
    for op in reversed(
        list(draft.each(("mul", "div")))
    ):  # the weight's product before what it is of
        found = match(_SCALED, op.result) if op.kind == "mul" else None
        if found is None or not _of_rows(found.wires["weight"], found.wires["x"]):
            found = match(_PLAIN, op.result)
        if found is not None and _fits(found, op):
            _replace(draft, op, found)
    draft.sweep()


def _of_rows(weight: Wire, x: Wire) -> bool:
    return weight.role == "parameter" and weight.dims == x.dims[-1:]


def _fits(found: Match, op: Op) -> bool:
    x = found.wires["x"]
    return found.numbers["dims"] == [x.rank - 1] and x.dims == op.result.dims


def _replace(draft: Draft, op: Op, found: Match) -> None:
    x, weight = found.wires["x"], found.wires.get("weight")
    at, bias = op, None
    if weight is not None:
        readers = draft.readers(op.result)
        if len(readers) == 1 and readers[0].kind == "add" and op.result not in draft.outputs:
            others = [w for w in readers[0].operands if w is not op.result]
            if len(others) == 1 and _of_rows(bare(others[0]), x):
                at, bias = readers[0], bare(others[0])
    operands = [x, *(w for w in (weight, bias) if w is not None)]
    made = draft.add(
        "layer_norm", operands, x.dims, dtype=x.dtype, module=at.module, before=at,
        attributes={"eps": found.numbers["eps"]},
    )  # fmt: skip
    draft.stand_in(at, made.result)
