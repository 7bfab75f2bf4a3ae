"""The op table: what there is to know about each kind of op, as data.

A line gives the factor rule (or, where the rule depends on shapes, the name of the builder in
`shape_rules`), in which operands the op is linear, what it costs, and what it saves for the
backward pass. Signatures, FLOPs, bytes, sharded shapes and legality follow from it.

To add an op: add a line here, a line that says how a backend writes it, and, if the tracer meets
it under another name, a line in the tracer's table. The property tests cover it unasked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Linear = Literal["none", "sum", "product", "first"]
"""In which operands the op is linear: jointly in all (`sum`), in each one alone (`product`), in the
first one (`first`). Decides where partial sums (`P`) may pass through."""

Work = Literal[
    "contraction", "attention", "normalisation", "pointwise", "lookup", "dispatch", "loss", "view"
]
"""Class of work, for the cost model: `view` moves no data; `dispatch` moves tokens to their experts
and back."""


@dataclass(frozen=True, slots=True)
class OpKind:
    """One kind of op.

    `rules`: index notation, one per admissible number of operands, or `@builder`.
    `special`: factor → the type all results have when an axis splits that factor and the op
    communicates inside itself (a cross-entropy over a split vocabulary). Such factors are locked
    for ordinary signatures.
    `flops`: floating point operations per iteration of the whole loop nest.
    `saves`: what backward needs, `x0` = operand 0, `r0` = result 0, `+n` = n further values of the
    result's leading dims (norm statistics, log-sum-exp).
    """

    name: str
    rules: tuple[str, ...]
    linear: Linear
    work: Work
    flops: float
    saves: tuple[str, ...]
    special: tuple[tuple[str, Literal["I", "R"]], ...] = ()


def _line(
    name: str,
    rules: str | tuple[str, ...],
    linear: Linear,
    work: Work,
    flops: float,
    saves: str,
    special: tuple[tuple[str, Literal["I", "R"]], ...] = (),
) -> OpKind:
    rules = (rules,) if isinstance(rules, str) else rules
    return OpKind(name, rules, linear, work, flops, tuple(saves.split()), special)


_POINTWISE = [
    # name, linear, FLOPs per element, saved for backward
    ("add", "sum", 1, ""),
    ("sub", "sum", 1, ""),
    ("mul", "product", 1, "x0 x1"),
    ("div", "first", 1, "x0 x1"),
    ("scale", "sum", 1, ""),  # by a Python number, attribute `factor`
    ("shift", "none", 1, ""),  # plus a Python number, attribute `term`: affine, so never P
    ("neg", "sum", 1, ""),
    ("cast", "sum", 0, ""),  # attribute `to`: "model" or "wide"
    ("silu", "none", 5, "x0"),
    ("gelu", "none", 8, "x0"),  # attribute `approximate`: "none" or "tanh"
    ("relu", "none", 1, "r0"),
    ("tanh", "none", 6, "r0"),
    ("sigmoid", "none", 4, "r0"),
    ("exp", "none", 4, "r0"),
    ("log", "none", 4, "x0"),
    ("sqrt", "none", 2, "r0"),
    ("rsqrt", "none", 2, "r0"),
    ("erf", "none", 8, "x0"),
    ("abs", "none", 1, "x0"),
    ("power", "none", 2, "x0"),  # attribute `exponent`
    ("softplus", "none", 6, "x0"),
    ("leaky_relu", "none", 1, "x0"),  # attribute `slope`
    ("elu", "none", 5, "x0"),  # attribute `alpha`
    ("expm1", "none", 4, "r0"),
    ("log1p", "none", 4, "x0"),
    ("stop_gradient", "none", 0, ""),  # the result has no gradient
    ("dropout", "none", 2, ""),  # attribute `p`; mask drawn from the global element index
]

_LINES = [
    # contractions
    _line("linear", "... h, o h -> ... o", "product", "contraction", 2, "x0 x1"),
    _line("linear_io", "... h, h o -> ... o", "product", "contraction", 2, "x0 x1"),
    _line("matmul", "@matmul", "product", "contraction", 2, "x0 x1"),
    # attention: q, k, v and optionally a padding mask (bool, True = attend) over the keys.
    # attributes: causal, window (int or None), scale, softcap (float or None), dropout
    _line(
        "attention",
        (
            "b (k g) s d, b k t d, b k t e -> b (k g) s e; s! t! d! e!",
            "b (k g) s d, b k t d, b k t e, b t -> b (k g) s e; s! t! d! e!",
        ),
        "none",
        "attention",
        2,
        "x0 x1 x2 r0 +1",
    ),
    # rotary embedding: x, cos, sin (tables of one row per position). attribute style: half
    _line(
        "rotary",
        (
            "b n s d, 1 s d, 1 s d -> b n s d; d!",
            "b n s d, b s d, b s d -> b n s d; d!",
        ),
        "none",
        "pointwise",
        3,
        "x1 x2",
    ),
    # rotary tables from positions: attributes inv_freq (list), scaling
    _line(
        "rotary_table",
        ("s -> 1 s d, 1 s d; d!", "b s -> b s d, b s d; d!"),
        "none",
        "pointwise",
        8,
        "",
    ),
    _line("positions", "@fixed", "none", "pointwise", 1, ""),  # 0 … s-1
    _line("constant", "@fixed", "none", "view", 0, ""),
    # normalisations over the last dim. attributes eps, offset (weight is stored minus this),
    # wide_weight (the weight is applied before casting back)
    _line("rms_norm", "... h, h -> ... h; h!", "none", "normalisation", 5, "x0 x1 +1"),
    _line(
        "layer_norm",
        ("... h, h, h -> ... h; h!", "... h, h -> ... h; h!", "... h -> ... h; h!"),
        "none",
        "normalisation",
        7,
        "x0 x1 +2",
    ),
    _line("softmax", "... h -> ... h; h!", "none", "normalisation", 8, "r0"),
    # along the last dim
    _line("cumsum", "... h -> ... h; h!", "sum", "pointwise", 1, ""),
    _line("sort", "... h -> ... h; h!", "none", "pointwise", 8, "r0"),  # ascending
    # lookup: a split vocabulary looks up what it has and leaves partial sums
    _line("embedding", "v h, ... -> ... h", "first", "lookup", 0, "x1"),
    # mixtures of experts. Every expert has c slots for each sequence, which take its tokens in
    # order; a token beyond them is left out (GShard, arXiv:2006.16868, section 2.2). With c as
    # large as the load, none is. Which slot a token takes depends on those before it: s is locked.
    # top_k: scores -> scores of the k largest and 0 elsewhere; which these are. attribute k
    _line("top_k", "... e -> ... e, ... e; e!", "none", "normalisation", 1, "r1"),
    # tokens and who chose them -> slots. attributes (here and in moe_combine) experts, top_k
    _line("moe_dispatch", "b s h, b s e -> e (b c) h; s! c!", "first", "dispatch", 0, "x1"),
    _line("grouped_linear", "e c h, e o h -> e c o", "product", "contraction", 2, "x0 x1"),
    _line("grouped_linear_io", "e c h, e h o -> e c o", "product", "contraction", 2, "x0 x1"),
    # slots, gates, who chose them -> the sum of a token's slots times their gates
    _line(
        "moe_combine",
        "e (b c) h, b s e, b s e -> b s h; s! c!",
        "product",
        "dispatch",
        0,
        "x0 x1 x2",
    ),
    # losses: the sum over terms and the count of terms
    _line("cross_entropy", "... v, ... -> , ; v!", "none", "loss", 8, "x0 x1 +1", (("v", "I"),)),
    # sum over all elements, count 1: locked, as every part of a split batch would count 1 again
    _line("sum_loss", "@reduce_all_locked", "sum", "loss", 1, ""),
    _line("mean_loss", "@reduce_all", "sum", "loss", 1, ""),  # sum, count of elements
    _line("shift_labels", "b s -> b s; s!", "none", "pointwise", 1, ""),  # attribute ignore_index
    # reductions. attributes dims, keepdim
    _line("sum", "@reduce", "sum", "pointwise", 1, ""),
    _line("mean", "@reduce_locked", "sum", "pointwise", 1, ""),
    # views
    _line("reshape", "@reshape", "sum", "view", 0, ""),
    _line("permute", "@permute", "sum", "view", 0, ""),  # attribute order
    _line("expand", "@expand", "sum", "view", 0, ""),
    _line("chunk", "@chunk", "sum", "view", 0, ""),  # attributes dim, count: equal pieces
    _line("slice", "@slice", "sum", "view", 0, ""),  # attributes dim, start, stop (negative: end)
    _line("concat", "@concat", "sum", "view", 0, ""),  # attribute dim
]

TABLE: dict[str, OpKind] = {
    line.name: line
    for line in [
        *_LINES,
        *(_line(n, "@broadcast", lin, "pointwise", f, s) for n, lin, f, s in _POINTWISE),  # type: ignore[arg-type]
    ]
}
"""Kind name → its line."""
