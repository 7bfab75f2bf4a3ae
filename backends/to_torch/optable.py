"""How each kind of op is written in torch, as data: a new op is a line.

See `emission.language.fill` for what stands in braces and brackets. `@name` is a builder in
lines.py, for what depends on shapes or types.
"""

from __future__ import annotations

from ..emission.language import Template


def _refused(kind: str) -> Template:
    reason = "the torch backend does not write mixtures of experts yet"
    return Template("", refused=f"op {kind!r}: {reason}")


def _call(function: str) -> Template:
    return Template(f"{function}({{0}})", role="pointwise")


TEMPLATES: dict[str, Template] = {
    # contractions
    "linear": Template("@linear", name="@parameter"),
    "linear_io": Template("{0} @ {1}", name="@parameter"),
    "matmul": Template("{0} @ {1}", name="product"),
    "attention": Template("@attention", name="context"),
    # rotary embedding
    "rotary": Template("rotary({0}, {1}, {2}[, style={style}])", defaults={"style": "half"}),
    "rotary_table": Template(
        "@rotary_table", name="cos sin", defaults={"scaling": 1.0, "style": "half"}
    ),
    "positions": Template("@positions", name="positions"),
    "constant": Template("@constant", name="constant"),
    # normalisations
    "rms_norm": Template(
        "rms_norm({0}, {1}, eps={eps}[, offset={offset}][, wide_weight={wide_weight}])",
        name="@module",
        defaults={"offset": 0.0, "wide_weight": False},
    ),
    "layer_norm": Template("@layer_norm", name="@module"),
    "softmax": Template("softmax({0})"),
    # lookup
    "embedding": Template("@embedding", name="hidden"),
    # mixtures of experts
    "top_k": _refused("top_k"),
    "moe_dispatch": _refused("moe_dispatch"),
    "grouped_linear": Template("{0} @ {1}.mT", name="@parameter"),
    "moe_combine": _refused("moe_combine"),
    # losses
    "cross_entropy": Template("@cross_entropy", name="loss count"),
    "sum_loss": Template("sum_loss({0})", name="loss count"),
    "mean_loss": Template("sum_loss({0})", name="loss count"),
    "shift_labels": Template(
        "shift_labels({0}[, ignore_index={ignore_index}])", defaults={"ignore_index": -100}
    ),
    # reductions
    "sum": Template("{0}.sum({dims}[, keepdim={keepdim}])", defaults={"keepdim": False}),
    "mean": Template("{0}.mean({dims}[, keepdim={keepdim}])", defaults={"keepdim": False}),
    # views
    "reshape": Template("@reshape", role="view"),
    "permute": Template("@permute", role="view"),
    "expand": Template("@expand", role="view"),
    "chunk": Template("@chunk"),
    "slice": Template("@slice", role="view"),
    "concat": Template("@concat"),
    # arithmetic
    "add": Template("{0} + {1}", name="@stream"),
    "sub": Template("{0} - {1}", name="@stream"),
    "mul": Template("{0} * {1}"),
    "div": Template("{0} / {1}"),
    "scale": Template("{0} * {factor}"),
    "shift": Template("{0} + {term}"),
    "neg": Template("-{0}"),
    "power": Template("{0} ** {exponent}"),
    "cast": Template("@cast"),
    # functions of one operand
    "silu": _call("F.silu"),
    "gelu": Template(
        "F.gelu({0}[, approximate={approximate}])",
        role="pointwise",
        defaults={"approximate": "none"},
    ),
    "relu": _call("F.relu"),
    "softplus": _call("F.softplus"),
    "tanh": _call("torch.tanh"),
    "sigmoid": _call("torch.sigmoid"),
    "exp": _call("torch.exp"),
    "log": _call("torch.log"),
    "sqrt": _call("torch.sqrt"),
    "rsqrt": _call("torch.rsqrt"),
    "erf": _call("torch.erf"),
    "abs": _call("torch.abs"),
    "dropout": Template("@dropout"),
}
"""Kind → how it is written."""
