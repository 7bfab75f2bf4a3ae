"""How each kind of op is written in JAX, as data: a new op is a line.

See `emission.language.fill` for what stands in braces and brackets. `@name` is a builder in
lines.py, for what depends on shapes or types.
"""

from __future__ import annotations

from ..emission.language import Template
from ..emission.optable import ALIKE, call, mixtures_refused

_REDUCTION = "jnp.{name}({{0}}, axis={{dims}}[, keepdims={{keepdim}}])"

TEMPLATES: dict[str, Template] = {
    **ALIKE,
    # contractions
    "linear": Template("{0} @ {1}.T", name="@parameter"),
    # rotary embedding
    "constant": Template("jnp.asarray({value})", name="constant"),
    **mixtures_refused("jax"),
    # reductions
    "sum": Template(_REDUCTION.format(name="sum"), defaults={"keepdim": False}),
    "mean": Template(_REDUCTION.format(name="mean"), defaults={"keepdim": False}),
    # views
    "expand": Template("@expand"),
    # functions of one operand
    "silu": call("nn.silu"),
    "gelu": Template("@gelu", role="pointwise"),
    "relu": call("nn.relu"),
    "softplus": call("nn.softplus"),
    "tanh": call("jnp.tanh"),
    "sigmoid": call("nn.sigmoid"),
    "exp": call("jnp.exp"),
    "log": call("jnp.log"),
    "sqrt": call("jnp.sqrt"),
    "rsqrt": call("lax.rsqrt"),
    "leaky_relu": Template("nn.leaky_relu({0}, {slope})", role="pointwise"),
    "elu": Template("nn.elu({0}[, {alpha}])", role="pointwise", defaults={"alpha": 1.0}),
    "expm1": call("jnp.expm1"),
    "log1p": call("jnp.log1p"),
    "stop_gradient": call("lax.stop_gradient"),
    "sort": Template("jnp.sort({0}, axis=-1)"),
    "erf": call("lax.erf"),
    "abs": call("jnp.abs"),
}
"""Kind → how it is written."""
