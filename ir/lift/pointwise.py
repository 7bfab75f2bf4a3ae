"""Formulas that are one op: RMS norm in all its spellings, GELU and SiLU."""

from __future__ import annotations

from .draft import Draft, Op, Wire, ancestors, uncast
from .patterns import Match, match, matches

_INVERSE_ROOT = """
rsqrt(shift(mean(power(x, exponent=2), dims=dims), term=eps))
| power(shift(mean(power(x, exponent=2), dims=dims), term=eps), exponent=-0.5)
"""
_ROOT = """
sqrt(shift(mean(power(x, exponent=2), dims=dims), term=eps))
| power(shift(mean(power(x, exponent=2), dims=dims), term=eps), exponent=0.5)
"""
_RMS_NORM = (
    f"mul(mul(x, ({_INVERSE_ROOT})), weight) | mul(div(x, ({_ROOT})), weight)"
    f" | mul(x, mul(({_INVERSE_ROOT}), weight))"
)
_RMS_NORM = " ".join(_RMS_NORM.split())

_GELU_TANH = """
shift(tanh(scale(add(x, scale(power(x, exponent=3), factor=0.044715)), factor=0.7978845608)),
      term=1)
"""
_GELU = "shift(erf(scale(x, factor=0.70710678)), term=1)"
_ERFC = "erfc(scale(neg(x), factor=0.70710678)) | erfc(neg(scale(x, factor=0.70710678)))"
_ERFC += " | erfc(scale(x, factor=-0.70710678))"

_FORMULAS = {
    "gelu_tanh": (
        f"mul(scale(x, factor=0.5), {_GELU_TANH}) | scale(mul(x, {_GELU_TANH}), factor=0.5)"
        f" | mul(x, scale({_GELU_TANH}, factor=0.5))"
    ),
    "gelu": (
        f"mul(scale(x, factor=0.5), {_GELU}) | scale(mul(x, {_GELU}), factor=0.5)"
        f" | mul(scale(x, factor=0.5), ({_ERFC})) | scale(mul(x, ({_ERFC})), factor=0.5)"
        f" | mul(x, scale(({_ERFC}), factor=0.5))"
    ),
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


def lift_softplus(draft: Draft) -> None:
    """log(1 + exp(x)) as JAX writes it, with its guard against what is no number."""
    for op in draft.each("jax.select_n"):
        guard = op.operands[0].made_by("jax.ne")
        found = match("add(relu(x), log1p(exp(neg(abs(x)))))", op.operands[1])
        if guard is None or found is None or guard.operands[0] is not guard.operands[1]:
            continue
        made = draft.add(
            "softplus", [found.wires["x"]], op.result.dims, module=op.module, before=op
        )
        draft.stand_in(op, made.result)
    draft.sweep()


def lift_dropout(draft: Draft) -> None:
    """where(random, x / keep, 0) becomes `dropout`."""
    for op in draft.each("torch.keep"):
        scaled = op.operands[0].made_by("scale")
        if scaled is None or op.attributes.get("value") != 0 or scaled.attributes["factor"] <= 1:
            continue
        made_by = {wire.producer.kind for wire in ancestors([op.operands[1]]) if wire.producer}
        if made_by.isdisjoint(_RANDOM):
            continue
        made = draft.add(
            "dropout", scaled.operands[:1], op.result.dims, module=op.module, before=op,
            attributes={"p": 1 - 1 / scaled.attributes["factor"]},
        )  # fmt: skip
        draft.stand_in(op, made.result)
    draft.sweep()


_RANDOM = frozenset({"jax.random_bits", "jax.threefry2x32"})


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
    result = op.result
    if weight.role != "parameter" or weight.dims != x.dims[-1:] or x.dims != result.dims:
        return False
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
