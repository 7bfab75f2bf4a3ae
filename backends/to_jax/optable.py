"""How each kind of op is written in JAX, as data: a new op is a line.

See `emission.language.fill` for what stands in braces and brackets. `@name` is a builder in
lines.py, for what depends on shapes or types.
"""

from __future__ import annotations

from ..emission.language import Template


def _refused(kind: str) -> Template:
    reason = "the jax backend does not write mixtures of experts yet"
    return Template("", refused=f"op {kind!r}: {reason}")


def _call(function: str) -> Template:
    return Template(f"{function}({{0}})", role="pointwise")


_REDUCTION = "jnp.{name}({{0}}, axis={{dims}}[, keepdims={{keepdim}}])"

TEMPLATES: dict[str, Template] = {
    # contractions
    "linear": Template("{0} @ {1}.T", name="@parameter"),
    "linear_io": Template("{0} @ {1}", name="@parameter"),
    "matmul": Template("{0} @ {1}", name="product"),
    "attention": Template("@attention", name="context"),
    # rotary embedding
    "rotary": Template("rotary({0}, {1}, {2}[, style={style}])", defaults={"style": "half"}),
    "rotary_table": Template(
        "@rotary_table", name="cos sin", defaults={"scaling": 1.0, "style": "half"}
    ),
    "positions": Template("@positions", name="positions"),
    "constant": Template("jnp.asarray({value})", name="constant"),
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
    "sum": Template(_REDUCTION.format(name="sum"), defaults={"keepdim": False}),
    "mean": Template(_REDUCTION.format(name="mean"), defaults={"keepdim": False}),
    # views
    "reshape": Template("@reshape", role="view"),
    "permute": Template("@permute", role="view"),
    "expand": Template("@expand"),
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
    "silu": _call("nn.silu"),
    "gelu": Template("@gelu", role="pointwise"),
    "relu": _call("nn.relu"),
    "softplus": _call("nn.softplus"),
    "tanh": _call("jnp.tanh"),
    "sigmoid": _call("nn.sigmoid"),
    "exp": _call("jnp.exp"),
    "log": _call("jnp.log"),
    "sqrt": _call("jnp.sqrt"),
    "rsqrt": _call("lax.rsqrt"),
    "erf": _call("lax.erf"),
    "abs": _call("jnp.abs"),
    "dropout": Template("@dropout"),
}
"""Kind → how it is written."""
