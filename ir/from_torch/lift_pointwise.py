"""Formulas that are one op: RMS norm in all its spellings, GELU and SiLU."""

from __future__ import annotations

from .draft import Draft, Op, Wire, uncast
from .patterns import Match, match, matches

_INVERSE_ROOT = """
rsqrt(shift(mean(power(x, exponent=2), dims=dims), term=eps))
| power(shift(mean(power(x, exponent=2), dims=dims), term=eps), exponent=-0.5)
"""
_ROOT = """
sqrt(shift(mean(power(x, exponent=2), dims=dims), term=eps))
| power(shift(mean(power(x, exponent=2), dims=dims), term=eps), exponent=0.5)
"""
_RMS_NORM = f"mul(mul(x, ({_INVERSE_ROOT})), weight) | mul(div(x, ({_ROOT})), weight)"
_RMS_NORM = " ".join(_RMS_NORM.split())

_GELU_TANH = """
shift(tanh(scale(add(x, scale(power(x, exponent=3), factor=0.044715)), factor=0.7978845608)),
      term=1)
"""
_GELU = "shift(erf(scale(x, factor=0.70710678)), term=1)"

_FORMULAS = {
    "gelu_tanh": (
        f"mul(scale(x, factor=0.5), {_GELU_TANH}) | scale(mul(x, {_GELU_TANH}), factor=0.5)"
    ),
    "gelu": f"mul(scale(x, factor=0.5), {_GELU}) | scale(mul(x, {_GELU}), factor=0.5)",
    "silu": "mul(x, sigmoid(x))",
}
"""Our name → the formula."""

_ACTIVATIONS = {name: " ".join(text.split()) for name, text in _FORMULAS.items()}


def lift_activations(draft: Draft) -> None:
    """GELU and SiLU that are written out become `gelu` and `silu`."""
    for op in draft.each(("mul", "scale")):
        for name, pattern in _ACTIVATIONS.items():
            found = match(pattern, op.result)
            if found is None or found.wires["x"].dims != op.result.dims:
                continue
            kind = "silu" if name == "silu" else "gelu"
            attributes = {} if name == "silu" else {
                "approximate": "tanh" if name == "gelu_tanh" else "none"
            }  # fmt: skip
            x = _in_dtype(draft, found.wires["x"], op)
            made = draft.add(kind, [x], x.dims, attributes=attributes, module=op.module, before=op)
            draft.redirect(op.result, made.result)
            break
    draft.sweep()


def lift_rms_norm(draft: Draft) -> None:
    """x / sqrt(mean(x²) + eps) · weight becomes `rms_norm`.

    Two facts about casts are kept: whether the weight is applied before the cast back to the
    model's dtype (`wide_weight`), and whether there is a cast back at all.
    """
    for op in draft.each("mul"):
        for found in matches(_RMS_NORM, op.result):
            if _replace_rms_norm(draft, op, found):
                break
    draft.sweep()


def _replace_rms_norm(draft: Draft, op: Op, found: Match) -> bool:
    x, weight, offset = found.wires["x"], found.wires["weight"], 0.0
    if found.numbers["dims"] != [x.rank - 1]:
        return False
    if shifted := weight.made_by("shift"):
        weight, offset = uncast(shifted.operands[0]), float(shifted.attributes["term"])
    if weight.role != "parameter" or weight.dims != x.dims[-1:]:
        return False
    result = op.result
    wide = result.dtype != x.dtype
    back = [
        reader for reader in draft.readers(result)
        if reader.kind == "cast" and reader.result.dtype == x.dtype
    ]  # fmt: skip
    absorbed = wide and len(back) == len(draft.readers(result)) and result not in draft.outputs
    if wide and not absorbed:
        x = _in_dtype(draft, x, op)
    norm = draft.add(
        "rms_norm",
        [x, weight],
        x.dims,
        dtype=x.dtype,
        attributes={"eps": found.numbers["eps"], "offset": offset, "wide_weight": absorbed},
        module=op.module,
        before=op,
    )
    for old in [reader.result for reader in back] if absorbed else [result]:
        draft.redirect(old, norm.result)
    return True


def _in_dtype(draft: Draft, x: Wire, op: Op) -> Wire:
    """`x` in the dtype of the op's result."""
    dtype = op.result.dtype
    if x.dtype == dtype:
        return x
    cast = draft.add(
        "cast", [x], x.dims, dtype=dtype, attributes={"to": dtype}, module=op.module, before=op
    )
    return cast.result
