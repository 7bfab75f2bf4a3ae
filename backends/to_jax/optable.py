"""How each kind of op is written in JAX, as data: a new op is a line.

See `emission.language.fill` for what stands in braces and brackets. `@name` is a builder in
lines.py, for what depends on shapes or types.
"""

from __future__ import annotations

from ..emission.language import Template
from ..emission.optable import ALIKE


def _refused(kind: str) -> Template:
    reason = "the jax backend does not write mixtures of experts yet"
    return Template("", refused=f"op {kind!r}: {reason}")


def _call(function: str) -> Template:
    return Template(f"{function}({{0}})", role="pointwise")


_REDUCTION = "jnp.{name}({{0}}, axis={{dims}}[, keepdims={{keepdim}}])"

TEMPLATES: dict[str, Template] = {
    **ALIKE,
    # contractions
    "linear": Template("{0} @ {1}.T", name="@parameter"),
    # rotary embedding
    "constant": Template("jnp.asarray({value})", name="constant"),
    # mixtures of experts
    "top_k": _refused("top_k"),
    "moe_dispatch": _refused("moe_dispatch"),
    "moe_combine": _refused("moe_combine"),
    # reductions
    "sum": Template(_REDUCTION.format(name="sum"), defaults={"keepdim": False}),
    "mean": Template(_REDUCTION.format(name="mean"), defaults={"keepdim": False}),
    # views
    "expand": Template("@expand"),
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
    "leaky_relu": Template("nn.leaky_relu({0}, {slope})", role="pointwise"),
    "elu": Template("nn.elu({0}[, {alpha}])", role="pointwise", defaults={"alpha": 1.0}),
    "expm1": _call("jnp.expm1"),
    "log1p": _call("jnp.log1p"),
    "stop_gradient": _call("lax.stop_gradient"),
    "sort": Template("jnp.sort({0}, axis=-1)"),
    "erf": _call("lax.erf"),
    "abs": _call("jnp.abs"),
}
"""Kind → how it is written."""
